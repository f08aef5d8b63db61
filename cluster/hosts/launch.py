"""`python -m cluster launch`: `deepspeed --hostfile`, made safe.

Checks every host first, passes options through a file (no shell reads them), watches the ranks, ends all that it has
started, and says by its exit status what became of the run: 0 done, 75 stopped with a checkpoint, 1 anything else.
"""

import argparse
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from cluster.hosts import plan as preparation
from cluster.hosts.checks import LaunchError
from cluster.hosts.hostfile import read_hostfile
from cluster.hosts.plan import CONFIG, Draft
from cluster.hosts.supervisor import END_SECONDS, POLL, Job, Plan
from maskvr_ds.config import RunConfig, add_run_options, load_config
from maskvr_ds.reliability.signals import SignalDebouncer
from maskvr_ds.run_folder import layout, status
from maskvr_ds.runtime.terminal import ERR, alert, say

_EXAMPLES = """examples:
  python -m cluster launch --hostfile hosts --config run.yaml --resume auto
  python -m cluster launch --hostfile hosts --config run.yaml --export NCCL_SOCKET_IFNAME=ib0 --timeout 3600
exit status: 0 done; 75 stopped (SIGTERM, SIGUSR1, SIGHUP or --timeout) with a checkpoint; 1 anything else; 128 + n
where SIGINT, or a second signal n, ended everything at once. The same command with --resume auto goes on.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "launch",
        help="train on the hosts of a hostfile",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    parser.add_argument("--hostfile", required=True, metavar="FILE", help="one `host slots=N` a line, the master first")
    preparation.add_options(parser, force="although other jobs are there; ends what this run left")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="then stop with a checkpoint, status 75")
    parser.set_defaults(run=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    hosts = read_hostfile(arguments.hostfile)
    config = load_config(arguments.config, arguments.assignments)
    plan = _prepare(arguments, hosts, config)
    (plan.run / layout.STOP_REQUEST).unlink(missing_ok=True)
    longest = plan.timeout + plan.grace + END_SECONDS
    ends = f"a rank or host that is lost ends the job within {longest:g} s" if plan.timeout else "hangs.timeout is off"
    print(f"{plan.world_size} ranks on {len(hosts)} hosts, logs in {plan.folder}; {ends}", flush=True)
    return watch(plan, config.training.steps, arguments.timeout)


def _prepare(arguments: argparse.Namespace, hosts: Mapping[str, int], config: RunConfig) -> Plan:
    for index in range(len(config.phases) or 1):
        config.phase(index).accumulation_steps(sum(hosts.values()))
    resume = ["--resume", arguments.resume] if arguments.resume else []
    draft = Draft(arguments, hosts, config)
    try:
        answers = draft.ask()
        if lines := draft.faults(answers):
            raise LaunchError("nothing was started:\n  " + "\n  ".join(lines))
        preparation.warn(draft.unevenness(answers))
        if arguments.force:
            draft.end_earlier(answers)
        return draft.plan(answers, "maskvr_ds.train", lambda folder: ["--config", str(folder / CONFIG), *resume])
    except BaseException:
        draft.discard()
        raise


class Signals:
    """The first SIGTERM, SIGUSR1 or SIGHUP asks the ranks to save and stop; SIGINT, or a second one, ends them all.

    The same one again within a second is its echo, as for the ranks: Slurm sends SIGTERM twice, a session that ends
    SIGHUP twice, or SIGTERM and SIGHUP.
    """

    def __init__(self, run: Path) -> None:
        self.last: int | None = None
        self.asked = False
        self._run = run
        self._echoes = SignalDebouncer()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._echoes.is_duplicate(number):
            return
        if self.asked or number == signal.SIGINT:
            self.last = number
        else:
            self.ask(signal.Signals(number).name)

    def ask(self, why: str) -> None:
        self.asked = True
        (self._run / layout.STOP_REQUEST).write_text(why + "\n", encoding="utf-8")
        alert(f"{why}: the ranks were asked to save and stop; a second signal ends them at once")


def watch(plan: Plan, steps: int, timeout: float | None = None) -> int:
    """Start the ranks and stay with them; → the exit status. steps: at which the run is done."""
    signals, before = Signals(plan.run), status.written(plan.run)
    job = Job(plan)
    why: str | None = None
    try:
        while (why := job.look()) is None and signals.last is None:
            if timeout and time.monotonic() - job.begun > timeout and not signals.asked:
                signals.ask(f"--timeout {timeout:g}")
            time.sleep(POLL)
    finally:
        answers = job.end()
    (plan.run / layout.STOP_REQUEST).unlink(missing_ok=True)
    if status.completed(plan.run, steps, before):
        say(f"done: {steps} steps, {plan.run}")
        return 0
    if (step := status.step_of(plan.run, layout.STOPPED, before)) is not None:
        say(f"stopped at step {step}, as a signal asked; --resume auto goes on", ERR)
        return status.EXIT_STOPPED
    if signals.last is not None:
        say(f"{signal.Signals(signals.last).name}: everything was ended at once", ERR)
        return 128 + signals.last
    lines = [*([why] if why else []), *job.explain(answers)]
    text = [f"error: the ranks ended before step {steps}; the same command with --resume auto goes on", *lines]
    say("\n  ".join(text), ERR)
    return 1
