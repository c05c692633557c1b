"""Loops whose rounds overlap around exchanges between the blocks of a cluster: what runs ahead,
what stays, and that results are those of rounds one after the other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, passes, tilejit
from tilejit.ir.node import walk
from tilejit.ir.sync import Control, ControlOp
from tilejit.passes import exchange
from tilejit.runtime.device import use_executor
from tilejit.runtime.kernel import TileKernel

ARRIVES = Control(op=ControlOp.CLUSTER_ARRIVE_RELAXED)
OVERLAP = "rounds overlap around exchanges of"


@tilejit
def centred(
    A: T.Tensor, B: T.Tensor, SUMS: T.Tensor,
    *, workers=2, blocks=2, stages=3, BM=1, threads=64, keeps=False,
):  # fmt: skip
    """B = A less the mean of each row; SUMS: (workers, N), of the rows of each worker. keeps: rows
    are kept in registers while the blocks exchange."""
    M, N = A.shape
    part, groups = T.ceildiv(N, blocks), T.ceildiv(M, BM)
    with T.Kernel(workers * blocks, threads=threads, cluster=blocks) as block:
        worker, column = block // blocks, block % blocks * part
        tile = T.alloc_shared((BM, part), A.dtype)
        x, acc = T.alloc_fragment((BM, part), "float32"), T.alloc_fragment((BM, part), "float32")
        mean, sums = T.alloc_fragment((BM,), "float32"), T.alloc_fragment((part,), "float32")
        T.clear(acc)
        for step in T.Pipelined(T.ceildiv(groups - worker, workers), num_stages=stages):
            row = (worker + step * workers) * BM
            T.copy(A[row, column], tile)
            for i, j in T.Parallel(BM, part):
                x[i, j] = tile[i, j]
                acc[i, j] += tile[i, j]
            T.reduce_sum(x, mean, dim=1)
            T.cluster_reduce(mean)
            for i in T.Parallel(BM):
                mean[i] = mean[i] / N
            if keeps:
                for i, j in T.Parallel(BM, part):
                    B[row + i, column + j] = x[i, j] - mean[i]
            else:
                for i, j in T.Parallel(BM, part):
                    B[row + i, column + j] = tile[i, j] - mean[i]
        T.reduce_sum(acc, sums, dim=0)
        T.copy(sums, SUMS[worker, column])


def explained(kernel, *shapes, dtype="float32", **constants):
    specs = [T.Tensor(s, dtype) for s in shapes]
    return kernel.compile(*specs, target="sm_90a", **constants)


def check_centred(hopper, rng, M, N, workers=2, BM=1, dtype=np.float32, **more):
    a = rng.integers(-9, 10, (M, N)).astype(dtype)
    out = [((M, N), np.float32), ((workers, N), np.float32)]
    b, sums = hopper(centred, a, out=out, workers=workers, BM=BM, **more)
    wide = a.astype(np.float64)
    np.testing.assert_allclose(b, wide - wide.mean(1, keepdims=True), atol=1e-5)
    owner = np.arange(M) // BM % workers
    assert (sums == [wide[owner == k].sum(0) for k in range(workers)]).all()


@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 11])  # workers with no round, one, and more
@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_any_number_of_rounds_and_slots(hopper, rng, M, stages):
    check_centred(hopper, rng, M, 37, stages=stages)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(
    "M, N, blocks, BM", [(7, 128, 2, 1), (9, 131, 4, 2), (5, 1, 2, 1), (13, 67, 8, 3)]
)
def test_rows_of_any_width_in_clusters_of_any_size(hopper, rng, M, N, blocks, BM, keeps):
    check_centred(hopper, rng, M, N, blocks=blocks, BM=BM, keeps=keeps, workers=1, threads=32)


def test_more_workers_than_rows(hopper, rng):
    check_centred(hopper, rng, 2, 40, workers=4)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("M, N, BM", [(1, 37, 1), (2, 37, 1), (9, 37, 1), (7, 13, 2), (8, 130, 1)])
def test_tiles_that_threads_fill_themselves(hopper, rng, M, N, BM, stages):
    """Rows that begin at odd multiples of two bytes."""
    check_centred(hopper, rng, M, N, BM=BM, dtype=np.float16, stages=stages, threads=32)
    text = explained(centred, (64, 511), (64, 511), (2, 511), dtype="float16").explain()
    assert "no copy can run ahead" in text and "serial" not in text
    assert f"{OVERLAP} mean, with two of tile" in text


def test_two_tiles_need_room():
    shapes = ((64, 131071), (64, 131071), (2, 131071))
    text = explained(centred, *shapes, dtype="float16", threads=1024).explain()
    assert "rounds wait for exchanges of mean: shared memory is too small for two" in text


@pytest.mark.parametrize("stages, says", [(2, "they need 3 slots"), (3, ""), (4, "")])
def test_what_explain_says(stages, says):
    shapes = ((64, 512), (64, 512), (2, 512))
    text = explained(centred, *shapes, stages=stages).explain()
    assert (f"{OVERLAP} mean" in text) == (not says)
    assert (f"rounds wait for exchanges of mean: {says}" in text) == bool(says)


def test_a_round_sends_for_the_next_one_before_it_takes_for_its_own():
    source = explained(centred, (64, 512), (64, 512), (2, 512), keeps=True).source
    lines = [line.strip() for line in source.split("while ")[1].splitlines()]
    body = [line.partition("(")[0].rpartition("= ")[2] for line in lines]
    wanted = ["parallel_x_next_acc", "cluster_send", "cluster_take", "parallel_B", "copy_x_next_x"]
    places = [next(k for k, c in enumerate(body) if c.startswith(w)) for w in wanted]
    assert places == sorted(places)
    # the mean is taken anew, and what the next round has sent of it need not be kept
    assert not any(c.startswith("copy_mean_next") for c in body)


def test_rows_too_long_for_two_in_registers_stay_where_they_are():
    shapes = ((64, 40960), (64, 40960), (2, 40960))
    kernel = explained(centred, *shapes, dtype="bfloat16", threads=256, keeps=True)
    assert "of mean: registers are too few for two rounds' values" in kernel.explain()
    kernel = explained(centred, *shapes, dtype="bfloat16", threads=256)
    assert OVERLAP in kernel.explain() and kernel.kernels[0].resources.spill_bytes == 0


@pytest.mark.parametrize("stages", [3, 4])
def test_the_graph_means_the_same_after_every_pass(rng, stages):
    a = rng.integers(-9, 10, (7, 37)).astype(np.float32)
    b, sums = np.full_like(a, np.nan), np.full((2, 37), np.nan, np.float32)
    wide = a.astype(np.float64)
    kernel = centred.compile(a, b, sums, target="sm_90a", stages=stages)
    (frame,) = kernel.kernels
    for name, graph in passes.stages(frame.graph, kernel.target):
        if any(isinstance(n, Control) for n in walk(graph.body)):  # who has made barriers arrives
            graph = dataclasses.replace(graph, body=(ARRIVES, *graph.body))
        program = dataclasses.replace(kernel.program, kernels=(graph,))
        b[:], sums[:] = np.nan, np.nan
        with use_executor("reference"):
            TileKernel(program, kernel.target, kernel.names)(a, b, sums)
        np.testing.assert_allclose(b, wide - wide.mean(1, keepdims=True), atol=1e-5, err_msg=name)
        assert (sums == [wide[::2].sum(0), wide[1::2].sum(0)]).all(), name


# ---- values that go from one part to the other ---------------------------------------------------


@tilejit
def counting(A: T.Tensor, B: T.Tensor, C: T.Tensor, LAST: T.Tensor, *, stages=3, M=6):
    """B: sums of rows; C: these and the sum of all rows so far, of the block alone; LAST: both
    after the loop."""
    N = A.shape[1] // 2
    with T.Kernel(2, threads=32, cluster=2) as block:
        tile = T.alloc_shared((N,), "float32")
        x, so_far = T.alloc_fragment((N,), "float32"), T.alloc_fragment((1,), "float32")
        total, own = T.alloc_fragment((1,), "float32"), T.alloc_fragment((1,), "float32")
        T.fill(so_far, 5)
        T.fill(total, 7)
        for r in T.Pipelined(M, num_stages=stages):
            T.copy(A[r, block * N], tile)
            T.copy(tile, x)
            T.reduce_sum(x, own, dim=0)
            for i in T.Parallel(1):
                so_far[i] += own[i]
                total[i] = own[i]
            T.cluster_reduce(total)
            T.copy(total, B[block, r])
            for i in T.Parallel(1):
                C[block, r + i] = total[i] + so_far[i]
        T.copy(total, LAST[block, 0])
        T.copy(so_far, LAST[block, 1])


@pytest.mark.parametrize("M", [0, 1, 2, 6])
def test_sums_that_run_ahead_and_are_read_late(hopper, rng, M):
    a = rng.integers(-9, 10, (max(M, 1), 34)).astype(np.float32)
    f = np.float32
    out = [((2, max(M, 1)), f), ((2, max(M, 1)), f), ((2, 2), f)]
    b, c, last = hopper(counting, a, out=out, M=M)
    halves = a[:M].reshape(M, 2, 17).sum(2).T
    assert M == 0 or (b == halves.sum(0)).all()
    assert M == 0 or (c == halves.sum(0) + 5 + halves.cumsum(1)).all()
    assert (last[:, 0] == (halves.sum(0)[-1] if M else 7)).all()
    assert (last[:, 1] == 5 + halves.sum(1)).all()
    text = explained(counting, (6, 34), (2, 6), (2, 6), (2, 2)).explain()
    assert f"{OVERLAP} total" in text


def test_registers_that_are_used_again_after_the_exchange(hopper, rng):
    """What stands there must not run ahead, though it needs no result."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, stages=3):
        M, N = A.shape[0], A.shape[1] // 2
        with T.Kernel(2, threads=32, cluster=2) as block:
            one, two = T.alloc_shared((N,), "float32"), T.alloc_shared((N,), "float32")
            x, total = T.alloc_fragment((N,), "float32"), T.alloc_fragment((1,), "float32")
            for r in T.Pipelined(M, num_stages=stages):
                T.copy(A[r, block * N], one)
                T.copy(A[M - 1 - r, block * N], two)
                T.copy(one, x)
                T.reduce_sum(x, total, dim=0)
                T.cluster_reduce(total)
                for j in T.Parallel(N):
                    B[r, block * N + j] = x[j] * total[0]
                T.copy(two, x)
                T.copy(x, C[r, block * N])

    a = rng.integers(-9, 10, (6, 66)).astype(np.float32)
    b, c = hopper(kernel, a, out=[(a.shape, a.dtype)] * 2)
    assert (b == a * a.sum(1, keepdims=True)).all() and (c == a[::-1]).all()
    assert f"{OVERLAP} total" in explained(kernel, a.shape, a.shape, a.shape).explain()


@tilejit
def spread(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, blocks=4, stages=3):
    """B = A less the least of its row, C = the sum of that: the second exchange needs the first."""
    M, N = A.shape
    part = N // blocks
    with T.Kernel(blocks, threads=32, cluster=blocks) as block:
        tile = T.alloc_shared((part,), "float32")
        x = T.alloc_fragment((part,), "float32")
        least, total = T.alloc_fragment((1,), "float32"), T.alloc_fragment((1,), "float32")
        for r in T.Pipelined(M, num_stages=stages):
            T.copy(A[r, block * part], tile)
            T.copy(tile, x)
            T.reduce_min(x, least, dim=0)
            T.cluster_reduce(least, "min")
            for j in T.Parallel(part):
                x[j] = tile[j] - least[0]
            T.copy(x, B[r, block * part])
            T.reduce_sum(x, total, dim=0)
            T.cluster_reduce(total)
            T.copy(total, C[block, r])


@pytest.mark.parametrize("M", [1, 2, 9])
def test_two_exchanges_of_which_one_needs_the_other(hopper, rng, M):
    a = rng.integers(-9, 10, (M, 68)).astype(np.float32)
    b, c = hopper(spread, a, out=[(a.shape, a.dtype), ((4, M), a.dtype)])
    assert (b == a - a.min(1, keepdims=True)).all()
    assert (c == (a - a.min(1, keepdims=True)).sum(1)).all()
    text = explained(spread, (9, 68), (9, 68), (4, 9)).explain()
    assert f"{OVERLAP} least, total" in text


def test_two_exchanges_side_by_side(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, stages=3):
        M, N = A.shape[0], A.shape[1] // 2
        with T.Kernel(2, threads=32, cluster=2) as block:
            tile = T.alloc_shared((N,), "float32")
            x = T.alloc_fragment((N,), "float32")
            least, most = T.alloc_fragment((1,), "float32"), T.alloc_fragment((1,), "float32")
            for r in T.Pipelined(M, num_stages=stages):
                T.copy(A[r, block * N], tile)
                T.copy(tile, x)
                T.reduce_min(x, least, dim=0)
                T.cluster_reduce(least, "min")
                T.reduce_max(x, most, dim=0)  # between the two, and apart from the first
                T.cluster_reduce(most, "max")
                for i in T.Parallel(1):
                    B[block, r] = least[i] * most[i]
                T.copy(tile, C[r, block * N])

    a = rng.integers(-9, 10, (9, 66)).astype(np.float32)
    b, c = hopper(kernel, a, out=[((2, 9), a.dtype), (a.shape, a.dtype)])
    assert (b == a.min(1) * a.max(1)).all() and (c == a).all()
    kernel = explained(kernel, (9, 66), (2, 9), (9, 66))
    assert f"{OVERLAP} least, most" in kernel.explain()
    body = kernel.source.split("while ")[1].split("is_true")[0]
    names = ["send_min_least", "send_max_most", "take_min_least", "take_max_most"]
    assert sorted(names, key=body.index) == names


@tilejit
def scaled(A: T.Tensor, S: T.Tensor, B: T.Tensor, SPREAD: T.Tensor, *, stages=3, blocks=2):
    """B = A * S / sum(A * S) along rows; SPREAD = the same of A times the row's last element that
    the block has: tiles that come asynchronously, by the block's threads, and that it makes."""
    M, N = A.shape
    part = N // blocks
    with T.Kernel(blocks, threads=32, cluster=blocks) as block:
        tile, own = T.alloc_shared((part,), A.dtype), T.alloc_shared((part,), "float32")
        s = T.alloc_shared((1,), S.dtype)
        x, total = T.alloc_fragment((part,), "float32"), T.alloc_fragment((1,), "float32")
        for r in T.Pipelined(M, num_stages=stages):
            T.copy(A[r, block * part], tile)
            T.copy(S[r], s)
            for j in T.Parallel(part):
                own[j] = tile[j] * s[0]
            T.copy(own, x)
            T.reduce_sum(x, total, dim=0)
            T.cluster_reduce(total)
            for j in T.Parallel(part):
                B[r, block * part + j] = tile[j] * s[0] / total[0]
            for j in T.Parallel(part):
                SPREAD[r, block * part + j] = own[j] * own[part - 1] / total[0]


@pytest.mark.parametrize("M", [1, 2, 3, 8])
def test_tiles_of_all_kinds(hopper, rng, M):
    a = rng.integers(1, 9, (M, 66)).astype(np.float32)
    s = rng.integers(1, 9, M).astype(np.float16)
    b, spread = hopper(scaled, a, s, out=[(a.shape, a.dtype)] * 2)
    own = a.astype(np.float64) * s[:, None]
    total = own.sum(1, keepdims=True)
    np.testing.assert_allclose(b, own / total, rtol=1e-6)
    last = own.reshape(M, 2, 33)[:, :, -1].repeat(33, axis=1)
    np.testing.assert_allclose(spread, own * last / total, rtol=1e-6)
    specs = (T.Tensor((8, 66), "float32"), T.Tensor((8,), "float16"))
    kernel = scaled.compile(*specs, specs[0], specs[0], target="sm_90a")
    assert f"{OVERLAP} total, with two of s, own" in kernel.explain()
    assert "3 slots of tile" in kernel.explain()


@tilejit
def keeping(A: T.Tensor, B: T.Tensor, LAST: T.Tensor, *, reads_last=False, stages=3):
    """B = the sum of the rows so far, times the sum of the row; LAST = the last row, or nothing."""
    M, N = A.shape[0], A.shape[1] // 2
    with T.Kernel(2, threads=32, cluster=2) as block:
        tile, keep = T.alloc_shared((N,), A.dtype), T.alloc_shared((N,), "float32")
        x, total = T.alloc_fragment((N,), "float32"), T.alloc_fragment((1,), "float32")
        for r in T.Pipelined(M, num_stages=stages):
            T.copy(A[r, block * N], tile)
            T.copy(tile, x)
            if r == 0:
                T.clear(keep)
            for j in T.Parallel(N):
                keep[j] += tile[j]
            T.reduce_sum(x, total, dim=0)
            T.cluster_reduce(total)
            for j in T.Parallel(N):
                B[r, block * N + j] = keep[j] * total[0] + 0 * tile[j]
        if reads_last:
            T.copy(tile, x)
            T.copy(x, LAST[0, block * N])


@pytest.mark.parametrize("reads_last", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tiles_that_keep_something_are_one(hopper, rng, dtype, reads_last):
    a = rng.integers(-9, 10, (6, 66)).astype(dtype)
    out = [((6, 66), np.float32), ((1, 66), np.float32)]
    b, last = hopper(keeping, a, out=out, reads_last=reads_last)
    assert (b == a.astype(np.float64).cumsum(0) * a.sum(1, dtype=np.float64, keepdims=True)).all()
    assert (last == a[-1:]).all() or not reads_last
    specs = (T.Tensor((6, 66), dtype), T.Tensor((6, 66), "float32"), T.Tensor((1, 66), "float32"))
    text = keeping.compile(*specs, target="sm_90a", reads_last=reads_last).explain()
    assert (OVERLAP in text) != reads_last and "keep" not in text.partition("two of")[2]


def test_tiles_that_roles_read_are_one(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, LAST: T.Tensor, *, stages=3):
        M, N = A.shape[0], A.shape[1] // 2
        with T.Kernel(2, threads=256, cluster=2) as block:
            tile = T.alloc_shared((N,), "float16")
            x, total = T.alloc_fragment((N,), "float32"), T.alloc_fragment((1,), "float32")
            for r in T.Pipelined(M, num_stages=stages):
                T.copy(A[r, block * N], tile)
                T.copy(tile, x)
                T.reduce_sum(x, total, dim=0)
                T.cluster_reduce(total)
                for j in T.Parallel(N):
                    B[r, block * N + j] = tile[j] * total[0]
            with T.ws(1):
                T.copy(tile, LAST[0, block * N])

    a = rng.integers(-9, 10, (5, 66)).astype(np.float16)
    b, last = hopper(kernel, a, out=[((5, 66), np.float32), ((1, 66), np.float16)])
    assert (b == a * a.sum(1, dtype=np.float64, keepdims=True)).all() and (last == a[-1:]).all()
    specs = T.Tensor(a.shape, "float16"), T.Tensor((5, 66), "float32"), T.Tensor((1, 66), "float16")
    text = kernel.compile(*specs, target="sm_90a").explain()
    assert "threads in other roles use tile" in text


@tilejit
def noting(A: T.Tensor, B: T.Tensor, P: T.Tensor, *, how, stages=3):
    """P: what runs ahead notes of each row; B: that, and the row's sum over both blocks."""
    M, N = A.shape[0], A.shape[1] // 2
    with T.Kernel(2, threads=32, cluster=2) as block:
        tile = T.alloc_shared((N,), A.dtype)
        x, y = T.alloc_fragment((N,), "float32"), T.alloc_fragment((N,), "float32")
        total, rows = T.alloc_fragment((1,), "float32"), T.alloc_var("int32", init=0)
        for r in T.Pipelined(M, num_stages=stages):
            T.copy(A[r, block * N], tile)
            T.copy(tile, x)
            if how == "in part":  # what is not written stays undefined, and is not read
                for j in T.Parallel(N):
                    if j % 3 != 1:
                        y[j] = x[j]
                for j in T.Parallel(N):
                    x[j] = T.if_then_else(j % 3 != 1, y[j], 0)
            elif how == "row before" and r > 0:
                for j in T.Parallel(N):
                    x[j] += P[r - 1, block * N + j]
            elif how == "count":
                rows = rows + 1
            if how != "row before":
                for j in T.Parallel(N):
                    P[r, block * N + j] = x[j] + 1
            T.reduce_sum(x, total, dim=0)
            T.cluster_reduce(total)
            if how == "row before":
                for j in T.Parallel(N):
                    P[r, block * N + j] = x[j]
            for j in T.Parallel(N):
                B[r, block * N + j] = P[r, block * N + N - 1 - j] * total[0] + rows


@pytest.mark.parametrize("M", [1, 6])
@pytest.mark.parametrize("how, overlaps", [
    ("plain", True), ("in part", True), ("count", True), ("row before", False),
])  # fmt: skip
def test_tensors_that_one_part_writes_and_the_other_reads(hopper, rng, how, overlaps, M):
    a = rng.integers(-3, 4, (M, 66)).astype(np.float32)
    b, p = hopper(noting, a, out=[(a.shape, a.dtype)] * 2, how=how)
    x = a.astype(np.float64)
    if how == "in part":
        x = x * (np.arange(66) % 33 % 3 != 1)
    elif how == "row before":
        x = x.cumsum(0)
    noted = x + (how != "row before")
    backwards = noted.reshape(M, 2, 33)[:, :, ::-1].reshape(M, 66)
    rows = np.arange(1, M + 1)[:, None] if how == "count" else 0
    assert (p == noted).all() and (b == backwards * x.sum(1, keepdims=True) + rows).all()
    text = explained(noting, (6, 66), (6, 66), (6, 66), how=how).explain()
    assert (OVERLAP in text) == overlaps


@pytest.mark.parametrize("executor", ["reference", "simulator"])
@pytest.mark.parametrize("keeps", [False, True])
def test_rows_that_are_centred_in_place(executor, rng, keeps):
    """What the kernel writes is not brought ahead of that."""
    a = rng.integers(-9, 10, (7, 38)).astype(np.float32)
    wanted = a - a.astype(np.float64).mean(1, keepdims=True)
    sums, total = np.full((2, 38), np.nan, np.float32), [a[::2].sum(0), a[1::2].sum(0)]
    with use_executor(executor), options(target="sm_90a"):
        centred(a, a, sums, keeps=keeps)
    np.testing.assert_allclose(a, wanted, atol=1e-5)
    assert (sums == total).all()


# ---- where rounds must stay one after the other --------------------------------------------------


@tilejit
def waiting(A: T.Tensor, B: T.Tensor, *, how, stages=3, N=40):
    """B[block, r] = what the blocks' numbers of row r become."""
    M = A.shape[0]
    with T.Kernel(2, threads=32, cluster=2) as block:
        tile = T.alloc_shared((N,), "float32")
        x, total = T.alloc_fragment((N,), "float32"), T.alloc_fragment((1,), "float32")
        keep = T.alloc_shared((1,), "float32")
        large = T.alloc_fragment((16 * N,), "float32")
        T.clear(total)
        T.clear(keep)
        for r in T.Pipelined(M, num_stages=stages):
            T.copy(A[r, block * N], tile)
            T.copy(tile, x)
            if how == "carried":  # each row starts with the result of the one before
                T.reduce_sum(x, total, dim=0, clear=False)
                T.cluster_reduce(total)
            elif how == "memory":  # the same through shared memory
                T.reduce_sum(x, total, dim=0)
                for i in T.Parallel(1):
                    total[i] += keep[i]
                T.cluster_reduce(total)
                T.copy(total, keep)
            elif how == "branch":
                T.reduce_sum(x, total, dim=0)
                if r % 2 == 0:
                    T.cluster_reduce(total)
            elif how == "loop":
                T.reduce_sum(x, total, dim=0)
                for _ in range(2):
                    T.cluster_reduce(total)
            elif how == "large":
                for i in T.Parallel(16 * N):
                    large[i] = tile[i % N]
                T.cluster_reduce(large)
                T.reduce_sum(large, total, dim=0)
            else:
                T.reduce_sum(x, total, dim=0)
                T.cluster_reduce(total)
                T.sync_threads()
            T.copy(total, B[block, r])


REASONS = {
    "carried": "what they send depends on what they give, or both use the same memory",
    "memory": "what they send depends on what they give, or both use the same memory",
    "branch": "they stand in a branch or loop, or their tiles are large",
    "loop": "they stand in a branch or loop, or their tiles are large",
    "large": "they stand in a branch or loop, or their tiles are large",
    "meeting": "it orders asynchronous work or threads itself",
}


@pytest.mark.parametrize("how", REASONS)
def test_rounds_that_wait(hopper, rng, how):
    a = rng.integers(-3, 4, (7, 80)).astype(np.float32)
    b = hopper(waiting, a, out=[((2, 7), a.dtype)], how=how)
    halves = a.reshape(7, 2, 40).sum(2).T
    if how in ("carried", "memory"):
        before, wanted = 0.0, []
        for own in halves.T:
            before = own.sum() + 2 * before
            wanted.append(before)
        assert (b == wanted).all()
    elif how == "branch":
        odd = np.arange(7) % 2 == 1
        assert (b == np.where(odd, halves, halves.sum(0))).all()
    else:
        assert (b == halves.sum(0) * {"loop": 2, "large": 16}.get(how, 1)).all()
    text = explained(waiting, (7, 80), (2, 7), how=how).explain()
    assert OVERLAP not in text
    assert f"rounds wait for exchanges of {'large' if how == 'large' else 'total'}" in text
    assert REASONS[how] in text


def test_a_loop_in_a_loop_overlaps_each_time(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, *, stages=3):
        L, M, N = A.shape[0], A.shape[1], A.shape[2] // 2
        with T.Kernel(2, threads=32, cluster=2) as block:
            tile = T.alloc_shared((N,), "float32")
            x, total = T.alloc_fragment((N,), "float32"), T.alloc_fragment((1,), "float32")
            for k in range(L):
                for r in T.Pipelined(M - k, num_stages=stages):
                    T.copy(A[k, r, block * N], tile)
                    T.copy(tile, x)
                    T.reduce_sum(x, total, dim=0)
                    T.cluster_reduce(total)
                    for j in T.Parallel(N):
                        B[k, r, block * N + j] = tile[j] * total[0]
                if M - k < 4:
                    T.fill(x, k)
                    T.copy(x, B[k, M - k, block * N])

    a = rng.integers(-9, 10, (5, 4, 66)).astype(np.float32)
    b = hopper(kernel, a, out=[(a.shape, a.dtype)])
    for k in range(5):
        assert (b[k, : 4 - k] == a[k, : 4 - k] * a[k, : 4 - k].sum(1, keepdims=True)).all()
        assert k == 0 or k == 4 or (b[k, 4 - k] == k).all()
    assert f"{OVERLAP} total" in explained(kernel, a.shape, a.shape).explain()


# ---- slots ---------------------------------------------------------------------------------------


def test_blocks_that_are_ahead_need_four_slots():
    """Of any two sends that must not use one slot: those that may happen while a block has not
    taken the first. Blocks take turns in every possible way."""
    for slots in range(2, 6):
        assert overwritten(slots) == (slots < exchange.AHEAD_SLOTS)


def overwritten(slots, rounds=7):
    """Whether any order in which two blocks run sends into a slot that one still has to take."""
    program = ["send"] + ["send", "take"] * (rounds - 1) + ["take"]
    seen, waiting = set(), [(0, 0)]
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        sent = [program[:place].count("send") for place in state]
        taken = [program[:place].count("take") for place in state]
        if max(sent) - min(taken) > slots:
            return True
        for block, place in enumerate(state):
            if place == len(program):
                continue
            if program[place] == "send" or min(sent) > taken[block]:
                waiting.append((*state[:block], place + 1, *state[block + 1 :]))
    return False
