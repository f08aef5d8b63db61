"""Which signals count: the same one again at once is no second one. For launchers and ranks alike; loads no torch."""

import signal
import time

# Slurm sends SIGTERM twice within milliseconds.
ECHO_SECONDS = 1.0


class Echoes:
    """Tells echoes, signal by signal. A session that ends sends SIGHUP and SIGTERM, so these count as the same."""

    def __init__(self) -> None:
        self._last = 0
        self._since = 0.0

    def is_one(self, number: int) -> bool:
        """Whether a signal, heard now, is the echo of the one before it."""
        kind = signal.SIGTERM if number == signal.SIGHUP else number
        before, self._last = self._last, kind
        since, self._since = self._since, time.monotonic()
        return kind == before and self._since - since < ECHO_SECONDS
