"""`T.tma_copy` and what goes with it: bulk copies that only start, and waiting for them.

Knows the arguments and their checks. Does not know boxes, tensor maps or who issues a copy.
"""

from __future__ import annotations

from typing import Any

from tilejit.errors import ArgumentError, ArgumentTypeError, ShapeError, caller_span
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.sync import BarrierSlot, Control, ControlOp
from tilejit.language.copy import check_eviction
from tilejit.language.extents import is_integer
from tilejit.language.gemm import refuse
from tilejit.language.handle import as_barrier
from tilejit.language.regions import as_side, match
from tilejit.language.trace import Trace
from tilejit.language.where import tile_op
from tilejit.ops.copy import Copy


def tma_copy(
    src: Any,
    dst: Any,
    *,
    barrier: Any = None,
    cluster_mask: Any = None,
    leader_scope_threads: Any = None,
    eviction_policy: str | None = None,
    annotations: Any = None,
) -> None:
    """Start a copy of a tile between global and shared memory by the tensor memory accelerator,
    and go on (PTX ISA, "cp.async.bulk.tensor").

    To shared memory: `barrier` is told how many bytes come, and then that they have come; nobody
    arrives there or waits. So `T.mbarrier_arrive(barrier)` by as many threads as its arrive count
    says follows, and `T.mbarrier_wait_parity` before the tile is read. What lies outside of the
    tensor becomes 0, and counts as bytes.

    To global memory: the copy is a group of its own (`T.tma_store_arrive` is not needed);
    `T.tma_store_wait` by the same thread waits for it. What threads have written to the tile they
    order before it by `T.fence_proxy_async()` and a barrier. What lies outside is not written.

    Issued once, by the first of the threads that get here: of all threads of the block or of the
    `T.ws` body, or of those that an `if` names, such as `if T.shuffle_elect(128):` or
    `if tx == 0:`. Where places in `src` or `dst` or the barrier depend on the thread, each thread
    that gets here issues its own.

    No barrier or fence is put in for a shared buffer that a T.tma_copy touches: they are yours.

    Args:
        src, dst: as for `T.copy`: one in global memory, a tensor argument with rows of a multiple
            of 16 bytes, in which the tile provably begins at such a multiple too; the other in
            shared memory; equal dtypes. Rows of the shared tile are whole and it begins at a
            multiple of 8 rows.
        barrier: one of `T.alloc_barrier`, for a copy to shared memory.
        cluster_mask: blocks of the cluster, bit r for rank r, that all start this copy with equal
            `src` and `dst` and each bring their share of it to all of them (multicast): each
            barrier is told all bytes. Blocks that are not in it bring all for themselves.
        leader_scope_threads, annotations: None.
        eviction_policy: "evict_first", "evict_last" or "evict_normal": how long the L2 cache
            keeps it.

    Raises:
        ShapeError: the extents differ, or nothing says them.
        ArgumentError, ArgumentTypeError: a barrier that is missing or too many, a mask that names
            blocks that the cluster has not, anything else about an argument.
        UnsupportedError: the accelerator cannot make the copy; says why.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    what = "T.tma_copy"
    trace = tile_op(what)
    refuse(
        what,
        leader_scope_threads=(leader_scope_threads, None),
        annotations=(annotations, None),
    )
    eviction = check_eviction(what, eviction_policy)
    source, target = as_side(src, what, "the source"), as_side(dst, what, "the destination")
    a, b = match(what, source, target)
    is_load = _direction(what, a.buffer, b.buffer)
    if a.shape != b.shape:
        raise ShapeError(f"{what}: the source repeats along extents of 1.", hint="Use T.copy.")
    slot = None
    if is_load:
        if barrier is None:
            raise ArgumentError(
                f"{what}: a copy to shared memory needs a barrier, which learns that it is there.",
                hint="full = T.alloc_barrier(1); T.tma_copy(..., barrier=full).",
            )
        found = as_barrier(barrier, f"barrier of {what}")
        slot = BarrierSlot(found.buffer, found.slot)
    elif barrier is not None:
        raise ArgumentError(
            f"{what}: a copy to global memory tells no barrier.",
            hint="Leave barrier out, and wait with T.tma_store_wait.",
        )
    mask = _mask(what, trace, cluster_mask, is_load)
    trace.add(
        Copy(
            src=a,
            dst=b,
            is_async=True,
            barrier=slot,
            cluster_mask=mask,
            eviction=eviction,
            span=caller_span(),
        )
    )


def _direction(what: str, source: Buffer, target: Buffer) -> bool:
    """True for a copy to shared memory."""
    scopes = (source.scope, target.scope)
    if scopes == (Scope.GLOBAL, Scope.SHARED):
        return True
    if scopes == (Scope.SHARED, Scope.GLOBAL):
        return False
    wrong = source if source.scope not in (Scope.GLOBAL, Scope.SHARED) else target
    if source.scope is target.scope:
        text = f"`{source.name}` and `{target.name}` are both in {source.scope.words}"
    else:
        text = f"`{wrong.name}` is in {wrong.scope.words}"
    raise ArgumentError(
        f"{what} copies between global and shared memory, but {text}.",
        related=[(wrong.span, f"{wrong.name} comes from here")],
        hint="T.copy copies between any two memories.",
    )


def _mask(what: str, trace: Trace, given: Any, is_load: bool) -> int | None:
    if given is None:
        return None
    if not is_integer(given):
        raise ArgumentTypeError(
            f"{what}: cluster_mask is {given!r}; it is an integer known while tracing.",
            hint="Where the mask differs between blocks, write each copy under its own `if`.",
        )
    mask, (x, y, z) = int(given), trace.cluster
    blocks = x * y * z
    if not is_load:
        raise ArgumentError(f"{what}: cluster_mask is for copies to shared memory.")
    if not 0 < mask < 1 << blocks:
        raise ArgumentError(
            f"{what}: cluster_mask is {mask:#b}, but the cluster has "
            f"{blocks} block{'s' if blocks > 1 else ''}.",
            related=[(trace.span, "the kernel")],
            hint="Bit r stands for the block of rank r: 0b11 for a cluster of two.",
        )
    return mask if mask.bit_count() > 1 else None


def tma_store_arrive() -> None:
    """Make a group of the bulk copies to global memory that the thread has started since the last
    one (PTX ISA, "cp.async.bulk.commit_group"). `T.tma_copy` does it for its own.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
    """
    tile_op("T.tma_store_arrive").add(Control(op=ControlOp.STORE_COMMIT, span=caller_span()))


def tma_store_wait(count: int = 0, read: bool = True) -> None:
    """Wait until at most `count` of the thread's newest groups of bulk copies to global memory are
    unfinished (PTX ISA, "cp.async.bulk.wait_group"). Threads that have started none go on at once.

    Args:
        count: 0 or more.
        read: wait only until they have read their tiles, which may then be overwritten; False
            waits until what they write is there.

    Raises:
        ArgumentError, ArgumentTypeError: a negative count, or no integer.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    what = "T.tma_store_wait"
    trace = tile_op(what)
    if not is_integer(count):
        raise ArgumentTypeError(f"{what}: count is {count!r}, not an integer.")
    if count < 0:
        raise ArgumentError(f"{what}: count must not be negative, got {count}.")
    op = ControlOp.STORE_WAIT_READ if read else ControlOp.STORE_WAIT
    trace.add(Control(op=op, count=int(count), span=caller_span()))


def fence_proxy_async() -> None:
    """What the thread has written to shared memory comes before what bulk copies and multiplies by
    warpgroups read later (PTX ISA, "fence.proxy.async"). A barrier then tells those who start
    them; before tile ops that start none the compiler puts it in.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
    """
    tile_op("T.fence_proxy_async").add(Control(op=ControlOp.FENCE_ASYNC, span=caller_span()))


def pdl_sync() -> None:
    """Wait until the kernels before this one in the stream have ended and what they wrote is there
    (PTX ISA, "griddepcontrol.wait"). A kernel that says this is launched before they end, so what
    it does before must not depend on them. Needs sm_90 or newer.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
    """
    tile_op("T.pdl_sync").add(Control(op=ControlOp.DEPENDENCY_WAIT, span=caller_span()))


def pdl_trigger() -> None:
    """The kernel after this one in the stream may be launched once all blocks have said so or
    ended, if it says `T.pdl_sync` (PTX ISA, "griddepcontrol.launch_dependents"). Needs sm_90 or
    newer.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
    """
    tile_op("T.pdl_trigger").add(Control(op=ControlOp.DEPENDENCY_LAUNCH, span=caller_span()))
