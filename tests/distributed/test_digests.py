"""Digests on real gloo ranks: equal for any layout, and different if one token, mask, corruption or weight differs."""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.manifest import read_manifest
from data_pipeline.shards import Corpus, write_shard
from maskvr_ds import hashing
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.data.loader import Loader
from maskvr_ds.masking.masker import Masker, data_digest, mask_digest
from maskvr_ds.masking.strategies import Parameters
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.layout import MANIFEST
from maskvr_ds.runtime import distributed
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, train_all
from tests.support.corpora import change_manifest, make_corpus

STEPS, GLOBAL, ROWS = 6, 24, 60
KINDS = ("position", "input", "weight")
SEEDS = range(5)


def changed(masked: MaskedBatch, micro: TokenBatch, kind: str, seed: int) -> MaskedBatch:
    """One change in one row of the global batch of step `seed` mod STEPS, wherever that row is read."""
    drawn = random.Random(f"{kind} {seed}")
    target, place = drawn.randrange(ROWS), drawn.random()
    masked = masked.map(torch.clone)
    for row in torch.nonzero(micro.sample_ids == target).squeeze(1).tolist():
        slots = torch.nonzero(masked.weights[row]).squeeze(1).tolist()
        if kind == "position":
            free = sorted(set(range(masked.input_ids.shape[1])) - set(masked.positions[row].tolist()))
            masked.positions[row, slots[int(place * len(slots))]] = free[int(place * len(free))]
        elif kind == "input":
            masked.input_ids[row, int(place * masked.input_ids.shape[1])] += 1
        else:
            masked.weights[row, slots[int(place * len(slots))]] *= 1 + place / 8 + 2**-14
    return masked


def digests(folder: Path, micro_size: int) -> dict[str, list[tuple[int, int]]]:
    """On a rank: (data digest, mask digest) of the first steps, all-reduced: unchanged, and with each change."""
    distributed.initialize()
    corpus = Corpus(folder)
    scores = (torch.arange(corpus.manifest.vocab_size) + 1.0).double() ** -0.5
    masker = Masker.for_corpus(
        corpus.manifest, seed=5, strategy="frequency", parameters=Parameters(token_scores=scores, floor=0.3)
    )
    ranks = distributed.world_size()
    loader = Loader(corpus, seed=2, global_size=GLOBAL, rank=distributed.rank(), world_size=ranks)
    names = ["none", *(f"{kind} {seed}" for kind in KINDS for seed in SEEDS)]
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    for _, batch in zip(range(STEPS), loader.batches(), strict=False):
        micro_batches = list(batch.split(micro_size))
        masks = [masker(micro) for micro in micro_batches]
        for name in names:
            kind, _, seed = name.partition(" ")
            total = data_digest(batch)
            masked = masks
            if kind != "none":
                masked = [changed(m, micro, kind, int(seed)) for m, micro in zip(masks, micro_batches, strict=True)]
            terms = [mask_digest(micro, m) for micro, m in zip(micro_batches, masked, strict=True)]
            sums = torch.stack([total, torch.stack(terms).sum()])
            distributed.all_reduce_sum(sums)
            found[name].append((int(sums[0]), int(sums[1])))
    return found


def with_token(folder: Path, row: int, place: int) -> tuple[int, int]:
    """Change one token of the corpus, hashes included; returns the id before and after."""
    corpus = Corpus(folder)
    ids, ends = corpus.input_ids(0).copy(), corpus.document_end(0)
    before = int(ids[row, place])
    ids[row, place] = 5 + (before - 4) % 20
    entry = write_shard(folder, "shard-00000.arrow", ids, ends)
    change_manifest(folder, lambda m: m["shards"].__setitem__(0, entry.model_dump(exclude={"length"})))
    return before, int(ids[row, place])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of ROWS rows; one like it with another token in row 11."""
    folder = tmp_path_factory.mktemp("corpora")
    make_corpus(folder / "one", rows=ROWS, words=20, padded_last_row=True)
    shutil.copytree(folder / "one", folder / "other")
    before, after = with_token(folder / "other", 11, 4)
    assert before != after
    return folder


@pytest.fixture(scope="module")
def found(corpora: Path) -> dict[tuple[str, int], dict[str, list[tuple[int, int]]]]:
    """(corpus, ranks) → `digests`; the same on all ranks."""
    answers = {}
    for name, ranks, micro_size in (("one", 1, 24), ("one", 2, 5), ("one", 3, 2), ("other", 1, 7), ("other", 2, 12)):
        of_ranks = run_ranks(digests, ranks, corpora / name, micro_size)
        assert all(answer == of_ranks[0] for answer in of_ranks)
        answers[name, ranks] = of_ranks[0]
    return answers


def test_equal_for_all_layouts_with_and_without_changes(found: dict[tuple[str, int], Any]) -> None:
    assert found["one", 1] == found["one", 2] == found["one", 3]
    assert found["other", 1] == found["other", 2]


@pytest.mark.parametrize("kind", KINDS)
def test_one_change_of_a_mask_changes_the_mask_digest_of_the_steps_with_that_row(
    kind: str, found: dict[tuple[str, int], Any], corpora: Path
) -> None:
    rows = [set(batch.sample_ids.tolist()) for batch in _batches(corpora / "one")]
    answers = found["one", 2]
    for seed in SEEDS:
        target = random.Random(f"{kind} {seed}").randrange(ROWS)
        for step, (plain, other) in enumerate(zip(answers["none"], answers[f"{kind} {seed}"], strict=True)):
            assert plain[0] == other[0], "the data is the same"
            assert (plain[1] != other[1]) == (target in rows[step])
    of_step = {tuple(answers[f"{kind} {seed}"]) for seed in SEEDS}
    assert len(of_step) == len(SEEDS), "different changes have different digests"


def test_one_token_changes_the_data_digest_of_the_steps_with_its_row(
    found: dict[tuple[str, int], Any], corpora: Path
) -> None:
    rows = [set(batch.sample_ids.tolist()) for batch in _batches(corpora / "one")]
    for step, (one, other) in enumerate(zip(found["one", 2]["none"], found["other", 2]["none"], strict=True)):
        assert (one[0] != other[0]) == (11 in rows[step])
        assert (one[1] != other[1]) == (11 in rows[step]), "the model reads another input too"


def _batches(folder: Path) -> list[TokenBatch]:
    loader = Loader(Corpus(folder), seed=2, global_size=GLOBAL)
    return [batch for _, batch in zip(range(STEPS), loader.batches(), strict=False)]


def test_a_run_resumed_from_earlier_digests_says_so_once(corpora: Path, tmp_path: Path) -> None:
    """And one whose manifest then changes its mask id, without a hash that would tell, is refused."""
    corpus = shutil.copytree(corpora / "one", tmp_path / "corpus")
    shutil.copytree(corpora / "one", corpus / "held_out")
    run = tmp_path / "run"
    values = configuration(run, corpus, steps=4, model=NO_DROPOUT, schedule={"warmup_steps": 1})
    assert run_ranks(train_all, 1, [(values, None)]) == [[None]]
    assert column(run, "digest_version") == [(hashing.DIGEST_VERSION,)] * 4
    (folder,) = checkpoints.complete_checkpoints(run)
    assert checkpoints.read_state(folder).digests == hashing.DIGEST_VERSION
    # As an earlier version would have written it.
    state = checkpoints.read_state(folder)
    identity = {key: value for key, value in state.identity.items() if key not in ("special_tokens", "vocab_size")}
    content = {key: value for key, value in vars(replace(state, identity=identity)).items() if key != "digests"}
    (folder / MANIFEST).unlink()
    checkpoints.write_manifest(folder, content)
    assert checkpoints.read_state(folder).digests == 1
    values["training"]["steps"] = 6
    ((said,),) = run_ranks(resumed_messages, 1, values)
    assert said.count("digests up to step 4 are of version 1, those after it of version 2") == 1
    assert len(column(run, "step")) == 6
    values["training"]["steps"] = 8
    for part in (corpus, corpus / "held_out"):
        mask = read_manifest(part).special_tokens.mask
        change_manifest(part, lambda m, mask=mask: m["special_tokens"].update(mask=mask + 9), hashed=False)
    ((outcome,),) = run_ranks(train_all, 1, [(values, "auto")])
    assert "special_tokens.mask was 4, is 13" in outcome


def resumed_messages(values: dict[str, Any]) -> list[str]:
    """On a rank: resume the run; returns what was logged."""
    import logging

    from maskvr_ds import train
    from maskvr_ds.config import RunConfig

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("maskvr_ds")
    logger.addHandler(Keep())
    logger.setLevel(logging.INFO)
    train.plot_loss = lambda *_: None
    distributed.initialize()
    train.train(RunConfig.model_validate(values), "auto")
    return ["\n".join(messages)]


def test_a_changed_mask_id_is_refused_at_start(corpora: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(corpora / "one", tmp_path / "corpus")
    path = corpus / "manifest.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"mask": 4', '"mask": 13'), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    values = configuration(
        tmp_path / "run", corpus, steps=2, schedule={"warmup_steps": 1}, evaluation={"every_steps": 0}
    )
    ((outcome,),) = run_ranks(train_all, 1, [(values, None)])
    assert outcome.startswith(f"CorpusError: {path}: sha256 ")
    assert not (tmp_path / "run").exists()
