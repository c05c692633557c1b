"""Tiles of all blocks of a cluster made one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tilejit.dtypes import DType
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr
from tilejit.ir.kernel import Kernel
from tilejit.ir.names import Names
from tilejit.ir.node import Node, walk
from tilejit.ops.reduce import ReduceKind, Step, accumulator


@dataclass(frozen=True, eq=False, kw_only=True)
class ClusterReduce(Node):
    """tile = the tiles of all blocks of the cluster, combined element by element, in all of them.

    tile: after `select` a whole fragment, updated in place.
    keeps_nan: a NaN among the elements makes `max` and `min` NaN; else they pass over NaNs.

    Decided by `exchange`:
    scratch: shared memory where the blocks leave their elements, (slots, *tile's shape, blocks).
    barrier, slot, parity: a barrier for each slot, perhaps shared with neighbours, that completes
        when the elements of all blocks have come; the slot that is used, and the parity of that
        phase.
    step: what this node does of it. To send reads the tile, to take writes it anew: a block's own
        elements come back with the others'.

    Elements are converted to `accumulator` first and the result to the tile's dtype last.
    """

    tile: Region
    kind: ReduceKind
    keeps_nan: bool = False
    scratch: Buffer | None = None
    barrier: Buffer | None = None
    slot: Expr | None = None
    parity: Expr | None = None
    step: Step = Step.WHOLE

    @property
    def reads(self) -> tuple[Buffer, ...]:
        if self.step is Step.TAKE:
            return self._scratch
        return (self.tile.buffer, *self._scratch)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        if self.step is Step.SEND:
            return self._scratch
        return (self.tile.buffer, *self._scratch)

    @property
    def _scratch(self) -> tuple[Buffer, ...]:
        return tuple(b for b in (self.scratch, self.barrier) if b is not None)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        turn = tuple(e for e in (self.slot, self.parity) if e is not None)
        return (*self.tile.starts, *turn)

    @property
    def regions(self) -> tuple[Region, ...]:
        return (self.tile,)

    @property
    def accumulator(self) -> DType:
        """The dtype in which elements are combined."""
        return accumulator(self.tile.buffer.dtype, self.tile.buffer.dtype)

    def problems(self) -> Iterator[str]:
        if self.tile.buffer.scope not in (Scope.SHARED, Scope.FRAGMENT):
            yield f"has `tile` in {self.tile.buffer.scope.value}"

    def show(self, names: Names) -> str:
        text = f'{names.region(self.tile)}, "{self.kind}"'
        if self.keeps_nan:
            text += ", nan_propagate=True"
        step = "" if self.step is Step.WHOLE else f", {self.step}"
        comment = f"  # through {self.scratch.name}{step}" if self.scratch is not None else ""
        return f"T.cluster_reduce({text}){comment}"


def meets_late(kernel: Kernel) -> bool:
    """Whether the threads of a cluster that have made their barriers need not wait for each other
    before the first T.cluster_reduce: nothing else uses barriers."""
    own = {n.barrier for n in walk(kernel.body) if isinstance(n, ClusterReduce)}
    return all(b in own for b in kernel.scoped(Scope.BARRIER) if not b.is_view)
