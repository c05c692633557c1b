"""Whether a kernel is split into producers, which bring tiles by the tensor memory accelerator, and
warpgroups that multiply them.

Knows what must hold for that. Does not know slots, barriers or registers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeGuard

from tilejit.dtypes import tfloat32
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import For, LoopKind, Node, Roles, While, walk
from tilejit.ir.sync import Control, ControlOp, SyncThreads
from tilejit.isa.atom import WgmmaAtom
from tilejit.ops.cluster import ClusterExchange
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm
from tilejit.passes.bring import Reach, is_inward
from tilejit.passes.pieces import round_copies
from tilejit.passes.registers import GROUP, MAX_THREADS
from tilejit.passes.tma import misfit, same_bits
from tilejit.passes.wgmma import choose_wgmma
from tilejit.target import Feature, Target


@dataclass(frozen=True)
class Brought:
    """copies: those that producers make; others: those beside them in loops, made by the block's
    threads. gemms: the atoms of multiplies by warpgroups.
    reasons, gemm_reasons: why others are not among them, where that is worth a word."""

    copies: frozenset[Copy] = frozenset()
    others: frozenset[Copy] = frozenset()
    gemms: dict[Gemm, WgmmaAtom] = field(default_factory=dict)
    reasons: dict[Copy, str] = field(default_factory=dict)
    gemm_reasons: dict[Gemm, list[str]] = field(default_factory=dict)


class Bringable:
    """What is known of a kernel's copies and multiplies whatever its threads.

    reasons: of copies from global to shared memory, why they are not brought, "" where they can be.
    repeated: copies that loops with stages make; refused: those of them that cannot be brought.
    viewed: buffers that have views. unrounded: tiles that nobody would round to tf32.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.nodes = list(walk(kernel.body))
        self.gemms = [n for n in self.nodes if isinstance(n, Gemm)]
        self.reasons = _reasons(kernel)
        self.unrounded = unrounded_tiles(kernel, {c for c, r in self.reasons.items() if not r})
        self.viewed = {b.root for b in kernel.buffers if b.is_view}
        self.repeated = repeated_copies(kernel)
        self.refused = {c: r for c, r in self.reasons.items() if r and c in self.repeated}


def brings(target: Target) -> bool:
    """Whether the chip has what producers and warpgroups need."""
    return target.has(Feature.TMA, Feature.WGMMA, Feature.SETMAXNREG)


def copies_to_bring(
    kernel: Kernel, target: Target, obstacle: str = "", known: Bringable | None = None
) -> Brought:
    """What producers bring and warpgroups multiply.

    obstacle: what rules producers out, if that is known. known: of the same body.

    A kernel has producers when it has a multiply for warpgroups and copies in T.Pipelined loops
    that can be brought, those of all such multiplies' operands among them.
    """
    if not brings(target):
        return Brought()
    known = known or Bringable(kernel)
    gemms, reasons, refused = known.gemms, known.reasons, known.refused
    unrounded, repeated = known.unrounded, known.repeated
    fits = {n: _choose(n, kernel, target, known.viewed, unrounded) for n in gemms}
    atoms = {n: atom for n, atom in fits.items() if isinstance(atom, WgmmaAtom)}
    why = {n: [f"wgmma ({reason})"] for n, reason in fits.items() if isinstance(reason, str)}
    if not atoms:  # where it is for want of rounding by TMA, the copies say why
        threads = kernel.num_threads
        fit = [n for n in gemms if isinstance(choose_wgmma(n, kernel, target, threads), WgmmaAtom)]
        missed = unrounded & {r.buffer for n in fit for r in (n.a, n.b)}
        own = {c: r for c, r in refused.items() if c.dst.buffer in missed}
        return Brought(reasons=own, gemm_reasons=why)
    general = obstacle or _obstacle(kernel, known.nodes)
    operands = {r.buffer for n in atoms for r in (n.a, n.b)}
    is_fed = any(c not in refused for c in repeated)
    missed = {c.dst.buffer for c in pipelined_copies(kernel) if c in refused}
    if general or not is_fed or missed & operands:
        reason = general or "its operands are not brought by TMA"
        own = dict(refused) if not general else dict.fromkeys(repeated, general)
        unrounded = unrounded_tiles(kernel, ())
        kept = {
            n: a
            for n, a in atoms.items()
            if _is_filled_by_threads(n, kernel) and not unrounded & {n.a.buffer, n.b.buffer}
        }
        why |= {n: [f"wgmma ({reason})"] for n in atoms if n not in kept}
        return Brought(gemms=kept, reasons=own, gemm_reasons=why)
    copies = frozenset(c for c, r in reasons.items() if not r)
    others = frozenset(refused)
    return Brought(copies, others, atoms, {c: r for c, r in reasons.items() if r}, why)


def _choose(
    node: Gemm, kernel: Kernel, target: Target, viewed: set[Buffer], unrounded: set[Buffer]
) -> WgmmaAtom | str:
    chosen = choose_wgmma(node, kernel, target, kernel.num_threads)
    for region in (node.a, node.b):
        name = region.buffer.name
        if isinstance(chosen, str) or region.buffer.scope is not Scope.SHARED:
            continue
        if region.buffer in viewed:
            chosen = f"{name} has views, so it lies in plain rows"
        elif region.buffer in unrounded:
            chosen = f"{name} is not rounded to tf32 on its way into shared memory"
    return chosen


def unrounded_tiles(kernel: Kernel, brought: Collection[Copy]) -> set[Buffer]:
    """The tf32 tiles in shared memory whose elements TMA does not round: warpgroups would cut them
    off, twice the error. It rounds what it alone brings and multiplies alone read."""
    found: set[Buffer] = set()
    for node in walk(kernel.body):
        written = () if node in brought else node.writes
        read = () if isinstance(node, Gemm) else node.reads
        found |= {b.root for b in (*written, *read) if b.dtype is tfloat32}
    return {b for b in found if b.scope is Scope.SHARED}


def _reasons(kernel: Kernel) -> dict[Copy, str]:
    """For every copy from global to shared memory without conversion, why it is not brought."""
    reasons = {c: misfit(c, kernel) or why for c, why in Reach(kernel).reasons.items()}
    pieces = [c for c in reasons if not c.dst.is_whole]
    why = {c.dst.buffer: reasons[c] for c in pieces if reasons[c]}
    reasons |= {c: why[c.dst.buffer] for c in pieces if c.dst.buffer in why}  # all or none
    return {c: r for c, r in reasons.items() if same_bits(c.src.buffer, c.dst.buffer)}


def pipelined_copies(kernel: Kernel) -> list[Copy]:
    """Plain copies into shared memory that loops with stages make in every round."""
    return [n for loop in _staged_loops(kernel) for n in loop.body if _is_plain(n)]


def repeated_copies(kernel: Kernel) -> list[Copy]:
    """The same, those that rounds make in branches, and pieces of tiles in loops of a round."""
    return [n for loop in _staged_loops(kernel) for n in round_copies(loop.body) if _is_plain(n)]


def _staged_loops(kernel: Kernel) -> list[For]:
    return [n for n in walk(kernel.body) if isinstance(n, For) and _has_stages(n)]


def _is_plain(node: Node) -> TypeGuard[Copy]:
    if not isinstance(node, Copy) or not is_inward(node):
        return False
    return same_bits(node.src.buffer, node.dst.buffer)


def _has_stages(loop: For) -> bool:
    if loop.kind is not LoopKind.PIPELINED:
        return False
    return loop.num_stages is None or loop.num_stages > 1


def _obstacle(kernel: Kernel, nodes: list[Node]) -> str:
    """What in the kernel rules producers out."""
    if any(b.scope is Scope.BARRIER for b in kernel.buffers):
        return "the kernel has barriers of its own"
    if any(isinstance(n, Roles) for n in nodes):
        return "the block's warpgroups have roles"
    if any(isinstance(n, Gemm) and n.is_async for n in nodes):
        return "the kernel waits for multiplies itself"
    if any(isinstance(n, While) for n in nodes):
        return "the kernel has a loop whose end only the block knows"
    if any(isinstance(n, Control) and n.op is not ControlOp.FENCE_DEVICE for n in nodes):
        return "the kernel orders asynchronous work itself"
    if any(isinstance(n, SyncThreads) and n.number is not None for n in nodes):
        return "the kernel names hardware barriers itself"
    if any(isinstance(n, ClusterExchange) for n in nodes) and not kernel.is_shared_out:
        return "all threads of a cluster's blocks exchange tiles"
    if kernel.threads[1:] != (1, 1):
        return "the block's threads have more than one dimension"
    if kernel.num_threads + GROUP > MAX_THREADS:
        return f"a block has no room for producers beside {kernel.num_threads} threads"
    return ""


def _is_filled_by_threads(node: Gemm, kernel: Kernel) -> bool:
    """True when ordinary stores fill the operands in shared memory, so that a fence is enough."""
    operands: set[Buffer] = {
        r.buffer.root for r in (node.a, node.b) if r.buffer.scope is Scope.SHARED
    }
    pipelined = {c.dst.buffer.root for c in pipelined_copies(kernel)}
    return not operands & pipelined
