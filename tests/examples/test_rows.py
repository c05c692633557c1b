"""Rows: right for all ways to divide them, on every executor, and compiled without spills."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import rows
import rows_plan

import tilejit.language as T
from tilejit import options
from tilejit.runtime.device import current_device, target_of
from tilejit.target import Feature

WIDTHS = (128, 1024, 4096, 8192, 16384, 65536, 262144)
HOPPER = "sm_90a"


@pytest.fixture
def hopper_executor(executor):
    """Each executor, of a chip that has clusters."""
    if executor == "gpu" and not target_of(current_device()).has(Feature.CLUSTER):
        pytest.skip("the GPU has no clusters")
    with options(target=HOPPER if executor != "gpu" else None):
        yield executor


def plan(BM=1, threads=64, blocks=1, stages=2):
    return rows_plan.Plan(BM, threads, blocks, 1, stages)


def test_rows_are_right_on_every_executor(executor, capsys):
    rows.check()
    assert capsys.readouterr().out.startswith(
        "softmax, rms_norm and layer_norm and their gradients"
    )


@pytest.mark.parametrize("name", rows.NAMES)
@pytest.mark.parametrize(
    "M, N, how, workers",
    [
        (1, 2, plan(), 1),
        (5, 127, plan(BM=4), 2),
        (3, 1000, plan(threads=128), 5),
        (2, 1001, plan(blocks=2), 1),
        (7, 515, plan(blocks=4), 3),
        (3, 300, plan(blocks=8, threads=32), 2),  # some blocks have nothing of a row
        (4, 640, plan(BM=2, blocks=2), 2),
        (3, 24, plan(blocks=4, threads=32), 1),
        (6, 200, plan(stages=3), 2),
    ],
)
def test_any_division_of_rows_is_right(hopper_executor, name, M, N, how, workers):
    rng = np.random.default_rng(N)
    rows.check_one(name, M, N, rng, plans=(how, how), workers=workers)
    rows.check_one(name, M, N, rng, plans=(replace(how, stages=0), how), workers=workers)


@pytest.mark.parametrize("name", rows.NAMES)
@pytest.mark.parametrize(
    "M, N, how, workers",
    [
        (9, 257, plan(), 8),
        (21, 301, plan(BM=4), 2),
        (5, 1001, plan(BM=2, threads=32), 4),
        (11, 2101, plan(blocks=2), 3),
        (10, 1003, plan(blocks=8, threads=32), 8),  # the last blocks have little of a row
        (9, 1004, plan(blocks=2, stages=3), 2),  # every other row begins at a vector
        (3, 4999, plan(threads=128), 1),
    ],
)
def test_rows_that_begin_amid_vectors_are_right(hopper_executor, name, M, N, how, workers):
    """And what lies beside a row in its vectors is not part of it, nor written."""
    rng = np.random.default_rng(N)
    for kept in range(rows.NAMES.index(name) + 1 if how.BM == 1 else 1):
        forward = replace(how, kept=kept)
        rows.check_one(name, M, N, rng, plans=(forward, how), workers=workers)
    rows.check_one(name, M, N, rng, plans=(replace(how, stages=0), how), workers=workers)


def test_workers_whose_rows_do_not_begin_alike_are_refused():
    x, w, s = np.zeros((9, 301), np.float32), np.ones(301, np.float32), np.ones(9, np.float32)
    with pytest.raises(AssertionError, match="begin alike"):
        rows.rms_norm(x, w, np.zeros_like(x), s, stages=2, kept=1, workers=7)
    with pytest.raises(AssertionError, match="begin alike"):
        rows.rms_norm(x, w, np.zeros_like(x), s, stages=2, kept=1, workers=8, BM=2)
    with pytest.raises(AssertionError, match="begin alike"):
        rows.rms_norm_backward(x, w, x, s, np.zeros_like(x), np.zeros_like(w), workers=7)


@pytest.mark.parametrize("name", rows.NAMES)
def test_infinities_and_nans_stay_in_rows_that_begin_amid_vectors(hopper_executor, name):
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((2, 16, 301)).astype(np.float32)
    x[1::2, [0, -1]], dy[1::2, [0, -1]] = np.nan, np.inf
    w = np.ones(301, np.float32)
    for how in (plan(BM=2), plan(blocks=2)):
        y, mean, s = rows.forward(name, x, w, w, how, workers=8)
        assert np.isfinite(y[::2]).all()
        of = y if name == "softmax" else x
        dx, _, _ = rows.backward(name, of, w, dy, mean, s, how, workers=8)
        assert np.isfinite(dx[::2]).all()


@pytest.mark.parametrize("name", rows.NAMES)
def test_odd_rows_with_gaps_that_vectors_divide_are_right(hopper_executor, name):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((9, 408)).astype(ml_dtypes.bfloat16)[:, :401]
    w, b = (1 + 0.5 * rng.standard_normal((2, 401))).astype(ml_dtypes.bfloat16)
    wide = np.full((9, 408), 9, ml_dtypes.bfloat16)
    y, mean, s = wide[:, :401], np.zeros(9, np.float32), np.zeros(9, np.float32)
    knobs = {"threads": 64, "stages": 0}
    if name == "softmax":
        rows.softmax(x, y, **knobs)
    elif name == "rms_norm":
        rows.rms_norm(x, w, y, s, eps=rows.EPS[name], **knobs)
    else:
        rows.layer_norm(x, w, b, y, mean, s, eps=rows.EPS[name], **knobs)
    assert rows.agree(y, rows.exact_forward(name, x, w, b)) and (wide[:, 401:] == 9).all()


def test_odd_rows_with_other_gaps_are_refused():
    x = np.zeros((4, 303), np.float32)[:, :301]
    with pytest.raises(AssertionError, match="follow each other without gaps"):
        rows.softmax(x, np.zeros_like(x))


@pytest.mark.parametrize("name", rows.NAMES[1:])
@pytest.mark.parametrize("N, blocks, threads", [
    (128, 1, 64), (256, 2, 64), (200, 2, 32), (1024, 4, 128), (72, 4, 32), (1000, 8, 32),
])  # fmt: skip
@pytest.mark.parametrize("M, workers", [(1, 1), (7, 1), (2, 3), (4, 2), (23, 3), (6, 3)])
def test_rows_that_clusters_take_when_they_are_free_are_right(
    hopper_executor, name, M, workers, N, blocks, threads
):
    rng = np.random.default_rng(N)
    for stages in (1, 2):
        how = plan(threads=threads, blocks=blocks, stages=stages)
        free = replace(how, is_free=True, kept=M % 2)
        rows.check_one(name, M, N, rng, plans=(free, plan(blocks=blocks)), workers=workers)


def test_the_count_of_taken_rows_is_zero_again(hopper_executor):
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((9, 64)).astype(np.float16), np.ones(64, np.float16)
    y, s, taken = np.empty_like(x), np.empty(9, np.float32), np.zeros(1, np.int32)
    for _ in range(3):
        y.fill(np.nan)
        knobs = {"threads": 32, "blocks": 2, "stages": 2, "workers": 2}
        rows.rms_norm(x, w, y, s, taken, eps=rows.EPS["rms_norm"], **knobs)
        assert rows.agree(y, rows.exact_forward("rms_norm", x, w, w)) and taken[0] == 0


@pytest.mark.parametrize("name", rows.NAMES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_dtypes(hopper_executor, name, dtype):
    rng = np.random.default_rng(3)
    rows.check_one(name, 5, 200, rng, dtype, plans=(plan(BM=2), plan(BM=2)))
    rows.check_one(name, 3, 200, rng, dtype, plans=(plan(blocks=2), plan(blocks=2)))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", rows.NAMES)
def test_infinities_and_nans_stay_in_their_rows(hopper_executor, name, blocks):
    x = np.random.default_rng(4).standard_normal((5, 130)).astype(ml_dtypes.bfloat16)
    x[0, 3], x[1, 120], x[2, 7], x[3, :] = np.inf, np.nan, -np.inf, -np.inf
    one = np.ones(130, ml_dtypes.bfloat16)
    y, _, _ = rows.forward(name, x, one, one, plan(blocks=blocks))
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = rows.exact_forward(name, x, one, one)
    assert np.isnan(wanted[:2]).any(1).all() and np.isfinite(wanted[4]).all()
    assert rows.agree(y, wanted)


@pytest.mark.parametrize("N, blocks", [(256, 1), (257, 1), (512, 2), (256, 4), (201, 4), (203, 8)])
def test_statistics_of_layer_norm_are_exact_where_sums_of_squares_would_not_be(
    hopper_executor, N, blocks
):
    """Rows far from zero, of blocks far from each other, and with all that varies in the last
    columns, of which the last block may have few."""
    rng = np.random.default_rng(N)
    x = rng.standard_normal((4, N))
    x[0] += 1e3
    x[1] += 1e3 * (np.arange(N) * blocks // N)
    x[2] = 500
    x[2, -3:] = -1e3, 2e3, 1e4
    x = x.astype(np.float32)
    one = np.ones(N, np.float32)
    _, mean, s = rows.forward("layer_norm", x, one, one, plan(blocks=blocks))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(s, 1 / np.sqrt(wide.var(1) + rows.EPS["layer_norm"]), rtol=2e-5)


@pytest.mark.parametrize("N, blocks", [(256, 1), (512, 2), (2048, 4)])
def test_statistics_that_are_made_in_one_pass_lose_little(hopper_executor, N, blocks):
    """Rows far from zero, of blocks far from each other, and with all that varies in the first
    vector, about which squares are summed."""
    rng = np.random.default_rng(N)
    x = rng.standard_normal((5, N))
    x[0] += 1e3
    x[1] += 1e3 * (np.arange(N) * blocks // N)
    x[2] = 500
    x[2, -3:] = -1e3, 2e3, 1e4
    x[3] = 0
    x[3, :8] = 1e4
    x = x.astype(np.float32)
    one = np.ones(N, np.float32)
    how = replace(plan(blocks=blocks, threads=32), is_free=True, kept=1)
    y, mean, s = rows.forward("layer_norm", x, one, one, how, workers=2)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(s, 1 / np.sqrt(wide.var(1) + rows.EPS["layer_norm"]), rtol=1e-4)
    assert rows.agree(y, rows.exact_forward("layer_norm", x, one, one))


@pytest.mark.parametrize("name", rows.NAMES[1:])
@pytest.mark.parametrize("N, blocks, threads", [(4096, 2, 64), (2048, 16, 32)])
def test_pieces_of_several_boxes_and_the_largest_clusters_are_right(
    hopper_executor, name, N, blocks, threads
):
    rng = np.random.default_rng(N)
    for kept, stages in ((1, 2), (1 + (name == "layer_norm"), 1)):
        how = plan(threads=threads, blocks=blocks, stages=stages)
        free = replace(how, is_free=True, kept=kept)
        x, w, b = (rng.standard_normal(s).astype(np.float16) for s in ((7, N), N, N))
        y, _, _ = rows.forward(name, x, w, b, free, workers=2)
        assert rows.agree(y, rows.exact_forward(name, x, w, b))


@pytest.mark.parametrize("name", rows.NAMES)
def test_gradients_are_the_same_bits_in_every_run(hopper_executor, name):
    rng = np.random.default_rng(5)
    x, dy = (rng.standard_normal((11, 160)).astype(ml_dtypes.bfloat16) for _ in range(2))
    w = rng.standard_normal(160).astype(ml_dtypes.bfloat16)
    how = plan(blocks=2)
    y, mean, s = rows.forward(name, x, w, w, how)
    of = y if name == "softmax" else x
    runs = [rows.backward(name, of, w, dy, mean, s, how, workers=3) for _ in range(3)]
    for a, b, c in zip(*runs, strict=True):
        assert a is None or a.tobytes() == b.tobytes() == c.tobytes()


def test_what_does_not_agree():
    wanted = np.array([[1.0, np.nan, np.inf]])
    assert rows.agree(wanted.astype(np.float32), wanted)
    for wrong in ([[1.1, np.nan, np.inf]], [[1.0, 0.0, np.inf]], [[1.0, np.nan, 5.0]]):
        assert not rows.agree(np.array(wrong), wanted)
    assert rows.agree(None, None) and not rows.agree(wanted, None)


@pytest.mark.parametrize("N", [1, 7, 127, 1000, 5000, 50257, 131073, *WIDTHS])
@pytest.mark.parametrize("name", rows.NAMES)
def test_plans_hold_their_rows(name, N):
    for found in (rows_plan.forward_plan(N, name), rows_plan.backward_plan(N, name)):
        assert found.BM == 1 or found.blocks == 1
        assert found.blocks <= 16 and found.blocks * 32768 >= N and max(N, 8192) >= found.BM * N
        assert found.resident * found.threads <= 2048 and found.workers >= 1


def test_rows_that_are_too_long():
    with pytest.raises(AssertionError, match="rows of 262145 elements are too long"):
        rows_plan.forward_plan(262145, "softmax")


@pytest.mark.parametrize("N", [5120, 10240, 12288, 20000, 28672, 50304, 151936, 200000])
def test_threads_fit_rows_of_any_length(N):
    for name in rows.NAMES:
        for found in (rows_plan.forward_plan(N, name), rows_plan.backward_plan(N, name)):
            if N <= 8192 and not found.stages:  # several rows to a block, as before
                continue
            part = rows_plan.part_of(N, found.blocks, found.threads, found.is_free)
            assert part % (found.threads * rows_plan.VECTOR) == 0, "no thread has part of a vector"
            assert N <= part * found.blocks <= 1.15 * N, "few columns are none of the row's"


ODD = (65, 250, 515, 1001, 2049, 5001, 8191, 12289, 20001, 50257, 100001, 151937, 262143)


@pytest.mark.parametrize("N", [*WIDTHS, 5120, 12288, 20000, 28672, 50304, 151936, *ODD])
def test_every_width_compiles_without_spills_and_with_wide_accesses(N):
    M = (1 << 24) // N
    x, w, s = T.Tensor((M, N), "bfloat16"), T.Tensor((N,), "bfloat16"), T.Tensor((M,), "float32")
    arguments = {
        "softmax": ((x, x), (x, x, x)),
        "rms_norm": ((x, w, x, s), (x, w, x, s, x, w)),
        "layer_norm": ((x, w, w, x, s, s), (x, w, x, s, s, x, w, w)),
    }
    for name, (ahead, back) in arguments.items():
        forward, backward = rows_plan.forward_plan(N, name), rows_plan.backward_plan(N, name)
        taken = [T.Tensor((1,), "int32")] if forward.is_free else []
        made = [
            getattr(rows, name).compile(
                *ahead, *taken, target=HOPPER,
                **rows_plan.chosen(forward, N, {}, forward.kept > 0),
            ),
            getattr(rows, f"{name}_backward").compile(
                *back, target=HOPPER, **rows_plan.chosen(backward, N, {}, name != "softmax")
            ),
        ]  # fmt: skip
        for frame in (frame for kernel in made for frame in kernel.kernels):
            assert (frame.resources.spill_bytes, frame.resources.stack_bytes) == (0, 0), name
            assert "goes through shared memory" not in frame.explain(), frame.explain()
        for kernel in made:
            main = max(kernel.kernels, key=lambda frame: len(frame.ptx))
            is_short = kernel is made[0] and N % 8 and N < rows_plan.FORWARD
            assert is_short or "st.global.v4.b32" in main.ptx
            clusters = main.ptx.count("st.async.shared::cluster")
            assert bool(clusters) == ("reqnctapercluster" in main.ptx)


@pytest.mark.parametrize("M, N", [(65536, 50257), (3_000_001, 1001)])
def test_more_than_2_31_elements_have_wide_accesses_too(M, N):
    x, w, s = T.Tensor((M, N), "bfloat16"), T.Tensor((N,), "bfloat16"), T.Tensor((M,), "float32")
    plan = rows_plan.forward_plan(N, "softmax")
    (softmax,) = rows.softmax.compile(x, x, target=HOPPER, **plan.options).kernels
    assert "ld.global.nc.v4.b32" in softmax.ptx and "st.global.v4.b32" in softmax.ptx
    knobs = rows_plan.chosen(rows_plan.backward_plan(N, "rms_norm"), N, {})
    _, main, _ = rows.rms_norm_backward.compile(x, w, x, s, x, w, target=HOPPER, **knobs).kernels
    assert "st.global.v4.b32" in main.ptx and "cp.async.cg" in main.ptx
