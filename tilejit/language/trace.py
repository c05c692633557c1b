"""The recording of one traced function: which nodes, in which frame, under which names.

Knows frames (kernel, loop, branch), the variables each defines and the user's names. Does not know
what users type, nor how the recording is cleaned up (`finish`).
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import dataclasses
import linecache
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from tilejit.dtypes import DType
from tilejit.errors import Span, TraceError, caller_span
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, index, show, variables
from tilejit.ir.kernel import Given, rank_in_cluster
from tilejit.ir.node import Atomic, For, If, Load, Node, Parallel, Store, While


class FrameKind(StrEnum):
    HOST = "host"
    KERNEL = "kernel"
    LOOP = "loop"
    PARALLEL = "parallel"
    BRANCH = "branch"
    WHILE = "while"
    ROLE = "role"


_PLACES = {
    FrameKind.HOST: "the function",
    FrameKind.KERNEL: "the kernel",
    FrameKind.LOOP: "the device loop",
    FrameKind.PARALLEL: "the T.Parallel loop",
    FrameKind.BRANCH: "the branch",
    FrameKind.WHILE: "the while loop",
    FrameKind.ROLE: "the T.ws body",
}


@dataclass(eq=False, slots=True)
class Frame:
    """A region of the program under construction; `nodes` is where the next node goes.

    owner: what opened it, where that matters to what may stand directly inside.
    threads: of a ROLE, how many run it.
    """

    kind: FrameKind
    span: Span | None
    parent: Frame | None
    nodes: list[Node] = field(default_factory=list)
    is_open: bool = True
    owner: object = None
    threads: int = 0

    @property
    def is_device_control(self) -> bool:
        """True for loops and branches, whose body runs any number of times on the device."""
        return self.kind not in (FrameKind.HOST, FrameKind.KERNEL)

    @property
    def place(self) -> str:
        return _PLACES[self.kind]

    def outward(self) -> Iterator[Frame]:
        """This frame and those around it, innermost first."""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.parent


class Trace:
    """A `T.Kernel` frame under construction, or the host part of the function around it.

    host: the trace of the whole function (itself for the host part).
    arguments, outputs, kernels: of the host part: buffers and variables of the call, in call
        order; the buffers made by `T.empty`; the closed `T.Kernel` frames.
    grid, threads, block_vars, thread_vars: of a kernel, x first. is_free: the compiler may choose
        other threads.
    given, cluster: of a kernel: what the user decides that passes would; blocks of a cluster.
    failures: mistakes found too late to raise at their line; the first is raised at the end.
    known: extents that annotations in the function's body have named, by that name.
    """

    def __init__(self, name: str, host: Trace | None = None, span: Span | None = None) -> None:
        self.name = name
        self.host = host if host is not None else self
        self.span = span
        kind = FrameKind.HOST if host is None else FrameKind.KERNEL
        self.frame: Frame = Frame(kind, span, host.frame if host is not None else None)
        self.root = self.frame
        self.arguments: list[Buffer | Var] = []
        self.outputs: list[Buffer] = []
        self.kernels: list[Trace] = []
        self.failures: list[BaseException] = []
        self.known: dict[str, object] = {}
        self._places: dict[Var, tuple[Buffer, tuple[Expr, ...]]] = {}
        self.grid: tuple[Expr, ...] = ()
        self.threads: tuple[int, int, int] = (1, 1, 1)
        self.is_free = False
        self.given = Given()
        self.cluster: tuple[int, int, int] = (1, 1, 1)
        self.block_vars: tuple[Var, ...] = ()
        self.thread_vars: tuple[Var, ...] = ()
        self._names: set[str] = set(host._names) if host is not None else set()
        self._frames: dict[Var, tuple[Frame, Span | None]] = {}
        self._homes: dict[Buffer, Span | None] = {}

    @property
    def is_kernel(self) -> bool:
        return self.host is not self

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        x, y, z = self.threads
        return x * y * z

    @property
    def cluster_rank(self) -> Expr:
        """The block's number in its cluster."""
        return rank_in_cluster(self.block_vars, self.cluster)

    # -- names --------------------------------------------------------------------------------

    def unique_name(self, hint: str) -> str:
        """`hint`, or `hint_1`, `hint_2`, ... when it is taken."""
        name, n = hint, 0
        while name in self._names:
            n += 1
            name = f"{hint}_{n}"
        self._names.add(name)
        return name

    # -- frames -------------------------------------------------------------------------------

    def push(self, kind: FrameKind, span: Span | None) -> Frame:
        """Open a frame inside the current one."""
        self.frame = Frame(kind, span, self.frame)
        return self.frame

    def pop(self, frame: Frame) -> list[Node]:
        """Close `frame` and all inside it; its nodes."""
        assert frame.is_open, f"{frame.kind} frame closed twice"
        for inner in self.frame.outward():
            inner.is_open = False
            if inner is frame:
                break
        assert frame.parent is not None
        self.frame = frame.parent
        return frame.nodes

    def enclosing(self, *kinds: FrameKind) -> Frame | None:
        """The innermost open frame of one of the kinds."""
        return next((f for f in self.frame.outward() if f.kind in kinds), None)

    # -- nodes --------------------------------------------------------------------------------

    def add(self, node: Node) -> None:
        """Record `node` in the current frame.

        Raises:
            TraceError: it uses a value or buffer outside the frame that defines it.
        """
        if node.span is None:
            node = dataclasses.replace(node, span=caller_span())
        if not isinstance(node, _ELEMENTWISE) and self.enclosing(FrameKind.PARALLEL):
            raise TraceError(
                f"{_operation(node)} works on whole tiles and cannot be inside T.Parallel.",
                span=node.span,
                hint="Move it out of the loop; inside, write the element: `B[i, j] = A[i, j]`.",
            )
        for buffer in (*node.reads, *node.writes):
            self.check_home(buffer, node.span)
        if not isinstance(node, While):  # its condition was checked inside the loop
            for expr in node_exprs(node):
                self.check_scope(expr, node.span)
        for var in node.defines:
            if var not in self._frames:
                self.define(var, node.span)
        self.frame.nodes.append(node)

    def load(self, buffer: Buffer, index: tuple[Expr, ...]) -> Var:
        """Record the read of one element; the variable that holds it."""
        name = self.unique_name(f"{buffer.name}_at")
        out = Var(name, buffer.dtype, VarKind.VALUE)
        self.add(Load(out=out, buffer=buffer, index=index, span=caller_span()))
        self._places[out] = (buffer, index)
        return out

    def name_of(self, var: Var) -> str:
        """What the user calls a value: `A[i, 0]` for one that was loaded from there."""
        if var not in self._places:
            return var.name
        buffer, at = self._places[var]
        return f"{buffer.name}[{', '.join(show(e, self.name_of) for e in at)}]"

    def define(self, var: Var, span: Span | None) -> None:
        """`var` may be used from here to the end of the current frame."""
        self._frames[var] = (self.frame, span)

    def new_var(
        self,
        hint: str,
        dtype: DType,
        kind: VarKind,
        bounds: tuple[int | Expr, int | Expr] | None,
        span: Span | None,
    ) -> Var:
        """A fresh variable of the current frame."""
        low, high = (index(b) for b in bounds) if bounds is not None else (None, None)
        var = Var(self.unique_name(hint), dtype, kind, low, high)
        self.define(var, span)
        return var

    def house(self, buffer: Buffer) -> None:
        """`buffer` lives in this kernel."""
        self._homes[buffer] = buffer.span

    def check_scope(self, expr: Expr, span: Span | None = None) -> None:
        """Refuse a variable whose frame is closed or belongs to another kernel."""
        used = variables(expr)
        for var in sorted(used, key=lambda v: v.serial) if used else ():
            if var.kind in (VarKind.SYMBOL, VarKind.SCALAR, VarKind.POINTER):
                continue
            frame, defined = self._frames.get(var, (None, None))
            if frame is not None and frame.is_open:
                continue
            place = frame.place if frame is not None else "another kernel"
            raise TraceError(
                f"`{show(var)}` belongs to {place} that defines it, and is used outside.",
                span=span,
                related=[(defined, "defined here")],
                hint="Keep it in a buffer or `T.alloc_var`, which outlive the loop or branch.",
            )

    def check_home(self, buffer: Buffer, span: Span | None) -> None:
        root = buffer.root
        if root.scope is Scope.GLOBAL or root in self._homes:
            return
        raise TraceError(
            f"`{buffer.name}` was not allocated in this kernel.",
            span=span,
            related=[(buffer.span, "allocated here")],
            hint="On-chip memory lasts as long as its kernel; pass results through a tensor.",
        )


# What may stand inside T.Parallel: steps of one iteration.
_ELEMENTWISE = (Load, Store, Atomic, For, If, While, Parallel)
_OPERATIONS = {"SyncThreads": "sync_threads", "BarrierArrive": "barrier_arrive",
               "BarrierWait": "barrier_wait", "Roles": "ws"}  # fmt: skip


def _operation(node: Node) -> str:
    name = type(node).__name__
    return f"T.{_OPERATIONS.get(name, name.lower())}"


def node_exprs(node: Node) -> Iterator[Expr]:
    """Every expression a node needs: its own, and those that say where its buffers are."""
    yield from node.exprs
    for buffer in (*node.reads, *node.writes):
        yield from buffer_exprs(buffer)


def buffer_exprs(buffer: Buffer) -> Iterator[Expr]:
    """Expressions of a buffer's place and shape, those it is a view of included."""
    yield from buffer.shape
    yield from buffer.strides or ()
    yield buffer.offset
    if isinstance(buffer.data, Buffer):
        yield from buffer_exprs(buffer.data)
    elif buffer.data is not None:
        yield buffer.data


_current: contextvars.ContextVar[Trace | None] = contextvars.ContextVar(
    "tilejit_trace", default=None
)


def current() -> Trace | None:
    """The trace under construction in this thread or task."""
    return _current.get()


def current_kernel(what: str) -> Trace:
    """The kernel under construction.

    Raises:
        TraceError: no `T.Kernel` is open.
    """
    trace = _current.get()
    if trace is None or not trace.is_kernel:
        raise TraceError(
            f"{what} is only allowed inside a kernel.",
            hint="Put it under `with T.Kernel(...) as ...:` in a @tilejit function.",
        )
    return trace


def current_host(what: str) -> Trace:
    """The host part of the function under construction, outside any kernel.

    Raises:
        TraceError: nothing is being traced, or a kernel is open.
    """
    trace = _current.get()
    if trace is None:
        raise TraceError(
            f"{what} is only allowed inside a @tilejit function.",
            hint="Move it into the function, before `with T.Kernel(...)`.",
        )
    if trace.is_kernel:
        raise TraceError(
            f"{what} is not allowed inside a kernel.",
            hint="Move it before `with T.Kernel(...)`.",
        )
    return trace


def enter(trace: Trace) -> None:
    """Make `trace` the current one, until `leave`."""
    _current.set(trace)


def leave(trace: Trace) -> None:
    """Go back to the host part around a kernel."""
    _current.set(trace.host if trace.is_kernel else None)


@contextlib.contextmanager
def tracing(trace: Trace) -> Iterator[Trace]:
    """Make `trace` the current one inside the `with` block."""
    token = _current.set(trace)
    try:
        yield trace
    finally:
        _current.reset(token)


_TARGET = re.compile(r"\s*([A-Za-z_]\w*)\s*(?::[^=]*)?=\s*[\[(]*\s*$")


def assigned_name(span: Span | None, default: str) -> str:
    """The variable that the statement at `span` assigns the call's result to, else `default`."""
    if span is None or span.column is None:
        return default
    line = linecache.getline(span.filename, span.line)
    before = line.encode()[: span.column].decode(errors="replace")
    match = _TARGET.match(before.rpartition(";")[2])  # of several statements in a line, its own
    if match:
        return match[1]
    return _tuple_target(line, span.column) or default


def _tuple_target(line: str, column: int) -> str | None:
    """The name for one call of `a, b = call(), call()`, when the line is such a statement."""
    stripped = line.lstrip()
    indent = len(line) - len(stripped)
    try:
        tree = ast.parse(stripped)
    except SyntaxError:  # part of a statement of several lines
        return None
    for statement in tree.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Tuple):
            continue
        target = statement.targets[0]
        if not isinstance(target, ast.Tuple) or len(target.elts) != len(statement.value.elts):
            continue
        for name, value in zip(target.elts, statement.value.elts, strict=True):
            begin, end = value.col_offset + indent, (value.end_col_offset or 0) + indent
            if begin <= column < end and isinstance(name, ast.Name):
                return name.id
    return None


def drop_nodes(frame: Frame, unwanted: Iterable[Node]) -> None:
    """Take nodes out of a frame again."""
    gone = set(map(id, unwanted))
    frame.nodes[:] = [n for n in frame.nodes if id(n) not in gone]
