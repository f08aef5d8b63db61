"""/proc compared with psutil; death with the parent; exit descriptions."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from maskvr_ds.runtime import processes

WAITS = "import time; print('up', flush=True); time.sleep(600)"
# Starts a child that dies with the process in its argument (0: this one), prints its pid and waits.
PARENT = """
import os, subprocess, sys
from functools import partial
from maskvr_ds.runtime.processes import die_with_parent
child = subprocess.Popen(["sleep", "600"], preexec_fn=partial(die_with_parent, int(sys.argv[1]) or os.getpid()))
print(child.pid, flush=True)
if int(sys.argv[1]):
    sys.exit(child.wait() != 137)
input()
"""


def test_start_time_and_state_match_psutil() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started = processes.start_time(process.pid)
        assert started is not None
        # psutil adds the boot time, which /proc/stat gives in integer seconds.
        seconds = started / os.sysconf("SC_CLK_TCK")
        assert abs(psutil.boot_time() + seconds - psutil.Process(process.pid).create_time()) < 0.02
        assert processes.start_time(os.getpid()) != started
        process.send_signal(signal.SIGSTOP)
        while processes.state(process.pid) != "T":
            time.sleep(0.01)
        process.kill()
        while processes.state(process.pid) != "Z":
            time.sleep(0.01)
        assert processes.start_time(process.pid) is None, "a zombie is not running"
    assert (processes.start_time(process.pid), processes.state(process.pid)) == (None, "?")


def test_a_command_name_with_parentheses() -> None:
    rename = "import sys; open('/proc/self/comm', 'w').write('a) S 1 ('); " + WAITS
    with subprocess.Popen([sys.executable, "-c", rename], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes.state(process.pid) in "SR"
        assert processes.start_time(process.pid) is not None
        process.kill()


def test_process_age() -> None:
    code = "from maskvr_ds.runtime.processes import process_age as age; import time; a = age(); time.sleep(1); "
    code += "print(a, age())"
    start = time.monotonic()
    words = [sys.executable, "-c", code]
    first, second = map(float, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    assert second - first >= 1
    assert 0 <= first < second < time.monotonic() - start + 0.05


def test_pid_namespace() -> None:
    assert processes.pid_namespace() == os.readlink("/proc/self/ns/pid")  # noqa: PTH115


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "killed by SIGTERM"),
        (
            "import os, signal; os.kill(os.getpid(), 9)",
            "killed by SIGKILL (by hand, or by the kernel when memory ran out)",
        ),
        ("import os; os.kill(os.getpid(), 40)", "killed by signal 40"),
    ],
)
def test_describe_exit(code: str, text: str) -> None:
    process = subprocess.run([sys.executable, "-c", code], check=False)
    assert processes.describe_exit(process.returncode) == text


def test_a_child_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, "0"], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    assert psutil.wait_procs([child], timeout=30)[1] == []


def test_a_child_whose_parent_is_already_dead_does_not_start() -> None:
    """The parent may die between fork and prctl; the child's parent is then no longer `parent`."""
    parent = subprocess.run([sys.executable, "-c", PARENT, "1000000000"], capture_output=True, timeout=60, check=False)
    assert parent.returncode == 0


def test_sigterm_raises_in_a_block() -> None:
    """What the block has to clean up is cleaned up, also if the signal comes twice; then the old handler is back."""
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def work() -> None:
        with processes.exit_on_sigterm():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                cleaned.append(True)

    with pytest.raises(SystemExit) as left:
        work()
    assert left.value.code == 143
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before
