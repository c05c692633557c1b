"""A schedule by hand: the order and the stages of a pipelined loop's statements.

Knows how `order`, `stage` and `group` of T.Pipelined name statements, marks these, and refuses what
would change the loop's meaning. Does not know who carries a schedule out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from tilejit.errors import ArgumentError, Span
from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Scope
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import For, Let, Load, Node, walk
from tilejit.ir.rounds import Rounds, by_hand
from tilejit.ops.copy import Copy

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


def check_schedules(kernel: Kernel) -> None:
    """Refuse schedules that change what their loop computes.

    Raises:
        ArgumentError: a statement would no longer follow one that it depends on; copies ahead of
            all that are none, or that depend on the loop; more than two stages.
    """
    for loop in walk(kernel.body):
        if isinstance(loop, For) and loop.order:
            _check(loop, Aliases(kernel))


def _check(loop: For, aliases: Aliases) -> None:
    ahead = [n for n in loop.body if n.schedule is not None and n.schedule[0] < 0]
    rest = [n for n in loop.body if n not in ahead]
    for node in ahead:
        scopes = (node.src.buffer.scope, node.dst.buffer.scope) if isinstance(node, Copy) else ()
        if scopes != (Scope.GLOBAL, Scope.SHARED):
            raise ArgumentError(
                "T.Pipelined: an order of -1 is for copies from tensors to shared memory.",
                span=loop.span,
                related=[(node.span, "this is none")],
            )
    rounds = Rounds(rest, aliases, (b for n in ahead for b in n.writes))
    stages = {n.schedule[1] for n in rest if n.schedule is not None}
    if len(stages) > 2:
        raise ArgumentError(
            f"T.Pipelined: the schedule has {len(stages)} stages besides that of the copies; two "
            "are supported.",
            span=loop.span,
            hint="Let each statement be of the next iteration or of the round's own.",
        )
    if not stages:
        return
    order, late = by_hand(rounds)
    found = rounds.overtaken(order, late)
    if found is not None:
        first, second = found
        raise ArgumentError(
            "T.Pipelined: the schedule changes what the loop computes: a statement would no longer "
            "follow one that it depends on.",
            span=loop.span,
            related=[(first.span, "the first"), (second.span, "depends on it")],
            hint="Compare with the order in which the body is written.",
        )


def _listed(statements: Sequence[Node]) -> Iterator[str]:
    for number, node in enumerate(statements):
        line = f" in line {node.span.line}" if node.span else ""
        yield f"{number}: {type(node).__name__.lower()}{line}"
