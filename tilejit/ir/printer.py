"""Prints a kernel as readable, TileLang-like Python with the user's names.

Knows every node of `ir`; tile ops show themselves. The text is deterministic and, without lines,
does not depend on where the source stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tilejit.ir.buffer import Buffer, Scope, Section
from tilejit.ir.expr import Const, Expr, arith, int_value
from tilejit.ir.kernel import Kernel, Param, ParamKind
from tilejit.ir.names import Names
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Let,
    Load,
    LoopKind,
    Node,
    OneThread,
    Parallel,
    Roles,
    Store,
    While,
    walk,
)
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
from tilejit.layout.shared import SharedLayout

_INDENT = "    "
GROUP = 128  # threads of a warpgroup
_COMMENT_COLUMN = 60
_SWIZZLES = {8: "full", 4: "half", 2: "quarter"}  # TileLang's names, by 16-byte chunks


def print_kernel(kernel: Kernel, *, lines: bool = False) -> str:
    """The kernel as text; with `lines`, each statement's user line in a comment."""
    return "\n".join(_Printer(kernel, lines).text()) + "\n"


class _Printer:
    def __init__(self, kernel: Kernel, lines: bool) -> None:
        self.kernel = kernel
        self.lines = lines
        self.names = Names()
        self.declared: set[Buffer] = set()
        self.leaves: dict[type[Node], Callable[[Any], str]] = {
            Load: self.load,
            Store: self.store,
            Atomic: self.atomic,
            SyncThreads: self.sync,
            BarrierArrive: self.arrive,
            BarrierWait: lambda n: (
                f"T.barrier_wait({self.slot(n)}, parity={self.names.expr(n.parity)})"
            ),
            BarrierExpect: self.expect,
            Elect: lambda n: f"{self.names.of(n.out)} = T.shuffle_elect({n.each})",
            Let: lambda n: f"{self.names.of(n.var)} = {self.names.expr(n.value)}",
            Control: lambda n: f"T.{n.op.value}({n.count or ''})",
            AsyncCommit: lambda n: "T.async_commit()",
            AsyncWait: lambda n: f"T.async_wait({n.pending})",
        }

    def text(self) -> Iterator[str]:
        kernel, names = self.kernel, self.names
        for param in kernel.params:
            tensor = param.buffer if param.box is None else param.box.tensor
            if tensor is not None:
                names.of(tensor)
                self.declared.add(tensor)
        params = ", ".join(self.param(p) for p in kernel.params)
        decided = [str(kernel.target)] if kernel.target else []
        decided += ["fast math"] if kernel.fast_math else []
        decided += [f"{kernel.shared_bytes} bytes shared"] if kernel.shared_bytes else []
        yield _comment(f"def {kernel.name}({params}):", ", ".join(decided))
        grid = ", ".join(map(names.expr, kernel.grid))
        x, y, z = kernel.threads
        threads = str(x) if y == z == 1 else str(kernel.threads)
        block = ", ".join(map(names.of, kernel.block_vars)) or "_"
        if len(kernel.block_vars) > 1:
            block = f"({block})"
        cluster = f", cluster={kernel.cluster}" if kernel.cluster_size > 1 else ""
        yield f"{_INDENT}with T.Kernel({grid}, threads={threads}{cluster}) as {block}:"
        for var, axis in zip(kernel.thread_vars, "xyz", strict=False):
            if any(var in _vars_of(node) for node in walk(kernel.body)):
                yield f"{_INDENT * 2}{names.of(var)} = T.get_thread_binding()  # threadIdx.{axis}"
        for buffer in kernel.buffers:
            if buffer.scope is not Scope.GLOBAL and self.is_constant(buffer):
                yield from self.declaration(buffer, _INDENT * 2)
        yield from self.given_layouts(_INDENT * 2)
        if not kernel.body:
            yield f"{_INDENT * 2}pass"
        yield from self.body(kernel.body, _INDENT * 2)

    # --- parameters and buffers ------------------------------------------------------------------

    def param(self, param: Param) -> str:
        names = self.names
        if param.box is not None:
            box = "x".join(map(str, param.box.extents))
            return f"{names.of(param.var)}: boxes of {box} of {names.of(param.box.tensor)}"
        if param.buffer is None:
            kind = "T.ptr" if param.kind is ParamKind.POINTER else f"T.{param.var.dtype}"
            return f"{names.of(param.var)}: {kind}"
        buffer = param.buffer
        extras = [f'"{buffer.dtype}"']
        kind = "Tensor"
        if buffer.strides is not None:
            kind = "StridedTensor"
            extras.insert(0, names.shape(buffer.strides))
        extras += self.offset(buffer)
        extras += [f"align={buffer.align}"] if buffer.align else []
        extras += ['buffer_type="auto_broadcast"'] if buffer.broadcasts else []
        extras += ["noalias=True"] if param.noalias else []
        extras += ["overlaps=True"] if param.overlaps else []
        return f"{names.of(buffer)}: T.{kind}({names.shape(buffer.shape)}, {', '.join(extras)})"

    def section(self, buffer: Buffer, section: Section) -> str:
        names, stop = self.names, arith("add", section.first, buffer.shape[section.dim])
        ends = f"{names.expr(section.first)}, {names.expr(stop)}"
        which = f", dim={section.dim}" if section.dim else ""
        return f"T.section({names.of(section.tensor)}, {ends}{which})"

    def offset(self, buffer: Buffer) -> list[str]:
        if int_value(buffer.offset) == 0:
            return []
        return [f"elem_offset={self.names.expr(buffer.offset)}"]

    def is_constant(self, buffer: Buffer) -> bool:
        """True when the declaration uses no variables and so may stand first."""
        fields = [*buffer.shape, *(buffer.strides or ()), buffer.offset]
        inner = not isinstance(buffer.data, Buffer) or self.is_constant(buffer.data)
        return inner and all(isinstance(e, Const) for e in fields)

    def declaration(self, buffer: Buffer, indent: str) -> Iterator[str]:
        if buffer in self.declared:
            return
        self.declared.add(buffer)
        if isinstance(buffer.data, Buffer):
            yield from self.declaration(buffer.data, indent)
        kernel = self.kernel
        decided: list[str] = []
        if buffer in kernel.slots:
            decided.append(f"{kernel.slots[buffer]} slots")
        if buffer in kernel.shared:
            decided.append(str(kernel.shared[buffer]))
        if buffer in kernel.fragments:
            decided.append(str(kernel.fragments[buffer]))
        if buffer in kernel.offsets:
            decided.append(f"at byte {kernel.offsets[buffer]}")
        text = f"{indent}{self.names.of(buffer)} = {self.allocation(buffer)}"
        yield _comment(text, ", ".join(decided))

    def allocation(self, buffer: Buffer) -> str:
        names = self.names
        if buffer.scope is Scope.BARRIER and not buffer.is_view:
            counts = buffer.arrive_counts
            return f"T.alloc_barrier({counts[0] if len(counts) == 1 else list(counts)})"
        if buffer.section is not None:
            return self.section(buffer, buffer.section)
        fields = [names.shape(buffer.shape), f'"{buffer.dtype}"']
        if buffer.strides is not None:
            fields.append(f"strides={names.shape(buffer.strides)}")
        fields += self.offset(buffer)
        fields += [f"align={buffer.align}"] if buffer.align else []
        fields += ['buffer_type="auto_broadcast"'] if buffer.broadcasts else []
        if isinstance(buffer.data, Expr):
            return f"T.make_tensor({', '.join([names.expr(buffer.data), *fields])})"
        if isinstance(buffer.data, Buffer):
            return f"T.view({', '.join([names.of(buffer.data), *fields])})"
        function = {
            Scope.SHARED: "alloc_shared",
            Scope.FRAGMENT: "alloc_fragment",
            Scope.LOCAL: "alloc_local",
            Scope.VAR: "alloc_var",
        }[buffer.scope]
        if buffer.scope is Scope.VAR and len(fields) == 2 and buffer.extents in ((), (1,)):
            fields = fields[1:]
        return f"T.{function}({', '.join(fields)})"

    def given_layouts(self, indent: str) -> Iterator[str]:
        """The layouts that the user gave to buffers which are still there."""
        given = self.kernel.given.layouts
        there = [b for b in self.kernel.buffers if b in given]
        pairs = [f"{self.names.of(b)}: {self.layout(b, given[b].layout)}" for b in there]
        if pairs:
            yield f"{indent}T.annotate_layout({{{', '.join(pairs)}}})"

    def layout(self, buffer: Buffer, layout: SharedLayout) -> str:
        """The call that makes a given layout."""
        name = self.names.of(buffer)
        if layout.pitch > layout.panel:
            return f"T.make_padded_layout({name}, {layout.pitch - layout.panel})"
        if layout.swizzle > 1:
            return f"T.make_{_SWIZZLES[layout.swizzle]}_bank_swizzled_layout({name})"
        kind = "linear" if layout.is_linear else "chunked"
        return f"T.make_{kind}_layout({name})"

    # --- nodes -----------------------------------------------------------------------------------

    def body(self, body: Body, indent: str) -> Iterator[str]:
        for node in body:
            for buffer in (*node.reads, *node.writes):
                yield from self.declaration(buffer, indent)
            yield from self.node(node, indent)

    def block(self, body: Body, indent: str) -> Iterator[str]:
        yield from self.body(body, indent + _INDENT)
        if not body:
            yield f"{indent}{_INDENT}pass"

    def line(self, text: str, node: Node, indent: str) -> str:
        if not self.lines or node.span is None:
            return indent + text
        where = f"line {node.span.line}"
        return f"{indent}{text}, {where}" if "  # " in text else _comment(indent + text, where)

    def node(self, node: Node, indent: str) -> Iterator[str]:
        if isinstance(node, For):
            yield self.line(self.loop(node), node, indent)
            yield from self.block(node.body, indent)
        elif isinstance(node, Parallel):
            yield self.line(self.parallel(node), node, indent)
            yield from self.block(node.body, indent)
        elif isinstance(node, If):
            condition = self.names.expr(node.condition)
            yield self.line(f"with T.If({condition}):", node, indent)
            yield from self.block(node.then, indent)
            if node.orelse:
                yield f"{indent}with T.Else():"
                yield from self.block(node.orelse, indent)
        elif isinstance(node, While):
            yield from self.loop_while(node, indent)
        elif isinstance(node, Roles):
            for number, role in enumerate(node.roles):
                last = role.first + role.threads - 1
                groups = range(role.first // GROUP, (last + 1) // GROUP)
                name = "" if role.name.startswith("ws") else f"{role.name}, "
                text = f"{indent}with T.ws({', '.join(map(str, groups))}):"
                teams = f", {role.teams} teams" if role.teams > 1 else ""
                opens = ", makes the barriers" if node.opener == number else ""
                yield f"{text}  # {name}threads {role.first} to {last}{teams}{opens}"
                yield from self.block(role.body, indent)
        elif isinstance(node, OneThread):
            each = f"each={node.each}" if node.each else ""
            yield self.line(f"with one_thread({each}):", node, indent)
            yield from self.block(node.body, indent)
        else:
            show = self.leaves.get(type(node))
            text = show(node) if show is not None else node.show(self.names)
            yield self.line(text, node, indent)

    def loop(self, node: For) -> str:
        names = self.names
        bounds = [names.expr(node.stop)]
        if int_value(node.start) != 0 or node.step != 1:
            bounds.insert(0, names.expr(node.start))
        if node.step != 1:
            bounds.append(str(node.step))
        function = "Pipelined" if node.kind is LoopKind.PIPELINED else node.kind.value
        if node.kind is LoopKind.PIPELINED and node.num_stages is not None:
            bounds.append(f"num_stages={node.num_stages}")
        for name in ("order", "stage", "group"):
            if getattr(node, name):
                bounds.append(f"{name}={getattr(node, name)}")
        if node.unroll_factor is not None:
            bounds.append(f"unroll_factor={node.unroll_factor}")
        return f"for {names.of(node.var)} in T.{function}({', '.join(bounds)}):"

    def parallel(self, node: Parallel) -> str:
        variables = ", ".join(map(self.names.of, node.vars))
        fields = list(map(str, node.extents))
        if node.coalesced_width is not None:
            fields.append(f"coalesced_width={node.coalesced_width}")
        text = f"for {variables} in T.Parallel({', '.join(fields)}):"
        return text if node.layout is None else f"{text}  # {node.layout}"

    def loop_while(self, node: While, indent: str) -> Iterator[str]:
        if not node.test:
            condition = self.names.expr(node.condition)
            yield self.line(f"with T.While({condition}):", node, indent)
            yield from self.block(node.body, indent)
            return
        yield self.line("while True:", node, indent)
        yield from self.body(node.test, indent + _INDENT)
        condition = self.names.expr(node.condition)
        yield f"{indent}{_INDENT}if not ({condition}): break"
        yield from self.body(node.body, indent + _INDENT)

    def load(self, node: Load) -> str:
        text = f"{self.names.of(node.out)} = {self.names.index(node.buffer, node.index)}"
        if node.when is not None:
            text += f" if {self.names.expr(node.when)} else 0"
        return text

    def store(self, node: Store) -> str:
        place = self.names.index(node.buffer, node.index)
        return f"{place} = {self.names.expr(node.value)}"

    def atomic(self, node: Atomic) -> str:
        place = self.names.index(node.buffer, node.index)
        text = f"T.atomic_{node.combine}({place}, {self.names.expr(node.value)})"
        return text if node.out is None else f"{self.names.of(node.out)} = {text}"

    def sync(self, node: SyncThreads) -> str:
        text = "T.sync_threads()"
        if node.number is not None:
            name = "named_barrier_arrive" if node.is_arrival else "sync_threads"
            text = f"T.{name}({self.names.expr(node.number)}, {node.threads})"
        return text + ("  # inserted" if node.inserted else "")

    def arrive(self, node: BarrierArrive) -> str:
        if node.cta is None:
            return f"T.barrier_arrive({self.slot(node)})"
        return f"T.mbarrier_arrive({self.slot(node)}, cta_id={self.names.expr(node.cta)})"

    def expect(self, node: BarrierExpect) -> str:
        name = "mbarrier_arrive_expect_tx" if node.arrives else "mbarrier_expect_tx"
        return f"T.{name}({self.slot(node)}, {node.bytes})"

    def slot(self, node: BarrierArrive | BarrierExpect | BarrierWait) -> str:
        return self.names.index(node.barrier, (node.slot,))


def _comment(text: str, comment: str) -> str:
    return f"{text:<{_COMMENT_COLUMN}}  # {comment}" if comment else text


def _vars_of(node: Node) -> set[Expr]:
    found: set[Expr] = set()
    stack: list[Expr] = list(node.exprs)
    while stack:
        e = stack.pop()
        if e not in found:
            found.add(e)
            stack.extend(e.children)
    return found
