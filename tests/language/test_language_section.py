"""`T.section`: the part of a tensor that it is, and what it refuses."""

from __future__ import annotations

import pytest
from traced import kernel, refused, tensor

import tilejit.language as T
from tilejit import tilejit
from tilejit.errors import ArgumentError, ArgumentTypeError, TraceError
from tilejit.ir.aliases import Aliases
from tilejit.ir.analysis import interval
from tilejit.ir.expr import int_value, variables
from tilejit.ir.node import Let, walk


def test_constant_section_is_a_view_of_the_tensor_with_fewer_elements():
    with kernel() as nodes:
        a = tensor("A", (10, 3, 8))
        part = T.section(a, 2, 7)
        last = T.section(a, 8, 99)
        none = T.section(a, 7, 2)
        columns = T.section(a, 1, 3, dim=1)
    assert not nodes and part.shape == (5, 3, 8) and part.dtype == "float32"
    assert part.strides == (24, 8, 1) and int_value(part.buffer.offset) == 48
    assert last.shape == (2, 3, 8) and none.shape == (0, 3, 8)
    assert columns.shape == (10, 2, 8) and int_value(columns.buffer.offset) == 8
    assert part.buffer.data is a.buffer.data and part.buffer.section.tensor is a.buffer


def test_bounds_that_the_kernel_loads_are_taken_to_the_ends_of_the_tensor():
    with kernel() as nodes:
        a, starts = tensor("A", (10, 8)), tensor("starts", (5,), "int64")
        part = T.section(a, starts[0], starts[1])
    begin, extent = (n for n in nodes if isinstance(n, Let))
    assert begin.var.name == "part_start" and extent.var.name == "part_extent"
    assert interval(begin.var).low == interval(extent.var).low == 0
    assert interval(begin.var).high == interval(extent.var).high == 10
    assert part.buffer.shape[0] is extent.var and part.buffer.section.first is begin.var


def test_nodes_that_touch_a_section_say_that_they_need_where_it_is():
    with kernel() as nodes:
        a, starts = tensor("A", (10, 8)), tensor("starts", (5,), "int32")
        part = T.section(a, starts[0], starts[1])
        tile = T.alloc_shared((4, 8), "float32")
        T.copy(part[0, 0], tile)
        part[0, 0] = tile[0, 0]
    where = {n.var for n in nodes if isinstance(n, Let)}
    touching = [n for n in walk(tuple(nodes)) if part.buffer in (*n.reads, *n.writes)]
    assert len(touching) == 3  # an index is a load too
    for node in touching:
        assert where <= {v for e in node.exprs for v in variables(e)}


@tilejit
def both(A: T.Tensor, B: T.Tensor, starts: T.Tensor):
    with T.Kernel(2, threads=32) as z:
        source = T.section(A, starts[z], starts[z + 1])
        result = T.section(B, starts[z], starts[z + 1])
        for i in T.Parallel(32):
            result[i] = source[i]


def test_sections_of_a_tensor_that_nobody_writes_are_apart_from_those_that_are_written():
    n = T.dynamic("n")
    a, starts = T.Tensor((n,), "float32"), T.Tensor((3,), "int32")
    compiled = both.compile(a, a, starts, target="sm_80").kernels[0]
    assert [p.noalias for p in compiled.graph.params[:3]] == [True, False, True]
    assert "ld.global.nc" in compiled.ptx
    aliases = Aliases(compiled.graph)
    read, written = (
        next(b for b in compiled.graph.buffers if b.name == name) for name in ("source", "result")
    )
    assert aliases.of(read) is not aliases.of(written)


def test_what_has_no_sections_is_refused():
    with kernel():
        a = tensor("A", (10, 8))
        starts = tensor("starts", (5,), "int32")
        tile = T.alloc_shared((4, 8), "float32")
        part = T.section(a, starts[0], starts[1])
        with refused(
            ArgumentTypeError,
            "T.section: the tensor is tile, not one in global memory.",
            "Of tiles on the chip, write the slice: `tile[8:16, :]`.",
        ):
            T.section(tile, 0, 2)
        with refused(
            ArgumentError,
            "T.section: `part` is a section itself.",
            "Take it of `A`, with both bounds.",
        ):
            T.section(part, 0, 2)
        with refused(ArgumentError, "T.section: dim is 2, but `A` has 2 dimensions."):
            T.section(a, 0, 2, dim=2)
        with refused(ArgumentTypeError, "T.section: dim is 1.0, not an integer."):
            T.section(a, 0, 2, dim=1.0)
        wide = tensor("W", (1, 8), broadcasts=True)
        with refused(ArgumentError, "T.section: `W` broadcasts, so it has no sections."):
            T.section(wide, 0, 1)


def test_section_stands_in_a_kernel_outside_of_parallel_loops():
    a = tensor("A", (10, 8))
    with pytest.raises(TraceError, match=r"T\.section is only allowed inside"):
        T.section(a, 0, 2)

    @tilejit
    def inside(A: T.Tensor):
        with T.Kernel(1, threads=32):
            for _ in T.Parallel(4):
                T.section(A, 0, 2)

    with refused(
        TraceError,
        "T.section is not allowed inside T.Parallel.",
        "All threads of the block do it together: move it out of the loop.",
    ):
        inside.compile(T.Tensor((4,), "float32"), target="sm_80")


def test_section_is_printed_as_what_it_is():
    a, starts = T.Tensor((100,), "float32"), T.Tensor((3,), "int32")
    text = str(both.compile(a, a, starts, target="sm_80").kernels[0].graph)
    assert "source = T.section(A, source_start, source_start + source_extent)" in text
