"""Warm calls: found by facts, launched without a check, and given up whenever something changes.

A driver that counts launches stands in for CUDA, and small classes for torch and CUDA arrays.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import types

import numpy as np
import pytest

import tilejit.language as T
from tilejit import ArgumentError, ArgumentTypeError, DeviceError, options, tilejit
from tilejit.runtime import device, frame, warm
from tilejit.runtime.signature import Signature
from tilejit.target import as_target

SCALE = 2
BASE = 1 << 20


class Driver:
    """Two GPUs that remember what they were given."""

    CUfunction = int
    CUpointer_attribute = types.SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)
    CUresult = types.SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2)

    def __init__(self):
        self.launches = []
        self.status = 0
        self.current = threading.local()
        self.places = {}

    def cuDeviceGet(self, n):
        return 0, n

    def cuDevicePrimaryCtxRetain(self, n):
        return 0, 1000 + n

    def cuCtxGetCurrent(self):
        return 0, getattr(self.current, "context", 1000)

    def cuCtxGetDevice(self):
        return 0, self.cuCtxGetCurrent()[1] - 1000

    def cuCtxSetCurrent(self, context):
        self.current.context = context
        return (0,)

    def cuLibraryLoadData(self, *_):
        return 0, 5

    def cuLibraryGetKernel(self, *_):
        return 0, 6

    def cuPointerGetAttribute(self, _, address):
        return 0, self.places.get(address, 0)

    def cuGetErrorString(self, _):
        return 0, b"made up"

    def cuLaunchKernel(self, function, *arguments):
        *sizes, _shared, stream, parameters, _extra = arguments
        if self.status:
            return (self.status,)
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)))
        first = pointers[0][0]
        context = self.cuCtxGetCurrent()[1]
        self.launches.append((tuple(sizes[:3]), first, stream, context))
        return (0,)


class dtype:
    __module__ = "torch"

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return f"torch.{self.name}"


@pytest.fixture
def torch(monkeypatch):
    """A module with a class that has what is read of torch's."""
    torch = types.ModuleType("torch")
    torch.float32, torch.float16 = dtype("float32"), dtype("float16")
    torch.is_recording = True
    torch.is_grad_enabled = lambda: torch.is_recording
    torch.stream = 77
    torch._C = types.SimpleNamespace(_cuda_getCurrentRawStream=lambda n: torch.stream + n)

    class Tensor:
        layout = "torch.strided"
        is_cuda = True

        def __init__(self, shape, strides=None, address=BASE, dtype=torch.float32, place=0):
            self.shape, self.strides, self.address = shape, strides, address
            self.dtype, self.place, self.requires_grad = dtype, place, False

        @property
        def device(self):
            return types.SimpleNamespace(type="cuda" if self.is_cuda else "cpu", index=self.place)

        def get_device(self):
            return self.place if self.is_cuda else -1

        def is_contiguous(self):
            return self.stride() == warm.arrays.compact_strides(self.shape)

        def stride(self):
            return self.strides or warm.arrays.compact_strides(self.shape)

        def data_ptr(self):
            return self.address

    Tensor.__module__ = "torch"
    torch.Tensor = Tensor
    torch.empty = lambda shape, dtype, device: Tensor(shape, None, 9 * BASE, dtype, device.index)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


@pytest.fixture
def gpu(monkeypatch):
    """The driver that calls run on."""
    fake = Driver()
    made = types.SimpleNamespace(cubin=b"", entry="entry", ptx="")
    monkeypatch.setattr(device, "_initialised_driver", lambda: (fake, 2))
    monkeypatch.setattr(device, "_contexts", {})
    monkeypatch.setattr(device, "target_of", lambda n: as_target("sm_80"))
    monkeypatch.setattr(device, "runs_on", lambda target, n: True)
    monkeypatch.setattr(device, "_ordinal_attribute", lambda: 9)
    monkeypatch.setattr(frame, "compile_lowered", lambda lowered, target: made)
    with device.use_executor("gpu"):
        yield fake


@pytest.fixture
def long_way(monkeypatch):
    """Grows with each call that is taken apart and checked."""
    calls = []
    bind = Signature.bind

    def counted(self, args, kwargs):
        calls.append(self.what)
        return bind(self, args, kwargs)

    monkeypatch.setattr(Signature, "bind", counted)
    return calls


def make_scale(table=(3,)):
    """A fresh function that has seen no call."""

    @tilejit
    def scale(A: T.Tensor, B: T.Tensor, alpha: T.float32 = 1.0, *, BN=32):
        with T.Kernel(T.ceildiv(A.shape[0], BN), threads=32) as block:
            for i in T.Parallel(BN):
                B[block * BN + i] = A[block * BN + i] * SCALE * alpha * table[0]

    return scale


def test_second_call_is_warm_and_passes_its_own_address_stream_and_context(gpu, torch, long_way):
    scale = make_scale()
    for n in range(3):
        torch.stream = 70 + n
        x = torch.Tensor((100,), address=BASE + 4096 * n)
        assert scale(x, torch.Tensor((100,), address=3 * BASE)) is None
    assert len(long_way) == 1
    assert gpu.launches == [((4, 1, 1), BASE + 4096 * n, 70 + n, 1000) for n in range(3)]
    scale(x, torch.Tensor((100,), address=3 * BASE), stream=5)
    gpu.cuCtxSetCurrent(1001)
    scale(x, torch.Tensor((100,), address=3 * BASE))
    assert len(long_way) == 1
    assert [launch[2:] for launch in gpu.launches[3:]] == [(5, 1000), (72, 1000)]
    assert gpu.cuCtxGetCurrent() == (0, 1001)


CHANGES = {
    "shape": lambda torch, x: setattr(x, "shape", (96,)),
    "strides": lambda torch, x: setattr(x, "strides", (2,)),
    "dtype": lambda torch, x: setattr(x, "dtype", torch.float16),
    "alignment": lambda torch, x: setattr(x, "address", BASE + 8),
    "overlap": lambda torch, x: setattr(x, "address", 3 * BASE + 384),
    "gradient": lambda torch, x: setattr(x, "requires_grad", True),
    "subclass": lambda torch, x: setattr(x, "__class__", type("Mine", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_call_with_another_argument_goes_the_long_way_and_is_warm_then(
    change, gpu, torch, long_way
):
    scale = make_scale()
    x, out = torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE)
    scale(x, out)
    scale(x, out)
    assert len(long_way) == 1
    CHANGES[change](torch, x)
    scale(x, out)
    assert len(long_way) == 2
    assert gpu.launches[-1][1] == x.address
    scale(x, out)
    assert len(long_way) == (3 if change == "subclass" else 2)


def test_arguments_that_touch_without_overlap_stay_warm(gpu, torch, long_way):
    scale = make_scale()
    scale(torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE))
    for address in (3 * BASE - 400, 3 * BASE + 400):
        scale(torch.Tensor((100,), address=address), torch.Tensor((100,), address=3 * BASE))
    assert len(long_way) == 1
    for address in (3 * BASE - 384, 3 * BASE + 384):
        scale(torch.Tensor((100,), address=address), torch.Tensor((100,), address=3 * BASE))
    assert len(long_way) == 2


def test_tensors_of_another_device_get_their_own_launch(gpu, torch, long_way):
    scale = make_scale()
    for place in (0, 1, 1, 0):
        scale(*(torch.Tensor((100,), address=a * BASE, place=place) for a in (1, 3)))
    assert len(long_way) == 2
    assert [launch[2:] for launch in gpu.launches] == [(77, 1000), *2 * [(78, 1001)], (77, 1000)]
    with pytest.raises(ArgumentError, match=r"^scale: A is on GPU 0 and B is on GPU 1\."):
        scale(torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE, place=1))


def test_captured_values_are_looked_at_in_each_call(gpu, torch, long_way, monkeypatch):
    table = [3]
    scale = make_scale(table)
    factor = 2

    @tilejit
    def closed(A: T.Tensor, B: T.Tensor):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(A.shape[0]):
                B[i] = A[i] * factor

    arguments = torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE)
    for function in (scale, closed):
        function(*arguments)
        function(*arguments)
    assert len(long_way) == 2
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 5)
    scale(*arguments)
    table[0] = 4
    scale(*arguments)
    factor = 7
    closed(*arguments)
    assert len(long_way) == 5
    for function in (scale, closed):
        function(*arguments)
    assert len(long_way) == 5
    monkeypatch.setattr(sys.modules[__name__], "SCALE", object())
    with pytest.raises(ArgumentTypeError, match="tilejit cannot tell when it changes"):
        scale(*arguments)


def test_constants_and_their_types_decide_and_numbers_do_not(gpu, torch, long_way):
    scale = make_scale()
    arguments = torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE)
    for alpha in (1.0, 2.5, 3):
        scale(*arguments, alpha, BN=64)
    assert len(long_way) == 2  # an int is read in another way than a float
    scale(*arguments, 2.5, BN=16)
    assert len(long_way) == 3
    assert [launch[0][0] for launch in gpu.launches] == [2, 2, 2, 7]
    with pytest.raises(ArgumentError, match=r"^scale: alpha: .* does not fit float32"):
        scale(*arguments, 1e300, BN=64)
    with pytest.raises(ArgumentTypeError, match=r"^scale has no parameter `BM`"):
        scale(*arguments, BM=64)


def test_gradient_of_a_written_tensor_is_asked_for_in_each_call(gpu, torch, long_way):
    scale = make_scale()
    x, out = torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE)
    out.requires_grad = True
    torch.is_recording = False
    scale(x, out)
    scale(x, out)
    assert len(long_way) == 1
    torch.is_recording = True
    with pytest.raises(ArgumentError, match=r"^scale: B requires a gradient"):
        scale(x, out)
    assert len(gpu.launches) == 2


def test_host_tensors_and_simulation_are_never_warm(gpu, torch, long_way, monkeypatch):
    scale = make_scale()
    x, out = torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE)
    scale(x, out)
    x.is_cuda = False
    with pytest.raises(ArgumentError, match=r"^scale: A is a torch tensor in host memory"):
        scale(x, out)
    x.is_cuda = True
    with device.use_executor("simulator"), pytest.raises(ArgumentError, match="on GPU 0, but this"):
        scale(x, out)
    token = device._forced.set(None)
    with options(simulate=True), pytest.raises(ArgumentError, match="on GPU 0, but this"):
        scale(x, out)
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    with pytest.raises(ArgumentError, match="on GPU 0, but this"):
        scale(x, out)
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM")
    scale(x, out)
    device._forced.reset(token)
    assert len(long_way) == 5


def test_target_option_is_for_calls_without_a_gpu(gpu, torch, long_way):
    scale = make_scale()
    for target in ("", "sm_90", "sm_90"):
        with options(target=target):
            scale(torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE))
    assert len(long_way) == 1
    assert len(scale._cache) == 1


class OnGpu:
    """An array of some CUDA library."""

    def __init__(self, address, read_only=False, **changes):
        self.interface = {"shape": (100,), "typestr": "<f4", "data": (address, read_only)}
        self.interface |= {"version": 3, "strides": None, **changes}

    @property
    def __cuda_array_interface__(self):
        return self.interface


def test_interface_arrays_are_warm_until_read_only_masked_or_elsewhere(gpu, long_way):
    scale = make_scale()
    for n in range(2):
        scale(OnGpu(BASE + 4096 * n, stream=11), OnGpu(3 * BASE))
    assert len(long_way) == 1
    assert gpu.launches[1] == ((4, 1, 1), BASE + 4096, 11, 1000)
    with pytest.raises(ArgumentError, match=r"^scale: B is read-only"):
        scale(OnGpu(BASE, stream=11), OnGpu(3 * BASE, read_only=True))
    with pytest.raises(ArgumentTypeError, match="masked array"):
        scale(OnGpu(BASE, stream=11, mask=object()), OnGpu(3 * BASE))
    gpu.places = {BASE: 1}
    with pytest.raises(ArgumentError, match=r"^scale: A is on GPU 1 and B is on GPU 0\."):
        scale(OnGpu(BASE, stream=11), OnGpu(3 * BASE))
    gpu.places = {}
    scale(OnGpu(BASE, stream=12), OnGpu(3 * BASE))
    scale(OnGpu(BASE, shape=[100], stream=12), OnGpu(3 * BASE))
    assert [launch[2] for launch in gpu.launches] == [11, 11, 12, 12]


def test_numba_device_arrays_are_warm(gpu, long_way, monkeypatch):
    name = "numba.cuda.cudadrv.devicearray"
    module = types.ModuleType(name)

    class DeviceNDArray(OnGpu):
        shape, strides, dtype, stream = (100,), (4,), np.dtype("float32"), 0

        @property
        def device_ctypes_pointer(self):
            return ctypes.c_void_p(self.interface["data"][0])

    DeviceNDArray.__module__ = name
    module.DeviceNDArray = DeviceNDArray
    monkeypatch.setitem(sys.modules, name, module)
    scale = make_scale()
    scale(DeviceNDArray(BASE), DeviceNDArray(3 * BASE))
    scale(DeviceNDArray(2 * BASE), DeviceNDArray(3 * BASE))
    assert len(long_way) == 1
    assert [launch[1] for launch in gpu.launches] == [BASE, 2 * BASE]


def test_stream_is_that_of_the_first_tensor_also_behind_a_pointer(gpu, torch, long_way):
    @tilejit
    def fill(p: T.ptr, B: T.Tensor):
        A = T.make_tensor(p, B.shape, "float32")
        with T.Kernel(1, threads=32):
            for i in T.Parallel(B.shape[0]):
                B[i] = A[i]

    out = torch.Tensor((100,), address=3 * BASE)
    for pointer in (OnGpu(BASE, stream=11), OnGpu(2 * BASE, stream=11), BASE, 2 * BASE):
        fill(pointer, out)
    assert len(long_way) == 2
    assert [launch[1:3] for launch in gpu.launches] == [(BASE, 77), (2 * BASE, 77)] * 2
    with pytest.raises(ArgumentError, match=r"^fill: p is -1, which is no 64-bit address\."):
        fill(-1, out)


def test_failing_launch_says_so_and_shows_only_the_users_frames(gpu, torch):
    scale = make_scale()
    arguments = torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE)
    scale(*arguments)
    gpu.status = types.SimpleNamespace(name="CUDA_ERROR_MADE_UP")
    with pytest.raises(DeviceError, match=r"^Launching scale: CUDA reports made up") as caught:
        scale(*arguments)
    assert [entry.name for entry in caught.traceback][-1] == (
        "test_failing_launch_says_so_and_shows_only_the_users_frames"
    )


def test_what_a_call_returns_is_its_own_argument_or_a_fresh_output(gpu, torch, long_way):
    @tilejit
    def twice(A: T.Tensor, n: T.int32):
        B = T.empty(A.shape, "float16")
        with T.Kernel(T.ceildiv(n, 32), threads=32) as block:
            for i in T.Parallel(32):
                B[block * 32 + i] = A[block * 32 + i] * 2
        return B, A

    for n in range(3):
        x = torch.Tensor((100,), address=BASE + 256 * n)
        made, same = twice(x, 32 * (n + 1))
        assert same is x
        assert (made.shape, made.dtype, made.address) == ((100,), torch.float16, 9 * BASE)
    twice(n=0, A=x)
    assert len(long_way) == 2
    assert [launch[0] for launch in gpu.launches] == [(1, 1, 1), (2, 1, 1), (3, 1, 1)]


def test_factory_made_kernel_is_warm_with_outputs_and_shape_scalars(gpu, torch, monkeypatch):
    m = T.dynamic("m")

    @tilejit(out_idx=[-1])
    def make():
        @T.prim_func
        def negate(A: T.Tensor((m,), "float32"), B: T.Tensor((m,), "float32")):
            with T.Kernel(T.ceildiv(m, 32), threads=32) as block:
                for i in T.Parallel(32):
                    B[block * 32 + i] = -A[block * 32 + i]

        return negate

    negate = make()
    reads = []
    read = negate._read
    monkeypatch.setattr(negate, "_read", lambda given: reads.append(1) or read(given))
    for extent in (100, 100, 64, 64, 100):
        out = negate(torch.Tensor((extent,)))
        assert (out.shape, out.address) == ((extent,), 9 * BASE)
    assert len(reads) == 2
    assert [launch[0][0] for launch in gpu.launches] == [4, 4, 2, 2, 4]


def test_declared_alignment_is_checked_in_each_call(gpu, torch, long_way):
    @tilejit
    def double(A: T.Buffer((64,), "float32", align=128)):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(64):
                A[i] = A[i] * 2

    for n in range(3):
        double(torch.Tensor((64,), address=BASE + 128 * n))
    assert len(long_way) == 1
    with pytest.raises(ArgumentError, match="no multiple of 128 bytes, as promised"):
        double(torch.Tensor((64,), address=BASE + 64))


def test_remembered_calls_are_bounded_and_hold_no_argument(gpu, torch, monkeypatch):
    monkeypatch.setattr(warm, "MAX_CALLS", 3)
    scale = make_scale()
    for n in range(1, 9):
        scale(torch.Tensor((n,)), torch.Tensor((n,), address=3 * BASE))
        assert len(scale._warm) <= 3
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is torch.Tensor]


def test_threads_pass_their_own_addresses(gpu, torch, long_way):
    scale = make_scale()
    scale(torch.Tensor((100,)), torch.Tensor((100,), address=3 * BASE))

    def call(n):
        for _ in range(200):
            scale(torch.Tensor((100,), address=n * 4096), torch.Tensor((100,), address=3 * BASE))

    threads = [threading.Thread(target=_in_gpu, args=(call, n)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [launch[1] for launch in gpu.launches[1:]]
    assert {n: seen.count(n * 4096) for n in range(1, 5)} == dict.fromkeys(range(1, 5), 200)
    assert len(long_way) == 1


def _in_gpu(call, n):
    with device.use_executor("gpu"):
        call(n)
