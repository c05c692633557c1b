"""Atoms: an instruction family as passes choose it, with the fragment maps it asks for.

Knows which atoms exist and what each multiplies or moves. Does not know tiles or kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tilejit.dtypes import DType
from tilejit.isa.instruction import Instruction
from tilejit.target import Feature


class CopyMethod(StrEnum):
    """How a copy moves its bytes."""

    REGISTERS = "registers"  # load to registers, cast, store
    CP_ASYNC = "cp.async"  # global to shared memory, past the registers


@dataclass(frozen=True, slots=True)
class CopyAtom:
    """vector: elements moved by one instruction of a thread."""

    method: CopyMethod
    vector: int

    def __str__(self) -> str:
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

    def __str__(self) -> str:
        name = self.mma.name if self.mma else "fma"
        return f"{name} on {self.warps_m}x{self.warps_n} warps"
