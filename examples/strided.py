"""Tensors that are not contiguous: sliced, transposed, broadcast: python examples/strided.py"""

from __future__ import annotations

import numpy as np

import tilejit.language as T
from tilejit import tilejit


@tilejit
def scale(X: T.Tensor, Y: T.Tensor, *, BM=16, BN=64):
    """Y = 2 X. The strides of both are read at the call: nothing is made contiguous first."""
    M, N = X.shape
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
        tile = T.alloc_fragment((BM, BN), X.dtype)
        T.copy(X[by * BM, bx * BN], tile)
        for i, j in T.Parallel(BM, BN):
            tile[i, j] = tile[i, j] * 2
        T.copy(tile, Y[by * BM, bx * BN])


M, N = T.dynamic("M, N")
row, column = T.dynamic("row, column")


@tilejit
def add_any(
    X: T.StridedTensor((M, N), (row, column), "float32"),
    B: T.StridedTensor((M, N), (0, 1), "float32"),
    Y: T.Tensor((M, N), "float32"),
):
    """Y = X + B for any extents and strides of X, B repeating one row: compiled once."""
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 16), threads=128) as (bx, by):
        for i, j in T.Parallel(16, 64):
            r, c = by * 16 + i, bx * 64 + j
            Y[r, c] = X[r, c] + B[r, c]


def main() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((90, 150)).astype(np.float32)
    for name, x in {
        "contiguous": base,
        "sliced": base[5:77:3, 10:140:2],
        "transposed": base.T,
        "broadcast": np.broadcast_to(base[0], (40, 150)),
    }.items():
        y = np.full((x.shape[0] + 2, x.shape[1] + 2), np.nan, np.float32)
        scale(x, y[1:-1, 1:-1])  # a strided output is written in place
        np.testing.assert_array_equal(y[1:-1, 1:-1], 2 * x)
        assert np.isnan(y[0]).all() and np.isnan(y[:, -1]).all(), "wrote around the output"

        bias = rng.standard_normal(x.shape[1]).astype(np.float32)
        z = np.full(x.shape, np.nan, np.float32)
        add_any(x, np.broadcast_to(bias, x.shape), z)
        np.testing.assert_array_equal(z, x + bias)
        print(f"{name}: strides {tuple(s // x.itemsize for s in x.strides)} are right")


if __name__ == "__main__":
    main()
