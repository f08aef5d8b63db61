"""Robust statistics of series of steps. NaN marks values that are missing. Loads no torch."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Standard deviation of a normal distribution in units of its median absolute deviation.
MAD_TO_SIGMA = 1.4826


def spread(values: Floats) -> float:
    """Robust standard deviation: 1.4826 × median absolute deviation."""
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))))


def noise(values: Floats) -> float:
    """Robust standard deviation of the noise around a slow trend, from differences of neighbours."""
    return spread(np.diff(values)) / np.sqrt(2) if len(values) > 2 else 0.0


def trailing(values: Floats, window: int, fewest: int) -> tuple[Floats, Floats]:
    """Median of the `window` values before each, without it, and the robust standard deviation of their noise, as
    `noise`: a series that falls steeply is not noisy. NaN if fewer than `fewest` are finite. float64 [n] each."""
    padded = np.concatenate([np.full(window, np.nan), values[:-1]])
    before = np.lib.stride_tricks.sliding_window_view(padded, window)
    enough = np.isfinite(before).sum(1) >= fewest
    medians, deviations = (np.full(len(values), np.nan) for _ in range(2))
    if enough.any():
        chosen = before[enough]
        steps = np.diff(chosen, axis=1)
        centre = np.nanmedian(steps, axis=1, keepdims=True)
        medians[enough] = np.nanmedian(chosen, axis=1)
        deviations[enough] = MAD_TO_SIGMA * np.nanmedian(np.abs(steps - centre), axis=1) / np.sqrt(2)
    return medians, deviations


def levels(values: Floats, window: int) -> Floats:
    """Medians of `window` consecutive values: float64 [n − window + 1]."""
    return np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)


def growth(values: Floats, blocks: int = 20) -> float:
    """Powers of ten by which positive values grow over the series, by the Theil–Sen slope of the logarithms of the
    medians of `blocks` blocks; NaN if fewer than three blocks have a positive median."""
    medians = np.array([np.median(block) for block in np.array_split(values, min(blocks, len(values)))])
    places = np.flatnonzero(medians > 0)
    if len(places) < 3:
        return float("nan")
    logs = np.log10(medians[places])
    first, second = np.triu_indices(len(places), 1)
    slopes = (logs[second] - logs[first]) / (places[second] - places[first])
    return float(np.median(slopes) * (len(medians) - 1))


def runs(flags: NDArray[np.bool_], gap: int = 1) -> list[tuple[int, int]]:
    """First and last index of each run of true flags; runs at most `gap` apart are one."""
    found: list[tuple[int, int]] = []
    for index in np.flatnonzero(flags).tolist():
        if found and index - found[-1][1] <= gap:
            found[-1] = (found[-1][0], index)
        else:
            found.append((index, index))
    return found
