"""Mixtures of corpora: weights hold exactly, for any number of ranks and from any sample on."""

import copy
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.config import ConfigError, RunConfig, dump_config, load_config
from maskvr_ds.data.loader import Loader, RepeatSchedule, sample_rows
from maskvr_ds.data.mixture import Mixture, Share, corpora_identity, open_mixture
from maskvr_ds.training.references import open_corpora
from tests.support.corpora import make_corpus

LENGTH = 16


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("three")
    made = [make_corpus(folder / str(n), rows=n, length=LENGTH, shard_rows=60, seed=n) for n in (257, 50, 81)]
    for n, path in zip((20, 30, 40), made, strict=True):
        make_corpus(path / "held_out", rows=n, length=LENGTH, seed=n)
    return list(map(Corpus, made))


def identities(batch: Any) -> list[tuple[int, int]]:
    return sorted(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True))


def joined(corpora: list[Corpus]) -> np.ndarray:
    return np.concatenate([c.input_ids(i) for c in corpora for i in range(len(c.manifest.shards))])


def test_a_mixture_of_even_weights_is_one_corpus_of_all_rows(three: list[Corpus]) -> None:
    """The same batches as from one folder with all shards; a mixture of one corpus equals the corpus."""
    rows = sum(corpus.rows for corpus in three)
    mixture, table = Mixture(three, [1, 1, 1]), joined(three)
    assert (mixture.rows, mixture.manifest.rows, len(mixture.manifest.shards)) == (rows, rows, 5 + 1 + 2)
    for step, batch in enumerate(islice(Loader(mixture, seed=3, global_size=40).batches(), 25)):
        expected = sample_rows(np.arange(step * 40, (step + 1) * 40), rows, seed=3)
        assert identities(batch) == sorted(zip(expected[1].tolist(), expected[0].tolist(), strict=True))
        assert np.array_equal(batch.input_ids.numpy(), table[batch.sample_ids.numpy()])
    assert type(open_mixture([(three[1].folder, 1.0)])) is Corpus
    alone = [next(Loader(c, seed=5, global_size=50).batches()) for c in (three[1], Mixture(three[1:2], [1]))]
    assert torch.equal(alone[0].input_ids, alone[1].input_ids)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0.01, 4)), min_size=1, max_size=4),
    st.integers(0, 1 << 40),
    st.integers(1, 3),
)
def test_weights_hold_exactly(corpora: list[tuple[int, float]], seed: int, copies: int) -> None:
    """Every epoch has round(w N) rows of each corpus, every pass has every row once, in a different order."""
    shares = [Share(n, max(1, round(w * n))) for n, w in corpora]
    total, epochs = sum(share.slots for share in shares), 7
    rows, passes = sample_rows(np.arange(epochs * total * copies), shares, seed, RepeatSchedule(copies))
    assert len(set(zip(rows.tolist(), passes.tolist(), strict=True))) == len(rows)
    bounds = np.cumsum([0, *(share.rows for share in shares)])
    of = np.searchsorted(bounds, rows, side="right") - 1
    for number, share in enumerate(shares):
        mine = of == number
        assert mine.reshape(epochs, -1).sum(1).tolist() == [share.slots * copies] * epochs
        complete, rest = divmod(epochs * share.slots, share.rows)
        readings = np.bincount(passes[mine] // copies, minlength=complete + 1)
        assert readings.tolist() == [share.rows * copies] * complete + [rest * copies]
    # Samples can be computed one at a time: there is no state.
    at = seed % len(rows)
    assert sample_rows(np.array([at]), shares, seed, RepeatSchedule(copies)) == (rows[at], passes[at])


def test_corpora_are_in_proportion_and_reshuffled_each_pass() -> None:
    """4,000 rows at weight 0.5, 2,000 at 1 and 400 at 2.5: 2 : 2 : 1 in any part of an epoch, passes shuffled."""
    shares = [Share(4000, 2000), Share(2000, 2000), Share(400, 1000)]
    rows, passes = sample_rows(np.arange(20_000), shares, seed=1)
    of = np.searchsorted([4000, 6000], rows, side="right")
    for repeats in np.split(of, 8):
        counts = np.bincount(repeats, minlength=3) / len(repeats)
        assert np.abs(counts - (0.4, 0.4, 0.2)).max() < 0.05
    # Half a pass reads rows from all over the corpus, and a different half in the next pass.
    halves = [rows[(of == 0) & (passes == p)][:2000] for p in (0, 1)]
    assert all(1800 < np.median(half) < 2200 for half in halves)
    assert 800 < len(set(halves[0].tolist()) & set(halves[1].tolist())) < 1200


def test_ranks_share_a_mixture(three: list[Corpus]) -> None:
    mixture, table = Mixture(three, [0.3, 2, 1.5]), joined(three)
    alone = Loader(mixture, seed=9, global_size=24)
    full = [identities(batch) for batch in islice(alone.batches(), 40)]
    for world_size in (2, 3):
        parts = [
            list(islice(Loader(mixture, seed=9, global_size=24, rank=r, world_size=world_size).batches(24 * 7), 33))
            for r in range(world_size)
        ]
        assert [sorted(pair for part in parts for pair in identities(part[step])) for step in range(33)] == full[7:]
        for batch in parts[0]:
            assert np.array_equal(batch.input_ids.numpy(), table[batch.sample_ids.numpy()])


def test_a_copy_is_the_same_mixture(three: list[Corpus]) -> None:
    mixture = Mixture(three, [1.5, 0.37, 2.0])
    for copied in (pickle.loads(pickle.dumps(mixture)), copy.deepcopy(mixture)):
        assert copied.shares == mixture.shares
        assert corpora_identity(copied) == corpora_identity(mixture)
        rows = np.arange(mixture.rows)
        buffers = [np.empty((mixture.rows, mixture.sequence_length), mixture.dtype) for _ in range(2)]
        for corpus, buffer in zip((mixture, copied), buffers, strict=True):
            corpus.take(rows, buffer)
        assert np.array_equal(*buffers)


def test_incompatible_corpora_are_refused(three: list[Corpus], tmp_path: Path) -> None:
    longer = Corpus(make_corpus(tmp_path / "longer", rows=10, length=LENGTH * 2))
    other = Corpus(make_corpus(tmp_path / "other", rows=10, length=LENGTH, words=100))
    (tmp_path / "link").symlink_to(three[1].folder)
    for corpus, message in (
        (longer, "longer: sequence_length 32 differs from 16 of .*one sequence length"),
        (other, "other: tokenizer_sha256 .* differs from"),
        (Corpus(tmp_path / "link"), "link is listed twice in the mixture; list it once, with a weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mixture([*three, corpus], [1, 1, 1, 1])


def test_a_mixture_names_every_bad_shard(three: list[Corpus], tmp_path: Path) -> None:
    folders = [make_corpus(tmp_path / str(n), rows=n, length=LENGTH, shard_rows=30) for n in (40, 80)]
    mixture = open_mixture([(folder, 1.0) for folder in folders])
    mixture.verify()
    for path in (folders[0] / "shard-00001.arrow", folders[1] / "shard-00002.arrow"):
        path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    mixture.verify([0, 2, 3])
    for wanted, bad in ((None, 2), ([1, 2], 1), ([4], 1)):
        with pytest.raises(ValueError, match="sha256") as caught:
            mixture.verify(wanted)
        assert len(str(caught.value).splitlines()) == bad


def configuration(**data: Any) -> dict[str, Any]:
    return {"output_dir": "run", "data": data, "training": {"steps": 10}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixture": [{"path": "a", "weight": 0}]}, r"data\.mixture\.0\.weight\s+Input should be greater than 0"),
        ({"mixture": [{"path": "a"}, {"path": "b", "weight": -1}]}, r"mixture\.1\.weight\s+Input should be greater"),
        ({"mixture": [{"path": "a", "weight": float("nan")}]}, r"mixture\.0\.weight\s+Input should be"),
        ({"mixture": [{"path": "a", "weight": 1e6}]}, "weight\\s+Input should be less than or equal to 1000"),
        ({"mixture": [{"weight": 1}]}, r"mixture\.0\.path\s+Field required"),
        ({"path": "a", "mixture": [{"path": "b"}]}, "path a and mixture are both given; remove one of them"),
        ({}, "path: required, but not given; name the folder of a corpus"),
        ({"mixture": []}, "path: required"),
    ],
)
def test_bad_mixtures(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(configuration(**data))


def test_a_mixture_is_declared_dumped_and_opened(three: list[Corpus], tmp_path: Path) -> None:
    mixture = [{"path": str(three[0].folder), "weight": 0.5}, {"path": str(three[1].folder)}]
    config = RunConfig.model_validate(configuration(mixture=mixture))
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config
    changed = load_config(tmp_path / "run.yaml", ["data.mixture.1.weight=3"])
    assert [entry.weight for entry in changed.data.corpora] == [0.5, 3]
    corpus, held_out = open_corpora(config)
    assert isinstance(corpus, Mixture)
    assert corpus.shares == (Share(257, 128), Share(50, 50))
    # The held-out split is that of each corpus, with equal weights.
    assert held_out is not None
    assert held_out.rows == 20 + 30
    table = joined([Corpus(corpus.folder / "held_out") for corpus in three[:2]])
    found = np.empty((50, LENGTH), held_out.dtype)
    held_out.take(np.arange(50), out=found)
    assert np.array_equal(found, table)
    bare = make_corpus(tmp_path / "bare", rows=9, length=LENGTH)
    config = RunConfig.model_validate(configuration(mixture=[*mixture, {"path": str(bare)}]))
    with pytest.raises(ConfigError, match="bare/held_out: no held-out corpus"):
        open_corpora(config)


def test_phases_have_mixtures_of_their_own() -> None:
    start = {"moments": "keep", "step_counter": "keep", "schedule": "restart"}
    mixture = [{"path": "b", "weight": 2}, {"path": "c"}]
    phases = [
        {"name": "short", "data": {"mixture": mixture}, "training": {"steps": 5}},
        {"name": "long", "data": {"path": "a"}, "training": {"steps": 7}, "start": start},
    ]
    for order in (phases, [phases[1] | {"start": None}, phases[0] | {"start": start}]):
        config = RunConfig.model_validate({"output_dir": "run", "phases": order})
        corpora = {phase.name: config.phase(i).data.corpora for i, phase in enumerate(config.phases)}
        assert [str(entry.path) for entry in corpora["short"]] == ["b", "c"]
        assert [str(entry.path) for entry in corpora["long"]] == ["a"]
        assert config.data.corpora == config.phase(0).data.corpora
    with pytest.raises(ValidationError, match=r"data\.mixture: set by each phase"):
        RunConfig.model_validate({"output_dir": "run", "phases": phases, "data": {"mixture": mixture}})


@pytest.mark.parametrize("weight", [0.001, 0.3, 0.505, 0.999, 1.7, 3.0])
def test_slots_are_the_nearest_number_to_weight_times_rows(three: list[Corpus], weight: float) -> None:
    for share, corpus in zip(Mixture(three, [weight] * 3).shares, three, strict=True):
        assert share.rows == corpus.rows
        assert share.slots == 1 or abs(share.slots - weight * corpus.rows) <= 0.5


def test_identity_covers_shards_order_and_weights(three: list[Corpus]) -> None:
    """A run must not resume with a different mixture."""
    alone = corpora_identity(three[1])
    assert alone == {"shards": hashing.fold(0, *(int(s.sha256, 16) for s in three[1].manifest.shards))}
    mixtures = [
        Mixture(three, [1, 1, 1]),
        Mixture(three, [1, 1, 2]),
        Mixture([three[0], three[2], three[1]], [1, 1, 1]),
        Mixture(three[:2], [1, 1]),
        Mixture(three[1:2], [0.5]),
    ]
    found = [alone, *map(corpora_identity, mixtures)]
    assert len({identity["shards"] for identity in found}) == len(found)
    assert found[2]["mixture"] == [[257, 257], [50, 50], [81, 162]]
