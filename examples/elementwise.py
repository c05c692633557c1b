"""Elementwise kernels: fused arithmetic, masks, a transpose: python examples/elementwise.py"""

from __future__ import annotations

import numpy as np

import tilejit.language as T
from tilejit import tilejit


@tilejit
def gelu_add(X: T.Tensor, Y: T.Tensor, Z: T.Tensor, *, BM=32, BN=128):
    """Z = gelu(X) + Y, with the tanh approximation of gelu (Hendrycks and Gimpel, 2016)."""
    M, N = X.shape
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
        for i, j in T.Parallel(BM, BN):
            x = X[by * BM + i, bx * BN + j]
            inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
            gelu = 0.5 * x * (1 + T.tanh(inner))
            Z[by * BM + i, bx * BN + j] = gelu + Y[by * BM + i, bx * BN + j]


@tilejit
def causal_mask(S: T.Tensor, Z: T.Tensor, *, BM=32, BN=64):
    """Z = S where the column is at most the row, else -inf."""
    M, N = S.shape
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
        tile = T.alloc_fragment((BM, BN), S.dtype)
        T.copy(S[by * BM, bx * BN], tile)
        for i, j in T.Parallel(BM, BN):
            tile[i, j] = T.if_then_else(
                bx * BN + j <= by * BM + i, tile[i, j], -T.infinity(S.dtype)
            )
        T.copy(tile, Z[by * BM, bx * BN])


@tilejit
def transpose(X: T.Tensor, Y: T.Tensor, *, B=32):
    """Y = X.T, through shared memory so that both sides are read and written in rows."""
    M, N = X.shape
    with T.Kernel(T.ceildiv(N, B), T.ceildiv(M, B), threads=128) as (bx, by):
        tile = T.alloc_shared((B, B), X.dtype)
        T.copy(X[by * B, bx * B], tile)
        for i, j in T.Parallel(B, B):
            Y[bx * B + i, by * B + j] = tile[j, i]


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((203, 517)).astype(np.float32)
    y = rng.standard_normal((203, 517)).astype(np.float32)
    z = np.full_like(x, np.nan)

    gelu_add(x, y, z)
    exact = 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x.astype(float) ** 3))) + y
    np.testing.assert_allclose(z, exact, rtol=1e-5, atol=1e-6)

    causal_mask(x, z)
    row, column = np.indices(x.shape)
    np.testing.assert_array_equal(z, np.where(column <= row, x, -np.inf).astype(np.float32))

    t = np.full(x.shape[::-1], np.nan, np.float32)
    transpose(x, t)
    np.testing.assert_array_equal(t, x.T)
    print("gelu_add, causal_mask and transpose are right")


if __name__ == "__main__":
    main()
