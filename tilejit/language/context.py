"""What all frames share: the base of their context managers, and the mark of code that was read.

Knows how rewritten code is told from plain Python. Does not know any frame.
"""

from __future__ import annotations

import sys
from types import FrameType

from tilejit.errors import TraceError, is_internal

# The name through which rewritten code reaches tilejit; code that has it was read.
MARK = "__tilejit__"


def require_read_source(what: str) -> None:
    """Refuse device control flow in a plain function, whose re-bound names nobody watches."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_internal(frame):
        frame = frame.f_back
    if frame is None or MARK in frame.f_code.co_freevars:
        return
    name = frame.f_code.co_name
    raise TraceError(
        f"{what} is used in `{name}`, a plain Python function that tilejit has not read.",
        hint=f"Decorate `{name}` with @T.macro.",
    )


class Context:
    """A context manager that tracing understands.

    names, unpacks: what the user calls the variables it gives, and whether one alone stands in
        a tuple, `as (bx,)`; set before it is entered.
    """

    names: tuple[str, ...] = ()
    unpacks: bool = False

    def name(self, position: int, default: str) -> str:
        return self.names[position] if position < len(self.names) else default
