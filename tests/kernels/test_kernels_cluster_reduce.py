"""Tiles that the blocks of a cluster combine: kinds, dtypes, shapes, loops, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.errors import DTypeError, SimulationError, TraceError, UnsupportedError

COMBINE = {"sum": np.add, "max": np.fmax, "min": np.fmin, "bitand": np.bitwise_and,
           "bitor": np.bitwise_or, "bitxor": np.bitwise_xor}  # fmt: skip


@tilejit
def combining(
    A: T.Tensor, C: T.Tensor, *, op="sum", blocks=4, rows=1, scope="fragment", nan=False, threads=64
):
    """C[b] = the tiles of b's cluster combined: each block has its own tile and keeps its own
    result."""
    with T.Kernel(A.shape[0] // rows, threads=threads, cluster=blocks) as block:
        make = {"fragment": T.alloc_fragment, "shared": T.alloc_shared}[scope]
        tile = make(A.shape[1:], A.dtype)
        for r in range(rows):
            at = block // blocks * blocks * rows + r * blocks + block % blocks
            T.copy(A[at, 0, 0], tile)
            T.cluster_reduce(tile, op, nan_propagate=nan)
            T.copy(tile, C[at, 0, 0])


def expected(a, op, blocks):
    """Of groups of `blocks` tiles, in float64 or in integers that wrap."""
    wide = a.astype(np.float64) if a.dtype.kind not in "iub" else a
    if op.startswith("abs"):
        wide, op = np.abs(wide), op[3:]
    groups = wide.reshape(-1, blocks, *a.shape[1:])
    result = COMBINE[op].reduce(groups, axis=1, keepdims=True)
    return np.broadcast_to(result, groups.shape).reshape(a.shape).astype(a.dtype)


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("op", ["sum", "abssum", "max", "min", "absmax"])
def test_floats_of_all_blocks_are_combined(hopper, rng, op, blocks):
    a = rng.integers(-9, 10, (2 * blocks, 3, 40)).astype(np.float32)
    c = hopper(combining, a, out=[(a.shape, a.dtype)], op=op, blocks=blocks)
    # alone, a block's tile stays as it is
    assert (c == (a if blocks == 1 else expected(a, op, blocks))).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8", "int32", "uint64"])
def test_dtypes_are_combined_in_their_accumulators(hopper, rng, dtype):
    a = rng.integers(-9, 10, (4, 1, 33)).astype(T.dtype(dtype).numpy)
    c = hopper(combining, a, out=[(a.shape, a.dtype)], op="sum")
    assert (c == expected(a, "sum", 4)).all()


@pytest.mark.parametrize("op", ["bitand", "bitor", "bitxor"])
def test_bits_are_combined(hopper, rng, op):
    a = rng.integers(0, 1 << 32, (4, 2, 17), np.uint32)
    c = hopper(combining, a, out=[(a.shape, a.dtype)], op=op)
    assert (c == expected(a, op, 4)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (2, 65), (5, 7), (128, 3)])
@pytest.mark.parametrize("scope", ["fragment", "shared"])
def test_tiles_of_any_shape_in_either_memory(hopper, rng, shape, scope):
    a = rng.integers(-9, 10, (4, *shape)).astype(np.float32)
    c = hopper(combining, a, out=[(a.shape, a.dtype)], scope=scope, blocks=2)
    assert (c == expected(a, "sum", 2)).all()


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_a_loop_uses_the_same_memory_again(hopper, rng, rows):
    a = rng.integers(-9, 10, (8 * rows, 1, 5)).astype(np.float32)
    c = hopper(combining, a, out=[(a.shape, a.dtype)], rows=rows)
    assert (c == expected(a, "sum", 4)).all()


def test_nans_count_where_asked(hopper):
    a = np.zeros((4, 1, 4), np.float32)
    a[1, 0, 1] = a[:, 0, 2] = np.nan
    quiet = hopper(combining, a, out=[(a.shape, a.dtype)], op="max")
    loud = hopper(combining, a, out=[(a.shape, a.dtype)], op="max", nan=True)
    assert (np.isnan(quiet) == [False, False, True, False]).all()
    assert (np.isnan(loud) == [False, True, True, False]).all()


def test_rows_longer_than_a_block_are_reduced_by_a_cluster(hopper, rng):
    """Two reductions a row, the second of what the first is needed for."""

    @tilejit
    def centred(A: T.Tensor, B: T.Tensor, V: T.Tensor, *, blocks=4, BM=2):
        M, N = A.shape
        part = T.ceildiv(N, blocks)
        with T.Kernel(T.ceildiv(M, BM) * blocks, threads=64, cluster=blocks) as block:
            row, column = block // blocks * BM, block % blocks * part
            x = T.alloc_fragment((BM, part), "float32")
            mean, square = (T.alloc_fragment((BM,), "float32") for _ in range(2))
            T.copy(A[row, column], x)
            T.reduce_sum(x, mean, dim=1)
            T.cluster_reduce(mean)
            for i, j in T.Parallel(BM, part):
                x[i, j] = T.if_then_else(column + j < N, x[i, j] - mean[i] / N, 0.0)
            T.reduce_max(x, square, dim=1)
            T.cluster_reduce(square, "max")
            T.copy(x, B[row, column])
            if T.block_rank_in_cluster() == 0:
                T.copy(square, V[row])

    a = rng.integers(-9, 10, (5, 201)).astype(np.float32)
    b, v = hopper(centred, a, out=[(a.shape, np.float32), ((5,), np.float32)])
    want = a.astype(np.float64) - a.mean(1, dtype=np.float64, keepdims=True)
    np.testing.assert_allclose(b, want, atol=1e-5)
    np.testing.assert_allclose(v, want.max(1), atol=1e-5)


def test_neighbours_send_before_any_of_them_waits(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, rows=3):
        with T.Kernel(4, threads=32, cluster=2) as block:
            a, b = T.alloc_fragment((8,), "float32"), T.alloc_fragment((8,), "float32")
            for r in range(rows):
                at = block // 2 * 2 * rows + 2 * r + block % 2
                T.copy(A[at, 0], a)
                T.copy(A[at, 0], b)
                T.cluster_reduce(a)
                T.cluster_reduce(b, "max")
                T.cluster_reduce(b)  # of what the one before gave
                T.copy(a, B[at, 0])
                T.copy(b, C[at, 0])

    a = rng.integers(-9, 10, (12, 8)).astype(np.float32)
    b, c = hopper(kernel, a, out=[(a.shape, a.dtype)] * 2)
    pairs = a.reshape(6, 2, 8)
    assert (b == pairs.sum(1, keepdims=True).repeat(2, 1).reshape(12, 8)).all()
    assert (c == 2 * pairs.max(1, keepdims=True).repeat(2, 1).reshape(12, 8)).all()
    spec = T.Tensor(a.shape, "float32")
    source = kernel.compile(spec, spec, spec, target="sm_90a").source
    calls = re.findall(r"= (cluster_\w+)\(|^ +(cluster_send\w+)\(", source, re.M)
    names = [a or b for a, b in calls]
    assert names == ["cluster_send_sum_a", "cluster_send_max_b", "cluster_take_sum_a",
                     "cluster_take_max_b", "cluster_reduce_sum_b"]  # fmt: skip


def test_beside_the_users_own_meetings(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(4, threads=32, cluster=2) as block:
            tile = T.alloc_fragment((8,), "float32")
            T.copy(A[block, 0], tile)
            T.cluster_sync()
            T.cluster_reduce(tile)
            T.cluster_arrive()
            T.cluster_reduce(tile)
            T.copy(tile, C[block, 0])
            T.cluster_wait()

    a = rng.integers(-9, 10, (4, 8)).astype(np.float32)
    c = hopper(kernel, a, out=[(a.shape, a.dtype)])
    assert (c == 2 * a.reshape(2, 2, 8).sum(1, keepdims=True).repeat(2, 1).reshape(4, 8)).all()


def test_what_it_becomes(hopper):
    spec = T.Tensor((8, 1, 64), "float32")
    kernel = combining.compile(spec, spec, blocks=8, target="sm_90a")
    assert "cluster_reduce sum tile: 8 blocks through shared memory" in kernel.explain()
    assert "mapa.shared::cluster" in kernel.ptx and "st.async.shared::cluster" in kernel.ptx
    # the blocks begin at once, and wait for each other after the loads only; nothing is fenced
    ptx = kernel.ptx
    places = [ptx.index(w) for w in ("cluster.arrive.relaxed", "ld.global", "cluster.wait")]
    assert places == sorted(places) and "cluster.arrive.release" not in ptx
    assert 'T.cluster_reduce(tile, "sum")' in str(kernel.graph)
    alone = combining.compile(spec, spec, blocks=1, target="sm_90a")
    assert "cluster" not in alone.ptx


# ---- what is refused -----------------------------------------------------------------------------


def compiled(body, target="sm_90a", **kinds):
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=128, cluster=2) as block:
            tile = T.alloc_fragment((64,), kinds.get("dtype", "float32"))
            T.clear(tile)
            body(tile, block)

    return kernel.compile(T.Tensor((64,), "float32"), target=target)


@T.macro
def add(tile, block):
    T.cluster_reduce(tile)


@T.macro
def add_bits(tile, block):
    T.cluster_reduce(tile, "bitor")


@T.macro
def in_a_branch(tile, block):
    with T.If(T.get_thread_binding() < 3), T.Then():
        T.cluster_reduce(tile)


@T.macro
def in_a_role(tile, block):
    with T.ws(0):
        own = T.alloc_fragment((64,), "float32")
        T.clear(own)
        T.cluster_reduce(own)


@T.macro
def in_a_loop(tile, block):
    for _ in T.Parallel(64):
        T.cluster_reduce(tile)


@pytest.mark.parametrize(
    "body, words",
    [
        (in_a_branch, "T.cluster_reduce needs all threads of the block, but it stands in a branch"),
        (in_a_role, "T.cluster_reduce needs all threads of the block, but it stands in a T.ws"),
        (in_a_loop, "T.cluster_reduce is not allowed inside T.Parallel"),
    ],
)
def test_where_it_must_not_stand(body, words):
    with pytest.raises(TraceError, match=words):
        compiled(body)


def test_clusters_of_sixteen_where_the_chip_has_them(hopper, rng):
    a = rng.integers(-9, 10, (32, 1, 40)).astype(np.float32)
    c = hopper(combining, a, out=[(a.shape, a.dtype)], blocks=16, threads=32)
    assert (c == expected(a, "sum", 16)).all()
    spec = T.Tensor((16, 1, 40), "float32")
    assert "reqnctapercluster 16" in combining.compile(spec, spec, blocks=16, target="sm_90").ptx
    with pytest.raises(UnsupportedError, match=r"a cluster of 16 blocks; sm_120a runs up to 8"):
        combining.compile(spec, spec, blocks=16, target="sm_120a")


def test_chips_and_dtypes_that_cannot():
    with pytest.raises(UnsupportedError, match="cluster needs"):
        compiled(add, target="sm_80")
    with pytest.raises(DTypeError, match="bool, which holds no sum"):
        compiled(add, dtype="bool")
    with pytest.raises(DTypeError, match="combines bits of integers or bool"):
        compiled(add_bits)


def test_blocks_that_do_not_come_are_found(executor):
    if executor == "gpu":
        pytest.skip("the blocks would wait for ever")

    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(2, threads=32, cluster=2) as block:
            tile = T.alloc_fragment((8,), "float32")
            T.copy(A, tile)
            if block == 0:
                T.cluster_reduce(tile)
            T.copy(tile, A)

    with options(target="sm_90a"), pytest.raises(SimulationError):
        kernel(np.ones(8, np.float32))
