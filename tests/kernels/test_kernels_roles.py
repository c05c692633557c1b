"""What T.ws bodies do: tile ops, barriers and variables of some of a block's warpgroups."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.errors import SimulationError
from tilejit.runtime.device import use_executor

GROUP = 128


def floats(rng, *shape):
    return rng.integers(-9, 9, shape).astype(np.float32)


@tilejit
def copy_by(A: T.Tensor, C: T.Tensor, *, threads, groups):
    with T.Kernel(2, threads=threads) as b:
        s = T.alloc_shared((16, 48), A.dtype)
        f = T.alloc_fragment((16, 48), A.dtype)
        with T.ws(*groups):
            T.copy(A[b * 16, 0], s)
            T.copy(s, f)
            for i, j in T.Parallel(16, 48):
                f[i, j] = f[i, j] * 2 + s[15 - i, j]
            T.copy(f, C[b * 16, 0])


@pytest.mark.parametrize("threads, groups", [(128, (0,)), (256, (1,)), (384, (1, 2)), (512, (2,)),
                                             (512, (3, 1, 2)), (384, (0, 1, 2))])  # fmt: skip
def test_tile_ops_are_spread_over_the_named_warpgroups(run, rng, threads, groups):
    a = floats(rng, 32, 48)
    c = run(copy_by, a, out=[((32, 48), np.float32)], threads=threads, groups=groups)
    flipped = a.reshape(2, 16, 48)[:, ::-1].reshape(32, 48)
    assert (c == a * 2 + flipped).all()


@tilejit
def multiply_by(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, stages=2):
    """Two roles multiply one half each, by whatever instruction there is."""
    with T.Kernel(1, threads=3 * GROUP):
        for half, groups in ((0, (0,)), (1, (1, 2))):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            with T.ws(*groups):
                T.clear(acc)
                for k in T.Pipelined(A.shape[1] // 32, num_stages=stages):
                    T.copy(A[half * 64, k * 32], a)
                    T.copy(B[k * 32, 0], b)
                    T.gemm(a, b, acc)
                T.copy(acc, C[half * 64, 0])


@pytest.mark.parametrize("stages", [0, 2, 3])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_roles_multiply_and_pipeline_on_their_own(run, rng, stages, dtype):
    a, b = floats(rng, 128, 96).astype(dtype), floats(rng, 96, 64).astype(dtype)
    c = run(multiply_by, a, b, out=[((128, 64), np.float32)], stages=stages)
    assert (c == a.astype(np.float32) @ b.astype(np.float32)).all()


@pytest.mark.parametrize("stages", [0, 2])
def test_roles_multiply_and_pipeline_on_their_own_on_hopper(hopper, rng, stages):
    a, b = floats(rng, 128, 96).astype(np.float16), floats(rng, 96, 64).astype(np.float16)
    c = hopper(multiply_by, a, b, out=[((128, 64), np.float32)], stages=stages)
    assert (c == a.astype(np.float32) @ b.astype(np.float32)).all()
    text = multiply_by.compile(a, b, c, target="sm_90a", stages=stages).explain()
    assert ("wgmma.m64n64k16" in text) == (stages == 0)


def test_roles_exchange_tiles_through_a_ring(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, *, slots=2):
        rounds = A.shape[0]
        with T.Kernel(1, threads=2 * GROUP):
            s = T.alloc_shared((slots, 200), "float32")
            f = T.alloc_fragment((200,), "float32")
            full = T.alloc_barrier([GROUP] * slots)
            empty = T.alloc_barrier([GROUP] * slots)
            with T.ws(0):
                for k in range(rounds):
                    T.mbarrier_wait_parity(empty[k % slots], ((k // slots) & 1) ^ 1)
                    T.copy(A[k, :], s[k % slots, :])
                    T.mbarrier_arrive(full[k % slots])
            with T.ws(1):
                T.clear(f)
                for k in range(rounds):
                    T.mbarrier_wait_parity(full[k % slots], (k // slots) & 1)
                    for i in T.Parallel(200):
                        f[i] = f[i] * 2 + s[k % slots, 199 - i]
                    T.mbarrier_arrive(empty[k % slots])
                T.copy(f, C)

    a = floats(rng, 7, 200)
    total = np.zeros(200, np.float32)
    for row in a:
        total = total * 2 + row[::-1]
    assert (run(kernel, a, out=[((200,), np.float32)]) == total).all()


def test_all_threads_see_what_roles_wrote_and_roles_what_all_did(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=2 * GROUP):
            s = T.alloc_shared((256,), "float32")
            t = T.alloc_shared((256,), "float32")
            T.copy(A, s)
            with T.ws(1):
                for i in T.Parallel(128):
                    t[i] = s[255 - i]
            with T.ws(0):
                for i in T.Parallel(128):
                    t[i + 128] = s[127 - i]
            for i in T.Parallel(256):
                C[i] = t[255 - i]

    a = floats(rng, 256)
    assert (run(kernel, a, out=[((256,), np.float32)]) == a).all()
    ptx = kernel.compile(a, a, target="sm_90a").ptx
    assert len(re.findall(r"bar\.sync 0", ptx)) == 2
    assert not re.findall(r"bar\.sync 1", ptx)


def test_threads_of_a_role_meet_at_a_barrier_of_their_own(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=3 * GROUP):
            s = T.alloc_shared((256,), "float32")
            with T.ws(1, 2):
                tx = T.get_thread_binding()
                s[tx - 128] = A[tx - 128]
                T.sync_threads()
                C[tx - 128] = s[383 - tx]

    a = floats(rng, 256)
    assert (run(kernel, a, out=[((256,), np.float32)]) == a[::-1]).all()
    ptx = kernel.compile(a, a, target="sm_90a").ptx
    assert re.findall(r"bar\.sync (\d+), (\d+)", ptx) == [("15", "256")]


def test_barriers_that_are_put_in_avoid_those_that_the_kernel_names(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=2 * GROUP):
            s = T.alloc_shared((2, 128), "float32")
            tx = T.get_thread_binding()
            for group in (0, 1):
                with T.ws(group):
                    T.copy(A[group * 128], s[group, :])
                    T.sync_threads(14 + tx // 128, 128)
                    for i in T.Parallel(128):
                        C[group * 128 + i] = s[group, 127 - i]

    a = floats(rng, 256)
    c = run(kernel, a, out=[((256,), np.float32)])
    assert (c == a.reshape(2, 128)[:, ::-1].reshape(256)).all()
    ptx = kernel.compile(a, a, target="sm_90a").ptx
    assert set(re.findall(r"bar\.sync (\d+), 128", ptx)) == {"12", "13"}


def test_variables_of_the_block_go_their_own_way_in_each_role(run):
    @tilejit
    def kernel(C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=3 * GROUP):
            x = T.alloc_var("int32", init=5)
            with T.ws(0):
                for i in range(3):
                    x += i
                if x == 8:
                    for i in T.Parallel(32):
                        D[i] = x
            with T.ws(2):
                x = x * 10
                for i in T.Parallel(32):
                    D[32 + i] = x
            C[T.get_thread_binding()] = x

    c, d = run(kernel, out=[((384,), np.int32), ((64,), np.int32)])
    assert c.tolist() == [8] * 128 + [5] * 128 + [50] * 128
    assert d.tolist() == [8] * 32 + [50] * 32


def test_variable_made_between_two_bodies_does_not_part_them(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=2 * GROUP):
            s = T.alloc_shared((128,), "float32")
            there = T.alloc_barrier(GROUP)
            with T.ws(1):
                T.mbarrier_wait_parity(there, 0)
                T.copy(s, C)
            factor = T.alloc_var("float32", init=3.0)
            with T.ws(0):
                for i in T.Parallel(128):
                    s[i] = A[i] * factor
                T.mbarrier_arrive(there)

    a = floats(rng, 128)
    assert (run(kernel, a, out=[((128,), np.float32)]) == a * 3).all()


def test_bodies_for_the_same_warpgroup_run_one_after_the_other(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=2 * GROUP):
            f = T.alloc_fragment((64, 8), "float32")
            with T.ws(1):
                T.copy(A, f)
            with T.ws(1):
                for i, j in T.Parallel(64, 8):
                    f[i, j] = f[i, j] + 1
            with T.ws(1):
                T.copy(f, C)

    a = floats(rng, 64, 8)
    assert (run(kernel, a, out=[((64, 8), np.float32)]) == a + 1).all()


def test_roles_stand_in_loops_and_branches(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, n: T.int32):
        with T.Kernel(2, threads=2 * GROUP) as b:
            s = T.alloc_shared((128,), "float32")
            for k in range(n):
                if k % 2 == b:
                    with T.ws(0):
                        T.copy(A[k, 0], s)
                    with T.ws(1):
                        for i in T.Parallel(128):
                            C[b, k, i] = k
                    for i in T.Parallel(128):
                        C[b, k, i] = C[b, k, i] + s[127 - i]
                else:
                    for i in T.Parallel(128):
                        C[b, k, i] = 0

    a = floats(rng, 5, 128)
    result = run(lambda a, c: kernel(a, c, 5), a, out=[((2, 5, 128), np.float32)])
    expected = np.zeros((2, 5, 128), np.float32)
    for k in range(5):
        expected[k % 2, k] = k + a[k, ::-1]
    assert (result == expected).all()


@pytest.mark.parametrize("where", ["reference", "simulator"])
def test_old_value_of_an_atomic_reaches_all_threads_of_a_role(where):
    @tilejit
    def kernel(N: T.Tensor, C: T.Tensor):
        with T.Kernel(4, threads=3 * GROUP), T.ws(1, 2):
            mine = T.atomic_add(N[0], 1, return_prev=True)
            C[mine, T.get_thread_binding() - GROUP] = mine

    counts, c = np.zeros(1, np.int32), np.full((4, 256), -1, np.int32)
    with use_executor(where):
        kernel(counts, c)
    assert counts[0] == 4 and (c == np.arange(4)[:, None]).all()


def test_reads_before_a_barrier_of_a_role_are_over_after_it(run):
    @tilejit
    def kernel(Q: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=2 * GROUP):
            s = T.alloc_shared((1,), "int32")
            tx = T.get_thread_binding()
            with T.ws(1):
                if tx == GROUP:
                    s[0] = Q[0]
                T.sync_threads()
                C[tx - GROUP] = s[0]
                T.sync_threads()
                if tx == GROUP:
                    s[0] = s[0] + 1
                    C[GROUP] = s[0]

    c = run(kernel, np.array([7], np.int32), out=[((GROUP + 1,), np.int32)])
    assert c.tolist() == [7] * GROUP + [8]


@pytest.mark.parametrize("where", ["reference", "simulator"])
def test_role_that_waits_for_ever_is_found(where):
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=2 * GROUP):
            b = T.alloc_barrier([GROUP, GROUP])
            with T.ws(0):
                T.mbarrier_wait_parity(b[0], 0)
                T.mbarrier_arrive(b[1])
            with T.ws(1):
                T.mbarrier_wait_parity(b[1], 0)
                T.mbarrier_arrive(b[0])
            C[T.get_thread_binding()] = 1

    with use_executor(where), pytest.raises(SimulationError, match="for ever"):
        kernel(np.zeros(256, np.float32))


@pytest.mark.parametrize("where", ["reference", "simulator"])
def test_named_barrier_that_too_few_come_to_is_found(where):
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=2 * GROUP):
            with T.ws(0):
                T.sync_threads(3, 256)
            with T.ws(1):
                C[T.get_thread_binding()] = 1

    with use_executor(where), pytest.raises(SimulationError, match="for ever"):
        kernel(np.zeros(256, np.float32))


@pytest.mark.parametrize("where", ["reference", "simulator"])
def test_bytes_that_nobody_brings_are_waited_for_in_vain(where):
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=GROUP):
            b = T.alloc_barrier(1)
            if T.shuffle_elect(0):
                T.mbarrier_arrive_expect_tx(b, 128)
            T.mbarrier_wait_parity(b, 0)
            C[T.get_thread_binding()] = 1

    wrong = pytest.raises(SimulationError, match="expects 128 bytes")
    with use_executor(where), options(target="sm_90a"), wrong:
        kernel(np.zeros(128, np.float32))


def test_warps_hand_over_at_a_named_barrier(run, rng):
    """One warp says that its part is there and goes on; another waits for it."""

    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((32,), "float32")
            tx = T.get_thread_binding()
            if tx < 32:
                s[tx] = A[tx]
                T.named_barrier_arrive(2, 64)
            else:
                T.sync_threads(2, 64)
                C[tx - 32] = s[63 - tx]

    a = floats(rng, 32)
    assert (run(kernel, a, out=[((32,), np.float32)]) == a[::-1]).all()


@pytest.mark.parametrize("arms", [1, 2])
def test_warps_wait_at_a_named_barrier_for_the_branch_after(run, rng, arms):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, *, arms):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((32,), "float32")
            tx = T.get_thread_binding()
            if arms == 2:
                if tx < 32:
                    T.sync_threads(2, 64)
                    C[tx] = s[31 - tx]
                else:
                    s[tx - 32] = A[tx - 32]
                    T.sync_threads(2, 64)
            else:
                if tx < 32:
                    T.sync_threads(2, 64)
                    C[tx] = s[31 - tx]
                if tx >= 32:
                    s[tx - 32] = A[tx - 32]
                    T.named_barrier_arrive(2, 64)

    a = floats(rng, 32)
    assert (run(kernel, a, out=[((32,), np.float32)], arms=arms) == a[::-1]).all()


def test_elected_threads_wait_for_each_other(run):
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=64):
            b = T.alloc_barrier(1)
            tx = T.get_thread_binding()
            if tx == 0:
                T.mbarrier_wait_parity(b, 0)
                C[0] = 1
            if T.shuffle_elect(32) and tx >= 32:
                C[1] = 2
                T.mbarrier_arrive(b)

    assert run(kernel, out=[((2,), np.int32)]).tolist() == [1, 2]


@pytest.mark.parametrize(
    "extent, expected",
    [(0, [0]), (256, [0]), (128, [0, 128]), (64, [0, 64, 128, 192]), (32, range(0, 256, 32))],
)
def test_one_thread_of_every_so_many_is_elected(run, extent, expected):
    @tilejit
    def kernel(C: T.Tensor, *, extent):
        with T.Kernel(1, threads=256):
            tx = T.get_thread_binding()
            C[tx] = 0
            if T.shuffle_elect(extent):
                T.atomic_add(C[tx // 32 * 32], 1)

    c = run(kernel, out=[((256,), np.int32)], extent=extent)
    assert np.flatnonzero(c).tolist() == list(expected) and c.sum() == len(list(expected))
