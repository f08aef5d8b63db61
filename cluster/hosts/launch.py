"""Train on the hosts of a hostfile: a safe `deepspeed --hostfile`.

Checks all hosts first, passes options through a file (no shell interprets them), watches the ranks, kills everything
that it started, and returns an exit status that can be relied upon.
"""

import argparse
import signal
import time
from collections.abc import Mapping
from types import FrameType

from cluster.hosts.checks import LaunchError
from cluster.hosts.plan import CONFIG, Draft, add_launch_options, warn
from cluster.hosts.supervisor import KILL_SECONDS, POLL, Job, Plan
from maskvr_ds.config import RunConfig, add_run_options, load_config, with_local_model
from maskvr_ds.reliability.signals import SIGNALS, SignalDebouncer
from maskvr_ds.run_folder import layout, status
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.launched import Launched
from maskvr_ds.run_folder.marks import output_fault
from maskvr_ds.run_folder.status import EXIT_STOPPED
from maskvr_ds.runtime.hostfile import read_hostfile
from maskvr_ds.runtime.logs import verbosity_words
from maskvr_ds.runtime.numbers import MAX_SECONDS
from maskvr_ds.runtime.numbers import number as bounded
from maskvr_ds.runtime.terminal import ERR, alert, say

_EXAMPLES = """examples:
  python -m cluster launch --hostfile hosts --config run.yaml --resume auto
  python -m cluster launch --hostfile hosts --config run.yaml --export NCCL_SOCKET_IFNAME=ib0 --timeout 3600
exit status: 0 done; 75 stopped with a checkpoint (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP or --timeout); 128 + n killed at
once by signal n, the second one; 1 any other failure. Resume with the same command and --resume auto.
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
    parser.add_argument("--hostfile", required=True, metavar="FILE", help="one `host slots=N` per line, master first")
    add_launch_options(parser, force="start although other jobs run on the hosts; kill processes left by this run")
    parser.add_argument(
        "--timeout",
        type=bounded(0, MAX_SECONDS),
        metavar="SECONDS",
        help="stop then with a checkpoint, exit status 75",
    )
    parser.set_defaults(run=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    hosts = read_hostfile(arguments.hostfile)
    arguments.assignments = with_local_model(arguments.config, arguments.assignments)
    config = load_config(arguments.config, arguments.assignments)
    launched = Launched(config.output_dir.absolute())
    plan = _prepare(arguments, hosts, config, launched)
    longest = plan.timeout + plan.grace + KILL_SECONDS
    limit = f"a lost rank or host ends the job within {longest:g} s" if plan.timeout else "hangs.timeout is off"
    print(f"{plan.world_size} ranks on {len(hosts)} hosts, logs in {plan.folder}; {limit}", flush=True)
    return watch(plan, launched, config.training.steps, arguments.timeout)


def _prepare(arguments: argparse.Namespace, hosts: Mapping[str, int], config: RunConfig, launched: Launched) -> Plan:
    Fence(config.output_dir).look()
    if (fault := output_fault(config.output_dir, arguments.resume)) is not None:
        raise LaunchError(fault)
    for index in range(len(config.phases) or 1):
        config.phase(index).accumulation_steps(sum(hosts.values()))
    options = ["--resume", arguments.resume] if arguments.resume else []
    options += [*verbosity_words(arguments.verbosity), *launched.options]
    draft = Draft(arguments, hosts, config)
    try:
        answers = draft.ask()
        if lines := draft.errors(answers):
            raise LaunchError("nothing was started:\n  " + "\n  ".join(lines))
        warn(draft.inconsistencies(answers))
        if arguments.force:
            draft.kill_earlier(answers)
        return draft.plan(answers, "maskvr_ds.train", lambda folder: ["--config", str(folder / CONFIG), *options])
    except BaseException:
        draft.discard()
        raise


class Signals:
    """Signal handlers: the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP requests a stop with a checkpoint; a second one
    kills the ranks.

    Repetitions within a second are ignored, as by the ranks (`SignalDebouncer`): Slurm sends SIGTERM twice, a session
    that ends sends SIGHUP twice, or SIGTERM and SIGHUP.
    """

    def __init__(self, launched: Launched) -> None:
        # The signal that kills the ranks.
        self.fatal: int | None = None
        self.stop_requested = False
        self._launched = launched
        self._debouncer = SignalDebouncer()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._debouncer.is_duplicate(number):
            return
        if self.stop_requested:
            self.fatal = number
        else:
            self.request_stop(signal.Signals(number).name)

    def request_stop(self, why: str) -> None:
        self.stop_requested = True
        self._launched.request_stop(why)
        alert(f"{why}: requested a checkpoint and stop; a second signal kills the ranks at once")


def watch(plan: Plan, launched: Launched, steps: int | None, timeout: float | None = None) -> int:
    """Start the ranks and watch them until they end; returns the exit status.

    steps: the run is complete at this step; None: not known here. timeout: seconds after which to stop with a
    checkpoint.
    """
    signals = Signals(launched)
    job = Job(plan)
    why: str | None = None
    try:
        while (why := job.poll()) is None and signals.fatal is None:
            if timeout and time.monotonic() - job.started > timeout and not signals.stop_requested:
                signals.request_stop(f"--timeout {timeout:g}")
            launched.deliver()
            time.sleep(POLL)
    finally:
        answers = job.kill()
    launched.withdraw()
    if launched.completed(steps or 0):
        say(f"done: {status.step_of(plan.run, layout.COMPLETED)} steps, {plan.run}")
        return 0
    if (step := launched.stopped_at()) is not None:
        say(f"stopped at step {step} with a checkpoint, on request; continue with --resume auto", ERR)
        return EXIT_STOPPED
    if signals.fatal is not None:
        say(f"{signal.Signals(signals.fatal).name}: the ranks were killed", ERR)
        return 128 + signals.fatal
    lines = [*([why] if why else []), *job.explain(answers)]
    end = f"step {steps}" if steps else "the last step"
    text = [f"error: the ranks ended before {end}; continue with the same command and --resume auto", *lines]
    say("\n  ".join(text), ERR)
    return 1
