"""Nodes with other expressions in the place of variables, or other buffers in the place of buffers.

Knows where nodes of all kinds keep them. Does not know why they change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tilejit.ir.buffer import Buffer, Region, Section
from tilejit.ir.expr import Expr, Var, substitute, variables
from tilejit.ir.node import Body, Node, Role
from tilejit.ir.sync import BarrierSlot


def substituted(body: Body, mapping: Mapping[Var, Expr]) -> Body:
    """The body with variables replaced by expressions of the same dtype, wherever they are used
    or, when a variable takes their place, defined: in the places of tensors too."""
    return _Substitution(dict(mapping), {}).body(body)


def rebuffered(body: Iterable[Node], mapping: Mapping[Buffer, Buffer]) -> Body:
    """The body with buffers replaced by others of the same shape and dtype."""
    return _Substitution({}, dict(mapping)).body(body)


@dataclass(frozen=True)
class _Substitution:
    variables: dict[Var, Expr]
    buffers: dict[Buffer, Buffer]

    def body(self, body: Iterable[Node]) -> Body:
        if not self.variables and not self.buffers:
            return tuple(body)
        return tuple(self.fields(node) for node in body)

    def value(self, old: Any) -> Any:
        if isinstance(old, Expr):
            is_concerned = not self.variables.keys().isdisjoint(variables(old))
            return substitute(old, self.variables) if is_concerned else old
        if isinstance(old, Buffer):
            return self.buffer(old)
        if isinstance(old, tuple):
            fresh = tuple(self.value(item) for item in old)
            return old if all(a is b for a, b in zip(fresh, old, strict=True)) else fresh
        if isinstance(old, Node | Region | Role | BarrierSlot | Section):
            return self.fields(old)
        return old

    def buffer(self, old: Buffer) -> Buffer:
        if old not in self.buffers and any(variables(e) & self.variables.keys() for e in old.place):
            self.buffers[old] = self.fields(old)
        return self.buffers.get(old, old)

    def fields(self, old: Any) -> Any:
        changes: dict[str, Any] = {}
        for field in (f for f in dataclasses.fields(old) if f.init):
            before = getattr(old, field.name)
            after = self.value(before)
            if after is not before:
                changes[field.name] = after
        return dataclasses.replace(old, **changes) if changes else old
