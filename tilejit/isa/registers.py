"""setmaxnreg: a warpgroup gives registers back, or asks for more.

Knows the instruction. Does not know who needs how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.isa.wgmma_fragments import whole_warpgroups
from tilejit.target import Feature


@cache
def setmaxnreg(count: int, increase: bool) -> Instruction:
    """The warpgroup's threads have `count` registers each from now on (24 to 256, a multiple of 8).

    increase: wait until the block has given back that many; else release those above `count`.
    The kernel must be compiled for a fixed number of threads, or the assembler ignores it.
    """
    assert 24 <= count <= 256 and count % 8 == 0, f"setmaxnreg {count}"
    direction = "inc" if increase else "dec"
    name = f"setmaxnreg.{direction}.{count}"

    def meaning(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
        whole_warpgroups(lanes, name)
        return ()

    # PTX ISA, "Miscellaneous instructions: setmaxnreg"
    return Instruction(
        name=name,
        ptx=f"setmaxnreg.{direction}.sync.aligned.u32 {count};",
        needs=frozenset({Feature.SETMAXNREG}),
        meaning=meaning,
    )
