"""What can be proven of an index expression: bounds, divisibility, dependence.

Index arithmetic here is arithmetic of whole numbers; who lowers an expression asks `interval`
whether 32 bits hold it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tilejit.dtypes import int32
from tilejit.ir.expr import Const, Expr, Op, Var, VarKind, arith, int_value, walk

# Largest runtime extent: checked at every call, so that index arithmetic over one dimension,
# rounded up to any tile, still fits 32 bits.
MAX_SYMBOL = 2**31 - 2**17


@dataclass(frozen=True, slots=True)
class Interval:
    """Inclusive bounds; None is unbounded."""

    low: int | None
    high: int | None

    @property
    def fits_int32(self) -> bool:
        return (
            self.low is not None
            and self.high is not None
            and self.low >= int32.min
            and self.high <= int32.max
        )


def interval(e: Expr) -> Interval:
    """Bounds of an integer expression over all values of its variables."""
    found = _intervals.get(e)
    if found is not None:
        return found
    done: dict[Expr, Interval] = {}
    for node in walk(e):
        done[node] = _intervals.get(node) or _interval(node, done)
        _intervals[node] = done[node]
    return done[e]


# Expressions and their variables' bounds never change, so neither does an interval.
_intervals: weakref.WeakKeyDictionary[Expr, Interval] = weakref.WeakKeyDictionary()


def _interval(e: Expr, done: dict[Expr, Interval]) -> Interval:
    if isinstance(e, Const):
        if isinstance(e.value, float):
            return Interval(None, None)
        return Interval(int(e.value), int(e.value))
    if isinstance(e, Var):
        return _var_interval(e)
    assert isinstance(e, Op)
    if e.dtype.is_bool:
        return Interval(0, 1)
    if not e.dtype.is_integer:
        return Interval(None, None)
    natural = Interval(int(e.dtype.min), int(e.dtype.max))
    if any(not c.dtype.is_integer and not c.dtype.is_bool for c in e.children):
        return natural
    args = [done[c] for c in e.children]
    if e.op == "cast":
        (a,) = args
        inside = (
            a.low is not None
            and a.high is not None
            and a.low >= natural.low  # type: ignore[operator]
            and a.high <= natural.high  # type: ignore[operator]
        )
        return a if inside else natural
    if e.op == "select":
        return _hull(args[1], args[2])
    if len(args) == 1:
        return _negate(args[0]) if e.op == "neg" else natural
    a, b = args
    if e.op == "add":
        return Interval(_plus(a.low, b.low), _plus(a.high, b.high))
    if e.op == "sub":
        n = _negate(b)
        return Interval(_plus(a.low, n.low), _plus(a.high, n.high))
    if e.op == "mul":
        return _times(a, b)
    if e.op == "floordiv" and b.low is not None and b.low > 0:
        low = a.low
        if low is not None and low < 0:
            low = low // b.low
        elif low is not None:
            low = 0 if b.high is None else low // b.high
        high = None if a.high is None else (a.high // b.low if a.high >= 0 else -1)
        return Interval(low, high)
    if e.op == "floormod" and b.low is not None and b.low > 0:
        if b.high is None:
            return Interval(0, None if a.low is None or a.low < 0 else a.high)
        if b.low == b.high and None not in (a.low, a.high):
            if a.low // b.low == a.high // b.low:  # type: ignore[operator]
                return Interval(a.low % b.low, a.high % b.low)  # type: ignore[operator]
        return Interval(0, b.high - 1)
    if e.op == "min":
        return Interval(_least(a.low, b.low), _known_min(a.high, b.high))
    if e.op == "max":
        return Interval(_known_max(a.low, b.low), _most(a.high, b.high))
    if e.op == "and" and b.low is not None and b.low >= 0:
        return Interval(0, b.high)
    if e.op == "and" and a.low is not None and a.low >= 0:
        return Interval(0, a.high)
    if e.op in ("or", "xor") and all(i.low is not None and i.low >= 0 for i in args):
        if None not in (a.high, b.high):
            bits = max(a.high.bit_length(), b.high.bit_length())  # type: ignore[union-attr]
            return Interval(0, (1 << bits) - 1)
    if e.op == "shl" and b.low is not None and b.low == b.high and 0 <= b.low < 64:
        return _times(a, Interval(1 << b.low, 1 << b.low))
    if e.op == "shr" and b.low is not None and b.low == b.high and 0 <= b.low < 64:
        return Interval(
            None if a.low is None else a.low >> b.low, None if a.high is None else a.high >> b.low
        )
    return natural


def _var_interval(v: Var) -> Interval:
    low = interval(v.low).low if v.low is not None else None
    high = interval(v.high).high if v.high is not None else None
    if v.dtype.is_integer:
        if low is None:
            low = int(v.dtype.min)
        if high is None:
            high = MAX_SYMBOL if v.kind is VarKind.SYMBOL else int(v.dtype.max)
    return Interval(low, high)


def _plus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _negate(a: Interval) -> Interval:
    return Interval(None if a.high is None else -a.high, None if a.low is None else -a.low)


def _times(a: Interval, b: Interval) -> Interval:
    if None in (a.low, a.high, b.low, b.high):
        if a.low is not None and b.low is not None and a.low >= 0 and b.low >= 0:
            return Interval(a.low * b.low, None)
        return Interval(None, None)
    corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]  # type: ignore[operator]
    return Interval(min(corners), max(corners))


def _least(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else min(a, b)


def _most(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)


def _known_min(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _known_max(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else max(a, b)


def _hull(a: Interval, b: Interval) -> Interval:
    return Interval(_least(a.low, b.low), _most(a.high, b.high))


def linear(e: Expr) -> tuple[dict[Expr, int], int]:
    """`e` as a sum of integer multiples of terms, and a constant: ({term: factor}, constant)."""
    if isinstance(e, Const):
        return {}, int(e.value)
    if isinstance(e, Op) and e.dtype.is_integer:
        if e.op in ("add", "sub"):
            (first, a), (second, b) = linear(e.children[0]), linear(e.children[1])
            sign = 1 if e.op == "add" else -1
            terms = dict(first)
            for term, count in second.items():
                terms[term] = terms.get(term, 0) + sign * count
            return {t: f for t, f in terms.items() if f}, a + sign * b
        if e.op == "mul":
            x, y = e.children
            for p, q in ((x, y), (y, x)):
                factor = int_value(q)
                if factor is not None:
                    terms, constant = linear(p)
                    return {t: f * factor for t, f in terms.items() if f * factor}, (
                        constant * factor
                    )
        if e.op == "neg":
            terms, constant = linear(e.children[0])
            return {t: -f for t, f in terms.items()}, -constant
        if e.op == "cast" and e.children[0].dtype.is_integer and e.dtype.bits >= 32:
            if e.children[0].dtype.bits >= 32:
                return linear(e.children[0])
    return {e: 1}, 0


def difference(a: Expr, b: Expr) -> int | None:
    """`a - b` when it is provably a constant."""
    (x, p), (y, q) = linear(a), linear(b)
    return p - q if x == y else None


def divisor(e: Expr, known: Mapping[Var, int] | None = None) -> int:
    """A number that provably divides `e` (0 when `e` is provably 0).

    known: divisors of variables, such as strides promised to be multiples of 8.
    """
    known = known or {}
    done: dict[Expr, int] = {}
    for node in walk(e):
        if isinstance(node, Var) and node in known:
            done[node] = known[node]
        elif isinstance(node, Const):
            done[node] = abs(int(node.value)) if not isinstance(node.value, float) else 1
        elif isinstance(node, Op) and node.dtype.is_integer:
            args = [done[c] for c in node.children]
            done[node] = _divisor(node, args)
        else:
            done[node] = 1
    return done[e]


def _divisor(e: Op, args: list[int]) -> int:
    if e.op in ("add", "sub", "min", "max"):
        return math.gcd(args[0], args[1])
    if e.op == "select":
        return math.gcd(args[1], args[2])
    if e.op == "mul":
        return args[0] * args[1]
    if e.op in ("neg", "cast"):
        return args[0] if e.children[0].dtype.is_integer else 1
    if e.op == "shl" and (shift := int_value(e.children[1])) is not None:
        return args[0] << shift
    if e.op == "floordiv" and (by := int_value(e.children[1])):
        return args[0] // by if args[0] % by == 0 else 1
    if e.op == "floormod":
        return math.gcd(args[0], args[1])
    return 1


def depends(e: Expr, on: Iterable[Var]) -> bool:
    """True when `e` uses any of the variables."""
    wanted = set(on)
    return any(node in wanted for node in walk(e) if isinstance(node, Var))


def provably(op: str, a: Expr, b: Expr) -> bool:
    """True when the comparison `a op b` (lt, le, ge, gt) holds for all values of the variables."""
    if op in ("gt", "ge"):
        return provably("lt" if op == "gt" else "le", b, a)
    terms, constant = linear(arith("sub", a, b))
    total = Interval(constant, constant)
    for term, factor in terms.items():
        part = _times(interval(term), Interval(factor, factor))
        total = Interval(_plus(total.low, part.low), _plus(total.high, part.high))
    return total.high is not None and (total.high < 0 if op == "lt" else total.high <= 0)
