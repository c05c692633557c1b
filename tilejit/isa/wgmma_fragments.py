"""wgmma's instructions, and which elements each thread of a warpgroup holds.

Knows the legal shapes and types, the PTX ISA's "Asynchronous warpgroup level matrix fragments", and
how instructions tile warpgroups. Does not know how products are issued.

A register index counts elements, as for mma: element `i` is in b32 register `i // per_word`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tilejit import dtypes
from tilejit.dtypes import DType
from tilejit.isa.machine import LaneContext
from tilejit.isa.wgmma_operands import K_BYTES
from tilejit.layout.fragment import Digit, FragmentLayout, register, thread
from tilejit.target import Feature, Target

WARPGROUP = 128
M = 64
NEEDS = frozenset({Feature.WGMMA})

PTX_TYPE = {
    dtypes.float16: "f16",
    dtypes.bfloat16: "bf16",
    dtypes.tfloat32: "tf32",
    dtypes.float8_e4m3fn: "e4m3",
    dtypes.float8_e5m2: "e5m2",
    dtypes.int8: "s8",
    dtypes.uint8: "u8",
    dtypes.float32: "f32",
    dtypes.int32: "s32",
}


@dataclass(frozen=True, eq=False)
class WgmmaInstruction:
    """A warpgroup-wide matrix multiply-accumulate, (m, n, k) elements."""

    n: int
    k: int
    a: DType
    b: DType
    acc: DType
    m: int = M
    needs: frozenset[Feature] = NEEDS

    @property
    def name(self) -> str:
        types = ".".join(PTX_TYPE[d] for d in (self.acc, self.a, self.b))
        return f"wgmma.m{self.m}n{self.n}k{self.k}.{types}"

    @property
    def acc_register(self) -> DType:
        """The dtype of an accumulator register: float16 travel in pairs."""
        return dtypes.uint32 if self.acc is dtypes.float16 else self.acc

    @property
    def acc_registers(self) -> int:
        """Accumulator registers of a thread."""
        return self.m * self.n * self.acc.bytes // (4 * WARPGROUP)

    @property
    def a_registers(self) -> int:
        """Registers of A of a thread, where A is in registers."""
        return self.m * K_BYTES // (4 * WARPGROUP)

    def __repr__(self) -> str:
        return self.name


def _per_word(dtype: DType) -> int:
    return 4 // dtype.bytes


@cache
def fragment_acc(one: WgmmaInstruction) -> FragmentLayout:
    """Where a warpgroup holds the accumulator, (m, n): a warp has 16 rows; pairs of a row, then
    the two row halves, then groups of 8 columns."""
    rows = (thread(4, 32), register(2, 2), thread(8, 4))
    columns = (register(one.n // 8, 4), thread(4, 1), register(2, 1))
    return FragmentLayout((one.m, one.n), (rows, _used(columns)), WARPGROUP)


@cache
def fragment_a(one: WgmmaInstruction) -> FragmentLayout:
    """Where a warpgroup holds A, (m, k), in registers: a warp has 16 rows. Words: the two row
    halves, then the two K halves."""
    per_word = _per_word(one.a)
    rows = (thread(4, 32), register(2, per_word), thread(8, 4))
    columns = (register(2, 2 * per_word), thread(4, 1), register(per_word, 1))
    return FragmentLayout((one.m, one.k), (rows, _used(columns)), WARPGROUP)


def tile_acc(
    one: WgmmaInstruction, m: int, n: int, groups_m: int, groups_n: int, *, halved: bool = False
) -> FragmentLayout:
    """The (m, n) accumulator of groups_m x groups_n warpgroups, each holding a contiguous tile.

    Warpgroup `gm * groups_n + gn` holds tile (gm, gn). Registers: those of one instruction, then
    the instructions along n, then those along m.

    halved: of one instruction along n whose operand B is stored with the first two of every four
    rows in its first half and the others in its second. Its pairs of columns 2q and 2q + 1 of 8 are
    then the columns 4q and 4q + 1 of 16, or 4q + 2 and 4q + 3, and a lane has fours of neighbours,
    as `fragment_a` of 8-bit elements.
    """
    part = fragment_acc(one)
    repeat_m, repeat_n = _repeats(m, one.m * groups_m), _repeats(n, one.n * groups_n)
    rows = (
        thread(groups_m, WARPGROUP * groups_n),
        register(repeat_m, part.registers * repeat_n),
        *part.dims[0],
    )
    columns = (thread(groups_n, WARPGROUP), register(repeat_n, part.registers), *part.dims[1])
    if halved:
        assert groups_n * repeat_n == 1 and n % 16 == 0, f"{one} for {n} columns in halves"
        half = part.registers // 2
        columns = (register(n // 16, 4), thread(4, 1), register(2, half), register(2, 1))
    threads = WARPGROUP * groups_m * groups_n
    return FragmentLayout((m, n), (_used(rows), _used(columns)), threads)


def tile_a(one: WgmmaInstruction, m: int, k: int, groups_m: int, groups_n: int) -> FragmentLayout:
    """The (m, k) left operand of groups_m x groups_n warpgroups, in registers; warpgroups of one
    row hold copies.

    Registers: those of one instruction, then the instructions along k, then those along m.
    """
    part = fragment_a(one)
    repeat_m, repeat_k = _repeats(m, one.m * groups_m), _repeats(k, one.k)
    rows = (
        thread(groups_m, WARPGROUP * groups_n),
        register(repeat_m, part.registers * repeat_k),
        *part.dims[0],
    )
    columns = (register(repeat_k, part.registers), *part.dims[1])
    threads = WARPGROUP * groups_m * groups_n
    return FragmentLayout((m, k), (_used(rows), _used(columns)), threads)


def _used(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    return tuple(d for d in digits if d.size > 1)


def _repeats(extent: int, step: int) -> int:
    assert extent > 0 and extent % step == 0, f"{extent} is no multiple of {step}"
    return extent // step


def whole_warpgroups(lanes: LaneContext, name: str) -> None:
    """Assert what warpgroup instructions demand: all 128 threads execute them, or none."""
    assert len(lanes.active) % WARPGROUP == 0, f"{name}: the threads are no whole warpgroups"
    groups = lanes.active.reshape(-1, WARPGROUP)
    assert (groups.all(1) | ~groups.any(1)).all(), f"{name}: only part of a warpgroup executes it"


_FP8 = (dtypes.float8_e4m3fn, dtypes.float8_e5m2)
_INT8 = (dtypes.int8, dtypes.uint8)
_F16, _F32 = dtypes.float16, dtypes.float32
# Operand and accumulator types (PTX ISA, "wgmma.mma_async")
_TYPES: tuple[tuple[DType, DType, DType], ...] = (
    (_F16, _F16, _F32),
    (_F16, _F16, _F16),
    (dtypes.bfloat16, dtypes.bfloat16, _F32),
    (dtypes.tfloat32, dtypes.tfloat32, _F32),
    *((a, b, acc) for a in _FP8 for b in _FP8 for acc in (_F32, _F16)),
    *((a, b, dtypes.int32) for a in _INT8 for b in _INT8),
)


def _widths(acc: DType) -> tuple[int, ...]:
    """The legal n: integers lack most odd multiples of 8."""
    return (8, 24, *range(16, 257, 16)) if acc is dtypes.int32 else tuple(range(8, 257, 8))


WGMMA: dict[tuple[DType, DType, DType, int], WgmmaInstruction] = {
    (a, b, acc, n): WgmmaInstruction(n, K_BYTES // a.bytes, a, b, acc)
    for a, b, acc in _TYPES
    for n in _widths(acc)
}


def find_wgmma(a: DType, b: DType, acc: DType, n: int, target: Target) -> WgmmaInstruction | None:
    """The target's instruction of that width for these types, or None."""
    return WGMMA.get((a, b, acc, n)) if target.has(*NEEDS) else None
