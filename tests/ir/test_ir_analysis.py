"""What is proven of index expressions holds: against their values, for many random ones."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from tilejit.dtypes import int8, int32, int64, uint8, uint32
from tilejit.ir.analysis import (
    difference,
    divisor,
    interval,
    linear,
    provably,
    reduced,
    tells_apart,
)
from tilejit.ir.expr import (
    Expr,
    Var,
    VarKind,
    arith,
    binary,
    cast,
    const,
    index,
    select,
    show,
    substitute,
    unary,
)
from tilejit.sim.reference_values import Values

OPS = "add sub mul floordiv floormod min max and or xor".split()
NUMBERS = (-7, -4, -1, 1, 2, 3, 4, 8, 12, 31, 64, 1000, 65536, 2**31 - 1)


def bounded(name: str, low: int, high: int) -> Var:
    return Var(name, int32, VarKind.LOOP, index(low), index(high))


def variables() -> dict[Var, tuple[int, int]]:
    """Variables of every kind of range, with the range."""
    ranges = {bounded("i", 0, 7): (0, 7), bounded("j", -5, 100): (-5, 100)}
    ranges |= {bounded("k", 3, 3): (3, 3), bounded("m", -20, -1): (-20, -1)}
    for dtype in (int8, uint8, uint32, int32, int64):
        low, high = int(dtype.min), int(dtype.max)
        if dtype is int64:  # so that no product leaves 64 bits
            low, high = -(2**33), 2**33
        ranges[Var(f"x_{dtype}", dtype, VarKind.VALUE)] = (low, high)
    return ranges


def random_index(rng: random.Random, names: list[Var], depth: int) -> Expr:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(names) if rng.random() < 0.7 else index(rng.choice(NUMBERS))
    a = random_index(rng, names, depth - 1)
    kind = rng.random()
    if kind < 0.1:
        return cast(a, rng.choice([int32, int64, uint32, int8]))
    if kind < 0.15:
        return unary("neg", a)
    if kind < 0.25:
        shift = const(rng.randrange(0, 6), a.dtype)
        return binary(rng.choice(["shl", "shr"]), a, shift)
    b = random_index(rng, names, depth - 1)
    if a.dtype is not b.dtype:
        a, b = cast(a, int64), cast(b, int64)
    if kind < 0.3:
        return select(binary("lt", a, b), a, b)
    return binary(rng.choice(OPS), a, b)


def whole(e: Expr, values: dict[Var, int]) -> int:
    executor = Values()
    executor.variables.update(values)
    return int(executor.whole(e))


def samples(rng: random.Random, ranges: dict[Var, tuple[int, int]]) -> dict[Var, int]:
    def one(low: int, high: int) -> int:
        near = [low, high, 0, 1, -1, 2, 5, 100, 50000, 2**31 - 2]
        return min(max(rng.choice([*near, rng.randint(low, high)]), low), high)

    return {v: one(low, high) for v, (low, high) in ranges.items()}


@pytest.mark.parametrize("seed", range(6))
def test_bounds_divisors_and_sums_hold_for_every_value(seed):
    rng = random.Random(seed)
    ranges = variables()
    for _ in range(250):
        e = random_index(rng, list(ranges), rng.randrange(1, 4))
        bounds, by, (terms, constant) = interval(e), divisor(e), linear(e)
        for _ in range(12):
            values = samples(rng, ranges)
            value = whole(e, values)
            if abs(value) >= 2**62:
                continue
            assert bounds.low is None or bounds.low <= value, (e, values, value, bounds)
            assert bounds.high is None or value <= bounds.high, (e, values, value, bounds)
            assert value == 0 if by == 0 else value % by == 0, (e, values, value, by)
            parts = [whole(t, values) * f for t, f in terms.items()]
            assert sum(parts) + constant == value, (e, values, value, terms, constant)


@pytest.mark.parametrize("seed", range(4))
def test_indexes_mean_the_same_without_what_does_not_reach_them(seed):
    rng = random.Random(seed)
    ranges = variables()
    names = list(ranges)
    shorter = 0
    for _ in range(300):
        e = random_index(rng, names, rng.randrange(0, 3))
        for _ in range(rng.randrange(1, 4)):
            unit = rng.choice([2, 8, 16, 12])
            e = arith("add", arith("mul", e, unit), rng.randrange(-3, 40))
            op = rng.choice(["floordiv", "floormod", "shr", "and", "or", "xor"])
            by = rng.choice([1, 3, 7, 8, 16, 63, 64, 96])
            e = binary(op, e, const(by % 8 if op == "shr" else by, e.dtype))
        found, by = reduced(e), divisor(e)
        shorter += found is not e
        for _ in range(12):
            values = samples(rng, ranges)
            value = whole(e, values)
            if abs(value) < 2**31:
                assert whole(found, values) == value, (show(e), show(found), values)
                assert value == 0 if by == 0 else value % by == 0, (show(e), values, by)
    assert shorter > 100


@pytest.mark.parametrize(
    ("op", "factor", "rest", "by", "wanted"),
    [
        ("floordiv", 8, 3, 128, "(i * 8) // 128"),
        ("floormod", 8, 67, 128, "(((i * 8) + 64) % 128) + 3"),
        ("shr", 8, 3, 7, "(i * 8) >> 7"),
        ("and", 8, 3, 63, "((i * 8) & 63) + 3"),
        ("xor", 8, 3, 64, "((i * 8) ^ 64) + 3"),
        ("and", 8, 3, 36, "((i * 8) + 3) & 36"),  # bits apart
        ("floordiv", 6, 3, 128, "((i * 6) + 2) // 128"),
        ("floordiv", 5, 3, 128, "((i * 5) + 3) // 128"),
    ],
)
def test_neighbours_have_one_quotient_and_remainders_one_apart(op, factor, rest, by, wanted):
    i = bounded("i", 0, 1000)
    e = binary(op, arith("add", arith("mul", i, factor), rest), const(by))
    assert show(reduced(e)) == wanted


@pytest.mark.parametrize("seed", range(4))
def test_comparisons_and_differences_that_are_proven_hold(seed):
    rng = random.Random(seed)
    ranges = variables()
    names = [v for v in ranges if v.kind is VarKind.LOOP]
    proven = 0
    for _ in range(300):
        a, b = (random_index(rng, names, rng.randrange(0, 3)) for _ in "ab")
        less, gap = provably("lt", a, b), difference(a, b)
        proven += less
        for _ in range(8):
            values = samples(rng, ranges)
            x, y = whole(a, values), whole(b, values)
            assert not less or x < y, (a, b, values)
            assert gap is None or x - y == gap, (a, b, values)
    assert proven


def test_sum_of_constants_that_32_bits_do_not_hold_stays_a_sum():
    i = bounded("i", -(2**31), 0)
    e = binary("add", binary("add", i, const(2**31 - 1)), const(1))
    assert whole(e, {i: 0}) == 2**31
    assert whole(binary("add", binary("add", i, const(3)), const(4)), {i: 0}) == 7


def test_cast_that_may_change_the_value_is_a_term_of_its_own():
    x = Var("x", int64, VarKind.VALUE)
    narrow = cast(x, int32)
    assert linear(narrow) == ({narrow: 1}, 0)
    assert interval(narrow) == interval(Var("y", int32, VarKind.VALUE))
    near = Var("near", int64, VarKind.LOOP, index(0), index(9))
    assert linear(cast(near, int32)) == ({near: 1}, 0)


def test_unsigned_arithmetic_wraps_in_an_index_too():
    x = Var("x", uint32, VarKind.VALUE)
    product = binary("mul", x, const(3, uint32))
    assert linear(product) == ({product: 1}, 0)
    assert divisor(product) == 1
    assert divisor(binary("mul", x, const(12, uint32))) == 4
    assert interval(product).high == 2**32 - 1


I4, J8 = bounded("i", 0, 3), bounded("j", 0, 7)


@pytest.mark.parametrize(
    "at",
    [
        (I4, J8),
        (arith("add", arith("mul", I4, 8), J8),),
        (arith("add", I4, arith("mul", J8, -4)),),
        (arith("add", I4, J8), J8),
        (arith("sub", 3, I4), arith("add", J8, arith("floordiv", I4, 2))),
    ],
)
def test_indexes_that_tell_iterations_apart_are_known(at):
    assert tells_apart(at, {I4: 4, J8: 8})


@pytest.mark.parametrize(
    "at",
    [
        (),
        (I4,),
        (arith("floordiv", I4, 2), J8),
        (arith("add", arith("mul", I4, 7), J8),),
        (arith("add", I4, J8),),
        (arith("add", I4, arith("floormod", I4, 2)), J8),
    ],
)
def test_indexes_that_two_iterations_may_share_are_not_told_apart(at):
    assert not tells_apart(at, {I4: 4, J8: 8})


def test_tells_apart_agrees_with_counting():
    rng = random.Random(1)
    names, extents = [I4, J8], {I4: 4, J8: 8}
    told = 0
    for _ in range(400):
        at = tuple(
            arith("add", arith("mul", I4, rng.randrange(-3, 9)), arith("mul", e, rng.randrange(3)))
            for e in (J8, random_index(rng, names, 1))
        )
        if tells_apart(at, extents):
            told += 1
            seen = {
                tuple(whole(substitute(e, {I4: const(i), J8: const(j)}), {}) for e in at)
                for i, j in itertools.product(range(4), range(8))
            }
            assert len(seen) == math.prod(extents.values()), at
    assert told
