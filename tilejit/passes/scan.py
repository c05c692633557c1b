"""Scans: a tile goes through a fragment that is spread for it, and where threads that do not trade
registers hold parts of the axis, what the parts before add up to goes through shared memory.

Knows what a scan asks of a fragment's layout. Does not know PTX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tilejit.errors import ResourceError
from tilejit.ir.buffer import Buffer, Region, Scope, whole
from tilejit.ir.expr import arith, index
from tilejit.ir.node import Body, Node, walk
from tilejit.layout.fragment import FragmentLayout
from tilejit.layout.scan import Scanning, scanned
from tilejit.ops.copy import Copy
from tilejit.ops.reduce import Step
from tilejit.ops.scan import Scan
from tilejit.passes.reduce import WIDEST_BYTES, by_registers, shared_scratch
from tilejit.passes.registers import MAX_WORDS

MOST_WORDS = 64  # registers of a thread for a tile, where it may come in pieces


def in_parts(node: Scan, threads: int) -> tuple[list[Node], str]:
    """The scan by so many threads of a fragment of its own, with the copies that it takes; and
    what explain() says of it. A tile in shared memory that is large comes in pieces.

    Raises:
        ResourceError: a line takes too many registers.
    """
    spread = _spread(node, threads)
    words = _words(node, spread)
    if words > MOST_WORDS:
        pieces = _halves(node)
        if pieces and all(_words(p, _spread(p, threads)) < words for p in pieces):
            (first, note), (second, _) = (in_parts(piece, threads) for piece in pieces)
            return [*first, *second], note
    if words > MAX_WORDS:
        region = node.src
        raise ResourceError(
            f"{node.call}: `{region.buffer.name}` takes {words} registers in each of {threads} "
            f"threads while it is scanned; {MAX_WORDS} is the most.",
            span=node.span,
            hint="Use more threads or a smaller tile.",
        )
    held = whole(_buffer(node, "scanned", node.src.shape, Scope.FRAGMENT))
    scan = replace(node, src=held, dst=held, spread=spread)
    steps = [scan]
    if spread.parts > 1:
        scratch = _buffer(node, "parts", spread.totals.shape, Scope.SHARED)
        steps = [replace(scan, scratch=scratch, step=step) for step in (Step.SEND, Step.TAKE)]
    fetch, keep = by_registers(node.src, held, node), by_registers(held, node.dst, node)
    return [fetch, *steps, keep], _note(node, spread)


def _spread(node: Scan, threads: int) -> Scanning:
    shape = node.src.shape
    itemsize = max(r.buffer.dtype.bytes for r in node.regions)
    vector = math.gcd(WIDEST_BYTES // itemsize, shape[-1])
    return scanned(shape, node.axis, threads, vector, itemsize)


def _words(node: Scan, spread: Scanning) -> int:
    """Registers of a thread."""
    return spread.layout.registers * node.accumulator.bytes // 4


def _halves(node: Scan) -> tuple[Scan, Scan] | None:
    """The scans of one half of a tile's lines and of the other, where neither changes what the
    other reads; None where the tile has one line, or is in registers."""
    if any(r.buffer.scope is not Scope.SHARED for r in node.regions):
        return None
    is_apart = node.src.buffer.root is not node.dst.buffer.root
    places = {(r.buffer, r.starts, r.kept) for r in node.regions}
    if not is_apart and len(places) > 1:
        return None
    shape = node.src.shape
    others = [d for d in range(len(shape)) if d != node.axis]
    longest = max(others, key=lambda d: shape[d], default=node.axis)
    if longest == node.axis or shape[longest] < 2:
        return None
    middle = 1 << ((shape[longest] - 1).bit_length() - 1)  # so that vectors stay whole

    def part(region: Region, first: int, count: int) -> Region:
        d = region.kept[longest]
        starts, extents = list(region.starts), list(region.extents)
        starts[d], extents[d] = arith("add", starts[d], first), count
        return replace(region, starts=tuple(starts), extents=tuple(extents))

    def scan(first: int, count: int) -> Scan:
        source, target = (part(r, first, count) for r in node.regions)
        return replace(node, src=source, dst=target)

    return scan(0, middle), scan(middle, shape[longest] - middle)


def scan_layouts(body: Body) -> dict[Buffer, FragmentLayout]:
    """Layouts of the fragments that scans need where they have decided."""
    found: dict[Buffer, FragmentLayout] = {}
    for node in walk(body):
        if isinstance(node, Scan):
            assert node.spread is not None, "select did not run"
            found[node.dst.buffer] = node.spread.layout
    return found


def scan_scratch(body: Body) -> dict[Buffer, Buffer]:
    """Shared memory for fragments that are scanned in their places, where they lie otherwise: one
    tile for the way there and the way back."""
    scratch: dict[Buffer, Buffer] = {}
    scanned = scan_layouts(body)
    for node in walk(body):
        if isinstance(node, Copy) and node.dst.buffer in scanned and node.src.is_whole:
            source, held = node.src.buffer, node.dst.buffer
            if source.scope is Scope.FRAGMENT and source.dtype is held.dtype:
                scratch[held] = scratch.setdefault(source, shared_scratch(source))
    return scratch


def _buffer(node: Scan, suffix: str, shape: Sequence[int], scope: Scope) -> Buffer:
    return Buffer(
        name=f"{node.src.buffer.name}_{suffix}",
        shape=tuple(index(n) for n in shape),
        dtype=node.accumulator,
        scope=scope,
        span=node.span,
    )


def _note(node: Scan, spread: Scanning) -> str:
    held = spread.rounds * spread.run
    how = [f"{held} register{'s' if held > 1 else ''} of a line"]
    if spread.lanes > 1:
        how.append(f"{spread.lanes} lanes by shuffles")
    if spread.parts > 1:
        how.append(f"{spread.parts} parts through shared memory")
    what = f"{node.call[2:]} {node.src.buffer.name} -> {node.dst.buffer.name}"
    return f"{what}: " + ", ".join(how)
