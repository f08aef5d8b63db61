"""The log, which rank 0 alone opens: if it cannot, all ranks end, instead of waiting for rank 0 in a collective."""

from pathlib import Path
from typing import Any

from data_pipeline.files import DiskFullError
from tests.distributed.ranks import run_ranks
from tests.distributed.training import configuration, train_all
from tests.support.corpora import make_corpus

FULL = "metrics.jsonl: cannot write (No space left on device)"


def train_on_a_full_disk(values: dict[str, Any]) -> list[str | None]:
    """On a rank: `train_all`, in which rank 0 cannot write metrics.jsonl."""
    from maskvr_ds.training import setup

    class Log:
        def __init__(self, *_: Any, rank: int, **__: Any) -> None:
            self.active = rank == 0
            if self.active:
                raise DiskFullError(FULL)

    setup.MetricsLog = Log  # type: ignore[assignment, misc]
    return train_all([(values, None)])


def test_all_ranks_end(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", rows=40, words=20)
    values = configuration(tmp_path / "run", corpus, steps=6, evaluation={"every_steps": 0})
    answers = run_ranks(train_on_a_full_disk, 2, values, timeout=120)
    assert answers == [[f"DiskFullError: {FULL}"], [f"RemoteError: rank 0: {FULL}"]]
