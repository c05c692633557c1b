"""Tiles that begin inside 16 bytes of a row: the tensor memory accelerator traps at them, so
another path is taken, and the numbers are the same. Those that provably do not go by it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from products import assert_product, explained, operand, stored

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import UnsupportedError

BF16, F16, E4M3 = ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn
HOPPER, GROUP = "sm_90a", 128
LAYOUTS = ["nn", "nt", "tn", "tt"]


def reason(name: str) -> str:
    return f"the part of {name} does not provably begin at a multiple of 16 bytes in a row"


def brings(text: str, *names: str) -> bool:
    """Whether explain() says that producers bring these tiles."""
    return f"of {', '.join(names)} by TMA" in text


@contextmanager
def refused(headline: str, at: str):
    """The compiler refuses the body, at the line of this file that ends with `at`."""
    with pytest.raises(UnsupportedError) as caught:
        yield
    assert caught.value.headline == headline
    span = caught.value.span
    assert span is not None and Path(span.filename).name == Path(__file__).name
    line = Path(__file__).read_text(encoding="utf-8").splitlines()[span.line - 1]
    assert line.endswith(at), line


# ---- matmuls of parts of matrices ---------------------------------------------------------------


@tilejit
def matmul_of_parts(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *,
    a=(0, 0), b=(0, 0), c=(0, 0), BM=64, BN=64, BK=32, threads=128, stages=None, cluster=None,
    split=None, panel=0, tA=False, tB=False, tf32=False, accum="float32", prefer_a=None,
    prefer_c=None,
):  # fmt: skip
    """Of what begins at the places a, b and c, as the matrices lie in memory."""
    M, N = C.shape[0] - c[0], C.shape[1] - c[1]
    K = A.shape[0] - a[0] if tA else A.shape[1] - a[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads, cluster=cluster) as (bx, by):
        if panel:
            T.use_swizzle(panel)
        left = T.alloc_shared((BK, BM) if tA else (BM, BK), "tfloat32" if tf32 else A.dtype)
        right = T.alloc_shared((BN, BK) if tB else (BK, BN), "tfloat32" if tf32 else B.dtype)
        acc = T.alloc_fragment((BM, BN), accum)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages, split=split):
            row, column = (k * BK, by * BM) if tA else (by * BM, k * BK)
            T.copy(A[row + a[0], column + a[1]], left, prefer_instruction=prefer_a)
            row, column = (bx * BN, k * BK) if tB else (k * BK, bx * BN)
            T.copy(B[row + b[0], column + b[1]], right)
            T.gemm(left, right, acc, transpose_A=tA, transpose_B=tB)
        T.copy(acc, C[by * BM + c[0], bx * BN + c[1]], prefer_instruction=prefer_c)


def embedded(x: np.ndarray, place: tuple[int, int], pitch: int = 0) -> np.ndarray:
    """The matrix behind `place` of a larger one of numbers that are not to be read, with rows of a
    multiple of 16 bytes where no pitch is given."""
    unit = 16 // x.itemsize
    columns = pitch or -(-(x.shape[1] + place[1]) // unit) * unit
    whole = np.full((x.shape[0] + place[0], columns), 99).astype(x.dtype)
    whole[place[0] :, place[1] : place[1] + x.shape[1]] = x
    return whole[:, : x.shape[1] + place[1]]


def multiply(
    hopper, rng, size=(72, 80, 72), layout="nn", dtype=BF16, out="float32", a=(0, 0), b=(0, 0),
    c=(0, 0), accum="float32", **constants,
):  # fmt: skip
    """Checks the product of such parts, and that the rest stays; returns explain()."""
    M, N, K = size
    tA, tB = (side == "t" for side in layout)
    x, y = operand(rng, (M, K), dtype), operand(rng, (K, N), dtype)
    arrays = embedded(stored(x, tA), a), embedded(stored(y, tB), b)
    constants |= {"a": a, "b": b, "c": c, "tA": tA, "tB": tB, "accum": accum}
    shape = (M + c[0], N + c[1])
    found = hopper(matmul_of_parts, *arrays, out=[(shape, out)], **constants)
    product = found[c[0] :, c[1] :].copy()
    assert_product(product, x, y, accum=accum, tf32=constants.get("tf32", False))
    rest = found.copy()
    rest.view(np.uint8).reshape(*shape, -1)[c[0] :, c[1] :] = 0xFF
    assert (rest.view(np.uint8) == 0xFF).all(), "wrote beside its part"
    return explained(matmul_of_parts, *arrays, T.Tensor(shape, out), **constants)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("column", [1, 3, 4, 8, 16, 20])
@pytest.mark.parametrize("side", ["a", "b"])
def test_operands_that_begin_inside_16_bytes_of_a_row_are_multiplied(
    hopper, rng, side, column, layout
):
    text = multiply(hopper, rng, layout=layout, **{side: (3, column)})
    assert brings(text, "left", "right") == (column % 8 == 0)
    name = side.upper()
    assert (f"not TMA ({reason(name)})" in text) == (column % 8 != 0)
    assert ("wgmma.m64n64k16" in text) == (column % 8 == 0)
    assert "acc -> C: by TMA" in text or column % 8


@pytest.mark.parametrize(
    "dtype, accum, column, fits",
    [(E4M3, "float32", 8, False), (E4M3, "float32", 16, True), (E4M3, "float32", 17, False),
     (np.int8, "int32", 8, False), (np.int8, "int32", 4, False), (np.int8, "int32", 48, True),
     (F16, "float16", 8, True), (F16, "float16", 12, False),
     (np.float32, "float32", 4, True), (np.float32, "float32", 2, False),
     (np.float32, "float32", 1, False), (np.float32, "float32", 12, True)],
)  # fmt: skip
@pytest.mark.parametrize("side", ["a", "b"])
def test_how_many_columns_are_16_bytes_depends_on_the_dtype(
    hopper, rng, side, dtype, accum, column, fits
):
    text = multiply(
        hopper, rng, (72, 80, 80), "nt", dtype, accum, accum=accum, tf32=dtype is np.float32,
        **{side: (1, column)},
    )  # fmt: skip
    assert brings(text, "left", "right") == fits
    assert (f"not TMA ({reason(side.upper())})" in text) != fits


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 67])
def test_any_row_may_be_the_first(hopper, rng, rows):
    text = multiply(hopper, rng, a=(rows, 8), b=(rows + 1, 0), c=(rows + 2, 4))
    assert brings(text, "left", "right") and "acc -> C: by TMA" in text


@pytest.mark.parametrize("columns", [-8, -3, -16, -40])
def test_parts_may_begin_before_the_tensor(hopper, rng, columns):
    """What is outside reads as 0."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, columns):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(4):
                T.copy(A[0, k * 32 + columns], a)
                T.copy(B[k * 32, 0], b)
                T.gemm(a, b, acc)
            T.copy(acc, C)

    a, b = operand(rng, (64, 72), BF16), operand(rng, (128, 64), BF16)
    c = hopper(kernel, a, b, out=[((64, 64), "float32")], columns=columns)
    shifted = np.zeros((64, 128), BF16)
    shifted[:, -columns : 72 - columns] = a[:, : min(72, 128 + columns)]
    assert_product(c, shifted, b)
    text = explained(kernel, a, b, c, columns=columns)
    assert brings(text, "a", "b") == (columns % 8 == 0)


@pytest.mark.parametrize(
    "out, column, fits",
    [("float32", 1, False), ("float32", 2, False), ("float32", 4, True), ("float32", 36, True),
     ("bfloat16", 1, False), ("bfloat16", 4, False), ("bfloat16", 8, True),
     ("float8_e4m3fn", 8, False), ("float8_e4m3fn", 16, True)],
)  # fmt: skip
@pytest.mark.parametrize(
    "tiles",
    [{}, {"BM": 128, "BN": 128, "threads": 256}, {"BM": 64, "BN": 256, "threads": 256}],
    ids=["one", "two below each other", "strips"],
)
def test_outputs_that_begin_inside_16_bytes_of_a_row_are_stored_by_threads(
    hopper, rng, out, column, fits, tiles
):
    N = 160 - column  # rows of the output are whole units
    text = multiply(hopper, rng, (136, N, 40), "nt", out=out, c=(1, column), **tiles)
    assert brings(text, "left", "right")
    refusal = f"acc -> C: stored by the threads, not by TMA ({reason('C')})"
    assert ("acc -> C: by TMA" in text, refusal in text) == (fits, not fits)


@pytest.mark.parametrize("column", [3, 8])
@pytest.mark.parametrize(
    "constants",
    [
        {"stages": 2, "BK": 64},
        {"BK": 128, "stages": 2},  # a tile of two boxes beside each other
        {"BM": 128, "BN": 128, "threads": 256, "panel": 2},
        {"cluster": 2},
        {"cluster": (1, 2)},
        {"split": 2, "BK": 16},
    ],
    ids=str,
)
def test_parts_are_multiplied_however_blocks_divide_the_work(hopper, rng, constants, column):
    size = (128, 256, 136)
    place = {"a": (2, column), "b": (5, column), "c": (1, column + column % 2)}
    text = multiply(hopper, rng, size, **place, **constants)
    assert brings(text, "left", "right") == (column == 8)


def test_boxes_of_a_tile_that_blocks_share_begin_where_they_may(hopper, rng):
    constants = {"BN": 128, "cluster": 2, "BK": 64, "stages": 2}
    multiply(hopper, rng, (128, 256, 128), a=(0, 8), b=(0, 8), c=(0, 4), **constants)
    kernel = matmul_of_parts.compile(
        T.Tensor((128, 136), "bfloat16"), T.Tensor((128, 264), "bfloat16"),
        T.Tensor((128, 260), "float32"), target=HOPPER,
        a=(0, 8), b=(0, 8), c=(0, 4), **constants,
    )  # fmt: skip
    assert ".multicast::cluster" in kernel.ptx


def test_only_the_operand_that_begins_so_is_named(hopper, rng):
    text = multiply(hopper, rng, a=(0, 8), b=(0, 5))
    assert reason("B") in text and reason("A") not in text and reason("C") not in text


def test_start_and_tensor_are_both_looked_at(hopper, rng):
    """Each begins inside of 16 bytes, and together at a multiple of them: a box counts from the
    tensor's address, which must be a multiple itself."""
    whole = operand(rng, (72, 96), BF16)
    b = operand(rng, (72, 64), BF16)
    for first, start, why in (
        (4, 4, "A does not provably begin at a multiple of 16 bytes"),
        (8, 4, reason("A")),
        (8, 8, ""),
    ):
        a = whole[:, first : first + start + 72]
        constants = {"a": (0, start)}
        c = hopper(matmul_of_parts, a, b, out=[((72, 64), "float32")], **constants)
        assert_product(c, a[:, start:], b)
        text = explained(matmul_of_parts, a, b, c, **constants)
        assert brings(text, "left", "right") == (not why)
        assert f"not TMA ({why})" in text or not why


# ---- starts that are known at the launch or in a loop -------------------------------------------


@tilejit
def moved(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, places: T.Tensor, first: T.int32, *,
    where, kind="scalar", scale=1,
):  # fmt: skip
    """A product along 128 columns; the first columns of A, B or C are known at the launch."""
    with T.Kernel(1, threads=128):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        given = first if kind == "scalar" else places[1]
        start = {name: given * scale if name == where else 0 for name in "abc"}
        T.clear(acc)
        for k in T.Pipelined(4):
            T.copy(A[0, k * 32 + start["a"]], a)
            T.copy(B[k * 32, start["b"]], b)
            T.gemm(a, b, acc)
        T.copy(acc, C[0, start["c"]])


@pytest.mark.parametrize("kind", ["scalar", "tensor"])
@pytest.mark.parametrize("where, scale", [("a", 1), ("a", 4), ("a", 8), ("b", 1), ("b", 8),
                                          ("c", 1), ("c", 2), ("c", 4)])  # fmt: skip
def test_start_known_at_the_launch_must_provably_be_a_multiple(hopper, rng, where, scale, kind):
    a, b = operand(rng, (64, 192), BF16), operand(rng, (128, 128), BF16)
    for first in (0, 1, 3, 8):
        at = {name: first * scale if name == where else 0 for name in "abc"}
        places, number = np.array([5, first], np.int32), first if kind == "scalar" else 5
        options = {"where": where, "kind": kind, "scale": scale}
        c = hopper(
            lambda a, b, places, number, c, **rest: moved(a, b, c, places, number, **rest),
            a, b, places, number, out=[((64, 128), "float32")], **options,
        )  # fmt: skip
        product = c[:, at["c"] : at["c"] + 64].copy()
        assert_product(product, a[:, at["a"] : at["a"] + 128], b[:, at["b"] : at["b"] + 64])
        assert np.isnan(c[:, : at["c"]]).all() and np.isnan(c[:, at["c"] + 64 :]).all()
    text = explained(moved, a, b, c, places, 8, **options)
    fits = scale * (4 if where == "c" else 2) == 16
    assert (reason(where.upper()) in text) != fits
    assert brings(text, "a", "b") == (fits or where == "c")
    # nor may what is written begin before the tensor
    assert ("acc -> C: by TMA" in text) == (fits and where != "c")


L = T.dynamic("L")


@tilejit
def from_extent(
    A: T.Tensor, B: T.Tensor, D: T.Tensor((L,), "float32"), C: T.Tensor,
):  # fmt: skip
    with T.Kernel(1, threads=128):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        for k in T.Pipelined(4):
            T.copy(A[0, L + k * 32], a)
            T.copy(B[k * 32, 0], b)
            T.gemm(a, b, acc)
        T.copy(acc, C)


def test_start_that_is_a_runtime_extent_is_one_of_each_call(hopper, rng):
    """What is made for extents that 8 divides is not used for others."""
    a, b = operand(rng, (64, 168), BF16), operand(rng, (128, 64), BF16)
    for extent in (8, 5, 16, 32, 12, 3, 40):
        d = np.zeros(extent, np.float32)
        c = hopper(from_extent, a, b, d, out=[((64, 64), "float32")])
        assert_product(c, a[:, extent : extent + 128], b)


@tilejit
def in_steps(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, kind, start=0, step=32, stop=128):
    """The loop's variable is the column itself."""
    with T.Kernel(1, threads=128):
        a = T.alloc_shared((64, 32), A.dtype)
        b = T.alloc_shared((32, 64), B.dtype)
        acc = T.alloc_fragment((64, 64), "float32")
        T.clear(acc)
        loops = {"serial": T.serial, "unroll": T.unroll}
        for k in loops[kind](start, stop, step):
            for n in T.Pipelined(2, num_stages=2):
                T.copy(A[0, k + n * 16], a)
                T.copy(B[n * 32, 0], b)
                T.gemm(a, b, acc)
        T.copy(acc, C)


@pytest.mark.parametrize("kind", ["serial", "unroll"])
@pytest.mark.parametrize(
    "start, step, fits",
    [(0, 32, True), (0, 24, True), (8, 40, True), (96, -32, True), (3, 32, False), (0, 12, False),
     (4, 8, False), (100, -40, False)],
)  # fmt: skip
def test_step_of_a_loop_divides_its_variable(hopper, rng, kind, start, step, fits):
    stop = 128 if step > 0 else -1
    constants = {"kind": kind, "start": start, "step": step, "stop": stop}
    a, b = operand(rng, (64, 192), BF16), operand(rng, (64, 64), BF16)
    c = hopper(in_steps, a, b, out=[((64, 64), "float32")], **constants)
    firsts = range(start, stop, step)
    parts = [a[:, k + n : k + n + 32] for k in firsts for n in (0, 16)]
    assert_product(c, np.hstack(parts), np.vstack([b] * len(firsts)))
    text = explained(in_steps, a, b, c, **constants)
    assert brings(text, "a", "b") == fits and (reason("A") in text) != fits


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("column", [8, 3])
def test_loop_with_stages_may_begin_anywhere(hopper, rng, first, column):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, C: T.Tensor, *, first, column):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 48), A.dtype)
            b = T.alloc_shared((64, 48), B.dtype)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(first, 4, num_stages=3):
                T.copy(A[0, (k - first) * 48 + column], a)
                T.copy(B[0, k * 48], b)
                T.gemm(a, b, acc, transpose_B=True)
            T.copy(acc, C)

    a, b = operand(rng, (64, 208), BF16), operand(rng, (64, 192), BF16)
    constants = {"first": first, "column": column}
    c = hopper(kernel, a, b, out=[((64, 64), "float32")], **constants)
    depth = 192 - first * 48
    assert_product(c, a[:, column : column + depth], b[:, first * 48 :].T)
    assert brings(explained(kernel, a, b, c, **constants), "a", "b") == (column == 8)


# ---- copies -------------------------------------------------------------------------------------


@tilejit
def vectors(X: T.Tensor, Y: T.Tensor, *, first=0, to=0, width=128):
    """Tiles of tensors of one dimension, in and out by the accelerator."""
    with T.Kernel(3, threads=128) as b:
        s = T.alloc_shared((width,), X.dtype)
        T.copy(X[b * width + first], s, prefer_instruction="tma")
        for i in T.Parallel(width):
            s[i] = s[i] + 1
        T.copy(s, Y[b * width + to], prefer_instruction="tma")


@pytest.mark.parametrize("dtype, unit", [(np.float32, 4), (np.int8, 16), (F16, 8), (np.int64, 2)])
@pytest.mark.parametrize("width", [128, 512])  # boxes have at most 256 elements
def test_parts_of_vectors_are_copied_in_bulk(hopper, dtype, unit, width):
    x = (np.arange(3 * width + 3 * unit) % 50).astype(dtype)
    for first, to in ((0, 0), (unit, 0), (0, 2 * unit), (5 * unit, unit), (-unit, unit)):
        size = 3 * width + to
        options = {"first": first, "to": to, "width": width}
        y = hopper(vectors, x, out=[((size,), dtype)], **options)
        expected = np.zeros(3 * width, dtype)
        low, high = max(first, 0), min(first + 3 * width, len(x))
        expected[low - first : high - first] = x[low:high]
        np.testing.assert_array_equal(y[to:], expected + 1)
        assert (y[:to].view(np.uint8) == 0xFF).all()
        kernel = vectors.compile(x, y, target=HOPPER, **options)
        assert "cp.async.bulk.tensor.1d.shared::cluster.global" in kernel.ptx
        assert "cp.async.bulk.tensor.1d.global.shared::cta" in kernel.ptx


@pytest.mark.parametrize("dtype, unit", [("float32", 4), ("int8", 16), ("float16", 8)])
def test_parts_of_vectors_that_begin_inside_16_bytes_are_refused(dtype, unit):
    x = T.Tensor((600,), dtype)
    headline = 'T.copy: prefer_instruction="tma" is not possible: {}.'
    for wrong in (1, unit - 1, unit // 2, -1, 3 * unit + unit // 2):
        with refused(headline.format(reason("X")), 'first], s, prefer_instruction="tma")'):
            vectors.compile(x, x, target=HOPPER, first=wrong)
        with refused(headline.format(reason("Y")), 'Y[b * width + to], prefer_instruction="tma")'):
            vectors.compile(x, x, target=HOPPER, to=wrong)


@pytest.mark.parametrize("first", [0, 4, 3, 1])
def test_vector_that_a_loop_brings_beside_the_operands(hopper, rng, first):
    """A row of numbers a step, brought by producers where it may be."""

    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, S: T.Tensor, C: T.Tensor, *, first):
        K = A.shape[1]
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 32), A.dtype)
            b = T.alloc_shared((32, 64), B.dtype)
            s = T.alloc_shared((64,), "float32")
            acc = T.alloc_fragment((64, 64), "float32")
            sums = T.alloc_fragment((64, 64), "float32")
            T.clear(sums)
            for k in T.Pipelined(K // 32, num_stages=2):
                T.copy(A[0, k * 32], a)
                T.copy(B[k * 32, 0], b)
                T.copy(S[k * 64 + first], s)
                T.gemm(a, b, acc, clear_accum=True)
                for i, j in T.Parallel(64, 64):
                    sums[i, j] += acc[i, j] * s[j]
            T.copy(sums, C)

    a, b = operand(rng, (64, 96), BF16), operand(rng, (96, 64), BF16)
    s = rng.integers(-2, 3, 3 * 64 + first).astype(np.float32)
    c = hopper(kernel, a, b, s, out=[((64, 64), "float32")], first=first)
    scaled = b.astype(np.float32) * np.repeat(s[first:].reshape(3, 64), 32, axis=0)
    assert_product(c, a, scaled)
    text = explained(kernel, a, b, s, c, first=first)
    assert "wgmma" in text
    assert (f"copy S -> s: by the block's threads, not TMA ({reason('S')})" in text) == (
        first % 4 != 0
    )


@tilejit
def tiles(
    A: T.Tensor, C: T.Tensor, *, first=(0, 0, 0), to=(0, 0, 0), rows=16, columns=64,
    prefer="tma", prefer_c="tma",
):  # fmt: skip
    """Tiles of a tensor of three dimensions, in slices."""
    x, y, z = first
    u, v, w = to
    with T.Kernel(2, 2, threads=128) as (bx, by):
        s = T.alloc_shared((rows, columns), A.dtype)
        row, column = by * rows, bx * columns
        T.copy(
            A[x, row + y : row + y + rows, column + z : column + z + columns], s,
            prefer_instruction=prefer)  # fmt: skip
        T.copy(
            s, C[u, row + v : row + v + rows, column + w : column + w + columns],
            prefer_instruction=prefer_c)  # fmt: skip


@pytest.mark.parametrize("dtype, unit", [(np.float32, 4), (np.uint8, 16), (BF16, 8)])
@pytest.mark.parametrize("rows, columns", [(16, 64), (12, 48), (8, 512)])
def test_slices_of_tensors_are_copied(hopper, rng, dtype, unit, rows, columns):
    """Whatever the first plane and row are; in bulk where the first column may be."""
    a = rng.integers(0, 99, (3, 2 * rows + 5, 2 * columns + 4 * unit)).astype(dtype)
    for first, to in (
        ((1, 3, unit), (2, 1, 0)),
        ((0, 1, 0), (1, 2, 2 * unit)),
        ((2, 0, 1), (0, 0, 0)),
        ((2, 5, unit // 2), (0, 1, unit - 1)),
    ):
        shape = (3, 2 * rows + 2, 2 * columns + 3 * unit)
        fits, fits_c = first[2] % unit == 0, to[2] % unit == 0
        options = {"first": first, "to": to, "rows": rows, "columns": columns}
        options |= {"prefer": "tma" if fits else None, "prefer_c": "tma" if fits_c else None}
        c = hopper(tiles, a, out=[(shape, dtype)], **options)
        x, y, z = first
        u, v, w = to
        here = (u, slice(v, v + 2 * rows), slice(w, w + 2 * columns))
        np.testing.assert_array_equal(c[here], a[x, y : y + 2 * rows, z : z + 2 * columns])
        rest = c.view(np.uint8).reshape(*shape, -1).copy()
        rest[here] = 0xFF
        assert (rest == 0xFF).all()
        ptx = tiles.compile(a, c, target=HOPPER, **options).ptx
        assert ("bulk.tensor.3d.shared::cluster.global" in ptx) == fits
        assert ("bulk.tensor.3d.global.shared::cta" in ptx) == fits_c


def test_slices_that_begin_inside_16_bytes_are_refused_where_tma_is_asked_for():
    a = T.Tensor((3, 80, 160), "bfloat16")
    headline = 'T.copy: prefer_instruction="tma" is not possible: {}.'
    for column in (1, 4, 12):
        with refused(headline.format(reason("A")), "T.copy("):
            tiles.compile(a, a, target=HOPPER, first=(1, 1, column))
        with refused(headline.format(reason("C")), "T.copy("):
            tiles.compile(a, a, target=HOPPER, to=(1, 1, column))


@pytest.mark.parametrize("column", [1, 4])
def test_operands_and_outputs_are_refused_where_tma_is_asked_for(column):
    half, single = T.Tensor((64, 72), "bfloat16"), T.Tensor((64, 72), "float32")
    headline = 'T.copy: prefer_instruction="tma" is not possible: {}.'
    options = {"target": HOPPER, "prefer_a": "tma", "prefer_c": "tma"}
    with refused(headline.format(reason("A")), "left, prefer_instruction=prefer_a)"):
        matmul_of_parts.compile(half, half, single, a=(0, column), **options)
    with refused(headline.format(reason("C")), "prefer_instruction=prefer_c)"):
        matmul_of_parts.compile(half, half, single, c=(0, column % 4 or 2), **options)


# ---- by hand ------------------------------------------------------------------------------------


@tilejit
def by_hand(A: T.Tensor, C: T.Tensor, *, first=0, to=0, mask=None, roles=False, columns=64):
    """One tile in and out; in a cluster each block brings its part to both."""
    with T.Kernel(2 if mask else 1, threads=GROUP, cluster=2 if mask else None) as b:
        s = T.alloc_shared((64, columns), A.dtype)
        full = T.alloc_cluster_barrier(1) if mask else T.alloc_barrier(1)

        @T.macro
        def body():
            T.tma_copy(A[0, first], s, barrier=full, cluster_mask=mask)
            if T.shuffle_elect(0):
                T.mbarrier_arrive(full)
            T.mbarrier_wait_parity(full, 0)
            T.tma_copy(s, C[b * 64, to])
            T.tma_store_wait()

        if roles:
            with T.ws(0):
                body()
        else:
            body()
        if mask:
            T.cluster_sync()


@pytest.mark.parametrize("mask", [None, 0b11])
@pytest.mark.parametrize("dtype, unit", [(np.float32, 4), (np.uint8, 16), (BF16, 8)])
def test_copies_by_hand_begin_at_16_bytes_of_a_row(hopper, rng, dtype, unit, mask):
    columns = 256 // np.dtype(dtype).itemsize  # two panels: each block of a cluster brings one
    a = rng.integers(0, 99, (64, 3 * columns)).astype(dtype)
    blocks = 2 if mask else 1
    for first, to in ((0, 0), (unit, 0), (columns + 3 * unit, 2 * unit)):
        shape = (64 * blocks, columns + 2 * unit)
        options = {"first": first, "to": to, "mask": mask, "columns": columns}
        c = hopper(by_hand, a, out=[(shape, dtype)], **options)
        for block in range(blocks):
            rows = slice(block * 64, block * 64 + 64)
            part = a[:, first : first + columns]
            np.testing.assert_array_equal(c[rows, to : to + columns], part)


@pytest.mark.parametrize("roles", [False, True])
@pytest.mark.parametrize("mask", [None, 0b11])
@pytest.mark.parametrize("dtype, wrong", [("float32", (1, 2)), ("uint8", (8, 15)),
                                          ("bfloat16", (4, 9))])  # fmt: skip
def test_copies_by_hand_that_begin_elsewhere_are_refused(dtype, wrong, mask, roles):
    a = T.Tensor((128, 1024), dtype)
    for column in wrong:
        options = {"mask": mask, "roles": roles, "columns": 256}
        headline = f"T.tma_copy cannot bring A to s: {reason('A')}."
        with refused(headline, "barrier=full, cluster_mask=mask)"):
            by_hand.compile(a, a, target=HOPPER, first=column, **options)
        headline = f"T.tma_copy cannot bring s to C: {reason('C')}."
        with refused(headline, "T.tma_copy(s, C[b * 64, to])"):
            by_hand.compile(a, a, target=HOPPER, to=column, **options)


@tilejit
def by_hand_in_steps(A: T.Tensor, C: T.Tensor, n: T.int32, *, start, stop, step, scale=0):
    with T.Kernel(1, threads=GROUP):
        s = T.alloc_shared((16, 32), A.dtype)
        full, turn = T.alloc_barrier(1), T.alloc_var("int32", init=0)
        for k in range(start, stop, step):
            T.tma_copy(A[0, k + n * scale], s, barrier=full)
            if T.shuffle_elect(0):
                T.mbarrier_arrive(full)
            T.mbarrier_wait_parity(full, turn & 1)
            for i, j in T.Parallel(16, 32):
                C[turn, i, j] = s[i, j]
            turn += 1
            T.sync_threads()


@pytest.mark.parametrize(
    "start, stop, step, scale, fits",
    [(0, 128, 32, 0, True), (8, 128, 24, 8, True), (96, -1, -32, 16, True),
     (0, 128, 32, 1, False), (3, 128, 32, 0, False), (0, 128, 12, 8, False),
     (100, 0, -40, 0, False)],
)  # fmt: skip
def test_columns_by_hand_may_be_a_loops_variable(hopper, rng, start, stop, step, scale, fits):
    a = operand(rng, (16, 192), BF16)
    options = {"start": start, "stop": stop, "step": step, "scale": scale}
    firsts = [k + 2 * scale for k in range(start, stop, step)]
    shape = (len(firsts), 16, 32)
    if not fits:
        with refused(f"T.tma_copy cannot bring A to s: {reason('A')}.", "s, barrier=full)"):
            by_hand_in_steps.compile(a, T.Tensor(shape, BF16), 2, target=HOPPER, **options)
        return
    c = hopper(
        lambda a, n, c, **rest: by_hand_in_steps(a, c, n, **rest),
        a, 2, out=[(shape, BF16)], **options,
    )  # fmt: skip
    for found, k in zip(c, firsts, strict=True):
        np.testing.assert_array_equal(found, a[:, k : k + 32])


@tilejit
def by_each_thread(A: T.Tensor, C: T.Tensor, *, step):
    """Four threads bring a tile each."""
    with T.Kernel(1, threads=GROUP):
        tx = T.get_thread_binding()
        s = T.alloc_shared((4, 8, 64), A.dtype)
        full = T.alloc_barrier(4)
        if tx < 4:
            T.tma_copy(A[0, tx * step], s[tx, :, :], barrier=full)
            T.mbarrier_arrive(full)
        T.mbarrier_wait_parity(full, 0)
        T.copy(s, C)


def test_columns_by_hand_may_be_each_threads_own(hopper, rng):
    a = operand(rng, (8, 112), BF16)
    for step in (8, 16):
        c = hopper(by_each_thread, a, out=[((4, 8, 64), BF16)], step=step)
        for t in range(4):
            np.testing.assert_array_equal(c[t], a[:, t * step : t * step + 64])
    with refused(f"T.tma_copy cannot bring A to s: {reason('A')}.", "s[tx, :, :], barrier=full)"):
        by_each_thread.compile(a, c, target=HOPPER, step=4)
