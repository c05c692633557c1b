"""Tiles whose width is no power of two: results leave in wide strips and a narrow rest, each width
through memory of its own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import assert_product, explained, operand

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.passes import late
from tilejit.passes.late import strip_widths
from tilejit.runtime.device import use_executor

BF16 = ml_dtypes.bfloat16
WIDTHS = (24, 72, 120, 144, 208)


@pytest.mark.parametrize("columns", range(8, 257, 8))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_strips_cover_the_columns_the_widest_first(columns, size):
    widths = strip_widths(columns, size)
    assert sum(widths) == columns
    assert sorted(widths, reverse=True) == widths
    assert max(widths) * size <= 128  # bytes, the widest swizzle
    assert all(width & (width - 1) == 0 for width in widths)  # as wide as a swizzle
    rest = [width for width in widths if width < widths[0]]
    assert len(set(rest)) == len(rest)  # each has one slot


@tilejit
def matmul(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM, BN, threads, BK=32, stages=None, kept=0):
    """kept: bytes of shared memory that something else has."""
    M, N = C.shape
    K = A.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        if kept:
            other = T.alloc_shared((kept,), "uint8")
            T.clear(other)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[bx * BN, k * BK], b)
            T.gemm(a, b, acc, transpose_B=True)
        T.copy(acc, C[by * BM, bx * BN])


def check(hopper, rng, size, *, out=BF16, **constants):
    M, N, K = size
    a, b = operand(rng, (M, K), BF16), operand(rng, (N, K), BF16)
    c = hopper(matmul, a, b, out=[((M, N), out)], **constants)
    assert_product(c, a, b.T)
    return explained(matmul, a, b, c, **constants)


@pytest.mark.parametrize("out", [BF16, np.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("threads, BM", [(128, 64), (128, 128), (256, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
def test_results_of_any_width_are_right(hopper, rng, columns, threads, BM, out):
    if columns * BM / threads > 104:
        pytest.skip("its sums do not fit the registers")
    text = check(hopper, rng, (2 * BM + 40, 2 * columns + 8, 200), BM=BM, BN=columns,
                 threads=threads, out=out)  # fmt: skip
    widths = dict.fromkeys(strip_widths(columns, np.dtype(out).itemsize))
    assert f"through strips of {' and '.join(map(str, widths))} columns" in text


@pytest.mark.parametrize("stages", [None, 2, 3])
@pytest.mark.parametrize(
    "columns, trips", [(40, 2), (72, 2), (80, 5), (144, 3), (144, 7), (208, 4)]
)
@pytest.mark.parametrize("threads, BM", [(256, 128), (256, 256)], ids=str)
def test_strips_of_any_width_wait_for_the_next_tile(
    hopper, rng, monkeypatch, columns, trips, threads, BM, stages
):
    if columns * BM / threads > 104:
        pytest.skip("its sums do not fit the registers")
    monkeypatch.setattr(late, "FEWEST_TILES", 0)
    size = (3 * BM, 2 * columns, 32 * trips)
    text = check(hopper, rng, size, BM=BM, BN=columns, threads=threads, stages=stages)
    strips = len(strip_widths(columns, 2)) * BM // 128
    assert ("while the next tile is multiplied" in text) == (strips <= trips)


@pytest.mark.parametrize("columns", [144, 208])
@pytest.mark.parametrize("kept", [0, 160_000, 166_000, 172_000, 178_000])
@pytest.mark.parametrize("least", [0, 10**6], ids=["late", "at once"])
def test_strips_have_the_slots_that_are_left(hopper, rng, monkeypatch, columns, kept, least):
    monkeypatch.setattr(late, "FEWEST_TILES", least)
    size = (384, 2 * columns + (16 if least else 0), 160)
    check(hopper, rng, size, BM=128, BN=columns, threads=256, kept=kept, stages=2)


@tilejit
def summed(A: T.Tensor, B: T.Tensor, S: T.Tensor, *, BN):
    """S += A @ B.T."""
    M, N = S.shape
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((BN, 32), B.dtype)
        acc = T.alloc_fragment((64, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(A.shape[1], 32)):
            T.copy(A[by * 64, k * 32], a)
            T.copy(B[bx * BN, k * 32], b)
            T.gemm(a, b, acc, transpose_B=True)
        T.atomic_add(S[by * 64, bx * BN], acc)


@pytest.mark.parametrize("columns", [40, 72, 144])
@pytest.mark.parametrize("executor", ["reference", "simulator"])
def test_sums_of_any_width_are_added(rng, executor, columns):
    a, b = operand(rng, (150, 96), BF16), operand(rng, (columns + 16, 96), BF16)
    c = rng.standard_normal((150, columns + 16)).astype(np.float32)
    text = explained(summed, a, b, c, BN=columns)
    assert "added by TMA, through strips" in text
    s = c.copy()
    with use_executor(executor), options(target="sm_90a"):
        summed(a, b, s, BN=columns)
    exact = c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(s, exact, atol=1e-4)


@tilejit
def pair(
    A: T.Tensor, B: T.Tensor, E: T.Tensor, C: T.Tensor, D: T.Tensor, *,
    first, second, is_repeated=False, kept=0,
):  # fmt: skip
    """C = A @ B.T and D = A @ E.T, whose tiles have other widths. kept: bytes of shared memory that
    something else has."""
    M, K = A.shape
    with T.Kernel(T.ceildiv(C.shape[1], first), T.ceildiv(M, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((first, 32), B.dtype)
        e = T.alloc_shared((second, 32), B.dtype)
        wide = T.alloc_fragment((64, first), "float32")
        slim = T.alloc_fragment((64, second), "float32")
        if kept:
            other = T.alloc_shared((kept,), "uint8")
            T.clear(other)
        for _turn in T.serial(2) if is_repeated else range(1):
            T.clear(wide)
            T.clear(slim)
            for k in T.Pipelined(T.ceildiv(K, 32), num_stages=2 if kept else None):
                T.copy(A[by * 64, k * 32], a)
                T.copy(B[bx * first, k * 32], b)
                T.copy(E[bx * second, k * 32], e)
                T.gemm(a, b, wide, transpose_B=True)
                T.gemm(a, e, slim, transpose_B=True)
            T.copy(wide, C[by * 64, bx * first])
            T.copy(slim, D[by * 64, bx * second])


@pytest.mark.parametrize("is_repeated", [False, True])
@pytest.mark.parametrize("first, second", [(144, 72), (72, 144), (80, 16), (16, 80), (72, 72)])
def test_outputs_of_any_widths_share_their_strips(hopper, rng, first, second, is_repeated):
    """A narrow strip may be another output's widest."""
    a, b, e = (operand(rng, s, BF16) for s in ((200, 96), (3 * first, 96), (3 * second, 96)))
    out = [((200, 3 * first), BF16), ((200, 3 * second), BF16)]
    constants = {"first": first, "second": second, "is_repeated": is_repeated}
    c, d = hopper(pair, a, b, e, out=out, **constants)
    assert_product(c, a, b.T)
    assert_product(d, a, e.T)
    assert explained(pair, a, b, e, c, d, **constants).count("by TMA, through strips") == 2


@pytest.mark.parametrize("kept", [184_000, 185_000, 186_000, 188_000, 190_000])
@pytest.mark.parametrize("first, second", [(128, 80), (80, 128), (128, 72)])
def test_outputs_share_the_only_slot_that_is_left(hopper, rng, first, second, kept):
    """Two strips of one output take turns at a slot that another output's first strip has too."""
    a, b, e = (operand(rng, s, BF16) for s in ((200, 96), (3 * first, 96), (3 * second, 96)))
    out = [((200, 3 * first), BF16), ((200, 3 * second), BF16)]
    c, d = hopper(pair, a, b, e, out=out, first=first, second=second, kept=kept)
    assert_product(c, a, b.T)
    assert_product(d, a, e.T)
