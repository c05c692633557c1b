"""How many registers of a thread the fragments of a loop take at once.

Knows which fragments hold values that are still wanted, and what multiplies in flight hold. Does
not know what else the assembler keeps in registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.loops import accesses, loop_layout
from tilejit.ir.node import (
    Body,
    For,
    If,
    Load,
    Node,
    Parallel,
    Part,
    Store,
    While,
    all_reads,
    all_writes,
    is_over_tiles,
    walk,
)
from tilejit.ir.parts import part_kernel, roles_of
from tilejit.ir.sync import Control, ControlOp
from tilejit.ops.cluster import ClusterExchange
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.ops.reduce import Reduce
from tilejit.passes.registers import launch_registers

_MORE = ControlOp.REGISTERS_UP
_FEW = 8  # variables that every loop has: where its block is, steps
_PASSES = 2  # over a loop's nodes: what a round hands to the next is known after the first


def fragments_at(loop: For, kernel: Kernel) -> set[Buffer]:
    """The fragments that a loop uses, or that keep values meanwhile."""
    before, after = _beside(kernel.body, loop, set(), set())
    return _fragments(_used((loop,))) | before & after


def words_beside(loop: For, kernel: Kernel) -> int:
    """Words of a thread that a loop takes besides fragments and the little that every loop has: the
    variables of run time that it uses, beyond a few, and what an elementwise loop in it reads from
    shared memory once for several elements, such as a number for each column. Needs: layouts."""
    defined = {v for n in walk((loop,)) for v in n.defines}
    used = {v for n in walk(loop.body) for e in n.exprs for v in variables(e)}
    reads = [_shared_words(n, kernel) for n in walk(loop.body) if isinstance(n, Parallel)]
    variables_beyond = len(used - defined - set(kernel.thread_vars)) - _FEW
    return max(0, variables_beyond) + max(reads, default=0)


def _shared_words(node: Parallel, kernel: Kernel) -> int:
    layout = loop_layout(node, kernel)
    total = 0
    for inner, buffer, at in accesses(node):
        along = [d for d, v in enumerate(node.vars) if any(v in variables(e) for e in at)]
        if isinstance(inner, Load) and buffer.scope.is_shared and len(along) < len(node.vars):
            own = layout.project(along).registers if not layout.flat else 1
            total += own * buffer.dtype.bytes // 4
    return total


def _beside(
    body: Body, loop: For, before: set[Buffer], after: set[Buffer]
) -> tuple[set[Buffer], set[Buffer]]:
    """The fragments that are used before a loop in the body, and those of which what they hold
    when it ends is wanted. before, after: the same of the body."""
    place = next(k for k, n in enumerate(body) if any(m is loop for m in walk((n,))))
    node, rest = body[place], body[place + 1 :]
    before = before | _fragments(_used(body[:place]))
    after = _wanted(rest) | after - _used(rest)
    if node is loop:
        return before, after
    (inner,) = (b for b in node.bodies if any(m is loop for m in walk(b)))
    if isinstance(node, For | While) and not is_over_tiles(node):  # it comes again
        before |= _fragments(_used(inner))
        after |= _wanted(inner)
    return _beside(inner, loop, before, after)


def _wanted(body: Body) -> set[Buffer]:
    """The fragments that a body uses before it surely makes them anew."""
    made: set[Buffer] = set()
    found: set[Buffer] = set()
    for node in body:
        inner = node.bodies if isinstance(node, For | While | If | Part) else ()
        needed = set().union(*map(_wanted, inner)) if inner else _needed(node)
        found |= needed - made
        made |= made_anew(node)
    return found


def _used(body: Body) -> set[Buffer]:
    return {b.root for n in body for b in all_reads(n) | all_writes(n)}


def _fragments(buffers: Iterable[Buffer]) -> set[Buffer]:
    return {b.root for b in buffers if b.scope is Scope.FRAGMENT}


def most_words(nodes: Sequence[Node], loop: For, kernel: Kernel) -> float:
    """Words of a thread that fragments take where a round of the loop has most of them.

    nodes: of the round, with the waits for its multiplies. What a node makes of a fragment that is
    not wanted any more takes its registers. Needs: layouts.
    """
    before, ended = _beside(kernel.body, loop, set(), set())
    used = _fragments(_used(loop.body))
    through = before & ended - used
    size = {b: f.registers * b.dtype.bytes / 4 for b, f in kernel.fragments.items()}
    read, made = [_needed(n) for n in nodes], [made_anew(n) for n in nodes]
    after = ended & used
    wanted = [after] * len(nodes)
    live = after
    for _ in range(_PASSES):
        for k in reversed(range(len(nodes))):
            wanted[k] = live
            live = live - made[k] | read[k]
        live = live | after
    flying: list[Gemm] = []
    most = 0.0
    for k, node in enumerate(nodes):
        if isinstance(node, Gemm) and node.is_async:
            flying.append(node)
        elif isinstance(node, GemmWait):
            flying = flying[len(flying) - node.pending :]
        busy = through | _fragments(r.buffer for g in flying for r in (g.a, g.acc))
        for now in (wanted[k] - made[k] | read[k], wanted[k]):
            most = max(most, sum(size.get(b, 0.0) for b in now | busy))
    return most


def crowded(kernel: Kernel) -> list[str]:
    """Words for explain() on each loop whose fragments do not fit the registers of a thread.

    Needs: layouts, roles and waits. Loops with loops or branches of multiplies in them are left
    out: of these it is not known what lives at once.
    """
    at_launch = launch_registers(kernel.num_threads + kernel.extra_threads)
    parts = [(part_kernel(kernel, r), r.body) for r in roles_of(kernel.body)]
    notes: list[str] = []
    for part, body in parts or [(kernel, kernel.body)]:
        asked = [n.count for n in walk(body) if isinstance(n, Control) and n.op is _MORE]
        most = max([at_launch, *asked])
        for loop in walk(body):
            if isinstance(loop, For) and not is_over_tiles(loop) and _is_plain(loop.body):
                words = most_words(loop.body, loop, replace(part, body=body))
                if words > most:
                    notes.append(
                        f"loop at {loop.span}: fragments take {words:.0f} registers of a thread, "
                        f"which has {most}: some are spilled; take more threads or smaller tiles"
                    )
    return list(dict.fromkeys(notes))


def _is_plain(body: Body) -> bool:
    """Whether a loop's body multiplies, and loops and branches in it do not."""
    inner = [n for node in body for child in node.bodies for n in walk(child)]
    multiplies = any(isinstance(n, Gemm) for n in body)
    return multiplies and not any(isinstance(n, Gemm | For) for n in inner)


def _needed(node: Node) -> set[Buffer]:
    """Fragments of which a node needs what they held before."""
    if isinstance(node, Gemm):
        sums = [] if node.clear and node.acc.is_whole else [node.acc.buffer]
        return _fragments([node.a.buffer, node.b.buffer, *sums])
    return _fragments(all_reads(node) | all_writes(node)) - made_anew(node)


def made_anew(node: Node) -> set[Buffer]:
    """Fragments of which a node surely writes every element, without reading any."""
    if isinstance(node, Gemm):
        return _fragments([node.acc.buffer] if node.clear and node.acc.is_whole else [])
    written = _fragments(all_writes(node)) - _fragments(all_reads(node))
    return {b for b in written if fills(node, b)}


def fills(node: Node, buffer: Buffer) -> bool:
    """Whether the node surely writes every element of the buffer, and by no other name."""
    if any(b.root is buffer and b is not buffer for b in all_writes(node)):
        return False
    if isinstance(node, If):
        return all(any(fills(n, buffer) for n in body) for body in node.bodies)
    if isinstance(node, Copy | Fill | Reduce):
        return node.dst.buffer is buffer and node.dst.is_whole
    if isinstance(node, ClusterExchange):
        return node.result.buffer is buffer and node.result.is_whole
    if not isinstance(node, Parallel) or node.extents != buffer.extents:
        return False
    stores = [n for n in node.body if isinstance(n, Store) and n.buffer is buffer]
    return any(n.index == node.vars for n in stores)
