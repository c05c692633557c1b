"""Control flow of the LLVM machine: branches and loops over the state that they carry.

Knows basic blocks and phis. Does not know what runs inside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tilejit.dtypes import DType
from tilejit.isa.machine import State
from tilejit.lower.llvm_cast import LLVMCasts
from tilejit.lower.llvm_values import LOOP_BLOCK, Value, constant_int, keep_rolled

_UNROLLED_TRIPS = 8  # shorter constant loops are left to LLVM, longer ones stay loops
_COUNTER = object()

_Snapshot = dict[Any, list[Value]]


class LLVMControl(LLVMCasts):
    """`branch`, `loop` and `loop_while` of the machine."""

    def _snapshot(self, state: State) -> _Snapshot:
        """The values of a state; parts leave their words, for a word may not reach far enough."""
        for entries in state.values():
            entries[:] = self.values(entries)
        return {key: list(entries) for key, entries in state.items()}

    def branch(
        self,
        condition: Value,
        then: Callable[[], None],
        orelse: Callable[[], None] | None,
        state: State,
    ) -> None:
        known = constant_int(condition)
        if known is not None:
            chosen = then if known else orelse
            if chosen is not None:
                chosen()
            return
        before = self._snapshot(state)
        builder = self.builder
        begin = builder.block
        taken = builder.append_basic_block("then")
        other = builder.append_basic_block("else") if orelse is not None else None
        join = builder.append_basic_block("join")
        builder.cbranch(condition, taken, other or join)
        ends = [self._arm(taken, join, then, state)]
        if other is not None and orelse is not None:
            _restore(state, before)
            ends.append(self._arm(other, join, orelse, state))
        else:
            ends.append((begin, before))
        builder.position_at_end(join)
        self._merge(state, ends)

    def _arm(
        self, block: Any, join: Any, body: Callable[[], None], state: State
    ) -> tuple[Any, _Snapshot]:
        self.builder.position_at_end(block)
        body()
        after = self._snapshot(state)
        end = self.builder.block
        self.builder.branch(join)
        return end, after

    def _merge(self, state: State, ends: Sequence[tuple[Any, _Snapshot]]) -> None:
        (first_block, first), (second_block, second) = ends
        for key, entries in state.items():
            for place, (a, b) in enumerate(zip(first[key], second[key], strict=True)):
                if a is b:
                    entries[place] = a
                    continue
                phi = self.builder.phi(a.type)
                phi.add_incoming(a, first_block)
                phi.add_incoming(b, second_block)
                entries[place] = phi

    def loop(
        self,
        start: Value,
        stop: Value,
        step: int,
        dtype: DType,
        body: Callable[[Value], None],
        state: State,
    ) -> None:
        assert step, "a loop has a step"
        start, stop = self.value(start), self.value(stop)
        known = constant_int(start), constant_int(stop)
        trips = None
        if known[0] is not None and known[1] is not None:
            trips = len(range(known[0], known[1], step))
            if trips == 0:
                return
            if trips == 1:
                body(start)
                return
        if trips is None and abs(step) > 1:  # start + step may lie beyond the dtype's range
            self._counted_loop(start, stop, step, dtype, body, state)
            return
        counter: State = {**state, _COUNTER: [start]}

        def test() -> Value:
            compare = "lt" if step > 0 else "gt"
            return self.binary(compare, counter[_COUNTER][0], stop, dtype)

        def advance() -> None:
            value = counter[_COUNTER][0]
            body(value)
            counter[_COUNTER][0] = self.binary("add", value, self.const(step, dtype), dtype)

        self._repeat(test, advance, counter, trips is None or trips > _UNROLLED_TRIPS)

    def _counted_loop(
        self,
        start: Value,
        stop: Value,
        step: int,
        dtype: DType,
        body: Callable[[Value], None],
        state: State,
    ) -> None:
        """The same with the trips counted beforehand, in unsigned arithmetic."""
        b = self.builder
        kind = start.type
        low, high = (start, stop) if step > 0 else (stop, start)
        runs = self.binary("lt", low, high, dtype)
        distance = b.sub(b.sub(high, low), kind(1))
        trips = b.add(b.udiv(distance, kind(abs(step))), kind(1))
        trips = b.select(runs, trips, kind(0))
        counter: State = {**state, _COUNTER: [kind(0), start]}

        def test() -> Value:
            return b.icmp_unsigned("<", counter[_COUNTER][0], trips)

        def advance() -> None:
            count, value = counter[_COUNTER]
            body(value)
            counter[_COUNTER][0] = b.add(count, kind(1))
            counter[_COUNTER][1] = b.add(value, self.const(step, dtype))

        self._repeat(test, advance, counter, True)

    def loop_while(self, test: Callable[[], Value], body: Callable[[], None], state: State) -> None:
        self._repeat(test, body, state, True)

    def _repeat(
        self,
        test: Callable[[], Value],
        body: Callable[[], None],
        state: State,
        rolled: bool,
    ) -> None:
        before = self._snapshot(state)
        builder = self.builder
        begin = builder.block
        header = builder.append_basic_block(LOOP_BLOCK)
        inside = builder.append_basic_block("body")
        after = builder.append_basic_block("done")
        builder.branch(header)
        builder.position_at_end(header)
        phis: _Snapshot = {}
        for key, entries in before.items():
            phis[key] = [builder.phi(v.type) for v in entries]
            for phi, value in zip(phis[key], entries, strict=True):
                phi.add_incoming(value, begin)
        _restore(state, phis)
        condition = test()
        at_exit = self._snapshot(state)
        builder.cbranch(condition, inside, after)
        builder.position_at_end(inside)
        body()
        at_end = self._snapshot(state)
        latch = builder.branch(header)
        if rolled:
            keep_rolled(builder.module, latch)
        end = builder.block
        for key, entries in at_end.items():
            for phi, value in zip(phis[key], entries, strict=True):
                phi.add_incoming(value, end)
        builder.position_at_end(after)
        _restore(state, at_exit)


def _restore(state: State, snapshot: _Snapshot) -> None:
    for key, entries in state.items():
        entries[:] = snapshot[key]
