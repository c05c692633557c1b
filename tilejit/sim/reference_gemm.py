"""Tile multiply of the reference executor.

Knows in which precision products are summed. Does not know instructions.
"""

from __future__ import annotations

import numpy as np

from tilejit.dtypes import DType, float32, float64, tfloat32
from tilejit.ops.scalar import Array, cast_array


def accumulate(a: Array, b: Array, acc: Array | None, dtypes: tuple[DType, DType, DType]) -> Array:
    """`a @ b`, plus `acc` if given, in the dtype of the accumulator (the last of `dtypes`).

    Integers are exact and wrap. Floats up to 32 bits are summed in float32 and rounded once at
    the end; tfloat32 operands are rounded to 10 mantissa bits, ties away from zero (PTX ISA,
    cvt.rna.tf32).
    """
    target = dtypes[2]
    if target.is_integer:
        product = _integer_product(a, b)
        total = product if acc is None else product + acc.astype(np.int64)
        return total.astype(target.numpy)
    wide = float64 if float64 in dtypes else float32
    product = np.matmul(_operand(a, dtypes[0], wide), _operand(b, dtypes[1], wide))
    if acc is not None:
        product = cast_array(acc, target, wide) + product
    return cast_array(product, wide, target)


def _operand(values: Array, dtype: DType, wide: DType) -> Array:
    if dtype is tfloat32:
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
        values = np.where(np.isfinite(values), rounded, values)
    return cast_array(values, dtype, wide)


def _integer_product(a: Array, b: Array) -> Array:
    # 53 bits hold any sum of products of 8-bit integers, and floats have a BLAS
    wide = np.float64 if a.itemsize == b.itemsize == 1 else np.int64
    product: Array = np.matmul(a.astype(wide), b.astype(wide)).astype(np.int64)
    return product
