"""Arguments of a call to a signature: what tracing may depend on, and a key for it.

Knows parameters' rules and arrays. Does not know kernels, executors or caches.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilejit.dtypes import DType
from tilejit.errors import ArgumentError, ArgumentTypeError, TileError, a_kind
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import int_value
from tilejit.language.function import (
    ConstArg,
    ParameterRule,
    PointerArg,
    ScalarArg,
    TensorArg,
    TracedFunction,
)
from tilejit.runtime.arrays import (
    HOST,
    ArrayView,
    compact_strides,
    is_array,
    overlapping,
    read,
    reader_of,
)
from tilejit.runtime.binding import MISSING, Binder
from tilejit.runtime.captures import freeze
from tilejit.runtime.matching import Matcher, Symbols, scalar_value

SPEC_ALIGN = 16  # bytes, what a spec promises unless it says otherwise


@dataclass(slots=True)
class Call:
    """A call taken apart.

    key: equal for calls that one kernel serves; values: of the parameters that are not constants,
    in order: an ArrayView for a tensor (and a pointer given as an array), else a number; names: of
    those; constants: of the others; overlaps: pairs of names whose bytes overlap.
    """

    key: Hashable
    names: tuple[str, ...]
    values: list[Any]
    constants: dict[str, Any]
    views: list[ArrayView]
    overlaps: tuple[tuple[str, str], ...] = ()
    symbolic: dict[str, Buffer] = field(default_factory=dict)


def read_argument(what: str, name: str, value: Any) -> ArrayView:
    """The memory of an array argument; messages name the function and the parameter."""
    try:
        view = read(value)
    except TileError as error:
        headline = error.headline.replace("{name}", f"{what}: {name}")
        raise type(error)(headline, notes=error.notes, hint=error.hint) from None
    if view.address % view.dtype.bytes and view.size:
        raise ArgumentError(
            f"{what}: {name} begins at an address that is no multiple of its element size, "
            f"{view.dtype.bytes} bytes.",
            hint="Pass a copy.",
        )
    return view


def pointer_value(what: str, name: str, value: Any) -> Any:
    """An address, or the view of an array whose address is meant."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if not 0 <= value < 1 << 64:
            raise ArgumentError(f"{what}: {name} is {value}, which is no 64-bit address.")
        return int(value)
    if is_array(value):
        return read_argument(what, name, value)
    raise ArgumentTypeError(
        f"{what}: {name} is {a_kind(value)}, but it was declared a pointer.",
        hint="Pass an array, an address (an int), or `tilejit.address_of(x)`.",
    )


def is_spec(value: object) -> bool:
    """True for a `T.Tensor(...)` that describes an argument of `compile`."""
    return isinstance(getattr(value, "buffer", None), Buffer)


class Signature:
    """The parameters of a traced function and how each becomes part of the key."""

    def __init__(self, traced: TracedFunction, function: Any, what: str) -> None:
        self.what = what
        self.rules: Mapping[str, ParameterRule] = traced.parameters
        parameters = inspect.signature(function).parameters.values()
        self.binder = _binder(what, parameters)
        self._slots = [(name, self.rules[name]) for name in self.binder.names]
        declared = [(n, r.annotation.buffer) for n, r in self._slots if r.kind == "declared"]
        self.declared_align = {n: b.align for n, b in declared if b.align > SPEC_ALIGN}
        self.matcher = Matcher(what, declared)
        self.declared = tuple(n for n, _ in declared)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Take a call apart.

        Raises:
            TypeError, ValueError: an argument that the parameter cannot be.
        """
        what = self.what
        parts: list[Hashable] = []
        names: list[str] = []
        values: list[Any] = []
        views: list[ArrayView] = []
        view_names: list[str] = []
        constants: dict[str, Any] = {}
        filled = self.binder.bind(args, kwargs)
        for (name, rule), value in zip(self._slots, filled, strict=True):
            kind = rule.kind
            if kind == "constant" or _is_constant(rule, value):
                constants[name] = value
                parts.append(freeze(value, what, name))
                continue
            names.append(name)
            if kind == "scalar":
                values.append(scalar_value(what, name, value, _scalar_dtype(rule)))
                continue
            if kind == "pointer":
                values.append(pointer_value(what, name, value))
                continue
            view = read_argument(what, name, value)
            values.append(view)
            views.append(view)
            view_names.append(name)
            if kind == "declared":
                self._check_align(name, view)
                parts.append(view.align if view.size else SPEC_ALIGN)
            else:
                align = view.align if view.size else SPEC_ALIGN
                parts.append((view.dtype.name, view.shape, view.strides, align))
        pairs = overlapping(views)
        named = tuple((view_names[i], view_names[j]) for i, j in pairs)
        parts.append(named)
        return Call(tuple(parts), tuple(names), values, constants, views, named)

    def _check_align(self, name: str, view: ArrayView) -> None:
        promised = self.declared_align.get(name)
        if promised is not None and view.address % promised:
            raise misaligned(self.what, name, promised)

    def match(self, call: Call) -> Symbols:
        """Check the declared tensors of a call; the values of their symbols."""
        if not self.declared:
            return {}
        by_name = dict(zip(call.names, call.values, strict=True))
        return self.matcher.match([by_name[n] for n in self.declared])

    def match_specs(self, call: Call) -> Symbols:
        """The values of the symbols that the tensors of a `compile` tell."""
        by_name = dict(zip(call.names, call.values, strict=True))
        told = [n for n in self.declared if n not in call.symbolic]
        declared = [(n, self.rules[n].annotation.buffer) for n in told]
        if not declared:
            return {}
        return Matcher(self.what, declared).match([by_name[n] for n in told])

    def bind_specs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Take the arguments of `compile` apart: arrays or specs; what is declared may be left
        out."""
        what = self.what
        parts: list[Hashable] = ["compile"]
        names: list[str] = []
        values: list[Any] = []
        constants: dict[str, Any] = {}
        symbolic: dict[str, Buffer] = {}
        views: dict[str, ArrayView] = {}
        filled = self.binder.bind(args, kwargs, is_partial=True)
        left_out = [
            name
            for (name, rule), value in zip(self._slots, filled, strict=True)
            if value is MISSING and rule.kind not in ("declared", "scalar", "pointer")
        ]
        if left_out:
            self.binder._missing([self.binder.names.index(n) for n in left_out])
        for (name, rule), value in zip(self._slots, filled, strict=True):
            kind = rule.kind
            if kind == "constant" or (not is_spec(value) and _is_constant(rule, value)):
                constants[name] = value
                parts.append(freeze(value, what, name))
                continue
            names.append(name)
            if kind in ("scalar", "pointer"):
                values.append(None)
                continue
            if value is MISSING:
                value = rule.annotation
            if is_spec(value):
                buffer = value.buffer
                _check_spec(what, name, buffer)
                if not _is_static(buffer):
                    symbolic[name] = buffer
                view = _spec_view(buffer)
                align = buffer.align or SPEC_ALIGN
            else:
                view = read_argument(what, name, value)
                align = view.align if view.size else SPEC_ALIGN
                buffer = None
            if kind == "declared" and value is not rule.annotation and name not in symbolic:
                Matcher(what, [(name, rule.annotation.buffer)]).match([view])
            values.append(view)
            views[name] = view
            part = (view.dtype.name, view.shape, view.strides, align)
            parts.append(part if name not in symbolic else (buffer, align))
        real = [(n, v) for n, v in views.items() if v.owner is not None]
        pairs = overlapping([v for _, v in real])
        named = tuple((real[i][0], real[j][0]) for i, j in pairs)
        parts.append(named)
        return Call(
            tuple(parts), tuple(names), values, constants, list(views.values()), named, symbolic
        )

    def trace_arguments(
        self, call: Call, aligns: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """What `TracedFunction.trace` takes for the call.

        aligns: bytes, for tensors that promise less than the call's.
        """
        partners: dict[str, set[str]] = {}
        for a, b in call.overlaps:
            partners.setdefault(a, set()).add(b)
            partners.setdefault(b, set()).add(a)
        result: dict[str, Any] = {n: ConstArg(v) for n, v in call.constants.items()}
        for name, value in zip(call.names, call.values, strict=True):
            rule = self.rules[name]
            if rule.kind == "scalar":
                result[name] = ScalarArg(_scalar_dtype(rule))
            elif rule.kind == "pointer":
                result[name] = _pointer_arg(rule)
            else:
                align = (aligns or {}).get(name)
                argument = self._tensor_arg(call, name, value, partners)
                if align is not None:
                    argument = dataclasses.replace(argument, align=align)
                result[name] = argument
        return {name: result[name] for name, _ in self._slots}

    def _tensor_arg(
        self, call: Call, name: str, view: ArrayView, partners: Mapping[str, set[str]]
    ) -> TensorArg:
        buffer = call.symbolic.get(name)
        if buffer is not None:
            return TensorArg(
                shape=buffer.shape,
                strides=buffer.element_strides,
                dtype=buffer.dtype,
                align=buffer.align or SPEC_ALIGN,
                overlaps=frozenset(partners.get(name, ())),
            )
        align = view.align if view.size else SPEC_ALIGN
        if view.owner is None:  # a spec
            align = view.address
        return TensorArg(
            shape=view.shape,
            strides=view.strides,
            dtype=view.dtype,
            align=align,
            overlaps=frozenset(partners.get(name, ())),
        )


def _is_constant(rule: ParameterRule, value: Any) -> bool:
    """True for no array where one is optional: not annotated, or None as the default says."""
    if value is None and rule.default is None:
        return True
    return rule.kind == "auto" and reader_of(type(value)) is None


def misaligned(what: str, name: str, promised: int) -> ArgumentError:
    return ArgumentError(
        f"{what}: {name} begins at an address that is no multiple of {promised} bytes, as "
        "promised.",
        hint=f"Pass an aligned copy, or declare it with `align=` (here {promised}) lower.",
    )


def _binder(what: str, parameters: Any) -> Binder:
    names: list[str] = []
    defaults: dict[str, Any] = {}
    positional = nameless = 0
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise ArgumentTypeError(
                f"{what}: a tile function takes no `{star}{parameter.name}`.",
                hint="Name each parameter.",
            )
        names.append(parameter.name)
        positional += parameter.kind is not parameter.KEYWORD_ONLY
        nameless += parameter.kind is parameter.POSITIONAL_ONLY
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
    return Binder(what, names, positional, defaults, nameless)


def _scalar_dtype(rule: ParameterRule) -> DType:
    assert isinstance(rule.annotation, DType), rule
    return rule.annotation


def _pointer_arg(rule: ParameterRule) -> PointerArg:
    return PointerArg(getattr(rule.annotation, "dtype", None))


def _is_static(buffer: Buffer) -> bool:
    return buffer.is_static and all(int_value(e) is not None for e in buffer.strides or ())


def _check_spec(what: str, name: str, buffer: Buffer) -> None:
    if buffer.scope is not Scope.GLOBAL:
        raise ArgumentError(
            f'{what}: {name} is a spec of scope "{buffer.scope.value}"; an argument is in global '
            "memory.",
            hint="Write T.Tensor(shape, dtype).",
        )


def _spec_view(buffer: Buffer) -> ArrayView:
    """A view without memory; its `address` carries the promised alignment."""
    align = buffer.align or SPEC_ALIGN
    if not _is_static(buffer):
        return ArrayView(None, "", (), (), buffer.dtype, align, HOST)
    shape = buffer.extents
    strides = tuple(int_value(e) or 0 for e in buffer.element_strides)
    if buffer.strides is None:
        strides = compact_strides(shape)
    return ArrayView(None, "", shape, strides, buffer.dtype, align, HOST)
