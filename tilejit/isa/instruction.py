"""One machine instruction: its PTX text, its registers, what it needs, and its meaning in NumPy.

The record only; the instructions themselves stand one family a file beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilejit.dtypes import DType
from tilejit.target import Feature

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Instruction:
    """A PTX instruction, or a few that only make sense together.

    ptx: text with `$d0 $d1 ...` for outputs and `$a0 $a1 ...` for inputs. A literal `$` or a
        label does not occur; a label that is needed is written `${uid}`-suffixed.
    outputs, inputs: dtypes of the registers. bool is not allowed; narrower than 32 bits only
        int16, uint16.
    immediates: inputs (by number) that must be compile-time constants in the text.
    tied: the first `tied` outputs are the registers of the first `tied` inputs, updated in
        place. The text names them as outputs; the other inputs keep their numbers.
    needs: target features, all of them.
    meaning: (lanes, input arrays) -> output arrays, one element a lane. `lanes` is a
        `machine.LaneContext`.
    has_effect: touches memory or synchronises, so it may be neither dropped, repeated nor moved.
    """

    name: str
    ptx: str
    outputs: tuple[DType, ...] = ()
    inputs: tuple[DType, ...] = ()
    immediates: frozenset[int] = frozenset()
    tied: int = 0
    needs: frozenset[Feature] = frozenset()
    meaning: Callable[[Any, Sequence[Array]], Sequence[Array]]
    has_effect: bool = True

    def __repr__(self) -> str:
        return self.name
