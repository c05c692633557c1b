"""The only reader of the environment; every knob is one typed field with its meaning.

Knows names and defaults of the knobs. Does not know what acts on them.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any


def _knob(env: str, default: object, doc: str) -> Any:
    return field(default=default, metadata={"env": env, "doc": doc})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of tilejit; each field has an environment variable and can be set by `options()`."""

    dump: str = _knob(
        "TILEJIT_DUMP",
        "",
        "Comma-separated stages to print to stderr: trace, choose_schedule, select_atoms, "
        "drop_masks, fold_clears, plan_exchanges, halve_operands, infer_layouts, pipeline_loops, "
        "specialise, order_tiles, insert_sync, order_reads, describe_tensors, allocate_memory, "
        "source, explain, ptx.",
    )
    verify: bool = _knob("TILEJIT_VERIFY", True, "Verify the tile graph after every pass.")
    full_traceback: bool = _knob(
        "TILEJIT_FULL_TRACEBACK", False, "Keep tilejit's own frames in the traceback of an error."
    )
    target: str = _knob(
        "TILEJIT_TARGET", "", "Target when there is no GPU (simulator, reference); default sm_80."
    )
    simulate: bool = _knob(
        "NUMBA_ENABLE_CUDASIM", False, "Run every call on Numba's CUDA simulator."
    )


def _parse(text: str, default: object) -> object:
    if isinstance(default, bool):
        return text.strip().lower() not in ("", "0", "false", "no", "off")
    return text


def from_environment(environ: Mapping[str, str]) -> Options:
    """Read every knob that `environ` sets; the others keep their defaults."""
    values: dict[str, Any] = {}
    for knob in fields(Options):
        text = environ.get(knob.metadata["env"])
        if text is not None:
            values[knob.name] = _parse(text, knob.default)
    return Options(**values)


_current: contextvars.ContextVar[Options | None] = contextvars.ContextVar(
    "tilejit_options", default=None
)


_environ = os.environ
_names = tuple(knob.metadata["env"] for knob in fields(Options))
_raw_names = tuple(map(getattr(_environ, "encodekey", str), _names))
_raw_value: Callable[[Any], object] | None = getattr(getattr(_environ, "_data", None), "get", None)
_parsed: tuple[tuple[object, ...], Options] = ((), Options())


def _of_process() -> Options:
    """The options of `os.environ`, parsed again only when one of its variables has changed.

    `os.environ` encodes and decodes at each access, which costs more than launching a kernel: the
    raw values are compared, where this Python has them.
    """
    global _parsed
    if _raw_value is None or os.environ is not _environ:
        return from_environment(os.environ)
    values = tuple(map(_raw_value, _raw_names))
    seen, parsed = _parsed
    if values != seen:
        parsed = from_environment(_environ)
        _parsed = values, parsed  # one store: a thread sees both or neither
    return parsed


def current() -> Options:
    """The options in force: those of the innermost `options()` block, else the environment's."""
    return _current.get() or _of_process()


@contextlib.contextmanager
def options(**changes: object) -> Iterator[Options]:
    """Change options for the code inside the `with` block, in this thread or task only.

    Raises:
        TypeError: an unknown option name.
    """
    token = _current.set(replace(current(), **changes))  # type: ignore[arg-type]
    try:
        yield current()
    finally:
        _current.reset(token)
