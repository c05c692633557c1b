"""Which register a fragment access means: the fragment's layout seen from a loop's layout.

Knows fragment layouts and index expressions. An access is local when every thread finds the
element it asks for in a register of its own, the same register number in every thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tilejit.ir.expr import Const, Expr, Op, Var, walk
from tilejit.layout.fragment import FragmentLayout

Registers = tuple[int, ...]

INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "floordiv": np.floor_divide,
    "floormod": np.remainder,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
}


def evaluate(e: Expr, values: Mapping[Var, Any]) -> Any | None:
    """An index expression over arrays of integers; None when it uses anything else."""
    done: dict[Expr, Any] = {}
    for node in walk(e):
        if isinstance(node, Const):
            done[node] = np.int64(int(node.value))
        elif isinstance(node, Var):
            if node not in values:
                return None
            done[node] = values[node]
        elif isinstance(node, Op) and node.op == "cast" and node.dtype.is_integer:
            done[node] = done[node.children[0]]
        elif isinstance(node, Op) and node.op in INTEGER:
            done[node] = INTEGER[node.op](*(done[c] for c in node.children))
        else:
            return None
    return done[e]


def local_registers(
    fragment: FragmentLayout,
    loop: FragmentLayout | None,
    variables: Sequence[Var],
    at: Sequence[Expr],
) -> Registers | None:
    """For each register of the loop's layout, the fragment's register with element `at`.

    loop: layout of the iterations over `variables`; None outside a loop (one register then).
    Returns None when the access is not local. Iterations that are padding get register 0.
    """
    if loop is not None and fragment.threads != loop.threads:
        return None
    direct = _same_shape(fragment, loop, variables, at)
    if direct is not None:
        return direct
    threads = np.arange(fragment.threads)[:, None]
    if loop is None:
        coordinates, inside = {}, np.ones((fragment.threads, 1), bool)
    else:
        places = [loop.coordinates(threads, r) for r in range(loop.registers)]
        grids = [
            np.concatenate([_column(p[d], threads) for p in places], axis=1)
            for d in range(len(loop.shape))
        ]
        inside = (
            np.logical_and.reduce([g < n for g, n in zip(grids, loop.shape, strict=True)])
            if grids
            else np.ones((fragment.threads, 1), bool)
        )
        coordinates = dict(zip(variables, grids, strict=True))
    wanted = [evaluate(e, coordinates) for e in at]
    known = [w for w in wanted if w is not None]
    if len(known) < len(wanted):
        return None
    return _find(fragment, [np.broadcast_to(w, inside.shape) for w in known], inside)


def _column(value: Any, threads: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.broadcast_to(np.asarray(value), threads.shape)


def _same_shape(
    fragment: FragmentLayout,
    loop: FragmentLayout | None,
    variables: Sequence[Var],
    at: Sequence[Expr],
) -> Registers | None:
    """The common case: indexed by different loop variables of the fragment's own extents."""
    if loop is None or (loop.flat and tuple(at) != tuple(variables)):
        return None
    order = {v: d for d, v in enumerate(variables)}
    if not all(isinstance(e, Var) and e in order for e in at) or len(set(at)) != len(at):
        return None
    keep = [order[e] for e in at if isinstance(e, Var)]
    if loop.flat:
        if fragment.same_places(loop):
            return tuple(loop.register_of(fragment))
        return None
    view = loop.project(keep)
    if view.shape != fragment.shape or not view.same_places(fragment):
        return None
    table = {fragment.register_part(r): r for r in range(fragment.registers)}
    result = []
    for r in range(loop.registers):
        part = loop.register_part(r)
        result.append(table[tuple(part[d] for d in keep)])
    return tuple(result)


def _find(
    fragment: FragmentLayout,
    wanted: Sequence[np.ndarray[Any, Any]],
    inside: np.ndarray[Any, Any],
) -> Registers | None:
    """Search every thread's registers for the wanted elements."""
    shape = fragment.shape
    for w, extent in zip(wanted, shape, strict=True):
        if np.any(inside & ((w < 0) | (w >= extent))):
            return None
    flat = np.zeros(inside.shape, np.int64)
    for w, extent in zip(wanted, shape, strict=True):
        flat = flat * extent + np.where(inside, w, 0)
    threads = np.arange(fragment.threads)
    owned = np.full((fragment.threads, fragment.registers), -1, np.int64)
    for r in range(fragment.registers):
        place = fragment.coordinates(threads, r)
        number = np.zeros(fragment.threads, np.int64)
        valid = np.ones(fragment.threads, bool)
        for p, extent in zip(place, shape, strict=True):
            number = number * extent + p
            valid = valid & (np.asarray(p) < extent)
        owned[:, r] = np.where(valid, number, -1)
    result = []
    for r in range(inside.shape[1]):
        rows = inside[:, r]
        if not rows.any():
            result.append(0)
            continue
        hits = (owned[rows] == flat[rows, r][:, None]).all(axis=0)
        if not hits.any():
            return None
        result.append(int(np.argmax(hits)))
    return tuple(result)
