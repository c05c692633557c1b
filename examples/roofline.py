"""The ceilings of a chip, and a picture of measured points below them.

Knows torch only where it measures, matplotlib only where it draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

# Dense tensor-core TFLOP/s by NVIDIA's datasheets; the first name that the device's contains.
_HOPPER = {"16": 989.4, "8": 1978.9, "tfloat32": 494.7}
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("H100 PCIe", {"16": 756.0, "8": 1513.0, "tfloat32": 378.0}),
    ("H100 NVL", {"16": 835.5, "8": 1670.5, "tfloat32": 417.5}),
    ("H100", _HOPPER),
    ("H200 NVL", {"16": 835.5, "8": 1670.5, "tfloat32": 417.5}),
    ("H200", _HOPPER),
    ("A100", {"16": 312.0, "8": 624.0, "tfloat32": 156.0}),
)

MARKS = {"tilejit": "o", "cublas": "s", "triton": "^", "pallas": "D", "tilelang": "v"}


def tensor_peak(device: str, dtype: str) -> float | None:
    """TFLOP/s of the datasheet for operands of that dtype, None for an unknown chip or dtype."""
    kind = {"bfloat16": "16", "float16": "16", "int8": "8", "float8_e4m3fn": "8"}.get(dtype, dtype)
    if kind == "8" and dtype != "int8" and "A100" in device:
        return None
    return next((peaks.get(kind) for name, peaks in PEAKS if name in device), None)


def copy_bandwidth(rounds: int = 10) -> float:
    """TB/s of a copy of 1 GiB within the GPU's memory, bytes read and bytes written."""
    import torch

    source = torch.ones(1 << 28, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(rounds + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return 2 * source.nbytes / statistics.median(times[2:]) / 1e9


def ceiling(intensity: float, bandwidth: float, peak: float | None) -> float:
    """TFLOP/s that memory and tensor cores allow at so many operations a byte."""
    return intensity * bandwidth if peak is None else min(intensity * bandwidth, peak)


def draw(path: str, points: Sequence[dict[str, Any]], device: str, bandwidth: float) -> str:
    """Write the picture; says in one line where it is, or why there is none.

    points: with "dtype", "layout", "who", "intensity" (operations a byte) and "tflops".
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        return f"No picture: it needs matplotlib ({error})."
    dtypes = list(dict.fromkeys(point["dtype"] for point in points))
    if not dtypes:
        return "No picture: nothing was measured."
    size = (5.5 * len(dtypes), 4.8)
    figure, axes = plt.subplots(1, len(dtypes), figsize=size, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _draw_dtype(axis, [p for p in points if p["dtype"] == dtype], device, bandwidth)
        axis.set_title(f"matmul {dtype} on {device}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f"Picture: {path}"


def _draw_dtype(axis: Any, points: Sequence[dict[str, Any]], device: str, bandwidth: float) -> None:
    peak = tensor_peak(device, points[0]["dtype"])
    across = [point["intensity"] for point in points]
    ends = [min(across) / 2, max(across) * 2]
    ridge = [] if peak is None else [peak / bandwidth]
    xs = sorted([*ends, *(x for x in ridge if ends[0] < x < ends[1])])
    roof = "" if peak is None else f", tensor cores {peak:.0f} TFLOP/s (datasheet)"
    label = f"memory {bandwidth:.2f} TB/s (measured copy){roof}"
    axis.plot(xs, [ceiling(x, bandwidth, peak) for x in xs], "k-", lw=1.2, label=label)
    for index, who in enumerate(dict.fromkeys(point["who"] for point in points)):
        for layout in dict.fromkeys(point["layout"] for point in points):
            mine = [p for p in points if (p["who"], p["layout"]) == (who, layout)]
            if mine:
                axis.plot(
                    [p["intensity"] for p in mine], [p["tflops"] for p in mine],
                    MARKS.get(who, "x"), color=f"C{index}", ms=5, label=f"{who} {layout}",
                    fillstyle="full" if layout == "nt" else "none",
                )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
    axis.grid(True, which="both", lw=0.3)
    axis.legend(fontsize=6)
