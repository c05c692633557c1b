"""fp8 matmuls whose sums are taken to a second accumulator after every block of K, with scales for
a tensor, a row or a block: written out as ordinary code, multiplied by warpgroups."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import FLOAT32_STEP, FP8_STEP, assert_near, explained, operand

import tilejit.language as T
from tilejit import tilejit

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


@tilejit
def two_level(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, scale: T.float32, *, BM=64, BN=64, BK=64, threads=128,
    stages=None, clears=True, accum="float32",
):  # fmt: skip
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK), B.dtype)
        part = T.alloc_fragment((BM, BN), accum)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[bx * BN, k * BK], b)
            if clears:
                T.gemm(a, b, part, transpose_B=True, clear_accum=True)
            else:
                T.clear(part)
                T.gemm(a, b, part, transpose_B=True)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += part[i, j]
        for i, j in T.Parallel(BM, BN):
            acc[i, j] *= scale
        T.copy(acc, C[by * BM, bx * BN])


@tilejit
def block_scaled(
    A: T.Tensor, B: T.Tensor, scale_a: T.Tensor, scale_b: T.Tensor, C: T.Tensor, *, BM=64, BN=64,
    BK=64, threads=128, where="global",
):  # fmt: skip
    """scale_a: (M, blocks of K), of rows; scale_b: (blocks of N, blocks of K)."""
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK), B.dtype)
        scales = T.alloc_shared((BM,), "float32")
        rows = T.alloc_fragment((BM,), "float32")
        part = T.alloc_fragment((BM, BN), "float32")
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[bx * BN, k * BK], b)
            if where == "shared":
                for i in T.Parallel(BM):
                    scales[i] = scale_a[by * BM + i, k] * scale_b[bx, k]
            elif where == "fragment":
                for i in T.Parallel(BM):
                    rows[i] = scale_a[by * BM + i, k] * scale_b[bx, k]
            T.gemm(a, b, part, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(BM, BN):
                if where == "global":
                    acc[i, j] += part[i, j] * scale_a[by * BM + i, k] * scale_b[bx, k]
                elif where == "shared":
                    acc[i, j] += part[i, j] * scales[i]
                else:
                    acc[i, j] += part[i, j] * rows[i]
        T.copy(acc, C[by * BM, bx * BN])


def assert_two_level(c, a, b, block, scale=1.0):
    """Only the sum of a block of K has fp8's coarse rounding."""
    exact = a.astype(np.float64) @ b.astype(np.float64).T * scale
    sizes = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)).T * abs(scale)
    error = min(block, a.shape[1]) * FP8_STEP + a.shape[1] * FLOAT32_STEP
    assert_near(c, exact, error * sizes)


@pytest.mark.parametrize("clears", [True, False], ids=["clear_accum", "T.clear"])
@pytest.mark.parametrize("size", [(64, 64, 256), (130, 144, 400), (80, 48, 16)], ids=str)
@pytest.mark.parametrize("types", [(E4M3, E4M3), (E5M2, E4M3)], ids=str)
def test_sums_of_blocks_are_added_up_in_a_second_accumulator(hopper, rng, types, size, clears):
    M, N, K = size
    a, b = operand(rng, (M, K), types[0]), operand(rng, (N, K), types[1])
    arguments = a, b, np.float32(0.25)
    c = hopper(lambda a, b, c: two_level(a, b, c, 0.25, clears=clears), a, b,
               out=[((M, N), "float32")])  # fmt: skip
    assert_two_level(c, a, b, 64, 0.25)
    text = explained(two_level, *arguments[:2], c, 0.25, clears=clears)
    assert "wgmma.m64n64k32.f32.e" in text
    assert "of a, b by TMA" in text


@pytest.mark.parametrize("stages", [0, 1, 2, 3])
def test_blocks_may_be_brought_in_any_number_of_stages(hopper, rng, stages):
    a, b = operand(rng, (64, 320), E4M3), operand(rng, (64, 320), E4M3)
    c = hopper(lambda a, b, c: two_level(a, b, c, -2.0, stages=stages), a, b,
               out=[((64, 64), "bfloat16")])  # fmt: skip
    assert_two_level(c, a, b, 64, -2.0)


def test_sums_of_blocks_in_float16_are_added_up_in_float32(hopper, rng):
    a, b = operand(rng, (64, 256), E4M3), operand(rng, (64, 256), E4M3)
    c = hopper(lambda a, b, c: two_level(a, b, c, 1.0, accum="float16"), a, b,
               out=[((64, 64), "float32")])  # fmt: skip
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    assert np.abs(c - exact).max() < 0.5
    assert "wgmma.m64n64k32.f16.e4m3" in explained(two_level, a, b, c, 1.0, accum="float16")


@pytest.mark.parametrize("where", ["global", "shared", "fragment"])
@pytest.mark.parametrize("size", [(64, 64, 256), (130, 144, 400)], ids=str)
def test_scales_of_blocks_come_from_anywhere(hopper, rng, size, where):
    M, N, K = size
    blocks = -(-K // 64)
    a, b = operand(rng, (M, K), E4M3), operand(rng, (N, K), E4M3)
    scale_a = rng.uniform(0.5, 2, (M, blocks)).astype(np.float32)
    scale_b = rng.uniform(0.5, 2, (-(-N // 64), blocks)).astype(np.float32)
    c = hopper(block_scaled, a, b, scale_a, scale_b, out=[((M, N), "float32")], where=where)
    of_k = np.arange(K) // 64
    wide_a = a.astype(np.float64) * scale_a[:, of_k]
    wide_b = b.astype(np.float64) * scale_b[:, of_k][np.arange(N) // 64]
    error = 64 * FP8_STEP + K * FLOAT32_STEP
    assert_near(c, wide_a @ wide_b.T, error * (np.abs(wide_a) @ np.abs(wide_b).T))
    text = explained(block_scaled, a, b, scale_a, scale_b, c, where=where)
    assert "wgmma.m64n64k32.f32.e4m3.e4m3" in text
    assert "of a, b by TMA" in text
