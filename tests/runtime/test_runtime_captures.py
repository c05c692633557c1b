"""What a function reads: by value, by code, by snapshot; the rest is refused."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import math
import sys
import types

import numpy as np
import pytest

import tilejit.dtypes
from tilejit.errors import ArgumentTypeError
from tilejit.runtime.captures import Captures, _is_installed, chains, freeze

SIZE = 4
TABLE = [1, 2]
BOX = types.SimpleNamespace(n=1)
module = types.ModuleType("settings")
module.BLOCK = 64


class Settings:
    BLOCK = 8


def reads_size():
    return SIZE


def reads_table():
    return TABLE[0]


def reads_module():
    return module.BLOCK


def reads_class():
    return Settings.BLOCK


def helper():
    return SIZE


def calls_helper():
    return helper()


def key(function):
    return Captures(function, function.__name__).key()


@pytest.mark.parametrize(
    ("function", "target", "name", "value"),
    [
        (reads_size, "SIZE", None, 5),
        (calls_helper, "SIZE", None, 5),
        (reads_size, "SIZE", None, 4.0),
        (reads_size, "SIZE", None, np.int32(4)),
        (reads_size, "SIZE", None, (1, "a", None)),
        (reads_module, module, "BLOCK", 128),
        (reads_class, Settings, "BLOCK", 16),
    ],
)
def test_key_changes_with_a_value_and_comes_back_with_it(
    monkeypatch, function, target, name, value
):
    captures = Captures(function, "f")
    before = captures.key()
    assert captures.key() == before
    if name is None:
        monkeypatch.setitem(globals(), target, value)
    else:
        monkeypatch.setattr(target, name, value)
    changed = captures.key()
    assert changed != before
    monkeypatch.undo()
    assert captures.key() == before


def test_list_counts_by_its_contents():
    captures = Captures(reads_table, "f")
    before = captures.key()
    TABLE.append(3)
    try:
        assert captures.key() != before
    finally:
        TABLE.pop()
    assert captures.key() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.__setitem__("a", True),  # equal to 1, and another type
        lambda table: table.__setitem__("c", 3),
        lambda table: table.pop("b"),
        lambda table: table.__setitem__("a", table.pop("a")),  # the order counts
        lambda table: table.__setitem__("b", -0.0),
    ],
)
def test_dict_of_numbers_counts_by_its_items_and_their_types(change):
    table = {"a": 1, "b": 0.0}

    def function():
        return table["a"]

    captures = Captures(function, "f")
    before = captures.key()
    table["a"], table["b"] = int("1"), float("0")
    assert captures.key() == before
    change(table)
    assert captures.key() != before


def test_nested_list_in_a_dict_counts_by_its_contents():
    inner = [1]
    outer = {"a": inner}

    def function():
        return outer["a"]

    captures = Captures(function, "f")
    before = captures.key()
    inner.append(2)
    assert captures.key() != before


def test_called_function_counts_by_its_code(monkeypatch):
    captures = Captures(calls_helper, "f")
    before = captures.key()
    monkeypatch.setitem(globals(), "helper", lambda: SIZE + 1)
    assert captures.key() != before


def test_closure_cell_counts_by_value():
    def outer():
        size = 1

        def set_size(n):
            nonlocal size
            size = n

        return (lambda: size), set_size

    function, set_size = outer()
    captures = Captures(function, "f")
    before = captures.key()
    set_size(2)
    assert captures.key() != before


def test_names_read_by_an_inner_function_count():
    def outer():
        def inner():
            return SIZE

        return inner

    assert ("SIZE",) in chains(outer.__code__)


def test_local_names_of_an_outer_function_do_not_count():
    def outer():
        size = 3

        def inner():
            return size

        return inner

    assert chains(outer.__code__) == ()


def test_equal_code_with_equal_values_has_one_key():
    def make(n):
        return lambda: n

    assert key(make(3)) == key(make(3))
    assert key(make(3)) != key(make(4))
    assert key(make(1)) != key(make(True))
    assert key(make(0.0)) != key(make(-0.0))


def test_recursive_function_has_a_key():
    def recurse(n):
        return recurse(n - 1) if n else 0

    assert key(recurse) == key(recurse)


def test_functions_of_libraries_count_by_identity():
    def function():
        return np.prod((1, 2)) + math.ceil(2.5)

    assert key(function) == key(function)


def test_library_installed_beside_its_metadata_counts_by_identity(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text("STATE = object()\ndef f():\n    return STATE\n")
    monkeypatch.syspath_prepend(tmp_path)
    library = importlib.import_module("elsewhere")

    def function():
        return library.f()

    with pytest.raises(ArgumentTypeError):
        key(function)
    _is_installed.cache_clear()
    (tmp_path / "elsewhere-1.0.dist-info").mkdir()
    assert key(function) == key(function)
    del sys.modules["elsewhere"]


def test_mutable_object_is_refused_by_name():
    def function():
        return BOX.n

    with pytest.raises(ArgumentTypeError) as caught:
        Captures(function, "matmul").key()
    assert caught.value.headline == (
        "matmul reads `BOX`, a SimpleNamespace; tilejit cannot tell when it changes."
    )
    assert caught.value.hint.startswith("Pass it as an argument")


def test_array_in_a_global_is_refused():
    weights = np.zeros(3)

    def function():
        return weights

    with pytest.raises(ArgumentTypeError, match=r"^f reads `weights`, an ndarray"):
        Captures(function, "f").key()


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Tile:
    rows: int


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 2),
        (1, 1.0),
        (1, True),
        ("float16", tilejit.dtypes.float16),
        ((1, 2), [1, 2]),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        (Colour.RED, Colour.BLUE),
        (Tile(1), Tile(2)),
        (np.float32(1), np.float64(1)),
        (np.float32, np.float64),
        (slice(1), slice(2)),
        (lambda x: x, lambda x: x + 1),
        (float("nan"), 0.0),
    ],
)
def test_constants_that_differ_have_different_keys(a, b):
    assert freeze(a, "f", "c") == freeze(a, "f", "c")
    assert freeze(a, "f", "c") != freeze(b, "f", "c")
    hash(freeze(a, "f", "c"))


def test_constant_that_can_change_unseen_is_refused():
    with pytest.raises(ArgumentTypeError) as caught:
        freeze(BOX, "f", "box")
    assert caught.value.headline == (
        "f: box is a SimpleNamespace, which cannot be a compile-time constant."
    )
