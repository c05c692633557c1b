"""Synchronisation that users write: `T.sync_threads` and barriers from `T.alloc_barrier`.

Knows the arguments and their checks. Does not know how threads wait.
"""

from __future__ import annotations

from typing import Any

from tilejit.dtypes import int32
from tilejit.errors import ArgumentError, ArgumentTypeError, caller_span
from tilejit.ir.analysis import interval
from tilejit.ir.expr import Expr, cast, int_value, show
from tilejit.ir.sync import BarrierArrive, BarrierExpect, BarrierWait, SyncThreads
from tilejit.language.extents import is_integer
from tilejit.language.handle import as_barrier
from tilejit.language.trace import FrameKind, Trace
from tilejit.language.value import as_expr
from tilejit.language.where import tile_op

LAST_BARRIER = 15  # of the hardware barriers of a block (PTX ISA, "bar, barrier")
MOST_BYTES = 2**20 - 1  # that a phase waits for (PTX ISA, "mbarrier: tx-count")


def sync_threads(barrier_id: Any = None, arrive_count: Any = None) -> None:
    """All of the block's threads meet, in a `T.ws` body all threads of its warpgroups; what they
    wrote before, all see after.

    Needed only for what the compiler cannot see; it inserts its own between tile ops.

    Args:
        barrier_id: a hardware barrier, 1 to 15, at which those meet who name it; an integer, or a
            traced one that is equal in a warp (PTX ISA, "bar.sync"). The compiler's own barriers
            are others.
        arrive_count: how many threads come there, those of `T.named_barrier_arrive` counted: a
            multiple of 32. All threads of the block or `T.ws` body when left out.

    Raises:
        ArgumentError, ArgumentTypeError: a barrier or count that cannot be, or a count alone.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    what = "T.sync_threads"
    trace = tile_op(what)
    if barrier_id is None:
        if arrive_count is not None:
            raise ArgumentError(
                f"{what}: a number of threads needs a barrier of their own.",
                hint=f"Write {what}(1, {arrive_count}).",
            )
        trace.add(SyncThreads(span=caller_span()))
        return
    if arrive_count is None:
        arrive_count = _executing_threads(trace)
    _named(what, trace, barrier_id, arrive_count, is_arrival=False)


def named_barrier_arrive(barrier_id: Any, thread_count: Any) -> None:
    """Each thread that gets here comes to a hardware barrier and goes on: those who
    `T.sync_threads` there see what it has written (PTX ISA, "bar.arrive").

    Args:
        barrier_id: 1 to 15; an integer, or a traced one that is equal in a warp.
        thread_count: how many threads come there, those who wait counted: a multiple of 32.

    Raises:
        ArgumentError, ArgumentTypeError: a barrier or count that cannot be.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    what = "T.named_barrier_arrive"
    _named(what, tile_op(what), barrier_id, thread_count, is_arrival=True)


def _executing_threads(trace: Trace) -> int:
    frame = trace.enclosing(FrameKind.ROLE)
    return trace.num_threads if frame is None else frame.threads


def _named(what: str, trace: Trace, number: Any, count: Any, is_arrival: bool) -> None:
    which = as_expr(number, int32, f"barrier of {what}")
    if not which.dtype.is_integer:
        raise ArgumentTypeError(f"{what}: the barrier is a {which.dtype}, not an integer.")
    bounds = interval(which)
    low = bounds.low if int_value(which) is None else int_value(which)
    high = bounds.high if int_value(which) is None else int_value(which)
    if (low is not None and low > LAST_BARRIER) or (high is not None and high < 1):
        raise ArgumentError(
            f"{what}: there is no barrier {show(which)}.",
            hint=f"1 to {LAST_BARRIER}; number 0 is that of all threads: T.sync_threads().",
        )
    if int_value(which) is None and (low is None or high is None or high - low >= LAST_BARRIER):
        raise ArgumentError(
            f"{what}: which barrier `{show(which)}` is cannot be seen.",
            hint="Compute it from the thread's index or a loop of constant bounds.",
        )
    if not is_integer(count):
        raise ArgumentTypeError(
            f"{what}: the number of threads is {count!r}; it is an integer known while tracing."
        )
    if not 32 <= count <= trace.num_threads or count % 32:
        raise ArgumentError(
            f"{what}: {count} threads; it takes whole warps, up to the block's "
            f"{trace.num_threads} threads.",
        )
    trace.is_free = False
    trace.add(
        SyncThreads(
            number=cast(which, int32),
            threads=int(count),
            is_arrival=is_arrival,
            span=caller_span(),
        )
    )


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
    """Each thread that gets here arrives once on a barrier (PTX ISA, "mbarrier.arrive").

    Args:
        mbar: what `T.alloc_barrier(count)` gave, or `mbars[k]` of several.
        cta_id: rank in the cluster of the block whose barrier is meant; an integer or a traced
            one, which may differ between threads. It says that the thread has done with what it
            read, and makes nothing that it wrote visible to that block.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
        ArgumentTypeError: no barrier, or a rank that is no integer.
        ArgumentError: a rank that the cluster has not.
    """
    what = "T.mbarrier_arrive"
    if cta_id is None:
        _arrive(what, mbar)
        return
    trace = tile_op(what)
    rank = as_expr(cta_id, int32, f"cta_id of {what}")
    if not rank.dtype.is_integer:
        raise ArgumentTypeError(f"{what}: cta_id is a {rank.dtype}, not an integer.")
    x, y, z = trace.cluster
    value = int_value(rank)
    if value is not None and not 0 <= value < x * y * z:
        raise ArgumentError(
            f"{what}: there is no block {value} in a cluster of {x * y * z}.",
            related=[(trace.span, "the kernel")],
            hint="Ranks are 0 and up; T.Kernel(..., cluster=2) makes clusters of two.",
        )
    _arrive(what, mbar, cast(rank, int32))


def _arrive(what: str, mbar: Any, cta: Expr | None = None) -> None:
    trace = tile_op(what)
    barrier = as_barrier(mbar, f"barrier of {what}")
    span = caller_span()
    trace.add(BarrierArrive(barrier=barrier.buffer, slot=barrier.slot, cta=cta, span=span))


def mbarrier_expect_tx(mbar: Any, tx: Any) -> None:
    """Each thread that gets here announces `tx` more bytes that the barrier's phase waits for
    (PTX ISA, "mbarrier.expect_tx"). `T.tma_copy` announces its own. Needs sm_90 or newer.

    Args:
        mbar: what `T.alloc_barrier(count)` gave, or `mbars[k]` of several.
        tx: bytes, 1 to 1048575, known while tracing.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
        ArgumentError, ArgumentTypeError: no barrier, or another number.
    """
    _expect("T.mbarrier_expect_tx", mbar, tx, arrives=False)


def mbarrier_arrive_expect_tx(mbar: Any, tx: Any) -> None:
    """The same, and then each thread arrives (PTX ISA, "mbarrier.arrive.expect_tx")."""
    _expect("T.mbarrier_arrive_expect_tx", mbar, tx, arrives=True)


def _expect(what: str, mbar: Any, tx: Any, arrives: bool) -> None:
    trace = tile_op(what)
    barrier = as_barrier(mbar, f"barrier of {what}")
    if not is_integer(tx):
        raise ArgumentTypeError(
            f"{what}: the number of bytes is {tx!r}; it is an integer known while tracing."
        )
    if not 0 < tx <= MOST_BYTES:
        raise ArgumentError(f"{what}: {tx} bytes; a phase waits for 1 to {MOST_BYTES}.")
    trace.add(
        BarrierExpect(
            barrier=barrier.buffer,
            slot=barrier.slot,
            bytes=int(tx),
            arrives=arrives,
            span=caller_span(),
        )
    )


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
