"""The generated kernel: a short Python function with the user's loops and one call per tile op.

Knows which nodes become Python control flow and which one call, what passes between the calls and
how it is packed. Does not know what a call emits, Numba or LLVM.
"""

from __future__ import annotations

import keyword
import linecache
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tilejit.dtypes import DType, bool_, int32, int64, uint32
from tilejit.errors import Span
from tilejit.ir.buffer import Scope
from tilejit.ir.expr import Expr, Var, VarKind, const, index, variables
from tilejit.ir.kernel import Kernel, Param, ParamKind
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Load,
    Node,
    Parallel,
    Role,
    Roles,
    Store,
    While,
    is_over_tiles,
    walk,
)
from tilejit.ir.parts import part_kernel
from tilejit.ir.sync import BarrierWait, SyncThreads
from tilejit.isa import barrier as isa_barrier
from tilejit.isa import launch as isa_launch
from tilejit.isa.machine import Granule, Lowered, Machine, Slot, Value
from tilejit.isa.mma import WARP
from tilejit.isa.wgmma import WARPGROUP as GROUP
from tilejit.lower.facts import Facts, facts, trip_count
from tilejit.lower.grouping import (
    Key,
    call_name,
    count_uses,
    count_uses_in,
    defines_all,
    is_pipeline_step,
    share_call,
)
from tilejit.lower.held import Held, held_as
from tilejit.lower.hopper import KernelEmitter
from tilejit.lower.opening import Opening, of_block, of_role
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.ops.uses import used_variables

COMMENT_COLUMN = 60


def lower_kernel(kernel: Kernel) -> Lowered:
    """Generate the Python source of a kernel that all passes have been over, and its granules."""
    return _Skeleton(kernel).lower()


class _Skeleton:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.facts: Facts = facts(kernel)
        self.lines: list[str] = []
        self.granules: dict[str, Granule] = {}
        self.names: dict[Any, str] = {}
        self.taken: set[str] = {"cuda"}
        self.depth = 1
        whole = Role("block", 0, kernel.num_threads, meeting=isa_barrier.WHOLE_BLOCK)
        self.role = _Part(kernel, whole)
        self.held = {key: self._held_of(key) for key in self._keys(kernel.body)}
        self.user_counts = {key: len(self._users(key, kernel.body)) for key in self.held}
        self.uses = count_uses(kernel)

    # ---- names ------------------------------------------------------------------------------

    def name(self, thing: Any, hint: str) -> str:
        """The Python variable of a Var, buffer or granule, made up at first use."""
        found = self.names.get(thing)
        if found is None:
            found = self.names[thing] = self.fresh(hint)
        return found

    def fresh(self, hint: str) -> str:
        base = re.sub(r"\W", "_", hint) or "x"
        if base[0].isdigit() or keyword.iskeyword(base):
            base = f"_{base}"
        name, number = base, 1
        while name in self.taken:
            number += 1
            name = f"{base}_{number}"
        self.taken.add(name)
        return name

    # ---- state ------------------------------------------------------------------------------

    def _held_of(self, key: Key) -> Held:
        if key.scope is Scope.FRAGMENT:
            return held_as(key.dtype, self.kernel.fragments[key].registers, False)
        return held_as(key.dtype, math.prod(key.extents), key.scope is Scope.VAR)

    def _keys(self, body: Body) -> list[Key]:
        """State that the nodes touch, in order of first use."""
        found: dict[Key, None] = {}
        for node in walk(body):
            for buffer in (*node.reads, *node.writes):
                if buffer.scope is Scope.FRAGMENT:
                    found.setdefault(buffer)
                elif buffer.scope.is_per_thread and buffer.root not in self.facts.in_memory:
                    found.setdefault(buffer.root)
        return list(found)

    def _users(self, key: Key, body: Body) -> list[Node]:
        """The nodes that touch the state themselves."""
        return [n for n in walk(body) if any(key in (b, b.root) for b in (*n.reads, *n.writes))]

    # ---- the whole kernel -------------------------------------------------------------------

    def lower(self) -> Lowered:
        kernel = self.kernel
        entry = self.fresh(kernel.name)
        parameters: list[tuple[str, Slot]] = []
        for param in kernel.params:
            parameters.append((self.name(param.var, param.name), _parameter_slot(param)))
        for var, axis in zip(kernel.block_vars, "xyz", strict=False):
            if self.uses.get(var):
                self.line(f"{self.name(var, var.name)} = cuda.blockIdx.{axis}")
        if kernel.blocks_var is not None:
            blocks = self.expression("grid_blocks", _grid_blocks, [], int32)
            self.line(f"{self.name(kernel.blocks_var, 'blocks')} = {blocks}")
        self._open(of_block(kernel, math.prod(self.threads)))
        self._define_state(kernel.body)
        self.body(self._merged(kernel.body))
        if not self.lines:
            self.line("pass")
        signature = ", ".join(name for name, _ in parameters)
        source = "\n".join([f"def {entry}({signature}):", *self.lines]) + "\n"
        return Lowered(
            source=source,
            entry=entry,
            parameters=tuple(parameters),
            noalias=tuple(p.noalias for p in kernel.params),
            granules=self.granules,
            threads=self.threads,
            shared_bytes=kernel.shared_bytes,
            fast_math=kernel.fast_math,
            lanes=self._lanes(),
            cluster=kernel.cluster,
            min_blocks=kernel.given.min_blocks,
            tensor_maps=tuple(p.kind is ParamKind.TENSOR_MAP for p in kernel.params),
        )

    @property
    def threads(self) -> tuple[int, int, int]:
        """Threads of a block, producers included."""
        kernel = self.kernel
        if not kernel.extra_threads:
            return kernel.threads
        return (kernel.num_threads + kernel.extra_threads, 1, 1)

    def _lanes(self) -> int:
        """Warps run apart in the simulator when a branch of some threads waits for others."""
        threads = math.prod(self.threads)
        if threads % WARP:
            return threads
        if any(_is_by_warpgroup(n) for n in walk(self.kernel.body)):
            return GROUP
        for node in walk(self.kernel.body):
            if isinstance(node, If | While) and self.facts.divergence.of(node.exprs):
                if any(_waits(n) for n in walk((node,))):
                    return WARP
        return threads

    def _open(self, opening: Opening | None) -> None:
        """The call with which the block, or a role, begins."""
        if opening is not None:
            self.call(opening.name, opening.maps, opening.emit, (), (), [], None)

    def _merged(self, body: Body) -> list[Body]:
        """The top-level nodes in granule-sized groups: nodes between which memory of the thread's
        own stays alive belong to one."""
        touching = [
            position
            for position, node in enumerate(body)
            if any(
                b.root in self.facts.in_memory for n in walk((node,)) for b in (*n.reads, *n.writes)
            )
        ]
        if not touching:
            return [(node,) for node in body]
        first, last = touching[0], touching[-1]
        return [
            *((node,) for node in body[:first]),
            body[first : last + 1],
            *((node,) for node in body[last + 1 :]),
        ]

    def _is_defined_first(self, key: Key, nodes: Body | None = None) -> bool:
        """True when the first use of the state sets all of it, in the same body as, or around,
        all other uses. State that outlives `nodes` must be set even if a loop has no rounds."""
        outlives = nodes is not None and len(self._users(key, nodes)) < self.user_counts[key]

        def search(body: Body) -> bool | None:
            users = [n for n in body if key in self._keys((n,))]
            if not users:
                return None
            if defines_all(users[0], key):
                return True
            if len(users) == 1 and users[0].bodies and not isinstance(users[0], Parallel):
                inner = [b for b in users[0].bodies if any(key in self._keys((n,)) for n in b)]
                if len(inner) == 1 and isinstance(users[0], For):
                    if outlives and not trip_count(users[0]):
                        return False
                    return search(inner[0])
            return False

        return bool(search(self.kernel.body if nodes is None else nodes))

    def _define_state(self, region: Body) -> None:
        """Define what is used in the region only, in more than one of its inner regions, and read
        before it is set."""
        inner = list(_inner_regions(region))
        for key in self._keys(region):
            if len(self._users(key, region)) < self.user_counts[key]:
                continue
            if any(len(self._users(key, r)) == self.user_counts[key] for r in inner):
                continue
            if not self._is_defined_first(key, region):
                self._define(key)

    def _define(self, key: Key) -> None:
        """Zeros: reading what was never written is no accident waiting to happen."""
        held = self.held[key]

        def emit(machine: Machine, inputs: list[Any]) -> list[Any]:
            return [held.pack(machine, [machine.const(0, held.dtype)] * held.count)]

        variable = self.name(key, key.name)
        name = self.fresh(f"empty_{variable}")
        self.granules[name] = Granule(name, (), (held.slot,), emit)
        self.line(f"{variable} = {name}()", key.span)

    # ---- lines ------------------------------------------------------------------------------

    def line(self, text: str, span: Span | None = None) -> None:
        indented = "    " * self.depth + text
        user = linecache.getline(span.filename, span.line).strip() if span else ""
        if user:
            indented = f"{indented:<{COMMENT_COLUMN}}  # {span.line if span else 0}: {user}"
        self.lines.append(indented)

    def body(self, groups: Iterable[Body]) -> None:
        """Nodes one after the other: neighbouring small ones share a call."""
        pending: list[Node] = []
        for group in groups:
            if len(group) == 1 and self._is_control(group[0]):
                self.flush(pending)
                self.control(group[0])
            elif pending and len(group) == 1 and share_call(pending[-1], group[0]):
                pending += group
            else:
                self.flush(pending)
                pending += group
        self.flush(pending)

    def flush(self, pending: list[Node]) -> None:
        if pending:
            self.granule(tuple(pending))
            pending.clear()

    def _is_control(self, node: Node) -> bool:
        """True when the node becomes Python control flow: every thread goes the same way, and it
        holds more than a few scalar statements."""
        if isinstance(node, Roles):
            return True
        if isinstance(node, For):
            if node.var in self.facts.unrolled or trip_count(node) == 1:
                return False
        elif not isinstance(node, If | While):
            return False
        if self.facts.divergence.of(node.exprs) or is_pipeline_step(node):
            return False
        return any(not isinstance(n, Load | Store | Atomic) for b in node.bodies for n in b)

    def control(self, node: Node) -> None:
        if isinstance(node, For):
            self._for(node)
        elif isinstance(node, Roles):
            self._roles(node)
        elif isinstance(node, If):
            self._if(node)
        else:
            assert isinstance(node, While)
            self._while(node)

    def _roles(self, node: Roles) -> None:
        """One branch a role; the last takes all threads that are left when they are all its own."""
        before = self.role
        is_all = sum(role.threads for role in node.roles) == math.prod(self.threads)
        for number, role in enumerate(node.roles):
            if is_all and number and role is node.roles[-1]:
                self.line("else:")
            else:
                condition = self.expression(f"is_{role.name}", _is_in(role), [], bool_)
                self.line(f"{'elif' if number else 'if'} {condition}:", node.span)
            self.role = _Part(self.kernel, replace(role, meeting=role.meeting or number + 1))
            self._nested(role.body, is_region=True, opening=of_role(self.kernel, node, role))
            self.role = before

    def _nested(self, body: Body, is_region: bool = False, opening: Opening | None = None) -> None:
        self.depth += 1
        before = len(self.lines)
        self._open(opening)
        if is_region:
            self._define_state(body)
        self.body((n,) for n in body)
        if len(self.lines) == before:
            self.line("pass")
        self.depth -= 1

    def _for(self, node: For) -> None:
        var = node.var
        name = self.name(var, var.name)
        hint = name
        step = const(node.step, var.dtype)
        start = self.expression(
            f"first_{hint}", lambda e: _as(e, node.start, var.dtype), [node.start], var.dtype
        )
        self.line(f"{name} = {start}", node.span)
        more = self.expression(
            f"more_{hint}",
            lambda e: _compare(e, var, node.stop, node.step),
            [var, node.stop],
            bool_,
        )
        self.line(f"while {more}:")
        self._nested(node.body, is_region=is_over_tiles(node))
        self.depth += 1
        following = self.expression(
            f"next_{hint}",
            lambda e: e.m.binary("add", e.value(var), e.value(step), var.dtype),
            [var],
            var.dtype,
        )
        self.line(f"{name} = {following}")
        self.depth -= 1

    def _if(self, node: If) -> None:
        condition = self.expression(
            "is_true", lambda e: e.value(node.condition), [node.condition], bool_
        )
        self.line(f"if {condition}:", node.span)
        self._nested(node.then)
        if node.orelse:
            self.line("else:")
            self._nested(node.orelse)

    def _while(self, node: While) -> None:
        self.line("while True:", node.span)
        self.depth += 1
        self.body((n,) for n in node.test)
        condition = self.expression(
            "is_over",
            lambda e: e.m.unary("not", e.value(node.condition), bool_),
            [node.condition],
            bool_,
        )
        self.line(f"if {condition}:")
        self.lines.append("    " * (self.depth + 1) + "break")
        if node.is_tiles:
            self._define_state(node.body)
        self.body((n,) for n in node.body)
        self.depth -= 1

    # ---- calls ------------------------------------------------------------------------------

    def expression(
        self,
        hint: str,
        compute: Callable[[KernelEmitter], Value],
        exprs: Sequence[Expr],
        dtype: DType,
    ) -> str:
        """The text of a call that evaluates a scalar."""
        inputs = self._inputs({v for e in exprs for v in variables(e)})
        role = self.role

        def emit(machine: Machine, values: list[Any]) -> list[Any]:
            emitter = self._emitter(machine, role)
            for var, value in zip(inputs, values, strict=True):
                emitter.bind(var, value)
            return [compute(emitter)]

        name = self.fresh(hint)
        slots = tuple(self._slot(v) for v in inputs)
        self.granules[name] = Granule(name, slots, (Slot(dtype),), emit)
        return f"{name}({', '.join(self.names[v] for v in inputs)})"

    def _emitter(self, machine: Machine, part: _Part) -> KernelEmitter:
        emitter = KernelEmitter(machine, part.kernel, self.facts)
        emitter.start(part.role, part.thread, part.role.meeting)
        return emitter

    def _inputs(self, used: set[Var]) -> list[Var]:
        """Variables that come from outside, in a fixed order; threads find their own index."""
        return sorted((v for v in used if v in self.names), key=lambda v: v.serial)

    def granule(self, nodes: Body) -> None:
        """One call that does the nodes."""
        defined = {v for n in walk(nodes) for v in n.defines}
        used = {v for n in walk(nodes) for v in used_variables(n)} - defined
        inputs = self._inputs(used)
        keys = self._keys(nodes)
        read = [k for k in keys if not self._is_defined_first(k, nodes)]
        written = {
            b.root if b.scope is not Scope.FRAGMENT else b for n in walk(nodes) for b in n.writes
        }
        changed = [k for k in keys if k in written]
        inside = count_uses_in(nodes)
        outputs = [
            v
            for n in nodes
            for v in n.defines
            if not n.bodies and self.uses.get(v, 0) > inside.get(v, 0)
        ]
        in_memory = sorted(
            {
                b.root
                for n in walk(nodes)
                for b in (*n.reads, *n.writes)
                if b.root in self.facts.in_memory
            },
            key=lambda b: b.name,
        )

        def emit(emitter: KernelEmitter) -> None:
            for buffer in in_memory:
                size = math.prod(buffer.extents) * buffer.dtype.bytes
                emitter.bases[buffer] = emitter.m.alloc_local(-(-size // 16) * 16, 16)
            for node in nodes:
                emitter.emit_node(node, emitter.single())

        self.call(call_name(nodes), inputs, emit, read, changed, outputs, nodes[0].span)

    def call(
        self,
        hint: str,
        inputs: Sequence[Var],
        emit: Callable[[KernelEmitter], None],
        read: Sequence[Key],
        changed: Sequence[Key],
        outputs: Sequence[Var],
        span: Span | None,
    ) -> None:
        """A line `outputs, state = name(inputs, state)` and its granule."""
        held, role = self.held, self.role

        def run(machine: Machine, values: list[Any]) -> list[Any]:
            emitter = self._emitter(machine, role)
            for var, value in zip(inputs, values, strict=False):
                emitter.bind(var, value)
            for key, value in zip(read, values[len(inputs) :], strict=True):
                emitter.state[key] = held[key].unpack(machine, value)
            for key in changed:
                if key not in emitter.state:
                    zero = machine.const(0, held[key].dtype)
                    emitter.state[key] = [zero] * held[key].count
            emit(emitter)
            results: list[Any] = [emitter.value(v) for v in outputs]
            return results + [held[k].pack(machine, emitter.state[k]) for k in changed]

        name = self.fresh(hint)
        arguments = [self.names[v] for v in inputs] + [self.name(k, k.name) for k in read]
        results = [self.name(v, v.name) for v in outputs]
        results += [self.name(k, k.name) for k in changed]
        slots = [self._slot(v) for v in inputs] + [held[k].slot for k in read]
        out_slots = [Slot(v.dtype) for v in outputs] + [held[k].slot for k in changed]
        self.granules[name] = Granule(name, tuple(slots), tuple(out_slots), run, span)
        target = f"{', '.join(results)} = " if results else ""
        self.line(f"{target}{name}({', '.join(arguments)})", span)

    def _slot(self, var: Var) -> Slot:
        for param in self.kernel.params:
            if param.var is var:
                return _parameter_slot(param)
        return Slot(var.dtype)


class _Part:
    """A role, the kernel as its threads see it, and their number as a variable."""

    def __init__(self, kernel: Kernel, role: Role) -> None:
        self.role = role
        self.kernel = part_kernel(kernel, role)
        self.thread = Var("thread", int32, VarKind.THREAD, index(0), index(role.size - 1))


def _waits(node: Node) -> bool:
    """True for what a thread does not get past before others have come."""
    if isinstance(node, SyncThreads):
        return node.number is not None and not node.is_arrival
    return isinstance(node, BarrierWait)


def _is_by_warpgroup(node: Node) -> bool:
    """True for what a warpgroup does as one."""
    if isinstance(node, Gemm):
        return node.is_async
    return isinstance(node, Roles | GemmWait)


def _parameter_slot(param: Param) -> Slot:
    if param.kind is ParamKind.TENSOR_MAP:
        return Slot(param.var.dtype, tensor_map=True)
    is_address = param.kind in (ParamKind.TENSOR, ParamKind.WORKSPACE)
    return Slot(int64 if is_address else param.var.dtype, address=is_address)


def _inner_regions(body: Body) -> Iterator[Body]:
    """The bodies inside that are entered anew: roles', and of loops over tiles."""
    for node in body:
        is_region = isinstance(node, Roles) or is_over_tiles(node)
        for inner in node.bodies:
            if is_region:
                yield inner
            else:
                yield from _inner_regions(inner)


def _grid_blocks(emitter: KernelEmitter) -> Value:
    (blocks,) = emitter.m.issue(isa_launch.GRID_BLOCKS_X)
    return emitter.m.cast([blocks], uint32, int32)[0]


def _is_in(role: Role) -> Callable[[KernelEmitter], Value]:
    def test(emitter: KernelEmitter) -> Value:
        m = emitter.m
        thread = m.cast([m.thread_index()], int32, uint32)[0]
        if role.first:
            thread = m.binary("sub", thread, m.const(role.first, uint32), uint32)
        return m.binary("lt", thread, m.const(role.threads, uint32), uint32)

    return test


def _as(emitter: KernelEmitter, e: Expr, dtype: DType) -> Value:
    return emitter.index_value(e, dtype.bits)[0]


def _compare(emitter: KernelEmitter, var: Var, stop: Expr, step: int) -> Value:
    left, right = emitter.index_value(var), emitter.index_value(stop)
    bits = max(left[1], right[1])
    a, b = emitter.index_value(var, bits)[0], emitter.index_value(stop, bits)[0]
    return emitter.m.binary("lt" if step > 0 else "gt", a, b, int32 if bits == 32 else int64)
