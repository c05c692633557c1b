"""How a piece of a thread's state passes through the generated Python code.

Knows registers, packing and slots. Does not know which nodes use the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilejit.dtypes import DType, bool_, uint8, uint32
from tilejit.isa.machine import Machine, Slot, Value


@dataclass(frozen=True)
class Held:
    """How a piece of per-thread state passes between calls.

    count: registers; slot: the type of the Python variable.
    """

    dtype: DType
    count: int
    slot: Slot

    def pack(self, machine: Machine, values: Sequence[Value]) -> Any:
        if self.slot.count is None:
            return values[0]
        if self.slot.dtype is self.dtype:
            return list(values)
        dtype, values = self._storage(machine, values)
        per = 32 // dtype.bits
        padded = [*values, *[machine.const(0, dtype)] * (-len(values) % per)]
        return [machine.pack(padded[i : i + per], dtype) for i in range(0, len(padded), per)]

    def unpack(self, machine: Machine, held: Any) -> list[Value]:
        if self.slot.count is None:
            return [held]
        if self.slot.dtype is self.dtype:
            return list(held)
        dtype = uint8 if self.dtype.is_bool else self.dtype
        values = [v for word in held for v in machine.unpack(word, dtype)][: self.count]
        return machine.cast(values, uint8, bool_) if self.dtype.is_bool else values

    def _storage(self, machine: Machine, values: Sequence[Value]) -> tuple[DType, Sequence[Value]]:
        if self.dtype.is_bool:
            return uint8, machine.cast(values, bool_, uint8)
        return self.dtype, values


def held_as(dtype: DType, count: int, is_scalar: bool) -> Held:
    if is_scalar:
        return Held(dtype, 1, Slot(dtype))
    if dtype.bits >= 32 and dtype.name != "tfloat32":
        return Held(dtype, count, Slot(dtype, count))
    if dtype.bits == 32:
        return Held(dtype, count, Slot(uint32, count))
    per = 4 if dtype.is_bool else 32 // dtype.bits
    return Held(dtype, count, Slot(uint32, -(-count // per)))
