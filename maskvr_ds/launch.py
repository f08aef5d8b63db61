"""Starts DeepSpeed's launcher, passes signals on to the ranks, and finds out how the run ended. Loads no torch.

The launcher kills its ranks at once where it hears SIGTERM, dies of SIGUSR1 itself, and returns 0 where a signal ended
its ranks. So it gets a process group of its own, in which SIGUSR1 is ignored (ranks set their own handlers), this
process asks the ranks by a file in the run's folder, and the exit status is read from that folder.
"""

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from maskvr_ds import outcome
from maskvr_ds.outcome import EXIT_STOPPED, REQUEST, STOPPED


def launch(words: list[str], run: Path, steps: int) -> int:
    """Run `deepspeed WORDS` to its end; → 0 done, 75 stopped with a checkpoint, 1 anything else.

    run, steps: the run's folder and the step at which it is done. The first SIGTERM or SIGUSR1 asks for a checkpoint
    and the end; SIGINT, or a second signal, ends everything on this machine at once.
    """
    (run / REQUEST).unlink(missing_ok=True)
    outcome.clear(run)
    process = subprocess.Popen(
        [sys.executable, "-m", "deepspeed.launcher.runner", *words],
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    )
    asked = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        name = signal.Signals(number).name
        if asked or number == signal.SIGINT or not run.is_dir():
            _end(process)
            sys.exit(128 + number)
        asked = True
        (run / REQUEST).write_text(name + "\n", encoding="utf-8")
        print(f"{name}: the ranks were asked to save and stop; a second signal ends them at once", flush=True)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    (run / REQUEST).unlink(missing_ok=True)
    if outcome.completed(run, steps):
        return 0
    if (step := outcome.step_of(run, STOPPED)) is not None:
        print(f"stopped at step {step}, as a signal asked; --resume auto goes on", file=sys.stderr)
        return EXIT_STOPPED
    print(f"error: the ranks ended before step {steps}; --resume auto goes on", file=sys.stderr)
    return 1


def _end(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL for the launcher and all below it: ranks have sessions of their own."""
    import psutil

    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        try:
            member.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    process.wait()
