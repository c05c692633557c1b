"""Annotations that are text because of `from __future__ import annotations`."""

from __future__ import annotations

import pytest

import tilejit.language as T
from tilejit.errors import TraceError
from tilejit.language.function import ConstArg, PrimFunc, TracedFunction


def test_factory_whose_sizes_are_only_in_text_annotations_finds_them():
    def factory(M, N, dtype):
        @T.prim_func
        def main(A: T.Tensor((M, N), dtype), alpha: T.float32):
            with T.Kernel(1):
                A[0, 0] = alpha

        return main

    args = {"M": ConstArg(3), "N": ConstArg(5), "dtype": ConstArg("float16")}
    inner = TracedFunction(factory).trace(args)
    assert isinstance(inner, PrimFunc)
    assert inner.parameters["A"].annotation.shape == (3, 5)
    assert inner.parameters["A"].annotation.dtype == "float16"
    assert inner.parameters["alpha"].kind == "scalar"


def test_text_annotation_with_an_unknown_name_is_refused():
    def kernel(A: Nothing):  # noqa: F821
        pass

    with pytest.raises(TraceError) as caught:
        TracedFunction(kernel).parameters
    assert caught.value.headline == (
        "The annotation `Nothing` of `A` uses a name that is not defined: "
        "name 'Nothing' is not defined."
    )
