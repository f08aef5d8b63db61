"""Commands whose reader goes away, as in `… | head`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.console import EXIT_CLOSED_PIPE, run_into_pipe

ROOT = Path(__file__).parents[2]
# Printed text is flushed at once, or at the end.
PRINTS = (
    "import sys; from data_pipeline.console import run_into_pipe; sys.exit(run_into_pipe(lambda: print('a', flush={})))"
)


def into_closed_pipe(*arguments: str) -> tuple[int, str]:
    """Status and standard error of Python with these arguments, whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, encoding="utf-8")
    os.close(writer)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.parametrize("flush", [False, True])
def test_a_command_ends_quietly_if_its_reader_has_gone(flush: bool) -> None:
    assert into_closed_pipe("-c", PRINTS.format(flush)) == (EXIT_CLOSED_PIPE, "")


def test_the_commands_do() -> None:
    assert into_closed_pipe("-m", "maskvr_ds.cli", "recipes") == (EXIT_CLOSED_PIPE, "")
    corpus = str(ROOT / "tests" / "data" / "acf4fb5" / "corpus")
    assert into_closed_pipe("-m", "data_pipeline", "inspect", corpus) == (EXIT_CLOSED_PIPE, "")


def test_a_pipe_to_somebody_else_is_an_error() -> None:
    def run() -> int:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_into_pipe(run)


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_the_status_is_that_of_the_command(returned: int | None, status: int) -> None:
    assert run_into_pipe(lambda: returned) == status
