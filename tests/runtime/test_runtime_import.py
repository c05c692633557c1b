"""What importing the package brings in, and what it does not."""

from __future__ import annotations

import subprocess
import sys

import tilejit


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_no_compiler_and_no_framework():
    code = (
        "import sys, tilejit, tilejit.language as T; from tilejit import tilejit as t\n"
        "print([m for m in ('numba', 'llvmlite', 'torch', 'cupy', 'cuda') if m in sys.modules])"
    )
    assert run(code) == "[]\n"


def test_simulator_variable_makes_calls_simulate():
    code = (
        "import os; os.environ['NUMBA_ENABLE_CUDASIM'] = '1'\n"
        "from tilejit.runtime.device import executor; print(executor())"
    )
    assert run(code) == "simulator\n"


def test_every_public_name_exists():
    for name in tilejit.__all__:
        assert getattr(tilejit, name) is not None
    assert set(tilejit.__all__) <= set(dir(tilejit))


def test_decorator_is_imported_under_its_own_name():
    from tilejit import tilejit as decorator

    assert decorator is tilejit.tilejit
    assert callable(decorator)
