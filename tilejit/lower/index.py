"""Index expressions of lowered code: layouts written over thread and register, simplified.

Knows fragment and shared layouts as expressions of the linear thread index, and how division and
remainder of a sum split when parts of it are proven small. Does not know machines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tilejit.dtypes import bool_, int32
from tilejit.ir.analysis import Interval, divisor, interval, linear, provably
from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import (
    Const,
    Expr,
    Op,
    Var,
    VarKind,
    arith,
    binary,
    cast,
    const,
    index,
    same_width,
    variables,
    walk,
)
from tilejit.layout.fragment import THREAD, FragmentLayout
from tilejit.layout.shared import SharedLayout

_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


def total(terms: dict[Expr, int], constant: int) -> Expr:
    """The sum of integer multiples of terms and a constant, constant last."""
    result: Expr | None = None
    for term, factor in terms.items():
        part = arith("mul", term, factor)
        result = part if result is None else arith("add", result, part)
    if result is None:
        return index(constant)
    return arith("add", result, constant)


def split(e: Expr, by: int) -> tuple[Expr, Expr]:
    """`e // by` and `e % by` (floor), with what is provably a multiple of `by` divided out. What
    the terms have in common with `by` stays outside of the remainder, so that neighbours differ by
    a constant there."""
    if by == 1:
        return e, index(0)
    terms, constant = linear(e)
    multiple = {t: f // by for t, f in terms.items() if f % by == 0}
    rest = {t: f for t, f in terms.items() if f % by}
    quotient = total(multiple, constant // by)
    remainder = total(rest, constant % by)
    bounds = interval(remainder)
    if bounds.low is not None and bounds.low >= 0 and bounds.high is not None:
        if bounds.high < by:
            return quotient, remainder
    common = math.gcd(by, *rest.values())
    inner = total({t: f // common for t, f in rest.items()}, constant % by // common)
    within = arith("mul", arith("floormod", inner, by // common), common)
    return (
        arith("add", quotient, arith("floordiv", inner, by // common)),
        arith("add", within, constant % common),
    )


def xor(a: Expr, b: Expr) -> Expr:
    """`a ^ b` of non-negative expressions; a constant part of `a` whose bits its other part
    cannot have is XORed last, so that the rest is shared between unrolled copies."""
    terms, constant = linear(a)
    if terms and constant > 0:
        bound = interval(total(terms, 0))
        if bound.low is not None and bound.low >= 0 and bound.high is not None:
            if constant % (1 << bound.high.bit_length()) == 0:
                inner = binary("xor", *same_width(total(terms, 0), b))
                return binary("xor", *same_width(inner, index(constant)))
    return binary("xor", *same_width(a, b))


def coarse_comparison(e: Op, known: Mapping[Var, int]) -> Expr:
    """A comparison of whole numbers that neighbours share: where all that varies on both sides are
    multiples of g, constants are rounded to them. So `8 * thread + c < 64` is one comparison for c
    from 0 to 7; and none where bounds prove what it is for every thread. known: divisors of
    variables."""
    a, b = e.children
    if a.dtype is not int32 or b.dtype is not int32 or not never_wraps(e):
        return e
    if any(v.kind is VarKind.THREAD for v in variables(e)):
        if provably(e.op, a, b) or provably(_OPPOSITE[e.op], a, b):
            return const(provably(e.op, a, b), bool_)
    (left, p), (right, q) = linear(a), linear(b)
    step = 0
    for terms in (left, right):
        for term, factor in terms.items():
            step = math.gcd(step, factor * divisor(term, known))
    # a < b where left - right + p - q < 0, a <= b where left - right + p - q - 1 < 0
    above = (p - q - (e.op in ("le", "gt"))) % step if step else 0
    if step <= 1 or interval(a).low - above < int32.min:  # type: ignore[operator]
        return e
    lower = _sum(left, p - above)
    return binary(e.op, lower, _sum(right, q))


def never_wraps(e: Expr) -> bool:
    """True when nothing in an expression leaves the numbers of its dtype, so that as a value it is
    what it is in an index."""
    whole = (n for n in walk(e) if n.dtype.is_integer)
    return all(interval(n).within(Interval(int(n.dtype.min), int(n.dtype.max))) for n in whole)


def _sum(terms: Mapping[Expr, int], constant: int) -> Expr:
    """A sum that fits int32, in which partial sums may wrap as long as all do."""
    result: Expr = const(0)
    for term, factor in terms.items():
        result = binary("add", result, binary("mul", cast(term, int32), const(factor)))
    return binary("add", result, const(constant))


def thread_part(layout: FragmentLayout, thread: Expr) -> tuple[Expr, ...]:
    """The part of each coordinate that depends on the thread."""
    result = []
    for weighted in layout.weights:
        terms: Expr = index(0)
        for digit, weight in weighted:
            if digit.place == THREAD and digit.size > 1:
                value = thread_digit(thread, digit.stride, digit.size, layout.threads)
                terms = arith("add", terms, arith("mul", value, weight))
        result.append(terms)
    return tuple(result)


def thread_digit(thread: Expr, stride: int, size: int, threads: int) -> Expr:
    """`(thread // stride) % size`, the remainder left out where it does nothing."""
    value = arith("floordiv", thread, stride) if stride > 1 else thread
    return value if stride * size >= threads else arith("floormod", value, size)


def coordinates(layout: FragmentLayout, parts: tuple[Expr, ...], register: int) -> tuple[Expr, ...]:
    """Coordinates of a register's element, `parts` being the layout's `thread_part`."""
    sums = tuple(
        arith("add", t, r) for t, r in zip(parts, layout.register_part(register), strict=True)
    )
    if not layout.flat:
        return sums
    rest, result = sums[0], []
    for extent in reversed(layout.shape[1:]):
        rest, remainder = split(rest, extent)
        result.append(remainder)
    return (rest, *reversed(result))


def shared_offset(layout: SharedLayout, at: Sequence[Expr]) -> Expr:
    """Byte offset of an element in a shared buffer."""
    if layout.is_linear:
        elements: Expr = index(0)
        for i, stride in zip(at, layout.linear_strides, strict=True):
            elements = arith("add", elements, arith("mul", i, stride))
        return arith("mul", elements, layout.itemsize)
    row = _stored_row(layout, at[-2]) if len(at) > 1 else index(0)
    panel, column = split(at[-1], layout.panel)
    lead: Expr = index(0)
    for i, extent in zip(at[:-2], layout.shape[:-2], strict=True):
        lead = arith("add", arith("mul", lead, extent), i)
    within = arith("mul", column, layout.itemsize)
    if layout.swizzle > 1:
        line, _ = split(row, 1 << layout.xor_shift)
        _, mask = split(line, layout.swizzle)
        chunk, byte = split(within, 16)
        within = arith("add", arith("mul", xor(chunk, mask), 16), byte)
    result = arith("mul", lead, layout.tile_elements * layout.itemsize)
    result = arith("add", result, arith("mul", panel, layout.rows * layout.pitch * layout.itemsize))
    result = arith("add", result, arith("mul", row, layout.pitch * layout.itemsize))
    return arith("add", result, within)


def _stored_row(layout: SharedLayout, row: Expr) -> Expr:
    """Where in its tile a row is stored, counted in rows."""
    if not layout.halved:
        return row
    four, within = split(row, 4)
    half, second = split(within, 2)
    first = arith("add", arith("mul", half, layout.rows // 2), arith("mul", four, 2))
    return arith("add", first, second)


def global_offset(buffer: Buffer, at: Sequence[Expr]) -> Expr:
    """Byte offset of an element from the buffer's address."""
    elements: Expr = buffer.offset
    for i, stride, extent in zip(at, buffer.element_strides, buffer.shape, strict=True):
        if buffer.broadcasts and isinstance(extent, Const) and extent.value == 1:
            continue
        elements = arith("add", elements, arith("mul", i, stride))
    return arith("mul", elements, buffer.dtype.bytes)


def power_of_two_divisor(number: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `number` (0: `limit`)."""
    return math.gcd(number, limit) if number else limit
