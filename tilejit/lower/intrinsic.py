"""Numba's view of a granule: a function that types by slots and lowers by running the emitter.

Knows Numba types and how a call is lowered. Does not know tile ops, nor how a kernel is compiled.
A granule is no registered `@intrinsic`: those stay in Numba's global registries for ever. It is
typed and lowered by the contexts of `front_end`, and goes away with its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.datamodel import PrimitiveModel
from numba.cuda.models import register_model
from numba.cuda.typing.templates import AbstractTemplate, signature

from tilejit.errors import InternalError, TileError
from tilejit.isa.machine import Granule, Slot
from tilejit.lower.llvm_machine import LLVMMachine
from tilejit.target import Target

_SCALARS = {
    "bool": types.boolean,
    "int8": types.int8, "int16": types.int16, "int32": types.int32, "int64": types.int64,
    "uint8": types.uint8, "uint16": types.uint16, "uint32": types.uint32, "uint64": types.uint64,
    "float16": types.uint16, "bfloat16": types.uint16,
    "float32": types.float32, "tfloat32": types.float32, "float64": types.float64,
    "float8_e4m3fn": types.uint8, "float8_e5m2": types.uint8,
}  # fmt: skip
_ADDRESS = types.CPointer(types.uint8)

TENSOR_MAP_BYTES = 128  # CUDA Driver API, CUtensorMap
TENSOR_MAP_ALIGN = 64


class _TensorMapType(types.Type):  # type: ignore[misc]
    """A tensor map among a kernel's parameters: the value is its address."""

    def __init__(self) -> None:
        super().__init__(name="tensor_map")


_TENSOR_MAP = _TensorMapType()


@register_model(_TensorMapType)
class _TensorMapModel(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        pointer = ir.ArrayType(ir.IntType(8), TENSOR_MAP_BYTES).as_pointer()
        super().__init__(manager, kind, pointer)


def numba_type(slot: Slot) -> Any:
    """The Numba type of a value: narrow floats are integers, addresses raw pointers."""
    if slot.tensor_map:
        return _TENSOR_MAP
    if slot.address:
        return _ADDRESS
    scalar = _SCALARS[slot.dtype.name]
    return scalar if slot.count is None else types.UniTuple(scalar, slot.count)


class GranuleCall:
    """What a granule's name means in the generated source."""

    def __init__(
        self,
        granule: Granule,
        target: Target,
        fast_math: bool,
        threads: tuple[int, int, int],
    ) -> None:
        self.granule = granule
        self.target = target
        self.fast_math = fast_math
        self.threads = threads
        outputs = [numba_type(slot) for slot in granule.outputs]
        if not outputs:
            result = types.none
        else:
            result = outputs[0] if len(outputs) == 1 else types.Tuple(outputs)
        self.result = result
        self.signature = signature(result, *(numba_type(slot) for slot in granule.inputs))
        self.function_type = types.Function(_template(self))

    def __repr__(self) -> str:
        return f"granule {self.granule.name}"

    def lower(self, context: Any, builder: Any, arguments: Sequence[Any]) -> Any:
        """Emit the granule's code at the builder and return its value as Numba has it."""
        machine = LLVMMachine(builder, self.target, self.fast_math, self.threads)
        inputs = [
            _unpack(builder, argument, slot)
            for argument, slot in zip(arguments, self.granule.inputs, strict=True)
        ]
        outputs = self._emit(machine, inputs)
        slots = self.granule.outputs
        values = [
            _pack(machine, context, value, slot) for value, slot in zip(outputs, slots, strict=True)
        ]
        if not values:
            return context.get_dummy_value()
        if len(values) == 1:
            return values[0]
        return context.make_tuple(builder, self.result, values)

    def _emit(self, machine: LLVMMachine, inputs: list[Any]) -> list[Any]:
        granule = self.granule
        try:
            outputs = granule.emit(machine, inputs)
            assert len(outputs) == len(granule.outputs), (
                f"it returned {len(outputs)} values and declares {len(granule.outputs)}"
            )
        except TileError:
            raise
        except Exception as error:
            raise InternalError(
                f"The code of `{granule.name}` could not be generated.",
                span=granule.span,
                notes=[f"{type(error).__name__}: {error}"],
                hint="This is a defect of tilejit; please report it with this text.",
            ) from error
        return outputs


def _template(call: GranuleCall) -> Any:
    class GranuleTemplate(AbstractTemplate):  # type: ignore[misc]
        key = call

        def generic(self, args: Any, kws: Any) -> Any:
            wanted = call.signature.args
            if kws or len(args) != len(wanted):
                return None
            for given, want in zip(args, wanted, strict=True):
                if self.context.can_convert(given, want) is None:
                    return None
            return call.signature

        def get_impl_key(self, _: Any) -> Any:
            return call

    return GranuleTemplate


def _unpack(builder: Any, argument: Any, slot: Slot) -> Any:
    if slot.tensor_map:
        return builder.ptrtoint(argument, ir.IntType(64))
    if slot.count is None:
        return argument
    return [builder.extract_value(argument, i) for i in range(slot.count)]


def _pack(machine: LLVMMachine, context: Any, value: Any, slot: Slot) -> Any:
    kind = context.get_value_type(numba_type(slot))
    builder = machine.builder
    if slot.count is None:
        return _convert(builder, machine.value(value), kind)
    assert len(value) == slot.count, f"{len(value)} values for a tuple of {slot.count}"
    result = ir.Constant(kind, ir.Undefined)
    for index, element in enumerate(machine.values(value)):
        converted = _convert(builder, element, kind.element)
        result = builder.insert_value(result, converted, index)
    return result


def _convert(builder: Any, value: Any, kind: Any) -> Any:
    """Pointers and 64-bit addresses are one thing to the machine, but two types to LLVM."""
    if value.type == kind:
        return value
    if isinstance(kind, ir.PointerType):
        return builder.inttoptr(value, kind)
    if isinstance(value.type, ir.PointerType):
        return builder.ptrtoint(value, kind)
    return builder.bitcast(value, kind)


def make_intrinsic(
    granule: Granule, target: Target, fast_math: bool, threads: tuple[int, int, int]
) -> GranuleCall:
    """The callable that stands for `granule` in the globals of the generated source."""
    return GranuleCall(granule, target, fast_math, threads)
