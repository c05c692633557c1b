"""The block meets where one thread uses what another has used; the simulator reports what is
missing."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit


def test_loops_that_share_elements_between_iterations_are_ordered(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((64,), "int32")
            T.clear(s)
            for i in T.Parallel(64):
                T.atomic_add(s[i // 2], A[i])
            for i in T.Parallel(64):
                B[i] = s[i // 2]

    a = np.arange(64, dtype=np.int32)
    b = run(kernel, a, out=[((64,), np.int32)])
    assert (b == np.repeat(a.reshape(32, 2).sum(1), 2)).all()


def test_tile_ops_in_a_vectorized_loop_are_ordered(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        N = A.shape[1]
        with T.Kernel(1, threads=64):
            s, a = T.alloc_shared((N,), "float32"), T.alloc_fragment((N,), "float32")
            total = T.alloc_fragment((1,), "float32")
            T.clear(total)
            for row in T.vectorized(4):
                T.copy(A[row, 0:N], s)
                for j in T.Parallel(N):
                    B[row, j] = s[N - 1 - j]
                T.copy(s, a)
                T.reduce_sum(a, total, dim=0, clear=False)
            T.copy(total, C)

    a = rng.integers(-9, 10, (4, 200)).astype(np.float32)
    b, c = run(kernel, a, out=[((4, 200), np.float32), ((1,), np.float32)])
    assert (b == a[:, ::-1]).all()
    assert c[0] == a.sum(dtype=np.float64)


def test_parallel_loops_stand_in_a_vectorized_loop(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=64):
            for k in T.vectorized(4):
                for i in T.Parallel(50):
                    B[i, k] = 2 * A[i, k]

    a = rng.integers(-9, 10, (50, 4)).astype(np.float32)
    assert (run(kernel, a, out=[(a.shape, np.float32)]) == 2 * a).all()


def test_element_read_by_two_iterations_is_not_overwritten_early(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((64,), "int32")
            T.copy(A, s)
            for i in T.Parallel(64):
                B[i] = s[i // 2]
            for i in T.Parallel(64):
                with T.If(i % 2 == 0):
                    s[i // 2] = -1
            for i in T.Parallel(64):
                B[i] += s[i]

    a = np.arange(64, dtype=np.int32)
    b = run(kernel, a, out=[((64,), np.int32)])
    assert (b == a // 2 + np.where(a < 32, -1, a)).all()


def test_loops_over_a_tile_and_a_shifted_view_of_it_are_ordered(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((65,), "int32")
            v = T.SharedBuffer((64,), "int32", data=s, elem_offset=1)
            T.clear(s)
            for i in T.Parallel(64):
                s[i] = A[i]
            for i in T.Parallel(64):
                B[i] = v[i]

    a = np.arange(64, dtype=np.int32)
    assert (run(kernel, a, out=[((64,), np.int32)]) == np.append(a[1:], 0)).all()


def test_thread_index_that_two_threads_share_is_ordered(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=64):
            tx = T.get_thread_binding(0)
            s = T.alloc_shared((65,), "int32")
            T.clear(s)
            T.atomic_add(s[tx + tx % 2], A[tx])
            B[tx] = s[tx + tx % 2]

    a = np.arange(64, dtype=np.int32)
    at = a + a % 2
    sums = np.bincount(at, a, 65).astype(np.int32)
    assert (run(kernel, a, out=[((64,), np.int32)]) == sums[at]).all()


def test_element_that_a_while_loop_tests_is_not_changed_while_others_test(run):
    @tilejit
    def kernel(B: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((1,), "int32")
            rounds = T.alloc_var("int32")
            s[0] = 0
            T.sync_threads()
            with T.While(s[0] < 3):
                rounds = rounds + 1
                T.sync_threads()
                s[0] = s[0] + 1
                T.sync_threads()
            s[0] = 7
            B[0] = s[0] + rounds * 10

    assert run(kernel, out=[((1,), np.int32)]) == [37]


@pytest.mark.parametrize("rounds", [(4, 4), (1, 3), (0, 2), (3, 0)])
@pytest.mark.parametrize("stages", [2, 3])
def test_pipeline_in_a_loop_does_not_refill_what_is_still_read(run, rng, rounds, stages):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, N: T.Tensor, C: T.Tensor, *, stages):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), "float16")
            b = T.alloc_shared((32, 64), "float16")
            acc = T.alloc_fragment((64, 64), "float32")
            for t in T.serial(2):
                T.clear(acc)
                for k in T.Pipelined(N[t], num_stages=stages):
                    T.copy(A[t * 64, k * 32], a)
                    T.copy(B[k * 32, 0], b)
                    T.gemm(a, b, acc)
                T.copy(acc, C[t * 64, 0])

    a = rng.integers(-3, 4, (128, 128)).astype(np.float16)
    b = rng.integers(-3, 4, (128, 64)).astype(np.float16)
    c = run(kernel, a, b, np.array(rounds, np.int32), out=[((128, 64), np.float32)], stages=stages)
    for t, n in enumerate(rounds):
        rows = a[t * 64 : t * 64 + 64, : n * 32].astype(np.float32)
        assert (c[t * 64 : t * 64 + 64] == rows @ b[: n * 32].astype(np.float32)).all()


def test_pipeline_in_a_pipeline_is_right(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((64,), "float32")
            t = T.alloc_shared((64,), "float32")
            acc = T.alloc_fragment((64,), "float32")
            T.clear(acc)
            for k in T.Pipelined(4, num_stages=3):
                T.copy(A[k * 64], s)
                for j in T.Pipelined(k, num_stages=2):
                    T.copy(B[j * 64], t)
                    for i in T.Parallel(64):
                        acc[i] += s[63 - i] * t[i]
            T.copy(acc, C)

    a, b = (rng.integers(1, 100, (4, 64)).astype(np.float32) for _ in "ab")
    want = sum(a[k, ::-1] * b[j] for k in range(4) for j in range(k))
    assert (run(kernel, a.ravel(), b.ravel(), out=[((64,), np.float32)]) == want).all()


def test_pipelined_buffer_read_after_the_loop_holds_the_last_copy(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((64,), "float32")
            acc = T.alloc_fragment((64,), "float32")
            T.clear(acc)
            for k in T.Pipelined(4, num_stages=2):
                T.copy(A[k * 64], s)
                for i in T.Parallel(64):
                    acc[i] += s[63 - i]
            for i in T.Parallel(64):
                B[i] = acc[i] + s[i]

    a = rng.integers(1, 100, (4, 64)).astype(np.float32)
    b = run(kernel, a.ravel(), out=[((64,), np.float32)])
    assert (b == a.sum(0)[::-1] + a[3]).all()
