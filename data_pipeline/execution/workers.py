"""Process pool with persistent results: a task whose result file exists is not run again.

Results are small JSON values in `folder/NAME.json`, written atomically after the files of the task itself: they allow
a killed build to resume. The output depends neither on the number of workers nor on the order in which tasks finish.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from data_pipeline.execution.mpi import Team
from data_pipeline.execution.tasks import Report, Task
from data_pipeline.files import CorpusError, write_json

_PAUSE = 0.005
_logger = logging.getLogger(__name__)


class Pool:
    """Up to `workers` processes on each rank of a team, started with the first tasks and terminated on exit.

    With one worker and no team, tasks run in the calling process.
    """

    def __init__(self, workers: int, team: Team | None = None) -> None:
        self._workers = workers
        self._team = team
        self._processes: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.join()
        if self._team:
            self._team.stop()

    def run(self, tasks: Sequence[Task], folder: Path, report: Report) -> list[Any]:
        """Run the tasks that have no result in `folder` yet; return the results of all tasks, in their order.

        Raises the first error of a task; CorpusError naming the task if a worker dies.
        """
        pending = []
        for task in tasks:
            if (folder / f"{task.name}.json").exists():
                report(task.size, 0)
            else:
                pending.append(task)
        if len(pending) < len(tasks):
            _logger.info("%d of %d tasks were done before", len(tasks) - len(pending), len(tasks))
        if self._team and len(pending) > 1:
            self._run_in_team(self._team, pending, folder, report)
        elif self._workers > 1 and len(pending) > 1:
            self._run_in_processes(pending, folder, report)
        else:
            with _one_thread():
                for task in pending:
                    _perform(task, folder, report)
                    _logger.info("done: %s", task.what)
        return [_read_result(folder / f"{task.name}.json", self._team is not None) for task in tasks]

    def _run_in_processes(self, tasks: list[Task], folder: Path, report: Report) -> None:
        while len(self._processes) < min(self._workers, len(tasks)):
            self.start()
        waiting = iter(tasks)
        busy: dict[Connection, Task] = {}
        for connection in self._processes:
            self._hand_out(connection, folder, waiting, busy)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                try:
                    kind, value = ready.recv()
                except (EOFError, ConnectionResetError):
                    raise self.death(ready, busy[ready]) from None
                if _is_done(kind, value, busy[ready], report):
                    self._hand_out(ready, folder, waiting, busy)

    def _run_in_team(self, team: Team, tasks: list[Task], folder: Path, report: Report) -> None:
        """Like `_run_in_processes`, using the workers of the other ranks too. remote: task of each (rank, slot)."""
        waiting = iter(tasks)
        remote = {(rank, slot): next(waiting, None) for slot in range(self._workers) for rank in range(1, team.size)}
        for (rank, slot), task in remote.items():
            if task:
                team.send_task(rank, slot, task, folder)
        busy: dict[Connection, Task] = {}
        while len(self._processes) < self._workers:
            self.start()
        for connection in self._processes:
            self._hand_out(connection, folder, waiting, busy)
        while busy or any(remote.values()):
            for ready in wait(list(busy), _PAUSE):
                assert isinstance(ready, Connection)
                try:
                    kind, value = ready.recv()
                except (EOFError, ConnectionResetError):
                    raise CorpusError(f"rank 0: {self.death(ready, busy[ready])}") from None
                if _is_done(kind, value, busy[ready], report):
                    self._hand_out(ready, folder, waiting, busy)
            if not busy:
                time.sleep(_PAUSE)
            for rank, slot, kind, value in team.messages():
                running = remote[rank, slot]
                assert running is not None
                if _is_done(kind, value, running, report):
                    remote[rank, slot] = task = next(waiting, None)
                    if task:
                        team.send_task(rank, slot, task, folder)

    def start(self) -> Connection:
        """Start another worker process; returns the connection to it."""
        # spawn: forking a process with threads (Arrow's, the caller's) can deadlock.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs,), daemon=True)
        # Ctrl-C is sent to the whole process group, but only the parent handles it: the child inherits a blocked
        # SIGINT. The resource tracker must be running already, since starting it within start() unblocks the signal.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Close our copy, so that the pipe reaches EOF when the worker exits.
        theirs.close()
        self._processes[ours] = process
        return ours

    def _hand_out(
        self, connection: Connection, folder: Path, waiting: Iterator[Task], busy: dict[Connection, Task]
    ) -> None:
        busy.pop(connection, None)
        if task := next(waiting, None):
            busy[connection] = task
            try:
                connection.send((task, folder))
            except (BrokenPipeError, ConnectionResetError):
                raise self.death(connection, task) from None

    def death(self, connection: Connection, task: Task) -> CorpusError:
        """The error that reports the death of a worker during a task."""
        process = self._processes[connection]
        process.join()
        return CorpusError(_describe_exit(process.exitcode, task))


def serve(team: Team, pool: Pool) -> None:
    """Run tasks from rank 0 until it sends "stop". Called on every rank but 0; an exception ends all ranks."""
    # Ctrl-C is sent to every rank, but only rank 0 handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pool:
            _serve_rank(team, pool)
        team.leave()
    except Exception:
        team.abort()


def _serve_rank(team: Team, pool: Pool) -> None:
    slots: list[Connection] = []
    busy: dict[Connection, Task] = {}

    def died(connection: Connection) -> None:
        where = f"rank {team.rank} ({socket.gethostname()}): "
        team.reply(slots.index(connection), "died", where + str(pool.death(connection, busy.pop(connection))))

    while True:
        if (message := team.receive()) is not None:
            if message[0] == "stop":
                return
            _, slot, task, folder = message
            while len(slots) <= slot:
                slots.append(pool.start())
            busy[slots[slot]] = task
            try:
                slots[slot].send((task, folder))
            except (BrokenPipeError, ConnectionResetError):  # it died while it had nothing to do
                died(slots[slot])
        for ready in wait(list(busy), _PAUSE) if busy else ():
            assert isinstance(ready, Connection)
            try:
                kind, value = ready.recv()
            except (EOFError, ConnectionResetError):
                died(ready)
                continue
            if kind != "progress":
                del busy[ready]
            team.reply(slots.index(ready), kind, value)
        if not busy:
            time.sleep(_PAUSE)


def _is_done(kind: str, value: Any, task: Task, report: Report) -> bool:
    """Handle a message from a worker; returns whether its task has finished. Raises the error it reports, if any."""
    if kind == "progress":
        report(*value)
        return False
    if kind in ("error", "died"):
        raise CorpusError(value)
    if kind == "crash":
        raise RuntimeError(f"{task.what}: {value}")
    _logger.info("done: %s", task.what)
    return True


def _read_result(path: Path, shared: bool) -> Any:
    # Network file systems may cache the absence of a file for a minute.
    for _ in range(1200 if shared else 0):
        if path.exists():
            break
        time.sleep(0.1)
    return json.loads(path.read_bytes())


def _perform(task: Task, folder: Path, report: Report) -> None:
    result = task.function(*task.arguments, report)
    # Without fsync of the folder: a result lost in a power failure is only computed again.
    write_json(folder / f"{task.name}.json", result, fsync_folder=False)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Disable the threads of `tokenizers`, which reads this variable at each call: one worker is one thread."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _describe_exit(code: int | None, task: Task) -> str:
    """Error message for a worker that exited during a task; code: its exit code, negative if killed by a signal."""
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    memory = " (SIGKILL often means out of memory: use fewer workers)" if code == -signal.SIGKILL else ""
    guard = "" if code is not None and code < 0 else ' (in a script, call build() under `if __name__ == "__main__":`)'
    return f"{task.what}: the worker died, {how}{memory}{guard}. Rerun the same command: it resumes where it stopped"


def _worker(connection: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        while True:
            _serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has closed its end


def _serve(connection: Connection) -> None:
    """Receive a task, run it and reply. Raises EOFError or a pipe error if the parent has exited."""
    task, folder = connection.recv()
    try:
        _perform(task, folder, lambda *numbers: connection.send(("progress", numbers)))
    except CorpusError as error:
        connection.send(("error", str(error)))
    except OSError as error:
        connection.send(("error", f"{task.what}: {error}"))
    except Exception:
        connection.send(("crash", traceback.format_exc()))
    else:
        connection.send(("done", None))


def _die_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
