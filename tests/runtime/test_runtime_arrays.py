"""What is read of NumPy, torch, CuPy, Numba, DLPack and `__cuda_array_interface__` arrays."""

from __future__ import annotations

import sys
import types

import ml_dtypes
import numpy as np
import pytest

from tilejit import dtypes
from tilejit.errors import ArgumentError, ArgumentTypeError, DTypeError
from tilejit.runtime import arrays
from tilejit.runtime.addresses import address_of, remembered_arrays
from tilejit.runtime.signature import read_argument


class Exporter:
    """Knows nothing but DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OnGpu:
    """An array of some CUDA library: 2 x 3 float32 at a made-up address of GPU 1."""

    device = types.SimpleNamespace(id=1)

    def __init__(self, **changes):
        self.interface = {
            "shape": (2, 3),
            "typestr": "<f4",
            "data": (4096, False),
            "version": 3,
            "strides": None,
            **changes,
        }

    @property
    def __cuda_array_interface__(self):
        return self.interface


def test_numpy_array_is_read_with_strides_in_elements():
    x = np.zeros((4, 6), np.float16)
    view = arrays.read(x[1:, ::2])
    assert view.shape == (3, 3)
    assert view.strides == (6, 2)
    assert view.dtype is dtypes.float16
    assert view.address == x.ctypes.data + 12
    assert view.device == arrays.HOST
    assert view.writable


def test_strides_of_extents_of_one_are_the_compact_ones():
    x = np.zeros((5, 8), np.float32)[:1]
    assert arrays.read(x.T[:1].T).strides == (1, 1)
    assert arrays.read(x).is_compact


def test_negative_strides_span_the_bytes_below_the_first_element():
    x = np.arange(10, dtype=np.int32)
    view = arrays.read(x[::-2])
    assert view.strides == (-2,)
    assert view.span == (x.ctypes.data + 4, x.ctypes.data + 40)


def test_zero_dimensional_array_is_one_element():
    view = arrays.read(np.array(3.0))
    assert (view.shape, view.strides, view.size) == ((), (), 1)


def test_bfloat16_and_float8_numpy_arrays_have_our_dtypes():
    assert arrays.read(np.zeros(2, ml_dtypes.bfloat16)).dtype is dtypes.bfloat16
    assert arrays.read(np.zeros(2, ml_dtypes.float8_e5m2)).dtype is dtypes.float8_e5m2


def test_read_only_numpy_array_is_not_writable():
    x = np.zeros(3)
    x.flags.writeable = False
    assert not arrays.read(x).writable


def test_complex_array_is_refused_by_dtype():
    with pytest.raises(
        DTypeError, match=r"^f: A has dtype complex128, which tilejit does not know"
    ):
        read_argument("f", "A", np.zeros(3, complex))


def test_array_of_foreign_byte_order_is_refused_with_the_cast_to_write():
    with pytest.raises(DTypeError) as caught:
        read_argument("f", "A", np.zeros(3, ">f4"))
    assert caught.value.headline == "f: A holds float32 of foreign byte order."
    assert caught.value.hint == "Pass `x.astype('float32')`."


def test_strides_between_elements_are_refused():
    field = np.zeros(4, np.dtype([("a", "i4"), ("b", "i1")], align=False))["a"]
    with pytest.raises(ArgumentError, match=r"^f: A has a stride of 5 bytes, no multiple of its 4"):
        read_argument("f", "A", field)


def test_misaligned_elements_are_refused():
    raw = np.zeros(33, np.uint8)
    offset = 1 if raw.ctypes.data % 4 == 0 else 0
    x = raw[offset : offset + 32].view(np.float32)
    with pytest.raises(ArgumentError, match=r"no multiple of its element size, 4 bytes"):
        read_argument("f", "A", x)


@pytest.mark.parametrize("value", [3, "x", [1.0], np.float32(1)])
def test_what_is_no_array_is_said_by_its_type(value):
    with pytest.raises(
        ArgumentTypeError, match=rf"^f: A is .*{type(value).__name__}.*not an array"
    ):
        read_argument("f", "A", value)


def test_dlpack_exporter_is_read_and_shares_memory():
    x = np.zeros((4, 6), np.float32)
    view = arrays.read(Exporter(x[:, ::2]))
    assert (view.shape, view.strides, view.dtype) == ((4, 3), (6, 2), dtypes.float32)
    arrays.host_array(view)[...] = 7
    assert x[:, ::2].min() == 7
    assert x[:, 1::2].max() == 0


def test_cuda_array_interface_is_read_with_its_device():
    view = arrays.read(OnGpu())
    assert (view.shape, view.strides, view.address) == ((2, 3), (3, 1), 4096)
    assert (view.device, view.writable, view.stream) == (1, True, None)


def test_cuda_array_interface_gives_strides_stream_and_read_only():
    view = arrays.read(OnGpu(strides=(4, 8), data=(4096, True), stream=2))
    assert (view.strides, view.writable, view.stream) == ((1, 2), False, 2)


def test_masked_cuda_array_is_refused():
    with pytest.raises(ArgumentTypeError, match="masked array"):
        arrays.read(OnGpu(mask=object()))


def make_torch(monkeypatch, grad_enabled=True):
    """A module that looks like torch, with a class that looks like its Tensor."""
    torch = types.ModuleType("torch")
    torch.is_grad_enabled = lambda: grad_enabled
    names = {"__module__": "torch"}
    dtype = type("dtype", (), {**names, "__str__": lambda self: "torch.bfloat16"})()

    class Tensor:
        shape = (2, 4)
        device = types.SimpleNamespace(type="cuda", index=0)
        layout = "torch.strided"
        requires_grad = True

        def __init__(self):
            self.dtype = dtype

        def is_contiguous(self):
            return False

        def stride(self):
            return (1, 2)

        def data_ptr(self):
            return 8192

    Tensor.__module__ = "torch"
    torch.Tensor = Tensor
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def test_torch_tensor_is_read_without_importing_torch(monkeypatch):
    tensor = make_torch(monkeypatch).Tensor()
    view = arrays.read(tensor)
    assert (view.framework, view.dtype, view.strides) == ("torch", dtypes.bfloat16, (1, 2))
    assert (view.address, view.device) == (8192, 0)


def test_torch_subclass_is_read_as_a_tensor(monkeypatch):
    torch = make_torch(monkeypatch)
    kind = type("Parameter", (torch.Tensor,), {})
    assert arrays.read(kind()).framework == "torch"


def test_torch_tensor_on_another_device_is_refused(monkeypatch):
    tensor = make_torch(monkeypatch).Tensor()
    tensor.device = types.SimpleNamespace(type="mps", index=0)
    with pytest.raises(ArgumentError, match="not in CUDA or host memory"):
        read_argument("f", "A", tensor)


def test_gradient_is_needed_only_while_autograd_records(monkeypatch):
    assert arrays.needs_gradient(make_torch(monkeypatch).Tensor())
    assert not arrays.needs_gradient(make_torch(monkeypatch, grad_enabled=False).Tensor())


def test_overlap_is_found_by_bytes_not_by_elements():
    x = np.zeros(100, np.int32)
    views = [arrays.read(a) for a in (x[:50], x[50:], x[40:60], x[::2], np.zeros(3))]
    assert arrays.overlapping(views) == ((0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def test_empty_arrays_overlap_nothing():
    x = np.zeros(10)
    assert arrays.overlapping([arrays.read(x), arrays.read(x[3:3])]) == ()


def test_address_of_gives_the_address_and_remembers_while_it_lives(reference):
    x = np.arange(4)
    assert address_of(x[1:]) == x.ctypes.data + 8
    assert address_of(x) == x.ctypes.data
    assert any(a is x for a in remembered_arrays())
    del x
    assert not any(a.shape == (4,) and a.dtype == np.int64 for a in remembered_arrays())


def test_address_of_what_is_no_array_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"^address_of takes an array, not a list\."):
        address_of([1])
