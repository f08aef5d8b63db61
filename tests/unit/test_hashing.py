"""Hashing against published SplitMix64 outputs; agreement of NumPy, torch and Python integers."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds import hashing

ALL = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def splitmix64(state: int) -> int:
    """Output function of SplitMix64 on unsigned integers, from its paper's listing."""
    z = state & ALL
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL
    return z ^ (z >> 31)


def test_first_outputs_of_splitmix64() -> None:
    # Widely published test vector of the generator seeded with 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    drawn = hashing.stream(1234567, np.arange(4))
    assert [int(x) & ALL for x in drawn] == expected


@given(st.lists(INT64, min_size=1, max_size=20))
def test_numpy_torch_and_integers_agree(values: list[int]) -> None:
    expected = [splitmix64(v) for v in values]
    assert [int(x) & ALL for x in hashing.mix(np.array(values, dtype=np.int64))] == expected
    assert [x & ALL for x in hashing.mix(torch.tensor(values)).tolist()] == expected


@given(INT64, st.lists(st.integers(0, 1 << 40), min_size=1, max_size=20))
def test_stream_agrees(key: int, counters: list[int]) -> None:
    drawn = hashing.stream(np.array([key]), np.array(counters))
    assert drawn.tolist() == hashing.stream(torch.tensor([key]), torch.tensor(counters)).tolist()
    assert int(drawn[0]) & ALL == splitmix64(key + (counters[0] + 1) * 0x9E3779B97F4A7C15)


@given(st.sampled_from([np.uint16, np.uint32]), st.integers(1, 6), st.integers(1, 40), st.data())
def test_hashes_of_rows_are_as_defined_and_see_one_changed_number(
    dtype: type[np.unsignedinteger], rows: int, length: int, data: st.DataObject
) -> None:
    numbers = st.integers(0, int(np.iinfo(dtype).max))
    ids = data.draw(st.lists(st.lists(numbers, min_size=length, max_size=length), min_size=rows, max_size=rows))
    also, changed = data.draw(numbers), data.draw(numbers)
    m = [splitmix64((i + 1) * 0x9E3779B97F4A7C15) | 1 for i in range(length + 1)]
    expected = [sum(a * b for a, b in zip([*row, also], m, strict=True)) & ALL for row in ids]
    array = np.array(ids, dtype)
    assert [int(h) & ALL for h in hashing.row_hashes(array, also)] == expected
    row, place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, length))
    before = also if place == length else ids[row][place]
    if place < length:
        array[row, place] = changed
    found = hashing.row_hashes(array, changed if place == length else also)
    assert (int(found[row]) & ALL == expected[row]) == (changed == before)


def test_mix_does_not_modify_its_argument() -> None:
    x = torch.arange(5)
    hashing.mix(x)
    assert x.tolist() == [0, 1, 2, 3, 4]


def test_fold_depends_on_order_number_and_value_of_parts() -> None:
    keys = {hashing.fold(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0)]}
    assert len(keys) == 7
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


def test_unit_interval_is_open_and_uniform() -> None:
    extremes = hashing.unit_interval(torch.tensor([0, -1, (1 << 63) - 1, -(1 << 63)]))
    assert extremes.min() > 0
    assert extremes.max() < 1
    u = hashing.unit_interval(hashing.stream(7, torch.arange(100_000)))
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum().item()
    assert chi_squared < 99 + 6 * (2 * 99) ** 0.5
