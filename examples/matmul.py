"""A tensor-core matmul in a dozen lines, and how fast it is beside cuBLAS.

python examples/matmul.py                  check it on NumPy arrays, wherever there is a device
python examples/matmul.py --bench          time tilings beside torch.matmul (needs a GPU, torch)
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import ml_dtypes
import numpy as np

import tilejit.language as T
from tilejit import tilejit


@tilejit
def matmul(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=128, BN=128, BK=32, stages=3, threads=128, group=8
):
    """C = A @ B; blocks go down `group` rows of tiles before the next column, so that the blocks
    that run at one time share their operands in the L2 cache."""
    M, K = A.shape
    N = C.shape[1]
    rows, columns = T.ceildiv(M, BM), T.ceildiv(N, BN)
    with T.Kernel(rows * columns, threads=threads) as block:
        first = block // (group * columns) * group
        height = T.min(rows - first, group)
        by = first + block % (group * columns) % height
        bx = block % (group * columns) // height
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * BM, bx * BN])


# The last ones need the shared memory of a server chip (163 to 227 KiB a block).
TILINGS = (
    {"BM": 128, "BN": 128, "BK": 32, "stages": 4, "threads": 128},
    {"BM": 128, "BN": 128, "BK": 64, "stages": 3, "threads": 128},
    {"BM": 256, "BN": 128, "BK": 64, "stages": 3, "threads": 256},
    {"BM": 256, "BN": 128, "BK": 64, "stages": 4, "threads": 256},
    {"BM": 256, "BN": 128, "BK": 128, "stages": 2, "threads": 256},
    {"BM": 128, "BN": 256, "BK": 128, "stages": 2, "threads": 256},
)


def check() -> None:
    """Compare with float64 on sizes that no tile divides."""
    rng = np.random.default_rng(0)
    M, N, K = 150, 170, 90
    a = rng.standard_normal((M, K)).astype(ml_dtypes.bfloat16)
    b = rng.standard_normal((K, N)).astype(ml_dtypes.bfloat16)
    c = np.full((M, N), np.nan, np.float32)
    matmul(a, b, c, BM=64, BN=64)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    wrong = ~(np.abs(c - exact) <= 2.0**-22 * K * bound)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements are wrong"
    print(f"matmul {M}x{N}x{K}: right")


def bench(size: int, dtype: str, rounds: int) -> None:
    """Interleave cuBLAS and the tilings, L2 flushed before each; medians and ratios."""
    import torch

    a = torch.randn(size, size, device="cuda").to(getattr(torch, dtype))
    b = torch.randn(size, size, device="cuda").to(getattr(torch, dtype))
    runs: dict[str, Any] = {"cuBLAS": lambda c: torch.matmul(a, b, out=c)}
    for tiling in TILINGS:
        name = "{BM}x{BN}x{BK} {stages} stages {threads} threads".format(**tiling)
        runs[name] = lambda c, tiling=tiling: matmul(a, b, c, **tiling)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    reference = torch.matmul(a.float(), b.float())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, call in runs.items():
        c = torch.full((size, size), float("nan"), device="cuda", dtype=a.dtype)
        call(c)
        error = ((c.float() - reference).norm() / reference.norm()).item()
        assert error < 1e-2, f"{name}: relative error {error}"
    c = torch.empty_like(a)
    for _ in range(rounds):
        for name, call in runs.items():
            flush.zero_()
            torch.cuda._sleep(500_000)  # the kernel is queued before the clock starts
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(c)
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    base = statistics.median(times["cuBLAS"])
    print(f"{size}^3 {dtype}")
    for name, samples in times.items():
        ms = statistics.median(samples)
        print(f"  {name:36} {ms:8.3f} ms {2 * size**3 / ms / 1e9:7.1f} TFLOP/s {base / ms:6.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if arguments.bench:
        bench(arguments.size, arguments.dtype, arguments.rounds)
    else:
        check()
