"""Chooses what the user left open of a kernel as a whole: threads of a block, and blocks that share
a loop's iterations.

Knows which choices there are and asks `cost` for each. Does not know how a choice is carried out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from tilejit.errors import ArgumentError, TileError
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import For, walk
from tilejit.ops.gemm import Gemm
from tilejit.passes.cost import Estimate, Plan, holds_fragments, plan
from tilejit.passes.select import Selection
from tilejit.passes.shared_out import divides, share_out, why_whole
from tilejit.passes.split import Splittable, split_loop, splittable
from tilejit.target import Target

FREE_THREADS = (128, 256, 384)  # whole warpgroups; a fourth one brings tiles
MOST_PARTS = 16
FEWEST_TRIPS = 4  # iterations that are left of a loop that is split
WORTH = 0.95  # of the time without it: what a split must save
MOST_SUM_REGISTERS = 128  # of a thread: it adds up sums of blocks while it holds its own
MOST_SUM_BYTES = 64 << 20  # of memory that the runtime keeps for a kernel


@dataclass(frozen=True)
class Schedule:
    """threads: of a block along x. parts: blocks that share each tile's iterations; is_shared_out:
    and what follows them."""

    threads: int
    parts: int
    estimate: Estimate
    is_shared_out: bool = False

    @property
    def weight(self) -> float:
        """The seconds by which it is compared: a split has to be worth more than it seems."""
        return self.estimate.seconds / (WORTH if self.parts > 1 else 1)


def choose_schedule(kernel: Kernel, target: Target) -> Kernel:
    """The kernel with its threads and parts decided.

    Raises:
        ArgumentError: a split by hand of a loop that does not allow it.
    """
    if not kernel.is_free and _asked_parts(kernel, splittable(kernel)) == 1:
        return kernel
    found = best_schedule(kernel, target)
    if isinstance(found, str):  # a later pass says what is wrong
        return replace(kernel, is_free=False)
    return apply(kernel, found, target)


def apply(kernel: Kernel, chosen: Schedule, target: Target) -> Kernel:
    """The kernel under a schedule."""
    if kernel.is_free:
        kernel = replace(kernel, threads=(chosen.threads, 1, 1), is_free=False)
    if chosen.parts == 1:
        return kernel
    if chosen.is_shared_out:
        return share_out(kernel, chosen.parts)
    found = splittable(kernel)
    assert isinstance(found, Splittable), "a split has a loop"
    why = why_whole(kernel, found, target)
    if not why and not divides(found, chosen.parts):
        why = f"{chosen.parts} blocks cannot share out the columns"
    return split_loop(kernel, chosen.parts, why)


def best_schedule(kernel: Kernel, target: Target) -> Schedule | str:
    """The schedule that is estimated to be fastest; why there is none, where nothing fits."""
    split = _Split(kernel, target)
    try:
        selection = Selection(replace(kernel, is_free=False), target)
    except TileError as error:
        if not kernel.is_free:
            raise
        return error.headline
    choices = _thread_choices(kernel)
    best: Schedule | None = None
    for threads in choices:
        if kernel.is_free and not holds_fragments(kernel, threads[0]):
            continue
        weighed = _planned(selection, threads, kernel.is_free)
        if isinstance(weighed, str):
            continue
        for parts, is_shared_out in split.choices(math.prod(threads), weighed):
            estimate = weighed.estimate(parts, is_shared_out)
            found = Schedule(threads[0], parts, estimate, is_shared_out)
            if best is None or found.weight < best.weight:
                best = found
    if best is not None:
        return best
    why = _planned(selection, choices[0], kernel.is_free)
    assert isinstance(why, str), "it was planned before"
    return why


def _planned(selection: Selection, threads: tuple[int, int, int], is_free: bool) -> Plan | str:
    """What the kernel costs with so many threads; why not."""
    try:
        return plan(selection.of(threads))
    except TileError as error:
        if not is_free:
            raise
        return error.headline


def _thread_choices(kernel: Kernel) -> list[tuple[int, int, int]]:
    """Threads to try."""
    if not kernel.is_free or not any(isinstance(n, Gemm) for n in walk(kernel.body)):
        return [kernel.threads]
    return [(threads, 1, 1) for threads in FREE_THREADS]


def _asked_parts(kernel: Kernel, found: Splittable | str) -> int | None:
    """Blocks a tile: 1 where a loop cannot or need not be split, None where that is open.

    Raises:
        ArgumentError: a split by hand of a loop that does not allow it.
    """
    loops = [n for n in walk(kernel.body) if isinstance(n, For)]
    asked = next((n for n in loops if n.parts is not None and n.parts > 1), None)
    if asked is not None:
        if isinstance(found, str) or found.loop is not asked:
            why = found if isinstance(found, str) else "another loop is the one that multiplies"
            raise ArgumentError(
                f"T.Pipelined: the iterations cannot be split among blocks: {why}.",
                span=asked.span,
                hint="Split a loop that only copies tiles and multiplies them, after T.clear.",
            )
        return asked.parts
    if isinstance(found, str) or found.loop.parts == 1 or found.loop.num_stages is not None:
        return 1
    return None


class _Split:
    """Into how many blocks a tile's loop may be split, whatever the block's threads.

    Raises:
        ArgumentError: a split by hand of a loop that does not allow it.
    """

    def __init__(self, kernel: Kernel, target: Target) -> None:
        self.kernel = kernel
        self.target = target
        self.found = splittable(kernel)
        self.asked = _asked_parts(kernel, self.found)

    @cached_property
    def _is_divided(self) -> bool:
        """Whether blocks can share out what follows the loop."""
        assert isinstance(self.found, Splittable), "a split has a loop"
        return not why_whole(self.kernel, self.found, self.target)

    def choices(self, threads: int, weighed: Plan) -> list[tuple[int, bool]]:
        """Blocks a tile, and whether they share out what follows, that may be fastest; where so
        many are asked for, the ways to have them."""
        found, asked = self.found, self.asked
        if asked == 1:
            return [(1, False)]
        assert isinstance(found, Splittable), "a split has a loop"
        can_share_out = weighed.has_room and self._is_divided
        if asked is not None:
            ways = [(asked, False)]
            return [*ways, (asked, True)] if can_share_out and divides(found, asked) else ways
        if found.trips is None:
            return [(1, False)]
        most = min(MOST_PARTS, found.trips // FEWEST_TRIPS)
        choices = [(n, True) for n in range(2, most + 1) if can_share_out and divides(found, n)]
        most = min(most, int(MOST_SUM_BYTES // max(1, weighed.sum_bytes * found.tiles)))
        if weighed.sum_bytes / 4 > MOST_SUM_REGISTERS * threads:
            most = 1
        return [(1, False), *choices, *((n, False) for n in range(2, most + 1))]
