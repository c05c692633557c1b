"""Indexes that are easy to get wrong: vectors that are none, integers that wrap or must not."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit


def test_vectorized_index_that_jumps_in_its_second_half_reads_the_right_elements(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for v in T.vectorized(12):
                B[v] = A[v % 6]

    a = np.arange(12, dtype=np.float32)
    assert (run(kernel, a, out=[((12,), np.float32)]) == np.tile(a[:6], 2)).all()


def test_vectorized_store_under_a_condition_stops_within_a_vector(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for v in T.vectorized(12):
                B[v] = 0.0
                with T.If(v < 6):
                    B[v] = A[v]

    a = np.arange(1, 13, dtype=np.float32)
    assert (run(kernel, a, out=[((12,), np.float32)]) == np.where(a <= 6, a, 0)).all()


def test_stride_that_differs_between_rows_is_no_vector_in_any(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared((1, 256), "float32")
            T.copy(A, s)
            for i, j in T.Parallel(2, 128):
                B[i, j] = s[0, j * (i + 1)]

    a = np.arange(256, dtype=np.float32)[None]
    b = run(kernel, a, out=[((2, 128), np.float32)])
    assert (b == np.stack([a[0, :128], a[0, ::2]])).all()


def test_choice_that_differs_within_a_vector_loads_what_it_needs(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(128):
                B[i] = T.if_then_else(i % 2 == 1, A[i + 4], 0.0)

    a = np.arange(1, 129, dtype=np.float32)
    shifted = np.append(a[4:], [0, 0, 0, 0])
    want = np.where(np.arange(128) % 2 == 1, shifted, 0)
    assert (run(kernel, a, out=[((128,), np.float32)]) == want).all()


@pytest.mark.parametrize("offset", [-40, -3, -1, 0, 1, 20, 31, 33, 1 << 29])
def test_vector_at_an_offset_known_at_run_time_is_guarded_at_both_ends(run, offset):
    @tilejit
    def kernel(A: T.Tensor, I: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(128):
                B[i] = A[I[0] * 4 + i]

    a = np.arange(1, 101, dtype=np.float32)
    at = np.arange(128) + offset * 4
    want = np.where((at >= 0) & (at < 100), a[np.clip(at, 0, 99)], 0)
    b = run(kernel, a, np.array([offset], np.int32), out=[((128,), np.float32)])
    assert (b == want).all()


def test_unsigned_arithmetic_in_an_index_wraps_as_the_value_does(run):
    @tilejit
    def kernel(U: T.Tensor, A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(64):
                B[i] = A[U[i] * 2654435761 >> 28]

    u = (np.arange(64, dtype=np.uint64) * 2246822519 + 7).astype(np.uint32)
    a = np.arange(16, dtype=np.int32) * 3
    want = a[u * np.uint32(2654435761) >> np.uint32(28)]
    assert (run(kernel, u, a, out=[((64,), np.int32)]) == want).all()


def test_narrow_arithmetic_in_an_index_wraps_as_the_value_does(run):
    @tilejit
    def kernel(U: T.Tensor, A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(64):
                B[i] = A[U[i] * U[i] >> 4]

    u = (np.arange(64) * 5).astype(np.uint8)
    a = np.arange(16, dtype=np.int32) * 3
    assert (run(kernel, u, a, out=[((64,), np.int32)]) == a[u * u >> 4]).all()


def test_cast_to_fewer_bits_in_an_index_wraps(run):
    @tilejit
    def kernel(U: T.Tensor, A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared((16,), "int32")
            T.copy(A, s)
            for i in T.Parallel(64):
                B[i] = A[T.cast(U[i], "int32")] + s[T.cast(U[i], "int32")]

    u = np.arange(64, dtype=np.int64) % 16 + 2**32
    a = np.arange(16, dtype=np.int32) * 3
    assert (run(kernel, u, a, out=[((64,), np.int32)]) == 2 * a[u - 2**32]).all()


def test_signed_arithmetic_in_an_index_never_wraps(run):
    @tilejit
    def kernel(U: T.Tensor, A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(64):
                square = U[i] * U[i]
                B[i] = A[(square >> 4) % 16] + A[square & 15] * 16
                B[i] += A[(square ^ -3) & 15] * 256 + A[(square // -T.max(U[i], 1)) % 16] * 4096

    u = np.arange(64, dtype=np.int32) * 40000
    a = np.arange(16, dtype=np.int32)
    q = u.astype(np.int64) ** 2
    want = (q >> 4) % 16 + (q & 15) * 16 + ((q ^ -3) & 15) * 256
    want += q // -np.maximum(u, 1) % 16 * 4096
    assert (run(kernel, u, a, out=[((64,), np.int32)]) == want).all()


def test_shift_by_more_than_the_width_in_an_index_leaves_zero(run):
    @tilejit
    def kernel(U: T.Tensor, A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(40):
                B[i] = A[T.int32(1) << U[i]]

    a = np.arange(1, 17, dtype=np.int32)
    want = [a[1 << k] if k < 4 else (a[0] if k >= 32 else 0) for k in range(40)]
    b = run(kernel, np.arange(40, dtype=np.int32), a, out=[((40,), np.int32)])
    assert (b == want).all()
