"""Reductions of tiles along any axis: all ops, dtypes, shapes, scopes, and what kernels do with the
results."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit

ALL = ("sum", "abssum", "max", "min", "absmax", "bitand", "bitor", "bitxor")
FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn")
INTEGERS = ("int8", "uint8", "int16", "int32", "uint32", "int64", "uint64")
COMBINE = {"sum": np.add, "max": np.fmax, "min": np.fmin, "bitand": np.bitwise_and,
           "bitor": np.bitwise_or, "bitxor": np.bitwise_xor}  # fmt: skip


@tilejit
def reducing(
    A: T.Tensor,
    C: T.Tensor,
    *,
    op,
    dim,
    source="fragment",
    target="fragment",
    threads=128,
    clear=True,
    start=0,
    keep=False,
    dtype=None,
    nan=False,
):
    gone = A.shape[:dim] + A.shape[dim + 1 :]
    kept = A.shape[:dim] + (1,) + A.shape[dim + 1 :]
    with T.Kernel(1, threads=threads):
        make = {"fragment": T.alloc_fragment, "shared": T.alloc_shared}
        a = make[source](A.shape, A.dtype)
        out = make[target](kept if keep or not gone else gone, dtype or A.dtype)
        T.copy(A, a)
        T.fill(out, start)
        T.reduce(a, out, op, dim, clear, nan_propagate=nan)
        T.copy(out, C)


def values(rng, dtype, shape):
    numpy = T.dtype(dtype).numpy
    if dtype == "bool":
        return rng.integers(0, 4, shape) > 0
    if dtype in INTEGERS:
        info = np.iinfo(numpy)
        return rng.integers(info.min, info.max, shape, numpy, endpoint=True)
    limit = 2 if dtype.startswith("float8") else 3  # sums of small whole numbers are exact
    return rng.integers(-limit, limit + 1, shape).astype(numpy)


def expected(a, op, axis, start=None, dtype=None):
    """In float64, or in integers that wrap."""
    target = T.dtype(dtype).numpy if dtype else a.dtype
    is_float = a.dtype.kind not in "iub"
    wide = a.astype(np.float64) if is_float else a if a.dtype == bool else a.astype(object)
    if op.startswith("abs"):
        wide, op = abs(wide), op[3:]
    if a.dtype == bool and op in ("max", "min"):
        op = {"max": "bitor", "min": "bitand"}[op]
    if is_float or a.dtype == bool:
        result = COMBINE[op].reduce(wide, axis=axis)
        if start is not None:
            result = COMBINE[op](result, np.asarray(start, wide.dtype))
    else:
        step = {"sum": lambda x, y: x + y, "max": max, "min": min, "bitand": lambda x, y: x & y,
                "bitor": lambda x, y: x | y, "bitxor": lambda x, y: x ^ y}[op]  # fmt: skip
        moved = np.moveaxis(wide, axis, -1)
        result = np.empty(moved.shape[:-1], object)
        for place in np.ndindex(result.shape):
            row = moved[place].tolist() + ([] if start is None else [start])
            bits = np.iinfo(target).bits
            number = functools.reduce(step, row) % (1 << bits)
            is_negative = target.kind == "i" and number >> (bits - 1)
            result[place] = number - (1 << bits) * is_negative
    return np.asarray(result).astype(target)


def check(run, rng, op, dtype, shape, dim, **options):
    a = values(rng, dtype, shape)
    out = options.get("dtype") or dtype
    start = None if options.get("clear", True) else options.get("start", 0)
    want = expected(a, op, dim, start, out)
    if options.get("keep") or not want.shape:
        want = np.expand_dims(want, dim)
    got = run(reducing, a, out=[(want.shape, T.dtype(out).numpy)], op=op, dim=dim, **options)
    assert got.tobytes() == want.tobytes(), (op, dtype, shape, dim, options, got, want)


CASES = [
    *((op, dtype) for op in ALL[:5] for dtype in FLOATS),
    *((op, dtype) for op in ALL for dtype in INTEGERS),
    *((op, "bool") for op in ("bitand", "bitor", "bitxor", "max", "min")),
]


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_every_op_of_every_dtype_is_right_along_both_axes(run, rng, op, dtype):
    for shape, dim, clear in (((24, 40), 1, True), ((24, 40), 0, False), ((7, 5), 1, False)):
        check(run, rng, op, dtype, shape, dim, clear=clear, start=1)


SHAPES = [(1,), (37,), (4096,), (1, 1), (5, 1), (1, 300), (129, 3), (16, 128), (2, 3, 5),
          (4, 8, 33), (3, 1, 64), (2, 3, 4, 5)]  # fmt: skip


@pytest.mark.parametrize("threads", [32, 96, 128, 48, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_any_shape_is_reduced_along_any_axis_by_any_threads(run, rng, shape, threads):
    for dim, keep in itertools.product(range(len(shape)), (False, True)):
        if np.prod(shape) / threads < 250:
            check(run, rng, "sum", "float32", shape, dim, threads=threads, keep=keep)
    check(run, rng, "max", "int8", shape, 0, threads=threads, clear=False, start=3)


@pytest.mark.parametrize("source", ["fragment", "shared"])
@pytest.mark.parametrize("target", ["fragment", "shared"])
@pytest.mark.parametrize("clear", [True, False])
def test_tiles_of_both_memories_are_reduced_to_both(run, rng, source, target, clear):
    where = {"source": source, "target": target, "clear": clear, "start": 2}
    check(run, rng, "sum", "float16", (30, 72), 1, **where)
    check(run, rng, "absmax", "float32", (6, 5, 64), 1, **where)


@pytest.mark.parametrize(
    ("dtype", "out"),
    [("float16", "float32"), ("float32", "float16"), ("int8", "int32"), ("bool", "int32"),
     ("uint8", "int16"), ("int32", "float32"), ("float32", "float64"), ("bfloat16", "float16")],
)  # fmt: skip
def test_results_may_have_another_dtype(run, rng, dtype, out):
    for op in ("sum", "max"):
        a = values(rng, dtype, (9, 50))
        if dtype in INTEGERS:
            a = (a % 5).astype(a.dtype)
        wide = a.astype(np.float64)
        want = wide.sum(1) if op == "sum" else wide.max(1)
        numpy = T.dtype(out).numpy
        got = run(reducing, a, out=[((9,), numpy)], op=op, dim=1, dtype=out)
        assert (got == want.astype(numpy)).all()


def test_sums_of_16_bit_floats_are_rounded_once(run, rng):
    a = (rng.standard_normal((4, 1000)) * 100).astype(np.float16)
    got = run(reducing, a, out=[((4,), np.float16)], op="sum", dim=1, clear=False, start=7)
    exact = a.astype(np.float64).sum(1) + 7
    # float32's error of a sum of magnitudes below 4e5, far less than half a unit of float16
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=2.0**-11 + 1e-5, atol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_nan_counts_only_where_it_is_asked_for(run, dtype):
    numpy = T.dtype(dtype).numpy
    a = np.arange(5 * 40).reshape(5, 40).astype(numpy) - 50
    a[1, 7] = a[2, 39] = np.nan
    a[3] = np.nan
    a[4, :] = -np.inf
    a[4, 3] = np.nan
    for op, plain in (("max", np.fmax), ("min", np.fmin), ("absmax", np.fmax)):
        wide = abs(a) if op == "absmax" else a
        got = run(reducing, a, out=[((5,), numpy)], op=op, dim=1)
        np.testing.assert_array_equal(got, plain.reduce(wide, 1))
        got = run(reducing, a, out=[((5,), numpy)], op=op, dim=1, nan=True)
        want = (np.minimum if op == "min" else np.maximum).reduce(wide, 1)
        np.testing.assert_array_equal(got, want)
        got = run(reducing, a, out=[((5,), numpy)], op=op, dim=1, clear=False, start=5)
        np.testing.assert_array_equal(got, plain(plain.reduce(wide, 1), numpy.type(5)))


def test_negative_zero_is_less_than_zero(run):
    a = np.array([[-0.0, 0.0] * 20, [-0.0, -0.0] * 20], np.float32)
    got = run(reducing, a, out=[((2,), np.float32)], op="max", dim=1)
    assert np.signbit(got).tolist() == [False, True]
    got = run(reducing, a, out=[((2,), np.float32)], op="min", dim=1)
    assert np.signbit(got).tolist() == [True, True]
