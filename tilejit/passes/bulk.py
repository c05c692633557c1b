"""Copies that the user asks the tensor memory accelerator for, made at once: started by one thread,
waited for by all.

Knows what such a copy becomes. Does not know which threads there are, slots or boxes.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.dtypes import int32, uint64
from tilejit.errors import UnsupportedError
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Var, VarKind, binary, const, index
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Load, Node, OneThread, Store, walk
from tilejit.ir.sync import BarrierArrive, BarrierSlot, BarrierWait, Control, ControlOp
from tilejit.isa.atom import CopyAtom, CopyMethod
from tilejit.ops.copy import Copy
from tilejit.passes.tma import misfit
from tilejit.target import Feature, Target


def refused(node: Copy, reason: str, kernel: Kernel) -> UnsupportedError:
    """The error where the accelerator is asked for and cannot do it."""
    asked, argument = 'T.copy: prefer_instruction="tma"', "prefer_instruction"
    if node.combine is not None:
        asked, argument = f"T.atomic_{node.combine}: use_tma=True", "use_tma"
    return UnsupportedError(
        f"{asked} is not possible: {reason}.",
        span=node.span,
        related=kernel.given.related(node.src.buffer, node.dst.buffer),
        hint=f"Leave {argument} out: {asked.partition(':')[0]} then chooses.",
    )


def check_preferences(kernel: Kernel) -> None:
    """
    Raises:
        UnsupportedError: a copy that the accelerator was asked for is made otherwise.
    """
    for node in walk(kernel.body):
        if isinstance(node, Copy) and node.prefer == "tma" and not node.is_tma:
            raise refused(node, misfit(node, kernel) or "no producer brings it", kernel)


def whole_copy(node: Copy, kernel: Kernel, target: Target) -> tuple[list[Node], list[Node]]:
    """A copy that is over when it is left, and what the kernel begins with for it.

    Raises:
        UnsupportedError: the accelerator cannot make it.
    """
    reason = misfit(node, kernel)
    if not target.has(Feature.TMA):
        reason = f"it needs {Feature.TMA}, which {target} lacks"
    if reason:
        raise refused(node, reason, kernel)
    span = node.span
    started = replace(node, atom=CopyAtom(CopyMethod.TMA, 0))
    if node.dst.buffer.scope is Scope.GLOBAL:
        rest = (
            Control(op=ControlOp.STORE_COMMIT, span=span),
            Control(op=ControlOp.STORE_WAIT_READ, span=span),
        )
        return [OneThread(body=(started, *rest), span=span)], []
    name = node.dst.buffer.name
    full = Buffer(
        name=f"{name}_full",
        shape=(index(1),),
        dtype=uint64,
        scope=Scope.BARRIER,
        arrive_counts=(1,),
        span=span,
    )
    turns = Buffer(name=f"{name}_turns", shape=(index(1),), dtype=int32, scope=Scope.VAR)
    turn = Var(turns.name, int32, VarKind.VALUE, index(0), index(1))
    at = (index(0),)
    first = Store(buffer=turns, index=at, value=const(0, int32), span=span)
    brought = replace(started, barrier=BarrierSlot(full, index(0)))
    arrive = BarrierArrive(barrier=full, slot=index(0), span=span)
    nodes: list[Node] = [
        OneThread(body=(brought, arrive), span=span),
        Load(out=turn, buffer=turns, index=at, span=span),
        BarrierWait(barrier=full, slot=index(0), parity=turn, span=span),
        Store(buffer=turns, index=at, value=binary("xor", turn, const(1, int32)), span=span),
    ]
    return nodes, [first]
