"""Emitters of scans: a thread's own neighbours first, then lanes of a warp by shuffles, then the
runs of registers one after the other.

Knows fragment digits and shuffles. Does not know why a fragment lies as it does.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilejit.dtypes import int32, uint32
from tilejit.ir.expr import arith, index
from tilejit.ir.node import Node
from tilejit.isa.machine import Value
from tilejit.isa.mma import WARP
from tilejit.layout.scan import Scanning
from tilejit.lower.emit import Points
from tilejit.lower.index import coordinates, thread_digit, thread_part
from tilejit.lower.reduce import ReduceEmitter
from tilejit.ops.reduce import Step
from tilejit.ops.scan import Scan


class ScanEmitter(ReduceEmitter):
    """Scans of fragments."""

    def emit_tile(self, node: Node, points: Points) -> None:
        if isinstance(node, Scan):
            with self.scope():
                self.emit_scan(node)
        else:
            super().emit_tile(node, points)

    def emit_scan(self, node: Scan) -> None:
        spread, held = node.spread, self.state[node.dst.buffer]
        assert spread is not None, "select did not run"
        lines: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for register in range(spread.layout.registers):
            line, place = spread.line(register)
            lines.setdefault(line, []).append((place, register))
        order = {
            line: [r for _, r in sorted(members, reverse=node.reverse)]
            for line, members in lines.items()
        }
        if node.step is Step.TAKE:
            self._add_before(node, spread, order)
            return
        lanes = _Lanes(self, node, spread)
        values = list(self.state[node.src.buffer])
        if spread.is_padded:
            values = self.existing(values, spread.layout, node.axis, self.nothing(node))
        totals: dict[tuple[int, ...], Value] = {}
        for line, registers in order.items():
            results, totals[line] = lanes.scan([values[r] for r in registers])
            for register, value in zip(registers, results, strict=True):
                held[register] = value
        if node.step is Step.SEND:
            self._leave_totals(node, spread, totals)

    def nothing(self, node: Scan) -> Value:
        """What leaves other values as they are."""
        return self.m.const(node.nothing, node.accumulator)

    def _leave_totals(
        self, node: Scan, spread: Scanning, totals: dict[tuple[int, ...], Value]
    ) -> None:
        """One thread of each part writes what it adds up to."""
        layout = spread.totals
        parts, first = thread_part(layout, self.thread), self.replica(layout)
        assert node.scratch is not None, "nothing goes through shared memory"
        for register in range(layout.registers):
            at = coordinates(layout, parts, register)
            value = totals[layout.register_part(register)[:-1]]
            inside = self.both(self.bounds(layout, at), first)
            self.m.store(self.address(node.scratch, at), [value], node.accumulator, inside)

    def _add_before(
        self, node: Scan, spread: Scanning, order: dict[tuple[int, ...], list[int]]
    ) -> None:
        """All threads combine what the parts before theirs add up to, one after the other, with
        what they hold."""
        m, layout, dtype = self.m, spread.totals, node.accumulator
        held, parts = self.state[node.dst.buffer], thread_part(layout, self.thread)
        assert node.scratch is not None, "nothing goes through shared memory"
        numbers = range(1, spread.parts) if node.reverse else range(spread.parts - 1)
        for register in range(layout.registers):
            *line, own = coordinates(layout, parts, register)
            start = (*line, index(0))
            inside = self.bounds(layout, start)
            all_parts = m.load(self.address(node.scratch, start), dtype, spread.parts, inside)
            before = self.nothing(node)
            for part in reversed(numbers) if node.reverse else numbers:
                is_before = self.value(arith("lt" if node.reverse else "gt", own, part))
                before = m.select(is_before, self.pair(node, before, all_parts[part]), before)
            for r in order[layout.register_part(register)[:-1]]:
                held[r] = self.pair(node, before, held[r])


class _Lanes:
    """What lanes trade along the axis, in its order or in reverse."""

    def __init__(self, emitter: ScanEmitter, node: Scan, spread: Scanning) -> None:
        self.emitter, self.node, self.spread = emitter, node, spread
        self.dtype = node.accumulator
        self.m = emitter.m
        self.nothing = emitter.nothing(node)
        if spread.lanes == 1:
            return
        threads, last = spread.layout.threads, spread.lanes - 1
        digit = thread_digit(emitter.thread, spread.stride, spread.lanes, threads)
        self.rank = arith("sub", last, digit) if node.reverse else digit
        lane = arith("floormod", emitter.thread, WARP)
        ahead = arith("mul", arith("sub", 0 if node.reverse else last, digit), spread.stride)
        (self.end,) = self.m.cast(
            [emitter.index_value(arith("add", lane, ahead), 32)[0]], int32, uint32
        )

    def scan(self, values: Sequence[Value]) -> tuple[list[Value], Value]:
        """A line's registers, in order, scanned; and all of the line combined."""
        run = self.spread.run
        results: list[Value] = []
        done: Value | None = None  # all of the runs before
        for first in range(0, len(values), run):
            own = self._own(values[first : first + run])
            if self.spread.lanes == 1:
                before, total = done, own[-1]
            else:
                before, total = self._across(own[-1], done)
            results += own if before is None else [self._pair(before, v) for v in own]
            done = total if done is None else self._pair(done, total)
        assert done is not None, "a line has elements"
        return results, done

    def _own(self, values: Sequence[Value]) -> list[Value]:
        result = [values[0]]
        for value in values[1:]:
            result.append(self._pair(result[-1], value))
        return result

    def _across(self, value: Value, done: Value | None) -> tuple[Value, Value]:
        """What comes before the thread's run, and all of the run of all lanes (Hillis and Steele,
        "Data parallel algorithms", 1986)."""
        m, emitter = self.m, self.emitter
        step = 1
        while step < self.spread.lanes:
            other = self._from(value, step)
            value = m.select(self._is_from(step), self._pair(other, value), value)
            step *= 2
        total = emitter.from_lane(value, self.end, self.dtype, "idx")
        before = m.select(self._is_from(1), self._from(value, 1), self.nothing)
        return (before if done is None else self._pair(done, before)), total

    def _from(self, value: Value, step: int) -> Value:
        """The value of the lane so many before."""
        mode = "down" if self.node.reverse else "up"
        distance = self.m.const(step * self.spread.stride, uint32)
        return self.emitter.from_lane(value, distance, self.dtype, mode)

    def _is_from(self, least: int) -> Value:
        """Whether at least so many lanes are before."""
        return self.emitter.value(arith("ge", self.rank, least))

    def _pair(self, a: Value, b: Value) -> Value:
        return self.emitter.pair(self.node, a, b)
