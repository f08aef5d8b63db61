"""Keyed permutation of [0, N) in O(1) memory."""

import math

import numpy as np
from numpy.typing import NDArray

from maskvr_ds import hashing

# Four rounds make a strong pseudorandom permutation (Luby & Rackoff 1988); two more for small domains.
_FEISTEL_ROUNDS = 6


class KeyedPermutation:
    """A pseudorandom permutation of [0, size) in O(1) memory.

    A Feistel network on pairs of residues modulo a = ⌈√size⌉; results ≥ `size` are permuted again (cycle walking:
    Black & Rogaway 2002), which is rare because a² − size ≤ 2a. Equal keys give equal permutations.

    Raises ValueError if size < 1.
    """

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation of {size} elements: the size must be at least 1")
        self.size = size
        self._modulus = math.isqrt(size - 1) + 1
        self._round_keys = [hashing.fold(key, r) for r in range(_FEISTEL_ROUNDS)]

    def _once(self, x: NDArray[np.int64]) -> NDArray[np.int64]:
        left, right = np.divmod(x, self._modulus)
        for key in self._round_keys:
            bits = (hashing.stream(key, right) >> 11) & 0x1F_FFFF_FFFF_FFFF
            left, right = right, (left + bits) % self._modulus
        return left * self._modulus + right

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of `indices`: int64 [n] in [0, size) → int64 [n]."""
        images = self._once(indices)
        while (outside := images >= self.size).any():
            images[outside] = self._once(images[outside])
        return images
