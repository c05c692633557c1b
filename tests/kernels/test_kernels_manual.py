"""Hopper kernels with every copy, barrier and role written by hand, on every executor."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from products import assert_near, assert_product, operand

import tilejit.language as T
from tilejit import UnsupportedError, tilejit

BF16, F16, E4M3 = ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn
GROUP = 128  # threads of a warpgroup


def example():
    path = Path(__file__).parents[2] / "examples" / "manual_matmul.py"
    spec = importlib.util.spec_from_file_location("example_manual_matmul", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matrices(rng, M, N, K, dtype=BF16):
    return operand(rng, (M, K), dtype), operand(rng, (K, N), dtype)


# ---- one warpgroup ------------------------------------------------------------------------------


@tilejit
def ring(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *,
    BM=64, BN=64, BK=64, stages=3, threads=128, tA=False, tB=False, pending=0,
):  # fmt: skip
    """One thread brings tiles ahead, all multiply: T.sync_threads says that a slot is free."""
    M, N = C.shape
    K = A.shape[0] if tA else A.shape[1]
    steps = T.ceildiv(K, BK)
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((stages, BK, BM) if tA else (stages, BM, BK), A.dtype)
        b = T.alloc_shared((stages, BN, BK) if tB else (stages, BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), "float32")
        full = T.alloc_barrier([1] * stages)

        @T.macro
        def bring(k):
            slot = k % stages
            row, column, depth = by * BM, bx * BN, k * BK
            if tA:
                T.tma_copy(A[depth, row], a[slot, :, :], barrier=full[slot])
            else:
                T.tma_copy(A[row, depth], a[slot, :, :], barrier=full[slot])
            if tB:
                T.tma_copy(B[column, depth], b[slot, :, :], barrier=full[slot])
            else:
                T.tma_copy(B[depth, column], b[slot, :, :], barrier=full[slot])
            T.mbarrier_arrive(full[slot])

        if T.shuffle_elect(0):
            for k in range(stages - 1 - pending):
                if k < steps:
                    bring(k)
        T.clear(acc)
        for k in range(steps):
            T.mbarrier_wait_parity(full[k % stages], (k // stages) & 1)
            T.wgmma_gemm(
                a[k % stages, :, :], b[k % stages, :, :], acc, transpose_A=tA, transpose_B=tB
            )
            T.wait_wgmma(pending)
            T.sync_threads()
            if T.shuffle_elect(0):
                if k + stages - 1 - pending < steps:
                    bring(k + stages - 1 - pending)
        T.wait_wgmma(0)
        T.copy(acc, C[by * BM, bx * BN])


@pytest.mark.parametrize("size", [(64, 64, 64), (128, 192, 320), (72, 136, 40), (64, 64, 8)])
@pytest.mark.parametrize("stages, pending", [(2, 0), (3, 0), (4, 1)])
def test_ring_of_one_warpgroup_multiplies(hopper, rng, size, stages, pending):
    M, N, K = size
    a, b = matrices(rng, M, N, K)
    c = hopper(ring, a, b, out=[((M, N), "float32")], stages=stages, pending=pending)
    assert_product(c, a, b)


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_ring_multiplies_in_every_layout(hopper, rng, layout):
    tA, tB = (side == "t" for side in layout)
    a, b = matrices(rng, 128, 128, 160, F16)
    stored = [np.ascontiguousarray(x.T) if t else x for x, t in ((a, tA), (b, tB))]
    c = hopper(ring, *stored, out=[((128, 128), "float32")], tA=tA, tB=tB, BK=32)
    assert_product(c, a, b)


def test_ring_of_two_warpgroups_multiplies_fp8(hopper, rng):
    a, b = matrices(rng, 256, 96, 256, E4M3)
    stored = np.ascontiguousarray(b.T)
    c = hopper(ring, a, stored, out=[((256, 96), "float32")], BM=128, BN=96, threads=256, tB=True)
    assert_product(c, a, b)


@tilejit
def single_precision(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, read=False, by_threads=False):
    with T.Kernel(1, threads=GROUP):
        a = T.alloc_shared((64, 64), "tfloat32")
        b = T.alloc_shared((32, 64), "tfloat32")
        acc = T.alloc_fragment((64, 32), "float32")
        there = T.alloc_barrier(1)
        T.tma_copy(B, b, barrier=there)
        if by_threads:
            T.copy(A, a)
        else:
            T.tma_copy(A, a, barrier=there)
        if T.shuffle_elect(0):
            T.mbarrier_arrive(there)
        T.mbarrier_wait_parity(there, 0)
        T.wgmma_gemm(a, b, acc, transpose_B=True, clear_accum=True)
        T.wait_wgmma(0)
        if read:
            acc[0, 0] = a[0, 0]
        T.copy(acc, C)


def test_tf32_tiles_are_rounded_on_their_way(hopper, rng):
    a = rng.standard_normal((64, 64)).astype(np.float32)
    b = rng.standard_normal((64, 32)).astype(np.float32)
    stored = np.ascontiguousarray(b.T)
    c = hopper(single_precision, a, stored, out=[((64, 32), "float32")])
    assert_product(c, a, b, tf32=True)
    for constants in ({"read": True}, {"by_threads": True}):
        with pytest.raises(UnsupportedError, match="a is not rounded to tf32 on its way"):
            single_precision.compile(a, stored, c, target="sm_90a", **constants)


@tilejit
def from_registers(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, N=64, K=64):
    """A's tile is scaled in registers, which the multiply reads."""
    with T.Kernel(1, threads=GROUP):
        a = T.alloc_shared((64, K), A.dtype)
        b = T.alloc_shared((K, N), B.dtype)
        left = T.alloc_fragment((64, K), A.dtype)
        acc = T.alloc_fragment((64, N), "float32")
        there = T.alloc_barrier(1)
        T.tma_copy(A[0, 0], a, barrier=there)
        T.tma_copy(B[0, 0], b, barrier=there)
        if T.get_thread_binding() == 0:
            T.mbarrier_arrive(there)
        T.mbarrier_wait_parity(there, 0)
        for i, k in T.Parallel(64, K):
            left[i, k] = a[i, k] * 2
        T.wgmma_gemm(left, b, acc, clear_accum=True)
        T.wait_wgmma(0)
        T.copy(acc, C)


def test_left_operand_may_be_a_fragment(hopper, rng):
    a, b = matrices(rng, 64, 64, 64)
    c = hopper(from_registers, a, b, out=[((64, 64), "float32")])
    assert_product(c, a * 2, b)


@tilejit
def stored_by_threads(A: T.Tensor, B: T.Tensor, C: T.Tensor):
    """Tiles that threads write are fenced, and the block meets, without a word."""
    with T.Kernel(1, threads=GROUP):
        a = T.alloc_shared((64, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        for k in range(2):
            T.copy(A[0, k * 64], a)
            T.copy(B[k * 64, 0], b)
            T.wgmma_gemm(a, b, acc)
            T.wait_wgmma(0)
        T.copy(acc, C)


def test_tiles_that_threads_fill_need_no_fence_by_hand(hopper, rng):
    a, b = matrices(rng, 64, 64, 128)
    c = hopper(stored_by_threads, a, b, out=[((64, 64), "float32")])
    assert_product(c, a, b)


# ---- roles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("size", [(128, 128, 64), (384, 256, 200), (300, 136, 72), (40, 264, 136)])
def test_example_of_producer_and_consumers_is_right(hopper, rng, size, cluster):
    M, N, K = size
    a, b = matrices(rng, M, N, K)
    c = hopper(
        example().matmul, a, b, out=[((M, N), BF16)], BN=128, blocks=2 * cluster, cluster=cluster
    )
    assert_product(c, a, b)


@pytest.mark.parametrize("stages, late", [(2, False), (4, False), (2, True), (4, True)])
def test_example_is_right_with_other_rings_and_dtypes(hopper, rng, stages, late):
    a, b = matrices(rng, 256, 256, 320, F16)
    c = hopper(
        example().matmul, a, b, out=[((256, 256), F16)], BN=256, BK=32, stages=stages, blocks=2,
        late=late,
    )  # fmt: skip
    assert_product(c, a, b)


@tilejit
def ping_pong(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BN=64, BK=64, stages=3, rounds=2):
    """Two consumers, each with tiles of its own: while one stores, the other multiplies."""
    steps = A.shape[1] // BK
    with T.Kernel(C.shape[1] // BN, threads=3 * GROUP) as column:
        a = T.alloc_shared((stages, 64, BK), A.dtype)
        b = T.alloc_shared((stages, BK, BN), B.dtype)
        sums = [T.alloc_fragment((64, BN), "float32") for _ in (0, 1)]
        full = T.alloc_barrier([1] * stages)
        empty = T.alloc_barrier([GROUP] * stages)

        @T.macro
        def consume(own):
            acc = sums[own]
            if own == 1:
                T.named_barrier_arrive(1, 2 * GROUP)  # the first consumer begins
            for turn in range(rounds):
                T.sync_threads(1 + own, 2 * GROUP)
                T.clear(acc)
                for k in range(steps):
                    n = (2 * turn + own) * steps + k
                    T.mbarrier_wait_parity(full[n % stages], (n // stages) & 1)
                    T.wgmma_gemm(a[n % stages, :, :], b[n % stages, :, :], acc)
                    T.wait_wgmma(0)
                    T.mbarrier_arrive(empty[n % stages])
                if own == 0 or turn < rounds - 1:
                    T.named_barrier_arrive(2 - own, 2 * GROUP)
                T.copy(acc, C[(2 * turn + own) * 64, column * BN])

        with T.ws(2):
            T.dec_max_nreg(40)
            if T.shuffle_elect(GROUP):
                for n in range(2 * rounds * steps):
                    T.mbarrier_wait_parity(empty[n % stages], ((n // stages) & 1) ^ 1)
                    row, k = n // steps * 64, n % steps
                    T.tma_copy(A[row, k * BK], a[n % stages, :, :], barrier=full[n % stages])
                    T.tma_copy(
                        B[k * BK, column * BN], b[n % stages, :, :], barrier=full[n % stages]
                    )
                    T.mbarrier_arrive(full[n % stages])
        with T.ws(0):
            T.inc_max_nreg(232)
            consume(0)
        with T.ws(1):
            T.inc_max_nreg(232)
            consume(1)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_consumers_take_turns_at_named_barriers(hopper, rng, rounds):
    M = 128 * rounds
    a, b = matrices(rng, M, 128, 192)
    c = hopper(ping_pong, a, b, out=[((M, 128), "float32")], rounds=rounds)
    assert_product(c, a, b)


@tilejit
def all_arrive(A: T.Tensor, B: T.Tensor, *, stages=2):
    """TileLang's usual form: every thread of the producer arrives, no condition anywhere."""
    rows = A.shape[0] // 8
    with T.Kernel(1, threads=2 * GROUP):
        s = T.alloc_shared((stages, 8, 64), A.dtype)
        part = T.alloc_fragment((8, 64), A.dtype)
        full = T.alloc_barrier([GROUP] * stages)
        empty = T.alloc_barrier([GROUP] * stages)
        with T.ws(1):
            for k in range(rows):
                T.mbarrier_wait_parity(empty[k % stages], ((k // stages) & 1) ^ 1)
                T.tma_copy(A[k * 8, 0], s[k % stages, :, :], barrier=full[k % stages])
                T.mbarrier_arrive(full[k % stages])
        with T.ws(0):
            for k in range(rows):
                T.mbarrier_wait_parity(full[k % stages], (k // stages) & 1)
                T.copy(s[k % stages, :, :], part)
                T.mbarrier_arrive(empty[k % stages])
                for i, j in T.Parallel(8, 64):
                    part[i, j] = part[i, j] + 1
                T.copy(part, B[k * 8, 0])


def test_every_thread_of_a_producer_may_arrive(hopper, rng):
    a = rng.standard_normal((56, 64)).astype(np.float32)
    assert (hopper(all_arrive, a, out=[((56, 64), np.float32)]) == a + 1).all()


@tilejit
def one_warp_arrives(A: T.Tensor, B: T.Tensor, *, stages=2):
    """A producer of one warp: one of its threads issues, all of them arrive."""
    rows = A.shape[0] // 8
    with T.Kernel(1, threads=2 * GROUP):
        s = T.alloc_shared((stages, 8, 64), A.dtype)
        full = T.alloc_barrier([32] * stages)
        empty = T.alloc_barrier([GROUP] * stages)
        tx = T.get_thread_binding()
        with T.ws(1):
            if tx < GROUP + 32:
                for k in range(rows):
                    T.mbarrier_wait_parity(empty[k % stages], ((k // stages) & 1) ^ 1)
                    T.tma_copy(A[k * 8, 0], s[k % stages, :, :], barrier=full[k % stages])
                    T.mbarrier_arrive(full[k % stages])
        with T.ws(0):
            for k in range(rows):
                T.mbarrier_wait_parity(full[k % stages], (k // stages) & 1)
                T.copy(s[k % stages, :, :], B[k * 8, 0])
                T.mbarrier_arrive(empty[k % stages])


def test_one_thread_of_a_warp_issues_what_all_get_to(hopper, rng):
    a = rng.standard_normal((40, 64)).astype(np.float32)
    assert (hopper(one_warp_arrives, a, out=[((40, 64), np.float32)]) == a).all()


# ---- stores -------------------------------------------------------------------------------------


@tilejit
def through_strips(A: T.Tensor, C: T.Tensor, *, W=32, slots=2):
    """A tile leaves in strips: each thread waits for its own bulk stores, then all meet."""
    with T.Kernel(T.ceildiv(C.shape[1], 128), T.ceildiv(C.shape[0], 64), threads=GROUP) as (bx, by):
        tile = T.alloc_fragment((64, 128), "float32")
        strip = T.alloc_shared((slots, 64, W), C.dtype)
        T.copy(A[by * 64, bx * 128], tile)
        for i, j in T.Parallel(64, 128):
            tile[i, j] = tile[i, j] * 2
        for j in T.unroll(128 // W):
            T.tma_store_wait(slots - 1)  # the slot's last store has been read
            T.sync_threads(3, GROUP)
            for r, c in T.Parallel(64, W):
                strip[j % slots, r, c] = tile[r, j * W + c]
            T.fence_proxy_async()
            T.sync_threads(3, GROUP)
            if T.shuffle_elect(GROUP):
                T.tma_copy(strip[j % slots, :, :], C[by * 64, bx * 128 + j * W])
        T.tma_store_wait(0, read=False)


@pytest.mark.parametrize("size", [(64, 128), (96, 264), (8, 8)])
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_tile_leaves_through_strips(hopper, rng, size, out, slots):
    a = rng.standard_normal(size).astype(np.float32)
    c = hopper(through_strips, a, out=[(size, out)], slots=slots)
    assert_near(c, a.astype(np.float64) * 2, 0.0)


@tilejit
def copies_by_threads_of_a_warp(A: T.Tensor, C: T.Tensor):
    """Eight threads bring a row of tiles each, and store it elsewhere."""
    with T.Kernel(1, threads=GROUP):
        s = T.alloc_shared((8, 8, 32), A.dtype)
        there = T.alloc_barrier(8)
        tx = T.get_thread_binding()
        if tx < 8:
            T.tma_copy(A[tx * 8, 0], s[tx, :, :], barrier=there)
            T.mbarrier_arrive(there)
        T.mbarrier_wait_parity(there, 0)
        if tx < 8:
            T.tma_copy(s[tx, :, :], C[(7 - tx) * 8, 0], eviction_policy="evict_first")
            T.tma_store_wait(0)


def test_copy_to_places_of_each_thread_is_made_by_each(hopper, rng):
    a = rng.standard_normal((64, 32)).astype(np.float32)
    c = hopper(copies_by_threads_of_a_warp, a, out=[((64, 32), np.float32)])
    assert (c == a.reshape(8, 8, 32)[::-1].reshape(64, 32)).all()


# ---- clusters -----------------------------------------------------------------------------------


@tilejit
def shared_tile(A: T.Tensor, C: T.Tensor, *, cluster, mask, rows=32, columns=64):
    """Blocks of a cluster bring a tile of A together and each adds its own number."""
    blocks = cluster[0] * cluster[1]
    tiles = A.shape[0] // rows
    with T.Kernel(*cluster, threads=GROUP, cluster=cluster) as (bx, by):
        s = T.alloc_shared((rows, columns), A.dtype)
        there = T.alloc_cluster_barrier(1)
        free = T.alloc_cluster_barrier(blocks)
        rank = T.block_rank_in_cluster()
        tx = T.get_thread_binding()
        for k in range(tiles):
            if T.shuffle_elect(0):
                T.mbarrier_wait_parity(free, (k & 1) ^ 1)
                T.tma_copy(A[k * rows, 0], s, barrier=there, cluster_mask=mask)
                T.mbarrier_arrive(there)
            T.mbarrier_wait_parity(there, k & 1)
            for i, j in T.Parallel(rows, columns):
                C[by * cluster[0] + bx, k * rows + i, j] = s[i, j] + rank
            T.sync_threads()
            if tx < blocks:
                T.mbarrier_arrive(free, cta_id=tx)
        T.cluster_sync()


@pytest.mark.parametrize(
    "cluster, mask",
    [((2, 1), 0b11), ((1, 2), 0b11), ((4, 1), 0b1111), ((2, 2), 0b1111), ((2, 2), 0b0011),
     ((2, 2), 0b1010), ((2, 1), 0b01)],
)  # fmt: skip
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_blocks_of_a_cluster_bring_a_tile_together(hopper, rng, cluster, mask, columns):
    a = rng.standard_normal((96, columns)).astype(np.float32)
    blocks = cluster[0] * cluster[1]
    c = hopper(
        shared_tile, a, out=[((blocks, 96, columns), np.float32)],
        cluster=cluster, mask=mask, columns=columns,
    )  # fmt: skip
    ranks = np.arange(blocks, dtype=np.float32).reshape(-1, 1, 1)
    assert (c == a[None] + ranks).all()


@tilejit
def ranks(C: T.Tensor, *, cluster):
    with T.Kernel(4, 4, 2, threads=32, cluster=cluster) as (bx, by, bz):
        if T.get_thread_binding() == 0:
            C[bz, by, bx] = T.block_rank_in_cluster()
        T.cluster_arrive()
        T.cluster_wait()


@pytest.mark.parametrize("cluster", [1, 2, (1, 4), (2, 2), (2, 2, 2), (4, 1, 2)])
def test_rank_counts_the_blocks_of_a_cluster_along_x_first(hopper, cluster):
    c = hopper(ranks, out=[((2, 4, 4), np.int32)], cluster=cluster)
    x, y, z = (*(cluster if isinstance(cluster, tuple) else (cluster,)), 1, 1)[:3]
    bz, by, bx = np.indices((2, 4, 4))
    assert (c == bx % x + by % y * x + bz % z * x * y).all()


@tilejit
def relay(C: T.Tensor):
    """Block after block of a cluster: each waits for the one before it."""
    with T.ClusterKernel(4, cluster_dims=4, threads=32) as block:
        turn = T.alloc_cluster_barrier(1)
        if T.shuffle_elect(0):
            if block > 0:
                T.mbarrier_wait_parity(turn, 0)
            C[block] = block * 10
            if block < 3:
                T.mbarrier_arrive(turn, cta_id=block + 1)
        T.cluster_sync()


def test_blocks_of_a_cluster_pass_a_turn_on(hopper):
    assert hopper(relay, out=[((4,), np.int32)]).tolist() == [0, 10, 20, 30]
