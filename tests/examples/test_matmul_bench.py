"""What the matmul benchmark knows without a GPU: cases, bounds, records, tables, options."""

from __future__ import annotations

import json

import bench_report
import bench_run
import matmul_bench as bench
import matmul_cases
import ml_dtypes
import numpy as np
import pytest
import roofline
from matmul_cases import Case


def outcome(case: Case, **ms: float) -> bench_report.Outcome:
    found = {who: bench_report.Measured(who, "its best", [time]) for who, time in ms.items()}
    return bench_report.Outcome(case, "cublas", found)


def test_real_shapes_are_32_products_of_language_models():
    real = matmul_cases.shapes([], real=True)
    assert len(real) == len(set(real)) == 32
    assert (16, 6144, 4096) in real
    assert (8192, 8192, 28672) in real
    assert matmul_cases.shapes([64], real=False) == [(64, 64, 64)]


def test_cases_leave_out_8_bit_operands_that_cublas_cannot_multiply():
    found = matmul_cases.cases([(4, 5, 6)], ["bfloat16", "int8"], ["nn", "nt"])
    assert [str(case) for case in found] == [
        "4x5x6 bfloat16 nn", "4x5x6 bfloat16 nt", "4x5x6 int8 nt",
    ]  # fmt: skip


def test_case_counts_operations_and_the_least_bytes():
    case = Case(2, 3, 5, "float8_e4m3fn", "nt")
    assert (case.flops, case.bytes) == (60, 10 + 15 + 2 * 6)
    assert Case(2, 3, 5, "tfloat32", "nn").bytes == 4 * (10 + 15 + 6)


def test_error_bound_explains_rounding_and_no_lost_tile():
    K, rng = 4096, np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((64, K), (K, 64)))
    a, b = a.astype(np.float64), b.astype(np.float64)
    exact = a @ b
    bound = matmul_cases.error_bound("bfloat16", np.abs(exact), np.abs(a) @ np.abs(b))
    assert (np.abs(exact.astype(ml_dtypes.bfloat16) - exact) <= bound).all()
    lost = np.abs(a[:, :-64] @ b[:-64] - exact)
    assert (lost > bound).mean() > 0.8


def test_error_bound_of_integers_is_less_than_one():
    assert matmul_cases.error_bound("int8", 1e6, 1e6) == 0.5


def test_row_shows_rate_ratio_notes_and_configuration():
    found = outcome(Case(1000, 1000, 1000, "bfloat16", "nt"), tilejit=0.004, cublas=0.002)
    found.notes.append("triton is left out: no such thing")
    lines = bench_report.row(
        found, ["tilejit", "cublas", "triton"], detailed=["tilejit"]
    ).splitlines()
    assert lines[0].split() == [
        "1000x1000x1000", "bfloat16", "nt", "500.0", "0.500", "1000.0", "1.000", "-",
    ]  # fmt: skip
    assert lines[1:3] == [
        "    triton is left out: no such thing",
        "    tilejit: its best, 0.0040 ms",
    ]
    assert len(lines) == 3


def test_row_without_cublas_has_no_ratio():
    found = outcome(Case(16, 16, 16, "int8", "nt"), tilejit=1.0)
    assert bench_report.row(found, ["tilejit"], detailed=[]).split()[-1] == "-"
    assert bench_report.records([found])[0]["ratio"] is None


def test_heading_and_rows_are_as_wide():
    who = ["tilejit", *bench.PEERS]
    case = Case(16384, 16384, 16384, "float8_e4m3fn", "nt")
    row = bench_report.row(outcome(case, tilejit=5.0, cublas=6.0, tilelang=7.0), who, detailed=[])
    assert (
        len(
            {
                len(line)
                for line in [row, *bench_report.heading(bench.BENCH.title, who).splitlines()]
            }
        )
        == 1
    )


def test_summary_has_means_for_each_dtype_and_layout():
    fast = outcome(Case(64, 64, 64, "bfloat16", "nn"), tilejit=1.0, cublas=4.0)
    slow = outcome(Case(128, 64, 64, "bfloat16", "nn"), tilejit=4.0, cublas=1.0)
    alone = outcome(Case(64, 64, 64, "int8", "nt"), tilejit=1.0)
    lines = bench_report.summary([fast, slow, alone], ["tilejit", "cublas"]).splitlines()
    assert lines[1].split() == ["bfloat16", "nn", "1.000", "of", "2", "1.000", "of", "2"]
    assert lines[2].split() == ["int8", "nt", "-", "-"]


def test_records_can_be_written_as_json():
    found = outcome(Case(64, 64, 64, "bfloat16", "nn"), tilejit=1.0, cublas=4.0)
    record = json.loads(json.dumps(bench_report.records([found])))[0]
    assert (record["who"], record["M"], record["ratio"]) == ("tilejit", 64, 4.0)
    assert record["intensity"] == pytest.approx(2 * 64**3 / (3 * 2 * 64**2))


def test_options_have_defaults():
    options = bench.parse([])
    assert options.sizes == [2048, 4096, 8192, 16384]
    assert (options.dtypes, options.layouts) == (["bfloat16"], ["nn", "nt"])
    assert (options.peers, options.real, options.timer) == (["cublas"], False, None)


def test_real_shapes_replace_squares_unless_sizes_are_given():
    assert bench.parse(["--shapes", "real"]).sizes == []
    assert bench.parse(["--shapes", "real", "--sizes", "64,128"]).sizes == [64, 128]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtypes", "float12"], "'float12' is not one of bfloat16, float16, tfloat32"),
        (["--sizes", "many"], "'many' is no list of integers"),
        (["--sizes", "0"], "integers here are positive"),
    ],
)
def test_wrong_option_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(words)
    assert message in capsys.readouterr().err


def test_peer_that_does_not_import_is_reported():
    found, notes = bench_run.load_peers(bench.BENCH, ["nobody"])
    assert list(found) == ["tilejit"]
    assert notes == [
        "nobody is left out: ModuleNotFoundError: No module named 'peers.matmul_nobody'"
    ]


def test_tilejit_takes_part_with_one_candidate_that_nobody_tuned():
    class Nothing:
        case = Case(64, 64, 64, "bfloat16", "nt")
        a = b = c = None

    names = [name for name, _ in bench.tilejit_candidates(Nothing(), quick=False)]
    assert names == ["T.auto"]


def test_ceiling_is_memory_first_and_tensor_cores_then():
    peak = roofline.tensor_peak("NVIDIA H100 80GB HBM3", "bfloat16")
    assert peak == 989.4
    assert roofline.ceiling(10, 3.0, peak) == 30
    assert roofline.ceiling(1000, 3.0, peak) == peak
    assert roofline.ceiling(1000, 3.0, roofline.tensor_peak("another", "int8")) == 3000


def test_picture_without_points_is_none(tmp_path):
    said = roofline.draw(str(tmp_path / "p.png"), [], "another", 1.0)
    assert said.startswith("No picture: ")
