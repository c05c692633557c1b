"""Where the kernels of the tests run: on every executor that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tilejit.runtime.device import has_gpu, use_executor

EXECUTORS = ("reference", "simulator", "gpu") if has_gpu() else ("reference", "simulator")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=float, default=1.0, metavar="N", help="N times as many random programs"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fuzz(n): runs n random programs, n times --fuzz")
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each: the NumPy reference, Numba's CUDA simulator, the GPU."""
    with use_executor(request.param):
        yield request.param


@pytest.fixture
def reference() -> Iterator[None]:
    """Calls run on the NumPy reference executor, whatever the machine has."""
    with use_executor("reference"):
        yield
