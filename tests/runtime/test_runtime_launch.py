"""Parameter packing, grid limits, streams and staging, as far as they need no GPU."""

from __future__ import annotations

import ctypes
import struct
import types

import ml_dtypes
import numpy as np
import pytest

from tilejit import dtypes
from tilejit.errors import ArgumentError, ArgumentTypeError, ResourceError
from tilejit.runtime import launch
from tilejit.runtime.launch import Packer, check_grid, stream_handle


def parameter_bytes(packer, values, sizes):
    pointers = ctypes.cast(packer.pack(values), ctypes.POINTER(ctypes.c_void_p))
    return [ctypes.string_at(pointers[n], size) for n, size in enumerate(sizes)]


def test_packed_parameters_have_the_bytes_of_their_dtypes():
    names = (None, "int32", "float32", "float64", "bool", "float16", "bfloat16", "float8_e5m2")
    packer = Packer([None if n is None else dtypes.as_dtype(n) for n in names])
    values = (1 << 40, -3, 1.5, 2.5, True, 0.5, 1.25, 3.0)
    got = parameter_bytes(packer, values, (8, 4, 4, 8, 1, 2, 2, 1))
    assert got == [
        struct.pack("<Q", 1 << 40),
        struct.pack("<i", -3),
        struct.pack("<f", 1.5),
        struct.pack("<d", 2.5),
        b"\1",
        np.float16(0.5).tobytes(),
        np.array(1.25, ml_dtypes.bfloat16).tobytes(),
        np.array(3.0, ml_dtypes.float8_e5m2).tobytes(),
    ]


def test_kernel_without_parameters_packs_nothing():
    assert Packer([]).pack([]) != 0


def test_grid_beyond_the_limit_names_the_axis_and_both_numbers():
    check_grid("f", (2**31 - 1, 65535, 65535))
    with pytest.raises(ResourceError) as caught:
        check_grid("f", (1, 65536, 1))
    assert caught.value.headline == (
        "f: the grid has 65536 blocks along y; a GPU launches at most 65535."
    )


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (7, 7),
        (types.SimpleNamespace(cuda_stream=9), 9),
        (types.SimpleNamespace(ptr=11), 11),
        (types.SimpleNamespace(handle=ctypes.c_void_p(13)), 13),
        (types.SimpleNamespace(handle=ctypes.c_void_p(None)), 0),
        (types.SimpleNamespace(__cuda_stream__=lambda: (0, 15)), 15),
    ],
)
def test_stream_of_any_framework_gives_its_handle(stream, handle):
    assert stream_handle(stream) == handle


def test_what_is_no_stream_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"^stream is a str, not a CUDA stream\."):
        stream_handle("default")


def test_spans_that_overlap_are_staged_together():
    assert launch._merged([(10, 20), (0, 5), (15, 30), (5, 8)]) == [(0, 5), (5, 8), (10, 30)]


def test_grid_that_clusters_do_not_divide_names_the_axis_and_both_numbers():
    check_grid("f", (4, 6, 1), (2, 3, 1))
    with pytest.raises(ArgumentError) as caught:
        check_grid("f", (4, 7, 1), (2, 3, 1))
    assert caught.value.headline == (
        "f: the grid has 7 blocks along y, which clusters of 3 do not divide."
    )


def test_kernel_that_waits_for_those_before_it_is_launched_so(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings.driver")
    calls = []
    fake = types.SimpleNamespace(
        cuLibraryLoadData=lambda *args: (0, "library"),
        cuLibraryGetKernel=lambda *args: (0, 17),
        CUfunction=lambda handle: ("function", handle),
        cuLaunchKernel=lambda *args: calls.append(("plain", args)) or (0,),
        cuLaunchKernelEx=lambda *args: calls.append(("early", args)) or (0,),
        **{
            name: getattr(bindings, name)
            for name in ("CUlaunchAttribute", "CUlaunchAttributeID", "CUlaunchAttributeValue",
                         "CUlaunchConfig", "CUstream")
        },
    )  # fmt: skip
    monkeypatch.setattr(launch, "driver", lambda: fake)
    monkeypatch.setattr(launch, "check", lambda result, doing: result[-1])
    for early in (False, True):
        kernel = launch.LoadedKernel("f", b"", "f", (64, 2, 1), 128, starts_early=early)
        kernel.launch((5, 6, 7), 1234, 99, 0)
        kernel.launcher((5, 6, 7), 0)(99, 1234)
    assert [kind for kind, _ in calls] == ["plain", "plain", "early", "early"]
    for _, (config, function, parameters, extra) in calls[2:]:
        assert (function, parameters, extra) == (("function", 17), 1234, 0)
        assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (5, 6, 7)
        assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (64, 2, 1)
        assert (config.sharedMemBytes, int(config.hStream), config.numAttrs) == (128, 99, 1)
        (attribute,) = config.attrs
        assert "PROGRAMMATIC_STREAM_SERIALIZATION" in str(attribute.id)
        assert attribute.value.programmaticStreamSerializationAllowed == 1


@pytest.mark.parametrize(
    "shared_bytes, cluster, wanted",
    [
        (48 << 10, 8, []),
        (64 << 10, 1, [("MAX_DYNAMIC_SHARED_SIZE_BYTES", 64 << 10)]),
        (0, 16, [("NON_PORTABLE_CLUSTER_SIZE_ALLOWED", 1)]),
    ],
)
def test_what_needs_an_attribute_gets_it_once_a_device(monkeypatch, shared_bytes, cluster, wanted):
    bindings = pytest.importorskip("cuda.bindings.driver")
    found = []
    fake = types.SimpleNamespace(
        cuLibraryLoadData=lambda *args: (0, "library"),
        cuLibraryGetKernel=lambda *args: (0, 17),
        CUfunction=lambda handle: ("function", handle),
        CUfunction_attribute=bindings.CUfunction_attribute,
        cuDeviceGet=lambda device: (0, device),
        cuKernelSetAttribute=lambda *args: found.append(args) or (0,),
        cuLaunchKernel=lambda *args: (0,),
    )
    monkeypatch.setattr(launch, "driver", lambda: fake)
    monkeypatch.setattr(launch, "check", lambda result, doing: result[-1])
    kernel = launch.LoadedKernel("f", b"", "f", (64, 1, 1), shared_bytes, cluster=cluster)
    for device in (0, 0, 3):
        kernel.launcher((16, 1, 1), device)(99, 1234)
    names = [(a.name.removeprefix("CU_FUNC_ATTRIBUTE_"), value, d) for a, value, _, d in found]
    assert names == [(name, value, d) for d in (0, 3) for name, value in wanted]
