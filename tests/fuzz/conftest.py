"""Gives every fuzz test its seeds: few by default, `--fuzz=N` times as many on request."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode alone does not find siblings


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.fuzz(n)` on a test with an argument `seed`: n programs, or n times --fuzz."""
    marker = metafunc.definition.get_closest_marker("fuzz")
    if marker is not None:
        count = round(marker.args[0] * metafunc.config.getoption("--fuzz"))
        metafunc.parametrize("seed", range(count))
