"""Traces a kernel body without the decorator, and pins the words of an error."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

import tilejit.language as T
from tilejit.dtypes import as_dtype, int64
from tilejit.errors import TileError
from tilejit.ir.buffer import Buffer, Scope
from tilejit.ir.expr import Var, VarKind, index
from tilejit.ir.node import Node
from tilejit.language.handle import BufferHandle
from tilejit.language.trace import Trace, current, tracing


@contextlib.contextmanager
def kernel(threads: int = 128) -> Iterator[list[Node]]:
    """An open T.Kernel frame; gives the list that its nodes go to."""
    host = Trace("kernel")
    with tracing(host), T.Kernel(4, 4, threads=threads):
        trace = current()
        assert trace is not None
        yield trace.root.nodes


@contextlib.contextmanager
def function() -> Iterator[Trace]:
    """The host part of a traced function."""
    host = Trace("function")
    with tracing(host):
        yield host


def tensor(name: str, shape: tuple, dtype: str = "float32", **fields) -> BufferHandle:
    """A tensor argument as the tracer makes it."""
    buffer = Buffer(
        name=name,
        shape=tuple(index(e) if isinstance(e, int) else e.expr for e in shape),
        dtype=as_dtype(dtype),
        scope=Scope.GLOBAL,
        data=Var(name, int64, VarKind.POINTER),
        align=16,
        **fields,
    )
    return BufferHandle(buffer)


@contextlib.contextmanager
def refused(kind: type[TileError], headline: str, hint: str = "") -> Iterator[None]:
    """The body raises `kind` with exactly these words, at a line of the calling test file."""
    with pytest.raises(kind) as caught:
        yield
    error = caught.value
    assert error.headline == headline
    assert error.hint == hint
    assert error.span is not None and "test_language" in error.span.filename
    assert headline in str(error)


def refusal(call: Callable[[], object], kind: type[TileError]) -> TileError:
    """The error that `call` raises."""
    with pytest.raises(kind) as caught:
        call()
    return caught.value
