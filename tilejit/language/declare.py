"""`A: T.Tensor(...)` in a function's body: it checks an argument and names its extents.

Knows how extents are matched with an array's. Does not know annotations of parameters
(`parameters`), nor real arrays (`runtime`).
"""

from __future__ import annotations

from tilejit.errors import DTypeError, ShapeError, TraceError
from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Expr, Var, VarKind, int_value, show, variables
from tilejit.language.trace import Trace
from tilejit.language.value import Value


class Again(BaseException):
    """Ends a trace that is to start anew, since more extents are known now."""

    def __init__(self, known: dict[str, object]) -> None:
        super().__init__(known)
        self.known = known


def bind_declared(host: Trace, name: str, array: Buffer, declared: Buffer) -> None:
    """Match argument `array` with what the body declares it to be.

    Raises:
        Again: symbols of the declaration stand for extents that are known now.
        ShapeError, DTypeError: the argument is something else.
        TraceError: a symbol made outside the function.
    """
    if array.dtype is not declared.dtype:
        raise DTypeError(f"{name} is {array.dtype}, but its annotation declares {declared.dtype}.")
    if array.rank != declared.rank:
        raise ShapeError(
            f"{name} has {_dimensions(array.rank)}, but its annotation declares {declared.rank}."
        )
    known = dict(host.known)
    for d, (extent, wanted) in enumerate(zip(array.shape, declared.shape, strict=True)):
        _match(host, known, f"{name}.shape[{d}]", extent, wanted)
    for d, (step, wanted) in enumerate(
        zip(array.element_strides, declared.element_strides, strict=True)
    ):
        taken = int_value(array.shape[d])
        if taken is None or taken > 1:  # a step that is never made may be any
            _match(host, known, f"{name}.strides[{d}]", step, wanted)
    if len(known) > len(host.known):
        raise Again(known)


def _match(host: Trace, known: dict[str, object], what: str, given: Expr, wanted: Expr) -> None:
    if given is wanted:
        return
    if isinstance(wanted, Var) and wanted.kind is VarKind.SYMBOL:
        if wanted.name in host.known:
            raise TraceError(
                f"The symbol `{wanted.name}` was made outside the function whose body uses it.",
                hint=f'Write `{wanted.name} = T.const("{wanted.name}")` in the body, or annotate '
                "the parameter itself.",
            )
        number = int_value(given)
        bound = known.setdefault(wanted.name, Value(given) if number is None else number)
        if bound == number or (isinstance(bound, Value) and bound.expr is given):
            return
        raise ShapeError(f"{what} is {show(given)}, but {wanted.name} is {bound!r} already.")
    if any(v.kind is VarKind.SYMBOL for v in variables(wanted)):
        return  # it is a number when the symbols are
    raise ShapeError(f"{what} is {show(given)}, but its annotation declares {show(wanted)}.")


def _dimensions(rank: int) -> str:
    return f"{rank} dimension" if rank == 1 else f"{rank} dimensions"
