"""Softmax, RMSNorm and LayerNorm of rows of up to 262,144 elements, and their gradients.

python examples/rows.py            check them, wherever there is a device
python examples/rows.py --bench    time them beside copies of as many bytes (rows_bench.py; needs a
                                   GPU and torch)

A row is read once and stays on the chip: in the registers of one block, or, where they are too few,
of a cluster of blocks that combine their sums by T.cluster_reduce, or tell each other theirs by
T.cluster_gather. Gradients with respect to weights are summed over the rows of a block in
registers, and over blocks by a second kernel, always in the same order. All maths is float32.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import ml_dtypes
import numpy as np

import tilejit.language as T
from tilejit import device_name, has_gpu, options, tilejit

LOG2_E = 1.4426950408889634
MULTIPROCESSORS = 132  # of an H100 or H200: how many blocks go through the rows of a gradient
MOST = 262_144  # elements of a row
VECTOR = 8  # elements of 16 bits that a thread reads or writes at once
WARP = 32
EPS = {"rms_norm": 1e-6, "layer_norm": 1e-5}


@dataclass(frozen=True)
class Plan:
    """How rows are divided: BM of them in a block, or one among `blocks` blocks.

    resident: blocks of a multiprocessor at once. stages: rows that are brought or computed at a
    time; 0 for blocks that have one group of rows each. kept: how many of W and B stay in shared
    memory for all rows of a block; the others come from L2 for each. turns: clusters for each that
    runs at once: multiprocessors are not equally fast, and who is done first takes the next.
    is_free: clusters stay, and each takes the next row when it is free.
    """

    BM: int
    threads: int
    blocks: int
    resident: int
    stages: int = 0
    kept: int = 0
    turns: int = 1
    is_free: bool = False

    @property
    def workers(self):
        """Clusters that go through the rows, `turns` for each that runs at once."""
        return self.turns * self.at_once

    @property
    def at_once(self):
        """Clusters of blocks that run at once; of wide ones fewer, for their blocks have to be
        neighbours."""
        at_once = max(1, MULTIPROCESSORS * self.resident // self.blocks)
        if self.blocks <= 2:
            return at_once
        share = 0.08 if self.blocks == 8 and self.resident < 4 else 0.125
        return at_once - max(1, round(share * at_once))

    @property
    def options(self):
        options = asdict(self) | {"workers": self.workers if self.stages else 0}
        del options["turns"], options["is_free"]
        return {name: value for name, value in options.items() if name != "kept" or value}


def rows_for(N):
    """Rows of a block, a power of two, such that it has at most 8192 elements."""
    return 1 << max(1, 8192 // N).bit_length() - 1


def forward_plan(N, name):
    """32 elements a thread and 1024 threads a multiprocessor: enough bytes on their way; of long
    rows 64 and 512. Of the longest, whose weights would come from L2 for each row anew, the next
    rows are brought meanwhile, and weights stay."""
    has_masks = N & N - 1 != 0  # which take registers
    is_loose = N % VECTOR != 0  # elements come one by one
    if N <= 8192:
        return Plan(rows_for(N), 256, 1, 3 if has_masks and name != "softmax" else 4)
    if name == "softmax":
        blocks = cluster_for(N, 8192 if N <= 65536 else 16384)
        if N > 65536:
            threads = 256 if is_loose else fitted(N, blocks, (7, 8), 320, slack=1.0)
            return Plan(1, threads, blocks, 2 if is_loose else 3)
        vectors, resident = ((3, 4), 5 - has_masks) if N > 16384 else ((2, 3, 4), 4)
        return Plan(1, 256 if is_loose else fitted(N, blocks, vectors, 256), blocks, resident)
    if N <= 16384 or (N < 32768 and name == "rms_norm"):
        blocks = cluster_for(N, 16384)
        return Plan(1, 256 if is_loose else fitted(N, blocks, (5, 6, 7, 8), 256), blocks, 2)
    if is_loose:
        kept = 1 if name == "layer_norm" or N <= 65536 else 0
        turns = 16 if N <= 65536 else 8 if N <= 131072 else 1
        return Plan(1, 512, cluster_for(N, 32768), 1, stages=2, kept=kept, turns=turns)
    if N <= 32768:
        threads = fitted(N, 1, (4, 5, 6), 640) if N < 32768 else 512
        return Plan(1, threads, 1, 1, stages=2, kept=1, is_free=True)
    kept = 2 if name == "layer_norm" and N > 65536 else 1  # in the place of a row
    blocks = cluster_for(N, 16384)
    resident = 32768 * blocks // N
    threads = fitted(N, blocks, (5, 6, 7, 8), 192 if resident > 2 else 256)
    resident = max(1, min(resident, 768 // threads))
    return Plan(1, threads, blocks, resident, stages=3 - kept, kept=kept, is_free=True)


def backward_plan(N, name):
    """16 elements a thread, of the longest rows 32: there are two tensors to read, and sums over
    rows to keep, of LayerNorm two."""
    has_masks, is_double = N & N - 1 != 0, name == "layer_norm"
    if N > 4096 and has_masks:
        return uneven_backward_plan(N, is_double)
    if is_double:
        if N <= 2048:
            return Plan(max(1, rows_for(N) // 4), 128, 1, 4, stages=3)
        if N <= 16384:
            return Plan(rows_for(N), 512, cluster_for(N, 8192), 1, stages=3)
        return Plan(1, 512, cluster_for(N, 16384), 1, stages=3)
    if N > 65536:
        return Plan(1, 1024 if name == "softmax" else 512, cluster_for(N, 16384), 1, stages=2)
    if N > 4096:
        return Plan(1, 512, cluster_for(N, 8192), 2, stages=2)
    if N > 2048:
        return Plan(1, 256, 1, 4, stages=2)
    if name == "softmax":
        return Plan(rows_for(N), 512, 1, 2, stages=2)
    return Plan(max(1, rows_for(N) // 4), 128, 1, 4, stages=2)


def uneven_backward_plan(N, is_double):
    """Of other widths than powers of two; is_double: there are two sums over rows. Up to 32,768
    columns there are about so many elements of all rows on a multiprocessor: with more the rings
    take the L1 cache's place, with fewer memory waits."""
    stages = 3 if is_double else 2
    if N <= 8192:
        return Plan(1, fitted(N, 1, (1, 2), 512), 1, 1 if is_double else 2, stages=stages)
    if N <= 32768:
        blocks = cluster_for(N, 4096)
        resident = (8192 if is_double else 11264) * blocks // N
        return Plan(1, fitted(N, blocks, (2, 3), 192), blocks, resident, stages=stages)
    if is_double and N <= 131072:
        blocks = cluster_for(N, 12800)
        vectors = (2,) if blocks * 8192 < N else (3, 4)
        return Plan(1, fitted(N, blocks, vectors, 256), blocks, 1, stages=stages)
    if N <= 65536:
        blocks = cluster_for(N, 8192)
        return Plan(1, fitted(N, blocks, (3, 4), 256), blocks, 2, stages=stages)
    blocks = cluster_for(N, 16384)
    vectors = (2,) if is_double or N % VECTOR else (3, 4)
    stages = 3 if is_double or 11264 * blocks >= N else 2
    return Plan(1, fitted(N, blocks, vectors, 512), blocks, 1, stages=stages)


def fitted(N, blocks, vectors, about, slack=1.05):
    """Threads of a block that has a share of a row, about so many, each with one of those numbers
    of vectors: such that not many more have nothing to do (`slack` times the fewest columns)."""

    def threads(count):
        return T.ceildiv(N, blocks * count * VECTOR * WARP) * WARP

    least = min(threads(n) * n for n in vectors)
    good = [threads(n) for n in vectors if threads(n) * n <= slack * least]
    return min(good, key=lambda n: (abs(n - about), n))


def cluster_for(N, most):
    """Blocks of a cluster, a power of two, such that each has at most so many columns."""
    assert N <= MOST, f"rows of {N} elements are too long"
    blocks = 1
    while blocks * most < N:
        blocks *= 2
    return blocks


def part_of(N, blocks, threads, is_free=False):
    """Columns of a row that each block of a cluster takes: whole vectors of 16 bytes. Where few are
    too many, as many for each thread: then masks are only where memory is read and written.
    is_free: warps bring a piece each, which is so always."""
    share, unit = T.ceildiv(N, blocks), VECTOR * threads
    whole = T.ceildiv(share, unit) * unit
    if is_free or 6 * whole <= 7 * share:
        return whole
    return N if blocks == 1 else T.ceildiv(share, VECTOR) * VECTOR


class FreeRows:
    """The rows of a cluster: two in a fixed order, and then the next one that none has taken, each
    time when it is done with one. One or two are on their way at a time, in a slot each: threads
    keep what they work on in registers.

    TAKEN[0] counts what has been taken so. One thread of a cluster adds to it when a row begins,
    and what it learns goes to the other blocks with the row's statistics. Each row that is worked
    on takes one: the last to do so leaves the count as it was.
    """

    def __init__(self, X, TAKEN, x, first, column, workers, threads, slots):
        (_, part), warps = x.shape, threads // WARP
        self.X, self.TAKEN, self.x, self.column, self.workers = X, TAKEN, x, column, workers
        self.thread, self.piece = T.get_thread_binding(), part // warps
        self.slots, self.width = slots, threads * VECTOR  # that threads read at once
        self.pieces = T.alloc_shared((slots, warps, 1, self.piece), X.dtype)  # each warp brings one
        self.tile = T.SharedBuffer((slots, 1, part), X.dtype, data=self.pieces)
        self.full = T.alloc_barrier([warps] * slots)
        self.number, self.claim = T.alloc_shared((1,), "int32"), T.alloc_fragment((1,), "int32")
        self.row = T.alloc_var("int32", init=first)
        self.following = T.alloc_var("int32", init=first + workers)
        self.count = T.alloc_var("int32", init=0)
        T.fill(self.number, 0)
        self.bring(first, 0)
        if slots == 2:
            self.bring(first + workers, 1)

    @T.macro
    def bring(self, row, slot):
        """Start to bring a row, if it exists, to a slot that all threads have left."""
        warp = self.thread // WARP
        if T.shuffle_elect(WARP):
            if row < self.X.shape[0]:
                place = self.X[row, self.column + warp * self.piece]
                T.tma_copy(place, self.pieces[slot, warp, :, :], barrier=self.full[slot])
                T.mbarrier_arrive(self.full[slot])

    @T.macro
    def begin(self):
        """Take a row for later, and wait for the one that is next."""
        slot = self.count[0] % self.slots
        if (self.thread == 0) & (T.block_rank_in_cluster() == 0):
            self.number[0] = T.atomic_add(self.TAKEN[0], 1, return_prev=True)
            if self.number[0] == self.X.shape[0] - 1:
                self.TAKEN[0] = 0
        T.mbarrier_wait_parity(self.full[slot], self.count[0] // self.slots & 1)
        T.copy(self.tile[slot, :, :], self.x)

    def pivot(self):
        """A number amid the block's elements of the row: the mean of a vector of them."""
        slot = self.count[0] % self.slots
        some = [T.cast(self.tile[slot, 0, k], "float32") for k in range(VECTOR)]
        return sum(some[1:], some[0]) / VECTOR

    def learn(self):
        """See what has been taken: threads have met, and all have read this row."""
        T.copy(self.number, self.claim)
        if self.slots == 1:
            self.bring(self.following[0], 0)

    def exchange(self):
        """Tell all blocks what has been taken."""
        T.cluster_reduce(self.claim)
        if self.slots == 2:
            self.bring(self.claim[0] + 2 * self.workers, self.count[0] % 2)

    def end(self):
        self.row[0] = self.following[0]
        self.following[0] = self.claim[0] + 2 * self.workers
        self.count[0] = self.count[0] + 1


@T.macro
def softmax_rows(x, Y, row, column, is_ragged):
    """Rows in a fragment, from a column on; is_ragged: there may be more columns than Y has."""
    BM, part = x.shape
    N = Y.shape[1]
    e = T.alloc_fragment((BM, part), "float32")
    most, total = T.alloc_fragment((BM,), "float32"), T.alloc_fragment((BM,), "float32")
    if is_ragged:
        for i, j in T.Parallel(BM, part):
            x[i, j] = T.if_then_else(column + j < N, x[i, j], -T.infinity(x.dtype))
    T.reduce_max(x, most, dim=1)
    T.cluster_reduce(most, "max")
    for i, j in T.Parallel(BM, part):
        e[i, j] = T.exp2((x[i, j] - most[i]) * LOG2_E)
    T.reduce_sum(e, total, dim=1)
    T.cluster_reduce(total)
    for i in T.Parallel(BM):
        total[i] = 1 / total[i]
    for i, j in T.Parallel(BM, part):
        Y[row + i, column + j] = e[i, j] * total[i]


@tilejit(fast_math=True)
def softmax(
    X: T.Tensor, Y: T.Tensor, *, BM=1, threads=256, blocks=1, resident=1, stages=0, workers=0
):
    """Y = exp(X) / sum(exp(X)) along rows. X, Y: (M, N).

    Without stages each block, or cluster of blocks, has one group of BM rows. With them, `workers`
    clusters take every `workers`th and bring the next ones meanwhile.
    """
    M, N = X.shape
    part, groups = part_of(N, blocks, threads), T.ceildiv(M, BM)
    is_ragged = part * blocks != N
    with T.Kernel((workers if stages else groups) * blocks, threads=threads, cluster=blocks) as b:
        T.annotate_min_blocks_per_sm(resident)
        first, column = b // blocks, b % blocks * part
        x = T.alloc_fragment((BM, part), X.dtype)
        if stages:
            tile = T.alloc_shared((BM, part), X.dtype)
            for step in T.Pipelined(T.ceildiv(groups - first, workers), num_stages=stages):
                row = (first + step * workers) * BM
                T.copy(X[row, column], tile)
                T.copy(tile, x)
                softmax_rows(x, Y, row, column, is_ragged)
        else:
            T.copy(X[first * BM, column], x)
            softmax_rows(x, Y, first * BM, column, is_ragged)


def kept_weights(tensors, part, column, kept):
    """A function for each tensor, of a column of the block's part; the first `kept` tensors come to
    shared memory here and now."""

    def function(tensor, is_kept):
        if not is_kept:
            return lambda j: tensor[column + j]
        tile = T.alloc_shared((part,), tensor.dtype)
        T.copy(tensor[column], tile)
        return lambda j: tile[j]

    return [function(tensor, number < kept) for number, tensor in enumerate(tensors)]


@T.macro
def rms_norm_rows(x, w, Y, S, row, column, eps, free=None):
    BM, part = x.shape
    N = Y.shape[1]
    square = T.alloc_fragment((BM, part), "float32")
    s = T.alloc_fragment((BM,), "float32")
    for i, j in T.Parallel(BM, part):
        square[i, j] = T.cast(x[i, j], "float32") * T.cast(x[i, j], "float32")
    T.reduce_sum(square, s, dim=1)
    if free is not None:
        free.learn()
    T.cluster_reduce(s)
    if free is not None:
        free.exchange()
    for i in T.Parallel(BM):
        s[i] = T.rsqrt(s[i] / N + eps)
    if column == 0:
        T.copy(s, S[row])
    for i, j in T.Parallel(BM, part):
        Y[row + i, column + j] = x[i, j] * s[i] * w(j)


@tilejit(fast_math=True)
def rms_norm(
    X: T.Tensor, W: T.Tensor, Y: T.Tensor, S: T.Tensor, TAKEN: T.Tensor = None,
    *, eps=1e-6, BM=1, threads=256, blocks=1, resident=1, stages=0, kept=0, workers=0,
):  # fmt: skip
    """S = 1 / sqrt(mean(X * X) + eps) of each row, Y = X * S * W. X, Y: (M, N); W: (N,); S: (M,)
    float32. Rows are divided as by `softmax`; with TAKEN, an int32 that is 0 before and after,
    each of `workers` clusters takes the next one when it is free (N in whole vectors)."""
    M, N = X.shape
    part, groups = part_of(N, blocks, threads, TAKEN is not None), T.ceildiv(M, BM)
    with T.Kernel((workers if stages else groups) * blocks, threads=threads, cluster=blocks) as b:
        T.annotate_min_blocks_per_sm(resident)
        first, column = b // blocks, b % blocks * part
        x = T.alloc_fragment((BM, part), X.dtype)
        (w,) = kept_weights((W,), part, column, kept)
        if TAKEN is not None:
            free = FreeRows(X, TAKEN, x, first, column, workers, threads, stages)
            with T.While(lambda: free.row[0] < M):
                free.begin()
                rms_norm_rows(x, w, Y, S, free.row[0], column, eps, free)
                free.end()
        elif stages:
            tile = T.alloc_shared((BM, part), X.dtype)
            for step in T.Pipelined(T.ceildiv(groups - first, workers), num_stages=stages):
                row = (first + step * workers) * BM
                T.copy(X[row, column], tile)
                T.copy(tile, x)
                rms_norm_rows(x, w, Y, S, row, column, eps)
        else:
            T.copy(X[first * BM, column], x)
            rms_norm_rows(x, w, Y, S, first * BM, column, eps)


@T.macro
def once_through(x, mean, s, pivot, width, count, is_inside):
    """The mean of a row's `count` elements and of the squares about it, with one meeting of the
    threads: first about a number amid them, so that differences are of the size of what is left.
    Where all that varies is in the vector that gives the pivot, the squares lose 11 of float32's 24
    bits. is_inside: whether there is an element in a column."""
    BM, part = x.shape
    offs, squares = (T.alloc_fragment((BM, width), "float32") for _ in range(2))
    for i, j in T.Parallel(BM, width):
        off = T.if_then_else(is_inside(j), x[i, j] - pivot, 0)
        offs[i, j] = off
        squares[i, j] = off * off
    for vector in T.unroll(1, part // width):
        for i, j in T.Parallel(BM, width):
            off = T.if_then_else(is_inside(vector * width + j), x[i, vector * width + j] - pivot, 0)
            offs[i, j] += off
            squares[i, j] += off * off
    T.reduce_sum(offs, mean, dim=1)
    T.reduce_sum(squares, s, dim=1)
    for i in T.Parallel(BM):
        mean[i] = mean[i] / T.max(count, 1)
        s[i] = s[i] / part - mean[i] * mean[i] * (count / part)
        mean[i] = mean[i] + pivot


@T.macro
def layer_norm_rows(x, w, b, Y, MEAN, S, row, column, blocks, eps, free=None):
    """Means and squares of each block's own columns, combined as by Chan, Golub and LeVeque (1983):
    one exchange between the blocks of a cluster, and no difference of large numbers. Blocks weigh
    as much as they have of a full part."""
    BM, part = x.shape
    N = Y.shape[1]
    is_ragged = part * blocks != N

    def columns(c):
        """How many of the row block c has."""
        return T.max(T.min(N - c * part, part), 0) if is_ragged else part

    def is_inside(j):
        return column + j < N if is_ragged else True

    square = T.alloc_fragment((BM, part), "float32")
    mean, s = T.alloc_fragment((BM,), "float32"), T.alloc_fragment((BM,), "float32")
    shift = T.alloc_fragment((BM,), "float32")
    count = columns(column // part)
    if free is None:
        T.reduce_sum(x, mean, dim=1)
        for i in T.Parallel(BM):
            mean[i] = mean[i] / T.max(count, 1)
        for i, j in T.Parallel(BM, part):
            off = T.if_then_else(is_inside(j), x[i, j] - mean[i], 0)
            square[i, j] = off * off
        T.reduce_sum(square, s, dim=1)
        for i in T.Parallel(BM):
            s[i] = s[i] / part
    else:
        once_through(x, mean, s, free.pivot(), free.width, count, is_inside)
    if free is not None:
        free.learn()
    if blocks > 1:
        means = T.alloc_fragment((BM, blocks), "float32")
        squares = T.alloc_fragment((BM, blocks), "float32")
        share = T.alloc_fragment((BM, blocks), "float32")
        T.cluster_gather(mean, means)
        T.cluster_gather(s, squares)
    if free is not None:
        free.exchange()
    if blocks > 1:
        for i, c in T.Parallel(BM, blocks):
            share[i, c] = means[i, c] * (columns(c) / part)
        T.reduce_sum(share, mean, dim=1)
        for i in T.Parallel(BM):
            mean[i] = mean[i] * (part / N)
        for i, c in T.Parallel(BM, blocks):
            off = means[i, c] - mean[i]
            share[i, c] = squares[i, c] + off * off * (columns(c) / part)
        T.reduce_sum(share, s, dim=1)
    for i in T.Parallel(BM):
        s[i] = T.rsqrt(s[i] * (part / N) + eps)
    if column == 0:
        T.copy(mean, MEAN[row])
        T.copy(s, S[row])
    for i in T.Parallel(BM):
        shift[i] = -mean[i] * s[i]
    for i, j in T.Parallel(BM, part):
        Y[row + i, column + j] = (x[i, j] * s[i] + shift[i]) * w(j) + b(j)


@tilejit(fast_math=True)
def layer_norm(
    X: T.Tensor, W: T.Tensor, B: T.Tensor, Y: T.Tensor, MEAN: T.Tensor, S: T.Tensor,
    TAKEN: T.Tensor = None,
    *, eps=1e-5, BM=1, threads=256, blocks=1, resident=1, stages=0, kept=0, workers=0,
):  # fmt: skip
    """Y = (X - MEAN) * S * W + B, with the mean and 1 / sqrt(variance + eps) of each row. X, Y:
    (M, N); W, B: (N,); MEAN, S: (M,) float32. Rows are divided as by `rms_norm`."""
    M, N = X.shape
    part, groups = part_of(N, blocks, threads, TAKEN is not None), T.ceildiv(M, BM)
    with T.Kernel((workers if stages else groups) * blocks, threads=threads, cluster=blocks) as b:
        T.annotate_min_blocks_per_sm(resident)
        first, column = b // blocks, b % blocks * part
        x = T.alloc_fragment((BM, part), X.dtype)
        weights = kept_weights((W, B), part, column, kept)
        if TAKEN is not None:
            free = FreeRows(X, TAKEN, x, first, column, workers, threads, stages)
            with T.While(lambda: free.row[0] < M):
                free.begin()
                layer_norm_rows(x, *weights, Y, MEAN, S, free.row[0], column, blocks, eps, free)
                free.end()
        elif stages:
            tile = T.alloc_shared((BM, part), X.dtype)
            for step in T.Pipelined(T.ceildiv(groups - first, workers), num_stages=stages):
                row = (first + step * workers) * BM
                T.copy(X[row, column], tile)
                T.copy(tile, x)
                layer_norm_rows(x, *weights, Y, MEAN, S, row, column, blocks, eps)
        else:
            T.copy(X[first * BM, column], x)
            layer_norm_rows(x, *weights, Y, MEAN, S, first * BM, column, blocks, eps)


@tilejit(fast_math=True)
def softmax_backward(
    Y: T.Tensor, DY: T.Tensor, DX: T.Tensor,
    *, workers=132, BM=1, stages=2, threads=256, blocks=1, resident=1,
):  # fmt: skip
    """DX = Y * (DY - sum(Y * DY)), of softmax's result Y and the gradient DY with respect to it.
    Clusters of `blocks` blocks take every `workers`th group of BM rows, and bring what comes next
    while they compute."""
    M, N = Y.shape
    part = part_of(N, blocks, threads)
    groups = T.ceildiv(M, BM)
    with T.Kernel(workers * blocks, threads=threads, cluster=blocks) as block:
        T.annotate_min_blocks_per_sm(resident)
        worker, column = block // blocks, block % blocks * part
        y, dy = T.alloc_shared((BM, part), Y.dtype), T.alloc_shared((BM, part), DY.dtype)
        product = T.alloc_fragment((BM, part), "float32")
        dot = T.alloc_fragment((BM,), "float32")
        for step in T.Pipelined(T.ceildiv(groups - worker, workers), num_stages=stages):
            row = (worker + step * workers) * BM
            T.copy(Y[row, column], y)
            T.copy(DY[row, column], dy)
            for i, j in T.Parallel(BM, part):
                product[i, j] = T.cast(y[i, j], "float32") * T.cast(dy[i, j], "float32")
            T.reduce_sum(product, dot, dim=1)
            T.cluster_reduce(dot)
            for i, j in T.Parallel(BM, part):
                DX[row + i, column + j] = y[i, j] * (dy[i, j] - dot[i])


@T.macro
def add_up(PARTS, OUT, columns):
    """OUT[n] = the sum of PARTS[:, n], always in the same order."""
    count, N = PARTS.shape
    with T.Kernel(T.ceildiv(N, columns), threads=256) as block:
        tile = T.alloc_fragment((32, columns), "float32")
        acc = T.alloc_fragment((32, columns), "float32")
        total = T.alloc_fragment((columns,), "float32")
        T.clear(acc)
        for step in range(T.ceildiv(count, 32)):
            T.copy(PARTS[step * 32, block * columns], tile)
            for i, j in T.Parallel(32, columns):
                acc[i, j] += tile[i, j]
        T.reduce_sum(acc, total, dim=0)
        T.copy(total, OUT[block * columns])


@tilejit(fast_math=True)
def rms_norm_backward(
    X: T.Tensor, W: T.Tensor, DY: T.Tensor, S: T.Tensor, DX: T.Tensor, DW: T.Tensor,
    *, workers=132, BM=1, stages=2, threads=256, blocks=1, resident=1,
):  # fmt: skip
    """The gradients with respect to X and W of `rms_norm`, which gave S, from DY, that with respect
    to Y. DW: (N,). Clusters of `blocks` blocks take every `workers`th group of BM rows; each keeps
    its part of DW in registers, and a second kernel adds the parts."""
    M, N = X.shape
    part = part_of(N, blocks, threads)
    groups = T.ceildiv(M, BM)
    parts = T.empty((workers, N), "float32")
    with T.Kernel(workers * blocks, threads=threads, cluster=blocks) as block:
        T.annotate_min_blocks_per_sm(resident)
        worker, column = block // blocks, block % blocks * part
        x, dy = T.alloc_shared((BM, part), X.dtype), T.alloc_shared((BM, part), DY.dtype)
        w = T.alloc_shared((part,), W.dtype)
        product = T.alloc_fragment((BM, part), "float32")
        dw = T.alloc_fragment((BM, part), "float32")
        s, dot = T.alloc_shared((BM,), "float32"), T.alloc_fragment((BM,), "float32")
        sums = T.alloc_fragment((part,), "float32")
        T.copy(W[column], w)
        T.clear(dw)
        for step in T.Pipelined(T.ceildiv(groups - worker, workers), num_stages=stages):
            row = (worker + step * workers) * BM
            T.copy(X[row, column], x)
            T.copy(DY[row, column], dy)
            T.copy(S[row], s)
            for i, j in T.Parallel(BM, part):
                hat = x[i, j] * s[i]
                dw[i, j] += dy[i, j] * hat
                product[i, j] = T.cast(dy[i, j], "float32") * T.cast(w[j], "float32") * hat
            T.reduce_sum(product, dot, dim=1)
            T.cluster_reduce(dot)
            for i in T.Parallel(BM):  # DX = s * (g - x * s * dot / N)
                dot[i] = -s[i] * s[i] * dot[i] / N
            for i, j in T.Parallel(BM, part):
                g = T.cast(dy[i, j], "float32") * T.cast(w[j], "float32")
                DX[row + i, column + j] = g * s[i] + x[i, j] * dot[i]
        T.reduce_sum(dw, sums, dim=0)
        T.copy(sums, parts[worker, column])
    add_up(parts, DW, 64)


@tilejit(fast_math=True)
def layer_norm_backward(
    X: T.Tensor, W: T.Tensor, DY: T.Tensor, MEAN: T.Tensor, S: T.Tensor,
    DX: T.Tensor, DW: T.Tensor, DB: T.Tensor,
    *, workers=132, BM=1, stages=2, threads=256, blocks=1, resident=1,
):  # fmt: skip
    """The same of `layer_norm`, with the gradient with respect to B."""
    M, N = X.shape
    part = part_of(N, blocks, threads)
    groups = T.ceildiv(M, BM)
    w_parts, b_parts = T.empty((workers, N), "float32"), T.empty((workers, N), "float32")
    with T.Kernel(workers * blocks, threads=threads, cluster=blocks) as block:
        T.annotate_min_blocks_per_sm(resident)
        worker, column = block // blocks, block % blocks * part
        x, dy = T.alloc_shared((BM, part), X.dtype), T.alloc_shared((BM, part), DY.dtype)
        w = T.alloc_shared((part,), W.dtype)
        product = T.alloc_fragment((BM, part), "float32")
        dw, db = T.alloc_fragment((BM, part), "float32"), T.alloc_fragment((BM, part), "float32")
        mean, s = T.alloc_shared((BM,), "float32"), T.alloc_shared((BM,), "float32")
        total, dot = T.alloc_fragment((BM,), "float32"), T.alloc_fragment((BM,), "float32")
        shift = T.alloc_fragment((BM,), "float32")
        g = T.alloc_fragment((BM, part), "float32")
        sums = T.alloc_fragment((part,), "float32")
        T.copy(W[column], w)
        T.clear(dw)
        T.clear(db)
        for step in T.Pipelined(T.ceildiv(groups - worker, workers), num_stages=stages):
            row = (worker + step * workers) * BM
            T.copy(X[row, column], x)
            T.copy(DY[row, column], dy)
            T.copy(MEAN[row], mean)
            T.copy(S[row], s)
            for i in T.Parallel(BM):
                shift[i] = -mean[i] * s[i]
            for i, j in T.Parallel(BM, part):
                hat = x[i, j] * s[i] + shift[i]
                db[i, j] += dy[i, j]
                dw[i, j] += dy[i, j] * hat
                g[i, j] = T.cast(dy[i, j], "float32") * T.cast(w[j], "float32")
                product[i, j] = g[i, j] * hat
            T.reduce_sum(g, total, dim=1)
            T.reduce_sum(product, dot, dim=1)
            T.cluster_reduce(total)
            T.cluster_reduce(dot)
            for i in T.Parallel(BM):  # DX = s * (g - total / N - hat * dot / N)
                dot[i] = -s[i] * dot[i] / N
                shift[i] = shift[i] * dot[i] - s[i] * total[i] / N
                dot[i] = s[i] * dot[i]
            for i, j in T.Parallel(BM, part):
                gradient = T.cast(dy[i, j], "float32") * T.cast(w[j], "float32")
                DX[row + i, column + j] = gradient * s[i] + (x[i, j] * dot[i] + shift[i])
        T.reduce_sum(dw, sums, dim=0)
        T.copy(sums, w_parts[worker, column])
        T.reduce_sum(db, sums, dim=0)
        T.copy(sums, b_parts[worker, column])
    add_up(w_parts, DW, 64)
    add_up(b_parts, DB, 64)


def forward(name, x, w, b, plan=None, **more):
    """The result of softmax, rms_norm or layer_norm of a NumPy array, and its statistics."""
    M, N = x.shape
    plan = plan or forward_plan(N, name)
    knobs = plan.options | more
    taken = (np.zeros(1, np.int32),) if plan.is_free else ()
    y, mean, s = (
        np.full_like(x, np.nan),
        np.full(M, np.nan, np.float32),
        np.full(M, np.nan, np.float32),
    )
    if name == "softmax":
        softmax(x, y, **knobs)
        return y, None, None
    if name == "rms_norm":
        rms_norm(x, w, y, s, *taken, eps=EPS[name], **knobs)
        return y, None, s
    layer_norm(x, w, b, y, mean, s, *taken, eps=EPS[name], **knobs)
    return y, mean, s


def backward(name, x, w, dy, mean, s, plan=None, **more):
    """Gradients with respect to X (of softmax x is the result), W and B, or None."""
    knobs = (plan or backward_plan(x.shape[1], name)).options | more
    dx, dw, db = np.full_like(x, np.nan), np.full_like(w, np.nan), np.full_like(w, np.nan)
    if name == "softmax":
        softmax_backward(x, dy, dx, **knobs)
        return dx, None, None
    if name == "rms_norm":
        rms_norm_backward(x, w, dy, s, dx, dw, **knobs)
        return dx, dw, None
    layer_norm_backward(x, w, dy, mean, s, dx, dw, db, **knobs)
    return dx, dw, db


def exact_forward(name, x, w, b):
    """The same in float64."""
    x, w, b = (a.astype(np.float64) for a in (x, w, b))
    if name == "softmax":
        with np.errstate(invalid="ignore"):
            e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)
    mean = x.mean(1, keepdims=True) if name == "layer_norm" else 0
    s = 1 / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + EPS[name])
    return (x - mean) * s * w + (b if name == "layer_norm" else 0)


def exact_backward(name, x, w, dy):
    """The same in float64; of softmax from its result x."""
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    if name == "softmax":
        return x * (dy - (x * dy).sum(1, keepdims=True)), None, None
    mean = x.mean(1, keepdims=True) if name == "layer_norm" else 0
    s = 1 / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + EPS[name])
    hat, g = (x - mean) * s, dy * w
    centre = g.mean(1, keepdims=True) if name == "layer_norm" else 0
    dx = s * (g - centre - hat * (g * hat).mean(1, keepdims=True))
    return dx, (dy * hat).sum(0), dy.sum(0) if name == "layer_norm" else None


def agree(got, wanted, tolerance=0.01):
    """Whether a result is as near to the exact one as 16-bit floats are, NaNs and infinities at the
    same places."""
    if wanted is None:
        return got is None
    got = got.astype(np.float64)
    scale = np.abs(wanted[np.isfinite(wanted)]).max(initial=1e-30)
    is_finite = np.isfinite(wanted)
    same = (np.isnan(got) == np.isnan(wanted)).all() and (np.isinf(got) == np.isinf(wanted)).all()
    off = np.abs(got[is_finite] - wanted[is_finite])
    near = off <= tolerance * (np.abs(wanted[is_finite]) + 0.1 * scale)
    return bool(same and near.all())


def check_one(name, M, N, rng, dtype=ml_dtypes.bfloat16, plans=(None, None), workers=3):
    """Compare one function and its gradient with float64."""
    x, dy = (rng.standard_normal((M, N)).astype(dtype) for _ in range(2))
    w, b = (1 + 0.5 * rng.standard_normal((2, N))).astype(dtype)
    is_ringed = plans[0] is not None and plans[0].stages
    y, mean, s = forward(name, x, w, b, plans[0], **({"workers": workers} if is_ringed else {}))
    assert agree(y, exact_forward(name, x, w, b)), f"{name} of {M} x {N} is wrong"
    of = y if name == "softmax" else x
    found = backward(name, of, w, dy, mean, s, plans[1], workers=workers)
    wanted = exact_backward(name, of, w, dy)
    for what, got, want in zip(("X", "W", "B"), found, wanted, strict=True):
        assert agree(got, want), f"{name}: the gradient of {what} of {M} x {N} is wrong"


NAMES = ("softmax", "rms_norm", "layer_norm")


def check() -> None:
    """Compare with float64: short rows, several in a block; odd ones; one in a cluster."""
    rng = np.random.default_rng(0)
    cluster = Plan(1, 64, 2, 1, stages=2)
    for name in NAMES:
        check_one(name, 70, 128, rng)
        check_one(name, 9, 1000, rng)
        if not has_gpu():
            with options(target="sm_90a"):  # what is simulated
                check_one(name, 3, 2100, rng, plans=(cluster, cluster))
        elif any(chip in device_name() for chip in ("sm_90", "sm_100", "sm_120")):
            check_one(name, 3, 2100, rng, plans=(cluster, cluster))
    print("softmax, rms_norm and layer_norm and their gradients are right")


if __name__ == "__main__":
    if "--bench" in sys.argv:
        import rows_bench

        rows_bench.main()
    else:
        check()
