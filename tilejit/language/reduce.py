"""`T.reduce` and its kin: one value of all elements of a tile along an axis, and what the blocks of
a cluster make of their tiles.

Knows shapes, dtypes and scopes. Does not know threads: passes find out who holds what.
"""

from __future__ import annotations

import math
from typing import Any

from tilejit.dtypes import DType, bool_, int32, promote
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ShapeError,
    Span,
    caller_span,
)
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.language.extents import count, is_integer, shape_text
from tilejit.language.gemm import refuse
from tilejit.language.regions import Start, as_side, dropped
from tilejit.language.where import tile_op
from tilejit.ops.cluster import ClusterGather, ClusterReduce, ClusterScatter
from tilejit.ops.copy import Copy
from tilejit.ops.reduce import Reduce, ReduceKind, result_shapes

# what to do instead, by an argument's role
_DETOURS = {
    "`out`": "Reduce to a fragment, and copy that with T.copy.",
    "`dst`": "Scan to a fragment, and copy that with T.copy.",
    "the destination": "Gather to a fragment, and copy that with T.copy.",
}


def reduce(
    buffer: Any,
    out: Any,
    reduce_type: str,
    dim: int,
    clear: bool = True,
    batch: int = 1,
    nan_propagate: bool = False,
    annotations: Any = None,
) -> None:
    """Combine all elements of a tile along one dimension.

    All threads of the block (or of a `T.ws` body) do it together. Two runs give the same bits.

    Args:
        buffer: a tile in a fragment or shared memory.
        out: the results, in a fragment or shared memory: `buffer`'s shape without `dim`, or with an
            extent of 1 there. Its layout follows from `buffer`'s where nothing else decides it:
            threads that share a result hold copies of it, so it can be used beside `buffer` in
            T.Parallel without leaving registers.
        reduce_type: "sum", "abssum", "max", "min", "absmax", "bitand", "bitor" or "bitxor".
        dim: counted from the end when negative.
        clear: False combines the results with what `out` holds: `out = out + sum`, say.
        nan_propagate: of max, min and absmax: a NaN makes the result NaN. Else NaNs are passed
            over; only of nothing but NaNs the result is NaN.
        batch: 1. annotations: None.

    Floats are combined in float32, or float64 where `buffer` or `out` is, and rounded once to
    `out`'s dtype at the end, 16-bit sums too. Integers are combined in `out`'s dtype and wrap.

    Raises:
        ShapeError: `out` has another shape.
        DTypeError: `out` cannot hold what comes out, or the operation has no meaning for the dtype.
        ArgumentError, ArgumentTypeError: anything else about an argument.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    _reduce("T.reduce", buffer, out, reduce_type, dim, clear, batch, nan_propagate, annotations)


def reduce_sum(
    buffer: Any,
    out: Any,
    dim: int = -1,
    clear: bool = True,
    batch: int = 1,
    annotations: Any = None,
) -> None:
    """`reduce` with "sum"."""
    _reduce("T.reduce_sum", buffer, out, "sum", dim, clear, batch, False, annotations)


def reduce_abssum(
    buffer: Any,
    out: Any,
    dim: int = -1,
    clear: bool = True,
    batch: int = 1,
    annotations: Any = None,
) -> None:
    """`reduce` with "abssum": the sum of the magnitudes."""
    _reduce("T.reduce_abssum", buffer, out, "abssum", dim, clear, batch, False, annotations)


def reduce_max(
    buffer: Any,
    out: Any,
    dim: int = -1,
    clear: bool = True,
    batch: int = 1,
    nan_propagate: bool = False,
    annotations: Any = None,
) -> None:
    """`reduce` with "max"."""
    _reduce("T.reduce_max", buffer, out, "max", dim, clear, batch, nan_propagate, annotations)


def reduce_min(
    buffer: Any,
    out: Any,
    dim: int = -1,
    clear: bool = True,
    batch: int = 1,
    nan_propagate: bool = False,
    annotations: Any = None,
) -> None:
    """`reduce` with "min"."""
    _reduce("T.reduce_min", buffer, out, "min", dim, clear, batch, nan_propagate, annotations)


def reduce_absmax(
    buffer: Any,
    out: Any,
    dim: int = -1,
    clear: bool = True,
    batch: int = 1,
    nan_propagate: bool = False,
    annotations: Any = None,
) -> None:
    """`reduce` with "absmax": the greatest magnitude."""
    _reduce("T.reduce_absmax", buffer, out, "absmax", dim, clear, batch, nan_propagate, annotations)


def reduce_bitand(
    buffer: Any,
    out: Any,
    dim: int = -1,
    clear: bool = True,
    batch: int = 1,
    annotations: Any = None,
) -> None:
    """`reduce` with "bitand", of integers or bool."""
    _reduce("T.reduce_bitand", buffer, out, "bitand", dim, clear, batch, False, annotations)


def reduce_bitor(
    buffer: Any,
    out: Any,
    dim: int = -1,
    clear: bool = True,
    batch: int = 1,
    annotations: Any = None,
) -> None:
    """`reduce` with "bitor", of integers or bool."""
    _reduce("T.reduce_bitor", buffer, out, "bitor", dim, clear, batch, False, annotations)


def reduce_bitxor(
    buffer: Any,
    out: Any,
    dim: int = -1,
    clear: bool = True,
    batch: int = 1,
    annotations: Any = None,
) -> None:
    """`reduce` with "bitxor", of integers or bool."""
    _reduce("T.reduce_bitxor", buffer, out, "bitxor", dim, clear, batch, False, annotations)


def cluster_reduce(buffer: Any, reduce_type: str = "sum", nan_propagate: bool = False) -> None:
    """Combine a tile with those of the other blocks of the cluster, element by element, in place:
    then all of them hold the same.

    A row that one block has no room for is divided among the blocks of a cluster: each reduces its
    part, and this makes the parts one. Elements go through distributed shared memory (PTX ISA,
    "st.async"). All threads of all blocks of the cluster come here equally often.
    In the body of a T.Pipelined loop of three stages or more, the tile of the next round is sent
    before this round's is taken, where the loop computes the same then; `explain()` says so.
    Two runs give the same bits, and so do all blocks. In kernels without `T.Kernel(cluster=...)`
    the block is alone, and the tile stays as it is.

    Args:
        buffer: a tile in a fragment or shared memory, such as a result of `reduce`; updated.
        reduce_type: "sum", "abssum", "max", "min", "absmax", "bitand", "bitor" or "bitxor".
        nan_propagate: of max, min and absmax: a NaN makes the result NaN. Else NaNs are passed
            over; only of nothing but NaNs the result is NaN.

    Floats are combined in float32, or float64 where `buffer` is; integers wrap.

    Raises:
        DTypeError: the operation has no meaning for the dtype.
        ArgumentError, ArgumentTypeError: anything else about an argument.
        TraceError: outside a kernel, inside T.Parallel or a T.ws, or in a branch that not all
            threads take.
    """
    what = "T.cluster_reduce"
    trace = tile_op(what)
    kind = _kind(what, reduce_type)
    tile = as_tile(what, buffer, "the tile")
    check_dtypes(what, kind, tile.buffer, tile.buffer)
    keeps_nan = as_flag(what, nan_propagate, "nan_propagate")
    if math.prod(trace.cluster) > 1:
        trace.add(ClusterReduce(tile=tile, kind=kind, keeps_nan=keeps_nan, span=caller_span()))


def cluster_gather(src: Any, dst: Any) -> None:
    """Bring the tiles of all blocks of the cluster to each of them: `dst[..., r]` = `src` of the
    block whose `T.block_rank_in_cluster()` is r.

    Elements go through distributed shared memory (PTX ISA, "st.async"), bit by bit as they are.
    All threads of all blocks of the cluster come here equally often. Exchanges that stand one after
    the other, these and `cluster_reduce`, wait for the other blocks once, where none of them sends
    what one before it makes. In kernels without `T.Kernel(cluster=...)` it is a copy.

    Args:
        src: a tile in a fragment or shared memory.
        dst: a tile of `src`'s dtype in a fragment or shared memory, of `src`'s shape with one
            dimension more at the end: the blocks of the cluster, 1 without clusters. Where nothing
            else decides a fragment's layout, threads that hold an element of `src` hold those of
            all blocks, so it can be used beside `src` in T.Parallel, and be reduced along its last
            dimension, without leaving registers.

    Raises:
        ShapeError: `dst` has another shape.
        DTypeError: the dtypes differ.
        ArgumentError, ArgumentTypeError: anything else about an argument.
        TraceError: outside a kernel, inside T.Parallel or a T.ws, or in a branch that not all
            threads take.
    """
    what = "T.cluster_gather"
    trace = tile_op(what)
    source, target = as_tile(what, src, "the source"), as_tile(what, dst, "the destination")
    blocks = math.prod(trace.cluster)
    related = [origin(source.buffer), origin(target.buffer)]
    if target.shape != (*source.shape, blocks):
        raise ShapeError(
            f"{what}: `{source.buffer.name}` is {shape_text(source.shape)} in each of "
            f"{count(blocks, 'block')} of a cluster, so the destination is "
            f"{shape_text((*source.shape, blocks))}, but `{target.buffer.name}` is "
            f"{shape_text(target.shape)}.",
            related=related,
        )
    if target.buffer.dtype is not source.buffer.dtype:
        raise DTypeError(
            f"{what}: `{source.buffer.name}` is {source.buffer.dtype}, "
            f"but `{target.buffer.name}` is {target.buffer.dtype}.",
            related=related,
            hint=f'Allocate `{target.buffer.name}` as "{source.buffer.dtype}".',
        )
    if blocks > 1:
        trace.add(ClusterGather(src=source, dst=target, span=caller_span()))
    else:
        alike = dropped(target, {target.kept[-1]})
        trace.add(Copy(src=source, dst=alike, span=caller_span()))


def cluster_reduce_scatter(
    src: Any, dst: Any, reduce_type: str = "sum", nan_propagate: bool = False
) -> None:
    """Combine the tiles of all blocks of the cluster, element by element, and leave each block a
    part of the result: the block whose `T.block_rank_in_cluster()` is r has columns `r * n` to
    `r * n + n` in `dst`, where n is `dst`'s last extent.

    What `cluster_reduce` does, for tiles of which no block needs all: each block receives, combines
    and goes on with its share, as where blocks have worked out parts of a sum. Elements go through
    distributed shared memory (PTX ISA, "st.async"), which takes as many bytes of each block as
    `src` has in float32. All threads of all blocks of the cluster come here equally often. Two runs
    give the same bits. In kernels without `T.Kernel(cluster=...)` it is a copy.

    Args:
        src: a tile in a fragment or shared memory; stays as it is.
        dst: a tile in a fragment or shared memory, of `src`'s shape but for the last dimension,
            which is `src`'s divided by the blocks of the cluster. Where nothing else decides a
            fragment's layout, it follows from how the tile is used.
        reduce_type: "sum", "abssum", "max", "min", "absmax", "bitand", "bitor" or "bitxor".
        nan_propagate: as of `cluster_reduce`.

    Floats are combined in float32, or float64 where `src` or `dst` is; integers wrap.

    Raises:
        ShapeError: `dst` has another shape.
        DTypeError: the operation has no meaning for the dtypes.
        ArgumentError, ArgumentTypeError: anything else about an argument.
        TraceError: outside a kernel, inside T.Parallel or a T.ws, or in a branch that not all
            threads take.
    """
    what = "T.cluster_reduce_scatter"
    trace = tile_op(what)
    kind = _kind(what, reduce_type)
    source, target = as_tile(what, src, "the source"), as_tile(what, dst, "the destination")
    check_dtypes(what, kind, source.buffer, target.buffer)
    keeps_nan = as_flag(what, nan_propagate, "nan_propagate")
    blocks = math.prod(trace.cluster)
    *rows, columns = source.shape
    if columns % blocks or target.shape != (*rows, columns // blocks):
        wanted = "no tile, for they do not divide it"
        if not columns % blocks:
            wanted = shape_text((*rows, columns // blocks))
        raise ShapeError(
            f"{what}: `{source.buffer.name}` is {shape_text(source.shape)}, and the part of one of "
            f"{count(blocks, 'block')} of a cluster is {wanted}, but `{target.buffer.name}` is "
            f"{shape_text(target.shape)}.",
            related=[origin(source.buffer), origin(target.buffer)],
        )
    span = caller_span()
    if blocks > 1:
        node = ClusterScatter(src=source, dst=target, kind=kind, keeps_nan=keeps_nan, span=span)
        trace.add(node)
    else:
        trace.add(Copy(src=source, dst=target, span=span))


def _reduce(
    what: str,
    buffer: Any,
    out: Any,
    reduce_type: Any,
    dim: Any,
    clear: Any,
    batch: Any,
    nan_propagate: Any,
    annotations: Any,
) -> None:
    trace = tile_op(what)
    refuse(what, batch=(batch, 1), annotations=(annotations, None))
    kind = _kind(what, reduce_type)
    source, target = as_tile(what, buffer, "the tile"), as_tile(what, out, "`out`")
    axis = as_axis(what, dim, source)
    _check_shapes(what, source, target, axis)
    check_dtypes(what, kind, source.buffer, target.buffer)
    trace.add(
        Reduce(
            src=source,
            dst=target,
            kind=kind,
            axis=axis,
            clear=as_flag(what, clear, "clear"),
            keeps_nan=as_flag(what, nan_propagate, "nan_propagate"),
            span=caller_span(),
        )
    )


def _kind(what: str, name: Any) -> ReduceKind:
    if isinstance(name, str) and name in tuple(ReduceKind):
        return ReduceKind(name)
    names = ", ".join(f'"{kind}"' for kind in ReduceKind)
    raise ArgumentError(f"{what}: reduce_type is {name!r}.", hint=f"It is one of {names}.")


def as_flag(what: str, x: Any, name: str) -> bool:
    """An argument that is True or False.

    Raises:
        ArgumentTypeError: it is something else, or traced.
    """
    if isinstance(x, bool) or (isinstance(x, int) and x in (0, 1)):
        return bool(x)
    raise ArgumentTypeError(f"{what}: {name} is {x!r}; it must be True or False while tracing.")


def as_tile(what: str, x: Any, role: str) -> Region:
    """A tile in a fragment or shared memory.

    Raises:
        ShapeError, ArgumentError: one element, or another memory.
    """
    side = as_side(x, what, role)
    if isinstance(side, Start):
        raise ShapeError(
            f"{what}: {role} is one element of `{side.buffer.name}`.",
            hint=f"Pass `{side.buffer.name}` itself, or a slice of it.",
        )
    scope = side.scope if isinstance(side, Buffer) else side.buffer.scope
    owner = side if isinstance(side, Buffer) else side.buffer
    if isinstance(side, Buffer) or scope not in (Scope.SHARED, Scope.FRAGMENT):
        raise ArgumentError(
            f"{what}: {role} is in {scope.words}, but it has to be in a fragment or shared memory.",
            related=[origin(owner)],
            hint=_DETOURS.get(role, "Copy it to a fragment with T.copy first."),
        )
    return side


def origin(buffer: Buffer) -> tuple[Span | None, str]:
    """Where a message says that the buffer was made."""
    return buffer.span, f"{buffer.name} comes from here"


def as_axis(what: str, dim: Any, source: Region) -> int:
    """A dimension of the tile, counted from its first.

    Raises:
        ArgumentError, ArgumentTypeError: it has no such dimension.
    """
    rank = len(source.shape)
    if not is_integer(dim):
        raise ArgumentTypeError(f"{what}: dim is {dim!r}, not an integer.")
    if not -rank <= int(dim) < rank:
        raise ArgumentError(
            f"{what}: dim is {dim}, but `{source.buffer.name}` is {shape_text(source.shape)}.",
            related=[origin(source.buffer)],
        )
    return int(dim) % rank


def _check_shapes(what: str, source: Region, target: Region, axis: int) -> None:
    gone, kept = result_shapes(source.shape, axis)
    if target.shape in (gone, kept):
        return
    wanted = [shape_text(shape) for shape in (gone, kept) if shape]
    raise ShapeError(
        f"{what}: `{source.buffer.name}` is {shape_text(source.shape)} and dim is {axis}, so `out` "
        f"is {' or '.join(wanted)}, but `{target.buffer.name}` is {shape_text(target.shape)}.",
        related=[origin(source.buffer), origin(target.buffer)],
    )


def check_dtypes(what: str, kind: ReduceKind, source: Buffer, target: Buffer) -> None:
    """
    Raises:
        DTypeError: the operation has no meaning for the dtypes, or the target does not hold what
            comes out.
    """
    related = [origin(source), origin(target)]
    a, b = source.dtype, target.dtype
    if kind.is_bitwise and (a.is_float or a is not b):
        raise DTypeError(
            f"{what}: combines bits of integers or bool, but `{source.name}` is {a} "
            f"and `{target.name}` {b}.",
            related=related,
            hint="Give both the same integer dtype.",
        )
    if b.is_bool and kind.combine == "add":
        raise DTypeError(
            f"{what}: `{target.name}` is bool, which holds no sum.",
            related=related,
            hint="Allocate it as int32" + (", or use T.reduce_bitor." if "reduce" in what else "."),
        )
    if not _holds(b, a):
        raise DTypeError(
            f"{what}: `{source.name}` is {a}, whose values `{target.name}` of {b} does not hold.",
            related=related,
            hint=f'Allocate `{target.name}` as "{int32 if a is bool_ else a}".',
        )


def _holds(target: DType, source: DType) -> bool:
    """Whether results of one dtype may be kept in another: any float in any float."""
    if target.is_float:
        return True
    return not source.is_float and (target is source or _promoted(target, source) is target)


def _promoted(a: DType, b: DType) -> DType | None:
    try:
        return promote(a, b)
    except DTypeError:
        return None
