"""Buffer and tensor proxies: `T.Tensor`, `T.SharedBuffer` and their kin, pointers and views.

A proxy is called, or subscripted, with a shape and a dtype. In a signature, and wherever no kernel
is being traced, that is a description of an argument; inside a kernel it makes memory or a view.
Knows which spelling means which. Does not know how buffers are made of them (`storage`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilejit.dtypes import DType
from tilejit.errors import ArgumentTypeError, TraceError
from tilejit.ir.buffer import Scope
from tilejit.language.extents import as_element_type, as_scope, is_extent
from tilejit.language.handle import BufferHandle
from tilejit.language.storage import Request, make_global, make_spec, make_tile
from tilejit.language.where import is_in_kernel, traced_function

_TENSOR_SCOPES = (Scope.GLOBAL, Scope.SHARED, Scope.FRAGMENT, Scope.LOCAL)


def _make(request: Request) -> BufferHandle:
    if request.scope is Scope.GLOBAL:
        if request.data is not None:
            traced_function(f"{request.what} with `data`")
            return make_global(request)
        if is_in_kernel():
            raise TraceError(
                f"{request.what} makes no memory, and it stands inside a kernel.",
                hint="Allocate with T.alloc_shared, T.alloc_fragment or T.alloc_local; for memory "
                "behind a pointer write T.make_tensor(pointer, shape, dtype).",
            )
        return make_spec(request)
    if request.data is None and not is_in_kernel():
        return make_spec(request)
    if request.data is not None and not is_in_kernel():
        raise TraceError(
            f"{request.what} with `data` is only allowed inside a kernel.",
            hint="Write it in the body of `with T.Kernel(...)`.",
        )
    return make_tile(request)


def _split_keys(keys: Any) -> tuple[Any, ...]:
    """Positional arguments for the call that `proxy[keys]` stands for.

    Leading integers and symbols are one shape; all else is passed on as it stands.
    """
    if not isinstance(keys, tuple):
        return (keys,)
    if not keys or is_extent(keys[0]):
        length = 0
        while length < len(keys) and is_extent(keys[length]):
            length += 1
        return (keys[:length], *keys[length:])
    return keys


class _Proxy:
    """What all proxies share: `from_ptr`, and `isinstance(x, proxy)`."""

    _name = "T.Tensor"
    default_scope = "global"

    def __instancecheck__(self, instance: object) -> bool:
        """True for buffers of this proxy's scope."""
        return isinstance(instance, BufferHandle) and instance.scope == self.default_scope

    def __repr__(self) -> str:
        return self._name

    def from_ptr(
        self, pointer_var: Any, shape: Any, dtype: Any = "float32", strides: Any = None
    ) -> BufferHandle:
        """A buffer on memory that something else owns.

        Args:
            pointer_var: a parameter annotated with `T.ptr`, an int64 value (`table[g]` of a
                tensor of dtype `T.ptr`), or a buffer of this proxy's scope, to view its memory.
            shape: extents in elements; accesses outside are guarded as for any tensor.
            dtype: of the elements.
            strides: in elements; compact if None.

        Raises:
            TraceError: no function is being traced.
            ArgumentTypeError: not a pointer.
        """
        what = f"{self._name}.from_ptr"
        scope = as_scope(self.default_scope, what)
        if not isinstance(pointer_var, BufferHandle):
            traced_function(what)
            if scope is not Scope.GLOBAL:
                raise ArgumentTypeError(
                    f'{what}: an address is one of global memory, not of "{scope}".',
                    hint="Use T.make_tensor for addresses, or pass a buffer to view.",
                )
        if pointer_var is None:
            raise ArgumentTypeError(f"{what}: the pointer is None.")
        request = Request(what, shape, dtype, scope, strides=strides, data=pointer_var)
        return _make(request)


class BufferProxy(_Proxy):
    """`T.Buffer`: every field of a buffer can be said; the scope is an argument."""

    _name = "T.Buffer"

    def __call__(
        self,
        shape: Any,
        dtype: Any = "float32",
        data: Any = None,
        strides: Any = None,
        elem_offset: Any = None,
        scope: Any = "global",
        align: Any = 0,
        offset_factor: Any = 0,
        buffer_type: Any = "",
        axis_separators: Any = None,
    ) -> BufferHandle:
        """See `BaseTensorProxy.__call__`."""
        what = self._name
        place = as_scope(scope, what, _TENSOR_SCOPES)
        request = Request(
            what, shape, dtype, place, strides, data, elem_offset, align, offset_factor,
            buffer_type, axis_separators,
        )  # fmt: skip
        return _make(request)

    def __getitem__(self, keys: Any) -> BufferHandle:
        return self(*_split_keys(keys))


class BaseTensorProxy(_Proxy):
    """Base of the proxies: a subclass sets the defaults of scope, alignment and offset factor."""

    default_scope = "global"
    default_align = 0
    default_offset_factor = 0

    def __call__(
        self,
        shape: Any,
        dtype: Any = "float32",
        data: Any = None,
        strides: Any = None,
        elem_offset: Any = None,
        scope: Any = None,
        align: Any = None,
        offset_factor: Any = None,
        buffer_type: Any = "",
        axis_separators: Any = None,
    ) -> BufferHandle:
        """A buffer: a description in a signature; memory, or with `data` a view, in a kernel.

        Args:
            shape: extents in elements: an integer, or a sequence of integers, symbols and
                expressions of symbols. Constants where it allocates.
            dtype: a name, or a tilejit, NumPy, ml_dtypes or torch dtype; `T.ptr` is int64.
            data: a buffer whose memory this one is a view of; for global memory also an address.
            strides: in elements, one an extent; row-major and compact if None.
            elem_offset: elements from `data` to the first one.
            scope: "global", "shared.dyn", "shared", "local", "local.fragment".
            align: bytes, a power of two: promised for a tensor's address (16 if not given),
                required of an allocation.
            offset_factor: promises that it divides `elem_offset`.
            buffer_type: "auto_broadcast" lets extents of 1 repeat.
            axis_separators: must be empty; memory is flat.

        Raises:
            ShapeError: negative extents, extents of an allocation that are 0 or not constant,
                another number of strides than extents.
            DTypeError: an unknown dtype.
            ArgumentError, ArgumentTypeError: any other argument.
        """
        what = self._name
        place = as_scope(scope or self.default_scope, what, _TENSOR_SCOPES)
        request = Request(
            what, shape, dtype, place, strides, data, elem_offset, align or self.default_align,
            offset_factor or self.default_offset_factor, buffer_type, axis_separators,
        )  # fmt: skip
        return _make(request)

    def __getitem__(self, keys: Any) -> BufferHandle:
        return self(*_split_keys(keys))


class TensorProxy(BaseTensorProxy):
    """`T.Tensor`: a contiguous tensor in global memory. Alone, as an annotation: any array."""

    def __call__(  # type: ignore[override]
        self,
        shape: Any,
        dtype: Any = "float32",
        data: Any = None,
        scope: Any = None,
        *,
        align: Any = None,
        strides: Any = None,
    ) -> BufferHandle:
        """A contiguous tensor; the arguments are those of `BaseTensorProxy.__call__`.

        Raises:
            ArgumentTypeError: strides are given.
        """
        if strides is not None:
            raise ArgumentTypeError(
                "T.Tensor is contiguous and takes no strides.",
                hint="Write T.StridedTensor(shape, strides, dtype).",
            )
        return super().__call__(shape, dtype, data, scope=scope, align=align)


class StridedTensorProxy(BaseTensorProxy):
    """`T.StridedTensor`: a tensor in global memory with strides, in elements, of its own."""

    _name = "T.StridedTensor"

    def __call__(  # type: ignore[override]
        self,
        shape: Any,
        strides: Any = None,
        dtype: Any = "float32",
        scope: Any = None,
        *,
        data: Any = None,
        align: Any = None,
    ) -> BufferHandle:
        """A strided tensor; the arguments are those of `BaseTensorProxy.__call__`.

        Raises:
            ArgumentTypeError: no strides.
        """
        if strides is None:
            raise ArgumentTypeError(
                "T.StridedTensor needs strides.",
                hint="Write T.StridedTensor(shape, strides, dtype), the strides in elements.",
            )
        return super().__call__(shape, dtype, data, strides, scope=scope, align=align)

    def __getitem__(self, keys: Any) -> BufferHandle:
        return self(*keys) if isinstance(keys, tuple) else self(keys)


class FragmentBufferProxy(BaseTensorProxy):
    """`T.FragmentBuffer`: a tile spread over the registers of the block's threads."""

    _name = "T.FragmentBuffer"
    default_scope = "local.fragment"


class SharedBufferProxy(BaseTensorProxy):
    """`T.SharedBuffer`: a tile in the block's shared memory."""

    _name = "T.SharedBuffer"
    default_scope = "shared.dyn"


class LocalBufferProxy(BaseTensorProxy):
    """`T.LocalBuffer`: an array of each thread's own."""

    _name = "T.LocalBuffer"
    default_scope = "local"


class _BaseTensorType(type):
    """Makes `isinstance(x, BaseTensor)` true of every buffer."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, BufferHandle)


class BaseTensor(metaclass=_BaseTensorType):
    """What type checkers know of a buffer; at run time its constructor is that of the proxies.

    `BaseTensor(shape, dtype)`, `BaseTensor[shape, dtype]` and `BaseTensor.from_ptr(...)` do what
    `BaseTensorProxy` does, and `isinstance(x, BaseTensor)` holds for every buffer.
    """

    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: DType
    scope: str
    name: str

    if TYPE_CHECKING:

        def __init__(
            self,
            shape: Any,
            dtype: Any = "float32",
            data: Any = None,
            strides: Any = None,
            elem_offset: Any = None,
            scope: Any = None,
            align: Any = None,
            offset_factor: Any = None,
            buffer_type: Any = "",
            axis_separators: Any = None,
        ) -> None: ...

        def __class_getitem__(cls, key: Any) -> Any: ...

        def __getitem__(self, key: Any) -> Any: ...

        def __setitem__(self, key: Any, value: Any) -> None: ...

        @classmethod
        def from_ptr(
            cls, pointer_var: Any, shape: Any, dtype: Any = "float32", strides: Any = None
        ) -> Any: ...

    else:

        def __new__(cls, *args, **kwargs):
            return _base(*args, **kwargs)

        def __class_getitem__(cls, key):
            return _base[key]

        @classmethod
        def from_ptr(cls, pointer_var, shape, dtype="float32", strides=None):
            return _base.from_ptr(pointer_var, shape, dtype, strides)


_base = BaseTensorProxy()
Buffer = BufferProxy()

if TYPE_CHECKING:

    class Tensor(BaseTensor):
        """A contiguous tensor in global memory."""

        def __init__(
            self,
            shape: Any,
            dtype: Any = "float32",
            data: Any = None,
            scope: Any = None,
            *,
            align: Any = None,
        ) -> None: ...

    class StridedTensor(BaseTensor):
        """A tensor in global memory with strides of its own."""

        def __init__(
            self,
            shape: Any,
            strides: Any,
            dtype: Any = "float32",
            scope: Any = None,
            *,
            data: Any = None,
            align: Any = None,
        ) -> None: ...

    class FragmentBuffer(BaseTensor):
        """A tile in the registers of the block's threads."""

    class SharedBuffer(BaseTensor):
        """A tile in shared memory."""

    class LocalBuffer(BaseTensor):
        """An array of each thread's own."""

else:
    Tensor = TensorProxy()
    StridedTensor = StridedTensorProxy()
    FragmentBuffer = FragmentBufferProxy()
    SharedBuffer = SharedBufferProxy()
    LocalBuffer = LocalBufferProxy()


class ptr:
    """An address as a parameter: `p: T.ptr` or `p: T.ptr("float16")`; as a dtype, int64.

    Args:
        dtype: what it points at; None leaves that to `T.make_tensor`.
        storage_scope: "global"; a kernel gets no other addresses.
        is_size_var: promises a value that is not negative, checked at the call.

    Raises:
        DTypeError: an unknown dtype.
        ArgumentError: another scope.
    """

    is_pointer_type = True

    def __init__(
        self, dtype: Any = None, storage_scope: Any = "global", *, is_size_var: bool = False
    ) -> None:
        self.dtype = None if dtype is None else as_element_type(dtype, "T.ptr")
        self.scope = as_scope(storage_scope, "T.ptr", (Scope.GLOBAL,))
        self.is_size_var = bool(is_size_var)

    @property
    def storage_scope(self) -> str:
        """The scope's name."""
        return self.scope.value

    def __repr__(self) -> str:
        parts = [] if self.dtype is None else [repr(self.dtype.name)]
        parts += ["is_size_var=True"] if self.is_size_var else []
        return f"T.ptr({', '.join(parts)})"


def make_tensor(ptr: Any, shape: Any, dtype: Any = "float32", strides: Any = None) -> BufferHandle:
    """A tensor in global memory at an address, inside a traced function.

    Args:
        ptr: a parameter annotated with `T.ptr`, or an int64 value such as `table[g]`.
        shape: extents in elements; accesses outside are guarded.
        dtype: of the elements.
        strides: in elements; compact if None.

    Raises:
        TraceError: no function is being traced.
        ArgumentTypeError: not an address.
    """
    return make_tensor_from_addr(ptr, shape, dtype, strides, _what="T.make_tensor")


def make_tensor_from_addr(
    addr: Any,
    shape: Any,
    dtype: Any = "float32",
    strides: Any = None,
    storage_scope: Any = "global",
    *,
    _what: str = "T.make_tensor_from_addr",
) -> BufferHandle:
    """The same as `make_tensor`; `storage_scope` is "global".

    Raises:
        TraceError: no function is being traced.
        ArgumentTypeError: not an address.
        ArgumentError: another scope.
    """
    scope = as_scope(storage_scope, _what, (Scope.GLOBAL,))
    traced_function(_what)
    if addr is None:
        raise ArgumentTypeError(f"{_what}: the pointer is None.")
    return make_global(Request(_what, shape, dtype, scope, strides=strides, data=addr))
