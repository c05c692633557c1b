"""`T.cumsum` and `T.cummax` as recorded, and what they refuse."""

from __future__ import annotations

import pytest
from traced import kernel, refused, tensor

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ShapeError,
    TraceError,
)
from tilejit.ops.reduce import ReduceKind
from tilejit.ops.scan import Scan


def test_both_names_record_a_scan():
    with kernel() as nodes:
        a, b = T.alloc_fragment((8, 16), "float16"), T.alloc_shared((8, 16), "float32")
        T.cumsum(a, b, -1, True)
        T.cummax(src=a, dim=1, nan_propagate=True)
    sums, maxima = nodes
    assert isinstance(sums, Scan) and isinstance(maxima, Scan)
    assert sums.kind is ReduceKind.SUM and maxima.kind is ReduceKind.MAX
    assert sums.axis == maxima.axis == 1 and sums.reverse and not maxima.reverse
    assert maxima.keeps_nan and not sums.keeps_nan
    assert sums.reads == (a.buffer,) and sums.writes == (b.buffer,)
    assert maxima.reads == maxima.writes == (a.buffer,)
    assert sums.accumulator.name == "float32"


def test_the_first_dimension_is_scanned_where_nothing_is_said():
    with kernel() as nodes:
        T.cumsum(T.alloc_shared((4, 8, 16), "int32")[1, :, :])
    (node,) = nodes
    assert node.axis == 0 and node.src.shape == node.dst.shape == (8, 16)


def test_results_of_another_shape_are_refused():
    with (
        kernel(),
        refused(
            ShapeError,
            "T.cumsum: `a` is 8x16, but `b` is 8x8.",
            "There is one result for each element.",
        ),
    ):
        a, b = T.alloc_fragment((8, 16), "float32"), T.alloc_fragment((8, 8), "float32")
        T.cumsum(a, b)


def test_dimension_that_is_not_there_is_refused():
    with kernel(), refused(ArgumentError, "T.cummax: dim is 2, but `a` is 8x16."):
        a = T.alloc_fragment((8, 16), "float32")
        T.cummax(a, dim=2)
    with kernel(), refused(ArgumentTypeError, "T.cumsum: dim is '0', not an integer."):
        a = T.alloc_fragment((8, 16), "float32")
        T.cumsum(a, dim="0")


def test_flags_must_be_known_while_tracing():
    with (
        kernel(),
        refused(
            ArgumentTypeError, "T.cumsum: reverse is 'no'; it must be True or False while tracing."
        ),
    ):
        a = T.alloc_fragment((8, 16), "float32")
        T.cumsum(a, reverse="no")


def test_dtypes_that_hold_no_sums_are_refused():
    with (
        kernel(),
        refused(DTypeError, "T.cumsum: `a` is bool, which holds no sum.", "Allocate it as int32."),
    ):
        a = T.alloc_fragment((8,), "bool")
        T.cumsum(a)
    with (
        kernel(),
        refused(
            DTypeError,
            "T.cumsum: `a` is float32, whose values `b` of int32 does not hold.",
            'Allocate `b` as "float32".',
        ),
    ):
        a, b = T.alloc_fragment((8,), "float32"), T.alloc_fragment((8,), "int32")
        T.cumsum(a, b)


def test_tensors_and_elements_are_refused():
    A = tensor("A", (8, 16))
    with (
        kernel(),
        refused(
            ArgumentError,
            "T.cumsum: the source is in global memory, but it has to be in a fragment or shared "
            "memory.",
            "Copy it to a fragment with T.copy first.",
        ),
    ):
        T.cumsum(A)
    with (
        kernel(),
        refused(
            ArgumentError,
            "T.cumsum: `dst` is in global memory, but it has to be in a fragment or shared memory.",
            "Scan to a fragment, and copy that with T.copy.",
        ),
    ):
        a = T.alloc_fragment((8, 16), "float32")
        T.cumsum(a, A)


def test_scan_inside_parallel_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=32):
            a = T.alloc_fragment((4,), "float32")
            for _ in T.Parallel(4):
                T.cumsum(a)

    with pytest.raises(TraceError, match=r"^T.cumsum is not allowed inside T.Parallel"):
        kernel.compile(T.Tensor((4,), "float32"), target="sm_80")
