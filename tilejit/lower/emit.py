"""Emitters: what each node of a kernel does, written against a `Machine`.

Knows nodes, layouts and offsets that passes decided. Does not know LLVM, Numba or NumPy: the same
code makes the GPU's instructions and runs on the simulator's lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tilejit.dtypes import DType, bool_, float32, int32, int64, uint8, uint16, uint32, uint64
from tilejit.errors import InternalError
from tilejit.ir.analysis import (
    Interval,
    divisor,
    interval,
    is_whole,
    keeps_value,
    linear,
    reduced,
)
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import (
    BINARY,
    COMPARE,
    Const,
    Expr,
    Op,
    Var,
    VarKind,
    arith,
    cast,
    const,
    index,
    int_value,
    substitute,
)
from tilejit.ir.kernel import Kernel
from tilejit.ir.node import Role
from tilejit.isa.machine import Address, Machine, Value
from tilejit.isa.special import HIDE, UNIFORM
from tilejit.layout.fragment import FragmentLayout
from tilejit.lower.facts import Facts
from tilejit.lower.index import (
    coarse_comparison,
    global_offset,
    power_of_two_divisor,
    shared_offset,
    total,
)

_SMALL_FLOAT_BITS = 16
_ORDERED = ("lt", "le", "gt", "ge")
EXACT = 1 << 24  # float32 has all whole numbers up to it


@dataclass
class Point:
    """One iteration that a statement is emitted for.

    mapping: loop variables and loaded values of this iteration.
    bounds: false for padding iterations, which must touch no memory; None is true.
    condition: conjunction of the enclosing branches' conditions; None is true.
    tests: more of these, that neighbours do not share: comparisons of whole numbers.
    """

    mapping: dict[Var, Expr] = field(default_factory=dict)
    bounds: Value | None = None
    condition: Value | None = None
    tests: tuple[Expr, ...] = ()

    def sub(self, e: Expr) -> Expr:
        return substitute(e, self.mapping) if self.mapping else e

    def place(self, e: Expr) -> Expr:
        """The same of an index, so that what neighbours share is the same expression."""
        return reduced(self.sub(e))


@dataclass
class Points:
    """The iterations that a thread runs, in register order.

    layout, variables: the T.Parallel loop they belong to; None for statements outside one.
    vector: that many consecutive points (from multiples of it) step `axis` by one.
    once: true in one of the threads that run copies of the same iteration; None is true.
    once_loads: the same for loads from memory, where only that thread needs the values.
    registers: the layout's register of each point; None when they are all, in order.
    constants: what enclosing unrolled loops' variables are.
    """

    points: list[Point]
    layout: FragmentLayout | None = None
    variables: tuple[Var, ...] = ()
    vector: int = 1
    axis: Var | None = None
    once: Value | None = None
    once_loads: Value | None = None
    registers: list[int] | None = None
    constants: dict[Var, Expr] = field(default_factory=dict)

    @property
    def is_single(self) -> bool:
        return self.layout is None and len(self.points) == 1

    def with_constant(self, var: Var, value: Expr) -> Points:
        points = [replace(p, mapping={**p.mapping, var: value}) for p in self.points]
        return replace(self, points=points, constants={**self.constants, var: value})


class EmitterBase:
    """Expressions, addresses and the values known at the current place."""

    def __init__(self, machine: Machine, kernel: Kernel, facts: Facts) -> None:
        self.m = machine
        self.kernel = kernel
        self.facts = facts
        self.state: dict[Any, list[Value]] = {}
        self.bases: dict[Any, Value] = {}
        self._values: list[dict[Expr, Value]] = [{}]
        self._indexes: list[dict[Expr, tuple[Value, int]]] = [{}]
        self._guards: list[dict[tuple[Expr, Expr], Value]] = [{}]
        self.divergent = 0
        assert kernel.target is not None, "lowering needs a target"
        self.target = kernel.target

    # ---- scopes -----------------------------------------------------------------------------

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Values computed inside (a branch or loop body) are forgotten outside."""
        self._values.append({})
        self._indexes.append({})
        self._guards.append({})
        try:
            yield
        finally:
            self._values.pop()
            self._indexes.pop()
            self._guards.pop()

    def forget(self) -> None:
        """Forget what was computed in the innermost scope."""
        for layers in (self._values, self._indexes, self._guards):
            layers[-1].clear()

    def bind(self, var: Var, value: Value) -> None:
        self._values[-1][var] = value

    def _lookup(self, e: Expr) -> Value | None:
        for layer in reversed(self._values):
            if e in layer:
                return layer[e]
        return None

    # ---- expressions ------------------------------------------------------------------------

    @property
    def thread(self) -> Var:
        """The number of the thread in its role as an index expression."""
        return self._thread_var

    def start(self, role: Role, thread_var: Var, meeting: int) -> None:
        """Give the executing role's threads their numbers, from 0 on, and threadIdx its variables.

        meeting: the hardware barrier at which the role's threads come together.
        """
        self._thread_var = thread_var
        self.threads = role.size
        self.meeting, self.team = meeting, role.team
        absolute = self.m.thread_index()
        if role.team is not None:
            absolute = self._in_team(role, absolute)
        self.bind(thread_var, absolute)
        if role.first:
            first = self.m.const(role.first, int32)
            self.bind(thread_var, self.m.binary("sub", absolute, first, int32))
        x, y, _ = self.kernel.threads
        total = self.kernel.num_threads
        if role.first or role.size < total or role.team is not None:
            assert x == total, "roles are of blocks with threads along x"
            for var, at in zip(self.kernel.thread_vars, (absolute, None, None), strict=False):
                self.bind(var, self.m.const(0, int32) if at is None else at)
            return
        parts = (
            _remainder(thread_var, x, total),
            _remainder(arith("floordiv", thread_var, x), y, total // x),
            arith("floordiv", thread_var, x * y),
        )
        for var, part in zip(self.kernel.thread_vars, parts, strict=False):
            self.bind(var, self.index_value(part, 32)[0])

    def _in_team(self, role: Role, absolute: Value) -> Value:
        """The number of a thread in its team, whose own number becomes known."""
        assert role.team is not None and not role.first, "teams are of a block's first threads"
        m, size = self.m, self.m.const(role.size, int32)
        number = m.bitcast(m.binary("floordiv", absolute, size, int32), int32, uint32)
        (number,) = m.issue(UNIFORM, [number])
        self.bind(role.team, m.bitcast(number, uint32, int32))
        return m.binary("floormod", absolute, size, int32)

    def value(self, e: Expr) -> Value:
        """The value of an expression, in its dtype."""
        found = self._lookup(e)
        if found is not None:
            return found
        stack = [e]
        while stack:
            node = stack[-1]
            if self._lookup(node) is not None:
                stack.pop()
                continue
            missing = [c for c in node.children if self._lookup(c) is None]
            if missing:
                stack.extend(missing)
                continue
            self._values[-1][node] = self._compute(node)
            stack.pop()
        result = self._lookup(e)
        assert result is not None
        return result

    def _compute(self, e: Expr) -> Value:
        m = self.m
        if isinstance(e, Const):
            return m.const(e.value, e.dtype)
        if isinstance(e, Var):
            raise InternalError(f"`{e.name}` is used where it has no value.", span=None)
        assert isinstance(e, Op)
        if e.op in _ORDERED:
            coarse = coarse_comparison(e, self.kernel.multiples)
            if coarse is not e:
                return self.value(coarse)
        args = [self._lookup(c) for c in e.children]
        source = e.children[0].dtype
        if e.op == "select":
            return m.select(*args)
        if e.op == "cast":
            parts = _exact_parts(e)
            if parts is not None:  # neighbours share the conversion, which is slow
                return m.binary("add", self.value(parts[0]), self.value(parts[1]), float32)
            return m.cast(args, source, e.dtype)[0]
        if e.op == "bitcast":
            return m.bitcast(args[0], source, e.dtype)
        if e.op == "hidden":
            return self._hidden(args[0], source)
        narrow = source.is_float and source.bits <= _SMALL_FLOAT_BITS
        dtype = float32 if narrow or source.name == "tfloat32" else source
        if narrow:
            args = m.cast(args, source, float32)
        if e.op in BINARY or e.op in COMPARE:
            result = m.binary(e.op, args[0], args[1], dtype)
        else:
            result = m.unary(e.op, args[0], dtype)
        if narrow and not e.dtype.is_bool:
            return m.cast([result], float32, e.dtype)[0]
        return result

    def _hidden(self, value: Value, dtype: DType) -> Value:
        """The value, which no compiler knows any more."""
        m = self.m
        own = {8: uint8, 16: uint16, 32: uint32}[dtype.bits]
        word = m.bitcast(value, dtype, own)
        (word,) = m.issue(HIDE, m.cast([word], own, uint32))
        return m.bitcast(m.cast([word], uint32, own)[0], own, dtype)

    def values(self, exprs: Sequence[Expr]) -> list[Value]:
        """Values of several expressions; conversions of the same kind go together."""
        pending = [
            e for e in dict.fromkeys(exprs)
            if isinstance(e, Op) and e.op == "cast" and self._lookup(e) is None
            and _exact_parts(e) is None
        ]  # fmt: skip
        kinds = {(e.children[0].dtype, e.dtype) for e in pending}
        for source, target in sorted(kinds, key=str):
            group = [e for e in pending if (e.children[0].dtype, e.dtype) == (source, target)]
            inner = self.values([e.children[0] for e in group])
            for e, converted in zip(group, self.m.cast(inner, source, target), strict=True):
                self._values[-1][e] = converted
        return [self.value(e) for e in exprs]

    def index_value(self, e: Expr, bits: int | None = None) -> tuple[Value, int]:
        """The value of an index expression as if computed in whole numbers, and its width: 32
        bits where its bounds prove that they hold it, else 64. `bits` asks for a width."""
        result = self._index(e)
        if bits is None or result[1] == bits:
            return result
        source, target = (int32, int64) if bits == 64 else (int64, int32)
        return self.m.cast([result[0]], source, target)[0], bits

    def _index(self, e: Expr) -> tuple[Value, int]:
        for layer in reversed(self._indexes):
            if e in layer:
                return layer[e]
        result = self._compute_index(e)
        self._indexes[-1][e] = result
        return result

    def _compute_index(self, e: Expr) -> tuple[Value, int]:
        m = self.m
        if isinstance(e, Const):
            small = int32.min <= int(e.value) <= int32.max
            return m.const(int(e.value), int32 if small else int64), 32 if small else 64
        if isinstance(e, Op) and e.op == "cast" and keeps_value(e):
            return self._index(e.children[0])
        if isinstance(e, Op) and is_whole(e):
            return self._whole_op(e)
        value = self.value(e)
        if e.dtype is int32 or e.dtype is int64:
            return value, e.dtype.bits
        fits = interval(e).fits_int32
        target = int32 if fits else int64
        return m.cast([value], e.dtype, target)[0], target.bits

    def _whole_op(self, e: Op) -> tuple[Value, int]:
        operands = e.children[1:] if e.op == "select" else e.children
        parts = [self._index(c) for c in operands]
        fits = interval(e).fits_int32
        bits = max([32 if fits else 64, *(b for _, b in parts)])
        args = [self.index_value(c, bits)[0] for c in operands]
        value = self._at_width(e, operands, args, bits)
        if fits and bits == 64:  # what follows is cheaper
            return self.m.cast([value], int64, int32)[0], 32
        return value, bits

    def _at_width(self, e: Op, operands: Sequence[Expr], args: Sequence[Value], bits: int) -> Value:
        dtype = int32 if bits == 32 else int64
        if e.op == "select":
            return self.m.select(self.value(e.children[0]), *args)
        if e.op == "neg":
            return self.m.unary("neg", args[0], dtype)
        if e.op in ("floordiv", "floormod"):
            low, by = (interval(n).low for n in operands)
            if low is not None and by is not None and low >= 0 and by >= 0:
                is_varying = int_value(operands[1]) is None
                return self.unsigned(e.op, args[0], args[1], bits, is_varying and by > 0)
        return self.m.binary(e.op, args[0], args[1], dtype)

    def unsigned(self, op: str, a: Value, b: Value, bits: int, is_nonzero: bool = False) -> Value:
        """The operation on signed values taken as unsigned ones; comparisons stay bool.
        is_nonzero: of a division, that b is known not to be 0."""
        m = self.m
        signed, dtype = (int32, uint32) if bits == 32 else (int64, uint64)
        x, y = m.cast([a, b], signed, dtype)
        if is_nonzero:
            result = m.quotient(x, y, dtype)
            if op == "floormod":
                result = m.binary("sub", x, m.binary("mul", result, y, dtype), dtype)
        else:
            result = m.binary(op, x, y, dtype)
        return result if op in COMPARE else m.cast([result], dtype, signed)[0]

    # ---- predicates -------------------------------------------------------------------------

    def both(self, *conditions: Value | None) -> Value | None:
        """Conjunction; None is true."""
        result: Value | None = None
        for condition in conditions:
            if condition is None or condition is result:
                continue
            result = condition if result is None else self.m.binary("and", result, condition, bool_)
        return result

    def condition(self, point: Point) -> Value | None:
        """Whether an iteration is in the branches around; None is true."""
        return self.both(point.condition, *map(self.value, point.tests))

    def inside(self, e: Expr, extent: Expr) -> Value | None:
        """Whether 0 <= e < extent; None when that is proven."""
        if is_surely_inside(e, extent):
            return None
        for layer in reversed(self._guards):
            if (e, extent) in layer:
                return layer[e, extent]
        left, right = self.index_value(e), self.index_value(extent)
        bits = max(left[1], right[1])
        a, b = self.index_value(e, bits)[0], self.index_value(extent, bits)[0]
        # one unsigned comparison: a negative index is a huge unsigned number
        result = self.unsigned("lt", a, b, bits)
        self._guards[-1][e, extent] = result
        return result

    def guard(self, buffer: Buffer, at: Sequence[Expr], lead_only: bool = False) -> Value | None:
        """Whether a global index is in range; None when that is proven. lead_only: all but its last
        part."""
        if buffer.scope is not Scope.GLOBAL:
            return None
        tests = []
        count = len(at) - lead_only
        for e, extent in zip(at[:count], buffer.shape[:count], strict=True):
            if buffer.broadcasts and int_value(extent) == 1:
                continue
            tests.append(self.inside(e, extent))
        return self.both(*tests)

    def check(
        self, buffer: Buffer, at: Sequence[Expr], when: Value | None = None, count: int = 1
    ) -> None:
        """Where the machine checks: report an access to `count` neighbours from `at` on that
        leaves a buffer on the chip."""
        if buffer.scope is Scope.GLOBAL or not self.m.checks_indexes:
            return
        for place in (at, (*at[:-1], arith("add", at[-1], count - 1))) if count > 1 else (at,):
            if not all(map(is_surely_inside, place, buffer.shape)):
                numbers = [self.index_value(e, 64)[0] for e in place]
                self.m.check_index(numbers, buffer.extents, buffer.name, when)

    def check_region(self, region: Region, point: Point) -> None:
        """The same for a box of a buffer."""
        starts = [point.sub(e) for e in region.starts]
        ends = [arith("add", e, n - 1) for e, n in zip(starts, region.extents, strict=True)]
        for at in (starts, ends):
            self.check(region.buffer, at, self.condition(point))

    # ---- addresses --------------------------------------------------------------------------

    def address(self, buffer: Buffer, at: Sequence[Expr]) -> Address:
        """The address of an element of a global, shared or local-memory buffer."""
        if buffer.scope is Scope.GLOBAL:
            assert isinstance(buffer.data, Expr)
            offset = global_offset(buffer, at)
            align = power_of_two_divisor(buffer.align or buffer.dtype.bytes, 16)
            written = buffer in self.written
            return self._split(
                "global",
                self.value(buffer.data),
                offset,
                align,
                not written and self.is_readonly(buffer),
            )
        root = buffer.root
        if buffer.scope.is_shared:
            layout = self.kernel.shared[root]
            if buffer is root:
                offset = shared_offset(layout, at)
            else:
                offset = arith("mul", self.view_element(buffer, at), buffer.dtype.bytes)
            offset = arith("add", offset, self.kernel.offsets[root])
            return self._split("shared", None, offset, 16, False)
        offset = arith("mul", self.view_element(buffer, at), buffer.dtype.bytes)
        return self._split("local", self.bases[root], offset, 16, False)

    def view_element(self, buffer: Buffer, at: Sequence[Expr]) -> Expr:
        """Linear element number of an index, counted from the root buffer's first element in
        elements of the view."""
        result: Expr = index(0)
        for i, stride in zip(at, buffer.element_strides, strict=True):
            result = arith("add", result, arith("mul", i, stride))
        inner = buffer
        scale = buffer.dtype.bytes
        while True:
            skipped = arith("mul", inner.offset, inner.dtype.bytes)
            result = arith("add", result, arith("floordiv", skipped, scale))
            if not isinstance(inner.data, Buffer):
                return result
            inner = inner.data

    def _split(
        self, space: str, base: Value | None, offset: Expr, align: int, readonly: bool
    ) -> Address:
        terms, constant = linear(offset)
        variable = total(terms, 0)
        known = divisor(variable, self.kernel.multiples) if terms else 0
        align = power_of_two_divisor(known, align)
        align = power_of_two_divisor(constant, align)
        value: Value | None = None
        if terms:  # shared and local memory are small: an offset in range fits 32 bits
            value = self.index_value(variable, None if space == "global" else 32)[0]
        return Address(space, base, value, constant, align, readonly)

    @property
    def written(self) -> frozenset[Buffer]:
        if not hasattr(self, "_written"):
            self._written = self.kernel.written
        return self._written

    def is_readonly(self, buffer: Buffer) -> bool:
        """True when nothing can write the buffer's memory while the kernel runs."""
        if self.facts.is_dependent:
            return False
        return any(p.var is buffer.data and p.noalias for p in self.kernel.params)

    # ---- private arrays ---------------------------------------------------------------------

    def private_slot(self, buffer: Buffer, at: Sequence[Expr]) -> int | Expr:
        """Which element of the root's register list an index means; an expression when it is
        known only at run time."""
        if buffer.root.dtype is not buffer.dtype:
            raise InternalError(f"`{buffer.name}` views registers as another dtype.")
        element = self.view_element(buffer, at)
        number = int_value(element)
        return element if number is None else number


def _exact_parts(e: Op) -> tuple[Expr, Expr] | None:
    """For a conversion of an index plus a constant to float32: that of the index, and the constant,
    whose sum is the same; None where it may be rounded, or there is none."""
    (source,) = e.children
    if e.dtype is not float32 or not source.dtype.is_integer:
        return None
    terms, constant = linear(source)
    if not constant or not terms:
        return None
    rest = total(terms, 0)
    exact = Interval(-EXACT, EXACT)
    if abs(constant) > EXACT or not all(interval(x).within(exact) for x in (source, rest)):
        return None
    return cast(rest, float32), const(float(constant), float32)


def is_surely_inside(e: Expr, extent: Expr) -> bool:
    """True when 0 <= e < extent is proven."""
    bounds, limit = interval(e), interval(extent)
    if bounds.low is None or bounds.high is None or limit.low is None:
        return False
    return bounds.low >= 0 and bounds.high < limit.low


def _remainder(e: Expr, size: int, limit: int) -> Expr:
    return e if size >= limit else arith("floormod", e, size)


def new_value(name: str, dtype: DType) -> Var:
    return Var(name, dtype, VarKind.VALUE)
