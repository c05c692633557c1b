"""How the iterations of an elementwise loop are spread over threads.

Knows the rule: a loop follows the fragments it touches; a loop that touches none is spread so
that memory accesses are as wide as alignment allows and neighbours go to neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from tilejit.ir.access import local_registers
from tilejit.ir.analysis import difference, divisor, linear, reduced
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Const, Expr, Var, arith, int_value, substitute, variables
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Atomic, Load, Node, Parallel, Store, walk
from tilejit.layout.fragment import Digit, FragmentLayout, blocked

VECTOR_BYTES = 16  # the widest access of a thread (PTX ISA, ld, st: .v4.b32)

Access = tuple[Node, Buffer, tuple[Expr, ...]]


def accesses(node: Parallel) -> Iterator[Access]:
    """Every scalar access in a loop's body."""
    for inner in walk(node.body):
        if isinstance(inner, Load | Store | Atomic):
            yield inner, inner.buffer, inner.index


def loop_layout(node: Parallel, kernel: Kernel) -> FragmentLayout:
    """The layout of a loop's iterations, once the fragments' layouts are decided."""
    if node.layout is not None:
        return node.layout
    found = layout_from_fragments(node, kernel.fragments)
    return found or _like_others(node, kernel)


def _like_others(node: Parallel, kernel: Kernel) -> FragmentLayout:
    """The layout of a loop that no fragment decides; where it uses parts of some, such as results
    of reductions, and would not have them at hand, that of a fragment of its shape, whose threads
    do."""
    default = default_layout(node, kernel)
    used = [(b, at) for _, b, at in accesses(node) if b.scope is Scope.FRAGMENT]

    def has_all(layout: FragmentLayout) -> bool:
        held = ((kernel.fragments[b], at) for b, at in used if b in kernel.fragments)
        return all(local_registers(f, layout, node.vars, at) is not None for f, at in held)

    if not used or has_all(default):
        return default
    alike = (f for f in kernel.fragments.values() if f.shape == node.extents and not f.flat)
    return next((f for f in alike if f.threads == kernel.num_threads and has_all(f)), default)


def layout_from_fragments(
    node: Parallel, fragments: Mapping[Buffer, FragmentLayout]
) -> FragmentLayout | None:
    """The layout that a loop takes from the fragments it indexes by all its variables, those it
    writes first."""
    candidates: list[tuple[int, FragmentLayout]] = []
    for inner, buffer, at in accesses(node):
        if buffer.scope is Scope.FRAGMENT and buffer in fragments:
            seen = seen_from(fragments[buffer], node, at)
            if seen is not None:
                candidates.append((0 if isinstance(inner, Store) else 1, seen))
    if not candidates:
        return None
    return min(candidates, key=lambda c: c[0])[1]


def seen_from(
    fragment: FragmentLayout, node: Parallel, at: Sequence[Expr]
) -> FragmentLayout | None:
    """The loop layout in which each thread visits just the elements that it holds: when every
    loop variable is an index of its own over the whole dimension, or over a part of it that each
    thread holds alike."""
    fragment, at = _window(fragment, node, at)
    order: list[int] = []
    for d, e in enumerate(at):
        if isinstance(e, Var) and e in node.vars:
            if node.extents[node.vars.index(e)] != fragment.shape[d]:
                return None
            order.append(d)
        elif not (isinstance(e, Const) and fragment.shape[d] == 1):
            return None
    named = [at[d] for d in order]
    missing = [v for v, n in zip(node.vars, node.extents, strict=True) if v not in named]
    if len(set(named)) != len(named):
        return None
    if missing:
        if any(node.extents[node.vars.index(v)] != 1 for v in missing):
            return None
    if fragment.flat:
        if missing or named != list(node.vars) or len(order) != len(fragment.shape):
            return None
        return fragment
    kept = fragment.project(order)
    dims: list[tuple[Digit, ...]] = []
    shape: list[int] = []
    for v, n in zip(node.vars, node.extents, strict=True):
        if v in missing:
            dims.append(())
            shape.append(1)
        else:
            d = named.index(v)
            dims.append(kept.dims[d])
            shape.append(n)
    return FragmentLayout(tuple(shape), tuple(dims), fragment.threads)


def _window(
    fragment: FragmentLayout, node: Parallel, at: Sequence[Expr]
) -> tuple[FragmentLayout, Sequence[Expr]]:
    """The part of a fragment that `variable + offset` indexes, and the index there."""
    fresh = list(at)
    for d, e in enumerate(at):
        moved = [v for v in node.vars if v in variables(e)]
        if isinstance(e, Var) or len(moved) != 1:
            continue
        (var,) = moved
        extent = node.extents[node.vars.index(var)]
        terms, constant = linear(e)
        if terms.pop(var, 0) != 1 or any(var in variables(term) for term in terms):
            continue
        if constant % extent or any(divisor(t) * k % extent for t, k in terms.items()):
            continue
        part = fragment.window(d, extent)
        if part is not None:
            fragment, fresh[d] = part, var
    return fragment, fresh


def default_layout(node: Parallel, kernel: Kernel) -> FragmentLayout:
    """The layout of a loop that no fragment decides."""
    return blocked(node.extents, kernel.num_threads, loop_vector(node, kernel))


def loop_vector(node: Parallel, kernel: Kernel) -> int:
    """Iterations along the last variable that a thread takes together.

    As many as fill the widest access of the narrowest element, but no more than every global
    access can use, and leaving work for all threads.
    """
    if not node.vars:
        return 1
    last, extent = node.vars[-1], node.extents[-1]
    limit = VECTOR_BYTES
    if node.coalesced_width:
        limit = node.coalesced_width
    widths = []
    for _, buffer, at in accesses(node):
        if buffer.scope in (Scope.GLOBAL, Scope.SHARED):
            width = contiguous_width(buffer, at, last, kernel.multiples)
            if width is not None:
                widths.append(min(width, VECTOR_BYTES // buffer.dtype.bytes))
    if not widths:
        return 1
    sizes = [b.dtype.bytes for _, b, _ in accesses(node) if b.scope is not Scope.FRAGMENT]
    vector = min(VECTOR_BYTES // min(sizes), limit, extent & -extent)
    vector = min(vector, _common_width(node, last, kernel.multiples))
    total = math.prod(node.extents)
    while vector > 1 and total // vector < kernel.num_threads:
        vector //= 2
    return max(1, vector)


def _common_width(node: Parallel, last: Var, multiples: Mapping[Var, int]) -> int:
    """The vector that every access along the last variable can use."""
    result = VECTOR_BYTES
    for _, buffer, at in accesses(node):
        if buffer.scope is not Scope.GLOBAL:
            continue
        width = contiguous_width(buffer, at, last, multiples)
        if width is not None:
            # wider elements need several accesses, each aligned
            result = min(result, width if width < VECTOR_BYTES // buffer.dtype.bytes else result)
    return result


def contiguous_width(
    buffer: Buffer, at: Sequence[Expr], last: Var, multiples: Mapping[Var, int]
) -> int | None:
    """Neighbouring iterations that one aligned access can serve, up to 16 bytes' worth; 1 when
    they are not neighbours in memory; None when the access does not depend on `last`."""
    if not at or not any(last in variables(e) for e in at):
        return None
    width, start = VECTOR_BYTES // buffer.dtype.bytes, at[-1]
    is_plain = not any(last in variables(e) for e in at[:-1])
    if not is_plain or difference(_moved(at[-1], last, 1), at[-1]) != 1:
        block = _block(at, last)
        if block is None:
            return 1
        size, is_same, start = block
        if is_same:
            return size
        width = min(width, size)
    if int_value(buffer.element_strides[-1]) != 1:
        return 1
    if buffer.scope is Scope.GLOBAL:
        width = min(width, max(1, (buffer.align or buffer.dtype.bytes) // buffer.dtype.bytes))
        width = _power(width, divisor(buffer.offset, multiples))
        for stride in buffer.element_strides[:-1]:
            width = _power(width, divisor(stride, multiples))
    start = substitute(start, {last: arith("mul", last, 0)})
    return _power(width, divisor(start, multiples))


def _moved(e: Expr, last: Var, by: int) -> Expr:
    return substitute(e, {last: arith("add", last, by)})


def _block(at: Sequence[Expr], last: Var) -> tuple[int, bool, Expr] | None:
    """How many iterations from each multiple of that number on access the same element, or
    neighbours, where quotients and remainders of `last` are what an access is at; whether it is the
    same one; and where the first is along the last dimension. None where it is neither."""
    high = None if last.high is None else arith("floordiv", last.high, 2)
    number = Var(last.name, last.dtype, last.kind, last.low, high)
    size = VECTOR_BYTES
    while size > 1:
        first, *others = (
            [
                reduced(substitute(e, {last: arith("add", arith("mul", number, size), k)}))
                for e in at
            ]
            for k in range(size)
        )
        steps = [[difference(e, f) for e, f in zip(o, first, strict=True)] for o in others]
        if not any(any(step[:-1]) or None in step for step in steps):
            moves = [step[-1] for step in steps]
            if not any(moves) or moves == list(range(1, size)):
                return size, not any(moves), first[-1]
        size //= 2
    return None


def _power(width: int, number: int) -> int:
    return math.gcd(width, number) if number else width
