"""Where a block is in its grid, and how a grid overlaps with the one before and after it.

Knows the instructions. Does not know streams or launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tilejit import dtypes
from tilejit.isa.instruction import Array, Instruction
from tilejit.isa.machine import LaneContext
from tilejit.target import Feature


def _nothing(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    """The simulator runs one grid after the other."""
    return ()


def _grid_blocks(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    return (np.full(lanes.thread.shape, lanes.grid_blocks(), np.uint32),)


def _cluster_index(lanes: LaneContext, inputs: Sequence[Array]) -> tuple[Array, ...]:
    return (np.full(lanes.thread.shape, lanes.cluster_index(), np.uint32),)


# PTX ISA, "griddepcontrol": wait until the grids that this one depends on have ended and their
# writes are visible; at once when it was not launched as dependent
GRID_DEPENDENCY_WAIT = Instruction(
    name="griddepcontrol.wait",
    ptx="griddepcontrol.wait;",
    needs=frozenset({Feature.GRIDDEPCONTROL}),
    meaning=_nothing,
)

# The grids that depend on this one may start once all its blocks have said so or ended.
GRID_DEPENDENCY_LAUNCH = Instruction(
    name="griddepcontrol.launch_dependents",
    ptx="griddepcontrol.launch_dependents;",
    needs=frozenset({Feature.GRIDDEPCONTROL}),
    meaning=_nothing,
)

# PTX ISA, "Special registers: %nctaid, %clusterid"
GRID_BLOCKS_X = Instruction(
    name="nctaid.x",
    ptx="mov.u32 $d0, %nctaid.x;",
    outputs=(dtypes.uint32,),
    meaning=_grid_blocks,
    has_effect=False,
)
CLUSTER_ID_X = Instruction(
    name="clusterid.x",
    ptx="mov.u32 $d0, %clusterid.x;",
    outputs=(dtypes.uint32,),
    needs=frozenset({Feature.CLUSTER}),
    meaning=_cluster_index,
    has_effect=False,
)
