"""Progress bar of a job, on stderr."""

from __future__ import annotations

import time
from types import TracebackType


class ProgressBar:
    """Progress in bytes read, with tokens per second. show: None shows the bar only on a terminal."""

    def __init__(self, total_bytes: int, description: str, show: bool | None = None) -> None:
        from tqdm import tqdm

        self.tokens = 0
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total_bytes,
            desc=description,
            unit="B",
            unit_scale=True,
            # None is tqdm's value for "disable unless on a terminal".
            disable=None if show is None else not show,
            dynamic_ncols=True,
        )

    def update(self, read: int, tokens: int = 0) -> None:
        self.tokens += tokens
        if tokens:
            rate = self.tokens / max(time.monotonic() - self._start, 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(read)

    def phase(self, description: str, total_bytes: int) -> None:
        """Start the next phase of the job on the same line."""
        self._bar.set_description(description, refresh=False)
        self._bar.reset(total_bytes)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
