"""Keeps from the assembler that registers of a warpgroup multiply hold constants.

ptxas (seen in CUDA 13.0 and 13.5) makes a constant in the left operand of `wgmma.mma_async` anew
for every multiply, and at times puts that behind a multiply that has read the register already:
it then multiplies by what an earlier kernel left there.

Knows which values of fragments may be constants when the kernel is compiled, and which statements
store them. Does not know registers: a value is hidden by an operation that changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.dtypes import bool_
from tilejit.ir.analysis import provably
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Const, Expr, Op, Var, VarKind, arith, index, rebuild, unary, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Body,
    For,
    Let,
    Load,
    Node,
    Parallel,
    Roles,
    Store,
    While,
    rewrite,
    walk,
)
from tilejit.isa.atom import WgmmaAtom
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.elementwise import as_parallel
from tilejit.ops.gemm import Gemm
from tilejit.ops.reduce import Reduce

Sites = frozenset[Node]
State = dict[Buffer, Sites]  # of buffers in registers: the stores that may have put constants there

_NONE: Sites = frozenset()
_KNOWN = (VarKind.LOOP, VarKind.PARALLEL)  # constants where loops are unrolled and threads few


def hide_constants(kernel: Kernel) -> Kernel:
    """Hide constants that reach left operands held in registers.

    Needs: atoms. Decides: `hidden` around what fills and stores put there. Leaves all values as
    they are.
    """
    if not any(_takes_registers(node) for node in walk(kernel.body)):
        return kernel
    search = _Search()
    search.body(kernel.body, {})
    if not search.found:
        return kernel

    def visit(node: Node) -> Node:
        if isinstance(node, Fill | Store) and node in search.found:
            return replace(node, value=search.hidden(node.value))
        if isinstance(node, Copy) and node in search.found:
            loop = as_parallel(node)
            assert loop is not None
            stores = [n for n in loop.body if isinstance(n, Store)]
            others = [n for n in loop.body if not isinstance(n, Store)]
            hidden = [replace(n, value=unary("hidden", n.value)) for n in stores]
            return replace(loop, body=(*others, *hidden))
        return node

    return replace(kernel, body=rewrite(kernel.body, visit))


def _takes_registers(node: Node) -> bool:
    return (
        isinstance(node, Gemm)
        and isinstance(node.atom, WgmmaAtom)
        and node.a.buffer.scope is Scope.FRAGMENT
    )


def _is_held(buffer: Buffer) -> bool:
    """Whether its elements are in registers, through which the compilers follow constants."""
    return buffer.scope in (Scope.FRAGMENT, Scope.LOCAL, Scope.VAR)


class _Search:
    """Follows constants through the program, in its order; loops until nothing changes."""

    def __init__(self) -> None:
        self.found: set[Node] = set()
        self._loaded: dict[Var, Sites | None] = {}  # None: a value of run time

    def body(self, body: Body, state: State) -> State:
        for node in body:
            state = self._after(node, state)
        return state

    def _after(self, node: Node, state: State) -> State:
        if _takes_registers(node):
            assert isinstance(node, Gemm)
            self.found |= state.get(node.a.buffer.root, _NONE)
        if isinstance(node, For | While):
            return self._loop(node, state)
        if isinstance(node, Parallel):
            return self._parallel(node, state)
        if isinstance(node, Let):
            self._loaded[node.var] = self._sites(node.value)
        elif isinstance(node, Load):
            self._loaded[node.out] = self._load(node, state)
        elif isinstance(node, Store):
            return self._written(node, node.buffer, self._stored(node), state, is_all=False)
        elif isinstance(node, Fill):
            sites = frozenset((node,)) if self._sites(node.value) is not None else _NONE
            return self._written(node, node.dst.buffer, sites, state, node.dst.is_whole)
        elif isinstance(node, Copy):
            return self._copy(node, state)
        elif isinstance(node, Gemm):
            return self._written(node, node.acc.buffer, _NONE, state, node.acc.is_whole)
        elif node.bodies:
            ends = [self.body(inner, state) for inner in node.bodies]
            return _joined(*ends, *([state] if isinstance(node, Roles) else []))
        else:
            sites = _NONE.union(*(state.get(b.root, _NONE) for b in node.reads))
            for buffer in node.writes:
                is_all = isinstance(node, Reduce) and node.clear and node.dst.is_whole
                state = self._written(node, buffer, sites, state, is_all)
        return state

    def _loop(self, node: For | While, state: State) -> State:
        while True:
            after = state
            for inner in node.bodies:
                after = self.body(inner, after)
            joined = _joined(state, after)
            if joined == state:
                return state
            state = joined

    def _parallel(self, node: Parallel, state: State) -> State:
        for inner in node.body:
            if isinstance(inner, Store) and _is_held(inner.buffer) and inner.index == node.vars:
                is_all = inner.buffer.extents == node.extents
                sites = self._stored(inner)
                state = self._written(inner, inner.buffer, sites, state, is_all)
            else:
                state = self._after(inner, state)
        return state

    def _copy(self, node: Copy, state: State) -> State:
        source = node.src.buffer
        sites = state.get(source.root, _NONE) if _is_held(source) else _NONE
        if source.scope is Scope.GLOBAL and not _is_inside(node):
            sites = frozenset((node,))
        return self._written(node, node.dst.buffer, sites, state, node.dst.is_whole)

    @staticmethod
    def _written(node: Node, buffer: Buffer, sites: Sites, state: State, is_all: bool) -> State:
        if not _is_held(buffer):
            return state
        is_all = is_all and not buffer.is_view
        before = _NONE if is_all else state.get(buffer.root, _NONE)
        return {**state, buffer.root: before | sites}

    def _stored(self, node: Store) -> Sites:
        sites = self._sites(node.value)
        if sites is None:
            return _NONE
        return sites if self.hidden(node.value) is node.value else sites | {node}

    def _load(self, node: Load, state: State) -> Sites | None:
        if _is_held(node.buffer):
            return state.get(node.buffer.root, _NONE) or None
        is_inside = node.when is None and all(
            provably("ge", i, index(0)) and provably("lt", i, extent)
            for i, extent in zip(node.index, node.buffer.shape, strict=True)
        )
        return None if is_inside or node.buffer.scope is not Scope.GLOBAL else _NONE

    def _sites(self, e: Expr) -> Sites | None:
        """Which stores would have to hide what they store for the value not to be a constant,
        besides what is constant in the expression itself; None where it is none."""
        if isinstance(e, Const):
            return _NONE
        if isinstance(e, Var):
            return _NONE if e.kind in _KNOWN else self._loaded.get(e)
        assert isinstance(e, Op)
        if e.op == "hidden":
            return None
        if e.op == "select" and any(map(self._is_of_run_time, variables(e.children[0]))):
            return None
        of = [self._sites(c) for c in (e.children[1:] if e.op == "select" else e.children)]
        known = [sites for sites in of if sites is not None]
        if not known or (e.op != "select" and len(known) < len(of)):
            return None
        return _NONE.union(*known)

    def _is_of_run_time(self, var: Var) -> bool:
        return var.kind not in _KNOWN and self._loaded.get(var) is None

    def hidden(self, e: Expr) -> Expr:
        """The expression with what may be constant in it hidden, but for what other stores hide."""
        if self._sites(e) is None or self._is_hidden_elsewhere(e):
            return e
        if isinstance(e, Op) and e.op == "select":
            return rebuild(e, (e.children[0], *map(self.hidden, e.children[1:])))
        if isinstance(e, Op) and all(_can_hide(c) for c in e.children):
            return rebuild(e, tuple(map(self.hidden, e.children)))
        return unary("hidden", e)

    def _is_hidden_elsewhere(self, e: Expr) -> bool:
        if isinstance(e, Var):
            return bool(self._loaded.get(e))
        if isinstance(e, Op) and e.op == "select":
            return all(map(self._is_hidden_elsewhere, e.children[1:]))
        return any(map(self._is_hidden_elsewhere, e.children))


def _can_hide(e: Expr) -> bool:
    return e.dtype is not bool_ and e.dtype.bits <= 32


def _is_inside(node: Copy) -> bool:
    source = node.src
    sizes = dict(zip(source.kept, source.shape, strict=True))
    return all(
        provably("ge", start, index(0))
        and provably("le", start, arith("sub", extent, sizes.get(d, 1)))
        for d, (start, extent) in enumerate(zip(source.starts, source.buffer.shape, strict=True))
    )


def _joined(first: State, *others: State) -> State:
    result = dict(first)
    for other in others:
        for buffer, sites in other.items():
            result[buffer] = result.get(buffer, _NONE) | sites
    return result
