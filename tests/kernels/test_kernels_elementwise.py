"""Elementwise loops, copies and control flow, on every executor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit


@tilejit
def add(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, BM=32, BN=64):
    M, N = A.shape
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=128) as (bx, by):
        for i, j in T.Parallel(BM, BN):
            C[by * BM + i, bx * BN + j] = A[by * BM + i, bx * BN + j] + B[by * BM + i, bx * BN + j]


@pytest.mark.parametrize("shape", [(32, 64), (1, 1), (33, 65), (100, 7), (31, 127)], ids=str)
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int64, np.uint16]
)
def test_add_is_bitwise_numpy(run, rng, shape, dtype):
    a = (rng.standard_normal(shape) * 50).astype(dtype)
    b = (rng.standard_normal(shape) * 50).astype(dtype)
    c = run(add, a, b, out=[(shape, dtype)])
    assert c.tobytes() == (a + b).astype(dtype).tobytes()


@pytest.mark.parametrize("order", ["transposed", "sliced", "columns cut"])
def test_strided_arguments_are_read_where_they_are(run, rng, order):
    base = rng.standard_normal((80, 90)).astype(np.float32)
    a = {
        "transposed": base.T,
        "sliced": base[3:70:2, 5:77],
        "columns cut": base[:, 4:40],
    }[order]
    b = np.ascontiguousarray(a)
    c = run(add, a, b, out=[(a.shape, np.float32)])
    assert (c == a + b).all()


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8])
@pytest.mark.parametrize("target", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8])
def test_copy_casts_like_numpy(run, rng, source, target):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(T.ceildiv(A.shape[0], 64), threads=64) as bx:
            f = T.alloc_fragment((64,), A.dtype)
            T.copy(A[bx * 64], f)
            T.copy(f, C[bx * 64])

    a = (rng.standard_normal(150) * 20).astype(source)
    c = run(kernel, a, out=[((150,), target)])
    want = (
        a.astype(np.float32).astype(np.int32).astype(target)
        if (np.dtype(target).kind in "iu")
        else a.astype(target)
    )
    assert c.tobytes() == want.tobytes()


def test_copy_through_every_pair_of_scopes_moves_all_elements(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=64):
            s1 = T.alloc_shared((12, 20), "float32")
            s2 = T.alloc_shared((12, 20), "float32")
            f1 = T.alloc_fragment((12, 20), "float32")
            f2 = T.alloc_fragment((12, 20), "float32")
            T.copy(A, s1)
            T.copy(s1, s2)
            T.copy(s2, f1)
            T.copy(f1, f2)
            T.copy(f2, s1)
            T.copy(s1, B)
            T.copy(f1, C)
            T.copy(A, D)

    a = rng.standard_normal((12, 20)).astype(np.float32)
    for c in run(kernel, a, out=[((12, 20), np.float32)] * 3):
        assert (c == a).all()


@pytest.mark.parametrize("width", [1, 3, 20, 33, 229])
def test_fragment_of_any_width_holds_its_elements(run, rng, width):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, *, width):
        with T.Kernel(1, threads=128):
            f = T.alloc_fragment((5, width), "float32")
            T.copy(A, f)
            for i, j in T.Parallel(5, width):
                f[i, j] = f[i, j] * 2 + i - j
            T.copy(f, C)

    a = rng.standard_normal((5, width)).astype(np.float32)
    i, j = np.indices(a.shape)
    c = run(kernel, a, out=[(a.shape, np.float32)], width=width)
    assert (c == (a * 2 + i.astype(np.float32) - j.astype(np.float32))).all()


def test_fragment_cleared_in_a_loop_that_may_not_run_keeps_its_elements(run):
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(2, threads=32) as bx:
            f = T.alloc_fragment((32,), "float32")
            T.fill(f, 1)
            for _ in T.unroll(1):
                for _ in T.serial(bx):
                    T.clear(f)
            T.copy(f, C[bx * 32])

    c = run(kernel, out=[((64,), np.float32)])
    assert (c == np.repeat([1, 0], 32)).all()


@pytest.mark.usefixtures("executor")
def test_loop_with_copies_of_iterations_orders_tensors_that_are_one_array():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            f = T.alloc_fragment((8,), "float32")
            for i in T.Parallel(8):
                v = A[i]
                C[i] = v + 1
                f[i] = v
            T.copy(f, C[8])

    c = np.arange(16, dtype=np.float32)
    kernel(c[:8], c)
    assert c.tolist() == [*range(1, 9), *range(8)]


@pytest.mark.usefixtures("executor")
def test_loops_over_two_outputs_that_are_one_array_are_ordered():
    @tilejit
    def kernel(C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=128):
            f = T.alloc_fragment((128,), "float32")
            for i in T.Parallel(128):
                C[i] = i
            for i in T.Parallel(128):
                f[i] = D[127 - i]
            T.copy(f, D)

    c = np.zeros(128, np.float32)
    kernel(c, c)
    assert c.tolist() == [*reversed(range(128))]


@pytest.mark.usefixtures("executor")
def test_pipeline_does_not_read_ahead_of_what_it_writes_under_another_name():
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared((32,), "float32")
            for k in T.Pipelined(4, num_stages=3):
                T.copy(A[k * 32], s)
                for i in T.Parallel(32):
                    C[k * 32 + 32 + i] = s[i] + 1

    c = np.zeros(160, np.float32)
    kernel(c, c)
    assert c.tolist() == np.repeat(np.arange(5), 32).tolist()


def test_loop_with_copies_of_iterations_reads_back_what_it_has_written(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=128):
            f = T.alloc_fragment((8,), "float32")
            for i in T.Parallel(8):
                C[i] = A[i] + 1
                f[i] = C[i] * 2
                C[i] = f[i] - 1
            T.copy(f, D)

    a = rng.standard_normal(8).astype(np.float32)
    c, d = run(kernel, a, out=[((8,), np.float32)] * 2)
    assert (d == (a + 1) * 2).all()
    assert (c == d - 1).all()


def test_branch_that_updates_memory_and_a_fragment_runs_in_one_thread(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, D: T.Tensor):
        with T.Kernel(1, threads=128):
            f = T.alloc_fragment((8,), "float32")
            T.fill(f, 1)
            for i in T.Parallel(8):
                C[i] = A[i]
            for i in T.Parallel(8):
                with T.If(A[i] > 0):
                    C[i] += f[i]
                    f[i] = C[i] * 2
            T.copy(f, D)

    a = rng.standard_normal(8).astype(np.float32)
    c, d = run(kernel, a, out=[((8,), np.float32)] * 2)
    assert (c == np.where(a > 0, a + 1, a)).all()
    assert (d == np.where(a > 0, (a + 1) * 2, 1)).all()


@pytest.mark.parametrize("rounds", [0, 3])
def test_variable_of_a_loop_that_may_not_run_needs_no_value_before_it(run, rounds):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, n: T.int32):
        with T.Kernel(1, threads=32):
            C[0] = 0
            for k in T.serial(n):
                x = T.alloc_var("int32", A[k])
                x += 1
                C[0] += x

    a = np.arange(3, dtype=np.int32)
    c = run(lambda A, C: kernel(A, C, rounds), a, out=[((1,), np.int32)])
    assert c[0] == (6 if rounds else 0)


@pytest.mark.parametrize("threads", [48, 96, 128])
@pytest.mark.parametrize("rows", [16, 17, 32])
def test_loop_over_a_part_of_a_fragment_leaves_the_rest_alone(run, threads, rows):
    @tilejit
    def kernel(C: T.Tensor, *, threads, rows):
        with T.Kernel(1, threads=threads):
            f = T.alloc_fragment((rows, 16), "float32")
            T.fill(f, 1)
            for i, j in T.Parallel(16, 16):
                f[i, j] = 5
            T.copy(f, C)

    c = run(kernel, out=[((rows, 16), np.float32)], threads=threads, rows=rows)
    assert (c == np.where(np.arange(rows) < 16, 5, 1)[:, None]).all()


def test_transpose_through_shared_memory_is_right(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        M, N = A.shape
        with T.Kernel(T.ceildiv(N, 32), T.ceildiv(M, 32), threads=128) as (bx, by):
            s = T.alloc_shared((32, 32), A.dtype)
            T.copy(A[by * 32, bx * 32], s)
            for i, j in T.Parallel(32, 32):
                C[bx * 32 + i, by * 32 + j] = s[j, i]

    a = rng.standard_normal((45, 70)).astype(np.float32)
    assert (run(kernel, a, out=[((70, 45), np.float32)]) == a.T).all()


def test_fragment_read_transposed_goes_through_shared_memory(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=128):
            f = T.alloc_fragment((32, 16), "float32")
            g = T.alloc_fragment((16, 32), "float32")
            T.copy(A, f)
            for i, j in T.Parallel(16, 32):
                g[i, j] = f[j, i] + f[j, 15 - i]
            T.copy(g, C)

    a = rng.standard_normal((32, 16)).astype(np.float32)
    assert (run(kernel, a, out=[((16, 32), np.float32)]) == a.T + a.T[::-1]).all()


def test_stencil_reads_zeros_outside_the_tensor(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        N = A.shape[0]
        with T.Kernel(T.ceildiv(N, 128), threads=128) as bx:
            for i in T.Parallel(128):
                C[bx * 128 + i] = A[bx * 128 + i - 1] + A[bx * 128 + i] + A[bx * 128 + i + 1]

    a = rng.standard_normal(300).astype(np.float32)
    p = np.pad(a, 1)
    c = run(kernel, a, out=[((300,), np.float32)])
    assert (c == (p[:-2] + p[1:-1]) + p[2:]).all()


def test_if_then_else_reads_only_where_it_may(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=64):
            s = T.alloc_shared((64,), "float32")
            T.copy(A, s)
            for i in T.Parallel(64):
                C[i] = T.if_then_else(i > 0, s[i - 1], -1.0)

    a = rng.standard_normal(64).astype(np.float32)
    assert (run(kernel, a, out=[((64,), np.float32)]) == np.concatenate([[-1], a[:-1]])).all()


def test_branches_inside_parallel_loops_write_only_their_own(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        N = A.shape[0]
        with T.Kernel(T.ceildiv(N, 100), threads=64) as bx:
            for i in T.Parallel(100):
                v = A[bx * 100 + i]
                with T.If(v > 0):
                    C[bx * 100 + i] = T.sqrt(v)
                with T.Else():
                    with T.If(v < -1):
                        C[bx * 100 + i] = -1.0
                    with T.Else():
                        C[bx * 100 + i] = v * v

    a = rng.standard_normal(333).astype(np.float32)
    want = np.where(a > 0, np.sqrt(np.abs(a)), np.where(a < -1, np.float32(-1), a * a))
    assert (run(kernel, a, out=[((333,), np.float32)]) == want).all()


def test_serial_loop_inside_a_parallel_one_accumulates(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        M, K = A.shape
        N = B.shape[1]
        with T.Kernel(T.ceildiv(N, 16), T.ceildiv(M, 16), threads=64) as (bx, by):
            acc = T.alloc_fragment((16, 16), "float32")
            T.clear(acc)
            for i, j in T.Parallel(16, 16):
                for k in T.serial(K):
                    acc[i, j] += A[by * 16 + i, k] * B[k, bx * 16 + j]
            T.copy(acc, C[by * 16, bx * 16])

    a = rng.integers(-4, 4, (20, 13)).astype(np.float32)
    b = rng.integers(-4, 4, (13, 23)).astype(np.float32)
    assert (run(kernel, a, b, out=[((20, 23), np.float32)]) == a @ b).all()


def test_while_loop_with_a_different_count_for_each_element_ends(run):
    @tilejit
    def collatz(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(50):
                n = T.alloc_var("int32", A[i])
                steps = T.alloc_var("int32", 0)
                with T.While(n > 1):
                    n = T.if_then_else(n % 2 == 0, n // 2, 3 * n + 1)
                    steps += 1
                C[i] = steps

    def count(n):
        steps = 0
        while n > 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            steps += 1
        return steps

    a = np.arange(1, 51, dtype=np.int32)
    c = run(collatz, a, out=[((50,), np.int32)])
    assert c.tolist() == [count(int(n)) for n in a]


def test_histogram_with_atomics_counts_every_element(run, rng):
    @tilejit
    def histogram(A: T.Tensor, C: T.Tensor):
        N = A.shape[0]
        with T.Kernel(1, threads=128):
            for i in T.Parallel(16):
                C[i] = 0
            for i in T.Parallel(N):
                T.atomic_add(C[A[i]], 1)

    a = rng.integers(0, 16, 777).astype(np.int32)
    c = run(histogram, a, out=[((16,), np.int32)])
    assert (c == np.bincount(a, minlength=16)).all()


def test_statement_that_depends_on_no_thread_takes_effect_once_a_block(run):
    @tilejit
    def kernel(C: T.Tensor, D: T.Tensor):
        with T.Kernel(5, threads=96) as bx:
            T.atomic_add(C[0], 1)
            D[bx] = bx * 10
            D[bx] += 1

    @tilejit
    def zero(C: T.Tensor):
        with T.Kernel(1):
            C[0] = 0

    def both(C, D):
        zero(C)
        kernel(C, D)

    c, d = run(both, out=[((1,), np.int32), ((5,), np.int32)])
    assert c[0] == 5
    assert d.tolist() == [1, 11, 21, 31, 41]


def test_statement_that_depends_on_the_thread_takes_effect_once_a_thread(run):
    @tilejit
    def kernel(C: T.Tensor):
        with T.Kernel(2, threads=64) as bx:
            tx = T.get_thread_binding()
            C[bx, tx] = tx * 2 + bx

    c = run(kernel, out=[((2, 64), np.int32)])
    assert (c == np.arange(64) * 2 + np.arange(2)[:, None]).all()


def test_private_arrays_and_unrolled_and_vectorised_loops_work(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            tx = T.get_thread_binding()
            x = T.alloc_local((8,), "float32")
            total = T.alloc_var("float32", 0.0)
            for v in T.vectorized(8):
                x[v] = A[tx, v]
            for v in T.unroll(8):
                total += x[v]
            for v in T.vectorized(8):
                C[tx, v] = x[7 - v] - total

    a = rng.integers(-8, 8, (32, 8)).astype(np.float32)
    c = run(kernel, a, out=[((32, 8), np.float32)])
    assert (c == a[:, ::-1] - a.sum(1, keepdims=True)).all()


def test_private_array_indexed_at_run_time_is_right(run, rng):
    @tilejit
    def kernel(A: T.Tensor, I: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            tx = T.get_thread_binding()
            x = T.alloc_local((40,), "float32")
            for v in T.serial(40):
                x[v] = A[tx, v]
            for v in T.serial(40):
                C[tx, v] = x[I[tx, v]]

    a = rng.standard_normal((32, 40)).astype(np.float32)
    i = rng.integers(0, 40, (32, 40)).astype(np.int32)
    c = run(kernel, a, i, out=[((32, 40), np.float32)])
    assert (c == np.take_along_axis(a, i, 1)).all()


def test_uniform_branches_and_loops_around_tile_ops_are_followed(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, n: T.int32):
        M = A.shape[0]
        with T.Kernel(M) as bx:
            f = T.alloc_fragment((64,), "float32")
            T.clear(f)
            with T.If(bx % 2 == 0):
                T.copy(A[bx, 0], f)
            with T.Else():
                T.fill(f, 3.0)
            for k in T.serial(n):
                for j in T.Parallel(64):
                    f[j] = f[j] + k
            T.copy(f, C[bx, 0])

    def call(A, C):
        kernel(A, C, 4)

    a = rng.standard_normal((5, 64)).astype(np.float32)
    want = a.copy()
    want[1::2] = 3
    for k in range(4):
        want = want + np.float32(k)
    assert (run(call, a, out=[((5, 64), np.float32)]) == want).all()


def test_several_frames_run_one_after_the_other(run, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        N = A.shape[0]
        with T.Kernel(T.ceildiv(N, 64), threads=64) as bx:
            for i in T.Parallel(64):
                B[bx * 64 + i] = A[bx * 64 + i] * 2
        with T.Kernel(T.ceildiv(N, 64), threads=64) as bx:
            for i in T.Parallel(64):
                C[bx * 64 + i] = B[N - 1 - (bx * 64 + i)] + 1

    a = rng.standard_normal(200).astype(np.float32)
    b, c = run(kernel, a, out=[((200,), np.float32)] * 2)
    assert (b == a * 2).all()
    assert (c == (a * 2)[::-1] + 1).all()


def test_index_past_32_bits_is_computed_in_64(run):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        with T.Kernel(4) as bx:
            C[bx] = A[bx * 1000000000]

    a = np.array([7], np.int8)  # every other block reads far outside: zero, not wrapped around
    c = run(kernel, a, out=[((4,), np.int8)])
    assert c.tolist() == [7, 0, 0, 0]


def test_views_of_a_tensors_data_reach_the_same_memory(run, rng):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor):
        M, N = A.shape
        flat = T.Tensor((M * N,), A.dtype, data=A.data)
        out = T.make_tensor(C.data, (M * N,), C.dtype)
        with T.Kernel(T.ceildiv(M * N, 64), threads=64) as bx:
            for i in T.Parallel(64):
                out[bx * 64 + i] = flat[bx * 64 + i] * 2

    a = rng.standard_normal((9, 13)).astype(np.float32)
    assert (run(kernel, a, out=[((9, 13), np.float32)]) == a * 2).all()
