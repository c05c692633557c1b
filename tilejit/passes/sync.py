"""Puts block barriers where one thread uses memory that another has used.

Knows which buffers nodes read and write, and when two accesses surely go from each thread to its
own elements. Does not know slots' contents or PTX.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from tilejit.ir.aliases import Aliases
from tilejit.ir.analysis import tells_apart
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.divergence import Divergence, divergence
from tilejit.ir.expr import Expr, Var, arith, int_value, substitute, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.loops import accesses, loop_layout
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Load,
    LoopKind,
    Node,
    OneThread,
    Parallel,
    Roles,
    Store,
    While,
    is_over_tiles,
    walk,
)
from tilejit.ir.parts import part_kernel
from tilejit.ir.sync import BarrierArrive, BarrierWait, Control, ControlOp, SyncThreads
from tilejit.isa.atom import CopyMethod
from tilejit.layout.fragment import FragmentLayout
from tilejit.ops.cluster import ClusterExchange, ClusterScatter
from tilejit.ops.copy import Copy, is_bulk_store
from tilejit.ops.elementwise import as_parallel
from tilejit.ops.gemm import Gemm
from tilejit.ops.reduce import Step
from tilejit.passes.apart import PLACES, apart_by_rounds, distinct
from tilejit.passes.meetings import share_meetings
from tilejit.passes.sent import Sent, after_round, may_meet, signals
from tilejit.passes.turns import exchanges_in_loops, in_turns, scratch_in_turns


def insert_sync(kernel: Kernel) -> Kernel:
    """Decide where the block's threads must meet.

    Needs: atoms, layouts, pipelines. Decides: SyncThreads nodes, and the steps of reductions that
    go through shared memory. After it, between any two accesses to a shared or global buffer of
    which one writes there is a barrier, unless they belong to one node, or each thread surely comes
    back to its own elements, or they are to a pipeline's slots (which the pipeline orders itself),
    to scratch that is used in turns or to a tile of T.tma_copy (which the user orders), or stand in
    branches or roles that wait for each other at the user's barriers.
    """
    kernel = replace(kernel, body=share_meetings(kernel.body))
    best = _synchronised(kernel)
    for group in exchanges_in_loops(kernel.body):
        fresh = in_turns(kernel, group)
        found = _synchronised(fresh)
        if _meetings(found) < _meetings(best):
            kernel, best = fresh, found
    return best


def _synchronised(kernel: Kernel) -> Kernel:
    body, _ = _Synchroniser(kernel).body(kernel.body, _Pending())
    return replace(kernel, body=body)


def _meetings(kernel: Kernel) -> int:
    return sum(isinstance(n, SyncThreads) for n in walk(kernel.body))


# Says which thread an access takes to which element: equal owners, same thread for an element.
Owner = tuple[object, ...]
Touched = Mapping[Buffer, Owner | None]  # None: any thread may touch any element


def _merge(a: Touched, b: Touched) -> dict[Buffer, Owner | None]:
    result = dict(a)
    for buffer, owner in b.items():
        result[buffer] = owner if buffer not in result or result[buffer] == owner else None
    return result


@dataclass(frozen=True)
class _Pending:
    """Buffers touched since the threads last met.

    unfenced: shared buffers that ordinary stores have written, unseen by asynchronous reads.
    sent: bulk stores to tensors that are perhaps not there yet.
    """

    reads: Touched = field(default_factory=dict)
    writes: Touched = field(default_factory=dict)
    unfenced: frozenset[Buffer] = frozenset()
    sent: Sent = frozenset()

    def conflicts(self, reads: Touched, writes: Touched) -> bool:
        pairs = ((writes, self.reads), (writes, self.writes), (reads, self.writes))
        return any(
            before[b] is None or before[b] != owner
            for now, before in pairs
            for b, owner in now.items()
            if b in before
        )

    def touches(self, tensors: Iterable[Buffer]) -> bool:
        """Whether threads have used what bulk stores go to."""
        return any(t in self.reads or t in self.writes for t in tensors)

    def after(
        self,
        reads: Touched,
        writes: Touched,
        unfenced: Iterable[Buffer] = (),
        sent: Iterable[tuple[Buffer, Copy | None]] = (),
    ) -> _Pending:
        return _Pending(
            _merge(self.reads, reads),
            _merge(self.writes, writes),
            self.unfenced.union(unfenced),
            self.sent.union(sent),
        )

    def joined(self, other: _Pending) -> _Pending:
        """What is pending where two ways meet."""
        return self.after(other.reads, other.writes, other.unfenced, other.sent)

    def within_block(self) -> _Pending:
        """Without tensors: tiles are blocks of the user's, which need no order among themselves."""
        touched = {*self.reads, *self.writes}
        return self.without({b for b in touched if b.scope is Scope.GLOBAL})

    def without(self, buffers: Collection[Buffer]) -> _Pending:
        """Without the accesses to these."""
        reads, writes = (
            {b: owner for b, owner in touched.items() if b not in buffers}
            for touched in (self.reads, self.writes)
        )
        return replace(self, reads=reads, writes=writes)

    def met(self) -> _Pending:
        """After the threads have met."""
        return _Pending(unfenced=self.unfenced, sent=self.sent)


class _Synchroniser:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.part = kernel  # as the executing threads see it
        self.divergence: Divergence = divergence(kernel)
        written = kernel.written
        self.exempt = frozenset(kernel.slots) | bulk_tiles(kernel) | scratch_in_turns(kernel)
        self.aliases = Aliases(kernel)
        changed = {self.aliases.of(b) for b in written}
        self.constant = frozenset(
            b.root
            for b in kernel.buffers
            if b.scope is Scope.GLOBAL and self.aliases.of(b) not in changed
        )
        # Variables that have one value for a block's whole life
        self.fixed = {*kernel.block_vars, *(p.var for p in kernel.params)}

    def body(self, nodes: Body, pending: _Pending) -> tuple[Body, _Pending]:
        result: list[Node] = []
        rest = list(nodes)
        while rest:
            together = self.together(rest)
            if len(together) > 1:
                before, pending = self.before_all(together, pending)
                result += [*before, *together]
            else:
                before, fresh, pending = self.node(rest[0], pending)
                result += [*before, fresh]
            del rest[: len(together)]
        return tuple(result), pending

    def together(self, nodes: list[Node]) -> list[Node]:
        """The first node, and the branches after it that other threads of the block must be able
        to reach while its threads wait: those that arrive at barriers that it waits for."""
        awaited: set[Buffer] = set()
        is_met = False  # at a named barrier, any of which may be the other's
        count = 1
        for k, node in enumerate(nodes):
            if not (isinstance(node, If) and self.divergence.of(node.exprs)):
                break
            inner = list(walk((node,)))
            named = [n for n in inner if isinstance(n, SyncThreads) and n.number is not None]
            if any(isinstance(n, BarrierArrive) and n.barrier.root in awaited for n in inner):
                count = k + 1
            if is_met and named:
                count = k + 1
            awaited |= {n.barrier.root for n in inner if isinstance(n, BarrierWait)}
            is_met |= any(not n.is_arrival for n in named)
        return nodes[:count]

    def before_all(self, nodes: list[Node], pending: _Pending) -> tuple[list[Node], _Pending]:
        """A barrier before nodes that run side by side, where any of them needs one."""
        reads: Touched = {}
        writes: Touched = {}
        for node in nodes:
            more_reads, more_writes = self.touched(node)
            reads, writes = _merge(reads, more_reads), _merge(writes, more_writes)
        return self.meet(nodes[0], pending, reads, writes)

    def node(self, node: Node, pending: _Pending) -> tuple[list[Node], Node, _Pending]:
        if isinstance(node, SyncThreads):
            return [], node, pending if node.number is not None else pending.met()
        if isinstance(node, Control):
            before, pending = self.meet(node, pending, {}, {})
            if node.op is ControlOp.FENCE_ASYNC:
                pending = replace(pending, unfenced=frozenset())
            return before, node, pending
        is_own_local = isinstance(node, ClusterScatter)  # threads store the block's own part
        if isinstance(node, ClusterExchange) and node.step is Step.TAKE and not is_own_local:
            reads, _ = self.touched(node)  # it waits itself for what is sent
            return [], node, pending.after(reads, {})
        if isinstance(node, Roles):
            return self.roles(node, pending)
        if self.is_entered(node):
            before, pending = self.meet(
                node, pending, self.shared(node.reads), self.shared(node.writes)
            )
            fresh, pending = self.inside(node, pending)
            return before, fresh, pending
        before, pending = self.meet(node, pending, *self.touched(node))
        return before, node, pending

    def roles(self, node: Roles, pending: _Pending) -> tuple[list[Node], Node, _Pending]:
        """What all threads have done before is in order with what each role does; roles wait for
        each other by barriers; what all do after is in order with every role."""
        sensed = {b for n in walk((node,)) if is_async_access(n) for b in n.reads}
        fence: list[Node] = []
        if any(b in pending.unfenced for b in self.shared(sensed)):
            fence.append(Control(op=ControlOp.FENCE_ASYNC, span=node.span))
            pending = replace(pending, unfenced=frozenset())
        before, _ = self.meet(node, pending, *self.touched(node))
        if fence and not before:
            before = [SyncThreads(inserted=True, span=node.span)]
        before = [*fence, *before]
        start = pending.met() if before else _Pending(unfenced=pending.unfenced)
        after = start if before else pending
        whole, bodies = self.kernel, []
        for role in node.roles:
            self.part = part_kernel(whole, role)
            fresh, left = self.body(role.body, start)
            bodies.append(fresh)
            after = after.joined(_without_owners(left))
        self.part = whole
        return before, node.with_bodies(*bodies), after

    def is_entered(self, node: Node) -> bool:
        """True when barriers may stand inside the node: all threads take the same way through
        its bodies."""
        if isinstance(node, For) and node.kind is LoopKind.VECTORIZED:
            return False
        return isinstance(node, For | If | While) and not self.divergence.of(node.exprs)

    def meet(
        self, node: Node, pending: _Pending, reads: Touched, writes: Touched
    ) -> tuple[list[Node], _Pending]:
        """A barrier if the accesses need one, and what is pending after the node."""
        meeting = SyncThreads(inserted=True, span=node.span)
        before: list[Node] = []
        is_entered = self.is_entered(node)
        sent = set() if is_entered else self.sent(node)
        on_their_way = {tensor for tensor, _ in pending.sent}
        is_met = on_their_way & {*reads, *writes} or may_meet(sent, pending.sent)
        if is_met or (on_their_way and not is_entered and signals(node)):
            before.append(Control(op=ControlOp.STORE_WAIT, span=node.span))
            pending = replace(pending, sent=frozenset())
        is_async = is_async_access(node)
        if is_async and any(b in pending.unfenced for b in reads):
            before.append(Control(op=ControlOp.FENCE_ASYNC, span=node.span))
            pending = replace(pending, unfenced=frozenset())
        if before or pending.conflicts(reads, writes) or pending.touches(t for t, _ in sent):
            before.append(meeting)
            pending = pending.met()
        unfenced = () if is_async else [b for b in writes if b.scope is Scope.SHARED]
        return before, pending.after(reads, writes, unfenced, sent)

    # ---- what a node touches ----------------------------------------------------------------

    def touched(self, node: Node) -> tuple[Touched, Touched]:
        """What a node and all in it read and write, with owners where they are sure."""
        inner = list(walk((node,)))  # bulk stores that add read their tensor beyond the block
        read = {b for n in inner for b in (n.reads[:1] if is_bulk_store(n) else n.reads)}
        reads = dict.fromkeys(self.shared(read), None)
        stored = {b for n in walk((node,)) if not is_bulk_store(n) for b in n.writes}
        writes = dict.fromkeys(self.shared(stored), None)
        owners: dict[Buffer, set[Owner | None]] = {}
        for buffer, owner in self.owners(node):
            owners.setdefault(self.standing_for(buffer), set()).add(owner)
        for touched in (reads, writes):
            for buffer in touched:
                found = owners.get(buffer, {None})
                if len(found) == 1:
                    touched[buffer] = next(iter(found))
        return reads, writes

    def sent(self, node: Node) -> set[tuple[Buffer, Copy]]:
        """The node's bulk stores, those aside that the user waits for: the tensors that they go
        to, and the copies they belong to."""
        nodes = (n for n in walk((node,)) if isinstance(n, Copy) and not n.is_async)
        stores = (n for n in nodes if is_bulk_store(n))
        return {(self.standing_for(n.dst.buffer), n.whole or n) for n in stores}

    def owners(self, node: Node) -> Iterator[tuple[Buffer, Owner | None]]:
        """Every access in the node with its owner."""
        is_async = (
            isinstance(node, Copy)
            and node.atom is not None
            and (node.atom.method is CopyMethod.CP_ASYNC)
        )
        loop = None if is_async else as_parallel(node)
        if loop is not None:
            layout = loop_layout(loop, self.part)
            for _, buffer, at in accesses(loop):
                yield buffer, self.loop_owner(loop, layout, buffer, at)
        elif isinstance(node, Load | Store | Atomic):
            yield node.buffer, self.thread_owner(node.buffer, node.index)
        elif isinstance(node, If | While | For):
            for inner in node.bodies:
                for child in inner:
                    yield from self.owners(child)
        else:
            for buffer in (*node.reads, *node.writes):
                yield buffer, None

    def loop_owner(
        self, loop: Parallel, layout: FragmentLayout, buffer: Buffer, at: tuple[Expr, ...]
    ) -> Owner | None:
        """Loops spread alike that use the same index go from a thread to the same elements, when
        no two iterations share one. Not so where threads run copies of an iteration: one stores
        and all load."""
        if layout.replicas > 1:
            return None
        places = dict(zip(PLACES, loop.extents, strict=False))
        mapping: dict[Var, Expr] = dict(zip(loop.vars, PLACES, strict=False))
        canonical = tuple(substitute(e, mapping) for e in at)
        allowed = {*self.fixed, *places}
        if any(v not in allowed for e in canonical for v in variables(e)):
            return None
        if not tells_apart(distinct(buffer, canonical), places):
            return None
        return ("loop", buffer, layout, canonical)

    def thread_owner(self, buffer: Buffer, at: tuple[Expr, ...]) -> Owner | None:
        """Outside loops: an index that differs from thread to thread, and only by the thread,
        never takes two threads to one element."""
        if self.kernel.threads[1:] != (1, 1) or not self.kernel.thread_vars:
            return None
        thread = self.kernel.thread_vars[0]
        for d, e in enumerate(distinct(buffer, at)):
            if variables(e) <= {thread, *self.fixed}:
                if tells_apart((e,), {thread: self.kernel.num_threads}):
                    return ("thread", buffer, d, e)
        return None

    def shared(self, buffers: set[Buffer] | tuple[Buffer, ...]) -> dict[Buffer, None]:
        """The buffers that several threads may touch and that something writes."""
        return {
            self.standing_for(b): None
            for b in buffers
            if b.scope in (Scope.SHARED, Scope.GLOBAL)
            and b.root not in self.exempt
            and self.standing_for(b) not in self.constant
        }

    def standing_for(self, buffer: Buffer) -> Buffer:
        return self.aliases.of(buffer)

    # ---- control flow -----------------------------------------------------------------------

    def inside(self, node: Node, pending: _Pending) -> tuple[Node, _Pending]:
        if isinstance(node, If):
            then, after_then = self.body(node.then, pending)
            orelse, after_else = self.body(node.orelse, pending)
            fresh = replace(node, then=then, orelse=orelse)
            return fresh, after_then.joined(after_else)
        if isinstance(node, For) and _is_once(node):
            inside, pending = self.body(node.body, pending)
            return node.with_bodies(inside), pending
        # What the last round left pending meets the first accesses of the next.
        entry = pending
        apart: frozenset[Buffer] = frozenset()
        if isinstance(node, For):
            apart = apart_by_rounds(node, self.kernel, self.divergence, self.standing_for)
        while True:
            fresh_loop, back, left = self.round(node, entry)
            back = replace(back, sent=after_round(back.sent, self.sent(node), node))
            if is_over_tiles(node):
                back = back.within_block()
            grown = entry.joined(back.without(apart))
            if grown == entry:
                return fresh_loop, left.joined(back) if apart else left
            entry = grown

    def round(self, node: Node, entry: _Pending) -> tuple[Node, _Pending, _Pending]:
        """A loop, and what is pending after a round of it and when it is left."""
        if isinstance(node, While):
            test, left = self.body(node.test, entry)
            body, back = self.body(node.body, left)
            return node.with_bodies(test, body), back, left
        assert isinstance(node, For), f"{type(node).__name__} is no loop"
        body, back = self.body(node.body, entry)
        return node.with_bodies(body), back, entry


def _is_once(loop: For) -> bool:
    """True when the loop surely has one round."""
    span = int_value(arith("sub", loop.stop, loop.start))
    return span is not None and 0 < span * (1 if loop.step > 0 else -1) <= abs(loop.step)


def bulk_tiles(kernel: Kernel) -> frozenset[Buffer]:
    """The shared buffers that copies touch which only start: the user orders all accesses."""
    return frozenset(
        b.root
        for n in walk(kernel.body)
        if isinstance(n, Copy) and n.is_async
        for b in (n.src.buffer, n.dst.buffer)
        if b.scope is Scope.SHARED
    )


def _without_owners(pending: _Pending) -> _Pending:
    """The same after threads of other numbers have been at work."""
    reads, writes = dict.fromkeys(pending.reads), dict.fromkeys(pending.writes)
    return replace(pending, reads=reads, writes=writes)


def is_async_access(node: Node) -> bool:
    """True for nodes that read shared memory asynchronously (PTX ISA, "Proxies"): they do not see
    what ordinary stores wrote before a fence."""
    if isinstance(node, Gemm):
        return node.is_async
    if isinstance(node, OneThread):
        return any(is_async_access(n) for n in node.body)
    return isinstance(node, Copy) and node.is_tma
