"""Running sums and maxima of a tile along one axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tilejit.dtypes import DType
from tilejit.ir.buffer import Buffer, Region, Scope, whole
from tilejit.ir.expr import Expr
from tilejit.ir.names import Names
from tilejit.ir.node import Node
from tilejit.layout.scan import Scanning
from tilejit.ops.reduce import ReduceKind, Step, accumulator, identity


@dataclass(frozen=True, eq=False, kw_only=True)
class Scan(Node):
    """Each element of dst = src's elements along `axis` up to there and there, combined; with
    `reverse`, those from there on.

    src: a tile; after `select` a whole fragment of the accumulator's dtype, the same as dst.
    dst: a tile of the same shape.
    kind: SUM or MAX.
    keeps_nan: maxima are NaN from the first NaN on; else they pass over NaNs.
    spread: decided by `select`: how the fragment lies, and how it is scanned.
    scratch: decided by `select`, where the axis has parts: shared memory for all of each part
        combined, (*dst's shape without `axis`, parts).
    step: decided by `select`, where there is scratch: to scan each part for itself and leave there
        what it adds up to, or to add what the parts before add up to.

    Elements are converted to `accumulator` first and each result to dst's dtype last.
    """

    src: Region
    dst: Region
    kind: ReduceKind
    axis: int
    reverse: bool = False
    keeps_nan: bool = False
    spread: Scanning | None = None
    scratch: Buffer | None = None
    step: Step = Step.WHOLE

    @property
    def call(self) -> str:
        """How the user spells it."""
        return "T.cumsum" if self.kind is ReduceKind.SUM else "T.cummax"

    @property
    def reads(self) -> tuple[Buffer, ...]:
        scratch = (self.scratch,) if self.scratch and self.step is Step.TAKE else ()
        return (self.src.buffer, *scratch)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        scratch = (self.scratch,) if self.scratch and self.step is Step.SEND else ()
        return (self.dst.buffer, *scratch)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (*self.src.starts, *self.dst.starts)

    @property
    def regions(self) -> tuple[Region, ...]:
        return self.src, self.dst

    @property
    def accumulator(self) -> DType:
        """The dtype in which elements are combined."""
        return accumulator(self.src.buffer.dtype, self.dst.buffer.dtype)

    @property
    def nothing(self) -> float | int:
        """What leaves every other value as it is, zeros of either sign too."""
        if self.kind is ReduceKind.SUM and self.accumulator.is_float:
            return -0.0
        return identity(self.kind, self.accumulator, keeps_nan=self.keeps_nan)

    def problems(self) -> Iterator[str]:
        if not 0 <= self.axis < len(self.src.shape):
            yield f"scans axis {self.axis} of {self.src.shape}"
        if self.src.shape != self.dst.shape:
            yield f"scans {self.src.shape} to {self.dst.shape}"
        for name, region in (("src", self.src), ("dst", self.dst)):
            if region.buffer.scope not in (Scope.SHARED, Scope.FRAGMENT):
                yield f"has `{name}` in {region.buffer.scope.value}"

    def show(self, names: Names) -> str:
        text = f"{names.region(self.src)}, {names.region(self.dst)}, dim={self.axis}"
        if self.reverse:
            text += ", reverse=True"
        if self.keeps_nan:
            text += ", nan_propagate=True"
        comment = ""
        if self.scratch is not None:
            comment = f"  # through {names.region(whole(self.scratch))}, {self.step}"
        return f"{self.call}({text}){comment}"
