"""What users hold for tensors and tiles: indexing, slicing and stores.

Knows how an index becomes a load, a place or a region. Does not know allocation or tile ops other
than the fill and copy that an assignment to a slice means.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from tilejit.dtypes import DType
from tilejit.errors import (
    ArgumentTypeError,
    ShapeError,
    TraceError,
    caller_span,
)
from tilejit.ir.buffer import Buffer, Region, Scope, whole
from tilejit.ir.expr import (
    Expr,
    Var,
    arith,
    cast,
    index,
    int_value,
    show,
)
from tilejit.ir.node import Store
from tilejit.language.slicing import checked_position, expand_index, make_region
from tilejit.language.trace import current, current_kernel
from tilejit.language.value import Scalar, Value, as_expr, is_scalar
from tilejit.ops.copy import Copy, Fill


def extent_value(e: Expr) -> Any:
    """A Python int where the expression is constant, else a Value."""
    constant = int_value(e)
    return constant if constant is not None else Value(e)


class Element(Value):
    """One element of a buffer: its loaded value, and its place for ops that take one.

    place: the buffer and the index.
    """

    __slots__ = ("place",)

    def __init__(self, var: Var, buffer: Buffer, position: tuple[Expr, ...]) -> None:
        super().__init__(var)
        self.place = (buffer, position)

    @property
    def region(self) -> Region:
        """The element as a region: extent 1 along every dimension, all of them dropped."""
        buffer, position = self.place
        return Region(buffer, position, (1,) * buffer.rank, frozenset(range(buffer.rank)))


class _Tile(Scalar):
    """Shared by whole buffers and regions: refuses to be a scalar."""

    __slots__ = ()

    def _refuse(self) -> NoReturn:
        raise ArgumentTypeError(
            f"`{self!r}` is a tile, where one number is needed.",
            hint="Index it, for example inside `for i, j in T.Parallel(...)`: `A[i, j]`.",
        )

    def scalar(self) -> Expr:
        self._refuse()

    def __matmul__(self, other: object) -> NoReturn:
        raise ArgumentTypeError(
            "Tiles are not multiplied with `@`.",
            hint="Write `T.gemm(a, b, acc)` with a fragment `acc`.",
        )

    def __bool__(self) -> bool:
        raise TraceError(
            f"`{self!r}` is a tile, so it is neither true nor false.",
            hint="To test an optional argument write `if x is not None:`.",
        )

    def __eq__(self, other: object) -> Any:
        if is_scalar(other) and not isinstance(other, _Tile):
            self._refuse()
        return self is other

    def __ne__(self, other: object) -> Any:
        return not self == other

    def __hash__(self) -> int:
        return id(self) >> 4

    def __iter__(self) -> NoReturn:
        raise TraceError(
            f"`{self!r}` is a tile; Python cannot iterate over it.",
            hint="Write `for i in T.serial(n):` and index with `i`.",
        )

    def __contains__(self, item: object) -> bool:
        raise TraceError(
            f"`in` cannot look into `{self!r}`, whose elements are only known on the device.",
            hint="Compare element by element in a loop.",
        )

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TraceError(
            f"NumPy cannot read `{self!r}`, whose elements are only known on the device.",
            hint="Use the functions of `tilejit.language`.",
        )


class BufferHandle(_Tile):
    """What a user holds for a tensor argument, an allocation or a view.

    shape, strides: elements; ints where constant, traced values where only known at the call.
    """

    __slots__ = ("buffer",)
    buffer: Buffer

    def __new__(cls, buffer: Buffer) -> BufferHandle:
        if cls is BufferHandle:
            cls = {Scope.VAR: VarHandle, Scope.BARRIER: BarrierHandle}.get(buffer.scope, cls)
        return object.__new__(cls)

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        trace = current()
        if trace is not None and trace.is_kernel and buffer.scope is not Scope.GLOBAL:
            trace.house(buffer.root)

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(extent_value(e) for e in self.buffer.shape)

    @property
    def strides(self) -> tuple[Any, ...]:
        return tuple(extent_value(e) for e in self.buffer.element_strides)

    @property
    def ndim(self) -> int:
        return self.buffer.rank

    @property
    def dtype(self) -> DType:
        return self.buffer.dtype

    @property
    def scope(self) -> Scope:
        return self.buffer.scope

    @property
    def data(self) -> BufferHandle:
        """The memory, for the `data=` of a view and for `T.make_tensor`."""
        return self

    @property
    def name(self) -> str:
        return self.buffer.name

    def __repr__(self) -> str:
        return self.buffer.name

    def __len__(self) -> int:
        raise TraceError(
            f"`len({self.name})` is not available while tracing.",
            hint=f"Write `{self.name}.shape[0]`.",
        )

    def __getitem__(self, key: object) -> Any:
        parts = expand_index(self.buffer, self.buffer.rank, key)
        if any(isinstance(p, slice) for p in parts):
            return RegionHandle(make_region(self.buffer, parts))
        position = tuple(checked_position(self.buffer, d, p) for d, p in enumerate(parts))
        trace = current_kernel(f"Indexing `{self.name}`")
        return Element(trace.load(self.buffer, position), self.buffer, position)

    def __setitem__(self, key: object, value: object) -> None:
        parts = expand_index(self.buffer, self.buffer.rank, key)
        if any(isinstance(p, slice) for p in parts):
            assign_region(make_region(self.buffer, parts), value)
            return
        position = tuple(checked_position(self.buffer, d, p) for d, p in enumerate(parts))
        store(self.buffer, position, value)


class VarHandle(BufferHandle):
    """A `T.alloc_var` scalar: reads as a number, `x[0]`, and is stored to by `x.set(v)`,
    `x[0] = v` and, in a traced function, `x = v`."""

    __slots__ = ()

    def scalar(self) -> Expr:
        trace = current_kernel(f"Reading `{self.name}`")
        return trace.load(self.buffer, tuple(index(0) for _ in self.buffer.shape))

    def set(self, value: object) -> None:
        """Store `value`, cast to the variable's dtype."""
        store(self.buffer, tuple(index(0) for _ in self.buffer.shape), value)

    __bool__ = Scalar.__bool__
    __eq__ = Scalar.__eq__
    __ne__ = Scalar.__ne__
    __hash__ = Scalar.__hash__
    __len__ = Scalar.__len__
    __iter__ = Scalar.__iter__
    __contains__ = Scalar.__contains__
    __array__ = Scalar.__array__


class BarrierRef:
    """One barrier of an array of them."""

    __slots__ = ("buffer", "slot")

    def __init__(self, buffer: Buffer, slot: Expr) -> None:
        self.buffer = buffer
        self.slot = slot

    def __repr__(self) -> str:
        return f"{self.buffer.name}[{show(self.slot)}]"


class BarrierHandle(BufferHandle):
    """What `T.alloc_barrier` gives: `mbars[k]` is one barrier, a single one stands for itself."""

    __slots__ = ()

    def __getitem__(self, key: object) -> BarrierRef:
        return BarrierRef(self.buffer, checked_position(self.buffer, 0, key))

    def __setitem__(self, key: object, value: object) -> None:
        raise ArgumentTypeError(
            f"`{self.name}` is a barrier and cannot be assigned to.",
            hint="Use `T.barrier_arrive(b)` and `T.barrier_wait(b, parity)`.",
        )


def as_barrier(x: object, what: str = "barrier") -> BarrierRef:
    """One barrier: a `BarrierRef`, or an allocation of exactly one.

    Raises:
        ArgumentTypeError: not a barrier.
        ShapeError: an array of several.
    """
    if isinstance(x, BarrierRef):
        return x
    if not isinstance(x, BarrierHandle):
        raise ArgumentTypeError(
            f"The {what} must come from `T.alloc_barrier`, got {_kind(x)}.",
        )
    (count,) = x.buffer.extents
    if count != 1:
        raise ShapeError(
            f"`{x.name}` holds {count} barriers, and the {what} must be one.",
            hint=f"Write `{x.name}[k]`.",
        )
    return BarrierRef(x.buffer, index(0))


class RegionHandle(_Tile):
    """A box of a buffer, as made by slicing."""

    __slots__ = ("region",)

    def __init__(self, region: Region) -> None:
        self.region = region

    @property
    def buffer(self) -> Buffer:
        return self.region.buffer

    @property
    def shape(self) -> tuple[int, ...]:
        return self.region.shape

    @property
    def dtype(self) -> DType:
        return self.region.buffer.dtype

    @property
    def scope(self) -> Scope:
        return self.region.buffer.scope

    def __repr__(self) -> str:
        return repr(self.region)

    def __len__(self) -> int:
        raise TraceError(
            f"`len({self!r})` is not available while tracing.", hint="Write `.shape[0]`."
        )

    def __getitem__(self, key: object) -> Any:
        region = self._sub(key)
        if len(region.dropped) < region.buffer.rank:
            return RegionHandle(region)
        trace = current_kernel(f"Indexing `{self!r}`")
        return Element(trace.load(region.buffer, region.starts), region.buffer, region.starts)

    def __setitem__(self, key: object, value: object) -> None:
        region = self._sub(key)
        if len(region.dropped) < region.buffer.rank:
            assign_region(region, value)
        else:
            store(region.buffer, region.starts, value)

    def _sub(self, key: object) -> Region:
        outer = self.region
        window = Buffer(
            name=repr(outer),
            shape=tuple(index(n) for n in outer.shape),
            dtype=outer.buffer.dtype,
            scope=Scope.LOCAL,
        )
        inner = make_region(window, expand_index(window, window.rank, key))
        starts, extents, dropped = list(outer.starts), list(outer.extents), set(outer.dropped)
        for d, start, extent in zip(outer.kept, inner.starts, inner.extents, strict=True):
            starts[d] = arith("add", starts[d], start)
            extents[d] = extent
        dropped |= {outer.kept[d] for d in inner.dropped}
        return Region(outer.buffer, tuple(starts), tuple(extents), frozenset(dropped))


def as_region(x: object, what: str) -> Region:
    """The region a user means: a whole buffer of constant shape, a slice, or an element (extent 1
    everywhere, all dimensions dropped).

    Raises:
        ArgumentTypeError: none of these.
        ShapeError: a whole tensor whose shape is only known at the call.
    """
    if isinstance(x, RegionHandle):
        return x.region
    if isinstance(x, Element):
        return x.region
    if isinstance(x, BufferHandle) and not isinstance(x, BarrierHandle):
        if not x.buffer.is_static:
            shape = ", ".join(show(e) for e in x.buffer.shape)
            raise ShapeError(
                f"The {what} is all of `{x.name}`, whose shape ({shape}) is not constant.",
                hint=f"Give a start point, such as `{x.name}[{_zeros(x.buffer)}]`.",
            )
        return whole(x.buffer)
    raise ArgumentTypeError(
        f"The {what} must be a tensor, a tile or a slice of one, got {_kind(x)}."
    )


def store(buffer: Buffer, position: tuple[Expr, ...], value: object) -> None:
    """Record `buffer[position] = value`, the value cast to the buffer's dtype."""
    trace = current_kernel(f"Storing to `{buffer.name}`")
    e = as_expr(value, buffer.dtype, f"value stored to `{buffer.name}`")
    trace.add(Store(buffer=buffer, index=position, value=cast(e, buffer.dtype), span=caller_span()))


def assign_region(region: Region, value: object) -> None:
    """Record `region[...] = value`: a fill with a number, or a copy of a tile of equal shape."""
    trace = current_kernel(f"Assigning to `{region!r}`")
    if is_scalar(value) and not isinstance(value, BufferHandle | RegionHandle):
        e = cast(as_expr(value, region.buffer.dtype, "fill value"), region.buffer.dtype)
        trace.add(Fill(dst=region, value=e, span=caller_span()))
        return
    if isinstance(value, VarHandle):
        trace.add(
            Fill(dst=region, value=cast(value.scalar(), region.buffer.dtype), span=caller_span())
        )
        return
    source = as_region(value, "value assigned to a slice")
    if source.shape != region.shape:
        raise ShapeError(
            f"`{region!r}` has shape {region.shape} and the value `{source!r}` has shape "
            f"{source.shape}.",
            hint="Slice both to one shape; tiles do not broadcast.",
        )
    trace.add(Copy(src=source, dst=region, span=caller_span()))


def _kind(x: object) -> str:
    if isinstance(x, BarrierRef | BarrierHandle):
        return "a barrier"
    if isinstance(x, RegionHandle | BufferHandle):
        return f"the tile `{x!r}`"
    if isinstance(x, Scalar):
        return f"the scalar `{x!r}`"
    if isinstance(x, np.ndarray):
        return "a NumPy array (arrays reach a kernel as arguments)"
    if x is None or isinstance(x, bool | int | float | str):
        return repr(x)
    return f"an object of type {type(x).__name__}"


def _zeros(buffer: Buffer) -> str:
    return ", ".join("0" for _ in buffer.shape)
