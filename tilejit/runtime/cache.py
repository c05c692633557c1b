"""The memory cache: one value a key, made once, also when threads ask together.

Knows locks. Does not know what keys or values are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class SignatureCache(Generic[V]):
    """A dictionary whose missing values are built by whoever asks first; the others wait.

    A build that raises leaves no entry: each waiting thread then tries by itself.
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, V] = {}
        self._building: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self.find: Callable[[Hashable], V | None] = self._values.get

    def __len__(self) -> int:
        return len(self._values)

    def find_or_build(self, key: Hashable, build: Callable[[], V]) -> V:
        """The value of `key`, from `build()` if there is none yet."""
        value = self._values.get(key)
        if value is not None:
            return value
        with self._lock:
            gate = self._building.setdefault(key, threading.Lock())
        with gate:
            value = self._values.get(key)
            if value is None:
                value = build()
                self._values[key] = value
        with self._lock:
            if self._building.get(key) is gate and key in self._values:
                del self._building[key]
        return value
