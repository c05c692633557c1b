"""A node with other expressions in the place of variables.

Knows where nodes of all kinds keep expressions. Does not know why they change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tilejit.ir.buffer import Buffer, Region
from tilejit.ir.expr import Expr, Var, substitute
from tilejit.ir.node import Body, Node


def substituted(body: Body, mapping: Mapping[Var, Expr]) -> Body:
    """The body with variables replaced by expressions of the same dtype, wherever they are used
    or, when a variable takes their place, defined."""
    return tuple(_node(node, dict(mapping)) for node in body) if mapping else body


def _node(node: Node, mapping: dict[Var, Expr]) -> Node:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        old = getattr(node, field.name)
        fresh = _value(old, mapping)
        if fresh is not old:
            changes[field.name] = fresh
    return dataclasses.replace(node, **changes) if changes else node


def _value(old: Any, mapping: dict[Var, Expr]) -> Any:
    if isinstance(old, Expr):
        return substitute(old, mapping)
    if isinstance(old, Node):
        return _node(old, mapping)
    if isinstance(old, Region):
        return dataclasses.replace(old, starts=_value(old.starts, mapping))
    if isinstance(old, tuple):
        fresh = tuple(_value(item, mapping) for item in old)
        return old if all(a is b for a, b in zip(fresh, old, strict=True)) else fresh
    if dataclasses.is_dataclass(old) and not isinstance(old, Buffer | type):
        return _part(old, mapping)
    return old


def _part(old: Any, mapping: dict[Var, Expr]) -> Any:
    """A part of a node that is no node: a barrier's slot, a role."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(old):
        before = getattr(old, field.name)
        if isinstance(before, Expr | Region | Node | tuple):
            fresh = _value(before, mapping)
            if fresh is not before:
                changes[field.name] = fresh
    return dataclasses.replace(old, **changes) if changes else old
