"""Conversions, fast functions and warp shuffles: instructions that LLVM has no plain name for.

Knows each instruction's rounding and special values. Does not know when speed beats accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from tilejit import dtypes
from tilejit.dtypes import DType
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.isa.mma import WARP
from tilejit.target import Feature

_FULL = 0xFFFFFFFF
_F32 = dtypes.float32
_NAN_16 = np.uint16(0x7FFF)  # what conversions to float16 and bfloat16 make of any NaN


def _narrow(values: Array, numpy: Any) -> Array:
    """float32 to a 16-bit float, to nearest even, as uint16."""
    with np.errstate(all="ignore"):
        bits = np.asarray(values, np.float32).astype(numpy).view(np.uint16)
    return np.where(np.isnan(values), _NAN_16, bits)


def _halves(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _bf16(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    return (_narrow(inputs[0], ml_dtypes.bfloat16),)


def _bf16x2(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    low, high = (_narrow(x, ml_dtypes.bfloat16) for x in inputs)
    return (_halves(low, high),)


def _f16x2(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    low, high = (_narrow(x, np.float16) for x in inputs)
    return (_halves(low, high),)


def _tf32(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    """Add half of the last kept bit to the magnitude and cut: ties go away from zero. NaNs are
    only cut, which makes infinities of some (so does an H200)."""
    bits = np.asarray(inputs[0], np.float32).view(np.uint32)
    half = np.where(np.isnan(inputs[0]), np.uint32(0), np.uint32(0x1000))
    return ((bits + half) & np.uint32(0xFFFFE000),)


# PTX ISA, "Data movement and conversion instructions: cvt". A pair's first input is the low half.
BF16_FROM_F32 = Instruction(
    name="cvt.rn.bf16.f32",
    ptx="{ .reg .b32 pair; .reg .b16 high; cvt.rn.bf16x2.f32 pair, 0f00000000, $a0; "
    "mov.b32 {$d0, high}, pair; }",
    outputs=(dtypes.uint16,),
    inputs=(_F32,),
    meaning=_bf16,
    has_effect=False,
)
BF16X2_FROM_F32 = Instruction(
    name="cvt.rn.bf16x2.f32",
    ptx="cvt.rn.bf16x2.f32 $d0, $a1, $a0;",
    outputs=(dtypes.uint32,),
    inputs=(_F32, _F32),
    meaning=_bf16x2,
    has_effect=False,
)
F16X2_FROM_F32 = Instruction(
    name="cvt.rn.f16x2.f32",
    ptx="cvt.rn.f16x2.f32 $d0, $a1, $a0;",
    outputs=(dtypes.uint32,),
    inputs=(_F32, _F32),
    meaning=_f16x2,
    has_effect=False,
)
# Round an operand of a tf32 mma, which would cut the low 13 bits; the result is float32 bits.
TF32_FROM_F32 = Instruction(
    name="cvt.rna.tf32.f32",
    ptx="cvt.rna.tf32.f32 $d0, $a0;",
    outputs=(dtypes.uint32,),
    inputs=(_F32,),
    meaning=_tf32,
    has_effect=False,
)


def _fp8_meaning(
    dtype: DType,
) -> Callable[[LaneContext, Sequence[Array]], tuple[Array, ...]]:
    largest = np.float32(dtype.max)

    def narrow(values: Array) -> Array:
        clipped = np.clip(np.asarray(values, np.float32), -largest, largest)
        with np.errstate(invalid="ignore"):  # NumPy warns of NaN in a cast, on some processors
            bits = clipped.astype(dtype.numpy).view(np.uint8)
        return np.where(np.isnan(values), np.uint8(0x7F), bits).astype(np.uint16)

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        low, high = (narrow(x) for x in inputs)
        return (low | high << np.uint16(8),)

    return meaning


def _fp8_back(
    dtype: DType,
) -> Callable[[LaneContext, Sequence[Array]], tuple[Array, ...]]:
    def widen(values: Array) -> Array:
        wide = values.astype(np.uint8).view(dtype.numpy).astype(np.float16)
        return np.where(np.isnan(wide), _NAN_16, wide.view(np.uint16))

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        pair = np.asarray(inputs[0], np.uint16)
        return (_halves(widen(pair & np.uint16(0xFF)), widen(pair >> np.uint16(8))),)

    return meaning


def _fp8_pair(dtype: DType, ptx: str) -> tuple[Instruction, Instruction]:
    """From two float32 to a pair of fp8 (infinities and overflow become the largest finite value)
    and from a pair of fp8 to a pair of float16 (exact)."""
    needs = frozenset({Feature.FP8_CONVERT})
    narrowing = Instruction(
        name=f"cvt.rn.satfinite.{ptx}x2.f32",
        ptx=f"cvt.rn.satfinite.{ptx}x2.f32 $d0, $a1, $a0;",
        outputs=(dtypes.uint16,),
        inputs=(_F32, _F32),
        needs=needs,
        meaning=_fp8_meaning(dtype),
        has_effect=False,
    )
    widening = Instruction(
        name=f"cvt.rn.f16x2.{ptx}x2",
        ptx=f"cvt.rn.f16x2.{ptx}x2 $d0, $a0;",
        outputs=(dtypes.uint32,),
        inputs=(dtypes.uint16,),
        needs=needs,
        meaning=_fp8_back(dtype),
        has_effect=False,
    )
    return narrowing, widening


E4M3X2_FROM_F32, F16X2_FROM_E4M3X2 = _fp8_pair(dtypes.float8_e4m3fn, "e4m3")
E5M2X2_FROM_F32, F16X2_FROM_E5M2X2 = _fp8_pair(dtypes.float8_e5m2, "e5m2")


def _flush(values: Array) -> Array:
    """Subnormal numbers become zeros of their sign."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def _approximate(ptx: str, function: Callable[[Array], Array], flushes: bool = True) -> Instruction:
    """A float32 function that the hardware computes to about 22 bits; the meaning rounds right."""

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        values = np.asarray(inputs[0], np.float32)
        with np.errstate(all="ignore"):
            if not flushes:
                return (function(values.astype(np.float64)).astype(np.float32),)
            return (_flush(function(_flush(values).astype(np.float64)).astype(np.float32)),)

    return Instruction(
        name=ptx,
        ptx=f"{ptx} $d0, $a0;",
        outputs=(_F32,),
        inputs=(_F32,),
        meaning=meaning,
        has_effect=False,
    )


# PTX ISA, "Floating point instructions: ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh"
EX2 = _approximate("ex2.approx.ftz.f32", np.exp2)
LG2 = _approximate("lg2.approx.ftz.f32", np.log2)
RCP = _approximate("rcp.approx.ftz.f32", lambda x: 1 / x)
RSQRT = _approximate("rsqrt.approx.ftz.f32", lambda x: 1 / np.sqrt(x))
SQRT = _approximate("sqrt.approx.ftz.f32", np.sqrt)
SIN = _approximate("sin.approx.ftz.f32", np.sin)
COS = _approximate("cos.approx.ftz.f32", np.cos)
TANH = _approximate("tanh.approx.f32", np.tanh, flushes=False)


def _first_lane(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    value = np.broadcast_to(inputs[0], lanes.thread.shape)
    lane = np.arange(len(value))
    first = value[lane - lane % WARP]
    assert (first == value).all(), "the lanes of a warp hold different values"
    return (first,)


# A value that all lanes of a warp hold alike, in a form that the assembler knows to be so and keeps
# in a uniform register (PTX ISA, "shfl.sync"). It touches nothing, so it may be moved out of loops.
UNIFORM = Instruction(
    name="uniform",
    ptx=f"shfl.sync.idx.b32 $d0, $a0, 0, 31, {_FULL};",
    outputs=(dtypes.uint32,),
    inputs=(dtypes.uint32,),
    meaning=_first_lane,
    has_effect=False,
)


def _same(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    return (inputs[0],)


# Its input, with the top bit of a clock added, which is 0 for centuries (PTX ISA, "%clock_hi"): no
# compiler knows that.
HIDE = Instruction(
    name="hide",
    ptx="{ .reg .b32 zero; mov.u32 zero, %clock_hi; shr.u32 zero, zero, 31; "
    "or.b32 $d0, $a0, zero; }",
    outputs=(dtypes.uint32,),
    inputs=(dtypes.uint32,),
    meaning=_same,
    has_effect=False,
)


@cache
def own_zero(dtype: DType) -> Instruction:
    """A zero of 32 bits that is nothing else's: compilers do not keep it in a register with others
    of its value (PTX ISA, "mov")."""

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        return (np.zeros(lanes.thread.shape, dtype.numpy),)

    return Instruction(
        name=f"zero.{dtype}",
        ptx="mov.b32 $d0, 0;",
        outputs=(dtype,),
        meaning=meaning,
        has_effect=False,
    )


def _elected(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    return ((lanes.thread % WARP == 0).astype(np.uint32),)


# 1 in one lane of the warp, all of whose lanes take part; 0 in the others. What only that lane
# does, the assembler then issues once (PTX ISA, "elect.sync").
ELECT = Instruction(
    name="elect.sync",
    ptx=(
        f"{{\n.reg .pred elected;\nelect.sync _|elected, {_FULL};\nselp.b32 $d0, 1, 0, elected;\n}}"
    ),
    outputs=(dtypes.uint32,),
    needs=frozenset({Feature.TMA}),
    meaning=_elected,
)


@cache
def shuffle(mode: str) -> Instruction:
    """Every lane reads the uint32 of another lane of its warp.

    mode: "idx": of the lane numbered by the second input, modulo 32; "bfly": of the lane whose
        number is this lane's XOR the second input; "up" and "down": of the lane whose number is
        less or more by the second input, and its own where the warp has none. All lanes of the
        warp must take part.
    """
    assert mode in ("idx", "bfly", "up", "down"), f"shuffle {mode}"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        shape = lanes.thread.shape
        value = np.broadcast_to(inputs[0], shape)
        operand = np.broadcast_to(inputs[1], shape).astype(np.int64) % WARP
        lane = np.arange(len(value))
        own = lane % WARP
        if mode in ("up", "down"):
            other = own - operand if mode == "up" else own + operand
            other = np.where((other < 0) | (other >= WARP), own, other)
        else:
            other = operand if mode == "idx" else own ^ operand
        return (value[lane - lane % WARP + other],)

    # PTX ISA, "Data movement and conversion instructions: shfl.sync"
    return Instruction(
        name=f"shfl.sync.{mode}",
        ptx=f"shfl.sync.{mode}.b32 $d0, $a0, $a1, {0 if mode == 'up' else 31}, {_FULL};",
        outputs=(dtypes.uint32,),
        inputs=(dtypes.uint32, dtypes.uint32),
        meaning=meaning,
    )


def _permuted(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    low, high, selector = (np.asarray(x, np.uint64) for x in inputs)
    both = low | high << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint64)
    for byte in range(4):
        chosen = selector >> np.uint64(4 * byte) & np.uint64(7)
        result = result | (both >> chosen * np.uint64(8) & np.uint64(255)) << np.uint64(8 * byte)
    return (result.astype(np.uint32),)


# Any four of the eight bytes of two words: each digit of the third input, lowest first, is the
# number of one; without the digits' top bits, which would repeat signs (PTX ISA, "prmt").
PERMUTE = Instruction(
    name="prmt.b32",
    ptx="prmt.b32 $d0, $a0, $a1, $a2;",
    outputs=(dtypes.uint32,),
    inputs=(dtypes.uint32, dtypes.uint32, dtypes.uint32),
    meaning=_permuted,
    has_effect=False,
)
