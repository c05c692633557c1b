"""Threads that wait for each other at the user's own barriers, on every executor."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import SimulationError
from tilejit.runtime.device import use_executor

SLOTS = 2  # of the ring between producers and consumers


def doubled_sum(a):
    total = np.zeros(a.shape[1], np.float32)
    for row in a:
        total = total * 2 + row[::-1]
    return total


@tilejit
def in_two_arms(A: T.Tensor, C: T.Tensor):
    with T.Kernel(2, threads=64):
        ring = T.alloc_shared((SLOTS, 32), "float32")
        full = T.alloc_barrier([32] * SLOTS)
        empty = T.alloc_barrier([32] * SLOTS)
        tx = T.get_thread_binding()
        if tx < 32:
            for k in T.serial(A.shape[0]):
                T.mbarrier_wait_parity(empty[k % SLOTS], ((k // SLOTS) & 1) ^ 1)
                ring[k % SLOTS, tx] = A[k, tx]
                T.mbarrier_arrive(full[k % SLOTS])
        else:
            acc = T.alloc_var("float32")
            for k in T.serial(A.shape[0]):
                T.mbarrier_wait_parity(full[k % SLOTS], (k // SLOTS) & 1)
                acc = acc * 2 + ring[k % SLOTS, 63 - tx]
                T.mbarrier_arrive(empty[k % SLOTS])
            C[tx - 32] = acc


@tilejit
def in_two_branches(A: T.Tensor, C: T.Tensor):
    with T.Kernel(2, threads=64):
        ring = T.alloc_shared((SLOTS, 32), "float32")
        full = T.alloc_barrier([32] * SLOTS)
        empty = T.alloc_barrier([32] * SLOTS)
        tx = T.get_thread_binding()
        acc = T.alloc_var("float32")
        if tx >= 32:
            for k in T.serial(A.shape[0]):
                T.mbarrier_wait_parity(full[k % SLOTS], (k // SLOTS) & 1)
                acc = acc * 2 + ring[k % SLOTS, 63 - tx]
                T.mbarrier_arrive(empty[k % SLOTS])
            C[tx - 32] = acc
        if tx < 32:
            for k in T.serial(A.shape[0]):
                T.mbarrier_wait_parity(empty[k % SLOTS], ((k // SLOTS) & 1) ^ 1)
                ring[k % SLOTS, tx] = A[k, tx]
                T.mbarrier_arrive(full[k % SLOTS])


@tilejit
def in_three_arms(A: T.Tensor, C: T.Tensor):
    with T.Kernel(2, threads=96):
        first = T.alloc_shared((SLOTS, 32), "float32")
        second = T.alloc_shared((SLOTS, 32), "float32")
        full = T.alloc_barrier([32] * SLOTS)
        empty = T.alloc_barrier([32] * SLOTS)
        turned = T.alloc_barrier([32] * SLOTS)
        free = T.alloc_barrier([32] * SLOTS)
        tx = T.get_thread_binding()
        if tx < 32:
            for k in T.serial(A.shape[0]):
                T.mbarrier_wait_parity(empty[k % SLOTS], ((k // SLOTS) & 1) ^ 1)
                first[k % SLOTS, tx] = A[k, tx]
                T.mbarrier_arrive(full[k % SLOTS])
        elif tx < 64:
            for k in T.serial(A.shape[0]):
                T.mbarrier_wait_parity(full[k % SLOTS], (k // SLOTS) & 1)
                T.mbarrier_wait_parity(free[k % SLOTS], ((k // SLOTS) & 1) ^ 1)
                second[k % SLOTS, tx - 32] = first[k % SLOTS, 63 - tx]
                T.mbarrier_arrive(empty[k % SLOTS])
                T.mbarrier_arrive(turned[k % SLOTS])
        else:
            acc = T.alloc_var("float32")
            for k in T.serial(A.shape[0]):
                T.mbarrier_wait_parity(turned[k % SLOTS], (k // SLOTS) & 1)
                acc = acc * 2 + second[k % SLOTS, tx - 64]
                T.mbarrier_arrive(free[k % SLOTS])
            C[tx - 64] = acc


@pytest.mark.parametrize("kernel", [in_two_arms, in_two_branches, in_three_arms])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_producer_and_consumer_warps_run_side_by_side(run, rng, kernel, rows):
    a = rng.integers(-3, 3, (rows, 32)).astype(np.float32)
    assert (run(kernel, a, out=[((32,), np.float32)]) == doubled_sum(a)).all()


def test_branches_that_wait_for_each_other_have_no_block_barrier_between():
    a, c = np.zeros((7, 32), np.float32), np.zeros(32, np.float32)
    ptx = in_two_branches.compile(a, c, target="sm_90a").ptx
    assert ptx.count("bar.sync") == 1  # after the barriers have been initialised


@pytest.mark.parametrize("threads", [64, 128])
def test_all_threads_meeting_at_an_mbarrier_see_each_others_stores(run, rng, threads):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, *, threads):
        with T.Kernel(1, threads=threads):
            s = T.alloc_shared((2, 64), "float32")
            met = T.alloc_barrier([threads, threads])
            tx = T.get_thread_binding()
            acc = T.alloc_local((1,), "float32")
            acc[0] = 0
            for k in T.serial(A.shape[0]):
                if tx < 64:
                    s[k % 2, tx] = A[k, tx]
                T.mbarrier_arrive(met[k % 2])
                T.mbarrier_wait_parity(met[k % 2], (k // 2) % 2)
                if tx < 64:
                    acc[0] = acc[0] * 2 + s[k % 2, 63 - tx]
            if tx < 64:
                C[tx] = acc[0]

    a = rng.integers(-9, 9, (6, 64)).astype(np.float32)
    c = run(kernel, a, out=[((64,), np.float32)], threads=threads)
    assert (c == doubled_sum(a)).all()


@pytest.mark.parametrize("where", ["reference", "simulator"])
def test_warps_that_wait_for_each_other_first_are_found(where):
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=64):
            b = T.alloc_barrier([32, 32])
            tx = T.get_thread_binding()
            if tx < 32:
                T.mbarrier_wait_parity(b[0], 0)
                T.mbarrier_arrive(b[1])
            else:
                T.mbarrier_wait_parity(b[1], 0)
                T.mbarrier_arrive(b[0])
            C[tx] = 1

    with use_executor(where), pytest.raises(SimulationError, match="for ever"):
        kernel(np.zeros(64, np.float32))


@pytest.mark.parametrize("where", ["reference", "simulator"])
def test_wait_for_arrivals_that_never_come_is_found_among_three_arms(where):
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(1, threads=64):
            b = T.alloc_barrier(32)
            tx = T.get_thread_binding()
            if tx < 32:
                T.mbarrier_wait_parity(b, 0)
            elif tx < 40:
                C[tx] = 2
                T.mbarrier_wait_parity(b, 0)
            else:
                T.mbarrier_arrive(b)
            C[tx] = 1

    with use_executor(where), pytest.raises(SimulationError, match="for ever"):
        kernel(np.zeros(64, np.float32))


@pytest.mark.parametrize("where", ["reference", "simulator"])
def test_mistake_in_one_of_two_waiting_arms_is_reported(where):
    @tilejit
    def kernel(I: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((32,), "float32")
            b = T.alloc_barrier(32)
            tx = T.get_thread_binding()
            if tx < 32:
                T.mbarrier_wait_parity(b, 0)
                C[tx] = s[tx]
            else:
                s[I[0] + tx] = 1.0
                T.mbarrier_arrive(b)

    with use_executor(where), pytest.raises(SimulationError, match="s"):
        kernel(np.array([100], np.int32), np.zeros(64, np.float32))
