"""Loops whose iterations the blocks of a cluster share, each finishing some columns of the tile:
what follows the loop, sizes, dtypes, and where the last block finishes all of it instead."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import FLOAT32_STEP, assert_near, operand

import tilejit.language as T
from tilejit import tilejit

BF16 = ml_dtypes.bfloat16
SHARED_OUT = "blocks a tile, a cluster, share its iterations"
LAST_ADDS = "blocks a tile share its iterations; the last adds up their sums"


@tilejit
def finished(
    A: T.Tensor, B: T.Tensor, V: T.Tensor, R: T.Tensor, C: T.Tensor, *,
    kind="plain", BM=64, BN=64, BK=32, split=2, stages=None, threads=None, panel=0,
):  # fmt: skip
    """What is made of A @ B before it is stored; V: (N,) or (M,), R: (M, N)."""
    M, K = A.shape
    N = B.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        if panel:
            T.use_swizzle(panel)
        a, b = T.alloc_shared((BM, BK), A.dtype), T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages, split=split):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        if kind == "bias":
            for i, j in T.Parallel(BM, BN):
                with T.If(bx * BN + j < N):
                    acc[i, j] = T.max(acc[i, j] + V[bx * BN + j], 0)
        if kind == "residual":
            for i, j in T.Parallel(BM, BN):
                with T.If((by * BM + i < M) & (bx * BN + j < N)):
                    acc[i, j] = acc[i, j] * 2 + R[by * BM + i, bx * BN + j]
        if kind == "updated":  # what it stores to is what it reads
            for i, j in T.Parallel(BM, BN):
                with T.If((by * BM + i < M) & (bx * BN + j < N)):
                    C[by * BM + i, bx * BN + j] = acc[i, j] + 2 * C[by * BM + i, bx * BN + j]
            return
        if kind == "rows":  # a statistic for each row, in registers
            scale = T.alloc_fragment((BM,), "float32")
            T.copy(V[by * BM], scale)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] *= scale[i]
        if kind == "other":  # another fragment, of another dtype
            out = T.alloc_fragment((BM, BN), "bfloat16")
            for i, j in T.Parallel(BM, BN):
                out[i, j] = acc[i, j] + i - j
            T.copy(out, C[by * BM, bx * BN])
            return
        if kind == "columns":
            bias = T.alloc_fragment((BN,), "float32")
            T.copy(V[bx * BN], bias)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += bias[j]
        if kind == "reduced":
            total = T.alloc_fragment((BM,), "float32")
            T.reduce_sum(acc, total, dim=1)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] -= total[i]
        if kind == "staged":
            tile = T.alloc_shared((BM, BN), "float32")
            T.copy(acc, tile)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += tile[i, BN - 1 - j]
        if kind == "twice":  # what one loop stores another one stores again
            for i, j in T.Parallel(BM, BN):
                C[by * BM + i, bx * BN + j] = acc[i, j]
            for i, j in T.Parallel(BM, BN):
                with T.If(j % 2 == 0):
                    C[by * BM + i, bx * BN + BN - 1 - j] = 3 * acc[i, j]
            return
        if kind == "read":
            T.copy(acc, R[by * BM, bx * BN])
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += R[by * BM + i, bx * BN + BN - 1 - j]
        T.copy(acc, C[by * BM, bx * BN])


def expected(kind, a, b, v, r, BN=64):
    exact = a.astype(np.float64) @ b.astype(np.float64)
    M, N = exact.shape
    if kind == "bias":
        return np.maximum(exact + v, 0)
    if kind == "residual":
        return 2 * exact + r
    if kind == "rows":
        return exact * v[:, None]
    if kind == "other":
        return exact + np.arange(M)[:, None] % 64 - np.arange(N) % BN
    if kind == "columns":
        return exact + v
    if kind == "twice":
        tiles = exact.reshape(M, N // BN, BN)
        return np.where(np.arange(BN) % 2 == 1, 3 * tiles[..., ::-1], tiles).reshape(M, N)
    if kind in ("reduced", "staged", "read"):
        tiles = exact.reshape(M, N // BN, BN)
        other = tiles[..., ::-1] if kind != "reduced" else -tiles.sum(-1, keepdims=True)
        return (tiles + other).reshape(M, N)
    return exact


def run(hopper, rng, kind, size, dtype=np.float32, **knobs):
    """Small integers, whose sums float32 holds."""
    M, N, K = size
    a, b = (rng.integers(-4, 5, s).astype(BF16) for s in ((M, K), (K, N)))
    v = rng.integers(-9, 10, M if kind == "rows" else N).astype(np.float32)
    r = rng.integers(-9, 10, (M, N)).astype(np.float32)
    given_r = np.full((M, N), np.nan, np.float32) if kind == "read" else r
    c = hopper(finished, a, b, v, given_r, out=[((M, N), dtype)], kind=kind, **knobs)
    wanted = expected(kind, a, b, v, r, knobs.get("BN", 64))
    np.testing.assert_array_equal(c, wanted.astype(c.dtype))


def explained(kind="plain", size=(128, 128, 512), target="sm_90a", **knobs):
    M, N, K = size
    specs = [T.Tensor(s, d) for s, d in (((M, K), "bfloat16"), ((K, N), "bfloat16"),
                                         ((M if kind == "rows" else N,), "float32"),
                                         ((M, N), "float32"), ((M, N), "float32"))]  # fmt: skip
    return finished.compile(*specs, target=target, kind=kind, **knobs).kernels[0]


KINDS = ["plain", "bias", "residual", "rows"]
WHOLE = {
    "columns": "bias has an element a column, which registers cannot divide",
    "reduced": "after the loop more is done than element by element",
    "staged": "after the loop elements go to shared memory",
    "read": "after the loop elements are read that another block may have written",
    "twice": "after the loop elements are written that another block may have written",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [2, 4, 8])
def test_what_follows_the_loop_is_shared_out(hopper, rng, kind, split):
    run(hopper, rng, kind, (128, 128, 512), split=split)
    assert f"{split} {SHARED_OUT}" in explained(kind, split=split).explain()


def test_another_fragment_is_shared_out_too(hopper, rng):
    run(hopper, rng, "other", (128, 128, 512), BF16, split=4)
    assert f"4 {SHARED_OUT}" in explained("other", split=4).explain()


def test_elements_that_are_read_where_they_are_stored(hopper, executor, rng):
    if executor == "gpu":
        pytest.skip("tensors that are read and written stay on the device")
    a, b = (rng.integers(-4, 5, s).astype(BF16) for s in ((100, 128), (128, 72)))
    v, c = np.zeros(72, np.float32), rng.integers(-9, 10, (100, 72)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    wanted = exact + 2 * (exact + 2 * c)  # two runs
    hopper(finished, a, b, v, np.zeros_like(c), c, out=[], kind="updated", split=4)
    np.testing.assert_array_equal(c, wanted)
    assert f"4 {SHARED_OUT}" in explained("updated", split=4).explain()


@pytest.mark.parametrize("kind", list(WHOLE))
def test_the_last_block_finishes_what_cannot_be_divided(hopper, rng, kind):
    run(hopper, rng, kind, (128, 128, 256))
    assert f"2 {LAST_ADDS} ({WHOLE[kind]})" in explained(kind).explain()


@pytest.mark.parametrize(
    "size", [(1, 8, 64), (65, 63, 97), (130, 72, 200), (16, 200, 1000), (200, 16, 31)], ids=str
)
@pytest.mark.parametrize("kind", ["bias", "residual"])
def test_odd_sizes(hopper, rng, size, kind):
    run(hopper, rng, kind, size, split=4)


@pytest.mark.parametrize(
    "knobs",
    [{"threads": 128}, {"threads": 256}, {"stages": 3}, {"stages": 1}, {"stages": 0}, {"panel": 2},
     {"BM": 128, "BN": 128, "BK": 64}, {"BN": 192, "split": 3}, {"BN": 96, "split": 6},
     {"BM": 64, "BN": 256, "split": 8}, {"BK": 16, "stages": 2}],
    ids=str,
)  # fmt: skip
def test_tiles_stages_and_threads(hopper, rng, knobs):
    run(hopper, rng, "bias", (200, 200, 264), **knobs)
    assert SHARED_OUT in explained("bias", (200, 200, 264), **knobs).explain()


@pytest.mark.parametrize("split", [3, 5, 16])
def test_columns_that_the_blocks_do_not_divide(hopper, rng, split):
    run(hopper, rng, "bias", (64, 64, 512), split=split)
    text = explained("bias", (64, 64, 512), split=split).explain()
    assert f"({split} blocks cannot share out the columns)" in text


def test_parts_of_unequal_length(hopper, rng):
    """17 iterations, 8 blocks; and blocks that have none."""
    run(hopper, rng, "plain", (64, 64, 17 * 32), split=8)
    run(hopper, rng, "plain", (64, 64, 3 * 32), split=8)


def test_sums_are_as_near_as_one_blocks(hopper, rng):
    """And two runs give the same bits, as of all that `hopper` runs."""
    a, b = operand(rng, (96, 1000), BF16), operand(rng, (1000, 72), BF16)
    v, r = np.zeros(72, np.float32), np.zeros((96, 72), np.float32)
    c = hopper(finished, a, b, v, r, out=[((96, 72), "float32")], split=8)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert_near(c, wide_a @ wide_b, 1000 * FLOAT32_STEP * (np.abs(wide_a) @ np.abs(wide_b)))


@tilejit
def gated(A: T.Tensor, B: T.Tensor, G: T.Tensor, C: T.Tensor, *, split=4, accumulate="float32"):
    """C = (A @ B) * (A @ G): two accumulators."""
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64)) as (bx, by):
        a = T.alloc_shared((64, 64), A.dtype)
        b, g = (T.alloc_shared((64, 64), B.dtype) for _ in range(2))
        up, gate = (T.alloc_fragment((64, 64), accumulate) for _ in range(2))
        T.clear(up)
        T.clear(gate)
        for k in T.Pipelined(T.ceildiv(K, 64), split=split):
            T.copy(A[by * 64, k * 64], a)
            T.copy(B[k * 64, bx * 64], b)
            T.copy(G[k * 64, bx * 64], g)
            T.gemm(a, b, up)
            T.gemm(a, g, gate)
        for i, j in T.Parallel(64, 64):
            up[i, j] = up[i, j] * gate[i, j]
        T.copy(up, C[by * 64, bx * 64])


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("accumulate", ["float32", "float16"])
def test_two_accumulators(hopper, rng, split, accumulate):
    a, b, g = (
        rng.integers(-1, 2, s).astype(np.float16) for s in ((100, 320), (320, 136), (320, 136))
    )
    c = hopper(
        gated, a, b, g, out=[((100, 136), "float32")], split=split, accumulate=accumulate
    )  # fmt: skip
    wide = [x.astype(np.float64) for x in (a, b, g)]
    wanted = (wide[0] @ wide[1]) * (wide[0] @ wide[2])
    if accumulate == "float16":  # sums are small, products may be rounded
        np.testing.assert_allclose(c, wanted, rtol=2**-10)
    else:
        np.testing.assert_array_equal(c, wanted)


@tilejit
def tall(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, split=2, BK=64):
    """C = A @ B.T on a grid of one dimension."""
    M, K = A.shape
    N = B.shape[0]
    accumulate = {"int8": "int32", "float64": "float64"}.get(str(A.dtype), "float32")
    with T.Kernel(T.ceildiv(M, 64)) as bx:
        a, b = T.alloc_shared((64, BK), A.dtype), T.alloc_shared((N, BK), B.dtype)
        acc = T.alloc_fragment((64, N), accumulate)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), split=split):
            T.copy(A[bx * 64, k * BK], a)
            T.copy(B[0, k * BK], b)
            T.gemm(a, b, acc, transpose_B=True)
        T.copy(acc, C[bx * 64, 0])


@pytest.mark.parametrize(
    "dtype, K", [("int8", 1024), ("float8_e4m3fn", 1024), ("float16", 500), ("float32", 256),
                 ("bfloat16", 333), ("float64", 64)],
)  # fmt: skip
def test_dtypes_on_a_grid_of_one_dimension(hopper, rng, dtype, K):
    """Rows of 333 elements are not brought by TMA, float64 is multiplied by other instructions."""
    dtype = T.dtype(dtype)
    a, b = (rng.integers(-3, 4, (n, K)).astype(dtype.numpy) for n in (150, 64))
    out = {"int8": "int32", "float64": "float64"}.get(str(dtype), "float32")
    c = hopper(tall, a, b, out=[((150, 64), out)], split=4)
    np.testing.assert_array_equal(c, a.astype(np.float64) @ b.astype(np.float64).T)


def test_sums_come_where_tiles_were():
    kernel = explained(size=(128, 128, 4096), BM=128, BN=128, BK=64, threads=256)
    plan = kernel.planned
    ((tiles, sums),) = plan.unions
    assert [b.name for b in tiles] == ["a", "b"] and [b.name for b in sums] == ["acc_blocks"]
    assert plan.offsets[sums[0]] == min(plan.offsets[b] for b in tiles)
    apart = sum(plan.shared[b].bytes for b in tiles)
    assert apart <= plan.shared_bytes < apart + plan.shared[sums[0]].bytes


@pytest.mark.parametrize(
    "knobs", [{}, {"threads": 256}, {"BM": 128, "BN": 128, "BK": 64}, {"split": 4, "BN": 128},
              {"BM": 128, "BN": 256, "BK": 64, "split": 2}, {"split": 8, "BK": 64}],
    ids=str,
)  # fmt: skip
def test_multiplies_overlap_and_nothing_spills(knobs):
    kernel = explained("bias", (128, 512, 1024), **knobs)
    assert SHARED_OUT in kernel.explain()
    assert kernel.resources.spill_bytes == 0
    assert "C75" not in kernel.compiled.log


def test_sums_that_would_leave_no_room_for_barriers():
    @tilejit
    def crowded(A: T.Tensor, B: T.Tensor, V: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=256):
            a, b = T.alloc_shared((128, 64), A.dtype), T.alloc_shared((64, 128), B.dtype)
            rows = T.alloc_shared((99, 256), "float32")
            acc = T.alloc_fragment((128, 128), "float32")
            T.clear(acc)
            for k in T.Pipelined(16, num_stages=1, split=8):
                T.copy(A[0, k * 64], a)
                T.copy(B[k * 64, 0], b)
                T.gemm(a, b, acc)
            T.copy(V[0, 0], rows)
            for i, j in T.Parallel(128, 128):
                acc[i, j] += rows[i % 99, j]
            T.copy(acc, C[0, 0])

    shapes = (128, 1023), (1023, 128), (99, 256), (128, 128)  # rows that TMA does not bring
    dtypes = ("bfloat16", "bfloat16", "float32", "float32")
    specs = [T.Tensor(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    kernel = crowded.compile(*specs, target="sm_90a").kernels[0]
    assert f"8 {LAST_ADDS}" in kernel.explain()


def test_a_block_for_each_part_of_each_tile():
    kernel = explained(size=(256, 128, 512), split=4)
    assert kernel.launch_grid((2, 4, 1), None) == (32, 1, 1)
    assert kernel.planned.cluster == (4, 1, 1) and not kernel.planned.is_persistent
    assert not kernel.spaces  # no memory is kept
    assert kernel.planned.block_vars[0].high.value == 31


def test_clusters_by_hand_and_chips_without_them():
    assert f"2 {LAST_ADDS} (sm_80 has no clusters)" in explained(target="sm_80").explain()

    @tilejit
    def by_hand(A: T.Tensor, C: T.Tensor):
        with T.Kernel(2, cluster=1) as bx:
            a, acc = T.alloc_shared((64, 64), A.dtype), T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(8, split=2):
                T.copy(A[bx * 64, k * 64], a)
                T.gemm(a, a, acc, transpose_B=True)
            T.copy(acc, C[bx * 64, 0])

    A, C = T.Tensor((128, 512), "bfloat16"), T.Tensor((128, 64), "float32")
    text = by_hand.compile(A, C, target="sm_90a").explain()
    assert f"2 {LAST_ADDS} (T.Kernel gives the clusters)" in text
