"""Memory of the LLVM machine: loads, stores, local arrays, addresses.

Knows address spaces, alignment and access widths. Does not know tiles.

Global and shared memory are reached through inline PTX only, never through LLVM's own loads and
stores: libNVVM has lost stores where views of different element types overlap, a predicated access
stays straight-line code, and constant offsets land in the instruction. Loads of read-only global
memory have no side effect, so they may be moved, merged and dropped; all other accesses keep
their order, and ptxas schedules them. Local memory is LLVM's, one scalar at a time, so that an
array that is indexed by constants still becomes registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tilejit.dtypes import DType
from tilejit.isa import memory
from tilejit.isa.machine import Address, Part
from tilejit.lower.llvm_control import LLVMControl
from tilejit.lower.llvm_values import (
    BYTE_POINTER,
    F32,
    F64,
    I1,
    I8,
    I16,
    I32,
    I64,
    Value,
    allocate,
    constant_int,
    llvm_type,
)

_WIDEST_BYTES = 16


def _accesses(size: int, count: int, align: int) -> Iterator[tuple[int, int]]:
    """(first element, elements) of each access: the widest that size and alignment allow."""
    align = max(align, size)
    position = 0
    while position < count:
        reach = min(_WIDEST_BYTES, align)
        offset = position * size
        if offset:
            reach = min(reach, offset & -offset)
        elements = max(1, min(reach // size, 1 << ((count - position).bit_length() - 1)))
        yield position, elements
        position += elements


class LLVMMemory(LLVMControl):
    """`load`, `store`, `alloc_local` and `address` of the machine."""

    # -- addresses ---------------------------------------------------------------------------

    def _place(self, address: Address) -> tuple[Value, int]:
        """The register part and the constant part of an address."""
        offset, constant = address.offset, address.constant
        while offset is not None:  # (x + 16) + 32
            split = self.sums.get(id(offset))
            if split is None:
                break
            offset, constant = split[1], constant + split[2]
        if offset is not None and (known := constant_int(offset)) is not None:
            offset, constant = None, constant + known
        if address.space == "shared":
            base = self.shared_base()
            if offset is None:
                return base, constant
            if offset.type == I64:
                offset = self.builder.trunc(offset, I32)
            return self.builder.add(offset, base), constant
        base = address.base
        assert base is not None, f"an address in {address.space} memory has a base"
        if base.type != I64:
            base = self.builder.ptrtoint(base, I64)
        if offset is not None:
            if offset.type == I32:
                offset = self.builder.sext(offset, I64)
            base = self.builder.add(base, offset)
        if not -(1 << 31) <= constant < (1 << 31):
            base, constant = self.builder.add(base, I64(constant)), 0
        return base, constant

    def address(self, address: Address) -> Value:
        base, constant = self._place(address)
        if not constant:
            return base
        if address.space == "shared":
            return self.builder.add(base, self.word(constant))
        return self.builder.add(base, I64(constant))

    def alloc_local(self, size: int, align: int) -> Value:
        return allocate(self.builder, size, align)

    # -- loads -------------------------------------------------------------------------------

    def load(
        self,
        address: Address,
        dtype: DType,
        count: int = 1,
        when: Value | None = None,
        part: Part | None = None,
    ) -> list[Value]:
        known = None if when is None else constant_int(when)
        if known == 0:
            return [self.zero(llvm_type(dtype))] * count
        if known is not None:
            when = None
        if address.space == "local":
            return [self._load_local(address, dtype, i, when) for i in range(count)]
        base, constant = self._place(address)
        result: list[Value] = []
        for first, elements in _accesses(dtype.bytes, count, address.align):
            offset = constant + first * dtype.bytes
            mine, whole = self._own_part(part, first, elements, when)
            result += self._load_access(address, base, offset, dtype, elements, whole, mine, first)
        return result

    def _own_part(
        self, part: Part | None, first: int, elements: int, when: Value | None
    ) -> tuple[Part | None, Value | None]:
        """The part of an access that begins with an element of the vector, and its condition; one
        element is there or not."""
        if part is None or elements > 1:
            return part, when
        begin, end = part
        is_there = self.builder.and_(
            self.builder.icmp_signed("<=", begin, I32(first)),
            self.builder.icmp_signed(">", end, I32(first)),
        )
        return None, is_there if when is None else self.builder.and_(is_there, when)

    def _load_access(
        self,
        address: Address,
        base: Value,
        constant: int,
        dtype: DType,
        elements: int,
        when: Value | None,
        part: Part | None,
        skipped: int,
    ) -> list[Value]:
        total = elements * dtype.bytes
        bits, kind = self._register(dtype, total)
        registers = total * 8 // bits
        how = {"readonly": address.readonly, "predicated": when is not None}
        if part is None:
            text = memory.load(address.space, bits, registers, constant, **how)
        else:
            text = memory.load_part(
                address.space, bits, registers, dtype.bytes, constant, skipped, **how
            )
        loaded = self.assemble(
            text,
            [kind] * registers,
            [base, *(part or ()), *(() if when is None else (when,))],
            has_effect=not (address.readonly and address.space == "global"),
            early=when is not None or part is not None,
        )
        if dtype.bytes >= 4:
            return [self._from_integer(v, llvm_type(dtype)) for v in loaded]
        if total >= 4:
            return [v for word in loaded for v in self.unpack(word, dtype)]
        if total == 2 and dtype.bytes == 1:
            word = self.builder.zext(loaded[0], I32)
            return self.unpack(word, dtype)[:2]
        narrow = loaded[0]
        if dtype.bytes == 1:
            narrow = self.builder.trunc(narrow, I8)
        return [self._from_integer(narrow, llvm_type(dtype))]

    def _register(self, dtype: DType, total: int) -> tuple[int, Value]:
        """Bits moved per register and the register's type, for an access of `total` bytes."""
        if dtype.bytes == 8:
            return 64, F64 if llvm_type(dtype) == F64 else I64
        if total >= 4:
            return 32, F32 if llvm_type(dtype) == F32 else I32
        return total * 8, I16 if total == 2 else I32

    # -- stores ------------------------------------------------------------------------------

    def store(
        self,
        address: Address,
        values: Sequence[Value],
        dtype: DType,
        when: Value | None = None,
        part: Part | None = None,
    ) -> None:
        known = None if when is None else constant_int(when)
        if known == 0:
            return
        if known is not None:
            when = None
        if address.space == "local":
            for index, value in enumerate(values):
                self._store_local(address, self.value(value), dtype, index, when)
            return
        base, constant = self._place(address)
        for first, elements in _accesses(dtype.bytes, len(values), address.align):
            mine, whole = self._own_part(part, first, elements, when)
            self._store_access(
                address.space,
                base,
                constant + first * dtype.bytes,
                values[first : first + elements],
                dtype,
                whole,
                mine,
                first,
            )

    def _store_access(
        self,
        space: str,
        base: Value,
        constant: int,
        values: Sequence[Value],
        dtype: DType,
        when: Value | None,
        part: Part | None,
        skipped: int,
    ) -> None:
        total = len(values) * dtype.bytes
        bits, _ = self._register(dtype, total)
        registers = self._pack_registers(values, dtype, total)
        count, is_predicated = len(registers), when is not None
        if part is None:
            text = memory.store(space, bits, count, constant, predicated=is_predicated)
        else:
            text = memory.store_part(
                space, bits, count, dtype.bytes, constant, skipped, predicated=is_predicated
            )
        inputs = [base, *registers, *(part or ()), *(() if when is None else (when,))]
        self.assemble(text, (), inputs, has_effect=True)

    def _pack_registers(self, values: Sequence[Value], dtype: DType, total: int) -> list[Value]:
        if dtype.bytes >= 4:
            return self.values(values)
        each = 4 // dtype.bytes
        if total >= 4:
            return [self.pack(values[i : i + each], dtype) for i in range(0, len(values), each)]
        bits = [self._to_integer(self.value(v)) for v in values]
        if total == 1:
            return [self.builder.zext(bits[0], I32)]
        if len(bits) == 1:
            return bits
        low, high = (self.builder.zext(v, I16) for v in bits)
        return [self.builder.or_(low, self.builder.shl(high, I16(8)))]

    # -- local memory ------------------------------------------------------------------------

    def _local_pointer(
        self, address: Address, dtype: DType, index: int, when: Value | None
    ) -> Value:
        offset = address.offset
        constant = I64(address.constant + index * dtype.bytes)
        if offset is None:
            offset = constant
        else:
            if offset.type == I32:
                offset = self.builder.sext(offset, I64)
            offset = self.builder.add(offset, constant)
        if when is not None:  # a place that exists, whatever the index
            offset = self.builder.select(when, offset, I64(0))
        base = address.base
        assert base is not None, "an address in local memory has a base"
        if base.type == I64:
            base = self.builder.inttoptr(base, BYTE_POINTER)
        place = self.builder.gep(base, [offset])
        kind = llvm_type(dtype)
        stored = I8 if kind == I1 else kind
        return self.builder.bitcast(place, stored.as_pointer())

    def _load_local(self, address: Address, dtype: DType, index: int, when: Value | None) -> Value:
        pointer = self._local_pointer(address, dtype, index, when)
        kind = llvm_type(dtype)
        value = self.builder.load(pointer, align=dtype.bytes)
        if kind == I1:
            value = self._from_integer(value, kind)
        return value if when is None else self.builder.select(when, value, self.zero(kind))

    def _store_local(
        self,
        address: Address,
        value: Value,
        dtype: DType,
        index: int,
        when: Value | None,
    ) -> None:
        pointer = self._local_pointer(address, dtype, index, when)
        if value.type == I1:
            value = self._to_integer(value)
        if when is not None:
            old = self.builder.load(pointer, align=dtype.bytes)
            value = self.builder.select(when, value, old)
        self.builder.store(value, pointer, align=dtype.bytes)
