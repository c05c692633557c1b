"""What a kernel written by hand asks for: what its target must have, which threads issue a copy,
where roles meet.

Knows conditions on threads and the target's features. Does not know layouts or PTX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from tilejit.dtypes import int32
from tilejit.errors import ResourceError, TraceError, UnsupportedError
from tilejit.ir.access import INTEGER
from tilejit.ir.buffer import Scope
from tilejit.ir.divergence import Divergence
from tilejit.ir.expr import Const, Expr, Op, Var, arith, binary, const, substitute, variables, walk
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Body, If, Node, OneThread, Role, Roles
from tilejit.ir.node import walk as walk_nodes
from tilejit.ir.parts import named_barriers, roles_of
from tilejit.ir.sync import BarrierArrive, BarrierExpect, Control, ControlOp, Elect
from tilejit.isa.atom import CopyAtom, CopyMethod, WgmmaAtom
from tilejit.isa.barrier import NUM_BARRIERS
from tilejit.isa.mma import WARP
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm
from tilejit.passes.hopper import pipelined_copies, unrounded_tiles
from tilejit.passes.sameness import Path, Sameness
from tilejit.passes.tma import misfit
from tilejit.passes.wgmma import choose_wgmma
from tilejit.target import TARGETS, Feature, Target

# ---- what the target must have ------------------------------------------------------------------

_NEEDS: dict[ControlOp, Feature] = {
    ControlOp.FENCE_ASYNC: Feature.TMA,
    ControlOp.FENCE_BARRIERS: Feature.CLUSTER,
    ControlOp.STORE_COMMIT: Feature.TMA,
    ControlOp.STORE_WAIT: Feature.TMA,
    ControlOp.STORE_WAIT_READ: Feature.TMA,
    ControlOp.REGISTERS_UP: Feature.SETMAXNREG,
    ControlOp.REGISTERS_DOWN: Feature.SETMAXNREG,
    ControlOp.CLUSTER_ARRIVE: Feature.CLUSTER,
    ControlOp.CLUSTER_ARRIVE_RELAXED: Feature.CLUSTER,
    ControlOp.CLUSTER_WAIT: Feature.CLUSTER,
    ControlOp.DEPENDENCY_WAIT: Feature.GRIDDEPCONTROL,
    ControlOp.DEPENDENCY_LAUNCH: Feature.GRIDDEPCONTROL,
}
# Instructions that all threads of a warp or warpgroup execute together (PTX ISA, ".aligned").
_ALIGNED = frozenset(
    op for op, needs in _NEEDS.items() if needs in (Feature.SETMAXNREG, Feature.CLUSTER)
)


def check_needs(kernel: Kernel, target: Target) -> None:
    """
    Raises:
        UnsupportedError: at the first call that the target has no instruction for.
    """
    if kernel.cluster_size > 1 and not target.has(Feature.CLUSTER):
        raise _lacks("T.Kernel: cluster", Feature.CLUSTER, target, kernel)
    if kernel.cluster_size > target.max_cluster and kernel.cluster_size > 1:
        raise UnsupportedError(
            f"T.Kernel: a cluster of {kernel.cluster_size} blocks; {target} runs up to "
            f"{target.max_cluster}.",
            span=kernel.span,
            hint="Use a smaller cluster.",
        )
    for node in walk_nodes(kernel.body):
        if isinstance(node, Control) and node.op in _NEEDS:
            feature = _NEEDS[node.op]
        elif isinstance(node, BarrierExpect):
            feature = Feature.MBARRIER_TX
        elif isinstance(node, BarrierArrive) and node.cta is not None:
            feature = Feature.CLUSTER
        elif isinstance(node, Copy) and node.is_async:
            feature = Feature.TMA
        else:
            continue
        if not target.has(feature):
            raise _lacks(spelling(node), feature, target, node)


def _lacks(what: str, feature: Feature, target: Target, node: Node | Kernel) -> UnsupportedError:
    return UnsupportedError(
        f"{what} needs {feature}, which {target} lacks.",
        span=node.span,
        hint="Targets that have it: "
        + ", ".join(name for name, t in TARGETS.items() if t.has(feature))
        + ".",
    )


_SPELLINGS: dict[type[Node], str] = {
    BarrierExpect: "T.mbarrier_expect_tx",
    BarrierArrive: "T.mbarrier_arrive with cta_id",
    Copy: "T.tma_copy",
    Roles: "T.ws",
    Elect: "T.shuffle_elect",
}


def spelling(node: Node) -> str:
    """How a node is written."""
    if isinstance(node, Control):
        return f"T.{node.op.value}"
    return _SPELLINGS[type(node)]


def is_aligned(node: Node) -> bool:
    """True for what threads cannot do apart from those of their warp."""
    return isinstance(node, Roles | Elect) or (isinstance(node, Control) and node.op in _ALIGNED)


# ---- where roles meet ---------------------------------------------------------------------------


def with_meetings(kernel: Kernel) -> Kernel:
    """The kernel whose roles have hardware barriers that the user does not name.

    Raises:
        ResourceError: too few are left.
    """
    homes = list(dict.fromkeys(role.home for role in roles_of(kernel.body) if not role.meeting))
    if not homes:
        return kernel
    named = named_barriers(kernel.body)
    free = [n for n in range(NUM_BARRIERS - 1, 0, -1) if n not in named]
    if len(free) < len(homes):
        first = next(n for n in walk_nodes(kernel.body) if isinstance(n, Roles))
        raise ResourceError(
            f"The T.ws bodies need {len(homes)} hardware barriers of their own, but the kernel "
            f"names all but {len(free)} of the {NUM_BARRIERS - 1} that there are.",
            span=first.span,
            hint="Use fewer numbers in T.sync_threads, or T.alloc_barrier.",
        )
    meeting = dict(zip(homes, free, strict=False))

    def visit(body: Body) -> Body:
        result: list[Node] = []
        for node in body:
            fresh = node.with_bodies(*map(visit, node.bodies))
            if isinstance(fresh, Roles):
                roles = [replace(r, meeting=r.meeting or meeting[r.home]) for r in fresh.roles]
                fresh = replace(fresh, roles=tuple(roles))
            result.append(fresh)
        return tuple(result)

    return replace(kernel, body=visit(kernel.body))


# ---- who executes -------------------------------------------------------------------------------


class Executing:
    """The threads that come to the place which is visited: a role's, those that branches let in."""

    def __init__(
        self,
        kernel: Kernel,
        divergence: Divergence,
        role: Role | None = None,
        sameness: Sameness | None = None,
    ) -> None:
        self.kernel = kernel
        self.role = role or Role("block", 0, kernel.num_threads)
        self._divergence = divergence
        self._sameness = sameness or Sameness(kernel, divergence)
        self._guards: Path = ()
        self._elected: dict[Var, Expr] = {
            n.out: binary("eq", arith("floormod", self._number(), n.each), const(0, int32))
            for n in walk_nodes(kernel.body)
            if isinstance(n, Elect)
        }

    @property
    def words(self) -> str:
        """Who they are, without branches."""
        if self.role.home == (0, self.kernel.num_threads):
            return "all threads of the block"
        return f"threads {self.role.first} to {self.role.first + self.role.threads - 1}"

    def of(self, role: Role) -> Executing:
        """The threads of a role."""
        return Executing(self.kernel, self._divergence, role, self._sameness)

    @contextmanager
    def inside(self, node: Node, number: int) -> Iterator[None]:
        """Inside of one of the node's bodies."""
        before = self._guards
        if self._sameness.splits(node):
            self._guards = (*before, (node, number))
        try:
            yield
        finally:
            self._guards = before

    def after_branch(self, node: Node) -> list[Node]:
        """The branch; what closes the group of a copy that an elected thread has started stands
        after it, so that nothing but the copy is left under its condition."""
        if not isinstance(node, If) or self._guards or not node.then:
            return [node]
        *first, last = node.then
        is_commit = isinstance(last, Control) and last.op is ControlOp.STORE_COMMIT
        if not is_commit or not first or node.orelse or node.condition not in self._elected:
            return [node]
        return [replace(node, then=tuple(first)), last]

    def once(self, body: Body, node: Node, exprs: tuple[Expr, ...]) -> list[Node]:
        """The body, executed once where `exprs` are the same for all threads, else by each thread.

        Raises:
            TraceError: which thread it should be is not known before the kernel runs, or none is.
        """
        differs = self._sameness.differs(exprs, self._guards, self.role.home)
        if not self._guards:
            if differs:
                return list(body)
            return [OneThread(body=body, span=node.span)]
        threads = self._threads()
        if threads is not None and not len(threads):
            raise TraceError(
                f"No thread gets to {spelling(node)}: the conditions around it exclude each other.",
                span=node.span,
            )
        if differs or (threads is not None and len(threads) == 1):
            return list(body)
        if threads is None:
            raise TraceError(
                f"Which thread is to do {spelling(node)} is only known when the kernel runs.",
                span=node.span,
                hint="Put it under a condition on the thread's index alone, such as "
                "`if T.shuffle_elect(128):`, or outside of such conditions.",
            )
        number, first = self._number(), int(threads[0])
        if self._has_elected:  # which thread of its warp is not known
            number, first = arith("floordiv", number, WARP), first // WARP
        is_first = binary("eq", number, const(first, int32))
        return [If(condition=is_first, then=body, span=node.span)]

    @property
    def _has_elected(self) -> bool:
        exprs = [e for node, _ in self._guards for e in node.exprs]
        return any(v in self._elected for e in exprs for v in variables(e))

    def _number(self) -> Expr:
        """The thread's number in the block."""
        x, y, z = self.kernel.threads
        if (y, z) == (1, 1):
            return self.kernel.thread_vars[0]
        result: Expr = const(0, int32)
        for var, step in zip(self.kernel.thread_vars, (1, x, x * y), strict=False):
            result = arith("add", result, arith("mul", var, step))
        return result

    def _threads(self) -> Any | None:
        """The numbers of the threads that the branches let in; None when that depends on more."""
        numbers = np.arange(self.role.first, self.role.first + self.role.threads)
        values: dict[Var, Any] = {}
        rest = numbers
        for var, extent in zip(self.kernel.thread_vars, self._extents, strict=False):
            values[var] = rest % extent
            rest = rest // extent
        inside = np.ones(len(numbers), bool)
        is_known = True
        for condition, is_taken in self._tests():
            found = None if condition is None else truth(condition, values)
            if found is None:
                is_known = False  # fewer still, or none
            else:
                inside &= found if is_taken else ~found
        return numbers[inside] if is_known or inside.sum() == 1 else None

    def _tests(self) -> Iterator[tuple[Expr | None, bool]]:
        """The conditions that tell threads apart, and whether they must hold."""
        for place, (node, number) in enumerate(self._guards):
            around = self._guards[:place]
            if not isinstance(node, If):
                if self._sameness.differs(node.exprs, around, self.role.home):
                    yield None, True
                continue
            is_taken = number == 0
            for part in _conjuncts(node.condition) if is_taken else [node.condition]:
                if self._sameness.differs((part,), around, self.role.home):
                    yield substitute(part, dict(self._elected)), is_taken

    @property
    def _extents(self) -> tuple[int, ...]:
        x, y, z = self.kernel.threads
        return (1 << 30, 1, 1) if (y, z) == (1, 1) else (x, y, z)


def _conjuncts(e: Expr) -> list[Expr]:
    if isinstance(e, Op) and e.op == "and" and e.dtype.is_bool:
        return [part for child in e.children for part in _conjuncts(child)]
    return [e]


_TESTS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "not": np.logical_not,
}


def truth(e: Expr, values: dict[Var, Any]) -> Any | None:
    """A condition for each thread, from its thread's variables; None when it needs more."""
    done: dict[Expr, Any] = {}
    for node in walk(e):
        if isinstance(node, Const):
            done[node] = np.asarray(node.value)
        elif isinstance(node, Var):
            if node not in values:
                return None
            done[node] = values[node]
        elif isinstance(node, Op) and node.op == "cast" and not node.dtype.is_float:
            done[node] = done[node.children[0]]
        elif isinstance(node, Op) and node.op in (INTEGER.keys() | _TESTS.keys()):
            function = _TESTS.get(node.op) or INTEGER[node.op]
            done[node] = function(*(done[c] for c in node.children))
        else:
            return None
    return np.broadcast_to(np.asarray(done[e], bool), next(iter(values.values())).shape)


# ---- copies and multiplies ----------------------------------------------------------------------


def bulk_copy(node: Copy, kernel: Kernel, executing: Executing) -> list[Node]:
    """A T.tma_copy with its atom, by the thread that issues it.

    Raises:
        UnsupportedError: the accelerator cannot make it.
    """
    reason = misfit(node, kernel)
    if reason:
        source, target = node.src.buffer, node.dst.buffer
        raise UnsupportedError(
            f"T.tma_copy cannot bring {source.name} to {target.name}: {reason}.",
            span=node.span,
            related=kernel.given.related(source, target),
            hint="T.copy moves any tile.",
        )
    chosen = replace(node, atom=CopyAtom(CopyMethod.TMA, 0))
    issued = executing.once((chosen,), node, node.exprs)
    if node.dst.buffer.scope is Scope.GLOBAL:  # a group without copies is complete
        issued.append(Control(op=ControlOp.STORE_COMMIT, span=node.span))
    return issued


def started_multiply(node: Gemm, kernel: Kernel, target: Target, threads: int) -> Gemm:
    """A T.wgmma_gemm with its atom.

    Raises:
        UnsupportedError: warpgroups cannot multiply such tiles.
    """
    found: WgmmaAtom | str = choose_wgmma(node, kernel, target, threads)
    viewed = {b.root for b in kernel.buffers if b.is_view}
    started = [n for n in walk_nodes(kernel.body) if isinstance(n, Copy) and n.is_async]
    unrounded = unrounded_tiles(kernel, started)
    for region in (node.a, node.b):
        if region.buffer.root in unrounded:
            found = f"{region.buffer.name} is not rounded to tf32 on its way into shared memory"
        if region.buffer.scope is Scope.SHARED and region.buffer in viewed:
            found = f"{region.buffer.name} has views, so it lies in plain rows"
        if region.buffer.root in {c.dst.buffer.root for c in pipelined_copies(kernel)}:
            found = f"{region.buffer.name} is filled ahead by T.Pipelined, where T.gemm waits"
    if isinstance(found, str):
        raise UnsupportedError(
            f"T.wgmma_gemm: warpgroups cannot multiply these tiles: {found}.",
            span=node.span,
            related=kernel.given.related(*(r.buffer for r in node.regions)),
            hint="T.gemm takes any tiles that have an instruction.",
        )
    return replace(node, atom=found)
