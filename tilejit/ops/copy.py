"""Moving tiles: copy, fill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr, Var
from tilejit.ir.names import Names
from tilejit.ir.node import Node
from tilejit.ir.sync import BarrierSlot
from tilejit.isa.atom import CopyAtom, CopyMethod


@dataclass(frozen=True, eq=False, kw_only=True)
class Copy(Node):
    """dst[...] = src[...] cast to dst's dtype, element by element; the regions' shapes are equal.

    Elements of `src` outside a global tensor read as `pad`; those of `dst` are not written.

    combine: "add" for dst[...] += src[...], each element in one step that no other thread can
        interrupt; None for a plain copy.

    coalesced_width: elements a thread moves at once, when the user says so.
    prefer: the method that the user asks for ("tma", "cp_async", "sync", or "no_tma": not that).
    eviction: how long the L2 cache should keep what is moved ("evict_first", "evict_last").
    is_async: it only starts, by the tensor memory accelerator: what waits for it is written too.
    atom: decided by `select`: how it is moved, None before.

    Of copies by the tensor memory accelerator, which every executing thread issues:
    barrier: for those to shared memory, where it announces the bytes that it brings and that they
        have come; None before roles are split.
    cluster_axis: the grid's axis along which the blocks of a cluster share what is brought: each
        brings its part and hands it to all; None where each brings all.
    cluster_mask: the same for the blocks of a cluster whose bits (1 << rank) are set; the others
        bring all for themselves.
    tensor_map, share: decided by `describe`: the parameter that describes the global tensor; the
        block's number among those that share.
    whole: the copy that it is one of several parts of.
    """

    src: Region
    dst: Region
    pad: Expr | None = None
    combine: str | None = None
    coalesced_width: int | None = None
    prefer: str | None = None
    eviction: str | None = None
    is_async: bool = False
    atom: CopyAtom | None = None
    barrier: BarrierSlot | None = None
    cluster_axis: int | None = None
    cluster_mask: int | None = None
    tensor_map: Var | None = None
    share: Expr | None = None
    whole: Copy | None = None

    def __post_init__(self) -> None:
        assert self.src.shape == self.dst.shape, f"{self.src} to {self.dst}"

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.src.buffer,) if self.combine is None else (self.src.buffer, self.dst.buffer)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        signals = () if self.barrier is None else (self.barrier.buffer,)
        return (self.dst.buffer, *signals)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        pad = () if self.pad is None else (self.pad,)
        slot = () if self.barrier is None else (self.barrier.slot,)
        described = () if self.tensor_map is None else (self.tensor_map,)
        share = () if self.share is None else (self.share,)
        place = (*self.src.buffer.place, *self.dst.buffer.place)
        return (*self.src.starts, *self.dst.starts, *pad, *slot, *described, *share, *place)

    @property
    def is_tma(self) -> bool:
        """True for copies by the tensor memory accelerator."""
        return self.atom is not None and self.atom.method is CopyMethod.TMA

    @property
    def is_trade(self) -> bool:
        """True for copies between fragments by which lanes of quads trade their elements."""
        return self.atom is not None and self.atom.method is CopyMethod.QUADS

    def sharers(self, blocks: int) -> int:
        """The mask of the blocks that share what is brought, in a cluster of `blocks`; 0 where
        each brings all."""
        if self.cluster_axis is not None:
            return (1 << blocks) - 1
        return self.cluster_mask or 0

    @property
    def regions(self) -> tuple[Region, ...]:
        return self.src, self.dst

    def problems(self) -> Iterator[str]:
        if self.src.shape != self.dst.shape:
            yield f"copies {self.src.shape} to {self.dst.shape}"
        if self.pad is not None and self.pad.dtype is not self.src.buffer.dtype:
            yield f"pads {self.src.buffer.dtype} with {self.pad.dtype}"
        if self.combine not in (None, "add"):
            yield f"combines by {self.combine}"

    def show(self, names: Names) -> str:
        if self.combine is not None:
            return self._show_combined(names)
        text = f"{names.region(self.src)}, {names.region(self.dst)}"
        if self.pad is not None:
            text += f", pad={names.expr(self.pad)}"
        if self.coalesced_width is not None:
            text += f", coalesced_width={self.coalesced_width}"
        if self.prefer is not None:
            is_ruled_out = self.prefer == "no_tma"
            text += (
                ", disable_tma=True" if is_ruled_out else f", prefer_instruction={self.prefer!r}"
            )
        if self.eviction is not None:
            text += f", eviction_policy={self.eviction!r}"
        if self.barrier is not None:
            text += f", barrier={names.index(self.barrier.buffer, (self.barrier.slot,))}"
        if self.cluster_mask is not None:
            text += f", cluster_mask={self.cluster_mask:#b}"
        is_started = self.is_async or self.barrier is not None
        is_started |= self.is_tma and self.dst.buffer.scope is Scope.GLOBAL
        name = "tma_copy" if is_started else "copy"
        return f"T.{name}({text})" + (f"  # {self.atom}" if self.atom else "")

    def _show_combined(self, names: Names) -> str:
        text = f"{names.region(self.dst)}, {names.region(self.src)}"
        if self.is_tma or self.prefer == "tma":
            text += ", use_tma=True"
        return f"T.atomic_{self.combine}({text})"


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
        return (*self.dst.starts, self.value, *self.dst.buffer.place)

    @property
    def regions(self) -> tuple[Region, ...]:
        return (self.dst,)

    def problems(self) -> Iterator[str]:
        if self.value.dtype is not self.dst.buffer.dtype:
            yield f"fills {self.dst.buffer.dtype} with {self.value.dtype}"

    def show(self, names: Names) -> str:
        return f"T.fill({names.region(self.dst)}, {names.expr(self.value)})"


def is_bulk_store(node: Node) -> bool:
    """True for copies to a tensor by the tensor memory accelerator."""
    return isinstance(node, Copy) and node.is_tma and node.dst.buffer.scope is Scope.GLOBAL
