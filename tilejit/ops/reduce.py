"""Reduction of a tile along one axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tilejit.dtypes import DType, float32, float64, int32, tfloat32, uint32
from tilejit.ir.buffer import Buffer, Region, Scope, whole
from tilejit.ir.expr import Expr, index
from tilejit.ir.names import Names
from tilejit.ir.node import Node
from tilejit.layout.fragment import FragmentLayout
from tilejit.layout.reduction import Reduction


class ReduceKind(StrEnum):
    """What becomes of the elements; the values are TileLang's names."""

    SUM = "sum"
    ABSSUM = "abssum"
    MAX = "max"
    MIN = "min"
    ABSMAX = "absmax"
    BITAND = "bitand"
    BITOR = "bitor"
    BITXOR = "bitxor"

    @property
    def combine(self) -> str:
        """The `ir.expr` operation that makes one value of two."""
        return _COMBINE[self]

    @property
    def is_absolute(self) -> bool:
        """True where elements count without their signs."""
        return self in (ReduceKind.ABSSUM, ReduceKind.ABSMAX)

    @property
    def is_bitwise(self) -> bool:
        return self in (ReduceKind.BITAND, ReduceKind.BITOR, ReduceKind.BITXOR)

    @property
    def is_extreme(self) -> bool:
        return self.combine in ("max", "min")


_COMBINE = {
    ReduceKind.SUM: "add",
    ReduceKind.ABSSUM: "add",
    ReduceKind.MAX: "max",
    ReduceKind.ABSMAX: "max",
    ReduceKind.MIN: "min",
    ReduceKind.BITAND: "and",
    ReduceKind.BITOR: "or",
    ReduceKind.BITXOR: "xor",
}


class Step(StrEnum):
    """What of an exchange a node does: first each party sends what it has, then it takes all."""

    WHOLE = "whole"
    SEND = "send"
    TAKE = "take"


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduce(Node):
    """dst = all of src along `axis`, combined; without `clear`, combined with what dst holds.

    src: a tile; after `select` a whole fragment.
    dst: src's shape without `axis`, or with an extent of 1 there; after `select` a whole fragment.
    keeps_nan: a NaN among the elements makes `max` and `min` NaN; else they pass over NaNs.
    scratch: decided by `layouts`, where the axis spans warps: shared memory through which the
        parts of a result go, (*dst's shape, parts).
    step: decided by `sync` where there is scratch: to leave the parts there, which ends the use of
        src, or to combine them in dst; the threads meet in between.
    slot: decided by `sync` in some loops: the scratch has another dimension first, and rounds use
        its two slots in turn.

    Elements are converted to `accumulator` first and the result to dst's dtype last.
    """

    src: Region
    dst: Region
    kind: ReduceKind
    axis: int
    clear: bool = True
    keeps_nan: bool = False
    scratch: Buffer | None = None
    step: Step = Step.WHOLE
    slot: Expr | None = None

    @property
    def reads(self) -> tuple[Buffer, ...]:
        old = () if self.clear else (self.dst.buffer,)
        if self.step is Step.SEND:
            return (self.src.buffer,)
        if self.step is Step.TAKE:
            return (*old, *self._scratch)
        return (self.src.buffer, *old, *self._scratch)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        if self.step is Step.SEND:
            return self._scratch
        if self.step is Step.TAKE:
            return (self.dst.buffer,)
        return (self.dst.buffer, *self._scratch)

    @property
    def _scratch(self) -> tuple[Buffer, ...]:
        return () if self.scratch is None else (self.scratch,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        slot = () if self.slot is None else (self.slot,)
        return (*self.src.starts, *self.dst.starts, *slot)

    @property
    def regions(self) -> tuple[Region, ...]:
        return self.src, self.dst

    @property
    def parts(self) -> Region:
        """Where in the scratch the parts are."""
        assert self.scratch is not None, "nothing goes through shared memory"
        if self.slot is None:
            return whole(self.scratch)
        shape = self.scratch.extents[1:]
        starts = (self.slot, *(index(0) for _ in shape))
        return Region(self.scratch, starts, (1, *shape), frozenset((0,)))

    @property
    def keeps_axis(self) -> bool:
        """True when dst has the reduced dimension, with an extent of 1."""
        return len(self.dst.shape) == len(self.src.shape)

    @property
    def accumulator(self) -> DType:
        """The dtype in which elements are combined."""
        return accumulator(self.src.buffer.dtype, self.dst.buffer.dtype)

    def reduction(self, source: FragmentLayout) -> Reduction:
        """How it is done where src lies so."""
        return Reduction(source, self.axis, self.keeps_axis)

    def problems(self) -> Iterator[str]:
        if not 0 <= self.axis < len(self.src.shape):
            yield f"reduces axis {self.axis} of {self.src.shape}"
        elif self.dst.shape not in result_shapes(self.src.shape, self.axis):
            yield f"reduces {self.src.shape} along {self.axis} to {self.dst.shape}"
        for name, region in (("src", self.src), ("dst", self.dst)):
            if region.buffer.scope not in (Scope.SHARED, Scope.FRAGMENT):
                yield f"has `{name}` in {region.buffer.scope.value}"

    def show(self, names: Names) -> str:
        text = f"{names.region(self.src)}, {names.region(self.dst)}, dim={self.axis}"
        if not self.clear:
            text += ", clear=False"
        if self.keeps_nan:
            text += ", nan_propagate=True"
        step = "" if self.step is Step.WHOLE else f", {self.step}"
        comment = f"  # through {names.region(self.parts)}{step}" if self.scratch else ""
        return f"T.reduce_{self.kind}({text}){comment}"


def result_shapes(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The two shapes that a reduction's result may have."""
    return (*shape[:axis], *shape[axis + 1 :]), (*shape[:axis], 1, *shape[axis + 1 :])


def accumulator(source: DType, target: DType) -> DType:
    """The dtype in which elements are combined: float32, or float64 where either is; for integers
    the result's, or 32 bits where it is narrower (the result wraps)."""
    if target.is_float or source.is_float:
        return float64 if float64 in (source, target) else float32
    if target.bits >= 32 and not target.is_bool:
        return target
    return int32 if target.is_signed and not target.is_bool else uint32


def identity(kind: ReduceKind, dtype: DType, *, keeps_nan: bool) -> float | int:
    """What leaves the other value as it is, of an accumulator's dtype."""
    assert dtype is not tfloat32, "accumulators are plain"
    if kind.combine == "and":
        return -1 if dtype.is_signed else int(dtype.max)
    if not kind.is_extreme:
        return 0
    if not dtype.is_float:
        return dtype.min if kind.combine == "max" else dtype.max
    if not keeps_nan:
        return float("nan")
    return float("-inf") if kind.combine == "max" else float("inf")
