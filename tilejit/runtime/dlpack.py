"""Reads what `__dlpack__` exports.

Knows the C layout of DLPack's `DLManagedTensor` (dmlc/dlpack, include/dlpack/dlpack.h, 0.8).
Does not know frameworks.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from tilejit.errors import ArgumentError, ArgumentTypeError

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13
_KINDS = {
    0: "int",
    1: "uint",
    2: "float",
    4: "bfloat",
    6: "bool",
    10: "float8_e4m3fn",
    12: "float8_e5m2",
}
_LEGACY_DEFAULT_STREAM = 1


class _Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("index", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


@dataclass(slots=True, eq=False)
class Exported:
    """A DLPack tensor; holds the capsule, which keeps the memory.

    dtype: a name that `dtypes.lookup` may know; device: CUDA ordinal, None in host memory.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    address: int
    device: int | None
    writable: bool
    capsule: Any


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def export(x: Any) -> Exported:
    """The tensor behind `x.__dlpack__()`.

    Raises:
        TypeError, ValueError: it is neither in CUDA nor in host memory, or cannot be exported.
    """
    kind, index = x.__dlpack_device__()
    if int(kind) not in (_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED):
        raise ArgumentError(
            f"{{name}} lives on DLPack device type {int(kind)}, not in CUDA or host memory."
        )
    try:
        on_gpu = int(kind) in (_CUDA, _CUDA_MANAGED)
        capsule = x.__dlpack__(stream=_LEGACY_DEFAULT_STREAM) if on_gpu else x.__dlpack__()
    except (BufferError, TypeError, RuntimeError) as error:
        raise ArgumentTypeError(f"{{name}} cannot be exported by DLPack: {error}.") from error
    tensor = ctypes.cast(
        _get_pointer(capsule, b"dltensor"), ctypes.POINTER(_Tensor)
    ).contents  # the legacy capsule: no version was asked for
    rank = tensor.ndim
    name = _KINDS.get(tensor.dtype.code, f"code{tensor.dtype.code}_")
    if tensor.dtype.code in (0, 1, 2, 4):
        name += str(tensor.dtype.bits)
    if tensor.dtype.lanes != 1:
        name += f"x{tensor.dtype.lanes}"
    return Exported(
        shape=tuple(tensor.shape[:rank]),
        strides=tuple(tensor.strides[:rank]) if tensor.strides else None,
        dtype=name,
        address=(tensor.data or 0) + tensor.byte_offset,
        device=int(index) if on_gpu else None,
        writable=True,
        capsule=capsule,
    )
