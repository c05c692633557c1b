"""`T.Kernel` and the indexes of blocks and threads.

Knows grids and thread counts. Does not know loops, branches or targets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from tilejit.dtypes import int32
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    ResourceError,
    TraceError,
    UnsupportedError,
    caller_span,
)
from tilejit.ir.analysis import interval
from tilejit.ir.expr import Expr, VarKind, arith, int_value
from tilejit.ir.kernel import Given
from tilejit.language.context import Context
from tilejit.language.trace import Trace, current, current_kernel, enter, leave
from tilejit.language.value import Value, as_index

USUAL_THREADS = 128
MAX_CLUSTER = 16  # blocks, where chips allow more than 8 (CUDA Programming Guide, clusters)
MOST_BLOCKS, MOST_RESIDENT = 32, 2048  # of a multiprocessor (the same, technical specifications)
MAX_THREADS = 1024  # per block, all CUDA devices (CUDA Programming Guide, compute capabilities)


class Kernel(Context):
    """One kernel launch: `with T.Kernel(gx, gy, threads=128) as (bx, by):`.

    Args:
        grid: blocks along x, y and z; integers, or values of symbols and runtime scalars.
        threads: threads of a block; an int, or up to three of them. Left out, the cost model
            chooses; 128 where the kernel asks for its threads.
        cluster: blocks of a cluster along x, y and z, or along x alone, at most 8 together, 16 on
            sm_90, sm_90a and sm_100a (where fewer clusters then run at once): they start together,
            meet at `T.cluster_sync`, exchange tiles by `T.cluster_reduce`, `T.cluster_gather` and
            `T.cluster_reduce_scatter`, and can share what `T.tma_copy` brings (PTX ISA,
            "Cluster of cooperative thread arrays"). It divides the grid. Left out, passes choose it
            for kernels whose tiles they bring themselves; 1 is for none. Needs sm_90 or newer.

    Raises:
        ArgumentError, ArgumentTypeError, ResourceError: grid, threads or cluster that cannot be.
    """

    def __init__(
        self,
        *grid: Any,
        threads: int | Sequence[int] | None = None,
        cluster: int | Sequence[int] | None = None,
        prelude: object = None,
    ) -> None:
        if prelude is not None:
            raise UnsupportedError("T.Kernel: `prelude` is CUDA C source, which is not used here.")
        if not 1 <= len(grid) <= 3:
            raise ArgumentError(
                f"T.Kernel takes 1 to 3 grid extents, got {len(grid)}.",
                hint="Fold two into one, and split the block's index with `//` and `%`.",
            )
        self.grid = tuple(_grid_extent(g, d) for d, g in enumerate(grid))
        self.threads = _threads(USUAL_THREADS if threads is None else threads)
        self.is_free = threads is None
        self.cluster = None if cluster is None else _cluster(cluster, self.grid)
        self.span = caller_span()
        self.trace: Trace | None = None

    def __enter__(self) -> Any:
        host = current()
        if host is None:
            raise TraceError(
                "T.Kernel is only allowed inside a @tilejit function.",
                span=self.span,
                hint="Decorate the function with @tilejit and call it.",
            )
        if host.is_kernel:
            raise TraceError(
                "A T.Kernel cannot be inside another one.",
                span=self.span,
                related=[(host.span, "the outer kernel")],
                hint="Close the first kernel; several in a row run in order.",
            )
        self._check_names()
        trace = Trace(host.name, host, self.span)
        trace.grid, trace.threads, trace.is_free = self.grid, self.threads, self.is_free
        trace.given = Given(cluster=self.cluster)
        trace.cluster = self.cluster or (1, 1, 1)
        trace.block_vars = tuple(
            trace.new_var(
                self.name(d, f"b{'xyz'[d]}"),
                int32,
                VarKind.BLOCK,
                (0, arith("sub", extent, 1)),
                self.span,
            )
            for d, extent in enumerate(self.grid)
        )
        self.trace = trace
        enter(trace)
        values = tuple(Value(v) for v in trace.block_vars)
        return values[0] if len(values) == 1 and not self.unpacks else values

    def _check_names(self) -> None:
        given, taken = len(self.grid), len(self.names)
        if given > 1 and given != taken and (taken > 1 or self.unpacks):
            names = "1 name takes" if taken == 1 else f"{taken} names take"
            raise ArgumentError(
                f"T.Kernel gives {given} block indexes, but {names} them.",
                span=self.span,
                hint="Write one name for each extent.",
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        trace = self.trace
        assert trace is not None, "left a kernel that was not entered"
        leave(trace)
        trace.root.is_open = False
        if error is not None:
            trace.host.failures.append(error)  # stays an error if somebody catches it
            return
        if trace.failures:
            raise trace.failures[0]
        trace.host.kernels.append(trace)


class ClusterKernel(Kernel):
    """TileLang's spelling of `T.Kernel(*grid, threads=threads, cluster=cluster_dims)`."""

    def __init__(
        self,
        *grid: Any,
        cluster_dims: int | Sequence[int],
        threads: int | Sequence[int] | None = None,
        prelude: object = None,
    ) -> None:
        super().__init__(*grid, threads=threads, cluster=cluster_dims, prelude=prelude)


def _grid_extent(extent: object, d: int) -> Expr:
    e = as_index(extent, f"grid extent {d} of T.Kernel")
    high = interval(e).high
    if high is not None and high < 0:
        raise ArgumentError(f"T.Kernel: grid extent {d} must not be negative, got {high}.")
    return e


def _threads(threads: object) -> tuple[int, int, int]:
    given = list(threads) if isinstance(threads, tuple | list) else [threads]
    if not 1 <= len(given) <= 3:
        raise ArgumentError(f"T.Kernel: threads has 1 to 3 entries, got {len(given)}.")
    sizes: list[int] = []
    for n in given:
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise ArgumentTypeError(
                f"T.Kernel: threads must be known when the kernel is traced, got {n!r}.",
                hint="Give an int or a compile-time parameter.",
            )
        if n <= 0:
            raise ArgumentError(
                f"T.Kernel: threads must be positive, got {n}.",
                hint="A multiple of 32, such as 128, uses whole warps.",
            )
        sizes.append(int(n))
    x, y, z = (*sizes, 1, 1)[:3]
    if x * y * z > MAX_THREADS:
        raise ResourceError(
            f"T.Kernel: {x * y * z} threads are more than the {MAX_THREADS} a block can have.",
            hint="Use fewer threads and more blocks.",
        )
    return x, y, z


def _cluster(cluster: object, grid: tuple[Expr, ...]) -> tuple[int, int, int]:
    given = list(cluster) if isinstance(cluster, tuple | list) else [cluster]
    if not 1 <= len(given) <= 3:
        raise ArgumentError(f"T.Kernel: cluster has 1 to 3 entries, got {len(given)}.")
    sizes: list[int] = []
    for n in given:
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise ArgumentTypeError(
                f"T.Kernel: cluster must be known when the kernel is traced, got {n!r}.",
                hint="Give an int or a compile-time parameter.",
            )
        if n <= 0:
            raise ArgumentError(f"T.Kernel: cluster must be positive, got {n}.")
        sizes.append(int(n))
    x, y, z = (*sizes, 1, 1)[:3]
    if x * y * z > MAX_CLUSTER:
        raise ResourceError(
            f"T.Kernel: a cluster of {x * y * z} blocks; no chip runs more than {MAX_CLUSTER}.",
            hint="Use a smaller cluster.",
        )
    for d, size in enumerate((x, y, z)):
        extent = int_value(grid[d]) if d < len(grid) else 1
        if extent is not None and extent % size:
            raise ArgumentError(
                f"T.Kernel: the grid has {extent} blocks along {'xyz'[d]}, which clusters of "
                f"{size} do not divide.",
                hint="Round the grid up to a multiple; blocks that are too many may do nothing.",
            )
    return x, y, z


def annotate_min_blocks_per_sm(count: int) -> None:
    """How many blocks a multiprocessor must have registers for at once: a thread then gets no more
    than that leaves (CUDA Programming Guide, "Launch Bounds"), and what it lacks goes to local
    memory, which `kernel.resources` shows.

    Raises:
        ArgumentError, ArgumentTypeError: no number of blocks of 1 to 32, or more threads than the
            2048 that a multiprocessor can have.
        TraceError: outside a kernel.
    """
    what = "T.annotate_min_blocks_per_sm"
    trace = current_kernel(what)
    if isinstance(count, bool) or not isinstance(count, int | np.integer):
        raise ArgumentTypeError(f"{what}: the number of blocks is {count!r}, not an integer.")
    threads = math.prod(trace.threads)
    if not 1 <= count <= MOST_BLOCKS or count * threads > MOST_RESIDENT:
        raise ArgumentError(
            f"{what}: a multiprocessor cannot hold {count} blocks of {threads} threads.",
            hint=f"Up to {MOST_BLOCKS} blocks, and {MOST_RESIDENT} threads together.",
        )
    trace.given = dataclasses.replace(trace.given, min_blocks=int(count))
    trace.is_free = False


def get_thread_binding(dim: int = 0) -> Value:
    """The thread's index in its block along `dim` (0 is x)."""
    trace = current_kernel("T.get_thread_binding")
    _check_dim("T.get_thread_binding", dim, 3)
    trace.is_free = False
    while len(trace.thread_vars) <= dim:
        d = len(trace.thread_vars)
        hint, bounds = f"t{'xyz'[d]}", (0, trace.threads[d] - 1)
        inner, trace.frame = trace.frame, trace.root  # it lives as long as the kernel
        var = trace.new_var(hint, int32, VarKind.THREAD, bounds, caller_span())
        trace.frame = inner
        trace.thread_vars = (*trace.thread_vars, var)
    return Value(trace.thread_vars[dim])


def get_thread_bindings() -> tuple[Value, Value, Value]:
    """The thread's indexes along x, y and z."""
    return get_thread_binding(0), get_thread_binding(1), get_thread_binding(2)


def get_block_binding(dim: int = 0) -> Value:
    """The block's index in the grid along `dim` (0 is x)."""
    trace = current_kernel("T.get_block_binding")
    _check_dim("T.get_block_binding", dim, len(trace.grid))
    return Value(trace.block_vars[dim])


def get_block_bindings() -> tuple[Value, ...]:
    """The block's indexes, as many as the grid has extents."""
    return tuple(Value(v) for v in current_kernel("T.get_block_bindings").block_vars)


def get_thread_extent(dim: int = 0) -> int:
    """Threads of a block along `dim`."""
    trace = current_kernel("T.get_thread_extent")
    _check_dim("T.get_thread_extent", dim, 3)
    trace.is_free = False
    return trace.threads[dim]


def get_thread_extents() -> tuple[int, int, int]:
    """Threads of a block along x, y and z."""
    return get_thread_extent(0), get_thread_extent(1), get_thread_extent(2)


def get_block_extent(dim: int = 0) -> Any:
    """Blocks of the grid along `dim`; an int where constant."""
    trace = current_kernel("T.get_block_extent")
    _check_dim("T.get_block_extent", dim, len(trace.grid))
    constant = int_value(trace.grid[dim])
    return constant if constant is not None else Value(trace.grid[dim])


def _check_dim(what: str, dim: object, rank: int) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < rank:
        raise ArgumentError(f"{what}: dimension {dim!r} does not exist; there are {rank}.")
