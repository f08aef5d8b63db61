"""Collectives that keep ranks in step if one of them fails, shared shards on a node, and the check before a save."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from maskvr_ds.runtime.deferred import DeferredTensor
from maskvr_ds.telemetry.metrics import StepRecord
from maskvr_ds.training.saver import check_finite, is_due
from tests.distributed.ranks import run_ranks
from tests.support.corpora import make_corpus


def fail_on(failing: list[int], corpus: Path | None = None) -> list[Any]:
    """On a rank: the outcome of `run_collectively` if the ranks `failing` raise; later collectives must still match.

    corpus: appends how many of its shards this rank opened for the ranks of its node, and how many it has mapped.
    """
    from maskvr_ds.runtime import distributed

    distributed.initialize()

    def action() -> int:
        if distributed.rank() in failing:
            raise ValueError(f"disk of rank {distributed.rank()} is gone")
        return distributed.rank() * 10

    try:
        outcome: Any = distributed.run_collectively(action)
    except (ValueError, distributed.RemoteError) as error:
        outcome = f"{type(error).__name__}: {error}"
    return [
        outcome,
        distributed.run_collectively(lambda: "from " + str(distributed.rank()), on=1),
        distributed.all_reduce_sum(torch.ones(1, dtype=torch.int64)).item(),
        *([] if corpus is None else open_on_node(corpus)),
    ]


def open_on_node(folder: Path) -> list[int]:
    from data_pipeline.shards import Corpus
    from maskvr_ds.data.shared_files import NodeFiles
    from maskvr_ds.runtime import distributed

    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    with NodeFiles(distributed.gather_objects, distributed.rank()) as files:
        corpus = distributed.run_collectively(lambda: Corpus(folder, files.open))
    corpus.verify()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return [sum(name.endswith(".arrow") for name in opened), maps.count(".arrow")]


def test_one_rank_raises_the_error_and_all_know() -> None:
    remote = "RemoteError: rank 1: disk of rank 1 is gone"
    expected = [remote, "ValueError: disk of rank 1 is gone", remote]
    for failing in ([1], [1, 2]):
        assert run_ranks(fail_on, 3, failing) == [[outcome, "from 1", 3] for outcome in expected]


def test_without_errors_each_rank_has_its_own_result(tmp_path: Path) -> None:
    """One rank opens the three shards of a corpus for both, which share this node."""
    corpus = make_corpus(tmp_path / "corpus", rows=30, length=8, shard_rows=10)
    assert run_ranks(fail_on, 2, [], corpus) == [[0, "from 1", 2, 3, 3], [10, "from 1", 2, 0, 3]]


def record_of(loss: float, norm: float, **extra: float) -> StepRecord:
    return StepRecord(
        step=7,
        samples=8,
        tokens=80,
        lr=0.1,
        counters=DeferredTensor(torch.tensor([1, 1, 1, 0])),
        loss_sum=DeferredTensor(torch.tensor([loss], dtype=torch.float64)),
        grad_norm=norm,
        extra=dict(extra),
        token_flops=1.0,
    )


@pytest.mark.parametrize(("loss", "norm", "named"), [(float("nan"), 1.0, "loss"), (1.0, float("inf"), "grad_norm")])
def test_a_diverged_step_is_not_saved(loss: float, norm: float, named: str) -> None:
    with pytest.raises(FloatingPointError, match=f"step 7: {named} is (nan|inf); not saved"):
        check_finite(record_of(loss, norm))


def test_fp16_overflow_is_not_divergence() -> None:
    check_finite(record_of(1.0, float("inf"), loss_scale=65536.0))
    with pytest.raises(FloatingPointError, match="grad_norm is nan"):
        check_finite(record_of(1.0, float("nan"), loss_scale=65536.0))
    with pytest.raises(FloatingPointError, match="loss is inf"):
        check_finite(record_of(float("inf"), float("inf"), loss_scale=65536.0))


def test_is_due() -> None:
    assert [s for s in range(1, 11) if is_due(s, 4, 10)] == [4, 8, 10]
    assert [s for s in range(1, 11) if is_due(s, 0, 10)] == [10]
