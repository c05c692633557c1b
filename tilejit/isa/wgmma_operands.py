"""How wgmma's operands lie in shared memory, and the descriptors that say so.

Knows bytes and addresses. Does not know instructions or who fills the memory.

An operand consists of 16-byte chunks along its contiguous dimension, which is K (K-major) or,
transposed, M or N (MN-major). A descriptor holds the address of the first, a layout mode with its
span of W chunks (none: 1, 32 bytes: 2, 64 bytes: 4, 128 bytes: 8) and two strides:

* K-major: row `r` of M or N and chunk `c` of K (0 or 1) are at
  `r % 8 * 16 * W + r // 8 * sbo + c * 16`; without swizzle `+ c * lbo` instead.
* MN-major: element `k` of K and chunk `c` of M or N are at
  `k % 8 * 16 * W + k // 8 * sbo + c % W * 16 + c // W * lbo`; without swizzle
  `k % 8 * 16 + k // 8 * lbo + c * sbo`.

The swizzle then permutes the chunks of a span by the bits of the address itself, so a tile begins
at a multiple of 8 spans, and moving along K or by 8 rows adds to the address. (PTX ISA, "Strides",
"Matrix descriptor format"; CUTLASS, cute/arch/mma_sm90_desc.hpp)
"""

from __future__ import annotations

import numpy as np

from tilejit import dtypes
from tilejit.dtypes import DType
from tilejit.isa.instruction import Array
from tilejit.isa.tma import CHUNK, swizzled

K_BYTES = 32  # of one instruction's operand
NO_SWIZZLE, SWIZZLE_128, SWIZZLE_64, SWIZZLE_32 = range(4)  # layout modes of a descriptor
_SPANS = {NO_SWIZZLE: 16, SWIZZLE_128: 128, SWIZZLE_64: 64, SWIZZLE_32: 32}  # bytes


def descriptor_constant(layout_mode: int, lbo_bytes: int, sbo_bytes: int) -> int:
    """All bits of a descriptor but the address, which is `(address & 0x3FFFF) >> 4`.

    layout_mode: 0 no swizzle, 1 of 128 bytes, 2 of 64, 3 of 32. lbo_bytes, sbo_bytes: the strides
    (see above); where one is not used any number will do.
    """
    assert layout_mode in _SPANS, f"layout mode {layout_mode}"
    for stride in (lbo_bytes, sbo_bytes):
        assert stride % 16 == 0 and 0 <= stride < 1 << 18, f"a stride of {stride} bytes"
    return lbo_bytes >> 4 << 16 | sbo_bytes >> 4 << 32 | layout_mode << 62


def operand_chunks(descriptor: int, extent: int, k: int, itemsize: int, transposed: bool) -> Array:
    """The shared addresses of the chunks of an operand with `extent` rows of M or N.

    K-major: (extent, 2); transposed, so MN-major: (k, chunks of extent).
    """
    start = (descriptor & 0x3FFF) << 4
    lbo, sbo = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    assert descriptor >> 49 & 7 == 0, "a descriptor whose pattern does not begin at its start"
    span = _SPANS[descriptor >> 62]
    is_plain = span == CHUNK
    if transposed:
        row, chunk = np.arange(k)[:, None], np.arange(extent * itemsize // CHUNK)
        if is_plain:
            places = row % 8 * CHUNK + row // 8 * lbo + chunk * sbo
        else:
            wide = span // CHUNK
            places = row % 8 * span + row // 8 * sbo + chunk % wide * CHUNK + chunk // wide * lbo
    else:
        row, chunk = np.arange(extent)[:, None], np.arange(K_BYTES // CHUNK)
        places = row % 8 * span + row // 8 * sbo + chunk * (lbo if is_plain else CHUNK)
    return swizzled(start + places, span if not is_plain else 0)


def operand_matrix(content: Array, dtype: DType, transposed: bool) -> Array:
    """The float32 matrix (..., extent, k) from its chunks as `operand_chunks` orders them, uint8
    (..., chunks, chunks, 16)."""
    elements = np.ascontiguousarray(content).view(np.uint32)
    if dtype is dtypes.tfloat32:
        elements = elements & np.uint32(0xFFFFE000)  # the low 13 bits are not read
    rows = elements.reshape(*content.shape[:-2], -1).view(dtype.numpy)
    return (rows.swapaxes(-1, -2) if transposed else rows).astype(np.float32)
