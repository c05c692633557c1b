"""Which role of a block makes its barriers and goes on at once, while the others wait for that.

Knows who uses barriers and which hardware barriers are free. Does not know instructions, nor how
barriers are made.

The tiles that a block needs first are long on their way; the role that brings them should not meet
the whole block before it sends for them. It makes the barriers itself, says so at a hardware
barrier, and its copies follow. That is right where

* one thread of the role does all that the role does with barriers: it has made them itself, so its
  own order is enough, and no thread of the role has to learn of it;
* the other roles come to that hardware barrier before all else, and nothing outside of the roles
  uses barriers: everybody else learns there that they are made;
* no other block uses the block's barriers before the cluster has met, which the role that goes on
  does not wait for (`meets_late`): blocks that hand each other tiles meet first, all of them;
* nothing else uses that hardware barrier: the role that only says that it has come might come to
  its next use before the others have come to this one.

Where a loop reduces tiles between its multiplies, instructions are what it waits for, and the block
has work for long: the assembler puts those of such a loop in another order when barriers are not
made before the roles part (attention, causal, D = 64 on an H100: 5 % slower), so they are.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from tilejit.ir.buffer import Scope
from tilejit.ir.expr import Expr
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, If, Let, Load, Node, OneThread, Role, Roles, Store, walk
from tilejit.ir.parts import named_barriers
from tilejit.ir.sync import Elect
from tilejit.isa.barrier import NUM_BARRIERS
from tilejit.ops.cluster import meets_late
from tilejit.ops.copy import Copy
from tilejit.passes.bring import is_inward
from tilejit.passes.teams import reduces_between


def open_early(kernel: Kernel) -> Kernel:
    """Decide `Roles.opener` and `opening` of the roles that a kernel begins with.

    Needs: roles, every meeting and copy with its barrier. Kernels without a role that may go on
    at once stay as they are: their blocks make the barriers and meet.
    """
    place = next((k for k, n in enumerate(kernel.body) if isinstance(n, Roles)), None)
    if place is None or (kernel.cluster_size > 1 and not meets_late(kernel)):
        return kernel
    if reduces_between(kernel):
        return kernel
    roles = kernel.body[place]
    assert isinstance(roles, Roles)
    before, after = kernel.body[:place], kernel.body[place + 1 :]
    if not all(_is_own(n) for n in before) or any(_uses_barriers(n) for n in walk(after)):
        return kernel
    everyone = kernel.num_threads + kernel.extra_threads
    if kernel.cluster_size > 1 and sum(r.threads for r in roles.roles) < everyone:
        return kernel  # all threads come to the cluster's barrier, which the roles do
    opener = next((k for k, role in enumerate(roles.roles) if _can_open(role, kernel.body)), None)
    opening = _free_barrier(kernel.body)
    if opener is None or opening is None:
        return kernel
    opened = replace(roles, opener=opener, opening=opening)
    return replace(kernel, body=(*before, opened, *after))


def _is_own(node: Node) -> bool:
    """True for what a thread does for itself and without waiting: else the block may as well meet,
    or the barriers be made meanwhile."""
    buffers = (*node.reads, *node.writes)
    is_private = all(b.scope is Scope.GLOBAL or b.scope.is_per_thread for b in buffers)
    return isinstance(node, Let | Load | Store | Elect) and is_private


def _uses_barriers(node: Node) -> bool:
    return any(b.scope is Scope.BARRIER for b in (*node.reads, *node.writes))


def _can_open(role: Role, body: Body) -> bool:
    """True for a role that brings tiles and uses barriers in one thread: that which is elected of
    its first warp, the same one every time (PTX ISA, "elect.sync"). body: the kernel's."""
    if role.teams > 1 or not any(_brings(n) for n in walk(role.body)):
        return False
    elected = {
        n.out
        for n in walk(body)
        if isinstance(n, Elect) and n.each >= role.threads and role.first % n.each == 0
    }
    return _is_in_one_thread(role.body, role, elected)


def _brings(node: Node) -> bool:
    return isinstance(node, Copy) and node.is_tma and is_inward(node)


def _is_in_one_thread(body: Body, role: Role, elected: Set[Expr]) -> bool:
    """True when only the role's elected thread uses barriers."""
    for node in body:
        if isinstance(node, OneThread) and (not node.each or node.each >= role.threads):
            continue
        inner = node.bodies
        if isinstance(node, If) and node.condition in elected:
            inner = (node.orelse,)
        if _uses_barriers(node) or not all(_is_in_one_thread(b, role, elected) for b in inner):
            return False
    return True


def _free_barrier(body: Body) -> int | None:
    """The first hardware barrier that no role meets at and no node names: a block takes as many of
    the multiprocessor's as its highest number says."""
    used = named_barriers(body)
    for node in walk(body):
        if isinstance(node, Roles):
            for number, role in enumerate(node.roles):
                first = role.meeting or number + 1
                used.update(range(first, first + role.teams))
    free = (n for n in range(1, NUM_BARRIERS) if n not in used)
    return next(free, None)
