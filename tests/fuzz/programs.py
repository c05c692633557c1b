"""Whole random programs: signature, tensors, tiles and body; and what they must compute.

Knows how a program is put together and what its tensors hold. Does not know how it is run.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import meaning as m
import ml_dtypes
import numpy as np
from meaning import Array, State, Statement, Term, literal
from writing import (
    EXTENTS,
    MAX_TILE,
    Memory,
    Product,
    Profile,
    Program,
    Statistic,
    Writer,
    random_array,
)

from tilejit.dtypes import DType, as_dtype, float32, int32

THREADS = (32, 64, 96, 128, 128, 48, 256)
WORDS = 64  # of a fragment, a thread
MAX_SHARED = 192 * 1024  # bytes of a pipeline's slots


class Assembly:
    """A program under construction."""

    def __init__(self, seed: int, profile: Profile, threads: tuple[int, ...] = THREADS) -> None:
        self.writer = Writer(seed, profile)
        self.threads = self.writer.pick(*threads)
        self.grid = self.writer.pick((1, 1), (2, 1), (3, 1), (2, 2), (1, 2))
        self.is_flat = self.grid[1] == 1 and self.writer.chance(0.6)
        self.arrays: dict[str, Array] = {}
        self.declared: set[str] = set()
        self.twins: dict[str, str] = {}
        self.symbols: list[str] = []
        self.parameters: list[str] = []
        self.tiles: list[Memory] = []
        self.body: list[Statement] = []
        self.scalars: dict[str, object] = {}
        self.names: dict[str, Array] = {}

    # --- parts -----------------------------------------------------------------------------------

    def block(self) -> None:
        """The block's index, and the runtime scalars."""
        w = self.writer
        w.scope.append(m.name("bx", int32, 0, self.grid[0] - 1))
        if not self.is_flat:
            w.scope.append(m.name("by", int32, 0, self.grid[1] - 1))
        if w.chance(0.4):
            self.scalar("alpha", float32, 2.0 if w.profile.exact else 1.25)
        if w.chance(0.6):
            self.scalar("count", int32, w.rng.randrange(0, 6), 0, 6)

    def scalar(self, name: str, dtype: DType, value: object, low=None, high=None) -> None:
        self.scalars[name] = value
        self.parameters.append(f"{name}: T.{dtype}")
        self.names[name] = np.array(value, dtype.numpy)
        self.writer.scope.append(m.name(name, dtype, low, high))

    def tensor(self, name: str, dtype: DType, shape: tuple[int, ...], values: Array) -> None:
        """A parameter; its extents are constants, symbols or read at the call."""
        w = self.writer
        self.arrays[name] = values
        kind = w.rng.random()
        if kind < 0.5:
            self.parameters.append(f"{name}: T.Tensor")
            return
        self.declared.add(name)
        extents = []
        for d, n in enumerate(shape):
            if kind < 0.75:
                symbol = f"{name}{d}"
                self.symbols.append(symbol)
                extents.append(symbol)
            else:
                extents.append(str(n))
        self.parameters.append(f'{name}: T.Tensor(({", ".join(extents)},), "{dtype}")')

    def input(self, name: str, dtype: DType, shape: tuple[int, ...], limit: int = 0) -> Memory:
        rng = self.writer.numbers
        if limit:
            low = 0 if not dtype.is_signed else -limit
            values = rng.integers(low, limit + 1, shape).astype(dtype.numpy)
        elif name == "P":  # indexes
            values = rng.integers(-30, 60, shape).astype(dtype.numpy)
        else:
            values = random_array(rng, shape, dtype)
        self.tensor(name, dtype, shape, values)
        memory = Memory(name, dtype, shape, "input", limit=limit or None)
        self.writer.memories.append(memory)
        return memory

    def output(self, name: str, dtype: DType, region: tuple[int, ...]) -> Memory:
        """A tensor of which each block has a region of its own; the last may stick out."""
        w = self.writer
        blocks = [*(1,) * len(region)]
        base: list[Term] = [literal(0)] * len(region)
        order = ("bx",) if self.is_flat else ("by", "bx")
        if len(region) == 1 and not self.is_flat:
            number = m.binary("add", m.binary("mul", m.name("by", int32, 0, 1),
                              literal(self.grid[0])), m.name("bx", int32, 0, 3))  # fmt: skip
            blocks[0] = self.grid[0] * self.grid[1]
            base[0] = self.base(number, region[0])
        else:
            for axis, d in zip(reversed(order), reversed(range(len(region))), strict=False):
                blocks[d] = self.grid[0 if axis == "bx" else 1]
                base[d] = self.base(m.name(axis, int32, 0, blocks[d] - 1), region[d])
        shape = tuple(
            max(1, n * k - (w.rng.randrange(0, n) if k > 1 and w.chance(0.4) else 0))
            for n, k in zip(region, blocks, strict=True)
        )
        before = np.frombuffer(b"\xff" * math.prod(shape) * dtype.bytes, np.uint8)
        values = np.ones(shape, bool) if dtype.is_bool else before.view(dtype.numpy).reshape(shape)
        self.tensor(name, dtype, shape, values.copy())
        memory = Memory(name, dtype, region, "output", tuple(base))
        self.writer.memories.append(memory)
        return memory

    def twin(self, name: str, other: Memory) -> None:
        """A tensor that is given the array of another one."""
        self.tensor(name, other.dtype, self.arrays[other.name].shape, self.arrays[other.name])
        self.declared |= {name, other.name}  # contiguous both
        self.writer.memories.append(replace(other, name=name))
        self.writer.twins |= {name: other.name, other.name: name}
        self.twins[name] = other.name

    def base(self, block: Term, size: int) -> Term:
        name = self.writer.fresh("base")
        value = m.binary("mul", block, literal(size))
        self.body.append(m.let(name, value))
        term = m.name(name, int32, value.low, value.high)
        self.writer.scope.append(term)
        return term

    def tile(self, scope: str, dtype: DType, extents: tuple[int, ...], limit: int = 0) -> Memory:
        w = self.writer
        name = w.fresh({"shared": "s", "fragment": "f"}[scope])
        shape = f"({', '.join(map(str, extents))},)" if len(extents) > 1 else f"{extents[0]}"
        text = f'{name} = T.alloc_{scope}({shape}, "{dtype}")'
        self.body.append(Statement([text], lambda _: None))
        memory = Memory(name, dtype, extents, scope, limit=limit or None)
        self.tiles.append(memory)
        w.memories.append(memory)
        return memory

    def shape(self, rank: int, scope: str, itemsize: int) -> tuple[int, ...]:
        w = self.writer
        limit = MAX_TILE
        if scope == "fragment":
            limit = min(limit, WORDS * 4 * self.threads // max(4, itemsize))
        while True:
            shape = tuple(w.pick(*EXTENTS) for _ in range(rank))
            if math.prod(shape) <= limit:
                return shape

    def initialise(self, tile: Memory) -> None:
        w = self.writer
        sources = [x for x in w.memories if x.scope == "input" and w.is_copyable(x, tile)
                   and len(x.extents) >= len(tile.extents)
                   and (tile.limit is None or (x.limit or 999) <= tile.limit)]  # fmt: skip
        if not sources or w.chance(0.4):
            self.body.append(m.fill(w.whole(tile), literal(w.pick(0, 1))))
            return
        source = w.rng.choice(sources)
        lead = [0] * (len(source.extents) - len(tile.extents))
        extents = [*lead, *tile.extents]
        starts = [literal(w.rng.randrange(0, n)) for n in source.extents]
        text = f"{source.name}[{', '.join(t.text for t in starts)}]"
        box = m.Box(source.name, source.dtype, text, starts, extents)
        self.body.append(m.copy(box, w.whole(tile)))

    # --- the whole -------------------------------------------------------------------------------

    def finish(self) -> Program:
        tensors = list(self.parameters)
        head = f"{self.grid[0]}" if self.is_flat else f"{self.grid[0]}, {self.grid[1]}"
        blocks = "bx" if self.is_flat else "(bx, by)"
        lines = ["import tilejit.language as T", "from tilejit import tilejit", ""]
        lines += [f'{s} = T.dynamic("{s}")' for s in self.symbols]
        lines += ["", "@tilejit", f"def kernel({', '.join(tensors)}):"]
        lines += [f"    with T.Kernel({head}, threads={self.threads}) as {blocks}:"]
        lines += ["    " + line for line in m.indent(self.body)]
        outputs = tuple(x.name for x in self.writer.memories if x.scope == "output")
        after = self.run()
        return Program(
            source="\n".join(lines) + "\n",
            arrays=self.arrays,
            outputs=outputs,
            declared=frozenset(self.declared),
            scalars=self.scalars,
            expected={name: after[name] for name in outputs},
            twins=self.twins,
            has_sums=self.writer.profile.exact,
        )

    def run(self) -> dict[str, Array]:
        """The tensors after all blocks have run."""
        memory = {name: array.copy() for name, array in self.arrays.items()}
        memory |= {name: memory[other] for name, other in self.twins.items()}
        for by in range(self.grid[1]):
            for bx in range(self.grid[0]):
                for tile in self.tiles:
                    memory[tile.name] = np.zeros(tile.extents, tile.dtype.numpy)
                names = {**self.names, "bx": np.array(bx, np.int32), "by": np.array(by, np.int32)}
                state = State(memory, names)
                with np.errstate(all="ignore"):
                    state.run(self.body, state.mask)
        return memory


def elementwise(seed: int) -> Program:
    """Loops, copies, branches and variables over tensors and tiles of any dtype."""
    a = Assembly(seed, Profile())
    w = a.writer
    a.block()
    rank = w.pick(1, 2, 2, 2, 3)
    for n in range(w.rng.randrange(1, 4)):
        a.input(f"A{n}", w.dtype(), a.shape(w.pick(1, 2, rank), "input", 4))
    a.input("P", int32, (w.rng.randrange(20, 200),))
    first = a.output("O", w.dtype(), a.shape(rank, "output", 4))
    if w.chance(0.15):
        a.twin("Z", first)
    if w.chance(0.3):
        a.output("Q", w.dtype(), a.shape(w.pick(1, 2), "output", 4))
    with_threads = w.chance(0.3)
    if with_threads:
        a.output("D", w.dtype(), (a.threads,))
    tiles = []
    for _ in range(w.rng.randrange(0, 4)):
        scope, dtype = w.pick("shared", "fragment"), w.dtype()
        extents = a.shape(w.pick(1, 2, rank), scope, dtype.bytes)
        tiles.append(a.tile(scope, dtype, extents))
    for tile in tiles:
        a.initialise(tile)
    a.body += w.tile_statements(depth=2)
    if with_threads:
        tx = "tx"
        a.body.append(Statement([f"{tx} = T.get_thread_binding()"], lambda _: None))
        a.body.append(w.threads_section(tx, a.threads))
        if w.chance(0.4):
            a.body += w.tile_statements(depth=1)
    return a.finish()


def reductions(seed: int) -> Program:
    """The same with reductions of tiles; half of them over products of tiles."""
    rng = random.Random(seed)
    profile = Profile(exact=rng.random() < 0.5, max_statements=5)
    a = Assembly(seed, profile)
    w = a.writer
    a.block()
    rank = w.pick(1, 2, 2, 3)
    sources: list[Memory] = []
    if profile.exact:
        dtypes = w.pick(*PRODUCTS)
        for n, d in enumerate(dtypes[:2]):
            a.input(f"A{n}", as_dtype(d), (w.pick(16, 50, 64), w.pick(32, 72, 96)), dtypes[3])
        product, acc = multiplied(a, dtypes, for_groups=False)
        w.products = [product]
        sources += [acc, acc, product.a]
    else:
        a.input("A0", w.dtype(), a.shape(rank, "input", 4))
    a.input("P", int32, (w.rng.randrange(20, 80),))
    for _ in range(w.pick(1, 2)):
        dtype = w.dtype()
        scope = w.pick("shared", "fragment", "fragment")
        sources.append(a.tile(scope, dtype, a.shape(rank, scope, dtype.bytes)))
    for source in sources:
        w.statistics.append(statistic(a, source))
    for n, found in enumerate(w.rng.sample(w.statistics, min(2, len(w.statistics)))):
        a.output(f"O{n}", found.out.dtype, found.out.extents)
    a.output("Q", float32, sources[0].extents)
    for tile in a.tiles:
        a.initialise(tile)
    a.body += w.tile_statements(depth=2)
    for n in range(len(w.statistics)):
        a.body.append(w.reduction())
        if n < 2:
            a.body += [w.copy(), w.parallel()]
    outputs = [x for x in w.memories if x.scope == "output"]
    for output in outputs:
        fits = [x for x in a.tiles if x.extents == output.extents]
        text = f"{output.name}[{', '.join(t.text for t in output.base)}]"
        box = m.Box(output.name, output.dtype, text, output.base, output.extents)
        a.body.append(m.copy(w.whole(w.rng.choice(fits)), box))
    return a.finish()


def statistic(a: Assembly, source: Memory) -> Statistic:
    """A tile for what a tile is reduced to."""
    w = a.writer
    axis = w.rng.randrange(len(source.extents))
    gone = (*source.extents[:axis], *source.extents[axis + 1 :])
    kept = (*source.extents[:axis], 1, *source.extents[axis + 1 :])
    wide = float32 if source.dtype.is_float else int32
    dtype = wide if w.chance(0.3) and source.dtype.bits <= 16 else source.dtype
    shape = kept if w.chance(0.2) or not gone else gone
    out = a.tile(w.pick("shared", "fragment", "fragment"), dtype, shape)
    return Statistic(source, out, axis)


# dtypes of A, B and C; magnitude of the operands that keeps sums exact
PRODUCTS = (
    ("float16", "float16", "float32", 3), ("bfloat16", "bfloat16", "float32", 3),
    ("float16", "float16", "float16", 1), ("tfloat32", "tfloat32", "float32", 3),
    ("float32", "float32", "float32", 3), ("float64", "float64", "float64", 3),
    ("int8", "int8", "int32", 9), ("uint8", "int8", "int32", 9), ("uint8", "uint8", "int32", 9),
    ("float8_e4m3fn", "float8_e4m3fn", "float32", 3),
    ("float8_e5m2", "float8_e4m3fn", "float32", 3),
    ("float8_e4m3fn", "float8_e5m2", "float16", 1),
)  # fmt: skip
PLAIN = ("float32", "float64")  # no warpgroup multiplies them


def multiplied(
    a: Assembly, dtypes: tuple[str, str, str, int], for_groups: bool
) -> tuple[Product, Memory]:
    """Tiles of one product. for_groups: that warpgroups can multiply, most of them."""
    w = a.writer
    left, right, total = (as_dtype(d) for d in dtypes[:3])
    if for_groups:
        M = w.pick(64, 64, 128)
        N, K = w.pick(8, 16, 16, 24, 32, 64), w.pick(32, 32, 64)
    elif w.chance(0.8):
        M, N, K = w.pick(16, 16, 32, 48, 64), w.pick(8, 16, 16, 24, 32, 64), w.pick(16, 32, 32, 64)
    else:
        M, N, K = (w.pick(1, 4, 8, 10, 16, 20, 33) for _ in range(3))
    while 32 * a.threads < M * N:
        M, N = max(M // 2, 1), max(N // 2, 1)
    t_a, t_b = w.chance(0.3), w.chance(0.4)
    if for_groups and left.bits != 16 and w.chance(0.8):
        t_a, t_b = False, True
    fragments = 0.1 if for_groups else 0.2
    scope_a = "fragment" if w.chance(fragments) and 16 * a.threads >= M * K else "shared"
    scope_b = "fragment" if w.chance(fragments) and 16 * a.threads >= K * N else "shared"
    tiles = (
        a.tile(scope_a, left, (K, M) if t_a else (M, K), dtypes[3]),
        a.tile(scope_b, right, (N, K) if t_b else (K, N), dtypes[3]),
        a.tile("fragment", total, (M, N), 64),
    )
    return Product(*tiles, t_a, t_b), tiles[2]


def tiles(seed: int, for_groups: bool = False) -> Program:
    """Copies, fills, elementwise loops, pipelines and matrix multiplies over tiles.

    for_groups: mostly such as warpgroups can multiply and bulk copies bring.
    """
    profile = Profile(exact=True, max_statements=5)
    a = Assembly(seed, profile, (128, 128, 256) if for_groups else THREADS)
    w = a.writer
    a.block()
    dtypes = w.pick(*(p for p in PRODUCTS if not for_groups or p[0] not in PLAIN))
    for n, d in enumerate(dtypes[:2]):
        source = as_dtype(d if w.chance(0.75) else w.pick("int8", "float32", "float16"))
        if not source.is_signed or as_dtype(d).is_signed is False:
            source = as_dtype(d)
        rank = w.pick(2, 2, 2, 3)
        extents = (16, 32, 50, 64, 72, 96, 128, 130)
        if for_groups and w.chance(0.8):
            extents = (16, 32, 48, 64, 80, 96, 128, 160)
        shape = tuple(w.pick(*extents) for _ in range(2))
        a.input(f"A{n}", source, (*(3,) * (rank - 2), *shape), dtypes[3])
    a.input("P", int32, (w.rng.randrange(20, 80),))
    products, accumulators = [], []
    for _ in range(w.pick(1, 1, 1, 2)):
        product, acc = multiplied(a, dtypes, for_groups)
        products.append(product)
        accumulators.append(acc)
    w.products = products
    if w.chance(0.6):
        a.tile(w.pick("shared", "fragment"), w.dtype(), a.shape(2, "fragment", 8), 9)
    outputs = [
        a.output(f"O{n}", w.pick(acc.dtype, float32, as_dtype("float16")), acc.extents)
        for n, acc in enumerate(accumulators)
    ]
    for tile in a.tiles:
        a.initialise(tile)
    a.body.append(w.tile_loop(1))
    a.body += w.tile_statements(depth=2)
    for acc, output in zip(accumulators, outputs, strict=True):
        text = f"{output.name}[{', '.join(t.text for t in output.base)}]"
        box = m.Box(output.name, output.dtype, text, output.base, acc.extents)
        a.body.append(m.copy(w.whole(acc), box))
    return a.finish()


MATMUL = """\
import tilejit.language as T
from tilejit import tilejit

M, N, K = T.dynamic("M"), T.dynamic("N"), T.dynamic("K")

@tilejit
def kernel(A: {A}, B: {B}, C: {C}):
    M, N = C.shape
    K = A.shape[{k_axis}]
    with T.Kernel(T.ceildiv(N, {BN}), T.ceildiv(M, {BM}), threads={threads}) as (bx, by):
        a = T.alloc_{a_scope}({a_shape}, "{a}")
        b = T.alloc_{b_scope}({b_shape}, "{b}")
        acc = T.alloc_fragment(({BM}, {BN}), "{acc}")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, {BK}){stages}):
            T.copy(A[{a_at}], a)
            T.copy(B[{b_at}], b)
            T.gemm(a, b, acc, {t_a}, {t_b}, T.GemmWarpPolicy.{policy})
        T.copy(acc, C[by * {BM}, bx * {BN}])
"""


def matmul(seed: int, for_groups: bool = False) -> Program:
    """A tile matmul of real numbers: tile shape, dtypes, transposes, warps, policy and stages are
    drawn; M, N and K are constants or known at the call.

    for_groups: mostly such as warpgroups can multiply and bulk copies bring.
    """
    w = Writer(seed, Profile(exact=True))
    a, b, acc, _ = w.pick(*(p for p in PRODUCTS if not for_groups or p[0] not in PLAIN))
    BM, BN, BK = w.pick(16, 32, 48, 64), w.pick(8, 16, 24, 32, 64), w.pick(16, 32, 64)
    if for_groups:
        BM, BN, BK = w.pick(64, 64, 128, 192), w.pick(8, 24, 32, 64, 80, 128), w.pick(32, 64, 96)
    elif w.chance(0.2):
        BM, BN, BK = (w.pick(1, 3, 4, 8, 10, 20) for _ in range(3))
    stages = w.pick(None, *range(5))
    if (BM + BN) * BK * as_dtype(a).bytes * (stages or 1) > MAX_SHARED:
        BK = 32
    M, N, K = (w.rng.randrange(1, 2 * n + 2) for n in (BM, BN, BK))
    if w.chance(0.5):
        M, N, K = BM * w.pick(1, 2), BN * w.pick(1, 2), BK * w.pick(1, 2, 5)
    if for_groups and w.chance(0.7):
        M, N, K = (-(-n // 16) * 16 for n in (M, N, K))
    t_a, t_b = w.chance(0.3), w.chance(0.4)
    if for_groups and as_dtype(a).bits != 16 and w.chance(0.8):
        t_a, t_b = False, True
    is_dynamic = w.chance(0.4)
    declared = {
        name: f'T.Tensor(({shape}), "{dtype}")' if is_dynamic else "T.Tensor"
        for name, shape, dtype in (
            ("A", "K, M" if t_a else "M, K", a),
            ("B", "N, K" if t_b else "K, N", b),
            ("C", "M, N", acc),
        )
    }
    threads = w.pick(128, 128, 256, 384) if for_groups else w.pick(32, 64, 96, 128, 256)
    fragments = 0.1 if for_groups else 0.2
    source = MATMUL.format(
        **declared, BM=BM, BN=BN, BK=BK, threads=threads, t_a=t_a, t_b=t_b, a=a, b=b, acc=acc,
        k_axis=0 if t_a else 1,
        a_shape=(BK, BM) if t_a else (BM, BK), b_shape=(BN, BK) if t_b else (BK, BN),
        a_at=f"k * {BK}, by * {BM}" if t_a else f"by * {BM}, k * {BK}",
        b_at=f"bx * {BN}, k * {BK}" if t_b else f"k * {BK}, bx * {BN}",
        stages="" if stages is None else f", num_stages={stages}",
        policy=w.pick("Square", "FullRow", "FullCol"),
        a_scope="fragment" if w.chance(fragments) and 16 * threads >= BM * BK else "shared",
        b_scope="fragment" if w.chance(fragments) and 16 * threads >= BK * BN else "shared",
    )  # fmt: skip
    left, right = operand(w, (M, K), as_dtype(a)), operand(w, (K, N), as_dtype(b))
    exact = left.astype(np.float64) @ right.astype(np.float64)
    size = np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)
    unit = _UNITS.get(acc, 0.0) + (2.0**-10 if a == "tfloat32" else 0)
    total = as_dtype(acc)
    smallest = float(ml_dtypes.finfo(total.numpy).smallest_subnormal) if total.is_float else 0.0
    before = np.frombuffer(b"\xff" * M * N * total.bytes, total.numpy).reshape(M, N)
    return Program(
        source=source,
        arrays={
            "A": np.ascontiguousarray(left.T) if t_a else left,
            "B": np.ascontiguousarray(right.T) if t_b else right,
            "C": before.copy(),
        },
        outputs=("C",),
        declared=frozenset("ABC") if is_dynamic else frozenset(),
        scalars={},
        expected={"C": exact},
        bounds={"C": (K + 1) * (unit * size + smallest)},
    )


# relative error of one addition, generously
_UNITS = {"float16": 2.0**-10, "float32": 2.0**-22, "float64": 2.0**-51}


def operand(w: Writer, shape: tuple[int, int], dtype: DType) -> Array:
    if dtype.is_integer:
        low, high = int(dtype.min), int(dtype.max)
        return w.numbers.integers(low, high, shape, dtype.numpy, endpoint=True)
    return w.numbers.standard_normal(shape).astype(dtype.numpy)
