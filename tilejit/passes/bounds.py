"""Leaves the masks of elementwise loops to the tiles that need them.

Knows T.Parallel loops, their conditions and what of them is the same for the whole block. Does not
know where a tile's elements lie, nor what a loop computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from tilejit.dtypes import bool_
from tilejit.ir.buffer import Scope
from tilejit.ir.corners import TRUE, Box
from tilejit.ir.divergence import divergence
from tilejit.ir.expr import (
    COMPARE,
    MATH,
    Const,
    Expr,
    Op,
    Var,
    binary,
    const,
    is_const,
    rebuild,
    select,
    show,
    unary,
    walk,
)
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Load,
    Node,
    Parallel,
    Roles,
    Store,
    While,
    all_writes,
)
from tilejit.ir.node import walk as walk_nodes

# Instructions of a thread that a tile without masks must save: a branch costs some twenty clocks,
# and cuts the code in pieces that are scheduled apart.
WORTH = 32
# Instructions of a thread that a loop may be long to be there twice.
LONGEST = 2048
LONG = 16  # instructions of a function such as exp


def drop_masks(kernel: Kernel) -> Kernel:
    """Decide for each T.Parallel loop which of its masks hold for a whole tile, and when.

    Needs: threads. A mask is a condition in the body, of T.if_then_else or a branch, that compares
    what rises or falls with the loop's indexes with what is the same for the whole block. Masks
    that always hold are left out. For the others, the loop becomes a branch: where the tile's
    corners show that all of them hold, the loop without them, else the loop as it was.
    """
    dropper = _Dropper(kernel)
    body = dropper.visit(kernel.body, kernel.num_threads)
    return replace(kernel, body=body, notes=(*kernel.notes, *dict.fromkeys(dropper.notes)))


class _Dropper:
    def __init__(self, kernel: Kernel) -> None:
        self.varying = divergence(kernel).vars
        self.notes: list[str] = []

    def visit(self, body: Body, threads: int) -> Body:
        result: list[Node] = []
        for node in body:
            if isinstance(node, Parallel):
                result += self.loop(node, threads)
                continue
            counts = [threads] * len(node.bodies)
            if isinstance(node, Roles):
                counts = [role.size for role in node.roles]
            pairs = zip(node.bodies, counts, strict=True)
            result.append(node.with_bodies(*(self.visit(b, n) for b, n in pairs)))
        return tuple(result)

    def loop(self, node: Parallel, threads: int) -> list[Node]:
        box = Box(dict(zip(node.vars, node.extents, strict=True)), self.varying)
        name = ", ".join(dict.fromkeys(b.name for b in all_writes(node)))
        surely = _Masks(box, is_sure=True)
        body = _without_identities(surely.strip(node.body))
        if surely.found:
            self.notes.append(f"loop over {name}: masks that hold in every tile are left out")
            node = replace(node, body=body)
        if not node.body:
            return []
        masks = _Masks(box)
        bare = replace(node, body=_without_identities(masks.strip(node.body)))
        if not masks.found:
            return [node]
        each = -(-math.prod(node.extents) // threads)  # iterations of a thread
        before, after = (_length(n.body, box) for n in (node, bare))
        if each * (before - after) < WORTH or (bare.body and each * after > LONGEST):
            return [node]
        self.notes.append(f"loop over {name}: no masks where {show(masks.holds)}")
        if not bare.body:
            condition = unary("not", masks.holds)
            branch = If(condition=condition, then=(node,), span=node.span)
        else:
            branch = If(condition=masks.holds, then=(bare,), orelse=(node,), span=node.span)
        return [replace(branch, schedule=node.schedule)]


class _Masks:
    """Takes masks out of a body.

    is_sure: only those that always hold.
    holds: the condition, the same for the whole block, under which what is left does the same.
    """

    def __init__(self, box: Box, is_sure: bool = False) -> None:
        self.box = box
        self.is_sure = is_sure
        self.holds: Expr = TRUE
        self.found = False
        self._settled: dict[tuple[Expr, bool], tuple[Expr, Expr]] = {}

    def strip(self, body: Body) -> Body:
        result: list[Node] = []
        for node in body:
            if isinstance(node, If):
                result += self.branch(node)
            elif isinstance(node, Load):
                when = None if node.when is None else self.condition(node.when, True)
                at = tuple(map(self.value, node.index))
                result.append(replace(node, index=at, when=None if when is TRUE else when))
            elif isinstance(node, Store | Atomic):
                at = tuple(map(self.value, node.index))
                result.append(replace(node, index=at, value=self.value(node.value)))
            else:
                assert isinstance(node, For | While), f"{type(node).__name__} in a T.Parallel"
                result.append(node.with_bodies(*map(self.strip, node.bodies)))
        return tuple(result)

    def branch(self, node: If) -> Body:
        wanted = bool(node.then)
        condition = self.condition(node.condition, wanted)
        if isinstance(condition, Const):
            return self.strip(node.then if condition.value else node.orelse)
        fresh = node.with_bodies(*map(self.strip, node.bodies))
        assert isinstance(fresh, If)
        return (replace(fresh, condition=condition),)

    def value(self, e: Expr) -> Expr:
        """The expression with its selections settled."""
        rests: dict[Expr, Expr] = {}
        for node in walk(e):
            if isinstance(node, Op) and node.op == "select":
                rest = self.settle(node.children[0], _wanted(node))[1]
                if rest is not node.children[0]:
                    rests[node] = rest
        if not rests:
            return e
        done: dict[Expr, Expr] = {}
        for node in walk(e):
            fresh = tuple(done[c] for c in node.children)
            if node in rests:
                done[node] = select(rests[node], *fresh[1:])
            else:
                done[node] = rebuild(node, fresh) if isinstance(node, Op) else node
        self._assume(e, rests)
        return done[e]

    def _assume(self, e: Expr, rests: dict[Expr, Expr]) -> None:
        """Note what the selections that are left of an expression, or chose an arm, rely on."""
        stack, seen = [e], set[Expr]()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            rest = rests.get(node)
            if rest is None:
                stack += node.children
                continue
            test, a, b = node.children
            self.condition(test, _wanted(node))
            stack += [a if rest.value else b] if isinstance(rest, Const) else [a, b]

    def condition(self, e: Expr, wanted: bool) -> Expr:
        """What is left of a condition in tiles where masks hold."""
        holds, rest = self.settle(e, wanted)
        if rest is not e:
            self.found = True
            self.holds = binary("and", self.holds, holds)
        return rest

    def settle(self, e: Expr, wanted: bool) -> tuple[Expr, Expr]:
        """What must hold for the whole tile, and what is then left of the condition `e`: the
        wanted value, fewer terms, or `e` itself where nothing can be told."""
        if (e, wanted) not in self._settled:
            self._settled[e, wanted] = self._settle(e, wanted)
        return self._settled[e, wanted]

    def _settle(self, e: Expr, wanted: bool) -> tuple[Expr, Expr]:
        if not isinstance(e, Op):
            return TRUE, e
        if e.op == "not":
            holds, rest = self.settle(e.children[0], not wanted)
            return holds, unary("not", rest)
        if e.op in ("and", "or"):
            (first, a), (second, b) = (self.settle(c, wanted) for c in e.children)
            if (e.op == "and") == wanted:  # every term must be as wanted
                return binary("and", first, second), binary(e.op, a, b)
            enough = [h for h, rest in ((first, a), (second, b)) if is_const(rest, wanted)]
            if not enough:
                return TRUE, e
            return _any(enough), const(wanted, bool_)
        found = self.box.holds(e, wanted) if e.op in COMPARE else None
        if found is None and self.box.is_fixed(e):
            found = e if wanted else unary("not", e)
        if found is None or (self.is_sure and found is not TRUE):
            return TRUE, e
        return found, const(wanted, bool_)


def _wanted(node: Expr) -> bool:
    """What the condition of a selection is where it selects no mask."""
    _, a, b = node.children
    return not isinstance(a, Const) or isinstance(b, Const)


def _any(conditions: Iterable[Expr]) -> Expr:
    result: Expr = const(False, bool_)
    for condition in conditions:
        result = binary("or", result, condition)
    return result


def _without_identities(body: Body) -> Body:
    """The body without stores of what was just loaded from the same place, and loads for them."""
    loads: dict[Var, Load] = {}
    result: list[Node] = []
    for node in body:
        if isinstance(node, Load):
            loads[node.out] = node
        elif isinstance(node, Store) and isinstance(node.value, Var):
            load = loads.get(node.value)
            is_own = node.buffer.scope is not Scope.GLOBAL  # others' memory may overlap
            if is_own and load is not None and load.when is None:
                if load.buffer is node.buffer and load.index == node.index:
                    continue
        written = {b.root for b in all_writes(node)}
        loads = {v: n for v, n in loads.items() if n.buffer.root not in written}
        result.append(node)
    if all(isinstance(n, Load) for n in result):
        return ()
    return tuple(result)


def _length(body: Body, box: Box) -> int:
    """About how many instructions an iteration takes."""
    exprs = {e for n in walk_nodes(body) for whole in n.exprs for e in walk(whole)}
    costs = [
        LONG if e.op in MATH else 1 for e in exprs if isinstance(e, Op) and not box.is_fixed(e)
    ]
    return sum(costs) + sum(1 for n in walk_nodes(body) if isinstance(n, Store | Atomic))
