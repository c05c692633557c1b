"""Chooses how each tile op is done: the Atom of every copy and matrix multiply.

Knows op kinds, dtypes, alignment and which instructions a target has. Does not know layouts of
buffers, pipelines or PTX.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

from tilejit.dtypes import bool_, int32
from tilejit.errors import TraceError, UnsupportedError
from tilejit.ir.analysis import divisor
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.divergence import Divergence, divergence
from tilejit.ir.expr import (
    Expr,
    Var,
    VarKind,
    binary,
    const,
    index,
    int_value,
    is_const,
    variables,
)
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    If,
    Load,
    LoopKind,
    Node,
    Parallel,
    Roles,
    Store,
    While,
    walk,
)
from tilejit.ir.parts import part_kernel
from tilejit.ir.sync import SyncThreads
from tilejit.isa.atom import CopyAtom, CopyMethod, GemmAtom, MmaInstruction, WgmmaAtom
from tilejit.isa.mma import MMA, WARP, find_mma
from tilejit.ops.cluster import ClusterExchange, ClusterGather, ClusterReduce, ClusterScatter
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.elementwise import as_loops, as_parallel, is_private
from tilejit.ops.gemm import Gemm, GemmWait, GemmWarpPolicy
from tilejit.ops.reduce import Reduce
from tilejit.ops.scan import Scan
from tilejit.passes.bulk import refused, whole_copy
from tilejit.passes.hopper import Bringable, brings, copies_to_bring
from tilejit.passes.manual import (
    Executing,
    bulk_copy,
    check_needs,
    is_aligned,
    spelling,
    started_multiply,
    with_meetings,
)
from tilejit.passes.own import own_tiles
from tilejit.passes.reduce import combined_in_fragment, in_fragments, shared_scratch
from tilejit.passes.rows import used_by_rows
from tilejit.passes.scan import in_parts
from tilejit.passes.tma import same_bits
from tilejit.target import Feature, Target

WIDEST_COPY = 16  # bytes of one cp.async (PTX ISA, "cp.async")


def select_atoms(kernel: Kernel, target: Target) -> Kernel:
    """Decide the atom of every Gemm and Copy; make explicit what one thread does for all.

    Needs: shapes and dtypes. Decides: `target`, `node.atom`. Also gives loops that fill one tile a
    tile each, turns a fragment operand that no instruction takes into a copy through shared
    memory, and an atomic whose old value all threads use into one thread's work and a broadcast.
    Raises UnsupportedError if an op has no candidate, TraceError for a tile op in a branch that
    not all threads take.
    """
    return Selection(kernel, target).of(kernel.threads)


class Selection:
    """Atoms of a kernel for any number of threads: what does not depend on these is found once.

    Raises:
        UnsupportedError: the target lacks what the kernel asks for by name.
    """

    def __init__(self, kernel: Kernel, target: Target) -> None:
        check_needs(kernel, target)
        self.target = target
        self.kernel = own_tiles(kernel, target)
        self.used = _used_variables(self.kernel.body)
        self.by_rows = used_by_rows(self.kernel.body)

    @cached_property
    def _divergence(self) -> Divergence:
        return divergence(self.kernel)

    @cached_property
    def _bringable(self) -> Bringable:
        return Bringable(self.kernel)

    def of(self, threads: tuple[int, int, int]) -> Kernel:
        """The kernel with so many threads and its atoms; see `select_atoms`."""
        kernel = self.kernel
        if threads != kernel.threads:
            kernel = replace(kernel, threads=threads)
        kernel = with_meetings(_with_thread_vars(kernel))
        if any(isinstance(n, Roles) for n in walk(kernel.body)):  # of some of the threads
            selector = _Selector(kernel, self.target, divergence(kernel), self, None)
        else:
            varying = self._divergence.vars.union(kernel.thread_vars)
            known = self._bringable if brings(self.target) else None
            state = replace(self._divergence, vars=varying)
            selector = _Selector(kernel, self.target, state, self, known)
        body = selector.visit(kernel.body, is_divergent=False, is_pipelined=False)
        return replace(
            kernel,
            target=self.target,
            body=(*selector.first, *body),
            notes=(*kernel.notes, *dict.fromkeys(selector.notes)),
        )


def _with_thread_vars(kernel: Kernel) -> Kernel:
    """All three threadIdx variables, named or not, so that passes can test for the first thread."""
    missing = tuple(
        Var(f"t{'xyz'[d]}", int32, VarKind.THREAD, index(0), index(kernel.threads[d] - 1))
        for d in range(len(kernel.thread_vars), 3)
    )
    return replace(kernel, thread_vars=(*kernel.thread_vars, *missing))


class _Selector:
    def __init__(
        self,
        kernel: Kernel,
        target: Target,
        divergence: Divergence,
        selection: Selection,
        known: Bringable | None,
    ) -> None:
        self.kernel = kernel
        self.target = target
        self.threads = kernel.num_threads
        self.divergence = divergence
        self.notes: list[str] = []
        self.first: list[Node] = []  # what the kernel begins with
        self.used = selection.used
        self.by_rows = selection.by_rows
        self.brought = copies_to_bring(kernel, target, known=known)
        self.executing = Executing(kernel, self.divergence)

    def visit(self, body: Body, *, is_divergent: bool, is_pipelined: bool) -> Body:
        result: list[Node] = []
        for node in body:
            done = len(result)
            if is_divergent and needs_all_threads(node):
                raise TraceError(
                    f"{_spelling(node)} needs {self.executing.words}, but it stands in a branch "
                    "or loop that not all of them take.",
                    span=node.span,
                    hint="Move it out, or make the condition the same for all of them.",
                )
            if isinstance(node, Parallel):
                result.append(node)
            elif isinstance(node, Copy | Fill) and is_private(node):
                result += as_loops(node)
            elif isinstance(node, Roles):
                result.append(self.roles(node))
            elif isinstance(node, Copy) and node.is_async:
                result += bulk_copy(node, self.kernel, self.executing)
            elif isinstance(node, Copy):
                result += self.copy(node, is_pipelined)
            elif isinstance(node, Gemm):
                result += self.gemm(node)
            elif isinstance(node, Reduce | ClusterGather | ClusterScatter):
                result += in_fragments(node)
            elif isinstance(node, Scan):
                nodes, note = in_parts(node, self.threads)
                result += nodes
                self.notes.append(note)
            elif isinstance(node, ClusterReduce):
                result += combined_in_fragment(node)
            elif isinstance(node, Atomic):
                result += self.atomic(node, is_divergent)
            else:
                inner: list[Body] = []
                for number, child in enumerate(node.bodies):
                    with self.executing.inside(node, number):
                        inner.append(
                            self.visit(
                                child,
                                is_divergent=is_divergent or self.splits(node),
                                is_pipelined=isinstance(node, For)
                                and node.kind is LoopKind.PIPELINED,
                            )
                        )
                node = one_at_a_time(node.with_bodies(*inner))
                result += self.executing.after_branch(node)
            if node.schedule is not None:
                result[done:] = [replace(n, schedule=node.schedule) for n in result[done:]]
        return tuple(result)

    def roles(self, node: Roles) -> Node:
        """Each role's body as that of a kernel with the role's threads."""
        bodies: list[Body] = []
        before = self.kernel, self.threads, self.brought, self.executing
        refuse_in_roles(node)
        for role in node.roles:
            self.threads = role.threads
            self.executing = before[3].of(role)
            part = replace(part_kernel(before[0], role), body=role.body)
            self.brought = copies_to_bring(part, self.target, "the block's warpgroups have roles")
            bodies.append(self.visit(role.body, is_divergent=False, is_pipelined=False))
        self.kernel, self.threads, self.brought, self.executing = before
        return node.with_bodies(*bodies)

    def splits(self, node: Node) -> bool:
        """True when threads may go different ways through the node's bodies."""
        return isinstance(node, If | While | For) and self.divergence.of(node.exprs)

    # ---- copies -----------------------------------------------------------------------------

    def copy(self, node: Copy, is_pipelined: bool) -> list[Node]:
        if node in self.brought.copies:
            return [replace(node, atom=CopyAtom(CopyMethod.TMA, 0))]
        if node.combine is not None:
            return self.addition(node)
        is_epilogue = node.src.buffer.scope is Scope.FRAGMENT
        if node.prefer == "tma" and not (is_epilogue and self.brought.copies):
            if self.brought.copies:
                reason = self.brought.reasons.get(node) or "no producer brings it"
                raise refused(node, reason, self.kernel)
            nodes, first = whole_copy(node, self.kernel, self.target)
            self.first += first
            return nodes
        if node in self.brought.others:
            self.notes.append(
                f"copy {node.src.buffer.name} -> {node.dst.buffer.name}: by the block's threads, "
                f"not TMA ({self.brought.reasons[node]})"
            )
            return [replace(node, atom=CopyAtom(CopyMethod.REGISTERS, 1))]
        chosen = replace(node, atom=self.copy_atom(node, is_pipelined))
        if node.eviction is not None and not (is_epilogue and self.brought.copies):
            name = f"{node.src.buffer.name} -> {node.dst.buffer.name}"
            self.notes.append(f"copy {name}: eviction_policy is not used by {chosen.atom}")
        return [chosen]

    def addition(self, node: Copy) -> list[Node]:
        """A copy that adds: the warpgroups' strips, one bulk copy, or each thread's elements."""
        if node.src.buffer.scope is Scope.FRAGMENT and self.brought.copies:
            return [replace(node, atom=CopyAtom(CopyMethod.REGISTERS, 1))]
        if node.prefer != "tma":
            loop = as_parallel(node)
            assert loop is not None, node
            return [loop]
        if self.brought.copies:
            raise refused(node, "the kernel's stores are its warpgroups'", self.kernel)
        nodes, _ = whole_copy(node, self.kernel, self.target)
        return nodes

    def copy_atom(self, node: Copy, is_pipelined: bool) -> CopyAtom:
        source, target = node.src.buffer, node.dst.buffer
        why_not_tma = self.brought.reasons.get(node, "")
        vector = self._async_vector(node, self._row_align(target)) if is_pipelined else 0
        is_narrow = is_pipelined and vector < self._async_vector(node, WIDEST_COPY)
        if vector:
            name, size = f"copy {source.name} -> {target.name}", vector * source.dtype.bytes
            if why_not_tma:
                self.notes.append(f"{name}: cp.async, not TMA ({why_not_tma})")
            if is_narrow:
                why = self.kernel.given.why_not(target)
                self.notes.append(f"{name}: cp.async of {size} bytes each ({why})")
            return CopyAtom(CopyMethod.CP_ASYNC, vector)
        if is_pipelined and source.scope is Scope.GLOBAL and target.scope is Scope.SHARED:
            tma = f"; not TMA ({why_not_tma})" if why_not_tma else ""
            self.notes.append(
                f"copy {source.name} -> {target.name}: through registers, not asynchronous "
                f"({self.kernel.given.why_not(target) if is_narrow else self._why_not_async(node)})"
                f"{tma}"
            )
        return CopyAtom(CopyMethod.REGISTERS, 1)

    def _row_align(self, target: Buffer) -> int:
        """What the bytes from one row to the next are a multiple of, where that is given."""
        given = self.kernel.given.layouts.get(target)
        if given is None:
            return WIDEST_COPY
        return math.gcd(given.layout.pitch * target.dtype.bytes, WIDEST_COPY)

    def _async_vector(self, node: Copy, most: int) -> int:
        """Elements of one cp.async of at most so many bytes, 0 when it cannot do the copy."""
        source, target = node.src.buffer, node.dst.buffer
        if (source.scope, target.scope) != (Scope.GLOBAL, Scope.SHARED):
            return 0
        if source.dtype.bytes != target.dtype.bytes or not same_bits(source, target):
            return 0
        if not self.target.has(Feature.CP_ASYNC) or not node.src.shape or node.prefer == "sync":
            return 0
        if node.pad is not None and not is_const(node.pad, 0):
            return 0
        if source.rank - 1 in node.src.dropped or target.rank - 1 in node.dst.dropped:
            return 0
        for size in (s for s in (WIDEST_COPY, 8, 4) if s <= most):
            vector = size // source.dtype.bytes
            if vector and self._fits(node, vector):
                return vector
        return 0

    def _fits(self, node: Copy, vector: int) -> bool:
        source, target = node.src.buffer, node.dst.buffer
        known = self.kernel.multiples
        size = vector * source.dtype.bytes
        if node.coalesced_width and vector > node.coalesced_width:
            return False
        if node.src.shape[-1] % vector or max(source.align, source.dtype.bytes) % size:
            return False
        for buffer, region in ((source, node.src), (target, node.dst)):
            strides = buffer.element_strides
            if int_value(strides[-1]) != 1 or divisor(region.starts[-1], known) % vector:
                return False
            if buffer.scope is Scope.GLOBAL or buffer.strides is not None:
                if any(divisor(s, known) % vector for s in strides[:-1]):
                    return False
            if buffer.scope is Scope.SHARED and divisor(buffer.shape[-1]) % vector:
                return False
            if divisor(buffer.offset, known) % vector:
                return False
        return True

    def _why_not_async(self, node: Copy) -> str:
        if not same_bits(node.src.buffer, node.dst.buffer):
            return f"it converts {node.src.buffer.dtype} to {node.dst.buffer.dtype}"
        return "rows are not provably aligned to 4, 8 or 16 bytes"

    # ---- matrix multiply --------------------------------------------------------------------

    def gemm(self, node: Gemm) -> list[Node]:
        name = f"gemm {node.a.buffer.name} @ {node.b.buffer.name} -> {node.acc.buffer.name}"
        if node.is_async:
            started = started_multiply(node, self.kernel, self.target, self.threads)
            assert isinstance(started.atom, WgmmaAtom), "warpgroups multiply it"
            self._note_gemm(name, started.atom, [])
            return [started]
        wgmma = self.brought.gemms.get(node)
        if wgmma is not None:
            self._note_gemm(name, wgmma, [])
            held = [r.buffer for r in (node.a, node.acc) if r.buffer.scope is Scope.FRAGMENT]
            wait = GemmWait(pending=0, registers=tuple(dict.fromkeys(held)), span=node.span)
            return [replace(node, atom=wgmma, is_async=True), wait]
        atom, reasons = choose_gemm(
            node, self.target, self.threads, by_rows=node.acc.buffer in self.by_rows
        )
        reasons = [*self.brought.gemm_reasons.get(node, ()), *reasons]
        copies = self.operand_copies(node) if atom.mma is None else {}
        for side, region in (("a", node.a), ("b", node.b)):
            copied = copies.get(region.buffer)
            if copied is not None:
                node = node.with_operand(side, replace(region, buffer=copied.dst.buffer))
        self.notes += [f"{name}: {b.name} goes through shared memory" for b in copies]
        self._note_gemm(name, atom, reasons)
        return [*copies.values(), replace(node, atom=atom)]

    def _note_gemm(self, name: str, atom: GemmAtom | WgmmaAtom, reasons: list[str]) -> None:
        self.notes.append(f"{name}: {atom}" + "".join(f"; not {r}" for r in reasons))

    def operand_copies(self, node: Gemm) -> dict[Buffer, Copy]:
        """Copies of the operands that are fragments to shared memory."""
        return {
            region.buffer: Copy(
                src=region,
                dst=replace(region, buffer=shared_scratch(region.buffer)),
                atom=CopyAtom(CopyMethod.REGISTERS, 1),
                span=node.span,
            )
            for region in (node.a, node.b)
            if region.buffer.scope is Scope.FRAGMENT
        }

    # ---- atomics ----------------------------------------------------------------------------

    def atomic(self, node: Atomic, is_divergent: bool) -> list[Node]:
        """An atomic executed once a block whose old value every thread may use."""
        if node.out is None or is_divergent or self.divergence.of(node.exprs):
            return [node]
        if node.out not in self.used:
            return [replace(node, out=None)]
        scratch = Buffer(
            name="previous", shape=(index(1),), dtype=node.buffer.dtype, scope=Scope.SHARED
        )
        old = Var(node.out.name, node.out.dtype, VarKind.VALUE)
        thread = self.first_thread()
        keep = Store(buffer=scratch, index=(index(0),), value=old, span=node.span)
        return [
            If(condition=thread, then=(replace(node, out=old), keep), span=node.span),
            Load(out=node.out, buffer=scratch, index=(index(0),), span=node.span),
        ]

    def first_thread(self) -> Expr:
        condition: Expr = const(True, bool_)
        first = self.executing.role.first  # roles are of blocks with threads along x
        for var, number in zip(self.kernel.thread_vars, (first, 0, 0), strict=False):
            condition = binary("and", condition, binary("eq", var, const(number, var.dtype)))
        return condition


def needs_all_threads(node: Node) -> bool:
    """True for tile ops, whose work is shared by the block's threads."""
    if isinstance(node, Copy | Fill):
        is_started = isinstance(node, Copy) and node.is_async
        return not is_private(node) and not is_started
    if isinstance(node, SyncThreads):
        return node.number is None
    kinds = Gemm | GemmWait | Parallel | Reduce | Scan | ClusterExchange
    return isinstance(node, kinds) or is_aligned(node)


def one_at_a_time(node: Node) -> Node:
    """A vectorized loop of tile ops as an unrolled one: threads may have to meet between them, and
    nothing is left to make wider."""
    if isinstance(node, For) and node.kind is LoopKind.VECTORIZED:
        if any(needs_all_threads(n) for n in walk(node.body)):
            return replace(node, kind=LoopKind.UNROLL)
    return node


def refuse_in_roles(node: Roles) -> None:
    """
    Raises:
        TraceError: a role's threads would meet those of other blocks without the block's others.
    """
    for inner in walk((node,)):
        if isinstance(inner, ClusterExchange):
            raise TraceError(
                f"{inner.call} needs all threads of the block, but it stands in a T.ws.",
                span=inner.span,
                hint="Move it out of the T.ws.",
            )


def _spelling(node: Node) -> str:
    names = {Copy: "T.copy", Fill: "T.fill", Gemm: "T.gemm", Parallel: "T.Parallel",
             GemmWait: "T.wait_wgmma", SyncThreads: "T.sync_threads"}  # fmt: skip
    if isinstance(node, Gemm) and node.is_async:
        return "T.wgmma_gemm"
    if isinstance(node, Reduce):
        return f"T.reduce_{node.kind}"
    if isinstance(node, Scan | ClusterExchange):
        return node.call
    return names.get(type(node)) or spelling(node)


def choose_gemm(
    node: Gemm, target: Target, threads: int, *, by_rows: bool = False
) -> tuple[GemmAtom, list[str]]:
    """The atom of a tile multiply, and why faster ones were passed over.

    by_rows: rows should be in one warp, where the user does not say how warps share the tile.
    """
    if by_rows and node.policy is GemmWarpPolicy.Square:
        node = replace(node, policy=GemmWarpPolicy.FullRow)
    a, b, acc = node.a.buffer.dtype, node.b.buffer.dtype, node.acc.buffer.dtype
    reasons: list[str] = []
    candidates = find_mma(a, b, acc, target)
    for mma in candidates:
        reason = _misfit(node, mma, threads)
        split = warp_split(node, mma, threads // WARP) if not reason else None
        if split is not None:
            return GemmAtom(mma, *split), reasons
        reasons.append(f"{mma.name} ({reason or 'no split of the warps fits the tile'})")
    if not candidates:
        reasons += [
            f"{mma.name} (needs {', '.join(sorted(mma.needs))}, which {target} lacks)"
            for mma in MMA
            if (mma.a, mma.b, mma.acc) == (a, b, acc)
        ]
    if acc.is_integer and not (a.is_integer and b.is_integer):
        raise UnsupportedError(
            f"T.gemm: nothing on {target} multiplies {a} and {b} tiles into {acc}.",
            span=node.span,
            notes=reasons,
        )
    return GemmAtom(None, 1, 1), reasons


def _misfit(node: Gemm, mma: MmaInstruction, threads: int) -> str:
    if threads % WARP:
        return f"{threads} threads are not whole warps"
    tile = f"the tile is {node.m}x{node.n}x{node.k}"
    if node.m % mma.m or node.n % mma.n or node.k % mma.k:
        return f"{tile}, not a multiple of {mma.m}x{mma.n}x{mma.k}"
    return ""


def warp_split(node: Gemm, mma: MmaInstruction, warps: int) -> tuple[int, int] | None:
    """How many warps go along m and n: all of them if the tile can be cut so, each then loading
    as few operand rows as possible; else as many as divide it, the others doing the same work."""
    best: tuple[tuple[int, int, int], tuple[int, int]] | None = None
    for down in range(1, warps + 1):
        for across in range(1, warps // down + 1):
            if warps % (down * across):
                continue
            if node.m % (mma.m * down) or node.n % (mma.n * across):
                continue
            if node.policy is GemmWarpPolicy.FullRow:
                preference = -down
            elif node.policy is GemmWarpPolicy.FullCol:
                preference = -across
            else:
                preference = 0
            rows, columns = node.m // down, node.n // across
            odd = (columns // mma.n) % 2  # pairs of instructions share one ldmatrix
            cost = (-down * across, preference, 2 * (rows + columns) + odd)
            if best is None or cost < best[0]:
                best = (cost, (down, across))
    return best[1] if best else None


def _used_variables(body: Body) -> set[Var]:
    return {v for node in walk(body) for e in node.exprs for v in variables(e)}
