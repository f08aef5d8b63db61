"""Launching the ranks of a job: start, signal forwarding, exit status. Imports no torch.

Ranks of this machine are child processes of this one and die with it. DeepSpeed's launcher is not used for them: it
imports torch twice before the first rank does, polls once per second, and returns 0 if a signal terminated its ranks.

With a hostfile DeepSpeed's launcher starts the ranks. It kills them immediately on SIGTERM, and SIGUSR1 terminates the
launcher itself. It therefore runs in a separate process group with SIGUSR1 ignored (ranks set their own handlers), this
process requests a stop by a file in the run's folder, and reads from that folder how the run ended.
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

from maskvr_ds.reliability.signals import MAY_BE_IGNORED, SIGNALS, SignalDebouncer
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.launched import Launched
from maskvr_ds.run_folder.status import EXIT_STOPPED
from maskvr_ds.runtime import terminal
from maskvr_ds.runtime.processes import describe_exit, die_with_parent

# Seconds for the other ranks of this machine to report their own error, once one has failed.
_GRACE = 5.0
_POLL = 0.05
Processes = list["subprocess.Popen[bytes]"]


def launch(words: list[str], run: Path, steps: int | None) -> int:
    """Run `deepspeed WORDS` until it exits; returns 0 if completed, 75 if stopped with a checkpoint, otherwise 1.

    run, steps: the run's folder and its last step; None: not known here. The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP
    requests a checkpoint and stop; a second signal kills everything on this machine immediately.
    """
    launched = Launched(run)
    return _supervise([["-m", "deepspeed.launcher.runner", *words, *launched.options]], [{}], launched, run, steps)


def launch_here(module: str, options: list[str], ranks: int, run: Path, steps: int | None) -> int:
    """Like `launch`, for `python -m MODULE OPTIONS` on `ranks` ranks of this machine."""
    launched = Launched(run)
    command = ["-u", "-m", module, *options, *launched.options]
    return _supervise([command] * ranks, _rank_environments(ranks), launched, run, steps)


def run_here(module: str, options: list[str], ranks: int) -> int:
    """Run `python -m MODULE OPTIONS` on `ranks` ranks of this machine; returns 0 if all of them exit with 0, else 1.
    SIGTERM, SIGHUP and SIGINT kill them."""
    processes = _start([["-u", "-m", module, *options]] * ranks, _rank_environments(ranks))

    def kill(number: int, frame: FrameType | None) -> None:
        _kill(processes)
        sys.exit(128 + number)

    with _signal_handler(kill, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        _wait(processes)
    return int(any(process.returncode for process in processes))


def _rank_environments(ranks: int) -> list[dict[str, str]]:
    """Environment variables of each rank."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    job["LOCAL_WORLD_SIZE"] = str(ranks)
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _free_port() -> int:
    """A free port, so that two runs on one machine do not collide. Below the ephemeral ports
    (net.ipv4.ip_local_port_range), since rank 0 binds it only after its imports."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _start(commands: list[list[str]], environments: list[dict[str, str]]) -> Processes:
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **environment},
            process_group=0,
            preexec_fn=partial(_prepare, os.getpid() if environment else None),
        )
        for words, environment in zip(commands, environments, strict=True)
    ]


def _prepare(parent: int | None) -> None:
    """In the child process: ignore SIGUSR1 and, if `parent` is given, die with it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if parent is not None:
        die_with_parent(parent)


def _supervise(
    commands: list[list[str]], environments: list[dict[str, str]], launched: Launched, run: Path, steps: int | None
) -> int:
    # Nothing in the folder is touched: the ranks may still refuse the run.
    processes = _start(commands, environments)
    requested, debouncer = False, SignalDebouncer()

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if debouncer.is_duplicate(number):
            return
        if requested or not run.is_dir():
            _kill(processes)
            sys.exit(128 + number)
        requested, name = True, signal.Signals(number).name
        launched.request_stop(name)
        terminal.alert(f"{name}: asked the ranks to save and stop; a second signal kills them immediately")

    with _signal_handler(forward, *SIGNALS):
        _wait(processes, launched.deliver)
    launched.withdraw()
    if launched.completed(steps or 0):
        return 0
    if launched.stopped_at() is not None:
        terminal.alert("to continue, repeat the command with --resume auto")
        return EXIT_STOPPED
    resume = "; resume with --resume auto" if complete_checkpoints(run) else ""
    terminal.alert(f"error: the ranks ended before {f'step {steps}' if steps else 'the last step'}{resume}")
    return 1


@contextlib.contextmanager
def _signal_handler(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Handle these signals in this context; not SIGHUP (nohup) and SIGINT (& in a script) if they are ignored."""
    before = {}
    for number in numbers:
        if number not in MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _wait(processes: Processes, poll: Callable[[], None] = lambda: None) -> None:
    """Wait for all processes. If one fails the others are killed: they may wait for it in a collective.

    Every process that a signal has ended is named, unless it was killed here. poll: called again and again.
    """
    deadline = None
    named: set[int] = set()
    while True:
        # Before the return codes are looked at: all processes may have ended since the last time.
        running = [process for process in processes if process.poll() is None]
        for number, process in enumerate(processes):
            if (process.returncode or 0) < 0 and number not in named:
                named.add(number)
                who = f"rank {number}" if len(processes) > 1 else "the launcher"
                terminal.alert(f"error: {who} was {describe_exit(process.returncode)}")
        if not running:
            return
        failed = any(process.returncode not in (None, 0, EXIT_STOPPED) for process in processes)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            _kill(running)
            return
        poll()
        time.sleep(_POLL)


def _kill(processes: Processes) -> None:
    """SIGKILL the processes and their descendants: ranks of DeepSpeed's launcher have separate sessions."""
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
