"""Errors a user can see, and the source spans they point at.

Knows Python frames and how a message is laid out. Does not know tile ops, dtypes or targets.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, FrameType

_MAX_DEFINITION_LINES = 60  # decorators and parameters that are searched for a name
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@dataclass(frozen=True, slots=True)
class Span:
    """A place in the user's source: lines and columns count from 1 and 0, as in Python's `ast`."""

    filename: str
    line: int
    column: int | None = None
    end_line: int | None = None
    end_column: int | None = None
    function: str = "<module>"

    def encloses(self, other: Span) -> bool:
        """True when `other` lies inside this span (by columns where both have them)."""
        if self.filename != other.filename:
            return False
        last = self.end_line or self.line
        if not self.line <= other.line <= last:
            return False
        if None in (self.column, self.end_column, other.column, other.end_column):
            return True
        begin, end = (self.line, self.column), (last, self.end_column)
        inner = (other.line, other.column)
        inner_end = (other.end_line or other.line, other.end_column)
        return begin <= inner and inner_end <= end

    def __str__(self) -> str:
        return f"{os.path.basename(self.filename)}:{self.line}"


_positions: dict[CodeType, list[tuple[int | None, int | None, int | None, int | None]]] = {}


def _frame_span(frame: FrameType) -> Span:
    code = frame.f_code
    table = _positions.get(code)
    if table is None:
        table = _positions[code] = list(code.co_positions())
    line, end_line, column, end_column = table[frame.f_lasti // 2]
    return Span(
        filename=code.co_filename,
        line=line or frame.f_lineno,
        column=column,
        end_line=end_line,
        end_column=end_column,
        function=code.co_name,
    )


def definition_span(code: CodeType, parameter: str = "") -> Span:
    """The `def` line of a function, below its decorators, or one of its parameters."""
    name, first = code.co_name, code.co_firstlineno
    wanted = re.compile(rf"def\s+{re.escape(name)}\b.*")
    if parameter:
        wanted_parameter = re.compile(rf"(?<![\w.'\"]){re.escape(parameter)}(?=\s*[:,=)])")
    line, begin = first, 0
    for line in range(first, first + _MAX_DEFINITION_LINES):
        text = linecache.getline(code.co_filename, line).rstrip("\n")
        if not text:
            break
        found = wanted.search(text, begin)
        if found and parameter:
            wanted, begin = wanted_parameter, found.start() + len("def ") + len(name)
            parameter = ""
            found = wanted.search(text, begin)
        if found:
            columns = (len(text[:at].encode()) for at in found.span())
            return Span(code.co_filename, line, next(columns), line, next(columns), name)
        begin = 0
    return Span(code.co_filename, first, function=name)


def is_package_file(filename: str) -> bool:
    """True for a source file of the tilejit package itself."""
    return filename.startswith(_PACKAGE)


def is_internal(frame: FrameType) -> bool:
    """True for a frame of the tilejit package itself."""
    return is_package_file(frame.f_code.co_filename)


def caller_span() -> Span | None:
    """The innermost running frame outside the package: the line the user wrote."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not is_internal(frame):
            return _frame_span(frame)
        frame = frame.f_back
    return None


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _quote(span: Span, label: str = "") -> list[str]:
    """The source line with carets under the span, or nothing when the source is not there."""
    source = linecache.getline(span.filename, span.line).rstrip("\n")
    if not source.strip():
        return []
    gutter = f"{span.line:>5} | "
    lines = [f"{gutter}{source}"]
    begin = span.column
    if begin is not None:
        raw = source.encode()
        same_line = span.end_line in (None, span.line)
        end = span.end_column if same_line and span.end_column is not None else len(raw)
        before = raw[:begin].decode(errors="replace")
        marked = raw[begin:end].decode(errors="replace").rstrip()
        carets = "^" if not label else "-"
        tail = f" {label}" if label else ""
        lines.append(f"{' ' * 5} | {' ' * _width(before)}{carets * max(1, _width(marked))}{tail}")
    return lines


def a_kind(value: object) -> str:
    """`a list`, `an ndarray`: the type of a value, for messages."""
    name = type(value).__name__
    is_vowel = name[0] in "aeioAEIO" or name == "ndarray"
    return f"an {name}" if is_vowel else f"a {name}"


class TileError(Exception):
    """A mistake in a tile program or a call of one; `str()` is the whole message.

    Args:
        headline: one sentence in the user's words.
        span: where it happened; the calling user line when not given.
        notes: facts. Each is a sentence.
        hint: what to do about it.
        related: other places that matter, each with a label.
    """

    def __init__(
        self,
        headline: str,
        *,
        span: Span | None = None,
        notes: Iterable[str] = (),
        hint: str = "",
        related: Iterable[tuple[Span | None, str]] = (),
    ) -> None:
        self.headline = headline
        self.span = span if span is not None else caller_span()
        self.notes = tuple(notes)
        self.hint = hint
        self.related = tuple((s, label) for s, label in related if s is not None)
        super().__init__(headline)

    def __str__(self) -> str:
        lines = [self.headline]
        if self.span is not None:
            where = f'  File "{self.span.filename}", line {self.span.line}'
            lines.append(f"{where}, in {self.span.function}")
            lines += _quote(self.span)
        for span, label in self.related:
            if self.span is None or span.filename != self.span.filename:
                lines.append(f'  File "{span.filename}", line {span.line}, in {span.function}')
            lines += _quote(span, label)
        lines += [f"  Note: {note}" for note in self.notes]
        if self.hint:
            lines.append(f"  Hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        state = {k: getattr(self, k) for k in ("headline", "span", "notes", "hint", "related")}
        return (_rebuild, (type(self), state))


def _rebuild(cls: type[TileError], state: dict[str, object]) -> TileError:
    error = cls.__new__(cls)
    Exception.__init__(error, state["headline"])
    error.__dict__.update(state)
    return error


class ShapeError(TileError, ValueError):
    """Shapes, strides or extents that do not fit."""


class ArgumentError(TileError, ValueError):
    """An argument with a value that is not allowed."""


class DTypeError(TileError, TypeError):
    """A dtype that is unknown or does not fit."""


class ArgumentTypeError(TileError, TypeError):
    """An argument of a kind that is not allowed, or the wrong number of arguments."""


class TraceError(TileError, RuntimeError):
    """A Python construct that tracing cannot see, or a tile op where it has no meaning."""


class OutOfRangeError(TileError, IndexError):
    """An index provably outside its buffer."""


class UnsupportedError(TileError, RuntimeError):
    """Nothing on the target does what was asked; the message lists what was tried."""


class ResourceError(TileError, RuntimeError):
    """Shared memory, registers or threads beyond what the target has."""


class DeviceError(TileError, RuntimeError):
    """The GPU or its driver refused something, or a kernel failed on it."""


class SimulationError(TileError, RuntimeError):
    """The simulator caught a kernel doing something that a GPU would do wrong silently."""


class InternalError(TileError, RuntimeError):
    """A defect of tilejit. Please report it with the text of this error."""
