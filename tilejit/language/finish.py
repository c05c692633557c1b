"""Tidies the recording of a kernel: drops loads nobody uses, guards those of one arm of a choice,
and refuses indexes that are certainly out of range.

Knows nodes and uses of variables. Does not know frames, Python or targets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from tilejit.dtypes import bool_
from tilejit.errors import OutOfRangeError
from tilejit.ir.analysis import Interval, linear, provably
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import (
    Const,
    Expr,
    Op,
    Var,
    VarKind,
    binary,
    const,
    index,
    int_value,
    select,
    show,
    unary,
    variables,
    walk,
)
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
)
from tilejit.language.trace import buffer_exprs, node_exprs

Path = tuple[Expr, ...]  # conditions that all hold where a variable is used

# Ways through one expression that are looked at; beyond, a load is taken to be always needed.
_MAX_VISITS = 20_000


def finish_body(body: Iterable[Node]) -> Body:
    """The body as it is kept: without unused loads, with guarded ones, checked."""
    kept = _drop_unused(tuple(body), set())
    guarded = _Guards(kept).apply(kept)
    _check_bounds(guarded, is_certain=True)
    return guarded


# -- unused loads -----------------------------------------------------------------------------


def _drop_unused(body: Body, wanted: set[Var]) -> Body:
    """Nodes whose effect or result somebody needs; `wanted` collects the variables."""
    result: list[Node] = []
    for node in reversed(body):
        if isinstance(node, If) and isinstance(node.condition, Const):
            taken = node.then if node.condition.value else node.orelse
            result.extend(reversed(_drop_unused(taken, wanted)))
            continue
        kept = _keep(node, wanted)
        if kept is not None:
            result.append(kept)
            for e in node_exprs(kept):
                wanted |= variables(e)
    return tuple(reversed(result))


def _keep(node: Node, wanted: set[Var]) -> Node | None:
    if isinstance(node, Atomic) and node.out is not None and node.out not in wanted:
        return dataclasses.replace(node, out=None)
    if not node.bodies:
        is_needed = node.has_effect or any(var in wanted for var in node.defines)
        return node if is_needed else None
    if isinstance(node, While):
        body = _drop_unused(node.body, wanted)
        wanted |= variables(node.condition)
        return node.with_bodies(_drop_unused(node.test, wanted), body)
    bodies = [_drop_unused(inner, wanted) for inner in node.bodies]
    return node.with_bodies(*bodies) if any(bodies) else None


# -- loads of one arm -------------------------------------------------------------------------


class _Guards:
    """Under which conditions each load of a body is needed."""

    def __init__(self, body: Body) -> None:
        self.uses: dict[Var, list[Path]] = {}
        self.order: dict[Var, int] = {}
        self.guards: dict[Load, Expr] = {}
        self.visits = 0
        self._number(body)
        self._collect(body)

    def apply(self, body: Body) -> Body:
        """The same body, its loads guarded."""
        return tuple(self._replace(node) for node in body)

    def _replace(self, node: Node) -> Node:
        if isinstance(node, Load) and node in self.guards:
            return dataclasses.replace(node, when=self.guards[node])
        if not node.bodies:
            return node
        return node.with_bodies(*(self.apply(inner) for inner in node.bodies))

    def _number(self, body: Body) -> None:
        for node in body:
            for var in node.defines:
                self.order[var] = len(self.order)
            for inner in node.bodies:
                self._number(inner)

    def _collect(self, body: Body) -> None:
        """Uses of a load come after it, so from the last node to the first."""
        for node in reversed(body):
            for inner in reversed(node.bodies):
                if isinstance(node, While) and inner is node.test:
                    self._use(node.condition, ())
                self._collect(inner)
            path: Path = ()
            if isinstance(node, Load):
                guard = self._guard(node)
                if guard is not None:
                    self.guards[node] = guard
                    self._use(guard, ())
                    path = (guard,)
            for e in node_exprs(node):
                self._use(e, path)

    def _use(self, e: Expr, path: Path) -> None:
        """Note the loads that `e` needs, and when."""
        if isinstance(e, Const):
            return
        if not any(isinstance(n, Op) and n.op == "select" for n in walk(e)):
            for var in variables(e):
                self._note(var, path)
            return
        seen: set[tuple[int, Path]] = set()
        stack: list[tuple[Expr, Path]] = [(e, path)]
        while stack:
            node, here = stack.pop()
            self.visits += 1
            if self.visits > _MAX_VISITS:
                here = ()
            if (id(node), here) in seen:
                continue
            seen.add((id(node), here))
            if isinstance(node, Var):
                self._note(node, here)
            elif isinstance(node, Op) and node.op == "select":
                test, a, b = node.children
                stack += [(test, here), (a, _with(here, test)), (b, _with(here, _not(test)))]
            else:
                stack += [(child, here) for child in node.children]

    def _note(self, var: Var, path: Path) -> None:
        if var.kind is VarKind.VALUE:
            self.uses.setdefault(var, []).append(path)

    def _guard(self, load: Load) -> Expr | None:
        """When the load is needed, as far as that is known before it; None for always."""
        paths = self.uses.get(load.out, [()])
        if () in paths or _is_in_range(load.buffer, load.index):
            return None
        ways: dict[Expr, None] = {}
        for path in paths:
            known = [c for c in path if self._is_known(c, load.out)]
            if not known:
                return None
            ways[_conjunction(known)] = None
        if any(_not(way) in ways for way in ways):
            return None
        return functools.reduce(lambda a, b: binary("or", a, b), ways)

    def _is_known(self, condition: Expr, before: Var) -> bool:
        return all(self.order.get(var, -1) < self.order[before] for var in variables(condition))


def _not(condition: Expr) -> Expr:
    return unary("not", condition)


def _with(path: Path, condition: Expr) -> Path:
    return path if condition in path else (*path, condition)


def _conjunction(conditions: list[Expr]) -> Expr:
    """All conditions; a later one that needs a load is looked at only where the earlier hold."""
    result = conditions[0]
    for condition in conditions[1:]:
        if any(var.kind is VarKind.VALUE for var in variables(condition)):
            result = select(result, condition, const(False, bool_))
        else:
            result = binary("and", result, condition)
    return result


def _is_in_range(buffer: Buffer, position: tuple[Expr, ...]) -> bool:
    return all(
        provably("ge", at, index(0)) and provably("lt", at, extent)
        for at, extent in zip(position, buffer.shape, strict=True)
    )


# -- bounds -----------------------------------------------------------------------------------


def _check_bounds(body: Body, *, is_certain: bool, in_role: bool = False) -> None:
    """Refuse accesses to on-chip buffers that certainly run and certainly miss.

    in_role: not all of the block's threads come there.
    """
    for node in body:
        is_guarded = isinstance(node, Load) and node.when is not None
        if is_certain and isinstance(node, Load | Store) and not is_guarded:
            by_thread = {v for e in node.index for v in variables(e) if v.kind is VarKind.THREAD}
            if not (in_role and by_thread):
                _check_access(node)
        for inner in node.bodies:
            _check_bounds(
                inner,
                is_certain=is_certain and _always_runs(node),
                in_role=in_role or isinstance(node, Roles),
            )


def _always_runs(node: Node) -> bool:
    if isinstance(node, If | While):
        return False
    if isinstance(node, For):
        start, stop = int_value(node.start), int_value(node.stop)
        return None not in (start, stop) and bool(range(start or 0, stop or 0, node.step))
    return isinstance(node, Parallel | Roles)


def _check_access(node: Load | Store) -> None:
    if node.buffer.scope is Scope.GLOBAL:
        return
    for d, (at, extent) in enumerate(zip(node.index, node.buffer.extents, strict=True)):
        reached = _reached(at)
        if reached is None:
            continue
        low, high = reached
        worst = low if low < 0 else high
        if low < 0 or high >= extent:
            raise OutOfRangeError(
                f"Index `{show(at)}` reaches {worst}, but dimension {d} of `{node.buffer.name}` "
                f"has extent {extent}.",
                span=node.span,
                related=[(node.buffer.span, f"{node.buffer.name} comes from here")],
                hint="Shrink the loop, or guard the access with `with T.If(cond):`.",
            )


def _reached(at: Expr) -> tuple[int, int] | None:
    """The least and greatest value that the index certainly takes, if it is that simple."""
    if not at.dtype.is_integer:
        return None
    terms, constant = linear(at)
    low = high = constant
    for term, factor in terms.items():
        bounds = _attained(term)
        if bounds.low is None or bounds.high is None:
            return None
        ends = (bounds.low * factor, bounds.high * factor)
        low, high = low + min(ends), high + max(ends)
    return low, high


def _attained(term: Expr) -> Interval:
    """Bounds of a variable that it takes both of: iterations of constant loops, and threads."""
    nothing = Interval(None, None)
    if not isinstance(term, Var) or term.low is None or term.high is None:
        return nothing
    if term.kind not in (VarKind.PARALLEL, VarKind.THREAD, VarKind.LOOP):
        return nothing
    return Interval(int_value(term.low), int_value(term.high))


def used_variables(body: Body) -> set[Var]:
    """Every variable that some node of the body needs."""
    found: set[Var] = set()
    for node in body:
        for e in node_exprs(node):
            found |= variables(e)
        for inner in node.bodies:
            found |= used_variables(inner)
    return found


def shape_variables(buffer: Buffer) -> list[Var]:
    """Variables of a buffer's shape and strides, in order of appearance."""
    found = [v for e in buffer_exprs(buffer) for v in walk(e) if isinstance(v, Var)]
    return list(dict.fromkeys(found))
