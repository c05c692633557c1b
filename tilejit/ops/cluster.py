"""Tiles of all blocks of a cluster made one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tilejit.dtypes import DType
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr
from tilejit.ir.names import Names
from tilejit.ir.node import Node
from tilejit.ops.reduce import ReduceKind, accumulator


@dataclass(frozen=True, eq=False, kw_only=True)
class ClusterReduce(Node):
    """tile = the tiles of all blocks of the cluster, combined element by element, in all of them.

    tile: after `select` a whole fragment, updated in place.
    keeps_nan: a NaN among the elements makes `max` and `min` NaN; else they pass over NaNs.
    scratch: decided by `layouts`: shared memory where the blocks leave their elements,
        (*tile's shape, blocks).

    Elements are converted to `accumulator` first and the result to the tile's dtype last.
    """

    tile: Region
    kind: ReduceKind
    keeps_nan: bool = False
    scratch: Buffer | None = None

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.tile.buffer, *self._scratch)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.tile.buffer, *self._scratch)

    @property
    def _scratch(self) -> tuple[Buffer, ...]:
        return () if self.scratch is None else (self.scratch,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return self.tile.starts

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
        comment = f"  # through {self.scratch.name}" if self.scratch is not None else ""
        return f"T.cluster_reduce({text}){comment}"
