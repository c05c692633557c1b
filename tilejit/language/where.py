"""Where a call of the language may stand: in a traced function, in a kernel, outside T.Parallel.

Knows the trace's frames. Does not know what the calls do.
"""

from __future__ import annotations

from tilejit.errors import TraceError
from tilejit.language.trace import FrameKind, Trace, current, current_kernel


def is_in_kernel() -> bool:
    """True while the body of a `T.Kernel` is being traced."""
    trace = current()
    return trace is not None and trace.is_kernel


def traced_function(what: str) -> Trace:
    """The kernel under construction, or else the function around it.

    Raises:
        TraceError: nothing is being traced.
    """
    trace = current()
    if trace is None:
        raise TraceError(
            f"{what} is only allowed inside a @tilejit function.",
            hint="Write it in the body of the function, before or in `with T.Kernel(...)`.",
        )
    return trace


def tile_op(what: str) -> Trace:
    """The kernel under construction, for an op that all threads of a block do together.

    Raises:
        TraceError: outside a kernel, or inside T.Parallel.
    """
    trace = current_kernel(what)
    loop = trace.enclosing(FrameKind.PARALLEL)
    if loop is not None:
        raise TraceError(
            f"{what} is not allowed inside T.Parallel.",
            related=[(loop.span, "T.Parallel starts here")],
            hint="All threads of the block do it together: move it out of the loop.",
        )
    return trace
