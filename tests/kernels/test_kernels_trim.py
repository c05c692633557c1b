"""Tiles that are longer than their tensor: only the rows that there are are brought."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.ir.node import walk
from tilejit.ops.copy import Copy

BF16 = ml_dtypes.bfloat16


@tilejit
def flat(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=64, BN=64, threads=128, transpose_A=False):
    """C = A @ B.T, or A.T @ B.T."""
    K, M = A.shape if transpose_A else A.shape[::-1]
    N = B.shape[0]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((64, BM) if transpose_A else (BM, 64), A.dtype)
        b = T.alloc_shared((BN, 64), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 64)):
            T.copy(A[(k * 64, by * BM) if transpose_A else (by * BM, k * 64)], a)
            T.copy(B[bx * BN, k * 64], b)
            T.gemm(a, b, acc, transpose_A=transpose_A, transpose_B=True)
        T.copy(acc, C[by * BM, bx * BN])


def boxes(kernel, tensor):
    (frame,) = kernel.kernels
    return {
        n.src.shape
        for n in walk(frame.planned.body)
        if isinstance(n, Copy) and n.is_tma and n.src.buffer.name == tensor
    }


@pytest.mark.parametrize("M", [1, 7, 16, 63, 64, 65, 100])
@pytest.mark.parametrize("BM, threads", [(64, 128), (128, 256)])
def test_absent_rows_are_not_brought_and_are_zeros(hopper, rng, M, BM, threads):
    K, N = 200, 136
    a, b = (rng.integers(-4, 5, (rows, K)).astype(BF16) for rows in (M, N))
    constants = {"BM": BM, "threads": threads}
    c = hopper(flat, a, b, out=[((M, N), "float32")], **constants)
    np.testing.assert_array_equal(c, a.astype(np.float64) @ b.astype(np.float64).T)
    specs = T.Tensor((M, K), BF16), T.Tensor((N, K), BF16), T.Tensor((M, N), "float32")
    kernel = flat.compile(*specs, target="sm_90a", **constants)
    assert boxes(kernel, "A") == {(min(M, BM) if M <= BM else BM, 64)}
    says = "a: only the" in kernel.explain()
    assert says == (M < BM)


@pytest.mark.parametrize("M, trimmed", [(264, True), (307, False), (312, True), (383, False)])
def test_more_rows_than_a_box_has_are_trimmed_where_boxes_fit(hopper, rng, M, trimmed):
    a, b = (rng.integers(-4, 5, (rows, 128)).astype(BF16) for rows in (M, 32))
    constants = {"BM": 384, "BN": 32, "threads": 256}
    c = hopper(flat, a, b, out=[((M, 32), "float32")], **constants)
    np.testing.assert_array_equal(c, a.astype(np.float64) @ b.astype(np.float64).T)
    specs = T.Tensor((M, 128), BF16), T.Tensor((32, 128), BF16), T.Tensor((M, 32), "float32")
    kernel = flat.compile(*specs, target="sm_90a", **constants)
    assert (f"a: only the {M} rows" in kernel.explain()) == trimmed


def test_a_short_right_operand_is_trimmed_too(hopper, rng):
    a, b = (rng.integers(-4, 5, (rows, 128)).astype(BF16) for rows in (200, 24))
    c = hopper(flat, a, b, out=[((200, 24), "float32")])
    np.testing.assert_array_equal(c, a.astype(np.float64) @ b.astype(np.float64).T)
    specs = T.Tensor((200, 128), BF16), T.Tensor((24, 128), BF16), T.Tensor((200, 24), "float32")
    assert boxes(flat.compile(*specs, target="sm_90a"), "B") == {(24, 64)}


def test_absent_columns_of_a_turned_operand_stay_in_their_boxes(hopper, rng):
    a, b = rng.integers(-4, 5, (128, 16)).astype(BF16), rng.integers(-4, 5, (64, 128)).astype(BF16)
    c = hopper(flat, a, b, out=[((16, 64), "float32")], transpose_A=True)
    np.testing.assert_array_equal(c, a.astype(np.float64).T @ b.astype(np.float64).T)


@tilejit
def summed(A: T.Tensor, B: T.Tensor, C: T.Tensor, S: T.Tensor):
    """C = A @ B.T; S = the sums of the columns of A's whole tiles, read by threads."""
    K = A.shape[1]
    N = B.shape[0]
    with T.Kernel(T.ceildiv(N, 64), threads=128) as bx:
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        wide = T.alloc_fragment((64, 64), "float32")
        total = T.alloc_fragment((64,), "float32")
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 64)):
            T.copy(A[0, k * 64], a)
            T.copy(B[bx * 64, k * 64], b)
            T.gemm(a, b, acc, transpose_B=True)
            T.copy(a, wide)
            T.reduce_sum(wide, total, dim=0)
            T.copy(total, S[bx, k * 64])
        T.copy(acc, C[0, bx * 64])


def test_threads_read_zeros_too(hopper, rng):
    a, b = (rng.integers(-4, 5, (rows, 192)).astype(BF16) for rows in (10, 72))
    c, s = hopper(summed, a, b, out=[((10, 72), "float32"), ((2, 192), "float32")])
    np.testing.assert_array_equal(c, a.astype(np.float64) @ b.astype(np.float64).T)
    np.testing.assert_array_equal(s, np.tile(a.astype(np.float64).sum(0), (2, 1)))


def test_teams_find_zeros(hopper, rng):
    """So many tiles that two teams of warpgroups take turns."""
    a, b = (rng.integers(-4, 5, (rows, 64)).astype(BF16) for rows in (16, 64 * 320))
    specs = T.Tensor(a.shape, BF16), T.Tensor(b.shape, BF16), T.Tensor((16, len(b)), "float32")
    assert "take turns" in flat.compile(*specs, target="sm_90a").explain()
    c = hopper(flat, a, b, out=[((16, len(b)), "float32")])
    np.testing.assert_array_equal(c, a.astype(np.float64) @ b.astype(np.float64).T)
