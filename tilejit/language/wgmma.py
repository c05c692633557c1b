"""`T.wgmma_gemm` and `T.wait_wgmma`: multiplies by warpgroups that only start, and the wait.

Knows which fragments are in use by multiplies that may not be over. Does not know instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tilejit.errors import ArgumentError, ArgumentTypeError, TraceError, caller_span
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import VarKind, variables
from tilejit.ir.node import Body, For, If, Node, Roles, While
from tilejit.language.extents import is_integer
from tilejit.language.gemm import GemmWarpPolicy, check_policy, multiply, refuse
from tilejit.language.where import tile_op
from tilejit.ops.gemm import Gemm, GemmWait

MOST_PENDING = 7  # of multiplies that a wait leaves running (PTX ISA, "wgmma.wait_group")


def wgmma_gemm(
    A: Any,
    B: Any,
    C: Any,
    transpose_A: bool = False,
    transpose_B: bool = False,
    policy: GemmWarpPolicy = GemmWarpPolicy.Square,
    clear_accum: bool = False,
    annotations: Any = None,
) -> None:
    """Start a multiply of two tiles by warpgroups, and go on (PTX ISA, "wgmma.mma_async").

    `C`, and A where it is a fragment, may not be used before a `T.wait_wgmma` that waits for it,
    but by further multiplies that add to C; tiles in shared memory may not be written before.
    Tiles that threads have written are fenced; those that `T.tma_copy` brings need nothing but
    its barrier.

    Args:
        A: (M, K), or (K, M) with `transpose_A`; shared memory, or a whole fragment (M, K). M is a
            multiple of 64 for each warpgroup, K of 32 bytes.
        B: (K, N), or (N, K) with `transpose_B`; shared memory. N is a multiple of 8.
        C: (M, N), a whole fragment of the executing warpgroups.
            Dtypes as for `T.gemm`; other than 16-bit ones are stored with K innermost.
        policy: how the warpgroups share C.
        clear_accum: C is set to the product instead.
        annotations: None.

    Raises:
        ShapeError, DTypeError, ArgumentError: as for `T.gemm`.
        UnsupportedError: the target's warpgroups do not multiply such tiles; says why.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    what = "T.wgmma_gemm"
    trace = tile_op(what)
    check_policy(what, policy)
    refuse(what, annotations=(annotations, None))
    flags = (transpose_A, transpose_B, clear_accum)
    node = multiply(what, (A, B, C), flags, GemmWarpPolicy(policy))
    trace.add(replace(node, is_async=True))


def wait_wgmma(id: int) -> None:
    """Wait until at most `id` of the newest `T.wgmma_gemm` that the warpgroup has started are
    unfinished (PTX ISA, "wgmma.wait_group").

    Args:
        id: 0 to 7, known while tracing.

    Raises:
        ArgumentError, ArgumentTypeError: another number.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    what = "T.wait_wgmma"
    trace = tile_op(what)
    if not is_integer(id):
        raise ArgumentTypeError(f"{what}: the number of multiplies is {id!r}, not an integer.")
    if not 0 <= id <= MOST_PENDING:
        raise ArgumentError(
            f"{what}: {id} multiplies; it leaves 0 to {MOST_PENDING} of the newest unfinished."
        )
    trace.add(GemmWait(pending=int(id), span=caller_span()))


# -- what is in use ---------------------------------------------------------------------------

# For each fragment in use, and shared tile that is read: how many multiplies have started after
# the newest one that uses it (at most `_MANY`), and that one.
InFlight = dict[Buffer, tuple[int, Gemm]]
_MANY = MOST_PENDING + 1


def check_multiplies(body: Body) -> Body:
    """The body, its waits knowing which fragments they wait for.

    Raises:
        TraceError: at the use of what a multiply that may not be over uses.
    """
    if not any(_starts(node) for node in body):
        return body
    return _Watch().body(body, {})[0]


def _starts(node: Node) -> bool:
    """Whether a multiply is started or waited for in it."""
    if isinstance(node, GemmWait) or (isinstance(node, Gemm) and node.is_async):
        return True
    return any(_starts(child) for inner in node.bodies for child in inner)


class _Watch:
    def body(self, body: Body, flying: InFlight) -> tuple[Body, InFlight]:
        result: list[Node] = []
        for node in body:
            fresh, flying = self.node(node, flying)
            result.append(fresh)
        return tuple(result), flying

    def node(self, node: Node, flying: InFlight) -> tuple[Node, InFlight]:
        if isinstance(node, GemmWait):
            held = tuple(b for b in flying if b.scope is Scope.FRAGMENT)
            kept = {b: entry for b, entry in flying.items() if entry[0] < node.pending}
            return replace(node, registers=held), kept
        self.check(node, flying)
        if isinstance(node, Gemm) and node.is_async:
            return node, self.started(node, flying)
        if not node.bodies:
            return node, flying
        return self.nested(node, flying)

    def started(self, node: Gemm, flying: InFlight) -> InFlight:
        older = {b: (min(age + 1, _MANY), gemm) for b, (age, gemm) in flying.items()}
        used = [r.buffer for r in (node.a, node.b, node.acc)]
        return older | dict.fromkeys(used, (0, node))

    def check(self, node: Node, flying: InFlight) -> None:
        for buffer in dict.fromkeys((*node.reads, *node.writes)):
            entry = flying.get(buffer)
            if entry is None or buffer.scope is not Scope.FRAGMENT:
                continue
            gemm = entry[1]
            if isinstance(node, Gemm) and node.is_async and _may_follow(node, gemm, buffer):
                continue
            raise TraceError(
                f"`{buffer.name}` is used while a multiply may not be over.",
                span=node.span,
                related=[(gemm.span, "started here")],
                hint="Put T.wait_wgmma(0) before the use.",
            )
        self.check_tiles(node, flying)

    def check_tiles(self, node: Node, flying: InFlight) -> None:
        """A tile that is surely the one that a multiply reads is not written meanwhile."""
        for region in node.regions:
            entry = flying.get(region.buffer)
            if entry is None or region.buffer.scope is not Scope.SHARED:
                continue
            if region.buffer not in node.writes:
                continue
            gemm = entry[1]
            if any(_is_same(region, r) for r in (gemm.a, gemm.b)):
                raise TraceError(
                    f"`{region.buffer.name}` is written while a multiply may still read it.",
                    span=node.span,
                    related=[(gemm.span, "started here")],
                    hint="Put T.wait_wgmma(0) before, or write another slot.",
                )

    def nested(self, node: Node, flying: InFlight) -> tuple[Node, InFlight]:
        if isinstance(node, Roles):
            after: InFlight = flying
            bodies = []
            for role in node.roles:
                fresh, left = self.body(role.body, flying)
                bodies.append(fresh)
                after = _joined(after, left)
            return node.with_bodies(*bodies), after
        if isinstance(node, If):
            then, after_then = self.body(node.then, flying)
            orelse, after_else = self.body(node.orelse, flying)
            return node.with_bodies(then, orelse), _joined(after_then, after_else)
        if not isinstance(node, For | While):
            bodies, after = [], flying
            for inner in node.bodies:
                fresh, after = self.body(inner, after)
                bodies.append(fresh)
            return node.with_bodies(*bodies), after
        while True:  # what the last round leaves running meets the first uses of the next
            rounds, back = [], flying
            for inner in node.bodies:
                fresh, back = self.body(inner, back)
                rounds.append(fresh)
            grown = _joined(flying, back)
            if _ages(grown) == _ages(flying):
                return node.with_bodies(*rounds), grown
            flying = grown


def _may_follow(node: Gemm, before: Gemm, buffer: Buffer) -> bool:
    """Whether a multiply may use a fragment of one that is running: to add to it, the same way."""
    if buffer is not node.acc.buffer:
        return buffer is not before.acc.buffer
    is_alike = buffer is before.acc.buffer and (node.m, node.n) == (before.m, before.n)
    return is_alike and node.policy is before.policy


def _is_same(a: Region, b: Region) -> bool:
    """Whether two regions are surely the same, whenever they are asked for."""
    moving = {v for e in a.starts for v in variables(e)}
    if any(v.kind in (VarKind.LOOP, VarKind.VALUE) for v in moving):
        return False
    return a.buffer is b.buffer and a.starts == b.starts and a.extents == b.extents


def _joined(a: InFlight, b: InFlight) -> InFlight:
    """What may be running where two ways meet."""
    result = dict(a)
    for buffer, entry in b.items():
        if buffer not in result or entry[0] < result[buffer][0]:
            result[buffer] = entry
    return result


def _ages(flying: Mapping[Buffer, tuple[int, Gemm]]) -> dict[Buffer, int]:
    return {buffer: age for buffer, (age, _) in flying.items()}
