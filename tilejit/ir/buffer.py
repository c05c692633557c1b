"""Buffers: named, typed memory of a tile program, and rectangular regions of them.

Knows shapes, strides and scopes. Does not know layouts, offsets in shared memory or registers:
those are decided later and stand in the `Kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from tilejit.dtypes import DType
from tilejit.errors import Span
from tilejit.ir.expr import Const, Expr, VarKind, arith, const, index, int_value, show, variables


class Scope(StrEnum):
    GLOBAL = "global"
    SHARED = "shared.dyn"
    FRAGMENT = "local.fragment"  # spread over the block's threads, in registers
    LOCAL = "local"  # one copy a thread
    VAR = "local.var"  # one scalar a thread
    BARRIER = "shared.barrier"  # mbarriers

    @property
    def is_shared(self) -> bool:
        return self in (Scope.SHARED, Scope.BARRIER)

    @property
    def is_per_thread(self) -> bool:
        return self in (Scope.LOCAL, Scope.VAR)

    @property
    def words(self) -> str:
        """Where that is, for messages: goes after "in"."""
        return _WORDS[self]


_WORDS = {
    Scope.GLOBAL: "global memory",
    Scope.SHARED: "shared memory",
    Scope.FRAGMENT: "a fragment",
    Scope.LOCAL: "local memory",
    Scope.VAR: "a variable",
    Scope.BARRIER: "a barrier",
}


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Section:
    """Which elements of a dimension of a global tensor a view of it has.

    tensor: what it is a view of, in the same strides. first: the first element that it has; it has
        as many as its shape says, all of them inside the tensor.
    """

    tensor: Buffer
    dim: int
    first: Expr


@dataclass(frozen=True, eq=False, kw_only=True)
class Buffer:
    """Memory that tile ops read and write.

    shape: extents in elements; int32 or int64 expressions, constants but for global buffers.
    strides: in elements; None means row-major and compact.
    data: for GLOBAL the address of the buffer (a pointer variable, or a 64-bit integer
        expression); for the others another buffer whose memory this one is a view of, or None.
    offset: elements from `data` to element 0.
    align: promised alignment of `data` in bytes (global) or required one (shared).
    arrive_counts: for BARRIER, threads that complete a phase of each barrier.
    broadcasts: extents of 1 repeat along their dimension (`buffer_type="auto_broadcast"`).
    section: for a view of consecutive elements of one dimension of another tensor, which those are.
    place: what of its shape, strides, offset and address only the kernel knows: what a node that
        touches it evaluates besides its own expressions.
    """

    name: str
    shape: tuple[Expr, ...]
    dtype: DType
    scope: Scope
    strides: tuple[Expr, ...] | None = None
    data: Expr | Buffer | None = None
    offset: Expr = field(default_factory=lambda: const(0))
    align: int = 0
    arrive_counts: tuple[int, ...] = ()
    broadcasts: bool = False
    section: Section | None = None
    span: Span | None = None
    place: tuple[Expr, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        exprs: tuple[Expr, ...] = ()
        if self.scope is Scope.GLOBAL:
            found = (*self.shape, *(self.strides or ()), self.offset, self.data)
            exprs = tuple(e for e in found if isinstance(e, Expr) and _is_of_kernel(e))
        object.__setattr__(self, "place", exprs)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def extents(self) -> tuple[int, ...]:
        """The shape as ints; only where all extents are constants."""
        result = tuple(int_value(e) for e in self.shape)
        assert None not in result, f"{self.name} has runtime extents"
        return result  # type: ignore[return-value]

    @property
    def is_static(self) -> bool:
        return all(isinstance(e, Const) for e in self.shape)

    @cached_property
    def element_strides(self) -> tuple[Expr, ...]:
        """Strides in elements, derived from the shape when none were given."""
        if self.strides is not None:
            return self.strides
        result: list[Expr] = []
        step: Expr = const(1)
        for extent in reversed(self.shape):
            result.append(step)
            step = arith("mul", step, extent)
        return tuple(reversed(result))

    @property
    def root(self) -> Buffer:
        """The buffer whose memory this one uses: itself unless it is a view."""
        buffer = self
        while isinstance(buffer.data, Buffer):
            buffer = buffer.data
        return buffer

    @property
    def is_view(self) -> bool:
        return isinstance(self.data, Buffer)

    def __repr__(self) -> str:
        dims = ", ".join(show(e) for e in self.shape)
        return f"{self.name}: {self.scope.value}[({dims}), {self.dtype}]"


_AT_CALL = (VarKind.SYMBOL, VarKind.SCALAR, VarKind.POINTER)


def _is_of_kernel(e: Expr) -> bool:
    """Whether an expression has values that the call does not know."""
    return any(v.kind not in _AT_CALL for v in variables(e))


@dataclass(frozen=True, eq=False)
class Region:
    """A box of a buffer: `extents[d]` elements from `starts[d]` along each dimension.

    Extents are Python ints; a dimension that was indexed by a scalar has extent 1 and is listed
    in `dropped`, so that the region's shape has no such dimension.
    """

    buffer: Buffer
    starts: tuple[Expr, ...]
    extents: tuple[int, ...]
    dropped: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        assert len(self.starts) == len(self.extents) == self.buffer.rank

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Dimensions of the buffer that are dimensions of the region."""
        return tuple(d for d in range(self.buffer.rank) if d not in self.dropped)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.extents[d] for d in self.kept)

    @property
    def is_whole(self) -> bool:
        """True when the region is provably the whole buffer."""
        return not self.dropped and all(
            isinstance(s, Const) and s.value == 0 and int_value(e) == n
            for s, n, e in zip(self.starts, self.extents, self.buffer.shape, strict=True)
        )

    def __repr__(self) -> str:
        if self.is_whole:
            return self.buffer.name
        parts = []
        for d, (start, extent) in enumerate(zip(self.starts, self.extents, strict=True)):
            if d in self.dropped:
                parts.append(show(start))
            else:
                parts.append(f"{show(start)}:{show(arith('add', start, extent))}")
        return f"{self.buffer.name}[{', '.join(parts)}]"


def whole(buffer: Buffer) -> Region:
    """All of a buffer with constant extents."""
    return Region(buffer, tuple(index(0) for _ in buffer.shape), buffer.extents)
