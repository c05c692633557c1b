"""A kernel in parts: what all threads of the block do, and what each role's do.

Knows which nodes run on which threads. Does not know what a pass does with a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tilejit.ir.analysis import interval
from tilejit.ir.buffer import Buffer
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, Node, Part, Role, Roles, walk
from tilejit.ir.sync import SyncThreads
from tilejit.isa.barrier import NUM_BARRIERS

Home = tuple[int, int]  # the first thread and how many


def roles_of(body: Body) -> list[Role]:
    """All roles, in program order."""
    return [role for node in walk(body) if isinstance(node, Roles) for role in node.roles]


def named_barriers(body: Body) -> set[int]:
    """The hardware barriers that nodes name by number, as far as is known of the numbers."""
    named: set[int] = set()
    for node in walk(body):
        if isinstance(node, SyncThreads) and node.number is not None:
            bounds = interval(node.number)
            low = 1 if bounds.low is None else bounds.low
            high = NUM_BARRIERS - 1 if bounds.high is None else bounds.high
            named.update(range(low, high + 1))
    return named


def part_kernel(kernel: Kernel, role: Role) -> Kernel:
    """The kernel as its role sees it: the block's threads are the role's."""
    if (role.first, role.size) == (0, kernel.num_threads):
        return kernel
    return replace(kernel, threads=(role.size, 1, 1))


def each_part(kernel: Kernel, change: Callable[[Kernel], Kernel]) -> Kernel:
    """The kernel with `change` applied to each part as a kernel of its own, whose threads are
    those that execute it; what one part decides, the next one finds decided."""
    roles = roles_of(kernel.body)
    if not roles:
        return change(kernel)
    done: dict[int, Body] = {}
    for home in dict.fromkeys(role.home for role in roles):
        mine = [role for role in roles if role.home == home]
        body = tuple(Part(body=role.body) for role in mine)
        changed = change(replace(part_kernel(kernel, mine[0]), body=body))
        done |= {id(r): n.body for r, n in zip(mine, changed.body, strict=True)}  # type: ignore[attr-defined]
        kernel = replace(changed, threads=kernel.threads, body=kernel.body)
    changed = change(replace(kernel, body=_emptied(kernel.body)))
    bodies = iter([done[id(role)] for role in roles])
    return replace(changed, body=_filled(changed.body, bodies))


def _emptied(body: Body) -> Body:
    """The body with roles that do nothing."""
    return tuple(
        node.with_bodies(*(() for _ in node.roles))
        if isinstance(node, Roles)
        else node.with_bodies(*map(_emptied, node.bodies))
        for node in body
    )


def _filled(body: Body, bodies: Iterator[Body]) -> Body:
    """The inverse, role by role in program order."""
    result: list[Node] = []
    for node in body:
        if isinstance(node, Roles):
            result.append(node.with_bodies(*(next(bodies) for _ in node.roles)))
        else:
            result.append(node.with_bodies(*(_filled(inner, bodies) for inner in node.bodies)))
    return tuple(result)


def common_buffers(kernel: Kernel) -> set[Buffer]:
    """The buffers that more than one part touches."""
    homes: dict[Buffer, set[Home]] = {}

    def visit(body: Body, home: Home) -> None:
        for node in body:
            for buffer in (*node.reads, *node.writes):
                homes.setdefault(buffer.root, set()).add(home)
            if isinstance(node, Roles):
                for role in node.roles:
                    visit(role.body, role.home)
            else:
                for inner in node.bodies:
                    visit(inner, home)

    visit(kernel.body, (0, kernel.num_threads))
    return {b for b, users in homes.items() if len(users) > 1}
