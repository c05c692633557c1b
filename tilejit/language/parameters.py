"""Parameters of a traced function: kinds of arguments, and what an annotation means.

Knows annotations and the names they use. Does not know real arrays (`runtime`) or traces.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any, Literal

from tilejit.dtypes import DType, lookup
from tilejit.errors import ArgumentError, Span, TraceError, definition_span, is_internal
from tilejit.ir.buffer import Scope
from tilejit.ir.expr import Expr
from tilejit.language.handle import BufferHandle

# Annotations that say how a value looks to Python: compile-time constants.
_CONSTANT = (int, float, bool, str)
DEFAULT_ALIGN = 16  # bytes, promised of a declared tensor unless it says otherwise


@dataclass(frozen=True)
class TensorArg:
    """What tracing may know of an array argument.

    shape, strides: in elements; ints, or expressions of symbols. align: bytes that divide the
    address. overlaps: names of arguments that share bytes with it.
    """

    shape: tuple[int | Expr, ...]
    strides: tuple[int | Expr, ...]
    dtype: DType
    align: int = DEFAULT_ALIGN
    overlaps: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ScalarArg:
    """A number known only when the kernel runs."""

    dtype: DType


@dataclass(frozen=True)
class PointerArg:
    """An address. dtype: what it points at, if said."""

    dtype: DType | None = None
    scope: Scope = Scope.GLOBAL
    is_size_var: bool = False


@dataclass(frozen=True)
class ConstArg:
    """A value that the trace may depend on."""

    value: Any


Argument = TensorArg | ScalarArg | PointerArg | ConstArg
Kind = Literal["tensor", "declared", "scalar", "pointer", "constant", "auto"]


@dataclass(frozen=True)
class ParameterRule:
    """How a parameter takes its argument.

    kind: tensor (any array), declared (annotation is a spec with `.buffer`), scalar (annotation is
        a dtype), pointer, constant, auto (arrays are tensors, all else constants).
    """

    name: str
    kind: Kind
    annotation: Any = None
    default: Any = inspect.Parameter.empty
    is_keyword_only: bool = False

    @property
    def has_default(self) -> bool:
        return self.default is not inspect.Parameter.empty


@dataclass(frozen=True)
class UserFunction:
    """What a user decorated.

    around: local names where it was decorated, for annotations that are text.
    """

    python: FunctionType
    name: str
    span: Span
    around: dict[str, Any]


def user_function(fn: object) -> UserFunction:
    """Take `fn` in, as it is decorated.

    Raises:
        TraceError: not a function written with `def`.
    """
    if not isinstance(fn, FunctionType):
        shown = "A class" if isinstance(fn, type) else repr(fn)
        raise TraceError(
            f"{shown} is not a Python function that tilejit can trace.",
            hint="Decorate a function written with `def`.",
        )
    span = definition_span(fn.__code__)
    return UserFunction(fn, fn.__name__, span, _caller_names() if _has_text_annotations(fn) else {})


def rules_of(function: UserFunction) -> dict[str, ParameterRule]:
    """The rule of each parameter, in order.

    Raises:
        ArgumentError: starred parameters, or one declared outside global memory.
        TraceError: an annotation with an undefined name.
    """
    rules: dict[str, ParameterRule] = {}
    for parameter in inspect.signature(function.python).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ArgumentError(
                f"`{function.name}` takes `*{parameter.name}`; a kernel's parameters are named.",
                span=function.span,
                hint="List every parameter.",
            )
        rules[parameter.name] = make_rule(function, parameter)
    return rules


def make_rule(function: UserFunction, parameter: inspect.Parameter) -> ParameterRule:
    note = _annotation(function, parameter)
    is_keyword_only = parameter.kind is parameter.KEYWORD_ONLY
    kind: Kind
    if isinstance(note, BufferHandle):
        kind = "declared"
        if note.buffer.scope is not Scope.GLOBAL:
            raise ArgumentError(
                f"`{parameter.name}` of `{function.name}` is declared in "
                f"{note.buffer.scope.words}; arguments are in global memory.",
                span=function.span,
                hint="Declare it with T.Tensor, and allocate inside the kernel.",
            )
    elif getattr(note, "is_pointer_type", False):
        kind = "pointer"
    elif hasattr(note, "from_ptr"):
        kind = "tensor"
    elif isinstance(note, DType):
        kind = "scalar"
    elif any(note is t for t in _CONSTANT) or (note is None and is_keyword_only):
        kind = "constant"
    elif lookup_scalar(note) is not None:
        kind, note = "scalar", lookup_scalar(note)
    else:
        kind = "auto"
    return ParameterRule(parameter.name, kind, note, parameter.default, is_keyword_only)


def _annotation(function: UserFunction, parameter: inspect.Parameter) -> Any:
    note = parameter.annotation
    if note is parameter.empty:
        return None
    if not isinstance(note, str):
        return note
    names = {**function.around, **_closure(function.python)}
    try:
        return eval(note, function.python.__globals__, names)
    except NameError as error:
        dtype = lookup(note)
        if dtype is not None:
            return dtype
        raise TraceError(
            f"The annotation `{note}` of `{parameter.name}` uses a name that is not defined: "
            f"{error}.",
            span=function.span,
        ) from None


def lookup_scalar(note: object) -> DType | None:
    """The dtype that an annotation such as `np.float32` or "float32" names."""
    is_spelling = isinstance(note, str | type) or type(note).__name__ == "dtype"
    return lookup(note) if is_spelling and note not in (object, type) else None


def _has_text_annotations(fn: FunctionType) -> bool:
    return any(isinstance(a, str) for a in fn.__annotations__.values())


def _caller_names() -> dict[str, Any]:
    """Local names where the function is decorated: its annotations may use them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_internal(frame):
        frame = frame.f_back
    if frame is None or frame.f_locals is frame.f_globals:
        return {}
    return dict(frame.f_locals)


def _closure(fn: FunctionType) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return names
