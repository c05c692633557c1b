"""Which values are the same in all threads that come to a place.

Knows how values come about: loops, loads, variables that branches change. Does not know why it
matters. It is finer than `ir.divergence`, which asks about all threads of a role.
"""

from __future__ import annotations

from collections.abc import Iterable

from tilejit.ir.buffer import Buffer
from tilejit.ir.divergence import Divergence
from tilejit.ir.expr import Expr, Var, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, For, If, Let, Load, Node, Roles, Store, While
from tilejit.ir.parts import Home

# The branches and loops around a place whose threads may go different ways: each a node and the
# number of the body.
Path = tuple[tuple[Node, int], ...]


class Sameness:
    """Of a kernel as traced."""

    def __init__(self, kernel: Kernel, divergence: Divergence) -> None:
        self._divergence = divergence
        self._makers: dict[Var, Node] = {}
        self._writers: dict[Buffer, list[tuple[Node, Path, Home]]] = {}
        self._threads = set(kernel.thread_vars)
        self._visit(kernel.body, (), (0, kernel.num_threads))

    def _visit(self, body: Body, path: Path, home: Home) -> None:
        for node in body:
            self._makers.update((var, node) for var in node.defines)
            for buffer in node.writes:
                if buffer.scope.is_per_thread:
                    self._writers.setdefault(buffer.root, []).append((node, path, home))
            for number, inner in enumerate(node.bodies):
                here = (*path, (node, number)) if self.splits(node) else path
                own = node.roles[number].home if isinstance(node, Roles) else home
                self._visit(inner, here, own)

    def splits(self, node: Node) -> bool:
        """True when threads may go different ways through the node's bodies."""
        return isinstance(node, If | While | For) and self._divergence.of(node.exprs)

    def differs(self, exprs: Iterable[Expr], path: Path, home: Home) -> bool:
        """Whether the expressions may differ between the threads that come to a place."""
        pending = [v for e in exprs for v in variables(e)]
        seen: set[Var] = set()
        while pending:
            var = pending.pop()
            if var in seen:
                continue
            seen.add(var)
            if var in self._threads:
                return True
            maker = self._makers.get(var)
            if isinstance(maker, Load) and maker.buffer.scope.is_per_thread:
                for writer, where, threads in self._writers.get(maker.buffer.root, ()):
                    if _apart(threads, home):
                        continue
                    if not isinstance(writer, Store) or where != path[: len(where)]:
                        return True
                    pending += [v for e in writer.exprs for v in variables(e)]
            if isinstance(maker, For | Let | Load):
                pending += [v for e in maker.exprs for v in variables(e)]
            elif maker is not None and self._divergence.of((var,)):
                return True
        return False


def _apart(a: Home, b: Home) -> bool:
    return a[0] + a[1] <= b[0] or b[0] + b[1] <= a[0]
