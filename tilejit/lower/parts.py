"""Which of neighbouring iterations conditions leave: those from one number to another, so that a
vector is accessed whole where all are left, and element by element at its ends alone.

Knows comparisons of whole numbers. Does not know machines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from tilejit.dtypes import int32, int64
from tilejit.ir.analysis import Interval, difference, interval
from tilejit.ir.expr import COMPARE, Const, Expr, Op, Var, arith, binary, cast, index
from tilejit.lower.index import coarse_comparison, never_wraps

_FAR = 1 << 20  # more than any vector has
_WIDE = Interval(-(1 << 62), 1 << 62)
_SWAPPED = {"gt": "lt", "ge": "le"}
_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


@dataclass(frozen=True)
class Kept:
    """Of neighbours those from `first` on and before `end` whose common conditions hold; None is
    no bound."""

    shared: tuple[Expr, ...] = ()
    first: Expr | None = None
    end: Expr | None = None

    @property
    def is_all(self) -> bool:
        return self.first is None and self.end is None

    def within(self, first: Expr | None, end: Expr | None) -> Kept:
        """Those that are also from one number on and before another."""
        return Kept(
            self.shared,
            _bound("max", [e for e in (self.first, first) if e is not None]),
            _bound("min", [e for e in (self.end, end) if e is not None]),
        )


def conjuncts(e: Expr) -> list[Expr]:
    """Conditions that hold together where `e` does."""
    if isinstance(e, Op) and e.op == "and" and e.dtype.is_bool:
        return [c for child in e.children for c in conjuncts(child)]
    return [e]


def opposite(e: Expr) -> Expr | None:
    """The comparison that holds where another one of integers does not."""
    if isinstance(e, Op) and e.op in _OPPOSITE and e.children[0].dtype.is_integer:
        return binary(_OPPOSITE[e.op], *e.children)
    return None


def kept(tests: Sequence[Sequence[Expr]], known: Mapping[Var, int]) -> Kept | None:
    """What conditions leave of neighbours, given those of each; None where that is no range.
    known: divisors of variables."""
    shared: list[Expr] = []
    firsts: list[Expr] = []
    ends: list[Expr] = []
    if len({len(t) for t in tests}) != 1:
        return None
    for column in zip(*tests, strict=True):
        coarse = [_coarse(e, known) for e in column]
        if all(e is coarse[0] for e in coarse):
            if not (isinstance(coarse[0], Const) and coarse[0].value):
                shared.append(coarse[0])
            continue
        bound = _half(column)
        if bound is None:
            return None
        (ends if bound[0] else firsts).append(bound[1])
    return Kept(tuple(shared), _bound("max", firsts), _bound("min", ends))


def _coarse(e: Expr, known: Mapping[Var, int]) -> Expr:
    """A comparison that neighbours share where they can; true or false where that is proven."""
    if isinstance(e, Op) and e.op in _OPPOSITE and e.children[0].dtype.is_integer:
        return coarse_comparison(e, known)
    return e


def _half(column: Sequence[Expr]) -> tuple[bool, Expr] | None:
    """For one comparison of each neighbour: whether it leaves those before a number, else those
    from one on, and that number; None where it is neither."""
    first = column[0]
    if not all(isinstance(e, Op) and e.op in COMPARE for e in column):
        return None
    assert isinstance(first, Op)
    if first.op not in _OPPOSITE or any(e.op != first.op for e in column):  # type: ignore[attr-defined]
        return None
    if not all(c.dtype.is_integer for c in first.children) or not all(map(never_wraps, column)):
        return None
    sides = [[_whole(e) for e in side] for side in zip(*(e.children for e in column), strict=True)]
    left, right = ([e for e in side if e is not None] for side in sides)
    if min(len(left), len(right)) < len(column):
        return None
    op = first.op
    if op in _SWAPPED:
        left, right, op = right, left, _SWAPPED[op]
    steps = set()
    for k in range(1, len(column)):
        a, b = difference(left[k], left[0]), difference(right[k], right[0])
        if a is None or b is None or (a - b) % k:
            return None
        steps.add((a - b) // k)
    if len(steps) != 1 or abs(step := steps.pop()) != 1:
        return None
    room = arith("sub", right[0], left[0])  # the k-th has room - step * k, more than 0 or no less
    if step == 1:
        return True, arith("add", room, 1) if op == "le" else room
    start = arith("sub", 0, room)
    return False, start if op == "le" else arith("add", start, 1)


def _whole(e: Expr) -> Expr | None:
    """The integer as one of whole numbers, of which sums do not wrap; None where they may."""
    bounds = interval(e)
    if bounds.fits_int32:
        return cast(e, int32)
    return cast(e, int64) if bounds.within(_WIDE) else None


def _bound(op: str, limits: Iterable[Expr]) -> Expr | None:
    numbers = list(limits)
    return reduce(lambda a, b: arith(op, a, b), numbers) if numbers else None


def narrowed(e: Expr) -> Expr:
    """A number of an element, far beyond any vector where it does not fit 32 bits."""
    if interval(e).within(Interval(int(int32.min), int(int32.max))):
        return e
    return arith("min", arith("max", e, index(-_FAR)), index(_FAR))
