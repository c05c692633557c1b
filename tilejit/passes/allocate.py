"""Gives every shared buffer its place in the block's shared memory.

Knows sizes and the chip's limit. Does not know what the buffers are for.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.errors import ResourceError
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.kernel import Kernel
from tilejit.isa import mbarrier
from tilejit.passes.pressure import crowded

# 128-byte swizzles repeat every 1024 bytes and count from an address with the low bits zero
# (PTX ISA, "Swizzling modes"); other buffers only need the widest access.
SWIZZLED_ALIGN = 1024
PLAIN_ALIGN = 16


def allocate_memory(kernel: Kernel) -> Kernel:
    """Decide the offset of each shared buffer and barrier; note loops that lack registers.

    Needs: layouts, slots and roles. Decides: `offsets`, `shared_bytes`.
    Raises ResourceError with the table of who uses what when the target has less.
    """
    assert kernel.target is not None, "select did not run"
    sizes: list[tuple[Buffer, int, int]] = []
    for buffer in kernel.scoped(Scope.SHARED):
        if not buffer.is_view:
            layout = kernel.shared[buffer]
            align = SWIZZLED_ALIGN if layout.swizzle > 1 else PLAIN_ALIGN
            align = max(align, layout.tile_align, buffer.align)
            sizes.append((buffer, layout.bytes, align))
    for buffer in kernel.scoped(Scope.BARRIER):
        if not buffer.is_view:
            sizes.append((buffer, mbarrier.BYTES * len(buffer.arrive_counts), mbarrier.BYTES))
    sizes.sort(key=lambda entry: -entry[2])  # strictest alignment first: no gaps
    lying_over = {b for _, over in kernel.unions for b in over}
    under = [b for first, _ in kernel.unions for b in first]
    offsets: dict[Buffer, int] = {}
    end = 0
    of = {buffer: (buffer, size, align) for buffer, size, align in sizes}
    for first, over in kernel.unions:
        begin = -(-end // SWIZZLED_ALIGN) * SWIZZLED_ALIGN
        end = max(_place([of[b] for b in those], begin, offsets) for those in (first, over))
    rest = [entry for entry in sizes if entry[0] not in lying_over and entry[0] not in under]
    end = _place(rest, end, offsets)
    if end > kernel.target.shared_bytes:
        raise _too_much(kernel, sizes, end)
    notes = (*kernel.notes, *crowded(kernel))
    return replace(kernel, offsets=offsets, shared_bytes=end, notes=notes)


def _place(sizes: list[tuple[Buffer, int, int]], begin: int, offsets: dict[Buffer, int]) -> int:
    """Give buffers of these sizes and alignments their places from a byte on; where they end."""
    end = begin
    for buffer, size, align in sizes:
        start = -(-end // align) * align
        offsets[buffer] = start
        end = start + size
    return end


def _too_much(kernel: Kernel, sizes: list[tuple[Buffer, int, int]], total: int) -> ResourceError:
    assert kernel.target is not None
    rows = sorted(sizes, key=lambda entry: -entry[1])
    table = [
        f"{size:>9} bytes  {buffer.name}: "
        + ("barriers" if buffer.scope is Scope.BARRIER else _shape(buffer))
        for buffer, size, _ in rows
    ]
    return ResourceError(
        f"Kernel `{kernel.name}` needs {total} bytes of shared memory; "
        f"{kernel.target} has {kernel.target.shared_bytes} for a block.",
        span=rows[0][0].span or kernel.span,
        notes=table,
        hint="Use smaller tiles or fewer stages.",
    )


def _shape(buffer: Buffer) -> str:
    return f"{'x'.join(map(str, buffer.extents))} {buffer.dtype}"
