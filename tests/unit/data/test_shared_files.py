"""One rank of each node opens the files; ranks are threads here (processes in tests/distributed)."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards import Corpus
from maskvr_ds.data import shared_files
from maskvr_ds.data.shared_files import NodeFiles, this_node
from tests.support.corpora import make_corpus

SHARDS = 40  # more than fit into one message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("node") / "corpus", rows=4 * SHARDS, length=8, shard_rows=4)


def on_ranks(nodes: list[str], action: Callable[[NodeFiles, int], Any]) -> list[Any]:
    """The result or exception of `action` on each of len(nodes) ranks."""
    barrier, values = threading.Barrier(len(nodes)), [None] * len(nodes)
    answers: list[Any] = [None] * len(nodes)

    def work(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            return list(values)

        try:
            with NodeFiles(gather, rank, nodes[rank]) as files:
                answers[rank] = action(files, rank)
        except Exception as error:
            answers[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return answers


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_each_shard_is_opened_once_on_each_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[int, str]] = []
    original = os.open

    def counted(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".arrow"):
            opened.append((threading.get_ident(), Path(path).name))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    before = descriptors()
    nodes = ["a", "b", "a", "a", "b", "c"]
    corpora = on_ranks(nodes, lambda files, _: (threading.get_ident(), Corpus(folder, files.open)))
    names = sorted(path.name for path in folder.glob("*.arrow"))
    openers = [ident for ident, _ in corpora]
    # Ranks 0, 1 and 5 are the lowest of their nodes.
    for rank, ident in enumerate(openers):
        assert sorted(name for by, name in opened if by == ident) == (names if rank in (0, 1, 5) else [])
    assert len(names) == SHARDS
    ids = [np.empty((4 * SHARDS, 8), np.uint16) for _ in nodes]
    for (_, corpus), out in zip(corpora, ids, strict=True):
        corpus.take(np.arange(4 * SHARDS), out=out)
        corpus.verify()
    assert all(np.array_equal(out, ids[0]) for out in ids)
    assert descriptors() == before
    assert len(opened) == 3 * SHARDS, "verifying opens nothing"


def test_missing_shard_is_reported_by_every_rank_of_the_node(folder: Path, tmp_path: Path) -> None:
    broken = make_corpus(tmp_path / "broken", rows=160, length=8, shard_rows=4)
    (broken / "shard-00035.arrow").unlink()
    before = descriptors()
    answers = on_ranks(["a", "a", "b"], lambda files, rank: Corpus(folder if rank == 2 else broken, files.open))
    assert [str(answer).split(":")[0] for answer in answers[:2]] == [str(broken / "shard-00035.arrow")] * 2
    assert isinstance(answers[2], Corpus)
    assert descriptors() == before


def test_no_rank_waits_for_one_that_failed(folder: Path) -> None:
    """Whichever rank fails, the others finish: with the files if it was not the one that opens them."""

    def fail(files: NodeFiles, rank: int, failing: int) -> Any:
        if rank == failing:
            raise RuntimeError("gone")
        return Corpus(folder, files.open)

    before = descriptors()
    first = on_ranks(["a"] * 3, lambda files, rank: fail(files, rank, 0))
    assert [str(answer) for answer in first[1:]] == [
        "the rank that opens files for all ranks of this node has failed"
    ] * 2
    second = on_ranks(["a"] * 3, lambda files, rank: fail(files, rank, 1))
    assert [type(answer) for answer in second] == [Corpus, RuntimeError, Corpus]
    # Midway: rank 1 fails to map a file that it has received.

    def take(files: NodeFiles, rank: int) -> int:
        taken = 0
        for descriptor in files.open(lambda i: os.open(folder / f"shard-{i:05d}.arrow", os.O_RDONLY), SHARDS):
            os.close(descriptor)
            taken += 1
            if rank == 1:
                raise RuntimeError("not this one")
        return taken

    third = on_ranks(["a"] * 3, take)
    assert (third[0], str(third[1]), third[2]) == (SHARDS, "not this one", SHARDS)
    assert descriptors() == before


def test_timeout_of_a_rank_without_response(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_files, "_TIMEOUT", 0.2)
    done = threading.Event()

    def action(files: NodeFiles, rank: int) -> Any:
        if rank == 0:
            done.wait(30)
            return None
        try:
            return Corpus(folder, files.open)
        finally:
            done.set()

    assert "has not responded for 0 seconds" in str(on_ranks(["a", "a"], action)[1])


def test_this_node_is_stable() -> None:
    assert this_node() == this_node()
    assert "net:[" in this_node()
