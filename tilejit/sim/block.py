"""Blocks while they are simulated: their memories, barriers and what happened when.

Knows what the groups of a block and the blocks of a cluster share. Does not know granules or how a
launch runs them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tilejit.errors import SimulationError, Span
from tilejit.isa.tma import TensorMap
from tilejit.sim.barriers import BlockBarriers, ClusterBarrier, Turns
from tilejit.sim.bulk import Load, Store
from tilejit.sim.hazards import History
from tilejit.sim.memory import SHARED_BASE, Memory, Region, shared_region
from tilejit.sim.order import Order

WARP = 32
CLUSTER_SHIFT = 24  # an address in the shared memory of block r of a cluster has r + 1 above it
_MAX_WATCHED_BYTES = 1 << 26  # the history of a byte takes up to 30


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is looked for while simulating.

    races: accesses of two of a block's threads to one place that nothing orders, and accesses to
        what an asynchronous copy is still filling. Other blocks are not looked at, nor
        arrays of more than 64 MiB.
    unwritten: reads of shared memory that nothing has written.
    """

    races: bool = True
    unwritten: bool = False


class Watch:
    """The search for races through all blocks of a launch, which run one after the other.

    order: of the accesses of the block that runs; None when races are not looked for.
    """

    def __init__(self, checks: Checks) -> None:
        self.order: Order | None = None
        self._checks = checks
        self._histories: dict[Region, History] = {}

    def start(self, threads: int, blocks: int, site_of: Callable[[int], Span | None]) -> None:
        """`blocks` blocks of `threads` threads start: what was before is in order."""
        if not self._checks.races:
            return
        if self.order is None:
            self.order = Order(threads * blocks, threads)
        self.order.start(site_of)

    def history_of(self, region: Region, space: str) -> History | None:
        """The accesses of a region so far, or None."""
        if self.order is None or region.size > _MAX_WATCHED_BYTES:
            return None
        region = region.origin
        found = self._histories.get(region)
        if found is None:
            unwritten = self._checks.unwritten and space == "shared"
            found = self._histories[region] = History(
                self.order, region.size, f"{space} memory", region.name, region.grain, unwritten
            )
        return found

    def forget(self, region: Region) -> None:
        """The region exists no more."""
        self._histories.pop(region, None)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What all blocks of a launch have in common.

    threads: of a block, run as groups of `lanes`, the last perhaps not full.
    blocks, cluster: extents of the grid and of a cluster, in blocks.
    maps: tensor maps by the address that the kernel gets for each.
    """

    threads: int
    lanes: int = 0
    shared_bytes: int
    memory: Memory
    blocks: tuple[int, int, int] = (1, 1, 1)
    cluster: tuple[int, int, int] = (1, 1, 1)
    maps: Mapping[int, TensorMap] = field(default_factory=dict)

    @property
    def group_threads(self) -> int:
        return self.lanes or self.threads

    @property
    def groups(self) -> int:
        return -(-self.threads // self.group_threads)

    @property
    def width(self) -> int:
        """Lanes of a group in whole warps; the surplus lanes are never active."""
        return -(-self.group_threads // WARP) * WARP


class Cluster:
    """Blocks that run at once: mostly a single one.

    index: the cluster's number along x. barrier: where all threads meet.
    loads: bulk copies to shared memory on their way, oldest first.
    """

    def __init__(self, grid: Grid, watch: Watch, index: int = 0) -> None:
        lanes = grid.group_threads
        assert lanes == grid.threads or lanes % WARP == 0, (
            f"groups of {lanes} of {grid.threads} threads"
        )
        size = math.prod(grid.cluster)
        self.grid = grid
        self.watch = watch
        self.index = index
        self.turns = Turns(grid.groups * size, self._land_next)
        watch.start(grid.groups * grid.width, size, self.site_of)
        self.barrier = ClusterBarrier(grid.threads * size, self.turns, watch.order)
        self.loads: list[Load] = []
        self._times: list[int] = []
        self._sites: list[Span | None] = []
        self.blocks = [Block(self, rank) for rank in range(size)]

    def mark(self, span: Span | None) -> None:
        """What happens from now on happens at `span`."""
        order = self.watch.order
        if order is not None:
            self._times.append(order.time)
            self._sites.append(span)

    def site_of(self, time: int) -> Span | None:
        """The span of what happened at that time."""
        place = bisect.bisect_left(self._times, time) - 1
        return self._sites[place] if place >= 0 else None

    def _land_next(self) -> bool:
        """The oldest bulk copy to shared memory lands; False when there is none."""
        if not self.loads:
            return False
        load = self.loads.pop(0)
        self.mark(load.span)
        load.land(self.grid.memory, self.watch.order)
        return True


class Block:
    """Block `rank` of a cluster, its groups numbered within it.

    first: its first thread among those of the cluster, in whole warps.
    stores: bulk copies to global memory that nobody waits for any more.
    """

    def __init__(self, cluster: Cluster, rank: int) -> None:
        grid = cluster.grid
        self.cluster = cluster
        self.grid = grid
        self.rank = rank
        self.threads = grid.threads
        self.lanes = grid.group_threads
        self.groups = grid.groups
        self.width = grid.width
        self.first = rank * grid.groups * grid.width
        self.memory = grid.memory
        self.shared_region = shared_region(grid.shared_bytes)
        self.shared = Memory("shared", [self.shared_region])
        self.watch = cluster.watch
        self.turns = cluster.turns
        is_alone = math.prod(grid.cluster) == 1
        owner = "" if is_alone else f" of block {rank} of the cluster"
        self.barriers = BlockBarriers(grid.threads, self.turns, self.watch.order, owner)
        self.stores: list[Store] = []
        self.warpgroup_agents: dict[int, int] = {}
        self._left_groups = self.groups

    @property
    def has_ended(self) -> bool:
        return self._left_groups == 0

    def mark(self, span: Span | None) -> None:
        """What happens from now on happens at `span`."""
        self.cluster.mark(span)

    @cached_property
    def cluster_memory(self) -> Memory:
        """The shared memory of all blocks of the cluster, as this one sees it."""
        regions = [self.shared_region]
        for block in self.cluster.blocks:
            base = SHARED_BASE + (block.rank + 1 << CLUSTER_SHIFT)
            regions.append(block.shared_region.seen_from(base))
        return Memory("shared", regions)

    def find(self, address: int) -> tuple[Block, int]:
        """The block that an address in the cluster's shared memory belongs to, and the address
        there."""
        rank = (address >> CLUSTER_SHIFT) - 1
        block = self if rank < 0 else self.cluster.blocks[rank]
        if block.has_ended:
            raise SimulationError(
                f"A block of the cluster reaches the shared memory of block {rank}, which has "
                "ended.",
                hint="Let all blocks of the cluster meet before they end.",
            )
        return block, address & (1 << CLUSTER_SHIFT) - 1

    def history(self) -> History | None:
        """The accesses of the block's shared memory so far, or None."""
        return self.watch.history_of(self.shared_region, "shared")

    def leave(self, threads: int) -> None:
        """A group of `threads` threads has ended; with the last the block ends."""
        self._left_groups -= 1
        self.cluster.barrier.leave(threads)
        if not self.has_ended:
            return
        for load in self.cluster.loads:
            load.check_end(self)
        self.barriers.check_end()
        for store in self.stores:
            store.read(self.shared, self.history(), self.watch.order)
            store.write(self.memory, self.watch)
        self.watch.forget(self.shared_region)
