"""Whether a corpus has tokens to predict."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shards import Corpus, id_dtype
from maskvr_ds.config import ConfigError, load_config
from maskvr_ds.masking.checks import check_maskable
from maskvr_ds.training.references import held_out_rows, open_corpora
from tests.support.corpora import UNK, make_corpus

LENGTH = 8


class Rows(Corpus):
    """ids [R, L] as a corpus."""

    def __init__(self, like: Corpus, ids: np.ndarray) -> None:
        self.folder, self.manifest, self.dtype = like.folder, like.manifest, like.dtype
        self.rows, self.sequence_length = ids.shape
        self._views, self._bounds = [ids], np.array([0, len(ids)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(make_corpus(tmp_path_factory.mktemp("data") / "corpus", rows=9, length=LENGTH, words=50))


@given(st.integers(1, 900), st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, LENGTH - 2)), max_size=3))
def test_one_ordinary_token_is_enough(corpus: Corpus, number: int, ordinary: list[tuple[int, int]]) -> None:
    """For any number of rows, and any of them with an ordinary token: an error if the chosen rows have none."""
    ids = np.full((number, LENGTH), UNK, id_dtype(corpus.manifest.vocab_size))
    for row, place in ordinary:
        ids[row % number, place] = 5
    rows = Rows(corpus, ids)
    chosen = held_out_rows(rows, 300)
    assert len(set(chosen.tolist())) == min(number, 300)
    if (ids[chosen] == 5).any():
        check_maskable(rows, chosen, "evaluation", "remedy")
    else:
        with pytest.raises(ConfigError, match=rf"all tokens of its {len(chosen)} rows for evaluation .*; remedy"):
            check_maskable(rows, chosen, "evaluation", "remedy")


def test_every_corpus_of_a_mixture_and_only_evaluated_rows(tmp_path: Path) -> None:
    good = make_corpus(tmp_path / "good", rows=20)
    bad = make_corpus(tmp_path / "bad", rows=20, unknown=True)
    held_out = make_corpus(tmp_path / "held_out", rows=20, unknown=True)
    base = ["output_dir=x", f"data.held_out_path={held_out}", f"data.path={good}"]
    with pytest.raises(ConfigError, match=r"held_out: nothing to predict: all tokens of its 20 rows for evaluation"):
        open_corpora(load_config("demo_cpu", base))
    with pytest.raises(
        ConfigError, match=r"its 7 rows for evaluation .*\); raise evaluation.rows, set data.held_out_path"
    ):
        open_corpora(load_config("demo_cpu", [*base, "evaluation.rows=7"]))
    open_corpora(load_config("demo_cpu", [*base, "evaluation.every_steps=0"]))
    mixture = f"data.mixture=[{{path: {good}, weight: 1}}, {{path: {bad}, weight: 2}}]"
    with pytest.raises(ConfigError, match=r"bad: nothing to predict: all tokens of its 20 rows for training"):
        open_corpora(load_config("demo_cpu", [*base[:2], "data.path=null", mixture]))
