"""Messages above a progress bar start on a line of their own."""

import io
import logging

import pytest
from tqdm import tqdm

from maskvr_ds.runtime.logs import TerminalHandler


def lines_of(written: str) -> list[str]:
    """What a terminal shows: after a carriage return, a line is overwritten."""
    shown = []
    for line in written.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        shown.append("".join(cells).rstrip())
    return shown


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_message_does_not_continue_the_bar(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    bar = tqdm(total=10, file=screen, bar_format="{n_fmt} of {total_fmt} steps", mininterval=0)
    TerminalHandler().emit(logging.LogRecord("x", level, "", 0, "model of 5 parameters", None, None))
    bar.update()
    bar.close()
    assert lines_of(screen.getvalue()) == ["model of 5 parameters", "1 of 10 steps", ""]


def test_closed_bar_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, closed = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", screen)
    bar = tqdm(total=10, file=closed)
    closed.close()
    TerminalHandler().emit(logging.LogRecord("x", logging.INFO, "", 0, "text", None, None))
    assert screen.getvalue() == "text\n"
    bar.disable = True
