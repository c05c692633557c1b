"""mma.sync: a warp multiplies small matrices held in registers.

Knows the instructions, which element each lane holds (PTX ISA, "Matrix fragments for mma"), and how
instructions tile a block of warps. Does not know how operands come into registers.

A register index counts elements: element `i` of an operand is in register `i // per_word`, the
first of a word in its lowest bits. Operand registers have 32 bits; float64 elements have their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from tilejit import dtypes
from tilejit.dtypes import DType
from tilejit.isa.atom import MmaInstruction
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.layout.fragment import Digit, FragmentLayout, register, thread
from tilejit.target import Feature, Target

WARP = 32

_PTX_TYPE = {
    dtypes.float16: "f16",
    dtypes.bfloat16: "bf16",
    dtypes.tfloat32: "tf32",
    dtypes.int8: "s8",
    dtypes.uint8: "u8",
    dtypes.float8_e4m3fn: "e4m3",
    dtypes.float8_e5m2: "e5m2",
    dtypes.float32: "f32",
    dtypes.float64: "f64",
    dtypes.int32: "s32",
}


@cache
def fragment_a(mma: MmaInstruction) -> FragmentLayout:
    """Where a warp holds A, (m, k). Words: the two row halves, then the two K halves."""
    per_word = _per_word(mma.a)
    rows = (register(mma.m // 8, per_word), thread(8, 4))
    columns = (
        register(mma.k // (4 * per_word), per_word * (mma.m // 8)),
        thread(4, 1),
        register(per_word, 1),
    )
    return FragmentLayout((mma.m, mma.k), (_used(rows), _used(columns)), WARP)


@cache
def fragment_b(mma: MmaInstruction) -> FragmentLayout:
    """Where a warp holds B, (k, n). Words: the two K halves."""
    per_word = _per_word(mma.b)
    rows = (
        register(mma.k // (4 * per_word), per_word),
        thread(4, 1),
        register(per_word, 1),
    )
    columns = (thread(8, 4),)
    return FragmentLayout((mma.k, mma.n), (_used(rows), columns), WARP)


@cache
def fragment_acc(mma: MmaInstruction) -> FragmentLayout:
    """Where a warp holds the accumulator, (m, n): pairs of a row, then the two row halves."""
    rows = (register(mma.m // 8, 2), thread(8, 4))
    columns = (thread(4, 1), register(2, 1))
    return FragmentLayout((mma.m, mma.n), (_used(rows), columns), WARP)


def tile_acc(mma: MmaInstruction, m: int, n: int, warps_m: int, warps_n: int) -> FragmentLayout:
    """The (m, n) accumulator of warps_m x warps_n warps, each holding a contiguous tile.

    Warp `wm * warps_n + wn` holds tile (wm, wn). Registers: those of one instruction, then the
    instructions along n, then those along m.
    """
    one = fragment_acc(mma)
    repeat_m, repeat_n = _repeats(m, mma.m * warps_m), _repeats(n, mma.n * warps_n)
    rows = (
        thread(warps_m, WARP * warps_n),
        register(repeat_m, one.registers * repeat_n),
        *one.dims[0],
    )
    columns = (thread(warps_n, WARP), register(repeat_n, one.registers), *one.dims[1])
    return FragmentLayout((m, n), (_used(rows), _used(columns)), WARP * warps_m * warps_n)


def tile_a(mma: MmaInstruction, m: int, k: int, warps_m: int, warps_n: int) -> FragmentLayout:
    """The (m, k) left operand of warps_m x warps_n warps; warps of one row hold copies.

    Registers: those of one instruction, then the instructions along k, then those along m.
    """
    one = fragment_a(mma)
    repeat_m, repeat_k = _repeats(m, mma.m * warps_m), _repeats(k, mma.k)
    rows = (
        thread(warps_m, WARP * warps_n),
        register(repeat_m, one.registers * repeat_k),
        *one.dims[0],
    )
    columns = (register(repeat_k, one.registers), *one.dims[1])
    return FragmentLayout((m, k), (_used(rows), _used(columns)), WARP * warps_m * warps_n)


def tile_b(mma: MmaInstruction, k: int, n: int, warps_m: int, warps_n: int) -> FragmentLayout:
    """The (k, n) right operand of warps_m x warps_n warps; warps of one column hold copies.

    Registers: those of one instruction, then the instructions along k, then those along n.
    """
    one = fragment_b(mma)
    repeat_k, repeat_n = _repeats(k, mma.k), _repeats(n, mma.n * warps_n)
    rows = (register(repeat_k, one.registers), *one.dims[0])
    columns = (
        thread(warps_n, WARP),
        register(repeat_n, one.registers * repeat_k),
        *one.dims[1],
    )
    return FragmentLayout((k, n), (_used(rows), _used(columns)), WARP * warps_m * warps_n)


def find_mma(a: DType, b: DType, acc: DType, target: Target) -> list[MmaInstruction]:
    """The instructions of the target for these operand types, the largest first."""
    found = [
        mma
        for mma in MMA
        if mma.a is a and mma.b is b and mma.acc is acc and target.has(*mma.needs)
    ]
    return sorted(found, key=lambda mma: -mma.m * mma.n * mma.k)


def operand_word(dtype: DType) -> DType:
    """The dtype of the registers that hold an operand's elements."""
    return dtypes.float64 if dtype is dtypes.float64 else dtypes.uint32


def words_a(mma: MmaInstruction) -> int:
    """Registers of A in a lane."""
    return _word_count(fragment_a(mma), mma.a)


def words_b(mma: MmaInstruction) -> int:
    """Registers of B in a lane."""
    return _word_count(fragment_b(mma), mma.b)


def _per_word(dtype: DType) -> int:
    return max(1, 4 // dtype.bytes)


def _used(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    return tuple(d for d in digits if d.size > 1)


def _repeats(extent: int, step: int) -> int:
    assert extent > 0 and extent % step == 0, f"{extent} is no multiple of {step}"
    return extent // step


def _word_count(layout: FragmentLayout, dtype: DType) -> int:
    return layout.registers // _per_word(dtype)


def whole_warps(lanes: LaneContext, name: str) -> None:
    """Assert what `.aligned` demands: all lanes of a warp execute the instruction, or none."""
    if not lanes.active.all():
        by_warp = lanes.active.reshape(-1, WARP)
        assert (by_warp.all(1) | ~by_warp.any(1)).all(), f"{name}: only part of a warp executes it"


def _places(layout: FragmentLayout, dtype: DType, warps: int) -> Array:
    """(warps, *shape): where elements are among all lanes' registers, register by register."""
    lane = np.arange(WARP)
    per_word = _per_word(dtype)
    places = np.empty((warps, *layout.shape), np.intp)
    for warp in range(warps):
        for r in range(layout.registers):
            word = (r // per_word * warps + warp) * WARP + lane
            places[warp][layout.coordinates(lane, r)] = word * per_word + r % per_word
    return places


def _sources(layout: FragmentLayout, warps: int) -> Array:
    """(registers, lanes): where in the matrices of all warps each lane's elements are."""
    warp, lane = np.divmod(np.arange(warps * WARP), WARP)
    return np.stack(
        [
            np.ravel_multi_index((warp, *layout.coordinates(lane, r)), (warps, *layout.shape))
            for r in range(layout.registers)
        ]
    )


@cache
def _gathers(mma: MmaInstruction, warps: int) -> tuple[int, int, Array, Array, Array]:
    """Number of A's registers, of A's and B's, places of A and of B, sources of the result."""
    a, b = fragment_a(mma), fragment_b(mma)
    places = _places(a, mma.a, warps), _places(b, mma.b, warps)
    sources = _sources(fragment_acc(mma), warps)
    return words_a(mma), words_a(mma) + words_b(mma), *places, sources


def _gather(words: Sequence[Array], dtype: DType, places: Array) -> Array:
    """The matrix of each warp from its lanes' registers, float64 if they are, else float32."""
    packed = np.concatenate(words)
    if dtype is dtypes.tfloat32:
        packed &= np.uint32(0xFFFFE000)  # the low 13 bits are not read
    wide = np.float64 if dtype is dtypes.float64 else np.float32
    return packed.view(dtype.numpy).take(places).astype(wide, copy=False)


def _multiply(
    mma: MmaInstruction, lanes: LaneContext, inputs: Sequence[Array]
) -> tuple[Array, ...]:
    """All warps at once. float64 is multiplied and summed as such. Other products are exact in
    float32 and summed in it; for 8-bit integers the sums of one instruction are exact too (below
    2**24), and the accumulator wraps."""
    whole_warps(lanes, mma.name)
    a_words, ab_words, a_places, b_places, sources = _gathers(mma, len(lanes.thread) // WARP)
    with np.errstate(all="ignore"):
        a = _gather(inputs[:a_words], mma.a, a_places)
        b = _gather(inputs[a_words:ab_words], mma.b, b_places)
        terms = np.matmul(a, b).take(sources)
        acc = inputs[ab_words:]
        if mma.acc is not dtypes.float16:
            return tuple(terms.astype(mma.acc.numpy, copy=False) + np.stack(acc))
        halves = np.stack(acc, axis=1).view(np.float16)
        sums = (halves.astype(np.float32) + terms.T).astype(np.float16, order="C")
    return tuple(sums.view(np.uint32).T)


def _registers(letter: str, start: int, count: int) -> str:
    return "{" + ", ".join(f"${letter}{start + i}" for i in range(count)) + "}"


def _mma(m: int, n: int, k: int, a: DType, b: DType, acc: DType, *needs: Feature) -> MmaInstruction:
    """A record from its shape and types; register counts follow from the fragments."""
    types = ".".join(_PTX_TYPE[d] for d in (acc, a, b, acc))
    features = frozenset({Feature.MMA, *needs})
    name = f"mma.m{m}n{n}k{k}.{types}"
    unwritten = Instruction(name=name, ptx="", meaning=lambda lanes, inputs: ())
    shape = MmaInstruction(m, n, k, a, b, acc, unwritten, features)
    a_words, b_words = words_a(shape), words_b(shape)
    acc_words = _word_count(fragment_acc(shape), acc)
    acc_register = dtypes.uint32 if acc is dtypes.float16 else acc
    instruction = Instruction(
        name=name,
        ptx=f"mma.sync.aligned.m{m}n{n}k{k}.row.col.{types} {_registers('d', 0, acc_words)}, "
        f"{_registers('a', 0, a_words)}, {_registers('a', a_words, b_words)}, "
        f"{_registers('a', a_words + b_words, acc_words)};",
        outputs=(acc_register,) * acc_words,
        inputs=(operand_word(a),) * a_words
        + (operand_word(b),) * b_words
        + (acc_register,) * acc_words,
        needs=features,
        meaning=partial(_multiply, shape),
        has_effect=False,
    )
    return replace(shape, instruction=instruction)


_F16, _BF16, _TF32 = dtypes.float16, dtypes.bfloat16, dtypes.tfloat32
_S8, _U8 = dtypes.int8, dtypes.uint8
_E4M3, _E5M2 = dtypes.float8_e4m3fn, dtypes.float8_e5m2
_F32, _F64, _S32 = dtypes.float32, dtypes.float64, dtypes.int32

# PTX ISA, "Matrix multiply-accumulate operation using mma instruction"; fragments in its
# subsections "Matrix fragments for mma.m8n8k4, .m16n8k4, .m16n8k8, .m16n8k16, .m16n8k32".
# tf32 operands are float32 bits of which the low 13 are not read: round with cvt.rna.tf32 first.
MMA: tuple[MmaInstruction, ...] = (
    _mma(16, 8, 16, _F16, _F16, _F32),
    _mma(16, 8, 8, _F16, _F16, _F32),
    _mma(16, 8, 16, _F16, _F16, _F16),
    _mma(16, 8, 8, _F16, _F16, _F16),
    _mma(16, 8, 16, _BF16, _BF16, _F32),
    _mma(16, 8, 8, _BF16, _BF16, _F32),
    _mma(16, 8, 8, _TF32, _TF32, _F32),
    _mma(16, 8, 4, _TF32, _TF32, _F32),
    *(
        _mma(16, 8, k, a, b, _S32)
        for k in (32, 16)
        for a in (_S8, _U8)
        for b in (_S8, _U8)
    ),
    *(
        _mma(16, 8, k, a, b, acc, Feature.MMA_FP8)
        for acc in (_F32, _F16)
        for k in (32, 16)
        for a in (_E4M3, _E5M2)
        for b in (_E4M3, _E5M2)
    ),
    *(_mma(16, 8, k, _F64, _F64, _F64, Feature.MMA_F64_M16) for k in (16, 8, 4)),
    _mma(8, 8, 4, _F64, _F64, _F64, Feature.MMA_F64),
)  # fmt: skip
