"""Warpgroups with work of their own: `T.ws`, one thread of several, registers of a thread.

Knows which threads a body runs on and how neighbouring bodies become roles. Does not know what
roles do, nor targets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tilejit.dtypes import bool_
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    ResourceError,
    TraceError,
    UnsupportedError,
    caller_span,
)
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Var, VarKind
from tilejit.ir.node import (
    Body,
    If,
    Let,
    Load,
    Node,
    Role,
    Roles,
    Store,
    all_reads,
    all_writes,
    walk,
)
from tilejit.ir.sync import Control, ControlOp, Elect
from tilejit.language.context import Context, require_read_source
from tilejit.language.extents import is_integer
from tilejit.language.trace import Frame, FrameKind, Trace, current_kernel
from tilejit.language.value import Value
from tilejit.language.where import tile_op

GROUP = 128  # threads of a warpgroup (PTX ISA, "Asynchronous warpgroup level matrix instructions")
# Registers that setmaxnreg can give a thread (PTX ISA, "setmaxnreg").
FEWEST_REGISTERS, MOST_REGISTERS, REGISTER_STEP = 24, 256, 8
REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor (CUDA Programming Guide)


class ws(Context):
    """`with T.ws(0, 1): ...`: the body is run by those warpgroups of the block only.

    A warpgroup is 128 threads; group g has threads 128 * g to 128 * g + 127. Inside, everything
    that says "all threads of the block" means the threads of these groups: tile ops are spread
    over them, `T.sync_threads()` and the barriers that are put in meet at a barrier of theirs.
    `T.get_thread_binding()` stays the thread's index in the block. A fragment belongs to the
    groups that use it and to no others.

    Bodies for different groups that follow each other, with nothing between them but
    allocations, run side by side: they are the roles of one kernel, and wait for each other only
    where they say so. Threads that no body names go on at once.

    Args:
        warp_group_idx: one or more groups next to each other.

    Raises:
        ArgumentError: a group that the block has not, one given twice, or none.
        UnsupportedError: groups that are not next to each other; threads along y or z.
        TraceError: outside a kernel, inside T.Parallel or another T.ws.
    """

    def __init__(self, *warp_group_idx: int) -> None:
        self.span = caller_span()
        self.trace = tile_op("T.ws")
        outer = self.trace.enclosing(FrameKind.ROLE)
        if outer is not None:
            raise TraceError(
                "A T.ws cannot be inside another one.",
                related=[(outer.span, "the outer one")],
                hint="Close the first body; bodies of different groups run side by side.",
            )
        self.first, self.count = _groups(self.trace, warp_group_idx)
        self.trace.is_free = False
        self.frame: Frame | None = None

    def __enter__(self) -> None:
        require_read_source("T.ws")
        self.frame = self.trace.push(FrameKind.ROLE, self.span)
        self.frame.threads = self.count * GROUP

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            return
        assert self.frame is not None, "left a T.ws that was not entered"
        body = tuple(self.trace.pop(self.frame))
        last = self.first + self.count - 1
        name = "ws" + "_".join(str(g) for g in range(self.first, last + 1))
        role = Role(name, self.first * GROUP, self.count * GROUP, body)
        self.trace.add(Roles(roles=(role,), span=self.span))
        nodes = self.trace.frame.nodes
        nodes[:] = gathered(nodes)


WarpSpecialize = ws


def _groups(trace: Trace, given: tuple[Any, ...]) -> tuple[int, int]:
    """The first group and how many."""
    what = "T.ws"
    if not given:
        raise ArgumentError(f"{what} needs a warpgroup.", hint="Write `with T.ws(0):`.")
    for g in given:
        if not is_integer(g):
            raise ArgumentTypeError(f"{what}: a warpgroup is {g!r}, not an integer.")
    groups = sorted(int(g) for g in given)
    if len(set(groups)) < len(groups):
        raise ArgumentError(f"{what}: a warpgroup is given twice in {given}.")
    if trace.threads[1:] != (1, 1):
        raise UnsupportedError(
            f"{what}: the block's threads have more than one dimension.",
            related=[(trace.span, "the kernel")],
            hint="Write threads=n in T.Kernel.",
        )
    there = trace.num_threads // GROUP
    if groups[0] < 0 or groups[-1] >= there:
        wrong = groups[0] if groups[0] < 0 else groups[-1]
        has = f"warpgroups 0 to {there - 1}" if there > 1 else f"{there or 'no'} warpgroup"
        raise ArgumentError(
            f"{what}: there is no warpgroup {wrong}; {trace.num_threads} threads are {has}.",
            related=[(trace.span, "the kernel")],
            hint=f"A warpgroup is {GROUP} threads: threads={GROUP * (max(groups[-1], 0) + 1)}.",
        )
    if groups[-1] - groups[0] >= len(groups):
        raise UnsupportedError(
            f"{what}: warpgroups {', '.join(map(str, groups))} are not next to each other.",
            hint="Number the groups so that those with the same work follow each other.",
        )
    return groups[0], len(groups)


# -- neighbouring bodies ----------------------------------------------------------------------


def gathered(nodes: list[Node]) -> list[Node]:
    """The nodes with the last one, a T.ws body, made a role of the one before it where the two
    may run side by side; what initialises variables between them then comes first."""
    added = nodes[-1]
    assert isinstance(added, Roles), "the last node is a T.ws body"
    place = next((n for n in range(len(nodes) - 2, -1, -1) if isinstance(nodes[n], Roles)), None)
    if place is None:
        return nodes
    before, between = nodes[place], nodes[place + 1 : -1]
    assert isinstance(before, Roles)
    (role,) = added.roles
    if any(_shares_threads(role, other) for other in before.roles):
        return nodes
    if not all(_may_come_first(node, before) for node in between):
        return nodes
    together = dataclasses.replace(before, roles=(*before.roles, role))
    return [*nodes[:place], *between, together]


def _shares_threads(a: Role, b: Role) -> bool:
    return a.first < b.first + b.threads and b.first < a.first + a.threads


def _may_come_first(node: Node, roles: Roles) -> bool:
    """True for what a thread does for itself, and that the roles neither use nor change."""
    if not isinstance(node, Let | Load | Store):
        return False
    if isinstance(node, Store) and not node.buffer.scope.is_per_thread:
        return False
    used = _roots(all_reads(roles) | all_writes(roles))
    changed = _roots(all_writes(roles))
    return not (_roots(set(node.writes)) & used) and not (_roots(set(node.reads)) & changed)


def _roots(buffers: set[Buffer]) -> set[Buffer]:
    return {b.root for b in buffers}


def check_roles(trace: Trace, body: Body) -> None:
    """Refuse what roles cannot do together.

    Raises:
        TraceError: fragments of two sets of threads; registers annotated outside of the roles.
        ResourceError: more registers than there are.
    """
    if not any(isinstance(node, Roles) for node in walk(body)):
        return
    if trace.given.register_span is not None:
        raise TraceError(
            "In a kernel with T.ws the registers of a thread are a matter of each body.",
            span=trace.given.register_span,
            hint="Move the call to the top of the T.ws body that it is for.",
        )
    check_homes(body)
    check_registers(body, trace.num_threads)


def check_homes(body: Body) -> None:
    """Refuse fragments that different sets of threads use: their registers hold one set's.

    Raises:
        TraceError: at the second use.
    """
    seen: dict[Buffer, tuple[str, Node]] = {}

    def visit(body: Body, who: str) -> None:
        for node in body:
            for buffer in (*node.reads, *node.writes):
                if buffer.scope is Scope.FRAGMENT:
                    other, first = seen.setdefault(buffer.root, (who, node))
                    if other != who:
                        raise TraceError(
                            f"`{buffer.name}` is used by {who}, but it is a fragment of {other}.",
                            span=node.span,
                            related=[(first.span, f"used here by {other}")],
                            hint="Give each set of warpgroups a fragment of its own; they exchange "
                            "tiles through shared memory.",
                        )
            if isinstance(node, Roles):
                for role in node.roles:
                    visit(role.body, _groups_text(role))
            else:
                for inner in node.bodies:
                    visit(inner, who)

    visit(body, "all threads of the block")


def _groups_text(role: Role) -> str:
    first, count = role.first // GROUP, role.threads // GROUP
    if count == 1:
        return f"warpgroup {first}"
    return f"warpgroups {first} to {first + count - 1}"


# -- one thread -------------------------------------------------------------------------------


def shuffle_elect(thread_extent: int) -> Value:
    """True in one thread of every `thread_extent` threads of the block: one of their first warp
    (PTX ISA, "elect.sync"; before sm_90 its first thread). A bool, for `if`.

    Args:
        thread_extent: a multiple of 32 that divides the block's threads, such as 128 for one
            thread of each warpgroup; 0 for one thread of the block.

    Raises:
        ArgumentError, ArgumentTypeError: another number.
        UnsupportedError: a block whose threads have more than one dimension.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    what = "T.shuffle_elect"
    trace = tile_op(what)
    if not is_integer(thread_extent):
        raise ArgumentTypeError(f"{what}: the extent is {thread_extent!r}, not an integer.")
    total, extent = trace.num_threads, int(thread_extent) or trace.num_threads
    if trace.threads[1:] != (1, 1):
        raise UnsupportedError(f"{what}: the block's threads have more than one dimension.")
    if extent < 0 or extent % 32 or total % extent:
        raise ArgumentError(
            f"{what}: {thread_extent} threads; the block's {total} are no whole number of such "
            "groups of warps.",
            hint="128 elects a thread of each warpgroup, 32 one of each warp, 0 one of all.",
        )
    trace.is_free = False
    out = Var(trace.unique_name("elected"), bool_, VarKind.VALUE)
    trace.add(Elect(out=out, each=extent, span=caller_span()))
    # before the branches that stand right before it, which may wait for the one that follows
    nodes = trace.frame.nodes
    place = len(nodes) - 1
    while place and isinstance(nodes[place - 1], If):
        place -= 1
    nodes.insert(place, nodes.pop())
    return Value(out)


# -- registers --------------------------------------------------------------------------------


def set_max_nreg(reg_count: int, is_inc: Any) -> None:
    """Each thread of the executing warpgroups has `reg_count` registers from now on
    (PTX ISA, "setmaxnreg").

    With `is_inc` they wait until other warpgroups of the block have given back as many; otherwise
    they give back those above. A kernel starts with the registers of the multiprocessor divided
    among the block's threads.

    Args:
        reg_count: 24 to 256, a multiple of 8.
        is_inc: 1 or True to ask for more, 0 or False to give some back.

    Raises:
        ArgumentError, ArgumentTypeError: another number.
        TraceError: outside a T.ws body.
    """
    is_up = bool(_flag("T.set_max_nreg", is_inc))
    _set_registers("T.set_max_nreg", reg_count, is_up)


def inc_max_nreg(reg_count: int) -> None:
    """`T.set_max_nreg(reg_count, 1)`: more registers, once others have given them back."""
    _set_registers("T.inc_max_nreg", reg_count, True)


def dec_max_nreg(reg_count: int) -> None:
    """`T.set_max_nreg(reg_count, 0)`: fewer registers, from now on."""
    _set_registers("T.dec_max_nreg", reg_count, False)


def annotate_producer_reg_dealloc(reg_count: int = 24) -> None:
    """How many registers a thread that brings tiles keeps.

    In a `T.ws` body it is `T.dec_max_nreg(reg_count)`. In a kernel that passes split into
    producers and consumers it says what they use instead of their own number.

    Raises:
        ArgumentError, ArgumentTypeError: no multiple of 8 from 24 to 256.
        TraceError: outside a kernel; outside the bodies of a kernel that has T.ws.
    """
    _annotate("T.annotate_producer_reg_dealloc", reg_count, "producer_registers", False)


def annotate_consumer_reg_alloc(reg_count: int = 240) -> None:
    """How many registers a thread that computes gets; otherwise like
    `T.annotate_producer_reg_dealloc`, with `T.inc_max_nreg` in a `T.ws` body."""
    _annotate("T.annotate_consumer_reg_alloc", reg_count, "consumer_registers", True)


def no_set_max_nreg() -> None:
    """Passes move no registers from producers to consumers.

    Raises:
        TraceError: outside a kernel.
    """
    trace = current_kernel("T.no_set_max_nreg")
    trace.given = dataclasses.replace(trace.given, keeps_registers=True)


def disable_warp_group_reg_alloc() -> None:
    """The same as `T.no_set_max_nreg`."""
    no_set_max_nreg()


def _flag(what: str, x: Any) -> bool:
    if isinstance(x, bool) or (is_integer(x) and x in (0, 1)):
        return bool(x)
    raise ArgumentTypeError(f"{what}: is_inc is {x!r}; it is 1 for more registers, 0 for fewer.")


def _registers(what: str, given: Any) -> int:
    if not is_integer(given):
        raise ArgumentTypeError(f"{what}: the number of registers is {given!r}, not an integer.")
    count = int(given)
    if not FEWEST_REGISTERS <= count <= MOST_REGISTERS or count % REGISTER_STEP:
        raise ArgumentError(
            f"{what}: a thread cannot have {count} registers.",
            hint=f"A multiple of {REGISTER_STEP} from {FEWEST_REGISTERS} to {MOST_REGISTERS}.",
        )
    return count


def _set_registers(what: str, given: Any, is_up: bool) -> None:
    trace = tile_op(what)
    count = _registers(what, given)
    if trace.enclosing(FrameKind.ROLE) is None:
        raise TraceError(
            f"{what} is only allowed in a T.ws body: what one warpgroup gets, another gives back.",
            hint="Write it at the top of `with T.ws(...):`.",
        )
    op = ControlOp.REGISTERS_UP if is_up else ControlOp.REGISTERS_DOWN
    trace.add(Control(op=op, count=count, span=caller_span()))


def _annotate(what: str, given: Any, field: str, is_up: bool) -> None:
    trace = tile_op(what)
    if trace.enclosing(FrameKind.ROLE) is not None:
        _set_registers(what, given, is_up)
        return
    count = _registers(what, given)
    changes: dict[str, Any] = {field: count, "register_span": caller_span()}
    trace.given = dataclasses.replace(trace.given, **changes)


def check_registers(body: Body, threads: int) -> None:
    """Refuse roles that together ask for more registers than a multiprocessor has.

    Raises:
        ResourceError: at the first request.
    """
    at_launch = min(255, REGISTER_FILE // threads // REGISTER_STEP * REGISTER_STEP)
    for node in body:
        if isinstance(node, Roles):
            _check_roles(node, threads, at_launch)
        for inner in node.bodies:
            check_registers(inner, threads)


def _check_roles(node: Roles, threads: int, at_launch: int) -> None:
    asked = {id(r): _last_request(r.body) for r in node.roles}
    ups = [n for n in asked.values() if n is not None and n.op is ControlOp.REGISTERS_UP]
    if ups:  # no more are given at the start than any thread asks for later
        at_launch = min(at_launch, max(n.count for n in ups))
    total = (threads - sum(role.threads for role in node.roles)) * at_launch
    for role in node.roles:
        request = asked[id(role)]
        total += role.threads * (request.count if request is not None else at_launch)
        if request is None or request.op is ControlOp.REGISTERS_UP or request.count <= at_launch:
            continue
        raise ResourceError(
            f"T.dec_max_nreg({request.count}) gives no registers back: a thread has {at_launch} "
            "when the block starts.",
            span=request.span,
            hint=f"Keep fewer than {at_launch}, or leave it out.",
        )
    if ups and total > at_launch * threads:
        raise ResourceError(
            f"The warpgroups ask for {total} registers together; the block's {threads} threads "
            f"start with {at_launch} each, {at_launch * threads} together.",
            span=ups[0].span,
            hint="Let other warpgroups give more back with T.dec_max_nreg, or ask for fewer.",
        )


def _last_request(body: Body) -> Control | None:
    found = [
        n
        for n in body
        if isinstance(n, Control) and n.op in (ControlOp.REGISTERS_UP, ControlOp.REGISTERS_DOWN)
    ]
    return found[-1] if found else None
