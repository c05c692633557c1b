"""Which nodes of a loop run an iteration ahead, around exchanges between the blocks of a cluster.

Knows what nodes use and change, and when what is sent may be taken. Does not know how slots are
filled, nor who fills them.

What a block sends takes its time to arrive, and blocks are not equally fast. So the nodes of an
iteration are parted in two, as those around multiplies are (`overlap`): what makes and sends a tile
runs ahead, and what takes it, with all that needs it, comes a round later. A round sends for the
next iteration first and takes for its own last, so that an exchange has a whole round.

Fragments that both parts use are two: the part that runs ahead has its own, which goes to the
other's registers when that part is done with them. Of tiles in shared memory that each iteration
fills anew there are two as well, which iterations use in turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Scope, whole
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Let,
    Load,
    Node,
    Parallel,
    Store,
    While,
    all_reads,
    all_writes,
    walk,
)
from tilejit.ir.rounds import Rounds
from tilejit.ir.substitution import rebuffered
from tilejit.isa.atom import CopyAtom, CopyMethod
from tilejit.ops.cluster import ClusterExchange
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import Gemm
from tilejit.ops.reduce import Reduce, Step
from tilejit.ops.scan import Scan
from tilejit.passes.exchange import FEWEST_STAGES, sends_ahead
from tilejit.passes.overlap import SPARE_REGISTERS, Overlap, with_followers
from tilejit.passes.pressure import fills, made_anew, most_words
from tilejit.passes.registers import launch_registers

MORE_WORDS = 4  # of a thread, which a round of two parts may take beyond one of a single part
_KNOWN = (
    Let, Load, Store, Atomic, Copy, Fill, Gemm, Parallel, Reduce, Scan, ClusterExchange, If, For,
    While,
)  # fmt: skip
_SLOTTED = (Load, Store, Copy, Fill)  # what can be pointed at one of two tiles


def exchanged(nodes: Body) -> list[ClusterExchange]:
    """The exchanges among a loop's nodes and in them."""
    return [n for n in walk(nodes) if isinstance(n, ClusterExchange) and n.step is not Step.SEND]


def around_exchanges(loop: For, nodes: Body, slots: int, kernel: Kernel) -> Overlap | str:
    """How rounds of a loop overlap around its exchanges, or why they do not.

    nodes: of the loop's body, besides those that fill slots. slots: of what is brought, or would
    be. Needs: layouts, exchanges' steps.
    """
    if slots < FEWEST_STAGES:
        return f"they need {FEWEST_STAGES} slots"
    if loop.order:
        return "it has an order by hand"
    other = next((n for n in walk(nodes) if not isinstance(n, _KNOWN)), None)
    if other is not None or any(isinstance(n, Gemm) and n.is_async for n in nodes):
        return "it orders asynchronous work or threads itself"
    exchanges = [n for n in walk(nodes) if isinstance(n, ClusterExchange)]
    if not all(n in nodes and sends_ahead(n) for n in exchanges):
        return "they stand in a branch or loop, or their tiles are large"
    overlap = _Parting(nodes, kernel, _pairs(loop, nodes, kernel)).run()
    if isinstance(overlap, Overlap) and not _fits(overlap, loop, nodes, kernel):
        return "registers are too few for two rounds' values"
    return overlap


def with_moved(kernel: Kernel, overlap: Overlap) -> Kernel:
    """The kernel with the layouts of fragments that are of the part ahead."""
    fresh = {b: kernel.fragments[old] for old, b in overlap.moved.items()}
    return replace(kernel, fragments={**kernel.fragments, **fresh})


def _fits(overlap: Overlap, loop: For, nodes: Body, kernel: Kernel) -> bool:
    """Whether the values of two rounds take no more registers than there are, or hardly more than
    those of one."""
    own = most_words(nodes, loop, kernel)
    both = most_words([n for n, _ in overlap.order], loop, with_moved(kernel, overlap))
    threads = kernel.num_threads * kernel.given.min_blocks
    return both <= max(launch_registers(threads) - SPARE_REGISTERS, own + MORE_WORDS)


def _pairs(loop: For, nodes: Body, kernel: Kernel) -> set[Buffer]:
    """Tiles in shared memory of which there may be two: each iteration fills them anew before it
    uses them, and nothing else does."""
    inside = {id(n) for n in walk(loop.body)}
    outside = {b.root for n in walk(kernel.body) if id(n) not in inside for b in _used(n)}
    viewed = {b.root for b in kernel.buffers if b.is_view}
    fixed = {b.root for n in walk(nodes) if not isinstance(n, _SLOTTED) for b in _used(n)}
    found: set[Buffer] = set()
    for buffer in kernel.shared.keys() - outside - viewed - fixed - kernel.slots.keys():
        using = [n for n in nodes if any(b.root is buffer for m in walk((n,)) for b in _used(m))]
        if using and buffer in _made(using[0], {buffer}):
            found.add(buffer)
    return found


def _used(node: Node) -> tuple[Buffer, ...]:
    """What the node itself reads and writes, without what is in it."""
    return (*node.reads, *node.writes)


def _made(node: Node, shared: Collection[Buffer]) -> set[Buffer]:
    """Fragments, and some tiles in shared memory, of which a node surely writes every element
    without reading any."""
    written = {b for b in all_writes(node) - all_reads(node) if b in shared}
    return made_anew(node) | {b for b in written if fills(node, b)}


class _Parting:
    """Parts the nodes of an iteration in two: of a round, those ahead come first.

    pairs: tiles in shared memory of which there may be two.
    """

    def __init__(self, nodes: Body, kernel: Kernel, pairs: Collection[Buffer]) -> None:
        self.rounds = Rounds(nodes, Aliases(kernel))
        self.nodes = self.rounds.nodes
        steps = [n for n in nodes if isinstance(n, ClusterExchange)]
        # what goes through slots of its own is no matter of order
        self.kept_apart = {b.root for n in steps for b in (n.scratch, n.barrier) if b is not None}
        used = [b for n in walk(nodes) for b in _used(n)]
        viewed = {b.root for b in used if b is not b.root}
        self.fragments = [
            b
            for b in dict.fromkeys(used)
            if b.scope is Scope.FRAGMENT and b is b.root and b not in viewed
        ]
        self.pairs = [b for b in dict.fromkeys(used) if b in pairs]
        self.twofold = {*self.fragments, *self.pairs}
        self.made = {n: _made(n, self.pairs) for n in nodes}
        self.sources = {n: self._sources(n) for n in nodes}

    def run(self) -> Overlap | str:
        late = self.late()
        ahead = [n for n in self.nodes if n not in late]
        if not any(isinstance(n, ClusterExchange) for n in ahead):
            return "what they send depends on what they give, or both use the same memory"
        repeated = self.rounds.repeated(late)
        last = [n for n in self.nodes if n in late or n in repeated]
        both = self.written(ahead) & self.touched(late)
        moved = {b: replace(b, name=f"{b.name}_next") for b in self.fragments if b in both}
        pairs = tuple(b for b in self.pairs if b in both)
        kept = [old for old in moved if self.is_found(old, last)]
        begun = [old for old in moved if self.is_found(old, ahead)]
        order = [
            *((n, True) for n in rebuffered(ahead, moved)),
            *((n, False) for n in last),
            *((_copy(moved[old], old), True) for old in kept),
        ]
        before = tuple(_copy(old, moved[old]) for old in begun)
        return Overlap(tuple(order), moved, before, pairs)

    def late(self) -> set[Node]:
        """What takes tiles, and what cannot run before that."""
        steps = (n for n in self.nodes if isinstance(n, ClusterExchange))
        seeds = {n for n in steps if n.step is Step.TAKE}
        return with_followers(seeds, self.nodes, self.follows)

    def follows(self, node: Node, late: Node) -> bool:
        """Whether a node cannot come an iteration ahead of a late one: it uses what that one makes,
        or makes anew what that one still uses and there can be no two of."""
        rounds = self.rounds
        if late in self.sources[node] or rounds.uses[node] & set(late.defines):
            return True
        if set(node.defines) & rounds.uses[late] and not rounds.is_repeatable(node):
            return True
        reads, writes = rounds.reads[node], rounds.writes[node]
        hazards = writes & self.touched([late]) | reads & rounds.writes[late]
        if hazards - self.twofold - self.kept_apart:
            return True
        is_after = rounds.place[node] > rounds.place[late]
        return is_after and bool(writes & self.touched([late]) & self.twofold)

    def written(self, nodes: Iterable[Node]) -> set[Buffer]:
        return {b for n in nodes for b in self.rounds.writes[n]}

    def touched(self, nodes: Iterable[Node]) -> set[Buffer]:
        return {b for n in nodes for b in self.rounds.reads[n] | self.rounds.writes[n]}

    def _sources(self, node: Node) -> set[Node]:
        """The nodes that make what the node finds in registers or tiles of which there are two, in
        its iteration or in the one before."""
        place = self.rounds.place[node]
        earlier = [*reversed(self.nodes[:place]), *reversed(self.nodes[place:])]
        found: set[Node] = set()
        for buffer in self.touched([node]) & self.twofold - self.made[node]:
            for other in earlier:
                if buffer in self.rounds.writes[other]:
                    found.add(other)
                if buffer in self.made[other]:
                    break
        return found

    def is_found(self, buffer: Buffer, nodes: Sequence[Node]) -> bool:
        """Whether the first of the nodes that touches a fragment needs what it holds."""
        first = next(n for n in nodes if buffer in self.touched([n]))
        return buffer not in self.made[first]


def _copy(source: Buffer, target: Buffer) -> Copy:
    atom = CopyAtom(CopyMethod.REGISTERS, 1)
    return Copy(src=whole(source), dst=whole(target), atom=atom, span=target.span)
