"""`T.gemm`: checks of shapes, dtypes and scopes of a tile multiply.

Knows what may be multiplied. Does not know instructions: `select` finds one, or says why not.
"""

from __future__ import annotations

from typing import Any

from tilejit.dtypes import (
    DType,
    bfloat16,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    float64,
    int8,
    int32,
    tfloat32,
    uint8,
)
from tilejit.errors import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ShapeError,
    Span,
    UnsupportedError,
    caller_span,
)
from tilejit.ir.buffer import Buffer, Region, Scope
from tilejit.language.extents import shape_text
from tilejit.language.regions import Start, as_side, dropped
from tilejit.language.where import tile_op
from tilejit.ops.gemm import Gemm, GemmWarpPolicy

__all__ = ["GemmWarpPolicy", "gemm"]

_FP8 = (float8_e4m3fn, float8_e5m2)
# (dtype of A, dtype of B) -> dtypes that may accumulate the product
PRODUCTS: dict[tuple[DType, DType], tuple[DType, ...]] = {
    (float16, float16): (float32, float16),
    (bfloat16, bfloat16): (float32,),
    (tfloat32, tfloat32): (float32,),
    (float32, float32): (float32,),
    (float64, float64): (float64,),
    **{(a, b): (int32,) for a in (int8, uint8) for b in (int8, uint8)},
    **{(a, b): (float32, float16) for a in _FP8 for b in _FP8},
}


def gemm(
    A: Any,
    B: Any,
    C: Any,
    transpose_A: bool = False,
    transpose_B: bool = False,
    policy: GemmWarpPolicy = GemmWarpPolicy.Square,
    clear_accum: bool = False,
    k_pack: int = 1,
    mbar: Any = None,
    annotations: Any = None,
) -> None:
    """Multiply two tiles and add the product to `C`.

    Args:
        A: (M, K), or (K, M) with `transpose_A`; shared memory or a whole fragment.
        B: (K, N), or (N, K) with `transpose_B`; shared memory or a whole fragment.
        C: (M, N), a whole fragment. float16 and float8 tiles accumulate in float32 or float16;
            bfloat16, tfloat32 and float32 in float32; float64 in float64; int8 and uint8 in int32.
        policy: how the warps share C.
        clear_accum: C is set to the product instead.
        k_pack: 1.
        mbar, annotations: None.

    Raises:
        ShapeError: M, N or K extents differ, or a tile has not two dimensions.
        DTypeError: nothing multiplies these dtypes.
        ArgumentError: a tile lies in the wrong memory.
        UnsupportedError: `k_pack`, `mbar` or `annotations` are given.
        TraceError: outside a kernel, or inside T.Parallel.
    """
    what = "T.gemm"
    trace = tile_op(what)
    check_policy(what, policy)
    refuse(what, k_pack=(k_pack, 1), mbar=(mbar, None), annotations=(annotations, None))
    flags = (transpose_A, transpose_B, clear_accum)
    trace.add(multiply(what, (A, B, C), flags, GemmWarpPolicy(policy)))


def multiply(
    what: str, tiles: tuple[Any, Any, Any], flags: tuple[Any, Any, Any], policy: GemmWarpPolicy
) -> Gemm:
    """The node of a multiply, checked: A, B, C; transpose_A, transpose_B, clear_accum."""
    a, b, acc = (_tile(what, x, name) for x, name in zip(tiles, "ABC", strict=True))
    names = ("transpose_A", "transpose_B", "clear_accum")
    t_a, t_b, clear = (_flag(what, x, name) for x, name in zip(flags, names, strict=True))
    _check_scopes(what, a, b, acc)
    _check_shapes(what, a, b, acc, t_a, t_b)
    _check_dtypes(what, a.buffer, b.buffer, acc.buffer)
    return Gemm(
        a=a,
        b=b,
        acc=acc,
        transpose_a=t_a,
        transpose_b=t_b,
        policy=policy,
        clear=clear,
        span=caller_span(),
    )


def _flag(what: str, x: Any, name: str) -> bool:
    if isinstance(x, bool) or (isinstance(x, int) and x in (0, 1)):
        return bool(x)
    raise ArgumentTypeError(
        f"{what}: {name} is {x!r}; it must be True or False while tracing.",
        hint=f"Call {what} in both arms of `with T.If(condition):`."
        if name == "clear_accum"
        else "",
    )


def check_policy(what: str, policy: Any) -> None:
    if not isinstance(policy, int) or policy not in tuple(GemmWarpPolicy):
        names = ", ".join(f"T.GemmWarpPolicy.{p.name}" for p in GemmWarpPolicy)
        raise ArgumentError(
            f"{what}: {policy!r} is not a policy for sharing C among warps.",
            hint=f"Policies: {names}.",
        )


def refuse(what: str, **given: tuple[Any, Any]) -> None:
    """Arguments that are in the signature for TileLang's sake: the value and the only one that is
    accepted."""
    for name, (value, default) in given.items():
        if value is not default and value != default:
            raise UnsupportedError(
                f"{what}: {name}={value!r} is not supported.", hint=f"Leave {name} out."
            )


def _tile(what: str, x: Any, name: str) -> Region:
    """The operand as a region of two dimensions; leading extents of 1 are dropped."""
    side = as_side(x, what, name)
    if isinstance(side, Start):
        raise ShapeError(
            f"{what}: {name} is one element of `{side.buffer.name}`, not a tile.",
            hint=f"Pass `{side.buffer.name}` itself, or a slice of it.",
        )
    if isinstance(side, Buffer):  # runtime extents: a global tensor
        raise _wrong_memory(what, side, name)
    lead = side.kept[:-2]
    if len(side.kept) < 2 or any(side.extents[d] != 1 for d in lead):
        raise ShapeError(
            f"{what}: {name} is {shape_text(side.shape)}, "
            f"but a tile has two dimensions, not {len(side.shape)}.",
            related=[_origin(side.buffer)],
        )
    return dropped(side, set(lead))


def _origin(buffer: Buffer) -> tuple[Span | None, str]:
    return buffer.span, f"{buffer.name} comes from here"


def _origins(*regions: Region) -> list[tuple[Span | None, str]]:
    return [_origin(r.buffer) for r in regions]


def _wrong_memory(what: str, buffer: Buffer, name: str) -> ArgumentError:
    wanted = "a fragment" if name == "C" else "shared memory or a fragment"
    hint = "Copy it to shared memory with T.copy first."
    if name == "C":
        hint = "Allocate it with T.alloc_fragment."
    return ArgumentError(
        f"{what}: {name} is in {buffer.scope.words}, but it has to be in {wanted}.",
        related=[_origin(buffer)],
        hint=hint,
    )


def _check_scopes(what: str, a: Region, b: Region, acc: Region) -> None:
    for name, region in (("A", a), ("B", b), ("C", acc)):
        buffer = region.buffer
        allowed = (Scope.FRAGMENT,) if name == "C" else (Scope.SHARED, Scope.FRAGMENT)
        if buffer.scope not in allowed:
            raise _wrong_memory(what, buffer, name)
        if buffer.scope is Scope.FRAGMENT and region.shape != _core(buffer):
            raise UnsupportedError(
                f"{what}: {name} is a {shape_text(region.shape)} part of the fragment "
                f"`{buffer.name}` ({shape_text(buffer.shape)}).",
                related=[_origin(buffer)],
                hint="Pass the whole fragment, or allocate one of the part's extents.",
            )


def _core(buffer: Buffer) -> tuple[int, ...]:
    return buffer.extents[-2:]


def _check_shapes(what: str, a: Region, b: Region, acc: Region, t_a: bool, t_b: bool) -> None:
    (m, k) = a.shape[::-1] if t_a else a.shape
    (k_b, n) = b.shape[::-1] if t_b else b.shape
    pair = f"A is {_stored(a, t_a)} and B is {_stored(b, t_b)}"
    if k != k_b:
        raise ShapeError(
            f"{what}: {pair}, so their K extents ({k} and {k_b}) differ.",
            related=_origins(a, b),
            hint=_transpose_hint(a, b, k, k_b),
        )
    for letter, position, extent, name, region in (("M", 0, m, "A", a), ("N", 1, n, "B", b)):
        other = acc.shape[position]
        if extent != other:
            stored = _stored(region, t_a if name == "A" else t_b)
            raise ShapeError(
                f"{what}: {name} is {stored} and C is {shape_text(acc.shape)}, "
                f"so their {letter} extents ({extent} and {other}) differ.",
                related=_origins(region, acc),
                hint=f"C has as many {'rows' if letter == 'M' else 'columns'} as the product: "
                f"{shape_text((m, n))}.",
            )


def _stored(region: Region, transposed: bool) -> str:
    return shape_text(region.shape) + (" (transposed)" if transposed else "")


def _transpose_hint(a: Region, b: Region, k: int, k_b: int) -> str:
    """The advice that fits: another transpose flag where that makes K equal."""
    if k == b.shape[0] + b.shape[1] - k_b:
        return "Give both tiles the same K, or toggle transpose_B (True if B is stored N x K)."
    if k_b == a.shape[0] + a.shape[1] - k:
        return "Give both tiles the same K, or toggle transpose_A (True if A is stored K x M)."
    return "Give both tiles the same K."


def _check_dtypes(what: str, a: Buffer, b: Buffer, acc: Buffer) -> None:
    sums = PRODUCTS.get((a.dtype, b.dtype))
    if sums is None:
        pairs = ", ".join(dict.fromkeys(x.name for x, y in PRODUCTS if x is y))
        raise DTypeError(
            f"{what}: nothing multiplies {a.dtype} (A) by {b.dtype} (B).",
            related=[_origin(a), _origin(b)],
            hint=f"Both tiles need the same dtype, one of {pairs}; T.copy casts.",
        )
    if acc.dtype not in sums:
        raise DTypeError(
            f"{what}: products of {a.dtype} (A) by {b.dtype} (B) add up in "
            f"{' or '.join(s.name for s in sums)}, but C is {acc.dtype}.",
            related=[_origin(acc)],
            hint=f'Allocate C as "{sums[0]}".',
        )
