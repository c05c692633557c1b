"""Sections in the coordinates of a tensor map: the hardware's bounds are theirs."""

from __future__ import annotations

import numpy as np
import pytest

from tilejit.isa.tma import Box, TensorMap
from tilejit.layout.sections import EDGE, map_shape, map_strides


@pytest.mark.parametrize(("first", "extent"), [(0, 10), (3, 4), (9, 1), (5, 0), (0, 0), (10, 0)])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_of_a_section_have_their_addresses_and_others_are_outside(first, extent, dim):
    shape, strides = ((10, 3, 8), (96, 32, 4)) if dim == 0 else ((3, 10, 8), (320, 32, 4))
    box = [1] * 5
    box[2 + dim], box[4] = 4, 8
    tensor = TensorMap(
        4096, 4, map_shape(shape, dim), map_strides(strides, dim), tuple(box), 0, kind="float32"
    )
    assert not tensor.problem()
    for row in range(0, 16, 3):
        start = [EDGE, first + extent, 0, 0, 0]
        start[2 + dim] = EDGE - extent + row
        outer, inner = Box(tensor, tuple(start)).meets()
        inside = max(0, min(row + 4, extent) - row)
        assert inner[2 + dim] == slice(0, inside)
        if inside:
            place = sum(s.start * n for s, n in zip(outer, tensor.strides, strict=True))
            assert place % (1 << 64) == (first + row) * strides[dim]


def test_strides_of_the_map_are_ones_that_the_hardware_takes():
    for stride in (16, 4096, 1 << 33):
        assert all(s % 16 == 0 and 0 <= s < 1 << 40 for s in map_strides((stride, 4), 0)[:3])
    assert np.prod([EDGE, 1 << 34], dtype=object) == 1 << 64
