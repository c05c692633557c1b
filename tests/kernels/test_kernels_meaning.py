"""What the language means where NumPy or TileLang leave it open, on every executor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import SimulationError
from tilejit.runtime.device import use_executor


def test_integers_with_floats_and_divisions_have_the_documented_types(run):
    @tilejit
    def kernel(I: T.Tensor, H: T.Tensor, A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(6):
                A[i] = (I[i] + H[i]) / 3
                B[i] = I[i] / 4
                C[i] = I[i] // 4 * 100 + I[i] % 4

    x = np.array([-9, -4, -1, 0, 5, 2049], np.int32)
    h = np.array([0.5, 1, 0, 0, 0.25, 0], np.float16)
    a, b, c = run(kernel, x, h, out=[((6,), np.float32), ((6,), np.float64), ((6,), np.int32)])
    half = (x.astype(np.float16) + h) / np.float16(3)  # in float16 throughout
    assert (a == half.astype(np.float32)).all()
    assert (b == (x.astype(np.float32) / np.float32(4)).astype(np.float64)).all()
    assert (c == x // 4 * 100 + x % 4).all()


def test_stores_cast_integers_wrap_and_float8_saturates(run):
    @tilejit
    def kernel(A: T.Tensor, F: T.Tensor, W: T.Tensor, N: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(4):
                F[i] = A[i] * 1000.0
                W[i] = T.cast(A[i], "int32") * 1500000000
                N[i] = T.cast(A[i], "int32") * 100

    a = np.array([1.5, -2, 3, np.inf], np.float32)
    f, w, n = run(
        kernel, a, out=[((4,), ml_dtypes.float8_e4m3fn), ((4,), np.int64), ((4,), np.int8)]
    )
    assert f.astype(np.float32).tolist() == [448, -448, 448, 448]
    whole = np.array([1, -2, 3], np.int32)
    with np.errstate(over="ignore"):
        assert (w[:3] == whole * np.int32(1500000000)).all()
    assert (n[:3] == (whole * 100).astype(np.int8)).all()


def test_index_outside_a_tensor_reads_zero_and_writes_nothing(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(20):
                B[i - 5] = A[i - 8] + 1.0

    a = np.arange(1, 11, dtype=np.float32)
    want = [a[i - 3] + 1 if 0 <= i - 3 < 10 else 1 for i in range(10)]
    assert (run(kernel, a, out=[((10,), np.float32)]) == want).all()


def message(where, kernel, *arguments):
    """The headline of the report when the kernel runs."""
    with use_executor(where), pytest.raises(SimulationError) as caught:
        kernel(*arguments)
    assert caught.value.span is not None and __file__ == caught.value.span.filename
    return caught.value.headline


WHERE = pytest.mark.parametrize("where", ["reference", "simulator"])


@WHERE
@pytest.mark.parametrize("first", [-64, -1, 1, 1 << 30])
def test_index_outside_a_shared_tile_between_others_is_reported(where, first):
    @tilejit
    def kernel(P: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            before = T.alloc_shared((32,), "float32")
            s = T.alloc_shared((32,), "float32")
            after = T.alloc_shared((32,), "float32")
            for tile in (before, s, after):
                T.clear(tile)
            for i in T.Parallel(32):
                B[i] = s[P[i]] + before[i] + after[i]

    place = np.arange(32, dtype=np.int32) + first
    wrong = place[(place < 0) | (place >= 32)][0]
    assert message(where, kernel, place, np.zeros(32, np.float32)) == (
        f"`s[{wrong}]` is outside of `s`, whose shape is (32)."
    )


@WHERE
def test_row_that_ends_in_the_next_row_of_a_shared_tile_is_reported(where):
    @tilejit
    def kernel(P: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared((8, 32), "float32")
            T.clear(s)
            for i in T.Parallel(32):
                s[2, P[0] * 4 + i] = B[i]
            T.copy(s[0, :], B)

    assert message(where, kernel, np.array([1], np.int32), np.zeros(32, np.float32)) == (
        "`s[2, 32]` is outside of `s`, whose shape is (8, 32)."
    )


@WHERE
@pytest.mark.parametrize("size", [4, 40])
def test_index_outside_a_private_array_is_reported(where, size):
    @tilejit
    def kernel(P: T.Tensor, B: T.Tensor, *, size):
        with T.Kernel(1, threads=32):
            v = T.alloc_local((size,), "float32")
            tx = T.get_thread_binding(0)
            for k in T.serial(size):
                v[k] = k
            B[tx] = v[P[tx] + size - 4]

    def call(*arguments):
        kernel(*arguments, size=size)

    place = np.arange(32, dtype=np.int32) % 5
    assert message(where, call, place, np.zeros(32, np.float32)) == (
        f"`v[{size}]` is outside of `v`, whose shape is ({size})."
    )


@WHERE
def test_index_outside_a_tile_in_a_branch_that_is_not_taken_is_legal(where):
    @tilejit
    def kernel(P: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared((32,), "float32")
            T.fill(s, 3)
            for i in T.Parallel(32):
                with T.If(P[i] < 32):
                    B[i] = s[P[i]]

    b = np.zeros(32, np.float32)
    with use_executor(where):
        kernel(np.arange(32, dtype=np.int32) + 16, b)
    assert (b == np.repeat([3, 0], 16)).all()


@WHERE
def test_operand_slice_outside_a_shared_tile_is_reported(where):
    @tilejit
    def kernel(P: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            a = T.alloc_shared((2, 16, 16), "float16")
            b = T.alloc_shared((16, 16), "float16")
            acc = T.alloc_fragment((16, 16), "float32")
            T.clear(a)
            T.clear(b)
            T.gemm(a[P[0], :, :], b, acc, clear_accum=True)
            T.copy(acc, C)

    headline = message(where, kernel, np.array([2], np.int32), np.zeros((16, 16), np.float32))
    assert headline.startswith("`a[2, ") and "is outside of `a`" in headline


@WHERE
def test_iterations_that_store_different_values_to_one_element_are_reported(where):
    @tilejit
    def kernel(B: T.Tensor):
        with T.Kernel(1, threads=32):
            s = T.alloc_shared((32,), "int32")
            T.clear(s)
            for i in T.Parallel(32):
                s[i // 2] = i
            T.copy(s, B)

    with use_executor(where), pytest.raises(SimulationError):
        kernel(np.zeros(32, np.int32))


def test_load_before_a_store_keeps_the_old_value(run):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(32):
                C[i] = A[i]
                x = C[i]
                C[i] = 0
                B[i] = x

    a = np.arange(1, 33, dtype=np.int32)
    b, c = run(kernel, a, out=[((32,), np.int32)] * 2)
    assert (b == a).all() and (c == 0).all()
