"""Memory accesses of neighbouring iterations: how many one instruction serves, and which of these
where a tensor's end or a condition cuts them.

Knows alignment, extents and conditions. Does not know statements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tilejit.dtypes import float32, int32
from tilejit.ir.analysis import difference, divisor, interval
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, arith, index, int_value, variables
from tilejit.isa.machine import Part, Value
from tilejit.layout.shared import SharedLayout
from tilejit.lower.emit import EmitterBase, Point, Points, is_surely_inside
from tilejit.lower.index import global_offset, power_of_two_divisor
from tilejit.lower.parts import Kept, conjuncts, kept, narrowed

_WORD = 4  # bytes of the narrowest access of which a part may be left out
_WIDEST = 16


class AccessEmitter(EmitterBase):
    """Loads of neighbours, and what stores of neighbours need to know."""

    def _load_group(
        self, buffer: Buffer, at: Sequence[Expr], group: Sequence[Point], once: Value | None
    ) -> list[Value]:
        """What neighbours load. What nothing writes is read for those that a condition leaves out
        too, where others are left: that costs less than to read each by itself."""
        found, width = self._kept(group), len(group)
        assert found is not None, "neighbours are left from one on to another"
        is_constant = buffer.scope is Scope.GLOBAL and buffer not in self.written
        if found.is_all or width == 1 or not is_constant or not self.is_readonly(buffer):
            when, part = self._reach(buffer, at, group, found, once)
            return self.m.load(self.address(buffer, at), buffer.dtype, width, when, part)
        first, end = self._part(found, width)
        before = self.m.binary("lt", first, self.m.const(width, int32), int32)
        some = self.both(once, before, self.m.binary("gt", end, self.m.const(0, int32), int32))
        when, part = self._reach(buffer, at, group, Kept(found.shared), some)
        read = self.m.load(self.address(buffer, at), buffer.dtype, width, when, part)
        zero = self.m.cast([self.m.const(0, float32)], float32, buffer.dtype)[0]
        return [
            self.m.select(self.condition(p), value, zero)
            for p, value in zip(group, read, strict=True)
        ]

    def _tested(self, point: Point, condition: Expr) -> Point:
        """An iteration under one more condition."""
        return replace(point, tests=(*point.tests, *conjuncts(condition)))

    def _kept(self, group: Sequence[Point]) -> Kept | None:
        """Which neighbours conditions leave; None where that is no range."""
        return kept([p.tests for p in group], self.kernel.multiples)

    def _reach(
        self,
        buffer: Buffer,
        at: Sequence[Expr],
        group: Sequence[Point],
        found: Kept,
        once: Value | None,
    ) -> tuple[Value | None, Part | None]:
        """Under which condition one access serves neighbours, and which of them where not all;
        checks what it touches where the machine checks. at: the first one's element. found: which
        of them the conditions leave."""
        point, width = group[0], len(group)
        if buffer.scope is not Scope.GLOBAL or width == 1 or self._is_together(buffer, at, width):
            guarded = self.guard(buffer, at)
        else:
            guarded = self.guard(buffer, at, lead_only=True)
            found = found.within(*self._range_left(buffer, at))
        conditions = (point.bounds, point.condition, once, *map(self.value, found.shared))
        when = self.both(guarded, *conditions)
        if found.is_all or width == 1:
            self.check(buffer, at, when, width)
            return when, None
        for k, one in enumerate(group):
            own = self.both(point.bounds, self.condition(one), once)
            self.check(buffer, (*at[:-1], arith("add", at[-1], k)), own)
        return when, self._part(found, width)

    def _part(self, found: Kept, width: int) -> Part:
        first = index(0) if found.first is None else narrowed(found.first)
        end = index(width) if found.end is None else narrowed(found.end)
        return self.index_value(first, 32)[0], self.index_value(end, 32)[0]

    # ---- how wide ---------------------------------------------------------------------------

    def access_width(self, buffer: Buffer, at: Sequence[Expr], points: Points) -> int:
        """How many consecutive points one memory access serves: their elements are consecutive,
        and those that are accessed have no others between them."""
        width, axis = points.vector, points.axis
        if width == 1 or axis is None or not at:
            return 1
        if any(axis in variables(Point(points.constants).sub(e)) for e in at[:-1]):
            return 1
        groups = [points.points[n : n + width] for n in range(0, len(points.points), width)]
        if not all(are_neighbours(group, at[-1]) for group in groups):
            return 1
        left = [self._kept(group) for group in groups]
        if None in left:
            return 1
        is_parted = not all(k is not None and k.is_all for k in left)
        if is_parted and (buffer.scope.is_per_thread or width * buffer.dtype.bytes < _WORD):
            return 1
        if buffer.scope is Scope.GLOBAL:
            return self._global_width(buffer, at, groups, width, is_parted)
        root = buffer.root
        if buffer.scope.is_shared and buffer is root:
            wide = self._shared_width(self.kernel.shared[root], points, at, width)
            return wide if wide == width or not is_parted else 1
        return width if int_value(buffer.element_strides[-1]) == 1 else 1

    def _global_width(
        self,
        buffer: Buffer,
        at: Sequence[Expr],
        groups: Sequence[Sequence[Point]],
        width: int,
        is_parted: bool,
    ) -> int:
        if int_value(buffer.element_strides[-1]) != 1:
            return 1
        extent = buffer.shape[-1]
        if buffer.broadcasts and int_value(extent) == 1:
            return 1
        if all(is_surely_inside(p.sub(at[-1]), extent) for group in groups for p in group):
            return width
        # a vector is inside or outside as a whole when it starts and the extent ends at its
        # multiple; else its end is accessed by itself, which is worth it where the rest is wide
        multiples = self.kernel.multiples
        starts = [tuple(group[0].place(e) for e in at) for group in groups]
        common = math.gcd(divisor(extent, multiples), *(divisor(s[-1], multiples) for s in starts))
        together = math.gcd(width, common)
        if together == width:
            return width
        align = min(self._alignment(buffer, s) for s in starts)
        reach = min(width, align // buffer.dtype.bytes)
        if reach > together and reach * buffer.dtype.bytes >= _WORD:
            return reach
        return 1 if is_parted else together

    def _alignment(self, buffer: Buffer, at: Sequence[Expr]) -> int:
        """A power of two that provably divides a global element's address, up to 16."""
        known = divisor(global_offset(buffer, at), self.kernel.multiples)
        return power_of_two_divisor(known, power_of_two_divisor(buffer.align or 1, _WIDEST))

    def _is_together(self, buffer: Buffer, at: Sequence[Expr], width: int) -> bool:
        """Whether a vector is, along the last dimension, in a tensor or not as a whole."""
        extent, multiples = buffer.shape[-1], self.kernel.multiples
        last = arith("add", at[-1], width - 1)
        if is_surely_inside(at[-1], extent) and is_surely_inside(last, extent):
            return True
        return math.gcd(divisor(at[-1], multiples), divisor(extent, multiples)) % width == 0

    def _range_left(self, buffer: Buffer, at: Sequence[Expr]) -> tuple[Expr | None, Expr | None]:
        """Which elements from one on are in the tensor along the last dimension."""
        low = interval(at[-1]).low
        is_before = low is None or low < 0
        first = arith("sub", 0, at[-1]) if is_before else None
        return first, arith("sub", buffer.shape[-1], at[-1])

    def _shared_width(
        self, layout: SharedLayout, points: Points, at: Sequence[Expr], width: int
    ) -> int:
        if layout.is_linear:
            return width if layout.linear_strides[-1:] == (1,) else 1
        # consecutive within a swizzle chunk, and within a panel
        starts = 0
        for first in range(0, len(points.points), points.vector):
            start = points.points[first].sub(at[-1])
            starts = math.gcd(starts, divisor(start, self.kernel.multiples))
        chunk = 16 // layout.itemsize if layout.swizzle > 1 else layout.panel
        return math.gcd(width, math.gcd(starts, chunk)) if starts else math.gcd(width, chunk)


def are_neighbours(points: Sequence[Point], last: Expr) -> bool:
    """True when the points run together and `last` goes up by one from each to the next."""
    first, *others = points
    start = first.place(last)
    return all(
        other.condition is first.condition and difference(other.place(last), start) == k
        for k, other in enumerate(others, 1)
    )
