"""Which values differ between the threads of a block, and which statements run once a block.

Knows the rule of the language: a statement outside T.Parallel that does not depend on the thread
takes effect once per block; one that does, once per thread. Does not know how either is lowered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Expr, Var, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Atomic, Body, For, If, Let, Load, Node, Parallel, Roles, Store, While
from tilejit.ir.node import walk as walk_nodes
from tilejit.ir.parts import common_buffers, roles_of
from tilejit.ir.sync import Elect


@dataclass(frozen=True, slots=True)
class Divergence:
    """What differs between threads: of a role in its body, of the block elsewhere.

    vars: variables. buffers: per-thread buffers. mixed: per-thread buffers that are the same in
    all threads of a role, but not in those of different roles.
    """

    vars: frozenset[Var]
    buffers: frozenset[Buffer]
    mixed: frozenset[Buffer] = frozenset()

    def of(self, exprs: Iterable[Expr]) -> bool:
        """True when any of the expressions may differ between threads."""
        return any(not self.vars.isdisjoint(variables(e)) for e in exprs)


def divergence(kernel: Kernel) -> Divergence:
    """The divergent variables and per-thread buffers of a kernel (flow-insensitive fixpoint)."""
    mixed = frozenset(_written_in_roles(kernel))
    state = Divergence(frozenset(kernel.thread_vars), frozenset(), mixed)
    while True:
        found_vars, found_buffers = set(state.vars), set(state.buffers)
        _visit(kernel.body, False, state, found_vars, found_buffers)
        if len(found_vars) == len(state.vars) and len(found_buffers) == len(state.buffers):
            return state
        state = Divergence(frozenset(found_vars), frozenset(found_buffers), mixed)


def _written_in_roles(kernel: Kernel) -> set[Buffer]:
    """Per-thread buffers that a role changes and that others use too."""
    written = {
        b.root
        for role in roles_of(kernel.body)
        for n in walk_nodes(role.body)
        for b in n.writes
        if b.scope.is_per_thread
    }
    return written & common_buffers(kernel) if written else set()


def _visit(
    body: Body,
    divergent: bool,
    state: Divergence,
    vars_: set[Var],
    buffers: set[Buffer],
    in_role: bool = False,
) -> None:
    for node in body:
        here = divergent or state.of(node.exprs)
        if isinstance(node, Load):
            # outside T.Parallel a fragment is read where every thread holds the element
            is_mixed = not in_role and node.buffer.root in state.mixed
            if here or is_mixed or node.buffer.root in state.buffers:
                vars_.add(node.out)
        elif isinstance(node, Let) and state.of(node.exprs):
            vars_.add(node.var)
        elif isinstance(node, Elect):
            vars_.update(node.defines)
        elif isinstance(node, Atomic) and node.out is not None and here:
            vars_.add(node.out)
        elif here and isinstance(node, Store | Atomic) and node.buffer.scope.is_per_thread:
            buffers.add(node.buffer.root)
        elif not isinstance(node, If | For | While | Parallel):
            for buffer in node.writes:
                if buffer.scope.is_per_thread and _reads_divergent(node, state, in_role):
                    buffers.add(buffer.root)
        if isinstance(node, For) and here:
            vars_.add(node.var)
        if isinstance(node, Parallel):
            vars_.update(node.vars)
            here = True
        if isinstance(node, While) and _has_divergent_test(node, state):
            here = True
        for inner in node.bodies:
            _visit(inner, here, state, vars_, buffers, in_role or isinstance(node, Roles))


def _reads_divergent(node: Node, state: Divergence, in_role: bool) -> bool:
    differing = state.buffers if in_role else state.buffers | state.mixed
    return any(b.root in differing for b in node.reads) or state.of(node.exprs)


def _has_divergent_test(node: While, state: Divergence) -> bool:
    return state.of((node.condition,))
