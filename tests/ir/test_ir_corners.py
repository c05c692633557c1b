"""Conditions on corners: what they say of a whole box is so, for many random comparisons, also
where arithmetic wraps; and they say it whenever it is so, where nothing does."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilejit.dtypes import bool_, float32, int32, int64, uint32
from tilejit.ir.corners import NEGATED, TRUE, Box
from tilejit.ir.expr import (
    Expr,
    Op,
    Var,
    VarKind,
    binary,
    cast,
    const,
    index,
    show,
    unary,
    variables,
)
from tilejit.sim.reference_values import Values

quick = settings(max_examples=400, deadline=None)

EXTENTS = (5, 3, 1)
NUMBERS = (-3, -1, 1, 2, 7, 100, 2**20)


def bounded(name: str, low: int, high: int, kind: VarKind = VarKind.LOOP) -> Var:
    return Var(name, int32, kind, index(low), index(high))


BOX = [bounded(f"i{n}", 0, extent - 1, VarKind.PARALLEL) for n, extent in enumerate(EXTENTS)]
STEP = bounded("step", 0, 9)
ANY = Var("any", int32, VarKind.SCALAR)
LONG = Var("long", int64, VarKind.SCALAR)
LOADED = Var("loaded", int32, VarKind.VALUE)
FIXED = {STEP: (0, 9), ANY: (-(2**31), 2**31 - 1), LONG: (-(2**63), 2**63 - 1)}


def box(varying: set[Var] = frozenset({LOADED})) -> Box:
    return Box(dict(zip(BOX, EXTENTS, strict=True)), varying)


def random_number(rng: random.Random, leaves: list[Var], depth: int) -> Expr:
    """An integer expression, often affine."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(leaves) if rng.random() < 0.75 else index(rng.choice(NUMBERS))
    a = random_number(rng, leaves, depth - 1)
    kind = rng.random()
    if kind < 0.05:
        return unary("neg", a)
    if kind < 0.1:
        return cast(a, rng.choice([int64, uint32, int32]))
    b = random_number(rng, leaves, depth - 1)
    if a.dtype is not b.dtype:
        a, b = cast(a, int64), cast(b, int64)
    if kind < 0.3:
        return binary("mul", a, const(rng.choice((-2, -1, 2, 3, 128)), a.dtype))
    if kind < 0.4:
        return binary(rng.choice(["mul", "floordiv", "min", "max", "xor"]), a, b)
    return binary(rng.choice(["add", "sub"]), a, b)


def comparison(rng: random.Random, leaves: list[Var], depth: int) -> Op | None:
    a, b = (random_number(rng, leaves, depth) for _ in range(2))
    if a.dtype is not b.dtype:
        a, b = cast(a, int64), cast(b, int64)
    e = binary(rng.choice(sorted(NEGATED)), a, b)
    return e if isinstance(e, Op) else None


def value(e: Expr, values: dict[Var, int]) -> bool:
    executor = Values()
    executor.variables.update(values)
    return bool(executor.value(e))


def in_box(e: Expr, fixed: dict[Var, int]) -> set[bool]:
    """What the comparison gives in the box."""
    places = itertools.product(*map(range, EXTENTS))
    return {value(e, {**fixed, **dict(zip(BOX, place, strict=True))}) for place in places}


def random_values(rng: random.Random) -> dict[Var, int]:
    def one(low: int, high: int) -> int:
        near = [low, high, 0, 1, -1, 5, 2**31 - 1, 2**31, rng.randint(-50, 50)]
        return min(max(rng.choice([*near, rng.randint(low, high)]), low), high)

    return {v: one(*bounds) for v, bounds in FIXED.items()}


@quick
@given(st.integers(0, 2**32), st.booleans())
def test_where_the_condition_holds_the_comparison_is_as_wanted_in_the_whole_box(seed, wanted):
    rng = random.Random(seed)
    e = comparison(rng, [*BOX, *BOX, *FIXED], 3)
    found = None if e is None else box().holds(e, wanted)
    if found is None:
        return
    assert found.dtype is bool_ and not variables(found) & set(BOX)
    for _ in range(12):
        fixed = random_values(rng)
        if value(found, fixed):
            assert in_box(e, fixed) == {wanted}, (show(e), fixed)


@quick
@given(st.integers(0, 2**32), st.booleans())
def test_where_nothing_wraps_the_condition_holds_whenever_the_comparison_does(seed, wanted):
    rng = random.Random(seed)
    terms = [binary("mul", rng.choice([*BOX, STEP, STEP]), index(rng.choice([-3, -1, 1, 2, 8])))
             for _ in range(rng.randint(1, 4))]  # fmt: skip
    left: Expr = index(rng.randint(-40, 40))
    for term in terms:
        left = binary(rng.choice(["add", "sub"]), left, term)
    e = binary(rng.choice(["lt", "le", "gt", "ge"]), left, binary("mul", STEP, index(3)))
    found = box().holds(e, wanted) if isinstance(e, Op) else None
    for step in range(10):
        holds = found is not None and value(found, {STEP: step})
        assert holds == (in_box(e, {STEP: step}) == {wanted})


def test_runtime_scalars_are_added_without_wrapping():
    """ANY + i wraps for a large ANY: then the condition must not hold."""
    e = binary("lt", index(0), binary("add", ANY, BOX[0]))
    found = box().holds(e, True)
    assert found is not None
    assert value(found, {ANY: 1}) and value(found, {ANY: 2**31 - 5})
    assert not value(found, {ANY: 2**31 - 4}) and not value(found, {ANY: 0})


def test_bounds_that_prove_it_leave_no_condition():
    i = BOX[0]
    place = binary("add", binary("mul", STEP, index(5)), i)
    assert box().holds(binary("lt", place, index(50)), True) is TRUE
    assert box().holds(binary("ge", place, index(50)), False) is TRUE
    assert box().holds(binary("lt", place, index(49)), True) is not TRUE
    assert box().holds(binary("lt", i, index(4)), True) is None  # never in the whole box


def test_equality_is_told_apart_from_both_sides():
    i, j = BOX[:2]
    e = binary("eq", binary("add", i, STEP), binary("add", j, index(6)))
    found = box().holds(e, False)
    assert found is not None and box().holds(e, True) is None
    assert [step for step in range(10) if value(found, {STEP: step})] == [0, 1, 9]


@pytest.mark.parametrize(
    "e",
    [
        binary("lt", binary("add", BOX[0], LOADED), index(4)),  # differs between threads
        binary("lt", binary("xor", BOX[0], index(5)), index(4)),  # rises and falls
        binary("lt", binary("mul", BOX[0], ANY), index(4)),  # of unknown sign
        binary("lt", cast(BOX[0], float32), const(2.0, float32)),
        binary("lt", cast(BOX[0], uint32), const(4, uint32)),
        binary("lt", cast(binary("add", cast(BOX[0], int64), LONG), int32), index(4)),
    ],
    ids=show,
)
def test_what_corners_do_not_tell_is_left(e):
    assert box().holds(e, True) is None and box().holds(e, False) is None
