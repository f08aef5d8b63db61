"""Preparation of a launch: its folder, the environment of the ranks, the checks of all hosts, the resulting plan."""

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
from maskvr_ds.run_folder.status import LONGEST_BEAT
from maskvr_ds.runtime.heartbeats import BEATS_PER_TIMEOUT
from maskvr_ds.runtime.hostfile import is_host
from maskvr_ds.runtime.numbers import MAX_SECONDS, integer, number

# In the launch's folder: the resolved configuration, read by the ranks.
CONFIG = "config.yaml"
# Environment variables passed to the ranks. No secrets: `ps` shows them on every host.
_EXPORTED = re.compile(
    "(NCCL|GLOO|UCX|FI|OMP|MKL|CUDA_LAUNCH|CUDA_DEVICE|TORCH|PYTORCH|TRITON|HF_HUB|TOKENIZERS)_.*|PYTHON.*"
    "|PATH|LD_LIBRARY_PATH|HF_HOME|DS_ACCELERATOR"
)
# DeepSpeed exports variables with these prefixes, without quoting them for the shell.
_DEEPSPEED_EXPORTS = ("MLFLOW", "MV2", "PYTHON", "UCX", "NCCL")
# Characters without a special meaning in any shell, in pdsh (%) and in mpirun.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./~-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Timeout for a host's report, which imports no torch.
_REPORT_SECONDS = 60


def add_launch_options(parser: argparse.ArgumentParser, force: str) -> None:
    """Options of the commands that start ranks. force: help of --force."""
    parser.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="default: pdsh")
    parser.add_argument("--launcher-args", default="", metavar="WORDS", help="further options for pdsh, mpirun or srun")
    parser.add_argument("--master-addr", metavar="ADDRESS", help="default: the master's first one, by `hostname -I`")
    parser.add_argument(
        "--master-port",
        type=integer(0, 65_535),
        default=0,
        metavar="PORT",
        help="default: a free one on the master",
    )
    parser.add_argument("--log-dir", metavar="DIR", help="default: RUN/logs; on a file system that all nodes share")
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="further environment variable for the ranks; may be repeated. PATH, NCCL_* and others are always passed",
    )
    parser.add_argument(
        "--start-timeout",
        type=number(0, MAX_SECONDS),
        default=1800,
        metavar="SECONDS",
        help="until all ranks train (default: 1800)",
    )
    parser.add_argument(
        "--grace",
        type=number(0, MAX_SECONDS),
        default=15,
        metavar="SECONDS",
        help="from the first failure of a rank until the others are killed (default: 15)",
    )
    parser.add_argument(
        "--minimum-free",
        type=number(0, 1e9),
        default=10,
        metavar="GIB",
        help="required on the run's disk (default: 10)",
    )
    parser.add_argument(
        "--clock",
        type=number(0, MAX_SECONDS),
        default=2,
        metavar="SECONDS",
        help="clock offset allowed (default: 2)",
    )
    parser.add_argument("--force", action="store_true", help=force)


class Draft:
    """A launch that is being prepared. Creates the launch's folder; `discard` removes it again.

    Raises LaunchError for errors that can be found without asking the hosts.
    """

    def __init__(self, arguments: argparse.Namespace, hosts: Mapping[str, int], config: RunConfig) -> None:
        self.arguments, self.hosts, self.config = arguments, hosts, config
        if (error := checks.launcher_error(arguments.launcher, _path())) is not None:
            raise LaunchError(error)
        if arguments.launcher != "pdsh" and len(set(hosts.values())) > 1:
            raise LaunchError(f"--launcher {arguments.launcher} needs the same number of slots on every host; use pdsh")
        self.run = config.output_dir.absolute()
        self.key = run_key(self.run)
        job = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self.exports = exported_variables(os.environ, arguments.export)
        self.exports[node.MARK] = f"{self.key}-{job}"
        check_exportable(self.exports, arguments.launcher)
        self.on_cpus = self.exports.get("DS_ACCELERATOR") == "cpu"
        self.transport = "srun" if arguments.launcher == "slurm" else "ssh"
        self.folder = Path(arguments.log_dir or self.run / layout.LOGS).absolute() / job
        self._created = [self.folder, *(p for p in self.folder.parents if not p.exists())]
        self.folder.mkdir(parents=True)

    def ask(self) -> dict[str, remote.Answer]:
        """The reports of all hosts (see node.report)."""
        token = self.folder / f"token-{secrets.token_hex(8)}"
        token.touch()
        request: dict[str, Any] = {"action": "report", "folder": str(self.folder), "token": token.name}
        request |= {"corpora": checks.corpora(self.config), "port": self.arguments.master_port}
        try:
            return remote.ask(self.hosts, request, timeout=_REPORT_SECONDS, transport=self.transport)
        finally:
            token.unlink()

    def errors(self, answers: Mapping[str, remote.Answer]) -> list[str]:
        """Errors that prevent the launch, one line each. With --force, other jobs on the hosts are only warned of."""
        lines = [line for found in self.errors_of_hosts(answers).values() for line in found]
        jobs = self.jobs(answers)
        if not self.arguments.force:
            return lines + jobs
        if not lines:
            warn(jobs)
        return lines

    def errors_of_hosts(self, answers: Mapping[str, remote.Answer]) -> dict[str, list[str]]:
        """Errors by what was checked, other jobs on the hosts not included."""
        port = self.arguments.master_port
        found = checks.host_errors(self.hosts, answers, folder=self.folder, port=port, on_cpus=self.on_cpus)
        return {**found, "disk": checks.disk_errors(answers, self.folder, self.arguments.minimum_free)}

    def jobs(self, answers: Mapping[str, remote.Answer]) -> list[str]:
        """Other jobs on the hosts."""
        return checks.job_errors(answers, self.key)

    def inconsistencies(self, answers: Mapping[str, remote.Answer]) -> list[str]:
        """Differences between hosts that slow a run or confuse its logs, one line each."""
        return checks.inconsistencies(answers, self.arguments.clock)

    def kill_earlier(self, answers: Mapping[str, remote.Answer]) -> None:
        """Kill processes of earlier launches of this run on the hosts. Raises LaunchError if some survive."""
        if not checks.job_errors(answers, self.key):
            return
        request = {"action": "kill", "mark": f"{self.key}-"}
        killed = remote.ask(self.hosts, request, timeout=_REPORT_SECONDS, transport=self.transport)
        lines = [f"{host}: {answer.error}" for host, answer in killed.items() if answer.error is not None]
        for host, answer in killed.items():
            if alive := answer.value.get("alive"):
                lines.append(remote.unkillable(host, alive))
        if lines:
            raise LaunchError("nothing was started:\n  " + "\n  ".join(lines))

    def plan(self, answers: Mapping[str, remote.Answer], module: str, options: Callable[[Path], Sequence[str]]) -> Plan:
        """Write the files that the ranks read, and return the plan: they run `module` with options(launch's folder)."""
        arguments, folder = self.arguments, self.folder
        first = next(iter(self.hosts))
        master = answers[first].value
        address = arguments.master_addr or (master["addresses"] or [first.rpartition("@")[2]])[0]
        if not is_host(address):
            raise LaunchError(f"--master-addr {address!r}: an address or a host name expected")
        (folder / CONFIG).write_text(dump_config(self.config), encoding="utf-8")
        (folder / "hosts").write_text("".join(f"{h} slots={n}\n" for h, n in self.hosts.items()), encoding="utf-8")
        variables = folder / "environment"
        variables.write_text("".join(f"{k}={v}\n" for k, v in self.exports.items()), encoding="utf-8")
        plan = Plan(
            hosts=self.hosts,
            hostfile=folder / "hosts",
            launcher=arguments.launcher,
            launcher_args=arguments.launcher_args,
            folder=folder,
            run=self.run,
            mark=self.exports[node.MARK],
            master_addr=address,
            master_port=master["port"],
            environment=runner_environment(variables),
            timeout=self.config.hangs.timeout,
            grace=arguments.grace,
            start_timeout=arguments.start_timeout,
        )
        content = {
            "module": module,
            "arguments": options(folder),
            "cwd": str(Path.cwd()),
            "world_size": plan.world_size,
            "beat": min(plan.timeout / BEATS_PER_TIMEOUT, LONGEST_BEAT) if plan.timeout else LONGEST_BEAT,
            "hosts": dict(plan.hosts),
            "master_addr": plan.master_addr,
            "master_port": plan.master_port,
            "launcher": plan.launcher,
            "mark": plan.mark,
        }
        (folder / rank.PLAN).write_text(json.dumps(content, indent=1), encoding="utf-8")
        return plan

    def discard(self) -> None:
        """Remove the launch's folder, and its parents if this launch created them and they are empty."""
        for path in self.folder.iterdir():
            path.unlink()
        with contextlib.suppress(OSError):  # not empty: another launch has a folder there
            for folder in self._created:
                folder.rmdir()


def run_key(run: Path) -> str:
    """Prefix of the marks of all launches of a run."""
    return hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:12]


def warn(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def exported_variables(environment: Mapping[str, str], exports: Sequence[str]) -> dict[str, str]:
    """Environment of the ranks. exports: more NAME or NAME=VALUE. Raises LaunchError if one is malformed or unset."""
    variables = {name: value for name, value in environment.items() if _EXPORTED.fullmatch(name)}
    variables["PATH"] = _path()
    home = Path(cluster.__file__).resolve().parents[1]
    if "site-packages" not in home.parts:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))
    for export in exports:
        name, equals, value = export.partition("=")
        if not _NAME.fullmatch(name):
            raise LaunchError(f"--export {export}: {name!r} is not the name of a variable")
        if not equals and name not in environment:
            raise LaunchError(f"--export {export}: not set here; give NAME=VALUE")
        variables[name] = value if equals else environment[name]
    return variables


def _path() -> str:
    """PATH in which tools installed with the interpreter (ninja, mpirun) come first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def check_exportable(variables: Mapping[str, str], launcher: str = "pdsh") -> None:
    """Raise LaunchError for names and values that the launcher and the shells would not pass unchanged."""
    for name, value in variables.items():
        if not _NAME.fullmatch(name):
            raise LaunchError(f"environment variable {name!r}: not a valid name in a shell; unset it")
        if not _PLAIN.fullmatch(value):
            raise LaunchError(
                f"{name}={value!r} cannot be passed to the hosts: shells leave only letters, digits and _@+=:,./~- "
                f"unchanged; unset it, or pass --export {name}=VALUE"
            )
        if launcher == "slurm" and "," in value:
            raise LaunchError(f"{name}={value!r} cannot be passed: srun --export starts the next variable at a comma")
    if not _PLAIN.fullmatch(sys.executable):
        raise LaunchError(f"{sys.executable}: DeepSpeed's launchers need a Python path without special characters")


def runner_environment(variables: Path) -> dict[str, str]:
    """Environment of DeepSpeed's runner: without variables that it would export on its own, with ssh keep-alive.

    variables: file of NAME=VALUE lines, which it exports.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_DEEPSPEED_EXPORTS)}
    home = str(Path(cluster.__file__).resolve().parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    kept["DS_ENV_FILE"] = str(variables)
    kept["PATH"] = _path()
    # Without these, pdsh waits forever for a host whose link is down.
    words = [kept.get("PDSH_SSH_ARGS_APPEND"), *remote.SSH_OPTIONS]
    kept["PDSH_SSH_ARGS_APPEND"] = " ".join(filter(None, words))
    return kept
