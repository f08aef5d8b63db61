"""Commands of the project in forks of a process that has imported everything: started together, or killed."""

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Set by run_ranks for its ranks; a command is none.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """status: as of `Popen.returncode`. said: what the command printed. seconds: how long it ran."""

    status: int
    said: str
    seconds: float


class Command:
    """One command in a fork: `words` of `maskvr`, or of `python -m data_pipeline` if they start with its name."""

    def __init__(self, words: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> None:
        self._log, self._started = log, time.monotonic()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
            os.dup2(1, 2)
            for name in _OF_RANKS:
                os.environ.pop(name, None)
            prepare()
            status = _run(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        _, status = os.waitpid(self.pid, 0)
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - self._started)


def _run(words: list[str]) -> int:
    from maskvr_ds import train

    train.plot_loss = lambda *_: None  # takes a second each
    if words[0] == "data_pipeline":
        from data_pipeline.__main__ import main

        return main(words[1:])
    from maskvr_ds import cli

    return cli.main(words)


def run(words: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> Ended:
    return Command(words, log, prepare).wait()


def die_during(owner: Any, name: str, call: int, seconds: float) -> Callable[[], None]:
    """Preparation of a command that kills itself, by SIGKILL, `seconds` after the `call`-th start of a function."""

    def prepare() -> None:
        function, calls = getattr(owner, name), [0]

        def deadly(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGKILL))).start()
            return function(*arguments, **options)

        setattr(owner, name, deadly)

    return prepare


def timed(owner: Any, name: str, note: Path) -> Callable[[], None]:
    """Preparation of a command that notes how many seconds each call of a function takes, one per line."""

    def prepare() -> None:
        function = getattr(owner, name)

        def measured(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            try:
                return function(*arguments, **options)
            finally:
                with note.open("a", encoding="utf-8") as file:
                    file.write(f"{time.monotonic() - started}\n")

        setattr(owner, name, measured)

    return prepare


def kill_at_random(words: list[str], log: Path, longest: float, chance: random.Random) -> Ended:
    """Start a command and kill it after at most `longest` seconds."""
    command = Command(words, log)
    time.sleep(chance.uniform(0, longest))
    command.kill()
    return command.wait()
