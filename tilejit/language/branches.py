"""`T.If`, `T.Then`, `T.Else` and `T.While`.

Knows the nodes of branches and while loops, and which reads a condition repeats. Does not know
how Python's `if` and `while` reach them (`constructs`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tilejit.errors import TraceError, caller_span
from tilejit.ir.expr import Expr, variables
from tilejit.ir.node import If as IfNode
from tilejit.ir.node import Load, Node
from tilejit.ir.node import While as WhileNode
from tilejit.language.context import Context, require_read_source
from tilejit.language.trace import Frame, FrameKind, Trace, current_kernel, drop_nodes
from tilejit.language.value import Scalar, Value, as_condition


class If(Context):
    """`with T.If(cond): ...`, optionally followed by `with T.Else(): ...`.

    TileLang's form works too: `with T.If(c):` around `with T.Then():` and `with T.Else():`.

    cond: a traced bool or number (true when not 0).
    """

    def __init__(self, condition: Any) -> None:
        self.span = caller_span()
        self.condition = as_condition(condition, "condition of T.If")
        self.orelse: tuple[Node, ...] = ()
        self.has_then = False  # a T.Then inside it is over: TileLang's form
        self.frame: Frame | None = None

    def __enter__(self) -> None:
        require_read_source("T.If")
        self.open()
        assert self.frame is not None, "just opened"
        self.frame.owner = self

    def open(self) -> None:
        trace = current_kernel("T.If")
        trace.check_scope(self.condition, self.span)
        self.frame = trace.push(FrameKind.BRANCH, self.span)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()

    def close(self) -> None:
        trace = current_kernel("T.If")
        assert self.frame is not None, "left a branch that was not entered"
        body = tuple(trace.pop(self.frame))
        trace.add(IfNode(condition=self.condition, then=body, orelse=self.orelse, span=self.span))


class Then(Context):
    """The first branch inside `with T.If(cond):`, in TileLang's form."""

    def __enter__(self) -> None:
        trace = current_kernel("T.Then")
        if not isinstance(trace.frame.owner, If):
            raise TraceError("T.Then must stand directly inside `with T.If(cond):`.")
        self.outer = trace.frame.owner

    def __exit__(self, *details: object) -> None:
        self.outer.has_then = True


class Else(Context):
    """What runs when the condition of the T.If just before (or around) it is false."""

    def __init__(self) -> None:
        self.span = caller_span()
        self.outer: If | None = None
        self.frame: Frame | None = None

    def __enter__(self) -> None:
        require_read_source("T.Else")
        self.open()

    def open(self) -> None:
        trace = current_kernel("T.Else")
        nodes, owner = trace.frame.nodes, trace.frame.owner
        if isinstance(owner, If) and (owner.has_then or not nodes):
            self.outer = owner
        elif not nodes or not isinstance(nodes[-1], IfNode) or nodes[-1].orelse:
            raise TraceError(
                "T.Else has no T.If just before it.",
                hint="Write `with T.If(cond):` and `with T.Else():` one after the other.",
            )
        self.frame = trace.push(FrameKind.BRANCH, self.span)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()

    def close(self) -> None:
        trace = current_kernel("T.Else")
        assert self.frame is not None, "left a branch that was not entered"
        body = tuple(trace.pop(self.frame))
        if self.outer is not None:
            self.outer.orelse = body
            return
        before = trace.frame.nodes[-1]
        assert isinstance(before, IfNode), "something was recorded between T.If and T.Else"
        trace.frame.nodes[-1] = dataclasses.replace(before, orelse=body)


class While(Context):
    """`with T.While(cond): ...`: repeat while `cond` holds.

    cond: a traced value whose reads stand inside the call, `T.While(x[0] < n)`, or a function
        that computes it; both are evaluated anew before every round.

    Raises:
        TraceError: a condition that nothing in the loop can change.
    """

    def __init__(self, condition: Any) -> None:
        self.span = caller_span()
        self.given = condition
        self.frame: Frame | None = None
        self.test: tuple[Node, ...] = ()
        self.condition: Expr | None = None

    def __enter__(self) -> None:
        require_read_source("T.While")
        trace = current_kernel("T.While")
        if isinstance(self.given, Scalar) and not isinstance(self.given, Value):
            self.open_test()
            self.open_body(Value(self.given.scalar()))  # a T.alloc_var is read every round
            return
        if callable(self.given):
            self.open_test()
            self.open_body(self.given())
            return
        condition = as_condition(self.given, "condition of T.While")
        moved = self._loads_of_call(trace, condition)
        drop_nodes(trace.frame, moved)
        frame = self.open_test()
        for load in moved:
            trace.define(load.out, load.span)
        frame.nodes.extend(moved)
        self.open_body(condition)

    def _loads_of_call(self, trace: Trace, condition: Expr) -> list[Load]:
        """Reads written inside the T.While(...) call that its condition depends on."""
        wanted = variables(condition)
        moved: list[Load] = []
        for node in reversed(trace.frame.nodes):
            if not isinstance(node, Load) or node.out not in wanted:
                continue
            if self.span is not None and node.span is not None and self.span.encloses(node.span):
                moved.append(node)
                for e in node.index:
                    wanted |= variables(e)
        return moved[::-1]

    def open_test(self) -> Frame:
        """Open the frame in which the condition is computed."""
        self.frame = current_kernel("T.While").push(FrameKind.WHILE, self.span)
        return self.frame

    def open_body(self, condition: object) -> None:
        """The nodes so far are the test; those to come are the body."""
        trace = current_kernel("T.While")
        assert self.frame is not None, "the test was not opened"
        self.condition = as_condition(condition, "condition of T.While")
        trace.check_scope(self.condition, self.span)
        self.test = tuple(self.frame.nodes)
        self.frame.nodes.clear()
        fresh = {var for node in self.test for var in node.defines}
        if not fresh & variables(self.condition):
            raise TraceError(
                "The condition of the while loop is computed before the loop, so it never changes.",
                span=self.span,
                hint="Read what changes inside it: `with T.While(x[0] < n):`, or pass a lambda.",
            )

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()

    def close(self) -> None:
        trace = current_kernel("T.While")
        assert self.frame is not None and self.condition is not None, "the loop was not entered"
        body = tuple(trace.pop(self.frame))
        trace.add(WhileNode(test=self.test, condition=self.condition, body=body, span=self.span))
