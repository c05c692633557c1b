"""Values of the LLVM machine: types, constants, packed words, inline assembly, external functions.

Knows llvmlite, and is the one module of `lower` that imports it. Does not know Numba, tile ops or
PTX spellings. Typed-pointer text is what llvmlite prints; both dialects of libNVVM read it.

Narrow elements that come out of a 32-bit word stay `Part`s of it until something needs them alone:
packing the parts of one word again gives that word, and costs nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import ir

from tilejit.dtypes import DType
from tilejit.target import Target

Value = Any

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
BYTE_POINTER = I8.as_pointer()

_TYPES = {
    "bool": I1, "int8": I8, "int16": I16, "int32": I32, "int64": I64,
    "uint8": I8, "uint16": I16, "uint32": I32, "uint64": I64,
    "float16": I16, "bfloat16": I16, "float32": F32, "float64": F64, "tfloat32": F32,
    "float8_e4m3fn": I8, "float8_e5m2": I8,
}  # fmt: skip
_INTEGER_TYPES = {1: I1, 8: I8, 16: I16, 32: I32, 64: I64}
_LETTERS = {"i1": "b", "i16": "h", "i32": "r", "i64": "l", "float": "f", "double": "d"}
_OPERAND = re.compile(r"\$([da])(\d+)|\$\{uid\}")

SHARED_SYMBOL = "tile_shared"
SHARED_ALIGN = 1024
LOOP_BLOCK = "tile_loop"  # the name of the first block of every loop that the machine makes


def llvm_type(dtype: DType) -> Any:
    """The type of a value: floats below 32 bits are integers of their width."""
    return _TYPES[dtype.name]


def integer_type(bits: int) -> Any:
    return _INTEGER_TYPES[bits]


def is_constant(value: Value) -> bool:
    return isinstance(value, ir.Constant) and isinstance(value.constant, int | float)


def constant_int(value: Value) -> int | None:
    """The bits of an integer constant as a Python int (signed or not as it was made)."""
    if isinstance(value, ir.Constant) and isinstance(value.constant, int):
        return int(value.constant)
    return None


class Part:
    """Element `index` of those of `bits` bits in a 32-bit `word`."""

    __slots__ = ("bits", "block", "extracted", "index", "word")

    def __init__(self, word: Value, index: int, bits: int) -> None:
        self.word = word
        self.index = index
        self.bits = bits
        self.block: Any = None
        self.extracted: Value = None


@cache
def _assembly(text: str, outputs: int) -> str:
    """`text` with LLVM's operand numbers in place of ours."""

    def number(match: re.Match[str]) -> str:
        if match[1] is None:
            return "${:uid}"
        return f"${int(match[2]) + (outputs if match[1] == 'a' else 0)}"

    return _OPERAND.sub(number, text)


class LLVMValues:
    """What every operation of the machine needs: a builder and ways to make values."""

    def __init__(
        self,
        builder: Any,
        target: Target,
        fast_math: bool,
        threads: tuple[int, int, int],
    ) -> None:
        self.builder = builder
        self.target = target
        self.fast_math = fast_math
        self.threads = threads
        # sums[id(x + c)] is (x + c, x, c) for constants c: addresses put c into the instruction
        self.sums: dict[int, tuple[Value, Value, int]] = {}

    # -- constants and narrow values ---------------------------------------------------------

    def const(self, value: bool | int | float, dtype: DType) -> Value:
        kind = llvm_type(dtype)
        if dtype.is_float and dtype.bits < 32:
            return ir.Constant(kind, int.from_bytes(dtype.numpy.type(value).tobytes(), "little"))
        if dtype.is_float:
            return ir.Constant(kind, float(dtype.numpy.type(value)))
        if dtype.is_bool:
            return ir.Constant(kind, int(bool(value)))
        bits = int(value) & ((1 << dtype.bits) - 1)
        if dtype.is_signed and bits >> (dtype.bits - 1):
            bits -= 1 << dtype.bits
        return ir.Constant(kind, bits)

    def word(self, value: int) -> Value:
        """A 32-bit integer constant."""
        return ir.Constant(I32, value)

    def zero(self, kind: Any) -> Value:
        return ir.Constant(kind, 0.0 if kind in (F32, F64) else 0)

    def value(self, value: Value) -> Value:
        """The LLVM value: a part is taken out of its word, once a basic block."""
        if type(value) is not Part:
            return value
        if value.block is not self.builder.block:
            word = value.word
            shift = value.index * value.bits
            if shift:
                word = self.builder.lshr(word, self.word(shift))
            value.extracted = self.builder.trunc(word, integer_type(value.bits))
            value.block = self.builder.block
        return value.extracted

    def values(self, values: Sequence[Value]) -> list[Value]:
        return [self.value(v) for v in values]

    def pack(self, values: Sequence[Value], dtype: DType) -> Value:
        assert len(values) * dtype.bits == 32, f"{len(values)} {dtype} are not a word"
        if dtype.bits == 32:
            return self._to_integer(self.value(values[0]))
        first = values[0]
        if type(first) is Part and all(
            type(v) is Part and v.word is first.word and v.index == i and v.bits == dtype.bits
            for i, v in enumerate(values)
        ):
            return first.word
        if all(is_constant(v) for v in values):
            mask = (1 << dtype.bits) - 1
            return self.word(
                sum((int(v.constant) & mask) << (i * dtype.bits) for i, v in enumerate(values))
            )
        result = None
        for index, value in enumerate(values):
            bits = self._positioned(value, index, dtype)
            result = bits if result is None else self.builder.or_(result, bits)
        return result

    def _positioned(self, value: Value, index: int, dtype: DType) -> Value:
        """A word with the element's bits at `index` and zeros elsewhere."""
        bits = dtype.bits
        if type(value) is Part and value.bits == bits and value.index == index:
            return self.builder.and_(value.word, self.word(((1 << bits) - 1) << (index * bits)))
        wide = self.builder.zext(self.value(value), I32)
        return self.builder.shl(wide, self.word(index * bits)) if index else wide

    def unpack(self, word: Value, dtype: DType) -> list[Value]:
        if dtype.bits == 32:
            return [self._from_integer(self.value(word), llvm_type(dtype))]
        count = 32 // dtype.bits
        bits = constant_int(word)
        if bits is not None and not dtype.is_bool:
            mask = (1 << dtype.bits) - 1
            kind = llvm_type(dtype)
            return [ir.Constant(kind, bits >> (i * dtype.bits) & mask) for i in range(count)]
        parts = [Part(word, i, dtype.bits) for i in range(count)]
        if not dtype.is_bool:
            return parts
        zero = self.zero(I8)
        return [self.builder.icmp_unsigned("!=", self.value(p), zero) for p in parts]

    def _to_integer(self, value: Value) -> Value:
        """The bits of a value as an integer of its width (a bool as 8 bits)."""
        if value.type == F32:
            return self.builder.bitcast(value, I32)
        if value.type == F64:
            return self.builder.bitcast(value, I64)
        return self.builder.zext(value, I8) if value.type == I1 else value

    def _from_integer(self, value: Value, kind: Any) -> Value:
        """The inverse of `_to_integer`."""
        if kind == I1:
            return self.builder.icmp_unsigned("!=", value, self.zero(value.type))
        return value if value.type == kind else self.builder.bitcast(value, kind)

    def bitcast(self, a: Value, source: DType, target: DType) -> Value:
        assert source.bits == target.bits, f"{source} and {target} differ in size"
        if llvm_type(source) == llvm_type(target):
            return a
        return self._from_integer(self._to_integer(self.value(a)), llvm_type(target))

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        known = constant_int(condition)
        if known is not None:
            return a if known else b
        if a is b:
            return a
        return self.builder.select(condition, self.value(a), self.value(b))

    # -- functions and assembly --------------------------------------------------------------

    def call(self, name: str, result: Any, *arguments: Value) -> Value:
        """Call an LLVM, NVVM or libdevice function by name, declaring it once a module."""
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [a.type for a in arguments])
            function = ir.Function(module, kind, name)
        return self.builder.call(function, arguments)

    def assemble(
        self,
        text: str,
        outputs: Sequence[Any],
        inputs: Sequence[Value],
        *,
        has_effect: bool,
        early: bool = False,
        convergent: bool = False,
        tied: int = 0,
    ) -> list[Value]:
        """Inline PTX; `$dN` are the outputs, of the given types, `$aN` the inputs.

        has_effect: it may not be dropped, repeated or moved across other memory accesses.
        early: outputs are written before all inputs have been read.
        tied: that many outputs are the registers of the inputs of their number.
        """
        mark = "=&" if early else "="
        constraints = [mark + _LETTERS[str(kind)] for kind in outputs]
        constraints += [str(number) for number in range(tied)]
        constraints += [_LETTERS[str(v.type)] for v in inputs[tied:]]
        if has_effect:
            constraints.append("~{memory}")
        if not outputs:
            result: Any = ir.VoidType()
        elif len(outputs) == 1:
            result = outputs[0]
        else:
            result = ir.LiteralStructType(outputs)
        kind = ir.FunctionType(result, [v.type for v in inputs])
        code = ir.InlineAsm(
            kind,
            _assembly(text, len(outputs)),
            ",".join(constraints),
            side_effect=has_effect,
        )
        attributes = ["nounwind"] if has_effect else ["nounwind", "readnone"]
        if convergent:
            attributes.append("convergent")
        called = self.builder.call(code, inputs, attrs=attributes)
        if len(outputs) <= 1:
            return [called] if outputs else []
        return [self.builder.extract_value(called, i) for i in range(len(outputs))]

    def convert_asm(self, text: str, output: Any, *inputs: Value) -> Value:
        """Pure inline PTX with one output."""
        return self.assemble(text, (output,), inputs, has_effect=False)[0]

    def shared_base(self) -> Value:
        """The shared address (32 bits) where the block's dynamic shared memory begins."""
        module = self.builder.module
        symbol = module.globals.get(SHARED_SYMBOL)
        if symbol is None:
            symbol = ir.GlobalVariable(module, ir.ArrayType(I8, 0), SHARED_SYMBOL, addrspace=3)
            symbol.linkage = "external"
            symbol.align = SHARED_ALIGN
        return symbol.ptrtoint(I32)


def allocate(builder: Any, size: int, align: int) -> Value:
    """`size` bytes of the thread's own memory, allocated once at the function's entry."""
    with builder.goto_entry_block():
        storage = builder.alloca(ir.ArrayType(I8, size))
        storage.align = align
        return builder.bitcast(storage, BYTE_POINTER)


def keep_rolled(module: Any, latch: Any) -> None:
    """Tell LLVM not to unroll the loop that the branch `latch` closes."""
    serial = ir.MetaDataString(module, str(len(module.metadata)))  # nodes with equal parts merge
    disable = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    loop = module.add_metadata([disable, serial])
    loop.operands = (loop, disable)  # a loop is told by a node that refers to itself
    latch.set_metadata("llvm.loop", loop)


def ir_int(value: int) -> Value:
    """A 32-bit constant, as metadata takes it."""
    return ir.Constant(I32, value)


def metadata_string(module: Any, text: str) -> Any:
    return ir.MetaDataString(module, text)


def constant_node(module: Any, values: Sequence[int]) -> Any:
    """A metadata node of 32-bit numbers."""
    return module.add_metadata([ir.Constant(I32, v) for v in values])


def set_range(value: Value, low: int, high: int) -> None:
    """`value`, a 32-bit call or load, is at least `low` and less than `high`."""
    bounds = value.module.add_metadata([ir.Constant(I32, low), ir.Constant(I32, high)])
    value.set_metadata("range", bounds)


def float_bits(value: float) -> int:
    """The IEEE single-precision bits of a Python number."""
    return int.from_bytes(struct.pack("<f", value), "little")
