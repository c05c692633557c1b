"""A schedule by hand: the order and the stages of a pipelined loop's statements.

Knows how `order`, `stage` and `group` of T.Pipelined name statements, and marks these. Does not
know whether the schedule keeps the loop's meaning, nor who carries it out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from tilejit.errors import ArgumentError, Span
from tilejit.ir.node import Let, Load, Node

Group = tuple[int, ...]


def marked(
    body: tuple[Node, ...],
    order: Sequence[int],
    stage: Sequence[int],
    group: Sequence[Group],
    span: Span | None,
) -> tuple[Node, ...]:
    """The body's statements with their place and stage.

    group: the statements that each entry of order and stage is for; without it, one each. An
    order of -1 is for copies that are made ahead of everything (their stage does not count).

    Raises:
        ArgumentError: a statement with no entry or with two, or numbers that name none.
    """
    statements = [n for n in body if not isinstance(n, Let | Load)]
    groups = [tuple(g) for g in group] or [(n,) for n in range(len(order))]
    if len(groups) != len(order):
        raise ArgumentError(
            f"T.Pipelined: group has {len(groups)} entries and order has {len(order)}.",
            span=span,
            hint="Give one entry of order and stage for every group.",
        )
    named = [n for g in groups for n in g]
    wrong = sorted(set(named) ^ set(range(len(statements))))
    if wrong or len(named) != len(set(named)):
        twice = sorted({n for n in named if named.count(n) > 1})
        what = f"{twice[0]} is named twice" if twice else f"{wrong[0]} is named wrongly or not"
        raise ArgumentError(
            f"T.Pipelined: the schedule must name each of the body's {len(statements)} statements "
            f"once, but {what}.",
            span=span,
            notes=list(_listed(statements)),
            hint="Statements count from 0 on; scalar values have no number.",
        )
    places = [n for n in order if n >= 0]
    if len(places) != len(set(places)):
        raise ArgumentError(
            "T.Pipelined: two entries of order are equal.",
            span=span,
            hint="Give each group a place of its own; only -1 may be repeated.",
        )
    marks = {
        statements[n]: (place, number)
        for g, place, number in zip(groups, order, stage, strict=True)
        for n in g
    }
    return tuple(dataclasses.replace(n, schedule=marks[n]) if n in marks else n for n in body)


def _listed(statements: Sequence[Node]) -> Iterator[str]:
    for number, node in enumerate(statements):
        line = f" in line {node.span.line}" if node.span else ""
        yield f"{number}: {type(node).__name__.lower()}{line}"
