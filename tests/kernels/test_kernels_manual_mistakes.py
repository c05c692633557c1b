"""Mistakes of kernels written by hand, which a GPU would make nothing of: the simulator tells."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.errors import SimulationError
from tilejit.runtime.device import use_executor

GROUP = 128


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    with use_executor("simulator"), options(target="sm_90a"):
        yield


def numbers(*shape, dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@tilejit
def stored(A: T.Tensor, C: T.Tensor, *, fence=True, meets=True, waits=True):
    with T.Kernel(1, threads=GROUP):
        s = T.alloc_shared((32, 32), A.dtype)
        for k in range(2):
            for i, j in T.Parallel(32, 32):
                s[i, j] = A[k * 32 + i, j] + 1
            if fence:
                T.fence_proxy_async()
            if meets:
                T.sync_threads()
            T.tma_copy(s, C[k * 32, 0])
            if waits:
                T.tma_store_wait()
            T.sync_threads()


@pytest.mark.parametrize(
    "missing, words",
    [
        ("fence", "without a fence"),
        ("meets", "nothing orders the two"),
        ("waits", "that a bulk store of thread 0 is still reading"),
    ],
)
def test_store_without_its_fence_barrier_or_wait_is_found(missing, words):
    a = numbers(64, 32)
    c = np.zeros_like(a)
    stored(a, c)
    assert (c == a + 1).all()
    with pytest.raises(SimulationError, match=words):
        stored(a, c, **{missing: False})


@tilejit
def loaded(A: T.Tensor, C: T.Tensor, *, waits=True, frees=True, arrives=True):
    with T.Kernel(1, threads=2 * GROUP):
        s = T.alloc_shared((32, 32), A.dtype)
        full, empty = T.alloc_barrier(1), T.alloc_barrier(GROUP)
        with T.ws(1):
            if T.shuffle_elect(GROUP):
                for k in range(2):
                    if frees:
                        T.mbarrier_wait_parity(empty, (k & 1) ^ 1)
                    T.tma_copy(A[k * 32, 0], s, barrier=full)
                    if arrives:
                        T.mbarrier_arrive(full)
        with T.ws(0):
            for k in range(2):
                if waits:
                    T.mbarrier_wait_parity(full, k & 1)
                for i, j in T.Parallel(32, 32):
                    C[k * 32 + i, j] = s[i, j]
                T.mbarrier_arrive(empty)


@pytest.mark.parametrize(
    "missing, words",
    [
        ("waits", "reads shared memory that a bulk copy is still filling"),
        ("frees", "writes shared memory that a bulk copy is still filling"),
        ("arrives", "for ever"),
    ],
)
def test_ring_without_a_wait_or_an_arrival_is_found(missing, words):
    a = numbers(64, 32)
    c = np.zeros_like(a)
    loaded(a, c)
    assert (c == a).all()
    with pytest.raises(SimulationError, match=words):
        loaded(a, c, **{missing: False})


@tilejit
def multiplied(A: T.Tensor, C: T.Tensor, *, waits=True):
    with T.Kernel(1, threads=GROUP):
        a = T.alloc_shared((2, 64, 64), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        full = T.alloc_barrier([1, 1])
        T.clear(acc)
        for k in range(4):
            if T.shuffle_elect(0):
                T.tma_copy(A[k * 64, 0], a[k % 2, :, :], barrier=full[k % 2])
                T.mbarrier_arrive(full[k % 2])
            T.mbarrier_wait_parity(full[k % 2], (k // 2) & 1)
            T.wgmma_gemm(a[k % 2, :, :], a[k % 2, :, :], acc)
            T.wait_wgmma(1 if waits else 2)
            T.sync_threads()
        T.wait_wgmma(0)
        T.copy(acc, C)


def test_slot_that_is_filled_while_a_multiply_reads_it_is_found():
    a = (numbers(256, 64) % 5).astype(np.float16)
    c = np.zeros((64, 64), np.float32)
    multiplied(a, c)
    tiles = a.reshape(4, 64, 64).astype(np.float32)
    assert (c == sum(t @ t for t in tiles)).all()
    with pytest.raises(SimulationError, match="matrix product"):
        multiplied(a, c, waits=False)


@tilejit
def in_a_cluster(A: T.Tensor, C: T.Tensor, *, ends_together=True):
    with T.Kernel(2, threads=GROUP, cluster=2) as b:
        s = T.alloc_shared((64, 32), A.dtype)
        full = T.alloc_cluster_barrier(1)
        T.tma_copy(A, s, barrier=full, cluster_mask=0b11)
        if T.shuffle_elect(0):
            T.mbarrier_arrive(full)
        if ends_together or b == 0:
            T.mbarrier_wait_parity(full, 0)
            for i, j in T.Parallel(64, 32):
                C[b, i, j] = s[i, j]
        if ends_together:
            T.cluster_sync()


def test_block_that_ends_before_others_have_sent_to_it_is_found():
    a = numbers(64, 32)
    c = np.zeros((2, 64, 32), np.float32)
    in_a_cluster(a, c)
    assert (c == a).all()
    with pytest.raises(SimulationError, match=r"which has ended|The kernel ends while"):
        in_a_cluster(a, c, ends_together=False)


def test_warpgroup_that_arrives_twice_in_a_phase_is_found():
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=2 * GROUP):
            b = T.alloc_barrier([GROUP, 1])
            with T.ws(0):
                T.mbarrier_arrive(b[1])
            with T.ws(1):
                T.mbarrier_wait_parity(b[0], 0)
            C[T.get_thread_binding()] = 1

    with pytest.raises(SimulationError, match="for ever"):
        kernel(np.zeros(256, np.float32))
