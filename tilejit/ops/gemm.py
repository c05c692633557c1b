"""Matrix multiply of tiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.ir.expr import Expr
from tilejit.ir.names import Names
from tilejit.ir.node import Body, Node
from tilejit.isa import wgmma
from tilejit.isa.atom import GemmAtom, WgmmaAtom
from tilejit.isa.mma import tile_a, tile_acc, tile_b, words_a, words_b
from tilejit.layout.fragment import FragmentLayout, blocked, register, thread


class GemmWarpPolicy(IntEnum):
    """How the warps share the accumulator tile."""

    Square = 0
    FullRow = 1
    FullCol = 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Gemm(Node):
    """acc += op(a) @ op(b) on one tile; with `clear`, acc = op(a) @ op(b).

    a: (M, K), or (K, M) with transpose_a; shared or fragment.
    b: (K, N), or (N, K) with transpose_b; shared or fragment.
    acc: (M, N) fragment, updated in place.
    atom: decided by `select`, None before.
    is_async: it only starts: `acc` may not be touched, nor the operands written, before a
        `GemmWait`. What atoms that complete later need; of others the product is there at once.
    carried: decided by `pipeline`: registers that hold the operands of the first step of k when
        the node starts, and those of `following` (the next iteration's a and b) when it ends.
        They are loaded while the last step is multiplied, after `meanwhile` has waited for them.
    filling: decided by `pipeline`: the copies that run ahead, issued before the first step.
    begins: decided by `fold_clears`: where it holds, all of acc is zero, and what acc holds need
        not be added; the same for all threads. None where that is not known.
    row: decided by `tail`: of the instructions of each warpgroup along m, the only one that is
        issued; None for all.
    """

    a: Region
    b: Region
    acc: Region
    transpose_a: bool = False
    transpose_b: bool = False
    policy: GemmWarpPolicy = GemmWarpPolicy.Square
    clear: bool = False
    atom: GemmAtom | WgmmaAtom | None = None
    is_async: bool = False
    carried: Buffer | None = None
    following: tuple[Region, Region] | None = None
    meanwhile: Body = ()
    filling: Body = ()
    begins: Expr | None = None
    row: int | None = None

    @property
    def m(self) -> int:
        return self.acc.shape[0]

    @property
    def n(self) -> int:
        return self.acc.shape[1]

    @property
    def k(self) -> int:
        return self.a.shape[0 if self.transpose_a else 1]

    @property
    def reads(self) -> tuple[Buffer, ...]:
        inputs = [r.buffer for r in self.regions if r is not self.acc]
        inputs += [] if self.clear else [self.acc.buffer]
        return (*inputs, *self._carried)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.acc.buffer, *self._carried)

    @property
    def _carried(self) -> tuple[Buffer, ...]:
        return () if self.carried is None else (self.carried,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        begins = () if self.begins is None else (self.begins,)
        return (*begins, *(e for region in self.regions for e in region.starts))

    @property
    def regions(self) -> tuple[Region, ...]:
        return (self.a, self.b, *(self.following or ()), self.acc)

    @property
    def bodies(self) -> tuple[Body, ...]:
        return (self.filling, self.meanwhile) if self.carried is not None else ()

    def with_bodies(self, *bodies: Body) -> Node:
        if not bodies:
            return self
        filling, meanwhile = bodies
        return dataclasses.replace(self, filling=filling, meanwhile=meanwhile)

    def with_operand(self, side: str, region: Region) -> Gemm:
        """The multiply with another `a` or `b`."""
        if side == "a":
            return dataclasses.replace(self, a=region)
        return dataclasses.replace(self, b=region)

    def problems(self) -> Iterator[str]:
        shapes = (self.a.shape, self.b.shape, self.acc.shape)
        if any(len(shape) != 2 for shape in shapes):
            yield f"multiplies tiles of shapes {shapes}"
            return
        a = shapes[0][::-1] if self.transpose_a else shapes[0]
        b = shapes[1][::-1] if self.transpose_b else shapes[1]
        if a[1] != b[0] or (a[0], b[1]) != shapes[2]:
            yield f"multiplies {a} by {b} into {shapes[2]}"
        for name, region in (("a", self.a), ("b", self.b)):
            if region.buffer.scope not in (Scope.SHARED, Scope.FRAGMENT):
                yield f"takes `{name}` from {region.buffer.scope.value}"
        if self.acc.buffer.scope is not Scope.FRAGMENT:
            yield f"accumulates in {self.acc.buffer.scope.value}"

    def show(self, names: Names) -> str:
        text = ", ".join(names.region(region) for region in (self.a, self.b, self.acc))
        for flag in ("transpose_a", "transpose_b"):
            if getattr(self, flag):
                text += f", {flag[:-1]}{flag[-1].upper()}=True"
        if self.policy is not GemmWarpPolicy.Square:
            text += f", policy=T.GemmWarpPolicy.{self.policy.name}"
        if self.clear:
            text += ", clear_accum=True"
        comment = f"  # {self.atom}" if self.atom else ""
        if self.begins is not None:
            comment += f"; without what acc holds where {names.expr(self.begins)}"
        if self.row is not None:
            comment += f"; row {self.row} of each"
        if self.following:
            ahead = ", ".join(names.region(region) for region in self.following)
            comment += f"; loads {ahead} before its last step"
        return f"T.{'wgmma_gemm' if self.is_async else 'gemm'}({text}){comment}"


@dataclass(frozen=True, eq=False, kw_only=True)
class GemmWait(Node):
    """Wait until at most `pending` of the thread's newest asynchronous multiplies are unfinished
    (PTX ISA, wgmma.wait_group).

    registers: decided by `sync`: the fragments that multiplies in flight may read or change.
    operands: shared memory that the multiplies which are over then have read until now.
    gemm: decided by `tail`: the multiply whose row is complete, where that is all that is.
    """

    pending: int
    registers: tuple[Buffer, ...] = ()
    operands: tuple[Buffer, ...] = ()
    gemm: Gemm | None = None

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (*self.registers, *self.operands)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return self.registers

    def show(self, names: Names) -> str:
        comment = "" if self.gemm is None else f"  # row {self.gemm.row} of each"
        return f"T.wait_wgmma({self.pending}){comment}"


@dataclass(frozen=True, eq=False, kw_only=True)
class FetchOperands(Node):
    """Load the operands of a multiply's first step of k into the registers it carries."""

    gemm: Gemm
    carried: Buffer

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.gemm.a.buffer, self.gemm.b.buffer

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return (self.carried,)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return (*self.gemm.a.starts, *self.gemm.b.starts)

    @property
    def regions(self) -> tuple[Region, ...]:
        return self.gemm.a, self.gemm.b

    def problems(self) -> Iterator[str]:
        if self.carried.scope is not Scope.FRAGMENT:
            yield f"fetches operands into {self.carried.scope.value}"

    def show(self, names: Names) -> str:
        regions = ", ".join(names.region(region) for region in self.regions)
        return f"fetch_operands({regions})  # of the first step of the multiply"


def operand_words(node: Gemm) -> int:
    """Registers a thread needs for the operands of one step of k, of the instruction's kind."""
    assert node.atom is not None and node.atom.mma is not None
    mma = node.atom.mma
    rows = node.m // (node.atom.warps_m * mma.m)
    columns = node.n // (node.atom.warps_n * mma.n)
    return rows * words_a(mma) + columns * words_b(mma)


def acc_layout(node: Gemm, atom: GemmAtom | WgmmaAtom, threads: int) -> FragmentLayout:
    """Where the accumulator lives; warps beyond those of the atom hold copies."""
    if isinstance(atom, WgmmaAtom):
        groups = atom.groups_m, atom.groups_n
        layout = wgmma.tile_acc(atom.wgmma, node.m, node.n, *groups, halved=atom.halved)
        return _in_buffer(layout, node.acc, False, threads)
    if atom.mma is None:
        return _in_buffer(fma_layout(node.m, node.n, threads), node.acc, False, threads)
    layout = tile_acc(atom.mma, node.m, node.n, atom.warps_m, atom.warps_n)
    return _in_buffer(layout, node.acc, False, threads)


def left_layout(node: Gemm, atom: GemmAtom | WgmmaAtom, threads: int) -> FragmentLayout:
    """Where A must live when it comes from a fragment."""
    if isinstance(atom, WgmmaAtom):
        layout = wgmma.tile_a(atom.wgmma, node.m, node.k, atom.groups_m, atom.groups_n)
        return _in_buffer(layout, node.a, node.transpose_a, threads)
    assert atom.mma is not None, "plain multiply-adds read A from shared memory"
    layout = tile_a(atom.mma, node.m, node.k, atom.warps_m, atom.warps_n)
    return _in_buffer(layout, node.a, node.transpose_a, threads)


def right_layout(node: Gemm, atom: GemmAtom | WgmmaAtom, threads: int) -> FragmentLayout:
    """Where B must live when it comes from a fragment."""
    assert isinstance(atom, GemmAtom) and atom.mma is not None, f"{atom} reads B from shared memory"
    layout = tile_b(atom.mma, node.k, node.n, atom.warps_m, atom.warps_n)
    return _in_buffer(layout, node.b, node.transpose_b, threads)


def held_operands(node: Gemm, threads: int) -> list[tuple[str, Region, FragmentLayout]]:
    """The operands in fragments: "a" or "b", the fragment, and where it must live."""
    assert node.atom is not None, "select did not run"
    sides = (("a", node.a, left_layout), ("b", node.b, right_layout))
    return [
        (side, region, wanted(node, node.atom, threads))
        for side, region, wanted in sides
        if region.buffer.scope is Scope.FRAGMENT
    ]


def _in_buffer(
    layout: FragmentLayout, region: Region, is_transposed: bool, threads: int
) -> FragmentLayout:
    """The layout of a matrix as one of the whole buffer, which may be stored transposed and have
    leading extents of 1."""
    shape, dims = layout.shape, layout.dims
    if is_transposed:
        shape, dims = shape[::-1], dims[::-1]
    lead = region.buffer.rank - len(shape)
    if layout.flat:
        return dataclasses.replace(layout, shape=(1,) * lead + shape)
    return FragmentLayout((1,) * lead + shape, ((),) * lead + dims, threads)


def fma_layout(m: int, n: int, threads: int) -> FragmentLayout:
    """A tile for plain multiply-adds: each thread a patch as square as divisibility allows, its
    columns in vectors of 4, so that a value loaded serves a whole row or column of the patch."""
    vector = math.gcd(n, 4)
    best: tuple[int, int] | None = None
    for across in _divisors(math.gcd(n // vector, threads)):
        down = threads // across
        if threads % across or m % down:
            continue
        loads = m // down + n // across
        if best is None or loads < best[0]:
            best = (loads, across)
    if best is None:
        return blocked((m, n), threads, 1)
    across = best[1]
    down = threads // across
    patches = n // (vector * across)
    rows = (register(m // down, vector * patches), thread(down, across))
    columns = (register(patches, vector), thread(across, 1), register(vector, 1))
    dims = tuple(tuple(d for d in dim if d.size > 1) for dim in (rows, columns))
    return FragmentLayout((m, n), dims, threads)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
