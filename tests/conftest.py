"""Where the kernels of the tests run: on every executor that this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tilejit import config
from tilejit.runtime.device import has_gpu, use_executor

# Numba reads the variable when it is imported, and is then without its compiler. Here it means
# that no test runs on a GPU; a kernel simulates as well in a process that has the compiler.
SIMULATES = config.from_environment(os.environ).simulate
os.environ.pop("NUMBA_ENABLE_CUDASIM", None)

HAS_GPU = has_gpu() and not SIMULATES
EXECUTORS = ("reference", "simulator", "gpu") if HAS_GPU else ("reference", "simulator")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=float, default=1.0, metavar="N", help="N times as many random programs"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fuzz(n): runs n random programs, n times --fuzz")
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each: the NumPy reference, Numba's CUDA simulator, the GPU."""
    with use_executor(request.param):
        yield request.param


@pytest.fixture(autouse=SIMULATES)
def simulated() -> Iterator[None]:
    """With NUMBA_ENABLE_CUDASIM=1, calls of tests that choose no executor simulate."""
    with use_executor("simulator"):
        yield


@pytest.fixture
def reference() -> Iterator[None]:
    """Calls run on the NumPy reference executor, whatever the machine has."""
    with use_executor("reference"):
        yield
