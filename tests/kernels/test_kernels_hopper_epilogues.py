"""What follows a product, written as ordinary code on its accumulator: bias, activation, residual,
scales, casts, several outputs. The product stays with warpgroups, fed by TMA."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import FLOAT32_STEP, assert_near, explained, operand

import tilejit.language as T
from tilejit import tilejit

BF16 = ml_dtypes.bfloat16
SIZES = [(128, 128, 64), (144, 168, 80), (100, 136, 72), (67, 136, 40)]


@tilejit
def fused(
    A: T.Tensor, B: T.Tensor, E: T.Tensor, bias: T.Tensor, C: T.Tensor, *, BM=64, BN=64, BK=32,
    threads=128, kind="bias", where="global", accum="float32",
):  # fmt: skip
    """C = f(A @ B): E is a residual, bias a row, a column or a number."""
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), accum)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        if kind == "bias" and where == "shared":
            row = T.alloc_shared((BN,), bias.dtype)
            T.copy(bias[bx * BN], row)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += row[j]
        elif kind == "bias" and where == "fragment":
            held = T.alloc_fragment((BN,), bias.dtype)
            T.copy(bias[bx * BN], held)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += held[j]
        elif kind == "bias":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += bias[bx * BN + j]
        elif kind == "column":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] *= bias[by * BM + i]
        elif kind == "residual":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += E[by * BM + i, bx * BN + j]
        elif kind == "residual_tile":
            tile = T.alloc_fragment((BM, BN), E.dtype)
            T.copy(E[by * BM, bx * BN], tile)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += tile[i, j]
        elif kind == "relu":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] = T.max(acc[i, j], 0)
        elif kind == "silu":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] = acc[i, j] / (1 + T.exp(-acc[i, j]))
        elif kind == "gelu":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] = acc[i, j] * (0.5 + 0.5 * T.erf(acc[i, j] * 0.70710678))
        T.copy(acc, C[by * BM, bx * BN])


def finished(kind, product, e, bias):
    """What `fused` does to the exact product, and how much it makes of an error."""
    if kind == "bias":
        return product + bias, 1.0
    if kind == "column":
        return product * bias[:, None], np.abs(bias)[:, None]
    if kind.startswith("residual"):
        return product + e, 1.0
    if kind == "relu":
        return np.maximum(product, 0), 1.0
    if kind == "silu":
        return product / (1 + np.exp(-product)), 1.2
    erf = np.vectorize(__import__("math").erf)
    return product * (0.5 + 0.5 * erf(product * 0.5**0.5)), 1.2


def check(hopper, rng, size, kind, out="float32", extra=None, **constants):
    M, N, K = size
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    e = operand(rng, (M, N), extra or np.float32)
    bias = operand(rng, (M if kind == "column" else N,), extra or np.float32)
    c = hopper(fused, a, b, e, bias, out=[((M, N), out)], kind=kind, **constants)
    wide = [x.astype(np.float64) for x in (a, b, e, bias)]
    exact, slope = finished(kind, wide[0] @ wide[1], *wide[2:])
    sizes = np.abs(wide[0]) @ np.abs(wide[1])
    error = K * FLOAT32_STEP * sizes * slope + 2.0**-20 * (np.abs(exact) + 1)
    assert_near(c, exact, error)
    return explained(fused, a, b, e, bias, c, kind=kind, **constants)


KINDS = ["bias", "column", "residual", "residual_tile", "relu", "silu", "gelu"]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_epilogue_on_the_accumulator_leaves_the_product_as_it_was(hopper, rng, kind, size):
    text = check(hopper, rng, size, kind)
    assert "wgmma.m64n64k16.f32.bf16.bf16" in text
    assert "of a, b by TMA" in text
    assert "acc -> C: by TMA" in text


@pytest.mark.parametrize("kind", KINDS)
def test_epilogue_reads_and_writes_16_bits(hopper, rng, kind):
    text = check(hopper, rng, SIZES[1], kind, "bfloat16", BF16)
    assert "wgmma.m64n64k16.f32.bf16.bf16" in text
    assert "of a, b by TMA" in text
    assert "acc -> C: by TMA" in text


@pytest.mark.parametrize("where", ["global", "shared", "fragment"])
@pytest.mark.parametrize("threads, tile", [(128, (64, 32)), (256, (128, 64)), (256, (64, 128))])
def test_bias_comes_from_anywhere(hopper, rng, where, threads, tile):
    for size in SIZES[1:3]:
        text = check(hopper, rng, size, "bias", BM=tile[0], BN=tile[1], threads=threads,
                     where=where)  # fmt: skip
        assert "wgmma" in text
        assert "of a, b by TMA" in text
        assert "acc -> C: by TMA" in text


@pytest.mark.parametrize("out", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_fragment_that_the_accumulator_was_cast_into_is_stored_by_tma(hopper, rng, out):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, by_copy=False):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            low = T.alloc_fragment((64, 64), C.dtype)
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            if by_copy:
                T.copy(acc, low)
            else:
                for i, j in T.Parallel(64, 64):
                    low[i, j] = acc[i, j]
            T.copy(low, C[by * 64, bx * 64])

    a, b = operand(rng, (80, 40), np.float16), operand(rng, (40, 80), np.float16)
    for by_copy in (False, True):
        c = hopper(kernel, a, b, out=[((80, 80), out)], by_copy=by_copy)
        exact = a.astype(np.float64) @ b.astype(np.float64)
        if out == "int8":
            assert (np.abs(c - np.trunc(exact)) <= 1).all()
        else:
            assert_near(c, exact, 40 * FLOAT32_STEP * (np.abs(a) @ np.abs(b)).astype(np.float64))
        text = explained(kernel, a, b, c, by_copy=by_copy)
        assert "wgmma" in text
        assert "low -> C: by TMA" in text


def test_integer_product_is_scaled_to_floats_by_rows_and_columns(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, rows: T.Tensor, columns: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
            a = T.alloc_shared((64, 64), A.dtype)
            b = T.alloc_shared((64, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "int32")
            scaled = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 64)):
                T.copy(A[by * 64, k * 64], a)
                T.copy(B[bx * 64, k * 64], b)
                T.gemm(a, b, acc, transpose_B=True)
            for i, j in T.Parallel(64, 64):
                scaled[i, j] = acc[i, j] * rows[by * 64 + i] * columns[bx * 64 + j]
            T.copy(scaled, C[by * 64, bx * 64])

    a, b = operand(rng, (80, 160), np.int8), operand(rng, (96, 160), np.uint8)
    rows, columns = operand(rng, (80,), np.float32), operand(rng, (96,), np.float32)
    for out in ("float32", "bfloat16"):
        c = hopper(kernel, a, b, rows, columns, out=[((80, 96), out)])
        exact = (a.astype(np.float64) @ b.T.astype(np.float64)) * rows[:, None] * columns
        assert_near(c, exact, 2.0**-22 * np.abs(exact))
        text = explained(kernel, a, b, rows, columns, c)
        assert "wgmma.m64n64k32.s32.s8.u8" in text
        assert "scaled -> C: by TMA" in text


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=str)
def test_old_output_is_read_scaled_and_written_again(executor, hopper, rng, dtype):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, alpha: T.float32, beta: T.float32):
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
                acc[i, j] = alpha * acc[i, j] + beta * C[by * 64 + i, bx * 64 + j]
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (144, 48), BF16), operand(rng, (48, 136), BF16)
    before = operand(rng, (144, 136), dtype)
    results = []
    for _ in range(2):
        c = before.copy()
        if executor == "gpu":
            c = on_device(c)
        kernel(*(on_device(x) if executor == "gpu" else x for x in (a, b)), c, 1.5, -0.5)
        results.append(c if executor != "gpu" else from_device(c, dtype))
    assert results[0].tobytes() == results[1].tobytes()
    wide = [x.astype(np.float64) for x in (a, b, before)]
    exact = 1.5 * (wide[0] @ wide[1]) - 0.5 * wide[2]
    assert_near(results[0], exact, 50 * FLOAT32_STEP * (np.abs(wide[0]) @ np.abs(wide[1]) + 1))
    text = explained(kernel, a, b, before, 1.5, -0.5)
    assert "wgmma" in text
    assert "of a, b by TMA" in text


def on_device(x):
    import torch

    name = {"bfloat16": torch.bfloat16, "float32": torch.float32}[np.dtype(x.dtype).name]
    return torch.from_numpy(x.view(np.uint8).copy()).cuda().view(name)


def from_device(x, dtype):
    import torch

    return x.view(torch.uint8).cpu().numpy().view(dtype)


def test_two_outputs_come_of_one_accumulator(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
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
            T.copy(acc, C[by * 64, bx * 64])
            for i, j in T.Parallel(64, 64):
                acc[i, j] = T.max(acc[i, j], 0)
            T.copy(acc, D[by * 64, bx * 64])

    a, b = operand(rng, (144, 48), BF16), operand(rng, (48, 136), BF16)
    for types in (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float8_e4m3fn")):
        c, d = hopper(kernel, a, b, out=[((144, 136), types[0]), ((144, 144), types[1])])
        exact = a.astype(np.float64) @ b.astype(np.float64)
        error = 48 * FLOAT32_STEP * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))
        assert_near(c, exact, error)
        assert_near(d[:, :136], np.maximum(exact, 0), error)
        assert (d[:, 136:] == 0).all()
        text = explained(kernel, a, b, c, d)
        assert "wgmma" in text
        assert "acc -> C: by TMA" in text
        assert "acc -> D: by TMA" in text


@pytest.mark.parametrize("out", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("threads, BM", [(128, 64), (256, 128)])
def test_output_goes_through_a_tile_of_the_users_own(hopper, rng, threads, BM, out):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, BM), threads=threads) as (bx, by):
            a = T.alloc_shared((BM, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            c = T.alloc_shared((BM, 64), C.dtype)
            acc = T.alloc_fragment((BM, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * BM, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            T.copy(acc, c)
            T.copy(c, C[by * BM, bx * 64])

    a, b = operand(rng, (144, 48), BF16), operand(rng, (48, 144), BF16)
    c = hopper(kernel, a, b, out=[((144, 144), out)])
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert_near(c, exact, 48 * FLOAT32_STEP * (np.abs(a).astype(float) @ np.abs(b).astype(float)))
    text = explained(kernel, a, b, c)
    assert "wgmma" in text
    assert "of a, b by TMA" in text


def test_rows_of_the_accumulator_are_summed_up(hopper, rng):
    """A loop that reads the accumulator by rows only: a copy of it goes through shared memory."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, sums: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(M, 64), threads=128) as by:
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, N), B.dtype)
            acc = T.alloc_fragment((64, N), "float32")
            total = T.alloc_fragment((64,), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, 0], b)
                T.gemm(a, b, acc)
            T.clear(total)
            for i in T.Parallel(64):
                for j in T.serial(N):
                    total[i] += acc[i, j]
            T.copy(acc, C[by * 64, 0])
            T.copy(total, sums[by * 64])

    a, b = operand(rng, (144, 48), BF16), operand(rng, (48, 64), BF16)
    c, sums = hopper(kernel, a, b, out=[((144, 64), "float32"), ((144,), "float32")])
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = 48 * FLOAT32_STEP * (np.abs(a).astype(float) @ np.abs(b).astype(float))
    assert_near(c, exact, error)
    np.testing.assert_allclose(sums, c.astype(np.float64).sum(1), rtol=1e-4, atol=1e-4)
    assert "wgmma" in explained(kernel, a, b, c, sums)


@pytest.mark.parametrize("threads, BM", [(128, 64), (256, 128)])
def test_output_that_was_sent_is_read_again(hopper, rng, threads, BM):
    """Threads read what TMA has stored: they wait until it is there, and meet."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, BM), threads=threads) as (bx, by):
            a = T.alloc_shared((BM, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((BM, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * BM, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * BM, bx * 64])
            for i, j in T.Parallel(64, BM):
                D[bx * 64 + i, by * BM + j] = C[by * BM + j, bx * 64 + i]

    a, b = operand(rng, (144, 48), BF16), operand(rng, (48, 136), BF16)
    c, d = hopper(kernel, a, b, out=[((144, 136), "float32"), ((136, 144), "float32")])
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = 48 * FLOAT32_STEP * (np.abs(a).astype(float) @ np.abs(b).astype(float))
    assert_near(c, exact, error)
    np.testing.assert_array_equal(d, c.T)
    assert "acc -> C: by TMA" in explained(kernel, a, b, c, d)


@tilejit
def stored_again(A: T.Tensor, B: T.Tensor, C: T.Tensor, counts: T.Tensor, *, kind):
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(M, 64), threads=128) as by:
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        for bx in T.serial(T.ceildiv(N, 64)):
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * 64, bx * 64])
            if kind == "twice":
                for i, j in T.Parallel(64, 64):
                    acc[i, j] *= 2
                T.copy(acc, C[by * 64, bx * 64])
            elif kind == "loop":
                for _ in T.serial(2):
                    for i, j in T.Parallel(64, 64):
                        acc[i, j] *= 2
                    T.copy(acc, C[by * 64, bx * 64])
            elif kind == "counted":
                T.atomic_add(counts[bx], 1)


@pytest.mark.parametrize("kind, times", [("once", 1), ("twice", 2), ("loop", 4), ("counted", 1)])
def test_output_is_sent_where_another_may_be_on_its_way_only_after_it(hopper, rng, kind, times):
    """Bulk stores are not ordered. Those of different tiles need no order."""
    a, b = operand(rng, (144, 48), BF16), operand(rng, (48, 136), BF16)
    out = [((144, 136), "float32"), ((3,), "int32")]
    c, counts = hopper(stored_again, a, b, out=out, kind=kind)
    exact = times * (a.astype(np.float64) @ b.astype(np.float64))
    error = 200 * FLOAT32_STEP * (np.abs(a).astype(float) @ np.abs(b).astype(float))
    assert_near(c, exact, error)
    kernel = stored_again.compile(a, b, c, counts, kind=kind, target="sm_90a")
    assert "acc -> C: by TMA" in kernel.explain()
    waits = str(kernel.kernels[0].planned).count("T.tma_store_wait()")
    assert waits == {"once": 0, "twice": 2, "loop": 2, "counted": 1}[kind]
