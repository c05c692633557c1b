"""Tile matmuls: dtypes, transposes, tile shapes, odd sizes, fragment operands, epilogues."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import tilejit.language as T
from tilejit import passes, tilejit
from tilejit.ir.kernel import ParamKind
from tilejit.ir.node import walk
from tilejit.ops.copy import Copy

UNIT = 2.0**-22  # of sum |a||b|: the rounding of a float32 accumulation, generously


@tilejit
def matmul(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *,
    BM=64, BN=64, BK=32, stages=3, threads=128, accum="float32", tA=False, tB=False,
    policy=T.GemmWarpPolicy.Square,
):  # fmt: skip
    M, N = C.shape
    K = A.shape[0] if tA else A.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BK, BM) if tA else (BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK) if tB else (BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), accum)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages):
            if tA:
                T.copy(A[k * BK, by * BM], a)
            else:
                T.copy(A[by * BM, k * BK], a)
            if tB:
                T.copy(B[bx * BN, k * BK], b)
            else:
                T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc, transpose_A=tA, transpose_B=tB, policy=policy)
        T.copy(acc, C[by * BM, bx * BN])


def operand(rng, shape, dtype):
    if np.dtype(dtype).kind in "iu":
        low = -9 if np.dtype(dtype).kind == "i" else 0
        return rng.integers(low, 9, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def assert_close(c, a, b, dtype, extra=0.0):
    """Every element within one ulp of the output and the rounding of the accumulation."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    if np.dtype(dtype).kind in "iu":
        assert (c == exact).all()
        return
    eps = float(ml_dtypes.finfo(dtype).eps)
    tolerance = eps * np.abs(exact) + (a.shape[1] * UNIT + extra) * bound + 1e-30
    wrong = ~(np.abs(c.astype(np.float64) - exact) <= tolerance)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements are wrong"


SHAPES = [(64, 64, 32), (96, 80, 48), (50, 71, 33), (1, 1, 1), (65, 63, 64)]


@pytest.mark.parametrize("transpose", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul_of_16_bit_floats_is_right(run, rng, shape, dtype, transpose):
    M, N, K = shape
    a, b = operand(rng, (M, K), dtype), operand(rng, (K, N), dtype)
    tA, tB = transpose[0] == "t", transpose[1] == "t"
    stored_a = np.ascontiguousarray(a.T) if tA else a
    stored_b = np.ascontiguousarray(b.T) if tB else b
    c = run(matmul, stored_a, stored_b, out=[((M, N), "float32")], tA=tA, tB=tB)
    assert_close(c, a, b, np.float32)


@pytest.mark.parametrize("transpose", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize(
    "dtype, out, extra",
    [(np.int8, "int32", 0), (np.uint8, "int32", 0), (np.float32, "float32", 0),
     (np.float64, "float64", 0)],
)  # fmt: skip
def test_matmul_of_other_dtypes_is_right(run, rng, dtype, out, extra, transpose):
    M, N, K = 72, 48, 96
    a, b = operand(rng, (M, K), dtype), operand(rng, (K, N), dtype)
    tA, tB = transpose[0] == "t", transpose[1] == "t"
    stored_a = np.ascontiguousarray(a.T) if tA else a
    stored_b = np.ascontiguousarray(b.T) if tB else b
    c = run(matmul, stored_a, stored_b, out=[((M, N), out)], tA=tA, tB=tB, accum=out, BM=32,
            BN=32)  # fmt: skip
    assert_close(c, a, b, out, extra)


@pytest.mark.parametrize("transpose", [False, True])
def test_matmul_through_tf32_rounds_the_operands(run, rng, transpose):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, tB=False):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 32), T.ceildiv(M, 32)) as (bx, by):
            a = T.alloc_shared((32, 32), "tfloat32")
            b = T.alloc_shared((32, 32), "tfloat32")
            acc = T.alloc_fragment((32, 32), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=2):
                T.copy(A[by * 32, k * 32], a)
                if tB:
                    T.copy(B[bx * 32, k * 32], b)
                else:
                    T.copy(B[k * 32, bx * 32], b)
                T.gemm(a, b, acc, transpose_B=tB)
            T.copy(acc, C[by * 32, bx * 32])

    a, b = operand(rng, (50, 70), np.float32), operand(rng, (70, 44), np.float32)
    stored = np.ascontiguousarray(b.T) if transpose else b
    c = run(kernel, a, stored, out=[((50, 44), "float32")], tB=transpose)
    assert_close(c, a, b, np.float32, extra=2.0**-10)


@pytest.mark.parametrize(
    "tile",
    [(16, 8, 16), (16, 128, 16), (128, 16, 64), (48, 24, 16), (32, 40, 48), (64, 96, 32),
     (128, 128, 32), (80, 56, 80)],
    ids=str,
)  # fmt: skip
def test_matmul_of_any_tile_shape_is_right(run, rng, tile):
    BM, BN, BK = tile
    a, b = operand(rng, (90, 100), np.float16), operand(rng, (100, 130), np.float16)
    c = run(matmul, a, b, out=[((90, 130), "float16")], BM=BM, BN=BN, BK=BK)
    assert_close(c, a, b, np.float16)


@pytest.mark.parametrize("tile", [(8, 8, 8), (10, 12, 7), (33, 17, 5), (64, 4, 16)], ids=str)
def test_matmul_of_tiles_no_instruction_takes_is_right(run, rng, tile):
    BM, BN, BK = tile
    a, b = operand(rng, (21, 30), np.float16), operand(rng, (30, 26), np.float16)
    c = run(matmul, a, b, out=[((21, 26), "float32")], BM=BM, BN=BN, BK=BK)
    assert_close(c, a, b, np.float32)


@pytest.mark.parametrize("policy", list(T.GemmWarpPolicy))
@pytest.mark.parametrize("threads", [32, 64, 96, 128, 256])
def test_matmul_with_any_number_of_warps_is_right(run, rng, threads, policy):
    a, b = operand(rng, (64, 64), np.float16), operand(rng, (64, 64), np.float16)
    c = run(matmul, a, b, out=[((64, 64), "float32")], threads=threads, policy=policy)
    assert_close(c, a, b, np.float32)


@pytest.mark.parametrize("stages", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("K", [16, 32, 40, 64, 160])
def test_matmul_with_any_number_of_stages_is_right(run, rng, stages, K):
    a, b = operand(rng, (32, K), np.float16), operand(rng, (K, 32), np.float16)
    c = run(matmul, a, b, out=[((32, 32), "float32")], stages=stages, BM=32, BN=32, BK=32)
    assert_close(c, a, b, np.float32)


def test_matmul_accumulating_in_float16_is_near(run, rng):
    a, b = operand(rng, (32, 64), np.float16), operand(rng, (64, 32), np.float16)
    c = run(matmul, a, b, out=[((32, 32), "float16")], accum="float16", BM=32, BN=32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(c - exact).max() < 0.1


def test_gemm_with_a_in_a_fragment_is_right(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            a = T.alloc_fragment((64, 32), "float16")
            b = T.alloc_shared((32, 48), "float16")
            acc = T.alloc_fragment((64, 48), "float32")
            T.copy(A, a)
            T.copy(B, b)
            T.gemm(a, b, acc, clear_accum=True)
            T.copy(acc, C)

    a, b = operand(rng, (64, 32), np.float16), operand(rng, (32, 48), np.float16)
    assert_close(run(kernel, a, b, out=[((64, 48), "float32")]), a, b, np.float32)


@pytest.mark.parametrize("policy", list(T.GemmWarpPolicy))
def test_two_gemms_with_the_first_product_as_operand_are_right(run, rng, policy):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, policy):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float16")
            b = T.alloc_shared((32, 48), "float16")
            d = T.alloc_shared((48, 40), "float16")
            s = T.alloc_fragment((64, 48), "float32")
            p = T.alloc_fragment((64, 48), "float16")
            acc = T.alloc_fragment((64, 40), "float32")
            T.copy(A, a)
            T.copy(B, b)
            T.copy(D, d)
            T.clear(s)
            T.clear(acc)
            T.gemm(a, b, s, policy=policy)
            for i, j in T.Parallel(64, 48):
                p[i, j] = T.max(s[i, j], 0)
            T.gemm(p, d, acc, policy=policy)
            T.copy(acc, C)

    a, b = operand(rng, (64, 32), np.float16), operand(rng, (32, 48), np.float16)
    d = operand(rng, (48, 40), np.float16)
    c = run(kernel, a, b, d, out=[((64, 40), "float32")], policy=policy)
    p = np.maximum(a.astype(np.float32) @ b.astype(np.float32), 0).astype(np.float16)
    exact = p.astype(np.float64) @ d.astype(np.float64)
    np.testing.assert_allclose(c, exact, atol=0.05, rtol=2e-3)


def test_bias_and_activation_on_the_accumulator_are_fused(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, bias: T.Tensor, scale: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64)) as (bx, by):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            row = T.alloc_fragment((64,), "float32")
            T.clear(acc)
            T.copy(scale[by * 64], row)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=2):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            for i, j in T.Parallel(64, 64):
                acc[i, j] = T.max(acc[i, j] * row[i] + bias[bx * 64 + j], 0)
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (70, 40), np.float16), operand(rng, (40, 90), np.float16)
    bias, scale = operand(rng, (90,), np.float32), operand(rng, (70,), np.float32)
    c = run(kernel, a, b, bias, scale, out=[((70, 90), "float32")])
    product = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(
        c, np.maximum(product * scale[:, None] + bias, 0), atol=1e-4, rtol=1e-5
    )


def test_batched_matmul_over_a_grid_of_three_dimensions_is_right(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        batch, M, K = A.shape
        N = C.shape[2]
        with T.Kernel(T.ceildiv(N, 32), T.ceildiv(M, 32), batch) as (bx, by, bz):
            a = T.alloc_shared((32, 32), A.dtype)
            b = T.alloc_shared((32, 32), B.dtype)
            acc = T.alloc_fragment((32, 32), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=2):
                T.copy(A[bz, by * 32, k * 32], a)
                T.copy(B[bz, k * 32, bx * 32], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[bz, by * 32, bx * 32])

    a, b = operand(rng, (3, 40, 50), np.float16), operand(rng, (3, 50, 36), np.float16)
    c = run(kernel, a, b, out=[((3, 40, 36), "float32")])
    for z in range(3):
        assert_close(c[z], a[z], b[z], np.float32)


def test_matmul_with_runtime_extents_serves_every_size(run, rng):
    M, N, K = T.dynamic("M"), T.dynamic("N"), T.dynamic("K")

    @tilejit
    def kernel(
        A: T.Tensor((M, K), "float16"), B: T.Tensor((K, N), "float16"),
        C: T.Tensor((M, N), "float32"),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(N, 32), T.ceildiv(M, 32)) as (bx, by):
            a = T.alloc_shared((32, 32), "float16")
            b = T.alloc_shared((32, 32), "float16")
            acc = T.alloc_fragment((32, 32), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=2):
                T.copy(A[by * 32, k * 32], a)
                T.copy(B[k * 32, bx * 32], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * 32, bx * 32])

    for m, n, k in [(32, 32, 32), (33, 47, 65), (1, 5, 3), (64, 40, 16)]:
        a, b = operand(rng, (m, k), np.float16), operand(rng, (k, n), np.float16)
        assert_close(run(kernel, a, b, out=[((m, n), "float32")]), a, b, np.float32)


def test_runtime_extents_that_are_multiples_are_copied_wide(run, rng):
    M, K = T.dynamic("M"), T.dynamic("K")

    @tilejit
    def kernel(A: T.Tensor((M, K), "float16"), B: T.Tensor((K, 32), "float16"),
               C: T.Tensor((M, 32), "float32")):  # fmt: skip
        with T.Kernel(T.ceildiv(M, 32)) as by:
            a = T.alloc_shared((32, 32), "float16")
            b = T.alloc_shared((32, 32), "float16")
            acc = T.alloc_fragment((32, 32), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=2):
                T.copy(A[by * 32, k * 32], a)
                T.copy(B[k * 32, 0], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * 32, 0])

    for k in (64, 72, 63, 80, 68):
        a, b = operand(rng, (40, k), np.float16), operand(rng, (k, 32), np.float16)
        assert_close(run(kernel, a, b, out=[((40, 32), "float32")]), a, b, np.float32)

    compiled = kernel.compile(target="sm_80")
    assert "copy A -> a: through registers" in compiled.explain()
    traced = compiled.graph
    extents = [param.var for param in traced.params if param.kind is ParamKind.SYMBOL]
    wide = passes.run(replace(traced, multiples=dict.fromkeys(extents, 8)), compiled.target)
    copies = [n for n in walk(wide.body) if isinstance(n, Copy)]
    atoms = {str(n.atom) for n in copies if n.src.buffer.name == "A"}
    assert atoms == {"cp.async, 8 elements a time"}


def test_call_with_runtime_extents_makes_a_kernel_for_each_divisibility(reference):
    N = T.dynamic("N")

    @tilejit
    def double(A: T.Tensor((N,), "float32"), B: T.Tensor((N,), "float32")):
        with T.Kernel(T.ceildiv(N, 64), threads=64) as bx:
            for i in T.Parallel(64):
                B[bx * 64 + i] = A[bx * 64 + i] * 2

    for n in (16, 32, 24, 40, 20, 7, 9, 160):
        a, b = np.arange(n, dtype=np.float32), np.full(n, np.nan, np.float32)
        double(a, b)
        assert (b == 2 * a).all()
    assert len(double._cache) == 4  # multiples of 16, 8, 4 and 1
