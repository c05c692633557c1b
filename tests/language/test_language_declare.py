"""`A: T.Tensor(...)` in a function's body, and T.const."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import ArgumentError, DTypeError, ShapeError, TileError, TraceError

pytestmark = pytest.mark.usefixtures("reference")
OUTSIDE = T.dynamic("OUTSIDE")


@pytest.mark.parametrize("symbol", [T.const, T.dynamic, T.symbolic])
def test_names_of_extents_are_integers_of_the_call(symbol):
    seen = []

    @tilejit
    def kernel(A, B):
        M, N = symbol("M, N")
        A: T.Tensor((M, N), "float32")
        B: T.Tensor[(N,), T.float32]
        seen.append((M, N))
        out = T.empty((M,), "float32")
        with T.Kernel(M, threads=32) as row:
            tile = T.alloc_shared((N,), "float32")
            T.copy(A[row, 0], tile)
            total = T.alloc_var("float32")
            for j in range(N):
                total += tile[j] * B[j]
            out[row] = total
        return out

    for m, n in ((3, 5), (4, 7), (0, 5)):
        a, b = np.ones((m, n), np.float32), np.arange(n, dtype=np.float32)
        assert (kernel(a, b) == a @ b).all()
        if m:
            assert seen[-1] == (m, n)


def test_extents_that_are_expressions_are_checked_when_their_symbols_are_known():
    @tilejit
    def kernel(A, B):
        n = T.const("n")
        A: T.Tensor((2 * n + 1,), "float32")
        B: T.Tensor((n,), "float32")
        with T.Kernel(1, threads=32):
            for i in T.Parallel(n):
                B[i] = A[2 * i + 1]

    a, b = np.arange(9, dtype=np.float32), np.zeros(4, np.float32)
    kernel(a, b)
    assert (b == a[1::2]).all()
    with pytest.raises(ShapeError) as caught:
        kernel(a[:8], b)
    assert caught.value.headline == "A.shape[0] is 8, but its annotation declares 9."


def test_strides_of_the_body_bind_and_are_checked():
    @tilejit
    def kernel(A, B):
        m, n, s = T.const("m n s")
        A: T.StridedTensor((m, n), (s, 1), "float32")
        B: T.Tensor((m, n), "float32")
        with T.Kernel(1, threads=32):
            for i, j in T.Parallel(m, n):
                B[i, j] = A[i, j] + s

    base = np.ones((4, 10), np.float32)
    b = np.zeros((4, 6), np.float32)
    kernel(base[:, :6], b)
    assert (b == 11).all()
    with pytest.raises(ShapeError) as caught:
        kernel(base[:, :6], base[:, 4:])
    assert caught.value.headline == "B.strides[0] is 10, but its annotation declares 6."


def test_arguments_that_are_not_as_declared_are_refused():
    @tilejit
    def kernel(A, B):
        M, N = T.const("M, N")
        A: T.Tensor((M, N), "float32")
        B: T.Tensor((N, 4), "float32")
        with T.Kernel(1):
            B[0, 0] = A[0, 0]

    def headline(error: type[TileError], a, b) -> str:
        with pytest.raises(error) as caught:
            kernel(a, b)
        assert caught.value.span is not None
        assert "test_language_declare.py" in caught.value.span.filename
        return caught.value.headline

    a = np.ones((2, 3), np.float32)
    assert headline(DTypeError, a.astype(np.float16), np.ones((3, 4), np.float32)) == (
        "A is float16, but its annotation declares float32."
    )
    assert headline(ShapeError, a[0], np.ones((3, 4), np.float32)) == (
        "A has 1 dimension, but its annotation declares 2."
    )
    assert headline(ShapeError, a, np.ones((5, 4), np.float32)) == (
        "B.shape[0] is 5, but its annotation declares 3."
    )
    assert headline(ShapeError, a, np.ones((3, 5), np.float32)) == (
        "B.shape[1] is 5, but its annotation declares 4."
    )


def test_one_name_for_two_extents_of_one_array_must_be_one_number():
    @tilejit
    def kernel(A):
        M = T.const("M")
        A: T.Tensor((M, M), "float32")
        with T.Kernel(1):
            A[0, 0] = 1

    kernel(np.zeros((3, 3), np.float32))
    with pytest.raises(ShapeError) as caught:
        kernel(np.zeros((3, 4), np.float32))
    assert caught.value.headline == "A.shape[1] is 4, but M is 3 already."


def test_symbol_made_outside_is_refused_in_a_body():
    @tilejit
    def kernel(A):
        A: T.Tensor((OUTSIDE,), "float32")
        with T.Kernel(OUTSIDE) as b:
            A[b] = 1

    with pytest.raises(TraceError) as caught:
        kernel(np.zeros(3, np.float32))
    assert caught.value.headline == (
        "The symbol `OUTSIDE` was made outside the function whose body uses it."
    )
    assert caught.value.hint == (
        'Write `OUTSIDE = T.const("OUTSIDE")` in the body, or annotate the parameter itself.'
    )


def test_name_that_only_an_annotation_uses_and_the_function_lacks_is_refused():
    dtype = "float32"

    @tilejit
    def kernel(A):
        A: T.Tensor((3,), dtype)  # Python captures no name for this
        with T.Kernel(1):
            A[0] = 1

    with pytest.raises(TraceError) as caught:
        kernel(np.zeros(3, np.float32))
    assert caught.value.headline == (
        "The annotation of `A` uses a name that is not defined: name 'dtype' is not defined."
    )


def test_symbol_that_no_argument_names_is_refused():
    @tilejit
    def kernel(A):
        n, k = T.const("n, k")
        A: T.Tensor((n,), "float32")
        out = T.empty((k,), "float32")
        with T.Kernel(1):
            out[0] = A[0]
        return out

    with pytest.raises(TraceError) as caught:
        kernel(np.zeros(3, np.float32))
    assert caught.value.headline == (
        "The symbol `k` stands in no argument's shape, so a call cannot know it."
    )


def test_const_outside_a_function_is_refused():
    with pytest.raises(TraceError) as caught:
        T.const("M")
    assert caught.value.headline == "T.const is only allowed inside a @tilejit function."


def test_annotations_of_other_names_mean_nothing():
    @tilejit
    def kernel(A, n: int):
        n: int
        x: T.Tensor((1, 2, 3), "int8")
        A: int
        with T.Kernel(1):
            x = A[0]
            A[0] = x + n

    a = np.ones(1, np.float32)
    kernel(a, 4)
    assert a[0] == 5


def test_compile_takes_specs_with_symbols_for_a_body_that_declares():
    @tilejit
    def kernel(A, B):
        n = T.const("n")
        A: T.Tensor((n,), "float32")
        B: T.Tensor((n,), "float32")
        with T.Kernel(T.ceildiv(n, 32), threads=32) as b:
            for i in T.Parallel(32):
                B[b * 32 + i] = A[b * 32 + i]

    spec = T.Tensor((T.dynamic("length"),), "float32")
    compiled = kernel.compile(spec, spec, target="sm_80")
    for n in (5, 70):
        a, b = np.arange(n, dtype=np.float32), np.zeros(n, np.float32)
        compiled(a, b)
        assert (a == b).all()


@pytest.mark.parametrize("grid", [1, 2])
def test_names_in_a_tuple_take_each_extent_of_the_grid(grid):
    @tilejit
    def one(A: T.Tensor):
        with T.Kernel(3) as (bx,):
            A[bx] = bx

    @tilejit
    def two(A: T.Tensor):
        with T.Kernel(3, 1) as (bx, by):
            A[bx] = bx + by

    a = np.zeros(3, np.float32)
    (one, two)[grid - 1](a)
    assert (a == [0, 1, 2]).all()


def test_block_indexes_and_names_that_differ_in_number_are_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(4, 2, 1) as (bx, by):
            A[bx] = by

    @tilejit
    def single(A: T.Tensor):
        with T.Kernel(4, 2) as (bx,):
            A[bx] = 1

    for bad, names in ((kernel, "3 block indexes, but 2 names take"),
                       (single, "2 block indexes, but 1 name takes")):  # fmt: skip
        with pytest.raises(ArgumentError) as caught:
            bad(np.zeros(4, np.float32))
        assert caught.value.headline == f"T.Kernel gives {names} them."
        assert caught.value.hint == "Write one name for each extent."


def test_kernel_whose_grid_alone_uses_a_symbol_runs():
    n = T.dynamic("n")

    @tilejit
    def kernel(A: T.Tensor((n,), "float32")):
        with T.Kernel(n, threads=32) as b:
            A[b]  # an unused load is dropped

    kernel(np.zeros(3, np.float32))
