"""A kernel: the form that passes fill in, one blank each; and a program of kernels.

Knows what has been decided and by which type. Does not know how anything is decided or lowered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any

from tilejit.errors import Span
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, arith, index
from tilejit.ir.node import Body, walk
from tilejit.layout.fragment import FragmentLayout
from tilejit.layout.shared import SharedLayout
from tilejit.target import Target


class ParamKind(StrEnum):
    TENSOR = "tensor"  # passed as its address
    POINTER = "pointer"  # a raw address given by the user
    SCALAR = "scalar"
    SYMBOL = "symbol"  # runtime extent or stride, found in the arguments
    TENSOR_MAP = "tensor map"  # how the tensor memory accelerator sees a tensor
    WORKSPACE = "workspace"  # address of memory that the runtime keeps for the kernel


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Param:
    """One parameter of the generated kernel.

    var: the variable it binds: the address for TENSOR and POINTER (64 bits), else the value.
    buffer: for TENSOR and WORKSPACE, the buffer that `var` is the address of.
    noalias: nothing that the kernel writes overlaps it, nor does the kernel write it.
    overlaps: the kernel writes another argument of the call that shares bytes with it.
    is_zeroed: for WORKSPACE: it is zero when a launch begins, and the kernel leaves it so.
    box: for TENSOR_MAP, of the tensor `described`: elements that one copy moves along each
        dimension, and the span of its swizzle in bytes.
    """

    name: str
    kind: ParamKind
    var: Var
    buffer: Buffer | None = None
    noalias: bool = False
    overlaps: bool = False
    is_zeroed: bool = False
    box: TensorBox | None = None


@dataclass(frozen=True, slots=True)
class TensorBox:
    """What a tensor map says besides the tensor.

    tensor: the buffer of a TENSOR parameter. extents: of a box, in elements, one a dimension.
    swizzle: bytes over which the 16-byte chunks of a row are permuted (0, 32, 64 or 128; PTX ISA,
        "Swizzling modes"). rounds: float32 elements are rounded to tfloat32 on their way.
    section: the dimension of the tensor of which copies see sections: the map has two dimensions
        more, before the tensor's, that say where one ends (`layout.sections`).
    """

    tensor: Buffer
    extents: tuple[int, ...]
    swizzle: int = 0
    rounds: bool = False
    section: int | None = None


_EMPTY: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class GivenLayout:
    """How a shared buffer lies by the user's word, and where that was said."""

    layout: SharedLayout
    span: Span | None


@dataclass(frozen=True, slots=True)
class Given:
    """What the user has decided that passes decide otherwise.

    cluster: blocks of a cluster along x, y, z; None where passes choose.
    panel, order: tiles are computed in panels of so many rows ("row") or columns ("column") of
        tiles; 0 where passes choose.
    producer_registers, consumer_registers: of a thread, where passes split the block into roles;
        0 where they choose; register_span: where that was said. keeps_registers: no thread gives
        any away.
    layouts: of shared buffers; passes choose those of others.
    min_blocks: blocks that a multiprocessor has registers for at once.
    """

    cluster: tuple[int, int, int] | None = None
    panel: int = 0
    order: str = "row"
    producer_registers: int = 0
    consumer_registers: int = 0
    register_span: Span | None = None
    keeps_registers: bool = False
    layouts: Mapping[Buffer, GivenLayout] = field(default_factory=lambda: _EMPTY)
    min_blocks: int = 1

    def layout_of(self, buffer: Buffer, otherwise: SharedLayout) -> SharedLayout:
        """How a shared buffer lies; `otherwise` where passes choose."""
        given = self.layouts.get(buffer)
        return otherwise if given is None else given.layout

    def why_not(self, buffer: Buffer) -> str:
        """The reason why an instruction cannot use a buffer of a given layout."""
        layout = self.layouts[buffer].layout
        return f"{buffer.name} has the layout given by T.annotate_layout: {layout}"

    def related(self, *buffers: Buffer) -> list[tuple[Span | None, str]]:
        """Places to show in an error about buffers: where they come from, where their layouts."""
        places = [(b.span, f"{b.name} comes from here") for b in buffers]
        given = {b: self.layouts[b].span for b in buffers if b in self.layouts}
        return places + [(s, f"{b.name} gets its layout here") for b, s in given.items()]


@dataclass(frozen=True, eq=False, kw_only=True)
class Kernel:
    """One `T.Kernel` frame.

    grid: blocks along x, y, z (host expressions of symbols and scalars).
    threads: user threads along x, y, z. is_free: the user left their number to the compiler.
    multiples: numbers that the call promises to divide runtime extents and strides.
    block_vars, thread_vars: variables of blockIdx and threadIdx, x first; as many as were named.
    given: what the user has decided of what passes decide.

    Decided by passes, empty before:
    fragments: layout of each fragment.
    shared: byte layout of each shared buffer (views excluded).
    slots: copies of a shared buffer that the pipeline keeps; 1 where absent.
    unions: shared buffers that have one place in turn: each entry is some buffers, one after the
        other, and those that lie over them once nobody uses them any more.
    offsets: byte offset of each shared buffer and barrier in dynamic shared memory.
    shared_bytes: dynamic shared memory of a block.
    extra_threads: of a block besides the user's: producers.
    parts: blocks that share the iterations of each tile, along the last axis of the grid.
    is_shared_out: those blocks are a cluster and each finishes its part of the tile; else the last
        of them finishes the tile.
    cluster: blocks of a cluster along x, y, z; the user's until a pass decides otherwise.
    blocks_var: the variable that holds how many blocks run.
    is_persistent: a launch has no more blocks than the chip runs at once, each computing tiles
        one after the other; `grid` then counts what there is to compute.
    notes: lines for `explain()`, in the order they were decided.
    """

    name: str
    params: tuple[Param, ...]
    grid: tuple[Expr, ...]
    threads: tuple[int, int, int]
    block_vars: tuple[Var, ...]
    thread_vars: tuple[Var, ...]
    body: Body
    target: Target | None = None
    multiples: Mapping[Var, int] = field(default_factory=lambda: _EMPTY)
    fast_math: bool = False
    given: Given = field(default_factory=Given)
    fragments: Mapping[Any, FragmentLayout] = field(default_factory=lambda: _EMPTY)
    shared: Mapping[Buffer, SharedLayout] = field(default_factory=lambda: _EMPTY)
    slots: Mapping[Buffer, int] = field(default_factory=lambda: _EMPTY)
    unions: tuple[tuple[tuple[Buffer, ...], tuple[Buffer, ...]], ...] = ()
    offsets: Mapping[Buffer, int] = field(default_factory=lambda: _EMPTY)
    shared_bytes: int = 0
    extra_threads: int = 0
    parts: int = 1
    is_shared_out: bool = False
    cluster: tuple[int, int, int] = (1, 1, 1)
    blocks_var: Var | None = None
    is_persistent: bool = False
    is_free: bool = False
    notes: tuple[str, ...] = ()
    span: Span | None = None

    @property
    def num_threads(self) -> int:
        """User threads of a block."""
        x, y, z = self.threads
        return x * y * z

    @property
    def cluster_size(self) -> int:
        x, y, z = self.cluster
        return x * y * z

    @property
    def cluster_rank(self) -> Expr:
        """The block's number in its cluster."""
        return rank_in_cluster(self.block_vars, self.cluster)

    @cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """Every buffer the body touches, in order of first use, views after what they view."""
        seen: dict[Buffer, None] = {}

        def add(buffer: Buffer) -> None:
            if isinstance(buffer.data, Buffer):
                add(buffer.data)
            seen.setdefault(buffer)

        for param in self.params:
            if param.buffer is not None:
                add(param.buffer)
        for node in walk(self.body):
            for buffer in (*node.reads, *node.writes):
                add(buffer)
        return tuple(seen)

    def scoped(self, *scopes: Scope) -> tuple[Buffer, ...]:
        return tuple(b for b in self.buffers if b.scope in scopes)

    @cached_property
    def written(self) -> frozenset[Buffer]:
        """Root buffers that the kernel writes."""
        return frozenset(b.root for node in walk(self.body) for b in node.writes)

    def __str__(self) -> str:
        # here, because the printer is written over kernels
        from tilejit.ir.printer import print_kernel

        return print_kernel(self)


def rank_in_cluster(block_vars: Sequence[Expr], cluster: tuple[int, int, int]) -> Expr:
    """A block's number in its cluster, counted along x first (PTX ISA, %cluster_ctarank)."""
    rank: Expr = index(0)
    step = 1
    for var, blocks in zip(block_vars, cluster, strict=False):
        rank = arith("add", rank, arith("mul", arith("floormod", var, blocks), step))
        step *= blocks
    return rank


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """Kernels of one traced function, in launch order.

    arguments: buffers (tensors), pointer variables and scalar variables, in call order.
    outputs: buffers made by the call (`T.empty`, `out_idx`).
    results: what the call returns, indexes into `arguments` or `outputs`; empty for None.
    """

    name: str
    kernels: tuple[Kernel, ...]
    arguments: tuple[Buffer | Var, ...]
    outputs: tuple[Buffer, ...] = ()
    results: tuple[Buffer, ...] = ()
    returns_tuple: bool = False
    span: Span | None = None

    def __str__(self) -> str:
        return "\n".join(str(k) for k in self.kernels)
