"""Turns T.Pipelined loops into software pipelines: several slots a buffer, copies ahead of use.

Knows which copies may run ahead and how many slots fit the chip. Does not know layouts or PTX.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tilejit.dtypes import bool_
from tilejit.errors import Span
from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import (
    Expr,
    Var,
    VarKind,
    arith,
    cast,
    index,
    int_value,
    substitute,
    variables,
)
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Load,
    LoopKind,
    Node,
    Store,
    While,
    all_reads,
    all_writes,
    rewrite,
    walk,
)
from tilejit.ir.parts import common_buffers, each_part
from tilejit.ir.substitution import substituted
from tilejit.ir.sync import AsyncCommit, AsyncWait, SyncThreads
from tilejit.isa.atom import CopyAtom, CopyMethod
from tilejit.isa.mma import WARP, operand_word
from tilejit.layout.fragment import FragmentLayout, register, thread
from tilejit.layout.shared import SharedLayout
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import FetchOperands, Gemm, operand_words
from tilejit.passes.around import around_exchanges, exchanged, with_moved
from tilejit.passes.bring import is_inward
from tilejit.passes.exchange import FEWEST_STAGES
from tilejit.passes.overlap import Overlap
from tilejit.passes.pieces import fill_once, in_round, round_copies
from tilejit.passes.skew import Mapping, skewed

DEFAULT_STAGES = 3
SPARE_BYTES = 2048  # of shared memory, for barriers and gaps


def pipeline_loops(kernel: Kernel) -> Kernel:
    """Decide which copies of each T.Pipelined loop run ahead, and how many slots they fill.

    Needs: atoms, layouts. Decides: `slots`; replaces the loop by prologue, steady state and
    waits. A copy that cannot run ahead stays where it is, through registers.
    """
    return each_part(kernel, functools.partial(_pipeline_part, common_buffers(kernel)))


def _pipeline_part(common: set[Buffer], kernel: Kernel) -> Kernel:
    """The same for the loops of one set of threads. common: what others use too."""
    pipeliner = _Pipeliner(kernel, common)
    body = pipeliner.visit(kernel.body)
    return replace(
        kernel,
        body=body,
        slots={**kernel.slots, **pipeliner.slots},
        shared=pipeliner.shared,
        fragments=pipeliner.fragments,
        notes=(*kernel.notes, *pipeliner.notes),
    )


@dataclass(frozen=True)
class _Split:
    """ahead: nodes that run ahead, in order; rest: the others; buffers: what the former fill."""

    ahead: tuple[Node, ...]
    rest: tuple[Node, ...]
    buffers: tuple[Buffer, ...]


class _Pipeliner:
    def __init__(self, kernel: Kernel, common: set[Buffer]) -> None:
        self.kernel = kernel
        self.common = common
        self.aliases = Aliases(kernel)
        self.slots: dict[Buffer, int] = {}
        self.shared = dict(kernel.shared)
        self.fragments = dict(kernel.fragments)
        self.notes: list[str] = []

    def visit(self, body: Body, is_repeated: bool = False) -> Body:
        """is_repeated: a loop around the body runs it again."""
        result: list[Node] = []
        for node in body:
            again = is_repeated or isinstance(node, For | While)
            fresh = node.with_bodies(*(self.visit(inner, again) for inner in node.bodies))
            if not isinstance(fresh, For) or fresh.kind is not LoopKind.PIPELINED:
                result.append(fresh)
            elif is_fed(fresh):  # nobody waits there for what the block's threads copy
                result.append(_synchronous(fresh))
            else:
                assert isinstance(node, For), "a loop stays one"
                result += self.loop(fresh, node, is_repeated)
        return tuple(result)

    def loop(self, node: For, old: For, is_repeated: bool) -> list[Node]:
        """old: the same in the kernel as it was."""
        where = f"pipelined loop at {node.span}" if node.span else "pipelined loop"
        if node.order:
            self.notes.append(f"{where}: order and stage are for asynchronous multiplies")
        split = self.split(node)
        stages = node.num_stages
        asked = DEFAULT_STAGES if stages is None else stages
        if stages is None:
            stages = self.stages_that_fit(split)
        if stages < 2 or not split.ahead:
            overlap = None if split.ahead else self.overlap(old, split, asked, where)
            serial = "" if overlap else "serial, "
            self.notes.append(f"{where}: {serial}{self.obstacle(node, split, stages)}")
            if overlap is None:
                return [_synchronous(replace(node, kind=LoopKind.SERIAL))]
            return self.expand_overlapped(node, split, stages, overlap)
        names = ", ".join(b.name for b in split.buffers)
        self.notes.append(f"{where}: {stages} slots of {names}")
        # the last round of the time before may still read the slots that are filled first
        meeting = [SyncThreads(inserted=True, span=node.span)] if is_repeated else []
        overlap = self.overlap(old, split, stages, where)
        if overlap is not None:
            return [*meeting, *self.expand_overlapped(node, split, stages, overlap)]
        return [*meeting, *self.expand(node, split, stages)]

    def obstacle(self, node: For, split: _Split, stages: int) -> str:
        """Why a loop's copies do not run ahead."""
        if split.ahead:
            return f"num_stages is {stages}"
        branched = [n for n in in_round(node.body) if n not in node.body and is_inward(n)]
        filled = dict.fromkeys(b.name for n in branched for b in n.writes)
        where = f": what fills {', '.join(filled)} stands in a branch" if filled else ""
        return f"no copy can run ahead{where}"

    def overlap(self, node: For, split: _Split, stages: int, where: str) -> Overlap | None:
        """How the loop's rounds overlap around exchanges between blocks, if it has any."""
        names = ", ".join(dict.fromkeys(n.given.buffer.name for n in exchanged(split.rest)))
        if not names:
            return None
        found = around_exchanges(node, split.rest, stages, self.kernel)
        if isinstance(found, Overlap) and self.common & set(found.pairs):
            found = f"threads in other roles use {_names(found.pairs)}"
        elif isinstance(found, Overlap) and not self.holds(split, stages, found.pairs):
            found = f"shared memory is too small for two of {_names(found.pairs)}"
        if isinstance(found, str):
            self.notes.append(f"{where}: rounds wait for exchanges of {names}: {found}")
            return None
        pairs = f", with two of {_names(found.pairs)}" if found.pairs else ""
        self.notes.append(f"{where}: rounds overlap around exchanges of {names}{pairs}")
        self.fragments.update(with_moved(self.kernel, found).fragments)
        return found

    def holds(self, split: _Split, stages: int, pairs: Sequence[Buffer]) -> bool:
        """Whether shared memory has room for slots, and for two tiles each of the pairs."""
        if not pairs:
            return True
        assert self.kernel.target is not None
        times = dict.fromkeys(split.buffers, stages) | dict.fromkeys(pairs, 2)
        bytes_ = sum(layout.bytes * times.get(b, 1) for b, layout in self.shared.items())
        free = self.kernel.target.shared_bytes // self.kernel.given.min_blocks
        return bytes_ + SPARE_BYTES <= free

    # ---- what may run ahead -----------------------------------------------------------------

    def split(self, node: For) -> _Split:
        """Asynchronous copies into buffers that only this loop uses, from memory that the loop
        does not write, with the loads that their indices need."""
        written = set().union(*(all_writes(n) for n in node.body)) if node.body else set()
        changed = {self.aliases.of(b) for b in written}
        chosen: dict[Node, None] = {}
        buffers: list[Buffer] = []
        filling: dict[Buffer, list[Copy]] = {}
        for child in node.body:
            if isinstance(child, Copy) and child.atom is not None:
                if child.atom.method is CopyMethod.CP_ASYNC:
                    filling.setdefault(child.dst.buffer, []).append(child)
        for target, copies in filling.items():
            loads = [self.needed_loads(node.body, node.body.index(c), c) for c in copies]
            needed = [n for group in loads if group is not None for n in group]
            if None in loads or not self.is_private(node, target, copies):
                continue
            read = [c.src.buffer for c in copies] + [n.buffer for n in needed]
            if changed & {self.aliases.of(b) for b in read}:
                continue
            for one in (*needed, *copies):
                chosen.setdefault(one)
            buffers.append(target)
        ahead = tuple(n for n in node.body if n in chosen)
        used = {
            v
            for n in node.body
            if n not in chosen
            for m in walk((n,))
            for e in m.exprs
            for v in variables(e)
        }
        rest = tuple(
            n for n in node.body
            if n not in chosen or (isinstance(n, Load) and n.out in used)
        )  # fmt: skip
        return _Split(ahead, rest, tuple(buffers))

    def needed_loads(self, body: Body, position: int, copy: Copy) -> list[Load] | None:
        """The loads in the loop's body whose values the copy's indices use; None when something
        else in the body makes one."""
        defined = {v: n for n in body[:position] for v in n.defines}
        needed: list[Load] = []
        pending = [v for e in copy.exprs for v in variables(e)]
        while pending:
            maker = defined.get(pending.pop())
            if maker is None:
                continue
            if not isinstance(maker, Load) or maker.buffer.scope is not Scope.GLOBAL:
                return None
            if maker not in needed:
                needed.append(maker)
                pending += [v for e in maker.exprs for v in variables(e)]
        return needed

    def is_private(self, node: For, target: Buffer, copies: Sequence[Copy]) -> bool:
        """True when the copies alone fill the buffer, each iteration anew, before any use, and
        nothing outside the loop touches it."""
        if target in self.common or target.is_view or target in self.slots:
            return False
        if not fill_once(target, copies):
            return False
        left = len(copies)
        for child in node.body:
            if any(child is c for c in copies):
                left -= 1
                continue
            touched = all_writes(child) | (all_reads(child) if left else set())
            if any(b.root is target for b in touched):
                return False
            if any(b.root is target and b is not target for b in all_reads(child)):
                return False
        inside = {id(n) for n in walk(node.body)}
        for other in walk(self.kernel.body):
            if id(other) in inside:
                continue
            if any(b.root is target for b in (*other.reads, *other.writes)):
                return False
        return True

    def stages_that_fit(self, split: _Split) -> int:
        """The default number of slots, fewer where shared memory is short."""
        assert self.kernel.target is not None
        free = self.kernel.target.shared_bytes - sum(
            layout.bytes for b, layout in self.shared.items() if b not in split.buffers
        )
        one = sum(self.shared[b].bytes for b in split.buffers)
        return min(DEFAULT_STAGES, free // one) if one else 0

    # ---- the pipeline -----------------------------------------------------------------------

    def expand(self, node: For, split: _Split, stages: int) -> list[Node]:
        """Prologue: fill all slots but one. Each iteration: wait for its slot, meet (everyone has
        then left the slot used before), start filling that one, work on its own."""
        slotted = {b: self.with_slots(b, stages) for b in split.buffers}
        prologue, fill = self.fills(node, split, slotted, stages)
        iteration = self.iteration(node)
        own = arith("floormod", iteration, stages)
        arrival = _arrival(stages - 2, node.span)
        work = [_synchronous(into_slot(n, slotted, own)) for n in split.rest]
        if carries_operands(split):
            following = arith("floormod", arith("add", iteration, 1), stages)
            carried = self.operand_registers(work[-1])
            first = tuple(into_slot(n, slotted, index(0)) for n in split.rest[-1:])
            assert isinstance(first[0], Gemm)
            prologue += [*arrival, FetchOperands(gemm=first[0], carried=carried, span=node.span)]
            (ahead,) = (into_slot(n, slotted, following) for n in split.rest[-1:])
            assert isinstance(ahead, Gemm) and isinstance(work[-1], Gemm)
            work[-1] = replace(
                work[-1],
                carried=carried,
                following=(ahead.a, ahead.b),
                meanwhile=arrival,
                filling=fill,
            )
            body: Body = tuple(work)
        else:
            body = (*arrival, *fill, *work)
        steady = replace(node, kind=LoopKind.SERIAL, body=body, num_stages=0)
        return [*prologue, steady, AsyncWait(pending=0, span=node.span)]

    def fills(
        self, node: For, split: _Split, slotted: dict[Buffer, Buffer], stages: int
    ) -> tuple[list[Node], Body]:
        """What fills all slots but one before the loop, and what each iteration fills of the one
        that the iteration before it has left."""
        prologue: list[Node] = []
        for s in range(stages - 1):
            value = arith("add", node.start, s * node.step)
            filled = self.ahead_at(split, node, slotted, value, index(s))
            prologue += [*self.guarded(node, value, filled), AsyncCommit(span=node.span)]
        later = arith("add", node.var, (stages - 1) * node.step)
        next_slot = arith("floormod", arith("add", self.iteration(node), stages - 1), stages)
        filled = self.ahead_at(split, node, slotted, self.existing(node, later), next_slot)
        return prologue, (*self.guarded(node, later, filled), AsyncCommit(span=node.span))

    def expand_overlapped(
        self, node: For, split: _Split, stages: int, overlap: Overlap
    ) -> list[Node]:
        """The same where a round uses its own slot and the next one's. Each waits for the latter;
        of three slots the third is filled before that, so that something is always on its way."""
        pairs = {b: self.with_two(b) for b in overlap.pairs}
        slotted = {b: self.with_slots(b, stages) for b in split.buffers}
        iteration, meeting = self.iteration(node), SyncThreads(inserted=True, span=node.span)
        prologue: list[Node] = []
        start: Body = ()
        own, turn = arith("floormod", iteration, stages or 1), arith("floormod", iteration, 2)
        if split.buffers:
            prologue, fill = self.fills(node, split, slotted, stages)
            prologue += _arrival(stages - 2, node.span)
            if stages > FEWEST_STAGES:
                start = (*_arrival(stages - 3, node.span), *fill)
            else:
                start = (meeting, *fill, *_arrival(stages - 2, node.span))

        def part(mapping: Mapping) -> Body:
            nodes: list[Node] = []
            for n, is_ahead in overlap.order:
                if is_ahead in mapping:
                    fresh = into_slot(into_slot(n, slotted, own), pairs, turn)
                    nodes += substituted((_synchronous(fresh),), mapping[is_ahead])
            return tuple(nodes)

        rounds = skewed(node, overlap, part, lambda mapping: (*start, *part(mapping)), part)
        ended = [AsyncWait(pending=0, span=node.span)] if split.buffers else []
        return [*prologue, *rounds, *ended]

    def with_two(self, buffer: Buffer) -> Buffer:
        """Two tiles in place of one. The block's threads fill them, and meet as for any other."""
        fresh, layout = with_slots(buffer, self.shared.pop(buffer), 2)
        self.shared[fresh] = layout
        return fresh

    def operand_registers(self, node: Node) -> Buffer:
        """Registers that carry a multiply's operands from one iteration to the next."""
        assert isinstance(node, Gemm)
        words, threads = operand_words(node), self.kernel.num_threads
        buffer = Buffer(
            name=f"{node.a.buffer.name}_{node.b.buffer.name}_operands",
            shape=(index(threads), index(words)),
            dtype=operand_word(node.a.buffer.dtype),
            scope=Scope.FRAGMENT,
            span=node.span,
        )
        dims = ((thread(threads, 1),), (register(words, 1),))
        self.fragments[buffer] = FragmentLayout((threads, words), dims, threads)
        return buffer

    def iteration(self, node: For) -> Expr:
        """How many iterations came before this one."""
        done = arith("sub", node.var, node.start)
        return done if node.step == 1 else arith("floordiv", done, node.step)

    def with_slots(self, buffer: Buffer, stages: int) -> Buffer:
        """The buffer with a leading dimension of slots; it replaces the old one."""
        fresh, layout = with_slots(buffer, self.shared.pop(buffer), stages)
        self.shared[fresh] = layout
        self.slots[fresh] = stages
        return fresh

    def ahead_at(
        self, split: _Split, node: For, slotted: dict[Buffer, Buffer], value: Expr, slot: Expr
    ) -> Body:
        """The nodes that run ahead, for the iteration with loop variable `value`."""
        mapping: dict[Var, Expr] = {node.var: cast(value, node.var.dtype)}
        result: list[Node] = []
        for child in split.ahead:
            if isinstance(child, Load):
                fresh = Var(child.out.name, child.out.dtype, VarKind.VALUE)
                moved = _substitute_load(child, mapping, fresh)
                mapping[child.out] = fresh
                result.append(moved)
            else:
                assert isinstance(child, Copy)
                moved_copy = replace(
                    child, src=_substitute_region(child.src, mapping), dst=child.dst
                )
                result.append(into_slot(moved_copy, slotted, slot))
        return tuple(result)

    def existing(self, node: For, value: Expr) -> Expr:
        """The value of an iteration that is only run where it exists, written so that its bounds
        show: copies then need no test against the end of the tensor."""
        return arith("min", value, arith("sub", node.stop, 1)) if node.step == 1 else value

    def guarded(self, node: For, value: Expr, body: Body) -> Body:
        """`body` where the iteration exists."""
        exists = arith("lt" if node.step > 0 else "gt", value, node.stop)
        if int_value(exists) is not None and exists.dtype is bool_:
            return body if int_value(exists) else ()
        return (If(condition=exists, then=body, span=node.span),)


def _names(buffers: Iterable[Buffer]) -> str:
    return ", ".join(b.name for b in buffers)


def _arrival(pending: int, span: Span | None) -> Body:
    """Where all threads know that all but the last so many copies have come."""
    return AsyncWait(pending=pending, span=span), SyncThreads(inserted=True, span=span)


def with_slots(buffer: Buffer, layout: SharedLayout, slots: int) -> tuple[Buffer, SharedLayout]:
    """A buffer like this one with a leading dimension of slots, and how it lies."""
    fresh = replace(buffer, shape=(index(slots), *buffer.shape), strides=None)
    if layout.strides is not None:
        step = -(-layout.bytes // layout.itemsize)
        strides: tuple[int, ...] | None = (step, *layout.strides)
    else:
        strides = None
    pitch = layout.pitch
    if len(layout.shape) == 1:  # a slot becomes a row
        pitch = layout.tile_elements
    shape = (slots, *layout.shape)
    return fresh, replace(layout, shape=shape, pitch=pitch, strides=strides)


def is_fed(loop: For) -> bool:
    """True when producers bring what the loop uses: `specialise` sees to it."""
    return any(n.is_tma for n in round_copies(loop.body))


# Operand registers worth carrying over the block's meeting: beyond them the accumulator spills.
MAX_CARRIED_WORDS = 48
MAX_ACCUMULATORS = 128


def carries_operands(split: _Split) -> bool:
    """True when the iteration's work ends in a matrix multiply of two pipelined buffers: the first
    operands of the next iteration are then loaded, and the block meets, behind its last step."""
    if not split.rest or not isinstance(split.rest[-1], Gemm):
        return False
    gemm = split.rest[-1]
    assert gemm.atom is not None, "select did not run"
    if gemm.atom.mma is None or gemm.k < 2 * gemm.atom.mma.k:
        return False
    if not {gemm.a.buffer, gemm.b.buffer} <= set(split.buffers):
        return False
    per_thread = gemm.m * gemm.n // (WARP * gemm.atom.warps_m * gemm.atom.warps_n)
    per_thread *= max(1, gemm.acc.buffer.dtype.bytes // 4)
    carried = operand_words(gemm) * operand_word(gemm.a.buffer.dtype).bytes // 4
    return per_thread <= MAX_ACCUMULATORS and carried <= MAX_CARRIED_WORDS


def _substitute_region(region: Region, mapping: dict[Var, Expr]) -> Region:
    starts = tuple(substitute(e, mapping) for e in region.starts)
    return replace(region, starts=starts)


def _substitute_load(node: Load, mapping: dict[Var, Expr], out: Var) -> Load:
    at = tuple(substitute(e, mapping) for e in node.index)
    when = None if node.when is None else substitute(node.when, mapping)
    return replace(node, index=at, when=when, out=out)


def into_slot(node: Node, slotted: dict[Buffer, Buffer], slot: Expr) -> Node:
    """The node with every use of a pipelined buffer pointed at one of its slots."""

    def region(old: Region) -> Region:
        fresh = slotted.get(old.buffer)
        if fresh is None:
            return old
        return Region(
            fresh,
            (slot, *old.starts),
            (1, *old.extents),
            frozenset({0, *(d + 1 for d in old.dropped)}),
        )

    def visit(n: Node) -> Node:
        if isinstance(n, Copy):
            return replace(n, src=region(n.src), dst=region(n.dst))
        if isinstance(n, Fill):
            return replace(n, dst=region(n.dst))
        if isinstance(n, Gemm):
            return replace(n, a=region(n.a), b=region(n.b))
        if isinstance(n, Load | Store | Atomic) and n.buffer in slotted:
            return replace(n, buffer=slotted[n.buffer], index=(slot, *n.index))
        return n

    (result,) = rewrite((node,), visit)
    return result


def _synchronous(node: Node) -> Node:
    """The node with the asynchronous copies in it done through registers."""

    (result,) = rewrite((node,), _waited_for)
    return result


def _waited_for(node: Node) -> Node:
    """An asynchronous copy as one through registers; other nodes as they are."""
    if isinstance(node, Copy) and node.atom and node.atom.method is CopyMethod.CP_ASYNC:
        return replace(node, atom=CopyAtom(CopyMethod.REGISTERS, 1))
    return node
