"""Process pool: failures name the task, finished tasks are kept."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.execution.tasks import Task
from data_pipeline.execution.workers import Pool
from data_pipeline.files import CorpusError


def die(how: str, report: Callable[[int, int], object]) -> int:
    """Task that kills or exits its process, raises, or succeeds."""
    report(10, 1)
    if how == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "error":
        raise CorpusError("a.txt: bad")
    if how == "disk":
        raise OSError(5, "Input/output error")
    if how == "bug":
        raise ZeroDivisionError
    return 7


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("signal", CorpusError, "unit 1 .a.txt.: the worker died, killed by SIGKILL .*out of memory"),
        ("exit", CorpusError, "unit 1 .a.txt.: the worker died, exit code 3"),
        ("error", CorpusError, "^a.txt: bad$"),
        ("disk", CorpusError, r"^unit 1 .a.txt.: \[Errno 5\] Input/output error$"),
        ("bug", RuntimeError, "(?s)unit 1 .a.txt.: .*ZeroDivisionError"),
    ],
)
def test_worker_that_fails_is_named(tmp_path: Path, how: str, kind: type[Exception], message: str) -> None:
    tasks = [Task(f"unit-{i}", f"unit {i} (a.txt)", die, (how if i == 1 else "good",)) for i in range(4)]
    with Pool(2) as pool, pytest.raises(kind, match=message):
        pool.run(tasks, tmp_path, lambda *_: None)
    assert not (tmp_path / "unit-1.json").exists()
    reports: list[tuple[int, int]] = []
    good = [Task(f"unit-{i}", "", die, ("good",)) for i in range(4)]
    done = len(list(tmp_path.glob("unit-*.json")))
    with Pool(2) as pool:
        assert pool.run(good, tmp_path, lambda *numbers: reports.append(numbers)) == [7] * 4
    assert reports.count((10, 1)) == 4 - done
