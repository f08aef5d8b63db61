"""What a launch is made of: its folder, the environment of its ranks, what its hosts answer, and then its plan."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cluster
from cluster.hosts import checks, node, rank, remote
from cluster.hosts.checks import LaunchError
from cluster.hosts.supervisor import LAUNCHERS, Plan
from maskvr_ds.config import RunConfig, dump_config
from maskvr_ds.run_folder import layout

CONFIG = "config.yaml"
# What of this machine's environment goes to the ranks. No secrets: `ps` shows them on every host.
_PASSED = re.compile(
    "(NCCL|GLOO|UCX|FI|OMP|MKL|CUDA_LAUNCH|CUDA_DEVICE|TORCH|PYTORCH|TRITON|HF_HUB|TOKENIZERS)_.*|PYTHON.*"
    "|PATH|LD_LIBRARY_PATH|HF_HOME|DS_ACCELERATOR"
)
# DeepSpeed exports what begins so as it is, whatever a shell makes of it.
_DEEPSPEED_PASSES = ("MLFLOW", "MV2", "PYTHON", "UCX", "NCCL")
# Stands for itself in every shell, in pdsh (no %) and for mpirun.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./~-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Within hangs.timeout, as in watchdog.py.
_BEATS = 8
# For a host to answer; without --start-timeout's imports.
_ANSWER_SECONDS = 60


def add_options(parser: argparse.ArgumentParser, force: str) -> None:
    """How ranks are started, for every command that does. force: what --force means to this one."""
    parser.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="default: pdsh")
    parser.add_argument("--launcher-args", default="", metavar="WORDS", help="more options for pdsh, mpirun or srun")
    parser.add_argument("--master-addr", metavar="ADDRESS", help="default: what `hostname -I` says first on the master")
    parser.add_argument("--master-port", type=int, default=0, metavar="PORT", help="default: one that is free there")
    parser.add_argument("--log-dir", metavar="DIR", help="default: RUN/logs; on a file system that all nodes share")
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the ranks; many are passed",
    )
    parser.add_argument(
        "--start-timeout", type=float, default=1800, metavar="SECONDS", help="until all ranks train (default: 1800)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=15,
        metavar="SECONDS",
        help="from the first rank's fault to the end of all (default: 15)",
    )
    parser.add_argument("--minimum-free", type=float, default=10, metavar="GIB", help="on the run's disk (default: 10)")
    parser.add_argument("--clock", type=float, default=2, metavar="SECONDS", help="offset allowed (default: 2)")
    parser.add_argument("--force", action="store_true", help=force)


class Draft:
    """A launch before it begins. Makes its folder; `discard` takes that away again.

    Raises LaunchError for what this machine can tell without the hosts.
    """

    def __init__(self, arguments: argparse.Namespace, hosts: Mapping[str, int], config: RunConfig) -> None:
        self.arguments, self.hosts, self.config = arguments, hosts, config
        if (fault := checks.launcher_fault(arguments.launcher, _path())) is not None:
            raise LaunchError(fault)
        if arguments.launcher != "pdsh" and len(set(hosts.values())) > 1:
            raise LaunchError(f"--launcher {arguments.launcher} needs the same number of slots on every host; use pdsh")
        self.run = config.output_dir.absolute()
        self.key = run_key(self.run)
        job = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self.passed = passed_on(os.environ, arguments.export)
        self.passed[node.MARK] = f"{self.key}-{job}"
        check_plain(self.passed, arguments.launcher)
        self.by = "srun" if arguments.launcher == "slurm" else "ssh"
        self.folder = Path(arguments.log_dir or self.run / layout.LOGS).absolute() / job
        self._made = [self.folder, *(p for p in self.folder.parents if not p.exists())]
        self.folder.mkdir(parents=True)

    def ask(self) -> dict[str, remote.Answer]:
        """Every host's report, all at once, within a stated time."""
        token = self.folder / f"token-{secrets.token_hex(8)}"
        token.touch()
        request: dict[str, Any] = {"action": "report", "folder": str(self.folder), "token": token.name}
        request |= {"corpora": checks.corpora(self.config), "port": self.arguments.master_port}
        try:
            return remote.ask(self.hosts, request, timeout=_ANSWER_SECONDS, by=self.by)
        finally:
            token.unlink()

    def faults(self, answers: Mapping[str, remote.Answer]) -> list[str]:
        """What must be mended first, a line each. With --force jobs that are there already are but told of."""
        port, on_cpus = self.arguments.master_port, self.passed.get("DS_ACCELERATOR") == "cpu"
        lines = checks.faults(self.hosts, answers, folder=self.folder, port=port, on_cpus=on_cpus)
        lines += checks.disk_faults(answers, self.folder, self.arguments.minimum_free)
        jobs = checks.job_faults(answers, self.key)
        if not self.arguments.force:
            return lines + jobs
        if not lines:
            warn(jobs)
        return lines

    def unevenness(self, answers: Mapping[str, remote.Answer]) -> list[str]:
        """What had better be mended, a line each."""
        return checks.unevenness(answers, self.arguments.clock)

    def end_earlier(self, answers: Mapping[str, remote.Answer]) -> None:
        """End what earlier launches of this run have left on the hosts. Raises LaunchError where some of it stays."""
        if not checks.job_faults(answers, self.key):
            return
        ended = remote.ask(self.hosts, {"action": "end", "mark": f"{self.key}-"}, timeout=_ANSWER_SECONDS, by=self.by)
        lines = [f"{host}: {answer.fault}" for host, answer in ended.items() if answer.fault is not None]
        for host, answer in ended.items():
            if left := answer.value.get("left"):
                pids = ", ".join(str(process["pid"]) for process in left)
                lines.append(f"{host}: processes {pids} do not end; they wait for a device or file system")
        if lines:
            raise LaunchError("nothing was started:\n  " + "\n  ".join(lines))

    def plan(self, answers: Mapping[str, remote.Answer], module: str, options: Callable[[Path], Sequence[str]]) -> Plan:
        """Write down what the ranks are to do: run `module` with options(folder of the launch)."""
        arguments, folder = self.arguments, self.folder
        first = next(iter(self.hosts))
        master = answers[first].value
        address = arguments.master_addr or (master["addresses"] or [first.rpartition("@")[2]])[0]
        if not _PLAIN.fullmatch(address):
            raise LaunchError(f"--master-addr {address!r}: an address or a host's name expected")
        (folder / CONFIG).write_text(dump_config(self.config), encoding="utf-8")
        (folder / "hosts").write_text("".join(f"{h} slots={n}\n" for h, n in self.hosts.items()), encoding="utf-8")
        variables = folder / "environment"
        variables.write_text("".join(f"{k}={v}\n" for k, v in self.passed.items()), encoding="utf-8")
        plan = Plan(
            hosts=self.hosts,
            hostfile=folder / "hosts",
            launcher=arguments.launcher,
            launcher_args=arguments.launcher_args,
            folder=folder,
            run=self.run,
            mark=self.passed[node.MARK],
            master_addr=address,
            master_port=master["port"],
            environment=runner_environment(variables),
            timeout=self.config.hangs.timeout,
            grace=arguments.grace,
            start=arguments.start_timeout,
        )
        said = {
            "module": module,
            "arguments": options(folder),
            "cwd": str(Path.cwd()),
            "world_size": plan.world_size,
            "beat": min(plan.timeout / _BEATS, rank.BEAT) if plan.timeout else rank.BEAT,
            "hosts": dict(plan.hosts),
            "master_addr": plan.master_addr,
            "master_port": plan.master_port,
            "launcher": plan.launcher,
            "mark": plan.mark,
        }
        (folder / rank.PLAN).write_text(json.dumps(said, indent=1), encoding="utf-8")
        return plan

    def discard(self) -> None:
        """Leave nothing of it."""
        for path in self.folder.iterdir():
            path.unlink()
        with contextlib.suppress(OSError):  # no more empty: another launch's
            for folder in self._made:
                folder.rmdir()


def run_key(run: Path) -> str:
    """What the marks of all launches of a run begin with."""
    return hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:12]


def warn(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def passed_on(environment: Mapping[str, str], exports: Sequence[str]) -> dict[str, str]:
    """What the ranks get of this machine's environment. exports: NAME, or NAME=VALUE. Raises LaunchError."""
    found = {name: value for name, value in environment.items() if _PASSED.fullmatch(name)}
    found["PATH"] = _path()
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


def _path() -> str:
    """Tools beside the interpreter (ninja, mpirun) must be those of its own environment."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def check_plain(passed: Mapping[str, str], launcher: str = "pdsh") -> None:
    """Raise LaunchError for names and values that would not come through launcher and shells as they are."""
    for name, value in passed.items():
        if not _NAME.fullmatch(name):
            raise LaunchError(f"the environment's {name!r} is no name that a shell takes; unset it")
        if not _PLAIN.fullmatch(value):
            raise LaunchError(
                f"{name}={value!r} cannot be passed to the hosts: letters, digits and _@+=:,./~- alone come through "
                f"their shells as they are; unset it, or give --export {name}=VALUE"
            )
        if launcher == "slurm" and "," in value:
            raise LaunchError(f"{name}={value!r} cannot be passed: to srun --export a comma begins the next variable")
    if not _PLAIN.fullmatch(sys.executable):
        raise LaunchError(f"{sys.executable}: DeepSpeed's launchers need a path without spaces and signs for Python")


def runner_environment(variables: Path) -> dict[str, str]:
    """Of DeepSpeed's runner: nothing that it would export by itself, and keep-alive for ssh. variables: a file of
    NAME=VALUE lines, which it exports."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_DEEPSPEED_PASSES)}
    home = str(Path(cluster.__file__).resolve().parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    kept["DS_ENV_FILE"] = str(variables)
    kept["PATH"] = _path()
    # Without these pdsh waits for ever for a host whose link is cut.
    words = [kept.get("PDSH_SSH_ARGS_APPEND"), *remote.SSH_OPTIONS]
    kept["PDSH_SSH_ARGS_APPEND"] = " ".join(filter(None, words))
    return kept
