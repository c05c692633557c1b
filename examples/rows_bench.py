"""Times `rows.py` beside copies on the device, `torch.Tensor.copy_`, of as many bytes.

python examples/rows.py --bench --widths 1024,8192 --seconds 120

Each result is compared with float64 on fewer rows before it is timed, and weight gradients must be
equal bit by bit in three runs. The L2 cache is flushed before every call. A forward function reads
and writes one tensor, a gradient reads two and writes one; weights and statistics are not counted.
Needs a GPU and torch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import rows
import rows_plan
from bench_clock import EventClock, Limit, measure, reason

WIDTHS = (128, 1024, 4096, 8192, 16384, 65536, 262144)
ELEMENTS = 1 << 28
CHECKED = 1 << 20


class Tensors:
    """What the functions of rows of a width read and write."""

    def __init__(self, M: int, N: int) -> None:
        import torch

        def make(*shape: int, dtype: Any = torch.bfloat16) -> Any:
            return torch.empty(shape, dtype=dtype, device="cuda").normal_()

        self.x, self.dy = make(M, N), make(M, N)
        self.y, self.dx = (torch.full_like(self.x, torch.nan) for _ in range(2))
        self.w, self.b = make(N), make(N)
        self.dw, self.db = torch.full_like(self.w, torch.nan), torch.full_like(self.w, torch.nan)
        self.mean, self.s = (
            torch.full((M,), torch.nan, dtype=torch.float32, device="cuda") for _ in range(2)
        )
        self.taken = torch.zeros(1, dtype=torch.int32, device="cuda")

    def forward(self, name: str, plan: rows_plan.Plan, **more: int) -> Callable[[], Any]:
        knobs = rows_plan.chosen(plan, self.x.shape[1], more, plan.kept > 0)
        taken = (self.taken,) if plan.is_free else ()
        if name == "softmax":
            return lambda: rows.softmax(self.x, self.y, **knobs)
        if name == "rms_norm":
            return lambda: rows.rms_norm(self.x, self.w, self.y, self.s, *taken, **knobs)
        outputs = self.y, self.mean, self.s
        return lambda: rows.layer_norm(self.x, self.w, self.b, *outputs, *taken, **knobs)

    def backward(self, name: str, plan: rows_plan.Plan, **more: int) -> Callable[[], Any]:
        """After `forward` of the same name, which gives what it reads."""
        knobs = rows_plan.chosen(plan, self.x.shape[1], more, name != "softmax")
        if name == "softmax":
            return lambda: rows.softmax_backward(self.y, self.dy, self.dx, **knobs)
        read = (self.x, self.w, self.dy)
        if name == "rms_norm":
            return lambda: rows.rms_norm_backward(*read, self.s, self.dx, self.dw, **knobs)
        return lambda: rows.layer_norm_backward(
            *read, self.mean, self.s, self.dx, self.dw, self.db, **knobs
        )


def _near(got: Any, wanted: Any, tolerance: float = 0.01) -> bool:
    """As near as 16-bit floats are; NaNs and infinities at the same places."""
    got = got.double()
    is_finite = wanted.isfinite()
    if not (is_finite == got.isfinite()).all() or not (wanted.isnan() == got.isnan()).all():
        return False
    scale = wanted[is_finite].abs().max()
    allowed = tolerance * (wanted[is_finite].abs() + 0.1 * scale)
    return bool(((got - wanted)[is_finite].abs() <= allowed).all())


def _exact(name: str, t: Tensors) -> tuple[Any, Any, Any, Any]:
    """Result and gradients in float64, of softmax from the result that was stored."""
    x, dy, w, b = (a.double() for a in (t.x, t.dy, t.w, t.b))
    if name == "softmax":
        y = t.y.double()
        return x.softmax(1), y * (dy - (y * dy).sum(1, keepdim=True)), None, None
    is_layer = name == "layer_norm"
    mean = x.mean(1, keepdim=True) if is_layer else 0
    s = ((x - mean).square().mean(1, keepdim=True) + rows.EPS[name]).rsqrt()
    hat, g = (x - mean) * s, dy * w
    centre = g.mean(1, keepdim=True) if is_layer else 0
    dx = s * (g - centre - hat * (g * hat).mean(1, keepdim=True))
    return hat * w + (b if is_layer else 0), dx, (dy * hat).sum(0), dy.sum(0) if is_layer else None


def wrong(name: str, M: int, N: int) -> str:
    """What is not right about a function and its gradient; empty when all is."""
    t = Tensors(M, N)
    t.forward(name, rows_plan.forward_plan(N, name))()
    y, dx, dw, db = _exact(name, t)
    if not _near(t.y, y):
        return "the result differs from float64"
    first: list[Any] | None = None
    for _ in range(3):
        for tensor in (t.dx, t.dw, t.db):
            tensor.fill_(float("nan"))
        t.backward(name, rows_plan.backward_plan(N, name))()
        for what, got, wanted in (("X", t.dx, dx), ("W", t.dw, dw), ("B", t.db, db)):
            if wanted is not None and not _near(got, wanted):
                return f"the gradient of {what} differs from float64"
        bits = [tensor.view(dtype=_bits()).clone() for tensor in (t.dx, t.dw, t.db)]
        if first is not None and not all((a == b).all() for a, b in zip(first, bits, strict=True)):
            return "two runs differ"
        first = bits
    return ""


def _bits() -> Any:
    import torch

    return torch.int16


def bench(width: int, rounds: int, limit: Limit) -> None:
    """Check and time all functions of rows of a width, and print a line."""
    import torch

    notes = [
        f"  {name}: {trouble}"
        for name in rows.NAMES
        if (trouble := wrong(name, max(3, CHECKED // width), width))
    ]
    t = Tensors(ELEMENTS // width, width)
    target = torch.empty_like(t.x)
    calls: dict[Any, Callable[[], Any]] = {"copy": lambda: target.copy_(t.x)}
    for name in rows.NAMES:
        calls[name] = t.forward(name, rows_plan.forward_plan(width, name))
        calls[f"{name} gradient"] = t.backward(name, rows_plan.backward_plan(width, name))
    for call in calls.values():
        call()
    times = {
        k: statistics.median(v) for k, v in measure(EventClock(), calls, rounds, limit).items()
    }
    size = ELEMENTS * t.x.element_size()
    copied = 2 * size / times["copy"]
    cells = [f"{width:>7}  copy {copied / 1e9:5.2f} TB/s"]
    for name in rows.NAMES:
        ahead = 2 * size / times[name] / copied
        back = 3 * size / times[f"{name} gradient"] / copied
        cells.append(f"{name} {ahead:5.3f} / {back:5.3f}")
    print("   ".join(cells), *notes, sep="\n", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench", action="store_true", help="what brought you here")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="elements of a row")
    parser.add_argument("--rounds", type=int, default=20, help="times that each is timed")
    parser.add_argument("--seconds", type=float, help="end by then")
    chosen = parser.parse_args(arguments)
    print("Bytes a second as a share of a copy's: forward / gradient.")
    limit = Limit(chosen.seconds)
    for width in map(int, chosen.widths.split(",")):
        try:
            bench(width, chosen.rounds, limit)
        except Exception as error:
            print(f"{width:>7}  {reason(error)}", flush=True)


if __name__ == "__main__":
    main()
