"""Carries out what the user has decided of what passes else choose: clusters, registers, the order
of tiles.

Knows `Kernel.given` and its limits. Does not know what passes would choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tilejit.errors import ResourceError, UnsupportedError
from tilejit.ir.expr import Expr, Var, VarKind, arith, index
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Let, Node
from tilejit.ops.copy import Copy
from tilejit.passes.queue import unevenness
from tilejit.passes.registers import GROUP, REGISTER_STEP, launch_registers, register_split
from tilejit.passes.tiles import (
    MAX_TILES,
    Walk,
    at_most,
    choose_cluster,
    is_in_step,
    only_multiplied,
)

FEWEST_REGISTERS, MOST_REGISTERS = 24, 256 - REGISTER_STEP


def cluster_of(kernel: Kernel, brought: Sequence[Copy]) -> tuple[int, int | None]:
    """How many blocks share the tiles that producers bring, and along which axis of the grid.

    Raises:
        UnsupportedError: passes cannot let blocks share along what the user gave.
    """
    given = kernel.given.cluster
    if kernel.is_shared_out:
        return 1, None  # the cluster has another use
    if given is None:
        return choose_cluster(kernel, brought) if unevenness(kernel) is None else (1, None)
    axes = [axis for axis, blocks in enumerate(given) if blocks > 1]
    if not axes:
        return 1, None
    if len(axes) > 1:
        raise UnsupportedError(
            f"T.Kernel: in a cluster of {'x'.join(map(str, given))} blocks the compiler's own "
            "producers cannot share tiles.",
            span=kernel.span,
            notes=["They share along one axis of the grid."],
            hint="Give one axis, such as cluster=(1, 2), or write the copies with T.tma_copy.",
        )
    if not only_multiplied(kernel, brought):
        raise UnsupportedError(
            f"T.Kernel: blocks of a cluster of {'x'.join(map(str, given))} cannot share the tiles "
            "that producers bring: more than T.gemm reads them.",
            span=kernel.span,
            hint="Leave cluster out, or write the copies with T.tma_copy.",
        )
    (axis,) = axes
    uneven = next((c for c in brought if not is_in_step(c, kernel, axis)), None)
    if uneven is not None:
        raise UnsupportedError(
            f"T.Kernel: blocks of a cluster of {'x'.join(map(str, given))} cannot share the tiles "
            f"that producers bring: each has its own number of copies of {uneven.src.buffer.name}.",
            span=kernel.span,
            notes=["They would wait for each other."],
            hint="Leave cluster out, or write the copies with T.tma_copy.",
        )
    return given[axis], axis


def registers_of(kernel: Kernel, teams: int = 1) -> tuple[int, int]:
    """Registers of a consumer and of a producer thread; (0, 0) where none are moved. teams: of
    consumers, each with the kernel's threads.

    Raises:
        ResourceError: together they are more than a multiprocessor has.
    """
    given, threads = kernel.given, kernel.num_threads * teams
    if given.keeps_registers:
        return 0, 0
    up, down = register_split(threads)
    if not given.consumer_registers and not given.producer_registers:
        return up, down
    at_launch = launch_registers(threads + GROUP)
    pool = at_launch * (threads + GROUP)
    down = given.producer_registers or down or FEWEST_REGISTERS
    up = given.consumer_registers or min(MOST_REGISTERS, _share(pool - down * GROUP, threads))
    if not given.producer_registers:
        down = min(down, _share(pool - up * threads, GROUP))
    if down < FEWEST_REGISTERS or up * threads + down * GROUP > pool:
        raise ResourceError(
            f"{threads} threads with {up} registers and {GROUP} producers with "
            f"{max(down, FEWEST_REGISTERS)} need more than the {pool} that a block of "
            f"{threads + GROUP} threads starts with.",
            span=given.register_span,
            hint="Ask for fewer with T.annotate_consumer_reg_alloc.",
        )
    return up, down


def _share(registers: int, threads: int) -> int:
    return registers // threads // REGISTER_STEP * REGISTER_STEP


def order_tiles(kernel: Kernel) -> Kernel:
    """Decide which tile a block computes, where T.use_swizzle asks for an order.

    Needs: clusters. Decides: the block variables of kernels whose blocks compute one tile each.
    """
    if kernel.given.register_span is not None and not kernel.extra_threads:
        note = "registers stay as they are: the block has no producers"
        kernel = replace(kernel, notes=(*kernel.notes, note))
    if not kernel.given.panel or kernel.extra_threads:  # those have an order already
        return kernel
    raw = tuple(
        Var(f"block_{'xyz'[d]}", var.dtype, VarKind.BLOCK, var.low, var.high)
        for d, var in enumerate(kernel.block_vars)
    )
    sizes = kernel.cluster[: len(raw)]
    units = [arith("floordiv", n, size) for n, size in zip(kernel.grid, sizes, strict=True)]
    is_single = all(size == 1 for size in sizes)
    places = kernel.block_vars
    if not is_single:  # neighbours of a cluster stay neighbours
        places = tuple(
            Var(f"cluster_{'xyz'[d]}", var.dtype, VarKind.VALUE, index(0), arith("sub", n, 1))
            for d, (var, n) in enumerate(zip(raw, units, strict=True))
        )
    number: Expr = index(0)
    step: Expr = index(1)
    for var, size, extent in zip(raw, sizes, units, strict=True):
        number = arith("add", number, arith("mul", arith("floordiv", var, size), step))
        step = arith("mul", step, extent)
    last = arith("sub", at_most(step, MAX_TILES), 1)
    unit = Var("tile", number.dtype, VarKind.VALUE, index(0), last)
    walked = Walk(replace(kernel, block_vars=places), 1, None, *given_order(kernel, kernel.cluster))
    nodes: list[Node] = [Let(var=unit, value=number), *walked.decode(unit, units, {})]
    if not is_single:
        for var, place, own, size in zip(kernel.block_vars, places, raw, sizes, strict=True):
            inside = arith("floormod", own, size)
            nodes.append(Let(var=var, value=arith("add", arith("mul", place, size), inside)))
    note = f"tiles are computed in panels of {kernel.given.panel} {kernel.given.order}s"
    return replace(kernel, block_vars=raw, body=(*nodes, *kernel.body), notes=(*kernel.notes, note))


def given_order(kernel: Kernel, cluster: tuple[int, int, int]) -> tuple[int, bool]:
    """Units of tiles in a panel, and whether panels are columns."""
    by_columns = kernel.given.order == "column"
    return max(1, kernel.given.panel // cluster[0 if by_columns else 1]), by_columns
