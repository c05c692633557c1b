"""Tensor maps: what a kernel's bulk copies are told of its tensors, encoded once for each tensor.

Knows host expressions and the driver's encoder. Does not know launches or how maps are passed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tilejit.errors import DeviceError
from tilejit.ir.expr import Expr, Var, arith, variables
from tilejit.ir.kernel import Param
from tilejit.isa.tma import TensorMap
from tilejit.layout.sections import EDGE, map_shape, map_strides
from tilejit.runtime.device import check, driver
from tilejit.runtime.host import host_function

MAP_BYTES, MAP_ALIGN = 128, 64  # CUDA Driver API, CUtensorMap
UNIT = 16  # bytes: the smallest tensor
MAX_ENCODED = 4096
"""Maps that a parameter keeps; with more it begins anew, so that tensors that are gone do not pile
up."""

_KINDS = {
    "float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT32", "tfloat32": "TFLOAT32",
    "float64": "FLOAT64", "int32": "INT32", "int64": "INT64", "uint8": "UINT8", "uint16": "UINT16",
    "uint32": "UINT32", "uint64": "UINT64",
}  # fmt: skip
_BY_SIZE = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


class MapSource:
    """The tensor map of one parameter, as a function of the values of `variables`: the tensor's
    address first, then the symbols in its shape and strides."""

    def __init__(self, param: Param) -> None:
        assert param.box is not None, f"{param.name} is no tensor map"
        self._box = param.box
        tensor = param.box.tensor
        assert isinstance(tensor.data, Var), f"{tensor.name} is no parameter"
        dims = (*tensor.shape, *tensor.element_strides, tensor.offset)
        symbols = {v for e in dims for v in variables(e)} - {tensor.data}
        self.variables = (tensor.data, *sorted(symbols, key=lambda v: v.serial))
        size = tensor.dtype.bytes
        scaled: list[Expr] = [
            arith("mul", e, size) for e in (*tensor.element_strides, tensor.offset)
        ]
        self._compute = host_function((*tensor.shape, *scaled), self.variables[1:])
        self._rank = tensor.rank
        self._encoded: dict[Any, int] = {}
        self._kept: list[Any] = []
        self._lock = threading.Lock()

    def describe(self, *values: int) -> TensorMap:
        """The map for these values."""
        tensor, box = self._box.tensor, self._box
        dims = self._compute(*values[1:])
        shape, strides = dims[: self._rank], dims[self._rank : -1]
        size = tensor.dtype.bytes
        kind = "tfloat32" if box.rounds else tensor.dtype.name
        if kind not in _KINDS or (kind == "tfloat32" and not box.rounds):
            kind = _BY_SIZE[size]
        strides = [
            s if extent > 1 else _stride_of_one(strides, shape, n, size)
            for n, (s, extent) in enumerate(zip(strides, shape, strict=True))
        ]
        strides = [*strides[:-1], size]
        if box.section is not None:
            shape, strides = _with_sections(shape, strides, box.section)
        return TensorMap(
            address=values[0] + dims[-1],
            itemsize=size,
            shape=tuple(shape),
            strides=tuple(strides),
            box=box.extents,
            swizzle=box.swizzle,
            rounds=box.rounds,
            kind=kind,
        )

    def encoded(self, *values: int) -> int:
        """The address of the map in the driver's form, in host memory."""
        key = values if len(values) > 1 else values[0]
        found = self._encoded.get(key)
        return self._encode(key, values) if found is None else found

    def _encode(self, key: Any, values: Sequence[int]) -> int:
        made = self.describe(*values)
        with self._lock:
            if len(self._encoded) >= MAX_ENCODED:
                self._encoded.clear()
                self._kept.clear()
            block = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGN)
            address = -(-ctypes.addressof(block) // MAP_ALIGN) * MAP_ALIGN
            if made.is_empty:
                made = _stand_in(made)
            ctypes.memmove(address, _driver_map(made), MAP_BYTES)
            self._kept.append(block)
            self._encoded[key] = address
        return address


def _with_sections(
    shape: Sequence[int], strides: Sequence[int], dim: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Shape and strides of the map of a tensor of which sections along `dim` are copied.

    Raises:
        DeviceError: the dimension is too long.
    """
    if shape[dim] > EDGE:
        raise DeviceError(
            f"Sections of a tensor with {shape[dim]} elements along dimension {dim} cannot be "
            f"copied in bulk: it may have {EDGE}.",
            hint="Forbid it: T.copy(..., disable_tma=True).",
        )
    if 0 in shape:  # no section has elements
        return (0, 0, *shape), (UNIT, UNIT, *strides)
    return map_shape(shape, dim), map_strides(strides, dim)


def _stride_of_one(strides: Sequence[int], shape: Sequence[int], n: int, size: int) -> int:
    """A stride that is legal where an extent of 1 makes it meaningless."""
    wide = max((s * e for s, e in zip(strides, shape, strict=True)), default=size)
    return max(16, -(-wide // 16) * 16) if n < len(shape) - 1 else size


def _stand_in(empty: TensorMap) -> TensorMap:
    """A tensor that reads as one without elements does, which no map can describe: one zero, and
    zeros around it. It lies in host memory that all GPUs see, and stays there."""
    api = driver()
    pages = api.CU_MEMHOSTALLOC_PORTABLE | api.CU_MEMHOSTALLOC_DEVICEMAP
    address = int(check(api.cuMemHostAlloc(UNIT, pages), "Allocating memory for an empty tensor"))
    ctypes.memset(address, 0, UNIT)
    rank = len(empty.shape)
    strides = (*(UNIT,) * (rank - 1), empty.itemsize)
    return replace(empty, address=address, shape=(1,) * rank, strides=strides)


def _driver_map(tensor: TensorMap) -> bytes:
    """The 128 bytes that cuTensorMapEncodeTiled makes.

    Raises:
        DeviceError: the driver refuses the tensor.
    """
    api = driver()
    reason = tensor.problem()
    if reason:
        raise DeviceError(f"A tensor cannot be copied in bulk: {reason}.")
    kinds = api.CUtensorMapDataType
    swizzles = api.CUtensorMapSwizzle
    span = f"{tensor.swizzle}B" if tensor.swizzle else "NONE"
    rank = len(tensor.shape)
    made = check(
        api.cuTensorMapEncodeTiled(
            getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{_KINDS[tensor.kind]}"),
            rank,
            tensor.address,
            [api.cuuint64_t(n) for n in reversed(tensor.shape)],
            # a tensor of one dimension has none, but the driver refuses a null pointer
            [api.cuuint64_t(n) for n in reversed(tensor.strides[:-1] or (UNIT,))],
            [api.cuuint32_t(n) for n in reversed(tensor.box)],
            [api.cuuint32_t(1)] * rank,
            api.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(swizzles, f"CU_TENSOR_MAP_SWIZZLE_{span}"),
            api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            api.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "Describing a tensor to the GPU",
    )
    return ctypes.string_at(made.getPtr(), MAP_BYTES)


def map_reader(source: MapSource, places: dict[Var, int]) -> Callable[[Sequence[int]], int]:
    """The address of the encoded map, from a call's values at their places."""
    wanted = [places[v] for v in source.variables]
    encoded = source.encoded
    if len(wanted) == 1:
        place = wanted[0]
        return lambda pool: encoded(pool[place])
    return lambda pool: encoded(*(pool[p] for p in wanted))
