"""Tiles that lie as T.annotate_layout says: right on every executor, and used as they are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from products import assert_product, operand, stored

import tilejit.language as T
from tilejit import options, tilejit
from tilejit.errors import UnsupportedError
from tilejit.ir.kernel import ParamKind

HOPPER = "sm_90a"


@T.macro
def lay(tile, kind):
    """Give a tile the layout of that name; a number is a pad, None leaves it to the compiler."""
    if isinstance(kind, int):
        T.annotate_layout({tile: T.make_padded_layout(tile, kind)})
    elif kind is not None:
        T.annotate_layout({tile: getattr(T, f"make_{kind}_layout")(tile)})


SPANS = {
    "full_bank_swizzled": 128,
    "half_bank_swizzled": 64,
    "quarter_bank_swizzled": 32,
    "chunked": 0,
}
WORDS = {"full_bank_swizzled": "128-byte swizzle", "half_bank_swizzled": "64-byte swizzle",
         "quarter_bank_swizzled": "32-byte swizzle", "chunked": "panels of", "linear": "rows",
         8: "pitch", 3: "pitch"}  # fmt: skip


@tilejit
def matmul(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *,
    a_kind=None, b_kind=None, c_kind=None, BM=64, BN=64, BK=64, stages=3, threads=128, tA=False,
    tB=False, tf32=False, accum="float32", prefer=None, cluster=None,
):  # fmt: skip
    M, N = C.shape
    K = A.shape[0] if tA else A.shape[1]
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=threads, cluster=cluster) as (bx, by):
        a = T.alloc_shared((BK, BM) if tA else (BM, BK), "tfloat32" if tf32 else A.dtype)
        b = T.alloc_shared((BN, BK) if tB else (BK, BN), "tfloat32" if tf32 else B.dtype)
        c = T.alloc_shared((BM, BN), C.dtype)
        lay(a, a_kind)
        lay(b, b_kind)
        acc = T.alloc_fragment((BM, BN), accum)
        T.clear(acc)
        for k in T.Pipelined(T.ceildiv(K, BK), num_stages=stages):
            if tA:
                T.copy(A[k * BK, by * BM], a, prefer_instruction=prefer)
            else:
                T.copy(A[by * BM, k * BK], a, prefer_instruction=prefer)
            if tB:
                T.copy(B[bx * BN, k * BK], b)
            else:
                T.copy(B[k * BK, bx * BN], b)
            T.gemm(a, b, acc, transpose_A=tA, transpose_B=tB)
        if c_kind is not None:
            lay(c, c_kind)
            T.copy(acc, c)
            T.copy(c, C[by * BM, bx * BN])
        else:
            T.copy(acc, C[by * BM, bx * BN])


def check(run, rng, dtype=np.float16, out="float32", size=(72, 136, 104), **constants):
    M, N, K = size
    a, b = operand(rng, (M, K), dtype), operand(rng, (K, N), dtype)
    tA, tB = constants.get("tA", False), constants.get("tB", False)
    c = run(matmul, stored(a, tA), stored(b, tB), out=[((M, N), out)], **constants)
    assert_product(c, a, b, tf32=constants.get("tf32", False))


def compiled(target, dtype="float16", size=(256, 256, 128), **constants):
    M, N, K = size
    shapes = ((K, M) if constants.get("tA") else (M, K), (N, K) if constants.get("tB") else (K, N))
    specs = [T.Tensor(shape, dtype) for shape in shapes]
    return matmul.compile(*specs, T.Tensor((M, N), "float32"), target=target, **constants)


# ---- by warps: cp.async, ldmatrix, mma.sync -----------------------------------------------------


@pytest.mark.parametrize("tA, tB", [(False, False), (True, True)])
@pytest.mark.parametrize("kind", list(WORDS))
def test_product_by_warps_of_tiles_that_lie_as_given(run, rng, kind, tA, tB):
    check(run, rng, a_kind=kind, b_kind=kind, tA=tA, tB=tB)


@pytest.mark.parametrize(
    "dtype, constants",
    [
        (np.float32, {"tf32": True}),
        (np.float32, {"BK": 16}),  # FMA
        (np.float64, {"accum": "float64", "out": "float64", "BK": 16, "stages": 2}),
        (np.int8, {"accum": "int32", "out": "int32", "tB": True}),
    ],
)
@pytest.mark.parametrize("kind", ["half_bank_swizzled", "chunked", 4, 3])
def test_product_of_other_dtypes_by_warps(run, rng, kind, dtype, constants):
    check(run, rng, dtype, a_kind=kind, b_kind=kind, **constants)


def test_tiles_of_one_product_may_lie_differently(run, rng):
    check(run, rng, a_kind="linear", b_kind=8, c_kind="quarter_bank_swizzled")
    check(run, rng, a_kind="chunked", b_kind=None, c_kind=1)


@pytest.mark.parametrize("kind", list(WORDS))
def test_given_layouts_are_explained(kind):
    text = compiled("sm_80", a_kind=kind, b_kind=kind).explain()
    assert "gemm a @ b -> acc: mma.m16n8k16" in text
    (line,) = [n for n in text.splitlines() if n.startswith("  a: layout given, ")]
    assert WORDS[kind] in line
    assert ("not ldmatrix (rows do not begin at multiples of 16 bytes)" in line) == (kind == 3)
    assert "3 slots of a, b" in text or kind == 3


@pytest.mark.parametrize("pad, text, vector", [
    (8, None, 16),
    (4, "cp.async of 8 bytes each", 8),
    (2, "cp.async of 4 bytes each", 4),
    (1, "through registers, not asynchronous", 0),
])  # fmt: skip
def test_copies_are_as_wide_as_padded_rows_allow(pad, text, vector):
    kernel = compiled("sm_80", a_kind=pad)
    why = f"(a has the layout given by T.annotate_layout: rows, pitch {64 + pad})"
    if text is not None:
        assert f"copy A -> a: {text} {why}" in kernel.explain()
    else:
        assert why not in kernel.explain()
    widths = set(re.findall(r"cp\.async\.\w+\.shared\.global [^;]*?, (\d+), ", kernel.ptx))
    assert widths == {"16", *([str(vector)] if vector else [])}


# ---- by warpgroups: TMA, wgmma ------------------------------------------------------------------


def tensor_maps(kernel):
    """The swizzle in bytes of each tensor's map."""
    params = kernel.kernels[0].planned.params
    boxes = [p.box for p in params if p.kind is ParamKind.TENSOR_MAP]
    return {box.tensor.name: box.swizzle for box in boxes}


def swizzles_of_descriptors(kernel):
    """The layout types that descriptors name, in bytes (PTX ISA, "Matrix descriptor")."""
    found = re.findall(r"or\.b64\s+%rd\d+, %rd\d+, (-?\d+);", kernel.ptx)
    return {(0, 128, 64, 32)[int(n) % (1 << 64) >> 62] for n in found}


@pytest.mark.parametrize("tA, tB", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("kind", list(SPANS))
def test_product_by_warpgroups_of_tiles_that_lie_as_given(hopper, rng, kind, tA, tB):
    check(hopper, rng, a_kind=kind, b_kind=kind, tA=tA, tB=tB)
    kernel = compiled(HOPPER, a_kind=kind, b_kind=kind, tA=tA, tB=tB)
    text = kernel.explain()
    assert "wgmma.m64n64k16" in text and "fills 3 slots of a, b by TMA" in text
    assert "a: layout given, " in text and "b: layout given, " in text
    maps = tensor_maps(kernel)
    assert maps["A"] == maps["B"] == SPANS[kind]
    assert swizzles_of_descriptors(kernel) == {SPANS[kind]}


def test_operands_of_warpgroups_may_lie_differently(hopper, rng):
    kinds = {"a_kind": "half_bank_swizzled", "b_kind": "quarter_bank_swizzled"}
    check(hopper, rng, **kinds)
    kernel = compiled(HOPPER, **kinds)
    assert swizzles_of_descriptors(kernel) == {64, 32}
    assert tensor_maps(kernel) == {"A": 64, "B": 32, "C": 128}
    check(hopper, rng, a_kind="chunked")
    assert swizzles_of_descriptors(compiled(HOPPER, a_kind="chunked")) == {0, 128}


@pytest.mark.parametrize("kind", list(SPANS))
def test_wide_tiles_of_many_panels_by_two_warpgroups(hopper, rng, kind):
    shape = {"BM": 128, "BN": 192, "BK": 64, "threads": 256}
    check(hopper, rng, a_kind=kind, b_kind=kind, size=(136, 200, 72), **shape)
    assert "wgmma" in compiled(HOPPER, a_kind=kind, b_kind=kind, **shape).explain()


@pytest.mark.parametrize("cluster", [2, (1, 2)])
@pytest.mark.parametrize("kind", list(SPANS))
def test_tiles_of_a_cluster_lie_as_given(hopper, rng, kind, cluster):
    check(hopper, rng, a_kind=kind, b_kind=kind, cluster=cluster, size=(128, 128, 72))
    text = compiled(HOPPER, a_kind=kind, b_kind=kind, cluster=cluster).explain()
    assert "share what they read" in text


@pytest.mark.parametrize(
    "dtype, constants",
    [
        (np.float32, {"tf32": True, "tB": True, "BK": 32}),
        (np.int8, {"accum": "int32", "out": "int32", "tB": True, "size": (72, 144, 112)}),
    ],
)
@pytest.mark.parametrize("kind", ["half_bank_swizzled", "quarter_bank_swizzled", "chunked"])
def test_product_of_other_dtypes_by_warpgroups(hopper, rng, kind, dtype, constants):
    check(hopper, rng, dtype, a_kind=kind, b_kind=kind, **constants)


@pytest.mark.parametrize("kind", ["linear", 8, 3])
def test_rows_that_warpgroups_cannot_read_are_multiplied_by_warps(hopper, rng, kind):
    check(hopper, rng, b_kind=kind)
    text = compiled(HOPPER, b_kind=kind).explain()
    layout = "rows" if kind == "linear" else f"rows, pitch {64 + kind}"
    assert (
        "gemm a @ b -> acc: mma.m16n8k16.f32.f16.f16.f32 on 2x2 warps; not wgmma (b has the layout "
        f"given by T.annotate_layout: {layout})"
    ) in text


def test_tile_beside_the_operands_is_copied_by_threads_where_boxes_cannot_fill_it(hopper, rng):
    @tilejit
    def kernel(A: T.Tensor, B: T.Tensor, D: T.Tensor, C: T.Tensor, *, kind):
        with T.Kernel(T.ceildiv(C.shape[1], 64), T.ceildiv(C.shape[0], 64), threads=128) as (
            bx,
            by,
        ):
            a = T.alloc_shared((64, 64), A.dtype)
            b = T.alloc_shared((64, 64), B.dtype)
            d = T.alloc_shared((64, 64), D.dtype)
            lay(d, kind)
            acc = T.alloc_fragment((64, 64), "float32")
            T.clear(acc)
            for k in T.Pipelined(T.ceildiv(A.shape[1], 64), num_stages=2):
                T.copy(A[by * 64, k * 64], a)
                T.copy(B[k * 64, bx * 64], b)
                T.copy(D[by * 64, k * 64], d)
                T.gemm(a, b, acc)
                for i, j in T.Parallel(64, 64):
                    acc[i, j] = acc[i, j] + d[i, 0]
            T.copy(acc, C[by * 64, bx * 64])

    a, b = operand(rng, (64, 128), np.float16), operand(rng, (128, 64), np.float16)
    d = operand(rng, (64, 128), np.float16)
    for kind in (None, "linear", "half_bank_swizzled", 8):
        c = hopper(kernel, a, b, d, out=[((64, 64), "float32")], kind=kind)
        bias = d[:, [0, 64]].astype(np.float64).sum(1, keepdims=True)
        exact = a.astype(np.float64) @ b.astype(np.float64) + bias
        np.testing.assert_allclose(c, exact, rtol=0, atol=1e-3)
        specs = [T.Tensor(x.shape, x.dtype) for x in (a, b, d, c)]
        text = kernel.compile(*specs, target=HOPPER, kind=kind).explain()
        assert "wgmma" in text
        by_threads = "copy D -> d: by the block's threads, not TMA (d has the layout given"
        assert (by_threads in text) == (kind == 8)


# ---- by hand ------------------------------------------------------------------------------------


@tilejit
def by_hand(
    A: T.Tensor, B: T.Tensor, C: T.Tensor, *, a_kind=None, b_kind=None, BM=64, BN=64, BK=64,
    stages=3,
):  # fmt: skip
    M, N = C.shape
    steps = T.ceildiv(A.shape[1], BK)
    with T.Kernel(T.ceildiv(N, BN), T.ceildiv(M, BM), threads=256) as (bx, by):
        a = T.alloc_shared((stages, BM, BK), A.dtype)
        b = T.alloc_shared((stages, BK, BN), B.dtype)
        lay(a, a_kind)
        lay(b, b_kind)
        acc = T.alloc_fragment((BM, BN), "float32")
        full = T.alloc_barrier([1] * stages)
        empty = T.alloc_barrier([128] * stages)
        with T.ws(1):
            if T.shuffle_elect(128):
                for k in range(steps):
                    slot, turn = k % stages, k // stages
                    T.mbarrier_wait_parity(empty[slot], (turn & 1) ^ 1)
                    T.tma_copy(A[by * BM, k * BK], a[slot, :, :], barrier=full[slot])
                    T.tma_copy(B[k * BK, bx * BN], b[slot, :, :], barrier=full[slot])
                    T.mbarrier_arrive(full[slot])
        with T.ws(0):
            T.clear(acc)
            for k in range(steps):
                slot, turn = k % stages, k // stages
                T.mbarrier_wait_parity(full[slot], turn & 1)
                T.wgmma_gemm(a[slot, :, :], b[slot, :, :], acc)
                T.wait_wgmma(0)
                T.mbarrier_arrive(empty[slot])
            T.copy(acc, C[by * BM, bx * BN])


def compiled_by_hand(**constants):
    half = T.Tensor((128, 128), "float16")
    return by_hand.compile(half, half, T.Tensor((128, 128), "float32"), target=HOPPER, **constants)


@pytest.mark.parametrize("kind", list(SPANS))
def test_kernel_by_hand_with_layouts_by_hand(hopper, rng, kind):
    M, N, K = 72, 136, 264
    a, b = operand(rng, (M, K), np.float16), operand(rng, (K, N), np.float16)
    c = hopper(by_hand, a, b, out=[((M, N), "float32")], a_kind=kind, b_kind=kind)
    assert_product(c, a, b)
    kernel = compiled_by_hand(a_kind=kind, b_kind=kind)
    assert tensor_maps(kernel) == {"A": SPANS[kind], "B": SPANS[kind]}
    assert swizzles_of_descriptors(kernel) == {SPANS[kind]}


def refused_at(call, words):
    """The headline of a refusal at the line with these words, which shows where the layout is
    given."""
    with pytest.raises(UnsupportedError) as caught:
        call()
    error = caught.value
    with open(__file__, encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert error.span.filename == __file__ and words in lines[error.span.line - 1]
    related = [lines[span.line - 1] for span, label in error.related if "gets its layout" in label]
    assert related and all("T.annotate_layout(" in line for line in related)
    return error.headline


def test_multiply_by_warpgroups_of_plain_rows_is_refused():
    assert refused_at(lambda: compiled_by_hand(b_kind="linear"), "T.wgmma_gemm(a[slot") == (
        "T.wgmma_gemm: warpgroups cannot multiply these tiles: b has the layout given by "
        "T.annotate_layout: rows."
    )


def test_bulk_copy_to_padded_rows_is_refused():
    assert refused_at(lambda: compiled_by_hand(a_kind=8), "T.tma_copy(A[") == (
        "T.tma_copy cannot bring A to a: a has the layout given by T.annotate_layout: rows, "
        "pitch 72."
    )


def test_preference_for_bulk_copies_to_padded_rows_is_refused():
    def call():
        compiled(HOPPER, a_kind=8, prefer="tma")

    assert refused_at(call, "T.copy(A[by * BM, k * BK], a, prefer") == (
        'T.copy: prefer_instruction="tma" is not possible: a has the layout given by '
        "T.annotate_layout: rows, pitch 72."
    )


# ---- without a multiply -------------------------------------------------------------------------

TILES = ["linear", "swizzled", "half_bank_swizzled", "quarter_bank_swizzled", "chunked", 1, 4]


@tilejit
def transpose(A: T.Tensor, B: T.Tensor, *, kind=None):
    M, N = A.shape
    with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 64), threads=64) as (bx, by):
        tile = T.alloc_shared((64, 64), A.dtype)
        lay(tile, kind)
        T.copy(A[by * 64, bx * 64], tile)
        for i, j in T.Parallel(64, 64):
            B[bx * 64 + i, by * 64 + j] = tile[j, i]


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", TILES)
def test_transpose_through_a_tile_that_lies_as_given(run, rng, kind, dtype):
    a = operand(rng, (70, 45), dtype)
    got = run(transpose, a, out=[((45, 70), dtype)], kind=kind)
    assert got.tobytes() == np.ascontiguousarray(a.T).tobytes()


@tilejit
def neighbours(A: T.Tensor, B: T.Tensor, *, kind=None):
    """Rows, columns and tiles by computed index; copies of parts; a row that threads change."""
    with T.Kernel(1, threads=64):
        tile = T.alloc_shared((3, 16, 32), A.dtype)
        lay(tile, kind)
        T.copy(A, tile)
        for i, j in T.Parallel(16, 32):
            tile[1, i, j] = tile[1, i, j] + tile[2, 15 - i, 31 - j]
        for t in range(3):
            T.copy(tile[t, 0:8, :], B[t, 8, 0])
            T.copy(tile[t, 8:16, 3:32], B[t, 0, 3])
            T.copy(tile[t, 8:16, 0:3], B[t, 0, 0])


@pytest.mark.parametrize("kind", TILES)
def test_tiles_one_after_the_other_lie_as_given(run, rng, kind):
    a = rng.integers(-99, 99, (3, 16, 32)).astype(np.float32)
    expected = a.copy()
    expected[1] += a[2, ::-1, ::-1]
    expected = np.roll(expected, 8, axis=1)
    got = run(neighbours, a, out=[(a.shape, np.float32)], kind=kind)
    assert (got == expected).all()


@tilejit
def through(A: T.Tensor, B: T.Tensor, *, shape, kind=None, prefer=None):
    with T.Kernel(1, threads=128):
        tile = T.alloc_shared(shape, A.dtype)
        lay(tile, kind)
        T.copy(A, tile, prefer_instruction=prefer)
        T.sync_threads()
        T.copy(tile, B, prefer_instruction=prefer)


@pytest.mark.parametrize("shape, kind, swizzle", [
    ((64, 64), "full_bank_swizzled", 128), ((64, 64), "half_bank_swizzled", 64),
    ((16, 48), "quarter_bank_swizzled", 32), ((16, 24), "chunked", 0), ((16, 72), "linear", 0),
    ((3, 5, 8), "linear", 0), ((2, 8, 64), "half_bank_swizzled", 64), ((64,), "linear", 0),
    ((300, 8), "linear", None), ((16, 320), "linear", None), ((16, 320), "swizzled", 128),
])  # fmt: skip
def test_bulk_copies_fill_and_empty_tiles_that_lie_as_given(hopper, rng, shape, kind, swizzle):
    a = operand(rng, shape, np.float16)
    prefer = None if swizzle is None else "tma"  # no boxes make up such rows
    constants = {"shape": shape, "kind": kind, "prefer": prefer}
    assert (hopper(through, a, out=[(shape, "float16")], **constants) == a).all()
    spec = T.Tensor(shape, "float16")
    kernel = through.compile(spec, spec, target=HOPPER, **constants)
    if prefer:
        assert set(tensor_maps(kernel).values()) == {swizzle}
    else:
        reason = "no boxes make up" if shape[0] == 300 else "tile has the layout given by"
        with pytest.raises(UnsupportedError, match=reason):
            through.compile(spec, spec, target=HOPPER, **{**constants, "prefer": "tma"})


@pytest.mark.parametrize("out", ["float16", "float32"])
@pytest.mark.parametrize("kind", [*TILES, 8])
def test_results_leave_through_a_tile_that_lies_as_given(hopper, rng, kind, out):
    size, shape = (72, 104, 40), {"BN": 128, "BK": 32}
    check(hopper, rng, out=out, c_kind=kind, size=size, **shape)


@pytest.mark.parametrize("kind", [*TILES, 8])
def test_results_of_warps_leave_through_a_tile_that_lies_as_given(run, rng, kind):
    check(run, rng, out="float16", c_kind=kind, size=(72, 104, 40), BN=128, BK=32)


# ---- keys ---------------------------------------------------------------------------------------

MAKE = T.make_full_bank_swizzled_layout


@tilejit
def captured(A: T.Tensor):
    with T.Kernel(1, threads=32):
        tile = T.alloc_shared((8, 64), A.dtype)
        T.annotate_layout({tile: MAKE(tile)})
        T.copy(A, tile)
        for i, j in T.Parallel(8, 64):
            A[i, j] = tile[7 - i, j]


def layout_in(kernel):
    return re.search(r"tile: layout given, (.*)", kernel.explain())[1]


def test_other_layouts_are_other_kernels(monkeypatch):
    spec = T.Tensor((64, 64), "float16")
    kernels = {
        kind: transpose.compile(spec, spec, target="sm_80", kind=kind) for kind in (None, *TILES)
    }
    assert len({id(k) for k in kernels.values()}) == len(kernels)
    assert layout_in(kernels["linear"]) == "rows"
    assert layout_in(kernels[4]) == "rows, pitch 68"
    again = transpose.compile(spec, spec, target="sm_80", kind=4)
    assert again is kernels[4]
    small = T.Tensor((8, 64), "float16")
    first = captured.compile(small, target="sm_80")
    monkeypatch.setitem(globals(), "MAKE", T.make_half_bank_swizzled_layout)
    second = captured.compile(small, target="sm_80")
    assert layout_in(first) == "rows, 128-byte swizzle"
    assert layout_in(second) == "rows, panels of 32, 64-byte swizzle"
    monkeypatch.undo()
    assert captured.compile(small, target="sm_80") is first


def test_calls_take_the_kernel_of_their_layout(rng):
    a = operand(rng, (70, 45), np.float32)
    with options(simulate=True):
        for kind in ("linear", 1, "linear", "swizzled", 1):
            b = np.zeros((45, 70), np.float32)
            transpose(a, b, kind=kind)
            assert (b == a.T).all()


def test_threads_left_open_are_chosen_for_the_given_layout():
    kernel = compiled(HOPPER, size=(1024, 1024, 512), a_kind="linear", threads=None)
    assert "mma.m16n8k16" in kernel.explain()
