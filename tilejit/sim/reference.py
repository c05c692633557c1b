"""Runs a tile graph in NumPy, a block or cluster at a time: the definition of what a program means.

Knows every node that users write. Does not know layouts, instructions or generated code:
asynchronous copies and multiplies complete at once. Roles, and the blocks of a cluster, run side by
side, each until it must wait; a wait that can never end is an error.

Tile ops act on whole arrays. The body of a `T.Parallel` is executed statement by statement, each
for all iterations at once: its loads before its store. Statements outside one run once, or, where
they depend on the thread, for all threads at once. `if` and loops whose conditions differ between
iterations or threads execute with a mask.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tilejit.errors import InternalError, SimulationError
from tilejit.ir.buffer import Buffer, Region, whole
from tilejit.ir.divergence import divergence
from tilejit.ir.expr import Expr, Var, index
from tilejit.ir.kernel import Kernel, ParamKind
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Let,
    Load,
    Node,
    OneThread,
    Parallel,
    Roles,
    Store,
    While,
    walk,
)
from tilejit.ir.parts import part_kernel
from tilejit.ir.sync import (
    AsyncCommit,
    AsyncWait,
    BarrierArrive,
    BarrierExpect,
    BarrierWait,
    Control,
    Elect,
    SyncThreads,
)
from tilejit.ops.cluster import ClusterExchange, ClusterGather, ClusterReduce, ClusterScatter
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import FetchOperands, Gemm, GemmWait
from tilejit.ops.reduce import Reduce, Step
from tilejit.ops.scalar import Array, cast_array, evaluate_op
from tilejit.ops.scan import Scan
from tilejit.sim.reference_atomic import combine_at
from tilejit.sim.reference_gemm import accumulate
from tilejit.sim.reference_memory import (
    AddressSpace,
    Mask,
    both,
    holds_everywhere,
    holds_nowhere,
)
from tilejit.sim.reference_reduce import (
    exchanged,
    parts_of,
    reduced,
    running,
    running_in_parts,
    taken,
    with_before,
)
from tilejit.sim.reference_state import BlockState
from tilejit.sim.reference_sync import Cluster, Meetings
from tilejit.sim.reference_values import (
    ThreadDependent,
    Value,
    as_array,
    as_value,
    is_lane_value,
)


def run_kernel(
    kernel: Kernel,
    arguments: Mapping[Buffer | Var, Any],
    grid: tuple[int, int, int],
    memory: Sequence[Array] = (),
) -> None:
    """Execute all blocks of `grid`, writing arrays in place.

    arguments: for each parameter an array (by its buffer; strided ones too) or a number (by its
        variable; addresses are numbers).
    memory: further arrays that addresses may point into.

    Raises:
        SimulationError: the program does what its meaning leaves open, such as reading on-chip
            memory out of range or storing two values to one element.
    """
    arrays = {key: value for key, value in arguments.items() if isinstance(key, Buffer)}
    addresses = AddressSpace([*arrays.values(), *memory])
    differing = divergence(kernel)
    cluster = Cluster(kernel)
    for rank in range(kernel.cluster_size):
        state = BlockState(arrays, addresses, kernel.num_threads, differing)
        executor = _Executor(kernel, state, cluster, rank)
        cluster.members.append(executor)
        for param in kernel.params:
            if param.kind is ParamKind.TENSOR:
                assert param.buffer is not None, f"parameter {param.name} has no buffer"
                value = arrays[param.buffer].ctypes.data
            else:
                value = arguments[param.var]
            executor.variables[param.var] = as_value(value, param.var.dtype)
    for blocks in cluster.places(grid):
        cluster.start()
        parts = [
            functools.partial(executor.run_block, block)
            for executor, block in zip(cluster.members, blocks, strict=True)
        ]
        if len(parts) == 1:
            parts[0]()
        else:
            cluster.strands.run(parts)


class _Executor(Meetings):
    """Executes the nodes of one kernel, block after block; or of one role of a block."""

    def __init__(self, kernel: Kernel, state: BlockState, cluster: Cluster, rank: int) -> None:
        super().__init__(kernel, state, cluster, rank)
        self.beside = waiting_branches(kernel.body)
        self.under_way: dict[Buffer | None, list[Array]] = {}  # what exchanges have sent
        self.begun: set[If] = set()  # run by the branch before them already
        self.actions: dict[type[Node], Callable[[Any], None]] = {
            For: self.run_for,
            Parallel: self.run_parallel,
            If: self.run_if,
            While: self.run_while,
            Load: self.run_load,
            Store: self.run_store,
            Atomic: self.run_atomic,
            Copy: self.run_copy,
            Fill: self.run_fill,
            Gemm: self.run_gemm,
            Reduce: self.run_reduce,
            Scan: self.run_scan,
            ClusterReduce: self.run_exchange,
            ClusterGather: self.run_exchange,
            ClusterScatter: self.run_exchange,
            BarrierArrive: self.run_arrive,
            BarrierWait: self.run_wait,
            SyncThreads: self.run_sync,
            BarrierExpect: self.run_expect,
            Control: self.run_control,
            Roles: self.run_roles,
            OneThread: self.run_one_thread,
            Let: self.run_let,
            Elect: self.run_elect,
            AsyncCommit: self.run_nothing,
            AsyncWait: self.run_nothing,
            GemmWait: self.run_nothing,
            FetchOperands: self.run_nothing,
        }

    def run_block(self, block: tuple[int, int, int]) -> None:
        """Run the kernel's body; the cluster has been started."""
        self.variables.update(zip(self.kernel.block_vars, block, strict=False))
        rest = np.arange(self.kernel.num_threads, dtype=np.int32)
        for var, extent in zip(self.kernel.thread_vars, self.kernel.threads, strict=False):
            self.variables[var] = (rest % extent).astype(var.dtype.numpy)
            rest = rest // extent
        self.come_first()
        self.run(self.kernel.body)
        self.cluster.leave(self.kernel.num_threads)

    def run_roles(self, node: Roles) -> None:
        """Each role by an executor of its own, side by side."""
        self.need_all_threads("T.ws")
        parts = []
        for role in node.roles:
            part = replace(part_kernel(self.kernel, role), body=role.body)
            lens = self.state.seen_by(role.first, role.threads)
            for var in self.kernel.thread_vars[:1]:
                own = np.arange(role.first, role.first + role.threads)
                lens.values.variables[var] = own.astype(var.dtype.numpy)
            executor = _Executor(part, lens, self.cluster, self.rank)
            parts.append(functools.partial(executor.run, role.body))
        self.strands.run(parts)

    def run_one_thread(self, node: OneThread) -> None:
        first = np.arange(self.kernel.num_threads) == 0
        self.run_masked(node.body, both(self.state.mask, first))

    def run_let(self, node: Let) -> None:
        value = self.values.whole(node.value)
        self.variables[node.var] = value

    def run(self, body: Body) -> None:
        for node in body:
            action = self.actions.get(type(node))
            if action is None:
                raise InternalError(
                    f"The reference executor does not know {type(node).__name__}.", span=node.span
                )
            self.values.span = node.span
            action(node)

    def run_masked(self, body: Body, mask: Mask) -> None:
        """Run the body in the lanes of `mask` only."""
        before = self.state.mask
        self.state.mask = mask
        try:
            self.run(body)
        finally:
            self.state.mask = before

    # --- control flow ----------------------------------------------------------------------------

    def run_for(self, node: For) -> None:
        start, stop = self.values.whole(node.start), self.values.whole(node.stop)
        if not is_lane_value(start) and not is_lane_value(stop):
            for number in range(start, stop, node.step):
                self.variables[node.var] = number
                self.run(node.body)
            return
        i: Array = np.asarray(start, np.int64)
        while True:
            more = i < stop if node.step > 0 else i > stop
            active = both(self.state.mask, more)
            if holds_nowhere(active):
                return
            self.variables[node.var] = as_value(i.astype(node.var.dtype.numpy), node.var.dtype)
            self.run_masked(node.body, active)
            i = i + node.step

    def run_if(self, node: If) -> None:
        condition = self.values.value(node.condition)
        if not is_lane_value(condition):
            self.run(node.then if condition else node.orelse)
            return
        if node in self.beside:
            self.run_together(node)
            return
        for body, active in self.arms(node, condition):
            self.run_masked(body, active)

    def arms(self, node: If, condition: Array) -> list[tuple[Body, Mask]]:
        """The arms that any lane takes, and which lanes do."""
        mask = self.state.mask
        pairs = ((node.then, both(mask, condition)), (node.orelse, both(mask, ~condition)))
        return [(body, active) for body, active in pairs if body and not holds_nowhere(active)]

    def run_together(self, node: If) -> None:
        """Run arms that wait for each other: those of `node` and of the branches right after it,
        as far as no thread takes two of them."""
        if node in self.begun:
            self.begun.discard(node)
            return
        arms: list[tuple[Body, Mask]] = []
        for branch in (node, *self.beside[node]):
            condition = self.values.value(branch.condition)
            if not is_lane_value(condition):
                break
            more = self.arms(branch, condition)
            if any(not holds_nowhere(both(a, b)) for _, a in arms for _, b in more):
                break
            arms += more
            if branch is not node:
                self.begun.add(branch)
        if len(arms) == 1:
            self.run_masked(*arms[0])
            return
        self.run_beside([functools.partial(self.run_masked, *arm) for arm in arms])

    def run_while(self, node: While) -> None:
        active = self.state.mask
        while True:
            self.run_masked(node.test, active)
            self.values.span = node.span
            condition = self.values.value(node.condition)
            if not is_lane_value(condition):
                if not condition:
                    return
            else:
                active = both(active, condition)
                if holds_nowhere(active):
                    return
            self.run_masked(node.body, active)

    def run_parallel(self, node: Parallel) -> None:
        self.need_all_threads("T.Parallel")
        if self.state.box is not None:
            raise InternalError("A T.Parallel stands inside another.", span=node.span)
        outer = dict(self.variables)
        for var, value in outer.items():
            if is_lane_value(value):
                same = np.all(value == value.flat[0])
                self.variables[var] = as_value(value.flat[0], var.dtype) if same else _UNKNOWN
        rank = len(node.extents)
        for d, (var, extent) in enumerate(zip(node.vars, node.extents, strict=True)):
            shape = tuple(extent if d == k else 1 for k in range(rank))
            self.variables[var] = np.arange(extent, dtype=var.dtype.numpy).reshape(shape)
        mask, self.state.mask, self.state.box = self.state.mask, None, node.extents
        try:
            self.run(node.body)
            self.state.end_parallel()
        finally:
            self.state.mask, self.state.box = mask, None
        self.variables.clear()
        self.variables.update(outer)

    def need_all_threads(self, what: str) -> None:
        """What the whole block does together must not stand where only some threads come."""
        if not holds_everywhere(self.state.mask):
            raise SimulationError(
                f"{what} is reached by some threads of the block only.",
                span=self.values.span,
                hint="Move it out of the condition or loop that differs between threads.",
            )

    # --- scalar access ---------------------------------------------------------------------------

    def indices(self, exprs: Sequence[Expr]) -> tuple[Value, ...]:
        return tuple(self.values.whole(e) for e in exprs)

    def run_load(self, node: Load) -> None:
        when = None if node.when is None else self.values.value(node.when)
        self.variables[node.out] = self.state.gather(node.buffer, self.indices(node.index), when)

    def run_store(self, node: Store) -> None:
        self.state.scatter(node.buffer, self.indices(node.index), self.values.value(node.value))

    def run_atomic(self, node: Atomic) -> None:
        index, value = self.indices(node.index), self.values.value(node.value)
        arrays = [v for v in (*index, value, self.state.mask) if is_lane_value(v)]
        lanes: tuple[int, ...] = ()
        if self.state.box is not None:
            lanes = self.state.box
        elif arrays:
            lanes = (self.kernel.num_threads,)
        old = np.zeros(lanes, node.buffer.dtype.numpy)
        for mask, view in self.state.views(node.buffer, self.state.mask):
            active = view.check(index, mask, node.span)
            if holds_nowhere(active):
                continue
            chosen = np.broadcast_to(True if active is None else active, lanes)
            places = view.places(index, active, node.span)
            flat = tuple(np.broadcast_to(p, lanes)[chosen] for p in places)
            operand = np.broadcast_to(as_array(value, node.buffer.dtype), lanes)[chosen]
            old[chosen] = combine_at(
                view.array, flat, operand, node.combine, node.buffer.dtype, node.out is not None
            )
        if node.out is not None:
            self.variables[node.out] = as_value(old, node.out.dtype)

    # --- tiles -----------------------------------------------------------------------------------

    def run_copy(self, node: Copy) -> None:
        if node.is_async or node.is_tma:
            self.run_bulk_copy(node)
            return
        if not any(r.buffer.scope.is_per_thread for r in (node.src, node.dst)):
            self.need_all_threads("T.copy")
        pad = 0 if node.pad is None else self.values.value(node.pad)
        self.move(node, node.src, node.dst, pad)

    def move(self, node: Copy, source: Region, target: Region, pad: Any = 0) -> None:
        """Copy or add a region, all of it at once."""
        kind = target.buffer.dtype
        values = cast_array(self.state.read(source, pad), source.buffer.dtype, kind)
        if node.combine is not None:
            values = evaluate_op(node.combine, (self.state.read(target), values), kind)
        self.state.write(target, values)

    def run_bulk_copy(self, node: Copy) -> None:
        """A copy that threads start: once, or once for each place that they name."""
        if node.barrier is not None:
            self.check_slots(node.barrier.buffer, self.values.whole(node.barrier.slot))
        starts = [self.values.whole(e) for e in (*node.src.starts, *node.dst.starts)]
        mask, rank = self.state.mask, len(node.src.starts)
        if any(map(is_lane_value, starts)):
            chosen = np.broadcast_to(True if mask is None else mask, (self.kernel.num_threads,))
            wide = [np.broadcast_to(s, chosen.shape)[chosen] for s in starts]
            places = dict.fromkeys(zip(*(w.tolist() for w in wide), strict=True))
        else:
            places = {tuple(starts): None}
        self.state.mask = None
        try:
            for place in places:
                at = tuple(index(n) for n in place)
                source, target = (
                    replace(node.src, starts=at[:rank]),
                    replace(node.dst, starts=at[rank:]),
                )
                self.move(node, source, target)
        finally:
            self.state.mask = mask

    def run_fill(self, node: Fill) -> None:
        if not node.dst.buffer.scope.is_per_thread:
            self.need_all_threads("T.fill")
        value = as_array(self.values.value(node.value), node.dst.buffer.dtype)
        self.state.write(node.dst, value.reshape(*value.shape, *(1,) * len(node.dst.shape)))

    def run_gemm(self, node: Gemm) -> None:
        self.need_all_threads("T.gemm")
        self.run(node.filling)
        a, b = self.state.read(node.a), self.state.read(node.b)
        is_first = node.clear or (node.begins is not None and bool(self.values.value(node.begins)))
        acc = None if is_first else self.state.read(node.acc)
        result = accumulate(
            a.T if node.transpose_a else a,
            b.T if node.transpose_b else b,
            acc,
            (node.a.buffer.dtype, node.b.buffer.dtype, node.acc.buffer.dtype),
        )
        self.state.write(node.acc, result)

    def run_reduce(self, node: Reduce) -> None:
        self.need_all_threads(f"T.reduce_{node.kind}")
        if node.step is Step.SEND:
            self.state.write(node.parts, parts_of(node, self.state.read(node.src)))
            return
        old = None if node.clear else self.state.read(node.dst)
        if node.step is Step.TAKE:
            self.state.write(node.dst, taken(node, self.state.read(node.parts), old))
            return
        self.state.write(node.dst, reduced(node, self.state.read(node.src), old))

    def run_scan(self, node: Scan) -> None:
        self.need_all_threads(node.call)
        if node.scratch is None:
            values = running(node, self.state.read(node.src))
            self.state.write(node.dst, cast_array(values, node.accumulator, node.dst.buffer.dtype))
        elif node.step is Step.SEND:
            values, totals = running_in_parts(node, self.state.read(node.src))
            self.state.write(node.dst, values)
            self.state.write(whole(node.scratch), totals)
        else:
            totals = self.state.read(whole(node.scratch))
            self.state.write(node.dst, with_before(node, self.state.read(node.src), totals))

    def run_exchange(self, node: ClusterExchange) -> None:
        self.need_all_threads(node.call)
        if node.step is not Step.TAKE:
            parts = self.exchange(node, self.state.read(node.given).copy())
            self.under_way.setdefault(node.scratch, []).append(exchanged(node, parts, self.rank))
        if node.step is not Step.SEND:
            self.state.write(node.result, self.under_way[node.scratch].pop(0))


def waiting_branches(body: Body) -> dict[If, tuple[If, ...]]:
    """The branches that wait for barriers, and those with barriers right after each."""
    result: dict[If, tuple[If, ...]] = {}
    for k, node in enumerate(body):
        for inner in node.bodies:
            result |= waiting_branches(inner)
        if isinstance(node, If) and _waits(node):
            rest = itertools.takewhile(
                lambda n: isinstance(n, If) and (_waits(n) or _holds(n, BarrierArrive)),
                body[k + 1 :],
            )
            result[node] = tuple(n for n in rest if isinstance(n, If))
    return result


def _waits(node: Node) -> bool:
    """True when threads in it wait for others that are not in it."""
    return any(
        isinstance(n, BarrierWait) or (isinstance(n, SyncThreads) and n.number is not None)
        for n in walk((node,))
    )


def _holds(node: Node, *kinds: type[Node]) -> bool:
    return any(isinstance(inner, kinds) for inner in walk((node,)))


_UNKNOWN = ThreadDependent()
