"""A real Slurm cluster of two nodes on one machine, in its own process, mount and network namespaces.

It is invisible from outside, and everything ends with the namespace's first process, which exits when its standard
input is closed, even if pytest is killed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.distributed.training import environment

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "unshare", "nsenter", "ip")
# Seconds: how long a node may be silent, from SIGTERM to SIGKILL, until credentials expire (which delays requeues).
_SILENCE, _KILL_WAIT, _CREDENTIALS = 6, 3, 5

_CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credentials}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
SlurmdTimeout={silence}
MinJobAge=300
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=1 RealMemory=4000 Gres=gpu:2
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=patient Nodes=ALL State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""

# bash stays the first process and reaps orphans.
# Without an address outside the loopback network, resolvers assume that there is no network.
_START = """set -e
ip link set lo up
ip address add 10.0.0.1/32 dev lo
mount --bind "$1/hosts" /etc/hosts
munged --force --key-file="$1/munge/key" --socket="$1/munge.socket" --pid-file="$1/munge/pid" \
    --log-file="$1/munge/log" --seed-file="$1/munge/seed" --num-threads=2
slurmctld
for node in n1 n2; do slurmd -N $node; done
echo up
cat >/dev/null
"""


def missing() -> str | None:
    """Why a cluster cannot run here; None if it can."""
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"not installed: {', '.join(absent)}"
    probe = subprocess.run(["unshare", "--pid", "--mount", "--net", "--fork", "true"], capture_output=True, text=True)
    return probe.stderr.strip() if probe.returncode else None


class Cluster:
    """A handle on the cluster from outside its namespaces. folder: its configuration, logs and state."""

    def __init__(self, folder: Path, process: "subprocess.Popen[str]") -> None:
        self.folder = folder
        self._first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()[0]

    def command(self, *words: object) -> list[str]:
        """The command line that runs `words` as on a login node."""
        enter = ["nsenter", f"--target={self._first}", "--pid", "--mount", "--net", f"--wdns={self.folder}"]
        return [*enter, *map(str, words)]

    def run(self, *words: object, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        variables = {**environment(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        result = subprocess.run(
            self.command(*words), env=variables, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        return result

    def tool(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python -m cluster …`."""
        return self.run(sys.executable, "-m", "cluster", *words, check=check)

    def sbatch(self, *words: object) -> str:
        """Submit; returns the job id."""
        return self.run("sbatch", "--parsable", *words).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The controller's fields of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(field.partition("=")[::2] for field in text.split() if "=" in field)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").stdout.split("\n")
        return dict(line.split() for line in lines if line)  # type: ignore[misc]

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = 300, every: float = 0.4) -> Any:
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what}: not within {timeout} s\n{self.describe()}"
            time.sleep(every)
        return value

    def wait_idle(self) -> None:
        """Wait until both nodes are up and idle."""
        self.wait_until(lambda: set(self.node_states().values()) == {"idle"}, "both nodes idle", timeout=60)

    def describe(self) -> str:
        queue = self.run("squeue", "--all", check=False).stdout
        logs = [f"--- {path}\n{path.read_text()[-3000:]}" for path in self.folder.glob("slurm*.log")]
        return "\n".join([queue, str(self.node_states()), *logs])

    def processes(self, node: str, text: str) -> list[int]:
        """Outside pids of processes that Slurm started on a node and whose command line contains `text`."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = (path / "environ").read_bytes().split(b"\0")
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            ours = f"SLURM_CONF={self.folder}/slurm.conf".encode() in variables
            if ours and f"SLURMD_NODENAME={node}".encode() in variables and text in line:
                found.append(int(path.name))
        return found

    def kill_daemon(self, node: str) -> None:
        """SIGKILL the node's slurmd; its jobs keep running."""
        self.run("kill", "-KILL", (self.folder / f"slurmd-{node}.pid").read_text().strip())

    def crash(self, node: str) -> None:
        """SIGKILL all processes of a node at once, as a power failure would."""
        self.kill_daemon(node)
        for pid in [*self._step_daemons(node), *self.processes(node, "")]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _step_daemons(self, node: str) -> list[int]:
        """slurmstepd overwrites its environment, so it is recognised by the log that it holds open."""
        log, found = str(self.folder / f"slurmd-{node}.log"), []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                held = [str(link.readlink()) for link in (path / "fd").iterdir()]
                if log in held and (path / "comm").read_text().startswith("slurmstepd"):
                    found.append(int(path.name))
        return found

    def revive(self, node: str) -> None:
        self.run("slurmd", "-N", node)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A running cluster with its files in an empty `folder`; shut down at the end."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o600)
    host = os.uname().nodename.split(".")[0]
    (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
    times = {"silence": _SILENCE, "kill_wait": _KILL_WAIT, "credentials": _CREDENTIALS}
    (folder / "slurm.conf").write_text(_CONF.format(host=host, folder=folder, **times))
    # Nothing opens these devices; they let jobs that ask for GPUs be accepted.
    devices = [f"NodeName=n[1-2] Name=gpu File={device}\n" for device in ("/dev/null", "/dev/zero")]
    (folder / "gres.conf").write_text("".join(devices))
    # If cgroups are not mounted, slurmd requires version 1 to be named.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    unshare = ["unshare", "--pid", "--mount", "--net", "--fork", "--kill-child", "--mount-proc"]
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(
            [*unshare, "bash", "-c", _START, "bash", str(folder)],
            env={**environment(), "SLURM_CONF": str(folder / "slurm.conf")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n", (folder / "start.log").read_text()
        made = Cluster(folder, process)
        made.wait_idle()
        yield made
    finally:
        process.communicate(timeout=60)


def dump(path: Path, values: dict[str, Any]) -> Path:
    """Write a configuration file; JSON is YAML."""
    path.write_text(json.dumps(values), encoding="utf-8")
    return path
