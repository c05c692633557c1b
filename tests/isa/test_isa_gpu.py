"""On a GPU: the meaning of every record that computes is what the hardware does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda.bindings import driver

from tilejit import dtypes
from tilejit.isa import special, tma
from tilejit.isa.instruction import Instruction
from tilejit.isa.ldmatrix import ldmatrix
from tilejit.isa.mma import MMA, fragment_a, fragment_acc, fragment_b
from tilejit.isa.stmatrix import stmatrix
from tilejit.isa.wgmma import wait_group
from tilejit.isa.wgmma_fragments import WGMMA
from tilejit.target import for_capability

LANES = 32
SHARED_BYTES = 48 * 1024  # of each kernel of a test module


@pytest.fixture(scope="module")
def gpu():
    """The target of the first GPU, whose context is current while the tests of this file run."""
    try:
        (code,) = driver.cuInit(0)
    except RuntimeError:  # no driver library
        code = driver.CUresult.CUDA_ERROR_NO_DEVICE
    if code != driver.CUresult.CUDA_SUCCESS:
        pytest.skip("needs a GPU")
    device = ask(driver.cuDeviceGet(0))
    context = ask(driver.cuDevicePrimaryCtxRetain(device))
    ask(driver.cuCtxPushCurrent(context))
    names = driver.CUdevice_attribute
    major = names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    minor = names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    yield for_capability(*(ask(driver.cuDeviceGetAttribute(n, device)) for n in (major, minor)))
    ask(driver.cuCtxPopCurrent())
    ask(driver.cuDevicePrimaryCtxRelease(device))


def ask(answer):
    code, *values = answer
    assert code == driver.CUresult.CUDA_SUCCESS, code
    return values[0] if values else None


@pytest.fixture
def execute(gpu, write_module):
    """Run a record on one block: a list of (threads,) arrays in, a list of (threads,) arrays out.
    `content` is what the block's shared memory begins with, and is overwritten with what it ends
    with."""

    def run(instruction, inputs, threads=LANES, content=None):
        if not gpu.has(*instruction.needs):
            pytest.skip(f"{instruction} is not on {gpu}")
        text = write_module(gpu, [instruction], threads).encode() + b"\0"
        module = ask(driver.cuModuleLoadData(text))
        kernel = ask(driver.cuModuleGetFunction(module, b"k0"))
        words = np.zeros((len(inputs), threads), np.uint64)
        for row, value, dtype in zip(words, inputs, instruction.inputs, strict=True):
            row.view(dtype.numpy).reshape(threads, -1)[:, 0] = value
        results = np.full((len(instruction.outputs), threads), 0xFFFFFFFFFFFFFFFF, np.uint64)
        shared = np.zeros(SHARED_BYTES, np.uint8) if content is None else content
        assert shared.nbytes == SHARED_BYTES
        buffers = [(array, ask(driver.cuMemAlloc(max(array.nbytes, 8))))
                   for array in (words, results, shared)]  # fmt: skip
        try:
            for array, memory in buffers:
                ask(driver.cuMemcpyHtoD(memory, array.ctypes.data, array.nbytes))
            addresses = np.array([int(memory) for _, memory in buffers], np.uint64)
            pointers = addresses.ctypes.data + np.arange(3, dtype=np.uint64) * 8
            shape = (1, 1, 1, threads, 1, 1)
            ask(driver.cuLaunchKernel(kernel, *shape, 0, 0, pointers.ctypes.data, 0))
            for array, memory in buffers[1:]:
                ask(driver.cuMemcpyDtoH(array.ctypes.data, memory, array.nbytes))
        finally:
            for _, memory in buffers:
                ask(driver.cuMemFree(memory))
            ask(driver.cuModuleUnload(module))
        return [
            row.view(dtype.numpy).reshape(threads, -1)[:, 0].copy()
            for row, dtype in zip(results, instruction.outputs, strict=True)
        ]

    return run


def registers(matrix, layout):
    """The registers of a fragment, one row a register: those of float64, or of 32 bits."""
    elements = np.stack(
        [matrix[layout.coordinates(np.arange(LANES), r)] for r in range(layout.registers)], axis=1
    )
    word = np.float64 if matrix.dtype == np.float64 else np.uint32
    return list(np.ascontiguousarray(elements).view(word).T)


@pytest.mark.parametrize("mma", MMA, ids=lambda mma: mma.name)
def test_mma_on_the_gpu_is_what_it_means(mma, execute, make_lanes):
    """Small integers: every sum is exact whatever its order."""
    rng = np.random.default_rng(5)
    low, high = (-8, 9) if mma.a.is_float else (mma.a.min, mma.a.max + 1)
    a = rng.integers(low, high, (mma.m, mma.k)).astype(mma.a.numpy)
    low, high = (-8, 9) if mma.b.is_float else (mma.b.min, mma.b.max + 1)
    b = rng.integers(low, high, (mma.k, mma.n)).astype(mma.b.numpy)
    acc_type = np.float16 if mma.acc is dtypes.float16 else mma.acc.numpy
    acc = rng.integers(-99, 99, (LANES, fragment_acc(mma).registers)).astype(acc_type)
    inputs = [
        *registers(a, fragment_a(mma)),
        *registers(b, fragment_b(mma)),
        *(acc.view(np.uint32) if mma.acc is dtypes.float16 else acc).T,
    ]
    for found, meant in zip(
        execute(mma.instruction, inputs),
        mma.instruction.meaning(make_lanes(LANES), inputs),
        strict=True,
    ):
        assert np.array_equal(found, meant)


def test_a_tf32_mma_on_the_gpu_ignores_the_low_13_bits(execute, make_lanes):
    for mma in (mma for mma in MMA if mma.a is dtypes.tfloat32):
        words = len(mma.instruction.inputs) - 4
        rng = np.random.default_rng(6)
        # one bit below the cut, so that rounding would show
        inputs = [rng.integers(0, 2, LANES).astype(np.uint32) * 0x1FFF + 0x3F800000] * words
        inputs += [np.zeros(LANES, np.float32)] * 4
        meant = mma.instruction.meaning(make_lanes(LANES), inputs)
        for found, expected in zip(execute(mma.instruction, inputs), meant, strict=True):
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_on_the_gpu_is_what_it_means(count, transposed, execute, make_lanes):
    lanes = make_lanes(LANES)
    content = np.zeros(SHARED_BYTES, np.uint8)
    content.view(np.uint16)[:] = np.arange(SHARED_BYTES // 2)
    lanes.shared[:4096] = content[:4096]
    address = (np.random.default_rng(2).permutation(256)[:LANES] * 16).astype(np.uint32)
    instruction = ldmatrix(count, transposed)
    meant = instruction.meaning(lanes, [address])
    for found, expected in zip(
        execute(instruction, [address], content=content), meant, strict=True
    ):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_on_the_gpu_is_what_it_means(count, transposed, execute, make_lanes):
    lanes = make_lanes(LANES)
    rng = np.random.default_rng(3)
    content = rng.integers(0, 256, SHARED_BYTES).astype(np.uint8)
    lanes.shared[:] = content
    address = (rng.permutation(256)[:LANES] * 16).astype(np.uint32)
    words = [rng.integers(0, 2**32, LANES, np.uint64).astype(np.uint32) for _ in range(count)]
    instruction = stmatrix(count, transposed)
    instruction.meaning(lanes, [address, *words])
    execute(instruction, [address, *words], content=content)
    assert np.array_equal(content, lanes.shared)


WGMMA_TYPES = tuple(dict.fromkeys(key[:3] for key in WGMMA))
HALVES = tuple(types for types in WGMMA_TYPES if types[0].bits == 16)


def names(types):
    return "-".join(map(str, types))


@pytest.fixture
def check_product(execute, make_product, make_lanes):
    """What a product of small numbers gives on the GPU is the matrix product, and what it means."""

    def check(types, n, *layouts, **options):
        product = make_product(WGMMA[*types, n], *layouts, **options)
        one = product.instruction
        waited = replace(one, ptx=f"{one.ptx}\n{wait_group(0, ()).ptx}")
        found = execute(waited, product.inputs, threads=128, content=product.content.copy())
        assert np.array_equal(product.run(make_lanes(128)), product.expected)
        assert np.array_equal(product.matrix(found), product.expected)

    return check


@pytest.mark.parametrize("mode", [0, 1, 2, 3], ids=["none", "128", "64", "32"])
@pytest.mark.parametrize("types", WGMMA_TYPES, ids=names)
def test_wgmma_on_the_gpu_of_each_type_and_swizzle_is_what_it_means(types, mode, check_product):
    for n in (8, 24, 64, 128, 256):
        check_product(types, n, mode, mode)


@pytest.mark.parametrize("turned", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("mode", [0, 1, 2, 3], ids=["none", "128", "64", "32"])
@pytest.mark.parametrize("types", HALVES, ids=names)
def test_wgmma_on_the_gpu_of_each_major_is_what_it_means(types, mode, turned, check_product):
    for n in (8, 24, 64, 128, 256):
        check_product(types, n, mode, mode, *turned)


@pytest.mark.parametrize("types", WGMMA_TYPES, ids=names)
def test_wgmma_on_the_gpu_with_a_in_registers_is_what_it_means(types, check_product):
    for n in (8, 64, 256):
        check_product(types, n, None, 1, steps=4)
    if types in HALVES:
        check_product(types, 64, None, 1, b_turned=True, steps=3)


@pytest.mark.parametrize("scale", [None, 0, 1])
@pytest.mark.parametrize("a_mode", [None, 1])
def test_a_wgmma_sequence_on_the_gpu_is_what_it_means(a_mode, scale, check_product):
    types = (dtypes.bfloat16, dtypes.bfloat16, dtypes.float32)
    check_product(types, 40, a_mode, 1, rows=2, columns=2, scale=scale)


def test_a_tf32_wgmma_on_the_gpu_ignores_the_low_13_bits(execute, make_product, make_lanes):
    one = WGMMA[dtypes.tfloat32, dtypes.tfloat32, dtypes.float32, 16]
    product = make_product(one, 1, 1)
    product.content.view(np.uint32)[:] |= 0x1FFF  # so that rounding would show
    waited = replace(product.instruction, ptx=f"{product.instruction.ptx}\n{wait_group(0, ()).ptx}")
    found = execute(waited, product.inputs, threads=128, content=product.content.copy())
    assert np.array_equal(product.matrix(found), product.run(make_lanes(128)))


EDGES = np.array(
    [0, -0.0, 1, -1.5, 65504, 65520, 1e-8, -6e-8, 448, 464, 480, 57344, 61440, 3e38, -3.4e38,
     np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1e-40, -7e-3,
     2**-9, 2**-10, 3 * 2**-10, 2**-16, 2**-17, 3 * 2**-17, 3.1415927, -0.1],
    np.float32,
)  # fmt: skip
NANS = np.array([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFC00000, 0xFFFFFFFF], np.uint32)
EXACT = [
    special.BF16_FROM_F32,
    special.BF16X2_FROM_F32,
    special.F16X2_FROM_F32,
    special.TF32_FROM_F32,
    special.E4M3X2_FROM_F32,
    special.E5M2X2_FROM_F32,
]


@pytest.mark.parametrize("instruction", EXACT, ids=lambda instruction: instruction.name)
def test_a_conversion_of_nans_on_the_gpu_is_what_it_means_bit_for_bit(instruction, execute):
    nans = np.resize(NANS, LANES).view(np.float32)
    inputs = [nans, np.roll(nans, 1)][: len(instruction.inputs)]
    (found,), (meant,) = execute(instruction, inputs), instruction.meaning(None, inputs)
    assert [hex(x) for x in found[:5]] == [hex(x) for x in meant[:5]]


@pytest.mark.parametrize("instruction", EXACT, ids=lambda instruction: instruction.name)
def test_a_conversion_on_the_gpu_is_what_it_means_bit_for_bit(instruction, execute):
    inputs = [EDGES, np.roll(EDGES, 5)][: len(instruction.inputs)]
    (found,), (meant,) = execute(instruction, inputs), instruction.meaning(None, inputs)
    assert [hex(x) for x in found] == [hex(x) for x in meant]


@pytest.mark.parametrize(
    "instruction",
    [special.F16X2_FROM_E4M3X2, special.F16X2_FROM_E5M2X2],
    ids=lambda instruction: instruction.name,
)
def test_widening_fp8_on_the_gpu_is_what_it_means_bit_for_bit(instruction, execute):
    for start in range(0, 256, LANES):
        low = np.arange(start, start + LANES, dtype=np.uint16)
        inputs = [low | (255 - low) << 8]
        (found,), (meant,) = execute(instruction, inputs), instruction.meaning(None, inputs)
        assert [hex(x) for x in found] == [hex(x) for x in meant]


@pytest.mark.parametrize(
    "instruction",
    [special.EX2, special.LG2, special.RCP, special.RSQRT, special.SQRT, special.SIN,
     special.COS, special.TANH],
    ids=lambda instruction: instruction.name,
)  # fmt: skip
def test_a_fast_function_on_the_gpu_is_close_to_what_it_means(instruction, execute):
    x = np.linspace(-3, 3, LANES).astype(np.float32)
    x[:6] = [0, -0.0, np.inf, np.nan, 1e-40, 100.25]
    if instruction in (special.SIN, special.COS):
        x[5] = 1.0  # their error grows with the argument
    (found,), (meant,) = execute(instruction, [x]), instruction.meaning(None, [x])
    tolerance = 1e-3 if instruction is special.TANH else 1e-5
    assert np.allclose(found, meant, rtol=tolerance, atol=2e-6, equal_nan=True), (found, meant)


@pytest.mark.parametrize("mode", ["idx", "bfly", "up", "down"])
def test_a_shuffle_on_the_gpu_is_what_it_means(mode, execute, make_lanes):
    value = np.arange(LANES, dtype=np.uint32) * 3
    operand = np.full(LANES, 5, np.uint32)
    if mode == "idx":
        operand = np.random.default_rng(0).integers(0, 64, LANES).astype(np.uint32)
    instruction = special.shuffle(mode)
    (meant,) = instruction.meaning(make_lanes(LANES), [value, operand])
    assert np.array_equal(execute(instruction, [value, operand])[0], meant)


def test_a_permutation_on_the_gpu_is_what_it_means(execute):
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 1 << 32, LANES, dtype=np.uint32) for _ in range(2)]
    selector = rng.integers(0, 1 << 16, LANES, dtype=np.uint32) & np.uint32(0x7777)
    (meant,) = special.PERMUTE.meaning(None, [*words, selector])
    assert np.array_equal(execute(special.PERMUTE, [*words, selector])[0], meant)


# --- bulk copies ----------------------------------------------------------------------------------

KINDS = {
    "uint16": "UINT16", "int32": "INT32", "float32": "FLOAT32", "tfloat32": "TFLOAT32",
    "bfloat16": "BFLOAT16",
}  # fmt: skip


@pytest.fixture
def tensor_on_gpu(gpu):
    """`tensor_on_gpu(array, tensor)`: the address of the encoded map of a copy of the array, and
    a function that gets the copy."""
    if not gpu.has(*tma.FENCE_ASYNC.needs):
        pytest.skip(f"no bulk copies on {gpu}")
    memories = []

    def put(array, tensor):
        kinds, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
        memory = ask(driver.cuMemAlloc(array.nbytes))
        memories.append(memory)
        ask(driver.cuMemcpyHtoD(memory, array.ctypes.data, array.nbytes))
        span = f"{tensor.swizzle}B" if tensor.swizzle else "NONE"
        encoded = ask(driver.cuTensorMapEncodeTiled(
            getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{KINDS[tensor.kind]}"),
            len(tensor.shape),
            int(memory),
            [driver.cuuint64_t(n) for n in tensor.shape[::-1]],
            [driver.cuuint64_t(n) for n in tensor.strides[-2::-1] or (16,)],
            [driver.cuuint32_t(n) for n in tensor.box[::-1]],
            [driver.cuuint32_t(1)] * len(tensor.shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(swizzles, f"CU_TENSOR_MAP_SWIZZLE_{span}"),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ))  # fmt: skip
        handle = ask(driver.cuMemAlloc(256))
        memories.append(handle)
        words = np.array([int(word) for word in encoded.opaque], np.uint64)
        ask(driver.cuMemcpyHtoD(handle, words.ctypes.data, words.nbytes))

        def get():
            ask(driver.cuMemcpyDtoH(array.ctypes.data, memory, array.nbytes))
            return array

        return int(handle), get

    yield put
    for memory in memories:
        ask(driver.cuMemFree(memory))


def tensor_of(array, box, swizzle=0, kind=None):
    kind = kind or array.dtype.name
    made = tma.TensorMap(
        0, array.itemsize, array.shape, array.strides, tuple(box), swizzle,
        rounds=kind == "tfloat32", kind=kind,
    )  # fmt: skip
    assert not made.problem(), made.problem()
    return made


def bulk_load(rank, size):
    """Thread 0 loads a box to the start of shared memory; the output says whether `size` bytes
    have come. It looks a limited number of times, so that too few of them do not hang the GPU."""
    load = tma.tma_load(rank).ptx
    load = load.replace(f"$a{rank + 2}", "full").replace(f"$a{rank + 1}", "%r501")
    return Instruction(
        name=f"load.{rank}",
        ptx=f"""{{
.reg .pred first, complete, again;
.reg .b32 full, round;
add.u32 full, %r501, {SHARED_BYTES - 64};
setp.eq.u32 first, %r500, 0;
@first mbarrier.init.shared.b64 [full], 1;
fence.mbarrier_init.release.cluster;
fence.proxy.async.shared::cta;
bar.sync 0;
@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {size};
@first {load}
mov.u32 round, 0;
look_${{uid}}:
mbarrier.try_wait.parity.shared.b64 complete, [full], 0;
add.u32 round, round, 1;
setp.lt.and.u32 again, round, 1000, !complete;
@again bra look_${{uid}};
selp.u32 $d0, 1, 0, complete;
}}""",
        outputs=(dtypes.uint32,),
        inputs=(dtypes.uint64, *(dtypes.int32,) * rank),
        needs=tma.tma_load(rank).needs,
        meaning=lambda lanes, inputs: (),
    )


@pytest.fixture
def check_load(execute, tensor_on_gpu):
    """A box that the GPU loads is the part of the array, its chunks where `Box` says, and its
    barrier is told `box_bytes`."""

    def check(array, tensor, start, expected=None):
        handle, _ = tensor_on_gpu(array, tensor)
        rng = np.random.default_rng(1)
        content = rng.integers(0, 256, SHARED_BYTES).astype(np.uint8)
        before = content.copy()
        inputs = [np.full(LANES, handle, np.uint64)]
        inputs += [np.full(LANES, i, np.int32) for i in start]
        one = bulk_load(len(start), tensor.box_bytes)
        (found,) = execute(one, inputs, content=content)
        assert found.all(), "the barrier was told another number of bytes"
        box = tma.Box(tensor, start)
        if expected is None:
            outer, inner = box.meets()
            expected = np.zeros(tensor.box, array.dtype)
            expected[inner] = array[outer]
        chunks = np.ascontiguousarray(expected).view(np.uint8).reshape(-1, tma.CHUNK)
        before[box.chunks(0)[:, None] + np.arange(tma.CHUNK)] = chunks
        end = SHARED_BYTES - 64  # the barrier is behind
        assert np.array_equal(content[:end], before[:end])

    return check


@pytest.mark.parametrize("start", [(0, 0), (-3, 8), (90, 152), (200, 0), (-40, 8), (8, -160)])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_a_bulk_load_on_the_gpu_is_what_it_means(span, start, check_load):
    array = np.arange(100 * 160, dtype=np.uint16).reshape(100, 160)
    check_load(array, tensor_of(array, (32, (span or 128) // 2), span), start)


@pytest.mark.parametrize("span", [64, 128])
def test_a_bulk_load_on_the_gpu_of_rows_below_the_swizzles_span_keeps_its_pitch(span, check_load):
    array = np.arange(100 * 160, dtype=np.uint16).reshape(100, 160)
    check_load(array, tensor_of(array, (32, 16), span), (4, 8))


@pytest.mark.parametrize("rank", [1, 3, 4, 5])
def test_a_bulk_load_on_the_gpu_of_any_rank_is_what_it_means(rank, check_load):
    shape = (5, 4, 3, 6, 16)[-rank:]
    array = np.arange(1, 1 + np.prod(shape), dtype=np.int32).reshape(shape)
    box = (2, 2, 2, 4, 8)[-rank:]
    check_load(array, tensor_of(array, box), (1, -1, 2, 3, 4)[-rank:])


def test_a_bulk_load_on_the_gpu_rounds_to_tf32_as_it_means(check_load):
    array = np.resize(np.random.default_rng(0).standard_normal(256), 256).astype(np.float32)
    step = np.float32(2.0**-10)
    array[:8] = [1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, 2 - step / 4, np.inf, -np.inf,
                 1e-40, 0]  # fmt: skip
    check_load(array, tensor_of(array, (256,), kind="tfloat32"), (0,), tma.round_to_tf32(array))


@pytest.mark.parametrize("add", [False, True], ids=["store", "add"])
@pytest.mark.parametrize("kind", ["int32", "float32", "bfloat16"])
@pytest.mark.parametrize("start", [(20, 80), (0, 64), (36, 0), (60, 0), (8, 160)], ids=str)
def test_a_bulk_store_on_the_gpu_is_what_it_means(kind, start, add, execute, tensor_on_gpu):
    rng = np.random.default_rng(2)
    dtype = dtypes.as_dtype(kind).numpy
    array = rng.integers(-8, 9, (40, 96)).astype(dtype)
    width = 128 // array.itemsize
    tensor = tensor_of(array, (32, width), 128, kind)
    box = tma.Box(tensor, start)
    values = rng.integers(-8, 9, tensor.box).astype(dtype)
    content = np.zeros(SHARED_BYTES, np.uint8)
    chunks = values.view(np.uint8).reshape(-1, tma.CHUNK)
    content[box.chunks(0)[:, None] + np.arange(tma.CHUNK)] = chunks
    expected = array.copy()
    outer, inner = box.meets()
    expected[outer] = expected[outer] + values[inner] if add else values[inner]
    handle, get = tensor_on_gpu(array, tensor)
    one = tma.tma_reduce_add(2) if add else tma.tma_store(2)
    text = one.ptx.replace("$a3", "%r501")
    store = Instruction(
        name=one.name,
        ptx="{\n.reg .pred first;\nsetp.eq.u32 first, %r500, 0;\n"
        f"{tma.FENCE_ASYNC.ptx}\nbar.sync 0;\n@first {text}\n"
        f"{tma.COMMIT_STORES.ptx}\n{tma.wait_stores(0, False).ptx}\n}}",
        inputs=one.inputs[:3],
        needs=one.needs,
        meaning=one.meaning,
    )
    inputs = [np.full(LANES, handle, np.uint64)]
    execute(store, [*inputs, *(np.full(LANES, i, np.int32) for i in box.start)], content=content)
    assert np.array_equal(get(), expected)
