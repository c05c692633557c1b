"""Functions whose blocks are nested deeper than Python allows once they are rewritten."""

from __future__ import annotations

import importlib.util

import pytest

import tilejit.language as T
from tilejit.errors import TraceError

SOURCE = """
import tilejit.language as T
from tilejit import tilejit


@tilejit
def chosen(X: T.Tensor, Y: T.Tensor, *, op="c3"):
    with T.Kernel(1, threads=32):
        for i in T.Parallel(32):
            y = X[i]
            if op == "c0":
                y = -y
"""


def made(tmp_path, word, count):
    """A function with so many cases of a compile-time choice."""
    path = tmp_path / f"cases_{word}_{count}.py"
    cases = (
        f"            {word} op == 'c{n}':\n                y = y + {n}\n" for n in range(1, count)
    )
    path.write_text(SOURCE + "".join(cases) + "            Y[i] = y\n")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.chosen


def test_long_chains_of_elif_say_what_to_write(tmp_path):
    specs = T.Tensor((32,), "float32"), T.Tensor((32,), "float32")
    made(tmp_path, "elif", 8).compile(*specs, target="sm_80")
    made(tmp_path, "if", 40).compile(*specs, target="sm_80")
    words = r"^`chosen` cannot be traced: too many statically nested blocks\."
    with pytest.raises(TraceError, match=words) as caught:
        made(tmp_path, "elif", 40).compile(*specs, target="sm_80")
    assert "write an `if` for each case" in str(caught.value)
    assert "elif op ==" in str(caught.value)
