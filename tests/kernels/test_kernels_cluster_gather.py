"""Tiles that blocks of a cluster bring together: dtypes, shapes, layouts, loops, and what is
refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.errors import (
    ArgumentError,
    DTypeError,
    ShapeError,
    SimulationError,
    TraceError,
    UnsupportedError,
)


@tilejit
def gathering(
    A: T.Tensor, C: T.Tensor, *, blocks=4, rows=1, source="fragment", target="fragment", threads=64
):
    """C[b] = the tiles of all blocks of b's cluster, side by side."""
    make = {"fragment": T.alloc_fragment, "shared": T.alloc_shared}
    with T.Kernel(A.shape[0] // rows, threads=threads, cluster=blocks) as block:
        own = make[source](A.shape[1:], A.dtype)
        all_ = make[target]((*A.shape[1:], blocks), A.dtype)
        for r in range(rows):
            at = block // blocks * blocks * rows + r * blocks + block % blocks
            T.copy(A[at, 0, 0], own)
            T.cluster_gather(own, all_)
            T.copy(all_, C[at, 0, 0, 0])


def expected(a, blocks):
    """Of groups of `blocks` tiles."""
    groups = np.moveaxis(a.reshape(-1, blocks, *a.shape[1:]), 1, -1)
    return groups.repeat(blocks, axis=0)


def run(hopper, a, blocks=4, **knobs):
    """All blocks' results, bit by bit as they are."""
    c = hopper(gathering, a, out=[((*a.shape, blocks), a.dtype)], blocks=blocks, **knobs)
    assert c.tobytes() == expected(a, blocks).tobytes()


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 8])
def test_each_block_has_all_tiles(hopper, rng, blocks):
    run(hopper, rng.standard_normal((2 * blocks, 3, 20)).astype(np.float32), blocks)


@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float8_e4m3fn", "float64", "int8", "uint16", "int32", "uint64",
     "bool"],
)  # fmt: skip
def test_any_bits_come_as_they_are(hopper, rng, dtype):
    """NaNs with their payloads, negative zeros and numbers."""
    dtype = T.dtype(dtype)
    raw = rng.integers(0, 2 if dtype.is_bool else 256, (4, 1, 33 * dtype.bits // 8), np.uint8)
    run(hopper, raw.view(dtype.numpy))


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (2, 65), (5, 7), (128, 3)])
@pytest.mark.parametrize(
    "source, target", [("fragment", "fragment"), ("shared", "fragment"), ("fragment", "shared"),
                       ("shared", "shared")],
)  # fmt: skip
def test_tiles_of_any_shape_in_either_memory(hopper, rng, shape, source, target):
    a = rng.integers(-9, 10, (4, *shape)).astype(np.float32)
    run(hopper, a, 2, source=source, target=target)


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_a_loop_uses_the_same_memory_again(hopper, rng, rows):
    run(hopper, rng.integers(-9, 10, (8 * rows, 1, 5)).astype(np.int32), rows=rows)


@pytest.mark.parametrize("source, target", [("shared", "shared"), ("fragment", "fragment")])
def test_slices_and_a_block_alone(hopper, rng, source, target):
    """Without clusters it is a copy."""
    make = {"fragment": T.alloc_fragment, "shared": T.alloc_shared}

    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, *, blocks=2):
        with T.Kernel(A.shape[0], threads=32, cluster=blocks) as block:
            own = make[source]((2, 24), "float32")
            all_ = make[target]((3, 24, blocks), "float32")
            T.clear(all_)
            T.copy(A[block, 0], own[1, :])
            T.cluster_gather(own[1, :], all_[2, :, :])
            T.copy(all_, C[block, 0, 0, 0])

    a = rng.standard_normal((4, 24)).astype(np.float32)
    for blocks in (1, 2):
        c = hopper(kernel, a, out=[((4, 3, 24, blocks), np.float32)], blocks=blocks)
        assert (c[:, 2] == expected(a, blocks)).all()
        assert not c[:, :2].any()


def test_what_reduces_and_what_gathers_share_a_meeting(hopper, rng):
    """Neighbours send before any waits; one that sends what another makes does not."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor, *, rows=3):
        with T.Kernel(4, threads=32, cluster=2) as block:
            a, b = T.alloc_fragment((8,), "float32"), T.alloc_fragment((8,), "float32")
            both = T.alloc_fragment((8, 2), "float32")
            sums = T.alloc_fragment((8, 2), "float32")
            for r in range(rows):
                at = block // 2 * 2 * rows + 2 * r + block % 2
                T.copy(A[at, 0], a)
                T.copy(A[at, 0], b)
                T.cluster_gather(a, both)
                T.cluster_reduce(a)  # of what the block had
                T.cluster_reduce(b, "max")
                T.cluster_gather(a, sums)  # of what the one before gave
                T.copy(both, B[at, 0, 0])
                T.copy(sums, C[at, 0, 0])
                T.copy(b, D[at, 0])

    a = rng.integers(-9, 10, (12, 8)).astype(np.float32)
    wide = (12, 8, 2)
    b, c, d = hopper(kernel, a, out=[(wide, a.dtype), (wide, a.dtype), (a.shape, a.dtype)])
    pairs = expected(a, 2)
    assert (b == pairs).all()
    assert (c == pairs.sum(-1, keepdims=True)).all()
    assert (d == pairs.max(-1)).all()
    flat, deep = T.Tensor(a.shape, "float32"), T.Tensor(wide, "float32")
    compiled = kernel.compile(flat, deep, deep, flat, target="sm_90a")
    calls = re.findall(r"^ +(?:\w+ = )?(cluster_(?!wait)\w+)\(", compiled.source, re.M)
    assert calls == ["cluster_send_a_both", "cluster_send_sum_a", "cluster_send_max_b",
                     "cluster_take_a_both", "cluster_take_sum_a", "cluster_take_max_b",
                     "cluster_gather_a_sums"]  # fmt: skip


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_statistics_of_rows_longer_than_a_block(hopper, rng, blocks):
    """Layouts follow from the block's own values: what is gathered is used beside them, and reduced
    without leaving registers."""

    @tilejit
    def kernel(A: T.Tensor, V: T.Tensor, W: T.Tensor, *, blocks=4, BM=2):
        M, N = A.shape
        part = N // blocks
        with T.Kernel(T.ceildiv(M, BM) * blocks, threads=64, cluster=blocks) as block:
            row, rank = block // blocks * BM, T.block_rank_in_cluster()
            x = T.alloc_fragment((BM, part), "float32")
            own = T.alloc_fragment((BM,), "float32")
            mean, spread = T.alloc_fragment((BM,), "float32"), T.alloc_fragment((BM,), "float32")
            means = T.alloc_fragment((BM, blocks), "float32")
            off = T.alloc_fragment((BM, blocks), "float32")
            T.copy(A[row, rank * part], x)
            T.reduce_sum(x, own, dim=1)
            T.cluster_gather(own, means)
            T.reduce_sum(means, mean, dim=1)
            for i, c in T.Parallel(BM, blocks):
                off[i, c] = T.abs(means[i, c] - own[i])
            T.reduce_max(off, spread, dim=1)
            if rank == blocks - 1:
                T.copy(mean, V[row])
                T.copy(spread, W[row])

    a = rng.integers(-9, 10, (5, 24 * blocks)).astype(np.float32)
    v, w = hopper(kernel, a, out=[((5,), np.float32)] * 2, blocks=blocks)
    sums = a.reshape(5, blocks, 24).sum(2)
    assert (v == sums.sum(1)).all()
    assert (w == np.abs(sums - sums[:, -1:]).max(1)).all()
    specs = [T.Tensor(s, "float32") for s in (a.shape, (5,), (5,))]
    text = kernel.compile(*specs, blocks=blocks, target="sm_90a").explain()
    assert f"reduce_sum means -> mean: {blocks} registers a result\n" in text
    assert "goes through shared memory" not in text


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_rows_that_are_brought_meanwhile(hopper, rng, rows, stages):
    """Two exchanges a round beside copies that run ahead: each row less the mean of its blocks'
    greatest elements, and how many of the blocks' sums are beneath their mean."""

    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, D: T.Tensor, *, stages=2):
        M, N = A.shape
        with T.Kernel(4, threads=32, cluster=4) as rank:
            tile, x = T.alloc_shared((N // 4,), "float32"), T.alloc_fragment((N // 4,), "float32")
            most, total = T.alloc_fragment((1,), "float32"), T.alloc_fragment((1,), "float32")
            mosts = T.alloc_fragment((1, 4), "float32")
            totals = T.alloc_fragment((1, 4), "float32")
            mean, count = T.alloc_fragment((1,), "float32"), T.alloc_fragment((1,), "int32")
            less = T.alloc_fragment((1, 4), "int32")
            for row in T.Pipelined(M, num_stages=stages):
                T.copy(A[row, rank * (N // 4)], tile)
                T.copy(tile, x)
                T.reduce_max(x, most, dim=0)
                T.reduce_sum(x, total, dim=0)
                T.cluster_gather(most, mosts)
                T.cluster_gather(total, totals)
                T.reduce_sum(mosts, mean, dim=1)
                T.cluster_reduce(total)
                for i, c in T.Parallel(1, 4):
                    less[i, c] = T.if_then_else(totals[i, c] * 4 < total[i], 1, 0)
                T.reduce_sum(less, count, dim=1)
                for j in T.Parallel(N // 4):
                    C[row, rank * (N // 4) + j] = x[j] - mean[0] / 4
                T.copy(count, D[row, rank])

    a = rng.integers(-9, 10, (rows, 256)).astype(np.float32)
    out = [(a.shape, np.float32), ((rows, 4), np.int32)]
    c, d = hopper(kernel, a, out=out, stages=stages)
    parts = a.reshape(rows, 4, 64)
    assert (c == a - parts.max(2).mean(1, keepdims=True)).all()
    sums = parts.sum(2)
    beneath = (4 * sums < sums.sum(1, keepdims=True)).sum(1, keepdims=True)
    assert (d == beneath).all()


def test_layouts_that_something_else_decides(hopper, rng):
    """Each thread takes what it holds, wherever that is."""

    @tilejit
    def kernel(A: T.Tensor, W: T.Tensor, C: T.Tensor):
        with T.Kernel(A.shape[0], threads=64, cluster=4) as block:
            own = T.alloc_fragment((16,), "float32")
            weights, all_ = (T.alloc_fragment((16, 4), "float32") for _ in range(2))
            T.copy(A[block, 0], own)
            T.copy(W, weights)  # an element in each thread
            for i, c in T.Parallel(16, 4):
                weights[i, c] += 1
            T.cluster_gather(own, all_)
            for i, c in T.Parallel(16, 4):
                C[block, i, c] = all_[i, c] * weights[i, c]

    a = rng.integers(-9, 10, (4, 16)).astype(np.float32)
    w = rng.integers(-9, 10, (16, 4)).astype(np.float32)
    c = hopper(kernel, a, w, out=[((4, 16, 4), np.float32)])
    assert (c == expected(a, 4) * (w + 1)).all()
    specs = (T.Tensor(x.shape, "float32") for x in (a, w, c))
    assert kernel.compile(*specs, target="sm_90a").ptx.count("ld.shared") == 1


def test_more_than_a_thread_has_registers_for(hopper, rng):
    """Columns of a product: a thread has 64 of 256; of 8 blocks that would be 512 registers."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(A.shape[0], threads=128, cluster=8) as block:
            a, b = T.alloc_shared((64, 16), "float16"), T.alloc_shared((16, 256), "float16")
            acc = T.alloc_fragment((64, 256), "float32")
            own = T.alloc_fragment((256,), "float32")
            all_ = T.alloc_fragment((256, 8), "float32")
            T.copy(A[block, 0, 0], a)
            T.copy(B, b)
            T.clear(acc)
            T.gemm(a, b, acc)
            T.reduce_sum(acc, own, dim=0)
            T.cluster_gather(own, all_)
            T.copy(all_, C[block, 0, 0])

    a = rng.integers(-2, 3, (8, 64, 16)).astype(np.float16)
    b = rng.integers(-2, 3, (16, 256)).astype(np.float16)
    c = hopper(kernel, a, b, out=[((8, 256, 8), np.float32)])
    sums = (a.astype(np.float64) @ b.astype(np.float64)).sum(1)
    assert (c == expected(sums, 8)).all()
    specs = (T.Tensor(x.shape, str(x.dtype)) for x in (a, b, c))
    assert kernel.compile(*specs, target="sm_90a").resources.spill_bytes == 0


def test_in_a_branch_that_all_blocks_of_a_cluster_take(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(A.shape[0], threads=32, cluster=2) as block:
            own, all_ = T.alloc_fragment((8,), "int32"), T.alloc_fragment((8, 2), "int32")
            T.copy(A[block, 0], own)
            T.fill(all_, 7)
            if block >= 2:
                T.cluster_gather(own, all_)
            T.copy(all_, C[block, 0, 0])

    a = rng.integers(-9, 10, (6, 8)).astype(np.int32)
    c = hopper(kernel, a, out=[((6, 8, 2), a.dtype)])
    want = expected(a, 2)
    want[:2] = 7
    assert (c == want).all()


def test_what_it_becomes():
    source, target = T.Tensor((8, 1, 64), "float32"), T.Tensor((8, 1, 64, 8), "float32")
    kernel = gathering.compile(source, target, blocks=8, target="sm_90a")
    assert "cluster_gather own -> all_: 8 blocks through shared memory" in kernel.explain()
    assert "T.cluster_gather(own, all_)" in str(kernel.graph)
    # an element for each block, and two loads of four
    assert kernel.ptx.count("st.async.shared::cluster") == 8
    assert kernel.ptx.count("ld.shared.v4") == 2
    ptx = kernel.ptx
    places = [ptx.index(w) for w in ("cluster.arrive.relaxed", "ld.global", "cluster.wait")]
    assert places == sorted(places) and "cluster.arrive.release" not in ptx
    target = T.Tensor((8, 1, 64, 1), "float32")
    assert "cluster" not in gathering.compile(source, target, blocks=1, target="sm_90a").ptx


def test_clusters_of_sixteen_where_the_chip_has_them():
    specs = T.Tensor((32, 1, 40), "float16"), T.Tensor((32, 1, 40, 16), "float16")
    kernel = gathering.compile(*specs, blocks=16, target="sm_90a")
    assert "reqnctapercluster 16" in kernel.ptx and kernel.resources.spill_bytes == 0
    with pytest.raises(UnsupportedError, match=r"a cluster of 16 blocks; sm_120a runs up to 8"):
        gathering.compile(*specs, blocks=16, target="sm_120a")


# ---- what is refused -----------------------------------------------------------------------------


def compiled(body, target="sm_90a", cluster=2, shape=(64, 2), dtype="float32"):
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128, cluster=cluster):
            own = T.alloc_fragment((64,), "float32")
            all_ = T.alloc_fragment(shape, dtype)
            T.clear(own)
            body(own, all_, A)

    return kernel.compile(T.Tensor((64, 2), "float32"), target=target)


@T.macro
def gather(own, all_, A):
    T.cluster_gather(own, all_)


@T.macro
def to_global(own, all_, A):
    T.cluster_gather(own, A)


@T.macro
def of_global(own, all_, A):
    T.cluster_gather(A, all_)


@T.macro
def of_an_element(own, all_, A):
    T.cluster_gather(own[0], all_)


@T.macro
def in_a_branch(own, all_, A):
    with T.If(T.get_thread_binding() < 3), T.Then():
        T.cluster_gather(own, all_)


@T.macro
def in_a_role(own, all_, A):
    with T.ws(0):
        mine, both = T.alloc_fragment((64,), "float32"), T.alloc_fragment((64, 2), "float32")
        T.clear(mine)
        T.cluster_gather(mine, both)


@T.macro
def in_a_loop(own, all_, A):
    for _ in T.Parallel(64):
        T.cluster_gather(own, all_)


@pytest.mark.parametrize(
    "body, words",
    [
        (in_a_branch, "T.cluster_gather needs all threads of the block, but it stands in a branch"),
        (in_a_role, "T.cluster_gather needs all threads of the block, but it stands in a T.ws"),
        (in_a_loop, "T.cluster_gather is not allowed inside T.Parallel"),
    ],
)
def test_where_it_must_not_stand(body, words):
    with pytest.raises(TraceError, match=words):
        compiled(body)


def test_outside_a_kernel():
    with pytest.raises(TraceError, match=r"T\.cluster_gather is only allowed inside"):
        T.cluster_gather(None, None)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("shape", [(64,), (2, 64), (64, 3), (63, 2), (64, 2, 1)])
def test_shapes_that_do_not_fit(shape, cluster):
    blocks = "1 block" if cluster == 1 else "2 blocks"
    words = (
        rf"T\.cluster_gather: `own` is 64 in each of {blocks} of a cluster, so the destination is "
        rf"64x{cluster}, but `all_` is {'x'.join(map(str, shape))}\."
    )
    with pytest.raises(ShapeError, match=words) as found:
        compiled(gather, shape=shape, cluster=cluster)
    assert "T.cluster_gather(own, all_)" in str(found.value)  # the user's line


def test_chips_dtypes_and_memory_that_cannot():
    with pytest.raises(UnsupportedError, match="cluster needs"):
        compiled(gather, target="sm_80")
    with pytest.raises(DTypeError, match="`own` is float32, but `all_` is float16"):
        compiled(gather, dtype="float16")
    with pytest.raises(ArgumentError, match="the destination is in global memory") as found:
        compiled(to_global)
    assert "Gather to a fragment, and copy that with T.copy." in str(found.value)
    with pytest.raises(ArgumentError, match=r"the source is in global memory"):
        compiled(of_global)
    with pytest.raises(ShapeError, match="the source is one element of `own`"):
        compiled(of_an_element)


def test_blocks_that_do_not_come_are_found(executor):
    if executor == "gpu":
        pytest.skip("the blocks would wait for ever")

    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=32, cluster=2) as block:
            own, all_ = T.alloc_fragment((8,), "float32"), T.alloc_fragment((8, 2), "float32")
            T.copy(A, own)
            if block == 0:
                T.cluster_gather(own, all_)
            T.copy(own, A)

    with options(target="sm_90a"), pytest.raises(SimulationError):
        kernel(np.ones(8, np.float32))
