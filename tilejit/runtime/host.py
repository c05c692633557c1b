"""Index expressions evaluated on the host: grids, extents of outputs, declared shapes.

Knows `ir.expr`. Does not know arguments or launches. Numbers are Python ints: nothing wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tilejit.ir.expr import Const, Expr, Op, Var, show, walk

_BINARY = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "floormod": "%",
    "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>", "pow": "**",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip


def _truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _truncated_rest(a: int, b: int) -> int:
    return a - _truncated_quotient(a, b) * b


_INTEGER_CALLS = {"div": _truncated_quotient, "fmod": _truncated_rest}
_CALLS = {"min": min, "max": max, "abs": abs}


def _text(node: Expr, done: dict[Expr, str], names: dict[Var, str]) -> str:
    if isinstance(node, Const):
        return repr(node.value)
    if isinstance(node, Var):
        return names[node]
    assert isinstance(node, Op)
    args = [done[c] for c in node.children]
    if node.op in _INTEGER_CALLS and node.dtype.is_integer:
        return f"{node.op}({', '.join(args)})"
    if node.op in _BINARY:
        return f"({args[0]} {_BINARY[node.op]} {args[1]})"
    if node.op in _CALLS:
        return f"{node.op}({', '.join(args)})"
    if node.op == "select":
        return f"({args[1]} if {args[0]} else {args[2]})"
    if node.op == "cast":
        if node.dtype.is_bool:
            return f"({args[0]} != 0)"
        return f"int({args[0]})" if node.dtype.is_integer else f"float({args[0]})"
    if node.op == "neg":
        return f"(-{args[0]})"
    if node.op == "not":
        return f"(not {args[0]})" if node.dtype.is_bool else f"(~{args[0]})"
    raise AssertionError(f"{show(node)} has no value on the host")


def host_function(exprs: Sequence[Expr], variables: Sequence[Var]) -> Callable[..., Any]:
    """A function of the variables' values, in order, that returns a tuple of the expressions'."""
    names = {v: f"v{n}" for n, v in enumerate(variables)}
    texts: list[str] = []
    for e in exprs:
        done: dict[Expr, str] = {}
        for node in walk(e):
            done[node] = _text(node, done, names)
        texts.append(done[e])
    source = f"lambda {', '.join(names.values())}: ({''.join(t + ', ' for t in texts)})"
    known = {"__builtins__": {}, "int": int, "float": float, **_CALLS, **_INTEGER_CALLS}
    return eval(source, known)  # type: ignore[no-any-return]
