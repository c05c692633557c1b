"""What a function reads besides its arguments: globals, closure cells, and functions it calls.

Values count by value, functions by code and captures, lists and dicts by snapshot, modules and
classes by identity (with the attributes that the code reads from them); any other mutable object
is refused. Knows Python's code objects. Does not know arrays, parameters or kernels.
"""

from __future__ import annotations

import builtins
import dataclasses
import dis
import enum
import functools
import operator
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tilejit.dtypes import DType, lookup
from tilejit.errors import ArgumentTypeError, Span, a_kind, definition_span, is_package_file

_MISSING = object()
IMMUTABLE = (int, bool, str, bytes, type(None), complex, type(Ellipsis), DType, range)
_IDENTICAL = (
    types.ModuleType, type, types.BuiltinFunctionType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.MethodWrapperType, types.GenericAlias, np.ufunc, np.dtype,
)  # fmt: skip
_LOADS = frozenset(
    {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
)
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_LIBRARIES = tuple(sysconfig.get_path(p) for p in ("stdlib", "platstdlib", "purelib", "platlib"))

Chain = tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def chains(code: types.CodeType) -> tuple[Chain, ...]:
    """The outer names that the code, and the functions defined in it, load, each with the
    attributes read from it: `T.copy` is ("T", "copy")."""
    found: dict[Chain, None] = {}
    current: list[str] = []
    inside: set[str] = set(code.co_varnames) | set(code.co_cellvars)
    for step in dis.get_instructions(code):
        if step.opname in _LOADS:
            if current:
                found.setdefault(tuple(current))
            current = [step.argval] if step.argval not in inside else []
        elif step.opname in _ATTRIBUTES and current:
            current.append(step.argval)
        elif step.opname not in ("PUSH_NULL", "CACHE", "EXTENDED_ARG"):
            if current:
                found.setdefault(tuple(current))
            current = []
    if current:
        found.setdefault(tuple(current))
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            for chain in chains(value):
                if chain[0] not in inside:
                    found.setdefault(chain)
    return tuple(found)


def _is_library(function: types.FunctionType, root_package: str) -> bool:
    filename = function.__code__.co_filename
    if is_package_file(filename):
        return True
    if (function.__module__ or "").partition(".")[0] == root_package:
        return False
    if filename.startswith(_LIBRARIES) or filename.startswith("<frozen"):
        return True
    return _is_installed((function.__module__ or "").partition(".")[0])


@functools.cache
def _is_installed(package: str) -> bool:
    """True for a package that an installer put elsewhere, such as on PYTHONPATH: its metadata lie
    beside it (an editable one's do not: that is the user's code)."""
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None:
        return False
    path = Path(file)
    home = path.parent.parent if path.stem == "__init__" else path.parent
    return any(home.glob(f"{package}-*.dist-info"))


class _Reading:
    """One look at everything: the key, and the cheap checks that it still holds."""

    def __init__(self, root: types.FunctionType | None, what: str) -> None:
        self.checks: list[Callable[[], bool]] = []
        self.what = what
        self.package = ((root.__module__ if root else "") or "").partition(".")[0]
        self.visited: dict[int, int] = {}
        self.names: dict[tuple[int, str], Any] = {}
        self.span = _definition(root) if root is not None else None

    def function(self, function: types.FunctionType) -> Hashable:
        """Code, defaults and captures of a function; a reference back where it recurses."""
        if id(function) in self.visited:
            return ("again", self.visited[id(function)])
        self.visited[id(function)] = len(self.visited)
        code, defaults, named = (function.__code__, function.__defaults__, function.__kwdefaults__)
        self.checks.append(
            lambda: (
                function.__code__ is code
                and function.__defaults__ is defaults
                and function.__kwdefaults__ is named
            )
        )
        if _is_library(function, self.package):
            return ("library", _Same(function))
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        parts = [(chain, self.chain(chain, cells, function.__globals__)) for chain in chains(code)]
        return (
            "function",
            code,
            self.value(defaults, f"a default of {function.__name__}"),
            self.value(named, f"a default of {function.__name__}"),
            tuple(parts),
        )

    def chain(
        self, chain: Chain, cells: dict[str, types.CellType], names: dict[str, Any]
    ) -> Hashable:
        """The value at the end of a chain of attributes of modules and classes."""
        found = self.name(chain[0], cells, names)
        shown = chain[0]
        for attribute in chain[1:]:
            if not isinstance(found, types.ModuleType | type) or _is_ours(found):
                break
            owner, value = found, getattr(found, attribute, _MISSING)
            self.checks.append(_attribute_check(owner, attribute, value))
            found = value
            shown += f".{attribute}"
        return self.value(found, f"`{shown}`")

    def name(self, name: str, cells: dict[str, types.CellType], names: dict[str, Any]) -> Any:
        cell = cells.get(name)
        if cell is not None:
            value = _cell_value(cell)
            self.checks.append(lambda: _cell_value(cell) is value)
            return value
        if (id(names), name) in self.names:
            return self.names[id(names), name]
        value = names.get(name, _MISSING)
        self.checks.append(lambda: names.get(name, _MISSING) is value)
        found = getattr(builtins, name, _MISSING) if value is _MISSING else value
        self.names[id(names), name] = found
        return found

    def value(self, value: Any, shown: str) -> Hashable:
        """A hashable that is equal exactly when the value means the same."""
        kind = type(value)
        if kind in IMMUTABLE:
            return (kind, value)
        if kind is float:
            return (float, value.hex())
        if value is _MISSING:
            return "missing"
        if isinstance(value, np.generic):
            return (np.generic, value.dtype.str, str(value.dtype), value.tobytes())
        if isinstance(value, enum.Enum):
            return (kind, value.name)
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, _IDENTICAL):
            bound = getattr(value, "__self__", None)
            if isinstance(value, types.BuiltinFunctionType) and not (
                bound is None or isinstance(bound, types.ModuleType | type)
            ):
                return ("bound", value.__name__, self.value(bound, shown))
            return _Same(value)
        return self._compound(value, kind, shown)

    def _compound(self, value: Any, kind: type, shown: str) -> Hashable:
        if isinstance(value, tuple | frozenset):
            return (kind, *self._items(value, shown))
        if isinstance(value, list | set | dict):
            part = _snapshot(value, shown, self)
            same = _same_items(value)
            self.checks.append(lambda: same() or _still(value, part, shown, self))
            return part
        if isinstance(value, slice):
            return (slice, *(self.value(v, shown) for v in (value.start, value.stop, value.step)))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return ("partial", *(self.value(v, shown) for v in parts))
        if isinstance(value, types.MethodType):
            return ("method", self.value(value.__func__, shown), self.value(value.__self__, shown))
        wrapped = getattr(value, "__wrapped__", None)
        if isinstance(wrapped, types.FunctionType) and (_is_ours(value) or callable(value)):
            return ("wrapped", _Same(kind), self.function(wrapped), self._knobs(value, shown))
        if _is_ours(value):
            return _Same(value)
        if dataclasses.is_dataclass(value) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return (
                kind,
                *(self.value(getattr(value, f.name), shown) for f in dataclasses.fields(value)),
            )
        if lookup(value) is not None:
            return ("dtype", str(value))
        raise ArgumentTypeError(
            f"{self.what} reads {shown}, {a_kind(value)}; tilejit cannot tell when it changes.",
            span=self.span,
            hint="Pass it as an argument, or use numbers, strings, dtypes, tuples, lists or dicts.",
        )

    def _knobs(self, value: Any, shown: str) -> Hashable:
        """What a decorated function was decorated with."""
        knobs = getattr(value, "capture_knobs", None)
        return self.value(knobs, shown)

    def _items(self, values: Any, shown: str) -> Iterator[Hashable]:
        parts = (self.value(v, shown) for v in values)
        return iter(sorted(parts, key=repr)) if isinstance(values, set | frozenset) else parts


class _Same:
    """Equal only for one object, which it keeps alive."""

    __slots__ = ("it",)

    def __init__(self, it: object) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.it is self.it

    def __hash__(self) -> int:
        return id(self.it)

    def __repr__(self) -> str:
        return f"same {id(self.it)}"


def _snapshot(value: Any, shown: str, reading: _Reading) -> Hashable:
    if isinstance(value, dict):
        return (
            dict,
            *((reading.value(k, shown), reading.value(v, shown)) for k, v in value.items()),
        )
    return (type(value), *reading._items(value, shown))


def _same_items(value: Any) -> Callable[[], bool]:
    """A quick test that the container holds the objects that it holds now, none of which can
    change; false does not say that it differs."""
    keys = tuple(value)
    values = tuple(value.values()) if isinstance(value, dict) else ()
    if not all(type(item) in IMMUTABLE or type(item) is float for item in (*keys, *values)):
        return lambda: False
    count, same = len(keys), operator.is_
    if isinstance(value, dict):
        return lambda: (
            len(value) == count
            and all(map(same, value, keys))
            and all(map(same, value.values(), values))
        )
    return lambda: len(value) == count and all(map(same, value, keys))


def _still(value: Any, part: Hashable, shown: str, reading: _Reading) -> bool:
    fresh = _Reading(None, reading.what)
    fresh.package, fresh.span = reading.package, reading.span
    # Functions inside count from the numbering of this look: compare those by a full look.
    if reading.visited:
        fresh.visited = dict(reading.visited)
    try:
        return _snapshot(value, shown, fresh) == part
    except ArgumentTypeError:
        return False  # the full look that follows raises it


def _is_ours(value: object) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else type(value).__module__
    if isinstance(value, type):
        name = value.__module__
    return name == "tilejit" or name.startswith("tilejit.")


def _cell_value(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _MISSING


def _attribute_check(owner: Any, attribute: str, value: Any) -> Callable[[], bool]:
    if isinstance(owner, types.ModuleType):
        names = owner.__dict__
        if names.get(attribute, _MISSING) is value:
            return lambda: names.get(attribute, _MISSING) is value
    return lambda: getattr(owner, attribute, _MISSING) is value


def _definition(function: types.FunctionType) -> Span:
    return definition_span(function.__code__)


_tokens: dict[Hashable, int] = {}
_tokens_lock = threading.Lock()


def _token(key: Hashable) -> int:
    with _tokens_lock:
        return _tokens.setdefault(key, len(_tokens))


class Captures:
    """The captures of one function; `key()` changes exactly when what it reads does."""

    def __init__(self, function: types.FunctionType, what: str) -> None:
        self._function = weakref.ref(function)
        self._what = what
        self._last: tuple[int, tuple[Callable[[], bool], ...]] | None = None

    def key(self) -> int:
        """A number that stands for the values read now.

        Raises:
            TypeError: a mutable object that cannot be compared by value.
        """
        last = self._last
        if last is not None:
            for check in last[1]:
                if not check():
                    break
            else:
                return last[0]
        function = self._function()
        assert function is not None, "the function is gone"
        reading = _Reading(function, self._what)
        token = _token(reading.function(function))
        self._last = (token, tuple(reading.checks))
        return token


_known: weakref.WeakKeyDictionary[types.FunctionType, Captures] = weakref.WeakKeyDictionary()


def freeze(value: Any, what: str, shown: str) -> Hashable:
    """A compile-time constant as a hashable; functions by code and captures.

    Raises:
        TypeError: a mutable object that cannot be compared by value; the message begins with
            `what` and names `shown`.
    """
    kind = type(value)
    if kind in IMMUTABLE:
        return (kind, value)
    if isinstance(value, types.FunctionType):
        captures = _known.get(value)
        if captures is None:
            captures = _known[value] = Captures(value, what)
        return ("function", captures.key())
    reading = _Reading(None, what)
    try:
        return reading.value(value, shown)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(
            f"{what}: {shown} is {a_kind(value)}, which cannot be a compile-time constant.",
            hint="Annotate the parameter as a tensor, or pass numbers, strings, dtypes, tuples, "
            "lists, dicts or functions.",
        ) from error
