"""Conversions of the LLVM machine: every dtype to every other, rounded as NumPy and ml_dtypes do.

Knows bit layouts of the narrow floats and which conversions the target has. Float to integer
truncates and saturates as the hardware does (NaN gives 0) for 32 and 64 bits; narrower integers
wrap from 32 bits. Float to fp8 saturates to the largest finite value. Narrow floats are reached
through float32, exactly or with one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilejit.dtypes import (
    DType,
    bfloat16,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    float64,
)
from tilejit.isa import special
from tilejit.isa.instruction import Instruction
from tilejit.lower.llvm_arithmetic import LLVMArithmetic
from tilejit.lower.llvm_values import (
    F16,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    Part,
    Value,
    float_bits,
    is_constant,
    llvm_type,
)
from tilejit.target import Feature

_FP8 = (float8_e4m3fn, float8_e5m2)
_NARROW = (float16, bfloat16, *_FP8)


class LLVMCasts(LLVMArithmetic):
    """`cast` of the machine."""

    def cast(self, values: Sequence[Value], source: DType, target: DType) -> list[Value]:
        if source is target or llvm_type(source) == llvm_type(target) == F32:
            return list(values)
        if source in _NARROW and target.is_bool:
            return [self._narrow_is_true(v, source) for v in values]
        if source in _NARROW:
            wide = self._widen(values, source)
            return wide if llvm_type(target) == F32 else self.cast(wide, float32, target)
        if target in _NARROW:
            return self._narrow(values, source, target)
        return [self._cast_wide(self.value(v), source, target) for v in values]

    # -- bool, integers, float32, float64 ----------------------------------------------------

    def _cast_wide(self, value: Value, source: DType, target: DType) -> Value:
        kind = llvm_type(target)
        if target.is_bool:
            if source.is_float:
                return self.builder.fcmp_unordered("!=", value, self.zero(value.type))
            return self.builder.icmp_unsigned("!=", value, self.zero(value.type))
        if source.is_float:
            if target.is_float:
                widen = self.builder.fpext if kind == F64 else self.builder.fptrunc
                return widen(value, kind)
            return self._truncate(value, target)
        if target.is_float:
            unsigned = source.is_bool or not source.is_signed
            convert = self.builder.uitofp if unsigned else self.builder.sitofp
            return convert(value, kind)
        if is_constant(value):
            return self.const(int(value.constant), target)
        if value.type == kind:
            return value
        if target.bits < source.bits and not source.is_bool:
            return self.builder.trunc(value, kind)
        signed = source.is_signed and not source.is_bool
        return (self.builder.sext if signed else self.builder.zext)(value, kind)

    def _truncate(self, value: Value, target: DType) -> Value:
        """Float to integer with cvt.rzi, which saturates."""
        letter = "f" if value.type == F32 else "d"
        wide = I64 if target.bits == 64 else I32
        signed = target.is_signed or target.bits < 32
        name = ("" if signed else "u") + ("ll" if wide == I64 else "i")
        result = self.call(f"llvm.nvvm.{letter}2{name}.rz", wide, value)
        is_nan = self.builder.fcmp_unordered("uno", value, value)
        result = self.builder.select(is_nan, self.zero(wide), result)
        kind = llvm_type(target)
        return result if wide == kind else self.builder.trunc(result, kind)

    # -- narrow floats to float32 ------------------------------------------------------------

    def _narrow_is_true(self, value: Value, source: DType) -> Value:
        bits = self.value(value)
        magnitude = self.builder.and_(bits, bits.type((1 << (source.bits - 1)) - 1))
        return self.builder.icmp_unsigned("!=", magnitude, self.zero(bits.type))

    def _widen(self, values: Sequence[Value], source: DType) -> list[Value]:
        if source is bfloat16:
            return [self._widen_bfloat16(v) for v in values]
        if source is float16:
            return [self._widen_half(v) for v in values]
        if source is float8_e4m3fn and self.target.has(Feature.FP8_CONVERT):
            return self._pairs(values, self._widen_fp8_pair, self._widen_fp8_alone)
        widen = self._widen_e5m2 if source is float8_e5m2 else self._widen_e4m3
        return [widen(self.value(v)) for v in values]

    def _pairs(
        self,
        values: Sequence[Value],
        pair: Callable[[Value, Value], Sequence[Value]],
        single: Callable[[Value], Value],
    ) -> list[Value]:
        """Convert two at a time, the last of an odd number alone."""
        result: list[Value] = []
        for index in range(0, len(values) - 1, 2):
            result += pair(values[index], values[index + 1])
        if len(values) % 2:
            result.append(single(values[-1]))
        return result

    def _widen_bfloat16(self, value: Value) -> Value:
        if type(value) is Part:
            if value.index:
                bits = self.builder.and_(value.word, self.word(0xFFFF0000))
            else:
                bits = self.builder.shl(value.word, self.word(16))
        else:
            bits = self.builder.shl(self.builder.zext(value, I32), self.word(16))
        return self.builder.bitcast(bits, F32)

    def _widen_half(self, value: Value) -> Value:
        return self.builder.fpext(self.builder.bitcast(self.value(value), F16), F32)

    def _widen_fp8_pair(self, low: Value, high: Value) -> Sequence[Value]:
        together = type(low) is Part and type(high) is Part and low.word is high.word
        if together and high.index == low.index + 1 and low.index in (0, 2):
            pair = low.word
            if low.index:
                pair = self.builder.lshr(pair, self.word(16))
            return self._widen_fp8_bytes(self.builder.trunc(pair, I16))
        first = self.builder.zext(self.value(low), I16)
        second = self.builder.shl(self.builder.zext(self.value(high), I16), I16(8))
        return self._widen_fp8_bytes(self.builder.or_(first, second))

    def _widen_fp8_alone(self, value: Value) -> Value:
        return self._widen_fp8_bytes(self.builder.zext(self.value(value), I16))[0]

    def _widen_fp8_bytes(self, pair: Value) -> Sequence[Value]:
        word = self.convert_asm(special.F16X2_FROM_E4M3X2.ptx, I32, pair)
        return [self._widen_half(Part(word, i, 16)) for i in range(2)]

    def _widen_e5m2(self, value: Value) -> Value:
        """float8_e5m2 is the upper byte of a float16."""
        return self._widen_half(self.builder.shl(self.builder.zext(value, I16), I16(8)))

    def _widen_e4m3(self, value: Value) -> Value:
        """Through the float16 with the same exponent field, whose bias is larger by 8."""
        wide = self.builder.zext(value, I16)
        sign = self.builder.shl(self.builder.and_(wide, I16(0x80)), I16(8))
        magnitude = self.builder.and_(wide, I16(0x7F))
        half = self.builder.or_(sign, self.builder.shl(magnitude, I16(7)))
        scaled = self.builder.fmul(self._widen_half(half), F32(256.0))
        is_nan = self.builder.icmp_unsigned("==", magnitude, I16(0x7F))
        return self.builder.select(is_nan, F32(float("nan")), scaled)

    # -- to narrow floats --------------------------------------------------------------------

    def _narrow(self, values: Sequence[Value], source: DType, target: DType) -> list[Value]:
        if source is float64 and target is float16:
            return [self._narrow_half(self.value(v)) for v in values]
        if llvm_type(source) == F32:
            wide = self.values(values)
        else:
            wide = self.cast(values, source, float32)
        if target is float16:
            return self._narrow_16(wide, special.F16X2_FROM_F32, self._narrow_half)
        if target is bfloat16:
            return self._narrow_16(wide, special.BF16X2_FROM_F32, self._narrow_bfloat16)
        if self.target.has(Feature.FP8_CONVERT):
            return self._narrow_fp8(wide, target)
        return [self._narrow_fp8_by_bits(v, target) for v in wide]

    def _narrow_half(self, value: Value) -> Value:
        return self.builder.bitcast(self.builder.fptrunc(value, F16), I16)

    def _narrow_bfloat16(self, value: Value) -> Value:
        return self.convert_asm(special.BF16_FROM_F32.ptx, I16, value)

    def _narrow_16(
        self,
        values: Sequence[Value],
        pair: Instruction,
        single: Callable[[Value], Value],
    ) -> list[Value]:
        def convert(low: Value, high: Value) -> Sequence[Value]:
            word = self.convert_asm(pair.ptx, I32, low, high)
            return Part(word, 0, 16), Part(word, 1, 16)

        return self._pairs(values, convert, single)

    def _narrow_fp8(self, values: Sequence[Value], target: DType) -> list[Value]:
        is_e4m3 = target is float8_e4m3fn
        text = (special.E4M3X2_FROM_F32 if is_e4m3 else special.E5M2X2_FROM_F32).ptx
        pairs = []
        for index in range(0, len(values), 2):
            low = values[index]
            high = values[index + 1] if index + 1 < len(values) else F32(0.0)
            pairs.append(self.convert_asm(text, I16, low, high))
        result: list[Value] = []
        for index in range(0, len(pairs), 2):
            word = self.builder.zext(pairs[index], I32)
            if index + 1 < len(pairs):
                upper = self.builder.shl(self.builder.zext(pairs[index + 1], I32), self.word(16))
                word = self.builder.or_(word, upper)
            result += [Part(word, i, 8) for i in range(4)]
        return result[: len(values)]

    def _narrow_fp8_by_bits(self, value: Value, target: DType) -> Value:
        """Round float32 to fp8 with integer arithmetic, for chips without the conversion."""
        b = self.builder
        mantissa, bias = (3, 7) if target is float8_e4m3fn else (2, 15)
        bits = b.bitcast(value, I32)
        magnitude = b.and_(bits, self.word(0x7FFFFFFF))
        is_nan = b.icmp_unsigned(">", magnitude, self.word(0x7F800000))
        largest = self.word(float_bits(float(target.max)))
        magnitude = b.select(b.icmp_unsigned("<", magnitude, largest), magnitude, largest)
        # normal: round the mantissa to nearest even, then move the exponent's bias
        drop = 23 - mantissa
        odd = b.and_(b.lshr(magnitude, self.word(drop)), self.word(1))
        rounded = b.add(b.add(magnitude, self.word((1 << (drop - 1)) - 1)), odd)
        normal = b.lshr(b.sub(rounded, self.word((127 - bias) << 23)), self.word(drop))
        # subnormal: adding 2**23 steps leaves the number of steps, rounded, in the mantissa
        magic = float(2.0 ** (1 - bias - mantissa + 23))
        sum_ = b.fadd(b.bitcast(magnitude, F32), F32(magic))
        steps = b.sub(b.bitcast(sum_, I32), self.word(float_bits(magic)))
        smallest = self.word(float_bits(2.0 ** (1 - bias)))
        is_normal = b.icmp_unsigned(">=", magnitude, smallest)
        sign = b.and_(b.lshr(bits, self.word(24)), self.word(0x80))
        result = b.or_(b.select(is_normal, normal, steps), sign)
        return b.trunc(b.select(is_nan, self.word(0x7F), result), I8)
