"""Shared-memory layouts: injective, in range, the hardware's swizzles, free of bank conflicts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilejit.layout.banks import conflict_ways
from tilejit.layout.shared import SharedLayout

quick = settings(deadline=None, max_examples=200)


@st.composite
def layouts(draw):
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    swizzle = draw(st.sampled_from([1, 2, 4, 8]))
    unit = 16 * swizzle // itemsize if swizzle > 1 else draw(st.integers(1, 20))
    panel = unit * draw(st.integers(1, 3))
    columns = panel * draw(st.integers(1, 3))
    pitch = 0 if swizzle > 1 else panel + draw(st.integers(0, 9))
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    halved = draw(st.booleans())
    rows = draw(st.integers(1, 20)) * (4 if halved else 1)
    shape = (*lead, rows, columns)
    return SharedLayout(shape, itemsize, panel=panel, pitch=pitch, swizzle=swizzle, halved=halved)


@quick
@given(layouts())
def test_a_layout_puts_each_element_at_its_own_aligned_place_inside_its_bytes(layout):
    offsets = layout.table()
    assert offsets.shape == layout.shape
    assert len(np.unique(offsets)) == offsets.size
    assert offsets.min() >= 0
    assert offsets.max() + layout.itemsize <= layout.bytes
    assert not (offsets % layout.itemsize).any()


@quick
@given(layouts())
def test_16_byte_chunks_of_a_swizzled_row_stay_whole(layout):
    chunk = 16 // layout.itemsize
    if layout.panel % chunk or layout.swizzle == 1:
        return
    offsets = layout.table().reshape(*layout.shape[:-1], -1, chunk)
    assert (np.diff(offsets, axis=-1) == layout.itemsize).all()
    assert not (offsets[..., 0] % 16).any()


@quick
@given(layouts())
def test_a_linear_layout_is_what_its_strides_say(layout):
    if not layout.is_linear:
        return
    index = np.indices(layout.shape)
    expected = sum(i * s for i, s in zip(index, layout.linear_strides, strict=True))
    assert np.array_equal(layout.table(), expected * layout.itemsize)
    same = SharedLayout(layout.shape, layout.itemsize, strides=layout.linear_strides)
    assert np.array_equal(same.table(), layout.table())


@quick
@given(layouts())
def test_offsets_of_single_indices_are_those_of_arrays(layout):
    table = layout.table()
    for index in itertools.islice(np.ndindex(layout.shape), 0, None, 37):
        assert layout.offset(index) == table[index]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,)])
def test_layouts_of_low_rank_are_dense(shape):
    layout = SharedLayout(shape, 4)
    assert layout.is_linear
    assert layout.table().ravel().tolist() == [4 * i for i in range(int(np.prod(shape)))]
    assert layout.bytes == 4 * int(np.prod(shape))


def test_the_128_byte_swizzle_is_the_hardwares():
    rows, chunks = np.indices((16, 8))
    offsets = SharedLayout((16, 64), 2, swizzle=8).table()[:, ::8]
    assert np.array_equal(offsets, rows * 128 + (chunks ^ rows % 8) * 16)


def test_the_64_byte_swizzle_is_the_hardwares():
    rows, chunks = np.indices((16, 4))
    offsets = SharedLayout((16, 32), 2, swizzle=4).table()[:, ::8]
    assert np.array_equal(offsets, rows * 64 + (chunks ^ rows // 2 % 4) * 16)


def test_the_32_byte_swizzle_is_the_hardwares():
    rows, chunks = np.indices((16, 2))
    offsets = SharedLayout((16, 16), 2, swizzle=2).table()[:, ::8]
    assert np.array_equal(offsets, rows * 32 + (chunks ^ rows // 4 % 2) * 16)


@pytest.mark.parametrize(("columns", "swizzle", "low"), [(16, 2, 7), (32, 4, 7), (64, 8, 7)])
def test_a_hardware_swizzle_xors_address_bits(columns, swizzle, low):
    """PTX ISA, "Swizzling modes": bits 4.. of the address are XORed with bits 7.. of it."""
    plain = SharedLayout((32, columns), 2).table()
    expected = plain ^ (plain >> low) % swizzle << 4
    assert np.array_equal(SharedLayout((32, columns), 2, swizzle=swizzle).table(), expected)


def test_panels_follow_one_another():
    layout = SharedLayout((8, 128), 2, panel=64, swizzle=8)
    offsets = layout.table()
    assert np.array_equal(offsets[:, 64:], offsets[:, :64] + 8 * 128)
    assert str(layout) == "rows, panels of 64, 128-byte swizzle"


def test_layouts_print_what_is_special():
    assert str(SharedLayout((8, 8), 4)) == "rows"
    assert str(SharedLayout((8, 8), 4, pitch=12)) == "rows, pitch 12"
    assert str(SharedLayout((8, 8), 4, strides=(1, 8))) == "strides (1, 8)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"panel": 24, "swizzle": 4}, "no multiple of swizzle 4"),
        ({"panel": 48, "swizzle": 4}, "no multiple of swizzle 4"),
        ({"panel": 16, "pitch": 24, "swizzle": 2}, "no multiple of swizzle 2"),
        ({"panel": 64, "swizzle": 3}, "swizzle 3"),
        ({"panel": 36}, "panel 36 of 96"),
        ({"panel": 48, "pitch": 40}, "pitch 40 is below panel 48"),
    ],
)
def test_a_layout_that_would_not_be_injective_is_our_error(arguments, message):
    shape = (16, 64 if arguments["panel"] in (16, 64) else 96)
    with pytest.raises(AssertionError, match=message):
        SharedLayout(shape, 2, **arguments)


def matrix_rows(layout, row, column):
    """The row addresses of the 8x8 matrix of 16-bit elements at (row, column)."""
    return layout.offset((np.arange(row, row + 8), np.full(8, column)))


@pytest.mark.parametrize("columns", [16, 32, 64, 128, 192, 256])
@pytest.mark.parametrize("rows", [16, 64])
def test_ldmatrix_of_a_swizzled_tile_has_no_bank_conflicts(rows, columns):
    panel = min(columns, 64)
    layout = SharedLayout((rows, columns), 2, panel=panel, swizzle=panel // 8)
    for row in range(0, rows, 8):
        for column in range(0, columns, 8):
            assert conflict_ways(matrix_rows(layout, row, column), 16) == 1


@pytest.mark.parametrize("columns", [128, 192, 256])
def test_ldmatrix_of_a_swizzled_tile_without_panels_has_no_bank_conflicts(columns):
    layout = SharedLayout((16, columns), 2, swizzle=8)
    assert conflict_ways(matrix_rows(layout, 8, columns - 8), 16) == 1


def test_16_byte_stores_to_a_swizzled_tile_have_no_bank_conflicts():
    layout = SharedLayout((32, 32), 2, swizzle=4)
    lane = np.arange(32)
    assert conflict_ways(layout.offset((lane // 4, lane % 4 * 8)), 16) == 1


@pytest.mark.parametrize(
    ("addresses", "width", "ways"),
    [
        (np.arange(32) * 4, 4, 1),
        (np.zeros(32, int), 4, 1),  # one word: broadcast
        (np.arange(32), 1, 1),
        (np.arange(32) * 2, 2, 1),
        (np.arange(32) * 8, 4, 2),
        (np.arange(32) * 128, 4, 32),
        (np.arange(32) * 132, 4, 1),
        (np.arange(32) * 8, 8, 1),
        (np.arange(32) * 16, 8, 2),
        (np.arange(32) * 16, 16, 1),
        (np.arange(32) * 128, 16, 8),
        (np.arange(8) * 128, 16, 8),
        (np.arange(8) * 144, 16, 1),  # rows padded by 16 bytes
    ],
)
def test_conflict_ways_counts_words_of_the_busiest_bank(addresses, width, ways):
    assert conflict_ways(addresses, width) == ways


def test_conflict_ways_of_an_impossible_width_is_our_error():
    with pytest.raises(AssertionError, match="no access is 12 bytes wide"):
        conflict_ways(np.arange(4), 12)


def test_halves_hold_two_of_every_four_rows():
    layout = SharedLayout((2, 12, 16), 1, halved=True)
    rows = layout.offset((1, np.arange(12), 0)) // 16
    assert (rows - 12).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert str(layout) == "rows, two of four in each half"
    with pytest.raises(AssertionError):
        SharedLayout((6, 16), 1, halved=True)
