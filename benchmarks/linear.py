"""The loss of a linear layer against the products that any method needs, and against its peers, in one interleaved run.

    python -m benchmarks.linear                                  all shapes, float32, loss and gradients, by PyTorch
    python -m benchmarks.linear --side numpy --shapes 2048,256,50257 --mode loss --threads 1 2
    python -m benchmarks.linear --side numpy torch --dtypes float32 bfloat16 --leave-out torch.compile

A shape is rows, features, classes. The floor of a side is its products alone, each in one piece: the logits, the gradient of
the input, the gradient of the weight; for a loss the first of them. NumPy's are written to warm arrays, and are those of
float32 in half precision, of which NumPy has none. Ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastxent as fx
from benchmarks.cases import GRAD, LOSS, Array, numpy_dtype
from benchmarks.measure import Effort, Group, Progress, entry, group, ratio, spread, threads, time_interleaved
from benchmarks.providers import Call

Shape = tuple[int, int, int]

SHAPES: tuple[Shape, ...] = ((2048, 256, 50257), (4096, 768, 32000), (2048, 1024, 128256), (64, 2048, 128256))
SHAPE = SHAPES[0]  # that of the bars and of the report
LIMIT = 64_000_000  # bytes: the memory_limit that is measured beside the default
EFFORT = Effort(3, 9, 60.0)
NUMPY, TORCH = "fastxent NumPy", "fastxent torch"
LIMITED, WHOLE = ", 64 MB", ", whole logits"
NUMPY_FLOOR, TORCH_FLOOR = "products of NumPy", "products of PyTorch"
EAGER, COMPILED = "PyTorch eager", "torch.compile"
CHUNKED, UNCHUNKED = "F.linear_cross_entropy, auto chunks", "F.linear_cross_entropy"
PEERS = (EAGER, COMPILED, UNCHUNKED, CHUNKED)


class Contestant(NamedTuple):
    """Someone who computes the loss, or the loss and the gradients of input and weight."""

    kind: str  # "ours", "peer" or "floor"
    run: Callable[[], Sequence[Any]]
    floor: str = ""


class Problem(NamedTuple):
    """Seeded arrays. The logits are about 1 in size."""

    x: Array  # (rows, features)
    w: Array  # (classes, features)
    y: Array  # (rows,)
    mode: str


def problem(shape: Shape, dtype: str, mode: str) -> Problem:
    n_rows, n_features, n_classes = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n_rows, n_features), np.float32)
    w = rng.standard_normal((n_classes, n_features), np.float32) / np.float32(n_features**0.5)
    return Problem(x.astype(numpy_dtype(dtype)), w.astype(numpy_dtype(dtype)), rng.integers(0, n_classes, n_rows), mode)


# ----------------------------------------------------------------------------------------------------
# The two sides
# ----------------------------------------------------------------------------------------------------


def by_numpy(p: Problem) -> dict[str, Contestant]:
    wide = np.result_type(p.x.dtype, np.float32)
    x, w = p.x.astype(wide), p.w.astype(wide)
    logits, dx, dw = np.zeros((len(x), len(w)), wide), np.zeros_like(x), np.zeros_like(w)

    def products() -> Sequence[Any]:
        np.matmul(x, w.T, out=logits)
        if p.mode == GRAD:
            np.matmul(logits, w, out=dx)
            np.matmul(logits.T, x, out=dw)
        return ()

    def ours(limit: int | None) -> Sequence[Any]:
        if p.mode == LOSS:
            return (fx.linear_cross_entropy(p.x, p.w, p.y, memory_limit=limit),)
        loss, gradients = fx.linear_cross_entropy_value_and_grad(p.x, p.w, p.y, memory_limit=limit)
        return loss, gradients.input, gradients.linear_weight

    limits = {NUMPY: None, NUMPY + LIMITED: LIMIT, NUMPY + WHOLE: sys.maxsize}
    found = {name: Contestant("ours", partial(ours, limit), NUMPY_FLOOR) for name, limit in limits.items()}
    return found | {NUMPY_FLOOR: Contestant("floor", products)}


def by_torch(p: Problem) -> dict[str, Contestant]:
    import torch
    from torch.nn import functional as F

    from benchmarks.providers import _tensor
    from fastxent.torch import cross_entropy, linear_cross_entropy

    x, w, y = (_tensor(a) for a in p[:3])
    for leaf in (x, w):
        leaf.requires_grad_(p.mode == GRAD)

    def products() -> Sequence[Any]:
        a, b = x.detach(), w.detach()
        logits = torch.mm(a, b.T)
        return (torch.mm(logits, b), torch.mm(logits.T, a)) if p.mode == GRAD else (logits,)

    def step(loss_of: Callable[..., Any]) -> Sequence[Any]:
        loss = loss_of(x, w, y)
        return (loss, *torch.autograd.grad(loss, (x, w))) if p.mode == GRAD else (loss,)

    def eager(x: Any, w: Any, y: Any) -> Any:
        return F.cross_entropy(F.linear(x, w), y)

    torch._dynamo.reset()
    ours: dict[str, Callable[..., Any]] = {
        TORCH: linear_cross_entropy,
        TORCH + LIMITED: partial(linear_cross_entropy, memory_limit=LIMIT),
        TORCH + WHOLE: lambda x, w, y: cross_entropy(F.linear(x, w), y, inplace=p.mode == GRAD),
    }
    peers: dict[str, Callable[..., Any]] = {EAGER: eager, COMPILED: torch.compile(eager, dynamic=False, fullgraph=True)}
    if hasattr(F, "linear_cross_entropy"):  # since PyTorch 2.13
        peers[UNCHUNKED] = F.linear_cross_entropy
        peers[CHUNKED] = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
    found = {name: Contestant("ours", partial(step, loss), TORCH_FLOOR) for name, loss in ours.items()}
    found |= {name: Contestant("peer", partial(step, loss), TORCH_FLOOR) for name, loss in peers.items()}
    return found | {TORCH_FLOOR: Contestant("floor", products)}


SIDES = {"numpy": by_numpy, "torch": by_torch}


@contextmanager
def all_threads(n: int) -> Iterator[None]:
    """Threads for fastxent, for PyTorch and for NumPy's BLAS."""
    from threadpoolctl import threadpool_limits  # scikit-learn, which is measured too, brings it along

    with threads(n), threadpool_limits(n, user_api="blas"):
        yield


# ----------------------------------------------------------------------------------------------------
# A group
# ----------------------------------------------------------------------------------------------------


def key_of(shape: Shape, dtype: str, mode: str) -> str:
    return f"linear {' x '.join(map(str, shape))} {dtype} {mode}"


def run_group(
    shape: Shape,
    dtype: str,
    mode: str,
    n_threads: int,
    *,
    sides: Sequence[str] = tuple(SIDES),
    leave_out: Mapping[str, str] | Collection[str] = (),
    effort: Effort = EFFORT,
    progress: Progress = lambda text, share=0.0: None,
) -> Group:
    """Check and time the contestants; ``missing`` says why one is not timed, as in `benchmarks.measure`."""
    progress("inputs")
    contestants, missing = checked(problem(shape, dtype, mode), sides, leave_out, progress)
    calls = {name: Call(contestant.run, lambda result: (0.0, None)) for name, contestant in contestants.items()}
    with all_threads(n_threads):
        timed = time_interleaved(calls, n_threads, effort, progress)
    entries = [
        entry(name, contestants[name].kind, samples, number=number, floor=contestants[name].floor)
        for name, (number, samples) in timed.items()
    ]
    title = f"linear layer and loss: {' x '.join(map(str, shape))}, {dtype}, {mode}, {n_threads} threads"
    return group(key_of(shape, dtype, mode), title, "rows x features x classes; the logits are not given", entries, missing)


def checked(
    p: Problem, sides: Sequence[str], leave_out: Collection[str], progress: Progress
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants whose results are those of our first one, and why the others are not among them."""
    contestants: dict[str, Contestant] = {}
    missing = dict.fromkeys(leave_out, "left out")
    for side in sides:
        try:
            contestants |= {name: c for name, c in SIDES[side](p).items() if name not in missing}
        except Exception as error:  # PyTorch, or fastxent's function, is not there
            missing[side] = f"{type(error).__name__}: {error}"
    want: Sequence[Array] | None = None
    for name, contestant in list(contestants.items()):
        progress(f"checking {name}")
        try:
            found = [] if contestant.kind == "floor" else [_numbers(a) for a in contestant.run()]
        except Exception as error:  # a peer that fails is no reason not to time the others
            reason = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            want = want or found
            reason = difference(found, want, 0.1 if p.x.itemsize == 2 else 1e-3) if found else ""
        if reason:
            missing[name] = reason
            del contestants[name]
    return contestants, missing


def difference(found: Sequence[Array], want: Sequence[Array], tolerance: float) -> str:
    """What is wrong with some results, or nothing."""
    for name, a, b in zip(("loss", "gradient of the input", "gradient of the weight"), found, want, strict=False):
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error <= tolerance:
            return f"WRONG: the {name} differs from ours by {error:.1e}"
    return ""


def _numbers(a: Any) -> Array:
    return np.asarray(a.detach().float() if hasattr(a, "detach") else a).astype(np.float32)


# ----------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------


def lines(found: Group, flops: float) -> Iterator[str]:
    """A table of a group: each by its floor, and ours of the same side by each."""
    samples = {e["name"]: e["samples"] for e in found["entries"]}
    yield f"\n{found['title']}, {len(next(iter(samples.values()), ()))} rounds"
    yield f"{'':36}{'ms':>9}{'GFLOP/s':>9}{'/ floor':>9}{'ours /':>9}"
    for e in found["entries"]:
        median, floor = spread(e["samples"]).median, e["floor"] or e["name"]
        ours = NUMPY if floor == NUMPY_FLOOR else TORCH
        ratios = (
            f"{ratio(samples[a], samples[b]).median:9.3f}" if {a, b} <= set(samples) else f"{'-':>9}"
            for a, b in ((e["name"], floor), (ours, e["name"]))
        )
        yield f"{e['name']:36}{1e3 * median:9.1f}{flops / median / 1e9:9.0f}{''.join(ratios)}"
    for name, reason in found["missing"].items():
        yield f"  missing: {name}: {reason}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", nargs="+", choices=tuple(SIDES), default=["torch"])
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="N,D,C")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--mode", choices=(LOSS, GRAD), default=GRAD)
    parser.add_argument("--threads", nargs="+", type=int, default=[fx.get_num_threads()])
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="NAME")
    args = parser.parse_args(argv)
    wrong = False
    for shape in args.shapes:
        flops = 2.0 * shape[0] * shape[1] * shape[2] * (3 if args.mode == GRAD else 1)
        for dtype in args.dtypes:
            for n_threads in args.threads:
                found = run_group(shape, dtype, args.mode, n_threads, sides=args.side, leave_out=args.leave_out, effort=EFFORT)
                print("\n".join(lines(found, flops)), flush=True)
                wrong |= any(reason.startswith(("WRONG", "failed")) for reason in found["missing"].values())
    return int(wrong)


def _shape(text: str) -> Shape:
    n_rows, n_features, n_classes = map(int, text.split(","))
    return n_rows, n_features, n_classes


if __name__ == "__main__":
    sys.exit(main())
