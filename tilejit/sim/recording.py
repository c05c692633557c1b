"""Records an emitter's machine operations once, to replay them for every call.

Knows the operations of `isa.machine.Machine`. Does not know what they compute: the lane machine
does that. Emitters spend most of their time on deciding what to emit, and a granule is called for
every block and every round of a loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tilejit.dtypes import DType
from tilejit.isa.instruction import Instruction
from tilejit.isa.machine import Address, Granule, State
from tilejit.sim.lanes import LaneMachine

Array = np.ndarray[Any, Any]
Step = Callable[[LaneMachine, list[Any]], None]


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


def _replay(steps: list[Step], machine: LaneMachine, registers: list[Any]) -> None:
    for step in steps:
        step(machine, registers)


class Recorder:
    """`isa.machine.Machine` whose values are registers. An array given as a value is a constant."""

    def __init__(self) -> None:
        self.registers: list[Any] = []
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
        return value if isinstance(value, Register) else self.new(value)

    def _in(self, value: Any) -> int:
        place = self.known(value).place
        assert isinstance(place, int), f"{value!r} is no value of a machine"
        return place

    def _when(self, value: Any) -> int | None:
        return None if value is None else self._in(value)

    def _one(self, method: Callable[..., Any], *values: Any, **fixed: Any) -> Register:
        """Record `method(machine, *values, **fixed)`, which gives one value."""
        places, out = [self._in(value) for value in values], self.new()
        into = out.place

        def step(machine: LaneMachine, registers: list[Any]) -> None:
            registers[into] = method(machine, *[registers[p] for p in places], **fixed)

        self.steps.append(step)
        return out

    def _several(
        self, method: Callable[..., Any], values: Sequence[Any], count: int, **fixed: Any
    ) -> list[Register]:
        """Record `method(machine, values, **fixed)`, which gives `count` values."""
        places, outs = [self._in(value) for value in values], [self.new() for _ in range(count)]
        first = outs[0].place if outs else 0

        def step(machine: LaneMachine, registers: list[Any]) -> None:
            registers[first : first + count] = method(
                machine, [registers[p] for p in places], **fixed
            )

        self.steps.append(step)
        return outs

    # --- values ----------------------------------------------------------------------------------

    def const(self, value: bool | int | float, dtype: DType) -> Register:
        return self.new(LaneMachine.constant(value, dtype))

    def thread_index(self) -> Register:
        return self._one(LaneMachine.thread_index)

    def binary(self, op: str, a: Any, b: Any, dtype: DType) -> Register:
        place_a, place_b, out = self._in(a), self._in(b), self.new()
        into = out.place

        def step(machine: LaneMachine, registers: list[Any]) -> None:
            registers[into] = machine.binary(op, registers[place_a], registers[place_b], dtype)

        self.steps.append(step)
        return out

    def unary(self, op: str, a: Any, dtype: DType) -> Register:
        return self._one(lambda machine, x: machine.unary(op, x, dtype), a)

    def fma(self, a: Any, b: Any, c: Any, dtype: DType) -> Register:
        return self._one(LaneMachine.fma, a, b, c, dtype=dtype)

    def cast(self, values: Sequence[Any], source: DType, target: DType) -> list[Any]:
        if source is target:
            return list(values)
        return self._several(LaneMachine.cast, values, len(values), source=source, target=target)

    def bitcast(self, a: Any, source: DType, target: DType) -> Register:
        return self._one(LaneMachine.bitcast, a, source=source, target=target)

    def select(self, condition: Any, a: Any, b: Any) -> Register:
        return self._one(LaneMachine.select, condition, a, b)

    def pack(self, values: Sequence[Any], dtype: DType) -> Register:
        return self._one(lambda machine, *them: machine.pack(them, dtype), *values)

    def unpack(self, word: Any, dtype: DType) -> list[Any]:
        return self._several(
            lambda machine, words: machine.unpack(words[0], dtype), [word], 32 // dtype.bits
        )

    # --- memory ----------------------------------------------------------------------------------

    def _address(self, address: Address) -> Callable[[list[Any]], Address]:
        base, offset = self._when(address.base), self._when(address.offset)
        fixed = (address.constant, address.align, address.readonly)

        def find(registers: list[Any]) -> Address:
            return Address(
                address.space,
                None if base is None else registers[base],
                None if offset is None else registers[offset],
                *fixed,
            )

        return find

    def load(
        self, address: Address, dtype: DType, count: int = 1, when: Any = None
    ) -> list[Any]:
        find, condition = self._address(address), self._when(when)

        def method(machine: LaneMachine, _: list[Any], registers: list[Any]) -> list[Array]:
            return machine.load(find(registers), dtype, count, _get(registers, condition))

        return self._with_registers(method, count)

    def _with_registers(
        self, method: Callable[[LaneMachine, list[Any], list[Any]], list[Any]], count: int
    ) -> list[Any]:
        outs = [self.new() for _ in range(count)]
        first = outs[0].place if outs else 0

        def step(machine: LaneMachine, registers: list[Any]) -> None:
            registers[first : first + count] = method(machine, [], registers)

        self.steps.append(step)
        return outs

    def store(
        self, address: Address, values: Sequence[Any], dtype: DType, when: Any = None
    ) -> None:
        find, condition = self._address(address), self._when(when)
        places = [self._in(value) for value in values]

        def step(machine: LaneMachine, registers: list[Any]) -> None:
            given = [registers[p] for p in places]
            machine.store(find(registers), given, dtype, _get(registers, condition))

        self.steps.append(step)
