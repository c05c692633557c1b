"""The operands of a matrix instruction on their way from shared memory to registers.

Knows which part of a tile a warp multiplies and which words belong to which instruction. Does not
know how a word is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tilejit.ir.buffer import Region
from tilejit.ir.expr import Expr, arith
from tilejit.isa.machine import Value
from tilejit.lower.emit import Point


@dataclass(frozen=True)
class Operand:
    """A shared operand seen as (outer, k): outer is m for A, n for B.

    is_k_major: k runs along the region's last dimension.
    """

    region: Region
    is_k_major: bool
    point: Point

    def at(self, outer: Expr, k: Expr) -> tuple[Expr, ...]:
        """The buffer index of an element."""
        pair = (outer, k) if self.is_k_major else (k, outer)
        result = [self.point.sub(e) for e in self.region.starts]
        for d, coordinate in zip(self.region.kept, pair, strict=True):
            result[d] = arith("add", result[d], coordinate)
        return tuple(result)


@dataclass(frozen=True)
class WarpTile:
    """rows, columns: instructions along m and n; origin: the tile's first row and column."""

    rows: int
    columns: int
    lane: Expr
    origin_m: Expr
    origin_n: Expr


@dataclass
class Operands:
    """The operand words of a step of k, by row (a) and by column (b) of instructions."""

    a: list[list[Value]] = field(default_factory=list)
    b: list[list[Value]] = field(default_factory=list)

    @property
    def words(self) -> list[Value]:
        return [w for side in (self.a, self.b) for group in side for w in group]


Piece = Callable[[], None]


@dataclass(frozen=True)
class OperandSource:
    """rows(i, step): words of A; columns(j, count, step): words of B for `count` instructions,
    `group` of which one load brings."""

    tile: WarpTile
    rows: Callable[[int, int], list[Value]]
    columns: Callable[[int, int, int], list[list[Value]]]
    group: int

    def pieces(self, step: int, into: Operands) -> Sequence[Piece]:
        """Loads of a step as functions to be called in order; each adds to `into`."""

        def load_a(i: int) -> None:
            into.a.append(self.rows(i, step))

        def load_b(j: int, count: int) -> None:
            into.b.extend(self.columns(j, count, step))

        columns = self.tile.columns
        return [partial(load_a, i) for i in range(self.tile.rows)] + [
            partial(load_b, j, min(self.group, columns - j)) for j in range(0, columns, self.group)
        ]

    def all(self, step: int) -> Operands:
        """All loads of a step at once."""
        result = Operands()
        for piece in self.pieces(step, result):
            piece()
        return result


class Spread:
    """Pieces of work spread evenly between `room` others, in order.

    Loads that come in a bunch wait for each other at the shared memory's one port, and the matrix
    instructions behind them wait too: ahead of every fourth one they cost nothing.
    """

    def __init__(self, pieces: Sequence[Piece], room: int) -> None:
        self._pieces = pieces
        self._room = room
        self._steps = 0
        self._done = 0

    def advance(self) -> None:
        """Another unit of the other work is about to be emitted: do what is due before it."""
        while self._done < len(self._pieces) and self._done * self._room <= self._steps * len(
            self._pieces
        ):
            self._pieces[self._done]()
            self._done += 1
        self._steps += 1

    def finish(self) -> None:
        for piece in self._pieces[self._done :]:
            piece()
        self._done = len(self._pieces)
