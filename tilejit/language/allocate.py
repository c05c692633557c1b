"""Memory of a kernel: shared memory, fragments, local arrays, scalars, barriers; `T.empty`.

Knows the arguments of each allocation and their checks. Does not know where the memory will lie.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from tilejit.dtypes import DType, float32, int64, uint64
from tilejit.errors import ArgumentError, ArgumentTypeError, UnsupportedError, caller_span
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Var, VarKind, cast, index
from tilejit.ir.node import Store
from tilejit.language.extents import (
    as_element_type,
    as_scope,
    as_shape,
    is_extent,
    is_integer,
)
from tilejit.language.handle import BufferHandle
from tilejit.language.storage import TENSOR_ALIGN_BYTES, Request, make_tile
from tilejit.language.trace import assigned_name, current_host, current_kernel
from tilejit.language.value import as_expr

# An mbarrier counts 20 bits (PTX ISA, mbarrier: "Size and alignment", "count").
MAX_ARRIVALS = 2**20 - 1


def alloc_shared(shape: Any, dtype: Any, scope: Any = "shared.dyn") -> BufferHandle:
    """A tile in shared memory, for all threads of the block.

    Args:
        shape: constant extents in elements, an integer or a tuple.
        dtype: of the elements; `T.ptr` is int64.
        scope: "shared.dyn" or "shared", which mean the same.

    Raises:
        TraceError: outside a kernel.
        ShapeError: an extent that is zero, negative or known only at run time.
        DTypeError: an unknown dtype.
    """
    return _alloc("T.alloc_shared", shape, dtype, scope, Scope.SHARED)


def alloc_local(shape: Any, dtype: Any, scope: Any = "local") -> BufferHandle:
    """An array of each thread's own; arguments and errors as for `alloc_shared`."""
    return _alloc("T.alloc_local", shape, dtype, scope, Scope.LOCAL)


def alloc_fragment(shape: Any, dtype: Any, scope: Any = "local.fragment") -> BufferHandle:
    """A tile of the whole block, spread over its threads' registers; `shape` is the tile's.

    Arguments and errors as for `alloc_shared`; with the scope "local" it is an array of each
    thread, as from `alloc_local`.
    """
    return _alloc("T.alloc_fragment", shape, dtype, scope, Scope.FRAGMENT, Scope.LOCAL)


def _alloc(what: str, shape: Any, dtype: Any, scope: Any, *allowed: Scope) -> BufferHandle:
    current_kernel(what)
    place = as_scope(scope, what, allowed)
    return make_tile(Request(what, shape, dtype, place))


def alloc_var(dtype: Any, *args: Any, scope: Any = None, init: Any = None) -> BufferHandle:
    """A scalar of each thread's own, 0 unless `init` says otherwise.

    Read it by name; store with `x = v` or `x += v` in a traced function, or `x.set(v)`, `x[0] = v`.

    Args:
        dtype: of the scalar; `T.ptr` is int64.
        args: `init`, then `scope`; a lone string is the scope.
        scope: "local.var".
        init: a number that the dtype can hold, or a traced value: what it is at this point, cast.

    Raises:
        TraceError: outside a kernel.
        ArgumentTypeError: more than two positional arguments after `dtype`, two initial values, a
            scope that is no string.
        ArgumentError: a number that the dtype cannot hold.
    """
    what = "T.alloc_var"
    trace = current_kernel(what)
    init, scope = _var_arguments(args, init, scope)
    place = as_scope("local.var" if scope is None else scope, what, (Scope.VAR,))
    element = as_element_type(dtype, what)
    span = caller_span()
    # `init` is read before the variable exists: it may use another of the same name
    value = cast(_initial(init, element, what), element)
    name = assigned_name(span, "var")
    buffer = Buffer(name=name, shape=(index(1),), dtype=element, scope=place, span=span)
    handle = BufferHandle(buffer)
    trace.add(Store(buffer=buffer, index=(index(0),), value=value, span=span))
    return handle


def _var_arguments(args: tuple[Any, ...], init: Any, scope: Any) -> tuple[Any, Any]:
    """`init` and `scope` from TileLang's positional forms."""
    if len(args) > 2:
        raise ArgumentTypeError(
            f"T.alloc_var takes at most 3 positional arguments but got {len(args) + 1}.",
            hint="Write T.alloc_var(dtype, init=value).",
        )
    if len(args) == 1 and isinstance(args[0], str):
        args = (None, args[0])
    if args and args[0] is not None:
        if init is not None:
            raise ArgumentTypeError(
                "T.alloc_var: the initial value is given twice.",
                hint="Keep either the positional one or `init=`.",
            )
        init = args[0]
    if len(args) == 2:
        if not isinstance(args[1], str):
            raise ArgumentTypeError(f"T.alloc_var: the scope must be a string, not {args[1]!r}.")
        if scope is not None:
            raise ArgumentTypeError("T.alloc_var: the scope is given twice.")
        scope = args[1]
    return init, scope


def _initial(init: Any, dtype: DType, what: str) -> Any:
    if init is None:
        init = 0
    if isinstance(init, bool | int | float | np.generic):
        init = dtype.constant(init)  # checks the range
    return as_expr(init, dtype, f"initial value of {what}")


def alloc_barrier(arrive_count: Any) -> BufferHandle:
    """Barriers in shared memory (mbarriers): one, or one for each count of a list.

    Args:
        arrive_count: how many arrivals complete a phase; an integer, or a list of them for
            several barriers, `mbars[k]`.

    Raises:
        TraceError: outside a kernel.
        ArgumentError: a count below 1 or above 1048575, or an empty list.
        ArgumentTypeError: not integers.
    """
    return _barriers("T.alloc_barrier", arrive_count)


def alloc_cluster_barrier(arrive_count: Any) -> BufferHandle:
    """Barriers at which threads of all blocks of the cluster may arrive, by
    `T.mbarrier_arrive(mbar, cta_id)`; each block has its own. Arguments and errors as for
    `alloc_barrier`. All blocks know of each other's barriers before any runs the kernel's body.
    """
    return _barriers("T.alloc_cluster_barrier", arrive_count)


def _barriers(what: str, arrive_count: Any) -> BufferHandle:
    current_kernel(what).is_free = False
    counts = arrive_count if isinstance(arrive_count, list | tuple) else [arrive_count]
    if not counts:
        raise ArgumentError(f"{what}: the list of arrive counts is empty.")
    for position, value in enumerate(counts):
        which = f"arrive count {position}" if len(counts) > 1 else "the arrive count"
        if not is_integer(value):
            raise ArgumentTypeError(
                f"{what}: {which} is {value!r}, not an integer.",
                hint="It is a constant: how many arrivals complete a phase.",
            )
        if not 1 <= value <= MAX_ARRIVALS:
            raise ArgumentError(
                f"{what}: {which} is {value}; a phase takes 1 to {MAX_ARRIVALS} arrivals.",
                hint="Count the threads that arrive: 1, or as many as T.Kernel has.",
            )
    span = caller_span()
    buffer = Buffer(
        name=assigned_name(span, "barrier"),
        shape=(index(len(counts)),),
        dtype=uint64,
        scope=Scope.BARRIER,
        arrive_counts=tuple(int(c) for c in counts),
        span=span,
    )
    return BufferHandle(buffer)


def alloc_global(shape: Any, dtype: Any, scope: Any = "global") -> NoReturn:
    """Not offered: a kernel gets global memory as an argument or from `T.empty`.

    Raises:
        UnsupportedError: always.
    """
    del shape, dtype, scope
    raise UnsupportedError(
        "T.alloc_global is not supported: a kernel does not allocate global memory.",
        hint="Pass a tensor as an argument, or make one with T.empty before T.Kernel.",
    )


def empty(*shape: Any, dtype: Any = float32) -> BufferHandle:
    """A tensor that the call makes and the traced function returns; its contents are undefined.

    Args:
        shape: extents, `T.empty(M, N)` or `T.empty((M, N))`; a dtype may follow.
        dtype: of the elements.

    Raises:
        TraceError: outside a traced function, or inside `T.Kernel`.
        ShapeError: a negative extent.
    """
    what = "T.empty"
    trace = current_host(what)
    if len(shape) > 1 and not is_extent(shape[-1]):
        shape, dtype = shape[:-1], shape[-1]
    if not shape:
        raise ArgumentTypeError(f"{what} needs a shape.", hint="Write T.empty((M, N), dtype).")
    extents = shape[0] if len(shape) == 1 else shape
    span = caller_span()
    name = assigned_name(span, "output")
    buffer = Buffer(
        name=name,
        shape=as_shape(extents, what),
        dtype=as_element_type(dtype, what),
        scope=Scope.GLOBAL,
        data=Var(trace.unique_name(name), int64, VarKind.POINTER),
        align=TENSOR_ALIGN_BYTES,
        span=span,
    )
    trace.outputs.append(buffer)
    return BufferHandle(buffer)
