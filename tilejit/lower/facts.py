"""What lowering needs to know of a whole kernel before it emits a node.

Knows divergence, which thread-private arrays need addressable memory, which loops must unroll.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.divergence import Divergence, divergence
from tilejit.ir.expr import Expr, Var, int_value, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Atomic, Body, For, Load, LoopKind, Node, OneThread, Store, walk
from tilejit.ir.sync import Control, ControlOp
from tilejit.ops.copy import Copy, Fill, is_bulk_store
from tilejit.ops.gemm import Gemm

# A private array up to this many elements that is indexed by a runtime value is still kept in
# registers and selected from; beyond it goes to local memory.
SELECT_LIMIT = 8
UNROLL_LIMIT = 64


@dataclass(frozen=True)
class Facts:
    """threads: user threads of a block; in_memory: private arrays that live in local memory;
    unrolled: variables of loops that are unrolled where they are emitted; read: memory that threads
    read themselves, unlike the sources of bulk copies and of warpgroups' multiplies; is_dependent:
    kernels before this one may still run when it starts; quick: what one thread sends by bulk
    copies amid a loop, while others wait for it to go on."""

    aliases: Aliases
    divergence: Divergence
    in_memory: frozenset[Buffer]
    unrolled: frozenset[Var]
    read: frozenset[Buffer]
    is_dependent: bool = False
    quick: frozenset[OneThread] = frozenset()


def facts(kernel: Kernel) -> Facts:
    unrolled = _unrolled_loops(kernel)
    in_memory = set()
    for buffer, at in _private_accesses(kernel.body):
        root = buffer.root
        free = {v for e in at for v in variables(e)} - unrolled
        if free and root.extents and _elements(root) > SELECT_LIMIT:
            in_memory.add(root)
    aliases = Aliases(kernel)
    nodes = list(walk(kernel.body))
    read = {aliases.of(b) for n in nodes if not _is_async(n) for b in n.reads}
    return Facts(
        aliases,
        divergence(kernel),
        frozenset(in_memory),
        frozenset(unrolled),
        frozenset(read),
        any(isinstance(n, Control) and n.op is ControlOp.DEPENDENCY_WAIT for n in nodes),
        frozenset(_quick(nodes)),
    )


def _quick(nodes: Sequence[Node]) -> Iterator[OneThread]:
    for loop in nodes:
        if isinstance(loop, For) and loop.kind is not LoopKind.TILES:
            for node in walk(loop.body):
                if isinstance(node, OneThread) and all(map(is_bulk_store, node.body)):
                    yield node


def _is_async(node: Node) -> bool:
    """True for what reads shared memory by itself, after threads have met."""
    return node.is_async if isinstance(node, Gemm) else isinstance(node, Copy) and node.is_tma


def _elements(buffer: Buffer) -> int:
    size = 1
    for extent in buffer.extents:
        size *= extent
    return size


def trip_count(node: For) -> int | None:
    """Iterations of a loop with constant bounds."""
    start, stop = int_value(node.start), int_value(node.stop)
    if start is None or stop is None:
        return None
    return len(range(start, stop, node.step))


def _unrolled_loops(kernel: Kernel) -> set[Var]:
    """Loops written as T.unroll or T.vectorized, and short ones that index registers."""
    result: set[Var] = set()
    for node in walk(kernel.body):
        if not isinstance(node, For):
            continue
        count = trip_count(node)
        if count is None:
            continue
        if (
            node.kind is LoopKind.VECTORIZED
            or (node.kind is LoopKind.UNROLL and node.unroll_factor is None)
            or (count <= UNROLL_LIMIT and _indexes_registers(node))
        ):
            result.add(node.var)
    return result


def _indexes_registers(loop: For) -> bool:
    for node in walk(loop.body):
        if isinstance(node, Load | Store | Atomic):
            if node.buffer.scope in (Scope.FRAGMENT, Scope.LOCAL):
                if any(loop.var in variables(e) for e in node.index):
                    return True
        elif isinstance(node, Copy):
            for region in (node.src, node.dst):
                if region.buffer.scope in (Scope.FRAGMENT, Scope.LOCAL):
                    if any(loop.var in variables(e) for e in region.starts):
                        return True
        elif isinstance(node, Fill) and node.dst.buffer.scope in (Scope.FRAGMENT, Scope.LOCAL):
            if any(loop.var in variables(e) for e in node.dst.starts):
                return True
    return False


def _private_accesses(body: Body) -> list[tuple[Buffer, Sequence[Expr]]]:
    result: list[tuple[Buffer, Sequence[Expr]]] = []
    for node in walk(body):
        if isinstance(node, Load | Store | Atomic) and node.buffer.scope is Scope.LOCAL:
            result.append((node.buffer, node.index))
        elif isinstance(node, Copy):
            for region in (node.src, node.dst):
                if region.buffer.scope is Scope.LOCAL:
                    result.append((region.buffer, region.starts))
        elif isinstance(node, Fill) and node.dst.buffer.scope is Scope.LOCAL:
            result.append((node.dst.buffer, node.dst.starts))
    return result
