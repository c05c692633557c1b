"""Proxies: every spelling of tilejit.language.proxy, what each argument means, each error."""

import sys
import types

import ml_dtypes
import numpy as np
import pytest
from traced import function, kernel, refused, tensor

import tilejit.language as T
from tilejit import dtypes
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    OutOfRangeError,
    ShapeError,
    TraceError,
    UnsupportedError,
)
from tilejit.ir.analysis import divisor
from tilejit.ir.buffer import Scope
from tilejit.ir.expr import Var, VarKind, int_value, show
from tilejit.ir.node import Store
from tilejit.language import proxy
from tilejit.language.value import Value

M, N = 64, 32


class TorchDType:
    """Stands for torch.dtype, which tilejit knows by module and name alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"


TorchDType.__module__, TorchDType.__name__ = "torch", "dtype"
torch = types.SimpleNamespace(float16=TorchDType("float16"), bfloat16=TorchDType("bfloat16"))


def spec(handle) -> tuple:
    return handle.shape, handle.dtype.name, handle.strides, handle.scope.value


@pytest.mark.parametrize(
    ("made", "shape", "dtype"),
    [
        (lambda: T.Tensor((M, N)), (M, N), "float32"),
        (lambda: T.Tensor((M, N), "float16"), (M, N), "float16"),
        (lambda: T.Tensor([M, N], "float16"), (M, N), "float16"),
        (lambda: T.Tensor((M, N), T.float16), (M, N), "float16"),
        (lambda: T.Tensor((M, N), torch.float16), (M, N), "float16"),
        (lambda: T.Tensor((M, N), np.dtype("float16")), (M, N), "float16"),
        (lambda: T.Tensor((M, N), np.float16), (M, N), "float16"),
        (lambda: T.Tensor((M, N), ml_dtypes.bfloat16), (M, N), "bfloat16"),
        (lambda: T.Tensor((M, N), np.dtype(ml_dtypes.float8_e5m2)), (M, N), "float8_e5m2"),
        (lambda: T.Tensor((M, N), "float"), (M, N), "float32"),
        (lambda: T.Tensor((M, N), "int"), (M, N), "int32"),
        (lambda: T.Tensor((M, N), "half"), (M, N), "float16"),
        (lambda: T.Tensor((M, N), "long"), (M, N), "int64"),
        (lambda: T.Tensor((M, N), T.ptr), (M, N), "int64"),
        (lambda: T.Tensor(128, "float16"), (128,), "float16"),
        (lambda: T.Tensor(np.int64(8)), (8,), "float32"),
        (lambda: T.Tensor((np.int64(8), 4)), (8, 4), "float32"),
        (lambda: T.Tensor(np.array([8, 4])), (8, 4), "float32"),
        (lambda: T.Tensor((), "float16"), (), "float16"),
        (lambda: T.Tensor((0, 4)), (0, 4), "float32"),
        (lambda: T.Tensor(shape=(M, N), dtype="int8"), (M, N), "int8"),
        (lambda: T.Tensor[(M, N), "float16"], (M, N), "float16"),
        (lambda: T.Tensor[[M, N], "float16"], (M, N), "float16"),
        (lambda: T.Tensor[(M, N), T.float16], (M, N), "float16"),
        (lambda: T.Tensor[(M, N), torch.float16], (M, N), "float16"),
        (lambda: T.Tensor[M, N], (M, N), "float32"),
        (lambda: T.Tensor[(M, N)], (M, N), "float32"),
        (lambda: T.Tensor[(M,)], (M,), "float32"),
        (lambda: T.Tensor[M], (M,), "float32"),
        (lambda: T.Tensor[()], (), "float32"),
        (lambda: T.Tensor[[M, N]], (M, N), "float32"),
        (lambda: T.Tensor[M, "float16"], (M,), "float16"),
        (lambda: T.Tensor[M, torch.float16], (M,), "float16"),
        (lambda: T.Tensor[M, np.float16], (M,), "float16"),
        (lambda: T.Tensor[M, N, "float16"], (M, N), "float16"),
        (lambda: T.Tensor[np.int32(M), N], (M, N), "float32"),
        (lambda: T.Tensor[M, T.ptr], (M,), "int64"),
        (lambda: T.Buffer((M, N)), (M, N), "float32"),
        (lambda: T.Buffer[M], (M,), "float32"),
        (lambda: T.Buffer[M, N], (M, N), "float32"),
        (lambda: T.Buffer[(M, N), "int8"], (M, N), "int8"),
        (lambda: T.BaseTensor((M, N), "int8"), (M, N), "int8"),
        (lambda: T.BaseTensor[(M, N), "int8"], (M, N), "int8"),
    ],
)
def test_tensor_every_spelling_gives_its_shape_and_dtype(made, shape, dtype):
    assert made().shape == shape
    assert made().dtype == dtype
    assert made().scope == "global"
    assert made().strides == tuple(int(np.prod(shape[d + 1 :])) for d in range(len(shape)))


def test_torch_dtype_is_recognised_without_importing_torch():
    was_imported = "torch" in sys.modules
    assert T.Tensor[M, torch.bfloat16].dtype == "bfloat16"
    assert ("torch" in sys.modules) is was_imported


def test_tensor_of_symbols_derives_symbolic_strides():
    n = T.dynamic("n")
    made = T.Tensor((N, n, 4), "float16")
    assert [repr(x) for x in made.shape] == ["32", "n", "4"]
    assert [repr(x) for x in made.strides] == ["n * 4", "4", "1"]


def test_tensor_of_an_expression_of_symbols_keeps_it():
    n = T.dynamic("n")
    assert repr(T.Tensor((n * 2 + 1,)).shape[0]) == "(n * 2) + 1"
    assert repr(T.Tensor[n, T.float16].shape[0]) == "n"
    assert repr(T.Tensor(n, "float16").shape[0]) == "n"


def test_tensor_promises_sixteen_bytes_unless_align_says_otherwise():
    assert T.Tensor((M,)).buffer.align == 16
    assert T.Tensor((M,), align=0).buffer.align == 16
    assert T.Tensor((M,), align=4).buffer.align == 4
    assert T.Buffer((M,), align=64).buffer.align == 64


def test_tensor_scope_override_is_honoured():
    assert T.Tensor((M, N), "float16", scope="shared").scope == "shared.dyn"
    assert T.Tensor((M, N), "float16", None, "shared.dyn").scope == Scope.SHARED
    assert T.Buffer((M, N), scope="local").scope == "local"


@pytest.mark.parametrize(
    ("made", "strides"),
    [
        (lambda: T.StridedTensor((M, N), (1, M), "float16"), (1, M)),
        (lambda: T.StridedTensor[(M, N), (1, M), "float16"], (1, M)),
        (lambda: T.StridedTensor((M, N), [N, 1]), (N, 1)),
        (lambda: T.StridedTensor((M, N), (0, 1), "float16"), (0, 1)),
        (lambda: T.StridedTensor(M, 1, "float16"), (1,)),
        (lambda: T.StridedTensor[M, 2], (2,)),
        (lambda: T.StridedTensor((M, N), strides=(N * 2, 2), dtype="int8"), (N * 2, 2)),
        (lambda: T.Buffer((M, N), strides=(np.int64(40), 1)), (40, 1)),
        (lambda: T.Buffer((M, N), strides=[]), (N, 1)),
    ],
)
def test_strided_tensor_every_spelling_gives_its_strides(made, strides):
    assert made().strides == strides


def test_strided_tensor_takes_symbols_as_strides():
    n, s = T.dynamic("n, s")
    made = T.StridedTensor((n, N), (s, 1), "float16")
    assert [repr(x) for x in made.strides] == ["s", "1"]


@pytest.mark.parametrize(
    ("one", "scope"),
    [
        (T.FragmentBuffer, "local.fragment"),
        (T.SharedBuffer, "shared.dyn"),
        (T.LocalBuffer, "local"),
    ],
)
def test_tile_proxy_outside_a_kernel_is_an_annotation(one, scope):
    assert spec(one((M, N), "float16")) == ((M, N), "float16", (N, 1), scope)
    assert spec(one[(M, N), "float16"]) == ((M, N), "float16", (N, 1), scope)
    assert one(M).shape == (M,)
    assert one[M].shape == (M,)


@pytest.mark.parametrize(
    ("one", "scope"),
    [
        (T.FragmentBuffer, "local.fragment"),
        (T.SharedBuffer, "shared.dyn"),
        (T.LocalBuffer, "local"),
    ],
)
def test_tile_proxy_inside_a_kernel_allocates_under_the_variable_name(one, scope):
    with kernel() as nodes:
        tile = one((M, N), "float16")
        other = one[8, "int8"]
        tile[0, 0] = 1
    assert (tile.name, tile.scope, tile.buffer.data) == ("tile", scope, None)
    assert (other.name, other.shape) == ("other", (8,))
    assert [type(n) for n in nodes] == [Store] and nodes[0].buffer is tile.buffer


def test_shared_buffer_takes_every_field():
    with kernel():
        s = T.SharedBuffer((M, N), "float16", strides=(40, 1), align=16, offset_factor=8)
    assert s.strides == (40, 1)
    assert (s.buffer.align, s.buffer.dtype) == (16, "float16")
    assert int_value(s.buffer.offset) == 0


def test_shared_buffer_with_elem_offset_allocates_room_for_it():
    with kernel():
        s = T.SharedBuffer((4, 8), "float16", elem_offset=4)
    assert int_value(s.buffer.offset) == 4
    assert s.buffer.root.extents == (4 + 32,)
    assert s.shape == (4, 8)


def test_view_counts_elem_offset_from_its_data():
    with kernel():
        base = T.SharedBuffer((M, N), "float16")
        view = T.SharedBuffer((8, 8), "float16", data=base, elem_offset=64)
        inner = T.SharedBuffer(8, "float16", data=view, elem_offset=8)
    assert view.buffer.data is base.buffer and int_value(view.buffer.offset) == 64
    assert inner.buffer.data is base.buffer and int_value(inner.buffer.offset) == 72


def test_view_of_another_dtype_counts_in_its_own_elements():
    with kernel():
        base = T.SharedBuffer(64, "float32")
        part = T.SharedBuffer(16, "float32", data=base, elem_offset=32)
        halves = T.SharedBuffer(30, "float16", data=part, elem_offset=2)
    assert int_value(halves.buffer.offset) == 32 * 2 + 2


def test_view_offset_may_be_traced_and_offset_factor_promises_its_divisor():
    with kernel():
        base = T.SharedBuffer((4, M), "float16")
        k = T.get_block_binding()
        view = T.SharedBuffer(16, "float16", data=base, elem_offset=k, offset_factor=8)
        plain = T.SharedBuffer(16, "float16", data=base, elem_offset=k)
    assert divisor(view.buffer.offset) % 8 == 0
    assert divisor(plain.buffer.offset) == 1


def test_tensor_view_of_a_tensor_shares_its_address():
    with kernel():
        a = tensor("a", (M, N), "float16")
        rows = T.Buffer((N,), "float16", data=a, elem_offset=N)
    assert rows.buffer.data is a.buffer.data
    assert int_value(rows.buffer.offset) == N


def test_auto_broadcast_marks_the_buffer():
    assert T.Buffer((1, N), buffer_type="auto_broadcast").buffer.broadcasts
    assert not T.Buffer((1, N), buffer_type="default").buffer.broadcasts
    assert not T.Buffer((1, N)).buffer.broadcasts


def test_axis_separators_empty_are_accepted():
    assert T.Buffer((M, N), axis_separators=[]).shape == (M, N)
    assert T.SharedBuffer((M, N), axis_separators=()).shape == (M, N)


def test_proxy_instances_have_the_classes_and_defaults_of_the_seed():
    assert isinstance(T.Tensor, proxy.TensorProxy) and isinstance(T.Buffer, proxy.BufferProxy)
    assert isinstance(T.StridedTensor, proxy.StridedTensorProxy)
    assert proxy.BaseTensorProxy.default_scope == "global"
    assert proxy.BaseTensorProxy.default_align == 0
    assert proxy.BaseTensorProxy.default_offset_factor == 0
    assert isinstance(T.Tensor((M,)), T.BaseTensor) and not isinstance(3, T.BaseTensor)


def test_isinstance_of_a_proxy_tells_the_memory():
    with kernel():
        s = T.alloc_shared((M,), "float16")
    assert isinstance(s, T.SharedBuffer) and not isinstance(s, T.Tensor)
    assert isinstance(T.Tensor((M,)), T.Tensor) and not isinstance(T.Tensor((M,)), T.FragmentBuffer)
    assert not isinstance(None, T.Tensor)


def test_proxy_subclass_changes_the_defaults():
    class Aligned(proxy.BaseTensorProxy):
        default_scope = "shared.dyn"
        default_align = 128
        default_offset_factor = 8

    with kernel():
        s = Aligned()((M, N), "float16")
        t = Aligned()((M, N), "float16", align=32)
        with refused(
            ArgumentError, "T.Tensor: elem_offset is 4, not a multiple of offset_factor 8."
        ):
            Aligned()((M,), "float16", data=s, elem_offset=4)
    assert (s.scope, s.buffer.align, t.buffer.align) == ("shared.dyn", 128, 32)


# -- pointers


def pointer():
    return Value(Var("p", dtypes.int64, VarKind.POINTER))


@pytest.mark.parametrize(
    "make",
    [
        T.make_tensor,
        T.Tensor.from_ptr,
        T.Buffer.from_ptr,
        T.StridedTensor.from_ptr,
        T.BaseTensor.from_ptr,
        T.make_tensor_from_addr,
    ],
)
def test_pointer_becomes_a_tensor_in_and_before_the_kernel(make):
    p = pointer()
    with kernel():
        inside = make(p, (M, N), "float16")
        strided = make(p, (M, N), "float16", (1, M))
    with function():
        before = make(p, (M, N))
    assert spec(inside) == ((M, N), "float16", (N, 1), "global")
    assert inside.buffer.data is p.expr and strided.strides == (1, M)
    assert before.dtype == "float32"


def test_pointer_tensor_is_trusted_to_be_aligned_to_its_elements_only():
    with kernel():
        assert T.make_tensor(pointer(), (M,), "float16").buffer.align == 2
        assert T.Tensor((M,), "float16", data=pointer()).buffer.align == 2
        assert T.Tensor((M,), "float16", data=pointer(), align=16).buffer.align == 16


def test_pointer_table_element_becomes_a_tensor():
    table = tensor("table", (8,), "int64")
    with kernel() as nodes:
        g = T.get_block_binding()
        a = T.make_tensor(table[g], (M,), "float16")
        T.copy(a, T.alloc_shared(M, "float16"))
    assert a.buffer.data is nodes[0].out


def test_pointer_kept_in_a_variable_becomes_a_tensor():
    with kernel() as nodes:
        address = T.alloc_var(T.ptr, init=pointer())
        a = T.make_tensor(address, (M,), "float16")
    assert a.buffer.data is nodes[-1].out


def test_from_ptr_of_a_tile_proxy_views_a_tile():
    with kernel():
        base = T.alloc_shared((M, N), "float16")
        flat = T.SharedBuffer.from_ptr(base, (M * N,), "float16")
    assert flat.buffer.data is base.buffer


def test_ptr_annotation_says_what_it_points_at():
    p = T.ptr("float16", "global", is_size_var=True)
    assert (p.dtype, p.storage_scope, p.is_size_var) == ("float16", "global", True)
    assert T.ptr().dtype is None and not T.ptr().is_size_var
    assert T.ptr.is_pointer_type
    assert repr(p) == "T.ptr('float16', is_size_var=True)"


def test_make_tensor_outside_a_function_is_refused():
    for call, name in (
        (T.make_tensor, "T.make_tensor"),
        (T.Tensor.from_ptr, "T.Tensor.from_ptr"),
        (T.make_tensor_from_addr, "T.make_tensor_from_addr"),
    ):
        with refused(
            TraceError,
            f"{name} is only allowed inside a @tilejit function.",
            "Write it in the body of the function, before or in `with T.Kernel(...)`.",
        ):
            call(pointer(), (M,))


def test_make_tensor_of_a_narrow_value_is_refused():
    with (
        kernel(),
        refused(
            ArgumentTypeError,
            "T.make_tensor: the pointer is a value of dtype int32; an address is an int64.",
            "Load it from a table of dtype T.ptr, or annotate the parameter with T.ptr.",
        ),
    ):
        T.make_tensor(T.get_thread_binding(), (M,))


def test_make_tensor_of_other_things_is_refused():
    with kernel():
        with refused(
            ArgumentTypeError,
            "T.make_tensor: T.ptr is an annotation of a parameter, not an address.",
            "Write `def kernel(p: T.ptr, ...)` and pass `p`.",
        ):
            T.make_tensor(T.ptr("float16"), (M,))
        with refused(ArgumentTypeError, "T.make_tensor: the pointer is None."):
            T.make_tensor(None, (M,))
        with refused(
            ArgumentTypeError,
            "T.make_tensor: the pointer is 'p', not a pointer parameter or a 64-bit integer value.",
        ):
            T.make_tensor("p", (M,))
        with refused(
            ArgumentTypeError,
            'T.SharedBuffer.from_ptr: an address is one of global memory, not of "shared.dyn".',
            "Use T.make_tensor for addresses, or pass a buffer to view.",
        ):
            T.SharedBuffer.from_ptr(pointer(), (M,))


def test_ptr_to_shared_memory_is_refused():
    with refused(
        ArgumentError,
        'T.ptr: scope "shared" is not one it can have.',
        'Scopes: "global".',
    ):
        T.ptr("float16", "shared")


# -- errors


def test_negative_extent_is_refused():
    with refused(
        ShapeError,
        "T.Tensor: extent 0 is -1; it must not be negative.",
        "Give the number of elements; T.dynamic makes one that is known at the call.",
    ):
        T.Tensor((-1, 4))


def test_fractional_extent_is_refused():
    with refused(
        ArgumentTypeError,
        "T.Tensor: extent 1 is 2.5, not an integer.",
        "Use integer division, `//`.",
    ):
        T.Tensor((4, 2.5))
    with refused(ArgumentTypeError, "T.Tensor: extent 0 is True, not an integer."):
        T.Tensor((True,))


def test_shape_that_is_no_shape_is_refused():
    with refused(
        ArgumentTypeError,
        "T.Tensor: the shape is 'float16', not an integer or a tuple of integers.",
        "The shape comes first, then the dtype: `((64, 32), 'float16')`.",
    ):
        T.Tensor("float16", (M, N))
    with refused(ShapeError, f"T.Tensor: extent 0 is {2**70}, which does not fit 64 bits."):
        T.Tensor(2**70)


def test_traced_extent_of_a_float_is_refused():
    alpha = T.cast(T.dynamic("n"), "float32")
    with refused(ArgumentTypeError, "T.Tensor: extent 0 is a float32 value, not an integer."):
        T.Tensor((alpha,))


def test_extents_without_a_tuple_are_refused_in_call_form():
    with refused(
        DTypeError,
        "T.Tensor: 32 is where the dtype goes.",
        "Put all extents into one tuple: `((64, 32), 'float16')`.",
    ):
        T.Tensor(M, N)


def test_unknown_dtype_is_refused_with_a_suggestion():
    with refused(
        DTypeError,
        "'flaot16' is not a dtype that tilejit knows.",
        'Did you mean "float16"?',
    ):
        T.Tensor((M,), "flaot16")
    with refused(DTypeError, "T.Tensor: the dtype is None.", 'For example "float16".'):
        T.Tensor((M,), None)
    with refused(
        DTypeError,
        "Python's `float` does not say how wide the elements are.",
        'Write "float32" or "float64".',
    ):
        T.Tensor((M,), float)


def test_strides_given_to_a_contiguous_tensor_are_refused():
    with refused(
        ArgumentTypeError,
        "T.Tensor is contiguous and takes no strides.",
        "Write T.StridedTensor(shape, strides, dtype).",
    ):
        T.Tensor((M, N), "float16", strides=(1, M))


def test_wrong_stride_count_is_refused():
    with refused(
        ShapeError,
        "T.StridedTensor: 2 extents but 1 stride.",
        "Give one stride, in elements, for each extent.",
    ):
        T.StridedTensor((M, N), (1,), "float16")


def test_strided_tensor_without_strides_is_refused():
    with refused(
        ArgumentTypeError,
        "T.StridedTensor: the strides are 'float16', not an integer or a tuple of integers.",
        "The shape comes first, then the strides, then the dtype: "
        "`((64, 32), (1, 64), 'float16')`.",
    ):
        T.StridedTensor((M, N), "float16")
    with refused(
        ArgumentTypeError,
        "T.StridedTensor needs strides.",
        "Write T.StridedTensor(shape, strides, dtype), the strides in elements.",
    ):
        T.StridedTensor((M, N))


def test_negative_stride_is_refused():
    with refused(ShapeError, "T.StridedTensor: stride 0 is -1; it must not be negative."):
        T.StridedTensor((M,), (-1,))


def test_align_that_cannot_be_is_refused():
    with refused(ArgumentError, "T.Buffer: align is 24 bytes, not a power of two."):
        T.Buffer((M,), align=24)
    with refused(
        ArgumentError, "T.Buffer: align is 2 bytes, less than one float32 element (4 bytes)."
    ):
        T.Buffer((M,), align=2)
    with refused(ArgumentError, "T.Buffer: align is -8; it must not be negative."):
        T.Buffer((M,), align=-8)
    with refused(ArgumentTypeError, "T.Buffer: align is '16', not an integer."):
        T.Buffer((M,), align="16")
    with refused(
        ArgumentError,
        "T.SharedBuffer: align is 2048 bytes; shared memory itself starts at a multiple of 1024.",
    ):
        T.SharedBuffer((M,), align=2048)


def test_elem_offset_of_an_argument_is_refused():
    with refused(
        ArgumentError,
        "T.Buffer: elem_offset counts elements from `data`, and none is given.",
        "An argument begins at its first element: pass the slice that you mean.",
    ):
        T.Buffer((M,), elem_offset=4)
    assert T.Buffer((M,), elem_offset=0, offset_factor=8).shape == (M,)


def test_elem_offset_against_offset_factor_is_refused():
    with (
        kernel(),
        refused(
            ArgumentError, "T.SharedBuffer: elem_offset is 4, not a multiple of offset_factor 8."
        ),
    ):
        T.SharedBuffer((M,), "float16", elem_offset=4, offset_factor=8)


def test_buffer_type_and_axis_separators_that_mean_nothing_are_refused():
    with refused(
        ArgumentError,
        "T.Buffer: buffer_type is 'broadcast'.",
        'It is "" or "auto_broadcast" (extents of 1 repeat).',
    ):
        T.Buffer((M,), buffer_type="broadcast")
    with refused(
        UnsupportedError,
        "T.Buffer: axis_separators is [1], but a GPU's memory is flat.",
        "Leave it out.",
    ):
        T.Buffer((M, N), axis_separators=[1])


def test_unknown_scope_is_refused():
    with refused(
        ArgumentError,
        'T.Buffer: scope "texture" is not one it can have.',
        'Scopes: "global", "shared", "shared.dyn", "local", "local.fragment".',
    ):
        T.Buffer((M,), scope="texture")
    with refused(ArgumentTypeError, "T.Buffer: scope is 3, not a string."):
        T.Buffer((M,), scope=3)


def test_tensor_inside_a_kernel_makes_no_memory():
    with (
        kernel(),
        refused(
            TraceError,
            "T.Tensor makes no memory, and it stands inside a kernel.",
            "Allocate with T.alloc_shared, T.alloc_fragment or T.alloc_local; for memory "
            "behind a pointer write T.make_tensor(pointer, shape, dtype).",
        ),
    ):
        T.Tensor((M, N), "float16")


def test_view_outside_a_kernel_is_refused():
    with kernel():
        base = T.alloc_shared((M,), "float16")
    with refused(
        TraceError,
        "T.SharedBuffer with `data` is only allowed inside a kernel.",
        "Write it in the body of `with T.Kernel(...)`.",
    ):
        T.SharedBuffer((M,), "float16", data=base)


def test_view_of_another_memory_is_refused():
    with kernel():
        base = T.alloc_shared((M,), "float16")
        with refused(
            ArgumentError,
            'T.LocalBuffer: the view is in "local", but `base` is in "shared.dyn".',
        ):
            T.LocalBuffer((4,), "float16", data=base)
        with refused(
            ArgumentError,
            'T.Tensor: the view is in "global", but `base` is in "shared.dyn".',
            "T.SharedBuffer, T.FragmentBuffer and T.LocalBuffer make views of tiles.",
        ):
            T.Tensor((4,), "float16", base)
        with refused(
            ArgumentTypeError,
            "T.SharedBuffer: data is 7; a view needs another buffer.",
            "Pass the handle that an alloc function or proxy returned.",
        ):
            T.SharedBuffer((4,), "float16", data=7)


def test_view_behind_the_end_is_refused_with_both_sizes():
    with kernel():
        base = T.alloc_shared((8, 8), "float16")
        with refused(
            OutOfRangeError,
            "T.SharedBuffer: the view ends at byte 144, but `base` has 128 bytes.",
            "Make the view smaller, or allocate more.",
        ):
            T.SharedBuffer((8, 8), "float16", data=base, elem_offset=8)


def test_view_inside_an_element_is_refused():
    with kernel():
        base = T.alloc_shared(64, "int8")
        odd = T.SharedBuffer(32, "int8", data=base, elem_offset=3)
        with refused(
            ArgumentError,
            "T.SharedBuffer: `odd` starts inside an element of float32.",
            "View the buffer that it is a view of.",
        ):
            T.SharedBuffer(4, "float32", data=odd)


def test_fragment_with_strides_is_refused():
    with (
        kernel(),
        refused(
            UnsupportedError,
            "T.FragmentBuffer: a fragment is spread over the threads and has no strides.",
            "Leave `strides` out, or use T.SharedBuffer.",
        ),
    ):
        T.FragmentBuffer((8, 8), "float32", strides=(16, 1))


def test_fragment_view_is_the_fragment_itself_or_refused():
    with kernel():
        acc = T.alloc_fragment((8, 16), "float32")
        same = T.FragmentBuffer((8, 16), "float32", data=acc)
        with refused(
            UnsupportedError,
            "T.FragmentBuffer: `acc` is a 8x16 float32 fragment; its registers cannot be seen as "
            "128 float32.",
            "Copy it to shared memory with T.copy and view that.",
        ):
            T.FragmentBuffer((128,), "float32", data=acc)
    assert same.buffer is acc.buffer


def test_runtime_extent_or_stride_of_an_allocation_is_refused():
    n = T.dynamic("n")
    with kernel():
        with refused(
            ShapeError,
            "T.SharedBuffer: extent 0 is `n`, which is known only at run time.",
            "Give the tile a constant extent; T.copy stops at a tensor's edge by itself.",
        ):
            T.SharedBuffer((n, 8))
        with refused(ShapeError, "T.SharedBuffer: stride 0 is `n`, known only at run time."):
            T.SharedBuffer((8, 8), strides=(n, 1))
        with refused(
            ShapeError,
            "T.SharedBuffer: elem_offset is `n`, known only at run time.",
            "An allocation needs a constant; a view (`data=`) takes any offset.",
        ):
            T.SharedBuffer((8, 8), elem_offset=n)
        with refused(
            ShapeError,
            "T.LocalBuffer: extent 0 is 0; a tile has at least one element.",
            "Allocate nothing, or give a positive extent.",
        ):
            T.LocalBuffer(0)


# -- symbols


def test_dynamic_gives_one_symbol_or_several():
    m, n = T.dynamic("m, n")
    (a, b, c) = T.dynamic("a b c", "int64")
    assert (repr(m), repr(n), m.dtype) == ("m", "n", "int32")
    assert [x.dtype.name for x in (a, b, c)] == ["int64"] * 3
    assert show(T.symbolic("k").expr) == "k"


def test_dynamic_refuses_what_is_no_name():
    with refused(ArgumentError, "T.dynamic: '3m' is not a name.", 'Write "M" or "M, N".'):
        T.dynamic("3m")
    with refused(ArgumentError, "T.dynamic: the name is empty.", 'Write "M" or "M, N".'):
        T.dynamic(" ")
    with refused(ArgumentTypeError, "T.dynamic: the name is 3, not a string."):
        T.dynamic(3)
    with refused(DTypeError, "T.dynamic: an extent is int32 or int64, not float32."):
        T.dynamic("m", "float32")


# -- the namespace


def test_every_exported_name_exists():
    for name in T.__all__:
        assert getattr(T, name) is not None


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(
        AttributeError, match=r"^tilejit has no T\.Tensr; did you mean T\.Tensor\?$"
    ):
        T.Tensr
    instead = r"^tilejit has no T\.async_copy; write T\.copy inside T\.Pipelined\.$"
    with pytest.raises(AttributeError, match=instead):
        T.async_copy
