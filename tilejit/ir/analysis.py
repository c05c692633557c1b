"""What can be proven of an index expression: bounds, divisibility, dependence.

Index arithmetic of int32 and int64 is arithmetic of whole numbers; who lowers an expression asks
`interval` whether 32 bits hold it. Other integers wrap, as values do.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tilejit.dtypes import DType, int32, int64
from tilejit.ir.expr import Const, Expr, Op, Var, VarKind, arith, int_value, rebuild, walk

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
        return self.within(_natural(int32))

    def within(self, other: Interval) -> bool:
        """True when no value lies outside the other, bounded interval."""
        assert other.low is not None and other.high is not None, "the other interval has bounds"
        return (
            self.low is not None
            and self.high is not None
            and self.low >= other.low
            and self.high <= other.high
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
    natural = _natural(e.dtype)
    if any(not c.dtype.is_integer and not c.dtype.is_bool for c in e.children):
        return natural
    args = [done[c] for c in e.children]
    if e.op == "cast":
        is_exact = e.children[0].dtype.is_bool or keeps_value(e, args[0])
        return args[0] if is_exact else natural
    if not _is_exact(e):
        return natural
    found = _whole_interval(e.op, args)
    return found if is_whole(e) or found.within(natural) else natural


_EXACT = frozenset("add sub mul floordiv floormod min max and or xor select neg".split())


def _is_exact(e: Op) -> bool:
    """True when the operation gives the same whole number at any width that holds it."""
    if e.op in ("shl", "shr"):
        count = int_value(e.children[1])
        return count is not None and 0 <= count < e.dtype.bits
    return e.op in _EXACT


def is_whole(e: Op) -> bool:
    """True when the operation, in an index, is one of whole numbers: nothing wraps at 32 bits."""
    return (e.dtype is int32 or e.dtype is int64) and _is_exact(e)


def keeps_value(e: Op, child: Interval | None = None) -> bool:
    """True when a cast between integers changes no value that its operand, of bounds `child`, can
    have in an index."""
    (source,) = e.children
    if not source.dtype.is_integer or not e.dtype.is_integer:
        return False
    if source.dtype is int32 and e.dtype is int64:
        return True
    return (child or interval(source)).within(_natural(e.dtype))


@functools.cache
def _natural(dtype: DType) -> Interval:
    return Interval(int(dtype.min), int(dtype.max))


def _whole_interval(op: str, args: list[Interval]) -> Interval:
    """Bounds of an operation of whole numbers."""
    if op == "select":
        return _hull(args[1], args[2])
    if op == "neg":
        return _negate(args[0])
    a, b = args
    if op in ("add", "sub"):
        n = b if op == "add" else _negate(b)
        return Interval(_plus(a.low, n.low), _plus(a.high, n.high))
    if op == "mul":
        return _times(a, b)
    if op == "floordiv":
        return _floordiv(a, b)
    if op == "floormod":
        return _floormod(a, b)
    if op == "min":
        return Interval(_least(a.low, b.low), _known_min(a.high, b.high))
    if op == "max":
        return Interval(_known_max(a.low, b.low), _most(a.high, b.high))
    if op in ("shl", "shr"):
        assert b.low is not None and b.low == b.high, "is_whole takes shifts by constants"
        return _shift(op, a, b.low)
    return _bits(op, a, b)


def _floordiv(a: Interval, b: Interval) -> Interval:
    if b.low is None or b.low < 0:  # by 0 it is 0
        return _hull(_hull(a, _negate(a)), Interval(0, 0))
    if b.low == 0:
        return _hull(a, Interval(0, 0))
    low = a.low
    if low is not None and low < 0:
        low = low // b.low
    elif low is not None:
        low = 0 if b.high is None else low // b.high
    return Interval(low, None if a.high is None else a.high // b.low if a.high >= 0 else -1)


def _floormod(a: Interval, b: Interval) -> Interval:
    if b.low is None or b.low < 0:
        return _hull(_hull(b, _negate(b)), Interval(0, 0))
    if b.high is None:
        return Interval(0, None if a.low is None or a.low < 0 else a.high)
    if b.low == b.high and b.low and a.low is not None and a.high is not None:
        if a.low // b.low == a.high // b.low:
            return Interval(a.low % b.low, a.high % b.low)
    return Interval(0, max(b.high - 1, 0))


def _bits(op: str, a: Interval, b: Interval) -> Interval:
    """Bounds of `a op b` for and, or, xor in two's complement."""
    if op == "and":
        for x in (b, a):
            if x.low is not None and x.low >= 0:
                return Interval(0, x.high)
    if None in (a.low, a.high, b.low, b.high):
        return Interval(None, None)
    bounds = [n for n in (a.low, a.high, b.low, b.high) if n is not None]
    span = 1 << max((n if n >= 0 else ~n).bit_length() for n in bounds)
    return Interval(0 if min(bounds) >= 0 else -span, span - 1)


def _shift(op: str, a: Interval, count: int) -> Interval:
    if op == "shl":
        return _times(a, Interval(1 << count, 1 << count))
    return Interval(
        None if a.low is None else a.low >> count, None if a.high is None else a.high >> count
    )


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
    if isinstance(e, Op) and e.op == "cast" and keeps_value(e):
        return linear(e.children[0])
    if isinstance(e, Op) and is_whole(e):
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
    return {e: 1}, 0


def difference(a: Expr, b: Expr) -> int | None:
    """`a - b` when it is provably a constant."""
    (x, p), (y, q) = linear(a), linear(b)
    return p - q if x == y else None


_PERIODIC = frozenset(("floordiv", "floormod", "shr", "and", "or", "xor"))


def reduced(e: Expr) -> Expr:
    """An index with its quotients, remainders and bits free of the part that does not reach them:
    (8 * i + 3) // 128 is 8 * i // 128, and (8 * i + 3) % 128 is 8 * i % 128 + 3. So what neighbours
    share, and how they differ, can be seen."""
    nodes = list(walk(e))
    if not any(isinstance(node, Op) and node.op in _PERIODIC for node in nodes):
        return e
    done: dict[Expr, Expr] = {}
    for node in nodes:
        fresh = node
        if isinstance(node, Op):
            fresh = rebuild(node, tuple(done[c] for c in node.children))
            if isinstance(fresh, Op) and fresh.op in _PERIODIC:
                fresh = _without_rest(fresh)
        done[node] = fresh
    return done[e]


def _without_rest(e: Op) -> Expr:
    x, by = e.children[0], int_value(e.children[1])
    if by is None or by <= 0 or e.dtype not in (int32, int64):
        return e
    if e.op == "and" and by & (by + 1):
        return e
    period = {"shr": 1 << min(by, 31), "and": by + 1, "or": by & -by, "xor": by & -by}.get(e.op, by)
    terms, constant = linear(x)
    unit = math.gcd(period, *(factor * divisor(term) for term, factor in terms.items()))
    rest = constant % unit
    if not rest or not terms:
        return e
    same = rebuild(e, (arith("add", x, -rest), e.children[1]))
    return same if e.op in ("floordiv", "shr") else arith("add", same, rest)


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
            found = _divisor(node, [done[c] for c in node.children])
            keeps = keeps_value(node) if node.op == "cast" else is_whole(node)
            # what wraps stays a multiple of powers of 2
            done[node] = found if keeps else math.gcd(found, 1 << node.dtype.bits)
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
    if e.op in ("and", "or", "xor"):
        low = [n & -n for n in args if n]  # the lowest bit that may be set
        if e.op == "and":
            return max(low) if len(low) == 2 else 0
        return min(low, default=0)
    return 1


def depends(e: Expr, on: Iterable[Var]) -> bool:
    """True when `e` uses any of the variables."""
    wanted = set(on)
    return any(node in wanted for node in walk(e) if isinstance(node, Var))


def tells_apart(at: Iterable[Expr], extents: Mapping[Var, int]) -> bool:
    """True when no two values of the variables give the same expressions `at`, all else equal.

    extents: how many values in a row each variable takes.
    """
    return told_apart(at, extents) >= {v for v, n in extents.items() if n > 1}


def told_apart(at: Iterable[Expr], extents: Mapping[Var, int]) -> set[Var]:
    """The variables of which no two values give the same expressions `at`, whatever the others'
    are; of which there is one value are not among them."""
    sums = [linear(e)[0] for e in at]
    taking_many = {v for v, n in extents.items() if n > 1}
    unknown = set(taking_many)
    before = None
    while unknown and before != unknown:
        before = set(unknown)
        for terms in sums:
            unknown -= _told_by(terms, unknown, extents)
    return taking_many - unknown


def _told_by(terms: Mapping[Expr, int], unknown: set[Var], extents: Mapping[Var, int]) -> set[Var]:
    """The unknown variables, when the sum of multiples tells them: as digits of a number do."""
    mine = {t: abs(f) for t, f in terms.items() if depends(t, unknown)}
    reach = 0
    for term, factor in sorted(mine.items(), key=lambda entry: entry[1]):
        if not isinstance(term, Var) or factor <= reach:
            return set()
        reach += factor * (extents[term] - 1)
    return {t for t in mine if isinstance(t, Var)}


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
