"""How long TMA takes for tiles, by how their rows lie in memory and in the tile."""

from __future__ import annotations

import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.ir.node import walk
from tilejit.ops.copy import Copy
from tilejit.passes import box_rows


@tilejit
def brought(A: T.Tensor, C: T.Tensor, *, rows, columns):
    with T.Kernel(1, threads=128):
        a = T.alloc_shared((rows, columns), A.dtype)
        for _n in T.Pipelined(4):
            T.copy(A[0, 0], a)
        T.copy(a, C[0:rows, 0:columns])


def copy_of(rows, columns, pitch, dtype="bfloat16"):
    a, c = T.Tensor((rows, pitch), dtype), T.Tensor((rows, columns), dtype)
    kernel = brought.compile(a, c, target="sm_90a", rows=rows, columns=columns).kernels[0].graph
    return next(n for n in walk(kernel.body) if isinstance(n, Copy))


@pytest.mark.parametrize(
    "columns, dtype, expected",
    [(64, "bfloat16", 128), (128, "bfloat16", 128), (144, "bfloat16", 32), (32, "bfloat16", 64),
     (200, "bfloat16", 16), (96, "bfloat16", 64), (64, "int8", 64), (64, "float32", 128)],
)  # fmt: skip
def test_rows_are_as_wide_as_the_swizzle_that_divides_the_tile(columns, dtype, expected):
    copy = copy_of(64, columns, 512, dtype)
    assert box_rows.row_bytes(copy) == expected
    size = 64 * columns * copy.dst.buffer.dtype.bytes
    assert box_rows.box_rows(copy) == size / expected


@pytest.mark.parametrize(
    "pitch, expected", [(4096, 1.35), (4128, 2.7), (4112, 3.4), (4104, 4.9)], ids=str
)
def test_rows_that_lie_in_two_lines_take_longer_the_less_they_are_aligned(pitch, expected):
    copy = copy_of(64, 64, pitch)
    assert box_rows.crosses_lines(copy) == (pitch != 4096)
    assert box_rows.row_clocks(copy) == expected
    assert box_rows.bring_clocks([copy]) == pytest.approx(64 * expected, rel=0.02)


def test_a_row_of_half_a_line_needs_no_more_than_half_the_alignment():
    assert not box_rows.crosses_lines(copy_of(64, 32, 4128))
    assert box_rows.crosses_lines(copy_of(64, 32, 4112))


def test_blocks_that_share_a_tile_bring_half_of_it():
    own, shared = copy_of(64, 64, 4104), copy_of(128, 64, 4104)
    together = box_rows.bring_clocks([own, shared], [shared])
    rows = 64 + 128 / 2
    assert together == pytest.approx(rows * box_rows.SHARED_CROSSING_CLOCKS, rel=0.02)
    assert together < box_rows.bring_clocks([own, shared])
