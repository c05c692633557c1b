"""Atomics of the LLVM machine: one instruction where there is one, else compare and swap.

Knows which combination of operation and dtype the target has. Does not know what it is used for.
"""

from __future__ import annotations

from collections.abc import Callable

from tilejit.dtypes import DType, float32
from tilejit.isa import memory
from tilejit.isa.machine import Address
from tilejit.lower.llvm_memory import LLVMMemory
from tilejit.lower.llvm_values import I1, I8, I32, Value, constant_int, integer_type, llvm_type


class LLVMAtomics(LLVMMemory):
    """`atomic` of the machine."""

    def atomic(
        self,
        address: Address,
        combine: str,
        value: Value,
        dtype: DType,
        when: Value | None = None,
        want_old: bool = False,
    ) -> Value | None:
        known = None if when is None else constant_int(when)
        kind = llvm_type(dtype)
        if known == 0:
            return self.zero(kind) if want_old else None
        if known is not None:
            when = None
        value = self.value(value)
        if address.space == "local":
            return self._atomic_local(address, combine, value, dtype, when, want_old)
        suffix = memory.atomic_type(combine, dtype, self.target)
        if suffix is None:
            return self._atomic_loop(address, combine, value, dtype, when, want_old)
        base, constant = self._place(address)
        text = memory.atomic(
            address.space,
            combine,
            suffix,
            constant,
            old=want_old,
            predicated=when is not None,
        )
        has_output = want_old or combine == "exch"
        register = value
        if suffix.startswith("b") and kind != integer_type(dtype.bits):
            register = self._to_integer(value)
        outputs = self.assemble(
            text,
            [register.type] if has_output else [],
            [base, register] if when is None else [base, register, when],
            has_effect=True,
            early=when is not None,
        )
        return self._from_integer(outputs[0], kind) if want_old else None

    def _combine(self, combine: str, old: Value, value: Value, dtype: DType) -> Value:
        """What an atomic leaves behind: `old` combined with `value`."""
        if combine == "exch":
            return value
        if dtype.is_bool and combine in ("add", "min", "max"):
            return self.binary("and" if combine == "min" else "or", old, value, dtype)
        if dtype.is_float and dtype.bits < 32:
            left, right = self.cast([old, value], dtype, float32)
            combined = self.binary(combine, left, right, float32)
            return self.value(self.cast([combined], float32, dtype)[0])
        return self.binary(combine, old, value, dtype)

    def _atomic_local(
        self,
        address: Address,
        combine: str,
        value: Value,
        dtype: DType,
        when: Value | None,
        want_old: bool,
    ) -> Value | None:
        old = self._load_local(address, dtype, 0, when)
        self._store_local(address, self._combine(combine, old, value, dtype), dtype, 0, when)
        return old if want_old else None

    def _atomic_loop(
        self,
        address: Address,
        combine: str,
        value: Value,
        dtype: DType,
        when: Value | None,
        want_old: bool,
    ) -> Value | None:
        """Compare and swap until nobody came between (no instruction combines so)."""
        kind = llvm_type(dtype)
        state: dict[object, list[Value]] = {"old": [self.zero(kind)]}

        def exchange() -> None:
            place = self.address(address)
            if dtype.bits == 8:
                state["old"][0] = self._swap_byte(address.space, place, combine, value, dtype)
            else:
                swapped = self._swap(address.space, place, combine, value, dtype)
                state["old"][0] = swapped

        if when is None:
            exchange()
        else:
            self.branch(when, exchange, None, state)
        return state["old"][0] if want_old else None

    def _swap(self, space: str, place: Value, combine: str, value: Value, dtype: DType) -> Value:
        kind = llvm_type(dtype)

        def replace(bits: Value) -> Value:
            old = self._from_integer(bits, kind)
            return self._to_integer(self._combine(combine, old, value, dtype))

        bits = self._swap_until_done(space, place, integer_type(dtype.bits), replace)
        return self._from_integer(bits, kind)

    def _swap_byte(
        self, space: str, place: Value, combine: str, value: Value, dtype: DType
    ) -> Value:
        """The same on a byte of the aligned word around it."""
        b = self.builder
        low = place if place.type == I32 else b.trunc(place, I32)
        shift = b.shl(b.and_(low, I32(3)), I32(3))
        word_place = b.and_(place, place.type(-4))
        keep = b.xor(b.shl(I32(0xFF), shift), I32(-1))
        kind = llvm_type(dtype)

        def replace(word: Value) -> Value:
            old = self._from_integer(b.trunc(b.lshr(word, shift), I8), kind)
            new = self._to_integer(self._combine(combine, old, value, dtype))
            return b.or_(b.and_(word, keep), b.shl(b.zext(new, I32), shift))

        word = self._swap_until_done(space, word_place, I32, replace)
        return self._from_integer(b.trunc(b.lshr(word, shift), I8), kind)

    def _swap_until_done(
        self, space: str, place: Value, kind: Value, replace: Callable[[Value], Value]
    ) -> Value:
        text = memory.load(space, kind.width, 1, 0, readonly=False, predicated=False)
        first = self.assemble(text, (kind,), (place,), has_effect=True)[0]
        state: dict[object, list[Value]] = {"expected": [first], "again": [I1(1)]}

        def attempt() -> None:
            expected = state["expected"][0]
            inputs = (place, expected, replace(expected))
            swap = memory.compare_and_swap(space, kind.width)
            seen = self.assemble(swap, (kind,), inputs, has_effect=True)[0]
            state["expected"][0] = seen
            state["again"][0] = self.builder.icmp_unsigned("!=", seen, expected)

        self.loop_while(lambda: state["again"][0], attempt, state)
        return state["expected"][0]
