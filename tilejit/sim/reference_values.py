"""Evaluates scalar expressions for one block, for all iterations or threads at once.

Knows expressions and variables' values. Does not know memory or control flow.

A value that is the same everywhere is a Python int or bool, or (floats) an array without
dimensions; one that differs is an array that broadcasts over the lanes: the block's threads, or the
box of a `T.Parallel`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tilejit.dtypes import DType, int64
from tilejit.errors import SimulationError, Span
from tilejit.ir.analysis import is_whole, keeps_value
from tilejit.ir.expr import FOLD, Const, Expr, Op, Var
from tilejit.ops.scalar import Array, bitcast_array, cast_array, evaluate_op

Value = Any  # int | bool | Array

# Operations on numbers that are the same everywhere; dividing by 0 gives 0.
_UNIFORM: dict[str, Callable[[Any, Any], Any]] = {
    **{op: FOLD[op] for op in FOLD if op not in ("div", "fmod")},
    "floordiv": lambda a, b: a // b if b else 0,
    "floormod": lambda a, b: a % b if b else 0,
}
# In an index, by constants within the width only.
_SHIFTS: dict[str, Callable[[int, int], int]] = {"shl": operator.lshift, "shr": operator.rshift}
# Operations that take arrays of whole numbers as they are.
_WHOLE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}


class ThreadDependent:
    """Stands for a thread's own value where no single thread is meant (inside T.Parallel)."""


def is_lane_value(value: Value) -> bool:
    """True for a value that differs between lanes."""
    return isinstance(value, np.ndarray) and value.ndim > 0


def wrap(value: int, dtype: DType) -> int:
    """The integer reduced to the range of the dtype."""
    value &= (1 << dtype.bits) - 1
    return value - (1 << dtype.bits) if dtype.is_signed and value >> (dtype.bits - 1) else value


def as_value(value: Any, dtype: DType) -> Value:
    """A number or array as the value of a variable of `dtype`."""
    if isinstance(value, np.ndarray) and value.ndim:
        return value
    if dtype.is_integer:
        return wrap(int(value), dtype)
    return bool(value) if dtype.is_bool else np.asarray(value, dtype.numpy)


def as_array(value: Value, dtype: DType) -> Array:
    """The value as an array of the dtype."""
    return value if isinstance(value, np.ndarray) else np.asarray(value, dtype.numpy)


class Values:
    """The values of variables, and of expressions of them.

    span: the node being executed, for errors.
    """

    def __init__(self) -> None:
        self.variables: dict[Var, Value] = {}
        self.span: Span | None = None
        self._orders: dict[Expr, list[Op]] = {}
        self._constants: dict[Const, Value] = {}

    def value(self, e: Expr) -> Value:
        """The value of `e` in the arithmetic of its dtype."""
        if not isinstance(e, Op):
            return self._leaf(e)
        done: dict[Expr, Value] = {}
        for node in self._order(e):
            args = [done[c] if isinstance(c, Op) else self._leaf(c) for c in node.children]
            done[node] = _apply(node, args)
        return done[e]

    def whole(self, e: Expr) -> Value:
        """The value of an index expression in whole numbers: nothing wraps at 32 bits."""
        if isinstance(e, Op) and e.op == "cast" and keeps_value(e):
            value = self.whole(e.children[0])
        elif not isinstance(e, Op) or not is_whole(e):
            value = self.value(e)
        elif e.op == "select":
            condition = self.value(e.children[0])
            a, b = self.whole(e.children[1]), self.whole(e.children[2])
            value = np.where(condition, a, b) if isinstance(condition, np.ndarray) else None
            value = (a if condition else b) if value is None else value
        else:
            value = _apply_whole(e.op, [self.whole(c) for c in e.children])
        if isinstance(value, np.ndarray):
            return value.astype(np.int64, copy=False) if value.ndim else int(value)
        return value

    def _leaf(self, e: Expr) -> Value:
        if isinstance(e, Const):
            value = self._constants.get(e)
            if value is None:
                value = self._constants[e] = as_value(e.value, e.dtype)
            return value
        assert isinstance(e, Var)
        value = self.variables.get(e)
        if value is None:
            raise AssertionError(f"{e.name} has no value where it is used")
        if isinstance(value, ThreadDependent):
            raise SimulationError(
                f"`{e.name}` differs between threads, and T.Parallel does not say which thread "
                "runs which iteration.",
                span=self.span,
                hint="Compute it from the iteration's own variables.",
            )
        return value

    def _order(self, e: Op) -> list[Op]:
        """The operations in `e`, operands first."""
        order = self._orders.get(e)
        if order is None:
            order = self._orders[e] = []
            seen: set[Expr] = set()
            stack: list[tuple[Op, bool]] = [(e, False)]
            while stack:
                node, ready = stack.pop()
                if ready:
                    order.append(node)
                elif node not in seen:
                    seen.add(node)
                    stack.append((node, True))
                    stack.extend((c, False) for c in node.children if isinstance(c, Op))
        return order


def _apply(node: Op, args: list[Value]) -> Value:
    source = node.children[-1].dtype
    uniform = not any(isinstance(a, np.ndarray) for a in args)
    if uniform and node.op in _UNIFORM:
        value = _UNIFORM[node.op](args[0], args[1])
        return wrap(value, node.dtype) if node.dtype.is_integer else bool(value)
    if node.op == "select" and not is_lane_value(args[0]):
        return args[1] if args[0] else args[2]
    if node.op == "cast":
        if uniform and source.is_integer and node.dtype.is_integer:
            return wrap(args[0], node.dtype)
        result = cast_array(as_array(args[0], source), source, node.dtype)
    elif node.op == "bitcast":
        result = bitcast_array(as_array(args[0], source), source, node.dtype)
    else:
        arrays = [as_array(a, c.dtype) for a, c in zip(args, node.children, strict=True)]
        result = evaluate_op(node.op, arrays, source)
    if result.ndim == 0 and not node.dtype.is_float:
        return result.item()
    return result


def _apply_whole(op: str, args: list[Value]) -> Value:
    if op == "neg":
        return -args[0]
    a, b = args
    if not isinstance(a, np.ndarray) and not isinstance(b, np.ndarray):
        return (_SHIFTS.get(op) or _UNIFORM[op])(a, b)
    if op in _WHOLE:
        return _WHOLE[op](a, b)
    return evaluate_op(op, (np.asarray(a, np.int64), np.asarray(b, np.int64)), int64)
