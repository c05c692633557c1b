"""Division and remainder of sums: equal to Python's, and neighbours differ by constants."""

from __future__ import annotations

import numpy as np
import pytest

from tilejit.dtypes import int32
from tilejit.ir.access import evaluate
from tilejit.ir.analysis import difference
from tilejit.ir.expr import Var, VarKind, arith, index
from tilejit.lower.index import split


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
