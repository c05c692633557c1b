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


def _parting(count: int, skipped: int, part: int, *, predicated: bool) -> tuple[str, str]:
    """Of an access to `count` elements after `skipped` others, of which the inputs from `part` on
    say which there are: what finds whether all are, and what leaves unless some are, but not
    all."""
    begin, end, last = f"$a{part}", f"$a{part + 1}", skipped + count
    found = (
        f".reg .pred whole, some, mine; "
        f"setp.ge.s32 whole, {end}, {last}; setp.le.and.s32 whole, {begin}, {skipped}, whole; "
        f"setp.gt.s32 some, {end}, {skipped}; setp.lt.and.s32 some, {begin}, {last}, some; "
    )
    if predicated:
        when = f"$a{part + 2}"
        found += f"and.pred whole, whole, {when}; and.pred some, some, {when}; "
    return found, "not.pred mine, whole; and.pred some, some, mine; @!some bra DONE; "


def _is_mine(number: int, part: int) -> str:
    """Sets `mine`: whether an element is one of those."""
    return (
        f"setp.gt.s32 mine, $a{part + 1}, {number}; "
        f"setp.le.and.s32 mine, $a{part}, {number}, mine; "
    )


@cache
def load_part(
    space: str,
    bits: int,
    count: int,
    size: int,
    constant: int,
    skipped: int,
    *,
    readonly: bool,
    predicated: bool,
) -> str:
    """ld of a vector of which only some elements, `size` bytes each, may be read; zeros in place of
    the others. Outputs: `count` registers. Inputs: the address, the number of the first element
    (int32), counted from `skipped` before the vector, that after the last and, if predicated, the
    condition. Where all may be read, it is one access."""
    path = ".nc" if readonly and space == "global" else ""
    each, name = max(1, bits // 8 // size), f"ld.{space}{path}"
    found, leave = _parting(count * each, skipped, 1, predicated=predicated)
    zero = "".join(f"mov.b{bits} $d{i}, 0; " for i in range(count))
    text = found + zero
    text += f"@whole {name}{_shape(bits, count)} {_vector('d', count)}, [$a0+{constant}]; " + leave
    kind = f"b{max(16, size * 8)}"
    if each > 1:
        text += "".join(f".reg .{kind} e{k}; mov.{kind} e{k}, 0; " for k in range(count * each))
    for k in range(count * each):
        goal = f"e{k}" if each > 1 else f"$d{k}"
        text += _is_mine(skipped + k, 1) + f"@mine {name}{_shape(size * 8, 1)} {goal}, "
        text += f"[$a0+{constant + k * size}]; "
    if size == 1:
        for k in range(0, count * each, 2):  # two bytes a time
            text += f"shl.b16 e{k + 1}, e{k + 1}, 8; or.b16 e{k}, e{k}, e{k + 1}; "
    if bits == 16 and each > 1:
        text += "mov.b16 $d0, e0; "
    elif each > 1:
        step = each // 2
        for i in range(count):
            text += f"mov.b32 $d{i}, {{e{i * each}, e{i * each + step}}}; "
    return "{ " + text + "DONE: }"


@cache
def store_part(
    space: str, bits: int, count: int, size: int, constant: int, skipped: int, *, predicated: bool
) -> str:
    """The same with st. Inputs: the address, `count` registers, the number of the first element,
    that after the last and, if predicated, the condition."""
    each, part = max(1, bits // 8 // size), count + 1
    found, leave = _parting(count * each, skipped, part, predicated=predicated)
    text = f"@whole st.{space}{_shape(bits, count)} [$a0+{constant}], {_vector('a', count, 1)}; "
    text = found + text + leave
    if bits == 16 and each > 1:
        text += ".reg .b16 e0; mov.b16 e0, $a1; "
    elif each > 1:
        text += "".join(f".reg .b16 e{k}; " for k in range(count * 2))
        for i in range(count):
            text += f"mov.b32 {{e{2 * i}, e{2 * i + 1}}}, $a{i + 1}; "
    for k in range(count * each):
        text += _is_mine(skipped + k, part)
        source = f"e{k * size // 2}" if each > 1 else f"$a{k + 1}"
        place = f"[$a0+{constant + k * size}]"
        text += f"@mine st.{space}{_shape(size * 8, 1)} {place}, {source}; "
        if size == 1 and k % 2 == 0:
            text += f"shr.u16 {source}, {source}, 8; "
    return "{ " + text + "DONE: }"


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
