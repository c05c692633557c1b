"""Results that leave row by row while the last products are worked out: the numbers are the same,
and what cannot be parted so is not."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from disassembler import has_disassembler
from products import (
    FLOAT32_STEP,
    assert_near,
    assert_product,
    explained,
    matmul,
    operand,
    stored,
)

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.passes import late
from tilejit.runtime import frame
from tilejit.runtime.device import use_executor

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
ROWS = "multiply one row of instructions after the other"


@pytest.fixture(autouse=True)
def large_grids(monkeypatch):
    """No results of small grids wait for another tile; the simulator has a few blocks."""
    monkeypatch.setattr(late, "FEWEST_TILES", 1 << 30)


TILE = {"BM": 256, "BN": 64, "BK": 32, "threads": 256}  # two rows of instructions a warpgroup


def leaves(kernel, *arguments, **constants):
    return ROWS in explained(kernel, *arguments, **constants)


def check(
    hopper, rng, size, *, is_parted=True, dtype=BF16, out=BF16, tA=False, tB=False, **constants
):
    M, N, K = size
    constants = TILE | constants
    a, b = operand(rng, (M, K), dtype), operand(rng, (K, N), dtype)
    arrays = stored(a, tA), stored(b, tB)
    c = hopper(matmul, *arrays, out=[((M, N), out)], tA=tA, tB=tB, **constants)
    assert_product(c, a, b, accum=constants.get("accum", "float32"))
    assert leaves(matmul, *arrays, c, tA=tA, tB=tB, **constants) == is_parted


# ---- tiles, loops and rings ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("threads, BM", [(256, 256), (256, 384), (384, 384)], ids=str)
def test_results_of_any_layout_are_right(hopper, rng, layout, threads, BM):
    tA, tB = (side == "t" for side in layout)
    check(hopper, rng, (BM + 40, 136, 136), tA=tA, tB=tB, BM=BM, threads=threads)


@pytest.mark.parametrize("size", [(8, 8, 64), (264, 136, 104), (129, 72, 104)], ids=str)
def test_ragged_results_are_right(hopper, rng, size):
    check(hopper, rng, size)


@pytest.mark.parametrize("stages", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("trips", range(1, 8))
def test_loops_of_any_length_are_right(hopper, rng, trips, stages):
    check(hopper, rng, (256, 64, 32 * trips), stages=stages, is_parted=stages != 1)


@pytest.mark.parametrize("columns", [16, 64, 96, 128, 192])
def test_rows_of_any_width_are_right(hopper, rng, columns):
    check(hopper, rng, (256, 2 * columns, 128), BN=columns)


@pytest.mark.parametrize("tiles", range(1, 6))
@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_of_any_number_of_tiles_are_right(hopper, rng, monkeypatch, tiles, blocks):
    monkeypatch.setattr(frame, "SIMULATED_BLOCKS", blocks)
    check(hopper, rng, (256 * tiles, 64, 128))


@pytest.mark.parametrize("policy", [T.GemmWarpPolicy.FullRow, T.GemmWarpPolicy.FullCol])
def test_warpgroups_beside_each_other_are_right(hopper, rng, policy):
    check(hopper, rng, (256, 128, 160), BN=128, policy=policy)


@pytest.mark.parametrize("dtype, out, accum", [
    (BF16, np.float32, "float32"),
    (np.float16, np.float16, "float32"),
    (np.int8, np.int32, "int32"),
    (E4M3, BF16, "float32"),
])  # fmt: skip
def test_dtypes_are_right(hopper, rng, dtype, out, accum):
    check(hopper, rng, (264, 96, 160), dtype=dtype, out=out, accum=accum, tB=True)


def test_clusters_share_tiles_that_leave_so(hopper, rng):
    check(hopper, rng, (512, 128, 160), cluster=2)


# ---- what is done to elements before they are stored --------------------------------------------


@tilejit
def finished(
    A: T.Tensor, B: T.Tensor, bias: T.Tensor, R: T.Tensor, C: T.Tensor, *, kind, BN=64, BK=32,
):  # fmt: skip
    BM = 256
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=256) as (bx, by):
        a, b = T.alloc_shared((BM, BK), A.dtype), T.alloc_shared((BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        other = T.alloc_fragment((BM, BN), "float32")
        small = T.alloc_fragment((BM, BN), C.dtype)
        row, length = T.alloc_fragment((BN,), "float32"), T.alloc_fragment((BM,), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK)):
            T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        if kind == "bias":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] = T.max(acc[i, j] + bias[bx * BN + j], 0)
        if kind == "bias in a fragment":
            T.copy(bias[bx * BN], row)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] = T.max(acc[i, j] + row[j], 0)
        if kind == "residual":
            for i, j in T.Parallel(BM, BN):
                small[i, j] = acc[i, j] + R[by * BM + i, bx * BN + j]
        if kind == "steps":
            T.copy(acc, other)
            for i, j in T.Parallel(BM, BN):
                other[i, j] = other[i, j] + bias[bx * BN + j]
            for i, j in T.Parallel(BM, BN):
                if other[i, j] < 0:
                    other[i, j] = 0
        if kind == "sum":
            T.reduce_sum(acc, length, dim=1)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] = acc[i, j] + length[i]
        if kind == "neighbours":
            for i, j in T.Parallel(BM, BN):
                R[by * BM + i, bx * BN + j] = acc[i, j]
        if kind == "residual":
            T.copy(small, C[by * BM, bx * BN])
        elif kind == "steps":
            T.copy(other, C[by * BM, bx * BN])
        else:
            T.copy(acc, C[by * BM, bx * BN])


@pytest.mark.parametrize("size", [(256, 64, 128), (300, 104, 160)], ids=str)
@pytest.mark.parametrize("kind, is_parted", [
    ("bias", True), ("bias in a fragment", True), ("residual", True), ("steps", True),
    ("sum", False), ("neighbours", False),
])  # fmt: skip
def test_what_is_done_to_elements_first_is_right(hopper, rng, kind, is_parted, size):
    M, N, K = size
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    bias = rng.standard_normal(N).astype(np.float32)
    residual = operand(rng, (M, N), BF16)
    c = hopper(finished, a, b, bias, residual, out=[((M, N), BF16)], kind=kind)
    wide_a, wide_b, add = (x.astype(np.float64) for x in (a, b, bias))
    exact, sizes = wide_a @ wide_b, np.abs(wide_a) @ np.abs(wide_b)
    if kind in ("bias", "bias in a fragment", "steps"):
        exact, sizes = np.maximum(exact + add, 0), sizes + np.abs(add)
    elif kind == "residual":
        exact, sizes = exact + residual.astype(np.float64), sizes + np.abs(residual.astype(float))
    elif kind == "sum":
        padded = exact.copy()
        tiles = [padded[:, n : n + 64].sum(1, keepdims=True) for n in range(0, N, 64)]
        sums = np.concatenate([np.repeat(t, 64, 1) for t in tiles], 1)[:, :N]
        exact, sizes = exact + sums, sizes * 66
    assert_near(c, exact, 2 * K * FLOAT32_STEP * sizes)
    assert leaves(finished, a, b, bias, residual, c, kind=kind) == is_parted


# ---- what a row must not see of the rows stored before it ---------------------------------------


@tilejit
def updated(
    A: T.Tensor, B: T.Tensor, R: T.Tensor, X: T.Tensor, Y: T.Tensor, C: T.Tensor, D: T.Tensor,
    *, kind, BM=256, BN=64, BK=32,
):  # fmt: skip
    """C and D begin as X and Y."""
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(M, threads=64) as row:
        for j in T.Parallel(N):
            C[row, j] = X[row, j]
            D[row, j] = Y[row, j]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=256) as (bx, by):
        a, b = T.alloc_shared((BM, BK), A.dtype), T.alloc_shared((BK, BN), B.dtype)
        tile, part = T.alloc_shared((BM, BN), R.dtype), T.alloc_shared((BN,), R.dtype)
        acc, other = (T.alloc_fragment((BM, BN), "float32") for _ in range(2))
        used = T.alloc_fragment((BM, BK), A.dtype)
        if kind == "from R":
            T.copy(R[by * BM, bx * BN], acc)
        else:
            T.clear(acc)
        if kind == "operand":
            for i, j in T.Parallel(BM, BK):
                a[i, j] = A[by * BM + i, j]
        for k in T.Pipelined(T.ceildiv(K, BK)):
            if kind != "operand":
                T.copy(A[by * BM, k * BK], a)
            T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc)
        if kind == "in place":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += C[by * BM + i, bx * BN + j]
        elif kind == "first row":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += C[by * BM, bx * BN + j]
        elif kind == "backwards":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += D[T.min(by * BM + BM, M) - 1 - i, bx * BN + j]
        elif kind == "operand":
            for i, j in T.Parallel(BM, BK):
                a[i, j] = 1 - A[by * BM + i, j]
        elif kind == "fragment":
            T.copy(R[by * BM, bx * BN], other)
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += other[i, j]
            T.clear(other)
            T.copy(other, D[by * BM, bx * BN])
        elif kind == "tile after":
            T.copy(R[by * BM, bx * BN], tile)
        elif kind == "shared":
            T.copy(R[by, bx * BN + 1 : bx * BN + BN + 1], part)  # no place that TMA reads from
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += part[BN - 1 - j]
        elif kind == "some":
            T.fill(other, 3)
            for i, j in T.Parallel(BM, BN):
                if 2 * i < BM + j:
                    other[i, j] = T.if_then_else(acc[i, j] > 0, acc[i, j], -acc[i, j])
        if kind == "added":
            T.atomic_add(C[by * BM, bx * BN], acc, use_tma=True)
        elif kind == "some":
            T.copy(other, C[by * BM, bx * BN])
        else:
            T.copy(acc, C[by * BM, bx * BN])
        if kind == "operand":
            T.copy(a, used)
            T.copy(used, D[by * BM, 0])
        elif kind == "tile after":
            for i, j in T.Parallel(BM, BN):
                D[by * BM + i, bx * BN + j] = acc[i, j] + tile[i, j]
        elif kind == "twice":
            for i, j in T.Parallel(BM, BN):
                acc[i, j] += C[by * BM, bx * BN + j]
            T.copy(acc, D[by * BM, bx * BN])


@pytest.mark.parametrize("kind, is_parted", [
    ("in place", False), ("first row", False), ("backwards", True), ("operand", False),
    ("fragment", False), ("tile after", True), ("shared", True), ("some", True), ("added", True),
    ("twice", True), ("from R", True),
])  # fmt: skip
def test_rows_see_what_they_would_after_the_loop(hopper, rng, monkeypatch, kind, is_parted):
    monkeypatch.setattr(frame, "SIMULATED_BLOCKS", 1)  # of four tiles
    inputs, results, error = updates(rng, kind)
    out = [(z.shape, np.float32) for z in results]
    found = hopper(updated, *inputs, out=out, kind=kind)
    for z, wanted in zip(found, results, strict=True):
        assert_near(z, wanted, error)
    assert leaves(updated, *inputs, *found, kind=kind) == is_parted


@pytest.mark.parametrize("executor", ["reference", "simulator"])
def test_rows_see_what_they_would_where_arguments_overlap(executor, rng):
    inputs, (wanted, _), error = updates(rng, "backwards")
    c = np.full(wanted.shape, np.nan, np.float32)
    inputs[3] = inputs[4]
    with use_executor(executor), options(target="sm_90a"):
        updated(*inputs, c, c, kind="backwards")
    assert_near(c, wanted, error)


def updates(rng, kind):
    """Arguments of `updated`, what becomes of C and D, and how far these may be from it."""
    M, N, K = 512, 72, 32 if kind == "operand" else 136
    a, b, r = (operand(rng, size, BF16) for size in ((M, K), (K, N), (M, N)))
    x, y = (rng.standard_normal((M, N), np.float32) for _ in range(2))
    left, right, other, c, d = (z.astype(np.float64) for z in (a, b, r, x, y))
    product, sizes = left @ right, np.abs(left) @ np.abs(right) + 8
    if kind in ("in place", "added"):
        c += product
    elif kind == "first row":
        c = product + c[::256].repeat(256, 0)
    elif kind == "backwards":
        c = product + d.reshape(2, 256, N)[:, ::-1].reshape(M, N)
    elif kind == "operand":
        c, d[:, :K] = product, (1 - left).astype(BF16)
    elif kind == "fragment":
        c, d = product + other, np.zeros((M, N))
    elif kind == "tile after":
        c, d = product, product + other
    elif kind == "shared":
        tiles = np.zeros((2, 129))  # past the tensor's end are zeros
        tiles[:, :N] = other[:2]
        parts = np.concatenate([tiles[:, 64:0:-1], tiles[:, :64:-1]], 1)[:, :N]
        c = product + parts.repeat(256, 0)
    elif kind == "some":
        i, j = np.arange(M)[:, None] % 256, np.arange(N) % 64
        c = np.where(2 * i < 256 + j, np.abs(product), 3)
    elif kind == "twice":
        c, d = product, product + product[::256].repeat(256, 0)
        sizes = 2 * sizes.max()
    else:
        c = product + other
    return [a, b, r, x, y], (c, d), 2 * K * FLOAT32_STEP * sizes


# ---- what is not parted -------------------------------------------------------------------------


def test_one_row_of_instructions_is_not_parted(hopper, rng):
    check(hopper, rng, (128, 64, 128), BM=128, is_parted=False)


def test_a_warpgroup_alone_is_not_held_up(hopper, rng):
    check(hopper, rng, (128, 64, 128), BM=128, threads=128, is_parted=False)


def test_sums_of_16_bits_are_not_parted(hopper, rng):
    check(hopper, rng, (256, 64, 64), dtype=np.float16, out=np.float16, accum="float16",
          is_parted=False)  # fmt: skip


def test_a_loop_that_blocks_share_is_right(hopper, rng):
    M, N, K = 256, 64, 256
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    c = hopper(matmul, a, b, out=[((M, N), BF16)], split=2, **TILE)
    assert_product(c, a, b)


def test_loops_of_unknown_length_are_right(hopper, rng):
    M, N, K = T.dynamic("M, N, K")

    @tilejit
    def open_matmul(
        A: T.Tensor((M, K), BF16), B: T.Tensor((K, N), BF16), C: T.Tensor((M, N), BF16)
    ):
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 256), threads=256) as (bx, by):
            a, b = T.alloc_shared((256, 32), BF16), T.alloc_shared((32, 64), BF16)
            acc = T.alloc_fragment((256, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * 256, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * 256, bx * 64])

    for k in (64, 160):
        a, b = operand(rng, (256, k), BF16), operand(rng, (k, 64), BF16)
        c = hopper(open_matmul, a, b, out=[((256, 64), BF16)])
        assert_product(c, a, b)


# ---- the choice and the machine code ------------------------------------------------------------


@pytest.mark.skipif(not has_disassembler(), reason="needs nvdisasm")
@pytest.mark.parametrize("BM, BN, threads", [(256, 128, 256), (256, 192, 256)])
def test_a_row_is_stored_between_the_next_rows_products(BM, BN, threads):
    spec = T.Tensor((2048, 2048), "bfloat16")
    kernel = matmul.compile(
        spec, spec, spec, target="sm_90a", BM=BM, BN=BN, BK=64, threads=threads, tB=True
    ).kernels[0]
    assert ROWS in kernel.explain()
    assert (kernel.resources.spill_bytes, kernel.resources.stack_bytes) == (0, 0)
    assert "C75" not in kernel.compiled.log
    order = re.findall(r"HGMMA|STSM|UTMASTG", kernel.sass)
    first, last = order.index("UTMASTG"), len(order) - 1 - order[::-1].index("HGMMA")
    assert first < last, "all is stored after the last product"


def test_the_choice_knows_what_leaves_early():
    """A grid of one tile a block takes the tile whose rows leave one after the other."""

    @tilejit
    def chosen(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=T.auto(128, 256), BN=T.auto(256, 128)):
        M, K = A.shape
        N = C.shape[1]
        with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM)) as (bx, by):
            a, b = T.alloc_shared((BM, 64), A.dtype), T.alloc_shared((64, BN), B.dtype)
            acc = T.alloc_fragment((BM, BN), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 64)):
                T.copy(A[by * BM, k * 64], a)
                T.copy(B[k * 64, bx * BN], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * BM, bx * BN])

    for size, tile in ((2048, "BM=256, BN=128"), (16384, "BM=128, BN=256")):
        spec = T.Tensor((size, size), "bfloat16")
        assert tile in chosen.compile(spec, spec, spec, target="sm_90a").explain().split("\n")[1]
