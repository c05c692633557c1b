"""Loops whose rounds overlap give the numbers that they give iteration by iteration, whatever the
loop keeps from one to the next, and whoever chose the schedule."""

from __future__ import annotations

import itertools
import sys

import ml_dtypes
import numpy as np
import pytest
from products import FLOAT32_STEP, assert_near, operand

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import ArgumentError, ArgumentTypeError
from tilejit.ir.node import For, LoopKind, Parallel, walk
from tilejit.ir.sync import SyncThreads
from tilejit.ops.gemm import Gemm, GemmWait
from tilejit.passes import late

BF16 = ml_dtypes.bfloat16
TURNS = "warpgroups take turns to multiply"


def make_chain():
    @tilejit
    def chain(
        A: T.Tensor, B: T.Tensor, D: T.Tensor, W: T.Tensor, count: T.int32, C: T.Tensor,
        *, BM=64, BN=64, K=64, N2=64, threads=128, stages=None, shared=False, again=False,
        tile=False, start=0,
    ):  # fmt: skip
        """C = sum over blocks n of BN rows of B, from `start` on: f(A @ B[n].T) @ D[n].

        f: relu(x) * (n + 1), times W of the column with `tile`. shared: the factor goes through
        shared memory. again: D is B.
        """
        M, N = A.shape[0], B.shape[0]
        with T.Kernel(T.ceildiv(M, BM), threads=threads) as by:
            a = T.alloc_shared((BM, K), A.dtype)
            b = T.alloc_shared((BN, K), B.dtype)
            d = T.alloc_shared((BN, N2), D.dtype)
            w = T.alloc_shared((1, BN), "float32")
            s = T.alloc_fragment((BM, BN), "float32")
            p = T.alloc_fragment((BM, BN), A.dtype)
            ps = T.alloc_shared((BM, BN), A.dtype)
            acc = T.alloc_fragment((BM, N2), "float32")
            T.clear(acc)
            T.copy(A[by * BM, 0], a)
            for n in T.Pipelined(start, T.min(count, T.ceildiv(N, BN)), num_stages=stages):
                T.copy(B[n * BN, 0], b)
                T.gemm(a, b, s, transpose_B=True, clear_accum=True)
                if tile:
                    T.copy(W[0, n * BN], w)
                for i, j in T.Parallel(BM, BN):
                    factor = T.cast(n + 1, "float32")
                    p[i, j] = T.max(s[i, j], 0) * (w[0, j] * factor if tile else factor)
                if shared:
                    T.copy(p, ps)
                if again:
                    T.gemm(ps if shared else p, b, acc)
                else:
                    T.copy(D[n * BN, 0], d)
                    T.gemm(ps if shared else p, d, acc)
            T.copy(acc, C[by * BM, 0])

    return chain


chain, apart = make_chain(), make_chain()  # the latter's rounds do not overlap


def reference(a, b, d, w, count, *, BN=64, start=0, tile=False):
    """The same in float64 with the factor rounded, and how large the sums of magnitudes are."""
    total = np.zeros((a.shape[0], d.shape[1]))
    sizes = np.zeros_like(total)
    for n in range(start, min(count, -(-b.shape[0] // BN))):
        rows = slice(n * BN, (n + 1) * BN)
        p = np.maximum(a.astype(np.float64) @ b[rows].astype(np.float64).T, 0) * (n + 1)
        if tile:
            p = p * w[0, rows].astype(np.float64)
        low, right = p.astype(a.dtype).astype(np.float64), d[rows].astype(np.float64)
        total += low @ right
        sizes += np.abs(low) @ np.abs(right)
    return total, sizes


def check(hopper, rng, monkeypatch, *, M=130, N=300, count=99, dtype=BF16, **constants):
    """Against float64, and bit by bit against the loop whose rounds do not overlap."""
    K, N2 = constants.get("K", 64), constants.get("N2", 64)
    a, b, d = (operand(rng, shape, dtype) for shape in ((M, K), (N, K), (N, N2)))
    w = operand(rng, (1, N), np.float32)
    d = b if constants.get("again") else d
    out = [((M, N2), "float32")]
    c = hopper(chain, a, b, d, w, count, out=out, **constants)
    own = {k: constants[k] for k in ("start", "tile", "BN") if k in constants}
    exact, sizes = reference(a, b, d, w, count, **own)
    # a factor beside a rounding boundary may fall to either side
    assert_near(c, exact, (2.0 ** (-8 if dtype is BF16 else -11) + N * FLOAT32_STEP) * sizes)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tilejit.passes.specialise"], "overlaps", lambda *_: {})
        assert hopper(apart, a, b, d, w, count, out=out, **constants).tobytes() == c.tobytes()


def planned(**constants):
    """The kernel, and the body of its rounds: None where they do not overlap."""
    square = T.Tensor((512, constants.get("K", 64)), "bfloat16")
    wide = T.Tensor((512, constants.get("N2", 64)), "bfloat16")
    out = T.Tensor((512, constants.get("N2", 64)), "float32")
    kernel = chain.compile(
        square, square, wide, T.Tensor((1, 512), "float32"), C=out, target="sm_90a", **constants
    )
    nodes = list(walk(kernel.kernels[0].planned.body))
    if sum(isinstance(n, Gemm) for n in nodes) == 2:
        return kernel, None
    (rounds,) = (
        n for n in nodes if isinstance(n, For) and any(isinstance(m, Gemm) for m in n.body)
    )
    return kernel, rounds.body


@pytest.mark.parametrize("count", [0, 1, 2, 5, 99])
@pytest.mark.parametrize("threads", [128, 256, 384])
def test_rounds_are_right_for_any_number_of_them(hopper, rng, monkeypatch, threads, count):
    BM = threads // 2
    check(hopper, rng, monkeypatch, M=BM + 70, count=count, BM=BM, threads=threads)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("start", [0, 2, 7])
def test_rounds_are_right_for_any_ring_and_start(hopper, rng, monkeypatch, start, stages):
    check(hopper, rng, monkeypatch, start=start, stages=stages, BM=128, threads=256)


@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("threads", [128, 256])
def test_what_both_parts_use_is_right(hopper, rng, monkeypatch, threads, shared, again, tile):
    """Factors in registers or shared memory, tiles that one or both parts read, or threads."""
    constants = {"BM": threads // 2, "threads": threads, "tile": tile, "shared": shared}
    check(hopper, rng, monkeypatch, again=again, **constants)


@pytest.mark.parametrize(
    "BN, K, N2", [(64, 128, 64), (128, 64, 96), (32, 64, 256), (96, 96, 40), (16, 64, 8)]
)
def test_other_tiles_are_right(hopper, rng, monkeypatch, BN, K, N2):
    check(hopper, rng, monkeypatch, M=200, BM=128, threads=256, BN=BN, K=K, N2=N2)
    check(hopper, rng, monkeypatch, M=200, BN=BN, K=K, N2=N2, dtype=np.float16)


@pytest.mark.parametrize("threads", [128, 256, 384])
def test_next_multiply_starts_before_the_operand_of_the_last_is_made_again(threads):
    """The round: multiply ahead, multiply late, wait for the first only, work, wait for both."""
    kernel, body = planned(threads=threads, BM=threads // 2)
    kinds = [type(n).__name__ for n in body if isinstance(n, Gemm | GemmWait | Parallel)]
    assert kinds[:2] == ["Gemm", "Gemm"]
    gemms = [n for n in body if isinstance(n, Gemm)]
    assert [g.acc.buffer.name for g in gemms] == ["s", "acc"]
    waits = [n for n in body if isinstance(n, GemmWait)]
    assert [w.pending for w in waits] == [1, 0]
    assert [b.name for b in waits[0].registers] == ["s"]
    between = body[body.index(waits[0]) : body.index(waits[1])]
    assert any(isinstance(n, Parallel) for n in between)
    turns = [n for n in body if isinstance(n, SyncThreads)]
    assert (TURNS in kernel.explain()) == (threads > 128)
    assert [n.is_arrival for n in turns] == ([False, True] if threads > 128 else [])
    assert not kernel.resources.spill_bytes


def test_factors_in_shared_memory_meet_after_the_wait():
    """Warps that write what a multiply in flight reads: all have seen that it is over."""
    _, body = planned(shared=True)
    store = next(k for k, n in enumerate(body) if any(b.name == "ps" for b in n.writes))
    before = [type(n).__name__ for n in body[:store] if isinstance(n, GemmWait | SyncThreads)]
    assert before[-2:] == ["GemmWait", "SyncThreads"]


@pytest.mark.parametrize(
    "constants",
    [{"stages": 1}, {"BM": 128, "BN": 128, "N2": 128, "threads": 128}],
    ids=str,
)
def test_rounds_that_do_not_fit_stay_apart(constants):
    assert planned(**constants)[1] is None


@tilejit
def finished(A: T.Tensor, B: T.Tensor, D: T.Tensor, R: T.Tensor, C: T.Tensor, *, when, given=True):
    """relu(A @ B.T) @ D, its rows divided by their length, plus R, which is read before the loop or
    after it; in a branch with `given`."""
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(M, 128), threads=256) as by:
        a = T.alloc_shared((128, K), A.dtype)
        b = T.alloc_shared((128, K), B.dtype)
        d = T.alloc_shared((128, 128), D.dtype)
        s = T.alloc_fragment((128, 128), "float32")
        p = T.alloc_fragment((128, 128), A.dtype)
        acc = T.alloc_fragment((128, 128), "float32")
        squares = T.alloc_fragment((128, 128), "float32")
        length = T.alloc_fragment((128,), "float32")
        rest = T.alloc_fragment((128, 128), "float32")
        T.clear(acc)
        T.copy(A[by * 128, 0], a)
        if when == "before":
            T.copy(R[by * 128, 0], rest)
        if by < M if given == "branch" else True:
            for n in T.Pipelined(T.ceildiv(N, 128)):
                T.copy(B[n * 128, 0], b)
                T.gemm(a, b, s, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(128, 128):
                    p[i, j] = T.max(s[i, j], 0)
                T.copy(D[n * 128, 0], d)
                T.gemm(p, d, acc)
            if when == "after":
                T.copy(R[by * 128, 0], rest)
            for i, j in T.Parallel(128, 128):
                squares[i, j] = acc[i, j] * acc[i, j]
            T.reduce_sum(squares, length, dim=1)
            for i, j in T.Parallel(128, 128):
                C[by * 128 + i, j] = acc[i, j] * T.rsqrt(length[i]) + rest[i, j]


@pytest.mark.parametrize("given", [True, "branch"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_only_fragments_that_live_in_the_loop_count(hopper, rng, when, given):
    """With what is needed after the loop alone there is room: the rounds overlap."""
    M, N, K = 200, 300, 64
    a, b, d = (operand(rng, shape, BF16) for shape in ((M, K), (N, K), (N, 128)))
    r = operand(rng, (M, 128), np.float32)
    out = [((M, 128), "float32")]
    c = hopper(finished, a, b, d, r, out=out, when=when, given=given)
    total, sizes = reference(a, b, d, None, 1, BN=N)
    rows = np.linalg.norm(total, axis=1, keepdims=True)
    bound = (2.0**-7 + 2 * N * FLOAT32_STEP) * (sizes / rows + np.abs(r) + 1)
    assert_near(c, total / rows + r, bound)
    specs = [T.Tensor(x.shape, x.dtype.name) for x in (a, b, d, r, c)]
    kernel = finished.compile(*specs, target="sm_90a", when=when, given=given)
    gemms = [n for n in walk(kernel.kernels[0].planned.body) if isinstance(n, Gemm)]
    assert len(gemms) == (4 if when == "after" else 2)
    assert when == "before" or not kernel.resources.spill_bytes


@tilejit
def pair(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, has_zeros=False):
    """2 ** (A @ B.T / 8) @ D, minus the same of -A: two chains of multiplies in a round. has_zeros:
    relu(A @ B.T) and relu(-A @ B.T) instead."""
    M, K = A.shape
    N, N2 = D.shape
    with T.Kernel(T.ceildiv(M, 128), threads=256) as by:
        a = T.alloc_shared((128, K), A.dtype)
        b = T.alloc_shared((128, K), B.dtype)
        d = T.alloc_shared((128, N2), D.dtype)
        s = T.alloc_fragment((128, 128), "float32")
        p = T.alloc_fragment((128, 128), A.dtype)
        sums = [T.alloc_fragment((128, N2), "float32") for _ in range(2)]
        for total in sums:
            T.clear(total)
        T.copy(A[by * 128, 0], a)
        for n in T.Pipelined(T.ceildiv(N, 128), num_stages=2):
            T.copy(B[n * 128, 0], b)
            T.copy(D[n * 128, 0], d)
            for total, sign in zip(sums, (1, -1), strict=True):
                T.gemm(a, b, s, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(128, 128):
                    if has_zeros:
                        p[i, j] = T.max(s[i, j] * sign, 0)
                    else:
                        p[i, j] = T.exp2(s[i, j] * (sign / 8))
                T.gemm(p, d, total)
        for i, j in T.Parallel(128, N2):
            C[by * 128 + i, j] = sums[0][i, j] - sums[1][i, j]


@pytest.mark.parametrize("N2, is_beside", [(64, True), (128, False)])
def test_multiplies_run_beside_others_where_both_fit_the_registers(hopper, rng, N2, is_beside):
    """With sums of 128 columns, the operand of one and the result of the next are too much."""
    M, N, K = 200, 300, 64
    a, b, d = (operand(rng, shape, BF16) for shape in ((M, K), (N, K), (N, N2)))
    c = hopper(pair, a, b, d, out=[((M, N2), "float32")])
    right = np.zeros((384, N2))  # the loop's last rows are zeros, the multiply's too
    right[:N] = d
    scores = a.astype(np.float64) @ np.vstack([b, np.zeros((84, K), BF16)]).astype(np.float64).T / 8
    exact = (2.0**scores - 2.0**-scores) @ right
    sizes = (2.0**scores + 2.0**-scores) @ np.abs(right)
    assert_near(c, exact, (2.0**-8 + N * FLOAT32_STEP) * sizes)
    specs = [T.Tensor(x.shape, x.dtype.name) for x in (a, b, d, c)]
    kernel = pair.compile(*specs, target="sm_90a")
    nodes = list(walk(kernel.kernels[0].planned.body))
    first = next(k for k, n in enumerate(nodes) if isinstance(n, Gemm) and n.acc.buffer.name != "s")
    following = next(n for n in nodes[first + 1 :] if isinstance(n, Gemm | GemmWait))
    assert isinstance(following, Gemm) == is_beside
    assert not kernel.resources.spill_bytes
    assert "C75" not in kernel.kernels[0].compiled.log


def test_zeros_in_the_users_code_are_not_those_that_multiplies_begin_with(hopper, rng):
    """Sharing a register, they kept the assembler from seeing that no sum is read: it spilt one,
    and serialised the multiplies."""
    M, N, K, N2 = 200, 300, 64, 96
    a, b, d = (operand(rng, shape, BF16) for shape in ((M, K), (N, K), (N, N2)))
    c = hopper(pair, a, b, d, out=[((M, N2), "float32")], has_zeros=True)
    parts = [reference(x, b, d, None, 1, BN=N) for x in (a, -a)]
    bound = (2.0**-8 + N * FLOAT32_STEP) * (parts[0][1] + parts[1][1])
    assert_near(c, parts[0][0] - parts[1][0], bound)
    specs = [T.Tensor(x.shape, x.dtype.name) for x in (a, b, d, c)]
    kernel = pair.compile(*specs, target="sm_90a", has_zeros=True)
    assert not kernel.resources.spill_bytes
    assert "C75" not in kernel.kernels[0].compiled.log


@tilejit
def carried(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, kind, BN=64):
    """As chain; what the next factor is made of depends on the sums so far ("sums"), on a value of
    the round ("values"), or on nothing ("nothing")."""
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(M, 64), threads=128) as by:
        a = T.alloc_shared((64, K), A.dtype)
        b = T.alloc_shared((BN, K), B.dtype)
        d = T.alloc_shared((BN, 64), D.dtype)
        s = T.alloc_fragment((64, BN), "float32")
        p = T.alloc_fragment((64, BN), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        row = T.alloc_fragment((64,), "float32")
        T.clear(acc)
        T.clear(row)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(N, BN)):
            T.copy(B[n * BN, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(64, BN):
                p[i, j] = T.max(s[i, j] - row[i], 0)
            T.copy(D[n * BN, 0], d)
            T.gemm(p, d, acc)
            if kind == "sums":
                T.reduce_max(acc, row, dim=1)
            elif kind == "values":
                for i, j in T.Parallel(64, 64):
                    acc[i, j] += (n * 8 + j) * 0.25
        T.copy(acc, C[by * 64, 0])


@pytest.mark.parametrize("kind", ["sums", "values", "nothing"])
def test_what_a_round_hands_to_the_next_is_right(hopper, rng, kind):
    M, N, K = 150, 260, 64
    a, b, d = operand(rng, (M, K), BF16), operand(rng, (N, K), BF16), operand(rng, (N, 64), BF16)
    c = hopper(carried, a, b, d, out=[((M, 64), "float32")], kind=kind)
    total, row, sizes = np.zeros((M, 64)), np.zeros((M, 1)), np.zeros((M, 64))
    for n in range(-(-N // 64)):
        rows = slice(n * 64, n * 64 + 64)
        s = a.astype(np.float64) @ b[rows].astype(np.float64).T
        p = np.maximum(s - row, 0).astype(BF16).astype(np.float64)
        total += p @ d[rows].astype(np.float64)
        sizes += np.abs(p) @ np.abs(d[rows].astype(np.float64))
        if kind == "sums":
            row = total.max(axis=1, keepdims=True)
        elif kind == "values":
            total += (n * 8 + np.arange(64)) * 0.25
    slack = 4 if kind == "sums" else 1  # a row's maximum carries the error of its sum on
    assert_near(c, total, slack * (2.0**-7 + N * FLOAT32_STEP) * (sizes + np.abs(total)))


# ---- schedules by hand ----------------------------------------------------------------------


@tilejit
def by_hand(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, order, stage, group=None):
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(M, 64), threads=128) as by:
        a = T.alloc_shared((64, K), A.dtype)
        b = T.alloc_shared((64, K), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        s = T.alloc_fragment((64, 64), "float32")
        p = T.alloc_fragment((64, 64), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(N, 64), order=order, stage=stage, group=group):
            T.copy(B[n * 64, 0], b)  # 0
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)  # 1
            for i, j in T.Parallel(64, 64):  # 2
                p[i, j] = T.max(s[i, j], 0)
            T.copy(D[n * 64, 0], d)  # 3
            T.gemm(p, d, acc)  # 4
        T.copy(acc, C[by * 64, 0])


@pytest.mark.parametrize("stage", [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_schedule_by_hand_is_right_or_refused(hopper, rng, order, stage):
    """Every order and stage of two multiplies and the work between them."""
    a, b, d = (
        operand(rng, (150, 64), BF16),
        operand(rng, (260, 64), BF16),
        operand(rng, (260, 64), BF16),
    )
    constants = {"order": (-1, *order[:2], -1, order[2]), "stage": (0, *stage[:2], 0, stage[2])}
    first, work, last = order
    # in one iteration they follow each other; what runs ahead must not overwrite what is used
    good = {
        (0, 0, 0): first < work < last,
        (0, 0, 1): first < work and last < work,
        (0, 1, 1): work < last and work < first,
    }.get(stage, False)
    out = [((150, 64), "float32")]
    if not good:
        with pytest.raises(ArgumentError, match="the schedule changes what the loop computes"):
            hopper(by_hand, a, b, d, out=out, **constants)
        return
    c = hopper(by_hand, a, b, d, out=out, **constants)
    plain = hopper(chain_of, a, b, d, out=out)
    assert c.tobytes() == plain.tobytes()


def test_schedule_by_hand_is_tilelangs(hopper, rng):
    """Groups of statements; copies ahead of all; the same kernel as the compiler's own choice."""
    specs = T.Tensor((512, 64), "bfloat16"), T.Tensor((512, 64), "bfloat16")
    specs += T.Tensor((512, 64), "bfloat16"), T.Tensor((512, 64), "float32")
    named = by_hand.compile(
        *specs, target="sm_90a", order=(-1, 0, 2, -1, 1), stage=(-1, 0, 0, -1, 1)
    )
    grouped = by_hand.compile(
        *specs,
        target="sm_90a",
        order=(-1, 0, 2, 1),
        stage=(-1, 0, 0, 1),
        group=((0, 3), (1,), (2,), (4,)),
    )
    own = chain_of.compile(*specs, target="sm_90a")
    assert lines(named) == lines(grouped) == lines(own)


def lines(kernel):
    return [line.split("#")[0].strip() for line in kernel.source.splitlines()[1:]]


def test_schedule_by_hand_says_where_it_has_no_effect(rng):
    specs = T.Tensor((512, 64), "bfloat16"), T.Tensor((512, 64), "bfloat16")
    specs += T.Tensor((512, 64), "bfloat16"), T.Tensor((512, 64), "float32")
    kernel = by_hand.compile(
        *specs, target="sm_80", order=(-1, 0, 2, -1, 1), stage=(-1, 0, 0, -1, 1)
    )
    assert "order and stage are for asynchronous multiplies" in kernel.explain()


@pytest.mark.parametrize(
    "constants, message",
    [
        ({"order": (0, 1), "stage": (0, 0)}, "each of the body's 5 statements once, but 2 is"),
        ({"order": (0,) * 6, "stage": (0,) * 6}, "each of the body's 5 statements once, but 5 is"),
        ({"order": (0, 1), "stage": (0, 0), "group": ((0, 1, 2), (2, 3, 4))}, "2 is named twice"),
        ({"order": (0, 1), "stage": (0, 0), "group": ((0, 1, 2, 3, 4),)}, "group has 1 entries"),
        ({"order": (-1, 1, 1, -1, 2), "stage": (0,) * 5}, "two entries of order are equal"),
        ({"order": (-1, 0, 2, -1, 1), "stage": (-1, 0, 1, -1, 2)}, "3 stages besides that"),
        ({"order": (), "stage": (), "group": ((0,),)}, "group is given without order"),
        ({"order": (-2, 0, 2, -1, 1), "stage": (0,) * 5}, "order has -2; places count from 0 on"),
        ({"order": 5, "stage": 5}, "order must be a sequence, got 5"),
        ({"order": (0.5,), "stage": (0,)}, "order must hold ints, got 0.5"),
        ({"order": (0,), "stage": ("1",)}, "stage must hold ints, got '1'"),
        ({"order": (0,), "stage": (0,), "group": (0,)}, "group must be a sequence, got 0"),
    ],
)
def test_schedules_that_name_nothing_are_refused(constants, message):
    specs = T.Tensor((512, 64), "bfloat16"), T.Tensor((512, 64), "bfloat16")
    specs += T.Tensor((512, 64), "bfloat16"), T.Tensor((512, 64), "float32")
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message) as caught:
        by_hand.compile(*specs, target="sm_90a", **constants)
    assert caught.value.span.filename == __file__


@tilejit
def chain_of(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor):
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(M, 64), threads=128) as by:
        a = T.alloc_shared((64, K), A.dtype)
        b = T.alloc_shared((64, K), B.dtype)
        d = T.alloc_shared((64, 64), D.dtype)
        s = T.alloc_fragment((64, 64), "float32")
        p = T.alloc_fragment((64, 64), A.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        T.copy(A[by * 64, 0], a)
        for n in T.Pipelined(T.ceildiv(N, 64)):
            T.copy(B[n * 64, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(64, 64):
                p[i, j] = T.max(s[i, j], 0)
            T.copy(D[n * 64, 0], d)
            T.gemm(p, d, acc)
        T.copy(acc, C[by * 64, 0])


# ---- what late multiplies wait for ----------------------------------------------------------


@tilejit
def fading(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, N2=64, works=1, BM=128, BN=64):
    """As chain with sums that fade by the factor's greatest element before each round."""
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(M, BM), threads=2 * BM) as by:
        a = T.alloc_shared((BM, K), A.dtype)
        b = T.alloc_shared((BN, K), B.dtype)
        d = T.alloc_shared((BN, N2), D.dtype)
        s = T.alloc_fragment((BM, BN), "float32")
        p = T.alloc_fragment((BM, BN), A.dtype)
        acc = T.alloc_fragment((BM, N2), "float32")
        most = T.alloc_fragment((BM,), "float32")
        T.clear(acc)
        T.copy(A[by * BM, 0], a)
        for n in T.Pipelined(T.ceildiv(N, BN)):
            T.copy(B[n * BN, 0], b)
            T.gemm(a, b, s, transpose_B=True, clear_accum=True)
            if works:
                for _ in range(works):
                    for i, j in T.Parallel(BM, BN):
                        s[i, j] = T.sin(s[i, j] * 0.125)
            T.reduce_absmax(s, most, dim=1)
            T.copy(s, p)
            for i, j in T.Parallel(BM, N2):
                acc[i, j] *= 1 - most[i] * 0.25
            T.copy(D[n * BN, 0], d)
            T.gemm(p, d, acc)
        T.copy(acc, C[by * BM, 0])


def fading_rounds(**constants):
    """The rounds of its loop."""
    shapes = (512, 128), (512, 128), (512, constants["N2"])
    out = T.Tensor((512, constants["N2"]), "float32")
    kernel = fading.compile(
        *(T.Tensor(s, "bfloat16") for s in shapes), out, target="sm_90a", **constants
    )
    loops = [n for n in walk(kernel.kernels[0].planned.body) if isinstance(n, For)]
    loops = [n for n in loops if n.kind is LoopKind.SERIAL]
    (body,) = (n.body for n in loops if any(isinstance(m, Gemm) for m in n.body))
    return body


@pytest.mark.parametrize("works, is_before", [(1, False), (6, True)])
def test_work_of_late_multiplies_is_done_where_nothing_waits_for_it(works, is_before):
    """Beside the next iteration's multiply where threads are the bottleneck; at the end of the
    round before where the tensor cores are."""
    body = fading_rounds(N2=128, works=works)
    fades = [k for k, n in enumerate(body) if isinstance(n, Parallel) and n.extents == (128, 128)]
    second = [k for k, n in enumerate(body) if isinstance(n, Gemm)][1]
    assert [k < second for k in fades] == [is_before]


@pytest.mark.parametrize("rows", [64, 128, 192, 512])
def test_results_do_not_leave_late_where_rounds_overlap(hopper, rng, monkeypatch, rows):
    """16-bit results of loops as short as the results have strips."""
    monkeypatch.setattr(late, "FEWEST_TILES", 0)
    a, b = operand(rng, (300, 64), BF16), operand(rng, (rows, 64), BF16)
    d = operand(rng, (rows, 128), BF16)
    c = hopper(fading, a, b, d, out=[((300, 128), BF16)], N2=128, works=0)
    wide = hopper(fading, a, b, d, out=[((300, 128), "float32")], N2=128, works=0)
    np.testing.assert_array_equal(c, wide.astype(BF16))


@pytest.mark.parametrize("works", [1, 6])
@pytest.mark.parametrize("N2", [64, 128])
def test_sums_that_fade_are_right(hopper, rng, N2, works):
    M, N, K = 150, 330, 128
    a, b, d = operand(rng, (M, K), BF16), operand(rng, (N, K), BF16), operand(rng, (N, N2), BF16)
    c = hopper(fading, a, b, d, out=[((M, N2), "float32")], N2=N2, works=works)
    total, sizes = np.zeros((M, N2)), np.zeros((M, N2))
    for n in range(0, N, 64):
        s = a.astype(np.float64) @ b[n : n + 64].astype(np.float64).T
        for _ in range(works):
            s = np.sin(s * 0.125)
        total *= 1 - np.abs(s).max(axis=1, keepdims=True) * 0.25
        low, right = s.astype(BF16).astype(np.float64), d[n : n + 64].astype(np.float64)
        total += low @ right
        sizes += np.abs(low) @ np.abs(right)
    assert_near(c, total, (2.0**-7 + N * FLOAT32_STEP) * sizes)
