"""Masks of loops over tiles: tiles that need none run without, and nothing else changes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tilejit.language as T
from tilejit import options, passes, tilejit
from tilejit.ir.node import If, Parallel, walk
from tilejit.passes import bounds
from tilejit.runtime.device import use_executor

NONE = -T.infinity("float32")


def single(*shape):
    return T.Tensor(shape, "float32")


def explained(kernel):
    return [line.strip() for line in kernel.explain().splitlines() if "masks" in line]


def branches(kernel):
    """The branches around loops, each with the loops in its two arms."""
    (frame,) = kernel.kernels
    found = [n for n in walk(frame.planned.body) if isinstance(n, If)]
    counts = [[sum(isinstance(x, Parallel) for x in walk(b)) for b in n.bodies] for n in found]
    return [(n, *c) for n, c in zip(found, counts, strict=True) if any(c)]


def make_causal():
    """Tiles of a matrix, what is right of the diagonal or outside becoming -inf."""

    @tilejit
    def causal(A: T.Tensor, C: T.Tensor, shift: T.int32, *, BM, BN, window, threads=64):
        M, N = A.shape
        with T.Kernel(T.ceildiv(M, BM), threads=threads) as block:
            x = T.alloc_fragment((BM, BN), "float32")
            for step in T.serial(T.ceildiv(N, BN)):
                T.copy(A[block * BM, step * BN], x)
                for i, j in T.Parallel(BM, BN):
                    row, column = block * BM + i, step * BN + j
                    seen = (column < N) & (column <= row + shift)
                    if window:
                        seen = seen & ~(column + window <= row + shift)
                    x[i, j] = T.if_then_else(seen, x[i, j], NONE)
                T.copy(x, C[block * BM, step * BN])

    return causal


def causal_of(a, shift, window):
    rows, columns = np.indices(a.shape)
    seen = columns <= rows + shift
    if window:
        seen &= columns + window > rows + shift
    return np.where(seen, a, -np.inf).astype(np.float32)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("shift", [0, -13, 70])
def test_masked_tiles_are_right(run, rng, shift, window):
    a = rng.standard_normal((75, 130)).astype(np.float32)
    a[3, 5], a[70, 2] = np.nan, np.inf
    got = run(
        lambda a, c: make_causal()(a, c, shift, BM=16, BN=32, window=window),
        a, out=[(a.shape, np.float32)],
    )  # fmt: skip
    np.testing.assert_array_equal(got, causal_of(a, shift, window))


def test_explanation_tells_where_there_are_no_masks():
    kernel = make_causal().compile(
        single(75, 128), single(75, 128), target="sm_80", BM=32, BN=32, window=0
    )
    first, second = explained(kernel)
    assert first == "loop over x: masks that hold in every tile are left out"  # column < N
    assert re.fullmatch(
        r"loop over x: no masks where \(\(int64\(step \* 32\) \+ 31\) <= .*", second
    )
    ((_, with_masks, without),) = branches(kernel)
    assert (with_masks, without) == (1, 0)  # without masks it copies x to itself


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_masks_that_always_hold_cost_nothing(target):
    @tilejit
    def padded(A: T.Tensor, C: T.Tensor, *, BN, masked):
        M, N = A.shape
        with T.Kernel(T.ceildiv(N, BN), M, threads=64) as (block, row):
            x = T.alloc_fragment((BN,), "float32")
            T.copy(A[row, block * BN], x)
            for j in T.Parallel(BN):
                value = x[j] * 3
                if masked:
                    value = T.if_then_else((block * BN + j < N) & (row < M), value, 0.0)
                x[j] = value
            T.copy(x, C[row, block * BN])

    sources = [
        padded.compile(single(20, 512), single(20, 512), target=target, BN=128, masked=masked)
        for masked in (True, False)
    ]
    assert sources[0].ptx == sources[1].ptx
    assert explained(sources[0]) == ["loop over x: masks that hold in every tile are left out"]
    kernel = padded.compile(single(20, 500), single(20, 500), target=target, BN=128, masked=True)
    assert branches(kernel) == []  # two elements a thread: too few


def loop_of(condition, value=lambda x: x * 2 + 1, arms=lambda c, x: T.if_then_else(c, x, NONE)):
    """A kernel that masks a tile of 64 x 64 in a loop over tiles, and its compiled form.

    condition: of i, j, the step, the block, and a runtime extent.
    """

    @tilejit
    def masked(A: T.Tensor, L: T.Tensor, C: T.Tensor, limit: T.int32):
        with T.Kernel(4, threads=128) as block:
            x = T.alloc_fragment((64, 64), "float32")
            length = L[block]
            for step in T.serial(5):
                T.copy(A[step * 64, 0], x)
                for i, j in T.Parallel(64, 64):
                    x[i, j] = arms(condition(i, j, step, block, limit, length, L), value(x[i, j]))
                T.copy(x, C[block, step * 64, 0])

    specs = single(320, 64), T.Tensor((64,), "int32"), single(4, 320, 64)
    return masked.compile(*specs, target="sm_90a")


@pytest.mark.parametrize(
    "condition, arms",
    [
        (lambda i, j, step, block, limit, length, L: step * 64 + i < limit, (1, 1)),
        (lambda i, j, step, block, limit, length, L: step * 64 + i < length, (1, 1)),
        (lambda i, j, step, block, limit, length, L: block <= step, (1, 1)),
        (lambda i, j, step, block, limit, length, L: i // 4 + j <= step * block * 9, (1, 1)),
        (lambda i, j, step, block, limit, length, L: step * 64 + i != block * 64 + j, (1, 1)),
        (lambda i, j, step, block, limit, length, L: (i < step * 32) & (L[j] > 0), (1, 1)),
        (lambda i, j, step, block, limit, length, L: (i < step * 32) | (L[j] > 0), (1, 1)),
        (lambda i, j, step, block, limit, length, L: i < L[j], None),  # differs in the tile
        (lambda i, j, step, block, limit, length, L: (i ^ 3) < step, None),
        (lambda i, j, step, block, limit, length, L: i < 40, None),  # in no tile
        (lambda i, j, step, block, limit, length, L: i < T.get_thread_binding(), None),
    ],
)
def test_conditions_that_corners_settle_become_branches(condition, arms):
    kernel = loop_of(condition)
    found = [counts for _, *counts in branches(kernel)]
    assert found == ([] if arms is None else [list(arms)])
    assert len(explained(kernel)) == len(found)


def test_a_mask_whose_other_arm_is_the_constant_is_wanted_false():
    kernel = loop_of(
        lambda i, j, step, block, limit, length, L: step * 64 + i >= limit,
        arms=lambda c, x: T.if_then_else(c, 0.0, x),
    )
    assert explained(kernel) == ["loop over x: no masks where ((step * 64) + 63) < limit"]


def test_long_loops_are_not_there_twice():
    def long(x):
        for _ in range(4):
            x = T.tan(x)
        return x

    condition = lambda i, j, step, block, limit, length, L: step * 64 + i < limit
    assert branches(loop_of(condition, long)) == []
    assert len(branches(loop_of(condition, lambda x: x))) == 1


def test_branches_in_a_loop_are_masks_too(run, rng):
    @tilejit
    def cut(A: T.Tensor, C: T.Tensor, *, BM=64):
        M, N = A.shape
        with T.Kernel(T.ceildiv(M, BM), threads=64) as block:
            x = T.alloc_fragment((BM, N), "float32")
            T.copy(A[block * BM, 0], x)
            for i, j in T.Parallel(BM, N):
                if block * BM + i > 70:
                    x[i, j] = x[i, j] * 2 + j
            T.copy(x, C[block * BM, 0])

    a = rng.standard_normal((200, 32)).astype(np.float32)
    got = run(cut, a, out=[(a.shape, np.float32)])
    want = np.where(np.arange(200)[:, None] > 70, a * 2 + np.arange(32, dtype=np.float32), a)
    np.testing.assert_array_equal(got, want.astype(np.float32))
    kernel = cut.compile(single(200, 32), single(200, 32), target="sm_80")
    assert [counts for _, *counts in branches(kernel)] == [[1, 1]]


def test_guarded_loads_lose_their_guards(run, rng):
    @tilejit
    def shifted(A: T.Tensor, C: T.Tensor, *, BM=32):
        M, N = A.shape
        with T.Kernel(T.ceildiv(M, BM), threads=32) as block:
            for i, j in T.Parallel(BM, N):
                row = block * BM + i
                C[row, j] = T.if_then_else(row >= 40, A[row - 40, j] * 2, 7.0)

    a = rng.standard_normal((150, 32)).astype(np.float32)
    got = run(shifted, a, out=[(a.shape, np.float32)])
    want = np.full_like(a, 7)
    want[40:] = a[:-40] * 2
    np.testing.assert_array_equal(got, want)
    kernel = shifted.compile(single(150, 32), single(150, 32), target="sm_80")
    assert [counts for _, *counts in branches(kernel)] == [[1, 1]]


# ---- with the pass and without -------------------------------------------------------------------

TERMS = [
    lambda i, j, row, column, p: column < p["N"],
    lambda i, j, row, column, p: column * p["a"] <= row * p["b"] + p["c"],
    lambda i, j, row, column, p: column > row - p["shift"],
    lambda i, j, row, column, p: p["shift"] + i * p["b"] >= p["c"] - j,
    lambda i, j, row, column, p: row + p["c"] != column,
    lambda i, j, row, column, p: column // 8 <= T.min(row, p["c"]) - i // 4,
    lambda i, j, row, column, p: (i ^ 1) < p["c"],
    lambda i, j, row, column, p: row < p["c"],
]
JOIN = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "not": lambda a, b: a & ~b}


def make_random(first, second, join, is_swapped):
    @tilejit
    def kernel(A: T.Tensor, C: T.Tensor, shift: T.int32, *, a, b, c, BM, BN):
        M, N = A.shape
        with T.Kernel(T.ceildiv(M, BM), threads=32) as block:
            x = T.alloc_fragment((BM, BN), "float32")
            for step in T.serial(T.ceildiv(N, BN)):
                T.copy(A[block * BM, step * BN], x)
                for i, j in T.Parallel(BM, BN):
                    p = {"a": a, "b": b, "c": c, "N": N, "shift": shift}
                    at = (i, j, block * BM + i, step * BN + j, p)
                    seen = JOIN[join](TERMS[first](*at), TERMS[second](*at))
                    if is_swapped:
                        x[i, j] = T.if_then_else(seen, -1.0, x[i, j] + j)
                    else:
                        x[i, j] = T.if_then_else(seen, x[i, j] * 2, NONE)
                T.copy(x, C[block * BM, step * BN])

    return kernel


small = st.integers(-3, 3)
masks = st.fixed_dictionaries(
    {
        "first": st.integers(0, len(TERMS) - 1),
        "second": st.integers(0, len(TERMS) - 1),
        "join": st.sampled_from(sorted(JOIN)),
        "is_swapped": st.booleans(),
    }
)
sizes = st.fixed_dictionaries(
    {
        "a": small, "b": small, "c": st.integers(-70, 70),
        "BM": st.sampled_from([1, 4, 8]), "BN": st.sampled_from([8, 16]),
    }
)  # fmt: skip
shifts = st.one_of(
    st.integers(-60, 60), st.sampled_from([2**31 - 1, 2**31 - 9, -(2**31), -(2**31) + 5])
)


@settings(max_examples=60, deadline=None)
@given(masks, sizes, shifts, st.integers(1, 30), st.integers(1, 60), st.booleans())
def test_the_pass_changes_no_bit(make, constants, shift, M, N, is_hopper):
    a = np.random.default_rng(M * N).standard_normal((M, N)).astype(np.float32)
    a.flat[::7] = [np.nan, np.inf, -0.0][N % 3]
    results = []
    for used in (True, False):
        c = np.full((M, N), np.nan, np.float32)
        chosen = tuple(p for p in passes.PASSES if used or p is not bounds.drop_masks)
        with pytest.MonkeyPatch.context() as patch, use_executor("simulator"):
            patch.setattr(passes, "PASSES", chosen)
            patch.setattr(bounds, "WORTH", 0)
            with options(target="sm_90a" if is_hopper else "sm_80"):
                make_random(**make)(a, c, shift, **constants)
        results.append(c)
    assert results[0].tobytes() == results[1].tobytes()
    with use_executor("reference"):
        c = np.full((M, N), np.nan, np.float32)
        make_random(**make)(a, c, shift, **constants)
    np.testing.assert_array_equal(results[0], c)


def test_a_good_part_of_the_random_masks_become_branches():
    found = 0
    for first in range(len(TERMS)):
        for second in range(len(TERMS)):
            constants = {"a": 1, "b": 1, "c": 20, "BM": 16, "BN": 32}
            kernel = make_random(first, second, "and", False).compile(
                single(60, 100), single(60, 100), target="sm_80", **constants
            )
            found += bool(branches(kernel))
    assert found > len(TERMS) ** 2 // 2


# ---- what rows have in common --------------------------------------------------------------------


def test_what_depends_on_the_row_alone_is_computed_once_a_row():
    @tilejit(fast_math=True)
    def scaled(A: T.Tensor, C: T.Tensor):
        with T.Kernel(1, threads=64):
            x = T.alloc_fragment((64, 64), "float32")
            most = T.alloc_fragment((64,), "float32")
            T.copy(A, x)
            T.reduce_max(x, most, dim=1)
            for i, j in T.Parallel(64, 64):
                x[i, j] *= T.if_then_else(most[i] == NONE, 0.0, T.rsqrt(most[i]))
            T.copy(x, C)

    kernel = scaled.compile(single(64, 64), single(64, 64), target="sm_90a")
    (frame,) = kernel.kernels
    held = {b.name: layout.registers for b, layout in frame.planned.fragments.items()}
    assert held["x"] == 64 and held["most"] < 32
    assert kernel.ptx.count("rsqrt.approx.ftz.f32") == held["most"]
