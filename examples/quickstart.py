"""Multiply two matrices with a tile kernel and check the product: python examples/quickstart.py"""

from __future__ import annotations

import time

import numpy as np

import tilejit.language as T
from tilejit import device_name, tilejit


@tilejit
def matmul(
    A: T.Tensor, B: T.Tensor, C: T.Tensor,
    *, BM=T.auto(128, 64, 256), BN=T.auto(128, 256, 64, step=8), BK=T.auto(64, 32),
):  # fmt: skip
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM)) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * BM, bx * BN])


def main(sizes=((512, 512, 512), (503, 763, 1017))) -> None:
    rng = np.random.default_rng(0)
    for M, N, K in sizes:
        a = rng.standard_normal((M, K)).astype(np.float16)
        b = rng.standard_normal((K, N)).astype(np.float16)
        c = np.full((M, N), np.nan, np.float32)
        matmul(a, b, c)  # the first call of a signature compiles
        start = time.perf_counter()
        matmul(a, b, c)
        elapsed_ms = (time.perf_counter() - start) * 1e3

        exact = a.astype(np.float64) @ b.astype(np.float64)
        bound = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
        wrong = ~(np.abs(c - exact) <= 2.0**-22 * K * bound)
        assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements are wrong"
        print(f"{M}x{N}x{K} float16 is right: {elapsed_ms:.2f} ms on {device_name()}")


if __name__ == "__main__":
    main()
