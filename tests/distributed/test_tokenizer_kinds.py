"""Training on a corpus whose ids need 32 bits, on real ranks."""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.build import build
from data_pipeline.shards import Corpus
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, train_all
from tests.support.documents import make_documents, write_text
from tests.support.tokenizers import enlarge, save


def test_vocabulary_beyond_16_bits(tmp_path: Path) -> None:
    tokenizer = enlarge(save("xlm-roberta", tmp_path / "tok"), 70_000)
    text = write_text(tmp_path / "a.txt", make_documents(400))
    build([text], tokenizer, 32, tmp_path / "corpus", held_out=0.1, progress=False)
    assert Corpus(tmp_path / "corpus").dtype == np.uint32
    sections: dict[str, Any] = {"model": NO_DROPOUT, "masking": {"strategy": "whole_word"}}
    losses = []
    for ranks in (1, 2):
        values = configuration(tmp_path / f"run{ranks}", tmp_path / "corpus", steps=6, **sections)
        assert run_ranks(train_all, ranks, [(values, None)]) == [[None]] * ranks
        losses.append(column(tmp_path / f"run{ranks}", "loss"))
    assert np.allclose(losses[0], losses[1], atol=1e-4)
    assert losses[0][-1][0] < losses[0][0][0]
