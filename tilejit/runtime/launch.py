"""Puts compiled kernels on a GPU: loading, parameter packing, staging of host arrays, launching.

Knows the driver through `device`. Does not know signatures, tracing or how cubins are made.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tilejit.dtypes import DType
from tilejit.errors import ArgumentError, ArgumentTypeError, ResourceError, a_kind
from tilejit.runtime.arrays import HOST, ArrayView, host_array
from tilejit.runtime.device import check, driver

MAX_GRID = (2**31 - 1, 65535, 65535)  # CUDA Programming Guide, technical specifications
_PLAIN_SHARED_BYTES = 48 * 1024  # more needs the function attribute
_PORTABLE_CLUSTER = 8  # blocks; more needs the function attribute
_STAGING_ALIGN = 256  # what cuMemAlloc aligns to; a host array keeps its address modulo this

_FORMATS = {
    "bool": "?", "int8": "b", "int16": "h", "int32": "i", "int64": "q",
    "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q",
    "float16": "e", "float32": "f", "tfloat32": "f", "float64": "d",
}  # fmt: skip
_SLOT_BYTES = 8


class Packer:
    """The parameter block of a kernel: one 8-byte slot a parameter.

    dtypes: None for an address. maps: places of the parameters that are tensor maps, whose values
    are the addresses of the maps in host memory.
    """

    def __init__(self, dtypes: Sequence[DType | None], maps: Sequence[int] = ()) -> None:
        self._count = len(dtypes)
        self._maps = tuple(maps)
        formats = []
        self._raw: list[tuple[int, DType]] = []
        for n, dtype in enumerate(dtypes):
            name = _FORMATS.get(dtype.name) if dtype is not None else "Q"
            if name is None:
                assert dtype is not None
                self._raw.append((n, dtype))  # passed as its bits
                name = "H" if dtype.bits == 16 else "B"
            formats.append(f"{name}{_SLOT_BYTES - struct.calcsize('=' + name)}x")
        self._struct = struct.Struct("=" + "".join(formats))
        self._local = threading.local()

    def pack(self, values: Sequence[Any]) -> int:
        """Address of the array of parameter pointers, valid in this thread until the next pack."""
        address: int
        try:
            block, address, pointers = self._local.block
        except AttributeError:
            block = ctypes.create_string_buffer(max(1, self._count) * _SLOT_BYTES)
            base = ctypes.addressof(block)
            slots = (base + n * _SLOT_BYTES for n in range(self._count))
            pointers = (ctypes.c_void_p * max(1, self._count))(*slots)
            address = ctypes.addressof(pointers)
            self._local.block = block, address, pointers
        if self._raw:
            values = list(values)
            for n, dtype in self._raw:
                bits = np.uint16 if dtype.bits == 16 else np.uint8
                values[n] = int(dtype.constant(values[n]).view(bits))
        self._struct.pack_into(block, 0, *values)
        for n in self._maps:
            pointers[n] = values[n]
        return address


class LoadedKernel:
    """A cubin in the driver, ready to launch on any device it runs on.

    starts_early: a launch may start before the kernels before it in the stream have ended; the
        kernel waits for them itself (CUDA Programming Guide, "Programmatic Dependent Launch").

    Raises:
        DeviceError: the driver refuses the cubin.
    """

    def __init__(
        self,
        name: str,
        cubin: bytes,
        entry: str,
        threads: tuple[int, int, int],
        shared_bytes: int,
        starts_early: bool = False,
        cluster: int = 1,
    ) -> None:
        api = driver()
        doing = f"Loading {name}"
        self._name = name
        self._library = check(api.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), doing)
        self._kernel = check(api.cuLibraryGetKernel(self._library, entry.encode()), doing)
        self._function = api.CUfunction(int(self._kernel))
        self._threads = threads
        self._shared_bytes = shared_bytes
        self._cluster = cluster
        self._prepared: set[int] = set()
        self._launch = _launch_early if starts_early else api.cuLaunchKernel

    def _prepare(self, device: int) -> None:
        """Allow more than 48 KiB of dynamic shared memory, and more than 8 blocks of a cluster, on
        the device, once."""
        if self._shared_bytes > _PLAIN_SHARED_BYTES:
            doing = f"Reserving {self._shared_bytes} bytes of shared memory for {self._name}"
            name = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
            self._set(name, self._shared_bytes, device, doing)
        if self._cluster > _PORTABLE_CLUSTER:
            doing = f"Allowing clusters of {self._cluster} blocks for {self._name}"
            self._set("CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED", 1, device, doing)
        self._prepared.add(device)

    def _set(self, name: str, value: int, device: int, doing: str) -> None:
        api = driver()
        attribute = getattr(api.CUfunction_attribute, name)
        handle = check(api.cuDeviceGet(device), doing)
        check(api.cuKernelSetAttribute(attribute, value, self._kernel, handle), doing)

    def launcher(self, grid: tuple[int, int, int], device: int) -> Callable[[int, int], None]:
        """`launch` for one grid on one device, as a function of stream and parameters."""
        if device not in self._prepared:
            self._prepare(device)
        start, doing = self._launch, f"Launching {self._name}"
        function, shared_bytes = self._function, self._shared_bytes
        (gx, gy, gz), (x, y, z) = grid, self._threads

        def launch(stream: int, parameters: int) -> None:
            status = start(
                function, gx, gy, gz, x, y, z, shared_bytes, stream, parameters, 0
            )  # fmt: skip
            if status[0]:
                check(status, doing)

        return launch

    def launch(self, grid: tuple[int, int, int], parameters: int, stream: int, device: int) -> None:
        """Enqueue one launch in the device's context, which is current."""
        if device not in self._prepared:
            self._prepare(device)
        x, y, z = self._threads
        status = self._launch(
            self._function, *grid, x, y, z, self._shared_bytes, stream, parameters, 0
        )
        if status[0]:
            check(status, f"Launching {self._name}")


def _launch_early(
    function: Any, gx: int, gy: int, gz: int, x: int, y: int, z: int, shared_bytes: int,
    stream: int, parameters: int, extra: int,
) -> Any:  # fmt: skip
    """cuLaunchKernel for a kernel that may start before those before it have ended."""
    api = driver()
    attribute, value = api.CUlaunchAttribute(), api.CUlaunchAttributeValue()
    attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value.programmaticStreamSerializationAllowed = 1
    attribute.value = value
    config = api.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = gx, gy, gz
    config.blockDimX, config.blockDimY, config.blockDimZ = x, y, z
    config.sharedMemBytes = shared_bytes
    config.hStream = api.CUstream(stream)
    config.attrs, config.numAttrs = [attribute], 1
    return api.cuLaunchKernelEx(config, function, parameters, extra)


def check_grid(
    name: str, grid: tuple[int, int, int], cluster: tuple[int, int, int] | None = None
) -> None:
    """
    Raises:
        ResourceError: more blocks along a dimension than CUDA launches.
        ArgumentError: clusters, as the user gave them, do not divide the grid.
    """
    for axis, blocks, size in zip("xyz", grid, cluster or (1, 1, 1), strict=True):
        if blocks % size:
            raise ArgumentError(
                f"{name}: the grid has {blocks} blocks along {axis}, which clusters of {size} do "
                "not divide.",
                hint="Round the grid in T.Kernel(...) up to a multiple.",
            )
    for axis, blocks, most in zip("xyz", grid, MAX_GRID, strict=True):
        if blocks > most:
            raise ResourceError(
                f"{name}: the grid has {blocks} blocks along {axis}; a GPU launches at most "
                f"{most}.",
                hint="Let each block do more, or put the large extent first in T.Kernel(...).",
            )


def stream_handle(stream: Any) -> int:
    """The raw handle of a stream: an int, or an object of torch, CuPy, Numba or cuda.core.

    Raises:
        TypeError: nothing that names a stream.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):  # torch, CuPy, Numba
        handle = getattr(stream, attribute, None)
        if handle is not None:
            return int(getattr(handle, "value", handle) or 0)
    raise ArgumentTypeError(f"stream is {a_kind(stream)}, not a CUDA stream.")


def stream_source(views: Sequence[ArrayView]) -> Callable[[], int]:
    """Gives the current stream of the framework of the first array in device memory; 0 is CUDA's
    default stream."""
    first = next((v for v in views if v.device != HOST), None)
    if first is not None and first.framework == "torch":
        return functools.partial(sys.modules["torch"]._C._cuda_getCurrentRawStream, first.device)
    if first is not None and first.framework == "cupy":
        current = sys.modules["cupy"].cuda.get_current_stream
        return lambda: int(current().ptr)
    handle = (first.stream if first is not None else None) or 0
    return lambda: handle


def stream_of(views: Sequence[ArrayView]) -> int:
    """What `stream_source` gives now."""
    return stream_source(views)()


class Staging:
    """Device copies of host arrays for one call; arrays that share bytes share them here too.

    The device's context is current. `close` frees the copies.
    """

    def __init__(self, views: Sequence[ArrayView]) -> None:
        self._views = [v for v in views if v.device == HOST and v.size]
        self._groups: list[tuple[int, int, int]] = []  # host low, host high, device base
        self._blocks: list[int] = []
        try:
            for low, high in _merged([v.span for v in self._views]):
                shift = low % _STAGING_ALIGN
                doing = f"Copying {high - low} bytes of host arrays to the GPU"
                block = int(check(driver().cuMemAlloc(high - low + shift), doing))
                self._blocks.append(block)
                self._groups.append((low, high, block + shift))
        except BaseException:
            self.close()
            raise

    def address(self, host: int) -> int:
        """The device address of a host address inside one of the arrays."""
        for low, high, base in self._groups:
            if low <= host < high:
                return base + (host - low)
        return 0  # an empty array has no memory

    def copy_in(self, stream: int) -> None:
        copy = driver().cuMemcpyHtoDAsync
        for low, high, base in self._groups:
            check(copy(base, low, high - low, stream), "Copying a host array to the GPU")

    def copy_out(self, written: Sequence[ArrayView], stream: int) -> None:
        """Wait for the stream and bring the elements of the written arrays back, and nothing
        between them."""
        doing = "Copying a result back from the GPU"
        api = driver()
        scattered = []
        for view in written:
            if view.device != HOST or not view.size:
                continue
            low, high = view.span
            if view.is_compact:
                target = low
            else:
                fresh = np.empty(high - low, np.uint8)
                scattered.append((view, low, fresh))
                target = fresh.ctypes.data
            check(api.cuMemcpyDtoHAsync(target, self.address(low), high - low, stream), doing)
        check(api.cuStreamSynchronize(stream), "Running the kernel")
        for view, low, fresh in scattered:
            width = view.dtype.bytes
            host_array(view)[...] = np.ndarray(
                view.shape,
                view.dtype.numpy,
                buffer=fresh.data,
                offset=view.address - low,
                strides=tuple(s * width for s in view.strides),
            )

    def close(self) -> None:
        blocks, self._blocks = self._blocks, []
        for block in blocks:
            check(driver().cuMemFree(block), "Freeing GPU memory")


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans, those that overlap made one."""
    result: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if result and low < result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], high))
        else:
            result.append((low, high))
    return result
