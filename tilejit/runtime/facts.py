"""The facts of a call's arguments that a warm call is found by, read by a short generated function.

Knows which attributes of torch tensors, Numba device arrays and `__cuda_array_interface__` say
everything that `arrays` reads of them. Does not know kernels. Whatever it cannot read fast and
exactly has no reader: such calls go the long way, which checks and explains.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tilejit.dtypes import DType
from tilejit.runtime import arrays
from tilejit.runtime.binding import MISSING, Binder
from tilejit.runtime.captures import IMMUTABLE, freeze
from tilejit.runtime.matching import scalar_value
from tilejit.runtime.signature import Signature, pointer_value

Key = tuple[Any, ...]
Values = tuple[Any, ...]
Gather = Callable[..., tuple[Key, Values]]
"""Arguments as given, to the key and a value (address or number) for each that is no constant."""

_ALIGN = 16  # bytes; two addresses that differ by a multiple of it are aligned alike


@dataclass(frozen=True)
class Slot:
    """A parameter, as far as warm calls know it.

    kind: "tensor" (an array, or None where that is the default), "auto" (an array or a constant),
    "scalar", "pointer" or "constant"; dtype: of a scalar; align: bytes that the address must be a
    multiple of; is_keyed: the scalar's value decides shapes, so another value is another call.
    """

    name: str
    kind: str
    dtype: DType | None = None
    align: int = 1
    is_keyed: bool = False


def slots_of(signature: Signature) -> list[Slot]:
    """The parameters of a decorated function."""
    slots = []
    for name in signature.binder.names:
        rule = signature.rules[name]
        kind = "tensor" if rule.kind == "declared" else rule.kind
        dtype = rule.annotation if isinstance(rule.annotation, DType) else None
        slots.append(Slot(name, kind, dtype, signature.declared_align.get(name, 1)))
    return slots


@dataclass(frozen=True)
class _Reading:
    """How arrays of one type are read: Python text with `{x}` for the argument, `{p}` for its
    address and `{i}` for a scratch name."""

    facts: str
    address: str
    before: str = ""


_TORCH = _Reading(
    "{x}.shape, {x}.stride(), {x}.dtype, {x}.is_cuda, {x}.get_device(), {x}.layout, "
    "{x}.requires_grad",
    "{x}.data_ptr()",
)
_NUMBA = _Reading(
    "{x}.shape, {x}.strides, {x}.dtype, int({x}.stream), array_device({x}, {p})",
    "{x}.device_ctypes_pointer.value or 0",
)
_INTERFACE = _Reading(
    '{i}["shape"], {i}["typestr"], {i}.get("strides"), {i}["data"][1], {i}.get("stream"), '
    '{i}.get("mask") is None, array_device({x}, {p})',
    '{i}["data"][0] or 0',
    "{i} = {x}.__cuda_array_interface__",
)


def _reading(kind: type) -> _Reading | None:
    """How to read arrays of exactly this type; None for those that go the long way."""
    torch = sys.modules.get("torch")
    if torch is not None:
        nn = getattr(torch, "nn", None)
        if kind is torch.Tensor or (nn is not None and kind is nn.Parameter):
            return _TORCH
    numba = sys.modules.get("numba.cuda.cudadrv.devicearray")
    if numba is not None and kind is numba.DeviceNDArray:
        return _NUMBA
    reader = arrays.reader_of(kind)
    return _INTERFACE if arrays.is_interface_reader(reader) else None


class _Writer:
    """Writes the function that gathers the facts of one way to call."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.lines: list[str] = []
        self.key: list[str] = []
        self.values: list[str] = []
        self.places: list[int] = []
        self.names: dict[str, Any] = {"array_device": arrays.array_device}

    def array(self, x: str, reading: _Reading, align: int) -> None:
        p, i = f"p_{x}", f"i_{x}"
        for text in (reading.before, f"{p} = {reading.address}"):
            if text:
                self.lines.append(text.format(x=x, p=p, i=i))
        step = math.lcm(_ALIGN, align)
        self.key += [reading.facts.format(x=x, p=p, i=i), f"{p} % {step}"]
        self.values.append(p)
        self.places.append(int(x[1:]) if x[0] == "a" else 0)

    def constant(self, x: str, kind: type, slot: Slot, is_given: bool) -> None:
        if kind in IMMUTABLE:  # its type is known: the value says the rest
            if is_given:
                self.key.append(x)
        elif kind is float:
            self.key.append(f"{x}.hex()")  # tells 0.0 from -0.0
        else:
            self.names["freeze"] = freeze
            self.key.append(f"freeze({x}, {self.what!r}, {slot.name!r})")

    def number(self, x: str, slot: Slot, checked: Callable[[Any], Any]) -> None:
        self.names[f"checked_{x}"] = checked
        self.lines.append(f"p_{x} = checked_{x}({x})")
        self.values.append(f"p_{x}")
        self.places.append(int(x[1:]) if x[0] == "a" else 0)
        if slot.is_keyed:
            self.key.append(f"p_{x}")

    def slot(self, x: str, kind: type, slot: Slot, is_given: bool) -> bool:
        """Read one argument; False where it goes the long way."""
        if slot.kind == "scalar":
            assert slot.dtype is not None, slot
            self.number(
                x, slot, functools.partial(scalar_value, self.what, slot.name, dtype=slot.dtype)
            )
            return True
        if slot.kind == "pointer" and kind is int:
            self.number(x, slot, functools.partial(pointer_value, self.what, slot.name))
            return True
        is_array = slot.kind != "constant" and arrays.reader_of(kind) is not None
        if not is_array:
            if slot.kind == "pointer" or (slot.kind == "tensor" and kind is not type(None)):
                return False  # refused, with a reason, by the long way
            self.constant(x, kind, slot, is_given)
            return True
        reading = _reading(kind)
        if reading is None:
            return False
        self.array(x, reading, slot.align)
        return True

    def function(self, parameters: Sequence[str]) -> Gather:
        def tuple_of(parts: Sequence[str]) -> str:
            return f"({''.join(f'{part}, ' for part in parts)})"

        body = [*self.lines, f"return {tuple_of(self.key)}, {tuple_of(self.values)}"]
        source = f"def gather({', '.join(parameters)}):\n" + "".join(f"    {b}\n" for b in body)
        exec(source, self.names)
        return self.names["gather"]  # type: ignore[no-any-return]


def make_gather(
    binder: Binder, slots: Sequence[Slot], kinds: Sequence[type], keywords: Sequence[str]
) -> tuple[Gather, tuple[int, ...]] | None:
    """The reader of calls with arguments of these types, the last of them given by keyword; and
    which argument each value is read from (0 for a default, which is no array).

    None where such calls go the long way.
    """
    given = binder.places(len(kinds) - len(keywords), keywords)
    if given is None:
        return None
    writer = _Writer(binder.what)
    for n, slot in enumerate(slots):
        place = given.get(n)
        if place is not None:
            x, kind = f"a{place}", kinds[place]
        else:
            default = binder.default(n)
            if default is MISSING:
                return None
            x, kind = f"d{n}", type(default)
            writer.names[x] = default
        if not writer.slot(x, kind, slot, place is not None):
            return None
    return writer.function([f"a{n}" for n in range(len(kinds))]), tuple(writer.places)
