"""Arguments against declarations: dtype, rank, contiguity, extents; binds the symbols.

Knows `ir.Buffer` shapes and array views. Does not know where a kernel runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tilejit.dtypes import DType, float32, int64, tfloat32, uint64
from tilejit.errors import ArgumentError, DTypeError, ShapeError, a_kind
from tilejit.ir.analysis import MAX_SYMBOL, linear
from tilejit.ir.buffer import Buffer
from tilejit.ir.expr import Const, Expr, Op, Var, VarKind, int_value, show, variables, walk
from tilejit.runtime.arrays import ArrayView, compact_strides
from tilejit.runtime.host import host_function

Symbols = dict[Var, int]
_SAME_MEMORY = {(float32, tfloat32), (tfloat32, float32), (uint64, int64)}


def symbol_multiples(symbols: Symbols) -> dict[Var, int]:
    """What divides each symbol's value: 16, 8, 4 or 1. It decides how wide memory accesses can
    be (16 elements of the narrowest dtype are 16 bytes), so it belongs to the signature. Of what
    is not positive it is 1: such strides are none that bulk copies can have."""
    return {v: _power(value) for v, value in symbols.items()}


def _power(value: int) -> int:
    return next(m for m in (16, 8, 4, 1) if value % m == 0) if value > 0 else 1


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def show_shape(shape: Sequence[int | Expr]) -> str:
    """(3, M): as Python prints a tuple."""
    parts = [show(e) if isinstance(e, Expr) else str(e) for e in shape]
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


class Matcher:
    """What a list of tensors was declared to be.

    what: the function's name, as messages begin with; declared: (parameter name, buffer) pairs.
    """

    def __init__(self, what: str, declared: Sequence[tuple[str, Buffer]]) -> None:
        self.what = what
        self.declared = tuple(declared)
        self._plans = [(name, b, _plan(b.shape), _plan(b.strides or ())) for name, b in declared]
        self._strides_given = any(b.strides is not None for _, b in declared)
        self.symbols = tuple(
            dict.fromkeys(
                v
                for _, b in declared
                for e in (*b.shape, *(b.strides or ()))
                for v in sorted(variables(e), key=lambda v: v.serial)
            )
        )

    def match(self, views: Sequence[ArrayView], known: Mapping[Var, Any] | None = None) -> Symbols:
        """The values of the symbols, from arguments in the order of the declarations.

        known: values that are given otherwise (scalar arguments).

        Raises:
            DTypeError, ShapeError, ArgumentError: an argument is not what was declared.
        """
        symbols: Symbols = dict(known or {})
        origin: dict[Var, str] = dict.fromkeys(symbols, "the arguments")
        later: list[tuple[str, Buffer, str, int, Expr, int]] = []
        for (name, buffer, extents, strides), view in zip(self._plans, views, strict=True):
            self._check_kind(name, buffer, view)
            for d, plan in enumerate(extents):
                self._extent(name, buffer, "extent", d, plan, view.shape[d], symbols, origin, later)
            if buffer.strides is None:
                if not view.is_compact:
                    self._not_contiguous(name, view)
                continue
            for d, plan in enumerate(strides):
                if isinstance(plan, int) and view.shape[d] <= 1:
                    continue  # the stride of a single element is never used
                self._extent(
                    name, buffer, "stride", d, plan, view.strides[d], symbols, origin, later
                )
        if later:
            self._solve(later, symbols, origin)
        for symbol in symbols.keys() - (known or {}).keys():
            self._check_bounds(symbol, symbols)
        return symbols

    def _check_kind(self, name: str, buffer: Buffer, view: ArrayView) -> None:
        if view.dtype is not buffer.dtype and (view.dtype, buffer.dtype) not in _SAME_MEMORY:
            raise DTypeError(
                f"{self.what}: {name} has dtype {view.dtype}, but it was declared {buffer.dtype}.",
                hint=f"Convert it first, for example with `{name}.astype(...)`.",
            )
        if len(view.shape) != buffer.rank:
            raise ShapeError(
                f"{self.what}: {name} has {plural(len(view.shape), 'dimension')}, but it was "
                f"declared with {buffer.rank}.",
                notes=(f"Its shape is {view.shape}; declared: {show_shape(buffer.shape)}.",),
                hint="Reshape it, or index out the dimensions that are too many.",
            )

    def _not_contiguous(self, name: str, view: ArrayView) -> None:
        raise ShapeError(
            f"{self.what}: {name} is not contiguous: its strides are {view.strides}, but "
            f"{compact_strides(view.shape)} were declared.",
            hint="Pass a contiguous copy, or declare it `T.StridedTensor` with its strides.",
        )

    def _extent(
        self,
        name: str,
        buffer: Buffer,
        noun: str,
        d: int,
        plan: int | Var | Expr,
        actual: int,
        symbols: Symbols,
        origin: dict[Var, str],
        later: list[tuple[str, Buffer, str, int, Expr, int]],
    ) -> None:
        if isinstance(plan, int):
            if plan != actual:
                self._differs(name, buffer, noun, d, str(plan), actual)
        elif isinstance(plan, Var):
            bound = symbols.get(plan)
            if bound is None:
                if actual > MAX_SYMBOL:
                    self._too_large(name, noun, d, actual)
                symbols[plan] = actual
                origin[plan] = name
            elif bound != actual:
                raise ShapeError(
                    f"{self.what}: {plan.name} is {bound} in {origin[plan]} and {actual} in "
                    f"{name}.",
                    notes=(f"{name} was declared {show_shape(buffer.shape)}.",),
                    hint=f"Extents that are declared {plan.name} are equal.",
                )
        else:
            later.append((name, buffer, noun, d, plan, actual))

    def _differs(
        self, name: str, buffer: Buffer, noun: str, d: int, declared: str, actual: int
    ) -> None:
        dims = buffer.shape if noun == "extent" else buffer.strides or ()
        raise ShapeError(
            f"{self.what}: {name} has {noun} {actual} in dimension {d}, but it was declared "
            f"{declared}.",
            notes=(f"{name} was declared with {noun}s {show_shape(dims)}.",),
            hint=f"Pass another array, or declare the {noun} with T.dynamic to take any.",
        )

    def _too_large(self, name: str, noun: str, d: int, actual: int) -> None:
        raise ShapeError(
            f"{self.what}: {name} has {noun} {actual} in dimension {d}; one that is known only at "
            f"run time may be at most {MAX_SYMBOL}.",
            hint="Declare it as a constant, or split the tensor.",
        )

    def _solve(
        self,
        later: list[tuple[str, Buffer, str, int, Expr, int]],
        symbols: Symbols,
        origin: dict[Var, str],
    ) -> None:
        """Settle the extents that are expressions, those with one unknown symbol by solving."""
        while later:
            waiting = []
            for entry in later:
                name, buffer, noun, d, e, actual = entry
                missing = variables(e) - symbols.keys()
                if not missing:
                    if evaluate(e, symbols) != actual:
                        self._differs(name, buffer, noun, d, f"`{show(e)}`", actual)
                elif len(missing) == 1:
                    (symbol,) = missing
                    value = _solve_for(symbol, e, actual, symbols)
                    if value is None:
                        self._differs(name, buffer, noun, d, f"`{show(e)}`", actual)
                    else:
                        symbols[symbol] = value
                        origin[symbol] = name
                else:
                    waiting.append(entry)
            if len(waiting) == len(later):
                names = sorted(v.name for v in variables(later[0][4]) - symbols.keys())
                raise ArgumentError(
                    f"{self.what}: the shapes of the arguments do not say what "
                    f"{' and '.join(names)} are.",
                    hint="Declare an extent that is the symbol alone.",
                )
            later = waiting

    def _check_bounds(self, symbol: Var, symbols: Symbols) -> None:
        value = symbols[symbol]
        low = int_value(symbol.low) if symbol.low is not None else None
        high = int_value(symbol.high) if symbol.high is not None else None
        if low is not None and value < low:
            promise = "a size, which is not negative" if low == 0 else f"at least {low}"
            raise ArgumentError(
                f"{self.what}: {symbol.name} is {value}, but it was declared {promise}."
            )
        if (high is not None and value > high) or value > MAX_SYMBOL:
            limit = MAX_SYMBOL if high is None else min(high, MAX_SYMBOL)
            raise ArgumentError(
                f"{self.what}: {symbol.name} is {value}; it may be at most {limit}."
            )


def _plan(dims: Sequence[Expr]) -> tuple[int | Expr, ...]:
    return tuple(int(e.value) if isinstance(e, Const) else _strip(e) for e in dims)


def _strip(e: Expr) -> Expr:
    """The expression without integer casts around a symbol."""
    while isinstance(e, Op) and e.op == "cast" and e.dtype.is_integer:
        e = e.children[0]
    return e


def evaluate(e: Expr, values: Mapping[Var, Any]) -> int:
    """An integer expression whose variables all have values."""
    used = sorted(variables(e), key=lambda v: v.serial)
    return int(host_function((e,), used)(*(values[v] for v in used))[0])


def _solve_for(symbol: Var, e: Expr, actual: int, values: Mapping[Var, Any]) -> int | None:
    """The value of `symbol` that makes `e` equal `actual`; None when no integer does."""
    terms, constant = linear(e)
    factor, rest = 0, actual - constant
    for term, times in terms.items():
        bare = _strip(term)
        if bare is symbol:
            factor += times
        elif symbol in walk(bare):
            raise ArgumentError(
                f"An extent `{show(e)}` does not say what {symbol.name} is.",
                hint=f"Declare another extent that is {symbol.name} alone.",
            )
        else:
            rest -= times * evaluate(bare, values)
    if factor == 0:
        return None
    value, remainder = divmod(rest, factor)
    if remainder or (symbol.kind is VarKind.SYMBOL and value > MAX_SYMBOL):
        return None
    return value


def scalar_value(what: str, name: str, value: Any, dtype: DType) -> Any:
    """A runtime scalar argument as a Python number of `dtype`.

    Raises:
        DTypeError, ArgumentError: no number, or one that does not fit.
    """
    if type(value) is int and dtype.is_integer and dtype.min <= value <= dtype.max:
        return value
    try:
        typed = dtype.constant(value)
        return float(typed) if dtype.is_float else int(typed) if dtype.is_integer else bool(typed)
    except DTypeError:
        raise DTypeError(
            f"{what}: {name} is {a_kind(value)}, but it was declared a {dtype} number.",
            hint="Pass a Python or NumPy number.",
        ) from None
    except ArgumentError as error:
        raise ArgumentError(f"{what}: {name}: {error.headline}") from None
