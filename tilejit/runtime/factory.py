"""Kernels of factories: a `T.prim_func` with its sizes fixed, and outputs named by `out_idx`.

Knows PrimFunc. Does not know how kernels run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tilejit.errors import ArgumentError, ArgumentTypeError
from tilejit.ir.kernel import Program
from tilejit.language.function import PrimFunc
from tilejit.runtime.cache import SignatureCache
from tilejit.runtime.choose import with_notes
from tilejit.runtime.kernel import TileKernel
from tilejit.runtime.signature import Signature
from tilejit.target import Target


def prim_kernel(
    prim: PrimFunc,
    target: Target,
    out_idx: int | Sequence[int] | None,
    fast_math: bool,
    notes: tuple[str, ...] = (),
) -> TileKernel:
    """The kernel object of a factory's inner function.

    notes: lines that `explain()` begins with.

    Raises:
        TypeError, ValueError: parameters without a declaration, `out_idx` outside the parameters.
    """
    signature = Signature(prim, prim.function, prim.name)
    variants: SignatureCache[TileKernel] = SignatureCache()
    for name, rule in prim.parameters.items():
        if rule.kind not in ("declared", "scalar", "pointer"):
            raise ArgumentTypeError(
                f"{prim.name}: {name} has no declared shape, which a T.prim_func needs.",
                hint=f'Write `{name}: T.Tensor((M, N), "float16")`.',
            )
    names = signature.binder.names
    places = _output_places(prim.name, out_idx, names, signature.declared)

    def variant(aligns: Mapping[str, int], overlaps: frozenset[tuple[str, str]]) -> TileKernel:
        key = (tuple(sorted(aligns.items())), overlaps)
        return variants.find_or_build(key, lambda: build(aligns, overlaps))

    def build(aligns: Mapping[str, int], overlaps: frozenset[tuple[str, str]]) -> TileKernel:
        call = signature.bind_specs((), {})
        call.overlaps = tuple(sorted(overlaps))
        arguments = signature.trace_arguments(call, aligns)
        program = prim.trace(arguments, name=prim.name, fast_math=fast_math)
        assert isinstance(program, Program), f"{prim.name} is no program"
        program = with_notes(program, notes)
        return TileKernel(
            program, target, names, out_idx=places, overlaps=call.overlaps, specialise=variant
        )

    return variant({}, frozenset())


def _output_places(
    what: str, out_idx: int | Sequence[int] | None, names: Sequence[str], tensors: Sequence[str]
) -> tuple[int, ...]:
    """Positions of the outputs among the parameters."""
    if out_idx is None:
        return ()
    places: list[int] = []
    for given in (out_idx,) if isinstance(out_idx, int) else tuple(out_idx):
        if isinstance(given, bool) or not isinstance(given, int):
            raise ArgumentTypeError(f"{what}: out_idx is {out_idx!r}, not integers.")
        place = given + len(names) if given < 0 else given
        if not 0 <= place < len(names):
            raise ArgumentError(
                f"{what}: out_idx {given} is outside its {len(names)} parameters.",
                hint="Parameters count from 0, or from -1 at the end.",
            )
        if names[place] not in tensors:
            raise ArgumentError(f"{what}: out_idx {given} is {names[place]}, which is no tensor.")
        if place in places:
            raise ArgumentError(f"{what}: out_idx names {names[place]} twice.")
        places.append(place)
    return tuple(places)
