"""How many blocks a multiprocessor is to hold at once."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import ArgumentError, ArgumentTypeError, TraceError


@tilejit
def scale(A: T.Tensor, B: T.Tensor, *, count=1, threads=512):
    with T.Kernel(A.shape[0], threads=threads) as block:
        T.annotate_min_blocks_per_sm(count)
        x = T.alloc_fragment((A.shape[1],), "float32")
        T.copy(A[block, 0], x)
        for j in T.Parallel(A.shape[1]):
            B[block, j] = 2 * x[j]


def test_a_thread_gets_no_more_registers_than_so_many_blocks_leave():
    spec = T.Tensor((4, 512 * 48), "float32")
    free = scale.compile(spec, spec, target="sm_90a")
    bound = scale.compile(spec, spec, count=4, target="sm_90a")
    assert free.resources.registers > 32 >= bound.resources.registers
    assert re.search(r"\.minnctapersm\s+4", bound.ptx)


def test_it_changes_no_results():
    a = np.arange(4 * 700, dtype=np.float32).reshape(4, 700)
    b = np.full_like(a, np.nan)
    scale(a, b, count=2)
    assert (b == 2 * a).all()


@pytest.mark.parametrize(
    "count, error, words",
    [
        (0, ArgumentError, "cannot hold 0 blocks of 512 threads"),
        (5, ArgumentError, "cannot hold 5 blocks of 512 threads"),
        ("2", ArgumentTypeError, "the number of blocks is '2', not an integer"),
        (True, ArgumentTypeError, "the number of blocks is True, not an integer"),
    ],
)
def test_numbers_that_cannot_be(count, error, words):
    spec = T.Tensor((4, 512), "float32")
    with pytest.raises(error, match=words):
        scale.compile(spec, spec, count=count, target="sm_90a")


def test_outside_a_kernel():
    with pytest.raises(TraceError, match=r"T\.annotate_min_blocks_per_sm"):
        T.annotate_min_blocks_per_sm(2)
