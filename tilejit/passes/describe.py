"""Describes to the tensor memory accelerator what each bulk copy moves.

Knows boxes, swizzles and tensors. Does not know how a description is encoded or passed.
"""

from __future__ import annotations

from dataclasses import replace

from tilejit.dtypes import int32, tfloat32, uint64
from tilejit.errors import UnsupportedError
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr, Var, VarKind, arith, binary, cast, const, index
from tilejit.ir.kernel import Kernel, Param, ParamKind, TensorBox
from tilejit.ir.node import Node, rewrite, walk
from tilejit.layout.boxes import boxes_of, swizzle_of
from tilejit.layout.sections import EDGE, WIDEST
from tilejit.ops.copy import Copy
from tilejit.ops.gemm import Gemm
from tilejit.ops.uses import used_variables
from tilejit.passes.bulk import check_preferences
from tilejit.passes.tma import SECTION_RANK


def describe_tensors(kernel: Kernel) -> Kernel:
    """Decide the tensor map of each bulk copy.

    Needs: layouts, slots, clusters. Decides: `Copy.tensor_map`; adds the maps to the parameters,
    one for copies of equal boxes, and drops addresses that nothing else needs.
    Raises UnsupportedError for tiles that have no boxes.
    """
    check_preferences(kernel)
    describer = _Describer(kernel)
    body = rewrite(kernel.body, describer.visit)
    if not describer.params:
        return kernel
    used = {v for node in walk(body) for v in used_variables(node)}
    kept = [p for p in kernel.params if p.kind is not ParamKind.TENSOR or p.var in used]
    return replace(kernel, body=body, params=(*kept, *describer.params.values()))


class _Describer:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.params: dict[TensorBox, Param] = {}
        self.split: dict[tuple[Buffer, int], Buffer] = {}
        read_otherwise: set[Buffer] = set()
        for node in walk(kernel.body):
            if not isinstance(node, Gemm):
                read_otherwise.update(b.root for b in node.reads)
        self.read_otherwise = read_otherwise

    def visit(self, node: Node) -> Node:
        if not isinstance(node, Copy) or not node.is_tma or node.tensor_map is not None:
            return node
        box = self.box(node)
        node = _in_map(node, box)
        param = self.params.get(box)
        if param is None:
            name = f"{box.tensor.name}_map"
            taken = {p.name for p in (*self.kernel.params, *self.params.values())}
            while name in taken:
                name += "_"
            var = Var(name, uint64, VarKind.POINTER)
            param = self.params[box] = Param(name=name, kind=ParamKind.TENSOR_MAP, var=var, box=box)
        return replace(node, tensor_map=param.var, share=self.share(node))

    def share(self, node: Copy) -> Expr | None:
        """The block's number among those that share what is brought."""
        mask, rank = node.sharers(self.kernel.cluster_size), self.kernel.cluster_rank
        if not mask:
            return None
        if mask == (1 << self.kernel.cluster_size) - 1:
            return rank
        before: Expr = const(0)
        for other in (n for n in range(mask.bit_length()) if mask >> n & 1):
            before = arith("add", before, cast(binary("gt", rank, const(other)), int32))
        return before

    def box(self, node: Copy) -> TensorBox:
        is_load = node.src.buffer.scope is Scope.GLOBAL
        outer, inner = (node.src, node.dst) if is_load else (node.dst, node.src)
        layout = self.kernel.shared[inner.buffer]
        blocks = max(1, node.sharers(self.kernel.cluster_size).bit_count())
        boxes = boxes_of(layout, inner.extents, blocks)
        if boxes is None:
            raise UnsupportedError(
                f"{inner.buffer.name} cannot be divided among {blocks} blocks of the cluster.",
                span=node.span,
                related=[(inner.buffer.span, f"{inner.buffer.name} comes from here")],
                hint="Each block brings as many panels or groups of 8 rows of it.",
            )
        extents = [1] * outer.buffer.rank
        kept = outer.kept
        extents[kept[-1]] = boxes.box_columns
        if len(kept) > 1:
            extents[kept[-2]] = boxes.box_rows
        tensor = outer.buffer
        if layout.halved:
            row = kept[-2]
            tensor = self.in_fours(tensor, row)
            extents[row : row + 1] = [boxes.box_rows // 2, 2]
        is_rounded = is_load and inner.buffer.dtype is tfloat32
        section = outer.buffer.section
        if section is not None:
            extents = [1] * SECTION_RANK + extents
        return TensorBox(
            tensor=tensor if section is None else section.tensor,
            extents=tuple(extents),
            swizzle=swizzle_of(layout),
            rounds=is_rounded and inner.buffer.root not in self.read_otherwise,
            section=None if section is None else section.dim,
        )

    def in_fours(self, tensor: Buffer, axis: int) -> Buffer:
        """The tensor with a dimension as two, the second of extent 4."""
        if (tensor, axis) not in self.split:
            shape, strides = list(tensor.shape), list(tensor.element_strides)
            shape[axis : axis + 1] = [
                arith("floordiv", shape[axis], 4),
                const(4, shape[axis].dtype),
            ]
            strides[axis : axis + 1] = [arith("mul", strides[axis], 4), strides[axis]]
            fresh = replace(tensor, shape=tuple(shape), strides=tuple(strides))
            self.split[tensor, axis] = fresh
        return self.split[tensor, axis]


def _in_map(node: Copy, box: TensorBox) -> Copy:
    """The copy, its part of a section of a tensor in the coordinates of the section's map."""
    is_load = node.src.buffer.scope is Scope.GLOBAL
    outer = node.src if is_load else node.dst
    section = outer.buffer.section
    if section is None:
        return node
    dim, tensor = section.dim, section.tensor
    extent = outer.buffer.shape[dim]
    starts = list(outer.starts)
    starts[dim] = arith("add", arith("sub", EDGE, extent), starts[dim])
    seen = Buffer(
        name=outer.buffer.name,
        shape=tuple(index(n) for n in (WIDEST, WIDEST)) + tensor.shape,
        strides=(index(0), index(0), *tensor.element_strides),
        dtype=tensor.dtype,
        scope=Scope.GLOBAL,
        data=tensor.data,
        align=tensor.align,
        span=outer.buffer.span,
    )
    region = Region(
        seen,
        (index(EDGE), arith("add", section.first, extent), *starts),
        (1,) * SECTION_RANK + outer.extents,
        frozenset({0, 1, *(d + SECTION_RANK for d in outer.dropped)}),
    )
    return replace(node, src=region) if is_load else replace(node, dst=region)
