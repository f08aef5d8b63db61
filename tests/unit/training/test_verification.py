"""The comparison of shards in the background, on one rank."""

import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.shards import Corpus, CorpusError
from maskvr_ds.data.loader import read_rows
from maskvr_ds.data.mixture import open_mixture
from maskvr_ds.runtime import distributed
from maskvr_ds.training.verification import BackgroundVerification
from tests.support.corpora import change_manifest, make_corpus


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def test_without_corpora_nothing_happens() -> None:
    verification = BackgroundVerification((None,))
    assert verification.flags is None
    verification.after_step(1, None)
    verification.wait(1)
    verification.cancel()


def test_flags_end_once_all_shards_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        verification = BackgroundVerification((Corpus(make_corpus(tmp_path / "corpus")), None))
        verification._thread.join()
        assert verification.flags == (False, False)
        verification.after_step(1, torch.tensor([0, 0]))
        assert verification.flags is not None, "figures of a step are read one step later"
        verification.after_step(2, torch.tensor([0, 0]))
    assert verification.flags is None
    assert "comparing 3 shards (0.00 GB)" in caplog.text
    assert "step 2: all 3 shards (0.00 GB) match their SHA-256" in caplog.text
    verification.after_step(3, None)
    verification.wait(3)


def test_every_shard_of_a_mixture_is_compared(tmp_path: Path) -> None:
    first, second = (make_corpus(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    flip(second / "shard-00002.arrow")
    verification = BackgroundVerification((open_mixture([(first, 1.0), (second, 2.0)]),))
    with pytest.raises(CorpusError, match=r"/b/shard-00002\.arrow: sha256 .* Found at step 5, in the background"):
        verification.wait(5)
    assert verification.flags == (False, True)


def test_all_ranks_must_have_compared_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verification = BackgroundVerification((Corpus(make_corpus(tmp_path / "corpus")),))
    verification._thread.join()
    answers = [[False, True], [False, False]]
    monkeypatch.setattr(distributed, "gather_objects", lambda value: answers.pop(0) if value is False else [None])
    verification.wait(4)
    assert not answers


def test_cancelling_ends_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(make_corpus(tmp_path / "corpus"))
    verify = Corpus.verify

    def endless(corpus: Corpus, indices: list[int], progress: object) -> None:
        while True:
            verify(corpus, indices, progress)  # type: ignore[arg-type]
            time.sleep(0.01)

    monkeypatch.setattr(Corpus, "verify", endless)
    verification = BackgroundVerification((corpus,))
    assert verification.flags == (True, False)
    verification.cancel()
    assert not verification._thread.is_alive()


def test_ids_beyond_the_vocabulary_are_named_when_they_are_read(tmp_path: Path) -> None:
    """An embedding would raise an error without a file, or none on a GPU, before the shard is compared."""
    folder = make_corpus(tmp_path / "corpus", words=20)
    corpus = Corpus(folder)
    highest = int(corpus.input_ids(1).max())
    row = int((corpus.input_ids(1) == highest).any(axis=1).argmax())
    change_manifest(folder, lambda manifest: manifest.update(vocab_size=highest))
    corpus = Corpus(folder)
    rows = np.arange(100, 100 + row + 1)
    with pytest.raises(CorpusError, match=rf"shard-00001\.arrow: row {row} has id {highest}, must be below the voc"):
        read_rows(corpus, rows, np.zeros_like(rows))
    if row:
        read_rows(corpus, rows[:-1], np.zeros_like(rows[:-1]))
