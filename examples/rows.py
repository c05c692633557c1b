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

import ml_dtypes
import numpy as np
from rows_plan import (
    BACKWARD,
    FORWARD,
    VECTOR,
    WARP,
    Plan,
    alike,
    backward_plan,
    chosen,
    columns_of,
    forward_plan,
    is_unaligned,
    part_of,
)

import tilejit.language as T
from tilejit import device_name, has_gpu, options, tilejit

LOG2_E = 1.4426950408889634
EPS = {"rms_norm": 1e-6, "layer_norm": 1e-5}


class Rows:
    """How a kernel sees tensors of rows, (M, N): a block of a cluster has `part` columns of BM rows
    at a time.

    Where rows begin at whole vectors, columns are the tensor's. Else all elements are one line, of
    which a row has the vectors with any of its elements: the first column is the vector's first
    element, and columns `before` the row and behind it are masked. So memory is accessed in whole
    vectors but for the row's ends, and what belongs to columns, such as weights, is moved alike.
    """

    def __init__(self, BM, blocks, threads, least, *tensors, is_free=False):
        (self.M, self.N), pitches = tensors[0].shape, [t.strides[0] for t in tensors]
        self.is_unaligned = self.M > 1 and any(is_unaligned(self.N, p, least) for p in pitches)
        if self.is_unaligned:
            assert set(pitches) == {self.N}, "such rows follow each other without gaps"
        self.BM, self.blocks = BM, blocks
        width = columns_of(self.N) if self.is_unaligned else T.ceildiv(self.N, VECTOR) * VECTOR
        self.part = part_of(width, blocks, threads, is_free)
        self.has_more = self.is_unaligned or self.part * blocks != self.N  # columns than the row

    def before(self, row):
        """Columns before a row's first element."""
        if not self.is_unaligned:
            return 0
        fits = self.M * self.N < 1 << 31
        return row * (self.N if fits else self.N % VECTOR) % VECTOR

    def has(self, row, column):
        """Whether a column is one of the row's."""
        if not self.has_more:
            return True
        column = column - self.before(row)
        return (column >= 0) & (column < self.N) if self.is_unaligned else column < self.N

    def count(self, row, block):
        """How many columns of a row a block of the cluster has."""
        begin, end = self.before(row), self.before(row) + self.N
        first, stop = block * self.part, (block + 1) * self.part
        return T.max(T.min(end, stop) - T.max(begin, first), 0) if self.has_more else self.part

    def line(self, X, row, column):
        """All elements, and where a row's column is among them."""
        line = T.make_tensor(X.data, (self.M * self.N,), X.dtype)
        return line, row * self.N // VECTOR * VECTOR + column

    @T.macro
    def read(self, X, row, column, x, none=0):
        """Rows to a fragment, from a column on; `none` in columns that are not theirs."""
        if self.is_unaligned:
            for i, j in T.Parallel(self.BM, self.part):
                line, at = self.line(X, row + i, column + j)
                x[i, j] = T.if_then_else(self.has(row + i, column + j), line[at], none)
        else:
            T.copy(X[row, column], x)
            if none:
                self.mask(row, column, x, none)

    @T.macro
    def mask(self, row, column, x, none):
        if self.has_more:
            for i, j in T.Parallel(self.BM, self.part):
                x[i, j] = T.if_then_else(self.has(row + i, column + j), x[i, j], none)

    def bring(self, X, row, column, tile):
        """Rows to a shared tile, with what lies beside them."""
        if not self.is_unaligned:
            T.copy(X[row, column], tile)
            return
        for i in range(self.BM):
            line, at = self.line(X, row + i, column)
            T.copy(line[at], tile[i, :])

    @T.macro
    def write(self, Y, row, column, value):
        """value(i, j): of a row and column of the block's."""
        if self.is_unaligned:
            for i, j in T.Parallel(self.BM, self.part):
                line, at = self.line(Y, row + i, column + j)
                result = value(i, j)  # of all columns: only what is written has ends
                if self.has(row + i, column + j):
                    line[at] = result
        else:
            for i, j in T.Parallel(self.BM, self.part):
                Y[row + i, column + j] = value(i, j)

    def write_sums(self, sums, OUT, worker, column):
        """Sums over a worker's rows, each added up in its place of BM rows, to a row of OUT; to BM
        rows where columns of these rows are not the same."""
        if self.is_unaligned:
            T.copy(sums, OUT[worker * self.BM, column])
            return
        total = T.alloc_fragment((self.part,), "float32")
        T.reduce_sum(sums, total, dim=0)
        T.copy(total, OUT[worker, column])

    def sums(self, workers):
        """A tensor for them, of workers whose rows begin alike."""
        if not self.is_unaligned:
            return T.empty((workers, self.N), "float32")
        self.check_alike(workers)
        return T.empty((workers * self.BM, self.part * self.blocks), "float32")

    def check_alike(self, workers):
        if self.is_unaligned:
            step = alike(self.N, self.BM)
            wrong = f"rows of a worker have to begin alike: workers is no multiple of {step}"
            assert workers % step == 0, wrong

    def weights_of(self, W, worker, column):
        """A function of a row and a column of the block's: weights for all rows of a worker."""
        count = self.BM if self.is_unaligned else 1
        tile = T.alloc_shared((count, self.part), W.dtype)
        for i in range(count):
            before = self.before(worker * self.BM + i)
            T.copy(W[before, column] if self.is_unaligned else W[column], tile[i, :])
        return lambda i, j: tile[i if self.is_unaligned else 0, j]

    def weights(self, *tensors):
        """Vectors of N elements as a kernel reads them: `moved`, where rows do not begin at whole
        vectors."""
        return moved(self, *tensors) if self.is_unaligned else tensors


@T.macro
def moved(rows, *tensors):
    """Tables whose row k has a vector's elements k columns further, and zeros beside them."""
    width, N, BN = rows.part * rows.blocks, rows.N, 2048
    tables = tuple(T.empty((VECTOR, width), t.dtype) for t in tensors)
    with T.Kernel(T.ceildiv(width, BN), VECTOR, threads=256) as (block, k):
        for tensor, table in zip(tensors, tables, strict=True):
            for j in T.Parallel(BN):
                column = block * BN + j
                is_there = (column >= k) & (column - k < N)
                table[k, column] = T.if_then_else(is_there, tensor[column - k], 0)
    return tables


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
def softmax_rows(rows, x, Y, row, column):
    """Of rows in a fragment, from a column on; beside them it has minus infinity."""
    BM, part = x.shape
    e = T.alloc_fragment((BM, part), "float32")
    most, total = T.alloc_fragment((BM,), "float32"), T.alloc_fragment((BM,), "float32")
    T.reduce_max(x, most, dim=1)
    T.cluster_reduce(most, "max")
    for i, j in T.Parallel(BM, part):
        e[i, j] = T.exp2((x[i, j] - most[i]) * LOG2_E)
    T.reduce_sum(e, total, dim=1)
    T.cluster_reduce(total)
    for i in T.Parallel(BM):
        total[i] = 1 / total[i]
    rows.write(Y, row, column, lambda i, j: e[i, j] * total[i])


@tilejit(fast_math=True)
def softmax(
    X: T.Tensor, Y: T.Tensor, *, BM=1, threads=256, blocks=1, resident=1, stages=0, workers=0
):
    """Y = exp(X) / sum(exp(X)) along rows. X, Y: (M, N).

    Without stages each block, or cluster of blocks, has one group of BM rows. With them, `workers`
    clusters take every `workers`th and bring the next ones meanwhile.
    """
    rows, groups = Rows(BM, blocks, threads, FORWARD, X, Y), T.ceildiv(X.shape[0], BM)
    part, none = rows.part, -T.infinity(X.dtype)
    with T.Kernel((workers if stages else groups) * blocks, threads=threads, cluster=blocks) as b:
        T.annotate_min_blocks_per_sm(resident)
        first, column = b // blocks, b % blocks * part
        x = T.alloc_fragment((BM, part), X.dtype)
        if stages:
            tile = T.alloc_shared((BM, part), X.dtype)
            for step in T.Pipelined(T.ceildiv(groups - first, workers), num_stages=stages):
                row = (first + step * workers) * BM
                rows.bring(X, row, column, tile)
                T.copy(tile, x)
                rows.mask(row, column, x, none)
                softmax_rows(rows, x, Y, row, column)
        else:
            rows.read(X, first * BM, column, x, none)
            softmax_rows(rows, x, Y, first * BM, column)


def kept_weights(rows, tensors, first, column, kept, workers):
    """A function for each tensor, of a row and a column of the block's; the first `kept` tensors
    come to shared memory here and now, for all rows of a worker."""
    if kept:
        assert rows.BM == 1 or not rows.is_unaligned, "rows of a block have to begin alike"
        rows.check_alike(workers)

    def function(tensor, is_kept):
        if not is_kept:
            if rows.is_unaligned:
                return lambda row, j: tensor[rows.before(row), column + j]
            return lambda row, j: tensor[column + j]
        tile = T.alloc_shared((rows.part,), tensor.dtype)
        T.copy(tensor[rows.before(first), column] if rows.is_unaligned else tensor[column], tile)
        return lambda row, j: tile[j]

    return [function(tensor, number < kept) for number, tensor in enumerate(tensors)]


@T.macro
def rms_norm_rows(rows, x, w, Y, S, row, column, eps, free=None):
    """Of rows in a fragment, from a column on; beside them it has zeros."""
    BM, part = x.shape
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
        s[i] = T.rsqrt(s[i] / rows.N + eps)
    if column == 0:
        T.copy(s, S[row])
    rows.write(Y, row, column, lambda i, j: x[i, j] * s[i] * w(row + i, j))


@tilejit(fast_math=True)
def rms_norm(
    X: T.Tensor, W: T.Tensor, Y: T.Tensor, S: T.Tensor, TAKEN: T.Tensor = None,
    *, eps=1e-6, BM=1, threads=256, blocks=1, resident=1, stages=0, kept=0, workers=0,
):  # fmt: skip
    """S = 1 / sqrt(mean(X * X) + eps) of each row, Y = X * S * W. X, Y: (M, N); W: (N,); S: (M,)
    float32. Rows are divided as by `softmax`; with TAKEN, an int32 that is 0 before and after,
    each of `workers` clusters takes the next one when it is free (N in whole vectors)."""
    rows = Rows(BM, blocks, threads, FORWARD, X, Y, is_free=TAKEN is not None)
    (M, _), part, weights = X.shape, rows.part, rows.weights(W)
    groups = T.ceildiv(M, BM)
    with T.Kernel((workers if stages else groups) * blocks, threads=threads, cluster=blocks) as b:
        T.annotate_min_blocks_per_sm(resident)
        first, column = b // blocks, b % blocks * part
        x = T.alloc_fragment((BM, part), X.dtype)
        (w,) = kept_weights(rows, weights, first, column, kept, workers)
        if TAKEN is not None:
            free = FreeRows(X, TAKEN, x, first, column, workers, threads, stages)
            with T.While(lambda: free.row[0] < M):
                free.begin()
                rms_norm_rows(rows, x, w, Y, S, free.row[0], column, eps, free)
                free.end()
        elif stages:
            tile = T.alloc_shared((BM, part), X.dtype)
            for step in T.Pipelined(T.ceildiv(groups - first, workers), num_stages=stages):
                row = (first + step * workers) * BM
                rows.bring(X, row, column, tile)
                T.copy(tile, x)
                if rows.is_unaligned:
                    rows.mask(row, column, x, 0)
                rms_norm_rows(rows, x, w, Y, S, row, column, eps)
        else:
            rows.read(X, first * BM, column, x)
            rms_norm_rows(rows, x, w, Y, S, first * BM, column, eps)


@T.macro
def once_through(rows, x, mean, s, pivot, width, row, column):
    """The mean of a block's elements of a row and of the squares about it, with one meeting of the
    threads: first about a number amid them, so that differences are of the size of what is left.
    Where all that varies is in the vector that gives the pivot, the squares lose 11 of float32's 24
    bits. is_inside: whether there is an element in a column."""
    (BM, part), count = x.shape, rows.count(row, column // rows.part)
    offs, squares = (T.alloc_fragment((BM, width), "float32") for _ in range(2))
    for i, j in T.Parallel(BM, width):
        off = T.if_then_else(rows.has(row, column + j), x[i, j] - pivot, 0)
        offs[i, j] = off
        squares[i, j] = off * off
    for vector in T.unroll(1, part // width):
        for i, j in T.Parallel(BM, width):
            off = T.if_then_else(
                rows.has(row, column + vector * width + j), x[i, vector * width + j] - pivot, 0
            )
            offs[i, j] += off
            squares[i, j] += off * off
    T.reduce_sum(offs, mean, dim=1)
    T.reduce_sum(squares, s, dim=1)
    for i in T.Parallel(BM):
        mean[i] = mean[i] / T.max(count, 1)
        s[i] = s[i] / part - mean[i] * mean[i] * (count / part)
        mean[i] = mean[i] + pivot


@T.macro
def layer_norm_rows(rows, x, w, b, Y, MEAN, S, row, column, eps, free=None):
    """Of rows in a fragment, from a column on; beside them it has zeros. Means and squares of each
    block's own columns, combined as by Chan, Golub and LeVeque (1983): one exchange between the
    blocks of a cluster, and no difference of large numbers. Blocks weigh as much as they have of a
    full part."""
    (BM, part), N, blocks = x.shape, rows.N, rows.blocks
    square = T.alloc_fragment((BM, part), "float32")
    mean, s = T.alloc_fragment((BM,), "float32"), T.alloc_fragment((BM,), "float32")
    shift = T.alloc_fragment((BM,), "float32")
    if free is None:
        T.reduce_sum(x, mean, dim=1)
        for i in T.Parallel(BM):
            mean[i] = mean[i] / T.max(rows.count(row + i, column // part), 1)
        for i, j in T.Parallel(BM, part):
            off = T.if_then_else(rows.has(row + i, column + j), x[i, j] - mean[i], 0)
            square[i, j] = off * off
        T.reduce_sum(square, s, dim=1)
        for i in T.Parallel(BM):
            s[i] = s[i] / part
    else:
        once_through(rows, x, mean, s, free.pivot(), free.width, row, column)
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
            share[i, c] = means[i, c] * (rows.count(row + i, c) / part)
        T.reduce_sum(share, mean, dim=1)
        for i in T.Parallel(BM):
            mean[i] = mean[i] * (part / N)
        for i, c in T.Parallel(BM, blocks):
            off = means[i, c] - mean[i]
            share[i, c] = squares[i, c] + off * off * (rows.count(row + i, c) / part)
        T.reduce_sum(share, s, dim=1)
    for i in T.Parallel(BM):
        s[i] = T.rsqrt(s[i] * (part / N) + eps)
    if column == 0:
        T.copy(mean, MEAN[row])
        T.copy(s, S[row])
    for i in T.Parallel(BM):
        shift[i] = -mean[i] * s[i]
    rows.write(
        Y, row, column,
        lambda i, j: (x[i, j] * s[i] + shift[i]) * w(row + i, j) + b(row + i, j),
    )  # fmt: skip


@tilejit(fast_math=True)
def layer_norm(
    X: T.Tensor, W: T.Tensor, B: T.Tensor, Y: T.Tensor, MEAN: T.Tensor, S: T.Tensor,
    TAKEN: T.Tensor = None,
    *, eps=1e-5, BM=1, threads=256, blocks=1, resident=1, stages=0, kept=0, workers=0,
):  # fmt: skip
    """Y = (X - MEAN) * S * W + B, with the mean and 1 / sqrt(variance + eps) of each row. X, Y:
    (M, N); W, B: (N,); MEAN, S: (M,) float32. Rows are divided as by `rms_norm`."""
    rows = Rows(BM, blocks, threads, FORWARD, X, Y, is_free=TAKEN is not None)
    (M, _), part, weights = X.shape, rows.part, rows.weights(W, B)
    groups = T.ceildiv(M, BM)
    with T.Kernel((workers if stages else groups) * blocks, threads=threads, cluster=blocks) as b:
        T.annotate_min_blocks_per_sm(resident)
        first, column = b // blocks, b % blocks * part
        x = T.alloc_fragment((BM, part), X.dtype)
        weights = kept_weights(rows, weights, first, column, kept, workers)
        if TAKEN is not None:
            free = FreeRows(X, TAKEN, x, first, column, workers, threads, stages)
            with T.While(lambda: free.row[0] < M):
                free.begin()
                layer_norm_rows(rows, x, *weights, Y, MEAN, S, free.row[0], column, eps, free)
                free.end()
        elif stages:
            tile = T.alloc_shared((BM, part), X.dtype)
            for step in T.Pipelined(T.ceildiv(groups - first, workers), num_stages=stages):
                row = (first + step * workers) * BM
                rows.bring(X, row, column, tile)
                T.copy(tile, x)
                if rows.is_unaligned:
                    rows.mask(row, column, x, 0)
                layer_norm_rows(rows, x, *weights, Y, MEAN, S, row, column, eps)
        else:
            rows.read(X, first * BM, column, x)
            layer_norm_rows(rows, x, *weights, Y, MEAN, S, first * BM, column, eps)


@tilejit(fast_math=True)
def softmax_backward(
    Y: T.Tensor, DY: T.Tensor, DX: T.Tensor,
    *, workers=132, BM=1, stages=2, threads=256, blocks=1, resident=1,
):  # fmt: skip
    """DX = Y * (DY - sum(Y * DY)), of softmax's result Y and the gradient DY with respect to it.
    Clusters of `blocks` blocks take every `workers`th group of BM rows, and bring what comes next
    while they compute."""
    rows, groups = Rows(BM, blocks, threads, BACKWARD, Y, DY, DX), T.ceildiv(Y.shape[0], BM)
    part = rows.part
    with T.Kernel(workers * blocks, threads=threads, cluster=blocks) as block:
        T.annotate_min_blocks_per_sm(resident)
        worker, column = block // blocks, block % blocks * part
        y, dy = T.alloc_shared((BM, part), Y.dtype), T.alloc_shared((BM, part), DY.dtype)
        product = T.alloc_fragment((BM, part), "float32")
        dot = T.alloc_fragment((BM,), "float32")
        for step in T.Pipelined(T.ceildiv(groups - worker, workers), num_stages=stages):
            row = (worker + step * workers) * BM
            rows.bring(Y, row, column, y)
            rows.bring(DY, row, column, dy)
            for i, j in T.Parallel(BM, part):
                product[i, j] = T.cast(y[i, j], "float32") * T.cast(dy[i, j], "float32")
            if rows.is_unaligned:
                rows.mask(row, column, product, 0)
            T.reduce_sum(product, dot, dim=1)
            T.cluster_reduce(dot)
            rows.write(DX, row, column, lambda i, j: y[i, j] * (dy[i, j] - dot[i]))


@T.macro
def add_up(rows, PARTS, OUT, columns):
    """OUT[n] = the sum of what workers have found for column n, always in the same order."""
    count, N = PARTS.shape[0], OUT.shape[0]
    with T.Kernel(T.ceildiv(N, columns), threads=256) as block:
        tile = T.alloc_fragment((32, columns), "float32")
        acc = T.alloc_fragment((32, columns), "float32")
        total = T.alloc_fragment((columns,), "float32")
        T.clear(acc)
        for step in range(T.ceildiv(count, 32)):
            if rows.is_unaligned:
                for i, j in T.Parallel(32, columns):
                    row = step * 32 + i
                    tile[i, j] = PARTS[row, block * columns + j + rows.before(row)]
            else:
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
    its part of DW in registers, and a second kernel adds the parts. workers: of odd N a multiple of
    8 (`alike`)."""
    rows = Rows(BM, blocks, threads, BACKWARD, X, DY, DX)
    (M, N), part, parts, (W,) = X.shape, rows.part, rows.sums(workers), rows.weights(W)
    groups = T.ceildiv(M, BM)
    with T.Kernel(workers * blocks, threads=threads, cluster=blocks) as block:
        T.annotate_min_blocks_per_sm(resident)
        worker, column = block // blocks, block % blocks * part
        x, dy = T.alloc_shared((BM, part), X.dtype), T.alloc_shared((BM, part), DY.dtype)
        w = rows.weights_of(W, worker, column)
        product = T.alloc_fragment((BM, part), "float32")
        dw = T.alloc_fragment((BM, part), "float32")
        s, dot = T.alloc_shared((BM,), "float32"), T.alloc_fragment((BM,), "float32")
        T.clear(dw)
        for step in T.Pipelined(T.ceildiv(groups - worker, workers), num_stages=stages):
            row = (worker + step * workers) * BM
            rows.bring(X, row, column, x)
            rows.bring(DY, row, column, dy)
            T.copy(S[row], s)
            for i, j in T.Parallel(BM, part):
                hat = x[i, j] * s[i]
                dw[i, j] += dy[i, j] * hat
                product[i, j] = T.cast(dy[i, j], "float32") * T.cast(w(i, j), "float32") * hat
            if rows.is_unaligned:
                rows.mask(row, column, product, 0)
            T.reduce_sum(product, dot, dim=1)
            T.cluster_reduce(dot)
            for i in T.Parallel(BM):  # DX = s * (g - x * s * dot / N)
                dot[i] = -s[i] * s[i] * dot[i] / N

            def gradient(i, j):
                g = T.cast(dy[i, j], "float32") * T.cast(w(i, j), "float32")
                return g * s[i] + x[i, j] * dot[i]

            rows.write(DX, row, column, gradient)
        rows.write_sums(dw, parts, worker, column)
    add_up(rows, parts, DW, 64)


@tilejit(fast_math=True)
def layer_norm_backward(
    X: T.Tensor, W: T.Tensor, DY: T.Tensor, MEAN: T.Tensor, S: T.Tensor,
    DX: T.Tensor, DW: T.Tensor, DB: T.Tensor,
    *, workers=132, BM=1, stages=2, threads=256, blocks=1, resident=1,
):  # fmt: skip
    """The same of `layer_norm`, with the gradient with respect to B."""
    rows = Rows(BM, blocks, threads, BACKWARD, X, DY, DX)
    (M, N), part, (W,) = X.shape, rows.part, rows.weights(W)
    groups, w_parts, b_parts = T.ceildiv(M, BM), rows.sums(workers), rows.sums(workers)
    with T.Kernel(workers * blocks, threads=threads, cluster=blocks) as block:
        T.annotate_min_blocks_per_sm(resident)
        worker, column = block // blocks, block % blocks * part
        x, dy = T.alloc_shared((BM, part), X.dtype), T.alloc_shared((BM, part), DY.dtype)
        w = rows.weights_of(W, worker, column)
        product = T.alloc_fragment((BM, part), "float32")
        dw, db = T.alloc_fragment((BM, part), "float32"), T.alloc_fragment((BM, part), "float32")
        mean, s = T.alloc_shared((BM,), "float32"), T.alloc_shared((BM,), "float32")
        total, dot = T.alloc_fragment((BM,), "float32"), T.alloc_fragment((BM,), "float32")
        shift = T.alloc_fragment((BM,), "float32")
        g = T.alloc_fragment((BM, part), "float32")
        T.clear(dw)
        T.clear(db)
        for step in T.Pipelined(T.ceildiv(groups - worker, workers), num_stages=stages):
            row = (worker + step * workers) * BM
            rows.bring(X, row, column, x)
            rows.bring(DY, row, column, dy)
            T.copy(MEAN[row], mean)
            T.copy(S[row], s)
            for i in T.Parallel(BM):
                shift[i] = -mean[i] * s[i]
            for i, j in T.Parallel(BM, part):
                hat = x[i, j] * s[i] + shift[i]
                db[i, j] += dy[i, j]
                dw[i, j] += dy[i, j] * hat
                g[i, j] = T.cast(dy[i, j], "float32") * T.cast(w(i, j), "float32")
                product[i, j] = g[i, j] * hat
            if rows.is_unaligned:
                rows.mask(row, column, g, 0)
                rows.mask(row, column, product, 0)
            T.reduce_sum(g, total, dim=1)
            T.reduce_sum(product, dot, dim=1)
            T.cluster_reduce(total)
            T.cluster_reduce(dot)
            for i in T.Parallel(BM):  # DX = s * (g - total / N - hat * dot / N)
                dot[i] = -s[i] * dot[i] / N
                shift[i] = shift[i] * dot[i] - s[i] * total[i] / N
                dot[i] = s[i] * dot[i]

            def gradient(i, j):
                weighted = T.cast(dy[i, j], "float32") * T.cast(w(i, j), "float32")
                return weighted * s[i] + (x[i, j] * dot[i] + shift[i])

            rows.write(DX, row, column, gradient)
        rows.write_sums(dw, w_parts, worker, column)
        rows.write_sums(db, b_parts, worker, column)
    add_up(rows, w_parts, DW, 64)
    add_up(rows, b_parts, DB, 64)


def forward(name, x, w, b, plan=None, **more):
    """The result of softmax, rms_norm or layer_norm of a NumPy array, and its statistics."""
    M, N = x.shape
    plan = plan or forward_plan(N, name)
    knobs = chosen(plan, N, more, plan.kept > 0)
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
    N = x.shape[1]
    knobs = chosen(plan or backward_plan(N, name), N, more, name != "softmax")
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
