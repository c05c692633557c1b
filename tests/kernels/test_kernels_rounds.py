"""What loops whose rounds overlap share with what is around them: tiles that both parts of a round
read, operands written in part, tiles that threads make before and after, rings of one slot, masks,
values, copies in branches."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.ir.node import walk
from tilejit.ops.gemm import GemmWait
from tilejit.runtime.device import use_executor

BF16 = ml_dtypes.bfloat16
EDGE = 64
HAND = {"order": (-1, 0, 2, -1, 1), "stage": (0, 0, 0, 0, 1)}


def small(rng, *shape, limit=2, dtype=BF16):
    """Whole numbers: whatever the order, sums of their products are exact."""
    return rng.integers(-limit, limit + 1, shape).astype(dtype)


def wide(x):
    return x.astype(np.float64)


def tiles(x):
    """Blocks of rows, the last one filled up with zeros."""
    padded = np.zeros((-(-len(x) // EDGE) * EDGE, *x.shape[1:]))
    padded[: len(x)] = x
    return padded.reshape(-1, EDGE, *x.shape[1:])


def exactly(c, want):
    np.testing.assert_array_equal(c.astype(np.float64), want[: len(c)])


@tilejit
def shares(A: T.Tensor, B: T.Tensor, D: T.Tensor, W: T.Tensor, C: T.Tensor, *, stages, late):
    """A tile of W is a factor of what is made ahead and, `late`, is added to sums."""
    M, K = A.shape
    with T.Kernel(T.ceildiv(M, 64), threads=128) as by:
        a = T.alloc_shared((64, K), A.dtype)
        b = T.alloc_shared((64, K), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        w = T.alloc_shared((1, 64), "float32")
        s = T.alloc_fragment((64, 64), "float32")
        p = T.alloc_fragment((64, 64), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64), num_stages=stages):
            T.copy(B[n * 64, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            T.copy(W[0, n * 64], w)
            for i, j in T.Parallel(64, 64):
                p[i, j] = T.clamp(s[i, j], -2, 2) * w[0, j]
            T.copy(D[n * 64, 0], d)
            T.gemm(p, d, acc)
            if late == "tile":
                for i, j in T.Parallel(64, 64):
                    acc[i, j] += w[0, j]
            elif late == "operand":
                for i, j in T.Parallel(64, 64):
                    acc[i, j] += d[i, j]
            elif late == "value":
                first = w[0, 5] * 2 + 1
                for i, j in T.Parallel(64, 64):
                    acc[i, j] += first
        T.copy(acc, C[by * 64, 0])


@pytest.mark.parametrize("stages", [None, 2, 3])
@pytest.mark.parametrize("late", ["tile", "operand", "value"])
def test_tile_that_both_parts_of_a_round_read_is_the_same_in_both(hopper, rng, late, stages):
    a, b, d = small(rng, 100, 64), small(rng, 320, 64), small(rng, 320, 64, limit=1)
    w = small(rng, 1, 320, limit=1, dtype=np.float32)
    c = hopper(shares, a, b, d, w, out=[((100, 64), "float32")], stages=stages, late=late)
    want = np.zeros((128, 64))
    left = tiles(wide(a)).reshape(-1, 64)
    for n, (right, factor) in enumerate(zip(tiles(wide(b)), tiles(wide(d)), strict=True)):
        row = wide(w[0, n * 64 : n * 64 + 64])
        want += (np.clip(left @ right.T, -2, 2) * row) @ factor
        want += {"tile": row, "operand": np.tile(factor, (2, 1)), "value": row[5] * 2 + 1}[late]
    exactly(c, want)


@tilejit
def in_part(
    A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, P: T.Tensor, *, kind, cut=0,
    order=None, stage=None,
):  # fmt: skip
    """The factor keeps of the rounds before what a round does not write."""
    M, K = A.shape
    with T.Kernel(T.ceildiv(M, 64), threads=128) as by:
        a = T.alloc_shared((64, K), A.dtype)
        b = T.alloc_shared((64, K), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        s = T.alloc_fragment((64, 64), "float32")
        p = T.alloc_fragment((64, 64), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        T.fill(p, 1)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64), order=order, stage=stage):
            T.copy(B[n * 64, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            if kind == "half":
                for i, j in T.Parallel(64, 64):
                    if j < 32:
                        p[i, j] = T.clamp(s[i, j], -2, 2)
            elif kind == "every other":
                if n % 2 == 1:
                    for i, j in T.Parallel(64, 64):
                        p[i, j] = T.clamp(s[i, j], -2, 2)
            else:
                for i, j in T.Parallel(64, 64):
                    low = T.clamp(s[i, j], -2, 2)
                    p[i, j] = T.if_then_else(n * 64 + j <= cut + i, low, 0)
            T.copy(D[n * 64, 0], d)
            T.gemm(p, d, acc)
        T.copy(acc, C[by * 64, 0])
        T.copy(p, P[by * 64, 0])


@pytest.mark.parametrize("schedule", [{}, HAND], ids=["own", "by hand"])
@pytest.mark.parametrize("kind", ["half", "every other", "masked"])
def test_factor_that_is_written_in_part_is_right(hopper, rng, kind, schedule):
    a, b, d = small(rng, 64, 64), small(rng, 300, 64), small(rng, 300, 64)
    out = [((64, 64), "float32"), ((64, 64), BF16)]
    c, last = hopper(in_part, a, b, d, out=out, kind=kind, cut=150, **schedule)
    want, p = np.zeros((64, 64)), np.ones((64, 64))
    rows, columns = np.arange(64)[:, None], np.arange(64)
    for n, (right, factor) in enumerate(zip(tiles(wide(b)), tiles(wide(d)), strict=True)):
        s = np.clip(wide(a) @ right.T, -2, 2)
        seen = {"half": columns < 32, "every other": n % 2 == 1, "masked": True}[kind]
        if kind == "masked":
            s = np.where(n * 64 + columns <= 150 + rows, s, 0)
        p = np.where(seen, s, p)
        want += p @ factor
    exactly(c, want)
    exactly(last, p)


def test_factor_that_is_written_whole_still_goes_to_registers_of_its_own():
    half = T.Tensor((512, 64), BF16)
    out = T.Tensor((512, 64), "float32"), half
    for kind, is_moved in (("masked", True), ("half", False), ("every other", False)):
        kernel = in_part.compile(half, half, half, *out, kind=kind, cut=100, target="sm_90a")
        assert bool(re.search(r"\b(p|fragment)_next\b", kernel.source)) == is_moved, kind


@tilejit
def around(
    A: T.Tensor, B: T.Tensor, D: T.Tensor, count: T.int32, C: T.Tensor, E: T.Tensor,
    *, BM, threads,
):  # fmt: skip
    """Threads make the loop's left operand before it, and use its memory after it."""
    M, K = A.shape
    with T.Kernel(T.ceildiv(M, BM), threads=threads) as by:
        a = T.alloc_shared((BM, K), A.dtype)
        b = T.alloc_shared((64, K), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        s = T.alloc_fragment((BM, 64), "float32")
        p = T.alloc_fragment((BM, 64), A.dtype)
        acc = T.alloc_fragment((BM, 64), "float32")
        T.clear(acc)
        for i, k in T.Parallel(BM, K):
            a[i, k] = A[by * BM + i, k] * 2
        for n in T.Pipelined(count):
            T.copy(B[n * 64, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(BM, 64):
                p[i, j] = T.clamp(s[i, j], -2, 2)
            T.copy(D[n * 64, 0], d)
            T.gemm(p, d, acc)
        for i, k in T.Parallel(BM, K):
            a[i, k] = k + 1
        for i, k in T.Parallel(BM, K):
            E[by * BM + i, k] = a[BM - 1 - i, k]
        T.copy(acc, C[by * BM, 0])


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("threads", [128, 256, 384])
def test_warpgroups_that_take_turns_meet_before_a_loop(hopper, rng, threads, count):
    """A loop that perhaps has no round cannot be where all see what threads made before it."""
    BM = threads // 2
    a, b, d = small(rng, BM + 9, 64, limit=1), small(rng, 256, 64), small(rng, 256, 64)
    out = [((BM + 9, 64), "float32"), ((BM + 9, 64), "float32")]
    c, e = hopper(around, a, b, d, count, out=out, BM=BM, threads=threads)
    want = np.zeros((BM + 9, 64))
    for n in range(count):
        rows = slice(n * 64, n * 64 + 64)
        want += np.clip(2 * wide(a) @ wide(b[rows]).T, -2, 2) @ wide(d[rows])
    exactly(c, want)
    exactly(e, np.tile(np.arange(1, 65), (BM + 9, 1)))


@tilejit
def beside(A: T.Tensor, B: T.Tensor, Q: T.Tensor, C: T.Tensor, S: T.Tensor, E: T.Tensor):
    """Threads meet while multiplies run that read a tile which is written after the loop."""
    with T.Kernel(1, threads=256):
        a = T.alloc_shared((128, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        q = T.alloc_shared((64, 64), A.dtype)
        z = T.alloc_shared((128, 64), "float32")
        s = T.alloc_fragment((128, 64), "float32")
        t = T.alloc_fragment((128, 64), "float32")
        total = T.alloc_fragment((128, 64), "float32")
        T.clear(s)
        T.clear(t)
        T.clear(total)
        T.copy(A[0, 0], a)
        for i, j in T.Parallel(64, 64):
            q[i, j] = Q[i, j] * 2
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64)):
            T.copy(B[n * 64, 0], b)
            T.gemm(a, b, t, transpose_B=True)
            T.gemm(a, q, s)
            for i, j in T.Parallel(128, 64):
                z[i, j] = i + j + n
            for i, j in T.Parallel(128, 64):
                total[i, j] += z[127 - i, j]
        for i, j in T.Parallel(64, 64):
            q[i, j] = 5
        T.copy(q, E)
        T.copy(s, C[0, 0])
        T.copy(t, C[0, 64])
        T.copy(total, S[0, 0])


def test_tile_is_written_again_when_the_multiplies_of_all_are_over(hopper, rng):
    a, b, q = small(rng, 128, 64), small(rng, 320, 64), small(rng, 64, 64)
    out = [((128, 128), "float32"), ((128, 64), "float32"), ((64, 64), BF16)]
    c, total, e = hopper(beside, a, b, q, out=out)
    exactly(c[:, :64], 10 * wide(a) @ wide(q))
    exactly(c[:, 64:], sum(wide(a) @ right.T for right in tiles(wide(b))))
    exactly(total, 5 * (127 - np.arange(128)[:, None] + np.arange(64)) + 10)
    exactly(e, np.full((64, 64), 5))


@tilejit
def again(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, kept, stages=None):
    """Both multiplies read a tile; `kept` words of shared memory are taken."""
    with T.Kernel(T.ceildiv(A.shape[0], 64), threads=128) as by:
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        ones = T.alloc_shared((kept,), "float32")
        s = T.alloc_fragment((64, 64), "float32")
        p = T.alloc_fragment((64, 64), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        T.copy(A[by * 64, 0], a)
        T.fill(ones, 1)
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64), num_stages=stages):
            T.copy(B[n * 64, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(64, 64):
                p[i, j] = T.clamp(s[i, j], -2, 2)
            T.gemm(p, b, acc)
        for i, j in T.Parallel(64, 64):
            acc[i, j] += ones[i * 64 + j]
        T.copy(acc, C[by * 64, 0])


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("stages", [None, 0, 1])
def test_as_few_slots_as_there_is_room_for_do(hopper, rng, slots, stages):
    a, b = small(rng, 100, 64), small(rng, 300, 64)
    kept = 227 * 256 - 768 - (1 + slots) * 2048
    c = hopper(again, a, b, out=[((100, 64), "float32")], kept=kept, stages=stages)
    want = np.ones((100, 64))
    for right in tiles(wide(b)):
        want += np.clip(wide(a) @ right.T, -2, 2) @ right
    exactly(c, want)


@tilejit
def inside(A: T.Tensor, B: T.Tensor, D: T.Tensor, W: T.Tensor, C: T.Tensor, *, kind):
    """Of a pipelined loop a branch, or a loop, brings a tile of its own."""
    with T.Kernel(T.ceildiv(A.shape[0], 64), threads=128) as by:
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        w = T.alloc_shared((1, 64), "float32")
        s = T.alloc_fragment((64, 64), "float32")
        p = T.alloc_fragment((64, 64), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64)):
            T.copy(B[n * 64, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(64, 64):
                s[i, j] = T.clamp(s[i, j], -2, 2)
            if kind == "branch":
                if n % 2 == 1:
                    T.copy(W[0, n * 64], w)
                    for i, j in T.Parallel(64, 64):
                        s[i, j] *= w[0, j]
            else:
                for _ in T.serial(2):
                    T.copy(W[0, n * 64], w)
                    for i, j in T.Parallel(64, 64):
                        s[i, j] *= w[0, j]
            T.copy(s, p)
            T.copy(D[n * 64, 0], d)
            T.gemm(p, d, acc)
        T.copy(acc, C[by * 64, 0])


@pytest.mark.parametrize("kind", ["branch", "loop"])
def test_branches_and_loops_in_the_loop_bring_tiles_of_their_own(hopper, rng, kind):
    a, b, d = small(rng, 100, 64), small(rng, 320, 64), small(rng, 320, 64)
    w = small(rng, 1, 320, limit=1, dtype=np.float32)
    c = hopper(inside, a, b, d, w, out=[((100, 64), "float32")], kind=kind)
    want = np.zeros((100, 64))
    for n, (right, factor) in enumerate(zip(tiles(wide(b)), tiles(wide(d)), strict=True)):
        row = wide(w[0, n * 64 : n * 64 + 64])
        times = row**2 if kind == "loop" else row if n % 2 else 1
        want += (np.clip(wide(a) @ right.T, -2, 2) * times) @ factor
    exactly(c, want)


@tilejit
def by_values(A: T.Tensor, B: T.Tensor, D: T.Tensor, X: T.Tensor, C: T.Tensor, *, order, stage):
    """A value is used by both parts of a round, which a schedule turns round."""
    with T.Kernel(T.ceildiv(A.shape[0], 64), threads=128) as by:
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        s = T.alloc_fragment((64, 64), "float32")
        p = T.alloc_fragment((64, 64), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64), order=order, stage=stage):
            T.copy(B[n * 64, 0], b)  # 0
            T.copy(D[n * 64, 0], d)  # 1
            x = X[n]
            for i, j in T.Parallel(64, 64):  # 2
                acc[i, j] += x
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)  # 3
            for i, j in T.Parallel(64, 64):  # 4
                p[i, j] = T.clamp(s[i, j] + x, -2, 2)
            T.gemm(p, d, acc)  # 5
        T.copy(acc, C[by * 64, 0])


@pytest.mark.parametrize(
    "order, stage",
    [((-1, -1, 1, 0, 3, 2), (0, 0, 1, 0, 0, 1)), ((-1, -1, 2, 0, 3, 1), (0, 0, 0, 0, 0, 1))],
    ids=["late sum", "sum ahead"],
)
def test_value_that_both_parts_use_is_made_for_each(hopper, rng, order, stage):
    a, b, d = small(rng, 100, 64), small(rng, 320, 64), small(rng, 320, 64)
    x = small(rng, 5, dtype=np.float32)
    out = [((100, 64), "float32")]
    c = hopper(by_values, a, b, d, x, out=out, order=order, stage=stage)
    want = np.zeros((100, 64))
    for n, (right, factor) in enumerate(zip(tiles(wide(b)), tiles(wide(d)), strict=True)):
        want += x[n] + np.clip(wide(a) @ right.T + x[n], -2, 2) @ factor
    exactly(c, want)


@tilejit
def unaligned(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor):
    """Copies that a schedule puts ahead of all, of which threads make one."""
    order, stage = ((-1, 0, 2, -1, 1), (0, 0, 0, 0, 1))
    with T.Kernel(T.ceildiv(A.shape[0], 64), threads=128) as by:
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        s = T.alloc_fragment((64, 64), "float32")
        p = T.alloc_fragment((64, 64), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64), order=order, stage=stage):
            T.copy(B[n * 64, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(64, 64):
                p[i, j] = T.clamp(s[i, j], -2, 2)
            T.copy(D[n * 64, 0], d)
            T.gemm(p, d, acc)
        T.copy(acc, C[by * 64, 0])


def test_copies_ahead_of_all_that_threads_make_go_with_what_needs_them(hopper, rng):
    a, b, d = small(rng, 100, 64), small(rng, 320, 64), small(rng, 320, 65)[:, :64]
    c = hopper(unaligned, a, b, d, out=[((100, 64), "float32")])
    want = np.zeros((100, 64))
    for right, factor in zip(tiles(wide(b)), tiles(wide(d)), strict=True):
        want += np.clip(wide(a) @ right.T, -2, 2) @ factor
    exactly(c, want)


# ---- additions by the accelerator -----------------------------------------------------------


@tilejit
def sums(A: T.Tensor, B: T.Tensor, D: T.Tensor, S: T.Tensor, U: T.Tensor, *, first):
    """Two tiles of other widths are added to tensors in a loop."""
    with T.Kernel(1, threads=128):
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, B.shape[1]), B.dtype)
        d = T.alloc_shared((64, D.shape[1]), D.dtype)
        s = T.alloc_fragment((64, B.shape[1]), "float32")
        u = T.alloc_fragment((64, D.shape[1]), "float32")
        for n in T.Pipelined(A.shape[1] // 64):
            T.copy(A[0, n * 64], a)
            T.copy(B[n * 64, 0], b)
            T.copy(D[n * 64, 0], d)
            T.gemm(a, b, s, clear_accum=True)
            T.gemm(a, d, u, clear_accum=True)
            if first == "s":
                T.atomic_add(S[0:64, 0 : B.shape[1]], s)
            T.atomic_add(U[0:64, 0 : D.shape[1]], u)
            if first == "u":
                T.atomic_add(S[0:64, 0 : B.shape[1]], s)


@pytest.mark.parametrize("first", ["s", "u"])
@pytest.mark.parametrize("widths", [(64, 128), (64, 64), (96, 64), (32, 128)], ids=str)
def test_strips_that_were_sent_together_are_not_written_before_they_are_read(rng, widths, first):
    a, b, d = small(rng, 64, 320), small(rng, 320, widths[0]), small(rng, 320, widths[1])
    s, u = (np.ones((64, width), np.float32) for width in widths)
    with use_executor("simulator"), options(target="sm_90a"):
        sums(a, b, d, s, u, first=first)
    exactly(s, 1 + wide(a) @ wide(b))
    exactly(u, 1 + wide(a) @ wide(d))


# ---- beside a ring ----------------------------------------------------------------------------


@tilejit
def two_loops(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, stages):
    """A loop without stages stands beside one with a ring of slots."""
    with T.Kernel(T.ceildiv(A.shape[0], 64), threads=128) as by:
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        e = T.alloc_shared((64, 64), D.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64), num_stages=stages):
            T.copy(B[n * 64, 0], b)
            T.copy(D[n * 64, 0], d)
            T.gemm(a, b, acc)
            T.gemm(a, d, acc)
        for n in T.Pipelined(T.ceildiv(D.shape[0], 64), num_stages=2):
            T.copy(B[n * 64, 0], e)
            T.gemm(a, e, acc)
        T.copy(acc, C[by * 64, 0])


@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("stages", [0, 1, 2])
def test_loop_without_stages_is_right_beside_a_ring(hopper, rng, stages, is_aligned):
    """Also where its threads make one of the copies."""
    a, b, d = small(rng, 100, 64), small(rng, 320, 64), small(rng, 320, 68)[:, :64]
    d = np.ascontiguousarray(d) if is_aligned else d
    c = hopper(two_loops, a, b, d, out=[((100, 64), "float32")], stages=stages)
    exactly(
        c, sum(wide(a) @ (2 * x + y) for x, y in zip(tiles(wide(b)), tiles(wide(d)), strict=True))
    )


@tilejit
def named(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, number):
    """The user's hardware barriers are others than those by which warpgroups take turns."""
    with T.Kernel(T.ceildiv(A.shape[0], 128), threads=256) as by:
        a = T.alloc_shared((128, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        s = T.alloc_fragment((128, 64), "float32")
        p = T.alloc_fragment((128, 64), A.dtype)
        acc = T.alloc_fragment((128, 64), "float32")
        T.clear(acc)
        T.copy(A[by * 128, 0], a)
        T.sync_threads(number)
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64)):
            T.copy(B[n * 64, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(128, 64):
                p[i, j] = T.clamp(s[i, j], -2, 2)
            T.copy(D[n * 64, 0], d)
            T.gemm(p, d, acc)
        T.sync_threads(number)
        T.copy(acc, C[by * 128, 0])


@pytest.mark.parametrize("number", [1, 2, 9, 10, 14])
def test_hardware_barriers_of_the_user_are_no_others_turns(hopper, rng, number):
    a, b, d = small(rng, 200, 64), small(rng, 320, 64), small(rng, 320, 64)
    c = hopper(named, a, b, d, out=[((200, 64), "float32")], number=number)
    want = np.zeros((200, 64))
    for right, factor in zip(tiles(wide(b)), tiles(wide(d)), strict=True):
        want += np.clip(wide(a) @ right.T, -2, 2) @ factor
    exactly(c, want)


# ---- multiplies into one accumulator ------------------------------------------------------------


@tilejit
def one_sum(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, R: T.Tensor):
    """Work stands between two multiplies that add to the same sums."""
    with T.Kernel(T.ceildiv(A.shape[0], 64), threads=128) as by:
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        row = T.alloc_fragment((64,), "float32")
        T.clear(acc)
        T.clear(row)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(B.shape[0], 64)):
            T.copy(B[n * 64, 0], b)
            T.copy(D[n * 64, 0], d)
            T.gemm(a, b, acc)
            for i in T.Parallel(64):
                row[i] += n * i
            T.gemm(a, d, acc)
        T.copy(acc, C[by * 64, 0])
        for i in T.Parallel(64):
            R[by * 64 + i, 0] = row[i]


def test_multiplies_into_one_accumulator_follow_each_other_unwaited(hopper, rng):
    a, b, d = small(rng, 100, 64), small(rng, 320, 64), small(rng, 320, 64)
    out = [((100, 64), "float32"), ((100, 1), "float32")]
    c, row = hopper(one_sum, a, b, d, out=out)
    exactly(c, sum(wide(a) @ (x + y) for x, y in zip(tiles(wide(b)), tiles(wide(d)), strict=True)))
    exactly(row, 10 * (np.arange(100)[:, None] % 64))
    specs = [T.Tensor((512, 64), BF16)] * 3 + [T.Tensor((512, n), "float32") for n in (64, 1)]
    kernel = one_sum.compile(*specs, target="sm_90a")
    assert kernel.ptx.count("wgmma.wait_group") == 1
    assert not re.search(r"\bC7\d\d\d\b", kernel.kernels[0].compiled.log)


# ---- sums that nothing reads ----------------------------------------------------------------


@tilejit
def last_product(A: T.Tensor, B: T.Tensor, C: T.Tensor, S: T.Tensor):
    """S = A @ B[-64:].T; C = the sum of B's rows, in every row."""
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(M, 64), threads=128) as by:
        a = T.alloc_shared((64, K), A.dtype)
        b = T.alloc_shared((64, K), B.dtype)
        s = T.alloc_fragment((64, 64), "float32")
        acc = T.alloc_fragment((64, K), "float32")
        ones = T.alloc_fragment((64, 64), A.dtype)
        T.fill(ones, 1)
        T.clear(acc)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(N, 64), num_stages=3):
            T.copy(B[n * 64, 0], b)
            T.gemm(ones, b, acc)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
        T.copy(acc, C[by * 64, 0])
        T.copy(s, S[by * 64, 0])


@pytest.mark.parametrize("rows", [64, 128, 512])
def test_products_that_are_made_anew_keep_their_registers(hopper, rng, rows):
    """A multiply that is on its way while its sums are dead would write over whatever the assembler
    has put there."""
    a, b = (rng.integers(-4, 4, (n, 64)).astype(BF16) for n in (200, rows))
    c, s = hopper(last_product, a, b, out=[((200, 64), "float32"), ((200, 64), "float32")])
    wide = b.astype(np.float64)
    np.testing.assert_array_equal(c, np.broadcast_to(wide.sum(axis=0), (200, 64)))
    np.testing.assert_array_equal(s, a.astype(np.float64) @ wide[-64:].T)
    specs = T.Tensor((200, 64), BF16), T.Tensor((rows, 64), BF16)
    outs = T.Tensor((200, 64), "float32"), T.Tensor((200, 64), "float32")
    plan = last_product.compile(*specs, *outs, target="sm_90a").kernels[0].planned
    waits = [n for n in walk(plan.body) if isinstance(n, GemmWait)]
    assert waits and all(n.pending < 2 for n in waits)


@tilejit
def both_kinds(A: T.Tensor, B: T.Tensor, W: T.Tensor, C: T.Tensor, D: T.Tensor):
    """C = A @ B by warpgroups; D = the first rows of A times W, too small for them."""
    M, K = A.shape
    N = B.shape[1]
    with T.Kernel(T.ceildiv(N, 128), T.ceildiv(M, 64), threads=128) as (bx, by):
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 128), B.dtype)
        x = T.alloc_shared((16, 64), A.dtype)
        w = T.alloc_shared((64, 32), W.dtype)
        acc = T.alloc_fragment((64, 128), "float32")
        small = T.alloc_fragment((16, 32), "float32")
        T.clear(acc)
        T.clear(small)
        for i, j in T.Parallel(16, 64):
            x[i, j] = A[by * 64 + i, j]
        for i, j in T.Parallel(64, 32):
            w[i, j] = W[i, j]
        T.gemm(x, w, small)
        for k in T.Pipelined(T.ceildiv(K, 64)):
            T.copy(A[by * 64, k * 64], a)
            T.copy(B[k * 64, bx * 128], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 64, bx * 128])
        if bx == 0:
            T.copy(small, D[by * 16, 0])


def test_multiplies_of_both_kinds_compile_together():
    """Also where there are tiles enough for clusters to be thought of."""
    specs = T.Tensor((8192, 8192), BF16), T.Tensor((8192, 8192), BF16), T.Tensor((64, 32), BF16)
    outs = T.Tensor((8192, 8192), BF16), T.Tensor((2048, 32), "float32")
    text = both_kinds.compile(*specs, *outs, target="sm_90a").explain()
    assert ": wgmma." in text and ": mma." in text


@tilejit
def many_products(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, count):
    """Each of the tiles of C: the sum over n of A * (2**n + 2**(n + 1)) @ B[n], by more products on
    their way than an instruction can leave there."""
    with T.Kernel(1, threads=128):
        held = T.alloc_fragment((64, 32), A.dtype)
        b = T.alloc_shared((32, 16), B.dtype)
        sums = [T.alloc_fragment((64, 16), "float32") for _ in range(count)]
        T.copy(A, held)
        for acc in sums:
            T.clear(acc)
        for n in T.Pipelined(B.shape[0] // 32):
            T.copy(B[n * 32, 0], b)
            for acc in sums:
                T.gemm(held, b, acc)
            for i, j in T.Parallel(64, 32):
                held[i, j] = held[i, j] * 2
            for acc in sums:
                T.gemm(held, b, acc)
        for k, acc in enumerate(sums):
            T.copy(acc, C[k * 64, 0])


@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_more_products_than_can_be_on_their_way(hopper, rng, count):
    a, b = rng.integers(-2, 3, (64, 32)).astype(BF16), rng.integers(-2, 3, (96, 16)).astype(BF16)
    c = hopper(many_products, a, b, out=[((count * 64, 16), "float32")], count=count)
    wide = a.astype(np.float64), b.astype(np.float64).reshape(3, 32, 16)
    want = sum((2**n + 2 ** (n + 1)) * wide[0] @ wide[1][n] for n in range(3))
    np.testing.assert_array_equal(c, np.tile(want, (count, 1)))
