"""Real ssh hosts on one machine: h1, h2 … each with its own network, hostname, processes, mounts and /dev/shm.

So has the head node, whose bridge connects the hosts. Everything lives in private namespaces and dies with the head's
first process, which exits when its stdin is closed: nothing survives the tests, however they end. Needs root.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAMS = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "pdsh")
_WRAPPERS = ("nsenter", "unshare")
SSHD = "/usr/sbin/sshd"
_HEAD = """
set -e
mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd
hostname head
ip link set lo up
ip link add br0 type bridge && ip addr add 10.77.0.254/24 dev br0 && ip link set br0 up
mount --bind "$0/hosts" /etc/hosts && mount --bind "$0/ssh_config" /etc/ssh/ssh_config
echo ready
cat
"""
# "$1": the host's number. The head creates the link.
_HOST = """
set -e
hostname "h$1"
mount -t tmpfs tmpfs /dev/shm
until ip link set eth0 up 2>/dev/null; do sleep 0.02; done
ip link set lo up && ip addr add "10.77.0.$1/24" dev eth0
exec /usr/sbin/sshd -D -f "$0/sshd_h$1.conf" -E "$0/sshd_h$1.log"
"""
_SSHD = """Port 22
ListenAddress 10.77.0.{number}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
MaxStartups 100
"""
_SSH = """Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def why_not() -> str | None:
    """Why ssh hosts cannot run here; None if they can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not Path(SSHD).exists():
        missing.append(SSHD)
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "namespaces with links of their own need root"
    trial = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return None if trial.returncode == 0 else f"unshare: {trial.stderr.decode().strip()}"


def require() -> None:
    """Skip if ssh hosts cannot run here; in CI, which can run them, that is a failure."""
    if (reason := why_not()) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"ssh hosts cannot be had: {reason}")
        pytest.skip(reason)


class SshHosts:
    """h1 … hN and the head. folder: keys and logs."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        folder.mkdir(mode=0o755, parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        names = "".join(f"10.77.0.{i} h{i}\n" for i in range(1, count + 1))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n10.77.0.254 head\n10.77.0.99 absent\n{names}")
        (folder / "ssh_config").write_text(_SSH.format(folder=folder))
        spaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._unshare = ["unshare", *spaces]
        self._head = subprocess.Popen(
            [*self._unshare, "bash", "-c", _HEAD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._head.stdout is not None
        assert self._head.stdout.readline() == b"ready\n"
        self._first = _inner(self._head.pid)
        self._hosts: dict[int, subprocess.Popen[bytes]] = {}
        for number in range(1, count + 1):
            self.boot(number)

    def boot(self, number: int) -> None:
        """Start a host, also after a crash."""
        (self.folder / f"sshd_h{number}.conf").write_text(_SSHD.format(number=number, folder=self.folder))
        self._hosts[number] = self.start([*self._unshare, "sh", "-c", _HOST, str(self.folder), str(number)])
        wait_until(lambda: self.pid(number) is not None)
        # Not in the head's process namespace: the pid is one of ours.
        on_bridge = ["nsenter", "-t", str(self._first), "-n", "ip", "link"]
        words = ["add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", str(self.pid(number))]
        subprocess.run([*on_bridge, *words], check=True)
        subprocess.run([*on_bridge, "set", f"v{number}", "master", "br0", "up"], check=True)
        wait_until(lambda: self.run(["ssh", "-o", "ConnectTimeout=2", f"h{number}", "true"]).returncode == 0)

    def pid(self, number: int) -> int | None:
        """The pid of the host's first process; None while it is starting."""
        inner = _inner(self._hosts[number].pid)
        try:
            # A wrapper is still in the head's namespaces.
            return None if psutil.Process(inner).name() in _WRAPPERS else inner
        except psutil.Error:
            return None

    def crash(self, number: int) -> None:
        """Kill all processes of the host; its link disappears."""
        pid = self.pid(number)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self._hosts[number].wait(30)

    def link(self, number: int, state: str) -> None:
        """Set the host's link. state: up, down."""
        subprocess.run(["nsenter", "-t", str(self._first), "-n", "ip", "link", "set", f"v{number}", state], check=True)

    def start(self, words: list[Any], **options: Any) -> "subprocess.Popen[bytes]":
        """Start a process on the head. The Popen is that of nsenter; `send` signals the process itself."""
        where = ["nsenter", "-t", str(self._first), "-n", "-m", "-u", "-i", "-p", f"--wdns={Path.cwd()}"]
        return subprocess.Popen([*where, *map(str, words)], **options)

    def run(self, words: list[Any], timeout: float = 120, **options: Any) -> "subprocess.CompletedProcess[str]":
        process = self.start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.kill(_inner(process.pid), signal.SIGKILL)
            raise AssertionError(f"{words}: not over within {timeout} s: {process.communicate()}") from None
        return subprocess.CompletedProcess(words, process.returncode, str(out), str(err))

    def on(self, number: int, *words: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command in the host's namespaces, whether its link is up or down."""
        where = ["nsenter", "-t", str(self.pid(number)), "-n", "-m", "-u", "-i", "-p"]
        return subprocess.run([*where, *map(str, words)], capture_output=True, text=True, check=False)

    def processes(self, number: int) -> list[tuple[psutil.Process, list[str]]]:
        """Processes of a host except sshd, with their command lines."""
        pid = self.pid(number)
        assert pid is not None
        found = []
        for process in psutil.Process(pid).children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and "sshd" not in process.name():
                    found.append((process, process.cmdline()))
            except psutil.Error:
                continue  # it has ended meanwhile
        return found

    def close(self) -> None:
        assert self._head.stdin is not None
        self._head.stdin.close()
        self._head.wait(30)
        for host in self._hosts.values():
            host.wait(30)


def send(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Signal a process started by `SshHosts.start`."""
    os.kill(_inner(process.pid), number)


def _inner(pid: int) -> int:
    """The process that nsenter and unshare have forked and wait for."""
    process = psutil.Process(pid)
    while process.name() in _WRAPPERS and (children := process.children()):
        process = children[0]
    return process.pid


def wait_until(condition: Callable[[], Any], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.02)
