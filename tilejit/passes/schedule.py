"""Chooses what the user left open of a kernel as a whole: threads of a block, and blocks that share
a loop's iterations.

Knows which choices there are and asks `cost` for each. Does not know how a choice is carried out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tilejit.errors import ArgumentError, TileError
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import For, walk
from tilejit.ops.gemm import Gemm
from tilejit.passes.cost import Estimate, Plan, plan
from tilejit.passes.select import select_atoms
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
    asked = _asked_parts(kernel)
    if not kernel.is_free and asked == 1:
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
    asked = _asked_parts(kernel)
    best: Schedule | None = None
    reasons: list[str] = []
    for threads in _thread_choices(kernel):
        tried = replace(kernel, threads=(threads, 1, 1), is_free=False) if threads else kernel
        try:
            weighed = plan(select_atoms(tried, target))
        except TileError as error:
            if not kernel.is_free:
                raise
            weighed = error.headline
        if isinstance(weighed, str):
            reasons.append(weighed)
            continue
        ways = [(1, False)] if asked is None or asked == 1 else []
        for parts, is_shared_out in (*ways, *_part_choices(tried, asked, weighed, target)):
            estimate = weighed.estimate(parts, is_shared_out)
            found = Schedule(tried.threads[0], parts, estimate, is_shared_out)
            if best is None or found.weight < best.weight:
                best = found
    return best if best is not None else reasons[0]


def _thread_choices(kernel: Kernel) -> tuple[int, ...]:
    """Threads to try; 0 for those that the user gave."""
    if not kernel.is_free:
        return (0,)
    if not any(isinstance(n, Gemm) for n in walk(kernel.body)):
        return (kernel.threads[0],)
    return FREE_THREADS


def _asked_parts(kernel: Kernel) -> int | None:
    """Blocks a tile: 1 where a loop cannot or need not be split, None where that is open.

    Raises:
        ArgumentError: a split by hand of a loop that does not allow it.
    """
    loops = [n for n in walk(kernel.body) if isinstance(n, For)]
    asked = next((n for n in loops if n.parts is not None and n.parts > 1), None)
    found = splittable(kernel)
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


def _part_choices(
    kernel: Kernel, asked: int | None, weighed: Plan, target: Target
) -> list[tuple[int, bool]]:
    """Blocks a tile, and whether they share out what follows, that may be faster than one; where
    so many are asked for, the ways to have them."""
    if asked == 1:
        return []
    found = splittable(kernel)
    assert isinstance(found, Splittable), "a split has a loop"
    can_share_out = weighed.has_room and not why_whole(kernel, found, target)
    if asked is not None:
        ways = [(asked, False)]
        return [*ways, (asked, True)] if can_share_out and divides(found, asked) else ways
    if found.trips is None:
        return []
    most = min(MOST_PARTS, found.trips // FEWEST_TRIPS)
    choices = [(n, True) for n in range(2, most + 1) if can_share_out and divides(found, n)]
    most = min(most, int(MOST_SUM_BYTES // max(1, weighed.sum_bytes * found.tiles)))
    if weighed.sum_bytes / 4 > MOST_SUM_REGISTERS * kernel.num_threads:
        most = 1
    return [*choices, *((n, False) for n in range(2, most + 1))]
