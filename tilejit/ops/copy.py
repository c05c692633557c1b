"""Moving tiles: copy, fill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tilejit.ir.buffer import Buffer, Region
from tilejit.ir.expr import Expr
from tilejit.ir.names import Names
from tilejit.ir.node import Node
from tilejit.isa.atom import CopyAtom


@dataclass(frozen=True, eq=False, kw_only=True)
class Copy(Node):
    """dst[...] = src[...] cast to dst's dtype, element by element; the regions' shapes are equal.

    Elements of `src` outside a global tensor read as `pad`; those of `dst` are not written.

    coalesced_width: elements a thread moves at once, when the user says so.
    atom: decided by `select`: how it is moved, None before.
    """

    src: Region
    dst: Region
    pad: Expr | None = None
    coalesced_width: int | None = None
    prefer: str | None = None
    atom: CopyAtom | None = None

    def __post_init__(self) -> None:
        assert self.src.shape == self.dst.shape, f"{self.src} to {self.dst}"

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.src.buffer,)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.dst.buffer,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        pad = () if self.pad is None else (self.pad,)
        return (*self.src.starts, *self.dst.starts, *pad)

    @property
    def regions(self) -> tuple[Region, ...]:
        return self.src, self.dst

    def problems(self) -> Iterator[str]:
        if self.src.shape != self.dst.shape:
            yield f"copies {self.src.shape} to {self.dst.shape}"
        if self.pad is not None and self.pad.dtype is not self.src.buffer.dtype:
            yield f"pads {self.src.buffer.dtype} with {self.pad.dtype}"

    def show(self, names: Names) -> str:
        text = f"{names.region(self.src)}, {names.region(self.dst)}"
        if self.pad is not None:
            text += f", pad={names.expr(self.pad)}"
        if self.coalesced_width is not None:
            text += f", coalesced_width={self.coalesced_width}"
        if self.prefer is not None:
            text += f", prefer={self.prefer!r}"
        return f"T.copy({text})" + (f"  # {self.atom}" if self.atom else "")


@dataclass(frozen=True, eq=False, kw_only=True)
class Fill(Node):
    """dst[...] = value, already of dst's dtype."""

    dst: Region
    value: Expr

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.dst.buffer,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (*self.dst.starts, self.value)

    @property
    def regions(self) -> tuple[Region, ...]:
        return (self.dst,)

    def problems(self) -> Iterator[str]:
        if self.value.dtype is not self.dst.buffer.dtype:
            yield f"fills {self.dst.buffer.dtype} with {self.value.dtype}"

    def show(self, names: Names) -> str:
        return f"T.fill({names.region(self.dst)}, {names.expr(self.value)})"
