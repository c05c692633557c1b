"""Errors of tilejit leave without the package's own frames.

Knows tracebacks. Does not know what failed.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

from tilejit import config
from tilejit.errors import TileError, is_package_file


class without_our_frames:
    """Strip the package's frames off a `TileError` that passes, unless options keep them."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if isinstance(error, TileError) and not config.current().full_traceback:
            error.__traceback__ = users_part(traceback)


def users_part(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback without the package's own frames."""
    frames = list(_entries(traceback))
    result: types.TracebackType | None = None
    for entry in reversed(frames):
        result = types.TracebackType(result, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return result


def _entries(traceback: types.TracebackType | None) -> Iterator[types.TracebackType]:
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if not is_package_file(filename):
            yield traceback
        traceback = traceback.tb_next
