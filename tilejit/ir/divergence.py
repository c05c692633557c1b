"""Which values differ between the threads of a block, and which statements run once a block.

Knows the rule of the language: a statement outside T.Parallel that does not depend on the thread
takes effect once per block; one that does, once per thread. Does not know how either is lowered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Expr, Var, walk
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Atomic, Body, For, If, Let, Load, Node, Parallel, Store, While


@dataclass(frozen=True, slots=True)
class Divergence:
    """vars: variables, and buffers: per-thread buffers, whose values differ between threads."""

    vars: frozenset[Var]
    buffers: frozenset[Buffer]

    def of(self, exprs: Iterable[Expr]) -> bool:
        """True when any of the expressions may differ between threads."""
        return any(node in self.vars for e in exprs for node in walk(e) if isinstance(node, Var))


def divergence(kernel: Kernel) -> Divergence:
    """The divergent variables and per-thread buffers of a kernel (flow-insensitive fixpoint)."""
    state = Divergence(frozenset(kernel.thread_vars), frozenset())
    while True:
        found_vars, found_buffers = set(state.vars), set(state.buffers)
        _visit(kernel.body, False, state, found_vars, found_buffers)
        if len(found_vars) == len(state.vars) and len(found_buffers) == len(state.buffers):
            return state
        state = Divergence(frozenset(found_vars), frozenset(found_buffers))


def _visit(
    body: Body, divergent: bool, state: Divergence, vars_: set[Var], buffers: set[Buffer]
) -> None:
    for node in body:
        here = divergent or state.of(node.exprs)
        if isinstance(node, Load):
            # outside T.Parallel a fragment is read where every thread holds the element
            if here or node.buffer.root in state.buffers:
                vars_.add(node.out)
        elif isinstance(node, Let) and state.of(node.exprs):
            vars_.add(node.var)
        elif isinstance(node, Atomic) and node.out is not None and here:
            vars_.add(node.out)
        elif here and isinstance(node, Store | Atomic) and node.buffer.scope.is_per_thread:
            buffers.add(node.buffer.root)
        elif not isinstance(node, If | For | While | Parallel):
            for buffer in node.writes:
                if buffer.scope.is_per_thread and _reads_divergent(node, state):
                    buffers.add(buffer.root)
        if isinstance(node, For) and here:
            vars_.add(node.var)
        if isinstance(node, Parallel):
            vars_.update(node.vars)
            here = True
        if isinstance(node, While) and _has_divergent_test(node, state):
            here = True
        for inner in node.bodies:
            _visit(inner, here, state, vars_, buffers)


def _reads_divergent(node: Node, state: Divergence) -> bool:
    return any(b.root in state.buffers for b in node.reads) or state.of(node.exprs)


def _has_divergent_test(node: While, state: Divergence) -> bool:
    return state.of((node.condition,))
