"""Names for printing: the user's, made unique, and texts of what nodes refer to.

Knows how expressions, indices and regions look. Does not know nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilejit.ir.buffer import Buffer, Region
from tilejit.ir.expr import Expr, Op, Var, arith, int_value, show


class Names:
    """Gives each variable and buffer a name of its own, in order of first use."""

    def __init__(self) -> None:
        self._names: dict[Var | Buffer, str] = {}
        self._taken: set[str] = set()

    def of(self, thing: Var | Buffer) -> str:
        name = self._names.get(thing)
        if name is None:
            name, count = thing.name, 1
            while name in self._taken:
                name, count = f"{thing.name}_{count}", count + 1
            self._names[thing] = name
            self._taken.add(name)
        return name

    def expr(self, e: Expr) -> str:
        return show(e, self.of)

    def index(self, buffer: Buffer, index: Sequence[Expr]) -> str:
        """An element, such as `A[i, j + 1]`."""
        return f"{self.of(buffer)}[{', '.join(map(self.expr, index)) or '()'}]"

    def region(self, region: Region) -> str:
        """The whole buffer by its name, else with a slice for each dimension."""
        if region.is_whole:
            return self.of(region.buffer)
        parts = []
        for d, (start, extent) in enumerate(zip(region.starts, region.extents, strict=True)):
            if d in region.dropped:
                parts.append(self.expr(start))
            elif int_value(start) is not None:
                parts.append(f"{self.expr(start)}:{self.expr(arith('add', start, extent))}")
            else:
                text = self.expr(start)
                if isinstance(start, Op) and start.op not in ("add", "sub", "mul"):
                    text = f"({text})"
                parts.append(f"{self.expr(start)}:{text} + {extent}")
        return f"{self.of(region.buffer)}[{', '.join(parts) or '()'}]"

    def shape(self, extents: Sequence[Expr]) -> str:
        """A tuple in Python's syntax."""
        texts = [self.expr(e) for e in extents]
        return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"
