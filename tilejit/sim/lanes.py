"""The lane machine: executes an emitter's code at once for all threads of a group.

Knows the meaning of every machine operation on arrays with one element a lane. Does not know
tile ops, nor where the emitters' code comes from.

A value is an array of its dtype, (lanes,) or, when all lanes have the same, (1,). Lanes that are
switched off compute too; their results are never used and their effects never happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from tilejit.dtypes import DType, bool_
from tilejit.errors import SimulationError, Span
from tilejit.isa.instruction import Instruction
from tilejit.isa.machine import Address, Part, State
from tilejit.ops.scalar import bitcast_array, cast_array, evaluate_op
from tilejit.sim.block import Block
from tilejit.sim.fma import fused_multiply_add
from tilejit.sim.lane_async import AsyncEffects
from tilejit.sim.memory import SHARED_BASE, raw_dtype

Array = np.ndarray[Any, Any]

_MAX_ROUNDS = 1 << 20  # of one loop: beyond is a loop that never ends
_ROUNDS_A_TURN = 64  # of a while loop, which may be waiting for another group

_SAME_FOR_ALL = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_INTEGER = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum,
}  # fmt: skip
_BY_CONSTANT = {
    "floordiv": np.floor_divide, "floormod": np.remainder,
    "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip


class LaneMachine(AsyncEffects):
    """`isa.machine.Machine` and `isa.machine.LaneContext` for group `group` of a block."""

    checks_indexes = True

    def __init__(self, block: Block, group: int) -> None:
        super().__init__(block, group)
        self._allocations = 0
        self._site: object = None

    def run(
        self,
        emit: Callable[[LaneMachine, list[Any]], list[Any]],
        inputs: list[Any],
        span: Span | None = None,
        site: object = None,
    ) -> list[Any]:
        """Execute an emitter's code, or its recording, for all lanes.

        span: where errors point. site: tells this call in the kernel from others; calls from one
        site share their local memory.
        """
        self._site, self._allocations = site, 0
        self.begin(span)
        with np.errstate(all="ignore"):
            return emit(self, inputs)

    # --- values ----------------------------------------------------------------------------------

    def const(self, value: bool | int | float, dtype: DType) -> Array:
        return make_constant(value, dtype)

    def thread_index(self) -> Array:
        return self.thread

    def binary(self, op: str, a: Array, b: Array, dtype: DType) -> Array:
        assert a.dtype == b.dtype == dtype.numpy, f"{op}: {a.dtype}, {b.dtype} for {dtype}"
        if dtype.is_integer:
            quick = _SAME_FOR_ALL.get(op) or _INTEGER.get(op)
            if quick is not None:
                return quick(a, b)
            if len(b) == 1 and op in _BY_CONSTANT and 0 < b[0] < 32:
                return _BY_CONSTANT[op](a, b)
        elif dtype.bits >= 32 and op in _SAME_FOR_ALL:
            return _SAME_FOR_ALL[op](a, b)
        return evaluate_op(op, (a, b), dtype)

    def quotient(self, a: Array, b: Array, dtype: DType) -> Array:
        return self.binary("floordiv", a, b, dtype)

    def unary(self, op: str, a: Array, dtype: DType) -> Array:
        assert a.dtype == dtype.numpy, f"{op}: {a.dtype} for {dtype}"
        return evaluate_op(op, (a,), dtype)

    def fma(self, a: Array, b: Array, c: Array, dtype: DType) -> Array:
        assert a.dtype == b.dtype == c.dtype == dtype.numpy, f"fma of {dtype}"
        return fused_multiply_add(a, b, c)

    def cast(self, values: Sequence[Array], source: DType, target: DType) -> list[Array]:
        if source is target:
            return list(values)
        if len(values) <= 2:
            return [cast_array(value, source, target) for value in values]
        table = np.empty((len(values), max(len(v) for v in values)), source.numpy)
        for row, value in zip(table, values, strict=True):
            row[...] = value
        return list(cast_array(table, source, target))

    def bitcast(self, a: Array, source: DType, target: DType) -> Array:
        return bitcast_array(a, source, target)

    def select(self, condition: Array, a: Array, b: Array) -> Array:
        assert a.dtype == b.dtype, f"select of {a.dtype} and {b.dtype}"
        if len(condition) == 1:
            return a if condition[0] else b
        return np.where(condition, a, b)

    def pack(self, values: Sequence[Array], dtype: DType) -> Array:
        assert len(values) * dtype.bits == 32, f"pack of {len(values)} {dtype}"
        return _columns(values, dtype, max(len(v) for v in values)).view(np.uint32)[:, 0]

    def unpack(self, word: Array, dtype: DType) -> list[Array]:
        assert word.dtype == np.uint32, f"unpack of {word.dtype}"
        return _rows(np.ascontiguousarray(word), dtype, 32 // dtype.bits)

    # --- memory ----------------------------------------------------------------------------------

    def load(
        self,
        address: Address,
        dtype: DType,
        count: int = 1,
        when: Array | None = None,
        part: Part | None = None,
    ) -> list[Array]:
        if part is not None:
            whole, each = _parted(part, count, when)
            together = self.load(address, dtype, count, whole)
            alone = [self.load(at, dtype, 1, own)[0] for at, own in _elements(address, dtype, each)]
            return [self.select(whole, a, b) for a, b in zip(together, alone, strict=True)]
        width = count * dtype.bytes
        mask = self.mask_with(when)
        if mask is not None and not mask.any():
            return [np.zeros(1, dtype.numpy)] * count
        place = self._locate(address, width, mask)
        raw = self.read_raw(address.space, place, width, mask, address.readonly)
        return _rows(raw, dtype, count)

    def store(
        self,
        address: Address,
        values: Sequence[Array],
        dtype: DType,
        when: Array | None = None,
        part: Part | None = None,
    ) -> None:
        if part is not None:
            whole, each = _parted(part, len(values), when)
            self.store(address, values, dtype, whole)
            for value, (at, own) in zip(values, _elements(address, dtype, each), strict=True):
                self.store(at, [value], dtype, own)
            return
        mask = self.mask_with(when)
        if mask is not None and not mask.any():
            return
        width = len(values) * dtype.bytes
        place = self.spread(self._locate(address, width, mask))
        raw = _columns(values, dtype, self.width).view(raw_dtype(width))[:, 0]
        self.write_raw(address.space, place, raw, mask)

    def atomic(
        self,
        address: Address,
        combine: str,
        value: Array,
        dtype: DType,
        when: Array | None = None,
        want_old: bool = False,
    ) -> Array | None:
        assert value.dtype == dtype.numpy, f"atomic {combine} of {value.dtype} for {dtype}"
        mask = self.mask_with(when)
        old = np.zeros(self.width, dtype.numpy)
        if mask is None or mask.any():
            place = self.spread(self._locate(address, dtype.bytes, mask))
            lanes = self.lanes_of(mask)
            self.check_atomic(address.space, place[lanes], dtype.bytes, lanes)
            self._combine(address.space, place, combine, self.spread(value), dtype, lanes, old)
        return old if want_old else None

    def _combine(
        self,
        space: str,
        place: Array,
        combine: str,
        value: Array,
        dtype: DType,
        lanes: Array,
        old: Array,
    ) -> None:
        """Round by round, each lane whose address no earlier lane of the round has."""
        memory = self.memory_of(space)
        while len(lanes):
            _, first = np.unique(place[lanes], return_index=True)
            now = lanes[first]
            before = memory.read(place[now], dtype.bytes).view(dtype.numpy)
            old[now] = before
            after = value[now]
            if combine != "exch":
                after = evaluate_op(combine, (before, after), dtype)
            memory.write(place[now], np.ascontiguousarray(after).view(raw_dtype(dtype.bytes)))
            lanes = np.delete(lanes, first)

    def check_index(
        self,
        index: Sequence[Array],
        extents: Sequence[int],
        name: str,
        when: Array | None = None,
    ) -> None:
        mask = self.mask_with(when)
        wrong: Any = False
        for i, extent in zip(index, extents, strict=True):
            wrong = wrong | (i < 0) | (i >= extent)
        found = np.flatnonzero(wrong if mask is None else wrong & mask)
        if len(found):
            numbers = ", ".join(str(int(i[found[0] if len(i) > 1 else 0])) for i in index)
            shape = ", ".join(map(str, extents))
            raise SimulationError(
                f"`{name}[{numbers}]` is outside of `{name}`, whose shape is ({shape})."
            )

    def alloc_local(self, size: int, align: int) -> Array:
        self._allocations += 1
        return self.alloc_numbered(self._allocations, size, align)

    def alloc_numbered(self, number: int, size: int, align: int) -> Array:
        """The allocation of that number at the current site."""
        return self.local.allocate((self._site, number), size, align)

    def address(self, address: Address) -> Array:
        place = self._sum(address)
        return place.astype(np.uint32 if address.space == "shared" else np.uint64)

    def _sum(self, address: Address) -> Array:
        place = np.full(1, address.constant, np.int64)
        if address.space == "shared":
            assert address.base is None, "an address in shared memory has no base"
            place += SHARED_BASE
        else:
            assert address.base is not None, f"an address in {address.space} memory has a base"
            place = place + address.base.astype(np.int64)
        if address.offset is not None:
            place = place + address.offset.astype(np.int64)
        return place

    def _locate(self, address: Address, width: int, mask: Array | None) -> Array:
        """Byte addresses, (lanes,) or (1,); checks the alignment that the emitter claims."""
        place = self._sum(address)
        wrong = (place & (address.align - 1)) != 0
        if mask is not None:
            wrong = wrong & mask
        if wrong.any():
            raise SimulationError(
                f"An access of {width} bytes to {address.space} memory is taken to be aligned to "
                f"{address.align} bytes, but is not.",
                hint="Check the alignment that the tensor's declaration promises.",
            )
        return place

    # --- instructions ----------------------------------------------------------------------------

    def issue(
        self, instruction: Instruction, inputs: Sequence[Array] = (), when: Array | None = None
    ) -> list[Array]:
        assert len(inputs) == len(instruction.inputs), f"{instruction}: {len(inputs)} inputs"
        assert when is None or not instruction.outputs, f"{instruction} has outputs and `when`"
        given = [
            self.spread(_as_register(value, dtype, instruction))
            for value, dtype in zip(inputs, instruction.inputs, strict=True)
        ]
        mask = self.mask_with(when)
        if mask is not None and not instruction.outputs and not mask.any():
            return []
        self.active = self.everyone if mask is None else mask
        results = list(instruction.meaning(self, given))
        assert len(results) == len(instruction.outputs), f"{instruction}: {len(results)} outputs"
        for value, dtype in zip(results, instruction.outputs, strict=True):
            assert value.dtype == dtype.numpy, f"{instruction}: {value.dtype} for {dtype}"
        return results

    # --- control flow ----------------------------------------------------------------------------

    def branch(
        self,
        condition: Array,
        then: Callable[[], None],
        orelse: Callable[[], None] | None,
        state: State,
    ) -> None:
        outer = self.mask
        taken = condition if outer is None else condition & outer
        others = ~condition if outer is None else ~condition & outer
        if not others.any():
            then()
        elif not taken.any():
            if orelse is not None:
                orelse()
        else:
            before = _snapshot(state)
            self._masked(taken, then)
            after = _snapshot(state)
            _restore(state, before)
            if orelse is not None:
                self._masked(others, orelse)
            _blend(state, taken, after)

    def loop(
        self,
        start: Array,
        stop: Array,
        step: int,
        dtype: DType,
        body: Callable[[Array], None],
        state: State,
    ) -> None:
        assert start.dtype == stop.dtype == dtype.numpy, f"loop over {start.dtype}, {stop.dtype}"
        if len(start) == 1 and len(stop) == 1:
            for i in range(int(start[0]), int(stop[0]), step):
                body(np.array([i], dtype.numpy))
            return
        index, end = self.spread(start).astype(np.int64), stop.astype(np.int64)
        while True:
            inside = index < end if step > 0 else index > end
            if not self._round(inside, partial(body, index.astype(dtype.numpy)), state):
                return
            index = index + step

    def loop_while(self, test: Callable[[], Array], body: Callable[[], None], state: State) -> None:
        going: Array = self.everyone if self.mask is None else self.mask
        for rounds in range(_MAX_ROUNDS):
            found: list[Array] = []
            self._round(going, lambda found=found: found.append(test()), state)  # type: ignore[misc]
            going = going & found[0]
            if not self._round(going, body, state):
                return
            if rounds % _ROUNDS_A_TURN == _ROUNDS_A_TURN - 1:
                self.give_way()
        raise SimulationError(
            f"A while loop has not ended after {_MAX_ROUNDS} rounds.",
            hint="Check its condition.",
        )

    def _round(self, inside: Array, body: Callable[[], None], state: State) -> bool:
        """Run `body` for the lanes that are `inside`; False when there are none."""
        mask = inside if self.mask is None else inside & self.mask
        if not mask.any():
            return False
        if mask.all() or (self.mask is not None and (mask == self.mask).all()):
            body()
            return True
        before = _snapshot(state)
        self._masked(mask, body)
        after = _snapshot(state)
        _restore(state, before)
        _blend(state, mask, after)
        return True

    def _masked(self, mask: Array, body: Callable[[], None]) -> None:
        outer, self.mask = self.mask, mask
        try:
            body()
        finally:
            self.mask = outer


def _as_register(value: Array, dtype: DType, instruction: Instruction) -> Array:
    """The value as an instruction's register has it: integers there have no sign."""
    if value.dtype == dtype.numpy:
        return value
    assert value.dtype.kind in "iu", f"{instruction}: {value.dtype} for {dtype}"
    assert dtype.is_integer, f"{instruction}: {value.dtype} for {dtype}"
    assert value.dtype.itemsize == dtype.bytes, f"{instruction}: {value.dtype} for {dtype}"
    return value.view(dtype.numpy)


def make_constant(value: bool | int | float, dtype: DType) -> Array:
    """The value for all lanes; integers wrap."""
    if dtype.is_integer:
        value = int(value) & ((1 << dtype.bits) - 1)
        if dtype.is_signed and value >> (dtype.bits - 1):
            value -= 1 << dtype.bits
    return np.array([value], dtype.numpy)


def _parted(part: Part, count: int, when: Array | None) -> tuple[Array, list[Array]]:
    """Which lanes access all of `count` elements, and for each element which others do."""
    begin, end = part
    is_asked = np.ones(1, bool) if when is None else when
    whole = is_asked & (begin <= 0) & (end >= count)
    return whole, [is_asked & ~whole & (begin <= k) & (k < end) for k in range(count)]


def _elements(
    address: Address, dtype: DType, each: Sequence[Array]
) -> Iterator[tuple[Address, Array]]:
    """The address of each of consecutive elements, and which lanes access it."""
    for k, own in enumerate(each):
        constant = address.constant + k * dtype.bytes
        yield replace(address, constant=constant, align=min(address.align, dtype.bytes)), own


def _columns(values: Sequence[Array], dtype: DType, length: int) -> Array:
    """(length, values), one column a value."""
    table = np.empty((length, len(values)), dtype.numpy)
    for column, value in enumerate(values):
        assert value.dtype == dtype.numpy, f"{value.dtype} for {dtype}"
        table[:, column] = value
    return table


def _rows(raw: Array, dtype: DType, count: int) -> list[Array]:
    """The inverse of `_columns`, from contiguous elements of any dtype that hold a row each."""
    if dtype is bool_:
        return list((raw.view(np.uint8).reshape(-1, count) != 0).T)
    if count == 1:
        return [raw.view(dtype.numpy)]
    return list(raw.view(dtype.numpy).reshape(-1, count).T)


def _snapshot(state: State) -> dict[Any, list[Any]]:
    return {key: list(values) for key, values in state.items()}


def _restore(state: State, saved: dict[Any, list[Any]]) -> None:
    for key, values in saved.items():
        state[key][:] = values


def _blend(state: State, mask: Array, after: dict[Any, list[Any]]) -> None:
    """Where `mask` holds, `state` becomes `after`."""
    for key, values in after.items():
        current = state[key]
        for place, value in enumerate(values):
            if value is not current[place]:
                current[place] = np.where(mask, value, current[place])
