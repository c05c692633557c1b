"""Decides where every fragment's elements and every shared buffer's bytes lie.

Knows what atoms ask for and how layouts spread through elementwise loops. Does not know PTX,
pipelines or offsets in shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tilejit.errors import ResourceError
from tilejit.ir.access import local_registers
from tilejit.ir.aliases import Aliases
from tilejit.ir.buffer import Buffer, Region, Scope, whole
from tilejit.ir.expr import Expr, Var, const, int_value, substitute, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.loops import accesses, layout_from_fragments, loop_layout, loop_vector
from tilejit.ir.node import (
    Atomic,
    Body,
    For,
    Load,
    Node,
    Parallel,
    Store,
    all_reads,
    all_writes,
    walk,
)
from tilejit.ir.parts import each_part
from tilejit.isa.atom import CopyAtom, CopyMethod, GemmAtom, WgmmaAtom
from tilejit.layout.boxes import BOX_ALIGN, boxed_layout, operand_layout
from tilejit.layout.fragment import FragmentLayout, blocked, replicated
from tilejit.layout.reduction import spread
from tilejit.layout.shared import SharedLayout
from tilejit.layout.trade import before_trade, quad_trade
from tilejit.ops.cluster import ClusterGather
from tilejit.ops.copy import Copy
from tilejit.ops.elementwise import as_parallel
from tilejit.ops.gemm import Gemm, GemmWait, acc_layout, held_operands
from tilejit.ops.reduce import Reduce
from tilejit.passes.reduce import (
    axis_of,
    note_of,
    parts_at_once,
    result_layout,
    shared_scratch,
    stands_alone,
    with_scratch,
)
from tilejit.passes.registers import MAX_WORDS
from tilejit.passes.scan import scan_layouts, scan_scratch
from tilejit.passes.wgmma import warpgroup_layout


def infer_layouts(kernel: Kernel) -> Kernel:
    """Decide a layout for each fragment and shared buffer.

    Needs: atoms. Decides: `fragments`, `shared`. A fragment that is used where its layout does
    not have it is copied through shared memory by explicit nodes.
    Raises ResourceError when a fragment is too large for the registers of its threads.
    """
    kernel = each_part(kernel, _fragment_layouts)
    return replace(
        kernel, shared=_shared_layouts(kernel), notes=(*kernel.notes, *_given_notes(kernel))
    )


def _fragment_layouts(kernel: Kernel) -> Kernel:
    """The same for the fragments of one set of threads."""
    inference = _Inference(kernel)
    inference.run()
    before = kernel.fragments
    kernel = replace(
        kernel,
        fragments=inference.layouts,
        notes=(*kernel.notes, *inference.notes),
    )
    kernel = _convert_conflicts(kernel)
    _check_registers(kernel)
    return replace(kernel, fragments={**before, **kernel.fragments})


class _Inference:
    """Layouts spread from atoms outward through elementwise loops until nothing changes; then one
    undecided fragment gets a default and they spread again."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.threads = kernel.num_threads
        self.layouts: dict[Buffer, FragmentLayout] = scan_layouts(kernel.body)
        self.notes: list[str] = []
        self.loops = [loop for node in walk(kernel.body) if (loop := as_parallel(node)) is not None]
        self.gemms = [node for node in walk(kernel.body) if isinstance(node, Gemm)]
        self.reductions = [node for node in walk(kernel.body) if isinstance(node, Reduce)]
        self.results = [n for n in walk(kernel.body) if isinstance(n, Reduce | ClusterGather)]

    def run(self) -> None:
        for node in self.gemms:
            assert node.atom is not None, "select did not run"
            self.layouts.setdefault(node.acc.buffer, acc_layout(node, node.atom, self.threads))
        self.spread()
        for node in self.gemms:  # an operand that nothing else decides is laid out as asked
            for _, region, wanted in held_operands(node, self.threads):
                fits = _words(region.buffer, wanted) <= MAX_WORDS
                if fits and region.buffer not in self.layouts:
                    self.layouts[region.buffer] = wanted
                    self.spread()
        undecided = [b for b in self.kernel.scoped(Scope.FRAGMENT) if b not in self.layouts]
        last = {n.dst.buffer for n in self.results if isinstance(n, ClusterGather)}
        undecided.sort(key=lambda b: (b in last, -math.prod(b.extents), -len(b.extents)))
        for buffer in undecided:
            if buffer not in self.layouts:
                self.layouts[buffer] = self.default(buffer)
                self.spread()
        self.renumber()

    def renumber(self) -> None:
        """Number the registers of 8-bit operands as their words are made: a word of neighbours in
        another order would be put together of others' bytes."""
        results = {node.acc.buffer for node in self.gemms}
        for node in self.gemms:
            for _, region, wanted in held_operands(node, self.threads):
                buffer = region.buffer
                if buffer.dtype.bits != 8 or buffer in results:
                    continue
                for layout in (wanted, before_trade(wanted)):
                    if layout is not None and self.layouts[buffer].same_places(layout):
                        self.layouts[buffer] = layout

    def spread(self) -> None:
        """Give fragments the layout of the loops that index them, results of reductions that of
        what is reduced, and what is gathered that of the block's own part."""
        changed = True
        while changed:
            changed = False
            for loop in self.loops:
                changed |= self.spread_loop(loop)
            for node in self.results:
                found, result = result_layout(node, self.layouts), node.dst.buffer
                if found is None or result in self.layouts or _words(result, found) > MAX_WORDS:
                    continue
                if self.taken_at_once(result) is None:
                    self.layouts[result] = found
                    changed = True

    def taken_at_once(self, buffer: Buffer) -> int | None:
        """Of reductions' results that come through shared memory, and that nothing wants beside
        what was reduced: how many one load brings. None for other fragments."""
        into = [n for n in self.reductions if n.dst.buffer is buffer]
        at_once = parts_at_once(into, self.layouts)
        return at_once if at_once and stands_alone(buffer, self.kernel.body) else None

    def spread_loop(self, loop: Parallel) -> bool:
        layout = layout_from_fragments(loop, self.layouts)
        if layout is None:
            return False
        changed = False
        for _, buffer, at in accesses(loop):
            if buffer.scope is Scope.FRAGMENT and buffer not in self.layouts:
                derived = derive(layout, loop, buffer, at)
                if derived is not None:
                    self.layouts[buffer] = derived
                    changed = True
        return changed

    def default(self, buffer: Buffer) -> FragmentLayout:
        """Every element in every thread for what is only used by constant index outside loops,
        else an even spread as wide as the memory accesses around it allow."""
        shape = buffer.extents
        if at_once := self.taken_at_once(buffer):
            return blocked(shape, self.threads, math.gcd(at_once, shape[-1]))
        group = self.together(buffer)
        axis = axis_of(self.reductions, group)
        if axis is not None and shape:
            vector = math.gcd(self.vector(group), shape[-1])
            return spread(shape, self.threads, vector, axis, buffer.dtype.bytes)
        widths: list[int] = []
        is_used = False
        for loop in self.loops:
            touched = list(accesses(loop))
            reaches_memory = any(_is_common(b) for _, b, _ in touched)
            for at in (at for _, b, at in touched if b is buffer):
                is_used = True
                if not loop.vars or at[-1:] != loop.vars[-1:]:
                    widths.append(1)
                elif reaches_memory:  # others go along with any width
                    widths.append(loop_vector(loop, self.kernel))
        if not is_used:
            return replicated(shape, self.threads)
        vector = math.gcd(min(widths, default=1), shape[-1]) if shape else 1
        return blocked(shape, self.threads, max(1, vector))

    def together(self, buffer: Buffer) -> set[Buffer]:
        """The fragments that loops use element by element with this one, and so on."""
        found = {buffer}
        while self.reductions:
            alike = set(found)
            for loop in self.loops:
                used: dict[tuple[Expr, ...], set[Buffer]] = {}
                for _, b, at in accesses(loop):
                    if b.scope is Scope.FRAGMENT:
                        used.setdefault(at, set()).add(b)
                alike |= {b for same in used.values() if same & found for b in same}
            if alike == found:
                break
            found = alike
        return found

    def vector(self, group: set[Buffer]) -> int:
        """Neighbours that the accesses to memory around these fragments take at once."""
        width = 0
        for loop in self.loops:
            touched = [(b, at) for _, b, at in accesses(loop)]
            is_ours = any(
                b in group and loop.vars and at[-1:] == loop.vars[-1:] for b, at in touched
            )
            if is_ours and any(_is_common(b) for b, _ in touched):
                width = math.gcd(width, math.gcd(loop_vector(loop, self.kernel), loop.extents[-1]))
        return width or 1


def derive(
    layout: FragmentLayout, loop: Parallel, buffer: Buffer, at: Sequence[Expr]
) -> FragmentLayout | None:
    """The layout of a fragment indexed in a loop, when its index is loop variables over their
    whole extents (or 0 in a dimension of 1)."""
    keep: list[int] = []
    shape = buffer.extents
    for e, extent in zip(at, shape, strict=True):
        if isinstance(e, Var) and e in loop.vars:
            d = loop.vars.index(e)
            if loop.extents[d] != extent:
                return None
            keep.append(d)
        elif extent != 1 or int_value(e) != 0:
            return None
    if len(set(keep)) != len(keep):
        return None
    if layout.flat:
        return (
            layout if keep == list(range(len(layout.shape))) and len(shape) == len(keep) else None
        )
    projected = layout.project(keep)
    dims = iter(zip(projected.shape, projected.dims, strict=True))
    full_shape, full_dims = [], []
    for e in at:
        if isinstance(e, Var):
            n, digits = next(dims)
            full_shape.append(n)
            full_dims.append(digits)
        else:
            full_shape.append(1)
            full_dims.append(())
    return FragmentLayout(tuple(full_shape), tuple(full_dims), layout.threads)


# ---- conversions --------------------------------------------------------------------------------


def _convert_conflicts(kernel: Kernel) -> Kernel:
    """Send fragments through shared memory where a loop or operand needs them elsewhere."""
    converter = _Converter(kernel)
    body = converter.visit(kernel.body, {})
    return replace(
        kernel,
        body=body,
        fragments=converter.layouts,
        notes=(*kernel.notes, *dict.fromkeys(converter.notes)),
    )


class _Converter:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.threads = kernel.num_threads
        self.layouts = dict(kernel.fragments)
        self.notes: list[str] = []
        self.scratch: dict[Buffer, Buffer] = scan_scratch(kernel.body)
        self.aliases = Aliases(kernel)

    def visit(self, body: Body, steps: dict[Var, Sequence[int]]) -> Body:
        """steps: values of the enclosing loops that can be unrolled."""
        result: list[Node] = []
        for node in body:
            loop = as_parallel(node)
            if loop is not None:
                result += self.loop(node, loop, steps)
            elif isinstance(node, Gemm):
                result += self.gemm(node)
            elif isinstance(node, Reduce):
                result += self.reduce(node)
            elif isinstance(node, Load | Store | Atomic):
                result += self.scalar(node, steps)
            else:
                inner = dict(steps)
                if isinstance(node, For):
                    start, stop = int_value(node.start), int_value(node.stop)
                    if start is not None and stop is not None:
                        inner[node.var] = range(start, stop, node.step)
                fresh = tuple(self.visit(child, inner) for child in node.bodies)
                result.append(node.with_bodies(*fresh))
        return tuple(result)

    def scratch_of(self, buffer: Buffer) -> Buffer:
        if buffer not in self.scratch:
            self.scratch[buffer] = shared_scratch(buffer)
        return self.scratch[buffer]

    def moved(self, node: Node, buffer: Buffer, *, back: bool) -> Copy:
        """A whole-fragment copy to its scratch buffer, or back."""
        pair = [whole(buffer), whole(self.scratch_of(buffer))]
        source, target = reversed(pair) if back else pair
        return Copy(src=source, dst=target, atom=CopyAtom(CopyMethod.REGISTERS, 1), span=node.span)

    def loop(self, node: Node, loop: Parallel, steps: dict[Var, Sequence[int]]) -> list[Node]:
        local = steps | inner_steps(loop.body)
        away: dict[Buffer, None] = {}
        replaced = loop
        while more := self.elsewhere(replaced, local):  # the rest may decide another layout
            away |= dict.fromkeys(more)
            body = _redirect(replaced.body, {b: self.scratch_of(b) for b in more})
            replaced = replace(replaced, body=body)
        if not away:
            return [node]
        self.notes += [
            f"fragment {b.name} goes through shared memory for the loop at {node.span}"
            for b in away
        ]
        before = [self.moved(node, b, back=False) for b in away]
        written = {b for n, b, _ in accesses(loop) if isinstance(n, Store | Atomic)}
        after = [self.moved(node, b, back=True) for b in away if b in written]
        return [*before, replaced, *after]

    def elsewhere(self, loop: Parallel, steps: dict[Var, Sequence[int]]) -> list[Buffer]:
        """The fragments that a thread does not hold where its iterations ask for them."""
        layout = loop_layout(loop, replace(self.kernel, fragments=self.layouts))
        fragments = [(b, at) for _, b, at in accesses(loop) if b.scope is Scope.FRAGMENT]
        if layout.replicas > 1 and _is_for_one_thread(loop, self.aliases):
            return [buffer for buffer, _ in fragments]
        return [
            buffer
            for buffer, at in fragments
            if not self.is_local(self.layouts[buffer], layout, loop, at, steps)
        ]

    def is_local(
        self,
        fragment: FragmentLayout,
        layout: FragmentLayout | None,
        loop: Parallel | None,
        at: Sequence[Expr],
        steps: dict[Var, Sequence[int]],
    ) -> bool:
        """Whether the access is local for every value of the unrolled loops around it."""
        names = loop.vars if loop else ()
        free = {v for e in at for v in variables(e)} - set(names)
        if not free:
            return local_registers(fragment, layout, names, at) is not None
        if len(free) > 1 or not free <= set(steps):
            return False
        (var,) = free
        if len(steps[var]) > 64:
            return False
        return all(
            local_registers(
                fragment,
                layout,
                names,
                [substitute(e, {var: const(value, var.dtype)}) for e in at],
            )
            is not None
            for value in steps[var]
        )

    def scalar(self, node: Load | Store | Atomic, steps: dict[Var, Sequence[int]]) -> list[Node]:
        """An access outside T.Parallel: local when every thread holds the element."""
        buffer = node.buffer
        if buffer.scope is not Scope.FRAGMENT:
            return [node]
        if self.is_local(self.layouts[buffer], None, None, node.index, steps):
            return [node]
        scratch = self.scratch_of(buffer)
        self.notes.append(
            f"fragment {buffer.name} goes through shared memory for the access at {node.span}"
        )
        before = self.moved(node, buffer, back=False)
        after = [] if isinstance(node, Load) else [self.moved(node, buffer, back=True)]
        return [before, replace(node, buffer=scratch), *after]

    def gemm(self, node: Gemm) -> list[Node]:
        assert node.atom is not None
        moved: dict[Buffer, Node] = {}
        for side, region, wanted in held_operands(node, self.threads):
            buffer = region.buffer
            held = self.layouts[buffer]
            if held.same_places(wanted):
                continue
            if buffer.dtype.bits == 8 and region.is_whole and quad_trade(held, wanted):
                own = self.own(buffer, wanted, "operand")
                atom = CopyAtom(CopyMethod.QUADS, 1)
                trade = Copy(src=region, dst=whole(own), atom=atom, span=node.span)
                moved.setdefault(own, trade)
                node = node.with_operand(side, replace(region, buffer=own))
                self.notes.append(
                    f"fragment {buffer.name}: lanes of quads trade elements to be the "
                    f"{'left' if side == 'a' else 'right'} operand at {node.span}"
                )
            else:
                self.notes.append(
                    f"fragment {buffer.name} goes through shared memory to be the "
                    f"{'left' if side == 'a' else 'right'} operand at {node.span}"
                )
                moved.setdefault(buffer, self.moved(node, buffer, back=False))
                node = node.with_operand(side, replace(region, buffer=self.scratch_of(buffer)))
        result = list(moved.values())
        assert node.atom is not None
        wanted = acc_layout(node, node.atom, self.threads)
        held = self.layouts[node.acc.buffer]
        if held != wanted:
            own = self.own(node.acc.buffer, wanted, "acc")
            self.notes.append(
                f"accumulator {node.acc.buffer.name} goes through shared memory to the matrix "
                f"multiply at {node.span}"
            )
            shared = self.scratch_of(node.acc.buffer)
            fetch = self.fetched(node, node.acc.buffer, own)
            keep = replace(fetch, src=whole(own), dst=whole(shared))
            wait = GemmWait(pending=0, registers=(own,), span=node.span)
            if not node.clear:
                result += [self.moved(node, node.acc.buffer, back=False), fetch]
            moved_acc = Region(own, node.acc.starts, node.acc.extents, node.acc.dropped)
            result += [
                replace(node, acc=moved_acc),
                *([wait] if node.is_async else []),
                keep,
                self.moved(node, node.acc.buffer, back=True),
            ]
            return result
        return [*result, node]

    def reduce(self, node: Reduce) -> list[Node]:
        """A reduction of what tells its axes apart to where that leaves the results."""
        source, target = node.src.buffer, node.dst.buffer
        before: list[Node] = []
        after: list[Node] = []
        if self.layouts[source].flat:
            own = self.own(source, spread(source.extents, self.threads, 1, node.axis, 4), "axes")
            before += [self.moved(node, source, back=False), self.fetched(node, source, own)]
            node = replace(node, src=whole(own))
            self.notes.append(f"fragment {source.name} goes through shared memory for {node.span}")
        reduction = node.reduction(self.layouts[node.src.buffer])
        self.notes.append(note_of(node, reduction))
        node = with_scratch(node, reduction)
        is_there = self.layouts[target].same_places(reduction.result)
        if node.scratch is None and not is_there:  # what goes through memory is taken from there
            own = self.own(target, reduction.result, "reduced")
            if not node.clear:
                before += [self.moved(node, target, back=False), self.fetched(node, target, own)]
            shared = whole(self.scratch_of(target))
            after.append(replace(self.fetched(node, target, own), src=whole(own), dst=shared))
            after.append(self.moved(node, target, back=True))
            node = replace(node, dst=whole(own))
            self.notes.append(f"fragment {target.name} goes through shared memory for {node.span}")
        return [*before, node, *after]

    def own(self, buffer: Buffer, layout: FragmentLayout, suffix: str) -> Buffer:
        """A fragment like another one with a layout of its own."""
        fresh = replace(buffer, name=f"{buffer.name}_{suffix}")
        self.layouts[fresh] = layout
        return fresh

    def fetched(self, node: Node, buffer: Buffer, own: Buffer) -> Copy:
        """A copy from a fragment's scratch buffer to another fragment."""
        atom = CopyAtom(CopyMethod.REGISTERS, 1)
        return Copy(src=whole(self.scratch_of(buffer)), dst=whole(own), atom=atom, span=node.span)


def _is_for_one_thread(loop: Parallel, aliases: Aliases) -> bool:
    """True when threads that hold copies of an iteration must all execute it, to set a fragment,
    and cannot: a branch or inner loop changes memory that it also reads."""
    if not any(b.scope is Scope.FRAGMENT for n in walk(loop.body) for b in n.writes):
        return False
    for node in loop.body:
        if node.bodies:
            written = {aliases.of(b) for b in all_writes(node) if _is_common(b)}
            if any(aliases.of(b) in written for b in all_reads(node) if _is_common(b)):
                return True
    return False


def _is_common(buffer: Buffer) -> bool:
    """True for memory that the block's threads share."""
    return buffer.scope in (Scope.GLOBAL, Scope.SHARED)


def inner_steps(body: Body) -> dict[Var, Sequence[int]]:
    """Values of the loops with constant bounds inside a body."""
    result: dict[Var, Sequence[int]] = {}
    for node in walk(body):
        if isinstance(node, For):
            start, stop = int_value(node.start), int_value(node.stop)
            if start is not None and stop is not None:
                result[node.var] = range(start, stop, node.step)
    return result


def _redirect(body: Body, moved: dict[Buffer, Buffer]) -> Body:
    result: list[Node] = []
    for node in body:
        if isinstance(node, Load | Store | Atomic) and node.buffer in moved:
            result.append(replace(node, buffer=moved[node.buffer]))
        else:
            inner = tuple(_redirect(child, moved) for child in node.bodies)
            result.append(node.with_bodies(*inner))
    return tuple(result)


def _words(buffer: Buffer, layout: FragmentLayout) -> int:
    """32-bit registers that a thread needs for a fragment."""
    return -(-layout.registers * buffer.dtype.bytes // 4)


def _check_registers(kernel: Kernel) -> None:
    for buffer, layout in kernel.fragments.items():
        words = _words(buffer, layout)
        if words > MAX_WORDS:
            raise ResourceError(
                f"Fragment `{buffer.name}` of {'x'.join(map(str, buffer.extents))} {buffer.dtype} "
                f"needs {words} registers in each of {kernel.num_threads} threads; "
                f"{MAX_WORDS} is the most.",
                span=buffer.span,
                hint="Use a smaller tile, more threads, or alloc_shared.",
            )


# ---- shared memory ------------------------------------------------------------------------------


def _shared_layouts(kernel: Kernel) -> dict[Buffer, SharedLayout]:
    """As given; else swizzled where a matrix multiply reads it or the tensor memory accelerator
    fills it, plain rows elsewhere and under views."""
    operands: set[Buffer] = set()
    panels: set[Buffer] = set()
    boxed: set[Buffer] = set()
    halved: set[Buffer] = set()
    for node in walk(kernel.body):
        if isinstance(node, Gemm):
            operands |= {node.a.buffer, node.b.buffer}
            if isinstance(node.atom, WgmmaAtom):
                panels |= {node.a.buffer, node.b.buffer}
                halved |= {node.b.buffer} if node.atom.halved else set()
        elif isinstance(node, Copy) and node.is_tma:
            boxed |= {node.src.buffer, node.dst.buffer}
    viewed = {b.root for b in kernel.buffers if b.is_view}
    result: dict[Buffer, SharedLayout] = {}
    for buffer in kernel.scoped(Scope.SHARED):
        if buffer.is_view:
            continue
        shape, itemsize = buffer.extents, buffer.dtype.bytes
        if buffer.strides is not None:
            strides = tuple(int_value(s) for s in buffer.strides)
            assert None not in strides, f"{buffer.name} has runtime strides"
            result[buffer] = SharedLayout(shape, itemsize, strides=strides)  # type: ignore[arg-type]
        elif buffer in kernel.given.layouts:
            tile_align = BOX_ALIGN if buffer in panels | boxed else 1
            result[buffer] = replace(kernel.given.layouts[buffer].layout, tile_align=tile_align)
        elif buffer in panels:
            layout = warpgroup_layout(shape, buffer.dtype)
            result[buffer] = replace(layout, halved=buffer in halved)
        elif buffer in boxed:
            result[buffer] = boxed_layout(shape, itemsize)
        elif buffer in operands and buffer not in viewed and len(shape) >= 2:
            result[buffer] = operand_layout(shape, itemsize)
        else:
            result[buffer] = SharedLayout(shape, itemsize)
    return result


def _given_notes(kernel: Kernel) -> list[str]:
    """What explain() says of the layouts that the user gave."""
    by_warps = {
        region.buffer
        for node in walk(kernel.body)
        if isinstance(node, Gemm) and isinstance(node.atom, GemmAtom) and node.atom.mma is not None
        for region in (node.a, node.b)
    }
    notes = []
    for buffer in kernel.scoped(Scope.SHARED):
        if buffer in kernel.given.layouts:
            layout = kernel.given.layouts[buffer].layout
            is_slow = buffer in by_warps and not layout.has_wide_rows
            why = "; not ldmatrix (rows do not begin at multiples of 16 bytes)" if is_slow else ""
            notes.append(f"{buffer.name}: layout given, {layout}{why}")
    return notes
