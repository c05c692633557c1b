"""Tensors of other ranks and orders, tiles of several parts, arguments that share memory, kernels
that follow each other: what surrounds a Hopper matmul in real programs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import FLOAT32_STEP, assert_near, assert_product, explained, matmul, operand

import tilejit.language as T
from tilejit import tilejit

BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("rank", [3, 4, 5, 6])
def test_matrices_in_a_tensor_of_many_dimensions_are_multiplied(hopper, rng, rank):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, lead):
        M, K = A.shape[-2:]
        N = C.shape[-1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), 2, threads=128) as (bx, by, bz):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            first = (bz,) + (1,) * (lead - 1)
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[(*first, by * 64, k * 32)], a)
                T.copy(B[(*first, k * 32, bx * 64)], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[(*first, by * 64, bx * 64)])

    lead = rank - 2
    a = operand(rng, (2,) * lead + (72, 40), BF16)
    b = operand(rng, (2,) * lead + (40, 72), BF16)
    c = hopper(kernel, a, b, out=[((2,) * lead + (72, 72), "float32")], lead=lead)
    for z in range(2):
        at = (z,) + (1,) * (lead - 1)
        assert_product(c[at], a[at], b[at])
    text = explained(kernel, a, b, c, lead=lead)
    if rank <= 5:
        assert "of a, b by TMA" in text
        assert "acc -> C: by TMA" in text
    else:
        assert "not TMA (A is no tensor of 1 to 5 dimensions)" in text


def test_heads_may_be_the_middle_dimension(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        M, heads, K = A.shape
        N = C.shape[2]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), heads, threads=128) as (bx, by, h):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((64, 32), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            rows, columns = by * 64, bx * 64
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[rows : rows + 64, h, k * 32 : k * 32 + 32], a)
                T.copy(B[columns : columns + 64, h, k * 32 : k * 32 + 32], b)
                T.gemm(a, b, acc, transpose_B=True)
            T.copy(acc, C[rows : rows + 64, h, columns : columns + 64])

    a, b = operand(rng, (72, 3, 40), BF16), operand(rng, (80, 3, 40), BF16)
    c = hopper(kernel, a, b, out=[((72, 3, 80), "float32")])
    for h in range(3):
        assert_product(c[:, h], a[:, h], b[:, h].T)
    text = explained(kernel, a, b, c)
    assert "of a, b by TMA" in text
    assert "acc -> C: by TMA" in text


def test_parts_of_a_tile_are_multiplied(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 128), A.dtype)
            b = T.alloc_shared((128, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 128), num_stages=2):
                T.copy(A[by * 64, k * 128], a)
                T.copy(B[k * 128, bx * 64], b)
                T.gemm(a[0:64, 64:128], b[64:128, 0:64], acc)
                T.gemm(a[0:64, 0:64], b[0:64, 0:64], acc)
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (72, 200), BF16), operand(rng, (200, 80), BF16)
    c = hopper(kernel, a, b, out=[((72, 80), "float32")])
    assert_product(c, a, b)
    assert "of a, b by TMA" in explained(kernel, a, b, c)


def test_tiles_with_slots_of_the_users_own_are_multiplied(hopper, rng):
    """A pipeline written by hand: it is not brought by TMA, and right."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        K = A.shape[1]
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((2, 64, 32), A.dtype)
            b = T.alloc_shared((2, 32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            T.copy(A[0:64, 0:32], a[0, :, :])
            T.copy(B[0:32, 0:64], b[0, :, :])
            for k in T.serial(K // 32):
                T.copy(A[0:64, (k + 1) * 32 : (k + 1) * 32 + 32], a[(k + 1) % 2, :, :])
                T.copy(B[(k + 1) * 32 : (k + 1) * 32 + 32, 0:64], b[(k + 1) % 2, :, :])
                T.gemm(a[k % 2, :, :], b[k % 2, :, :], acc)
            T.copy(acc, C)

    a, b = operand(rng, (64, 160), BF16), operand(rng, (160, 64), BF16)
    assert_product(hopper(kernel, a, b, out=[((64, 64), "float32")]), a, b)


@pytest.mark.parametrize("kind", ["T.Pipelined", "T.serial"])
def test_next_tile_may_be_copied_after_the_multiply(hopper, rng, kind):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, kind):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            T.copy(A[0, 0], a)
            T.copy(B[0, 0], b)
            rounds = T.Pipelined(8, num_stages=2) if kind == "T.Pipelined" else T.serial(8)
            for k in rounds:
                T.gemm(a, b, acc)
                T.copy(A[0, (k + 1) * 32], a)
                T.copy(B[(k + 1) * 32, 0], b)
            T.copy(acc, C)

    a, b = operand(rng, (64, 160), BF16), operand(rng, (160, 64), BF16)
    assert_product(hopper(kernel, a, b, out=[((64, 64), "float32")], kind=kind), a, b)


def test_tile_that_is_used_after_the_loop_is_right(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
        K = A.shape[1]
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(K // 32, num_stages=3):
                T.copy(A[0, k * 32], a)
                T.copy(B[k * 32, 0], b)
                T.gemm(a, b, acc)
            T.copy(acc, C)
            T.copy(a, D)

    a, b = operand(rng, (64, 160), BF16), operand(rng, (160, 64), BF16)
    c, d = hopper(kernel, a, b, out=[((64, 64), "float32"), ((64, 32), "bfloat16")])
    assert_product(c, a, b)
    assert d.tobytes() == a[:, -32:].tobytes()


@pytest.mark.parametrize("out", [np.float32, BF16], ids=str)
def test_residual_may_be_the_output_itself(executor, hopper, rng, out):
    if executor == "gpu":
        pytest.skip("arrays on the host")

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, E: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            for i, j in T.Parallel(64, 64):
                acc[i, j] += E[by * 64 + i, bx * 64 + j]
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (144, 72), BF16), operand(rng, (72, 136), BF16)
    before = operand(rng, (144, 136), out)
    c = before.copy()
    kernel(a, b, c, c)
    x, y, e = (z.astype(np.float64) for z in (a, b, before))
    assert_near(c, x @ y + e, 80 * FLOAT32_STEP * (np.abs(x) @ np.abs(y) + np.abs(e)))
    assert "of a, b by TMA" in explained(kernel, a, b, c, c)


def test_operand_that_is_the_output_is_not_brought_ahead(executor, hopper, rng):
    if executor == "gpu":
        pytest.skip("arrays on the host")

    @tilejit
    def square(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 64), A.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            for _ in range(3):
                T.clear(acc)
                for _ in T.Pipelined(1, num_stages=2):
                    T.copy(A[0, 0], a)
                    T.gemm(a, a, acc)
                T.copy(acc, C)

    a = (rng.integers(-1, 2, (64, 64)) * (rng.random((64, 64)) < 0.02)).astype(BF16)
    c = a.copy()
    square(c, c)
    exact = a.astype(np.float64)
    for _ in range(3):
        exact = exact @ exact
    np.testing.assert_array_equal(c.astype(np.float64), exact)
    assert "not TMA (the kernel writes A)" in explained(square, c, c)


def test_kernels_that_follow_each_other_see_each_others_outputs(hopper, rng):
    @tilejit
    def mlp(X: T.Tensor, W1: T.Tensor, W2: T.Tensor, H: T.Tensor, Y: T.Tensor):
        for source, weight, target in ((X, W1, H), (H, W2, Y)):
            M, K = source.shape
            N = target.shape[1]
            with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
                a = T.alloc_shared((64, 32), source.dtype)
                b = T.alloc_shared((32, 64), weight.dtype)
                acc = T.alloc_fragment((64, 64), "float32")
                T.clear(acc)
                for k in T.Pipelined(T.ceildiv(K, 32)):
                    T.copy(source[by * 64, k * 32], a)
                    T.copy(weight[k * 32, bx * 64], b)
                    T.gemm(a, b, acc)
                for i, j in T.Parallel(64, 64):
                    acc[i, j] = T.max(acc[i, j], 0)
                T.copy(acc, target[by * 64, bx * 64])

    x, w1, w2 = (operand(rng, s, BF16) for s in ((80, 72), (72, 136), (136, 72)))
    h, y = hopper(mlp, x, w1, w2, out=[((80, 136), "bfloat16"), ((80, 72), "float32")])
    hidden = np.maximum(x.astype(np.float64) @ w1.astype(np.float64), 0)
    error = 80 * FLOAT32_STEP * (np.abs(x).astype(float) @ np.abs(w1).astype(float))
    assert_near(h, hidden, error)
    exact = np.maximum(h.astype(np.float64) @ w2.astype(np.float64), 0)
    sizes = np.abs(h).astype(float) @ np.abs(w2).astype(float)
    assert_near(y, exact, 140 * FLOAT32_STEP * sizes)


@pytest.mark.parametrize("depth, slots", [(64, 2), (128, 1)])
def test_large_tiles_get_as_many_slots_as_fit(hopper, rng, depth, slots):
    """Two of the larger ones do not: one is filled after it was used."""
    a, b = operand(rng, (64, 300), np.float32), operand(rng, (264, 300), np.float32)
    constants = {"BM": 128, "BN": 256, "BK": depth, "threads": 256, "tB": True, "tf32": True}
    c = hopper(matmul, a, b, out=[((64, 264), "float32")], **constants)
    assert_product(c, a, b.T, tf32=True)
    text = explained(matmul, a, b, c, **constants)
    assert f"fills {slots} slot{'s' * (slots > 1)} of a, b by TMA" in text
