"""What passes tiles from a producer to consumers: slots of shared memory, with barriers that say
which are full and which are free again.

Knows one ring: whose turn a slot is, and who says that it is free. Does not know loops or roles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tilejit.dtypes import int32
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, binary, const, index
from tilejit.ir.node import If, Let, Load, Node, Store, all_reads
from tilejit.ir.sync import BarrierArrive
from tilejit.passes.bring import Feed
from tilejit.passes.registers import GROUP


@dataclass(eq=False)
class Channel:
    """What passes one feed from producer to consumers.

    fed, used: how often the producer has filled, and the consumers have left, a slot.
    is_deferred: a slot is left one iteration late, when its multiply is surely over.
    by_group: one thread of each warpgroup says for all that a slot is free.
    thread: the number of a consumer's thread. cluster: blocks that fill each other's slots.
    """

    feed: Feed
    slots: int
    slotted: dict[Buffer, Buffer]
    full: Buffer
    empty: Buffer
    fed: Buffer
    used: Buffer
    by_group: bool
    thread: Var
    cluster: int
    is_deferred: bool = False

    def is_read_by(self, node: Node) -> bool:
        return any(b.root in self.feed.buffers for b in all_reads(node))

    def turn(self, counter: Buffer, skipped: int = 0) -> tuple[list[Node], Var, Expr]:
        """The slot whose turn it is, or will be after so many turns, and the parity of how often it
        has been filled before."""
        loaded = Var(counter.name, int32, VarKind.VALUE, index(0))
        count = arith("add", loaded, skipped) if skipped else loaded
        if self.slots == 1:
            slot = Var(f"{counter.name}_slot", int32, VarKind.VALUE, index(0), index(0))
            which: Expr = const(0, int32)
            turn: Expr = count
        else:
            slot = Var(
                f"{counter.name}_slot", int32, VarKind.VALUE, index(0), index(self.slots - 1)
            )
            which = arith("floormod", count, self.slots)
            turn = arith("floordiv", count, self.slots)
        nodes: list[Node] = [
            Load(out=loaded, buffer=counter, index=(index(0),)),
            Let(var=slot, value=which),
        ]
        return nodes, slot, binary("and", turn, const(1))

    def before(self) -> tuple[list[Node], Expr]:
        """The slot used last."""
        count = Var(f"{self.used.name}_now", int32, VarKind.VALUE, index(0))
        last = arith("floormod", arith("add", count, self.slots - 1), self.slots)
        return [Load(out=count, buffer=self.used, index=(index(0),))], last

    def leave(self, slot: Expr, when: Expr | None = None) -> list[Node]:
        """Say that the slot may be filled again, to all blocks that fill it."""
        span = self.feed.copies[0].span
        if not self.by_group:
            arrive: Node = BarrierArrive(barrier=self.empty, slot=slot, span=span)
            return [arrive] if when is None else [If(condition=when, then=(arrive,), span=span)]
        lane = arith("floormod", self.thread, GROUP)
        says = arith("lt", lane, self.cluster)
        condition = says if when is None else binary("and", says, when)
        arrive = BarrierArrive(
            barrier=self.empty,
            slot=slot,
            cta=lane if self.cluster > 1 else None,
            span=span,
        )
        return [If(condition=condition, then=(arrive,), span=span)]


def barriers(name: str, count: int, arrivals: int) -> Buffer:
    return Buffer(
        name=name,
        shape=(index(count),),
        dtype=int32,
        scope=Scope.BARRIER,
        arrive_counts=(arrivals,) * count,
    )


def counter(name: str) -> Buffer:
    return Buffer(name=name, shape=(index(1),), dtype=int32, scope=Scope.VAR)


def zeros(counters: Iterable[Buffer]) -> list[Node]:
    return [Store(buffer=c, index=(index(0),), value=const(0, int32)) for c in counters]


def counted(counter: Buffer) -> list[Node]:
    """One turn more."""
    count = Var(f"{counter.name}_next", int32, VarKind.VALUE, index(0))
    return [
        Load(out=count, buffer=counter, index=(index(0),)),
        Store(buffer=counter, index=(index(0),), value=arith("add", count, 1)),
    ]
