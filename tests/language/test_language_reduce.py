"""`T.reduce` and its kin as recorded, and what they refuse."""

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
    UnsupportedError,
)
from tilejit.ops.reduce import Reduce, ReduceKind


def tiles(dtype="float32", shape=(8, 16), out=(8,), out_dtype=None):
    a = T.alloc_fragment(shape, dtype)
    out = T.alloc_fragment(out, out_dtype or dtype)
    return a, out


@pytest.mark.parametrize("kind", list(ReduceKind))
def test_every_name_records_its_op(kind):
    with kernel() as nodes:
        a, out = tiles("int32")
        getattr(T, f"reduce_{kind}")(a, out)
        T.reduce(a, out, str(kind), 1, False)
    first, second = nodes
    assert isinstance(first, Reduce) and isinstance(second, Reduce)
    assert first.kind is second.kind is kind and first.axis == second.axis == 1
    assert first.clear and not second.clear
    assert first.reads == (a.buffer,) and second.reads == (a.buffer, out.buffer)
    assert first.writes == second.writes == (out.buffer,)


def test_dimension_may_be_kept_with_an_extent_of_one():
    with kernel() as nodes:
        a, out = tiles(shape=(4, 8, 16), out=(4, 1, 16))
        T.reduce_max(a, out, dim=-2, nan_propagate=True)
    (node,) = nodes
    assert node.axis == 1 and node.keeps_axis and node.keeps_nan


def test_slices_of_shared_tiles_are_taken():
    with kernel() as nodes:
        a = T.alloc_shared((3, 8, 16), "float32")
        out = T.alloc_shared((4, 8), "float32")
        T.reduce_sum(a[1, :, :], out[2, :])
    (node,) = nodes
    assert node.src.shape == (8, 16) and node.dst.shape == (8,)


def test_result_of_another_shape_is_refused():
    with (
        kernel(),
        refused(
            ShapeError,
            "T.reduce_sum: `a` is 8x16 and dim is 1, so `out` is 8 or 8x1, but `out` is 16.",
        ),
    ):
        a, out = tiles(out=(16,))
        T.reduce_sum(a, out)


def test_dimension_that_is_not_there_is_refused():
    with kernel(), refused(ArgumentError, "T.reduce_max: dim is 2, but `a` is 8x16."):
        a, out = tiles()
        T.reduce_max(a, out, dim=2)
    with kernel(), refused(ArgumentTypeError, "T.reduce_max: dim is 1.0, not an integer."):
        a, out = tiles()
        T.reduce_max(a, out, dim=1.0)


def test_unknown_op_is_refused_with_those_that_there_are():
    names = ", ".join(f'"{kind}"' for kind in ReduceKind)
    with (
        kernel(),
        refused(ArgumentError, "T.reduce: reduce_type is 'mean'.", f"It is one of {names}."),
    ):
        a, out = tiles()
        T.reduce(a, out, "mean", 1)


def test_tensors_and_variables_are_refused():
    with (
        kernel(),
        refused(
            ArgumentError,
            "T.reduce_sum: the tile is in global memory, but it has to be in a fragment or shared "
            "memory.",
            "Copy it to a fragment with T.copy first.",
        ),
    ):
        T.reduce_sum(tensor("A", (8, 16)), T.alloc_fragment((8,), "float32"))
    with (
        kernel(),
        refused(
            ArgumentError,
            "T.reduce_sum: `out` is in global memory, but it has to be in a fragment or shared "
            "memory.",
            "Reduce to a fragment, and copy that with T.copy.",
        ),
    ):
        T.reduce_sum(tiles()[0], tensor("C", (8,)))
    with (
        kernel(),
        refused(
            ShapeError,
            "T.reduce_sum: `out` is one element of `out`.",
            "Pass `out` itself, or a slice of it.",
        ),
    ):
        a, out = tiles()
        T.reduce_sum(a, out[0])


def test_dtypes_that_do_not_hold_the_result_are_refused():
    with (
        kernel(),
        refused(
            DTypeError,
            "T.reduce_max: `a` is int32, whose values `out` of int8 does not hold.",
            'Allocate `out` as "int32".',
        ),
    ):
        a, out = tiles("int32", out_dtype="int8")
        T.reduce_max(a, out)
    with (
        kernel(),
        refused(
            DTypeError,
            "T.reduce_sum: `a` is float32, whose values `out` of int32 does not hold.",
            'Allocate `out` as "float32".',
        ),
    ):
        a, out = tiles("float32", out_dtype="int32")
        T.reduce_sum(a, out)
    with (
        kernel(),
        refused(
            DTypeError,
            "T.reduce_sum: `out` is bool, which holds no sum.",
            "Allocate it as int32, or use T.reduce_bitor.",
        ),
    ):
        a, out = tiles("bool")
        T.reduce_sum(a, out)
    with (
        kernel(),
        refused(
            DTypeError,
            "T.reduce_bitor: combines bits of integers or bool, but `a` is float32 and `out` "
            "float32.",
            "Give both the same integer dtype.",
        ),
    ):
        a, out = tiles()
        T.reduce_bitor(a, out)


def test_flags_must_be_known_while_tracing():
    with (
        kernel(),
        refused(
            ArgumentTypeError,
            "T.reduce_sum: clear is 'no'; it must be True or False while tracing.",
        ),
    ):
        a, out = tiles()
        T.reduce_sum(a, out, clear="no")


def test_options_without_meaning_are_refused():
    with (
        kernel(),
        refused(UnsupportedError, "T.reduce_sum: batch=2 is not supported.", "Leave batch out."),
    ):
        a, out = tiles()
        T.reduce_sum(a, out, batch=2)


def test_reduction_inside_parallel_is_refused():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=32):
            a, out = tiles()
            for _ in T.Parallel(4):
                T.reduce_sum(a, out)

    with pytest.raises(TraceError, match=r"^T.reduce_sum is not allowed inside T.Parallel"):
        kernel.compile(T.Tensor((4,), "float32"), target="sm_80")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("reduce_argmax", r"T\.reduce_max, and T\.reduce_min of T\.if_then_else\(.*\)"),
        ("any_of", r"T\.reduce_bitor of a bool tile"),
        ("alloc_reducer", r"T\.alloc_fragment, and T\.reduce_sum of it after the loop"),
        ("warp_reduce_max", r"T\.reduce_max of a fragment"),
    ],
)
def test_what_is_not_there_says_what_to_write(name, instead):
    with pytest.raises(AttributeError, match=rf"^tilejit has no T\.{name}; write {instead}\.$"):
        getattr(T, name)
