"""Consumers that take turns at a block's tiles: the numbers are the same, whoever multiplies."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import FLOAT32_STEP, assert_near, assert_product, explained, matmul, operand, stored

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.passes import teams

BF16 = ml_dtypes.bfloat16
TURNS = "2 teams of 128 threads take turns"


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    """Blocks that compute a few tiles have teams too."""
    monkeypatch.setattr(teams, "FEWEST_TILES", 0)


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize(
    "size", [(64, 64, 32), (192, 64, 96), (136, 264, 136), (320, 200, 40), (64, 704, 8)], ids=str
)
def test_matmul_in_turns_is_right(hopper, rng, size, layout):
    M, N, K = size
    tA, tB = (side == "t" for side in layout)
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    arrays = stored(a, tA), stored(b, tB)
    c = hopper(matmul, *arrays, out=[((M, N), "float32")], tA=tA, tB=tB)
    assert_product(c, a, b)
    assert TURNS in explained(matmul, *arrays, T.Tensor((M, N), "float32"), tA=tA, tB=tB)


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("depth", [1, 2, 7, 11])
def test_turns_are_right_for_any_length_of_loop_and_ring(hopper, rng, depth, stages):
    a, b = operand(rng, (320, 32 * depth), BF16), operand(rng, (32 * depth, 128), BF16)
    c = hopper(matmul, a, b, out=[((320, 128), "float32")], stages=stages)
    assert_product(c, a, b)


def test_loop_without_iterations_gives_zeros_in_turns(hopper, rng):
    a, b = operand(rng, (192, 0), BF16), operand(rng, (0, 128), BF16)
    c = hopper(matmul, a, b, out=[((192, 128), "float32")])
    assert (c == 0).all()


def test_two_rows_of_instructions_take_turns(hopper, rng):
    a, b = operand(rng, (384, 96), BF16), operand(rng, (96, 136), BF16)
    c = hopper(matmul, a, b, out=[((384, 136), BF16)], BM=128, BN=96)
    assert_product(c, a, b)


@tilejit
def scaled(A: T.Tensor, B: T.Tensor, scale: T.Tensor, D: T.Tensor, *, BM=64, BN=64, BK=32):
    """D = relu(A @ B * scale), the scale of each row."""
    M, K = A.shape
    N = D.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        for i, j in T.Parallel(BM, BN):
            acc[i, j] = T.max(acc[i, j] * scale[by * BM + i], 0)
        T.copy(acc, D[by * BM, bx * BN])


def test_epilogue_in_turns_is_right(hopper, rng):
    a, b = operand(rng, (200, 72), BF16), operand(rng, (72, 128), BF16)
    scale = operand(rng, (200,), np.float32)
    d = hopper(scaled, a, b, scale, out=[((200, 128), "float32")])
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    exact = np.maximum(wide_a @ wide_b * scale[:, None], 0)
    assert_near(d, exact, 74 * FLOAT32_STEP * np.abs(wide_a) @ np.abs(wide_b) * abs(scale[:, None]))
    arrays = a, b, scale, T.Tensor((200, 128), "float32")
    assert TURNS in explained(scaled, *arrays)


@tilejit
def dynamic(
    A: T.Tensor((T.dynamic("M"), T.dynamic("K")), "bfloat16"),
    B: T.Tensor((T.dynamic("K"), T.dynamic("N")), "bfloat16"),
    C: T.Tensor((T.dynamic("M"), T.dynamic("N")), "float32"),
):
    (M, K), N = A.shape, C.shape[1]
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


@pytest.mark.parametrize("size", [(64, 64, 32), (192, 136, 104), (16, 520, 8)], ids=str)
def test_sizes_that_the_call_decides_take_turns(hopper, rng, size):
    M, N, K = size
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    assert_product(hopper(dynamic, a, b, out=[((M, N), "float32")]), a, b)


@tilejit
def triangular(A: T.Tensor, B: T.Tensor, C: T.Tensor):
    """C = lower triangle of blocks of A @ B: rows of tiles multiply less the higher they are."""
    M, N = C.shape
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(by + 1):
            T.copy(A[by * 64, k * 64], a)
            T.copy(B[k * 64, bx * 64], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 64, bx * 64])


def test_tiles_of_unequal_work_have_no_turns(hopper, rng):
    a, b = operand(rng, (256, 256), BF16), operand(rng, (256, 128), BF16)
    c = hopper(triangular, a, b, out=[((256, 128), "float32")])
    mask = np.kron(np.tril(np.ones((4, 4))), np.ones((64, 64)))
    wide_a, wide_b = a.astype(np.float64) * mask, b.astype(np.float64)
    assert_near(c, wide_a @ wide_b, 256 * FLOAT32_STEP * np.abs(wide_a) @ np.abs(wide_b))
    assert TURNS not in explained(triangular, a, b, T.Tensor((256, 128), "float32"))


@tilejit
def staged(A: T.Tensor, B: T.Tensor, C: T.Tensor):
    """C = A @ B by way of a tile of the user's, half of it at a time."""
    K, N = B.shape
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(A.shape[0], 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        out = T.alloc_shared((64, 64), "float32")
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * 64, k * 32], a)
            T.copy(B[k * 32, bx * 64], b)
            T.gemm(a, b, acc)
        T.copy(acc, out)
        T.copy(out[:32, :], C[by * 64, bx * 64])
        T.copy(out[32:, :], C[by * 64 + 32, bx * 64])


def test_tiles_that_share_memory_of_the_block_have_no_turns(hopper, rng):
    a, b = operand(rng, (192, 64), BF16), operand(rng, (64, 128), BF16)
    assert_product(hopper(staged, a, b, out=[((192, 128), "float32")]), a, b)
    assert TURNS not in explained(staged, a, b, T.Tensor((192, 128), "float32"))


@pytest.mark.parametrize("tile", [(64, 256), (128, 128), (128, 192), (64, 128)], ids=str)
def test_kernels_with_turns_compile_without_spills(tile):
    BM, BN = tile
    spec = T.Tensor((4096, 4096), "bfloat16")
    kernel = matmul.compile(
        spec, spec, spec, target="sm_90a", BM=BM, BN=BN, BK=64, threads=128, tB=True
    )
    assert TURNS in kernel.explain()
    assert kernel.kernels[0].lowered.threads == (384, 1, 1)
    assert (kernel.resources.spill_bytes, kernel.resources.stack_bytes) == (0, 0)
    assert "C75" not in kernel.kernels[0].compiled.log


def test_few_tiles_have_no_turns(monkeypatch):
    monkeypatch.undo()
    spec = T.Tensor((256, 256), "bfloat16")
    with options(target="sm_90a"):
        assert TURNS not in explained(matmul, spec, spec, spec)


@tilejit
def normalised(A: T.Tensor, B: T.Tensor, D: T.Tensor):
    """Sums of products of which each block of K is divided by its greatest."""
    M, K = A.shape
    N = B.shape[1]
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        part = T.alloc_fragment((64, 64), "float32")
        total = T.alloc_fragment((64, 64), "float32")
        most = T.alloc_fragment((64,), "float32")
        T.clear(total)
        for k in T.Pipelined(T.ceildiv(K, 64)):
            T.copy(A[by * 64, k * 64], a)
            T.copy(B[k * 64, bx * 64], b)
            T.clear(part)
            T.gemm(a, b, part)
            T.reduce_absmax(part, most, dim=1)
            for i, j in T.Parallel(64, 64):
                total[i, j] += part[i, j] / T.max(most[i], 1e-30)
        T.copy(total, D[by * 64, bx * 64])


def test_loops_that_reduce_between_multiplies_have_no_turns(hopper, rng):
    """A team would keep its turn while it reduces."""
    a, b = operand(rng, (192, 128), BF16), operand(rng, (128, 128), BF16)
    d = hopper(normalised, a, b, out=[((192, 128), "float32")])
    exact = np.zeros((192, 128))
    for k in (0, 64):
        part = a[:, k : k + 64].astype(np.float64) @ b[k : k + 64].astype(np.float64)
        for x in (0, 64):
            most = np.abs(part[:, x : x + 64]).max(axis=1, keepdims=True)
            exact[:, x : x + 64] += part[:, x : x + 64] / most
    assert_near(d, exact, 1e-5)
    text = explained(normalised, a, b, T.Tensor((192, 128), "float32"))
    assert "slots of a, b by TMA" in text and TURNS not in text
