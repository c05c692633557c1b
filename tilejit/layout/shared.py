"""How a shared buffer's elements are laid out in bytes: rows, panels and XOR swizzles.

Pure index maths. Does not know machines, instructions or when a swizzle is worth it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SharedLayout:
    """Byte layout of a shared buffer of `shape` elements of `itemsize` bytes.

    The last two dimensions form a tile; leading dimensions count whole tiles. A tile is cut into
    panels of `panel` elements along the last dimension, panels one after the other, each stored
    row by row with `pitch` elements a row. Within a panel the 16-byte chunk number is XORed with
    the row number modulo `swizzle` (1, 2, 4 or 8), as the hardware's 32-, 64- and 128-byte
    swizzles do for rows of 32, 64 and 128 bytes (PTX ISA, "Swizzling modes").

    halved: of every four rows the first two are stored in the first half of the tile, the others in
        the second: a product with such columns is held by fours of a lane (`isa.wgmma.tile_acc`).
    tile_align: bytes that a whole tile's size is rounded up to a multiple of.
    strides: explicit strides in elements instead of all this (views given by the user).
    """

    shape: tuple[int, ...]
    itemsize: int
    panel: int = 0
    pitch: int = 0
    swizzle: int = 1
    strides: tuple[int, ...] | None = None
    tile_align: int = 1
    halved: bool = False

    def __post_init__(self) -> None:
        if not self.panel:
            object.__setattr__(self, "panel", self.columns)
        if not self.pitch:
            object.__setattr__(self, "pitch", self.panel)
        assert self.strides is None or len(self.strides) == len(self.shape)
        assert self.columns % self.panel == 0, f"panel {self.panel} of {self.columns}"
        assert self.pitch >= self.panel, f"pitch {self.pitch} is below panel {self.panel}"
        assert self.swizzle in (1, 2, 4, 8), f"swizzle {self.swizzle}"
        assert not self.halved or (self.strides is None and self.rows % 4 == 0)
        assert self.swizzle == 1 or (
            self.panel * self.itemsize % (16 * self.swizzle) == 0 and self.pitch == self.panel
        ), f"a row of {self.panel} elements is no multiple of swizzle {self.swizzle}"

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def xor_shift(self) -> int:
        """Rows that share one XOR value: the swizzle repeats every `swizzle << xor_shift` rows.

        With rows shorter than 128 bytes several rows fill one line of all banks, and the
        hardware's pattern XORs with the number of that 128-byte line.
        """
        row_bytes = self.pitch * self.itemsize
        return max(0, (128 // row_bytes).bit_length() - 1) if row_bytes < 128 else 0

    @property
    def tile_elements(self) -> int:
        """Elements from one tile (last two dimensions) to the next."""
        bytes_ = self.rows * self.pitch * (self.columns // self.panel) * self.itemsize
        return -(-bytes_ // self.tile_align) * self.tile_align // self.itemsize

    @property
    def bytes(self) -> int:
        if self.strides is not None:
            span = sum((e - 1) * s for e, s in zip(self.shape, self.strides, strict=True)) + 1
            return span * self.itemsize
        return math.prod(self.shape[:-2]) * self.tile_elements * self.itemsize

    @property
    def is_linear(self) -> bool:
        """True when the offset is a plain sum of index times stride."""
        is_plain = self.swizzle == 1 and self.panel == self.columns and not self.halved
        return self.strides is not None or is_plain

    @property
    def has_wide_rows(self) -> bool:
        """True when every 16 bytes of a row start at a multiple of 16."""
        if self.strides is None:
            return self.pitch * self.itemsize % 16 == 0
        *outer, last = self.strides
        return last == 1 and all(s * self.itemsize % 16 == 0 for s in outer)

    @property
    def linear_strides(self) -> tuple[int, ...]:
        """Strides in elements of a linear layout."""
        assert self.is_linear
        if self.strides is not None:
            return self.strides
        strides = [1, self.pitch][: len(self.shape)]
        step = self.tile_elements
        for extent in reversed(self.shape[:-2]):
            strides.append(step)
            step *= extent
        return tuple(reversed(strides))

    def stored_row(self, row: Any) -> Any:
        """Where in its tile a row is stored, counted in rows; an int or an array of them."""
        if not self.halved:
            return row
        return row // 4 * 2 + row % 2 + row % 4 // 2 * (self.rows // 2)

    def offset(self, index: tuple[Any, ...]) -> Any:
        """Byte offset of an element; `index` holds ints or integer arrays."""
        if self.is_linear:
            strides = self.linear_strides
            return sum(i * s for i, s in zip(index, strides, strict=True)) * self.itemsize
        row = self.stored_row(index[-2]) if len(index) > 1 else 0
        column = index[-1]
        lead: Any = 0
        for i, extent in zip(index[:-2], self.shape[:-2], strict=True):
            lead = lead * extent + i
        within = column % self.panel * self.itemsize
        within = within ^ ((row >> self.xor_shift) % self.swizzle * 16)
        elements = lead * self.tile_elements + column // self.panel * (self.rows * self.pitch)
        return (elements + row * self.pitch) * self.itemsize + within

    def table(self) -> np.ndarray[Any, Any]:
        """Byte offsets of all elements, for tests and pictures."""
        return np.asarray(self.offset(tuple(np.indices(self.shape))))

    def __str__(self) -> str:
        if self.strides is not None:
            return f"strides {self.strides}"
        parts = ["rows"]
        if self.panel != self.columns:
            parts.append(f"panels of {self.panel}")
        if self.pitch != self.panel:
            parts.append(f"pitch {self.pitch}")
        if self.halved:
            parts.append("two of four in each half")
        if self.swizzle > 1:
            parts.append(f"{16 * self.swizzle}-byte swizzle")
        return ", ".join(parts)
