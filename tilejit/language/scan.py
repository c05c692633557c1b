"""`T.cumsum` and `T.cummax`: running sums and maxima of a tile along an axis.

Knows shapes, dtypes and scopes. Does not know threads: passes find out who holds what.
"""

from __future__ import annotations

from typing import Any

from tilejit.errors import ShapeError, caller_span
from tilejit.language.extents import shape_text
from tilejit.language.reduce import as_axis, as_flag, as_tile, check_dtypes, origin
from tilejit.language.where import tile_op
from tilejit.ops.reduce import ReduceKind
from tilejit.ops.scan import Scan


def cumsum(src: Any, dst: Any = None, dim: int = 0, reverse: bool = False) -> None:
    """Running sums of a tile along one dimension, each with its own element.

    All threads of the block (or of a `T.ws` body) do it together. Two runs give the same bits.

    Args:
        src: a tile in a fragment or shared memory.
        dst: the sums, a tile of the same shape in a fragment or shared memory; None: `src` itself.
        dim: counted from the end when negative. As in TileLang the first, not the last as in
            reductions, where nothing is said.
        reverse: True sums from each element to the end.

    Floats are added in float32, or float64 where `src` or `dst` is, in an order that depends on
    the shapes, dtypes and memories of the tiles and on the threads alone, and each sum is rounded
    once to `dst`'s dtype. Integers are added in `dst`'s dtype and wrap. The same sums as
    `numpy.cumsum` but for rounding.

    Raises:
        ShapeError: `dst` has another shape.
        DTypeError: `dst` cannot hold what comes out.
        ArgumentError, ArgumentTypeError: anything else about an argument.
        TraceError: outside a kernel, inside T.Parallel, or in a branch that not all threads take.
    """
    _scan("T.cumsum", ReduceKind.SUM, src, dst, dim, reverse, False)


def cummax(
    src: Any, dst: Any = None, dim: int = 0, reverse: bool = False, nan_propagate: bool = False
) -> None:
    """Running maxima of a tile along one dimension, each with its own element.

    Args:
        nan_propagate: True makes a maximum NaN from the first NaN on, as `numpy.maximum.accumulate`
            and `torch.cummax` do. Else NaNs are passed over, as by `reduce_max`; only of nothing
            but NaNs the result is NaN.

    The others, and what is raised, as of `cumsum`.
    """
    _scan("T.cummax", ReduceKind.MAX, src, dst, dim, reverse, nan_propagate)


def _scan(
    what: str, kind: ReduceKind, src: Any, dst: Any, dim: Any, reverse: Any, nan_propagate: Any
) -> None:
    trace = tile_op(what)
    source = as_tile(what, src, "the source")
    target = source if dst is None else as_tile(what, dst, "`dst`")
    axis = as_axis(what, dim, source)
    if target.shape != source.shape:
        raise ShapeError(
            f"{what}: `{source.buffer.name}` is {shape_text(source.shape)}, but "
            f"`{target.buffer.name}` is {shape_text(target.shape)}.",
            related=[origin(source.buffer), origin(target.buffer)],
            hint="There is one result for each element.",
        )
    check_dtypes(what, kind, source.buffer, target.buffer)
    trace.add(
        Scan(
            src=source,
            dst=target,
            kind=kind,
            axis=axis,
            reverse=as_flag(what, reverse, "reverse"),
            keeps_nan=as_flag(what, nan_propagate, "nan_propagate"),
            span=caller_span(),
        )
    )
