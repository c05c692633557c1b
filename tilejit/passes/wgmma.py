"""Which tile multiplies warpgroups can do with Hopper's asynchronous matrix instructions.

Knows what the instruction asks of operands and accumulator. Does not know who fills the operands.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.dtypes import DType
from tilejit.ir.analysis import divisor
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.kernel import Kernel
from tilejit.isa.atom import WgmmaAtom
from tilejit.isa.wgmma import find_wgmma
from tilejit.layout.boxes import BOX_ALIGN, CHUNK, chunked_layout, operand_layout
from tilejit.layout.shared import SharedLayout
from tilejit.ops.gemm import Gemm, GemmWarpPolicy
from tilejit.passes.registers import (
    GROUP,
    SPARE_REGISTERS,
    consumer_registers,
    launch_registers,
)
from tilejit.target import Feature, Target

SHARED_BYTES = 128  # a clock, that a multiprocessor reads of its shared memory
ROWS = 64  # of one instruction
STEP_BYTES = 32  # of K that one instruction multiplies
MAX_COLUMNS = 256
# Registers that a thread has at launch besides those of one instruction: the assembler takes no
# account of what producers give away when it looks at one (ptxas, C7602).
LAUNCH_SPARE = 26


def choose_wgmma(node: Gemm, kernel: Kernel, target: Target, threads: int) -> WgmmaAtom | str:
    """The atom of a multiply by warpgroups, or why there is none. threads: that execute it."""
    if not target.has(Feature.WGMMA):
        return f"it needs {Feature.WGMMA}, which {target} lacks"
    if threads % GROUP:
        return f"{threads} threads are not whole warpgroups of {GROUP}"
    a, b, acc = node.a.buffer.dtype, node.b.buffer.dtype, node.acc.buffer.dtype
    if node.k * a.bytes % STEP_BYTES or node.m % ROWS or node.n % 8:
        return (
            f"the tile is {node.m}x{node.n}x{node.k}, no multiple of 64x8x{STEP_BYTES // a.bytes}"
        )
    reason = _operand_misfit(node.a, not node.transpose_a, "a", kernel)
    reason = reason or _operand_misfit(node.b, node.transpose_b, "b", kernel)
    if reason:
        return reason
    if find_wgmma(a, b, acc, 8, target) is None:
        return f"no instruction multiplies {a} and {b} into {acc}"
    unit = 8 if node.transpose_b else _layout(node.b.buffer, kernel).panel
    return _split(node, target, threads // GROUP, unit) or _no_split(node, threads)


def _no_split(node: Gemm, threads: int) -> str:
    """Why the warpgroups cannot share the tile."""
    words = node.m * node.n * node.acc.buffer.dtype.bytes // 4 // threads
    most = consumer_registers(threads) - SPARE_REGISTERS
    if words > most:
        return f"its sums take {words} registers of each of {threads} threads, of {most} free"
    groups = f"{threads // GROUP} warpgroups" if threads > GROUP else "a warpgroup"
    return f"{groups} cannot share {node.m}x{node.n} in parts of {ROWS}x8"


def _split(node: Gemm, target: Target, groups: int, unit: int) -> WgmmaAtom | None:
    """The warpgroups along m and n whose operands are read least often.

    unit: what the columns of an instruction must be a multiple of to begin at a place of their own.
    """
    best: tuple[tuple[float, ...], WgmmaAtom] | None = None
    for down in (d for d in range(1, groups + 1) if groups % d == 0):
        across = groups // down
        if node.m % (ROWS * down) or node.n % (8 * across):
            continue
        atom = _atom(node, target, down, across, unit)
        if atom is None:
            continue
        preference = 0
        if node.policy is GemmWarpPolicy.FullRow:
            preference = -down
        elif node.policy is GemmWarpPolicy.FullCol:
            preference = -across
        # shared memory is read once for each instruction's rows and columns
        loads = atom.rows * atom.columns * (ROWS + atom.wgmma.n) * groups
        cost = (preference, loads, -down)
        if best is None or cost < best[0]:
            best = (cost, atom)
    return best[1] if best else None


def _atom(node: Gemm, target: Target, down: int, across: int, unit: int) -> WgmmaAtom | None:
    a, b, acc = node.a.buffer.dtype, node.b.buffer.dtype, node.acc.buffer.dtype
    rows, wide = node.m // down // ROWS, node.n // across
    threads = down * across * GROUP
    words_a_column = ROWS * acc.bytes / (4 * GROUP)
    if rows * wide * words_a_column > consumer_registers(threads) - SPARE_REGISTERS:
        return None
    most = (launch_registers(threads + GROUP) - LAUNCH_SPARE) / words_a_column
    most = min(MAX_COLUMNS, int(most))
    for columns in range(-(-wide // most), wide // 8 + 1):
        n = wide // columns
        if wide % columns or n % 8 or (columns * across > 1 and n % unit):
            continue
        wgmma = find_wgmma(a, b, acc, n, target)
        if wgmma is not None:
            return WgmmaAtom(wgmma, down, across, rows, columns)
    return None


def _operand_misfit(region: Region, is_k_major: bool, name: str, kernel: Kernel) -> str:
    """Why an operand cannot be read where it lies; "" when it can."""
    buffer = region.buffer
    if buffer.scope is Scope.FRAGMENT:
        if name == "a" and is_k_major:
            return ""
        return f"{name} is a fragment" + ("" if name == "b" else ", transposed")
    if buffer.dtype.bits != 16 and not is_k_major:
        return f"{name} is stored with K outermost, which takes 16-bit elements"
    if buffer.is_view or buffer.strides is not None or buffer.rank < 2:
        return f"{buffer.name} has a layout of its own"
    if buffer.extents[-1] * buffer.dtype.bytes % 16 or buffer.extents[-2] % 8:
        return f"{buffer.name} is {buffer.extents[-2]}x{buffer.extents[-1]}, not in whole chunks"
    layout = _layout(buffer, kernel)
    if layout.pitch != layout.panel or layout.panel * layout.itemsize != CHUNK * layout.swizzle:
        return kernel.given.why_not(buffer)
    *_, row, column = region.starts
    if set(region.kept) != {buffer.rank - 2, buffer.rank - 1}:
        return f"{buffer.name} is multiplied along other dimensions than its last two"
    if divisor(row) % 8 or divisor(column) % layout.panel:
        return f"the part of {buffer.name} begins inside of a swizzle"
    if not is_k_major and region.extents[-1] % layout.panel:
        return f"{region.extents[-1]} columns of {buffer.name} are not whole panels"
    return ""


def _layout(buffer: Buffer, kernel: Kernel) -> SharedLayout:
    return kernel.given.layout_of(buffer, warpgroup_layout(buffer.extents, buffer.dtype))


def warpgroup_layout(shape: tuple[int, ...], dtype: DType) -> SharedLayout:
    """How a tile must lie that warpgroups multiply: panels of 128, 64, 32 or 16 bytes, swizzled
    over their width (PTX ISA, "Asynchronous warpgroup-level matrix shared memory layout")."""
    layout = operand_layout(shape, dtype.bytes)
    if layout.swizzle == 1:
        layout = chunked_layout(shape, dtype.bytes)
    return replace(layout, tile_align=BOX_ALIGN)


def multiply_clocks(node: Gemm) -> float:
    """How long the tensor cores are busy with a multiply by warpgroups: one instruction of 64 rows,
    n columns and 32 bytes of K takes n / 2 clocks and one more, or what it takes to read A."""
    assert isinstance(node.atom, WgmmaAtom), "select did not run"
    n = node.atom.wgmma.n
    count = node.m // ROWS * (node.n // n) * (node.k * node.a.buffer.dtype.bytes // STEP_BYTES)
    return count * (max(n / 2, ROWS * STEP_BYTES / SHARED_BYTES) + 1)
