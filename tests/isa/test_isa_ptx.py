"""Every record's text is accepted by the assembler of every target that it claims."""

from __future__ import annotations

import re

import pytest
from cuda.bindings import nvjitlink

from tilejit.target import TARGETS


def assemble(text: str, architecture: str) -> bytes:
    handle = nvjitlink.create(1, [f"-arch={architecture}"])
    try:
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, text.encode(), len(text), "isa")
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise AssertionError(log.decode()) from error
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        return bytes(cubin)
    finally:
        nvjitlink.destroy(handle)


@pytest.mark.parametrize("name", TARGETS)
def test_every_instruction_of_a_target_assembles(name, instructions, write_module):
    target = TARGETS[name]
    legal = [one for one in instructions if target.has(*one.needs)]
    assert len(legal) > 50
    assert len(assemble(write_module(target, legal), name)) > 1000


def test_an_instruction_a_target_lacks_is_refused_by_its_assembler(instructions, write_module):
    lacking = [one for one in instructions if not TARGETS["sm_80"].has(*one.needs)]
    assert len(lacking) > 100
    for one in {one.needs: one for one in lacking}.values():
        with pytest.raises(AssertionError, match=r"\.target"):
            assemble(write_module(TARGETS["sm_80"], [one]), "sm_80")


def test_a_record_names_each_of_its_registers_once_and_no_other(instruction):
    """Of tied registers the text names all outputs or none, and no inputs."""
    outputs, inputs = (
        sorted({int(i) for i in re.findall(rf"\${letter}(\d+)", instruction.ptx)})
        for letter in "da"
    )
    assert outputs == list(range(len(instruction.outputs))) or (
        not outputs and instruction.tied == len(instruction.outputs)
    )
    assert inputs == list(range(instruction.tied, len(instruction.inputs)))


def test_tied_registers_have_one_dtype(instruction):
    tied = instruction.tied
    assert instruction.inputs[:tied] == instruction.outputs[:tied]


def test_a_record_without_outputs_has_an_effect(instruction):
    assert instruction.has_effect or instruction.outputs
    assert repr(instruction) == instruction.name
