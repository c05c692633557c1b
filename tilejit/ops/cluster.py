"""Tiles of all blocks of a cluster made one, or brought together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tilejit.dtypes import DType, uint32
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr
from tilejit.ir.kernel import Kernel
from tilejit.ir.names import Names
from tilejit.ir.node import Node, walk
from tilejit.ops.reduce import ReduceKind, Step, accumulator

MOST_BLOCKS = 8  # of a cluster, on every chip that has any (PTX ISA, "Cluster of CTAs")
ROOM_GAP = 8  # elements between rows


@dataclass(frozen=True, eq=False, kw_only=True)
class ClusterExchange(Node):
    """Each block of the cluster sends a tile to all of them, and makes a result of what has come.

    Decided by `exchange`:
    scratch: shared memory where the blocks leave their elements, (slots, *`room`).
    barrier, slot, parity: a barrier for each slot, perhaps shared with neighbours, that completes
        when the elements of all blocks have come; the slot that is used, and the parity of that
        phase.
    step: what this node does of it. To send reads what is given, to take writes the result anew: a
        block's own elements come back with the others'.
    """

    scratch: Buffer | None = None
    barrier: Buffer | None = None
    slot: Expr | None = None
    parity: Expr | None = None
    step: Step = Step.WHOLE

    call: ClassVar[str]  # the user's spelling

    @property
    def given(self) -> Region:
        """What each block sends."""
        raise NotImplementedError

    @property
    def result(self) -> Region:
        """What each block has in the end."""
        raise NotImplementedError

    @property
    def accumulator(self) -> DType:
        """The dtype in which elements are combined, where they are."""
        return accumulator(self.given.buffer.dtype, self.result.buffer.dtype)

    @property
    def sent_as(self) -> DType:
        """The dtype of what is under way, of 32 or 64 bits."""
        return self.accumulator

    @property
    def title(self) -> str:
        """What is done, in a word or two, with the tiles' names."""
        raise NotImplementedError

    def room(self, blocks: int) -> tuple[int, ...]:
        """The shape of what comes to a block from all blocks of the cluster."""
        return (*self.given.shape, blocks)

    def received(self, blocks: int) -> int:
        """Elements that the block's barrier waits for: all of them, its own come that way too."""
        return math.prod(self.given.shape) * blocks

    @property
    def reads(self) -> tuple[Buffer, ...]:
        given = () if self.step is Step.TAKE else (self.given.buffer,)
        return (*given, *self._scratch)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        result = () if self.step is Step.SEND else (self.result.buffer,)
        return (*result, *self._scratch)

    @property
    def _scratch(self) -> tuple[Buffer, ...]:
        return tuple(b for b in (self.scratch, self.barrier) if b is not None)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        turn = tuple(e for e in (self.slot, self.parity) if e is not None)
        return (*(e for region in self.regions for e in region.starts), *turn)

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(dict.fromkeys((self.given, self.result)))

    def problems(self) -> Iterator[str]:
        for region in self.regions:
            if region.buffer.scope not in (Scope.SHARED, Scope.FRAGMENT):
                yield f"has `{region.buffer.name}` in {region.buffer.scope.value}"

    def _shown(self, text: str) -> str:
        step = "" if self.step is Step.WHOLE else f", {self.step}"
        comment = f"  # through {self.scratch.name}{step}" if self.scratch is not None else ""
        return f"{self.call}({text}){comment}"


@dataclass(frozen=True, eq=False, kw_only=True)
class ClusterReduce(ClusterExchange):
    """tile = the tiles of all blocks of the cluster, combined element by element, in all of them.

    tile: after `select` a whole fragment, updated in place.
    keeps_nan: a NaN among the elements makes `max` and `min` NaN; else they pass over NaNs.

    Elements are converted to `accumulator` first and the result to the tile's dtype last.
    """

    tile: Region
    kind: ReduceKind
    keeps_nan: bool = False

    call = "T.cluster_reduce"

    @property
    def given(self) -> Region:
        return self.tile

    @property
    def result(self) -> Region:
        return self.tile

    @property
    def title(self) -> str:
        return f"cluster_reduce {self.kind} {self.tile.buffer.name}"

    def show(self, names: Names) -> str:
        nan = ", nan_propagate=True" if self.keeps_nan else ""
        return self._shown(f'{names.region(self.tile)}, "{self.kind}"{nan}')


@dataclass(frozen=True, eq=False, kw_only=True)
class _FromTo(ClusterExchange):
    """An exchange whose result is another tile than what is given."""

    src: Region
    dst: Region

    @property
    def given(self) -> Region:
        return self.src

    @property
    def result(self) -> Region:
        return self.dst


@dataclass(frozen=True, eq=False, kw_only=True)
class ClusterGather(_FromTo):
    """dst[..., r] = src of the cluster's block r, in all blocks.

    src: a tile; after `select` a whole fragment.
    dst: (*src's shape, blocks), of the same dtype; after `select` a whole fragment.

    Bits stay as they are; elements of fewer than 32 are sent as uint32.
    """

    call = "T.cluster_gather"

    @property
    def sent_as(self) -> DType:
        dtype = self.src.buffer.dtype
        return dtype if dtype.bits >= 32 else uint32

    @property
    def title(self) -> str:
        return f"cluster_gather {self.src.buffer.name} -> {self.dst.buffer.name}"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.dst.shape[:-1] != self.src.shape:
            yield f"gathers {self.src.shape} to {self.dst.shape}"
        if self.dst.buffer.dtype is not self.src.buffer.dtype:
            yield f"gathers {self.src.buffer.dtype} to {self.dst.buffer.dtype}"

    def show(self, names: Names) -> str:
        return self._shown(f"{names.region(self.src)}, {names.region(self.dst)}")


@dataclass(frozen=True, eq=False, kw_only=True)
class ClusterScatter(_FromTo):
    """dst = the part of src that has the block's number, of the tiles of all blocks of the cluster
    combined element by element.

    src: a tile whose last dimension divides into as many parts as blocks; after `select` a whole
        fragment.
    dst: a tile of such a part's shape; after `select` a whole fragment.
    keeps_nan: as of `ClusterReduce`.

    Elements are converted to `accumulator` first and the result to dst's dtype last.
    """

    kind: ReduceKind
    keeps_nan: bool = False

    call = "T.cluster_reduce_scatter"

    @property
    def title(self) -> str:
        return (
            f"cluster_reduce_scatter {self.kind} {self.src.buffer.name} -> {self.dst.buffer.name}"
        )

    def room(self, blocks: int) -> tuple[int, ...]:
        """Rows are longer than what comes: neighbouring rows of the tensor cores' results lie in
        other banks."""
        *rows, columns = self.dst.shape
        return (blocks, *rows, columns + (ROOM_GAP if rows else 0))

    def received(self, blocks: int) -> int:
        return math.prod(self.dst.shape) * (blocks - 1)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        *rows, columns = self.src.shape
        if self.dst.shape[:-1] != tuple(rows) or columns % max(1, self.dst.shape[-1]):
            yield f"scatters {self.src.shape} to {self.dst.shape}"

    def show(self, names: Names) -> str:
        nan = ", nan_propagate=True" if self.keeps_nan else ""
        tiles = f"{names.region(self.src)}, {names.region(self.dst)}"
        return self._shown(f'{tiles}, "{self.kind}"{nan}')


def meets_late(kernel: Kernel) -> bool:
    """Whether the threads of a cluster that have made their barriers need not wait for each other
    before the first exchange: nothing else uses barriers of other blocks."""
    if kernel.is_shared_out:
        return True
    own = {n.barrier for n in walk(kernel.body) if isinstance(n, ClusterExchange)}
    return all(b in own for b in kernel.scoped(Scope.BARRIER) if not b.is_view)
