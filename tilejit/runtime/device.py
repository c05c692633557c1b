"""Whether there is a GPU, which one, its target, and where a call runs.

Knows the CUDA driver through cuda.bindings, imported when a driver library is found. Does not know
kernels or arguments.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

from tilejit import config
from tilejit.errors import ArgumentError, DeviceError, ResourceError
from tilejit.target import Target, as_target, for_capability, measured

DEFAULT_TARGET = "sm_80"
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class Executor(StrEnum):
    """Who runs a call."""

    GPU = "gpu"
    SIMULATOR = "simulator"
    REFERENCE = "reference"


_forced: contextvars.ContextVar[Executor | None] = contextvars.ContextVar(
    "tilejit_executor", default=None
)


@contextlib.contextmanager
def use_executor(name: str) -> Iterator[Executor]:
    """Run the calls inside the `with` block on that executor, in this thread or task only.

    Raises:
        ValueError: no such executor, or "gpu" where there is none.
    """
    executor = Executor(name)
    if executor is Executor.GPU and not has_gpu():
        raise ArgumentError("There is no GPU here to run on.")
    token = _forced.set(executor)
    try:
        yield executor
    finally:
        _forced.reset(token)


def executor() -> Executor:
    """Where a call made now runs: as forced, simulated if asked, on the GPU if there is one."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if config.current().simulate:
        return Executor.SIMULATOR
    return Executor.GPU if has_gpu() else Executor.REFERENCE


@functools.cache
def _initialised_driver() -> tuple[Any, int]:
    """The driver module and the number of GPUs; (None, 0) where there is no driver."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return None, 0
    from cuda.bindings import driver

    status, *_ = driver.cuInit(0)
    if status in (
        driver.CUresult.CUDA_ERROR_NO_DEVICE,
        driver.CUresult.CUDA_ERROR_STUB_LIBRARY,
        driver.CUresult.CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE,
    ):
        return None, 0
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"The CUDA driver does not start: {status.name}.")
    status, count = driver.cuDeviceGetCount()
    return (driver, int(count)) if count else (None, 0)


def has_gpu() -> bool:
    """True where there is a CUDA driver with a GPU."""
    return _initialised_driver()[1] > 0


def driver() -> Any:
    """The `cuda.bindings.driver` module, initialised.

    Raises:
        DeviceError: there is no GPU.
    """
    module, count = _initialised_driver()
    if not count:
        raise DeviceError(
            "There is no GPU (or no CUDA driver) to run on.",
            hint="Call the kernel without one: it then runs on tilejit's reference executor.",
        )
    return module


def check(result: tuple[Any, ...], doing: str) -> Any:
    """The value of a driver call's result tuple.

    Raises:
        ResourceError: the GPU's memory is used up.
        DeviceError: any other failure, with CUDA's name and text for it.
    """
    status = result[0]
    if status:
        api = driver()
        text = api.cuGetErrorString(status)[1]
        reason = text.decode() if text else "no text"
        if status == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise ResourceError(f"{doing}: the GPU's memory is used up.")
        raise DeviceError(f"{doing}: CUDA reports {reason} ({status.name}).")
    values = result[1:]
    return values[0] if len(values) == 1 else values


def current_device() -> int:
    """Ordinal of the thread's current device; 0 when none is current."""
    api = driver()
    context = check(api.cuCtxGetCurrent(), "Finding the current device")
    if not int(context):
        return 0
    return int(check(api.cuCtxGetDevice(), "Finding the current device"))


_contexts: dict[int, Any] = {}
_contexts_lock = threading.Lock()


def _primary_context(device: int) -> Any:
    with _contexts_lock:
        if device not in _contexts:
            api = driver()
            handle = check(api.cuDeviceGet(device), f"Opening GPU {device}")
            _contexts[device] = check(api.cuDevicePrimaryCtxRetain(handle), f"Opening GPU {device}")
        return _contexts[device]


def activity(device: int) -> Callable[[], bool]:
    """A quick test whether the device's primary context is the thread's current one."""
    get_current, context = driver().cuCtxGetCurrent, int(_primary_context(device))

    def is_active() -> bool:
        status, current = get_current()
        return not status and int(current) == context

    return is_active


@contextlib.contextmanager
def active(device: int) -> Iterator[None]:
    """Make the device's primary context current in this thread, and put back what was."""
    api = driver()
    context = _primary_context(device)
    before = check(api.cuCtxGetCurrent(), "Finding the current device")
    if int(before) == int(context):
        yield
        return
    check(api.cuCtxSetCurrent(context), f"Choosing GPU {device}")
    try:
        yield
    finally:
        if int(before):
            check(api.cuCtxSetCurrent(before), "Going back to the former GPU")


@functools.cache
def target_of(device: int) -> Target:
    """The target that suits the device best, with the device's own figures.

    Raises:
        UnsupportedError: older than any target.
    """
    names = driver().CUdevice_attribute
    kilohertz, bits, cache = (
        _attribute(device, name)
        for name in (
            names.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE,
            names.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH,
            names.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE,
        )
    )
    bytes_a_second = 2 * kilohertz * 1e3 * bits / 8  # two transfers a clock
    target = for_capability(*capability_of(device))
    return measured(target, multiprocessors(device), bytes_a_second, cache)


@functools.cache
def capability_of(device: int) -> tuple[int, int]:
    names = driver().CUdevice_attribute
    return (
        _attribute(device, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        _attribute(device, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    )


@functools.cache
def multiprocessors(device: int) -> int:
    """Multiprocessors of the device: how many blocks run at once that each take a whole one."""
    name = driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    return _attribute(device, name)


def _attribute(device: int, name: Any) -> int:
    api = driver()
    handle = check(api.cuDeviceGet(device), f"Opening GPU {device}")
    return int(check(api.cuDeviceGetAttribute(name, handle), f"Asking GPU {device}"))


def runs_on(target: Target, device: int) -> bool:
    """True when a cubin of the target loads on the device: the same major version and no newer
    minor one; with a suffix, exactly that chip (CUDA Programming Guide, binary compatibility)."""
    major, minor = capability_of(device)
    if target.suffix:
        return target.cc == (major, minor)
    return target.cc[0] == major and target.cc[1] <= minor


@functools.cache
def _product_name(device: int) -> str:
    api = driver()
    handle = check(api.cuDeviceGet(device), f"Opening GPU {device}")
    text: bytes = check(api.cuDeviceGetName(128, handle), f"Asking GPU {device}")
    return text.split(b"\0")[0].decode(errors="replace")


def device_name() -> str:
    """What a call made now runs on: such as "NVIDIA H200 (sm_90a)", or the executor without one."""
    where = executor()
    if where is Executor.GPU:
        device = current_device()
        return f"{_product_name(device)} ({target_of(device)})"
    if where is Executor.SIMULATOR:
        return f"Numba's CUDA simulator ({offline_target()})"
    return "the NumPy reference executor"


def offline_target() -> Target:
    """The target of compilations and simulations that name none and have no GPU."""
    return as_target(config.current().target or DEFAULT_TARGET)


def pointer_device(address: int) -> int:
    """The device whose memory the address is in; the current one for a null address."""
    api = driver()
    if not address:
        return current_device()
    result = api.cuPointerGetAttribute(_ordinal_attribute(), address)
    return int(check(result, "Finding where an array lives"))


@functools.cache
def _ordinal_attribute() -> Any:
    return driver().CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
