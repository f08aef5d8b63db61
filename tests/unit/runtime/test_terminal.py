"""Printing to a closed pipe or terminal: the process continues and exits with its own status."""

import os
import pty
import subprocess
import sys

import pytest

CODE = """
import sys
from maskvr_ds.runtime import terminal
terminal.say("ready")
sys.stdin.readline()
print("buffered", end="")
terminal.say("to standard output")
terminal.say("again")
terminal.alert("to standard error")
sys.exit(75)
"""


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_closed_reader(kind: str) -> None:
    ours, theirs = pty.openpty() if kind == "terminal" else os.pipe()
    words = [sys.executable, "-c", CODE]
    # Unbuffered, Python would have nothing left to flush at exit.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 5) == b"ready"
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 75
