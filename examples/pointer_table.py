"""Groups of different sizes through a table of addresses: python examples/pointer_table.py"""

from __future__ import annotations

import numpy as np

import tilejit.language as T
from tilejit import address_of, has_gpu, tilejit


@tilejit
def gather_rows(sources: T.Tensor, sizes: T.Tensor, starts: T.Tensor, out: T.Tensor, *, B=128):
    """out[starts[g] : starts[g] + sizes[g]] = the `sizes[g]` floats at address sources[g]."""
    groups = sources.shape[0]
    longest = T.ceildiv(out.shape[0], B)
    with T.Kernel(longest, groups, threads=B) as (bx, g):
        source = T.make_tensor(sources[g], (sizes[g],), "float32")
        start = starts[g]
        for i in T.Parallel(B):
            place = bx * B + i
            with T.If(place < sizes[g]):
                out[start + place] = source[place]


@tilejit
def copy_from(address: T.ptr("float32"), out: T.Tensor, *, B=128):
    """out = the floats that start at an address."""
    N = out.shape[0]
    source = T.Tensor.from_ptr(address, (N,), "float32")
    with T.Kernel(T.ceildiv(N, B), threads=B) as bx:
        for i in T.Parallel(B):
            out[bx * B + i] = source[bx * B + i]


def on_device(array: np.ndarray):
    """The array where the kernel can follow its address: a GPU's memory if there is one."""
    if not has_gpu():
        return array
    from numba import cuda

    return cuda.to_device(array)


def main() -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([5, 300, 128, 1], np.int32)
    groups = [on_device(rng.standard_normal(n).astype(np.float32)) for n in lengths]
    table = np.array([address_of(g) for g in groups], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int32)
    out = np.full(int(lengths.sum()), np.nan, np.float32)
    gather_rows(table, lengths, starts, out)
    host = [g if isinstance(g, np.ndarray) else g.copy_to_host() for g in groups]
    np.testing.assert_array_equal(out, np.concatenate(host))

    single = np.full(300, np.nan, np.float32)
    copy_from(address_of(groups[1]), single)
    np.testing.assert_array_equal(single, host[1])
    print(f"{len(groups)} groups of {lengths.tolist()} floats gathered through their addresses")


if __name__ == "__main__":
    main()
