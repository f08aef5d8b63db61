"""Purposes of a run's keys: no two uses of its seed share random numbers. Loads no torch."""

# `hashing.fold(seed, purpose)` is the key of a run without phases.
WEIGHTS, ORDER, MASKS, DROPOUT, MAPNET, AUTO = range(6)
