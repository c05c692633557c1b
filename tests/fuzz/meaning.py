"""What a generated program means, executed beside its text: the fuzz tests' own oracle.

Every `Term` and `Statement` carries its source text and a function that does in NumPy what the
language says of it. Knows the language's meaning of scalars, masks, places and tiles. Does not
know how tilejit traces, simplifies or executes anything; only the arithmetic of single operations
(`tilejit.ops.scalar`) is shared, and tested elsewhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tilejit.dtypes import DType, bool_, float32, float64, int32, int64, promote
from tilejit.errors import DTypeError
from tilejit.ops.scalar import cast_array, evaluate_op

Array = np.ndarray[Any, Any]


@dataclass
class State:
    """One block while it runs.

    memory: arrays by name. names: values of variables by name. box: extents of the iterations or
    threads that run together, () outside. mask: those that are active.
    """

    memory: dict[str, Array]
    names: dict[str, Array] = field(default_factory=dict)
    box: tuple[int, ...] = ()
    mask: Array = field(default_factory=lambda: np.array(True))

    def spread(self, value: Array) -> Array:
        return np.broadcast_to(value, self.box)

    def run(self, body: Sequence[Statement], mask: Array) -> None:
        """Run the body where `mask` holds."""
        if not mask.any():
            return
        before, self.mask = self.mask, mask
        for statement in body:
            statement.run(self)
        self.mask = before

    def place(self, name: str, index: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
        """Which iterations' index lies in the array, and the index with the others at 0."""
        spread = [self.spread(i).astype(np.int64) for i in index]
        inside = np.ones(self.box, bool)
        for i, extent in zip(spread, self.memory[name].shape, strict=True):
            inside &= (i >= 0) & (i < extent)
        return inside, tuple(np.where(inside, i, 0) for i in spread)

    def load(self, name: str, index: Sequence[Array]) -> Array:
        inside, at = self.place(name, index)
        values = self.memory[name][at]
        return np.where(inside, values, np.zeros((), values.dtype)).astype(values.dtype)

    def store(self, name: str, index: Sequence[Array], value: Array) -> None:
        inside, at = self.place(name, index)
        active = inside & self.mask
        self.memory[name][tuple(i[active] for i in at)] = self.spread(value)[active]


@dataclass(frozen=True)
class Term:
    """An expression. weak: a Python number, which takes its partner's dtype.

    low, high: bounds of an integer that indexes are made of; None for others.
    """

    text: str
    dtype: DType
    value: Callable[[State], Array]
    weak: bool = False
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class Statement:
    """Lines of source, the first not indented, and what they do."""

    lines: Sequence[str]
    run: Callable[[State], None]


# --- terms ---------------------------------------------------------------------------------------


def literal(number: int | float) -> Term:
    if isinstance(number, int):
        dtype = int32 if -(2**31) <= number < 2**31 else int64
        value = np.array(number, dtype.numpy)
        return Term(repr(number), dtype, lambda _: value, True, number, number)
    array = np.array(number, np.float32)
    return Term(repr(number), float32, lambda _: array, weak=True)


def name(text: str, dtype: DType, low: int | None = None, high: int | None = None) -> Term:
    """A variable of the program."""
    return Term(text, dtype, lambda s: s.names[text], low=low, high=high)


def cast(a: Term, target: DType, text: str | None = None) -> Term:
    if text is None:
        text = a.text if a.dtype is target else f'{a.text}.astype("{target}")'
    keep = a.dtype.is_integer and target.is_integer and target.bits >= 32
    return Term(
        text,
        target,
        lambda s: cast_array(a.value(s), a.dtype, target),
        low=a.low if keep else None,
        high=a.high if keep else None,
    )


def _typed(a: Term, partner: DType) -> Term:
    """A Python number in the dtype of its partner, as NumPy 2 makes it."""
    is_whole = a.dtype.is_integer
    if not is_whole:
        dtype = partner if partner.is_float else float32
    else:
        dtype = int32 if partner.is_bool else partner
    number = float(a.text.strip("()")) if not is_whole else int(a.text.strip("()"))
    value = np.array(dtype.constant(number))
    return Term(a.text, dtype, lambda _: value, low=a.low, high=a.high)


def common(a: Term, b: Term) -> tuple[Term, Term]:
    """Both operands in the dtype that the language computes in."""
    if a.weak and not b.weak:
        a = _typed(a, b.dtype)
    elif b.weak and not a.weak:
        b = _typed(b, a.dtype)
    try:
        dtype = promote(a.dtype, b.dtype)
    except DTypeError:
        b = cast(b, a.dtype)
        dtype = a.dtype
    return cast(a, dtype, a.text), cast(b, dtype, b.text)


_SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "floormod": "%",
    "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
_EXACT: dict[str, Callable[[int, int], int]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul,
    "floordiv": operator.floordiv, "floormod": operator.mod, "min": min, "max": max,
}  # fmt: skip
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def binary(op: str, a: Term, b: Term, text: str | None = None) -> Term:
    """`a op b`, or `text` with them in the places of {0} and {1}."""
    x, y = common(a, b)
    if text is None:
        text = f"({{0}} {_SIGNS[op]} {{1}})" if op in _SIGNS else f"T.{op}({{0}}, {{1}})"
    shown = text.format(x.text, y.text)
    if op not in COMPARISONS:
        if x.dtype.is_bool and op not in ("and", "or", "xor", "min", "max"):
            x, y = cast(x, int32, x.text), cast(y, int32, y.text)
        if op == "div" and not x.dtype.is_float:
            x, y = cast(x, float32, x.text), cast(y, float32, y.text)
    dtype = x.dtype
    result = bool_ if op in COMPARISONS else dtype

    def value(s: State) -> Array:
        return evaluate_op(op, (x.value(s), y.value(s)), dtype)

    low, high = _bounds(op, x, y)
    return Term(shown, result, value, low=low, high=high)


def _bounds(op: str, a: Term, b: Term) -> tuple[int | None, int | None]:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        if op == "floormod" and b.low is not None and b.low == b.high and b.low > 0:
            return 0, b.low - 1
        return None, None
    if a.low == a.high and b.low == b.high and op in _EXACT:
        if op in ("floordiv", "floormod") and b.low == 0:
            return 0, 0
        value = _EXACT[op](a.low, b.low)
        return value, value
    ends = [(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    if op in ("add", "sub", "mul"):
        values = [{"add": x + y, "sub": x - y, "mul": x * y}[op] for x, y in ends]
        return min(values), max(values)
    if op == "floordiv" and b.low == b.high and b.low > 0:
        return a.low // b.low, a.high // b.low
    if op == "floormod" and b.low == b.high and b.low > 0:
        return 0, b.low - 1
    if op in ("min", "max"):
        pick = min if op == "min" else max
        return pick(a.low, b.low), pick(a.high, b.high)
    return None, None


def compare_with_number(op: str, a: Term, number: int) -> Term:
    """An integer compared with a Python number that its dtype may not hold."""
    value = np.array(number, np.int64)

    def compared(s: State) -> Array:
        wide = a.value(s).astype(np.int64) if a.dtype.bits < 64 else a.value(s)
        return evaluate_op(op, (wide, value.astype(wide.dtype)), int64)

    return Term(f"({a.text} {_SIGNS[op]} {number})", bool_, compared)


def unary(op: str, a: Term, text: str) -> Term:
    return Term(text.format(a.text), a.dtype, lambda s: evaluate_op(op, (a.value(s),), a.dtype))


def predicate(op: str, a: Term) -> Term:
    return Term(f"T.{op}({a.text})", bool_, lambda s: evaluate_op(op, (a.value(s),), a.dtype))


def select(condition: Term, a: Term, b: Term, text: str) -> Term:
    x, y = common(a, b)
    test = cast(condition, bool_)

    def value(s: State) -> Array:
        return np.where(test.value(s), x.value(s), y.value(s)).astype(x.dtype.numpy)

    shown = text.format(condition.text, x.text, y.text)
    return Term(shown, x.dtype, value, low=_least(x, y), high=_most(x, y))


def _least(x: Term, y: Term) -> int | None:
    return None if x.low is None or y.low is None else min(x.low, y.low)


def _most(x: Term, y: Term) -> int | None:
    return None if x.high is None or y.high is None else max(x.high, y.high)


def as_index(a: Term) -> Term:
    """The term as an index: int32, or int64 where its dtype is wider."""
    if a.dtype in (int32, int64):
        return a
    wide = a.dtype.bits == 64 or a.dtype.name == "uint32"
    return cast(a, int64 if wide else int32, a.text)


def load(buffer: str, dtype: DType, index: Sequence[Term]) -> Term:
    at = [as_index(i) for i in index]
    text = f"{buffer}[{', '.join(i.text for i in at)}]"
    return Term(text, dtype, lambda s: s.load(buffer, [i.value(s) for i in at]))


# --- statements ----------------------------------------------------------------------------------


def indent(body: Sequence[Statement]) -> list[str]:
    return ["    " + line for statement in body for line in statement.lines] or ["    pass"]


def let(variable: str, value: Term) -> Statement:
    """`variable = value`: the value it has here."""

    def run(s: State) -> None:
        s.names[variable] = s.spread(value.value(s)).copy()

    return Statement([f"{variable} = {value.text}"], run)


def declare(variable: str, dtype: DType, value: Term) -> Statement:
    """`variable = T.alloc_var(dtype, value)`."""
    stored = _stored(value, dtype)

    def run(s: State) -> None:
        s.names[variable] = s.spread(stored.value(s)).copy()

    return Statement([f'{variable} = T.alloc_var("{dtype}", {value.text})'], run)


def assign(
    variable: str, dtype: DType, value: Term, text: str = "{0} = {1}", op: str = ""
) -> Statement:
    """Set a T.alloc_var; `text` with `op` is an augmented assignment."""
    stored = _stored(value, dtype)
    if op:
        own, value = common(name(variable, dtype), value)
        stored = _stored(binary(op, own, value), dtype)

    def run(s: State) -> None:
        s.names[variable] = np.where(s.mask, stored.value(s), s.names[variable])

    return Statement([text.format(variable, value.text)], run)


def _stored(value: Term, dtype: DType) -> Term:
    return cast(_typed(value, dtype) if value.weak else value, dtype, value.text)


def store(buffer: str, dtype: DType, index: Sequence[Term], value: Term, op: str = "") -> Statement:
    """`buffer[index] = value`, or with `op` the augmented assignment."""
    at = [as_index(i) for i in index]
    place = f"{buffer}[{', '.join(i.text for i in at)}]"
    if op:
        own, value = common(load(buffer, dtype, index), value)
        stored = _stored(binary(op, own, value), dtype)
        text = f"{place} {_SIGNS[op]}= {value.text}"
    else:
        stored = _stored(value, dtype)
        text = f"{place} = {value.text}"

    def run(s: State) -> None:
        s.store(buffer, [i.value(s) for i in at], stored.value(s))

    return Statement([text], run)


def branch(
    condition: Term,
    then: Sequence[Statement],
    orelse: Sequence[Statement],
    native: bool = False,
) -> Statement:
    """`with T.If(...)`, or Python's `if` where `native`."""
    head = f"if {condition.text}:" if native else f"with T.If({condition.text}):"
    lines = [head, *indent(then)]
    if orelse:
        lines += ["else:" if native else "with T.Else():", *indent(orelse)]
    test = cast(condition, bool_)

    def run(s: State) -> None:
        chosen = s.spread(test.value(s))
        mask = s.mask
        s.run(then, mask & chosen)
        s.run(orelse, mask & ~chosen)

    return Statement(lines, run)


def loop(
    head: str, variable: str, start: Term, stop: Term, step: int, body: Sequence[Statement]
) -> Statement:
    """A device loop; `head` is its first line."""

    def run(s: State) -> None:
        i = s.spread(start.value(s)).astype(np.int64)
        end = s.spread(stop.value(s)).astype(np.int64)
        while True:
            more = s.mask & ((i < end) if step > 0 else (i > end))
            if not more.any():
                return
            s.names[variable] = i.astype(np.int32)
            s.run(body, more)
            i = i + step

    return Statement([head, *indent(body)], run)


def while_loop(condition: Term, body: Sequence[Statement], native: bool) -> Statement:
    head = f"while {condition.text}:" if native else f"with T.While({condition.text}):"
    test = cast(condition, bool_)

    def run(s: State) -> None:
        active = s.mask
        while True:
            active = active & s.spread(test.value(s))
            if not active.any():
                return
            s.run(body, active)

    return Statement([head, *indent(body)], run)


def parallel(
    variables: Sequence[str], box: tuple[int, ...], body: Sequence[Statement]
) -> Statement:
    names, extents = ", ".join(variables), ", ".join(map(str, box))
    head = f"for {names} in T.Parallel({extents}):"
    return Statement([head, *indent(body)], over_box(variables, box, body))


def over_box(
    variables: Sequence[str], box: tuple[int, ...], body: Sequence[Statement]
) -> Callable[[State], None]:
    """Runs the body once for every point of the box."""

    def run(s: State) -> None:
        inner = State(s.memory, dict(s.names), box, np.ones(box, bool))
        for d, variable in enumerate(variables):
            shape = tuple(n if d == k else 1 for k, n in enumerate(box))
            inner.names[variable] = np.arange(box[d], dtype=np.int32).reshape(shape)
        inner.run(body, inner.mask)

    return run


def per_thread(variable: str, threads: int, body: Sequence[Statement]) -> Statement:
    """Statements that depend on the thread `variable`: they take effect once a thread."""
    lines = [line for statement in body for line in statement.lines]
    return Statement(lines, over_box([variable], (threads,), body))


# --- tiles ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A box of a buffer: an index for each dimension, and how many elements from there; extent 0
    stands for an index that drops its dimension."""

    buffer: str
    dtype: DType
    text: str
    starts: Sequence[Term]
    extents: Sequence[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(n for n in self.extents if n)

    def index(self, s: State) -> list[Array]:
        """The index of every element of the box, in the box's shape with dropped dimensions."""
        full = tuple(n or 1 for n in self.extents)
        grid = np.indices(full)
        starts = [int(as_index(t).value(s)) for t in self.starts]
        return [g + start for g, start in zip(grid, starts, strict=True)]

    def read(self, s: State) -> Array:
        index = self.index(s)
        inner = State(s.memory, s.names, index[0].shape, np.ones(index[0].shape, bool))
        return inner.load(self.buffer, index).reshape(self.shape)

    def write(self, s: State, values: Array) -> None:
        index = self.index(s)
        inner = State(s.memory, s.names, index[0].shape, np.ones(index[0].shape, bool))
        inner.store(self.buffer, index, values.reshape(index[0].shape))


def copy(src: Box, dst: Box, options: str = "") -> Statement:
    def run(s: State) -> None:
        dst.write(s, cast_array(src.read(s), src.dtype, dst.dtype))

    return Statement([f"T.copy({src.text}, {dst.text}{options})"], run)


def fill(dst: Box, value: Term | None) -> Statement:
    if value is None:
        stored, text = literal(0), f"T.clear({dst.text})"
    else:
        stored, text = value, f"T.fill({dst.text}, {value.text})"
    stored = _stored(stored, dst.dtype)

    def run(s: State) -> None:
        dst.write(s, np.broadcast_to(stored.value(s), dst.shape))

    return Statement([text], run)


def gemm(a: Box, b: Box, acc: Box, t_a: bool, t_b: bool, clear: bool, options: str) -> Statement:
    """`acc += a @ b`, exact: operands are small integers."""

    def run(s: State) -> None:
        left, right = a.read(s).astype(np.float64), b.read(s).astype(np.float64)
        product = (left.T if t_a else left) @ (right.T if t_b else right)
        if not clear:
            product = product + acc.read(s).astype(np.float64)
        assert np.abs(product).max() < 2**24, "the generator keeps products exact"
        acc.write(s, product.astype(np.float32).astype(acc.dtype.numpy))

    flags = f", transpose_A={t_a}" * t_a + f", transpose_B={t_b}" * t_b
    flags += ", clear_accum=True" * clear
    return Statement([f"T.gemm({a.text}, {b.text}, {acc.text}{flags}{options})"], run)


def reduce(src: Box, dst: Box, kind: str, axis: int, clear: bool, keeps_nan: bool) -> Statement:
    """All elements along an axis, combined one after the other; where that could round, the
    generator keeps it exact."""

    def run(s: State) -> None:
        values = np.moveaxis(src.read(s), axis, 0)
        old = None if clear else dst.read(s).reshape(values.shape[1:])
        dst.write(s, reduced(kind, values, src.dtype, old, dst.dtype, keeps_nan))

    text = f"{src.text}, {dst.text}"
    options = ", clear=False" * (not clear)
    if keeps_nan or len(kind) % 2:
        options += f", nan_propagate={keeps_nan}" * (kind[-3:] in ("max", "min"))
        return Statement([f"T.reduce_{kind}({text}, {axis}{options})"], run)
    return Statement([f'T.reduce({text}, "{kind}", {axis}{options})'], run)


def scan(tile: Box, kind: str, axis: int, reverse: bool, keeps_nan: bool) -> Statement:
    """Running sums or maxima in the place of the elements."""

    def run(s: State) -> None:
        lines = np.moveaxis(tile.read(s), axis, 0)
        results = list(lines[::-1] if reverse else lines)
        for k in range(1, len(results)):
            pair = np.stack([results[k - 1], results[k]])
            results[k] = reduced(kind, pair, tile.dtype, None, tile.dtype, keeps_nan)
        found = np.stack(results[::-1] if reverse else results)
        tile.write(s, np.moveaxis(found, 0, axis))

    options = ", reverse=True" * reverse
    if kind == "max" and (keeps_nan or reverse):
        options += f", nan_propagate={keeps_nan}"
    return Statement([f"T.cum{kind}({tile.text}, dim={axis}{options})"], run)


_FLOAT_STEPS = {"sum": "add", "max": "max", "min": "min"}


def _of_floats(op: str, keeps_nan: bool, a: Array, b: Array) -> Array:
    result = evaluate_op(op, (a, b), float64)
    is_nan = np.isnan(a) | np.isnan(b)
    return np.where(is_nan, np.nan, result) if keeps_nan or op == "add" else result


def reduced(
    kind: str, values: Array, source: DType, old: Array | None, target: DType, keeps_nan: bool
) -> Array:
    is_float = source.is_float or target.is_float
    if is_float:
        wide, bits = [x.astype(np.float64) for x in values], 0
    else:
        bits = max(32, target.bits)
        wide = [x.astype(object) for x in values]
    if kind.startswith("abs"):
        wide = [abs(x) for x in wide]
    if bits and target.is_signed:  # magnitudes wrap before they are compared
        wide = [(x + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1) for x in wide]
    if old is not None:
        wide.append(old.astype(np.float64 if is_float else object))
    exact = {"sum": operator.add, "max": max, "min": min, "bitand": operator.and_,
             "bitor": operator.or_, "bitxor": operator.xor}  # fmt: skip
    steps: dict[str, Callable[..., Any]] = {n: np.frompyfunc(f, 2, 1) for n, f in exact.items()}
    if is_float:
        steps = {n: partial(_of_floats, op, keeps_nan) for n, op in _FLOAT_STEPS.items()}
    total = wide[0]
    for x in wide[1:]:
        total = steps[kind.removeprefix("abs")](total, x)
    if is_float:
        accumulator = float64 if float64 in (source, target) else float32
        return cast_array(cast_array(total, float64, accumulator), accumulator, target)
    if target.is_bool:
        return np.asarray(total).astype(bool)
    return np.asarray(total % (1 << target.bits)).astype(f"u{target.bytes}").view(target.numpy)
