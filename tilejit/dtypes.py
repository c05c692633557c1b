"""Element types: one frozen value each, with its NumPy twin (ml_dtypes for those NumPy lacks).

Knows names, sizes, NumPy promotion and value ranges. Does not know machine registers or PTX.
"""

from __future__ import annotations

import difflib
import functools
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np

from tilejit.errors import ArgumentError, DTypeError


class Kind(StrEnum):
    BOOL = "bool"
    INT = "int"
    UINT = "uint"
    FLOAT = "float"


@dataclass(frozen=True, eq=False, slots=True)
class DType:
    """An element type. `str(dtype)` is its name, `==` accepts any spelling of it.

    Calling it converts: `T.float16(x)` casts a traced value, and makes a typed constant of a
    Python number.
    """

    name: str
    kind: Kind
    bits: int
    numpy: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """Size of one element in memory."""
        return self.numpy.itemsize

    itemsize = bytes

    @property
    def is_float(self) -> bool:
        return self.kind is Kind.FLOAT

    @property
    def is_integer(self) -> bool:
        return self.kind in (Kind.INT, Kind.UINT)

    @property
    def is_bool(self) -> bool:
        return self.kind is Kind.BOOL

    @property
    def is_signed(self) -> bool:
        return self.kind in (Kind.INT, Kind.FLOAT)

    @property
    def min(self) -> float | int:
        """Smallest finite value."""
        return self._limits()[0]

    @property
    def max(self) -> float | int:
        """Largest finite value."""
        return self._limits()[1]

    @functools.cache  # noqa: B019 - dtypes are few and live as long as the module
    def _limits(self) -> tuple[float | int, float | int]:
        if self.is_bool:
            return 0, 1
        if self.is_integer:
            low = -(1 << (self.bits - 1)) if self.is_signed else 0
            return low, (1 << (self.bits - (1 if self.is_signed else 0))) - 1
        finfo = ml_dtypes.finfo(self.numpy)
        return float(finfo.min), float(finfo.max)

    def __call__(self, value: Any) -> Any:
        astype = getattr(value, "astype", None)
        if astype is not None and not isinstance(value, np.generic):
            return astype(self)
        return self.constant(value)

    def constant(self, value: Any) -> np.generic:
        """The Python or NumPy number as a NumPy scalar of this dtype.

        Raises:
            ArgumentError: the value is out of range (a finite float that would become infinite,
                an integer that does not fit).
            DTypeError: not a number.
        """
        if isinstance(value, np.generic):
            value = value.item()
        if not isinstance(value, bool | int | float):
            raise DTypeError(f"{value!r} is not a number, so it cannot become {self.name}.")
        if self.is_integer:
            if isinstance(value, float) and (not math.isfinite(value) or value != int(value)):
                raise ArgumentError(
                    f"{value!r} is not a whole number, so it is no {self.name}.",
                    hint="Round it, or choose a floating-point dtype.",
                )
            low, high = self._limits()
            if not low <= value <= high:
                raise ArgumentError(
                    f"{value!r} does not fit {self.name} ({low} to {high}).",
                    hint="Choose a wider dtype, or a number that fits.",
                )
            return self._of_numpy(int(value))
        if self.is_float:
            number = float(value)
            with np.errstate(over="ignore"):
                converted = self._of_numpy(number)
            if math.isfinite(number) and abs(number) > self.max:
                raise ArgumentError(
                    f"{value!r} does not fit {self.name} (largest finite value {self.max!r}).",
                    hint="Choose a wider dtype, or a number that fits.",
                )
            return converted
        return self._of_numpy(bool(value))

    def _of_numpy(self, value: float) -> np.generic:
        made: np.generic = self.numpy.type(value)
        return made

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, DType):
            return False  # one instance a dtype
        if isinstance(other, str):
            return _by_name.get(other) is self
        if other is None:
            return False
        return lookup(other) is self

    def __reduce__(self) -> str | tuple[Any, ...]:
        return (as_dtype, (self.name,))


def _make(name: str, kind: Kind, numpy: Any, bits: int = 0) -> DType:
    dtype = np.dtype(numpy)
    return DType(name, kind, bits or dtype.itemsize * 8, dtype)


bool_ = _make("bool", Kind.BOOL, np.bool_)
int8 = _make("int8", Kind.INT, np.int8)
int16 = _make("int16", Kind.INT, np.int16)
int32 = _make("int32", Kind.INT, np.int32)
int64 = _make("int64", Kind.INT, np.int64)
uint8 = _make("uint8", Kind.UINT, np.uint8)
uint16 = _make("uint16", Kind.UINT, np.uint16)
uint32 = _make("uint32", Kind.UINT, np.uint32)
uint64 = _make("uint64", Kind.UINT, np.uint64)
float16 = _make("float16", Kind.FLOAT, np.float16)
bfloat16 = _make("bfloat16", Kind.FLOAT, ml_dtypes.bfloat16)
float32 = _make("float32", Kind.FLOAT, np.float32)
float64 = _make("float64", Kind.FLOAT, np.float64)
# float32 in memory; matrix instructions read its top 19 bits (PTX ISA, "Alternate floating point")
tfloat32 = _make("tfloat32", Kind.FLOAT, np.float32)
float8_e4m3fn = _make("float8_e4m3fn", Kind.FLOAT, ml_dtypes.float8_e4m3fn)
float8_e5m2 = _make("float8_e5m2", Kind.FLOAT, ml_dtypes.float8_e5m2)

ALL: tuple[DType, ...] = (
    bool_, int8, int16, int32, int64, uint8, uint16, uint32, uint64,
    float16, bfloat16, float32, float64, tfloat32, float8_e4m3fn, float8_e5m2,
)  # fmt: skip

ALIASES: dict[str, str] = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "char": "int8",
    "short": "int16",
    "int": "int32",
    "uint": "uint32",
    "long": "int64",
    "float8_e4m3": "float8_e4m3fn",
    "tf32": "tfloat32",
    "bool_": "bool",
    "boolean": "bool",
}
_by_name: dict[str, DType] = {d.name: d for d in ALL}
_by_name.update({alias: _by_name[name] for alias, name in ALIASES.items()})
_by_numpy: dict[np.dtype[Any], DType] = {d.numpy: d for d in ALL if d is not tfloat32}


def lookup(spelling: object) -> DType | None:
    """The dtype a spelling means, or None: a name, NumPy, ml_dtypes, torch or tilejit dtype."""
    if isinstance(spelling, DType):
        return spelling
    if isinstance(spelling, str):
        return _by_name.get(spelling)
    if spelling is bool:
        return bool_
    if spelling is float or spelling is int:
        return None  # their width is not said
    if type(spelling).__module__ == "torch" and type(spelling).__name__ == "dtype":
        return _by_name.get(str(spelling).removeprefix("torch."))
    try:
        return _by_numpy.get(np.dtype(spelling))  # type: ignore[call-overload]
    except TypeError:
        return None


def as_dtype(spelling: object) -> DType:
    """The dtype that `spelling` means.

    Raises:
        DTypeError: nothing in tilejit's table; names close matches.
    """
    dtype = lookup(spelling)
    if dtype is not None:
        return dtype
    if spelling is float or spelling is int:
        wide, narrow = ("float64", "float32") if spelling is float else ("int64", "int32")
        raise DTypeError(
            f"Python's `{spelling.__name__}` does not say how wide the elements are.",
            hint=f'Write "{narrow}" or "{wide}".',
        )
    text = spelling if isinstance(spelling, str) else str(spelling)
    close = difflib.get_close_matches(text, list(_by_name), n=1)
    hint = f'Did you mean "{close[0]}"?' if close else "Known: " + ", ".join(map(str, ALL)) + "."
    raise DTypeError(f"{spelling!r} is not a dtype that tilejit knows.", hint=hint)


def promote(a: DType, b: DType) -> DType:
    """NumPy 2's result type of two dtypes, but an integer with a float gives that float.

    Raises:
        DTypeError: the two have no common type (float16 with bfloat16, two fp8 formats).
    """
    if a is b:
        return a
    if a.is_float != b.is_float:
        return a if a.is_float else b
    if tfloat32 in (a, b):  # float32 whose precision was given up on purpose
        other = b if a is tfloat32 else a
        return float64 if other is float64 else float32
    if a.is_float and b.is_float:
        narrow = {float8_e4m3fn, float8_e5m2}
        if (a in narrow and b in narrow) or {a, b} == {float16, bfloat16}:
            raise DTypeError(
                f"{a} and {b} have no common type.",
                hint="Cast one side, for example `x.astype('float32')`.",
            )
        return a if a.bits > b.bits else b
    common = _by_numpy.get(np.promote_types(a.numpy, b.numpy))
    if common is None or common.is_float:  # NumPy gives float64 for int64 with uint64
        raise DTypeError(
            f"{a} and {b} have no common integer type.",
            hint="Cast one side, for example `x.astype('int64')`.",
        )
    return common
