"""The host side of a traced program: grids, extents of outputs, which arguments are written.

Knows `ir` programs and host expressions. Does not know arrays or executors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tilejit.ir.expr import Expr, Var, VarKind, variables
from tilejit.ir.kernel import Kernel, Program
from tilejit.runtime.host import host_function

Grid = tuple[int, int, int]


class HostProgram:
    """A program's host side: where each value comes from, grids, extents of outputs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.grids = [self._grid(kernel) for kernel in program.kernels]
        self.output_shapes = [self.function(b.shape) for b in program.outputs]
        self.written = self._written()
        self.grid_variables = _variables(e for k in program.kernels for e in k.grid)
        self.output_variables = _variables(e for b in program.outputs for e in b.shape)

    def function(self, exprs: Sequence[Expr]) -> Callable[[Mapping[Var, Any]], tuple[Any, ...]]:
        """Evaluates the expressions from the program's values."""
        used = tuple(
            dict.fromkeys(v for e in exprs for v in sorted(variables(e), key=lambda v: v.serial))
        )
        compute = host_function(exprs, used)
        if not used:
            constant = compute()
            return lambda values: constant
        return lambda values: compute(*(values[v] for v in used))

    def _grid(self, kernel: Kernel) -> Callable[[Mapping[Var, Any]], Grid]:
        compute = self.function(kernel.grid)
        padding = (1,) * (3 - len(kernel.grid))
        return lambda values: (*compute(values), *padding)

    def _written(self) -> frozenset[Var]:
        """Address variables of the arguments and outputs that a kernel writes."""
        found: set[Var] = set()
        for kernel in self.program.kernels:
            for buffer in kernel.written:
                if isinstance(buffer.data, Expr):
                    found |= {v for v in variables(buffer.data) if v.kind is VarKind.POINTER}
        return frozenset(found)


def _variables(exprs: Iterable[Expr]) -> frozenset[Var]:
    return frozenset(v for e in exprs for v in variables(e))
