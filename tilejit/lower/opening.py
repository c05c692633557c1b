"""How a block begins: its barriers are made, its tensor maps fetched, and its threads learn of it.

Knows who does which and what orders them. Does not know why a role may go on before the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilejit.dtypes import uint32
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Var, index
from tilejit.ir.kernel import Kernel, ParamKind
from tilejit.ir.node import Role, Roles, walk
from tilejit.isa import barrier as isa_barrier
from tilejit.isa import cluster as isa_cluster
from tilejit.isa import mbarrier as isa_mbarrier
from tilejit.isa import tma as isa_tma
from tilejit.isa.machine import Value
from tilejit.lower.hopper import KernelEmitter
from tilejit.ops.cluster import meets_late
from tilejit.ops.copy import Copy


@dataclass(frozen=True)
class Opening:
    """A call at the beginning: what it is named, the tensor maps that it takes, what it does."""

    name: str
    maps: tuple[Var, ...]
    emit: Callable[[KernelEmitter], None]


def of_block(kernel: Kernel, threads: int) -> Opening | None:
    """The first of the block's `threads` threads sets the counts of all barriers before any goes
    on; None where there are none, or a role makes them."""
    barriers = _barriers(kernel)
    if not barriers or any(isinstance(n, Roles) and n.opener is not None for n in kernel.body):
        return None
    maps = _maps(kernel)

    def emit(emitter: KernelEmitter) -> None:
        m = emitter.m
        first = emitter.inside_first_thread()
        _fetch(emitter, maps, first)  # while the barriers are made
        _make(emitter, barriers, first)
        if kernel.cluster_size > 1:
            m.issue(isa_mbarrier.FENCE_INIT)
            if not meets_late(kernel):
                m.issue(isa_cluster.CLUSTER_ARRIVE)
                m.issue(isa_cluster.CLUSTER_WAIT)
                return
            m.issue(isa_cluster.CLUSTER_ARRIVE_RELAXED)
            if not kernel.is_shared_out:
                return  # no barrier is used before the cluster has met
        else:
            m.issue(isa_mbarrier.FENCE_INIT if maps else isa_barrier.FENCE_BLOCK)
        m.issue(isa_barrier.bar_sync(isa_barrier.WHOLE_BLOCK, threads))

    return Opening("init_barriers", maps, emit)


def of_role(kernel: Kernel, roles: Roles, role: Role) -> Opening | None:
    """What a role does first: one thread of the opener makes the barriers, and its role only says
    that it has come; the others wait for that. None where the block has met.

    The thread that makes the barriers is the one that uses them: for its own copies its order and
    the fence, which tells the accelerator, are enough. For the others they are made before the
    role comes to the hardware barrier (PTX ISA, "bar": what threads did before they arrive is done
    for those who wait), for other blocks before it comes to the cluster's, where no thread but
    that one has anything to release.

    That thread fetches the maps of what the opener brings. The opener's second warp, which has
    nothing to do, fetches the others: a role that uses them would keep their addresses until then.
    """
    if roles.opener is None:
        return None
    threads = sum(r.threads for r in roles.roles)
    opener = roles.roles[roles.opener]
    if role is not opener:
        return Opening("await_barriers", (), lambda emitter: _come(emitter, roles.opening, threads))
    used = {n.tensor_map for n in walk(role.body) if isinstance(n, Copy)}
    maps = _maps(kernel)
    brought = tuple(v for v in maps if v in used)
    others = tuple(v for v in maps if v not in used)

    def make(emitter: KernelEmitter) -> None:
        _fetch(emitter, brought)
        _make(emitter, _barriers(kernel))
        emitter.m.issue(isa_mbarrier.FENCE_INIT)

    def emit(emitter: KernelEmitter) -> None:
        emitter.in_elected_thread(lambda: make(emitter))
        _come(emitter, roles.opening, threads, is_waiting=False)
        if others:
            emitter.in_warp(1, lambda: _fetch(emitter, others))

    return Opening("init_barriers", maps, emit)


def _come(emitter: KernelEmitter, barrier: int, threads: int, is_waiting: bool = True) -> None:
    """All threads of the executing role come to the cluster's barrier, for later, and to the
    hardware barrier where the block learns of its barriers."""
    if emitter.kernel.cluster_size > 1:
        emitter.m.issue(isa_cluster.CLUSTER_ARRIVE_RELAXED)
    come = isa_barrier.bar_sync if is_waiting else isa_barrier.bar_arrive
    emitter.m.issue(come(barrier, threads))


def _barriers(kernel: Kernel) -> tuple[Buffer, ...]:
    return tuple(b for b in kernel.scoped(Scope.BARRIER) if not b.is_view)


def _maps(kernel: Kernel) -> tuple[Var, ...]:
    return tuple(p.var for p in kernel.params if p.kind is ParamKind.TENSOR_MAP)


def _fetch(emitter: KernelEmitter, maps: tuple[Var, ...], when: Value | None = None) -> None:
    for var in maps:
        emitter.m.issue(isa_tma.PREFETCH_MAP, [emitter.value(var)], when)


def _make(emitter: KernelEmitter, barriers: tuple[Buffer, ...], when: Value | None = None) -> None:
    """Set the counts of all barriers."""
    for barrier in barriers:
        for number, count in enumerate(barrier.arrive_counts):
            point = emitter.single().points[0]
            where = emitter.barrier_address(barrier, index(number), point)
            emitter.m.issue(isa_mbarrier.INIT, [where, emitter.m.const(count, uint32)], when)
