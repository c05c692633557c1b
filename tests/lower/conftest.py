"""Kernels of one hand-written granule, compiled without a GPU and run where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from tilejit.dtypes import int32, uint8
from tilejit.isa.machine import Address, Granule, Lowered, Slot

ADDRESS = Slot(uint8, address=True)
COUNT = Slot(int32)
THREADS = 128


def lower_elementwise(emit, inputs, outputs, *, fast_math=False, name="kernel"):
    """Each thread applies `emit(machine, values) -> values` to one element of every input.

    inputs, outputs: dtypes of the arrays, all of `n` elements; the last parameter is n.
    """

    def body(m, arguments):
        *bases, block, count = arguments
        index = m.binary("add", m.binary("mul", block, m.const(THREADS, int32), int32),
                         m.thread_index(), int32)  # fmt: skip
        inside = m.binary("lt", index, count, int32)

        def place(base, dtype, readonly):
            offset = m.binary("mul", index, m.const(dtype.bytes, int32), int32)
            return Address("global", base, offset, align=dtype.bytes, readonly=readonly)

        values = [
            m.load(place(base, dtype, True), dtype, 1, inside)[0]
            for base, dtype in zip(bases, inputs, strict=False)
        ]
        results = emit(m, values)
        for base, dtype, value in zip(bases[len(inputs) :], outputs, results, strict=True):
            m.store(place(base, dtype, False), [value], dtype, inside)
        return []

    names = [f"A{i}" for i in range(len(inputs) + len(outputs))]
    arguments = ", ".join(names)
    slots = (ADDRESS,) * len(names)
    return Lowered(
        source=f"def {name}({arguments}, n):\n    body_0({arguments}, cuda.blockIdx.x, n)\n",
        entry=name,
        parameters=(*((n, ADDRESS) for n in names), ("n", COUNT)),
        noalias=(False,) * (len(names) + 1),
        granules={"body_0": Granule("body_0", (*slots, COUNT, COUNT), (), body)},
        threads=(THREADS, 1, 1),
        shared_bytes=0,
        fast_math=fast_math,
    )


def lower_single(emit, arrays, *, threads=(32, 1, 1), shared_bytes=0, extra=()):
    """One call of `emit(machine, addresses)`; parameters are `arrays` addresses and `extra`."""
    names = [f"A{i}" for i in range(arrays)]
    slots = ((ADDRESS,) * arrays) + tuple(extra)
    names += [f"x{i}" for i in range(len(extra))]
    arguments = ", ".join(names)

    def body(m, values):
        emit(m, *values)
        return []

    return Lowered(
        source=f"def kernel({arguments}):\n    body_0({arguments})\n",
        entry="kernel",
        parameters=tuple(zip(names, slots, strict=True)),
        noalias=(False,) * len(names),
        granules={"body_0": Granule("body_0", slots, (), body)},
        threads=threads,
        shared_bytes=shared_bytes,
    )


@pytest.fixture
def elementwise():
    return lower_elementwise


@pytest.fixture
def single():
    return lower_single


@pytest.fixture(scope="session")
def gpu():
    """A callable that launches a lowered kernel on the GPU, with its target as `.target`."""
    from cuda.bindings import driver

    try:
        (code,) = driver.cuInit(0)
    except RuntimeError:  # no driver library
        code = driver.CUresult.CUDA_ERROR_NO_DEVICE
    if code != driver.CUresult.CUDA_SUCCESS:
        pytest.skip("needs a GPU")
    return Gpu(driver)


class Gpu:
    """Runs kernels on the first GPU; arrays are copied in and back."""

    def __init__(self, driver):
        from tilejit.target import for_capability

        self.driver = driver
        device = self.ask(driver.cuDeviceGet(0))
        self.ask(driver.cuCtxPushCurrent(self.ask(driver.cuDevicePrimaryCtxRetain(device))))
        attribute = driver.CUdevice_attribute
        self.target = for_capability(
            self.ask(driver.cuDeviceGetAttribute(
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)),
            self.ask(driver.cuDeviceGetAttribute(
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)),
        )  # fmt: skip

    def ask(self, answer):
        code, *values = answer
        assert code == self.driver.CUresult.CUDA_SUCCESS, code
        return values[0] if values else None

    def __call__(self, lowered, arrays, extra=(), grid=1, target=None):
        from tilejit.runtime.compile import compile_lowered

        driver, ask = self.driver, self.ask
        compiled = compile_lowered(lowered, target or self.target)
        library = ask(driver.cuLibraryLoadData(compiled.cubin, [], [], 0, [], [], 0))
        kernel = ask(driver.cuLibraryGetKernel(library, compiled.entry.encode()))
        buffers = [ask(driver.cuMemAlloc(max(a.nbytes, 16))) for a in arrays]
        try:
            for buffer, array in zip(buffers, arrays, strict=True):
                ask(driver.cuMemcpyHtoD(buffer, array.ctypes.data, array.nbytes))
            words = [np.array([int(b)], np.uint64) for b in buffers]
            words += [np.array([e]) for e in extra]
            pointers = np.array([w.ctypes.data for w in words], np.uint64)
            ask(driver.cuLaunchKernel(
                driver.CUfunction(int(kernel)), grid, 1, 1, *lowered.threads,
                lowered.shared_bytes, 0, pointers.ctypes.data, 0))  # fmt: skip
            ask(driver.cuCtxSynchronize())
            for buffer, array in zip(buffers, arrays, strict=True):
                ask(driver.cuMemcpyDtoH(array.ctypes.data, buffer, array.nbytes))
        finally:
            for buffer in buffers:
                ask(driver.cuMemFree(buffer))
            ask(driver.cuLibraryUnload(library))
