"""How a tensor map sees sections of a tensor, though it knows nothing of them.

Knows the coordinates and strides that make the hardware's own bounds those of a section. Does not
know where sections begin, nor who copies them.

A map has one extent for each dimension, and a section ends anywhere. So the dimension of which
sections are taken is there three times, with one stride S in bytes, as in Triton's descriptors of
ragged tensors: coordinates (EDGE, end, EDGE - extent + row) of a map with strides
(WRAP - S, S, S) stand for the address

    EDGE * (WRAP - S) + end * S + (EDGE - extent + row) * S = EDGE * WRAP + (end - extent + row) * S

which is that of the section's row, for EDGE * WRAP is 2**64 and addresses wrap. The last of the
three coordinates leaves its extent, EDGE, where the row leaves the section. The others never do.
"""

from __future__ import annotations

from collections.abc import Sequence

EDGE = 1 << 30
WRAP = 1 << 34  # bytes
WIDEST = (1 << 31) - (1 << 16)  # the extent of the dimensions before: above any coordinate


def map_shape(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    """The extents of the map of a tensor, of which sections along `dim` are copied."""
    return (WIDEST, WIDEST, *shape[:dim], EDGE, *shape[dim + 1 :])


def map_strides(strides: Sequence[int], dim: int) -> tuple[int, ...]:
    """Its strides in bytes, from the tensor's."""
    return (WRAP - strides[dim], strides[dim], *strides)
