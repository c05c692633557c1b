"""Refuses T.Parallel loops whose iterations certainly depend on each other, and tiles that are
used though nothing fills them.

Knows linear indexes. What it cannot prove is left to the simulator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tilejit.errors import TraceError
from tilejit.ir.analysis import difference, linear
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Op, Var, show, variables
from tilejit.ir.expr import walk as walk_expr
from tilejit.ir.node import Body, If, Load, Node, Parallel, Store, While, walk
from tilejit.ops.gemm import Gemm

_FILLED = (Scope.FRAGMENT, Scope.SHARED, Scope.LOCAL, Scope.VAR)


def check_iterations(body: Body) -> None:
    """Refuse an iteration that reads an element which another iteration writes.

    Raises:
        TraceError: at the read.
    """
    for node in walk(body):
        if isinstance(node, Parallel):
            _check(node)


def check_filled(body: Body) -> None:
    """Refuse tiles and variables that nothing in the kernel writes, or only what adds to them.

    Raises:
        TraceError: at the first use.
    """
    filled: set[Buffer] = set()
    used: dict[Buffer, Node] = {}
    loads: dict[Var, Load] = {}
    for node in walk(body):
        if isinstance(node, Load):
            loads[node.out] = node
        read = {b.root for b in node.reads}
        if isinstance(node, Store) and _adds(node, loads):
            read.add(node.buffer.root)
        filled |= {b.root for b in node.writes} - read
        for buffer in read:
            if buffer.scope in _FILLED:
                used.setdefault(buffer, node)
    for buffer, node in used.items():
        if buffer not in filled:
            is_added = any(buffer in {b.root for b in n.writes} for n in walk(body))
            what = "only what adds to it" if is_added else "nothing"
            raise TraceError(
                f"`{buffer.name}` is used here, but {what} in the kernel fills it.",
                span=node.span,
                related=[(buffer.span, f"{buffer.name} comes from here")],
                hint="Begin with T.clear, T.fill or T.copy"
                + (", or clear_accum=True." if isinstance(node, Gemm) else "."),
            )


def _adds(store: Store, loads: Mapping[Var, Load]) -> bool:
    """Whether the element that is stored is certainly worked out from what it was before."""
    if any(isinstance(e, Op) and e.op == "select" for e in walk_expr(store.value)):
        return False
    return any(
        (load := loads.get(v)) is not None
        and load.buffer is store.buffer
        and load.index == store.index
        for v in variables(store.value)
    )


def _check(loop: Parallel) -> None:
    accesses = list(_unconditional(loop.body))
    stores = [n for n in accesses if isinstance(n, Store) and not n.buffer.scope.is_per_thread]
    written: set[Buffer] = set()  # before the load: it may read what its own iteration wrote
    for load in accesses:
        if isinstance(load, Store):
            written.add(load.buffer)
            continue
        if load.when is not None:
            continue
        for store in stores:
            if store.buffer is not load.buffer:
                continue
            text = ", ".join(show(e) for e in load.index)
            shared = _shared_by(loop, load, store)
            if shared is not None and load.buffer not in written:
                raise TraceError(
                    f"`{load.buffer.name}[{text}]` is read and written by every iteration over "
                    f"`{shared.name}` of T.Parallel.",
                    span=load.span,
                    related=[(store.span, "written here")],
                    hint="Combine elements with T.reduce_sum or another reduction, or write a loop "
                    f"without `{shared.name}`.",
                )
            if _is_of_another(loop, load, store):
                raise TraceError(
                    f"`{load.buffer.name}[{text}]` is written by another iteration of T.Parallel.",
                    span=load.span,
                    related=[(store.span, "written here")],
                    hint="Iterations run in any order: write to another tile, or use T.serial.",
                )


def _unconditional(body: Body) -> Iterator[Load | Store]:
    """Accesses that every iteration makes, but for inner loops of no rounds."""
    for node in body:
        if isinstance(node, Load | Store):
            yield node
        elif not isinstance(node, If | While):
            for inner in node.bodies:
                yield from _unconditional(inner)


def _shared_by(loop: Parallel, load: Load, store: Store) -> Var | None:
    """A variable of the loop whose iterations certainly read and write one element."""
    if any(difference(a, b) != 0 for a, b in zip(load.index, store.index, strict=True)):
        return None
    used = {v for e in store.index for v in variables(e)}
    inside = {v for n in walk(loop.body) for v in n.defines}
    if used & inside:
        return None
    pairs = zip(loop.vars, loop.extents, strict=True)
    return next((v for v, extent in pairs if extent > 1 and v not in used), None)


def _is_of_another(loop: Parallel, load: Load, store: Store) -> bool:
    """True when some iteration certainly reads what another one stores."""
    is_shifted = False
    for read, written in zip(load.index, store.index, strict=True):
        offset = difference(read, written)
        if offset is None:
            return False
        shift = _shift(loop, written, offset)
        if shift is None:
            return False
        is_shifted |= shift != 0
    return is_shifted


def _shift(loop: Parallel, written: Expr, offset: int) -> int | None:
    """How many iterations lie between the two indexes along one dimension; None if unclear."""
    terms, _ = linear(written)
    steps = [(loop.extents[d], terms[v]) for d, v in enumerate(loop.vars) if v in terms]
    if not steps:
        return 0 if offset == 0 else None
    if len(steps) > 1:
        return None
    ((extent, factor),) = steps
    if offset % factor or abs(offset // factor) >= extent:
        return None
    return offset // factor
