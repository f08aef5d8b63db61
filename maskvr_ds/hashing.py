"""Counter-based hashing: the source of randomness for data order, masks and digests.

All functions accept NumPy arrays and torch tensors of dtype int64 (two's complement, wrapping) and give the same bits
on host and device. The mixer is the output function of SplitMix64
(Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"); a stream is the sequence
mix(key + i · golden), i = 1, 2, …, which is that generator with `key` as its state.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Int64 = TypeVar("Int64", "np.ndarray[Any, np.dtype[np.int64]]", "torch.Tensor")


# Version of `data_digest` and `mask_digest` (masking/masker.py). Version 1 had only row numbers and masked positions.
DIGEST_VERSION = 2
_ALL_BITS = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned `value`."""
    value &= _ALL_BITS
    return value - (1 << 64) if value >> 63 else value


GOLDEN = _signed(0x9E37_79B9_7F4A_7C15)
_MULTIPLIER_1 = _signed(0xBF58_476D_1CE4_E5B9)
_MULTIPLIER_2 = _signed(0x94D0_49BB_1331_11EB)


def mix(x: Int64) -> Int64:
    """Output function of SplitMix64, a bijection: int64 of any shape → int64 of the same shape."""
    # int64 shifts are arithmetic; the masks turn them into the logical shifts of the mixer's definition. In place: this
    # is the hottest code of masking, and allocation costs more than the arithmetic.
    y = x >> 30
    y &= 0x3_FFFF_FFFF
    y ^= x
    y *= _MULTIPLIER_1
    z = y >> 27
    z &= 0x1F_FFFF_FFFF
    z ^= y
    z *= _MULTIPLIER_2
    y = z >> 31
    y &= 0x1_FFFF_FFFF
    y ^= z
    return y


def stream(key: "Int64 | int", counter: Int64) -> Int64:
    """Element `counter` (≥ 0, int64) of the stream of `key` (int64); shapes broadcast."""
    return mix(key + (counter + 1) * GOLDEN)


def fold(seed: int, *parts: int) -> int:
    """Combine a seed and further integers into one signed 64-bit key; their order matters."""
    key = seed
    for part in (0, *parts):
        key = _mix_int(key + (part + 1) * GOLDEN)
    return _signed(key)


def _mix_int(x: int) -> int:
    """`mix` of one Python integer, modulo 2^64 (NumPy scalars would warn on overflow, arrays do not)."""
    x &= _ALL_BITS
    x = ((x ^ (x >> 30)) * _MULTIPLIER_1) & _ALL_BITS
    x = ((x ^ (x >> 27)) * _MULTIPLIER_2) & _ALL_BITS
    return x ^ (x >> 31)


@lru_cache(maxsize=8)
def factors(length: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """m, int64 [length], odd and random: the hash of a row x is Σ_i m_i x_i modulo 2^64 (multilinear hashing, Carter &
    Wegman 1979; Lemire & Kaser 2014, "Strongly universal string hashing is fast").

    Rows that differ at one position have different hashes, since odd numbers are invertible modulo 2^64.
    """
    found = stream(0, np.arange(length, dtype=np.int64)) | 1
    found.flags.writeable = False
    return found


def row_hashes(
    rows: "np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]", also: int
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Hashes of rows of L token ids and of one more number, `also`: uint16 or uint32 [B, L] → int64 [B]."""
    m = factors(rows.shape[1] + 1)
    # A quarter of the time of products and a sum: no array of int64 products.
    return np.einsum("ij,j->i", rows, m[:-1]) + np.int64(also) * m[-1:]


def unit_interval(bits: "torch.Tensor") -> "torch.Tensor":
    """Hash bits (int64, any shape) → float64 uniform on the open interval (0, 1), 2^52 equidistant values."""
    # The upper 52 bits, signed, in [-2^51, 2^51); the sum is exact in float64.
    return ((bits >> 12).double() + (2.0**51 + 0.5)) * 2.0**-52
