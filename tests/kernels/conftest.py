"""Runs whole kernels with outputs prefilled and guarded, twice, and compares exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilejit import options
from tilejit.dtypes import as_dtype
from tilejit.runtime import device
from tilejit.runtime.device import use_executor
from tilejit.target import Feature

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode alone does not find siblings

HOPPER = "sm_90a"
GUARD = 64  # elements before and after an output that must stay as they were


class Guarded:
    """An output array inside a larger allocation whose other bytes are watched.

    `argument` is what a kernel gets: a NumPy view, or on a GPU a torch tensor on the device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, on_gpu: bool) -> None:
        self.dtype = as_dtype(dtype)
        count = int(np.prod(shape))
        size = self.dtype.bytes
        self._shape, self._count, self._size = shape, count, size
        host = np.full((count + 2 * GUARD) * size, 0xFF, np.uint8)  # NaN in every float type
        if on_gpu:
            import torch

            self._memory = torch.from_numpy(host).cuda()
            inner = self._memory[GUARD * size : (GUARD + count) * size]
            name = {"bool": "bool", "tfloat32": "float32"}.get(self.dtype.name, self.dtype.name)
            self.argument = inner.view(getattr(torch, name)).view(shape)
        else:
            self._memory = host
            inner = host[GUARD * size : (GUARD + count) * size]
            self.argument = inner.view(self.dtype.numpy).reshape(shape)

    def result(self) -> np.ndarray:
        """What the kernel wrote; fails when it wrote anything around it."""
        memory = self._memory
        if not isinstance(memory, np.ndarray):
            memory = memory.cpu().numpy()
        edge = GUARD * self._size
        assert (memory[:edge] == 0xFF).all(), "wrote before the output"
        assert (memory[edge + self._count * self._size :] == 0xFF).all(), "wrote past the output"
        inner = memory[edge : edge + self._count * self._size]
        return inner.view(self.dtype.numpy).reshape(self._shape).copy()


@pytest.fixture
def run(executor: str) -> Callable[..., Any]:
    """run(kernel, *inputs, out=[(shape, dtype), ...], **constants) -> outputs.

    Calls `kernel(*inputs, *outputs, **constants)` twice on fresh guarded outputs and asserts
    that both give the same bits.
    """
    return runner(executor)


@pytest.fixture
def hopper(executor: str) -> Iterator[Callable[..., Any]]:
    """The same for a chip with multiplies by warpgroups and the tensor memory accelerator; on a
    GPU where it is one."""
    if executor == "gpu":
        skip_unless_hopper()
    with options(target=HOPPER):
        yield runner(executor)


@pytest.fixture
def hopper_gpu() -> Iterator[Callable[..., Any]]:
    """The same on a GPU only, for tests with the `gpu` mark."""
    skip_unless_hopper()
    with use_executor("gpu"):
        yield runner("gpu")


def skip_unless_hopper() -> None:
    chip = device.target_of(device.current_device())
    if not chip.has(Feature.WGMMA):
        pytest.skip(f"the GPU is {chip}")


def runner(executor: str) -> Callable[..., Any]:
    def call(kernel: Any, *inputs: Any, out: list[tuple[tuple[int, ...], Any]], **constants: Any):
        on_gpu = executor == "gpu"
        results = []
        for _ in range(2):
            outputs = [Guarded(shape, dtype, on_gpu) for shape, dtype in out]
            arguments = [_to_device(x) if on_gpu else x for x in inputs]
            kernel(*arguments, *(o.argument for o in outputs), **constants)
            results.append([o.result() for o in outputs])
        for first, second in zip(*results, strict=True):
            assert first.tobytes() == second.tobytes(), "two runs differ"
        return results[0][0] if len(out) == 1 else results[0]

    return call


def _to_device(x: Any) -> Any:
    """A tensor on the GPU with the array's values and strides, as far from a multiple of 16 bytes
    as the array is."""
    if not isinstance(x, np.ndarray):
        return x
    import torch

    dtype = getattr(torch, as_dtype(x.dtype).name)
    if x.size == 0:
        return torch.empty(x.shape, dtype=dtype, device="cuda")
    strides = tuple(s // x.itemsize for s in x.strides)
    span = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
    plain = x.view(f"u{x.itemsize}")  # NumPy has no strides of dtypes that are not its own
    flat = np.lib.stride_tricks.as_strided(plain, (span,), (x.itemsize,))
    shift = x.ctypes.data % 16
    memory = torch.empty(shift + span * x.itemsize, dtype=torch.uint8, device="cuda")
    inner = memory[shift:]
    inner.copy_(torch.from_numpy(flat.copy().view(np.uint8)))
    return inner.view(dtype).as_strided(x.shape, strides, shift // x.itemsize)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2026)
