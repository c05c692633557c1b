"""Arithmetic of the LLVM machine: integers with floor semantics, IEEE floats, math functions.

Knows NVVM's intrinsic functions and libdevice's names. Does not know memory or control flow.
Results equal NumPy's, bit for bit where IEEE says so: nothing here is contracted to a fused
multiply-add except `fma` (the compile step tells NVVM so unless `fast_math`).
"""

from __future__ import annotations

from collections.abc import Callable

from tilejit.dtypes import DType, int32, uint32
from tilejit.ir import expr
from tilejit.isa import special
from tilejit.lower.llvm_values import (
    F32,
    I1,
    I32,
    LLVMValues,
    Value,
    constant_int,
    integer_type,
    is_constant,
    llvm_type,
)

_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_ROUNDING = {"floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "rint"}
_BOOL = {"min": "and", "mul": "and", "max": "or", "add": "or"}
_DIVISIONS = ("div", "fmod", "floordiv", "floormod")
_FOLDED = (
    "add", "sub", "mul", "floordiv", "floormod", "min", "max", "and", "or", "xor", "shl", "shr",
)  # fmt: skip
# approximations, relative to the exact functions (CUDA C++ Programming Guide, fast math)
_APPROXIMATE: dict[str, tuple[float, str, float]] = {
    "exp": (1.4426950408889634, "ex2", 1.0),
    "exp2": (1.0, "ex2", 1.0),
    "exp10": (3.3219280948873623, "ex2", 1.0),
    "log": (1.0, "lg2", 0.6931471805599453),
    "log2": (1.0, "lg2", 1.0),
    "log10": (1.0, "lg2", 0.3010299956639812),
    "sin": (1.0, "sin", 1.0),
    "cos": (1.0, "cos", 1.0),
    "rsqrt": (1.0, "rsqrt", 1.0),
    "sqrt": (1.0, "sqrt", 1.0),
}


class LLVMArithmetic(LLVMValues):
    """`binary`, `quotient`, `unary` and `fma` of the machine."""

    def binary(self, op: str, a: Value, b: Value, dtype: DType) -> Value:
        a, b = self.value(a), self.value(b)
        if dtype.is_float:
            assert dtype.bits >= 32, f"{op} on {dtype}: cast to float32 first"
            return self._float_binary(op, a, b, dtype)
        if is_constant(a) and is_constant(b):
            folded = self._fold(op, a, b, dtype)
            if folded is not None:
                return folded
        if op in _COMPARE:
            compare = self.builder.icmp_signed if dtype.is_signed else self.builder.icmp_unsigned
            return compare(_COMPARE[op], a, b)
        if dtype.is_bool:
            return _BITWISE[_BOOL.get(op, op)](self, a, b)
        return self._integer_binary(op, a, b, dtype)

    def quotient(self, a: Value, b: Value, dtype: DType) -> Value:
        assert not dtype.is_signed, f"quotient of {dtype}"
        a, b = self.value(a), self.value(b)
        if is_constant(b):
            return self.binary("floordiv", a, b, dtype)
        return self.builder.udiv(a, b)

    def _fold(self, op: str, a: Value, b: Value, dtype: DType) -> Value | None:
        if dtype.is_bool:
            op = _BOOL.get(op, op)
        if op not in _FOLDED and op not in _COMPARE:
            return None
        result = expr.binary(op, expr.const(a.constant, dtype), expr.const(b.constant, dtype))
        value = expr.const_value(result)
        return None if value is None else self.const(value, result.dtype)

    # -- integers ----------------------------------------------------------------------------

    def _integer_binary(self, op: str, a: Value, b: Value, dtype: DType) -> Value:
        if is_constant(a) and op in ("add", "mul", "and", "or", "xor", "min", "max"):
            a, b = b, a
        known = constant_int(b)
        if known == 0 and op in ("add", "sub", "or", "xor", "shl", "shr"):
            return a
        if known == 1 and op in ("mul", "floordiv", "div"):
            return a
        if op in _DIVISIONS:
            return self._divide(op, a, b, dtype)
        if op in ("shl", "shr"):
            return self._shift(op, a, b, dtype)
        if op in ("min", "max"):
            compare = self.builder.icmp_signed if dtype.is_signed else self.builder.icmp_unsigned
            return self.builder.select(compare("<" if op == "min" else ">", a, b), a, b)
        if op == "pow":
            return self._integer_power(a, b, dtype)
        if op == "mul" and known is not None and known > 0 and known & (known - 1) == 0:
            return self.builder.shl(a, self._like(b, known.bit_length() - 1))
        assert op in _BITWISE, f"{op} on {dtype}"
        result = _BITWISE[op](self, a, b)
        if op == "add" and known is not None:
            self.sums[id(result)] = (result, a, known)
        return result

    def _like(self, value: Value, number: int) -> Value:
        return value.type(number)

    def _shift(self, op: str, a: Value, b: Value, dtype: DType) -> Value:
        """Shifts by the width or more (or by a negative number) leave zeros, or the sign."""
        right = self.builder.ashr if dtype.is_signed else self.builder.lshr
        shift = self.builder.shl if op == "shl" else right
        known = constant_int(b)
        if known is not None and 0 <= known < dtype.bits:
            return shift(a, b)
        fits = self.builder.icmp_unsigned("<", b, self._like(b, dtype.bits))
        if op == "shr" and dtype.is_signed:
            return shift(a, self.builder.select(fits, b, self._like(b, dtype.bits - 1)))
        shifted = shift(a, self.builder.select(fits, b, self._like(b, 0)))
        return self.builder.select(fits, shifted, self._like(a, 0))

    def _divide(self, op: str, a: Value, b: Value, dtype: DType) -> Value:
        """Quotient or remainder, rounded down or (`div`, `fmod`) to zero; 0 when `b` is 0.

        Narrow integers are divided as 32-bit ones: libNVVM 13.0 divides the magnitude of the
        smallest int16 wrongly.
        """
        if dtype.bits < 32:
            wide = int32 if dtype.is_signed else uint32
            x, y = (self._widened(v, dtype) for v in (a, b))
            return self.builder.trunc(self._divide(op, x, y, wide), a.type)
        down = op in ("floordiv", "floormod")
        wants_rest = op in ("fmod", "floormod")
        known = constant_int(b)
        if known is not None and known > 0 and (down or not dtype.is_signed):
            if known & (known - 1) == 0:
                return self._divide_by_power(a, known, dtype, wants_rest)
            quotient = self._divide_by_positive(a, b, dtype)
            if not wants_rest:
                return quotient
            return self.builder.sub(a, self.builder.mul(quotient, b))
        if not dtype.is_signed:
            return self._divide_unsigned(a, b, wants_rest)
        return self._divide_signed(a, b, down, wants_rest)

    def _widened(self, value: Value, dtype: DType) -> Value:
        """A narrow integer as a 32-bit one; a constant stays one."""
        known = constant_int(value)
        if known is None:
            extend = self.builder.sext if dtype.is_signed else self.builder.zext
            return extend(value, I32)
        known &= (1 << dtype.bits) - 1
        if dtype.is_signed and known >> (dtype.bits - 1):
            known -= 1 << dtype.bits
        return I32(known)

    def _divide_by_power(self, a: Value, b: int, dtype: DType, wants_rest: bool) -> Value:
        if wants_rest:
            return self.builder.and_(a, self._like(a, b - 1))
        shift = self.builder.ashr if dtype.is_signed else self.builder.lshr
        return shift(a, self._like(a, b.bit_length() - 1))

    def _divide_by_positive(self, a: Value, b: Value, dtype: DType) -> Value:
        if not dtype.is_signed:
            return self.builder.udiv(a, b)
        # a // b == ~(~a // b) for negative a: an unsigned division by a constant both times
        sign = self.builder.ashr(a, self._like(a, dtype.bits - 1))
        return self.builder.xor(self.builder.udiv(self.builder.xor(a, sign), b), sign)

    def _divide_unsigned(self, a: Value, b: Value, wants_rest: bool) -> Value:
        zero = self._like(b, 0)
        is_zero = self.builder.icmp_unsigned("==", b, zero)
        safe = self.builder.select(is_zero, self._like(b, 1), b)
        divide = self.builder.urem if wants_rest else self.builder.udiv
        return self.builder.select(is_zero, zero, divide(a, safe))

    def _divide_signed(self, a: Value, b: Value, down: bool, wants_rest: bool) -> Value:
        # By magnitudes, which are unsigned: the smallest integer has one, and 0 can be replaced.
        builder = self.builder
        zero = self._like(b, 0)
        is_zero = builder.icmp_unsigned("==", b, zero)
        a_negative = builder.icmp_signed("<", a, zero)
        b_negative = builder.icmp_signed("<", b, zero)
        size_a = builder.select(a_negative, builder.sub(zero, a), a)
        size_b = builder.select(b_negative, builder.sub(zero, b), b)
        size_b = builder.select(is_zero, self._like(b, 1), size_b)
        quotient = builder.udiv(size_a, size_b)
        rest = builder.sub(size_a, builder.mul(quotient, size_b))
        differ = builder.xor(a_negative, b_negative)
        uneven = builder.icmp_unsigned("!=", rest, zero)
        if wants_rest:
            result = builder.select(a_negative, builder.sub(zero, rest), rest)
            if down:
                other_side = builder.and_(differ, uneven)
                result = builder.select(other_side, builder.add(result, b), result)
        else:
            if down:  # away from zero where the signs differ
                more = builder.and_(differ, uneven)
                quotient = builder.add(quotient, builder.zext(more, quotient.type))
            result = builder.select(differ, builder.sub(zero, quotient), quotient)
        return builder.select(is_zero, zero, result)

    def _integer_power(self, a: Value, b: Value, dtype: DType) -> Value:
        """By squaring; a negative exponent gives the truncated reciprocal."""
        known = constant_int(b)
        if known is not None and known >= 0:
            return self._constant_power(a, known)
        one = self._like(a, 1)
        result, square = one, a
        for bit in range(dtype.bits - (1 if dtype.is_signed else 0)):
            is_set = self.builder.and_(b, self._like(b, 1 << bit))
            is_set = self.builder.icmp_unsigned("!=", is_set, self._like(b, 0))
            result = self.builder.select(is_set, self.builder.mul(result, square), result)
            square = self.builder.mul(square, square)
        if not dtype.is_signed:
            return result
        # 1/a is a where a is 1 or -1 (to the power, again 1 or -1), else 0
        size = self.unary("abs", a, dtype)
        unit = self.builder.icmp_unsigned("==", size, one)
        odd = self.builder.trunc(b, I1)
        reciprocal = self.builder.select(odd, a, one)
        reciprocal = self.builder.select(unit, reciprocal, self._like(a, 0))
        negative = self.builder.icmp_signed("<", b, self._like(b, 0))
        return self.builder.select(negative, reciprocal, result)

    def _constant_power(self, a: Value, exponent: int) -> Value:
        result = None
        square = a
        while exponent:
            if exponent & 1:
                result = square if result is None else self.builder.mul(result, square)
            exponent >>= 1
            if exponent:
                square = self.builder.mul(square, square)
        return self._like(a, 1) if result is None else result

    # -- floats ------------------------------------------------------------------------------

    def _float_binary(self, op: str, a: Value, b: Value, dtype: DType) -> Value:
        if op in _COMPARE:
            unordered = op == "ne"
            compare = self.builder.fcmp_unordered if unordered else self.builder.fcmp_ordered
            return compare(_COMPARE[op], a, b)
        simple: dict[str, Callable[[Value, Value], Value]] = {
            "add": self.builder.fadd,
            "sub": self.builder.fsub,
            "mul": self.builder.fmul,
            "div": self.builder.fdiv,
        }
        if op in simple:
            return simple[op](a, b)
        kind = llvm_type(dtype)
        if op in ("min", "max"):  # the operand that is no NaN wins
            suffix = "f" if kind == F32 else "d"
            return self.call(f"llvm.nvvm.f{op}.{suffix}", kind, a, b)
        if op == "pow" and self.fast_math and kind == F32:
            logarithm = self.call("llvm.nvvm.lg2.approx.ftz.f", F32, a)
            return self.call("llvm.nvvm.ex2.approx.ftz.f", F32, self.builder.fmul(b, logarithm))
        if op in ("pow", "atan2", "fmod"):
            return self._libdevice(op, kind, a, b)
        assert op in ("floordiv", "floormod"), f"{op} on {dtype}"
        return self._float_floor(op, a, b, kind)

    def _libdevice(self, name: str, kind: Value, *arguments: Value) -> Value:
        return self.call(f"__nv_{name}{'f' if kind == F32 else ''}", kind, *arguments)

    def _float_intrinsic(self, name: str, *arguments: Value) -> Value:
        kind = arguments[0].type
        return self.call(f"llvm.{name}.{'f32' if kind == F32 else 'f64'}", kind, *arguments)

    def _float_floor(self, op: str, a: Value, b: Value, kind: Value) -> Value:
        """`//` and `%` as NumPy computes them: from the exact remainder."""
        b_ = self.builder
        zero = self.zero(kind)
        rest = self._libdevice("fmod", kind, a, b)
        uneven = b_.fcmp_unordered("!=", rest, zero)
        differ = b_.xor(b_.fcmp_ordered("<", rest, zero), b_.fcmp_ordered("<", b, zero))
        other_side = b_.and_(uneven, differ)
        by_zero = b_.fcmp_ordered("==", b, zero)
        if op == "floormod":
            moved = b_.select(other_side, b_.fadd(rest, b), rest)
            even = self._float_intrinsic("copysign", zero, b)
            return b_.select(by_zero, rest, b_.select(uneven, moved, even))
        exact = b_.fdiv(a, b)
        quotient = b_.fdiv(b_.fsub(a, rest), b)
        quotient = b_.select(other_side, b_.fsub(quotient, kind(1.0)), quotient)
        down = self._float_intrinsic("floor", quotient)
        above = b_.fcmp_ordered(">", b_.fsub(quotient, down), kind(0.5))
        down = b_.select(above, b_.fadd(down, kind(1.0)), down)
        nonzero = b_.fcmp_unordered("!=", quotient, zero)
        signed_zero = self._float_intrinsic("copysign", zero, exact)
        return b_.select(by_zero, exact, b_.select(nonzero, down, signed_zero))

    def fma(self, a: Value, b: Value, c: Value, dtype: DType) -> Value:
        a, b, c = self.values((a, b, c))
        if dtype.is_float:
            return self._float_intrinsic("fma", a, b, c)
        return self.binary("add", self.binary("mul", a, b, dtype), c, dtype)

    # -- one operand -------------------------------------------------------------------------

    def unary(self, op: str, a: Value, dtype: DType) -> Value:
        a = self.value(a)
        if op == "not":
            return self.builder.xor(a, a.type(1 if dtype.is_bool else -1))
        if op in expr.PREDICATES:
            return self._predicate(op, a, dtype)
        if dtype.is_float:
            assert dtype.bits >= 32, f"{op} on {dtype}: cast to float32 first"
            return self._float_unary(op, a, llvm_type(dtype))
        return self._integer_unary(op, a, dtype)

    def _predicate(self, op: str, a: Value, dtype: DType) -> Value:
        if not dtype.is_float:
            return I1(1 if op == "isfinite" else 0)
        if op == "isnan":
            return self.builder.fcmp_unordered("uno", a, a)
        infinite = a.type(float("inf"))
        compare = "==" if op == "isinf" else "<"
        return self.builder.fcmp_ordered(compare, self._float_intrinsic("fabs", a), infinite)

    def _integer_unary(self, op: str, a: Value, dtype: DType) -> Value:
        zero = self._like(a, 0)
        if op == "neg":
            return self.builder.sub(zero, a)
        if op == "abs":
            if not dtype.is_signed:
                return a
            negative = self.builder.icmp_signed("<", a, zero)
            return self.builder.select(negative, self.builder.sub(zero, a), a)
        if op in _ROUNDING:
            return a
        wide = integer_type(64 if dtype.bits == 64 else 32)
        value = a if a.type == wide else self.builder.zext(a, wide)
        if op == "popcount":
            count = self.call(f"llvm.ctpop.{wide}", wide, value)
        else:
            assert op == "clz", f"{op} on {dtype}"
            count = self.call(f"llvm.ctlz.{wide}", wide, value, I1(0))
            if dtype.bits < 32:
                count = self.builder.sub(count, I32(32 - dtype.bits))
        return count if count.type == a.type else self.builder.trunc(count, a.type)

    def _float_unary(self, op: str, a: Value, kind: Value) -> Value:
        if op == "neg":
            return self.builder.fsub(kind(-0.0), a)  # the older dialect has no fneg
        if op == "abs":
            return self._float_intrinsic("fabs", a)
        if op in _ROUNDING:
            return self._float_intrinsic(_ROUNDING[op], a)
        if self.fast_math and kind == F32:
            approximate = self._approximate(op, a)
            if approximate is not None:
                return approximate
        if op == "sqrt":
            return self._float_intrinsic("sqrt", a)
        return self._libdevice(op, kind, a)

    def _approximate(self, op: str, a: Value) -> Value | None:
        if op == "tanh":
            return self.convert_asm(special.TANH.ptx, F32, a)
        if op == "tan":
            sine, cosine = self._approximate("sin", a), self._approximate("cos", a)
            return self.builder.fdiv(sine, cosine)
        found = _APPROXIMATE.get(op)
        if found is None:
            return None
        before, name, after = found
        value = a if before == 1.0 else self.builder.fmul(a, F32(before))
        value = self.call(f"llvm.nvvm.{name}.approx.ftz.f", F32, value)
        return value if after == 1.0 else self.builder.fmul(value, F32(after))


_BITWISE: dict[str, Callable[[LLVMArithmetic, Value, Value], Value]] = {
    "add": lambda m, a, b: m.builder.add(a, b),
    "sub": lambda m, a, b: m.builder.sub(a, b),
    "mul": lambda m, a, b: m.builder.mul(a, b),
    "and": lambda m, a, b: m.builder.and_(a, b),
    "or": lambda m, a, b: m.builder.or_(a, b),
    "xor": lambda m, a, b: m.builder.xor(a, b),
}
