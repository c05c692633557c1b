"""Random multiplies of left operands in registers that are constants, wholly or in part: filled,
chosen, compared, copied from beyond a tensor's end, converted from other fragments."""

from __future__ import annotations

import random
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from writing import Program

BF16 = ml_dtypes.bfloat16
VALUES = (0, 1, 2, 2)


@dataclass(frozen=True)
class Plan:
    """What is random: BM x BN tiles p and q times BN x D tiles of B, `rounds` of them (0: no loop).
    first: what p, q and t begin with. change: how p changes in a round, in columns below `cut`.
    products: what is multiplied in a round, before and after that, and added to `sums` tiles."""

    BM: int
    BN: int
    D: int
    rounds: int
    first: tuple[int, int, int]
    change: str
    cut: int
    products: tuple[str, str]
    sums: int
    stores: bool


CHANGES = {
    "some": (
        "for i, j in T.Parallel({BM}, {BN}):",
        "    if j < {cut}:",
        "        p[i, j] = T.clamp(x + i % 3, -2, 2)",
    ),
    "chosen": (
        "for i, j in T.Parallel({BM}, {BN}):",
        "    p[i, j] = T.if_then_else(j < {cut}, T.clamp(x + i % 3, -2, 2), 2)",
    ),
    "compared": (
        "for i, j in T.Parallel({BM}, {BN}):",
        "    p[i, j] = T.cast(i < j + {cut}, 'float32')",
    ),
    "copied": ("T.copy(A[0, 0], p)",),
    "converted": (
        "for i, j in T.Parallel({BM}, {BN}):",
        "    if j < {cut}:",
        "        t[i, j] = x",
        "for i, j in T.Parallel({BM}, {BN}):",
        "    p[i, j] = t[i, j] * 2 - 1",
    ),
    "filled": ("T.fill(p, 1)",),
    "none": (),
}


def drawn(seed: int) -> Plan:
    r = random.Random(seed)
    BN = r.choice([16, 32, 48, 64, 96])
    return Plan(
        BM=r.choice([64, 128, 192]),
        BN=BN,
        D=r.choice([32, 64, 128]),
        rounds=r.choice([0, 1, 3, 3]),
        first=(r.choice(VALUES), r.choice(VALUES), r.choice(VALUES)),
        change=r.choice(list(CHANGES)),
        cut=r.choice([8, 16, 24, 32, BN // 2]),
        products=(r.choice(["p", "q", "pq"]), r.choice(["p", "q", "pq", ""])),
        sums=r.randint(1, 3),
        stores=r.random() < 0.7,
    )


def held_constants(seed: int) -> Program:
    plan = drawn(seed)
    rng = np.random.default_rng(seed)
    rounds = max(plan.rounds, 1)
    arrays = {
        "A": rng.integers(-2, 3, (plan.BM - 8, plan.cut)).astype(BF16),
        "B": rng.integers(-2, 3, (rounds * plan.BN - 3, plan.D)).astype(BF16),
        "X": rng.integers(-2, 3, (rounds,)).astype(np.float32),
        "P_out": np.full((plan.BM, plan.BN), np.nan, BF16),
        **{f"sum{k}_out": np.full((plan.BM, plan.D), np.nan, np.float32) for k in range(plan.sums)},
    }
    outputs = tuple(n for n in arrays if n.endswith("_out") and (plan.stores or n != "P_out"))
    return Program(
        source=_source(plan, arrays),
        arrays=arrays,
        outputs=outputs,
        declared=frozenset(arrays),
        scalars={},
        expected=_meaning(plan, arrays, outputs),
        has_sums=True,
    )


def _source(plan: Plan, arrays: dict[str, np.ndarray]) -> str:
    BM, BN, D = plan.BM, plan.BN, plan.D
    lines = [
        f"with T.Kernel(1, threads={2 * BM}) as by:",
        f'    b = T.alloc_shared(({BN}, {D}), "bfloat16")',
        *(f'    {f} = T.alloc_fragment(({BM}, {BN}), "bfloat16")' for f in "pq"),
        f'    t = T.alloc_fragment(({BM}, {BN}), "float32")',
        *(f"    T.fill({f}, {v})" for f, v in zip("pqt", plan.first, strict=True)),
    ]
    for k in range(plan.sums):
        lines.append(f'    sum{k} = T.alloc_fragment(({BM}, {D}), "float32")')
        lines.append(f"    T.fill(sum{k}, {k % 2})")
    indent = "    "
    if plan.rounds:
        lines.append(f"    for n in T.Pipelined({plan.rounds}):")
        indent *= 2
    n = "n" if plan.rounds else "0"
    body = [f"T.copy(B[{n} * {BN}, 0], b)", f"x = X[{n}]"]
    first, second = (
        [f"T.gemm({f}, b, sum{k})" for f in some for k in range(plan.sums)]
        for some in plan.products
    )
    change = [text.format(BM=BM, BN=BN, cut=plan.cut) for text in CHANGES[plan.change]]
    lines += [indent + text for text in (*body, *first, *change, *second)]
    if plan.stores:
        lines.append("    T.copy(p, P_out[0, 0])")
    lines += [f"    T.copy(sum{k}, sum{k}_out[0, 0])" for k in range(plan.sums)]
    parameters = ", ".join(
        f'{name}: T.Tensor({a.shape}, "{a.dtype.name}")' for name, a in arrays.items()
    )
    head = [
        "import tilejit.language as T",
        "from tilejit import tilejit",
        "",
        "",
        "@tilejit",
        f"def kernel({parameters}):",
    ]
    return "\n".join(head + ["    " + line for line in lines]) + "\n"


def _meaning(
    plan: Plan, arrays: dict[str, np.ndarray], outputs: tuple[str, ...]
) -> dict[str, np.ndarray]:
    shape = (plan.BM, plan.BN)
    state = {f: np.full(shape, float(v)) for f, v in zip("pqt", plan.first, strict=True)}
    sums = [np.full((plan.BM, plan.D), float(k % 2)) for k in range(plan.sums)]
    rounds = max(plan.rounds, 1)
    b = np.zeros((rounds * plan.BN, plan.D))
    b[: len(arrays["B"])] = arrays["B"]
    i, j = np.ogrid[: plan.BM, : plan.BN]
    for n in range(rounds):
        tile = b[n * plan.BN : (n + 1) * plan.BN]
        before, after = plan.products
        for f in before:
            for total in sums:
                total += state[f] @ tile
        x = float(arrays["X"][n])
        mixed = np.broadcast_to(np.clip(x + i % 3, -2, 2), shape)
        if plan.change == "some":
            state["p"] = np.where(j < plan.cut, mixed, state["p"])
        elif plan.change == "chosen":
            state["p"] = np.where(j < plan.cut, mixed, 2.0)
        elif plan.change == "compared":
            state["p"] = (i < j + plan.cut).astype(np.float64)
        elif plan.change == "copied":
            state["p"] = np.zeros(shape)
            a = arrays["A"][:, : plan.BN].astype(np.float64)
            state["p"][: a.shape[0], : a.shape[1]] = a
        elif plan.change == "converted":
            state["t"] = np.where(j < plan.cut, x, state["t"])
            state["p"] = state["t"] * 2 - 1
        elif plan.change == "filled":
            state["p"] = np.ones(shape)
        for f in after:
            for total in sums:
                total += state[f] @ tile
    found = {"P_out": state["p"], **{f"sum{k}_out": total for k, total in enumerate(sums)}}
    return {name: found[name].astype(arrays[name].dtype) for name in outputs}
