"""Results that leave while the block multiplies its next tile: the numbers are the same, and what
must not wait does not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from products import FLOAT32_STEP, FP8_STEP, assert_near, assert_product, explained, operand, stored

import tilejit.language as T
from tilejit import tilejit
from tilejit.passes import late
from tilejit.runtime import frame

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
WAITS = "while the next tile is multiplied"


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    """Results of blocks that compute a few tiles wait too."""
    monkeypatch.setattr(late, "FEWEST_TILES", 0)


def waits(kernel, *arguments, **constants):
    return WAITS in explained(kernel, *arguments, **constants)


@tilejit
def matmul(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *,
    BM=128, BN=128, BK=32, stages=None, threads=256, tA=False, tB=False, accum="float32",
    cluster=None, panel=0, order="row", split=None, kept=0,
):  # fmt: skip
    """kept: bytes of shared memory that something else has."""
    M, N = C.shape
    K = A.shape[0] if tA else A.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads, cluster=cluster) as (bx, by):
        if panel:
            T.use_swizzle(panel, order)
        a = T.alloc_shared((BK, BM) if tA else (BM, BK), A.dtype)
        b = T.alloc_shared((BN, BK) if tB else (BK, BN), B.dtype)
        acc = T.alloc_fragment((BM, BN), accum)
        if kept:
            other = T.alloc_shared((kept,), "uint8")
            T.clear(other)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages, split=split):
            if tA:
                T.copy(A[k * BK, by * BM], a)
            else:
                T.copy(A[by * BM, k * BK], a)
            if tB:
                T.copy(B[bx * BN, k * BK], b)
            else:
                T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc, transpose_A=tA, transpose_B=tB)
        T.copy(acc, C[by * BM, bx * BN])


def check(
    hopper, rng, size, *, is_late=True, dtype=BF16, out=BF16, tA=False, tB=False, **constants
):
    M, N, K = size
    a, b = operand(rng, (M, K), dtype), operand(rng, (K, N), dtype)
    arrays = stored(a, tA), stored(b, tB)
    c = hopper(matmul, *arrays, out=[((M, N), out)], tA=tA, tB=tB, **constants)
    assert_product(c, a, b, accum=constants.get("accum", "float32"))
    assert waits(matmul, *arrays, c, tA=tA, tB=tB, **constants) == is_late


# ---- tiles, loops and rings ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("threads, BM", [(128, 64), (256, 128), (384, 192)], ids=str)
def test_results_of_any_layout_are_right(hopper, rng, layout, threads, BM):
    tA, tB = (side == "t" for side in layout)
    size = (2 * BM + 40, 328, 136)
    check(hopper, rng, size, tA=tA, tB=tB, BM=BM, threads=threads)


@pytest.mark.parametrize(
    "size", [(8, 8, 64), (136, 264, 72), (129, 136, 104), (520, 72, 200)], ids=str
)
def test_ragged_results_are_right(hopper, rng, size):
    check(hopper, rng, size)


@pytest.mark.parametrize("tiles", range(1, 8))
@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_of_any_number_of_tiles_are_right(hopper, rng, monkeypatch, tiles, blocks):
    monkeypatch.setattr(frame, "SIMULATED_BLOCKS", blocks)
    check(hopper, rng, (128 * tiles, 128, 64))


# columns: 64 are a strip
@pytest.mark.parametrize("stages", [None, 2, 3, 5])
@pytest.mark.parametrize("columns, trips", [
    (64, 1), (64, 2), (128, 2), (128, 3), (192, 3), (192, 4), (256, 4), (256, 5), (256, 9),
])  # fmt: skip
def test_loops_of_as_many_iterations_as_strips_or_more_are_right(
    hopper, rng, columns, trips, stages
):
    check(hopper, rng, (384, 2 * columns, 32 * trips), BN=columns, stages=stages)


@pytest.mark.parametrize("columns, trips", [(128, 1), (192, 2), (256, 3)])
def test_results_do_not_wait_for_fewer_iterations_than_strips(hopper, rng, columns, trips):
    check(hopper, rng, (384, columns, 32 * trips), BN=columns, is_late=False)


def test_results_do_not_wait_for_a_loop_without_iterations(hopper):
    a, b = np.zeros((256, 0), BF16), np.zeros((0, 128), BF16)
    c = hopper(matmul, a, b, out=[((256, 128), BF16)])
    assert (c == 0).all()
    assert not waits(matmul, a, b, c)


@pytest.mark.parametrize("kept", [0, 140_000, 160_000, 170_000, 178_000])
@pytest.mark.parametrize("columns", [64, 128, 192, 256])
def test_strips_have_the_slots_that_are_left(hopper, rng, columns, kept):
    size = (384, 2 * columns, 160)
    a, b = operand(rng, (384, 160), BF16), operand(rng, (160, 2 * columns), BF16)
    c = hopper(matmul, a, b, out=[((384, 2 * columns), BF16)], BN=columns, kept=kept, stages=2)
    assert_product(c, a, b)
    plan = matmul.compile(a, b, c, target="sm_90a", BN=columns, kept=kept, stages=2)
    assert ("by TMA, through strips" not in plan.explain()) or WAITS in plan.explain(), size


def test_a_single_slot_is_written_when_it_was_read(hopper, rng):
    check(hopper, rng, (384, 384, 160), BN=192, kept=165_000, stages=2)
    spec = T.Tensor((384, 160), BF16), T.Tensor((160, 384), BF16), T.Tensor((384, 384), BF16)
    kernel = matmul.compile(*spec, target="sm_90a", BN=192, kept=165_000, stages=2).kernels[0]
    strips = next(b for b in kernel.planned.slots if b.name == "C_strips")
    assert strips.extents[0] == 1


@pytest.mark.parametrize("BM, BN, threads", [(256, 64, 256), (256, 128, 256), (128, 128, 128)])
def test_several_rows_of_instructions_are_right(hopper, rng, BM, BN, threads):
    check(hopper, rng, (2 * BM + 8, 3 * BN, 160), BM=BM, BN=BN, threads=threads)


@pytest.mark.parametrize("panel, order", [(2, "row"), (3, "column")])
def test_panels_are_right(hopper, rng, panel, order):
    check(hopper, rng, (640, 392, 64), panel=panel, order=order)


@pytest.mark.parametrize("cluster", [2, (1, 2), (1, 4)], ids=str)
def test_clusters_are_right(hopper, rng, cluster):
    check(hopper, rng, (512, 512, 96), BM=128, BN=64, cluster=cluster)


@pytest.mark.parametrize("size", [(256, 128, 64), (512, 256, 128), (130, 520, 72)], ids=str)
def test_split_loops_store_at_once(hopper, rng, size):
    check(hopper, rng, size, split=2, is_late=False)


def test_few_tiles_store_at_once(monkeypatch):
    monkeypatch.undo()
    spec = T.Tensor((1024, 1024), "bfloat16")
    assert not waits(matmul, spec, spec, spec)
    spec = T.Tensor((4096, 4096), "bfloat16")
    assert waits(matmul, spec, spec, spec, BK=64)


# ---- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_results_of_any_dtype_are_right(hopper, rng, out):
    check(hopper, rng, (264, 272, 128), out=out)


@pytest.mark.parametrize("out", ["int8", "float32", "int16"])
def test_integer_products_are_right(hopper, rng, out):
    check(hopper, rng, (264, 272, 128), dtype=np.int8, out=out, accum="int32", tB=True,
          is_late=out != "int32")  # fmt: skip


@pytest.mark.parametrize("dtype, accum", [(BF16, "float32"), (np.int8, "int32")], ids=str)
def test_sums_that_are_not_converted_leave_at_once(hopper, rng, dtype, accum):
    check(hopper, rng, (264, 264, 256), dtype=dtype, out=accum, accum=accum, tB=True, is_late=False)


def test_sums_of_float16_leave_at_once(hopper, rng):
    a, b = operand(rng, (264, 128), np.float16), operand(rng, (128, 264), np.float16)
    c = hopper(matmul, a, b, out=[((264, 264), "float16")], accum="float16")
    assert_product(c, a, b, accum="float16")
    assert not waits(matmul, a, b, c, accum="float16")


@tilejit
def two_level(A: T.Tensor, B: T.Tensor, C: T.Tensor, scale: T.float32):
    M, K = A.shape
    N = B.shape[0]
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 128), threads=256) as (bx, by):
        a = T.alloc_shared((128, 64), A.dtype)
        b = T.alloc_shared((64, 64), B.dtype)
        part = T.alloc_fragment((128, 64), "float32")
        acc = T.alloc_fragment((128, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 64)):
            T.copy(A[by * 128, k * 64], a)
            T.copy(B[bx * 64, k * 64], b)
            T.gemm(a, b, part, transpose_B=True, clear_accum=True)
            for i, j in T.Parallel(128, 64):
                acc[i, j] += part[i, j]
        for i, j in T.Parallel(128, 64):
            acc[i, j] *= scale
        T.copy(acc, C[by * 128, bx * 64])


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_sums_of_blocks_of_fp8_are_right(hopper, rng, out):
    a, b = operand(rng, (392, 208), E4M3), operand(rng, (144, 208), E4M3)
    scale = np.float32(0.25)
    c = hopper(lambda A, B, C: two_level(A, B, C, scale), a, b, out=[((392, 144), out)])
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64).T
    error = (64 * FP8_STEP + 208 * FLOAT32_STEP) / 4
    assert_near(c, wide_a @ wide_b / 4, error * (np.abs(wide_a) @ np.abs(wide_b)))
    assert waits(two_level, a, b, c, scale)


# ---- epilogues ----------------------------------------------------------------------------------


@tilejit
def fused(A: T.Tensor, B: T.Tensor, E: T.Tensor, row: T.Tensor, C: T.Tensor, *, kind, threads=256):
    M, K = A.shape
    N = C.shape[1]
    BM = threads // 2
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((BM, 64), "float32")
        count = T.alloc_fragment((BM,), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * BM, k * 32], a)
            T.copy(B[k * 32, bx * 64], b)
            T.gemm(a, b, acc)
            if kind == "counted":  # work between a multiply and the wait for it
                for i in T.Parallel(BM):
                    count[i] = k + 1
        if kind == "bias":
            for i, j in T.Parallel(BM, 64):
                acc[i, j] += row[bx * 64 + j]
        elif kind == "bias tile":
            held = T.alloc_shared((64,), row.dtype)
            T.copy(row[bx * 64], held)
            for i, j in T.Parallel(BM, 64):
                acc[i, j] += held[j]
        elif kind == "relu":
            for i, j in T.Parallel(BM, 64):
                acc[i, j] = T.max(acc[i, j], 0)
        elif kind == "residual":
            for i, j in T.Parallel(BM, 64):
                acc[i, j] += E[by * BM + i, bx * 64 + j]
        elif kind == "residual tile":
            tile = T.alloc_shared((BM, 64), E.dtype)
            T.copy(E[by * BM, bx * 64], tile)
            for i, j in T.Parallel(BM, 64):
                acc[i, j] += tile[i, j]
        elif kind == "counted":
            for i, j in T.Parallel(BM, 64):
                acc[i, j] *= count[i]
        elif kind == "gelu":
            for i, j in T.Parallel(BM, 64):
                acc[i, j] = acc[i, j] * (0.5 + 0.5 * T.erf(acc[i, j] * 0.70710678))
        if kind == "cast":
            out = T.alloc_fragment((BM, 64), C.dtype)
            for i, j in T.Parallel(BM, 64):
                out[i, j] = acc[i, j]
            T.copy(out, C[by * BM, bx * 64])
        elif kind == "copied":
            out = T.alloc_fragment((BM, 64), C.dtype)
            T.copy(acc, out)
            T.copy(out, C[by * BM, bx * 64])
        else:
            T.copy(acc, C[by * BM, bx * 64])


KINDS = [
    "bias",
    "bias tile",
    "relu",
    "residual",
    "residual tile",
    "counted",
    "gelu",
    "cast",
    "copied",
]


@pytest.mark.parametrize("threads", [128, 256, 384])
@pytest.mark.parametrize("kind", KINDS)
def test_epilogues_are_right(hopper, rng, kind, threads):
    M, N, K = 3 * threads // 2 + 16, 136, 80
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    e, row = operand(rng, (M, N), BF16), operand(rng, (N,), np.float32)
    c = hopper(fused, a, b, e, row, out=[((M, N), BF16)], kind=kind, threads=threads)
    wide_a, wide_b, wide_e = (x.astype(np.float64) for x in (a, b, e))
    exact, sizes = wide_a @ wide_b, np.abs(wide_a) @ np.abs(wide_b)
    if kind.startswith("bias"):
        exact += row
    elif kind == "relu":
        exact = np.maximum(exact, 0)
    elif kind.startswith("residual"):
        exact += wide_e
    elif kind == "counted":
        exact, sizes = 3 * exact, 3 * sizes
    elif kind == "gelu":
        exact = exact * (0.5 + 0.5 * np.vectorize(__import__("math").erf)(exact * 0.5**0.5))
    assert_near(c, exact, 100 * FLOAT32_STEP * (sizes + np.abs(exact) + 1))
    assert waits(fused, a, b, e, row, c, kind=kind, threads=threads) == (kind != "gelu")


@tilejit
def two_outputs(A: T.Tensor, B: T.Tensor, C: T.Tensor, D: T.Tensor):
    M, K = A.shape
    N = C.shape[1]
    with T.Kernel(T.ceildiv(N, 128), T.ceildiv(M, 128), threads=256) as (bx, by):
        a = T.alloc_shared((128, 32), A.dtype)
        b = T.alloc_shared((32, 128), B.dtype)
        acc = T.alloc_fragment((128, 128), "float32")
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * 128, k * 32], a)
            T.copy(B[k * 32, bx * 128], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[by * 128, bx * 128])
        for i, j in T.Parallel(128, 128):
            acc[i, j] *= 2
        T.copy(acc, D[by * 128, bx * 128])


@pytest.mark.parametrize("out", [(BF16, BF16), (np.float32, BF16), (BF16, np.float16)], ids=str)
def test_only_the_last_of_two_outputs_waits(hopper, rng, out):
    a, b = operand(rng, (392, 96), BF16), operand(rng, (96, 264), BF16)
    c, d = hopper(two_outputs, a, b, out=[((392, 264), kind) for kind in out])
    assert_product(c, a, b)
    assert_product(d, a, (2 * b.astype(np.float32)).astype(BF16))
    text = explained(two_outputs, a, b, c, d)
    (line,) = (line for line in text.splitlines() if WAITS in line)
    assert "acc -> D" in line
    assert text.count("by TMA, through strips") == 2


@tilejit
def pair(
    A: T.Tensor, B: T.Tensor, E: T.Tensor, C: T.Tensor, D: T.Tensor, *, BM, threads, is_swapped
):
    """C = A @ B and D = A @ E, whose tiles are of 192 and 128 columns."""
    M, K = A.shape
    with T.Kernel(T.ceildiv(C.shape[1], 192), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, 32), A.dtype)
        b = T.alloc_shared((32, 192), B.dtype)
        e = T.alloc_shared((32, 128), B.dtype)
        wide = T.alloc_fragment((BM, 192), "float32")
        slim = T.alloc_fragment((BM, 128), "float32")
        T.clear(wide)
        T.clear(slim)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * BM, k * 32], a)
            T.copy(B[k * 32, bx * 192], b)
            T.copy(E[k * 32, bx * 128], e)
            T.gemm(a, b, wide)
            T.gemm(a, e, slim)
        if is_swapped:
            T.copy(wide, C[by * BM, bx * 192])
            T.copy(slim, D[by * BM, bx * 128])
        else:
            T.copy(slim, D[by * BM, bx * 128])
            T.copy(wide, C[by * BM, bx * 192])


@pytest.mark.parametrize("least", [0, 10**6], ids=["late", "at once"])
@pytest.mark.parametrize("threads, BM", [(128, 64), (256, 128)])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_outputs_of_unequal_strips_share_their_slots(
    hopper, rng, monkeypatch, threads, BM, is_swapped, least
):
    """After three strips in two slots the next one's first slot is still being read."""
    monkeypatch.setattr(late, "FEWEST_TILES", least)
    N = 376 if least else 384  # compiled anew
    a, b, e = (operand(rng, s, BF16) for s in ((5 * BM, 128), (128, N), (128, 256)))
    out = [((5 * BM, N), BF16), ((5 * BM, 256), BF16)]
    constants = {"threads": threads, "BM": BM, "is_swapped": is_swapped}
    c, d = hopper(pair, a, b, e, out=out, **constants)
    assert_product(c, a, b)
    assert_product(d, a, e)
    assert explained(pair, a, b, e, c, d, **constants).count("by TMA, through strips") == 2


@tilejit
def two_loops(A: T.Tensor, B: T.Tensor, E: T.Tensor, C: T.Tensor, D: T.Tensor, *, BN):
    """C = A @ B.T, then D = A @ E.T: the first could leave row by row, the second waits."""
    M, K = A.shape
    with T.Kernel(T.ceildiv(C.shape[1], BN), T.ceildiv(M, 256), threads=256) as (bx, by):
        a, other = (T.alloc_shared((256, 32), A.dtype) for _ in range(2))
        b, e = (T.alloc_shared((BN, 32), A.dtype) for _ in range(2))
        x, y = (T.alloc_fragment((256, BN), "float32") for _ in range(2))
        T.clear(x)
        T.clear(y)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * 256, k * 32], a)
            T.copy(B[bx * BN, k * 32], b)
            T.gemm(a, b, x, transpose_B=True)
        T.copy(x, C[by * 256, bx * BN])
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * 256, k * 32], other)
            T.copy(E[bx * BN, k * 32], e)
            T.gemm(other, e, y, transpose_B=True)
        T.copy(y, D[by * 256, bx * BN])


@pytest.mark.parametrize("trips", range(1, 8))
@pytest.mark.parametrize("BN", [32, 40])
def test_a_loop_has_either_waiting_results_or_rows_in_turn(hopper, rng, BN, trips):
    """Both together would need more iterations than there are."""
    K = 32 * trips
    a, b, e = (operand(rng, s, BF16) for s in ((768, K), (2 * BN, K), (2 * BN, K)))
    out = [((768, 2 * BN), BF16)] * 2
    c, d = hopper(two_loops, a, b, e, out=out, BN=BN)
    assert_product(c, a, b.T)
    assert_product(d, a, e.T)
    strips = 2 * len(late.strip_widths(BN, 2))
    assert waits(two_loops, a, b, e, c, d, BN=BN) == (trips >= strips)


# ---- where a tile goes --------------------------------------------------------------------------


@tilejit
def placed(A: T.Tensor, B: T.Tensor, rows: T.Tensor, C: T.Tensor, start: T.int32, *, kind):
    """C = A @ B, whose rows of tiles lie as `kind` says."""
    M, K = A.shape
    N = B.shape[1]
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 128), threads=256) as (bx, by):
        a = T.alloc_shared((128, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((128, 64), "float32")
        if kind == "start":  # which may be negative
            row = by * 128 + start
        elif kind == "bounded":
            row = by * 128 + T.max(start, 0)
        elif kind == "reversed":
            row = (T.ceildiv(M, 128) - 1 - by) * 128
        elif kind == "variable":
            row = T.alloc_var("int32", init=by * 128 + start)
        elif kind == "table":
            row = rows[by]
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * 128, k * 32], a)
            T.copy(B[k * 32, bx * 64], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[row, bx * 64])


@pytest.mark.parametrize(
    "kind, is_late",
    [
        ("start", False),
        ("bounded", True),
        ("reversed", True),
        ("variable", False),
        ("table", False),
    ],
)
def test_tiles_lie_where_the_program_says(hopper, rng, kind, is_late):
    a, b = operand(rng, (512, 96), BF16), operand(rng, (96, 200), BF16)
    rows = np.array([384, 0, 256, 128], np.int32)
    start = np.int32(8 if kind in ("start", "bounded", "variable") else 0)

    def kernel(A, B, rows, C):
        placed(A, B, rows, C, start, kind=kind)

    c = hopper(kernel, a, b, rows, out=[((512 + start, 200), BF16)])
    order = {"table": rows // 128, "reversed": np.arange(4)[::-1]}.get(kind, np.arange(4))
    for tile, at in enumerate(order):
        first = at * 128 + start
        assert_product(c[first : first + 128], a[tile * 128 : tile * 128 + 128], b)
    assert waits(placed, a, b, rows, c, start, kind=kind) == is_late


@tilejit
def batched(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, heads_first):
    if heads_first:
        heads, M, K = A.shape
    else:
        M, heads, K = A.shape
    N = C.shape[2]
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 128), heads, threads=256) as (bx, by, h):
        a = T.alloc_shared((128, 32), A.dtype)
        b = T.alloc_shared((64, 32), B.dtype)
        acc = T.alloc_fragment((128, 64), "float32")
        m, n = by * 128, bx * 64
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            if heads_first:
                T.copy(A[h, m : m + 128, k * 32 : k * 32 + 32], a)
                T.copy(B[h, n : n + 64, k * 32 : k * 32 + 32], b)
            else:
                T.copy(A[m : m + 128, h, k * 32 : k * 32 + 32], a)
                T.copy(B[n : n + 64, h, k * 32 : k * 32 + 32], b)
            T.gemm(a, b, acc, transpose_B=True)
        if heads_first:
            T.copy(acc, C[h, m : m + 128, n : n + 64])
        else:
            T.copy(acc, C[m : m + 128, h, n : n + 64])


@pytest.mark.parametrize("heads_first", [True, False])
def test_batches_are_right(hopper, rng, heads_first):
    a, b = operand(rng, (3, 200, 72), BF16), operand(rng, (3, 136, 72), BF16)
    shape = (3, 200, 136)
    if not heads_first:
        a, b, shape = a.swapaxes(0, 1).copy(), b.swapaxes(0, 1).copy(), (200, 3, 136)
    c = hopper(batched, a, b, out=[(shape, BF16)], heads_first=heads_first)
    for h in range(3):
        at = h if heads_first else (slice(None), h)
        assert_product(c[at], a[at], b[at].T)
    assert waits(batched, a, b, c, heads_first=heads_first)


def sized(M, K):
    @tilejit
    def kernel(A: T.Tensor((M, K), BF16), B: T.Tensor((K, 136), BF16), C: T.Tensor((M, 136), BF16)):
        M, K = A.shape
        with T.Kernel(T.ceildiv(136, 64), T.ceildiv(M, 128), threads=256) as (bx, by):
            a = T.alloc_shared((128, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((128, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(K, 32)):
                T.copy(A[by * 128, k * 32], a)
                T.copy(B[k * 32, bx * 64], b)
                T.gemm(a, b, acc)
            T.copy(acc, C[by * 128, bx * 64])

    return kernel


@pytest.mark.parametrize("rows", [1, 128, 130, 700])
def test_number_of_rows_may_be_the_calls(hopper, rng, rows):
    kernel = sized(T.dynamic("M"), 104)
    a, b = operand(rng, (rows, 104), BF16), operand(rng, (104, 136), BF16)
    c = hopper(kernel, a, b, out=[((rows, 136), BF16)])
    assert_product(c, a, b)
    assert waits(kernel, a, b, c)


def test_results_do_not_wait_for_a_number_of_iterations_that_the_call_decides(hopper, rng):
    kernel = sized(T.dynamic("M"), T.dynamic("K"))
    a, b = operand(rng, (400, 104), BF16), operand(rng, (104, 136), BF16)
    c = hopper(kernel, a, b, out=[((400, 136), BF16)])
    assert_product(c, a, b)
    assert not waits(kernel, a, b, c)


# ---- loops --------------------------------------------------------------------------------------


@tilejit
def looped(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, kind, threads=256):
    M, K = A.shape
    N = C.shape[1]
    BM = threads // 2
    with T.Kernel(T.ceildiv(N, 128), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, 32), A.dtype)
        b = T.alloc_shared((32, 128), B.dtype)
        x = T.alloc_shared((BM, 32), A.dtype)
        y = T.alloc_shared((32, 128), B.dtype)
        left = T.alloc_fragment((BM, 32), A.dtype)
        acc = T.alloc_fragment((BM, 128), "float32")

        def step(k, a=a, b=b):
            T.copy(A[by * BM, k], a)
            T.copy(B[k, bx * 128], b)
            T.gemm(a, b, acc)

        T.clear(acc)
        if kind == "from one":
            step(0, x, y)
            for k in T.Pipelined(1, K // 32):
                step(k * 32)
        elif kind == "step":
            for k in T.serial(0, K, 32):
                step(k)
        elif kind == "backwards":
            for k in T.serial(K // 32 - 1, -1, -1):
                step(k * 32)
        elif kind == "unroll":
            for k in T.unroll(K // 32):
                step(k * 32)
        elif kind == "two loops":
            for k in T.Pipelined(2):
                step(k * 32)
            for k in T.Pipelined(2, K // 32):
                step(k * 32, x, y)
        elif kind == "short loop first":
            for k in T.Pipelined(1):
                step(k * 32)
            for k in T.Pipelined(1, K // 32):
                step(k * 32, x, y)
        elif kind == "two multiplies":
            for k in T.Pipelined(K // 64):
                step(k * 64)
                step(k * 64 + 32, x, y)
        elif kind == "both together":
            for k in T.Pipelined(K // 64):
                T.copy(A[by * BM, k * 64], a)
                T.copy(B[k * 64, bx * 128], b)
                T.copy(A[by * BM, k * 64 + 32], x)
                T.copy(B[k * 64 + 32, bx * 128], y)
                T.gemm(a, b, acc)
                T.gemm(x, y, acc)
        elif kind == "registers":
            for k in T.Pipelined(K // 32):
                T.copy(A[by * BM, k * 32], a)
                T.copy(B[k * 32, bx * 128], b)
                T.copy(a, left)
                T.gemm(left, b, acc)
        elif kind == "copies after":
            T.copy(A[by * BM, 0], a)
            T.copy(B[0, bx * 128], b)
            for k in T.Pipelined(K // 32, num_stages=2):
                T.gemm(a, b, acc)
                T.copy(A[by * BM, k * 32 + 32], a)
                T.copy(B[k * 32 + 32, bx * 128], b)
        elif kind == "nested":
            for k in T.serial(K // 64):
                for h in T.Pipelined(2):
                    step(k * 64 + h * 32)
        elif kind == "branch in the loop":
            for k in T.Pipelined(K // 32):
                T.copy(A[by * BM, k * 32], a)
                T.copy(B[k * 32, bx * 128], b)
                with T.If(k >= 0):
                    T.gemm(a, b, acc)
        elif kind == "branch before":
            with T.If(by % 2 == 1):
                for i, j in T.Parallel(BM, 128):
                    acc[i, j] = 0 * by
            for k in T.Pipelined(K // 32):
                step(k * 32)
        elif kind == "loop in a branch":
            with T.If(bx >= 0):
                for k in T.Pipelined(K // 32):
                    step(k * 32)
        elif kind == "triangle":
            for k in T.Pipelined(T.max(K // 32, by)):
                step(k * 32)
        T.copy(acc, C[by * BM, bx * 128])


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize(
    "kind, is_late",
    [
        ("from one", True),
        ("step", False),
        ("backwards", False),
        ("unroll", False),
        ("two loops", True),
        ("short loop first", False),
        ("two multiplies", True),
        ("both together", True),
        ("registers", False),
        ("copies after", False),
        ("nested", False),
        ("branch in the loop", False),
        ("branch before", True),
        ("loop in a branch", False),
        ("triangle", False),
    ],
)
def test_loops_of_any_kind_are_right(hopper, rng, kind, is_late, threads):
    M, N, K = 3 * threads // 2 + 8, 264, 192
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    c = hopper(looped, a, b, out=[((M, N), BF16)], kind=kind, threads=threads)
    assert_product(c, a, b)
    assert waits(looped, a, b, c, kind=kind, threads=threads) == is_late


# ---- what comes before and after the copy -------------------------------------------------------


@tilejit
def around(A: T.Tensor, B: T.Tensor, E: T.Tensor, C: T.Tensor, sums: T.Tensor, *, kind, threads):
    M, K = A.shape
    N = C.shape[1]
    BM = threads // 2
    with T.Kernel(T.ceildiv(N, 128), T.ceildiv(M, BM), threads=threads) as (bx, by):
        a = T.alloc_shared((BM, 32), A.dtype)
        b = T.alloc_shared((32, 128), B.dtype)
        acc = T.alloc_fragment((BM, 128), "float32")
        if kind == "written before":
            for i, j in T.Parallel(BM, 128):
                C[by * BM + i, bx * 128 + j] = 7.0
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, 32)):
            T.copy(A[by * BM, k * 32], a)
            T.copy(B[k * 32, bx * 128], b)
            T.gemm(a, b, acc)
        if kind == "sent before":
            T.copy(acc, C[by * BM, bx * 128])
            for i, j in T.Parallel(BM, 128):
                acc[i, j] *= 2
        elif kind == "read":
            for i, j in T.Parallel(BM, 128):
                acc[i, j] += C[by * BM + i, bx * 128 + j]
        elif kind == "read upside down":
            for i, j in T.Parallel(BM, 128):
                acc[i, j] += C[by * BM + BM - 1 - i, bx * 128 + j]
        elif kind == "residual":
            for i, j in T.Parallel(BM, 128):
                acc[i, j] += E[by * BM + i, bx * 128 + j]
        elif kind == "residual upside down":
            for i, j in T.Parallel(BM, 128):
                acc[i, j] += E[by * BM + BM - 1 - i, bx * 128 + j]
        elif kind == "counted before":
            T.atomic_add(sums[0], 1.0)
        if kind == "branch":
            with T.If(by >= 0):
                T.copy(acc, C[by * BM, bx * 128])
        else:
            T.copy(acc, C[by * BM, bx * 128])
        if kind == "stored after":
            for i in T.Parallel(BM):
                sums[bx * M + by * BM + i] = 1.0
        elif kind == "counted after":
            T.atomic_add(sums[0], 1.0)


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize(
    "kind, is_late, is_sent",
    [
        ("written before", False, False),
        ("sent before", False, True),
        ("read", False, True),
        ("read upside down", False, True),
        ("residual", True, True),
        ("counted before", True, True),
        ("branch", False, True),
        ("stored after", False, True),
        ("counted after", False, True),
    ],
)
def test_only_what_nothing_else_needs_waits(hopper, rng, kind, is_late, is_sent, threads):
    M, N, K = 3 * threads // 2, 256, 96
    a, b = operand(rng, (M, K), BF16), operand(rng, (K, N), BF16)
    e = np.ones((M, N), BF16)

    def kernel(A, B, E, C, sums):
        if kind.startswith("read"):
            C[...] = C.dtype.type(1) if isinstance(C, np.ndarray) else 1
        around(A, B, E, C, sums, kind=kind, threads=threads)

    c, _ = hopper(kernel, a, b, e, out=[((M, N), BF16), ((2 * M,), "float32")])
    exact = a.astype(np.float64) @ b.astype(np.float64)
    exact = 2 * exact if kind == "sent before" else exact + kind.startswith(("read", "residual"))
    sizes = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)) + 1
    assert_near(c, exact, 2 * K * FLOAT32_STEP * sizes)
    sums = T.Tensor((2 * M,), "float32")
    text = explained(around, a, b, e, c, sums, kind=kind, threads=threads)
    assert (WAITS in text) == is_late
    assert ("acc -> C: by TMA" in text) == is_sent


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize("kind", ["residual", "residual upside down"])
def test_residual_that_is_the_output_itself_is_read_before(executor, hopper, rng, kind, threads):
    if executor == "gpu":
        pytest.skip("arrays on the host")
    M, N, K = 3 * threads // 2, 256, 96
    a, b, before = (operand(rng, s, BF16) for s in ((M, K), (K, N), (M, N)))
    c, sums = before.copy(), np.zeros(2 * M, np.float32)
    around(a, b, c, c, sums, kind=kind, threads=threads)
    wide_a, wide_b, e = (x.astype(np.float64) for x in (a, b, before))
    if kind != "residual":
        BM = threads // 2
        e = e.reshape(-1, BM, N)[:, ::-1].reshape(M, N)
    sizes = np.abs(wide_a) @ np.abs(wide_b) + np.abs(e)
    assert_near(c, wide_a @ wide_b + e, 2 * K * FLOAT32_STEP * sizes)
    assert not waits(around, a, b, c, c, sums, kind=kind, threads=threads)


# ---- machine code -------------------------------------------------------------------------------


@pytest.mark.parametrize("BM, BN, threads", [(128, 256, 256), (256, 128, 256), (192, 128, 384)])
def test_kernels_whose_results_wait_compile_without_spills(BM, BN, threads):
    spec = T.Tensor((4096, 4096), "bfloat16")
    kernel = matmul.compile(
        spec, spec, spec, target="sm_90a", BM=BM, BN=BN, BK=64, threads=threads, tB=True
    )
    assert WAITS in kernel.explain()
    assert (kernel.resources.spill_bytes, kernel.resources.stack_bytes) == (0, 0)
    assert "C75" not in kernel.kernels[0].compiled.log
