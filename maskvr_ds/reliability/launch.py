"""Starts the ranks of a job, passes signals on to them, and finds out how the run ended. Loads no torch.

On this machine ranks are processes of this one: DeepSpeed's launcher would import torch twice before the first of them
does, look once a second whether they have ended, and return 0 where a signal ended them. They die with this process.
With a hostfile it is DeepSpeed's launcher that starts them, and its ways are what the rest of this file is about: it
kills its ranks at once where it hears SIGTERM, and dies of SIGUSR1 itself. So it gets a process group of its own, in
which SIGUSR1 is ignored (ranks set their own handlers), this process asks the ranks by a file in the run's folder, and
how the run ended is read from that folder.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

from maskvr_ds.reliability.signals import SignalDebouncer
from maskvr_ds.run_folder import status
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import STOP_REQUEST, STOPPED
from maskvr_ds.run_folder.status import EXIT_STOPPED
from maskvr_ds.runtime import terminal
from maskvr_ds.runtime.processes import describe_exit, die_with_parent

# Seconds that the other ranks of this machine have, once one has ended with an error, to tell their own.
_GRACE = 5.0
_POLL = 0.05
Processes = list["subprocess.Popen[bytes]"]


def launch(words: list[str], run: Path, steps: int) -> int:
    """Run `deepspeed WORDS` to its end; → 0 done, 75 stopped with a checkpoint, 1 anything else.

    run, steps: the run's folder and the step at which it is done. The first SIGTERM, SIGUSR1 or SIGHUP asks for a
    checkpoint and the end; SIGINT, or a second signal, ends everything on this machine at once.
    """
    return _watch_over([["-m", "deepspeed.launcher.runner", *words]], [{}], run, steps)


def launch_here(module: str, options: list[str], ranks: int, run: Path, steps: int) -> int:
    """As `launch`, `python -m MODULE OPTIONS` on so many ranks of this machine."""
    return _watch_over([["-u", "-m", module, *options]] * ranks, _places(ranks), run, steps)


def run_here(module: str, options: list[str], ranks: int) -> int:
    """`python -m MODULE OPTIONS` on so many ranks of this machine; → 0 where all of them ended with 0, else 1.
    SIGTERM, SIGHUP and SIGINT end them too."""
    processes = _start([["-u", "-m", module, *options]] * ranks, _places(ranks))

    def end(number: int, frame: FrameType | None) -> None:
        _end(processes)
        sys.exit(128 + number)

    with _handling(end, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        _wait(processes)
    return int(any(process.returncode for process in processes))


def _places(ranks: int) -> list[dict[str, str]]:
    """The environment of every rank."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    job["LOCAL_WORLD_SIZE"] = str(ranks)
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _free_port() -> int:
    """A port of its own, so that two runs on one machine do not meet. Below those that the system gives to whoever asks
    for any (net.ipv4.ip_local_port_range): it is taken only after rank 0's imports."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _start(commands: list[list[str]], places: list[dict[str, str]]) -> Processes:
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **place},
            process_group=0,
            preexec_fn=partial(_prepare, os.getpid() if place else None),
        )
        for words, place in zip(commands, places, strict=True)
    ]


def _prepare(parent: int | None) -> None:
    """In a new process: ignore SIGUSR1, and die with the parent, where one is given."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if parent is not None:
        die_with_parent(parent)


def _watch_over(commands: list[list[str]], places: list[dict[str, str]], run: Path, steps: int) -> int:
    (run / STOP_REQUEST).unlink(missing_ok=True)
    before_start = status.written(run)
    processes = _start(commands, places)
    asked, echoes = False, SignalDebouncer()

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if echoes.is_duplicate(number):
            return
        if asked or number == signal.SIGINT or not run.is_dir():
            _end(processes)
            sys.exit(128 + number)
        asked, name = True, signal.Signals(number).name
        (run / STOP_REQUEST).write_text(name + "\n", encoding="utf-8")
        terminal.alert(f"{name}: the ranks were asked to save and stop; a second signal ends them at once")

    with _handling(pass_on, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        _wait(processes)
    (run / STOP_REQUEST).unlink(missing_ok=True)
    if status.completed(run, steps, before_start):
        return 0
    if (step := status.step_of(run, STOPPED, before_start)) is not None:
        terminal.alert(f"stopped at step {step}, as a signal asked; --resume auto goes on")
        return EXIT_STOPPED
    goes_on = "; --resume auto goes on" if complete_checkpoints(run) else ""
    terminal.alert(f"error: the ranks ended before step {steps}{goes_on}")
    return 1


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Have these signals handled in here; SIGHUP not where nohup has it ignored."""
    before = {}
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _wait(processes: Processes) -> None:
    """Until all have ended. One that ends with an error takes the others along: they may wait for it without end."""
    deadline = None
    while running := [process for process in processes if process.poll() is None]:
        failed = any(process.returncode not in (None, 0, EXIT_STOPPED) for process in processes)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE
            for number, process in enumerate(processes):
                if (process.returncode or 0) < 0:
                    who = f"rank {number}" if len(processes) > 1 else "the launcher"
                    terminal.alert(f"error: {who} was {describe_exit(process.returncode)}")
        if deadline is not None and time.monotonic() > deadline:
            _end(running)
        time.sleep(_POLL)


def _end(processes: Processes) -> None:
    """SIGKILL for them and all below them: ranks of DeepSpeed's launcher have sessions of their own."""
    import psutil

    for process in processes:
        try:
            members = [*psutil.Process(process.pid).children(recursive=True), process]
        except psutil.NoSuchProcess:
            continue
        for member in members:
            try:
                member.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
    for process in processes:
        process.wait()
