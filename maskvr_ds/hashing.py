"""Counter-based hashing: the one source of randomness for data order, masks and digests.

Every function works alike on NumPy arrays and torch tensors of dtype int64 (two's complement, wrapping), so
what the host and the device compute is equal bit for bit. The mixer is the output function of SplitMix64
(Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"); a stream is the sequence
mix(key + i · golden), i = 1, 2, …, which is that generator with `key` as its state.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Int64 = TypeVar("Int64", "np.ndarray[Any, np.dtype[np.int64]]", "torch.Tensor")


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned `value`."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    return value - (1 << 64) if value >> 63 else value


GOLDEN = _signed(0x9E37_79B9_7F4A_7C15)
_MULTIPLIER_1 = _signed(0xBF58_476D_1CE4_E5B9)
_MULTIPLIER_2 = _signed(0x94D0_49BB_1331_11EB)


def mix(x: Int64) -> Int64:
    """A bijection of 64-bit integers whose outputs look independent. Any shape, int64 in and out."""
    # int64 shifts arithmetically; the masks turn each into the logical shift that the mixer is defined with.
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * _MULTIPLIER_1
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * _MULTIPLIER_2
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


def stream(key: "Int64 | int", counter: Int64) -> Int64:
    """Draw number `counter` (≥ 0, int64) of the stream that belongs to `key` (int64); shapes broadcast."""
    return mix(key + (counter + 1) * GOLDEN)


def fold(seed: int, *parts: int) -> int:
    """One signed 64-bit key out of a seed and further integers; the order of the parts counts."""
    key = _signed(seed)
    for part in (0, *parts):
        # A one-element array, since NumPy scalars warn where arrays wrap.
        key = int(mix(np.array([_signed(key + (part + 1) * GOLDEN)], dtype=np.int64))[0])
    return key


def unit_interval(bits: "torch.Tensor") -> "torch.Tensor":
    """Hash bits (int64, any shape) → float64 uniform on the open interval (0, 1), 2^53 equidistant values."""
    return (((bits >> 11) & 0x1F_FFFF_FFFF_FFFF).double() + 0.5) * 2.0**-53
