"""Random programs compile for every target: no compiler refuses them, and registers suffice."""

import re
from functools import partial

import chains
import pipelines
import programs
import pytest
from checking import compile_some
from held_constants import held_constants
from unwritten import unwritten

from tilejit.errors import UnsupportedError
from tilejit.target import TARGETS

# what the math library computes with an array of its own (argument reduction of large angles)
WITH_STACK = ("T.sin(", "T.cos(")


@pytest.mark.fuzz(14)
def test_random_program_compiles_without_spills(seed):
    make = programs.tiles if seed % 3 == 2 else programs.elementwise
    program, kernel, _ = compile_some(make, seed, list(TARGETS)[seed % len(TARGETS)])
    used = kernel.resources
    assert used.spill_bytes == 0
    assert used.stack_bytes == 0 or any(name in program.source for name in WITH_STACK)


@pytest.mark.fuzz(7)
def test_random_reductions_compile_without_spills(seed):
    program, kernel, _ = compile_some(programs.reductions, seed, list(TARGETS)[seed % len(TARGETS)])
    used = kernel.resources
    assert used.spill_bytes == 0
    assert used.stack_bytes == 0 or any(name in program.source for name in WITH_STACK)


@pytest.mark.fuzz(2)
@pytest.mark.parametrize("target", TARGETS)
def test_random_matmul_compiles_without_spills(seed, target):
    _, kernel, _ = compile_some(programs.matmul, seed, target)
    assert (kernel.resources.spill_bytes, kernel.resources.stack_bytes) == (0, 0)


@pytest.mark.fuzz(12)
def test_random_program_for_warpgroups_compiles_without_spills(seed):
    """Where TMA brings the operands; byte by byte, through registers, they may take too many."""
    make = (pipelines.pipeline, partial(programs.matmul, for_groups=True),
            partial(programs.tiles, for_groups=True))[seed % 3]  # fmt: skip
    _, kernel, _ = compile_some(make, seed, "sm_90a")
    resources, log = kernel.resources, kernel.kernels[0].compiled.log
    if re.search(r"fills \d+ slot", kernel.explain()):
        assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)
        assert not re.search(r"\bC7\d\d\d\b", log), log


@pytest.mark.fuzz(25)
def test_random_constants_are_in_registers_before_they_are_multiplied(seed):
    """ptxas moves constants behind multiplies that take them, unless it does not know them."""
    for make in (held_constants, chains.chain):
        _, kernel, _ = compile_some(make, seed, "sm_90a")
        try:
            sass = kernel.sass
        except UnsupportedError:
            pytest.skip("nvdisasm is not installed")
        assert not unwritten(sass)
