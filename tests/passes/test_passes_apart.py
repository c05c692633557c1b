"""Loops whose rounds write elements of their own do not meet; those whose rounds share any do."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.ir.node import walk
from tilejit.ir.sync import SyncThreads
from tilejit.runtime.device import use_executor

THREADS = 64


@tilejit
def in_a_row(A: T.Tensor, C: T.Tensor):
    with T.Kernel(1, threads=THREADS):
        for k in range(4):
            for j in T.Parallel(96):
                C[k * 96 + j] = A[k * 96 + j]


@tilejit
def by_steps(A: T.Tensor, C: T.Tensor):
    with T.Kernel(1, threads=THREADS):
        for k in T.serial(0, A.shape[0], 96):
            for j in T.Parallel(96):
                C[k + j] = A[k + j]


@tilejit
def interleaved(A: T.Tensor, C: T.Tensor):
    with T.Kernel(2, threads=THREADS) as b:
        for k in range(A.shape[0] // 8):
            for j in T.Parallel(4):
                C[k * 8 + j * 2 + b] = A[k * 8 + j * 2 + b]


@tilejit
def in_two_loops(A: T.Tensor, C: T.Tensor):
    with T.Kernel(1, threads=THREADS):
        for k in range(4):
            for m in range(2):
                for j in T.Parallel(48):
                    C[k * 96 + m * 48 + j] = A[k * 96 + m * 48 + j]


@tilejit
def by_a_thread_each(A: T.Tensor, C: T.Tensor):
    with T.Kernel(1, threads=THREADS):
        thread = T.get_thread_binding()
        for k in range(6):
            C[k * 64 + thread] = A[k * 64 + thread]


@tilejit
def columns(A: T.Tensor, C: T.Tensor):
    """Two stores of a round, to elements that only another index tells apart."""
    with T.Kernel(1, threads=THREADS):
        for k in range(A.shape[0] // 32):
            for i in T.Parallel(32):
                C[k * 32 + i, 0] = A[k * 32 + i, 0]
                C[k * 32 + i, 1] = A[k * 32 + i, 1]


@tilejit
def overlapping(A: T.Tensor, C: T.Tensor):
    with T.Kernel(1, threads=THREADS):
        for k in range(5):
            for j in T.Parallel(128):
                C[k * 64 + j] = A[k * 64 + j]


@tilejit
def shifted_by_another_loop(A: T.Tensor, C: T.Tensor):
    """Rounds of the outer loop share elements, for the inner loop's variable begins at its own."""
    with T.Kernel(1, threads=THREADS):
        for k in range(1, 65):
            for m in range(k, k + 4):
                for j in T.Parallel(2):
                    C[(4 * k - m) * 2 + j] = A[(4 * k - m) * 2 + j]


@tilejit
def by_a_loaded_index(A: T.Tensor, P: T.Tensor, C: T.Tensor):
    with T.Kernel(1, threads=THREADS):
        for k in range(4):
            at = P[k]
            for j in T.Parallel(96):
                C[at + j] = A[at + j]


@tilejit
def by_a_thread_from_its_own_place(A: T.Tensor, P: T.Tensor, C: T.Tensor):
    with T.Kernel(1, threads=THREADS):
        thread = T.get_thread_binding()
        at = P[thread]
        for k in range(5):
            C[k * 64 + at] = A[k * 64 + at]


@tilejit
def read_by_the_next(A: T.Tensor, C: T.Tensor):
    """A round reads what the one before has written, which another thread did."""
    with T.Kernel(1, threads=THREADS):
        for j in T.Parallel(96):
            C[j] = A[j]
        for k in range(1, 4):
            for j in T.Parallel(96):
                C[k * 96 + j] = C[k * 96 - 1 - j] * 0 + A[k * 96 + j]


@tilejit
def read_after_the_loop(A: T.Tensor, C: T.Tensor):
    with T.Kernel(1, threads=THREADS):
        s = T.alloc_shared((384,), "float32")
        for k in range(4):
            for j in T.Parallel(96):
                s[k * 96 + j] = A[383 - k * 96 - j]
        for j in T.Parallel(384):
            C[j] = s[383 - j]


def meetings(kernel, *specs):
    planned = kernel.compile(*specs, target="sm_90a").kernels[0].planned
    return sum(isinstance(n, SyncThreads) for n in walk(planned.body))


APART = [in_a_row, by_steps, interleaved, in_two_loops, by_a_thread_each, columns]
SHARED = [overlapping, shifted_by_another_loop, by_a_loaded_index, by_a_thread_from_its_own_place,
          read_by_the_next, read_after_the_loop]  # fmt: skip


def arguments(kernel):
    shape = (192, 2) if kernel is columns else (384,)
    a = np.arange(384, dtype=np.float32).reshape(shape)
    if kernel is by_a_loaded_index:
        return a, np.array([0, 96, 192, 288], np.int32)
    if kernel is by_a_thread_from_its_own_place:
        return a, np.arange(THREADS, dtype=np.int32) * 2
    return (a,)


@pytest.mark.parametrize("kernel", APART, ids=lambda k: k.__name__)
def test_rounds_with_elements_of_their_own_do_not_meet(kernel):
    (a,) = arguments(kernel)
    assert meetings(kernel, a, a.copy()) == 0


@pytest.mark.parametrize("kernel", SHARED, ids=lambda k: k.__name__)
def test_rounds_that_share_elements_meet(kernel):
    inputs = arguments(kernel)
    assert meetings(kernel, *inputs, inputs[0].copy()) >= 1


@pytest.mark.parametrize("kernel", APART + SHARED, ids=lambda k: k.__name__)
@pytest.mark.parametrize("executor", ["reference", "simulator"])
def test_results_are_right(executor, kernel):
    inputs = arguments(kernel)
    c = np.full_like(inputs[0], np.nan)
    with use_executor(executor), options(target="sm_90a"):
        kernel(*inputs, c)
    is_written = ~np.isnan(c)
    assert (c == inputs[0])[is_written].all()
    assert is_written.all() or kernel in SHARED
