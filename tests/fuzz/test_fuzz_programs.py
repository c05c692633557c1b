"""Random programs mean the same to everybody: to an oracle of their own, to the reference executor
before and after every pass, and as generated code to the simulator, which also looks for races
and for accesses out of bounds."""

from functools import partial

import chains
import pipelines
import programs
import pytest
from checking import check_some
from held_constants import held_constants
from layouts import laid_out
from roles import in_a_role

# each has instructions that others have not
TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_120a")


@pytest.mark.fuzz(70)
def test_random_elementwise_program_means_the_same_everywhere(seed):
    check_some(programs.elementwise, seed, TARGETS[seed % 4])


@pytest.mark.fuzz(25)
def test_random_tile_program_means_the_same_everywhere(seed):
    check_some(programs.tiles, seed, TARGETS[seed % 4])


@pytest.mark.fuzz(50)
def test_random_reductions_mean_the_same_everywhere(seed):
    check_some(programs.reductions, seed, TARGETS[seed % 4])


@pytest.mark.fuzz(30)
def test_random_matmul_is_as_near_to_the_exact_product_as_its_dtypes_allow(seed):
    check_some(programs.matmul, seed, TARGETS[seed % 4])


@pytest.mark.fuzz(30)
def test_random_tile_program_for_warpgroups_means_the_same_everywhere(seed):
    check_some(partial(programs.tiles, for_groups=True), seed, "sm_90a")


@pytest.mark.fuzz(40)
def test_random_program_means_the_same_to_some_warpgroups_of_a_block(seed):
    make = programs.elementwise if seed % 2 else partial(programs.tiles, for_groups=seed % 4 == 0)

    check_some(of_warpgroups(make), seed, TARGETS[seed % 4] if seed % 4 else "sm_90a")


def of_warpgroups(make):
    """The same for programs that some warpgroups of a block do."""

    def make_role(number):
        tries = (in_a_role(make(number + k * 7919), number) for k in range(50))
        return next(found for found in tries if found is not None)

    return make_role


@pytest.mark.fuzz(20)
def test_random_reductions_mean_the_same_to_some_warpgroups_of_a_block(seed):
    check_some(of_warpgroups(programs.reductions), seed, TARGETS[seed % 4])


@pytest.mark.fuzz(30)
def test_random_matmul_for_warpgroups_is_as_near_to_the_exact_product(seed):
    check_some(partial(programs.matmul, for_groups=True), seed, "sm_90a")


@pytest.mark.fuzz(40)
def test_random_main_loop_for_warpgroups_means_the_same_everywhere(seed):
    check_some(pipelines.pipeline, seed, "sm_90a")


@pytest.mark.fuzz(20)
def test_random_main_loop_in_rows_of_instructions_means_the_same_everywhere(seed):
    check_some(pipelines.in_rows, seed, "sm_90a")


@pytest.mark.fuzz(20)
def test_random_loop_that_blocks_share_means_the_same_everywhere(seed):
    check_some(pipelines.in_parts, seed, "sm_90a")


@pytest.mark.fuzz(40)
def test_random_loop_of_dependent_multiplies_means_the_same_everywhere(seed):
    check_some(chains.chain, seed, "sm_90a")


@pytest.mark.fuzz(40)
def test_random_constants_as_left_operands_mean_the_same_everywhere(seed):
    check_some(held_constants, seed, "sm_90a")


@pytest.mark.fuzz(60)
def test_random_layouts_of_shared_tiles_do_not_change_what_a_program_means(seed):
    for_groups = seed % 2 == 1
    make = (
        pipelines.pipeline,
        partial(programs.matmul, for_groups=for_groups),
        partial(programs.tiles, for_groups=for_groups),
    )[seed % 3]
    target = "sm_90a" if for_groups or seed % 3 == 0 else TARGETS[seed // 2 % 4]
    check_some(lambda number: laid_out(make(number), number), seed, target)
