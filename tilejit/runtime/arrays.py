"""What an argument is: shape, strides, dtype, address and place of anybody's array.

Knows NumPy, torch, CuPy, Numba device arrays, `__cuda_array_interface__` and DLPack, the
frameworks by the module their types name: none is imported here. Does not know signatures.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilejit.dtypes import ALL, DType, as_dtype, lookup, tfloat32
from tilejit.errors import ArgumentError, ArgumentTypeError, DTypeError, a_kind
from tilejit.runtime import dlpack
from tilejit.runtime.device import pointer_device

HOST = -1
"""The `device` of an array in host memory."""


@dataclass(slots=True, eq=False)
class ArrayView:
    """An argument's memory as found at the call.

    owner: the user's object; framework: "numpy", "torch", "cupy", "numba" or "" for another.
    shape, strides: in elements; strides of a row-major compact array are canonical, also where
        an extent is 1.
    address: of element 0; device: CUDA ordinal or `HOST`.
    stream: the raw CUDA stream handle that the exporter asks for, or None.
    keeper: holds the memory while the view lives.
    """

    owner: Any
    framework: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    address: int
    device: int
    writable: bool = True
    stream: int | None = None
    keeper: Any = None

    @property
    def size(self) -> int:
        """Elements."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total

    @property
    def is_compact(self) -> bool:
        """Row-major without gaps."""
        return self.strides == compact_strides(self.shape) or self.size == 0

    @property
    def span(self) -> tuple[int, int]:
        """First byte and the byte after the last that an element occupies."""
        low = high = 0
        for extent, stride in zip(self.shape, self.strides, strict=True):
            if extent == 0:
                return self.address, self.address
            if stride > 0:
                high += (extent - 1) * stride
            else:
                low += (extent - 1) * stride
        width = self.dtype.bytes
        return self.address + low * width, self.address + (high + 1) * width

    @property
    def align(self) -> int:
        """Bytes: 16 where the address is a multiple of it, else the largest power of two."""
        return 16 if self.address % 16 == 0 else self.address & -self.address


@functools.lru_cache(maxsize=4096)
def compact_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def _canonical(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, or the compact ones where they mean the same memory."""
    compact = compact_strides(shape)
    if strides == compact:
        return compact
    for extent, a, b in zip(shape, strides, compact, strict=True):
        if extent == 0:
            return compact
        if extent != 1 and a != b:
            return strides
    return compact


def _element_strides(byte_strides: Sequence[int], width: int) -> tuple[int, ...]:
    strides = []
    for stride in byte_strides:
        step, rest = divmod(stride, width)
        if rest:
            raise ArgumentError(
                f"{{name}} has a stride of {stride} bytes, no multiple of its {width}-byte "
                "elements.",
                hint="Pass a copy, for example `numpy.ascontiguousarray(x)`.",
            )
        strides.append(step)
    return tuple(strides)


_numpy_dtypes: dict[np.dtype[Any], DType] = {d.numpy: d for d in ALL if d is not tfloat32}


def _numpy_dtype(dtype: np.dtype[Any]) -> DType:
    found = _numpy_dtypes.get(dtype)
    if found is not None:
        return found
    if dtype.kind in "iuf" and not dtype.isnative:
        raise DTypeError(
            f"{{name}} holds {dtype.newbyteorder('=')} of foreign byte order.",
            hint=f"Pass `x.astype('{dtype.newbyteorder('=')}')`.",
        )
    raise DTypeError(
        f"{{name}} has dtype {dtype}, which tilejit does not know.",
        hint="Known: " + ", ".join(map(str, ALL)) + ".",
    )


def read_numpy(x: np.ndarray[Any, Any], framework: str = "numpy") -> ArrayView:
    dtype = _numpy_dtypes.get(x.dtype) or _numpy_dtype(x.dtype)
    flags = x.flags
    shape = x.shape
    if flags.c_contiguous:
        strides = compact_strides(shape)
    else:
        strides = _canonical(shape, _element_strides(x.strides, dtype.bytes))
    address = x.ctypes.data
    return ArrayView(x, framework, shape, strides, dtype, address, HOST, flags.writeable, None, x)


_torch_dtypes: dict[Any, DType] = {}


def _read_torch(x: Any) -> ArrayView:
    dtype = _torch_dtypes.get(x.dtype)
    if dtype is None:
        found = lookup(x.dtype)
        if found is None:
            raise DTypeError(f"{{name}} has dtype {x.dtype}, which tilejit does not know.")
        dtype = _torch_dtypes[x.dtype] = found
    place = x.device
    if place.type == "cuda":
        device = place.index
    elif place.type == "cpu":
        device = HOST
    else:
        raise ArgumentError(
            f"{{name}} lives on torch's device {place}, not in CUDA or host memory."
        )
    if str(x.layout) != "torch.strided":
        raise ArgumentTypeError(f"{{name}} is a {x.layout} tensor, not a strided one.")
    shape = tuple(x.shape)
    strides = compact_strides(shape) if x.is_contiguous() else _canonical(shape, x.stride())
    return ArrayView(x, "torch", shape, strides, dtype, x.data_ptr(), device, True, None, x)


@functools.lru_cache(maxsize=256)
def _typestr_dtype(typestr: str) -> DType:
    return _numpy_dtype(np.dtype(typestr))


def _read_cuda_interface(x: Any, framework: str = "") -> ArrayView:
    interface = x.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise ArgumentTypeError("{name} is a masked array, which a kernel cannot see.")
    dtype = _typestr_dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    address, is_readonly = interface["data"]
    byte_strides = interface.get("strides")
    if byte_strides is None:
        strides = compact_strides(shape)
    else:
        strides = _canonical(shape, _element_strides(byte_strides, dtype.bytes))
    stream = interface.get("stream")
    return ArrayView(
        x, framework, shape, strides, dtype, address or 0, array_device(x, address or 0),
        not is_readonly, stream, x,
    )  # fmt: skip


def array_device(x: Any, address: int) -> int:
    """The device of an array with `__cuda_array_interface__`: as it says, else its address."""
    device = getattr(getattr(x, "device", None), "id", None)
    return pointer_device(address) if device is None else int(device)


def _read_dlpack(x: Any) -> ArrayView:
    tensor = dlpack.export(x)
    dtype = lookup(tensor.dtype)
    if dtype is None:
        raise DTypeError(f"{{name}} has dtype {tensor.dtype}, which tilejit does not know.")
    strides = tensor.strides
    return ArrayView(
        x, "", tensor.shape,
        compact_strides(tensor.shape) if strides is None else _canonical(tensor.shape, strides),
        dtype, tensor.address, HOST if tensor.device is None else tensor.device,
        tensor.writable, None, tensor,
    )  # fmt: skip


def _read_simulated(x: Any) -> ArrayView:
    view = read_numpy(x._ary, "numba")  # Numba's simulator keeps the NumPy array here
    view.owner = x
    return view


Reader = Callable[[Any], ArrayView]
_readers: dict[type, Reader | None] = {}


def _origin(kind: type, names: tuple[str, ...]) -> str:
    """The first of the packages `names` that a base of `kind` comes from, or ""."""
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package in names:
            return package
    return ""


def _is_torch(kind: type) -> bool:
    return any(
        b.__name__ == "Tensor" and b.__module__.partition(".")[0] == "torch" for b in kind.__mro__
    )


def reader_of(kind: type) -> Reader | None:
    """The function that reads arrays of type `kind`, or None when it is no array type."""
    if kind in _readers:
        return _readers[kind]
    reader: Reader | None = None
    if issubclass(kind, np.ndarray):
        reader = read_numpy
    elif issubclass(kind, np.generic):
        reader = None
    elif _is_torch(kind):
        reader = _read_torch
    elif kind.__module__.startswith("numba.cuda.simulator"):
        reader = _read_simulated if hasattr(kind, "copy_to_host") else None
    elif hasattr(kind, "__cuda_array_interface__"):
        reader = functools.partial(_read_cuda_interface, framework=_origin(kind, ("cupy", "numba")))
    elif hasattr(kind, "__dlpack__"):
        reader = _read_dlpack
    _readers[kind] = reader
    return reader


def is_interface_reader(reader: Reader | None) -> bool:
    """True for the reader of `__cuda_array_interface__`."""
    return isinstance(reader, functools.partial) and reader.func is _read_cuda_interface


def is_array(x: object) -> bool:
    """True for what can be a tensor argument."""
    return reader_of(type(x)) is not None


def read(x: Any) -> ArrayView:
    """The memory of an array.

    Raises:
        TypeError, ValueError: it has no memory that a kernel can see. The headline has `{name}`
            where the argument's name belongs.
    """
    reader = reader_of(type(x))
    if reader is None:
        kind = "None" if x is None else a_kind(x)
        raise ArgumentTypeError(
            f"{{name}} is {kind}, not an array.",
            hint="NumPy, Numba, CuPy and torch arrays do, and all with DLPack.",
        )
    return reader(x)


def host_array(view: ArrayView) -> np.ndarray[Any, Any]:
    """The memory of a host view as a NumPy array, shared and writable."""
    if isinstance(view.owner, np.ndarray):
        return view.owner
    low, high = view.span
    if low == high:
        return np.empty(view.shape, view.dtype.numpy)
    raw = (ctypes.c_char * (high - low)).from_address(low)
    width = view.dtype.bytes
    return np.ndarray(
        view.shape,
        view.dtype.numpy,
        buffer=memoryview(raw).cast("B"),
        offset=view.address - low,
        strides=tuple(s * width for s in view.strides),
    )


def overlapping(views: Sequence[ArrayView]) -> tuple[tuple[int, int], ...]:
    """Pairs (i < j) of arguments that share bytes, by the span of bytes each covers."""
    if len(views) < 2:
        return ()
    spans = sorted((*v.span, i) for i, v in enumerate(views))
    pairs: list[tuple[int, int]] = []
    for n, (low, high, i) in enumerate(spans):
        if low == high:
            continue
        for other_low, other_high, j in spans[n + 1 :]:
            if other_low >= high:
                break
            if other_low != other_high:
                pairs.append((min(i, j), max(i, j)))
    return tuple(sorted(pairs))


def needs_gradient(x: Any) -> bool:
    """True for a torch tensor whose writes autograd would have to record."""
    torch = sys.modules.get("torch")
    return bool(torch is not None and x.requires_grad and torch.is_grad_enabled())


def maker(like: ArrayView, shape: tuple[int, ...], dtype: DType) -> Callable[[], Any] | None:
    """Makes arrays as `allocate` does, beside a torch tensor; None for other frameworks."""
    torch = sys.modules.get("torch")
    kind = getattr(torch, "float32" if dtype is tfloat32 else dtype.name, None)
    if like.framework != "torch" or torch is None or kind is None:
        return None
    return functools.partial(torch.empty, shape, dtype=kind, device=like.owner.device)


def allocate(
    framework: str, shape: tuple[int, ...], dtype: DType, like: ArrayView | None
) -> ArrayView:
    """A new compact array of the framework, beside `like` (its device), uninitialised.

    Raises:
        DTypeError: the framework has no such dtype.
    """
    on_host = like is None or like.device == HOST
    if framework == "torch":
        torch = sys.modules["torch"]
        kind = getattr(torch, "float32" if dtype is tfloat32 else dtype.name, None)
        if kind is None:
            raise DTypeError(f"torch has no dtype {dtype} for an output.")
        assert like is not None
        return read(torch.empty(shape, dtype=kind, device=like.owner.device))
    if framework == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.device if like is not None else 0):
            return read(cupy.empty(shape, dtype=as_dtype(dtype).numpy))
    if on_host and framework != "numba":
        return read_numpy(np.empty(shape, dtype.numpy))
    from numba import cuda  # a device array of Numba's for exporters we cannot allocate with

    if like is not None and not on_host and like.device != cuda.get_current_device().id:
        with cuda.gpus[like.device]:
            return read(cuda.device_array(shape, dtype.numpy))
    return read(cuda.device_array(shape, dtype.numpy))
