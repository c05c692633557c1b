"""Nodes of the tile graph: the base class, control flow, scalar memory access.

Tile ops (copy, gemm, ...) are nodes too and live in `ops/`, synchronisation in `ir.sync`. A node is
immutable; a pass makes a new one with `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from tilejit.errors import Span
from tilejit.ir.buffer import Buffer, Region
from tilejit.ir.expr import Expr, Var
from tilejit.ir.names import Names
from tilejit.layout.fragment import FragmentLayout

Body = tuple["Node", ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Node:
    """One step of a tile program, executed in order.

    Passes ask a node through these properties instead of knowing its class:
    reads, writes: buffers it touches itself (nested bodies not included).
    exprs: scalar expressions it evaluates itself, those that say where buffers are included.
    defines: variables that nodes after it (or, for loops, in its body) may use.
    bodies: nested node lists.

    schedule: of a statement of a pipelined loop with a schedule by hand: its place and its stage.
    """

    span: Span | None = None
    schedule: tuple[int, int] | None = None

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return ()

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return ()

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return ()

    @property
    def defines(self) -> tuple[Var, ...]:
        return ()

    @property
    def bodies(self) -> tuple[Body, ...]:
        return ()

    @property
    def regions(self) -> tuple[Region, ...]:
        """The boxes of buffers that a tile op works on."""
        return ()

    def problems(self) -> Iterator[str]:
        """What is wrong with a tile op's shapes, dtypes and scopes, for `verify`."""
        return iter(())

    def show(self, names: Names) -> str:
        """A tile op as one line of text; control flow is laid out by the printer."""
        raise AssertionError(f"{type(self).__name__} does not say how it is printed")

    def with_bodies(self, *bodies: Body) -> Node:
        """The same node around other bodies."""
        assert not bodies
        return self

    @property
    def has_effect(self) -> bool:
        """False when the node may be dropped if nothing uses what it defines."""
        return True


class LoopKind(StrEnum):
    SERIAL = "serial"
    TILES = "tiles"  # over the tiles that a block computes one after the other
    UNROLL = "unroll"
    VECTORIZED = "vectorized"
    PIPELINED = "pipelined"


@dataclass(frozen=True, eq=False, kw_only=True)
class For(Node):
    """`for var in range(start, stop, step)`; step is a positive or negative constant.

    num_stages: for PIPELINED: slots of each asynchronously filled buffer; 0 means serial, None
        that the pipeline pass chooses.
    parts: for PIPELINED: blocks that share the iterations; None means that the compiler chooses.
    order, stage, group: TileLang's manual schedule, one entry a statement of the body.
    unroll_factor: for UNROLL: iterations a round, None for all.
    """

    var: Var
    start: Expr
    stop: Expr
    step: int = 1
    kind: LoopKind = LoopKind.SERIAL
    body: Body = ()
    num_stages: int | None = 0
    parts: int | None = None
    order: tuple[int, ...] = ()
    stage: tuple[int, ...] = ()
    group: tuple[tuple[int, ...], ...] = ()
    unroll_factor: int | None = None

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return self.start, self.stop

    @property
    def defines(self) -> tuple[Var, ...]:
        return (self.var,)

    @property
    def bodies(self) -> tuple[Body, ...]:
        return (self.body,)

    def with_bodies(self, *bodies: Body) -> Node:
        (body,) = bodies
        return dataclasses.replace(self, body=body)


@dataclass(frozen=True, eq=False, kw_only=True)
class Parallel(Node):
    """Independent iterations over a box of `extents`, spread over the block's threads.

    Iterations may run in any order and must not depend on each other.

    layout: which thread runs which iteration, where a pass has decided that; else it follows from
        the fragments and memory that the body accesses.
    """

    vars: tuple[Var, ...]
    extents: tuple[int, ...]
    body: Body = ()
    coalesced_width: int | None = None
    layout: FragmentLayout | None = None

    @property
    def defines(self) -> tuple[Var, ...]:
        return self.vars

    @property
    def bodies(self) -> tuple[Body, ...]:
        return (self.body,)

    def with_bodies(self, *bodies: Body) -> Node:
        (body,) = bodies
        return dataclasses.replace(self, body=body)


@dataclass(frozen=True, eq=False, kw_only=True)
class If(Node):
    condition: Expr
    then: Body = ()
    orelse: Body = ()

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (self.condition,)

    @property
    def bodies(self) -> tuple[Body, ...]:
        return self.then, self.orelse

    def with_bodies(self, *bodies: Body) -> Node:
        then, orelse = bodies
        return dataclasses.replace(self, then=then, orelse=orelse)


@dataclass(frozen=True, eq=False, kw_only=True)
class While(Node):
    """Run `test` (loads the condition needs), leave when `condition` is false, else run `body`.

    bodies are (test, body); variables defined in `test` are visible in `body`.

    is_tiles: it is the loop over the tiles that a block computes, as `LoopKind.TILES`.
    """

    test: Body = ()
    condition: Expr
    body: Body = ()
    is_tiles: bool = False

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (self.condition,)

    @property
    def bodies(self) -> tuple[Body, ...]:
        return self.test, self.body

    def with_bodies(self, *bodies: Body) -> Node:
        test, body = bodies
        return dataclasses.replace(self, test=test, body=body)


def is_over_tiles(node: Node) -> bool:
    """True for the loop over the tiles that a block computes one after the other."""
    if isinstance(node, While):
        return node.is_tiles
    return isinstance(node, For) and node.kind is LoopKind.TILES


@dataclass(frozen=True, slots=True)
class Role:
    """What some of the block's threads do while others do something else.

    first, threads: the executing threads, `first` being the linear index of the first in the block.
    meeting: the hardware barrier, 1 to 15, at which they come together; 0 where roles of one
        `Roles` have those from 1 on, in order.
    teams: so many equal teams do the body, each for itself, with threads that count from 0 on
        and a meeting of its own. team: the variable that holds the team's number.
    """

    name: str
    first: int
    threads: int
    body: Body = ()
    meeting: int = 0
    teams: int = 1
    team: Var | None = None

    @property
    def size(self) -> int:
        """Threads that do the body together."""
        return self.threads // self.teams

    @property
    def home(self) -> tuple[int, int]:
        """Which threads it is."""
        return self.first, self.threads


@dataclass(frozen=True, eq=False, kw_only=True)
class Roles(Node):
    """The bodies of all roles at the same time, each by its own threads; threads of none go on.

    opener, opening: decided by `open_early`: the number of the role that makes the block's
        barriers and goes on at once, and the hardware barrier at which it says so and the other
        roles wait for that; None where the block makes them and meets before it does anything.
    """

    roles: tuple[Role, ...]
    opener: int | None = None
    opening: int = 0

    @property
    def bodies(self) -> tuple[Body, ...]:
        return tuple(role.body for role in self.roles)

    def with_bodies(self, *bodies: Body) -> Node:
        fresh = [dataclasses.replace(r, body=b) for r, b in zip(self.roles, bodies, strict=True)]
        return dataclasses.replace(self, roles=tuple(fresh))


@dataclass(frozen=True, eq=False, kw_only=True)
class Part(Node):
    """`body` alone: one of several pieces that a pass looks at together (`ir.parts`)."""

    body: Body = ()

    @property
    def bodies(self) -> tuple[Body, ...]:
        return (self.body,)

    def with_bodies(self, *bodies: Body) -> Node:
        (body,) = bodies
        return dataclasses.replace(self, body=body)


@dataclass(frozen=True, eq=False, kw_only=True)
class OneThread(Node):
    """`body`, by one of the executing role's threads only, or by one of `each` so many."""

    body: Body = ()
    each: int = 0

    @property
    def bodies(self) -> tuple[Body, ...]:
        return (self.body,)

    def with_bodies(self, *bodies: Body) -> Node:
        (body,) = bodies
        return dataclasses.replace(self, body=body)


@dataclass(frozen=True, eq=False, kw_only=True)
class Let(Node):
    """`var = value`: a value with a name, computed once."""

    var: Var
    value: Expr

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (self.value,)

    @property
    def defines(self) -> tuple[Var, ...]:
        return (self.var,)

    @property
    def has_effect(self) -> bool:
        return False


@dataclass(frozen=True, eq=False, kw_only=True)
class Load(Node):
    """`out = buffer[index]`; 0 where `when` is false or, in global memory, out of range.

    A global index is out of range outside [0, extent) of any dimension; negative ones are not
    wrapped.
    """

    out: Var
    buffer: Buffer
    index: tuple[Expr, ...]
    when: Expr | None = None

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.buffer,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        when = () if self.when is None else (self.when,)
        return (*self.index, *when, *self.buffer.place)

    @property
    def defines(self) -> tuple[Var, ...]:
        return (self.out,)

    @property
    def has_effect(self) -> bool:
        return False


@dataclass(frozen=True, eq=False, kw_only=True)
class Store(Node):
    """`buffer[index] = value` (already of the buffer's dtype); dropped when out of range of a
    global buffer."""

    buffer: Buffer
    index: tuple[Expr, ...]
    value: Expr

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.buffer,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (*self.index, self.value, *self.buffer.place)


@dataclass(frozen=True, eq=False, kw_only=True)
class Atomic(Node):
    """`buffer[index] = combine(buffer[index], value)` in one step; `out` gets the old value.

    combine: add, min, max, and, or, xor, exch.
    """

    buffer: Buffer
    index: tuple[Expr, ...]
    value: Expr
    combine: str = "add"
    out: Var | None = None

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.buffer,)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.buffer,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (*self.index, self.value, *self.buffer.place)

    @property
    def defines(self) -> tuple[Var, ...]:
        return () if self.out is None else (self.out,)


def walk(body: Body) -> Iterator[Node]:
    """All nodes, outer before inner, in program order."""
    for node in body:
        yield node
        for inner in node.bodies:
            yield from walk(inner)


def rewrite(body: Body, visit: Callable[[Node], Node | Body | None]) -> Body:
    """A new body: every node, inner bodies first, replaced by what `visit` returns
    (a node, several, or None to drop it)."""
    result: list[Node] = []
    for node in body:
        fresh = tuple(rewrite(inner, visit) for inner in node.bodies)
        changed = any(a is not b for a, b in zip(fresh, node.bodies, strict=True))
        replaced = visit(node.with_bodies(*fresh) if changed else node)
        if isinstance(replaced, Node):
            result.append(replaced)
        elif replaced is not None:
            result.extend(replaced)
    if len(result) == len(body) and all(a is b for a, b in zip(result, body, strict=True)):
        return body
    return tuple(result)


def all_reads(node: Node) -> set[Buffer]:
    """Buffers that the node or anything nested in it reads."""
    found = set(node.reads)
    for inner in node.bodies:
        for child in inner:
            found |= all_reads(child)
    return found


def all_writes(node: Node) -> set[Buffer]:
    """Buffers that the node or anything nested in it writes."""
    found = set(node.writes)
    for inner in node.bodies:
        for child in inner:
            found |= all_writes(child)
    return found
