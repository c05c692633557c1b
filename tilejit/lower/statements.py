"""Emitters of control flow and scalar statements, in and outside T.Parallel.

Knows how the iterations of a loop that a thread runs are unrolled, predicated and vectorised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tilejit.dtypes import bool_, int32, int64, uint32
from tilejit.errors import InternalError
from tilejit.ir.access import local_registers
from tilejit.ir.analysis import difference
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Const, Expr, Var, arith, binary, const, int_value, variables
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Load,
    LoopKind,
    Node,
    Store,
    While,
    all_writes,
    walk,
)
from tilejit.ir.sync import AsyncCommit, AsyncWait, BarrierArrive, BarrierWait, SyncThreads
from tilejit.isa import barrier as isa_barrier
from tilejit.isa import cp_async as isa_cp_async
from tilejit.isa import mbarrier as isa_mbarrier
from tilejit.isa.machine import Value
from tilejit.lower.accesses import AccessEmitter
from tilejit.lower.emit import Point, Points, new_value
from tilejit.lower.facts import trip_count
from tilejit.lower.parts import opposite

# Registers that one round of a T.Parallel loop handles: enough loads in flight, and code of a
# loop over a large tile in memory stays small.
ROUND = 128


class StatementEmitter(AccessEmitter):
    """Bodies, loops, branches, loads and stores."""

    def single(self) -> Points:
        return Points([Point()])

    def emit_body(self, body: Body, points: Points) -> None:
        for node in body:
            self.emit_node(node, points)

    def emit_node(self, node: Node, points: Points) -> None:
        if isinstance(node, Load):
            self.emit_load(node, points)
        elif isinstance(node, Store):
            self.emit_store(node, points)
        elif isinstance(node, Atomic):
            self.emit_atomic(node, points)
        elif isinstance(node, For):
            self.emit_for(node, points)
        elif isinstance(node, If):
            self.emit_if(node, points)
        elif isinstance(node, While):
            self.emit_while(node, points)
        else:
            self.emit_tile(node, points)

    def emit_tile(self, node: Node, points: Points) -> None:
        """Nodes that all threads of the block execute together."""
        if not points.is_single:
            raise InternalError(f"{type(node).__name__} inside T.Parallel.", span=node.span)
        m = self.m
        if isinstance(node, SyncThreads):
            self.emit_sync(node, points.points[0])
        elif isinstance(node, AsyncCommit):
            m.issue(isa_cp_async.COMMIT_GROUP)
        elif isinstance(node, AsyncWait):
            m.issue(isa_cp_async.wait_group(node.pending))
        elif isinstance(node, BarrierArrive):
            address = self.barrier_address(node.barrier, node.slot, points.points[0])
            m.issue(isa_mbarrier.ARRIVE, [address])
        elif isinstance(node, BarrierWait):
            address = self.barrier_address(node.barrier, node.slot, points.points[0])
            parity = self.value(points.points[0].sub(node.parity))
            m.issue(isa_mbarrier.wait_parity(self.target), [address, parity])
        else:
            raise InternalError(f"No emitter for {type(node).__name__}.", span=node.span)

    def emit_sync(self, node: SyncThreads, point: Point) -> None:
        if node.number is None:
            self.meet()
            return
        number = self.m.cast([self.index_value(point.sub(node.number), 32)[0]], int32, uint32)
        record = isa_barrier.bar_arrive_at if node.is_arrival else isa_barrier.bar_sync_at
        self.m.issue(record(node.threads), number)

    def meet(self) -> None:
        """All threads of the executing role come together."""
        m = self.m
        if self.team is None:
            m.issue(isa_barrier.bar_sync(self.meeting, self.threads))
            return
        number = m.binary("add", self.value(self.team), m.const(self.meeting, int32), int32)
        m.issue(isa_barrier.bar_sync_at(self.threads), [m.cast([number], int32, uint32)[0]])

    def barrier_address(self, barrier: Buffer, slot: Expr, point: Point) -> Value:
        self.check(barrier, [point.sub(slot)], self.condition(point))
        offset = arith("mul", point.sub(slot), isa_mbarrier.BYTES)
        offset = arith("add", offset, self.kernel.offsets[barrier.root])
        return self.m.address(self._split("shared", None, offset, isa_mbarrier.BYTES, False))

    # ---- loads ------------------------------------------------------------------------------

    def emit_load(self, node: Load, points: Points) -> None:
        scope = node.buffer.scope
        if scope is Scope.FRAGMENT:
            registers = self.fragment_access(node.buffer, node.index, points)
            held = self.state[node.buffer]
            self._bind_each(node.out, points, [held[r] for r in registers])
        elif scope.is_per_thread and node.buffer.root not in self.facts.in_memory:
            results = [self._load_private(node, point) for point in points.points]
            self._bind_each(node.out, points, results)
        else:
            self._load_memory(node, points)

    def _bind_each(self, out: Var, points: Points, values: Sequence[Value]) -> None:
        if points.is_single:
            self.bind(out, values[0])
            return
        fresh: dict[int, Var] = {}
        for point, value in zip(points.points, values, strict=True):
            var = fresh.get(id(value))
            if var is None:
                var = fresh[id(value)] = new_value(out.name, out.dtype)
                self.bind(var, value)
            point.mapping[out] = var

    def _load_private(self, node: Load, point: Point) -> Value:
        held = self.state[node.buffer.root]
        at = [point.sub(e) for e in node.index]
        slot = self.private_slot(node.buffer, at)
        if isinstance(slot, int):
            return held[slot]
        when = None if node.when is None else self.value(point.sub(node.when))
        self.check(node.buffer, at, self.both(point.bounds, self.condition(point), when))
        number, bits = self.index_value(slot)
        dtype = int32 if bits == 32 else int64
        result = held[0]
        for k in range(1, len(held)):
            hit = self.m.binary("eq", number, self.m.const(k, dtype), dtype)
            result = self.m.select(hit, held[k], result)
        return result

    def _load_memory(self, node: Load, points: Points) -> None:
        done: dict[Any, list[Value]] = {}
        results: list[Value] = []
        if node.when is not None:
            tested = [self._tested(p, p.sub(node.when)) for p in points.points]
            points = replace(points, points=tested)
        width = self.access_width(node.buffer, node.index, points)
        for first in range(0, len(points.points), width):
            group = points.points[first : first + width]
            at = tuple(group[0].place(e) for e in node.index)
            tests = tuple(p.tests for p in group)
            key = (at, tests, id(group[0].bounds), id(group[0].condition))
            if key not in done:
                done[key] = self._load_group(node.buffer, at, group, points.once_loads)
            results += done[key]
        self._bind_each(node.out, points, results)

    # ---- stores -----------------------------------------------------------------------------

    def emit_store(self, node: Store, points: Points) -> None:
        scope = node.buffer.scope
        values = self.values([point.sub(node.value) for point in points.points])
        if scope is Scope.FRAGMENT:
            registers = self.fragment_access(node.buffer, node.index, points)
            held = self.state[node.buffer]
            # padding of a loop spread like the fragment is padding there too, else an element
            is_alike = points.layout == self.kernel.fragments[node.buffer] and (
                tuple(node.index) == tuple(points.variables)
            )
            for register, value, point in zip(registers, values, points.points, strict=True):
                bounds = None if is_alike else point.bounds
                held[register] = self._merge(
                    self.both(bounds, self.condition(point)), value, held[register]
                )
        elif scope.is_per_thread and node.buffer.root not in self.facts.in_memory:
            for value, point in zip(values, points.points, strict=True):
                self._store_private(node, point, value)
        else:
            self._store_memory(node, points, values)

    def _merge(self, condition: Value | None, new: Value, old: Value) -> Value:
        return new if condition is None else self.m.select(condition, new, old)

    def _store_private(self, node: Store, point: Point, value: Value) -> None:
        held = self.state[node.buffer.root]
        condition = self.both(point.bounds, self.condition(point))
        at = [point.sub(e) for e in node.index]
        self.check(node.buffer, at, condition)
        slot = self.private_slot(node.buffer, at)
        if isinstance(slot, int):
            held[slot] = self._merge(condition, value, held[slot])
            return
        number, bits = self.index_value(slot)
        dtype = int32 if bits == 32 else int64
        for k in range(len(held)):
            hit = self.m.binary("eq", number, self.m.const(k, dtype), dtype)
            held[k] = self._merge(self.both(condition, hit), value, held[k])

    def _store_memory(self, node: Store, points: Points, values: list[Value]) -> None:
        width = self.access_width(node.buffer, node.index, points)
        once = self.once(node, points)
        for first in range(0, len(points.points), width):
            group = points.points[first : first + width]
            at = tuple(group[0].place(e) for e in node.index)
            found = self._kept(group)
            assert found is not None, "neighbours are left from one on to another"
            when, part = self._reach(node.buffer, at, group, found, once)
            mine, dtype = values[first : first + width], node.buffer.dtype
            self.m.store(self.address(node.buffer, at), mine, dtype, when, part)

    def once(self, node: Node, points: Points) -> Value | None:
        """Restriction to one thread, for effects on memory that all threads would repeat."""
        if points.layout is not None:
            return points.once
        per_thread = any(b.scope.is_per_thread for b in node.writes)
        if per_thread or self.divergent or self.facts.divergence.of(node.exprs):
            return None
        return self.inside_first_thread()

    def inside_first_thread(self) -> Value | None:
        return self.value(binary("eq", self.thread, const(0)))

    def emit_atomic(self, node: Atomic, points: Points) -> None:
        once = self.once(node, points)
        results: list[Value] = []
        for point in points.points:
            at = tuple(point.sub(e) for e in node.index)
            if node.buffer.scope not in (Scope.GLOBAL, Scope.SHARED):
                raise InternalError("An atomic on private memory.", span=node.span)
            when = self.both(self.guard(node.buffer, at), point.bounds, self.condition(point), once)
            value = self.value(point.sub(node.value))
            self.check(node.buffer, at, when)
            address = self.address(node.buffer, at)
            old = self.m.atomic(
                address, node.combine, value, node.buffer.dtype, when, node.out is not None
            )
            results.append(old)
        if node.out is not None:
            self._bind_each(node.out, points, results)

    # ---- which register ---------------------------------------------------------------------

    def fragment_access(
        self, buffer: Buffer, at: Sequence[Expr], points: Points
    ) -> tuple[int, ...]:
        """For each point the register of a fragment element."""
        layout = self.kernel.fragments[buffer]
        substituted = tuple(Point(points.constants).sub(e) for e in at)
        key = (buffer, substituted, points.layout)
        memo = self._accesses
        if key not in memo:
            memo[key] = local_registers(layout, points.layout, points.variables, substituted)
        registers = memo[key]
        if registers is None:
            raise InternalError(f"`{buffer.name}` is not held where it is used.", span=buffer.span)
        if points.layout is None:
            return registers * len(points.points)
        return tuple(registers[r] for r in points_registers(points))

    @property
    def _accesses(self) -> dict[Any, tuple[int, ...] | None]:
        if not hasattr(self, "_access_memo"):
            self._access_memo: dict[Any, tuple[int, ...] | None] = {}
        return self._access_memo

    # ---- control flow -----------------------------------------------------------------------

    def changed(self, *bodies: Body) -> dict[Any, list[Value]]:
        """The part of the state that the bodies may change."""
        written: set[Buffer] = set()
        for body in bodies:
            for node in body:
                written |= all_writes(node)
        keys = written | {b.root for b in written}
        return {key: held for key, held in self.state.items() if key in keys}

    def emit_for(self, node: For, points: Points) -> None:
        starts = [p.sub(node.start) for p in points.points]
        stops = [p.sub(node.stop) for p in points.points]
        if any(e is not starts[0] for e in starts) or any(e is not stops[0] for e in stops):
            for one in split_points(points):
                self.emit_for(node, one)
            return
        fixed = replace(node, start=starts[0], stop=stops[0])
        count = trip_count(fixed)
        if count is not None and (node.var in self.facts.unrolled or count == 1):
            self._emit_unrolled(fixed, count, points)
            return
        start, stop = self.index_value(fixed.start), self.index_value(fixed.stop)
        bits = max(start[1], stop[1], node.var.dtype.bits)
        dtype = int32 if bits == 32 else int64
        divergent = points.is_single and self.facts.divergence.of((fixed.start, fixed.stop))
        self.divergent += divergent

        def body(value: Value) -> None:
            with self.scope():
                if dtype is not node.var.dtype:
                    value = self.m.cast([value], dtype, node.var.dtype)[0]
                self.bind(node.var, value)
                self.emit_body(node.body, copy_points(points))

        self.m.loop(
            self.index_value(fixed.start, bits)[0],
            self.index_value(fixed.stop, bits)[0],
            node.step,
            dtype,
            body,
            self.changed(node.body),
        )
        self.divergent -= divergent

    def _emit_unrolled(self, node: For, count: int, points: Points) -> None:
        start = int_value(node.start)
        assert start is not None
        steps = [const(start + k * node.step, node.var.dtype) for k in range(count)]
        if node.kind is LoopKind.VECTORIZED and points.is_single and count > 1:
            self._emit_vectorized(node, steps, points)
            return
        for value in steps:
            with self.scope():
                self.emit_body(node.body, copy_points(points).with_constant(node.var, value))

    def _emit_vectorized(self, node: For, steps: list[Const], points: Points) -> None:
        """Iterations of one thread: when independent, statement by statement and neighbours
        together."""
        (outer,) = points.points
        if not are_independent(node, steps):
            for value in steps:
                with self.scope():
                    self.emit_body(node.body, copy_points(points).with_constant(node.var, value))
            return
        inner = [replace(outer, mapping={**outer.mapping, node.var: value}) for value in steps]
        vector = len(steps) & -len(steps) if node.step == 1 else 1
        self.emit_body(
            node.body,
            Points(inner, vector=vector, axis=node.var, constants=dict(points.constants)),
        )

    def emit_if(self, node: If, points: Points) -> None:
        conditions = [p.sub(node.condition) for p in points.points]
        if all(c is conditions[0] for c in conditions):
            self._emit_branch(node, conditions[0], points)
            return
        for body, negate in ((node.then, False), (node.orelse, True)):
            if not body:
                continue
            arm = copy_points(points)
            wanted = [opposite(c) for c in conditions] if negate else conditions
            for n, (point, condition) in enumerate(zip(arm.points, conditions, strict=True)):
                test = wanted[n]
                if test is not None:
                    arm.points[n] = self._tested(point, test)
                else:
                    value = self.m.unary("not", self.value(condition), bool_)
                    point.condition = self.both(point.condition, value)
            self.emit_body(body, arm)

    def _emit_branch(self, node: If, condition: Expr, points: Points) -> None:
        if isinstance(condition, Const):
            self.emit_body(node.then if condition.value else node.orelse, copy_points(points))
            return
        divergent = points.is_single and self.facts.divergence.of((condition,))
        self.divergent += divergent

        def arm(body: Body) -> None:
            with self.scope():
                self.emit_body(body, copy_points(points))

        self.m.branch(
            self.value(condition),
            lambda: arm(node.then),
            (lambda: arm(node.orelse)) if node.orelse else None,
            self.changed(node.then, node.orelse),
        )
        self.divergent -= divergent

    def emit_while(self, node: While, points: Points) -> None:
        if len(points.points) > 1:
            for one in split_points(points):
                self.emit_while(node, one)
            return
        divergent = points.is_single and self.facts.divergence.of((node.condition,))
        self.divergent += divergent
        inner = copy_points(points)

        def test() -> Value:
            self.forget()  # a machine that executes comes here once a round
            (point,) = inner.points
            point.mapping = dict(points.points[0].mapping)
            self.emit_body(node.test, inner)
            return self.both(self.value(point.sub(node.condition)), self.condition(point))

        def body() -> None:
            self.emit_body(node.body, inner)

        with self.scope():
            self.m.loop_while(test, body, self.changed(node.test, node.body))
        self.divergent -= divergent


def copy_points(points: Points) -> Points:
    """The same iterations; what one body binds is not seen by another."""
    fresh = [replace(p, mapping=dict(p.mapping)) for p in points.points]
    return replace(points, points=fresh)


def split_points(points: Points) -> list[Points]:
    """Each iteration on its own."""
    return [
        replace(points, points=[point], vector=1, axis=None, registers=[register])
        for point, register in zip(points.points, points_registers(points), strict=True)
    ]


def points_registers(points: Points) -> list[int]:
    """The loop layout's register of each point."""
    if points.registers is not None:
        return points.registers
    return list(range(len(points.points)))


def are_independent(node: For, steps: Sequence[Const]) -> bool:
    """True when no round of the loop touches what another writes, so that statements may run
    round by round."""
    touched: dict[Buffer, list[Load | Store | Atomic]] = {}
    inside = {var for n in walk(node.body) for var in n.defines}
    for n in walk(node.body):
        if isinstance(n, Load | Store | Atomic):
            touched.setdefault(n.buffer.root, []).append(n)
        elif n.reads or n.writes:
            return False
    for accesses in touched.values():
        first, *others = accesses
        if all(isinstance(n, Load) for n in accesses):
            continue
        if not others and not first.buffer.scope.is_per_thread:
            continue  # stored to only: the last round last, as in the loop
        if any(n.buffer is not first.buffer or n.index != first.index for n in others):
            return False
        if not any(_differs_each_round(e, node.var, steps, inside) for e in first.index):
            return False
    return True


def _differs_each_round(e: Expr, var: Var, steps: Sequence[Const], inside: set[Var]) -> bool:
    """True when an index is provably another number in every round of the loop over `var`."""
    if inside & variables(e):
        return False
    start = Point({var: steps[0]}).sub(e)
    moves = [difference(Point({var: step}).sub(e), start) for step in steps]
    return None not in moves and len(set(moves)) == len(moves)


def writes_shared_temporary(body: Body, loop: Sequence[Var]) -> bool:
    """True when iterations use the same private variable or array element for their own values:
    they must then run one after the other."""
    for node in walk(body):
        if isinstance(node, Store | Atomic) and node.buffer.scope.is_per_thread:
            if not any(v in variables(e) for e in node.index for v in loop):
                return True
    return False
