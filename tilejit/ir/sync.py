"""Nodes of synchronisation: threads that meet, barriers that count, waiting for asynchronous work.

Knows what each orders. Does not know instructions or who needs the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Expr, Var
from tilejit.ir.node import Node


@dataclass(frozen=True, eq=False, kw_only=True)
class SyncThreads(Node):
    """The executing role's threads meet (all user threads where there are no roles); their shared
    and global writes are visible after.

    Inserted by the sync pass where a hazard needs it, or written as `T.sync_threads()`.

    number, threads: a hardware barrier other than the role's own, 1 to 15, and how many threads
        meet there; number may differ between warps.
    is_arrival: the thread only says that it has come, and goes on (PTX ISA, bar.arrive).
    """

    inserted: bool = False
    number: Expr | None = None
    threads: int = 0
    is_arrival: bool = False

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return () if self.number is None else (self.number,)


@dataclass(frozen=True, slots=True)
class BarrierSlot:
    """One of the barriers of `T.alloc_barrier`."""

    buffer: Buffer
    slot: Expr


@dataclass(frozen=True, eq=False, kw_only=True)
class BarrierArrive(Node):
    """Every executing thread arrives once on `barrier[slot]` (PTX ISA, mbarrier.arrive).

    cta: rank in the cluster of the block whose barrier is meant; None for the thread's own.
    """

    barrier: Buffer
    slot: Expr
    cta: Expr | None = None

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.barrier,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (self.slot,) if self.cta is None else (self.slot, self.cta)


@dataclass(frozen=True, eq=False, kw_only=True)
class BarrierExpect(Node):
    """The phase of `barrier[slot]` completes no sooner than `bytes` more bytes have been copied on
    its account (PTX ISA, mbarrier.expect_tx).

    arrives: every executing thread arrives too, as by `BarrierArrive`.
    """

    barrier: Buffer
    slot: Expr
    bytes: int
    arrives: bool = False

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.barrier,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (self.slot,)


@dataclass(frozen=True, eq=False, kw_only=True)
class BarrierWait(Node):
    """Every executing thread waits until the phase of parity `parity` has completed
    (PTX ISA, mbarrier.try_wait.parity)."""

    barrier: Buffer
    slot: Expr
    parity: Expr

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.barrier,)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.barrier,)  # orders memory accesses around it

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return self.slot, self.parity


@dataclass(frozen=True, eq=False, kw_only=True)
class AsyncCommit(Node):
    """Close the group of the asynchronous copies issued since the last commit
    (PTX ISA, cp.async.commit_group)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AsyncWait(Node):
    """Wait until at most `pending` of the thread's newest copy groups are unfinished
    (PTX ISA, cp.async.wait_group). Other threads' copies need a SyncThreads after it."""

    pending: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Elect(Node):
    """`out` is true in one of every `each` threads of the block, in their first warp; all threads
    of a warp come there together (PTX ISA, elect.sync)."""

    out: Var
    each: int

    @property
    def defines(self) -> tuple[Var, ...]:
        return (self.out,)

    @property
    def has_effect(self) -> bool:
        return False


class ControlOp(StrEnum):
    """Instructions without operands in memory that order or prepare others."""

    FENCE_ASYNC = "fence_proxy_async"  # the thread's writes come before asynchronous reads
    FENCE_BARRIERS = "fence_barrier_init"  # barriers made are known to the cluster
    FENCE_DEVICE = "fence_device"  # the thread's accesses are ordered for the whole device
    STORE_COMMIT = "tma_store_arrive"  # close a group of bulk stores
    STORE_WAIT = "tma_store_wait"  # at most `count` groups are unfinished
    STORE_WAIT_READ = "tma_store_wait_read"  # at most `count` still read shared memory
    REGISTERS_UP = "inc_max_nreg"
    REGISTERS_DOWN = "dec_max_nreg"
    CLUSTER_ARRIVE = "cluster_arrive"
    CLUSTER_ARRIVE_RELAXED = "cluster_arrive_relaxed"
    CLUSTER_WAIT = "cluster_wait"
    DEPENDENCY_WAIT = "pdl_sync"  # kernels before this one have ended (griddepcontrol.wait)
    DEPENDENCY_LAUNCH = "pdl_trigger"  # the kernel after this one may start


@dataclass(frozen=True, eq=False, kw_only=True)
class Control(Node):
    """One instruction of `ControlOp`, by every executing thread.

    count: registers, or groups that may be unfinished, where the instruction has such a number.
    """

    op: ControlOp
    count: int = 0
