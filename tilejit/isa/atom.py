"""Atoms: an instruction family as passes choose it, with the fragment maps it asks for.

Knows which atoms exist and what each multiplies or moves. Does not know tiles or kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from tilejit.dtypes import DType
from tilejit.isa.instruction import Instruction
from tilejit.target import Feature

if TYPE_CHECKING:
    from tilejit.isa.wgmma import WgmmaInstruction


class CopyMethod(StrEnum):
    """How a copy moves its bytes."""

    REGISTERS = "registers"  # load to registers, cast, store
    QUADS = "quads"  # between fragments, by the lanes of each quad trading 8-bit elements
    CP_ASYNC = "cp.async"  # global to shared memory, past the registers
    TMA = "tma"  # whole boxes between global and shared memory, by the tensor memory accelerator


@dataclass(frozen=True, slots=True)
class CopyAtom:
    """vector: elements moved by one instruction of a thread; 0 where that is a whole box."""

    method: CopyMethod
    vector: int

    def __str__(self) -> str:
        if not self.vector:
            return self.method.value
        return f"{self.method.value}, {self.vector} elements a time"


@dataclass(frozen=True, slots=True, eq=False)
class MmaInstruction:
    """A warp-wide matrix multiply-accumulate, (m, n, k) elements a warp."""

    m: int
    n: int
    k: int
    a: DType
    b: DType
    acc: DType
    instruction: Instruction
    needs: frozenset[Feature]

    @property
    def name(self) -> str:
        return self.instruction.name


@dataclass(frozen=True, slots=True)
class GemmAtom:
    """How a tile multiply is done by `warps_m` x `warps_n` warps.

    mma: the matrix instruction; None for plain fused multiply-adds.
    """

    mma: MmaInstruction | None
    warps_m: int
    warps_n: int

    @property
    def is_async(self) -> bool:
        """True when the product is there only after a wait."""
        return False

    def __str__(self) -> str:
        name = self.mma.name if self.mma else "fma"
        return f"{name} on {self.warps_m}x{self.warps_n} warps"


@dataclass(frozen=True, slots=True)
class WgmmaAtom:
    """How a tile multiply is done by `groups_m` x `groups_n` warpgroups.

    rows, columns: instructions along m and n that each of them issues.
    halved: the tile of B is stored in halves (`layout.shared`), and the product has its columns in
        the order that this makes of them.
    """

    wgmma: WgmmaInstruction
    groups_m: int
    groups_n: int
    rows: int
    columns: int
    halved: bool = False

    @property
    def is_async(self) -> bool:
        return True

    @property
    def mma(self) -> None:
        """No instruction of a single warp."""
        return

    def __str__(self) -> str:
        each = f", {self.rows}x{self.columns} each" if self.rows * self.columns > 1 else ""
        return f"{self.wgmma.name} on {self.groups_m}x{self.groups_n} warpgroups{each}"

    def registers_of(self, row: int | None) -> slice:
        """The accumulator's registers that a row of each warpgroup's instructions writes, or, of
        None, all rows."""
        each = self.columns * self.wgmma.acc_registers
        return slice(0, self.rows * each) if row is None else slice(row * each, (row + 1) * each)
