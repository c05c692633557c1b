"""Which variables a node needs: its own expressions' and those that say where its buffers are.

Knows nodes and buffers. Does not know how variables are passed.
"""

from __future__ import annotations

from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, variables
from tilejit.ir.node import Node
from tilejit.ops.copy import Copy


def used_variables(node: Node) -> set[Var]:
    """Variables that a node's own expressions and the buffers it touches mention. A copy that has
    a tensor map finds its tensor there."""
    exprs: list[Expr] = list(node.exprs)
    is_described = isinstance(node, Copy) and node.tensor_map is not None
    for buffer in (*node.reads, *node.writes):
        if is_described and buffer.scope is Scope.GLOBAL:
            continue
        while True:
            exprs += [*buffer.shape, *buffer.element_strides, buffer.offset]
            if not isinstance(buffer.data, Buffer):
                break
            buffer = buffer.data
        if isinstance(buffer.data, Expr):
            exprs.append(buffer.data)
    return {v for e in exprs for v in variables(e)}
