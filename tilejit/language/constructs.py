"""What rewritten Python statements call: each looks at run time whether its operands are traced.

Knows the meaning of `if`, `while`, `and`, `x = e`, `break` ... on traced values, and keeps Python's
meaning for all else. Does not know syntax trees (`rewrite`).
"""

from __future__ import annotations

import builtins
import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilejit.dtypes import DType, bool_
from tilejit.errors import Span, TraceError, caller_span
from tilejit.ir.expr import Const, binary, const, unary
from tilejit.ir.expr import select as select_expr
from tilejit.ir.node import LoopKind
from tilejit.language.declare import bind_declared
from tilejit.language.frames import (
    Context,
    DeviceLoop,
    Else,
    If,
    RangeLoop,
    While,
    left_early,
)
from tilejit.language.handle import BufferHandle, RegionHandle, VarHandle
from tilejit.language.trace import Frame, current, current_kernel
from tilejit.language.value import Scalar, Value, as_condition, is_scalar, select

Thunk = Callable[[], Any]


def is_traced(x: object) -> bool:
    """True for a number that is only known when the kernel runs."""
    if isinstance(x, VarHandle):
        return True
    return isinstance(x, Value) and not isinstance(x.expr, Const)


def frame() -> Frame | None:
    """The frame that is being recorded now."""
    trace = current()
    return trace.frame if trace is not None else None


# -- names ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Binding:
    """What a name is bound to, and where that happened."""

    value: Any
    frame: Frame | None
    span: Span | None
    is_parameter: bool = False

    @property
    def is_live(self) -> bool:
        return self.frame is None or self.frame.is_open


class Scope:
    """The local names of one run of a traced function.

    Finds what tracing would get wrong: a name bound outside a device loop or branch and re-bound
    inside, and one that is read after the loop or branch that bound it.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.base = frame()
        self.bound = {
            name: Binding(value, self.base, None, is_parameter=True)
            for name, value in arguments.items()
        }

    def bind(self, name: str, value: Any) -> Any:
        """`name = value`: what the name is to hold. A `T.alloc_var` is stored to instead."""
        old = self.bound.get(name)
        if old is None or not old.is_live:
            return self.target(name, value)
        is_number = is_scalar(value) and not isinstance(value, BufferHandle)
        if is_number and isinstance(old.value, VarHandle) and not old.is_parameter:
            old.value.set(value)
            return old.value
        control = _control_between(frame(), old.frame)
        if control is not None and value is not old.value:
            raise TraceError(
                f"`{name}` is re-bound inside {control.place}, which tracing would run only once.",
                related=[(old.span, "bound here")],
                hint=f"Make it a variable of the device: `{name} = T.alloc_var(dtype, init=...)`.",
            )
        return self.target(name, value)

    def target(self, name: str, value: Any) -> Any:
        """`name` is bound by a `for`, a `with` or for the first time."""
        self.bound[name] = Binding(value, frame(), caller_span())
        return value

    def read(self, name: str, value: Any) -> Any:
        """The value of a name, unless the loop or branch that bound it is over."""
        binding = self.bound.get(name)
        if binding is None or binding.is_live:
            return value
        assert binding.frame is not None, "a live binding"
        if not binding.frame.is_device_control:
            return value
        raise TraceError(
            f"`{name}` is bound inside {binding.frame.place} and read after it.",
            related=[(binding.span, "bound here")],
            hint=f"Make it a variable of the device before: `{name} = T.alloc_var(dtype)`; for a "
            "choice of two values write `T.if_then_else(cond, a, b)`.",
        )

    def container(self, name: str, value: Any) -> Any:
        """What `name[...] = e` stores to: a tile, or a Python object of the same loop."""
        binding = self.bound.get(name)
        if binding is None or not binding.is_live or isinstance(value, BufferHandle | RegionHandle):
            return value
        control = _control_between(frame(), binding.frame)
        if control is None:
            return value
        raise TraceError(
            f"An item of `{name}`, a Python {type(value).__name__}, is set inside {control.place}, "
            "which tracing would run only once.",
            related=[(binding.span, "bound here")],
            hint="Keep values of the device in T.alloc_local or T.alloc_var.",
        )

    def leave(self, value: Any = None) -> Any:
        """`return value`."""
        control = _control_between(frame(), self.base)
        if control is not None:
            raise TraceError(
                f"`return` inside {control.place} cannot be traced.",
                related=[(control.span, "opened here")],
                hint="Let the function end; guard the rest with `with T.If(cond):`.",
            )
        return value


def _control_between(inner: Frame | None, outer: Frame | None) -> Frame | None:
    """The outermost device loop or branch between two frames, `outer` excluded."""
    found: Frame | None = None
    if inner is not None:
        for f in inner.outward():
            if f is outer:
                break
            if f.is_device_control:
                found = f
    return found


def value_of(x: Any) -> Any:
    """`y = x` copies the number of a `T.alloc_var`."""
    return Value(x.scalar()) if isinstance(x, VarHandle) else x


def annotated(value: Any, annotation: Thunk) -> Any:
    """`x: T.int32 = e` converts; other annotations mean nothing, as in Python."""
    try:
        dtype = annotation()
    except NameError:  # Python never evaluates annotations of local names
        return value
    if isinstance(dtype, DType) and isinstance(value, Scalar | int | float | np.generic):
        return (
            value.astype(dtype)
            if isinstance(value, Scalar)
            else Value(const(dtype.constant(value), dtype))
        )
    return value


def declare(name: str, value: Any, annotation: Thunk) -> None:
    """`A: T.Tensor(...)` on its own: what argument `A` of the call has to be."""
    trace = current()
    if trace is None or not isinstance(value, BufferHandle):
        return
    try:
        spec = annotation()
    except NameError as error:
        raise TraceError(
            f"The annotation of `{name}` uses a name that is not defined: {error}.",
            hint="A function takes along only the outer names that its statements use: use it in "
            "one, or annotate the parameter instead.",
        ) from None
    if isinstance(spec, BufferHandle) and value.buffer in trace.host.arguments:
        bind_declared(trace.host, name, value.buffer, spec.buffer)


_INPLACE: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.iadd,
    "Sub": operator.isub,
    "Mult": operator.imul,
    "Div": operator.itruediv,
    "FloorDiv": operator.ifloordiv,
    "Mod": operator.imod,
    "Pow": operator.ipow,
    "LShift": operator.ilshift,
    "RShift": operator.irshift,
    "BitOr": operator.ior,
    "BitXor": operator.ixor,
    "BitAnd": operator.iand,
    "MatMult": operator.imatmul,
}


def inplace(op: str, a: Any, b: Any) -> Any:
    """`a op= b`."""
    return _INPLACE[op](a, b)


# -- expressions ------------------------------------------------------------------------------


def and_(first: Any, *rest: Thunk) -> Any:
    """`first and ...`: a bool value once an operand is traced."""
    value = first
    for thunk in rest:
        if is_traced(value):
            value = _join(value, thunk, is_and=True)
        elif not value:
            return value
        else:
            value = thunk()
    return value


def or_(first: Any, *rest: Thunk) -> Any:
    """`first or ...`: a bool value once an operand is traced."""
    value = first
    for thunk in rest:
        if is_traced(value):
            value = _join(value, thunk, is_and=False)
        elif value:
            return value
        else:
            value = thunk()
    return value


def _join(left: Any, right: Thunk, *, is_and: bool) -> Value:
    """Both conditions; reads of the right one happen only where the left one asks for it."""
    a = as_condition(left)
    here = frame()
    before = len(here.nodes) if here is not None else 0
    b = as_condition(right())
    if here is None or len(here.nodes) == before:
        return Value(binary("and" if is_and else "or", a, b))
    stop = const(not is_and, bool_)
    return Value(select_expr(a, b, stop) if is_and else select_expr(a, stop, b))


def not_(x: Any) -> Any:
    return Value(unary("not", as_condition(x))) if is_traced(x) else not x


def ternary(test: Any, a: Thunk, b: Thunk) -> Any:
    """`a if test else b`."""
    if not is_traced(test):
        return a() if test else b()
    condition = Value(as_condition(test))
    return select(condition, value_of(a()), value_of(b()))


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Is": operator.is_,
    "IsNot": operator.is_not,
    "In": lambda a, b: a in b,
    "NotIn": lambda a, b: a not in b,
}


def chain(first: Any, *links: tuple[str, Thunk]) -> Any:
    """`a < b < c`, every operand evaluated at most once."""
    left = first

    def step(op: str, thunk: Thunk) -> Thunk:
        def compare() -> Any:
            nonlocal left
            right = thunk()
            result = _COMPARE[op](left, right)
            left = right
            return result

        return compare

    steps = [step(op, thunk) for op, thunk in links]
    return and_(steps[0](), *steps[1:])


# -- statements -------------------------------------------------------------------------------


def branches(test: Any, has_else: bool) -> Iterator[bool]:
    """`if test`: gives True to run the first body, False for the other; both when traced."""
    if not is_traced(test):
        if test or has_else:
            yield bool(test)
        return
    trace = current()
    if trace is None or not trace.is_kernel:
        bool(test)  # says that Python cannot decide on it
    branch = If(test)
    branch.open()
    yield from _once(True, branch.span)
    branch.close()
    if has_else:
        orelse = Else()
        orelse.open()
        yield from _once(False, branch.span)
        orelse.close()
    assert trace is current(), "a branch changed the trace"


def _once(value: bool, span: Span | None) -> Iterator[bool]:
    try:
        yield value
    except GeneratorExit:
        current_kernel("`if`").failures.append(left_early("a traced `if`", span))
        raise


def loop_while(test: Thunk) -> Iterator[None]:
    """`while test`: Python's loop, or one round of the body inside a device loop."""
    trace = current()
    if trace is None or not trace.is_kernel:
        while host_test(test(), "while"):
            yield
        return
    loop = While(None)
    opened = loop.open_test()
    value = test()
    if not is_traced(value):
        trace.frame.parent.nodes.extend(trace.pop(opened))  # type: ignore[union-attr]
        while value:
            yield
            value = host_test(test(), "while")
        return
    loop.open_body(value)
    try:
        yield
    except GeneratorExit:
        trace.failures.append(left_early("a traced `while`", loop.span))
        raise
    loop.close()


_HOST_ONLY = {
    "break": (
        "`break` under a traced condition cannot be traced.",
        "Use `with T.While(cond):` with the condition for going on.",
    ),
    "continue": (
        "`continue` under a traced condition cannot be traced.",
        "Put the rest of the body under `with T.If(...):` with the opposite condition.",
    ),
    "return": (
        "`return` under a traced condition cannot be traced.",
        "Put the rest of the function under `with T.If(...):` with the opposite condition.",
    ),
    "assert": (
        "`assert` on a traced value cannot be checked while tracing.",
        "Check arguments before the call, or guard with `with T.If(cond):`.",
    ),
    "while": (
        "The condition of this `while` is only known on the device.",
        "Write `with T.While(cond):` inside a kernel.",
    ),
    ":=": (
        "A condition with `:=` cannot be traced.",
        "Assign in a statement of its own before the condition.",
    ),
}


def host_test(test: Any, what: str) -> Any:
    """A condition that Python has to decide now, because of `what` depends on it."""
    if is_traced(test):
        headline, hint = _HOST_ONLY[what]
        raise TraceError(headline, hint=hint)
    return test


def loop_range(function: Any) -> Any:
    """`range` after `in` of a `for`: a device loop inside a kernel."""
    trace = current()
    if function is not builtins.range or trace is None or not trace.is_kernel:
        return function
    return _device_range


def _device_range(start: Any, stop: Any = None, step: Any = None) -> DeviceLoop:
    return RangeLoop("range", start, stop, step, LoopKind.SERIAL)


def iterate(iterable: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """What a `for` statement runs through: a device loop gives its variables once."""
    if isinstance(iterable, DeviceLoop):
        return iterable.rounds(names)
    return iter(iterable)


def jump(what: str, body: Frame | None, around: Frame | None) -> None:
    """`break` or `continue` in a loop whose body runs in frame `body`, opened in `around`."""
    if frame() is not body:
        headline, hint = _HOST_ONLY[what]
        raise TraceError(headline, hint=hint)
    if what == "break" and body is not around:
        raise TraceError(
            "`break` would leave a device loop, whose body tracing runs only once.",
            related=[(body.span if body is not None else None, "the loop")],
            hint="Use `with T.While(cond):` with the condition for going on.",
        )


def context(manager: Any, names: tuple[str, ...], unpacks: bool) -> Any:
    """What a `with` statement enters; `unpacks` when one name alone stands in a tuple."""
    if isinstance(manager, Context):
        manager.names, manager.unpacks = names, unpacks
        return manager
    trace = current()
    if trace is None or not trace.is_kernel or isinstance(manager, contextlib.nullcontext):
        return manager
    raise TraceError(
        f"`with` on an object of type {type(manager).__name__} means nothing inside a kernel.",
        hint="Inside T.Kernel only tilejit's own contexts work: T.If, T.Else, T.While.",
    )


def refuse_in_kernel(what: str) -> None:
    """A statement that has no meaning on the device."""
    trace = current()
    if trace is not None and trace.is_kernel:
        raise TraceError(
            f"`{what}` means nothing inside a kernel.",
            hint="Move it out of the kernel; nothing on the device raises exceptions.",
        )
