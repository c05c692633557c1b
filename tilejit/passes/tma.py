"""What the tensor memory accelerator can move: boxes of global tensors to and from shared memory.

Knows its rules of alignment and shape (CUDA Driver API, cuTensorMapEncodeTiled). Does not know who
issues a copy or who waits for it.
"""

from __future__ import annotations

import math

from tilejit.dtypes import bfloat16, float16, float32, int32, uint32, uint64
from tilejit.ir.analysis import divisor, interval
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Var, int_value, is_const
from tilejit.ir.kernel import Kernel, ParamKind
from tilejit.ir.node import For, walk
from tilejit.layout.boxes import SWIZZLE_ROWS, boxed_layout, boxes_of
from tilejit.ops.copy import Copy

UNIT = 16  # bytes: of addresses, strides and rows of a box
MAX_RANK = 5
SECTION_RANK = 2  # dimensions more of a map whose tensor's sections are copied
# Of elements that it adds (PTX ISA, "cp.reduce.async.bulk")
_ADDED = (int32, uint32, uint64, float16, bfloat16, float32)


def same_bits(source: Buffer, target: Buffer) -> bool:
    """True when copying needs no conversion."""
    pair = {source.dtype.name, target.dtype.name}
    return source.dtype is target.dtype or pair == {"float32", "tfloat32"}


def misfit(copy: Copy, kernel: Kernel) -> str:
    """Why the accelerator cannot make the copy; "" when it can."""
    if copy.prefer in ("cp_async", "sync"):
        return f"prefer_instruction is {copy.prefer!r}"
    if copy.prefer == "no_tma":
        return "disable_tma is set"
    scopes = copy.src.buffer.scope, copy.dst.buffer.scope
    if set(scopes) != {Scope.GLOBAL, Scope.SHARED}:
        return "it moves boxes between global and shared memory only"
    if not same_bits(copy.src.buffer, copy.dst.buffer):
        return f"it converts {copy.src.buffer.dtype} to {copy.dst.buffer.dtype}"
    if copy.pad is not None and not is_const(copy.pad, 0):
        return "what lies outside reads as 0 only"
    if scopes[0] is Scope.GLOBAL:
        return _global_misfit(copy.src, kernel) or _shared_misfit(copy.dst, kernel)
    is_asked = copy.is_async or copy.prefer == "tma"
    if copy.combine is not None and copy.dst.buffer.dtype not in _ADDED:
        return f"it does not add {copy.dst.buffer.dtype}"
    reason = _global_misfit(copy.dst, kernel) or _written_misfit(copy.dst, kernel, is_asked)
    return reason or _shared_misfit(copy.src, kernel)


def _global_misfit(region: Region, kernel: Kernel) -> str:
    buffer, known, size = region.buffer, kernel.multiples, region.buffer.dtype.bytes
    name, section = buffer.name, buffer.section
    whole = buffer if section is None else section.tensor
    if not any(p.kind is ParamKind.TENSOR and p.buffer is whole for p in kernel.params):
        return f"{whole.name} is no argument"
    most = MAX_RANK if section is None else MAX_RANK - SECTION_RANK
    if buffer.broadcasts or not 1 <= buffer.rank <= most:
        what = "tensor" if section is None else "section of a tensor"
        return f"{name} is no {what} of 1 to {most} dimensions"
    if section is not None:
        if section.dim == buffer.rank - 1:
            return f"{name} is a section of rows"
        low = interval(region.starts[section.dim]).low
        if low is None or low < 0:
            return f"the part of {name} may begin before the section does"
    if not region.shape or buffer.rank - 1 in region.dropped:
        return f"a row of {name} is one element"
    if any(int_value(e) == 0 for e in buffer.shape):
        return f"{name} is empty"
    *outer, last = buffer.element_strides
    if int_value(last) != 1:
        return f"neighbours in a row of {name} are not neighbours in memory"
    for extent, stride in zip(buffer.shape, outer, strict=False):
        if (int_value(stride) or 1) < 0 or (int_value(stride) == 0 and int_value(extent) != 1):
            return f"rows of {name} do not follow each other in memory"
        if divisor(stride, known) * size % UNIT:
            return f"rows of {name} do not provably begin at multiples of {UNIT} bytes"
    offset = divisor(whole.offset, known) * size
    if max(buffer.align, size) % UNIT or offset % UNIT:
        return f"{name} does not provably begin at a multiple of {UNIT} bytes"
    if region.extents[-1] * size % UNIT:
        return f"a row of {region.extents[-1]} {buffer.dtype} is no multiple of {UNIT} bytes"
    if divisor(region.starts[-1], multiples_of(kernel)) * size % UNIT:
        # the tile's first column: the hardware traps, although no manual says so
        return f"the part of {name} does not provably begin at a multiple of {UNIT} bytes in a row"
    return ""


def _written_misfit(region: Region, kernel: Kernel, is_asked: bool) -> str:
    """What loads may do and stores may not. No manual says either: measured on an H100, which
    writes whole 16 bytes at the end of a row and traps at what begins before the tensor.

    is_asked: the user asked for it, so it may begin where only the user knows it to be inside.
    """
    buffer = region.buffer
    if divisor(buffer.shape[-1], kernel.multiples) * buffer.dtype.bytes % UNIT:
        return f"rows of {buffer.name} do not provably end at multiples of {UNIT} bytes"
    for start in region.starts:
        bounds = interval(start)
        if bounds.high is not None and bounds.high < 0:
            return f"the part of {buffer.name} begins before the tensor does"
        if not is_asked and (bounds.low is None or bounds.low < 0):
            return f"the part of {buffer.name} may begin before the tensor does"
    return ""


def multiples_of(kernel: Kernel) -> dict[Var, int]:
    """What divides the variables: what the call promises of extents and strides, and of a loop's
    variable what divides its start and its step."""
    known = dict(kernel.multiples)
    for node in walk(kernel.body):
        if isinstance(node, For):
            divides = math.gcd(divisor(node.start, known), node.step)
            known[node.var] = math.gcd(known.get(node.var, 0), divides)
    return known


def _shared_misfit(region: Region, kernel: Kernel) -> str:
    """The tile lies in whole rows, or as a sub-tile that begins where a swizzle does."""
    buffer = region.buffer
    if buffer.is_view or buffer.strides is not None:
        return f"{buffer.name} has a layout of its own"
    if buffer.rank - 1 in region.dropped:
        return f"a row of {buffer.name} is one element"
    if int_value(region.starts[-1]) != 0 or region.extents[-1] != buffer.extents[-1]:
        return f"it moves parts of the rows of {buffer.name}"
    if buffer.rank > 1 and divisor(region.starts[-2]) % SWIZZLE_ROWS:
        return f"it begins inside {SWIZZLE_ROWS} rows of {buffer.name}"
    wanted = boxed_layout(buffer.extents, buffer.dtype.bytes)
    if boxes_of(wanted, region.extents) is None:
        return f"no boxes make up {'x'.join(map(str, region.shape))} {buffer.dtype}"
    layout = kernel.given.layout_of(buffer, wanted)
    if layout.pitch != layout.panel or boxes_of(layout, region.extents) is None:
        return kernel.given.why_not(buffer)
    return ""
