"""What lanes start and do not wait for, bulk copies and matrix products, and other blocks' memory.

Knows who started what and what was waited for. Does not know what products compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilejit.errors import SimulationError
from tilejit.isa.tma import CHUNK, Box, TensorMap
from tilejit.isa.wgmma_fragments import WARPGROUP
from tilejit.sim.block import CLUSTER_SHIFT, Block
from tilejit.sim.bulk import Load, Store, Target
from tilejit.sim.lane_context import LaneEffects
from tilejit.sim.memory import SHARED_BASE

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class _Product:
    """A matrix product on its way: of group `group` of a warpgroup.

    reads: addresses of its chunks, in its order; held: offsets of what is held, each once.
    """

    warpgroup: int
    group: int
    reads: Array
    held: Array
    finish: Callable[[Array], None]


class AsyncEffects(LaneEffects):
    """The asynchronous part of `isa.machine.LaneContext`."""

    def __init__(self, block: Block, group: int) -> None:
        super().__init__(block, group)
        self._stores: list[Store] = []
        self._store_groups = np.zeros(self.width, np.int64)
        self._products: list[_Product] = []
        self._product_groups = np.zeros(-(-self.width // WARPGROUP), np.int64)

    def end(self) -> None:
        """The lanes have run to the kernel's end."""
        if self._products:
            raise SimulationError(
                f"The kernel ends while {self._product_name(self._products[0].warpgroup)} is on "
                "its way.",
                hint="Wait for every product.",
            )
        self._block.stores += self._stores
        self._block.leave(int(self.everyone.sum()))

    # --- bulk copies -----------------------------------------------------------------------------

    def tensor_map(self, handle: int) -> TensorMap:
        found = self._block.grid.maps.get(handle)
        assert found is not None, f"there is no tensor map at address {handle:#x}"
        return found

    def load_box(self, lane: int, box: Box, shared: int, barrier: int, mask: int | None) -> None:
        blocks = self._block.cluster.blocks
        thread = self._threads[[lane]]
        targets = []
        for block in [self._block] if mask is None else self._masked_blocks(mask):
            block, _ = self._block.find(block.rank + 1 << CLUSTER_SHIFT)
            found = block.barriers.find(barrier, thread, "copies to")
            targets.append(Target(block, box.chunks(shared), found))
        load = Load(box, targets, self._span)
        load.start(int(thread[0]), self._block.memory, self._block.watch)
        blocks[0].cluster.loads.append(load)

    def _masked_blocks(self, mask: int) -> list[Block]:
        blocks = self._block.cluster.blocks
        assert 0 < mask < 1 << len(blocks), f"mask {mask:#x} for {len(blocks)} blocks"
        return [block for block in blocks if mask >> block.rank & 1]

    def store_box(self, lane: int, box: Box, shared: int, add: bool) -> None:
        block, thread = self._block, int(self._threads[lane])
        if min(box.start) < 0:  # not in the PTX ISA: measured on an H100
            raise SimulationError(
                f"A bulk store begins at {box.start}, before its tensor: a GPU would stop with an "
                "illegal instruction.",
            )
        store = Store(box, box.chunks(shared), thread, int(self._store_groups[lane]), add)
        store.start(block.shared, block.history(), block.memory, block.watch)
        self._stores.append(store)

    def commit_stores(self) -> None:
        self._store_groups = self._store_groups + self.active

    def wait_stores(self, pending: int, read: bool) -> None:
        block, first = self._block, int(self._threads[0])
        left = []
        for store in self._stores:
            lane = store.thread - first
            is_done = store.group < self._store_groups[lane] - pending
            if is_done and self.active[lane]:
                store.read(block.shared, block.history(), block.watch.order)
                if not read:
                    store.write(block.memory, block.watch)
                    continue
            left.append(store)
        self._stores = left

    def fence_async(self) -> None:
        order = self._block.watch.order
        if order is None:
            return
        time = order.tick()
        for block in self._block.cluster.blocks:
            history = None if block.has_ended else block.history()
            if history is not None:
                history.fence(self._threads[self.active], time)

    # --- matrix products -------------------------------------------------------------------------

    def _product_name(self, warpgroup: int) -> str:
        first = self.thread[WARPGROUP * warpgroup]
        name = f"a matrix product of threads {first} to {first + WARPGROUP - 1}"
        is_alone = len(self._block.cluster.blocks) == 1
        return name if is_alone else f"{name} of block {self._block.rank} of the cluster"

    def _threads_of(self, warpgroup: int) -> Array:
        return self._threads[WARPGROUP * warpgroup : WARPGROUP * (warpgroup + 1)]

    def start_product(self, warpgroup: int, reads: Array, finish: Callable[[Array], None]) -> None:
        self._block.shared.check(reads, CHUNK, "reads")
        held = np.unique(reads) - SHARED_BASE
        history = self._block.history()
        if history is not None:
            name = self._product_name(warpgroup)
            history.hold(self._threads_of(warpgroup), name, held, CHUNK)
        group = int(self._product_groups[warpgroup])
        self._products.append(_Product(warpgroup, group, reads, held, finish))

    def commit_products(self) -> None:
        self._product_groups = self._product_groups + self.active[::WARPGROUP]

    def wait_products(self, pending: int) -> None:
        left = []
        for product in self._products:
            number = product.warpgroup
            is_done = product.group < self._product_groups[number] - pending
            if is_done and self.active[WARPGROUP * number]:
                self._finish(product)
            else:
                left.append(product)
        self._products = left

    def _finish(self, product: _Product) -> None:
        """Shared memory is read now; any of the warpgroup's threads may tell others so."""
        content = np.ascontiguousarray(self._block.shared.read(product.reads, CHUNK))
        history, order = self._block.history(), self._block.watch.order
        if history is not None and order is not None:
            agents = self._block.warpgroup_agents
            number = int(self.thread[WARPGROUP * product.warpgroup]) // WARPGROUP
            if number not in agents:
                name = self._product_name(product.warpgroup)
                agents[number] = order.new_agent(name, reads=True)
            time = order.tick()
            history.release_hold(agents[number], product.held, CHUNK, time)
            threads = self._threads_of(product.warpgroup)
            order.acquire(threads, order.told(agents[number], time))
        product.finish(content.view(np.uint8).reshape(-1, CHUNK))

    # --- the cluster and the grid ----------------------------------------------------------------

    def cluster_rank(self) -> int:
        return self._block.rank

    def cluster_index(self) -> int:
        return self._block.cluster.index

    def grid_blocks(self) -> int:
        return self._block.grid.blocks[0]

    def map_shared(self, address: Array, rank: Array) -> Array:
        rank, count = np.broadcast_to(rank, address.shape), len(self._block.cluster.blocks)
        wrong = rank[self.active & (rank >= count)]
        if len(wrong):
            raise SimulationError(
                f"The kernel asks for block {wrong[0]} of a cluster of {count} blocks."
            )
        mapped: Array = address + (rank + 1 << CLUSTER_SHIFT)
        return mapped.astype(np.uint32)

    def mbarrier_fence(self) -> None:
        known = self._block.cluster.barrier.next_known()
        self._block.barriers.publish(self._threads[self.active], known)

    def cluster_arrive(self, releases: bool) -> None:
        self._block.cluster.barrier.arrive(self._threads[self.active], releases)

    def cluster_wait(self) -> None:
        barrier = self._block.cluster.barrier
        barrier.wait(self._group, self._threads[self.active], self._span)
        self._block.mark(self._span)
