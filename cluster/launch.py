"""`python -m cluster launch`: `deepspeed --hostfile`, made safe.

Checks every host first, passes options through a file (no shell reads them), watches the ranks, ends all that it has
started, and says by its exit status what became of the run: 0 done, 75 stopped with a checkpoint, 1 anything else.
"""

import argparse
import hashlib
import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import cluster
from cluster import checks, node, rank, remote
from cluster.checks import LaunchError
from cluster.hostfile import read_hostfile
from cluster.supervision import LAUNCHERS, POLL, Job, Plan
from maskvr_ds import outcome
from maskvr_ds.config import RunConfig, add_run_options, dump_config, load_config

# What of this machine's environment goes to the ranks. No secrets: `ps` shows them on every host.
PASSED = tuple(
    "NCCL_ GLOO_ UCX_ FI_ OMP_ MKL_ CUDA_LAUNCH_ CUDA_DEVICE_ TORCH_ PYTORCH_ TRITON_ HF_HOME HF_HUB_ DS_ACCELERATOR "
    "TOKENIZERS_ PATH LD_LIBRARY_PATH PYTHON".split()
)
# DeepSpeed exports these as well, as they are.
_DEEPSPEED_PASSES = ("MLFLOW", "MV2", "PYTHON", "UCX", "NCCL")
# Stands for itself in every shell, in pdsh (no %) and for mpirun.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./~-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CHECK_SECONDS = 60
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
    add_launch_options(parser)
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="then stop with a checkpoint, status 75")
    parser.set_defaults(run=_launch)


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", metavar="FILE", help="one `host slots=N` a line, the master first")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="default: pdsh")
    parser.add_argument("--launcher-args", default="", metavar="WORDS", help="more options for pdsh, mpirun or srun")
    parser.add_argument(
        "--master-addr", metavar="ADDRESS", help="default: the first that `hostname -I` says on the master"
    )
    parser.add_argument("--master-port", type=int, default=0, metavar="PORT", help="default: one that is free there")
    parser.add_argument("--log-dir", metavar="DIR", help="default: RUN/logs; on a file system that all nodes share")
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the ranks, beside the usual",
    )
    parser.add_argument(
        "--start-timeout", type=float, default=600, metavar="SECONDS", help="until every rank has begun (default: 600)"
    )
    parser.add_argument(
        "--grace", type=float, default=15, metavar="SECONDS", help="from the first rank's fault to the end of all"
    )
    parser.add_argument("--force", action="store_true", help="although other jobs are there; ends what this run left")


def _launch(arguments: argparse.Namespace) -> int:
    if not arguments.hostfile:
        raise LaunchError("--hostfile: which? `python -m cluster hostfile --help` tells how to make one")
    hosts = read_hostfile(arguments.hostfile)
    config = load_config(arguments.config, arguments.assignments)
    for index in range(len(config.phases) or 1):
        config.phase(index).accumulation_steps(sum(hosts.values()))
    plan = prepare(
        arguments, hosts, config, "maskvr_ds.train", ["--resume", arguments.resume] if arguments.resume else []
    )
    outcome.clear(plan.run)
    (plan.run / outcome.REQUEST).unlink(missing_ok=True)
    within = f"a rank that hangs ends the job within {plan.timeout + plan.grace:g} s" if plan.timeout else "hangs last"
    print(f"{plan.world_size} ranks on {len(hosts)} hosts, logs in {plan.folder}; {within}", flush=True)
    return watch(plan, config.training.steps, arguments.timeout)


def prepare(
    arguments: argparse.Namespace,
    hosts: Mapping[str, int],
    config: RunConfig,
    module: str,
    options: Sequence[str],
) -> Plan:
    """Check the hosts, and write down what the ranks are to do. Raises LaunchError, one fault a line."""
    if (fault := checks.launcher_fault(arguments.launcher)) is not None:
        raise LaunchError(fault)
    if arguments.launcher != "pdsh" and len(set(hosts.values())) > 1:
        raise LaunchError(f"--launcher {arguments.launcher} needs the same number of slots on every host; use pdsh")
    run = config.output_dir.absolute()
    key = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:12]
    job = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = Path(arguments.log_dir or run / outcome.LOGS).absolute() / job
    passed = passed_on(os.environ, arguments.export)
    passed[node.MARK] = f"{key}-{job}"
    _check_plain(passed)
    folder.mkdir(parents=True)
    try:
        token = f"token-{secrets.token_hex(8)}"
        (folder / token).touch()
        answers = check(arguments, hosts, config, folder, token, key, passed.get("DS_ACCELERATOR") == "cpu")
        (folder / token).unlink()
        master = next(iter(answers.values())).value
        address = arguments.master_addr or (master["addresses"] or [next(iter(hosts)).rpartition("@")[2]])[0]
        if not _PLAIN.fullmatch(address):
            raise LaunchError(f"--master-addr {address!r}: an address or a host's name expected")
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        (folder / "hosts").write_text("".join(f"{h} slots={n}\n" for h, n in hosts.items()), encoding="utf-8")
        environment_file = folder / "environment"
        environment_file.write_text("".join(f"{k}={v}\n" for k, v in passed.items()), encoding="utf-8")
        plan = Plan(
            hosts=hosts,
            hostfile=folder / "hosts",
            launcher=arguments.launcher,
            launcher_args=arguments.launcher_args,
            module=module,
            arguments=["--config", str(folder / "config.yaml"), *options],
            folder=folder,
            run=run,
            mark=passed[node.MARK],
            master_addr=address,
            master_port=master["port"],
            environment=runner_environment(environment_file),
            timeout=config.hangs.timeout,
            grace=arguments.grace,
            start=arguments.start_timeout,
        )
        write_plan(plan)
    except BaseException:
        for path in folder.iterdir():
            path.unlink()
        for empty in (folder, *folder.parents[: 2 if arguments.log_dir is None else 0]):
            if any(empty.iterdir()):
                break
            empty.rmdir()
        raise
    return plan


def write_plan(plan: Plan) -> None:
    """launch.json: what rank.py reads."""
    values: dict[str, Any] = {
        "module": plan.module,
        "arguments": list(plan.arguments),
        "cwd": str(Path.cwd()),
        "world_size": plan.world_size,
        "hosts": dict(plan.hosts),
        "master_addr": plan.master_addr,
        "master_port": plan.master_port,
        "launcher": plan.launcher,
        "mark": plan.mark,
    }
    (plan.folder / rank.PLAN).write_text(json.dumps(values, indent=1), encoding="utf-8")


def check(
    arguments: argparse.Namespace,
    hosts: Mapping[str, int],
    config: RunConfig,
    folder: Path,
    token: str,
    key: str,
    on_cpus: bool,
) -> dict[str, remote.Answer]:
    """Every host's report, all at once. Raises LaunchError with all that is wrong."""
    by = "srun" if arguments.launcher == "slurm" else "ssh"
    request = {"action": "report", "folder": str(folder), "token": token, "corpora": checks.corpora(config)}
    request["port"] = arguments.master_port
    answers = remote.ask(hosts, request, timeout=_CHECK_SECONDS, by=by)
    lines = checks.faults(hosts, answers, folder=folder, port=arguments.master_port, on_cpus=on_cpus)
    jobs = checks.job_faults(answers, key)
    if jobs and not arguments.force:
        lines += [*jobs, "two jobs on a host share its GPUs, and a signal to one's launcher may end both: --force?"]
    if lines:
        raise LaunchError("the hosts are not ready:\n  " + "\n  ".join(lines))
    if jobs:
        print("\n".join(f"warning: {line}" for line in jobs), file=sys.stderr)
        remote.ask(hosts, {"action": "end", "mark": f"{key}-"}, timeout=_CHECK_SECONDS, by=by)
    return answers


def passed_on(environment: Mapping[str, str], exports: Sequence[str]) -> dict[str, str]:
    """What the ranks get of this machine's environment. exports: NAME, or NAME=VALUE."""
    found = {name: value for name, value in environment.items() if name.startswith(PASSED)}
    # Tools beside the interpreter (ninja) must be those of its own environment.
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    home = Path(cluster.__file__).resolve().parents[1]
    if "site-packages" not in home.parts:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))
    for export in exports:
        name, equals, value = export.partition("=")
        if not _NAME.fullmatch(name):
            raise LaunchError(f"--export {export}: {name!r} is no name of a variable")
        if not equals and name not in environment:
            raise LaunchError(f"--export {export}: not set here; give NAME=VALUE")
        found[name] = value if equals else environment[name]
    return found


def _check_plain(passed: Mapping[str, str]) -> None:
    for name, value in passed.items():
        if not _NAME.fullmatch(name):
            raise LaunchError(f"the environment's {name!r} is no name that a shell takes; unset it")
        if not _PLAIN.fullmatch(value):
            raise LaunchError(
                f"{name}={value!r} cannot be passed to the hosts: letters, digits and _@+=:,./~- alone come through "
                f"their shells as they are; unset it, or give --export {name}=VALUE"
            )
    if not _PLAIN.fullmatch(sys.executable):
        raise LaunchError(f"{sys.executable}: DeepSpeed's launchers need a path without spaces and signs for Python")


def runner_environment(environment_file: Path) -> dict[str, str]:
    """Of DeepSpeed's runner: nothing that it would export by itself, keep-alive for ssh."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_DEEPSPEED_PASSES) or k == "PYTHONPATH"}
    home = str(Path(cluster.__file__).resolve().parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [home, kept.get("PYTHONPATH")]))
    kept["DS_ENV_FILE"] = str(environment_file)
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    # Without these pdsh waits for ever for a host whose link is cut.
    more = f"{' '.join(remote.SSH_OPTIONS)}"
    kept["PDSH_SSH_ARGS_APPEND"] = " ".join(filter(None, [kept.get("PDSH_SSH_ARGS_APPEND"), more]))
    return kept


class Signals:
    """The first SIGTERM, SIGUSR1 or SIGHUP asks the ranks to save and stop; SIGINT, or a second, ends all."""

    def __init__(self, run: Path) -> None:
        self.last: int | None = None
        self._run, self._asked = run, False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._asked or number == signal.SIGINT:
            self.last = number
        else:
            self.ask(signal.Signals(number).name)

    def ask(self, why: str) -> None:
        self._asked = True
        (self._run / outcome.REQUEST).write_text(why + "\n", encoding="utf-8")
        # Not print: a handler may have interrupted one.
        os.write(2, f"{why}: the ranks were asked to save and stop; a second signal ends them at once\n".encode())

    @property
    def asked(self) -> bool:
        return self._asked


def watch(plan: Plan, steps: int, timeout: float | None = None) -> int:
    """Start the ranks and stay with them; → the exit status. steps: at which the run is done."""
    signals = Signals(plan.run)
    job = Job(plan)
    why: str | None = None
    try:
        while (why := job.wait()) is None and signals.last is None:
            if timeout and time.monotonic() - job.begun > timeout and not signals.asked:
                signals.ask(f"--timeout {timeout:g}")
            time.sleep(POLL)
    finally:
        ended = dict(job.ranks.ended)
        answers = job.end()
    (plan.run / outcome.REQUEST).unlink(missing_ok=True)
    if outcome.completed(plan.run, steps):
        print(f"done: {steps} steps, {plan.run}")
        return 0
    if (step := outcome.step_of(plan.run, outcome.STOPPED)) is not None:
        print(f"stopped at step {step}, as a signal asked; --resume auto goes on", file=sys.stderr)
        return outcome.EXIT_STOPPED
    if signals.last is not None:
        print(f"{signal.Signals(signals.last).name}: everything was ended at once", file=sys.stderr)
        return 128 + signals.last
    lines = [*([why] if why else []), *job.explain(answers, ended)]
    print(f"error: the ranks ended before step {steps}; the same command with --resume auto goes on", file=sys.stderr)
    print("\n".join(f"  {line}" for line in lines), file=sys.stderr)
    return 1
