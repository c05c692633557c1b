"""Checks that a kernel is well formed, after tracing and after every pass.

Knows what must always hold, and what must hold of each blank once it is filled in. Does not know
what tile ops mean: they name their own problems. Takes time linear in the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tilejit.dtypes import bool_
from tilejit.errors import InternalError, Span
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import (
    BINARY,
    COMPARE,
    MATH,
    PREDICATES,
    UNARY,
    Expr,
    Op,
    Var,
    int_value,
    variables,
    walk,
)
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
)
from tilejit.ir.sync import AsyncWait, BarrierArrive, BarrierExpect, BarrierWait
from tilejit.isa.barrier import NUM_BARRIERS

_PER_ITERATION = (Load, Store, Atomic, For, If, While)  # what may stand in a T.Parallel
_COMBINE = frozenset(("add", "min", "max", "and", "or", "xor", "exch"))
_INTEGER_ONLY = frozenset(("shl", "shr", "popcount", "clz"))
_BITWISE = frozenset(("and", "or", "xor", "not"))
_FLOAT_ONLY = (MATH | {"atan2"}) - {"popcount", "clz", "floor", "ceil", "round", "trunc"}


def verify(kernel: Kernel) -> None:
    """Raise InternalError, with the node's span, for the first thing that is wrong."""
    _Verifier(kernel).run()


class _Verifier:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scope: set[Var] = set()
        self.variables: dict[Expr, frozenset[Var]] = {}  # of expressions whose types are checked
        self.buffers: set[Buffer] = set()
        self.thread_counts = {kernel.num_threads}
        self.in_parallel = False
        self.where = "kernel"
        self.span: Span | None = kernel.span

    def run(self) -> None:
        kernel = self.kernel
        self.require(len(kernel.threads) == 3 and min(kernel.threads) > 0, "no threads")
        self.require(1 <= len(kernel.grid) <= 3, f"a grid of {len(kernel.grid)} dimensions")
        for param in kernel.params:
            self.require(param.var not in self.scope, f"parameter `{param.name}` occurs twice")
            self.scope.add(param.var)
            if param.box is not None:  # the map stands for the tensor's address
                assert isinstance(param.box.tensor.data, Expr), f"{param.name} has no tensor"
                self.scope |= variables(param.box.tensor.data)
            if param.kind is ParamKind.TENSOR:
                is_global = param.buffer is not None and param.buffer.scope is Scope.GLOBAL
                self.require(is_global, f"tensor `{param.name}` has no global buffer")
        self.indices(kernel.grid)
        self.scope.update(kernel.block_vars, kernel.thread_vars)
        if kernel.blocks_var is not None:
            self.scope.add(kernel.blocks_var)
        for param in kernel.params:
            if param.buffer is not None:
                self.buffer(param.buffer)
        self.body(kernel.body)
        self.where, self.span = "kernel", kernel.span
        self.decisions()

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise InternalError(f"{self.where}: {problem}.", span=self.span)

    # --- expressions -----------------------------------------------------------------------------

    def expr(self, e: Expr) -> None:
        """Types agree all the way down, and every variable is in scope."""
        used = self.variables.get(e)
        if used is None:
            found = set()
            for node in walk(e):
                if isinstance(node, Var):
                    found.add(node)
                elif isinstance(node, Op) and node not in self.variables:
                    self.operation(node)
            used = self.variables[e] = frozenset(found)
        if not used <= self.scope:
            names = ", ".join(sorted(v.name for v in used - self.scope))
            self.require(False, f"{names} is used where it is not defined")

    def operation(self, e: Op) -> None:
        types = [c.dtype for c in e.children]
        text = f"{e.op} of {', '.join(map(str, types))} as {e.dtype}"
        if e.op == "select":
            good = len(types) == 3 and types[0] is bool_ and types[1] is types[2] is e.dtype
        elif e.op in ("cast", "bitcast"):
            good = len(types) == 1 and (e.op == "cast" or types[0].bits == e.dtype.bits)
        elif e.op in COMPARE:
            good = len(types) == 2 and types[0] is types[1] and e.dtype is bool_
        elif e.op in PREDICATES:
            good = len(types) == 1 and e.dtype is bool_
        elif e.op in BINARY or e.op in UNARY or e.op in MATH:
            arity = 2 if e.op in BINARY else 1
            good = len(types) == arity and all(t is e.dtype for t in types) and _allows(e)
        else:
            good = False
        self.require(good, f"there is no {text}")

    def indices(self, exprs: Iterable[Expr]) -> None:
        for e in exprs:
            self.expr(e)
            self.require(e.dtype.is_integer, f"an index of dtype {e.dtype}")

    def condition(self, e: Expr) -> None:
        self.expr(e)
        self.require(e.dtype is bool_, f"a condition of dtype {e.dtype}")

    # --- buffers ---------------------------------------------------------------------------------

    def buffer(self, buffer: Buffer) -> None:
        exprs = (*buffer.shape, *(buffer.strides or ()), buffer.offset)
        if buffer.scope is Scope.GLOBAL:
            self.indices(exprs)  # at every use: they may be loaded values
            self.require(isinstance(buffer.data, Expr), f"`{buffer.name}` has no address")
            assert isinstance(buffer.data, Expr)
            self.indices((buffer.data,))
            self.require(buffer.data.dtype.bits == 64, f"`{buffer.name}` has a narrow address")
        if buffer in self.buffers:
            return
        self.buffers.add(buffer)
        self.indices(exprs)
        ranks = len(buffer.strides) if buffer.strides is not None else buffer.rank
        self.require(ranks == buffer.rank, f"`{buffer.name}` has {ranks} strides")
        if buffer.scope is Scope.GLOBAL:
            return
        self.require(
            buffer.is_static and all(n > 0 for n in buffer.extents),
            f"`{buffer.name}` has no constant positive shape",
        )
        if isinstance(buffer.data, Buffer):
            self.buffer(buffer.data)
            same = buffer.data.scope is buffer.scope
            self.require(same, f"`{buffer.name}` is a view of {buffer.data.scope.value} memory")
        else:
            self.require(buffer.data is None, f"`{buffer.name}` has an address")
        if buffer.scope is Scope.BARRIER and not buffer.is_view:
            counts = buffer.arrive_counts
            self.require(
                bool(counts) and min(counts) > 0 and buffer.extents == (len(counts),),
                f"`{buffer.name}` has arrive counts {counts}",
            )

    def element(self, buffer: Buffer, index: Sequence[Expr]) -> None:
        self.buffer(buffer)
        self.require(buffer.scope is not Scope.BARRIER, f"`{buffer.name}` is a barrier")
        self.indices(index)
        self.require(
            len(index) == buffer.rank,
            f"`{buffer.name}` has {buffer.rank} dimensions and {len(index)} indices",
        )

    def region(self, region: Region) -> None:
        buffer = region.buffer
        self.element(buffer, region.starts)
        self.require(all(n > 0 for n in region.extents), f"an empty region of `{buffer.name}`")
        for d in region.dropped:
            single = 0 <= d < buffer.rank and region.extents[d] == 1
            self.require(single, f"dimension {d} of `{buffer.name}` is dropped")
        if buffer.scope is Scope.GLOBAL:
            return
        for start, extent, whole in zip(region.starts, region.extents, buffer.extents, strict=True):
            first = int_value(start)
            outside = extent > whole or (first is not None and not 0 <= first <= whole - extent)
            self.require(not outside, f"{region} is outside of its buffer")

    # --- nodes -----------------------------------------------------------------------------------

    def body(self, body: Body) -> list[Var]:
        """Check the nodes in order; their variables stay in scope until the caller drops them."""
        defined: list[Var] = []
        for node in body:
            self.where, self.span = type(node).__name__, node.span
            self.node(node)
            if not node.bodies:
                fresh = [v for v in node.defines if v not in self.scope]
                self.scope.update(fresh)
                defined += fresh
        return defined

    def nested(self, *bodies: Body, defines: Sequence[Var] = ()) -> None:
        """Bodies that share a scope, one after the other."""
        fresh = [v for v in defines if v not in self.scope]
        self.scope.update(fresh)
        for body in bodies:
            fresh += self.body(body)
        self.scope.difference_update(fresh)

    def node(self, node: Node) -> None:
        for region in node.regions:
            self.region(region)
        for problem in node.problems():
            self.require(False, problem)
        if isinstance(node, While):
            self.loop_while(node)
            return
        for e in node.exprs:
            self.expr(e)
        if isinstance(node, Load | Store | Atomic):
            self.access(node)
        elif isinstance(node, BarrierArrive | BarrierExpect | BarrierWait):
            self.barrier(node)
        elif isinstance(node, Let):
            same = node.value.dtype is node.var.dtype or (
                node.value.dtype.is_integer and node.var.dtype.is_integer
            )
            self.require(same, f"{node.var.dtype} is a value of {node.value.dtype}")
        elif isinstance(node, Roles):
            self.roles(node)
        elif isinstance(node, OneThread):
            self.nested(node.body)
        elif isinstance(node, For):
            self.loop(node)
        elif isinstance(node, Parallel):
            self.parallel(node)
        elif isinstance(node, If):
            self.condition(node.condition)
            self.nested(node.then)
            self.nested(node.orelse)
        elif isinstance(node, AsyncWait):
            self.require(node.pending >= 0, f"{node.pending} pending groups")
        if self.in_parallel and not isinstance(node, _PER_ITERATION):
            self.require(False, "stands in a T.Parallel")

    def access(self, node: Load | Store | Atomic) -> None:
        buffer = node.buffer
        self.element(buffer, node.index)
        if isinstance(node, Load):
            if node.when is not None:
                self.condition(node.when)
        else:
            same = node.value.dtype is buffer.dtype
            self.require(same, f"{node.value.dtype} goes to `{buffer.name}` of {buffer.dtype}")
        if isinstance(node, Atomic):
            self.require(node.combine in _COMBINE, f"combines by {node.combine!r}")
        if not isinstance(node, Store) and node.out is not None:
            same = node.out.dtype is buffer.dtype
            self.require(same, f"{buffer.dtype} of `{buffer.name}` gives {node.out.dtype}")

    def roles(self, node: Roles) -> None:
        end = 0
        for role in sorted(node.roles, key=lambda role: role.first):
            self.require(role.first >= end and role.threads > 0, f"`{role.name}` shares threads")
            end = role.first + role.threads
            self.require(role.threads % role.teams == 0, f"{role.teams} teams are not equal")
            self.thread_counts.add(role.size)
            self.nested(role.body, defines=() if role.team is None else (role.team,))
        total = self.kernel.num_threads + self.kernel.extra_threads
        self.require(end <= total, f"roles of {end} threads in a block of {total}")
        if node.opener is not None:
            is_there = 0 <= node.opener < len(node.roles) and 0 < node.opening < NUM_BARRIERS
            self.require(is_there, f"role {node.opener} opens at barrier {node.opening}")

    def barrier(self, node: BarrierArrive | BarrierExpect | BarrierWait) -> None:
        barrier = node.barrier
        self.buffer(barrier)
        self.require(barrier.scope is Scope.BARRIER, f"`{barrier.name}` is no barrier")
        self.indices(node.exprs)
        slot, count = int_value(node.slot), len(barrier.root.arrive_counts)
        self.require(slot is None or 0 <= slot < count, f"`{barrier.name}` has no slot {slot}")

    def loop(self, node: For) -> None:
        self.indices((node.start, node.stop))
        self.require(node.var.dtype.is_integer, f"counts in {node.var.dtype}")
        self.require(node.step != 0, "a step of 0")
        self.nested(node.body, defines=node.defines)

    def loop_while(self, node: While) -> None:
        before = self.where, self.span
        tested = self.body(node.test)
        self.where, self.span = before
        self.condition(node.condition)
        self.nested(node.body)
        self.scope.difference_update(tested)

    def parallel(self, node: Parallel) -> None:
        self.require(not self.in_parallel, "stands in a T.Parallel")
        self.require(
            len(node.vars) == len(node.extents) and all(n > 0 for n in node.extents),
            f"{len(node.vars)} variables over extents {node.extents}",
        )
        self.in_parallel = True
        self.nested(node.body, defines=node.vars)
        self.in_parallel = False

    # --- what passes decided ---------------------------------------------------------------------

    def decisions(self) -> None:
        kernel = self.kernel
        for key, layout in kernel.fragments.items():
            shape = key.extents
            name = key.name if isinstance(key, Buffer) else "a T.Parallel"
            self.require(
                layout.shape == tuple(shape),
                f"the layout of `{name}` has shape {layout.shape}, not {tuple(shape)}",
            )
            self.require(
                layout.threads in self.thread_counts,
                f"the layout of `{name}` is over {layout.threads} of {kernel.num_threads} threads",
            )
        for buffer, bytes_ in kernel.shared.items():
            self.require(
                bytes_.shape == buffer.extents and bytes_.itemsize == buffer.dtype.bytes,
                f"the layout of `{buffer.name}` has shape {bytes_.shape} of {bytes_.itemsize}-byte "
                "elements",
            )
        for buffer, given in kernel.given.layouts.items():
            self.require(
                replace(kernel.shared.get(buffer, given.layout), tile_align=1) == given.layout,
                f"`{buffer.name}` does not lie in its given layout, {given.layout}",
            )
        for buffer, slots in kernel.slots.items():
            self.require(slots >= 1, f"`{buffer.name}` has {slots} slots")
        self.offsets()

    def offsets(self) -> None:
        kernel = self.kernel
        taken = []
        lying_over = {b for _, over in kernel.unions for b in over}
        for buffer, offset in kernel.offsets.items():
            if buffer.scope is Scope.BARRIER:
                size = 8 * len(buffer.arrive_counts)
            else:
                known = buffer in kernel.shared
                self.require(known, f"`{buffer.name}` has an offset and no layout")
                size = kernel.shared[buffer].bytes
            if buffer not in lying_over:
                taken.append((offset, offset + size, buffer.name))
        end, last = 0, ""
        for start, stop, name in sorted(taken):
            self.require(start >= end, f"`{last}` and `{name}` overlap in shared memory")
            end, last = stop, name
        self.require(
            not taken or end <= kernel.shared_bytes,
            f"shared memory ends at {kernel.shared_bytes} bytes, `{last}` at {end}",
        )


def _allows(e: Op) -> bool:
    """True when the operation exists for its dtype."""
    if e.op in _BITWISE:
        return not e.dtype.is_float
    if e.op in _INTEGER_ONLY:
        return e.dtype.is_integer
    if e.op in _FLOAT_ONLY:
        return e.dtype.is_float
    return not e.dtype.is_bool or e.op in ("min", "max")
