"""Tasks on processes: each runs once, its result is kept in a file, and a task that has one is not run again.

Results are small JSON values in `folder/NAME.json`, written whole or not at all after the task's own files:
they are what makes a killed build go on where it stopped. Tasks are handed out one by one, so that
the order in which they finish, and the number of workers, cannot matter to what they write.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data_pipeline.files import CorpusError, write_json

Report = Callable[[int, int], object]


@dataclass(frozen=True)
class Task:
    """`function(*arguments, report)` returns a JSON value; `size` is its share of the progress bar, in
    bytes."""

    name: str
    what: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    size: int = 0


def run_tasks(tasks: Sequence[Task], folder: Path, workers: int, report: Report) -> list[Any]:
    """Run the tasks that have no result yet on `workers` processes; return all results in the order of the
    tasks.

    With one worker they run in this process. `report` is called with (bytes read, tokens made).
    Raises the first error of a task, and CorpusError naming the task where a worker dies; the others are
    stopped.
    """
    pending = []
    for task in tasks:
        if (folder / f"{task.name}.json").exists():
            report(task.size, 0)
        else:
            pending.append(task)
    workers = min(workers, len(pending))
    if workers > 1:
        _run_in_processes(pending, folder, workers, report)
    else:
        with _one_thread():
            for task in pending:
                _perform(task, folder, report)
    return [json.loads((folder / f"{task.name}.json").read_bytes()) for task in tasks]


def _perform(task: Task, folder: Path, report: Report) -> None:
    write_json(folder / f"{task.name}.json", task.function(*task.arguments, report))


@contextmanager
def _one_thread(environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """A worker is one thread: `tokenizers` reads this variable at each call."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _run_in_processes(tasks: list[Task], folder: Path, workers: int, report: Report) -> None:
    # spawn: forking a process that has threads (Arrow's, the caller's) can hang.
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    busy: dict[Connection, tuple[Any, Task]] = {}
    waiting = iter(tasks)
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, folder), daemon=True)
            process.start()
            # Closed here, so that the pipe ends when the worker does.
            theirs.close()
            processes.append(process)
            _hand_out(ours, process, waiting, busy)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, task = busy[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    raise CorpusError(_obituary(process.exitcode, task)) from None
                if kind == "progress":
                    report(*value)
                elif kind == "error":
                    raise CorpusError(value)
                elif kind == "crash":
                    raise RuntimeError(f"{task.what}: {value}")
                else:
                    _hand_out(connection, process, waiting, busy)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _hand_out(
    connection: Connection, process: Any, waiting: Iterator[Task], busy: dict[Connection, tuple[Any, Task]]
) -> None:
    busy.pop(connection, None)
    if task := next(waiting, None):
        busy[connection] = process, task
        try:
            connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            process.join()
            raise CorpusError(_obituary(process.exitcode, task)) from None


def _obituary(code: int | None, task: Task) -> str:
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    memory = (
        " (SIGKILL often means that memory ran out: use fewer workers)" if code == -signal.SIGKILL else ""
    )
    guard = (
        ""
        if code is not None and code < 0
        else ' (in a script, call build() under `if __name__ == "__main__":`)'
    )
    return (
        f"{task.what}: the worker died, {how}{memory}{guard}. "
        "Run the same command again: it goes on where it stopped"
    )


def _worker(connection: Connection, folder: Path) -> None:
    # Ctrl-C reaches the whole group: the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            _perform(task, folder, lambda *numbers: connection.send(("progress", numbers)))
        except CorpusError as error:
            connection.send(("error", str(error)))
        except Exception:
            connection.send(("crash", traceback.format_exc()))
        else:
            connection.send(("done", None))


def _die_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
