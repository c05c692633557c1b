"""Synchronisation that users write: `T.sync_threads` and barriers from `T.alloc_barrier`.

Knows the arguments and their checks. Does not know how threads wait.
"""

from __future__ import annotations

from typing import Any

from tilejit.dtypes import int32
from tilejit.errors import ArgumentError, ArgumentTypeError, UnsupportedError, caller_span
from tilejit.ir.expr import cast, int_value
from tilejit.ir.sync import BarrierArrive, BarrierWait, SyncThreads
from tilejit.language.handle import as_barrier
from tilejit.language.value import as_expr
from tilejit.language.where import tile_op


def sync_threads(barrier_id: Any = None, arrive_count: Any = None) -> None:
    """All of the block's threads meet; what they wrote before, all see after.

    Needed only for what the compiler cannot see; it inserts its own between tile ops.

    Raises:
        UnsupportedError: arguments are given (named barriers).
        TraceError: outside a kernel, or inside T.Parallel.
    """
    trace = tile_op("T.sync_threads")
    if barrier_id is not None or arrive_count is not None:
        raise UnsupportedError(
            "T.sync_threads takes no barrier number or count: all threads meet.",
            hint="Use T.alloc_barrier for a part of the threads.",
        )
    trace.add(SyncThreads(span=caller_span()))


def barrier_arrive(mbar: Any) -> None:
    """Each thread that gets here arrives once on a barrier.

    Args:
        mbar: what `T.alloc_barrier(count)` gave, or `mbars[k]` of several.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
        ArgumentTypeError: no barrier.
    """
    _arrive("T.barrier_arrive", mbar)


def mbarrier_arrive(mbar: Any, cta_id: Any = None) -> None:
    """The same as `barrier_arrive`; `cta_id` is None (no clusters)."""
    if cta_id is not None:
        raise UnsupportedError(
            f"T.mbarrier_arrive: cta_id={cta_id!r} is not supported.", hint="Leave cta_id out."
        )
    _arrive("T.mbarrier_arrive", mbar)


def _arrive(what: str, mbar: Any) -> None:
    trace = tile_op(what)
    barrier = as_barrier(mbar, f"barrier of {what}")
    trace.add(BarrierArrive(barrier=barrier.buffer, slot=barrier.slot, span=caller_span()))


def barrier_wait(mbar: Any, parity: Any) -> None:
    """Each thread that gets here waits until the barrier's phase of that parity has completed.

    Args:
        mbar: what `T.alloc_barrier(count)` gave, or `mbars[k]` of several.
        parity: 0 for the first phase, 1 for the second, and so on in turn; an integer or a traced
            one. Waiting for parity 1 on a fresh barrier does not block.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
        ArgumentTypeError: no barrier, or a parity that is no integer.
        ArgumentError: a constant parity other than 0 and 1.
    """
    _wait("T.barrier_wait", mbar, parity)


def mbarrier_wait_parity(mbar: Any, parity: Any) -> None:
    """The same as `barrier_wait`."""
    _wait("T.mbarrier_wait_parity", mbar, parity)


def _wait(what: str, mbar: Any, parity: Any) -> None:
    trace = tile_op(what)
    barrier = as_barrier(mbar, f"barrier of {what}")
    phase = as_expr(parity, int32, f"parity of {what}")
    if phase.dtype.is_float:
        raise ArgumentTypeError(f"{what}: the parity is a {phase.dtype}, not an integer.")
    value = int_value(phase)
    if value is not None and value not in (0, 1):
        raise ArgumentError(
            f"{what}: the parity is {value}; it is 0 or 1.",
            hint="Take the phase number modulo 2: `phase & 1`.",
        )
    trace.add(
        BarrierWait(
            barrier=barrier.buffer,
            slot=barrier.slot,
            parity=cast(phase, int32),
            span=caller_span(),
        )
    )
