"""How the parts of a program wait for each other in the reference executor: barriers that count,
threads that meet, blocks of a cluster.

Knows the nodes of synchronisation and turns. Does not know tiles, memory or control flow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilejit.errors import SimulationError
from tilejit.ir.buffer import Buffer
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Node, walk
from tilejit.ir.sync import (
    BarrierArrive,
    BarrierExpect,
    BarrierWait,
    Control,
    ControlOp,
    Elect,
    SyncThreads,
)
from tilejit.ops.cluster import ClusterExchange, meets_late
from tilejit.ops.scalar import Array
from tilejit.sim.reference_memory import holds_everywhere
from tilejit.sim.reference_state import BlockState, Phases
from tilejit.sim.reference_values import Value, is_lane_value
from tilejit.sim.strands import Strands

Place = tuple[int, int, int]


class Cluster:
    """Blocks that run side by side, one at a time: a single one without clusters.

    members: what executes each block, by its rank.
    is_come_first: all come to the cluster's barrier when they begin, and wait for that later.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.shape = kernel.cluster
        self.threads = kernel.num_threads * kernel.cluster_size
        exchanges = (n for n in walk(kernel.body) if isinstance(n, ClusterExchange))
        is_planned = any(n.barrier is not None for n in exchanges)
        self.is_come_first = is_planned and meets_late(kernel)
        self.strands = Strands()
        self.members: list[Any] = []

    def places(self, grid: Place) -> Iterator[list[Place]]:
        """The blocks of each cluster of a grid, by rank."""
        steps = [range(0, n, step) for n, step in zip(grid, self.shape, strict=True)]
        inner = [range(n) for n in self.shape]
        for z, y, x in itertools.product(*reversed(steps)):
            ranks = itertools.product(*reversed(inner))
            yield [(x + i, y + j, z + k) for k, j, i in ranks]

    def start(self) -> None:
        """Forget the blocks before."""
        self.meeting = Meeting(self.threads)
        self.exchanges: list[Exchange] = []
        for member in self.members:
            member.state.start_block()

    def leave(self, threads: int) -> None:
        """Threads have ended: nobody waits for them any more."""
        self.meeting.needed -= threads
        self.meeting.come(0)


@dataclass
class Exchange:
    """What the blocks of a cluster have left for each other at a node, by rank."""

    node: Node
    parts: dict[int, Array] = field(default_factory=dict)


@dataclass
class Meeting:
    """Where `needed` threads come together, again and again."""

    needed: int
    arrived: int = 0
    rounds: int = 0

    def come(self, count: int) -> None:
        self.arrived += count
        while self.arrived and self.arrived >= self.needed:
            self.arrived -= self.needed
            self.rounds += 1


class Meetings:
    """What an executor does about synchronisation."""

    def __init__(self, kernel: Kernel, state: BlockState, cluster: Cluster, rank: int) -> None:
        self.kernel = kernel
        self.state = state
        self.cluster = cluster
        self.rank = rank  # of the block in its cluster
        self.values = state.values
        self.variables = state.values.variables
        self.strands = cluster.strands
        self._come_in = 0  # the round of the cluster's barrier that was come to

    def come_first(self) -> None:
        """Come to the cluster's barrier where the kernel's beginning does."""
        self._come_in = 0
        if self.cluster.is_come_first:
            self.cluster.meeting.come(self.kernel.num_threads)

    # --- waiting ---------------------------------------------------------------------------------

    def wait_until(self, ready: Callable[[], bool]) -> bool:
        """Let others run until `ready` holds; False when it never will."""
        mask, span = self.state.mask, self.values.span
        result = self.strands.wait_until(ready)
        self.state.mask, self.values.span = mask, span
        return result

    def run_beside(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run parts of the same threads' program that wait for each other."""
        mask = self.state.mask
        self.strands.run(parts)
        self.state.mask = mask

    def need_all_threads(self, what: str) -> None:
        """What the executing threads do together must not stand where only some come."""
        if not holds_everywhere(self.state.mask):
            raise SimulationError(
                f"{what} is reached by some threads of the block only.",
                span=self.values.span,
                hint="Move it out of the condition or loop that differs between threads.",
            )

    def run_nothing(self, node: Node) -> None:
        """Asynchronous work has completed already, and a multiply reads its operands itself."""

    def _active(self) -> Any:
        """Which of the threads execute."""
        mask = True if self.state.mask is None else self.state.mask
        return np.broadcast_to(mask, (self.kernel.num_threads,))

    def _counts(self, value: Value) -> dict[int, int]:
        """How many executing threads have each value."""
        active = self._active()
        chosen = np.broadcast_to(value, active.shape)[active]
        numbers, counts = np.unique(chosen, return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    def run_elect(self, node: Elect) -> None:
        thread = self.variables[self.kernel.thread_vars[0]] if self.kernel.thread_vars else None
        numbers = np.arange(self.kernel.num_threads) if thread is None else thread
        self.variables[node.out] = numbers % node.each == 0

    # --- threads that meet -----------------------------------------------------------------------

    def run_sync(self, node: SyncThreads) -> None:
        if node.number is None:
            self.need_all_threads("T.sync_threads")
            return
        awaited: list[tuple[int, Meeting, int]] = []
        for number, count in self._counts(self.values.whole(node.number)).items():
            if not 1 <= number <= 15:
                raise SimulationError(f"There is no barrier {number}.", span=node.span)
            meeting = self.state.meetings.setdefault(number, Meeting(node.threads))
            meeting.needed = node.threads
            awaited.append((number, meeting, meeting.rounds))
            meeting.come(count)
        if node.is_arrival:
            return
        for number, meeting, rounds in awaited:
            if not self.wait_until(lambda m=meeting, r=rounds: m.rounds > r):  # type: ignore[misc]
                raise SimulationError(
                    f"Waiting at barrier {number} would wait for ever.",
                    span=node.span,
                    notes=[f"{meeting.arrived} of {meeting.needed} threads have come."],
                    hint="Let as many threads come to T.sync_threads or T.named_barrier_arrive as "
                    "they say.",
                )

    # --- barriers that count ---------------------------------------------------------------------

    def phases(self, barrier: Buffer, state: BlockState | None = None) -> list[Phases]:
        root = barrier.root
        found = (state or self.state).barriers
        if root not in found:
            found[root] = [Phases(count) for count in root.arrive_counts]
        return found[root]

    def run_arrive(self, node: BarrierArrive) -> None:
        slots = self.values.whole(node.slot)
        ranks = -1 if node.cta is None else self.values.whole(node.cta)
        pairs = np.asarray(slots, np.int64) * 32 + np.asarray(ranks, np.int64) + 1
        for pair, count in self._counts(pairs).items():
            slot, rank = divmod(pair, 32)
            state = None
            if rank:
                self._check_rank(rank - 1)
                state = self.cluster.members[rank - 1].state
            self.check_slots(node.barrier, slot)
            self.phases(node.barrier, state)[slot].arrive(count)

    def _check_rank(self, rank: int) -> None:
        blocks = len(self.cluster.members)
        if rank >= blocks:
            raise SimulationError(
                f"There is no block {rank} in a cluster of {blocks}.", span=self.values.span
            )

    def run_expect(self, node: BarrierExpect) -> None:
        for slot, count in self._counts(self.values.whole(node.slot)).items():
            self.check_slots(node.barrier, slot)
            phases = self.phases(node.barrier)[slot]
            phases.bytes += node.bytes * count
            if node.arrives:
                phases.arrive(count)

    def run_wait(self, node: BarrierWait) -> None:
        slots, parities = self.values.whole(node.slot), self.values.whole(node.parity)
        if not is_lane_value(slots) and not is_lane_value(parities):
            pairs = {(int(slots), int(parities) & 1)}
        else:
            wide = np.broadcast_arrays(slots, parities & 1, self._active())
            chosen = np.asarray(wide[2], np.bool_)
            pairs = set(zip(wide[0][chosen].tolist(), wide[1][chosen].tolist(), strict=True))
        for slot, parity in sorted(pairs):
            self.check_slots(node.barrier, slot)
            phases = self.phases(node.barrier)[slot]
            if not self.wait_until(lambda p=phases, q=parity: p.count % 2 != q):  # type: ignore[misc]
                missing = f" and still expects {phases.bytes} bytes" if phases.bytes else ""
                raise SimulationError(
                    f"Waiting on `{node.barrier.name}[{slot}]` for the phase of parity {parity} "
                    "would wait for ever.",
                    span=node.span,
                    notes=[
                        f"Phase {phases.count} has {phases.arrivals} of {phases.needed} "
                        f"arrivals{missing}."
                    ],
                    hint="A phase completes when as many threads have arrived as alloc_barrier "
                    "was told.",
                )

    def check_slots(self, barrier: Buffer, slots: Value) -> None:
        count = len(barrier.root.arrive_counts)
        for slot in self._counts(slots) if is_lane_value(slots) else (int(slots),):
            if not 0 <= slot < count:
                raise SimulationError(
                    f"`{barrier.name}[{slot}]` does not exist: there are {count} barriers.",
                    span=self.values.span,
                )

    # --- clusters --------------------------------------------------------------------------------

    def run_control(self, node: Control) -> None:
        """Fences and registers mean nothing here."""
        if node.op in (ControlOp.CLUSTER_ARRIVE, ControlOp.CLUSTER_ARRIVE_RELAXED):
            self.need_all_threads("T.cluster_arrive")
            self._come_in = self.cluster.meeting.rounds
            self.cluster.meeting.come(self.kernel.num_threads)
        elif node.op is ControlOp.CLUSTER_WAIT:
            meeting = self.cluster.meeting
            if not self.wait_until(lambda: meeting.rounds > self._come_in):
                raise SimulationError(
                    "Waiting for the blocks of the cluster would wait for ever.",
                    span=node.span,
                    notes=[f"{meeting.arrived} of {meeting.needed} threads have come."],
                    hint="Let all threads of all blocks come to the cluster's barrier.",
                )

    def exchange(self, node: ClusterExchange, own: Array) -> list[Array]:
        """What each block of the cluster has at the node, once all have come there."""
        rank = self.rank
        exchanges = self.cluster.exchanges
        mine = next((e for e in exchanges if rank not in e.parts), None)
        if mine is None:
            mine = Exchange(node)
            exchanges.append(mine)
        blocks = len(self.cluster.members)
        if mine.node is node:
            mine.parts[rank] = own
        if mine.node is not node or not self.wait_until(lambda: len(mine.parts) == blocks):
            raise SimulationError(
                f"The blocks of the cluster do not come to {node.call} together.",
                span=node.span,
                notes=[f"{len(mine.parts)} of {blocks} blocks have come."],
                hint="Let all blocks of a cluster come to it equally often.",
            )
        return [mine.parts[r] for r in range(blocks)]
