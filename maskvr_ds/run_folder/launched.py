"""A launcher's view of the run that its ranks train: requests to stop, and how the run ended. Loads no torch.

A launcher chooses the token with which its ranks own the run (fence.py). It believes only status files that carry this
token, and asks only ranks that own the run to stop: a job that is refused, because another one has the run, neither
stops that job nor takes its end for its own.
"""

import re
import secrets
import time
from pathlib import Path

from maskvr_ds.run_folder import fence, status
from maskvr_ds.run_folder.layout import STOPPED

# Seconds since 1970 at which the launcher started, and something that makes it unique.
TOKEN = re.compile(r"(\d{1,12})\.[\w.-]{1,80}")


def launch_token(text: str) -> str:
    """The value of --launch; for argparse. Raises ValueError if it has another form."""
    if not TOKEN.fullmatch(text):
        raise ValueError(f"{text!r} is not SECONDS.TEXT")
    return text


def seconds_since(token: str) -> float | None:
    """Seconds since the launcher started that has chosen `token`, by the clocks of both hosts; None if none has."""
    match = TOKEN.fullmatch(token)
    return None if match is None else max(0.0, time.time() - int(match[1]))


class Launched:
    """The ranks that a launcher starts on a run. Give them `options`, and call `deliver` now and then."""

    def __init__(self, run: Path) -> None:
        self.token = f"{int(time.time())}.{secrets.token_hex(8)}"
        self.options = ["--launch", self.token]
        self._run = run
        self._pending: str | None = None

    def request_stop(self, why: str) -> None:
        """Ask the ranks to save and stop, as soon as they own the run."""
        self._pending = why
        self.deliver()

    def deliver(self) -> None:
        """Make the request to stop, if there is one and the ranks own the run."""
        if self._pending is not None and self._owns():
            status.request_stop(self._run, self._pending, self.token)
            self._pending = None

    def withdraw(self) -> None:
        """Delete the request once the ranks have ended."""
        self._pending = None
        status.withdraw_request(self._run, self.token)

    def completed(self, steps: int) -> bool:
        """Whether these ranks have completed the run, at step `steps` or later."""
        return status.completed(self._run, steps, self.token)

    def stopped_at(self) -> int | None:
        """The step at which these ranks have stopped on request, with a checkpoint; None if they have not."""
        return status.step_of(self._run, STOPPED, self.token)

    def _owns(self) -> bool:
        try:
            owner = fence.read(self._run)
        except (fence.FencedError, OSError):
            return False
        return owner is not None and owner.token == self.token
