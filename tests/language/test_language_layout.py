"""Layouts by hand: what each constructor gives, and what is refused at the user's line."""

from __future__ import annotations

import pytest
from traced import kernel as opened
from traced import refused, tensor

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ShapeError,
    TraceError,
    UnsupportedError,
)
from tilejit.language.trace import Trace, current, tracing

FUNCTIONS = [
    (T.make_swizzled_layout, 128),
    (T.make_full_bank_swizzled_layout, 128),
    (T.make_half_bank_swizzled_layout, 64),
    (T.make_quarter_bank_swizzled_layout, 32),
    (T.make_chunked_layout, 16),
]
ADVICE = "T.make_linear_layout and T.make_padded_layout take any rows."


# ---- what layouts are ---------------------------------------------------------------------------


@pytest.mark.parametrize("make, span", FUNCTIONS)
def test_element_lies_where_the_hardware_puts_it(make, span):
    """Panels of `span` bytes; chunks XORed with the number of the 128-byte line, modulo theirs."""
    with opened():
        a = T.alloc_shared((16, 128), "float16")
        layout = make(a).layout
    for row, column in ((0, 0), (1, 9), (7, 127), (11, 64), (15, 40)):
        panel, inside = divmod(column * 2, span)
        address = panel * 16 * span + row * span + inside
        address ^= (address >> 7) % (span // 16) << 4
        assert layout.offset((row, column)) == address


@pytest.mark.parametrize(
    "columns, words",
    [
        (64, "16x64 float16 in rows, 128-byte swizzle"),
        (192, "16x192 float16 in rows, panels of 64, 128-byte swizzle"),
        (96, "16x96 float16 in rows, panels of 32, 64-byte swizzle"),
        (16, "16x16 float16 in rows, 32-byte swizzle"),
    ],
)
def test_swizzle_is_the_widest_that_rows_have_room_for(columns, words):
    with opened():
        a = T.alloc_shared((16, columns), "float16")
        assert repr(T.make_swizzled_layout(a)) == words


def test_plain_rows_have_gaps_where_asked():
    with opened():
        a, v = T.alloc_shared((3, 5, 7), "float32"), T.alloc_shared(9, "int8")
        linear, padded = T.make_linear_layout(a).layout, T.make_padded_layout(a, 2).layout
        assert linear.linear_strides == (35, 7, 1)
        assert padded.linear_strides == (45, 9, 1)
        assert T.make_linear_layout(v).layout.linear_strides == (1,)


def test_annotation_is_part_of_the_graph():
    with opened():
        a, b = T.alloc_shared((8, 64), "float16"), T.alloc_shared((8, 64), "float16")
        T.annotate_layout({a: T.make_swizzled_layout(a)})
        T.annotate_layout({b: T.make_linear_layout(b)})
        T.annotate_layout({})
        given = current().given.layouts
    assert [str(g.layout) for g in given.values()] == ["rows, 128-byte swizzle", "rows"]
    assert list(given) == [a.buffer, b.buffer]


def test_graph_is_printed_with_the_layouts_of_what_is_used():
    @tilejit
    def kernel(A: T.Tensor):
        with T.Kernel(1, threads=128):
            tiles = [T.alloc_shared((8, 64), "float16") for _ in range(7)]
            a, b, c, d, e, f, g = tiles
            T.annotate_layout({
                a: T.make_swizzled_layout(a), b: T.make_half_bank_swizzled_layout(b),
                c: T.make_quarter_bank_swizzled_layout(c), d: T.make_chunked_layout(d),
                e: T.make_linear_layout(e), f: T.make_padded_layout(f, 8),
                g: T.make_linear_layout(g),
            })  # fmt: skip
            for tile in (a, b, c, d, e, f):
                T.copy(A, tile)
                T.copy(tile, A)

    text = str(kernel.compile(T.Tensor((8, 64), "float16"), target="sm_80").graph)
    (line,) = [line.strip() for line in text.splitlines() if "annotate_layout" in line]
    names = ["tiles", *(f"tiles_{n}" for n in range(1, 6))]
    calls = [
        "make_full_bank_swizzled_layout(tiles)", "make_half_bank_swizzled_layout(tiles_1)",
        "make_quarter_bank_swizzled_layout(tiles_2)", "make_chunked_layout(tiles_3)",
        "make_linear_layout(tiles_4)", "make_padded_layout(tiles_5, 8)",
    ]  # fmt: skip
    pairs = ", ".join(f"{n}: T.{c}" for n, c in zip(names, calls, strict=True))
    assert line == f"T.annotate_layout({{{pairs}}})"


# ---- tiles that a layout is not for -------------------------------------------------------------


def test_rows_that_a_swizzle_does_not_divide_are_refused():
    with opened():
        a, b = T.alloc_shared((8, 40), "float16"), T.alloc_shared((12, 64), "float16")
        v, c = T.alloc_shared(64, "float16"), T.alloc_shared((8, 12), "int8")
        for make, span in FUNCTIONS[1:4]:
            with refused(
                ShapeError,
                f"T.{make.__name__}: a row of `a` has 80 bytes, no multiple of {span}.",
                ADVICE,
            ):
                make(a)
        with refused(
            ShapeError,
            "T.make_swizzled_layout: a row of `a` has 80 bytes, no multiple of 32.",
            ADVICE,
        ):
            T.make_swizzled_layout(a)
        with refused(
            ShapeError, "T.make_chunked_layout: a row of `c` has 12 bytes, no multiple of 16.",
            ADVICE,
        ):  # fmt: skip
            T.make_chunked_layout(c)
        for make, _ in FUNCTIONS:
            with refused(
                ShapeError, f"T.{make.__name__}: `b` has 12 rows, no multiple of 8.", ADVICE
            ):
                make(b)
            with refused(
                ShapeError,
                f"T.{make.__name__}: `v` has one dimension, so it has no rows to arrange.",
                "T.make_linear_layout takes it.",
            ):
                make(v)


def test_pads_that_cannot_be_are_refused():
    with opened():
        a, v = T.alloc_shared((8, 8), "float16"), T.alloc_shared(8, "float16")
        with refused(ArgumentTypeError, "T.make_padded_layout: pad is 'x', not an integer."):
            T.make_padded_layout(a, "x")
        with refused(
            ArgumentError,
            "T.make_padded_layout: pad must be positive, got 0.",
            "It counts elements; T.make_linear_layout has none.",
        ):
            T.make_padded_layout(a, 0)
        with refused(
            ShapeError,
            "T.make_padded_layout: `v` has one dimension, so it has no rows to arrange.",
            "T.make_linear_layout takes it.",
        ):
            T.make_padded_layout(v, 1)


@pytest.mark.parametrize(
    "call",
    [
        *(make for make, _ in FUNCTIONS),
        T.make_linear_layout,
        lambda x: T.make_padded_layout(x, 1),
        lambda x: T.annotate_layout({x: None}),
    ],
)
def test_what_is_no_shared_tile_is_refused(call):
    def name():
        return "T.annotate_layout" if call.__name__ == "<lambda>" else f"T.{call.__name__}"

    alloc = "Pass what T.alloc_shared returned."
    with opened():
        A, acc = tensor("A", (8, 64)), T.alloc_fragment((8, 64), "float32")
        s = T.alloc_shared((2, 8, 64), "float16")
        view = T.SharedBuffer((8, 64), "float16", data=s)
        strided = T.SharedBuffer((8, 64), "float16", strides=(72, 1))
        mbar = T.alloc_barrier(1)
        errors = []
        for x in (acc, A, s[0, :, :], view, strided, mbar, "s"):
            with pytest.raises((ArgumentTypeError, UnsupportedError)) as caught:
                call(x)
            assert caught.value.span.filename == __file__
            what, _, words = caught.value.headline.partition(": ")
            assert what == name() or what == "T.make_padded_layout"
            errors.append((type(caught.value), words, caught.value.hint))
    assert errors == [
        (UnsupportedError, "`acc` is a fragment, and layouts of fragments are decided by the "
         "compiler: its instructions ask for them.",
         "Tiles in shared memory can be given a layout."),
        (ArgumentTypeError, "`A` is in global memory, not a tile in shared memory.", alloc),
        (ArgumentTypeError, "`s[0, 0:8, 0:64]` is a slice, and a layout is that of a whole tile.",
         "Pass `s`."),
        (UnsupportedError, "`view` is a view of other memory, which is its layout.",
         "Give a layout to a tile from T.alloc_shared(shape, dtype)."),
        (UnsupportedError, "`strided` has strides of its own, which is its layout.",
         "Give a layout to a tile from T.alloc_shared(shape, dtype)."),
        (ArgumentTypeError, "`mbar` is in a barrier, not a tile in shared memory.", alloc),
        (ArgumentTypeError, "a str is no tile.", alloc),
    ]  # fmt: skip


# ---- annotations that cannot be -----------------------------------------------------------------


def test_annotation_of_something_else_than_layouts_is_refused():
    write = "Write `T.annotate_layout({a: T.make_swizzled_layout(a)})`."
    with opened():
        a = T.alloc_shared((8, 64), "float16")
        with refused(
            ArgumentTypeError, "T.annotate_layout takes a dictionary, got a TileLayout.", write
        ):
            T.annotate_layout(T.make_linear_layout(a))
        with refused(
            UnsupportedError,
            "T.annotate_layout: the layout of `a` is a function, not one that T.make_*_layout "
            "gives.",
            write,
        ):
            T.annotate_layout({a: lambda i, j: i * 64 + j})
        with refused(
            ArgumentTypeError,
            "T.annotate_layout: the layout of `a` is a tuple, not one that T.make_*_layout gives.",
            write,
        ):
            T.annotate_layout({a: (64, 1)})


def test_layout_of_another_tile_is_refused():
    with opened():
        a, b = T.alloc_shared((8, 64), "float16"), T.alloc_shared((8, 32), "float32")
        c = T.alloc_shared((8, 64), "bfloat16")
        with refused(
            ShapeError,
            "T.annotate_layout: `a` is 8x64 float16, but its layout is that of 8x32 float32.",
            "Make the layout from `a`.",
        ):
            T.annotate_layout({a: T.make_swizzled_layout(b)})
        with refused(
            DTypeError,
            "T.annotate_layout: `a` holds float16, but its layout is that of a tile of bfloat16.",
            "Make the layout from `a`.",
        ):
            T.annotate_layout({a: T.make_swizzled_layout(c)})


def test_second_layout_of_a_tile_is_refused():
    with opened():
        a = T.alloc_shared((8, 64), "float16")
        T.annotate_layout({a: T.make_swizzled_layout(a)})
        with refused(ArgumentError, "T.annotate_layout: `a` is given a layout twice."):
            T.annotate_layout({a: T.make_swizzled_layout(a)})


@tilejit
def misplaced(A: T.Tensor, *, place):
    with T.Kernel(1, threads=256):
        a = T.alloc_shared((8, 64), "float16")
        layouts = {a: T.make_swizzled_layout(a)}
        if place == "the device loop":
            for _ in range(2):
                T.annotate_layout(layouts)
        elif place == "the T.Parallel loop":
            for _ in T.Parallel(8):
                T.annotate_layout(layouts)
        elif place == "the branch":
            if T.get_thread_binding() < 1:
                T.annotate_layout(layouts)
        else:
            with T.ws(0):
                T.annotate_layout(layouts)


@pytest.mark.parametrize(
    "place", ["the device loop", "the T.Parallel loop", "the branch", "the T.ws body"]
)
def test_annotation_in_a_loop_branch_or_role_is_refused(place):
    with refused(
        TraceError,
        f"T.annotate_layout holds for the whole kernel and cannot stand in {place}.",
        "Write it right after the T.alloc_shared, at the top of the kernel.",
    ):
        misplaced.compile(T.Tensor((8, 64), "float16"), target="sm_90a", place=place)


def test_annotation_after_a_use_is_refused():
    hint = "Write the call right after the T.alloc_shared."
    headline = "T.annotate_layout: `a` was used before it is given a layout."
    with opened():
        a = T.alloc_shared((8, 64), "float16")
        layout = T.make_swizzled_layout(a)
        T.clear(a)
        with refused(TraceError, headline, hint):
            T.annotate_layout({a: layout})

    @tilejit
    def roles(A: T.Tensor):
        with T.Kernel(1, threads=256):
            a = T.alloc_shared((8, 64), "float16")
            with T.ws(0):
                T.copy(A, a)
            T.annotate_layout({a: T.make_swizzled_layout(a)})

    with refused(TraceError, headline, hint):
        roles.compile(T.Tensor((8, 64), "float16"), target="sm_90a")


def test_annotation_outside_a_kernel_or_of_another_one_is_refused():
    inside = "Put it under `with T.Kernel(...) as ...:` in a @tilejit function."
    with tracing(Trace("kernel")):
        with T.Kernel(1, threads=32):
            a = T.alloc_shared((8, 64), "float16")
            layout = T.make_swizzled_layout(a)
        with refused(TraceError, "T.annotate_layout is only allowed inside a kernel.", inside):
            T.annotate_layout({a: layout})
        with refused(TraceError, "T.make_swizzled_layout is only allowed inside a kernel.", inside):
            T.make_swizzled_layout(a)
        with T.Kernel(1, threads=32), refused(
            TraceError,
            "`a` was not allocated in this kernel.",
            "On-chip memory lasts as long as its kernel; pass results through a tensor.",
        ):  # fmt: skip
            T.annotate_layout({a: layout})


@tilejit
def viewed(A: T.Tensor, *, kind):
    with T.Kernel(1, threads=32):
        a = T.alloc_shared((8, 64), "float16")
        view = T.SharedBuffer((512,), "float16", data=a)
        layouts = {
            "linear": T.make_linear_layout(a),
            "padded": T.make_padded_layout(a, 8),
            "swizzled": T.make_swizzled_layout(a),
        }
        T.annotate_layout({a: layouts[kind]})
        T.copy(A, a)
        for i in T.Parallel(512):
            view[i] = view[i] + 1
        T.copy(a, A)


def test_view_of_a_tile_that_lies_in_plain_rows_is_taken():
    kernel = viewed.compile(T.Tensor((8, 64), "float16"), target="sm_80", kind="linear")
    assert "a: layout given, rows" in kernel.explain()


@pytest.mark.parametrize("kind, words", [("padded", "rows, pitch 72"),
                                         ("swizzled", "rows, 128-byte swizzle")])  # fmt: skip
def test_view_of_a_tile_that_lies_otherwise_is_refused(kind, words):
    with refused(
        UnsupportedError,
        "`view` is a view of `a`, and views see plain rows; it was given another layout "
        f"({words}).",
        "Give it T.make_linear_layout, or a tile of its own in place of the view.",
    ):
        viewed.compile(T.Tensor((8, 64), "float16"), target="sm_80", kind=kind)


def test_names_of_tilelang_that_have_another_name_here_say_so():
    with pytest.raises(AttributeError, match=r"write T\.make_swizzled_layout\."):
        _ = T.make_wgmma_swizzled_layout
    with pytest.raises(AttributeError, match=r"T\.annotate_layout with T\.make_padded_layout\."):
        _ = T.annotate_padding
