"""Sends accumulators to global memory by the tensor memory accelerator: in strips through shared
memory, while the next strip or tile is computed.

Knows how the warpgroups hold an accumulator. Does not know roles or slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tilejit.dtypes import DType, int32
from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, cast, index
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, Load, Node, OneThread, Parallel, Store, rewrite, walk
from tilejit.ir.sync import Control, ControlOp, SyncThreads
from tilejit.isa.atom import CopyAtom, CopyMethod, WgmmaAtom
from tilejit.layout.shared import SharedLayout
from tilejit.ops.copy import Copy
from tilejit.ops.elementwise import as_parallel
from tilejit.ops.gemm import Gemm
from tilejit.passes.bulk import refused
from tilejit.passes.late import Late, can_wait, strip_widths
from tilejit.passes.registers import GROUP
from tilejit.passes.tma import misfit
from tilejit.passes.wgmma import ROWS, warpgroup_layout

MOST_STRIPS = 2
StripBuffers = dict[int, Buffer]  # by the columns of a strip
FIRST_BARRIER = 2  # hardware barriers of the warpgroups; 0 is the block's, 1 the consumers'


@dataclass(frozen=True)
class Place:
    """Where a strip lies in a warpgroup's part of an accumulator, and through which slot it leaves.

    row: the number of the instruction along m. column: the first of `width`. slot: among those of
    strips as wide.
    """

    row: int
    column: int
    width: int
    slot: int = 0

    def is_where(self, other: Place) -> bool:
        """Whether both leave through the same slot."""
        return (self.width, self.slot) == (other.width, other.slot)


@dataclass(frozen=True)
class Strips:
    """The nodes that store an accumulator, strip by strip."""

    copy: Copy
    places: tuple[Place, ...]
    nodes: tuple[Body, ...]


@dataclass
class Staging:
    """A kernel whose accumulators leave through shared memory.

    buffers: the strips there, written by warpgroups of their own. strips: of copies that are stored
        at once. late: the copy that is left for the next tile's time. by_threads: copies that stay
        as they were.
    """

    kernel: Kernel
    buffers: list[Buffer] = field(default_factory=list)
    strips: list[Strips] = field(default_factory=list)
    late: Late | None = None
    by_threads: list[Copy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def stage_stores(kernel: Kernel, free: int, teams: int = 1, team: Var | None = None) -> Staging:
    """Replace copies of accumulators to tensors that the accelerator can write.

    free: bytes of shared memory that the strips may take. teams, team: of the consumers (`Role`),
    each with strips of its own.
    """
    staging = Staging(kernel)
    stager = _Stager(kernel, staging, free, teams, index(0) if team is None else team)
    body = rewrite(kernel.body, stager.visit)
    staging.kernel = replace(
        kernel,
        body=body,
        fragments=stager.fragments,
        shared=stager.shared,
        slots={**kernel.slots, **{b: b.extents[0] for b in staging.buffers}},
    )
    return staging


class _Stager:
    def __init__(self, kernel: Kernel, staging: Staging, free: int, teams: int, team: Expr) -> None:
        self.kernel = kernel
        self.free = free
        self.teams = teams
        self.team = team
        self.staging = staging
        self.shared: dict[Buffer, SharedLayout] = dict(kernel.shared)
        self.fragments = dict(kernel.fragments)
        self.thread = kernel.thread_vars[0]
        self.gemms = [n for n in walk(kernel.body) if isinstance(n, Gemm)]
        self.strips: dict[tuple[tuple[int, ...], DType, bool], Buffer] = {}
        self.aliases = Aliases(kernel)
        loops = (n for n in walk(kernel.body) if isinstance(n, For))
        self.repeated = {inner for loop in loops for inner in walk(loop.body)}
        held = {n: self._held(n) for n in walk(kernel.body)}
        # Tensors that threads write: no order is between their writes and the accelerator's
        self.by_threads = {
            self.aliases.of(b)
            for n, atom in held.items()
            if atom is None and not (isinstance(n, Copy) and n.is_tma)
            for b in n.writes
        }
        # Copies that share strips follow each other in any order: the slot that one begins with
        # may be the one that another ended with.
        strips = {
            n: _strips(n, atom)
            for n, atom in held.items()
            if isinstance(n, Copy) and atom is not None
        }
        self.last = [places[-1] for places in strips.values()]
        self.is_uneven = any(s[0].is_where(end) for s in strips.values() for end in self.last)
        # After copies that send all strips together, none of their slots has been read.
        self.is_together = any(n in self.repeated and _is_apart(s) for n, s in strips.items())

    def _held(self, node: Node) -> WgmmaAtom | None:
        """The multiply by which warpgroups hold what the node copies to a tensor; None for other
        nodes."""
        if not isinstance(node, Copy) or node.atom is None:
            return None
        source, target = node.src.buffer, node.dst.buffer
        if (source.scope, target.scope) != (Scope.FRAGMENT, Scope.GLOBAL):
            return None
        return self._holder(source) if node.src.is_whole and source.rank == 2 else None

    def visit(self, node: Node) -> Node | tuple[Node, ...]:
        atom = self._held(node)
        if isinstance(node, Copy) and node.combine is not None and not node.is_tma and atom is None:
            return self._by_threads(node, f"{node.src.buffer.name} is no accumulator")
        if not isinstance(node, Copy) or atom is None:
            return node
        source, target = node.src.buffer, node.dst.buffer
        strips = _strips(node, atom)
        is_repeated = node in self.repeated
        buffers, strips = self._strip_buffers(source, target, atom, strips, is_repeated)
        prefer = node.prefer if node.prefer == "tma" else None
        reason = ""
        for place in {p.width: p for p in reversed(strips)}.values():  # the narrowest first
            probe = self._store(node, buffers, atom, place)
            probe = replace(probe, atom=None, prefer=prefer)
            reason = reason or misfit(probe, self.kernel)
        if self.aliases.of(target) in self.by_threads:
            reason = reason or f"threads write {target.name} too"
        fresh = [b for b in buffers.values() if b not in self.shared]
        size = sum(math.prod(b.extents) * b.dtype.bytes for b in fresh)
        if size > self.free:
            reason = reason or f"{size} bytes of shared memory for it are not left"
        if reason:
            return self._by_threads(node, reason)
        self.free -= size
        self.shared.update((b, warpgroup_layout(b.extents, b.dtype)) for b in fresh)
        self.staging.buffers += fresh
        added = "" if node.combine is None else "added "
        widths = " and ".join(str(width) for width in buffers)
        note = f"{source.name} -> {target.name}: {added}by TMA, through strips of {widths} columns"
        if self.teams == 1 and can_wait(self.kernel, node, len(strips)):
            self.staging.notes.append(f"{note}, while the next tile is multiplied")
            return (self._hold(node, buffers, atom, strips),)
        self.staging.notes.append(note)
        if is_repeated and _is_apart(strips):
            return self._at_once(node, buffers, atom, strips)
        nodes = [
            tuple(self._strip(node, buffers, atom, strips, number)) for number in range(len(strips))
        ]
        self.staging.strips.append(Strips(node, tuple(strips), tuple(nodes)))
        return tuple(n for strip in nodes for n in strip)

    def _by_threads(self, node: Copy, reason: str) -> Node:
        """The copy as threads make it."""
        source, target = node.src.buffer, node.dst.buffer
        if node.prefer == "tma":
            raise refused(node, reason, self.kernel)
        done = "stored" if node.combine is None else "added"
        self.staging.notes.append(
            f"{source.name} -> {target.name}: {done} by the threads, not by TMA ({reason})"
        )
        self.by_threads.add(self.aliases.of(target))
        self.staging.by_threads.append(node)
        loop = None if node.combine is None else as_parallel(node)
        return loop or node

    def _hold(
        self, node: Copy, buffers: StripBuffers, atom: WgmmaAtom, strips: Sequence[Place]
    ) -> Parallel:
        """The loop that keeps what the copy stores, which waits."""
        source = node.src.buffer
        held = Buffer(
            name=f"{source.name}_held",
            shape=source.shape,
            dtype=node.dst.buffer.dtype,
            scope=Scope.FRAGMENT,
            span=source.span,
        )
        layout = self.fragments[held] = self.fragments[source]

        def strip(number: int, region: Region) -> list[Node]:
            kept = replace(node, src=replace(node.src, buffer=held), dst=region, whole=node)
            return self._strip(kept, buffers, atom, strips, number)

        self.staging.late = Late(node, held, len(strips), strip)
        places = tuple(
            Var(name, int32, VarKind.PARALLEL, index(0), index(n - 1))
            for name, n in zip("ij", source.extents, strict=True)
        )
        loaded = Var(source.name, source.dtype, VarKind.VALUE)
        load = Load(out=loaded, buffer=source, index=places, span=node.span)
        value = cast(loaded, held.dtype)
        store = Store(buffer=held, index=places, value=value, span=node.span)
        extents = source.extents
        body = (load, store)
        return Parallel(vars=places, extents=extents, body=body, layout=layout, span=node.span)

    def _holder(self, fragment: Buffer) -> WgmmaAtom | None:
        """The multiply whose accumulator lies as the fragment does."""
        layout = self.kernel.fragments[fragment]
        for gemm in self.gemms:
            if isinstance(gemm.atom, WgmmaAtom):
                if self.kernel.fragments[gemm.acc.buffer] == layout:
                    return gemm.atom
        return None

    def _strip_buffers(
        self,
        source: Buffer,
        target: Buffer,
        atom: WgmmaAtom,
        strips: Sequence[Place],
        is_repeated: bool,
    ) -> tuple[StripBuffers, list[Place]]:
        """Memory for the strips of each width, and the strips with the slots that they have there:
        two of a warpgroup for the widest, so that one is written while the other is sent; one where
        space is short. Copies in loops share none with those outside."""
        groups = self.teams * atom.groups_m * atom.groups_n
        column = groups * ROWS * target.dtype.bytes
        most = {place.width: 0 for place in strips}
        for place in strips:
            most[place.width] = max(most[place.width], place.slot + 1)
        widest, *others = most
        left = self.free - column * sum(others)
        most[widest] = max(1, min(most[widest], left // (column * widest)))
        buffers: StripBuffers = {}
        for width, slots in most.items():
            shape = (self.teams * atom.groups_m, atom.groups_n, ROWS, width)
            found = self.strips.get((shape, target.dtype, is_repeated))
            if found is None or found.extents[0] < slots:
                found = self.strips[shape, target.dtype, is_repeated] = Buffer(
                    name=f"{target.name}_strips",
                    shape=tuple(index(n) for n in (slots, *shape)),
                    dtype=target.dtype,
                    scope=Scope.SHARED,
                    span=source.span,
                )
            buffers[width] = found
        return buffers, [replace(p, slot=p.slot % buffers[p.width].extents[0]) for p in strips]

    def _at_once(
        self, node: Copy, buffers: StripBuffers, atom: WgmmaAtom, strips: Sequence[Place]
    ) -> tuple[Node, ...]:
        """All strips, each in its slot: written when those of the round before have been read,
        which is long ago, and sent together."""
        span = node.span
        stores = [self._store(node, buffers, atom, place) for place in strips]
        return (
            Control(op=ControlOp.STORE_WAIT_READ, span=span),
            self._meeting(node, atom),
            *(self._written(node, buffers, atom, place) for place in strips),
            Control(op=ControlOp.FENCE_ASYNC, span=span),
            self._meeting(node, atom),
            OneThread(body=tuple(stores), each=GROUP, span=span),
            Control(op=ControlOp.STORE_COMMIT, span=span),
        )

    def _meeting(self, node: Copy, atom: WgmmaAtom) -> SyncThreads:
        """Of the thread's warpgroup."""
        number = self._barrier(atom)
        return SyncThreads(inserted=True, number=number, threads=GROUP, span=node.span)

    def _strip(
        self,
        node: Copy,
        buffers: StripBuffers,
        atom: WgmmaAtom,
        strips: Sequence[Place],
        number: int,
    ) -> list[Node]:
        """One strip: write it when its slot has been read, send it."""
        span, place = node.span, strips[number]
        meeting = self._meeting(node, atom)
        store = self._store(node, buffers, atom, place)
        written = self._written(node, buffers, atom, place)
        read = Control(op=ControlOp.STORE_WAIT_READ, span=span)
        sent: list[Node] = [
            OneThread(body=(store,), each=GROUP, span=span),
            Control(op=ControlOp.STORE_COMMIT, span=span),
        ]
        fence = Control(op=ControlOp.FENCE_ASYNC, span=span)
        # where they meet for this strip, all learn that the slots of those before have been read
        filled = [written, fence, read, meeting, *sent]
        if number:
            is_unread = place.is_where(strips[number - 1])
        else:
            ends_there = any(end.width == place.width for end in self.last)
            is_unread = self.is_uneven or (self.is_together and node in self.repeated)
            # where space is short, slots are fewer than what `is_uneven` knows
            is_unread |= buffers[place.width].extents[0] == 1 and ends_there
        return [read, meeting, *filled] if is_unread else filled

    def _barrier(self, atom: WgmmaAtom) -> Expr:
        """The hardware barrier of the thread's warpgroup."""
        group = arith("floordiv", self.thread, GROUP)
        first = arith("mul", self.team, atom.groups_m * atom.groups_n)
        return arith("add", arith("add", first, group), FIRST_BARRIER)

    def _of_team(self, number: Expr, atom: WgmmaAtom) -> Expr:
        """A number along the first of the warpgroups' dimensions, among those of all teams."""
        return arith("add", arith("mul", self.team, atom.groups_m), number)

    def _written(
        self, node: Copy, buffers: StripBuffers, atom: WgmmaAtom, place: Place
    ) -> Parallel:
        """The loop by which each thread writes the part of a strip that it holds."""
        source, target = node.src.buffer, node.dst.buffer
        columns = source.extents[1] // atom.groups_n
        extents = (atom.groups_m, atom.groups_n, ROWS, place.width)
        d, g, i, j = variables = tuple(
            Var(name, int32, VarKind.PARALLEL, index(0), index(n - 1))
            for name, n in zip("dgij", extents, strict=True)
        )
        at = (
            arith("add", arith("mul", d, atom.rows * ROWS), arith("add", i, place.row * ROWS)),
            arith("add", arith("mul", g, columns), arith("add", j, place.column)),
        )
        loaded = Var(source.name, source.dtype, VarKind.VALUE)
        load = Load(out=loaded, buffer=source, index=at, span=node.span)
        value = cast(loaded, target.dtype)
        home = (index(place.slot), self._of_team(d, atom), g, i, j)
        store = Store(buffer=buffers[place.width], index=home, value=value, span=node.span)
        # (groups_m, rows, ROWS, groups_n, instructions, columns of one)
        held = self.fragments[source].split(0, ROWS).split(0, atom.rows)
        held = held.split(3, columns).split(4, atom.wgmma.n).crop(5, place.width)
        return Parallel(
            vars=variables,
            extents=extents,
            body=(load, store),
            layout=held.project((0, 3, 2, 5)),
            span=node.span,
        )

    def _store(self, node: Copy, buffers: StripBuffers, atom: WgmmaAtom, place: Place) -> Copy:
        """The copy of a warpgroup's strip to the tensor, issued by one thread of it."""
        source, target = node.src.buffer, node.dst.buffer
        columns = source.extents[1] // atom.groups_n
        group = arith("floordiv", self.thread, GROUP)
        down = arith("floordiv", group, atom.groups_n)
        across = arith("floormod", group, atom.groups_n)
        row = arith("add", arith("mul", down, atom.rows * ROWS), place.row * ROWS)
        column = arith("add", arith("mul", across, columns), place.column)
        corner = (index(place.slot), self._of_team(down, atom), across, index(0), index(0))
        shape = (ROWS, place.width)
        inner = Region(buffers[place.width], corner, (1, 1, 1, *shape), frozenset({0, 1, 2}))
        starts: list[Expr] = list(node.dst.starts)
        extents = list(node.dst.extents)
        for d, offset, extent in zip(node.dst.kept, (row, column), shape, strict=True):
            starts[d] = arith("add", starts[d], offset)
            extents[d] = extent
        outer = Region(target, tuple(starts), tuple(extents), node.dst.dropped)
        return Copy(
            src=inner,
            dst=outer,
            atom=CopyAtom(CopyMethod.TMA, 0),
            combine=node.combine,
            eviction=node.eviction,
            whole=node.whole or node,
            span=node.span,
        )


def _strips(node: Copy, atom: WgmmaAtom) -> list[Place]:
    """The strips of a warpgroup's part of the accumulator, one row of instructions after the other:
    as wide as a swizzle is, what is left of an instruction in powers of two. The widest take turns
    at two slots."""
    places: list[Place] = []
    columns = node.src.buffer.extents[1] // atom.groups_n
    for row in range(atom.rows):
        for first in range(0, columns, atom.wgmma.n):
            column = first
            for width in strip_widths(atom.wgmma.n, node.dst.buffer.dtype.bytes):
                places.append(Place(row, column, width))
                column += width
    widest, turn = places[0].width, 0
    for number, place in enumerate(places):
        if place.width == widest:
            places[number] = replace(place, slot=turn % MOST_STRIPS)
            turn += 1
    return places


def _is_apart(strips: Sequence[Place]) -> bool:
    """Whether each strip has a slot of its own."""
    return len({(place.width, place.slot) for place in strips}) == len(strips)
