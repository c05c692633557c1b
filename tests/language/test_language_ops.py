"""Tile ops: T.copy, T.fill, T.clear, T.gemm, atomics and synchronisation; nodes and errors."""

import pytest
from traced import kernel, refusal, refused, tensor

import tilejit.language as T
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ShapeError,
    TraceError,
    UnsupportedError,
)
from tilejit.ir.expr import show
from tilejit.ir.node import Atomic, Load, Parallel, Store
from tilejit.ir.sync import BarrierArrive, BarrierWait, SyncThreads
from tilejit.language.trace import FrameKind, current
from tilejit.ops.copy import Copy, Fill
from tilejit.ops.gemm import Gemm, GemmWarpPolicy


def last(nodes, kind):
    (node,) = [n for n in nodes if isinstance(n, kind)][-1:]
    return node


def copied(src, dst, **options):
    """The Copy node's regions as text, and their shape."""
    T.copy(src, dst, **options)
    node = last(current().root.nodes, Copy)
    assert node.src.shape == node.dst.shape
    return repr(node.src), repr(node.dst), node.src.shape


# -- copy


def test_copy_of_whole_buffers_keeps_them_whole():
    with kernel():
        s = T.alloc_shared((64, 32), "float16")
        acc = T.alloc_fragment((64, 32), "float32")
        assert copied(s, acc) == ("s", "acc", (64, 32))
        assert copied(acc, s) == ("acc", "s", (64, 32))


def test_copy_start_point_takes_the_other_sides_extents():
    A, C = tensor("A", (200, 100), "float16"), tensor("C", (200, 100), "float16")
    with kernel():
        bx = T.get_block_binding()
        s = T.alloc_shared((64, 32), "float16")
        src, _, shape = copied(A[bx * 64, 32], s)
        assert shape == (64, 32) and src.startswith("A[bx * 64:") and "32:64" in src
        _, dst, shape = copied(s, C[0, 8])
        assert (dst, shape) == ("C[0:64, 8:40]", (64, 32))


def test_copy_start_point_of_a_symbolic_tensor_works():
    M, N = T.dynamic("M, N")
    A = tensor("A", (M, N), "float16")
    with kernel():
        s = T.alloc_shared((64, 32), "float16")
        assert copied(A[64, 0], s)[0] == "A[64:128, 0:32]"


def test_copy_start_point_with_leading_scalars_drops_them():
    Q = tensor("Q", (2, 4, 100, 32), "float16")
    with kernel():
        q = T.alloc_shared((64, 32), "float16")
        assert copied(Q[1, 3, 64, 0], q)[::2] == ("Q[1, 3, 64:128, 0:32]", (64, 32))
        assert copied(q, Q[1, 3, 64, 0])[1] == "Q[1, 3, 64:128, 0:32]"


def test_copy_slice_with_a_scalar_in_the_middle_drops_it():
    Q = tensor("Q", (2, 128, 4, 32), "float16")
    with kernel():
        bx = T.get_block_binding()
        q = T.alloc_shared((64, 32), "float16")
        src, _, shape = copied(Q[1, bx * 64 : (bx + 1) * 64, 3, :], q)
        assert shape == (64, 32) and src.endswith(", 3, 0:32]")


def test_copy_start_point_of_a_longer_tile_drops_extents_of_one():
    A = tensor("A", (64, 32))
    with kernel():
        s = T.alloc_shared((1, 16, 32), "float32")
        assert copied(A[8, 0], s)[::2] == ("A[8:24, 0:32]", (16, 32))


def test_copy_ignores_extents_of_one():
    with kernel():
        s = T.alloc_shared((1, 64), "float16")
        t = T.alloc_shared((64, 1), "float16")
        f = T.alloc_fragment((64,), "float16")
        assert copied(s, f)[2] == (64,)
        assert copied(s, t)[2] == (64,)


def test_copy_of_two_elements_moves_one():
    A, B = tensor("A", (8,)), tensor("B", (8, 8), "float16")
    with kernel():
        assert copied(A[3], B[2, 1]) == ("A[3]", "B[2, 1]", ())


def test_copy_to_and_from_a_variable_moves_one():
    A = tensor("A", (8, 8))
    with kernel():
        x = T.alloc_var("float32")
        assert copied(A[3, 4], x)[0] == "A[3, 4:5]"


def test_copy_partial_index_is_the_rest_of_the_tensor():
    A = tensor("A", (8, 32))
    with kernel():
        row = T.alloc_local((32,), "float32")
        assert copied(A[3], row)[::2] == ("A[3, 0:32]", (32,))


def test_copy_of_a_tile_between_scopes_of_every_pair_is_recorded():
    A = tensor("A", (16, 16))
    with kernel() as nodes:
        sides = [
            A,
            T.alloc_shared((16, 16), "float16"),
            T.alloc_fragment((16, 16), "int32"),
            T.alloc_local((16, 16), "float32"),
        ]
        for src in sides:
            for dst in sides:
                T.copy(src, dst)
    assert len([n for n in nodes if isinstance(n, Copy)]) == 16


def test_copy_options_reach_the_node():
    with kernel() as nodes:
        s = T.alloc_shared((16, 32), "float16")
        f = T.alloc_fragment((16, 32), "float16")
        T.copy(f, s, coalesced_width=8, disable_tma=True, prefer_instruction="sync")
    node = last(nodes, Copy)
    assert (node.coalesced_width, node.prefer) == (8, "sync")
    assert node.span is not None and node.span.filename.endswith("test_language_ops.py")


def test_copy_of_unequal_extents_names_both_shapes():
    with kernel():
        a = T.alloc_shared((64, 32), "float16")
        b = T.alloc_fragment((32, 64), "float16")
        with refused(
            ShapeError,
            "T.copy: the source is 64x32, but the destination is 32x64.",
            "Give both sides the same extents, or a start point such as `b[i, j]`, "
            "which takes them from the other side.",
        ):
            T.copy(a, b)
        error = refusal(lambda: T.copy(a, b), ShapeError)
    assert [label for _, label in error.related] == ["a comes from here", "b comes from here"]


def test_copy_of_a_whole_symbolic_tensor_wants_a_start_point():
    n = T.dynamic("n")
    A, B = tensor("A", (n, 32)), tensor("B", (n, 32))
    with kernel():
        s = T.alloc_shared((64, 32), "float32")
        with refused(
            ShapeError,
            "T.copy: `A` is (n, 32), but the other side is 64x32.",
            "Name a start point, `A[i, j]`, with a tile on the other side.",
        ):
            T.copy(A, s)
        with refused(
            ShapeError,
            "T.copy: `B` is (n, 32), known only at run time, and nothing else says how much is "
            "meant.",
            "Name a start point, `B[i, j]`, with a tile on the other side.",
        ):
            T.copy(A[0, 0], B)
        with refused(
            ShapeError,
            "T.copy: `A` is (n, 32), known only at run time, and nothing else says how much is "
            "meant.",
            "Name a start point, `A[i, j]`, with a tile on the other side.",
        ):
            T.copy(A, B)


def test_copy_of_too_many_dimensions_is_refused():
    A = tensor("A", (64,))
    with kernel():
        s = T.alloc_shared((8, 8), "float32")
        with refused(
            ShapeError,
            "T.copy: `A` has 1 dimension, but `s` is 8x8.",
            "Copy a slice with fewer dimensions.",
        ):
            T.copy(A[0], s)


def test_copy_of_something_else_is_refused():
    with kernel():
        s = T.alloc_shared((8, 8), "float32")
        with refused(
            ArgumentTypeError,
            "T.copy: the source is 1.5, not a buffer, a slice or an element of one.",
            "For example `A`, `A[i, j]` (a start point) or `A[i:i + 64, j:j + 32]`.",
        ):
            T.copy(1.5, s)
        with refused(
            ArgumentTypeError,
            "T.copy: the destination is None, not a buffer, a slice or an element of one.",
            "For example `A`, `A[i, j]` (a start point) or `A[i:i + 64, j:j + 32]`.",
        ):
            T.copy(s, None)
        with refused(ArgumentTypeError, "T.copy: `bars` is a barrier, which holds no tile."):
            bars = T.alloc_barrier([1] * 8)
            T.copy(bars, s)


def test_copy_options_without_meaning_are_refused():
    with kernel():
        s = T.alloc_shared((8, 8), "float32")
        f = T.alloc_fragment((8, 8), "float32")
        with refused(
            ArgumentError,
            "T.copy: prefer_instruction is 'fast'.",
            'It is "tma", "cp_async" or "sync".',
        ):
            T.copy(s, f, prefer_instruction="fast")
        with refused(
            ArgumentError,
            'T.copy: prefer_instruction="tma" and disable_tma=True contradict.',
        ):
            T.copy(s, f, prefer_instruction="tma", disable_tma=True)
        with refused(ArgumentTypeError, "T.copy: disable_tma is 1, not True or False."):
            T.copy(s, f, disable_tma=1)
        with refused(
            ArgumentError,
            "T.copy: eviction_policy is 'evict_some'.",
            'It is "evict_normal", "evict_first", "evict_last".',
        ):
            T.copy(s, f, eviction_policy="evict_some")
        with refused(
            ArgumentError,
            "T.copy: coalesced_width is 0; it counts elements, 1 or more.",
        ):
            T.copy(s, f, coalesced_width=0)
        with refused(
            ArgumentError,
            "T.copy: coalesced_width is 3, which does not divide the last extent 8.",
        ):
            T.copy(s, f, coalesced_width=3)


def test_copy_outside_a_kernel_is_refused():
    A = tensor("A", (8, 8))
    with refused(
        TraceError,
        "T.copy is only allowed inside a kernel.",
        "Put it under `with T.Kernel(...) as ...:` in a @tilejit function.",
    ):
        T.copy(A, A)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("T.copy", lambda s: T.copy(s, s)),
        ("T.fill", lambda s: T.fill(s, 0)),
        ("T.clear", lambda s: T.clear(s)),
        ("T.gemm", lambda s: T.gemm(s, s, s)),
        ("T.sync_threads", lambda s: T.sync_threads()),
        ("T.atomic_add on a tile", lambda s: T.atomic_add(s, s)),
    ],
)
def test_tile_op_inside_parallel_is_refused(name, call):
    with kernel():
        s = T.alloc_shared((8, 8), "float32")
        trace = current()
        frame = trace.push(FrameKind.PARALLEL, None)
        with refused(
            TraceError,
            f"{name} is not allowed inside T.Parallel.",
            "All threads of the block do it together: move it out of the loop.",
        ):
            call(s)
        trace.pop(frame)


def test_copy_from_a_broadcasting_buffer_repeats_extents_of_one():
    bias = tensor("bias", (1, 32), "float16", broadcasts=True)
    with kernel() as nodes:
        tile = T.alloc_shared((8, 32), "float32")
        T.copy(bias, tile)
    loop = last(nodes, Parallel)
    load, store = loop.body
    assert loop.extents == (8, 32)
    assert [show(e) for e in load.index] == ["0", "j"]
    assert [show(e) for e in store.index] == ["i", "j"]


def test_copy_from_a_broadcasting_buffer_that_repeats_nothing_is_a_copy():
    table = tensor("table", (64, 32), "float16", broadcasts=True)
    with kernel():
        tile = T.alloc_shared((8, 32), "float32")
        assert copied(table[8, 0], tile)[0] == "table[8:16, 0:32]"


def test_copy_from_a_broadcasting_start_point_repeats_an_extent_of_one():
    n = T.dynamic("n")
    bias = tensor("bias", (1, n), "float16", broadcasts=True)
    with kernel() as nodes:
        tile = T.alloc_shared((8, 32), "float32")
        T.copy(bias[0, 0], tile)
    load = last(nodes, Parallel).body[0]
    assert [show(e) for e in load.index] == ["0", "if_then_else(n == 1, 0, j)"]


def test_index_of_a_broadcasting_buffer_is_0_where_its_extent_is_one():
    n = T.dynamic("n")
    bias = tensor("bias", (1, n), "float16", broadcasts=True)
    plain = tensor("plain", (1, 8), "float16")
    with kernel() as nodes:
        i, j = T.get_thread_binding(), T.get_block_binding()
        _ = bias[i, j], plain[i, 3]
    first, second = [n for n in nodes if isinstance(n, Load)]
    at = show(j.expr)
    assert [show(e) for e in first.index] == ["0", f"if_then_else(n == 1, 0, {at})"]
    assert show(second.index[0]) == show(i.expr)


def test_copy_without_auto_broadcast_does_not_repeat():
    bias = tensor("bias", (1, 32))
    with kernel():
        tile = T.alloc_shared((8, 32), "float32")
        with refused(
            ShapeError,
            "T.copy: the source is 1x32, but the destination is 8x32.",
            "Give both sides the same extents, or a start point such as `tile[i, j]`, "
            "which takes them from the other side.",
        ):
            T.copy(bias, tile)


# -- fill, clear


def test_fill_and_clear_set_buffers_slices_and_elements():
    A = tensor("A", (8, 8), "int8")
    with kernel() as nodes:
        s = T.alloc_shared((8, 8), "float16")
        T.fill(s, 3)
        T.clear(s)
        T.fill(s[0:4, 2], 1.5)
        T.fill(A, -1)
        T.fill(A[2, 3], T.get_thread_binding())
    fills = [n for n in nodes if isinstance(n, Fill)]
    assert [f"{f.dst} = {show(f.value)}" for f in fills] == [
        "s = float16(3.0)",
        "s = float16(0.0)",
        "s[0:4, 2] = float16(1.5)",
        "A = int8(-1)",
        f"A[2, 3] = int8({show(fills[-1].value.children[0])})",
    ]
    assert fills[-1].dst.shape == ()


def test_fill_with_infinity_is_allowed():
    with kernel() as nodes:
        T.fill(T.alloc_fragment(8, "float32"), -T.infinity("float32"))
    assert nodes[0].value.value == float("-inf")


def test_fill_with_a_value_that_does_not_fit_is_refused():
    with kernel():
        s = T.alloc_shared((8, 8), "int8")
        with refused(
            ArgumentError,
            "300 does not fit int8 (-128 to 127).",
            "Choose a wider dtype, or a number that fits.",
        ):
            T.fill(s, 300)


def test_fill_of_a_symbolic_tensor_is_refused():
    A = tensor("A", (T.dynamic("n"), 8))
    with (
        kernel(),
        refused(
            ShapeError,
            "T.clear: `A` is (n, 8), known only at run time.",
            "Fill a slice of constant extents, or store to `A[i, j]` in T.Parallel.",
        ),
    ):
        T.clear(A)


# -- gemm


def tiles(a, b, c, dtypes=("float16", "float16", "float32")):
    return (
        T.alloc_shared(a, dtypes[0]),
        T.alloc_shared(b, dtypes[1]),
        T.alloc_fragment(c, dtypes[2]),
    )


@pytest.mark.parametrize(
    ("transpose_a", "transpose_b", "a", "b"),
    [
        (False, False, (64, 32), (32, 128)),
        (False, True, (64, 32), (128, 32)),
        (True, False, (32, 64), (32, 128)),
        (True, True, (32, 64), (128, 32)),
    ],
)
def test_gemm_all_four_transposes_record_m_n_k(transpose_a, transpose_b, a, b):
    with kernel() as nodes:
        A, B, C = tiles(a, b, (64, 128))
        T.gemm(A, B, C, transpose_a, transpose_b)
        T.gemm(A, B, C, transpose_A=transpose_a, transpose_B=transpose_b, clear_accum=True)
    first, second = nodes
    assert (first.m, first.n, first.k, first.clear) == (64, 128, 32, False)
    assert (second.transpose_a, second.transpose_b, second.clear) == (
        transpose_a,
        transpose_b,
        True,
    )


def test_gemm_defaults_of_the_rest_are_accepted():
    with kernel() as nodes:
        A, B, C = tiles((64, 32), (32, 128), (64, 128))
        T.gemm(A, B, C, policy=T.GemmWarpPolicy.FullRow, k_pack=1, mbar=None, annotations=None)
    assert isinstance(nodes[0], Gemm) and nodes[0].policy is GemmWarpPolicy.FullRow


def test_gemm_takes_slices_and_leading_extents_of_one():
    with kernel() as nodes:
        A = T.alloc_shared((2, 64, 32), "float16")
        B = T.alloc_shared((1, 32, 128), "float16")
        C = T.alloc_fragment((64, 128), "float32")
        T.gemm(A[1, :, :], B, C)
        T.gemm(A[0:1, 0:64, :], B[0, :, :], C)
    assert [(n.m, n.n, n.k) for n in nodes] == [(64, 128, 32)] * 2


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float16", "float16", "float32"),
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "float32"),
        ("tfloat32", "tfloat32", "float32"),
        ("int8", "int8", "int32"),
        ("uint8", "int8", "int32"),
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
    ],
)
def test_gemm_takes_every_pair_of_dtypes(dtypes):
    with kernel() as nodes:
        T.gemm(*tiles((64, 32), (32, 64), (64, 64), dtypes))
    assert isinstance(nodes[0], Gemm)


def test_gemm_takes_a_from_a_fragment():
    with kernel() as nodes:
        A = T.alloc_fragment((64, 32), "float16")
        _, B, C = tiles((1, 1), (32, 64), (64, 64))
        T.gemm(A, B, C)
    assert nodes[0].a.buffer is A.buffer


def test_gemm_with_unequal_k_names_both_tiles():
    with kernel():
        A = T.alloc_shared((128, 32), "float16")
        B = T.alloc_shared((64, 128), "float16")
        C = T.alloc_fragment((128, 128), "float32")
        with refused(
            ShapeError,
            "T.gemm: A is 128x32 and B is 64x128, so their K extents (32 and 64) differ.",
            "Give both tiles the same K.",
        ):
            T.gemm(A, B, C)
        error = refusal(lambda: T.gemm(A, B, C), ShapeError)
    assert [label for _, label in error.related] == ["A comes from here", "B comes from here"]


def test_gemm_with_a_forgotten_transpose_says_so():
    with kernel():
        A, B, C = tiles((128, 32), (64, 32), (128, 64))
        with refused(
            ShapeError,
            "T.gemm: A is 128x32 and B is 64x32, so their K extents (32 and 64) differ.",
            "Give both tiles the same K, or toggle transpose_B (True if B is stored N x K).",
        ):
            T.gemm(A, B, C)
        D = T.alloc_shared((32, 128), "float16")
        E = T.alloc_shared((32, 64), "float16")
        with refused(
            ShapeError,
            "T.gemm: A is 32x128 and B is 32x64, so their K extents (128 and 32) differ.",
            "Give both tiles the same K, or toggle transpose_A (True if A is stored K x M).",
        ):
            T.gemm(D, E, C)


def test_gemm_with_unequal_m_or_n_names_both_extents():
    with kernel():
        A, B, C = tiles((128, 32), (32, 64), (64, 64))
        with refused(
            ShapeError,
            "T.gemm: A is 128x32 and C is 64x64, so their M extents (128 and 64) differ.",
            "C has as many rows as the product: 128x64.",
        ):
            T.gemm(A, B, C)
        D = T.alloc_shared((48, 32), "float16")
        F = T.alloc_fragment((128, 64), "float32")
        with refused(
            ShapeError,
            "T.gemm: B is 48x32 (transposed) and C is 128x64, so their N extents (48 and 64) "
            "differ.",
            "C has as many columns as the product: 128x48.",
        ):
            T.gemm(A, D, F, transpose_B=True)


def test_gemm_of_other_ranks_is_refused():
    with kernel():
        A = T.alloc_shared((4, 16, 32), "float16")
        B = T.alloc_shared((32, 64), "float16")
        C = T.alloc_fragment((16, 64), "float32")
        with refused(ShapeError, "T.gemm: A is 4x16x32, but a tile has two dimensions, not 3."):
            T.gemm(A, B, C)
        with refused(
            ShapeError,
            "T.gemm: B is one element of `B`, not a tile.",
            "Pass `B` itself, or a slice of it.",
        ):
            T.gemm(A[0, :, :], B[0, 0], C)


def test_gemm_operands_in_the_wrong_memory_are_refused():
    n = T.dynamic("n")
    G, H = tensor("G", (64, 32), "float16"), tensor("H", (n, 64), "float16")
    with kernel():
        A, B, C = tiles((64, 32), (32, 64), (64, 64))
        with refused(
            ArgumentError,
            "T.gemm: A is in global memory, but it has to be in shared memory or a fragment.",
            "Copy it to shared memory with T.copy first.",
        ):
            T.gemm(G, B, C)
        with refused(
            ArgumentError,
            "T.gemm: B is in global memory, but it has to be in shared memory or a fragment.",
            "Copy it to shared memory with T.copy first.",
        ):
            T.gemm(A, H, C)
        with refused(
            ArgumentError,
            "T.gemm: C is in shared memory, but it has to be in a fragment.",
            "Allocate it with T.alloc_fragment.",
        ):
            T.gemm(A, B, T.alloc_shared((64, 64), "float32"))


def test_gemm_on_a_part_of_a_fragment_is_refused():
    with kernel():
        A = T.alloc_shared((64, 32), "float16")
        B = T.alloc_shared((32, 64), "float16")
        C = T.alloc_fragment((64, 128), "float32")
        with refused(
            UnsupportedError,
            "T.gemm: C is a 64x64 part of the fragment `C` (64x128).",
            "Pass the whole fragment, or allocate one of the part's extents.",
        ):
            T.gemm(A, B, C[:, 0:64])


def test_gemm_of_dtypes_that_nothing_multiplies_is_refused():
    with kernel():
        A, B, C = tiles((64, 32), (32, 64), (64, 64), ("float16", "bfloat16", "float32"))
        with refused(
            DTypeError,
            "T.gemm: nothing multiplies float16 (A) by bfloat16 (B).",
            "Both tiles need the same dtype, one of float16, bfloat16, tfloat32, float32, "
            "float64, int8, uint8, float8_e4m3fn, float8_e5m2; T.copy casts.",
        ):
            T.gemm(A, B, C)
        A, B, C = tiles((64, 32), (32, 64), (64, 64), ("int8", "int8", "float32"))
        with refused(
            DTypeError,
            "T.gemm: products of int8 (A) by int8 (B) add up in int32, but C is float32.",
            'Allocate C as "int32".',
        ):
            T.gemm(A, B, C)


def test_gemm_options_without_meaning_are_refused():
    with kernel():
        A, B, C = tiles((64, 32), (32, 64), (64, 64))
        with refused(UnsupportedError, "T.gemm: k_pack=2 is not supported.", "Leave k_pack out."):
            T.gemm(A, B, C, k_pack=2)
        with refused(
            UnsupportedError, "T.gemm: annotations={} is not supported.", "Leave annotations out."
        ):
            T.gemm(A, B, C, annotations={})
        with refused(
            ArgumentError,
            "T.gemm: 7 is not a policy for sharing C among warps.",
            "Policies: T.GemmWarpPolicy.Square, T.GemmWarpPolicy.FullRow, "
            "T.GemmWarpPolicy.FullCol.",
        ):
            T.gemm(A, B, C, policy=7)
        error = refusal(
            lambda: T.gemm(A, B, C, clear_accum=T.get_thread_binding() == 0), ArgumentTypeError
        )
    assert error.headline.endswith("it must be True or False while tracing.")
    assert error.hint == "Call T.gemm in both arms of `with T.If(condition):`."


# -- atomics


@pytest.mark.parametrize(
    ("call", "combine"),
    [
        (T.atomic_add, "add"),
        (T.atomic_max, "max"),
        (T.atomic_min, "min"),
        (T.atomic_or, "or"),
    ],
)
def test_atomic_on_an_element_records_one_update(call, combine):
    C = tensor("C", (8, 8), "int32")
    with kernel() as nodes:
        assert call(C[1, 2], 5, memory_order="relaxed") is None
        old = call(C[1, 2], 7, return_prev=True)
    first, second = [n for n in nodes if isinstance(n, Atomic)]
    assert (first.combine, show(first.value), first.out) == (combine, "5", None)
    assert old.expr is second.out and old.dtype == "int32"


@pytest.mark.parametrize(("use_tma", "prefer"), [(None, None), (True, "tma")])
@pytest.mark.parametrize("scope", ["fragment", "shared"])
def test_atomic_add_of_a_tile_is_a_copy_that_adds(scope, use_tma, prefer):
    C = tensor("C", (16, 32))
    with kernel() as nodes:
        tile = {"fragment": T.alloc_fragment, "shared": T.alloc_shared}[scope]((16, 32), "float16")
        T.atomic_add(C[0, 0], tile, use_tma=use_tma)
    copy = last(nodes, Copy)
    assert (copy.combine, copy.prefer) == ("add", prefer)
    assert copy.src.buffer is tile.buffer and copy.writes == (C.buffer,)
    assert copy.reads == (tile.buffer, C.buffer)


def test_atomic_add_casts_its_value():
    C = tensor("C", (8,), "float16")
    with kernel() as nodes:
        T.atomic_add(C[0], T.get_thread_binding())
    assert last(nodes, Atomic).value.dtype == "float16"


@pytest.mark.parametrize("form", ["start", "slice", "whole"])
def test_atomic_add_of_a_tile_updates_each_element(form):
    C = tensor("C", (16, 32))
    with kernel() as nodes:
        acc = T.alloc_fragment((16, 32), "float16")
        T.atomic_add({"start": C[0, 0], "slice": C[0:16, :], "whole": C}[form], acc, use_tma=False)
    loop = last(nodes, Parallel)
    load, update = loop.body
    assert loop.extents == (16, 32) and isinstance(load, Load)
    assert load.buffer is acc.buffer and update.buffer is C.buffer
    assert [show(e) for e in update.index] == ["i", "j"]
    assert show(update.value) == f"float32({load.out.name})"


def test_atomic_add_of_a_number_to_a_tile_updates_each_element():
    with kernel() as nodes:
        s = T.alloc_shared((16,), "int32")
        T.atomic_add(s, 1)
    loop = last(nodes, Parallel)
    assert loop.extents == (16,) and show(loop.body[0].value) == "1"


def test_atomic_of_unequal_tiles_is_refused():
    C = tensor("C", (16, 32))
    with kernel():
        acc = T.alloc_fragment((16, 16), "float32")
        with refused(
            ShapeError,
            "T.atomic_add: the source is 16x16, but the destination is 16x32.",
            "Give both sides the same extents, or a start point such as `C[i, j]`, "
            "which takes them from the other side.",
        ):
            T.atomic_add(C, acc)


def test_atomic_in_registers_is_refused():
    with kernel():
        f = T.alloc_fragment((8,), "float32")
        with refused(
            ArgumentError,
            'T.atomic_add: `f` is in "local.fragment", which no other thread can reach.',
            "Atomics are for global and shared memory; write `x += v` instead.",
        ):
            T.atomic_add(f[0], 1)


def test_atomic_on_a_dtype_without_it_is_refused():
    C, D = tensor("C", (8,), "int8"), tensor("D", (8,), "float32")
    with kernel():
        with refused(
            DTypeError,
            "T.atomic_add: `C` is int8, which has no atomic add.",
            "Dtypes: int32, uint32, int64, uint64, float16, bfloat16, float32, float64.",
        ):
            T.atomic_add(C[0], 1)
        with refused(
            DTypeError,
            "T.atomic_or: `D` is float32, which has no atomic or.",
            "Dtypes: int32, uint32, int64, uint64.",
        ):
            T.atomic_or(D[0], 1)


def test_atomic_options_without_meaning_are_refused():
    C = tensor("C", (8,))
    with kernel():
        s = T.alloc_shared((8,), "float32")
        with refused(
            UnsupportedError,
            "T.atomic_add: memory_order='acq_rel' is not supported.",
            'Atomics are "relaxed"; order them with T.sync_threads or a barrier.',
        ):
            T.atomic_add(C[0], 1, memory_order="acq_rel")
        for dst, value in ((C[0], 1), (C, 1.0), (s, s)):
            with refused(
                UnsupportedError,
                "T.atomic_add: use_tma=True adds tiles to global tensors only.",
                "Omit it.",
            ):
                T.atomic_add(dst, value, use_tma=True)
        with refused(
            UnsupportedError,
            "T.atomic_add: use_tma=True adds tiles of fragments and of shared memory only.",
            "Omit it.",
        ):
            T.atomic_add(C, tensor("D", (8,)), use_tma=True)
        with refused(
            ArgumentTypeError, "T.atomic_add: use_tma is 'yes', not True, False or None.", ""
        ):
            T.atomic_add(C, s, use_tma="yes")
        with refused(
            UnsupportedError, "T.atomic_max: annotations are not supported.", "Omit them."
        ):
            T.atomic_max(C[0], 1, annotations={})
        with refused(
            UnsupportedError,
            "T.atomic_add: return_prev=True needs one element, not a tile.",
            "Update `C[i]` in T.Parallel.",
        ):
            T.atomic_add(C, s, return_prev=True)
        n = T.dynamic("n")
        G = tensor("G", (n,))
        with refused(
            ShapeError,
            "T.atomic_add: `G` is (n,), known only at run time.",
            "Update `G[i]` in T.Parallel.",
        ):
            T.atomic_add(G, 1)


# -- barriers


def test_barrier_calls_record_arrivals_and_waits():
    with kernel() as nodes:
        one = T.alloc_barrier(128)
        several = T.alloc_barrier([32, 32])
        k = T.get_block_binding()
        T.barrier_arrive(one)
        T.mbarrier_arrive(several[1])
        T.barrier_wait(one, 0)
        T.mbarrier_wait_parity(several[k % 2], k & 1)
        T.sync_threads()
    assert [type(n) for n in nodes] == [
        BarrierArrive,
        BarrierArrive,
        BarrierWait,
        BarrierWait,
        SyncThreads,
    ]
    assert [show(n.slot) for n in nodes[:3]] == ["0", "1", "0"]
    assert nodes[3].barrier is several.buffer and nodes[3].parity.dtype == "int32"


def test_barrier_calls_on_other_things_are_refused():
    with kernel():
        s = T.alloc_shared((8,), "float32")
        several = T.alloc_barrier([32, 32])
        with refused(
            ArgumentTypeError,
            "The barrier of T.barrier_arrive must come from `T.alloc_barrier`, got the tile `s`.",
        ):
            T.barrier_arrive(s)
        with refused(
            ShapeError,
            "`several` holds 2 barriers, and the barrier of T.barrier_wait must be one.",
            "Write `several[k]`.",
        ):
            T.barrier_wait(several, 0)
        with refused(
            ArgumentError,
            "T.mbarrier_arrive: there is no block 1 in a cluster of 1.",
            "Ranks are 0 and up; T.Kernel(..., cluster=2) makes clusters of two.",
        ):
            T.mbarrier_arrive(several[0], cta_id=1)
        with refused(ArgumentTypeError, "T.mbarrier_arrive: cta_id is a float32, not an integer."):
            T.mbarrier_arrive(several[0], cta_id=0.5)


def test_barrier_parity_that_cannot_be_is_refused():
    with kernel():
        one = T.alloc_barrier(1)
        with refused(
            ArgumentError,
            "T.mbarrier_wait_parity: the parity is 2; it is 0 or 1.",
            "Take the phase number modulo 2: `phase & 1`.",
        ):
            T.mbarrier_wait_parity(one, 2)
        with refused(ArgumentTypeError, "T.barrier_wait: the parity is a float32, not an integer."):
            T.barrier_wait(one, 0.0)


def test_store_in_a_kernel_body_is_recorded_in_order():
    A = tensor("A", (8,))
    with kernel() as nodes:
        A[0] = A[1] + 1
    assert [type(n) for n in nodes] == [Load, Store]
