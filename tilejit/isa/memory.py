"""PTX of a single thread's memory accesses: loads, stores, atomics.

Knows spellings only; what the accesses mean is `isa.machine`'s to say. Texts number their outputs
`$d0 $d1 ...` and inputs `$a0 $a1 ...`, as instruction records do. Named sections are the PTX ISA's
("Data movement and conversion instructions", "Parallel synchronization and communication").
"""

from __future__ import annotations

from functools import cache

from tilejit.dtypes import DType
from tilejit.target import Target


def _vector(letter: str, count: int, first: int = 0) -> str:
    names = ", ".join(f"${letter}{first + i}" for i in range(count))
    return "{" + names + "}" if count > 1 else names


def _shape(bits: int, count: int) -> str:
    kind = "u8" if bits == 8 else f"b{bits}"  # sub-word registers are wider than the access
    return f".v{count}.{kind}" if count > 1 else f".{kind}"


@cache
def load(
    space: str,
    bits: int,
    count: int,
    constant: int,
    *,
    readonly: bool,
    predicated: bool,
) -> str:
    """ld, ld.global.nc. Outputs: `count` registers; inputs: the address and,
    if predicated, the condition, without which the outputs are zeros."""
    path = ".nc" if readonly and space == "global" else ""
    access = f"ld.{space}{path}{_shape(bits, count)} {_vector('d', count)}, [$a0+{constant}];"
    if not predicated:
        return access
    zero = "".join(f"mov.b{max(bits, 16)} $d{i}, 0; " for i in range(count))
    if bits == 8:
        zero = "mov.b32 $d0, 0; "
    return f"{zero}@$a1 {access}"


@cache
def store(space: str, bits: int, count: int, constant: int, *, predicated: bool) -> str:
    """st. Inputs: the address, `count` registers and, if predicated, the condition."""
    guard = f"@$a{count + 1} " if predicated else ""
    return f"{guard}st.{space}{_shape(bits, count)} [$a0+{constant}], {_vector('a', count, 1)};"


_BITWISE = ("and", "or", "xor", "exch")


def atomic_type(combine: str, dtype: DType, target: Target) -> str | None:
    """The type suffix of the atomic instruction that combines so, or None if there is none
    (atom)."""
    if dtype.bits in (32, 64) and combine in _BITWISE:
        return None if dtype.is_float and combine != "exch" else f"b{dtype.bits}"
    if dtype.is_integer and dtype.bits in (32, 64):
        if combine == "add":
            return f"u{dtype.bits}"
        return f"{'s' if dtype.is_signed else 'u'}{dtype.bits}"
    if combine != "add" or not dtype.is_float:
        return None
    if dtype.name in ("float32", "tfloat32", "float64"):
        return f"f{dtype.bits}"
    if dtype.name == "float16":
        return "noftz.f16"
    if dtype.name == "bfloat16" and target.cc >= (9, 0):
        return "noftz.bf16"
    return None


@cache
def atomic(
    space: str, combine: str, suffix: str, constant: int, *, old: bool, predicated: bool
) -> str:
    """atom, or red where the old value is not wanted. Inputs: address,
    value and, if predicated, the condition."""
    scope = "relaxed.gpu.global" if space == "global" else "relaxed.cta.shared"
    guard = "@$a2 " if predicated else ""
    if not old and combine != "exch":
        return f"{guard}red.{scope}.{combine}.{suffix} [$a0+{constant}], $a1;"
    width = 64 if suffix.endswith("64") else 16 if suffix.endswith("16") else 32
    zero = f"mov.b{width} $d0, 0; " if predicated else ""
    return f"{zero}{guard}atom.{scope}.{combine}.{suffix} $d0, [$a0+{constant}], $a1;"


@cache
def compare_and_swap(space: str, bits: int) -> str:
    """atom.cas. Inputs: address, expected, replacement; output: the old value."""
    scope = "relaxed.gpu.global" if space == "global" else "relaxed.cta.shared"
    return f"atom.{scope}.cas.b{bits} $d0, [$a0], $a1, $a2;"
