"""The dtypes under the names that users type, `T.float16` and so on.

A dtype is a value: `T.float16(x)` converts, `alpha: T.float32` annotates a runtime scalar. Type
checkers are told that it is a class, since only classes may stand in annotations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilejit import dtypes
from tilejit.dtypes import DType

if TYPE_CHECKING:

    class _Element(DType):
        """A dtype as a type checker sees it."""

        def __new__(cls, value: Any) -> Any: ...

    bool = _Element
    int8 = _Element
    int16 = _Element
    int32 = _Element
    int64 = _Element
    uint8 = _Element
    uint16 = _Element
    uint32 = _Element
    uint64 = _Element
    float16 = _Element
    bfloat16 = _Element
    float32 = _Element
    float64 = _Element
    tfloat32 = _Element
    float8_e4m3fn = _Element
    float8_e5m2 = _Element
    half = _Element
    float = _Element
    double = _Element
    short = _Element
    int = _Element
    uint = _Element
    long = _Element
    float8_e4m3 = _Element
    tf32 = _Element
else:
    bool = dtypes.bool_
    int8 = dtypes.int8
    int16 = dtypes.int16
    int32 = dtypes.int32
    int64 = dtypes.int64
    uint8 = dtypes.uint8
    uint16 = dtypes.uint16
    uint32 = dtypes.uint32
    uint64 = dtypes.uint64
    float16 = dtypes.float16
    bfloat16 = dtypes.bfloat16
    float32 = dtypes.float32
    float64 = dtypes.float64
    tfloat32 = dtypes.tfloat32
    float8_e4m3fn = dtypes.float8_e4m3fn
    float8_e5m2 = dtypes.float8_e5m2
    half = dtypes.float16
    float = dtypes.float32
    double = dtypes.float64
    short = dtypes.int16
    int = dtypes.int32
    uint = dtypes.uint32
    long = dtypes.int64
    float8_e4m3 = dtypes.float8_e4m3fn
    tf32 = dtypes.tfloat32
