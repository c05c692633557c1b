"""A tensor-core matmul in a dozen lines, and how fast it is beside cuBLAS and other compilers.

python examples/matmul.py                  check it on NumPy arrays, wherever there is a device
python examples/matmul.py --bench          time it (needs a GPU, torch); --bench --help says what
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

import tilejit.language as T
from tilejit import tilejit


@tilejit
def matmul(
    A: T.Tensor, B: T.Tensor, C: T.Tensor,
    *,
    BM=T.auto(128, 64, 256), BN=T.auto(128, 256, 64, 192, 320, 32, step=8), BK=T.auto(64, 32, 128),
    transpose_B=False, tiles=None,
):  # fmt: skip
    """C = A @ B, or A @ B.T where B is stored N x K; `tiles` is another dtype for the tiles."""
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM)) as (bx, by):
        a = T.alloc_shared((BM, BK), tiles or A.dtype)
        b = T.alloc_shared((BN, BK) if transpose_B else (BK, BN), tiles or B.dtype)
        acc = T.alloc_fragment((BM, BN), "int32" if A.dtype == "int8" else "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[(bx * BN, k * BK) if transpose_B else (k * BK, bx * BN)], b)
            T.gemm(a, b, acc, transpose_B=transpose_B)
        T.copy(acc, C[by * BM, bx * BN])


def check() -> None:
    """Compare with float64 on sizes that no tile divides."""
    rng = np.random.default_rng(0)
    M, N, K = 150, 170, 90
    a = rng.standard_normal((M, K)).astype(ml_dtypes.bfloat16)
    b = rng.standard_normal((K, N)).astype(ml_dtypes.bfloat16)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    for transpose_B, stored in ((False, b), (True, np.ascontiguousarray(b.T))):
        c = np.full((M, N), np.nan, np.float32)
        matmul(a, stored, c, transpose_B=transpose_B)
        wrong = ~(np.abs(c - exact) <= 2.0**-22 * K * bound)
        assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements are wrong"
    print(f"matmul {M}x{N}x{K}: right")


if __name__ == "__main__":
    from bench_options import script

    script(__doc__, check, "matmul_bench")
