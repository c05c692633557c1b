"""What a wrong call says, before anything runs and with outputs untouched."""

from __future__ import annotations

import numpy as np
import pytest

import tilejit.language as T
from tilejit import (
    ArgumentError,
    ArgumentTypeError,
    DTypeError,
    ShapeError,
    TileError,
    UnsupportedError,
    options,
    tilejit,
)
from tilejit.runtime import placement
from tilejit.runtime.arrays import ArrayView
from tilejit.runtime.device import Executor

pytestmark = pytest.mark.usefixtures("reference")


@tilejit
def add(A: T.Tensor((4, 8), "float32"), B: T.Tensor((T.dynamic("m"), 8), "float32"), C: T.Tensor):
    with T.Kernel(1, threads=32):
        for i, j in T.Parallel(4, 8):
            C[i, j] = A[i, j] + B[i, j]


def arrays(**changes):
    made = {"A": (4, 8), "B": (4, 8), "C": (4, 8)}
    result = {n: np.full(s, np.nan, np.float32) for n, s in made.items()}
    result.update(changes)
    return result


def read_only():
    x = np.zeros((4, 8), np.float32)
    x.flags.writeable = False
    return x


WRONG = {
    "add: A has dtype float64, but it was declared float32.": (
        DTypeError,
        {"A": np.zeros((4, 8))},
    ),
    "add: A has 1 dimension, but it was declared with 2.": (
        ShapeError,
        {"A": np.zeros(4, np.float32)},
    ),
    "add: A has extent 9 in dimension 1, but it was declared 8.": (
        ShapeError,
        {"A": np.zeros((4, 9), np.float32)},
    ),
    "add: B is not contiguous: its strides are (1, 4), but (8, 1) were declared.": (
        ShapeError,
        {"B": np.zeros((8, 4), np.float32).T},
    ),
    "add: C is read-only, but the kernel writes it.": (ArgumentError, {"C": read_only()}),
    "add: C repeats its elements along dimension 0 (its stride is 0), but the kernel writes it.": (
        ArgumentError,
        {"C": np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (4, 8), (0, 4))},
    ),
    "add: A is a list, not an array.": (ArgumentTypeError, {"A": [1.0]}),
    "add: A is None, not an array.": (ArgumentTypeError, {"A": None}),
    "add: A is a float32, not an array.": (ArgumentTypeError, {"A": np.float32(1)}),
    "add has no parameter `D`.": (ArgumentTypeError, {"D": 1}),
}


@pytest.mark.parametrize("headline", WRONG)
def test_wrong_argument_is_one_sentence_and_leaves_outputs_alone(headline):
    error, changes = WRONG[headline]
    given = arrays(**changes)
    before = given["C"].copy()
    with pytest.raises(error) as caught:
        add(**given)
    assert caught.value.headline == headline
    np.testing.assert_array_equal(given["C"], before)


@pytest.mark.parametrize(
    ("args", "headline"),
    [
        (2, "add: C is missing."),
        (1, "add: B and C are missing."),
        (0, "add: A, B and C are missing."),
        (4, "add takes 3 positional arguments, but 4 were given."),
    ],
)
def test_wrong_number_of_arguments_is_a_type_error(args, headline):
    given = [np.zeros((4, 8), np.float32) for _ in range(args)]
    with pytest.raises(TypeError) as caught:
        add(*given)
    assert caught.value.headline == headline


def test_argument_given_twice_is_refused():
    x = np.zeros((4, 8), np.float32)
    with pytest.raises(ArgumentTypeError) as caught:
        add(x, x, x, A=x)
    assert caught.value.headline == "add: A was given twice."


def test_misspelt_parameter_is_suggested():
    with pytest.raises(ArgumentTypeError) as caught:
        tilejit(lambda_free)(block_M=3)
    assert caught.value.hint == "Did you mean `block_m`?"


def lambda_free(block_m=1):
    with T.Kernel(1, threads=32):
        pass


def test_message_points_at_the_users_call():
    given = arrays(A=np.zeros((4, 8)))
    with pytest.raises(TileError) as caught:
        add(**given)
    text = str(caught.value)
    assert text.startswith("add: A has dtype float64, but it was declared float32.\n  File ")
    assert "test_runtime_messages.py" in text
    assert "add(**given)" in text


def frames_of(error):
    names, traceback = [], error.__traceback__
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return [name for name in names if "tilejit/runtime" in name.replace("\\", "/")]


def test_traceback_has_our_frames_only_when_asked():
    with pytest.raises(TileError) as caught:
        add(**arrays(A=np.zeros((4, 8))))
    assert len([n for n in frames_of(caught.value) if "test_" not in n]) <= 1
    with options(full_traceback=True), pytest.raises(TileError) as caught:
        add(**arrays(A=np.zeros((4, 8))))
    assert len([n for n in frames_of(caught.value) if "test_" not in n]) > 2


def test_scalar_that_is_no_number_is_refused():
    @tilejit
    def scale(A: T.Tensor, alpha: T.float32):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(4):
                A[i] = A[i] * alpha

    with pytest.raises(DTypeError) as caught:
        scale(np.zeros(4, np.float32), "2")
    assert caught.value.headline == "scale: alpha is a str, but it was declared a float32 number."


def test_pointer_that_is_no_address_is_refused():
    @tilejit
    def fetch(source: T.ptr, C: T.Tensor):
        with T.Kernel(1, threads=32):
            A = T.make_tensor(source, (8,), "float32")
            for i in T.Parallel(8):
                C[i] = A[i]

    with pytest.raises(ArgumentTypeError) as caught:
        fetch("here", np.zeros(8, np.float32))
    assert caught.value.headline == "fetch: source is a str, but it was declared a pointer."
    with pytest.raises(ArgumentError) as caught:
        fetch(-1, np.zeros(8, np.float32))
    assert caught.value.headline == "fetch: source is -1, which is no 64-bit address."


def spec(n, **more):
    return T.Tensor((n,), "float32", **more)


@tilejit
def copy(A: T.Tensor, B: T.Tensor, *, BN=32):
    with T.Kernel(1, threads=32):
        for i in T.Parallel(BN):
            B[i] = A[i]


def test_compiled_kernel_checks_the_alignment_that_a_spec_promised():
    made = copy.compile(spec(32), spec(32))
    x = np.zeros(40, np.float32)
    start = 1 if x.ctypes.data % 16 == 0 else 0
    with pytest.raises(ArgumentError) as caught:
        made(x[start : start + 32], np.zeros(32, np.float32))
    assert caught.value.headline == (
        "copy: A begins at an address that is no multiple of 16 bytes, as promised."
    )
    loose = copy.compile(spec(32, align=4), spec(32, align=4))
    out = np.zeros(32, np.float32)
    loose(x[start : start + 32] + 1, out)
    assert (out == 1).all()


def test_compiled_kernel_checks_shape_and_dtype():
    made = copy.compile(spec(32), spec(32))
    with pytest.raises(ShapeError) as caught:
        made(np.zeros(33, np.float32), np.zeros(32, np.float32))
    assert caught.value.headline == (
        "copy: A has extent 33 in dimension 0, but it was declared 32."
    )
    with pytest.raises(DTypeError):
        made(np.zeros(32), np.zeros(32, np.float32))


def test_compiled_kernel_refuses_an_overlap_it_was_not_made_for():
    made = copy.compile(spec(32), spec(32))
    x = np.zeros(64, np.float32)
    with pytest.raises(ArgumentError) as caught:
        made(x[:32], x[:32])
    assert caught.value.headline == (
        "copy: A and B share memory, but the kernel was compiled for arguments that do not."
    )


def test_compiled_kernel_refuses_another_constant():
    made = copy.compile(spec(32), spec(32), BN=16)
    x = np.zeros(32, np.float32)
    with pytest.raises(ArgumentError) as caught:
        made(x, x.copy(), BN=32)
    assert caught.value.headline == "copy: BN is 32, but the kernel was compiled for 16."


def test_compile_without_a_needed_argument_names_it():
    with pytest.raises(ArgumentTypeError) as caught:
        copy.compile(spec(32))
    assert caught.value.headline == "copy: B is missing."


def test_compile_for_an_unknown_target_lists_the_targets():
    with pytest.raises(UnsupportedError) as caught:
        copy.compile(spec(32), spec(32), target="sm_70")
    assert caught.value.headline == "'sm_70' is not a target that tilejit compiles for."
    assert "sm_80" in caught.value.hint


@pytest.mark.parametrize(
    ("decorate", "headline"),
    [
        (lambda: tilejit(3), "@tilejit decorates a Python function, not an int."),
        (lambda: tilejit(block=3), "tilejit has no option `block`."),
        (lambda: tilejit(copy), "copy is a tile function already."),
        (
            lambda: tilejit(staticmethod(lambda_free)),
            "@tilejit does not decorate a staticmethod.",
        ),
    ],
)
def test_wrong_decoration_is_refused(decorate, headline):
    with pytest.raises(ArgumentTypeError) as caught:
        result = decorate()
        if callable(result):
            result(lambda_free)
    assert caught.value.headline == headline


def test_tile_function_is_no_method():
    class Holder:
        kernel = copy

    with pytest.raises(ArgumentTypeError, match=r"^copy: a tile function is not a method"):
        Holder().kernel


@pytest.mark.parametrize(
    ("out_idx", "headline"),
    [
        (3, "inner: out_idx 3 is outside its 2 parameters."),
        ([1, -1], "inner: out_idx names B twice."),
        ("B", "inner: out_idx is 'B', not integers."),
    ],
)
def test_out_idx_that_names_no_parameter_is_refused(out_idx, headline):
    @tilejit(out_idx=out_idx)
    def factory(n):
        @T.prim_func
        def inner(A: T.Tensor((n,), "float32"), B: T.Tensor((n,), "float32")):
            with T.Kernel(1, threads=32):
                for i in T.Parallel(n):
                    B[i] = A[i]

        return inner

    with pytest.raises(TileError) as caught:
        factory(4)
    assert caught.value.headline == headline


def test_out_idx_without_a_prim_func_says_what_to_write():
    made = tilejit(out_idx=-1)(lambda_free)
    with pytest.raises(ArgumentTypeError) as caught:
        made()
    assert caught.value.headline == (
        "lambda_free: out_idx is for a function that returns a T.prim_func."
    )
    assert "T.empty" in caught.value.hint


def view(device=-1, framework=""):
    return ArrayView(None, framework, (4,), (1,), T.float32, 4096, device)


@pytest.mark.parametrize(
    ("views", "executor", "headline"),
    [
        ([view(0), view(1)], "gpu", "f: A is on GPU 0 and B is on GPU 1."),
        (
            [view(framework="torch")],
            "gpu",
            "f: A is a torch tensor in host memory, but the kernel runs on the GPU.",
        ),
        (
            [view(2)],
            "simulator",
            "f: A is on GPU 2, but this call runs on the simulator, which reads host memory.",
        ),
    ],
)
def test_argument_that_the_executor_cannot_reach_is_refused(views, executor, headline):
    with pytest.raises(ArgumentError) as caught:
        placement.place("f", "AB", (views + [3])[:2], Executor(executor))
    assert caught.value.headline == headline


def test_torch_tensor_that_records_gradients_is_not_written(monkeypatch):
    monkeypatch.setattr(placement.arrays, "needs_gradient", lambda x: True)
    with pytest.raises(ArgumentError) as caught:
        placement.check_writable("f", "C", view(0, "torch"))
    assert caught.value.headline == (
        "f: C requires a gradient, but the kernel writes it unseen by autograd."
    )
