"""Division and remainder of sums: equal to Python's, and neighbours differ by constants."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tilejit.dtypes import int8, int32, int64, uint32
from tilejit.ir.access import evaluate
from tilejit.ir.analysis import difference
from tilejit.ir.expr import Const, Var, VarKind, arith, binary, cast, const, index
from tilejit.lower.index import coarse_comparison, split


def var(name, stop):
    return Var(name, int32, VarKind.THREAD, index(0), index(stop - 1))


@pytest.mark.parametrize("by", [1, 2, 7, 8, 12, 96, 1000, 1024])
@pytest.mark.parametrize("factors", [(1, 0), (8, 0), (8, 4), (24, 8), (1000, 8), (96, 7), (12, 30)])
def test_quotient_and_remainder_are_those_of_the_sum(by, factors):
    a, b = var("a", 300), var("b", 40)
    rng = np.random.default_rng(0)
    values = {a: rng.integers(0, 300, 500), b: rng.integers(0, 40, 500)}
    for constant in (0, 1, 5, 8, 1003, -3):
        e = arith("add", arith("mul", a, factors[0]), arith("mul", b, factors[1]))
        e = arith("add", e, constant)
        whole = factors[0] * values[a] + factors[1] * values[b] + constant
        quotient, remainder = (np.asarray(evaluate(part, values)) for part in split(e, by))
        assert (quotient == whole // by).all() and (remainder == whole % by).all()


def test_neighbours_in_a_row_differ_by_a_constant_where_rows_are_whole_vectors():
    vector = arith("mul", var("a", 300), 8)
    first = split(vector, 1000)
    for k in range(1, 8):
        row, column = split(arith("add", vector, k), 1000)
        assert difference(row, first[0]) == 0
        assert difference(column, first[1]) == k


ORDERED = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def holds(comparison, values):
    return ORDERED[comparison.op](*(np.asarray(evaluate(x, values)) for x in comparison.children))


@pytest.mark.parametrize("op", ORDERED)
@pytest.mark.parametrize("factors", [(8, 16, 24), (8, 4, 8), (2, 6, 10), (3, 9, 6), (8, 5, 16)])
def test_coarse_comparisons_are_equal_to_fine_ones(op, factors):
    a, b, n = var("a", 6), var("b", 5), var("n", 7)
    values = dict(zip((a, b, n), np.indices((6, 5, 7)).reshape(3, -1), strict=True))
    for near, far in itertools.product(range(-9, 10), (-8, -3, 0, 1, 16)):
        left = arith("add", arith("mul", a, factors[0]), arith("mul", b, factors[1]))
        right = arith("add", arith("mul", n, factors[2]), far)
        for x, y in ((arith("add", left, near), right), (right, arith("add", left, near))):
            fine = binary(op, x, y)
            coarse = coarse_comparison(fine, {})
            assert (holds(coarse, values) == holds(fine, values)).all(), (fine, coarse)


@pytest.mark.parametrize("op", ORDERED)
def test_neighbours_in_a_vector_share_a_comparison(op):
    vector = arith("add", arith("mul", var("thread", 256), 8), 4096)
    of = {coarse_comparison(binary(op, arith("add", vector, k), index(5000)), {}) for k in range(8)}
    assert len(of) == 1 + (op in ("le", "gt"))  # the first element alone is not below 5000
    n = Var("n", int32, VarKind.SYMBOL, index(0))
    places = [arith("add", vector, k) for k in range(8)]
    assert len({coarse_comparison(binary("lt", x, n), {}) for x in places}) == 8
    assert len({coarse_comparison(binary("lt", x, n), {n: 8}) for x in places}) == 1


def test_what_may_wrap_is_compared_as_it_is():
    x = Var("x", int32, VarKind.VALUE)
    eight = binary("mul", x, const(8))
    for e in (
        binary("lt", binary("add", eight, const(3)), const(64)),
        binary("lt", binary("floormod", eight, const(1000)), const(251)),
        binary("lt", cast(eight, int64), const(2**40, int64)),
        binary("lt", binary("mul", cast(var("a", 9), uint32), const(8, uint32)), const(7, uint32)),
        binary("lt", binary("mul", cast(var("a", 9), int8), const(8, int8)), const(7, int8)),
    ):
        assert coarse_comparison(e, {}) is e
    far = arith("add", arith("mul", Var("a", int32, VarKind.VALUE, index(0), index(8)), 8), 5)
    lowest = binary("lt", const(-(2**31) + 1), far)
    assert coarse_comparison(lowest, {}) is lowest  # what it is rounded to would not be an int32


def test_what_bounds_prove_for_every_thread_is_not_compared():
    """Nor what they disprove; what does not depend on the thread stays as it is."""
    thread, x = var("a", 9), Var("x", int32, VarKind.VALUE, index(0), index(8))
    for op, right, known in (("lt", 9, True), ("ge", 9, False), ("gt", 8, False), ("le", 8, True)):
        folded = coarse_comparison(binary(op, thread, const(right)), {})
        assert isinstance(folded, Const) and folded.value == known
        e = binary(op, x, const(right))
        assert coarse_comparison(e, {}) is e
    undecided = binary("lt", thread, const(8))
    assert coarse_comparison(undecided, {}) is undecided
