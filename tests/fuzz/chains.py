"""Random loops of two and more multiplies with work between them: what one makes another needs, in
the same round or the next; uneven ends, masks, parts, reductions, schedules by hand, two such loops
in a kernel.

Knows what a body's statements compute, of small whole numbers, exactly, and which of them depend on
each other. Does not know how a loop is run.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from writing import Program

from tilejit.dtypes import as_dtype

WIDTH = 64  # of all operands along what rounds do not divide
State = dict[str, np.ndarray]
Run = Callable[[State, int, int], None]  # of the state, the block's number and the round's

STOPS = {
    "T.ceildiv(N, {BN})": lambda plan, by: plan.rounds,
    "T.min(count, T.ceildiv(N, {BN}))": lambda plan, by: min(plan.count, plan.rounds),
    "T.min(T.ceildiv(N, {BN}), by + 1)": lambda plan, by: min(plan.rounds, by + 1),
    "T.min(T.ceildiv(N, {BN}), lengths[by])": lambda plan, by: min(plan.rounds, LENGTHS[by]),
}  # fmt: skip
LENGTHS = (3, 0, 1, 2, 4)


@dataclass(frozen=True)
class Statement:
    lines: tuple[str, ...]
    reads: frozenset[str]
    writes: frozenset[str]
    run: Run
    is_copy: bool = False
    is_value: bool = False


@dataclass(frozen=True)
class Loop:
    body: tuple[Statement, ...]
    start: int
    stop: str
    stages: int | None
    schedule: str


@dataclass(frozen=True)
class Plan:
    blocks: int
    BM: int
    BN: int
    rounds: int
    N: int
    M: int
    threads: int
    count: int
    made: frozenset[str]  # outer tiles that threads make
    wide: frozenset[str]  # tensors whose rows the accelerator cannot bring
    repeats: int
    loops: tuple[Loop, ...] = ()
    first: dict[str, int] = field(default_factory=dict)


def drawn(seed: int) -> Plan:
    w = random.Random(f"chain {seed}")
    threads = w.choice([128, 128, 256, 256, 384])
    BM = threads // 2 if w.random() < 0.93 or threads == 384 else 64
    widest = {128: 128, 256: 64, 384: 32}[threads]  # all tiles fit, wherever they lie
    BN = min(widest, w.choice([32, 64, 64, 64, 128]))
    blocks, rounds = w.choice([1, 2, 3]), w.choice([1, 2, 3, 5])
    plan = Plan(
        blocks=blocks,
        BM=BM,
        BN=BN,
        rounds=rounds,
        N=rounds * BN - w.choice([0, 0, 8, 13]),
        M=blocks * BM - w.choice([0, 0, 5]),
        threads=threads,
        count=w.choice([0, 1, 2, 99]),
        made=frozenset(t for t in ("a", "e") if w.random() < 0.25),
        wide=frozenset(t for t in "BDW" if w.random() < 0.08),
        repeats=w.choice([1, 1, 1, 1, 2]),
    )
    loops = tuple(_loop(plan, w) for _ in range(w.choice([1, 1, 1, 2])))
    first = {name: w.randrange(-2, 3) for name in ("s", "t", "p", "q", "h", "acc", "sum", "row")}
    return Plan(**{**vars(plan), "loops": loops, "first": first})


# ---- statements ---------------------------------------------------------------------------------


def _low(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def _multiply(a: str, b: str, acc: str, is_turned: bool, clears: bool) -> Statement:
    def run(state: State, by: int, n: int) -> None:
        right = state[b].T if is_turned else state[b]
        state[acc] = state[a] @ right + (0 if clears else state[acc])

    options = ", transpose_B=True" * is_turned + ", clear_accum=True" * clears
    reads = {a, b} | (set() if clears else {acc})
    return Statement(
        (f"T.gemm({a}, {b}, {acc}{options})",), frozenset(reads), frozenset({acc}), run
    )


def _factor(plan: Plan, w: random.Random, to: str) -> Statement:
    """What a multiply takes, of what others gave."""
    source = w.choice(["s", "s", "s", "t", "p"] if to != "p" else ["s", "s", "s", "t"])
    by_row, by_tile, by_value = (w.random() < p for p in (0.3, 0.3, 0.2))
    kind = w.choice(["", "", "", "mask", "mask", "half", "odd"])
    cut = w.randrange(0, plan.rounds * plan.BN)
    value = f"{source}[i, j]"
    value += " - row[i]" * by_row + " + x" * by_value
    value = f"T.clamp({value}, -2, 2)" + " * w[0, j]" * by_tile
    if kind == "mask":
        value = f"T.if_then_else(n * {plan.BN} + j <= by * {plan.BM} + i + {cut}, {value}, 0)"
    loop = f"for i, j in T.Parallel({plan.BM}, {plan.BN}):"
    store = f"{to}[i, j] = {value}"
    lines = {
        "half": (loop, f"    if j < {plan.BN // 2}:", f"        {store}"),
        "odd": ("if n % 2 == 1:", f"    {loop}", f"        {store}"),
    }.get(kind, (loop, f"    {store}"))

    def run(state: State, by: int, n: int) -> None:
        if kind == "odd" and n % 2 == 0:
            return
        x = state[source] - (state["row"][:, None] if by_row else 0)
        x = np.clip(x + (state["x"] if by_value else 0), -2, 2)
        x = x * (state["w"] if by_tile else 1)
        if kind == "mask":
            rows, columns = np.arange(plan.BM)[:, None], np.arange(plan.BN)
            x = np.where(n * plan.BN + columns <= by * plan.BM + rows + cut, x, 0)
        if kind == "half":
            x = np.where(np.arange(plan.BN) < plan.BN // 2, x, state[to])
        state[to] = _low(x)

    reads = {source}
    reads |= {"row"} if by_row else set()
    reads |= {"w"} if by_tile else set()
    reads |= {"x"} if by_value else set()
    return Statement(lines, frozenset(reads), frozenset({to}), run)


def _reduction(w: random.Random) -> Statement:
    source, kind, clears = w.choice("sstp"), w.choice(["max", "sum"]), w.random() < 0.5

    def run(state: State, by: int, n: int) -> None:
        if kind == "max":
            found = state[source].max(axis=1)
            state["row"] = found if clears else np.maximum(found, state["row"])
        else:
            state["row"] = state[source].sum(axis=1) + (0 if clears else state["row"])

    line = f"T.reduce_{kind}({source}, row, dim=1, clear={clears})"
    reads = {source} | (set() if clears else {"row"})
    return Statement((line,), frozenset(reads), frozenset({"row"}), run)


def _rescaling(plan: Plan, w: random.Random) -> Statement:
    """Of sums, by what is known of the round."""
    to = w.choice(["acc", "sum"])
    by_row, by_value, by_tile = (w.random() < p for p in (0.5, 0.3, 0.3))
    by_tile = by_tile and plan.BN >= WIDTH
    value = f"T.clamp({to}[i, j], -99, 99)"
    value += " + T.clamp(row[i], -3, 3)" * by_row + " + x" * by_value + " + w[0, j]" * by_tile

    def run(state: State, by: int, n: int) -> None:
        x = np.clip(state[to], -99, 99)
        x = x + (np.clip(state["row"], -3, 3)[:, None] if by_row else 0)
        x = x + (state["x"] if by_value else 0)
        state[to] = x + (state["w"][:, :WIDTH] if by_tile else 0)

    reads = {to, *("row",) * by_row, *("x",) * by_value, *("w",) * by_tile}
    lines = (f"for i, j in T.Parallel({plan.BM}, {WIDTH}):", f"    {to}[i, j] = {value}")
    return Statement(lines, frozenset(reads), frozenset({to}), run)


def _through_memory() -> Statement:
    def run(state: State, by: int, n: int) -> None:
        state["h"] = state["p"]

    return Statement(("T.copy(p, h)",), frozenset("p"), frozenset("h"), run)


def _told(plan: Plan) -> Statement:
    def run(state: State, by: int, n: int) -> None:
        state["told"][by, n] = state["row"]

    lines = (f"for i in T.Parallel({plan.BM}):", "    told[by, n, i] = row[i]")
    return Statement(lines, frozenset({"row"}), frozenset({"told"}), run)


def _copies(plan: Plan) -> dict[str, Statement]:
    """What brings the tiles of a round, and a value of it."""

    def bringing(tile: str, tensor: str, at: str, is_row: bool = False) -> Statement:
        def run(state: State, by: int, n: int) -> None:
            part = slice(n * plan.BN, n * plan.BN + plan.BN)
            state[tile] = state[tensor][:, part] if is_row else state[tensor][part]

        line = f"T.copy({tensor}[{at}], {tile})"
        return Statement((line,), frozenset({tensor}), frozenset({tile}), run, is_copy=True)

    def load(state: State, by: int, n: int) -> None:
        state["x"] = state["values"][n]

    return {
        "b": bringing("b", "B", f"n * {plan.BN}, 0"),
        "d": bringing("d", "D", f"n * {plan.BN}, 0"),
        "w": bringing("w", "W", f"0, n * {plan.BN}", is_row=True),
        "x": Statement(("x = values[n]",), frozenset(), frozenset("x"), load, is_value=True),
    }


# ---- bodies -------------------------------------------------------------------------------------


def _loop(plan: Plan, w: random.Random) -> Loop:
    makers: list[Callable[[], Statement]] = [
        lambda: _multiply("a", w.choice("bbd"), "s", True, w.random() < 0.9),
        lambda: _multiply("a", w.choice("bbd"), "s", True, w.random() < 0.9),
        lambda: _multiply("e", w.choice("bd"), "t", True, w.random() < 0.8),
        lambda: _factor(plan, w, "p"),
        lambda: _factor(plan, w, "p"),
        lambda: _factor(plan, w, "q"),
        lambda: _reduction(w),
        lambda: _rescaling(plan, w),
        lambda: _multiply(w.choice("ppqh"), w.choice("ddb"), "acc", False, w.random() < 0.1),
        lambda: _multiply(w.choice("pqh"), w.choice("bd"), "sum", False, w.random() < 0.2),
        _through_memory,
        lambda: _told(plan),
    ]
    # as attention has it, more often than any other order
    usual = [makers[0], w.choice([makers[6], makers[3]]), makers[3], makers[8]]
    chosen = [make() for make in usual] if w.random() < 0.6 else []
    for _ in range(w.randrange(0, 5) if chosen else w.randrange(3, 8)):
        chosen.insert(w.randrange(len(chosen) + 1), w.choice(makers)())
    body: list[Statement] = []
    copies = _copies(plan)
    early = w.random() < 0.5
    for place, statement in enumerate(chosen):
        wanted = set().union(*(s.reads for s in (chosen if early else chosen[place : place + 1])))
        for name in [n for n in copies if n in wanted]:
            body.append(copies.pop(name))
        body.append(statement)
    schedule = _schedule(body, w) if w.random() < 0.4 else ""
    return Loop(
        body=tuple(body),
        start=w.choice([0, 0, 0, 1]),
        stop=w.choice([*STOPS, next(iter(STOPS))]),
        stages=w.choice([None, None, None, None, 2, 2, 2, 3, 3, 1, 0]),
        schedule=schedule,
    )


def _schedule(body: Sequence[Statement], w: random.Random) -> str:
    """A random order and stages that keep the meaning; "" where none is found."""
    numbered = [s for s in body if not s.is_value]
    own = [s for s in numbered if not s.is_copy]
    for _ in range(60):
        start = w.randrange(len(own) + 1)
        late = {k for k in range(len(own)) if k >= start and w.random() < 0.8}
        order = sorted(range(len(own)), key=lambda k: k + w.choice([0, 0, 3, -3]) + 4 * (k in late))
        if w.random() < 0.5:
            order.sort(key=lambda k: (k not in late) and any(j in late for j in range(k)))
        place = {k: p for p, k in enumerate(order)}
        if late and all(
            _keeps(own[i], own[k], i in late, k in late, place[i] < place[k])
            for k in range(len(own))
            for i in range(k)
        ):
            break
    else:
        return ""
    numbers = {id(s): k for k, s in enumerate(own)}
    places = [-1 if s.is_copy else place[numbers[id(s)]] for s in numbered]
    stages = [0 if s.is_copy else int(numbers[id(s)] in late) for s in numbered]
    return f", order={tuple(places)}, stage={tuple(stages)}"


def _keeps(first: Statement, second: Statement, a: bool, b: bool, is_before: bool) -> bool:
    """Whether two statements do what they did; a, b: whether they are late ones."""
    touched = first.writes & (second.reads | second.writes) or first.reads & second.writes
    if not touched or (a == b and is_before):
        return True
    return not a and b and not is_before


# ---- the program --------------------------------------------------------------------------------


def chain(seed: int) -> Program:
    plan = drawn(seed)
    rng = np.random.default_rng(seed)

    def whole(shape: tuple[int, ...], limit: int, dtype: str) -> np.ndarray:
        return rng.integers(-limit, limit + 1, shape).astype(as_dtype(dtype).numpy)

    def tensor(name: str, shape: tuple[int, int], limit: int, dtype: str) -> np.ndarray:
        wider = shape[1] + (3 if name in plan.wide else 0)
        pitch = wider if name in plan.wide else -(-wider // 8) * 8
        return whole((shape[0], pitch), limit, dtype)[:, : wider if name in plan.wide else pitch]

    M, N = plan.M, plan.N
    arrays = {
        "A": whole((M, WIDTH), 2, "bfloat16"),
        "E": whole((M, WIDTH), 2, "bfloat16"),
        "B": tensor("B", (N, WIDTH), 2, "bfloat16"),
        "D": tensor("D", (N, WIDTH), 1, "bfloat16"),
        "W": tensor("W", (1, N), 1, "float32"),
        "values": whole((plan.rounds,), 2, "float32"),
        "lengths": np.array(LENGTHS, np.int32),
        "told": np.full((plan.blocks, plan.rounds, plan.BM), np.nan, np.float32),
    }
    for name, width in (("acc", WIDTH), ("sum", WIDTH), ("s", plan.BN), ("row", 1)):
        arrays[f"{name}_out"] = np.full((M, width), np.nan, np.float32)
    arrays["p_out"] = np.full((M, plan.BN), np.nan, ml_dtypes.bfloat16)
    is_plain = rng.random() < 0.9
    outputs = tuple(n for n in arrays if n.endswith("_out") or n == "told")
    return Program(
        source=_source(plan),
        arrays=arrays,
        outputs=outputs,
        declared=frozenset(arrays) if is_plain else frozenset(),
        scalars={"count": plan.count},
        expected=_meaning(plan, arrays, outputs),
        twins={},
        has_sums=True,
    )


def _meaning(
    plan: Plan, arrays: dict[str, np.ndarray], outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    results = {name: arrays[name].copy() for name in outputs}
    padded = plan.rounds * plan.BN

    def wide(name: str, shape: tuple[int, int]) -> np.ndarray:
        rows, columns = min(arrays[name].shape[0], shape[0]), min(arrays[name].shape[1], shape[1])
        result = np.zeros(shape)
        result[:rows, :columns] = arrays[name][:rows, :columns]
        return result

    tensors = {
        "A": wide("A", (plan.blocks * plan.BM, WIDTH)),
        "E": wide("E", (plan.blocks * plan.BM, WIDTH)),
        "B": wide("B", (padded, WIDTH)),
        "D": wide("D", (padded, WIDTH)),
        "W": wide("W", (1, padded)),
        "values": arrays["values"].astype(np.float64),
        "told": results["told"],
    }
    shapes = {
        **dict.fromkeys("stpqh", (plan.BM, plan.BN)),
        **dict.fromkeys(("acc", "sum"), (plan.BM, WIDTH)),
        "row": (plan.BM,),
    }
    for by in range(plan.blocks):
        rows = slice(by * plan.BM, by * plan.BM + plan.BM)
        state = {**tensors, "a": tensors["A"][rows], "e": tensors["E"][rows]}
        state |= {tile: state[tile] * 2 for tile in plan.made}
        state |= {name: np.full(shape, float(plan.first[name])) for name, shape in shapes.items()}
        for _ in range(plan.repeats):
            for loop in plan.loops:
                for n in range(loop.start, STOPS[loop.stop](plan, by)):
                    for statement in loop.body:
                        statement.run(state, by, n)
        for name in outputs:
            if name != "told":
                value = state[name.removesuffix("_out")].reshape(plan.BM, -1)
                rest = results[name][rows]
                rest[...] = value[: len(rest)].astype(rest.dtype)
    return results


def _own(*names: str) -> list[str]:
    """The tiles of the first loop and of the second."""
    return [f"{name}{end}" for end in ("", "_too") for name in names]


def _source(plan: Plan) -> str:
    BM, BN = plan.BM, plan.BN
    lines = [
        "M = A.shape[0]",
        "N = B.shape[0]",
        f"with T.Kernel(T.ceildiv(M, {BM}), threads={plan.threads}) as by:",
        *(f'    {t} = T.alloc_shared(({BM}, {WIDTH}), "bfloat16")' for t in "ae"),
        *(f'    {t} = T.alloc_shared(({BN}, {WIDTH}), "bfloat16")' for t in _own("b", "d")),
        *(f'    {t} = T.alloc_shared((1, {BN}), "float32")' for t in _own("w")),
        f'    h = T.alloc_shared(({BM}, {BN}), "bfloat16")',
        *(f'    {t} = T.alloc_fragment(({BM}, {BN}), "float32")' for t in "st"),
        *(f'    {t} = T.alloc_fragment(({BM}, {BN}), "bfloat16")' for t in "pq"),
        *(f'    {t} = T.alloc_fragment(({BM}, {WIDTH}), "float32")' for t in ("acc", "sum")),
        f'    row = T.alloc_fragment(({BM},), "float32")',
        *(f"    T.fill({name}, {value})" for name, value in plan.first.items()),
    ]
    for tile, tensor in (("a", "A"), ("e", "E")):
        if tile in plan.made:
            lines += [
                f"    for i, j in T.Parallel({BM}, {WIDTH}):",
                f"        {tile}[i, j] = {tensor}[by * {BM} + i, j] * 2",
            ]
        else:
            lines.append(f"    T.copy({tensor}[by * {BM}, 0], {tile})")
    indent = "    "
    if plan.repeats > 1:
        lines.append(f"    for again in T.serial({plan.repeats}):")
        indent *= 2
    for number, loop in enumerate(plan.loops):
        stages = "" if loop.stages is None else f", num_stages={loop.stages}"
        stop = loop.stop.format(BN=BN)
        lines.append(f"{indent}for n in T.Pipelined({loop.start}, {stop}{stages}{loop.schedule}):")
        body = [line for s in loop.body for line in s.lines]
        if number:  # with tiles of its own
            body = [re.sub(r"\b([bdw])\b", r"\1_too", line) for line in body]
        lines += [f"{indent}    {line}" for line in body]
    for name in ("acc", "sum", "s", "p"):
        lines.append(f"    T.copy({name}, {name}_out[by * {BM}, 0])")
    lines += [
        f"    for i in T.Parallel({BM}):",
        f"        row_out[by * {BM} + i, 0] = row[i]",
    ]
    tensors = ("A", "E", "B", "D", "W", "values", "lengths", "told")
    names = [
        f"{n}: T.Tensor" for n in (*tensors, "acc_out", "sum_out", "s_out", "row_out", "p_out")
    ]
    return "\n".join([
        "import tilejit.language as T", "from tilejit import tilejit", "", "", "@tilejit",
        f"def kernel({', '.join(names)}, count: T.int32):", *("    " + line for line in lines), "",
    ])  # fmt: skip
