"""Host time of a warm call, by kind of argument: python examples/call_time.py  (needs a GPU)

A warm call is one like another before: same shapes, strides, dtypes and constants. Each line is the
median of rounds of calls that only enqueue: between rounds the GPU catches up, so that no call
waits for a place in its queue. Frameworks that are not installed are left out, by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import quickstart

import tilejit.language as T
from tilejit import device_name, has_gpu, tilejit

ROUNDS, CALLS = 30, 200  # the queue of a stream holds about a thousand launches
M, N = T.dynamic("M, N")


@tilejit
def scale(A: T.Tensor((M, N), "float32"), B: T.Tensor((M, N), "float32"), alpha: T.float32):
    with T.Kernel(T.ceildiv(N, 128), M, threads=128) as (bx, row):
        for j in T.Parallel(128):
            B[row, bx * 128 + j] = alpha * A[row, bx * 128 + j]


def microseconds(call: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Host time of one call."""
    call()
    wait()
    samples = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
        wait()
    return statistics.median(samples)


class OnlyInterface:
    """An array of a library that tilejit has never heard of."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface: dict[str, Any] = self.array.__cuda_array_interface__
        return interface


def kinds() -> dict[str, tuple[Callable[[np.ndarray[Any, Any]], Any], Callable[[], Any]]]:
    """By name: what puts an array on the GPU, and what waits for the GPU."""
    from numba import cuda

    found: dict[str, Any] = {
        "Numba device array": (cuda.to_device, cuda.synchronize),
        "__cuda_array_interface__": (lambda x: OnlyInterface(cuda.to_device(x)), cuda.synchronize),
    }
    if importlib.util.find_spec("torch"):
        import torch

        found["torch"] = (lambda x: torch.from_numpy(x).cuda(), torch.cuda.synchronize)
    if importlib.util.find_spec("cupy"):
        import cupy

        found["CuPy"] = (cupy.asarray, cupy.cuda.runtime.deviceSynchronize)
    return found


def report() -> None:
    half, single = np.zeros((64, 64), np.float16), np.zeros((64, 64), np.float32)
    found = kinds()
    print(f"host microseconds of a warm call on {device_name()}")
    print(f"{'arguments':26}{'matmul(A, B, C)':>18}{'with constants':>18}{'with a scalar':>18}")
    for name, (put, wait) in found.items():
        a, b, c, d = put(half), put(half), put(single), put(single)
        times = (
            microseconds(lambda: quickstart.matmul(a, b, c), wait),  # noqa: B023 - called here
            microseconds(lambda: quickstart.matmul(a, b, c, BM=64, BN=64), wait),  # noqa: B023
            microseconds(lambda: scale(c, d, 2.5), wait),  # noqa: B023
        )
        print(f"{name:26}" + "".join(f"{value:18.1f}" for value in times))
    for name, package in (("torch", "torch"), ("CuPy", "cupy")):
        if name not in found:
            print(f"{name:26}{package} is not installed")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not has_gpu():
        sys.exit("There is no GPU here: a call would run in NumPy, and its time says nothing.")
    report()
