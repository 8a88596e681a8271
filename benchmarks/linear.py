"""The loss of a linear layer, ours and PyTorch's, against the three products that any method needs, in one interleaved run.

    python -m benchmarks.linear                                   all shapes, float32, forward and backward
    python -m benchmarks.linear --shapes 2048,256,50257 --dtypes float32 bfloat16 --mode loss --threads 1 2

A shape is rows, features, classes. The floor is the products alone, each in one piece: logits, gradient of the input, gradient
of the weight; for a loss the first of them. Ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import GRAD, LOSS
from benchmarks.measure import Effort, time_interleaved
from benchmarks.providers import Call
from fastxent.torch import cross_entropy, linear_cross_entropy

SHAPES = ((2048, 256, 50257), (4096, 768, 32000), (2048, 1024, 128256), (64, 2048, 128256))
OURS, FLOOR = "ours", "products"
EFFORT = Effort(3, 9, 60.0)


def losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Ours with several memory limits, and its peers."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        OURS: linear_cross_entropy,
        "ours, 64 MB": partial(linear_cross_entropy, memory_limit=64_000_000),
        "ours, whole logits": lambda x, w, y: cross_entropy(F.linear(x, w), y, inplace=True),
        "eager": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
    }
    if hasattr(F, "linear_cross_entropy"):  # since PyTorch 2.13
        auto = torch.nn.LinearCrossEntropyOptions()
        found["F.linear, None"] = F.linear_cross_entropy
        found["F.linear, auto"] = partial(F.linear_cross_entropy, options=auto)
    torch._dynamo.reset()
    found["compiled"] = torch.compile(found["eager"], dynamic=False, fullgraph=True)
    return found


def calls(shape: tuple[int, int, int], dtype: torch.dtype, mode: str) -> dict[str, Call]:
    n_rows, n_features, n_classes = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, n_features, generator=generator).to(dtype).requires_grad_(mode == GRAD)
    w = (torch.randn(n_classes, n_features, generator=generator) / n_features**0.5).to(dtype).requires_grad_(mode == GRAD)
    y = torch.randint(n_classes, (n_rows,), generator=generator)

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
        return torch.autograd.grad(loss(x, w, y), (x, w)) if mode == GRAD else loss(x, w, y)

    def products() -> Any:
        a, b = x.detach(), w.detach()
        logits = torch.mm(a, b.T)
        return (torch.mm(logits, b), torch.mm(logits.T, a)) if mode == GRAD else logits

    timed = {FLOOR: products} | {name: partial(step, loss) for name, loss in losses().items()}
    return {name: Call(run, lambda result: (0.0, None)) for name, run in timed.items()}


def check(timed: dict[str, Call], tolerance: float) -> None:
    """Raise an error if a method's results are not ours."""
    want = timed[OURS].run()
    for name, call in timed.items():
        if name == FLOOR:
            continue
        got = call.run()
        for a, b in zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]:
            error = (a.float() - b.float()).abs().max() / b.float().abs().max()
            if not error <= tolerance:
                raise ArithmeticError(f"{name}: differs from ours by {float(error):.1e}")


def report(shape: tuple[int, int, int], dtype: torch.dtype, mode: str, n_threads: int, leave_out: Sequence[str]) -> None:
    timed = {name: call for name, call in calls(shape, dtype, mode).items() if name not in leave_out}
    check(timed, 0.1 if dtype.itemsize == 2 else 1e-3)
    samples = {name: found for name, (_, found) in time_interleaved(timed, n_threads, EFFORT, lambda *_: None).items()}
    flops = 2 * shape[0] * shape[1] * shape[2] * (3 if mode == GRAD else 1)
    print(f"\n{shape}, {dtype}, {mode}, {n_threads} threads, {len(samples[OURS])} rounds")
    print(f"{'':20}{'ms':>9}{'GFLOP/s':>9}{'/ floor':>9}{'ours /':>9}")
    for name, found in samples.items():
        to_floor = median(a / b for a, b in zip(found, samples[FLOOR], strict=True))
        ours = median(a / b for a, b in zip(samples[OURS], found, strict=True))
        print(f"{name:20}{1e3 * median(found):9.1f}{flops / median(found) / 1e9:9.0f}{to_floor:9.3f}{ours:9.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=lambda s: tuple(map(int, s.split(","))), default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--mode", choices=(LOSS, GRAD), default=GRAD)
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="NAME")
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            for n_threads in arguments.threads:
                report(shape, getattr(torch, dtype), arguments.mode, n_threads, arguments.leave_out)


if __name__ == "__main__":
    main()
