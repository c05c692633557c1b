"""A user's function: the run that turns it into a `Program`.

Knows what each kind of argument becomes inside the function. Does not know real arrays, signatures
or caches (`runtime`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, cast

from tilejit.dtypes import int64
from tilejit.errors import ArgumentTypeError, Span, TraceError, definition_span
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Expr, Var, VarKind, const, index, int_value
from tilejit.ir.kernel import Program
from tilejit.language.declare import Again
from tilejit.language.handle import BufferHandle
from tilejit.language.parameters import (
    DEFAULT_ALIGN,
    Argument,
    ConstArg,
    ParameterRule,
    PointerArg,
    ScalarArg,
    TensorArg,
    rules_of,
    user_function,
)
from tilejit.language.program import make_program
from tilejit.language.rewrite import rewrite
from tilejit.language.trace import Trace, current, tracing
from tilejit.language.value import Value

__all__ = [
    "Argument",
    "ConstArg",
    "Macro",
    "ParameterRule",
    "PointerArg",
    "PrimFunc",
    "ScalarArg",
    "TensorArg",
    "TracedFunction",
    "macro",
    "prim_func",
]


class TracedFunction:
    """A Python function that can be traced.

    Raises:
        TraceError: not a function written with `def`.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        taken = user_function(fn)
        self.user = taken
        self.function = taken.python
        self.name = taken.name
        self.span = taken.span
        self._lock = threading.Lock()
        self._rewritten: Callable[..., Any] | None = None
        functools.update_wrapper(cast(Any, self), fn)

    @functools.cached_property
    def parameters(self) -> Mapping[str, ParameterRule]:
        """The rule of each parameter, in order."""
        return rules_of(self.user)

    @functools.cached_property
    def _places(self) -> dict[str, Span]:
        """Where each parameter is written."""
        code = self.function.__code__
        return {name: definition_span(code, name) for name in self.parameters}

    def place_of(self, parameter: str) -> Span:
        """Where a parameter is written."""
        return self._places[parameter]

    def trace(
        self, args: Mapping[str, Argument], *, name: str | None = None, fast_math: bool = False
    ) -> Program | PrimFunc:
        """Run the function on proxies and return what it recorded.

        args: by parameter name; parameters declared by their annotation may be left out.

        Raises:
            TileError: a mistake in the function, at its line.
        """
        with self._lock:
            if self._rewritten is None:
                self._rewritten = rewrite(self.function)
        known: dict[str, object] = {}
        while True:
            host = Trace(name or self.name, span=self.span)
            host.known = known
            try:
                return self._run(host, self._rewritten, args, fast_math)
            except Again as again:  # now with the numbers of more extents
                known = again.known

    def _run(
        self,
        host: Trace,
        function: Callable[..., Any],
        args: Mapping[str, Argument],
        fast_math: bool,
    ) -> Program | PrimFunc:
        overlaps: dict[Expr, frozenset[str]] = {}
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for rule in self.parameters.values():
            value = _enter_argument(host, self, rule, args.get(rule.name), overlaps)
            if rule.is_keyword_only:
                named[rule.name] = value
            else:
                positional.append(value)
        with tracing(host):
            result = function(*positional, **named)
        if host.failures:
            raise host.failures[0]
        if isinstance(result, PrimFunc) and not host.kernels:
            return result
        return make_program(host, result, overlaps, fast_math)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class PrimFunc(TracedFunction):
    """What `@T.prim_func` makes: a traced function with declared parameters, for a factory to
    return."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TraceError(
            f"`{self.name}` is a @T.prim_func, which is not called itself.",
            hint="Return it from a @tilejit function, and call what that returns.",
        )


def prim_func(fn: Callable[..., Any]) -> PrimFunc:
    """Mark the function that a @tilejit factory returns; its parameters are all declared."""
    return PrimFunc(fn)


class Macro:
    """A function that is traced into its caller at every call."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = user_function(fn).python
        functools.update_wrapper(self, fn)

    @functools.cached_property
    def _rewritten(self) -> Callable[..., Any]:
        return rewrite(self.fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current() is None:
            raise TraceError(
                f"`{self.fn.__name__}` is a @T.macro and only allowed inside a @tilejit function.",
                hint="Call it from the function that opens T.Kernel.",
            )
        return self._rewritten(*args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)


def macro(fn: Callable[..., Any]) -> Macro:
    """Make a helper whose loops and branches are traced like the kernel's own.

    Its parameters may be tiles, traced values and Python values; assigning to one does not change
    the caller's variable.
    """
    return Macro(fn)


def _enter_argument(
    host: Trace,
    function: TracedFunction,
    rule: ParameterRule,
    arg: Argument | None,
    overlaps: dict[Expr, frozenset[str]],
) -> Any:
    """What the parameter is bound to inside the function."""
    if isinstance(arg, ConstArg):
        return arg.value
    span = function.place_of(rule.name)
    if rule.kind == "declared" and (arg is None or isinstance(arg, TensorArg)):
        return _tensor(host, rule.name, rule.annotation.buffer, arg, span, overlaps)
    if isinstance(arg, TensorArg):
        return _tensor(host, rule.name, None, arg, span, overlaps)
    if isinstance(arg, PointerArg) or (arg is None and rule.kind == "pointer"):
        promises = arg if isinstance(arg, PointerArg) and arg.is_size_var else rule.annotation
        is_size = getattr(promises, "is_size_var", False)
        low = const(0, int64) if is_size else None
        return _variable(host, Var(rule.name, int64, VarKind.POINTER, low))
    if isinstance(arg, ScalarArg):
        return _variable(host, Var(rule.name, arg.dtype, VarKind.SCALAR))
    if rule.kind == "scalar":
        return _variable(host, Var(rule.name, rule.annotation, VarKind.SCALAR))
    if rule.has_default:
        return rule.default
    raise ArgumentTypeError(
        f"`{function.name}` needs an argument for `{rule.name}`.", span=function.span
    )


def _variable(host: Trace, var: Var) -> Value:
    host.unique_name(var.name)
    host.arguments.append(var)
    return Value(var)


def _tensor(
    host: Trace,
    name: str,
    declared: Buffer | None,
    arg: TensorArg | None,
    span: Span,
    overlaps: dict[Expr, frozenset[str]],
) -> BufferHandle:
    host.unique_name(name)
    data = Var(name, int64, VarKind.POINTER)
    if declared is not None:
        align = arg.align if arg is not None else declared.align or DEFAULT_ALIGN
        buffer = Buffer(
            name=name,
            shape=declared.shape,
            dtype=declared.dtype,
            scope=Scope.GLOBAL,
            strides=declared.strides,
            data=data,
            offset=declared.offset,
            align=align,
            broadcasts=declared.broadcasts,
            span=declared.span or span,
        )
    else:
        assert arg is not None, f"{name} has no array"
        buffer = Buffer(
            name=name,
            shape=tuple(index(n) for n in arg.shape),
            dtype=arg.dtype,
            scope=Scope.GLOBAL,
            strides=_strides(arg),
            data=data,
            align=arg.align,
            span=span,
        )
    overlaps[data] = arg.overlaps if arg is not None else frozenset()
    host.arguments.append(buffer)
    return BufferHandle(buffer)


def _strides(arg: TensorArg) -> tuple[Expr, ...] | None:
    """The strides, or None when they are those of a compact row-major array."""
    given = tuple(index(s) for s in arg.strides)
    bare = Buffer(
        name="", shape=tuple(index(n) for n in arg.shape), dtype=arg.dtype, scope=Scope.GLOBAL
    )
    is_compact = all(
        step is own or int_value(extent) == 1
        for step, own, extent in zip(given, bare.element_strides, bare.shape, strict=True)
    )
    return None if is_compact else given
