"""When a comparison holds in a whole box of indexes: a condition on the box's corners.

Knows integer expressions and how they rise and fall. Does not know loops, tiles or threads.

Conditions are values, whose int32 and int64 arithmetic wraps, while rising and falling is about
whole numbers. So a comparison is answered for only where nothing that depends on the box wraps:
where bounds prove that, else where the corners, in 64 bits, show it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tilejit.dtypes import DType, bool_, int32, int64
from tilejit.ir.analysis import Interval, interval, keeps_value, linear, provably
from tilejit.ir.expr import (
    COMPARE,
    Expr,
    Op,
    Var,
    VarKind,
    arith,
    binary,
    cast,
    const,
    int_value,
    rebuild,
    substitute,
    variables,
    walk,
)

TRUE, FALSE = const(True, bool_), const(False, bool_)
NEGATED = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}
_SWAPPED = {"gt": "lt", "ge": "le"}

Corner = dict[Var, Expr]


class Box:
    """All values of some variables, each from 0 to below its extent.

    varying: variables besides these that no condition may use.
    """

    def __init__(self, extents: Mapping[Var, int], varying: Collection[Var]) -> None:
        self.extents = extents
        self.varying = varying

    def depends(self, e: Expr) -> bool:
        """True when the expression may differ within the box."""
        return any(v in self.extents for v in variables(e))

    def is_fixed(self, e: Expr) -> bool:
        """True when it is one value for the whole box, which conditions may use."""
        return all(v not in self.varying and v not in self.extents for v in variables(e))

    def holds(self, comparison: Op, wanted: bool) -> Expr | None:
        """A condition without the box's variables under which the comparison is `wanted` in the
        whole box; None where there is none to be found."""
        a, b = comparison.children
        if any(v in self.varying and v not in self.extents for v in variables(comparison)):
            return None
        if comparison.op not in COMPARE or a.dtype not in (int32, int64):
            return None
        op = comparison.op if wanted else NEGATED[comparison.op]
        if op == "ne":
            return _either(self._always("lt", a, b), self._always("lt", b, a))
        if op == "eq":
            return None
        return self._always(_SWAPPED[op], b, a) if op in _SWAPPED else self._always(op, a, b)

    def _always(self, op: str, a: Expr, b: Expr) -> Expr | None:
        """The same for `a op b`, lt or le: it holds where `a - b` is largest."""
        fixed: dict[Expr, Var] = {}
        a, b = (self._opaque(e, fixed) for e in (a, b))
        corner = self._highest(arith("sub", a, b))
        if corner is None:
            return None
        back: dict[Var, Expr] = {v: e for e, v in fixed.items()}
        left, right = (substitute(e, corner) for e in (a, b))
        if _never_wraps(a) and _never_wraps(b):
            if provably(op, left, right):
                return TRUE
            if provably("lt" if op == "le" else "le", right, left):
                return None
            return substitute(binary(op, left, right), back)
        ranges = self._in_range(a, b)
        wide = [substitute(self._widened(e), corner) for e in (a, b)]
        if ranges is None or not all(_never_wraps(e) for e in wide):
            return None
        return substitute(binary("and", binary(op, *wide), ranges), back)

    def _in_range(self, *exprs: Expr) -> Expr | None:
        """Whether no part of the expressions leaves its dtype, told by the parts' corners."""
        result: Expr = TRUE
        for e in (n for whole in exprs for n in walk(whole) if isinstance(n, Op)):
            if interval(e).within(_natural(e.dtype)):
                continue
            highest = self._highest(e)
            if highest is None or e.dtype is not int32:
                return None
            lowest = {v: _across(end, self.extents[v]) for v, end in highest.items()}
            low, high = (substitute(self._widened(e), c) for c in (lowest, highest))
            if not (_never_wraps(low) and _never_wraps(high)):
                return None
            result = binary("and", result, binary("ge", low, const(int(int32.min), int64)))
            result = binary("and", result, binary("le", high, const(int(int32.max), int64)))
        return result

    def _opaque(self, e: Expr, fixed: dict[Expr, Var]) -> Expr:
        """The expression with its parts that are fixed in the box, but may wrap, as variables."""
        wrapping = _wrapping(e)
        done: dict[Expr, Expr] = {}
        for node in walk(e):
            if not isinstance(node, Op) or node not in wrapping:
                done[node] = node
            elif self.depends(node):
                done[node] = rebuild(node, tuple(done[c] for c in node.children))
            else:
                done[node] = fixed.setdefault(node, Var("fixed", node.dtype, VarKind.VALUE))
        return done[e]

    def _widened(self, e: Expr) -> Expr:
        """The same in 64 bits; parts that are fixed in the box are computed as they were."""
        done: dict[Expr, Expr] = {}
        for node in walk(e):
            if isinstance(node, Op) and self.depends(node):
                fresh = tuple(done[c] for c in node.children)
                done[node] = fresh[0] if node.op == "cast" else rebuild(node, fresh)
            else:
                done[node] = cast(node, int64)
        return done[e]

    # ---- rising and falling -----------------------------------------------------------------

    def _highest(self, e: Expr) -> Corner | None:
        """The corner of the box at which a whole number is largest; None when that is unknown."""
        terms, _ = linear(e)
        corner: Corner = {}
        for var, extent in self.extents.items():
            slope: int | None = 0
            for term, factor in terms.items():
                slope = _joined(slope, _scaled(_slope(term, var), factor))
            if slope is None:
                return None
            if slope:
                corner[var] = const(extent - 1 if slope > 0 else 0, var.dtype)
            elif any(var in variables(t) for t in terms) or var in variables(e):
                corner[var] = const(0, var.dtype)
        return corner


def _across(end: Expr, extent: int) -> Expr:
    return const(0 if int_value(end) else extent - 1, end.dtype)


def _either(a: Expr | None, b: Expr | None) -> Expr | None:
    if a is None or b is None:
        return a if b is None else b
    return binary("or", a, b)


def _slope(e: Expr, var: Var) -> int | None:
    """1 where `e` never falls with the variable, -1 where it never rises, 0 where it does not
    depend on it; None where that is unknown."""
    done: dict[Expr, int | None] = {}
    for node in walk(e):
        if var not in variables(node):
            done[node] = 0
        elif isinstance(node, Op) and node.dtype in (int32, int64):
            done[node] = _slope_of(node, [done[c] for c in node.children])
        else:
            done[node] = 1 if node is var else None
    return done[e]


def _slope_of(e: Op, slopes: list[int | None]) -> int | None:
    """Of an operation of whole numbers, given those of its operands."""
    if e.op in ("add", "min", "max"):
        return _joined(*slopes)
    if e.op == "sub":
        return _joined(slopes[0], _scaled(slopes[1], -1))
    if e.op == "neg":
        return _scaled(slopes[0], -1)
    if e.op == "mul":
        for factor, own, other in zip(e.children, slopes, slopes[::-1], strict=True):
            sign = _sign(interval(factor))
            if own == 0 and sign is not None:
                return _scaled(other, sign)
    if e.op == "floordiv" and slopes[1] == 0:
        return slopes[0] if (interval(e.children[1]).low or 0) > 0 else None
    if e.op == "cast" and keeps_value(e):
        return slopes[0]
    return None


def _joined(a: int | None, b: int | None) -> int | None:
    if a is None or b is None or a * b < 0:
        return None
    return a or b


def _scaled(slope: int | None, factor: int) -> int | None:
    return None if slope is None else slope * ((factor > 0) - (factor < 0))


def _sign(bounds: Interval) -> int | None:
    low, high = bounds.low, bounds.high
    if low is not None and low >= 0:
        return 1
    return -1 if high is not None and high <= 0 else None


# ---- what may wrap ------------------------------------------------------------------------------


def _natural(dtype: DType) -> Interval:
    return Interval(int(dtype.min), int(dtype.max))


def _never_wraps(e: Expr) -> bool:
    """True when no part of the expression wraps, whatever its variables are."""
    return not _wrapping(e)


def _wrapping(e: Expr) -> set[Expr]:
    """The parts of an expression that may wrap, or are made of such."""
    found: set[Expr] = set()
    for node in walk(e):
        if not isinstance(node, Op):
            continue
        is_whole = node.dtype.is_integer and interval(node).within(_natural(node.dtype))
        if any(c in found for c in node.children) or not (is_whole or node.dtype.is_bool):
            found.add(node)
    return found
