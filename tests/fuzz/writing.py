"""Writes random programs in the public language, each with its meaning (`meaning`).

Knows which programs are well defined: on-chip indexes are in range, iterations of a T.Parallel do
not depend on each other, blocks write regions of their own, and operands of T.gemm are small
integers so that every order of summation gives the same bits. Does not know how they are run.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import meaning as m
import numpy as np
from meaning import Array, Box, Statement, Term, literal

from tilejit.dtypes import DType, as_dtype, int32

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "tfloat32")
EXTENTS = (1, 2, 3, 4, 5, 7, 8, 8, 12, 16, 16, 17, 24, 31, 32, 32, 33, 40, 64, 64, 80, 128)
MAX_TILE = 2048  # elements
MATH = (
    "exp", "exp2", "log", "log2", "log10", "log1p", "expm1", "sqrt", "rsqrt", "sin", "cos", "tanh",
    "erf", "atan",
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """A buffer of the program.

    base: for a tensor that blocks write: where the block's own region begins; `extents` are then
    those of the region. scope: "input", "output", "shared" or "fragment".
    """

    name: str
    dtype: DType
    extents: tuple[int, ...]
    scope: str
    base: tuple[Term, ...] = ()
    limit: int | None = None  # magnitude of what is stored, so that sums of products are exact

    @property
    def is_tile(self) -> bool:
        return self.scope in ("shared", "fragment")

    def at(self, index: Sequence[Term]) -> list[Term]:
        if not self.base:
            return list(index)
        return [m.binary("add", b, i) for b, i in zip(self.base, index, strict=True)]


@dataclass
class Program:
    """source: of a module with the @tilejit function `kernel`. arrays: its tensors by name, with
    what outputs hold before. declared: those whose shape is, so that they are contiguous.
    scalars: further arguments. expected: outputs after a run; they may differ by `bounds`.
    twins: tensors for which the array of another one is given. has_sums: of products, where zeros
    get the sign that the order of summation gives them."""

    source: str
    arrays: dict[str, Array]
    outputs: tuple[str, ...]
    declared: frozenset[str]
    scalars: dict[str, Any]
    expected: dict[str, Array]
    bounds: dict[str, Array] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    has_sums: bool = False


@dataclass(frozen=True)
class Product:
    """Tiles that fit `T.gemm(a, b, acc)`."""

    a: Memory
    b: Memory
    acc: Memory
    t_a: bool
    t_b: bool


@dataclass(frozen=True)
class Statistic:
    """Tiles that fit `T.reduce(source, out, ..., axis)`."""

    source: Memory
    out: Memory
    axis: int


@dataclass(frozen=True)
class Profile:
    """What kind of program: exact ones hold small whole numbers, and may multiply tiles."""

    exact: bool = False
    max_statements: int = 6


class Writer:
    """Writes one program; everything is drawn from `seed`."""

    def __init__(self, seed: int, profile: Profile) -> None:
        self.rng = random.Random(f"{seed} {profile}")
        self.numbers = np.random.default_rng(seed)
        self.profile = profile
        self.serial = 0
        self.memories: list[Memory] = []
        self.scope: list[Term] = []  # variables in scope
        self.own: dict[str, list[Term]] = {}  # index that an iteration writes, by buffer
        self.twins: dict[str, str] = {}  # tensors that are the same array
        self.products: list[Product] = []
        self.statistics: list[Statistic] = []
        self.loops = 0

    # --- helpers ---------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def fresh(self, stem: str) -> str:
        self.serial += 1
        return f"{stem}{self.serial}"

    def dtype(self) -> DType:
        if self.profile.exact:
            return as_dtype(self.pick("float16", "float32", "int32", "bfloat16", "int8"))
        kinds = (*INTEGERS, *FLOATS, "float32", "float32", "float16", "int32", "bool")
        return as_dtype(self.pick(*kinds))

    # --- expressions -----------------------------------------------------------------------------

    def term(self, depth: int) -> Term:
        """A number that is not a plain Python number."""
        if depth <= 0 or self.chance(0.15):
            return self.leaf()
        makers: list[Callable[[int], Term]] = [self.arithmetic] * 4 + [self.choice, self.extreme]
        if not self.profile.exact:
            makers += [self.bits, self.conversion, self.function, self.function, self.divided]
        return self.rng.choice(makers)(depth - 1)

    def leaf(self) -> Term:
        if self.chance(0.3) and self.scope:
            return self.rng.choice(self.scope)
        readable = [x for x in self.memories if self.is_readable(x)]
        if not readable:
            return self.rng.choice(self.scope)
        return self.load(self.rng.choice(readable))

    def is_readable(self, memory: Memory) -> bool:
        return not (memory.scope == "output" and memory.dtype.is_bool)

    def operand(self, depth: int, partner: DType) -> Term:
        if self.chance(0.25):
            if partner.is_float and self.chance(0.5) and not self.profile.exact:
                return literal(self.pick(0.5, 1.5, 2.0, 0.125, 3.0))
            return literal(self.pick(0, 1, 2, 3, 4, 5, 7, 8, 10))
        return self.term(depth)

    def arithmetic(self, depth: int) -> Term:
        a = self.term(depth)
        b = self.operand(depth, a.dtype)
        op = self.pick("add", "sub", "mul")
        return m.binary(op, a, b) if self.chance(0.7) else m.binary(op, b, a)

    def divided(self, depth: int) -> Term:
        a = self.term(depth)
        op = self.pick("div", "floordiv", "floormod")
        if self.chance(0.5):
            return m.binary(op, a, literal(self.pick(1, 2, 3, 4, 7, 8, 10, 16)))
        b = self.term(depth)
        return m.binary(op, a, b if b.low is None else literal(3))  # folding may find a zero

    def extreme(self, depth: int) -> Term:
        a = self.term(depth)
        return m.binary(self.pick("min", "max"), a, self.operand(depth, a.dtype))

    def bits(self, depth: int) -> Term:
        a, b = self.integer(depth), self.integer(depth)
        op = self.pick("and", "or", "xor", "shl", "shr")
        if op in ("shl", "shr") and self.chance(0.5):
            b = literal(self.pick(0, 1, 2, 3, 5, 7))
        return m.binary(op, a, b)

    def integer(self, depth: int) -> Term:
        a = self.term(depth)
        return a if not a.dtype.is_float else m.cast(a, as_dtype(self.pick(*INTEGERS)))

    def conversion(self, depth: int) -> Term:
        a = self.term(depth)
        target = self.dtype()
        text = self.pick('{0}.astype("{1}")', 'T.cast({0}, "{1}")', "T.{1}({0})")
        return m.cast(a, target, text.format(a.text, target))

    def function(self, depth: int) -> Term:
        a = self.term(depth)
        if a.dtype.is_bool:
            return m.unary("not", a, "(~{0})")
        if a.dtype.is_integer:
            op, text = self.pick(
                ("not", "(~{0})"), ("neg", "(-{0})"), ("popcount", "T.popcount({0})"),
                ("clz", "T.clz({0})"),
            )  # fmt: skip
            return m.unary(op, a, text)
        names = [*MATH, "floor", "ceil", "trunc", "round"]
        op = self.pick("neg", "abs", *names)
        return m.unary(op, a, {"neg": "(-{0})"}.get(op, f"T.{op}({{0}})"))

    def condition(self, depth: int) -> Term:
        kind = self.rng.random()
        if depth > 0 and kind < 0.15:
            a, b = self.condition(depth - 1), self.condition(depth - 1)
            return m.binary(self.pick("and", "or", "xor"), a, b)
        if kind < 0.2:
            return m.unary("not", self.condition(depth - 1), "(~{0})")
        a = self.term(depth)
        if a.dtype.is_float and kind < 0.3 and not self.profile.exact:
            return m.predicate(self.pick("isnan", "isinf", "isfinite"), a)
        op = self.rng.choice(m.COMPARISONS)
        if a.dtype.is_integer and kind < 0.4:
            numbers = [0, 100, 200, 300, 70000, -1, -40000]
            number = self.rng.choice(numbers[:5] if a.dtype.name == "uint64" else numbers)
            return m.compare_with_number(op, a, number)
        return m.binary(op, a, self.operand(depth, a.dtype))

    def choice(self, depth: int) -> Term:
        condition, a = self.condition(depth), self.term(depth)
        b = self.operand(depth, a.dtype)
        text = self.pick("T.if_then_else({0}, {1}, {2})", "T.Select({0}, {1}, {2})",
                         "({1} if {0} else {2})")  # fmt: skip
        if self.chance(0.5):
            a, b = b, a
        if a.weak and b.weak:
            a = self.term(depth)
        return m.select(condition, a, b, text)

    # --- indexes ---------------------------------------------------------------------------------

    def small(self) -> Term:
        """An integer that index arithmetic cannot overflow."""
        bounded = [t for t in self.scope if t.low is not None and t.high is not None]
        if bounded and self.chance(0.75):
            return self.rng.choice(bounded)
        data = [x for x in self.memories if x.name == "P" and self.is_readable(x)]
        if data and self.chance(0.6):
            term = self.load(data[0])
            return dataclasses.replace(m.cast(term, int32), low=-200, high=200)
        return literal(self.rng.randrange(0, 9))

    def affine(self) -> Term:
        term = self.small()
        for _ in range(self.rng.randrange(0, 3)):
            other = self.small() if self.chance(0.4) else literal(self.rng.randrange(0, 20))
            op = self.pick("add", "sub", "add", "mul")
            if op == "sub" and other.text == term.text:  # folds
                op = "add"
            if op == "mul":
                other = literal(self.pick(2, 3, 4, 8))
            term = m.binary(op, term, other)
        if self.chance(0.2):
            term = m.binary(self.pick("floordiv", "floormod"), term, literal(self.pick(2, 3, 8)))
        return term

    def inside(self, extent: int) -> Term:
        """An index in range(extent)."""
        fits = [
            t for t in self.scope
            if t.low is not None and t.high is not None and t.low >= 0 and t.high < extent
        ]  # fmt: skip
        kind = self.rng.random()
        if extent == 1:
            return literal(0)
        if fits and kind < 0.45:
            return self.rng.choice(fits)
        if fits and kind < 0.6:
            return m.binary("sub", literal(extent - 1), self.rng.choice(fits))
        if fits and kind < 0.7:
            shifted = m.binary("add", self.rng.choice(fits), literal(self.rng.randrange(1, 4)))
            return m.binary("min", shifted, literal(extent - 1))
        term = self.affine()
        if term.weak or isinstance(_constant(term), int):
            return literal(self.rng.randrange(extent))
        return m.binary("floormod", term, literal(extent))

    def anywhere(self, extent: int) -> Term:
        """An index of a tensor, in range or not."""
        if self.chance(0.5):
            term = self.inside(extent)
            if _constant(term) is not None:
                return term
            step = literal(self.rng.randrange(1, 5))
            return m.binary(self.pick("add", "sub"), term, step) if self.chance(0.3) else term
        term = self.affine()
        if _constant(term) is not None:
            return literal(self.rng.randrange(extent))
        return term

    def load(self, memory: Memory) -> Term:
        own = self.own.get(memory.name)
        if own is not None:
            return m.load(memory.name, memory.dtype, own)
        if memory.scope == "input":
            index = self.tensor_index(memory)
            return m.load(memory.name, memory.dtype, index)
        guard = self.guarded(memory)
        if guard is not None:
            return guard
        index = memory.at([self.inside(n) for n in memory.extents])
        return m.load(memory.name, memory.dtype, index)

    def tensor_index(self, memory: Memory) -> list[Term]:
        bases = [t for t in self.scope if t.text.startswith("base")]
        index = []
        for d, n in enumerate(memory.extents):
            if bases and self.chance(0.5):
                at = self.inside(16) if not self.scope else self.affine()
                index.append(m.binary("add", bases[d % len(bases)], at))
            else:
                index.append(self.anywhere(n))
        return index

    def guarded(self, memory: Memory) -> Term | None:
        """`T.if_then_else(i >= 2, s[i - 2], x)`: read only where it may be."""
        if not memory.is_tile or self.chance(0.85):
            return None
        fits = [
            t for t in self.scope
            if t.low == 0 and t.high is not None and 2 < t.high < memory.extents[0]
        ]  # fmt: skip
        if not fits:
            return None
        i, step = self.rng.choice(fits), literal(self.rng.randrange(1, 3))
        rest = [self.inside(n) for n in memory.extents[1:]]
        inner = m.load(memory.name, memory.dtype, [m.binary("sub", i, step), *rest])
        text = "T.if_then_else({0}, {1}, {2})"
        return m.select(m.binary("ge", i, step), inner, literal(1), text)

    # --- statements of one iteration -------------------------------------------------------------

    def body(self, targets: Sequence[Memory], depth: int) -> list[Statement]:
        """Statements for one iteration or thread; variables end with the body."""
        scope = list(self.scope)
        result = []
        for _ in range(self.rng.randrange(1, 4)):
            result += self.small_statement(targets, depth)
        if not any("[" in line.split("=")[0] for s in result for line in s.lines):
            result.append(self.write(self.rng.choice(targets)))
        self.scope = scope
        return result

    def small_statement(self, targets: Sequence[Memory], depth: int) -> list[Statement]:
        kind = self.rng.random()
        if depth > 0 and kind < 0.12:
            return [self.branch(targets, depth - 1)]
        if depth > 0 and kind < 0.22:
            return [self.serial_loop(targets, depth - 1)]
        if depth > 0 and kind < 0.28:
            return self.while_loop(targets, depth - 1)
        if kind < 0.42:
            return [self.let()]
        if kind < 0.55:
            return self.variable()
        return [self.write(self.rng.choice(targets))]

    def let(self) -> Statement:
        value = self.term(2)
        variable = self.fresh("v")
        statement = m.let(variable, value)
        low, high = (value.low, value.high) if value.dtype is int32 else (None, None)
        self.scope.append(m.name(variable, value.dtype, low, high))
        return statement

    def variable(self) -> list[Statement]:
        """A new T.alloc_var, and some assignments to it."""
        variable, dtype = self.fresh("x"), self.dtype()
        if dtype.is_bool:
            dtype = int32
        result = [m.declare(variable, dtype, self.term(1))]
        self.scope.append(m.name(variable, dtype))
        if self.chance(0.6):
            result.append(self.assignment(variable, dtype))
        return result

    def assignment(self, variable: str, dtype: DType) -> Statement:
        kind = self.pick("{0} = {1}", "{0}.set({1})", "{0}[0] = {1}", "+=")
        if kind == "+=":
            return m.assign(variable, dtype, self.term(1), "{0} += {1}", "add")
        return m.assign(variable, dtype, self.term(2), kind)

    def write(self, target: Memory) -> Statement:
        value = self.clamped(self.term(3), target.limit)
        index = self.own[target.name]
        if self.chance(0.15) and target.limit is None and not target.dtype.is_bool:
            return m.store(target.name, target.dtype, index, value, self.pick("add", "sub", "mul"))
        return m.store(target.name, target.dtype, index, value)

    def clamped(self, value: Term, limit: int | None) -> Term:
        if limit is None:
            return value
        if value.dtype.is_bool:
            return m.cast(value, int32)
        low = 0 if not value.dtype.is_signed else -limit
        value = m.binary("min", value, literal(limit))
        return m.binary("max", value, literal(low))

    def branch(self, targets: Sequence[Memory], depth: int) -> Statement:
        condition = self.condition(2)
        then = self.body(targets, depth)
        orelse = self.body(targets, depth) if self.chance(0.5) else []
        return m.branch(condition, then, orelse, native=self.chance(0.3))

    def serial_loop(self, targets: Sequence[Memory], depth: int) -> Statement:
        k = self.fresh("k")
        head, start, stop, step = self.range(k)
        before = list(self.scope)
        self.scope.append(m.name(k, int32, *_ends(start, stop)))
        body = self.body(targets, depth)
        self.scope = before
        return m.loop(head, k, start, stop, step, body)

    def range(self, k: str) -> tuple[str, Term, Term, int]:
        """A loop's head, bounds and step; few rounds."""
        if self.chance(0.25):
            n = self.rng.randrange(1, 5)
            return f"for {k} in T.unroll({n}):", literal(0), literal(n), 1
        stop = literal(self.rng.randrange(0, 5))
        if self.chance(0.4):
            source = self.affine()
            if not source.weak and _constant(source) is None:
                stop = m.binary("floormod", source, literal(self.rng.randrange(2, 5)))
        if self.chance(0.6):
            name = self.pick("T.serial", "range", "T.Serial")
            return f"for {k} in {name}({stop.text}):", literal(0), stop, 1
        start = literal(self.rng.randrange(0, 3))
        step = self.pick(1, 2, 3, -1, -2)
        if step < 0:
            start, stop = stop, start
        head = f"for {k} in T.serial({start.text}, {stop.text}, {step}):"
        return head, start, stop, step

    def while_loop(self, targets: Sequence[Memory], depth: int) -> list[Statement]:
        counter = self.fresh("n")
        count = m.binary("floormod", m.cast(self.integer(1), int32), literal(4))
        start = m.declare(counter, int32, count)
        left = m.name(counter, int32, 0, 4)
        outer = list(self.scope)
        self.scope.append(left)
        body = self.body(targets, depth)
        self.scope = [*outer, left]
        body.append(m.assign(counter, int32, literal(1), "{0} -= {1}", "sub"))
        condition = m.binary("gt", left, literal(0))
        return [start, m.while_loop(condition, body, native=self.chance(0.3))]

    # --- tile statements -------------------------------------------------------------------------

    def parallel(self) -> Statement:
        """Elementwise work on one or two buffers."""
        writable = [x for x in self.memories if x.scope != "input"]
        first = self.rng.choice(writable)
        box, variables, maps = self.iterations(first)
        outer, own = list(self.scope), dict(self.own)
        terms = [m.name(v, int32, 0, n - 1) for v, n in zip(variables, box, strict=True)]
        self.scope += terms
        targets = [first]
        self.possess(first, [f(terms) for f in maps])
        for other in writable:
            fits = len(other.extents) == len(box) and all(
                n <= e for n, e in zip(box, other.extents, strict=True)
            )
            if other.name not in self.own and fits and self.chance(0.25) and len(targets) < 2:
                targets.append(other)
                self.possess(other, terms)
        size = math.prod(box)  # the simulator takes its time for deep loops over many elements
        body = self.body(targets, depth=2 if size <= 512 else 1 if size <= 1024 else 0)
        self.scope, self.own = outer, own
        return m.parallel(variables, box, body)

    def possess(self, target: Memory, index: Sequence[Term]) -> None:
        """An iteration reads and writes only this element of `target`."""
        for name in (target.name, self.twins.get(target.name, target.name)):
            self.own[name] = target.at(index)

    def iterations(
        self, target: Memory
    ) -> tuple[tuple[int, ...], list[str], list[Callable[[list[Term]], Term]]]:
        """A box of iterations, its variables, and an index into `target` that no two share."""
        rank = len(target.extents)
        order = list(range(rank))
        if self.chance(0.2):
            self.rng.shuffle(order)
        box = [0] * rank
        maps: list[Any] = [None] * rank
        for place, d in enumerate(order):
            box[place], maps[d] = self.dimension(target.extents[d], place)
        variables = [self.fresh("ijkl"[d]) for d in range(rank)]
        return tuple(box), variables, maps

    def dimension(self, extent: int, place: int) -> tuple[int, Callable[[list[Term]], Term]]:
        kind = self.rng.random()
        if kind < 0.6 or extent < 4:
            return extent, lambda v: v[place]
        if kind < 0.75:
            return extent, lambda v: m.binary("sub", literal(extent - 1), v[place])
        if kind < 0.9:
            start = self.rng.randrange(1, extent)
            size = self.rng.randrange(1, extent - start + 1)
            return size, lambda v: m.binary("add", v[place], literal(start))
        return extent // 2, lambda v: m.binary("mul", v[place], literal(2))

    def whole(self, memory: Memory) -> Box:
        zero = [literal(0) for _ in memory.extents]
        return Box(memory.name, memory.dtype, memory.name, zero, memory.extents)

    def copy(self) -> Statement:
        targets = [x for x in self.memories if x.scope != "input"]
        dst = self.rng.choice(targets)
        sources = [
            x for x in self.memories
            if dst.name not in (x.name, self.twins.get(x.name)) and self.is_copyable(x, dst)
        ]  # fmt: skip
        if not sources:
            return self.fill()
        src = self.rng.choice(sources)
        if self.profile.exact and dst.limit is not None and (src.limit or 999) > dst.limit:
            return self.fill()
        return m.copy(*self.sides(src, dst), self.copy_options())

    def copy_options(self) -> str:
        return self.pick("", "", "", "", ', prefer_instruction="sync"',
                         ', prefer_instruction="cp_async"', ", disable_tma=True")  # fmt: skip

    def is_copyable(self, src: Memory, dst: Memory) -> bool:
        if not self.is_readable(src):
            return False
        return len(src.extents) == len(dst.extents) or 1 in (len(src.extents), len(dst.extents))

    def sides(self, src: Memory, dst: Memory) -> tuple[Box, Box]:
        """Two boxes of one shape."""
        rank = min(len(src.extents), len(dst.extents))
        limits = [
            [n if x.scope != "input" else 64 for n in x.extents[len(x.extents) - rank :]]
            for x in (src, dst)
        ]
        shape = [min(a, b) for a, b in zip(*limits, strict=True)]
        if self.chance(0.4):
            shape = [self.rng.randrange(1, n + 1) if self.chance(0.4) else n for n in shape]
        if math.prod(shape) > MAX_TILE:
            shape[0] = max(1, MAX_TILE // math.prod(shape[1:]))
        sides = [self.box(x, shape) for x in (src, dst)]
        if sides[0].text.endswith("!") and sides[1].text.endswith("!"):
            sides[1] = self.box(dst, shape, only_slice=True)
        return (
            dataclasses.replace(sides[0], text=sides[0].text.rstrip("!")),
            dataclasses.replace(sides[1], text=sides[1].text.rstrip("!")),
        )

    def box(self, memory: Memory, shape: Sequence[int], only_slice: bool = False) -> Box:
        """A box of `shape` in the last dimensions; its text ends with ! when it is a start point,
        whose extents the other side must say."""
        lead = len(memory.extents) - len(shape)
        if not lead and memory.is_tile and tuple(shape) == memory.extents and self.chance(0.7):
            return self.whole(memory)
        extents = [0] * lead + list(shape)
        starts = [self.start(memory, d, n or 1) for d, n in enumerate(extents)]
        if not only_slice and self.chance(0.6):
            starts = memory.at(starts)
            text = f"{memory.name}[{', '.join(t.text for t in starts)}]!"
            return Box(memory.name, memory.dtype, text, starts, extents)
        starts = memory.at([t if _is_stable(t) else literal(0) for t in starts])
        parts = [
            t.text if not n else f"{t.text}:{t.text} + {n}"
            for t, n in zip(starts, extents, strict=True)
        ]
        text = f"{memory.name}[{', '.join(parts)}]"
        return Box(memory.name, memory.dtype, text, starts, extents)

    def start(self, memory: Memory, d: int, size: int) -> Term:
        extent = memory.extents[d]
        if memory.scope == "input":
            bases = [t for t in self.scope if t.text.startswith(("base", "k"))]
            if bases and self.chance(0.7):
                term = self.rng.choice(bases)
                if self.chance(0.5):
                    term = m.binary("mul", term, literal(self.pick(4, 8, 16, size)))
                return term
            term = self.anywhere(extent)
            return literal(0) if _constant(term) is not None or self.chance(0.5) else term
        if size == extent:
            return literal(0)
        if self.chance(0.5):
            step = math.gcd(size, extent)
            return literal(self.rng.randrange(0, (extent - size) // step + 1) * step)
        return self.inside(extent - size + 1)

    def fill(self) -> Statement:
        dst = self.rng.choice([x for x in self.memories if x.scope != "input"])
        if self.chance(0.7) and dst.is_tile:
            box = self.whole(dst)
        else:
            shape = [self.rng.randrange(1, n + 1) for n in dst.extents]
            box = self.box(dst, shape, only_slice=True)
        if self.chance(0.3):
            return m.fill(box, None)
        if self.chance(0.4) or dst.limit is not None:
            return m.fill(box, literal(self.pick(0, 1)))
        return m.fill(box, self.term(2))

    def uniform(self) -> list[Statement]:
        """A scalar of the whole block, from memory or computed."""
        variable, dtype = self.fresh("u"), as_dtype(self.pick("int32", "float32", "int64"))
        result = [m.declare(variable, dtype, self.term(2))]
        self.scope.append(m.name(variable, dtype))
        if self.chance(0.5):
            result.append(self.assignment(variable, dtype))
        return result

    def scalar_store(self) -> Statement:
        """One element stored by one thread for all."""
        dst = self.rng.choice([x for x in self.memories if x.scope in ("shared", "output")])
        index = dst.at([self.inside(n) for n in dst.extents])
        return m.store(dst.name, dst.dtype, index, self.clamped(self.term(2), dst.limit))

    def tile_statements(self, depth: int) -> list[Statement]:
        scope = list(self.scope)
        result: list[Statement] = []
        for _ in range(self.rng.randrange(1, self.profile.max_statements)):
            result += self.tile_statement(depth)
        self.scope = scope
        return result

    def tile_statement(self, depth: int) -> list[Statement]:
        kind = self.rng.random()
        if self.products and self.chance(0.2):
            return self.multiply()
        if self.statistics and self.chance(0.35):
            return [self.scan() if self.chance(0.3) else self.reduction()]
        if depth > 0 and kind < 0.14:
            return [self.tile_loop(depth - 1)]
        if depth > 0 and kind < 0.22:
            return [self.tile_branch(depth - 1)]
        if depth > 0 and kind < 0.25:
            return self.tile_while(depth - 1)
        if kind < 0.28:
            return [Statement(["T.sync_threads()"], lambda _: None)]
        if kind < 0.33:
            return self.uniform()
        if kind < 0.37:
            return [self.scalar_store()]
        if kind < 0.44:
            return [self.fill()]
        if kind < 0.62:
            return [self.copy()]
        return [self.parallel()]

    def tile_loop(self, depth: int) -> Statement:
        k = self.fresh("k")
        if self.loops < 2 and self.chance(0.6):
            self.loops += 1
            stages = self.pick("", ", num_stages=1", ", num_stages=2", ", num_stages=3",
                               ", num_stages=4", ", num_stages=0")  # fmt: skip
            start, stop = literal(0), self.rounds()
            if self.chance(0.2):
                start = literal(self.rng.randrange(1, 3))
            shown = stop.text if start.text == "0" else f"{start.text}, {stop.text}"
            head, step = f"for {k} in T.Pipelined({shown}{stages}):", 1
        else:
            head, start, stop, step = self.range(k)
        before = list(self.scope)
        self.scope.append(m.name(k, int32, *_ends(start, stop)))
        body = self.tile_statements(depth)
        self.scope = before
        return m.loop(head, k, start, stop, step, body)

    def rounds(self) -> Term:
        """How often a pipelined loop runs: a constant, or known at run time."""
        runtime = [t for t in self.scope if t.text == "count"]
        if runtime and self.chance(0.5):
            return runtime[0]
        return literal(self.rng.randrange(0, 7))

    def tile_branch(self, depth: int) -> Statement:
        condition = self.uniform_condition()
        then = self.tile_statements(depth)
        orelse = self.tile_statements(depth) if self.chance(0.5) else []
        return m.branch(condition, then, orelse, native=self.chance(0.3))

    def uniform_condition(self) -> Term:
        return self.condition(2)

    def tile_while(self, depth: int) -> list[Statement]:
        counter = self.fresh("n")
        start = m.declare(counter, int32, literal(self.rng.randrange(0, 4)))
        left = m.name(counter, int32, 0, 4)
        self.scope.append(left)
        body = self.tile_statements(depth)
        body.append(m.assign(counter, int32, literal(1), "{0} -= {1}", "sub"))
        return [start, m.while_loop(m.binary("gt", left, literal(0)), body, self.chance(0.3))]

    def multiply(self) -> list[Statement]:
        """A gemm, often with copies to its operands just before."""
        product = self.rng.choice(self.products)
        result = []
        for operand in (product.a, product.b):
            sources = [
                x for x in self.memories
                if x.scope == "input" and x.limit and x.limit <= operand.limit
                and len(x.extents) in (2, 3)
            ]  # fmt: skip
            if sources and self.chance(0.8):
                result.append(self.producer(self.rng.choice(sources), operand))
        return [*result, self.gemm(product)]

    def producer(self, source: Memory, operand: Memory) -> Statement:
        """A tile of a tensor, from a place that depends on the loops around."""
        extents = [0] * (len(source.extents) - 2) + list(operand.extents)
        starts = []
        for d, n in enumerate(extents):
            counters = [t for t in self.scope if re.match(r"k\d|bx|by", t.text)]
            kind = self.rng.random()
            if counters and kind < 0.6:
                step = n or 1
                step = self.pick(step, step, step, 8, 4, 1)
                starts.append(m.binary("mul", self.rng.choice(counters), literal(step)))
            elif kind < 0.75:
                starts.append(self.start(source, d, n or 1))
            else:
                starts.append(literal(0))
        text = f"{source.name}[{', '.join(t.text for t in starts)}]"
        box = Box(source.name, source.dtype, text, starts, extents)
        return m.copy(box, self.whole(operand), self.copy_options())

    def gemm(self, product: Product) -> Statement:
        options = self.pick("", "", ", policy=T.GemmWarpPolicy.FullRow",
                            ", policy=T.GemmWarpPolicy.FullCol")  # fmt: skip
        sides = [self.whole(x) for x in (product.a, product.b, product.acc)]
        return m.gemm(*sides, product.t_a, product.t_b, self.chance(0.2), options)

    def reduction(self) -> Statement:
        """A reduction that is exact: of floats only sums of small whole numbers."""
        statistic = self.rng.choice(self.statistics)
        source, out = statistic.source, statistic.out
        kinds = ["max", "min", "absmax"]
        if not source.dtype.is_float and source.dtype is out.dtype:
            kinds += ["bitand", "bitor", "bitxor"]
        has_float = source.dtype.is_float or out.dtype.is_float
        is_small = self.profile.exact and source.limit is not None and source.limit < 10
        is_exact = is_small or not has_float
        if is_exact and not out.dtype.is_bool:
            kinds += ["sum", "abssum"]
        kind = self.rng.choice(kinds)
        has_old = self.chance(0.4) and not (has_float and kind.endswith("sum"))
        keeps_nan = self.chance(0.3) and kind in ("max", "min", "absmax")
        sides = self.whole(source), self.whole(out)
        return m.reduce(*sides, kind, statistic.axis, not has_old, keeps_nan)

    def scan(self) -> Statement:
        """Running maxima of a tile in its place, or sums of integers."""
        statistic = self.rng.choice(self.statistics)
        source = statistic.source
        is_sum = not source.dtype.is_float and not source.dtype.is_bool and source.limit is None
        is_sum = is_sum and self.chance(0.5)
        keeps_nan = self.chance(0.3) and not is_sum
        axis = self.rng.randrange(len(source.extents))
        tile = self.whole(source)
        return m.scan(tile, "sum" if is_sum else "max", axis, self.chance(0.4), keeps_nan)

    def threads_section(self, variable: str, threads: int) -> Statement:
        """Statements that each thread executes for itself."""
        targets = [x for x in self.memories if x.name == "D"]
        outer, own = list(self.scope), dict(self.own)
        # fragments are read by threads that hold them, or not at all
        memories, self.memories = self.memories, [
            x for x in self.memories if x.scope != "fragment"
        ]  # fmt: skip
        thread = m.name(variable, int32, 0, threads - 1)
        self.scope = [*outer, thread]
        for target in targets:
            self.possess(target, [thread])
        body = self.body(targets, depth=2)
        self.scope, self.own, self.memories = outer, own, memories
        return m.per_thread(variable, threads, body)


def _constant(term: Term) -> int | None:
    """The number of a term made of literals alone."""
    return term.low if term.low is not None and term.low == term.high else None


def _ends(start: Term, stop: Term) -> tuple[int, int]:
    """Bounds of a loop's variable."""
    ends = [e or 0 for e in (start.low, start.high, stop.low, stop.high)]
    return min(ends), max(ends)


def _is_stable(term: Term) -> bool:
    """True when the text means the same expression each time: it reads no memory."""
    return not re.search(r"\[|\b[nxu]\d", term.text)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Array:
    """Values that matter: small and large ones, zeros of both signs, infinities and NaN."""
    if dtype.is_bool:
        return rng.integers(0, 2, shape).astype(np.bool_)
    if dtype.is_integer:
        low, high = int(dtype.min), int(dtype.max)
        wild = rng.integers(low, high, shape, dtype.numpy, endpoint=True)
        calm = rng.integers(max(low, -20), 20, shape).astype(dtype.numpy)
        return np.where(rng.random(shape) < 0.3, wild, calm)
    values = (rng.standard_normal(shape) * rng.choice([1.0, 30.0, 1e4], shape)).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 0.5, 2.5, 1e-40], np.float32)
    values = np.where(rng.random(shape) < 0.1, rng.choice(special, shape), values)
    with np.errstate(all="ignore"):
        return values.astype(dtype.numpy)
