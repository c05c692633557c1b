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


def test_arrays_of_numbas_simulator_are_taken_and_made():
    code = (
        "import os; os.environ['NUMBA_ENABLE_CUDASIM'] = '1'\n"
        "import sys, tempfile, textwrap, importlib.util\n"
        "text = textwrap.dedent('''\n"
        "    import numpy as np\n"
        "    from numba import cuda\n"
        "    from tilejit import tilejit\n"
        "    import tilejit.language as T\n"
        "    @tilejit\n"
        "    def plus(A: T.Tensor):\n"
        "        C = T.empty(A.shape, A.dtype)\n"
        "        with T.Kernel(1, threads=32):\n"
        "            for i in T.Parallel(32):\n"
        "                C[i] = A[i] + 1\n"
        "        return C\n"
        "    result = plus(cuda.to_device(np.arange(32, dtype=np.float32)))\n"
        "    print(result.copy_to_host().sum())\n"
        "''')\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    path = os.path.join(folder, 'program.py')\n"
        "    open(path, 'w').write(text)\n"
        "    spec = importlib.util.spec_from_file_location('program', path)\n"
        "    spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
    )
    assert run(code) == "528.0\n"


def test_every_public_name_exists():
    for name in tilejit.__all__:
        assert getattr(tilejit, name) is not None
    assert set(tilejit.__all__) <= set(dir(tilejit))


def test_decorator_is_imported_under_its_own_name():
    from tilejit import tilejit as decorator

    assert decorator is tilejit.tilejit
    assert callable(decorator)
