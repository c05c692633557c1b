"""Records an emitter's machine operations once, to replay them for every call.

Knows the operations of `isa.machine.Machine`. Does not know what they compute: the lane machine
does that. Emitters spend most of their time on deciding what to emit, and a granule is called for
every block and every round of a loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tilejit.dtypes import DType
from tilejit.isa.instruction import Instruction
from tilejit.isa.machine import Address, Granule, Part, State
from tilejit.sim.lanes import LaneMachine, make_constant

Array = np.ndarray[Any, Any]
Registers = list[Any]
Step = Callable[[LaneMachine, Registers], None]


class Register:
    """A value that replaying will find at `place`."""

    __slots__ = ("place",)

    def __init__(self, place: int) -> None:
        self.place = place


class Program:
    """What a granule does. Inputs and outputs are scalars or lists, as its emitter has them."""

    def __init__(self, granule: Granule) -> None:
        recorder = Recorder()
        inputs = [
            recorder.new() if slot.count is None else [recorder.new() for _ in range(slot.count)]
            for slot in granule.inputs
        ]
        outputs = granule.emit(recorder, inputs)
        self._steps = recorder.steps
        self._inputs = [_places(value) for value in inputs]
        self._outputs = [_places(recorder.known(value)) for value in outputs]
        self._start = recorder.registers

    def run(self, machine: LaneMachine, inputs: list[Any]) -> list[Any]:
        """Replay on `machine`."""
        registers = list(self._start)
        for place, value in zip(self._inputs, inputs, strict=True):
            if isinstance(place, int):
                registers[place] = value
            else:
                for each, element in zip(place, value, strict=True):
                    registers[each] = element
        _replay(self._steps, machine, registers)
        return [
            registers[place] if isinstance(place, int) else [registers[each] for each in place]
            for place in self._outputs
        ]


@functools.lru_cache(maxsize=256)
def program_of(granule: Granule) -> Program:
    """The granule's program, recorded at its first use."""
    return Program(granule)


def _places(value: Any) -> int | list[int]:
    return [each.place for each in value] if isinstance(value, list) else value.place


def _replay(steps: list[Step], machine: LaneMachine, registers: Registers) -> None:
    for step in steps:
        step(machine, registers)


class Recorder:
    """`isa.machine.Machine` whose values are registers. An array given as a value is a constant."""

    checks_indexes = True

    def __init__(self) -> None:
        self.registers: list[Any] = []  # what each holds from the start: constants, else None
        self.steps: list[Step] = []
        self._allocations = 0

    def new(self, value: Array | None = None) -> Register:
        """A register, with the value it has from the start."""
        self.registers.append(value)
        return Register(len(self.registers) - 1)

    def known(self, value: Any) -> Any:
        """The same value or list of values, arrays replaced by registers."""
        if isinstance(value, list | tuple):
            return [self.known(each) for each in value]
        if isinstance(value, Register):
            return value
        assert isinstance(value, np.ndarray), f"{value!r} is no value of a machine"
        return self.new(value)

    def _in(self, value: Any) -> int:
        return self.known(value).place  # type: ignore[no-any-return]

    def _all(self, values: Sequence[Any]) -> list[int]:
        return [self._in(value) for value in values]

    def _maybe(self, value: Any) -> int:
        """The place of a value that may be missing: then one that holds None."""
        return self.new().place if value is None else self._in(value)

    def _record(self, count: int, run: Callable[[LaneMachine, Registers], Any]) -> list[Register]:
        """Append a step that computes `count` values."""
        outs = [self.new() for _ in range(count)]
        begin = outs[0].place if outs else 0
        end = begin + count

        def step(machine: LaneMachine, r: Registers) -> None:
            r[begin:end] = run(machine, r)

        self.steps.append(step)
        return outs

    def _effect(self, run: Step) -> None:
        self.steps.append(run)

    # --- values ----------------------------------------------------------------------------------

    def const(self, value: bool | int | float, dtype: DType) -> Register:
        return self.new(make_constant(value, dtype))

    def thread_index(self) -> Register:
        return self._record(1, lambda m, r: [m.thread_index()])[0]

    def binary(self, op: str, a: Any, b: Any, dtype: DType) -> Register:
        x, y = self._in(a), self._in(b)
        return self._record(1, lambda m, r: [m.binary(op, r[x], r[y], dtype)])[0]

    def quotient(self, a: Any, b: Any, dtype: DType) -> Register:
        x, y = self._in(a), self._in(b)
        return self._record(1, lambda m, r: [m.quotient(r[x], r[y], dtype)])[0]

    def unary(self, op: str, a: Any, dtype: DType) -> Register:
        x = self._in(a)
        return self._record(1, lambda m, r: [m.unary(op, r[x], dtype)])[0]

    def fma(self, a: Any, b: Any, c: Any, dtype: DType) -> Register:
        x, y, z = self._all((a, b, c))
        return self._record(1, lambda m, r: [m.fma(r[x], r[y], r[z], dtype)])[0]

    def cast(self, values: Sequence[Any], source: DType, target: DType) -> list[Any]:
        if source is target or not values:
            return list(values)
        these = self._all(values)
        return self._record(len(these), lambda m, r: m.cast([r[p] for p in these], source, target))

    def bitcast(self, a: Any, source: DType, target: DType) -> Register:
        x = self._in(a)
        return self._record(1, lambda m, r: [m.bitcast(r[x], source, target)])[0]

    def select(self, condition: Any, a: Any, b: Any) -> Register:
        c, x, y = self._all((condition, a, b))
        return self._record(1, lambda m, r: [m.select(r[c], r[x], r[y])])[0]

    def pack(self, values: Sequence[Any], dtype: DType) -> Register:
        these = self._all(values)
        return self._record(1, lambda m, r: [m.pack([r[p] for p in these], dtype)])[0]

    def unpack(self, word: Any, dtype: DType) -> list[Any]:
        x = self._in(word)
        return self._record(32 // dtype.bits, lambda m, r: m.unpack(r[x], dtype))

    # --- memory and instructions -----------------------------------------------------------------

    def _find(self, address: Address) -> Callable[[Registers], Address]:
        base, offset = self._maybe(address.base), self._maybe(address.offset)
        space, fixed = address.space, (address.constant, address.align, address.readonly)
        return lambda r: Address(space, r[base], r[offset], *fixed)

    def load(
        self,
        address: Address,
        dtype: DType,
        count: int = 1,
        when: Any = None,
        part: Part | None = None,
    ) -> list[Any]:
        find, c = self._find(address), self._maybe(when)
        if part is None:
            return self._record(count, lambda m, r: m.load(find(r), dtype, count, r[c]))
        a, b = self._all(part)
        return self._record(count, lambda m, r: m.load(find(r), dtype, count, r[c], (r[a], r[b])))

    def check_index(
        self, index: Sequence[Any], extents: Sequence[int], name: str, when: Any = None
    ) -> None:
        places, c = self._all(index), self._maybe(when)
        self._effect(lambda m, r: m.check_index([r[p] for p in places], extents, name, r[c]))

    def store(
        self,
        address: Address,
        values: Sequence[Any],
        dtype: DType,
        when: Any = None,
        part: Part | None = None,
    ) -> None:
        find, c, these = self._find(address), self._maybe(when), self._all(values)
        if part is None:
            self._effect(lambda m, r: m.store(find(r), [r[p] for p in these], dtype, r[c]))
            return
        a, b = self._all(part)
        self._effect(
            lambda m, r: m.store(find(r), [r[p] for p in these], dtype, r[c], (r[a], r[b]))
        )

    def atomic(
        self,
        address: Address,
        combine: str,
        value: Any,
        dtype: DType,
        when: Any = None,
        want_old: bool = False,
    ) -> Register | None:
        find, c, x = self._find(address), self._maybe(when), self._in(value)
        outs = self._record(
            1, lambda m, r: [m.atomic(find(r), combine, r[x], dtype, r[c], want_old)]
        )
        return outs[0] if want_old else None

    def alloc_local(self, size: int, align: int) -> Register:
        self._allocations += 1
        number = self._allocations
        return self._record(1, lambda m, r: [m.alloc_numbered(number, size, align)])[0]

    def address(self, address: Address) -> Register:
        find = self._find(address)
        return self._record(1, lambda m, r: [m.address(find(r))])[0]

    def issue(
        self, instruction: Instruction, inputs: Sequence[Any] = (), when: Any = None
    ) -> list[Any]:
        these, c = self._all(inputs), self._maybe(when)
        return self._record(
            len(instruction.outputs),
            lambda m, r: m.issue(instruction, [r[p] for p in these], r[c]),
        )

    # --- control flow ----------------------------------------------------------------------------

    def branch(
        self,
        condition: Any,
        then: Callable[[], None],
        orelse: Callable[[], None] | None,
        state: State,
    ) -> None:
        c, before = self._in(condition), _flat(state)
        then_steps, then_after = self._body(then, state)
        _unflatten(state, before)
        else_steps, else_after = self._body(orelse or _nothing, state)
        begin, on_true, on_false = (self._all(v) for v in (before, then_after, else_after))

        def run(m: LaneMachine, r: Registers) -> list[Array]:
            flat: State = {0: [r[p] for p in begin]}

            def take(steps: list[Step], after: list[int]) -> None:
                _replay(steps, m, r)
                flat[0][:] = [r[p] for p in after]

            m.branch(
                r[c],
                functools.partial(take, then_steps, on_true),
                functools.partial(take, else_steps, on_false),
                flat,
            )
            return flat[0]

        _unflatten(state, self._record(len(before), run))

    def loop(
        self,
        start: Any,
        stop: Any,
        step: int,
        dtype: DType,
        body: Callable[[Any], None],
        state: State,
    ) -> None:
        first, last, index = self._in(start), self._in(stop), self.new()
        begin, inside = self._enter(state)
        steps, after = self._body(lambda: body(index), state)
        end = self._all(after)

        def run(m: LaneMachine, r: Registers) -> list[Array]:
            flat: State = {0: [r[p] for p in begin]}

            def once(i: Array) -> None:
                r[index.place] = i
                r[inside] = flat[0]
                _replay(steps, m, r)
                flat[0][:] = [r[p] for p in end]

            m.loop(r[first], r[last], step, dtype, once, flat)
            return flat[0]

        _unflatten(state, self._record(len(begin), run))

    def loop_while(self, test: Callable[[], Any], body: Callable[[], None], state: State) -> None:
        begin, inside = self._enter(state)
        found: list[Any] = []
        test_steps, tested = self._body(lambda: found.append(test()), state)
        condition, middle = self._in(found[0]), self._all(tested)
        body_steps, after = self._body(body, state)
        end = self._all(after)

        def run(m: LaneMachine, r: Registers) -> list[Array]:
            flat: State = {0: [r[p] for p in begin]}

            def check() -> Array:
                r[inside] = flat[0]
                _replay(test_steps, m, r)
                flat[0][:] = [r[p] for p in middle]
                return r[condition]  # type: ignore[no-any-return]

            def once() -> None:
                _replay(body_steps, m, r)
                flat[0][:] = [r[p] for p in end]

            m.loop_while(check, once, flat)
            return flat[0]

        _unflatten(state, self._record(len(begin), run))

    def _enter(self, state: State) -> tuple[list[int], slice]:
        """Give the state new registers, as a loop's body finds it each round."""
        begin = self._all(_flat(state))
        fresh = [self.new() for _ in begin]
        _unflatten(state, fresh)
        place = fresh[0].place if fresh else 0
        return begin, slice(place, place + len(fresh))

    def _body(self, run: Callable[[], Any], state: State) -> tuple[list[Step], list[Any]]:
        """The steps that `run` records, and the state after them."""
        outer, self.steps = self.steps, []
        try:
            run()
            return self.steps, _flat(state)
        finally:
            self.steps = outer


def _flat(state: State) -> list[Any]:
    return [value for values in state.values() for value in values]


def _unflatten(state: State, flat: Sequence[Any]) -> None:
    assert len(flat) == sum(map(len, state.values())), "a body added to the state"
    each = iter(flat)
    for values in state.values():
        values[:] = [next(each) for _ in values]


def _nothing() -> None:
    """The other side of a branch that has none."""
