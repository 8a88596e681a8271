"""Cases, truth, PyTorch's own answer and a counter of kernels, for the tests of `fastxent.torch`.

A module, not a conftest: the tests of the NumPy functions import theirs by that name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from conftest import make_rng, widest
from torch import Tensor

from fastxent import reference as ref
from fastxent._fastpath.cache import calls
from fastxent._runtime import run
from fastxent.torch import _calls

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["none", "mean", "sum"]

# Words that `make_case` understands: each option alone, then those that interact in the formula.
OPTIONS = [
    "index",
    "weight",
    "ignore",
    "smoothing",
    "weight ignore smoothing",
    "probabilities",
    "probabilities unnormalised",
    "probabilities weight smoothing",
]
EXTRAS = [
    "sample_weight",
    "z_loss",
    "softcap",
    "weight ignore sample_weight",
    "ignore z_loss softcap",
    "weight ignore smoothing sample_weight z_loss softcap",
    "probabilities sample_weight",
    "probabilities weight smoothing sample_weight z_loss softcap",
]

Z_LOSS, SOFTCAP = 0.01, 5.0  # a cap that bends logits of the size of ours
POISON = {True: float("nan"), False: 10**6}  # what stands around a view: is it floating?


class Case(NamedTuple):
    """Arguments of one call of `cross_entropy`, without the reduction."""

    x: Tensor
    target: Tensor
    options: dict[str, Any]

    @property
    def class_axis(self) -> int:
        return min(1, self.x.dim() - 1)

    @property
    def soft(self) -> bool:
        return self.target.shape == self.x.shape


# ----------------------------------------------------------------------------------------------------
# Cases
# ----------------------------------------------------------------------------------------------------


def tensor(a: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(np.asarray(a, np.float64)).to(dtype)


def make_case(dtype: torch.dtype, shape: tuple[int, ...], option: str = "index", size: float = 3.0) -> Case:
    """Logits of `shape` (N, C, ...) or (C,) and of `size`, a target, and what the words of `option` ask for."""
    rng, words = make_rng(str(dtype), shape, option, size), option.split()
    axis = min(1, len(shape) - 1)
    rows, classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    x = tensor(size * rng.standard_normal(shape), dtype)
    target = torch.tensor(rng.integers(0, max(classes, 1), rows))
    options: dict[str, Any] = {}
    if "weight" in words:
        options["weight"] = tensor(rng.uniform(0.5, 2, classes), dtype)
    if "ignore" in words:
        target[torch.tensor(rng.random(rows) < 0.25)] = -100
        target.view(-1)[0] = classes - 1  # not all of them
    if "smoothing" in words:
        options["label_smoothing"] = 0.1
    if "sample_weight" in words:
        options["sample_weight"] = tensor(rng.uniform(0, 2, rows), dtype)
    if "z_loss" in words:
        options["z_loss"] = Z_LOSS
    if "softcap" in words:
        options["softcap"] = SOFTCAP
    if "probabilities" in words:
        t = rng.dirichlet(np.full(classes, 0.5), rows)
        if "unnormalised" in words:  # nobody says that they must add up to 1
            t = t * rng.uniform(0, 3, (*t.shape[:-1], 1))
        target = tensor(np.moveaxis(t, -1, axis), dtype)
    return Case(x, target, options)


def channels_last(x: Tensor) -> Tensor:
    """Classes innermost: as memory_format=torch.channels_last, for any number of axes."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x


def transposed(x: Tensor) -> Tensor:
    """Axes in reverse order in memory: rows side by side, class by class."""
    return x.permute(*range(x.dim() - 1, -1, -1)).contiguous().permute(*range(x.dim() - 1, -1, -1))


def framed(x: Tensor) -> Tensor:
    """A view of a larger tensor of poison, with gaps between its rows: who reads past it is found out."""
    frame = x.new_full([n + 3 for n in x.shape], POISON[x.is_floating_point()])
    view = frame[tuple(slice(1, n + 1) for n in x.shape)]
    view.copy_(x)
    return view


def every_second(x: Tensor) -> Tensor:
    """No axis is contiguous."""
    frame = x.new_full([2 * n for n in x.shape], POISON[x.is_floating_point()])
    view = frame[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def expanded(x: Tensor) -> Tensor:
    """One row for all: its elements share memory, so a gradient must not."""
    return x[:1].expand(x.shape) if x.dim() > 1 else x


DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "transposed": transposed,
}


def is_dense(x: Tensor) -> bool:
    """Does x fill its memory without gaps or overlaps, in some order of its axes? Then a gradient can lie as x does."""
    return x.permute(sorted(range(x.dim()), key=lambda d: (-x.stride(d), -x.shape[d]))).is_contiguous()


LAYOUTS = DENSE | {"framed": framed, "every_second": every_second, "expanded": expanded}


# ----------------------------------------------------------------------------------------------------
# Truth
# ----------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """What is right, and the size of the largest term that its formula adds up (the unit of the budget)."""

    loss: np.ndarray
    grad: np.ndarray
    loss_scale: np.ndarray
    grad_scale: np.ndarray


def array(t: Tensor) -> np.ndarray:
    """The values of `t` in NumPy, bfloat16 included."""
    t = t.detach()
    return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def classes_last(case: Case) -> tuple[np.ndarray, np.ndarray]:
    x, t = widest(array(case.x)), array(case.target)
    x = np.moveaxis(x, case.class_axis, -1)
    return x, np.moveaxis(widest(t), case.class_axis, -1) if case.soft else t.reshape(x.shape[:-1])


@np.errstate(all="ignore")
def make_truth(case: Case, reduction: str) -> Truth:
    """Loss and gradient in longdouble. With y the capped logits and u the row's weight, a row's loss is

    u (-sum_c q_c logp_c + z lse^2), its gradient u (Q p - q + 2 z lse p) times dy/dx = 1 - tanh(x / cap)^2.

    Scales: as in the conftest of the NumPy functions. A cap makes logits that are rounded themselves, by an
    ulp at their size: of the loss this is an absolute error, of the probabilities a relative one.
    """
    o = {k: widest(array(v) if isinstance(v, Tensor) else v) for k, v in case.options.items()}
    z, cap = o.pop("z_loss", 0), o.pop("softcap", None)
    x, t = classes_last(case)
    slope, size = np.ones_like(x), np.ones(x.shape[:-1])
    if cap is not None:
        slope = 1 - np.tanh(x / cap) ** 2
        x = cap * np.tanh(x / cap)
        size = np.maximum(size, np.abs(x).max(-1, initial=0))
    rows = dict(weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0) | o
    r = ref._rows(x, t, -1, *rows.values())
    lse, p, u = ref.logsumexp(r.x, -1), ref.softmax(r.x, -1), r.u[..., None]
    keep, mass, divisor = r.keep[..., None], r.q.sum(-1), r.divisor if reduction == "mean" else 1
    penalty = np.where(r.keep, r.u * z * lse**2, 0) if z else np.zeros(r.u.shape)
    push = 2 * z * lse[..., None] if z else np.zeros_like(u)
    losses = ref._losses(r) + penalty
    grad = np.where(keep, (ref._gradients(r) + u * push * p) * slope, 0) / divisor
    loss_scale = np.maximum(np.maximum(np.abs(losses), penalty), r.u * mass * size)
    p_scale = p * np.maximum(size[..., None], np.abs(ref.log_softmax(r.x, -1)))
    grad_scale = u * slope * np.maximum(np.maximum(mass[..., None], np.abs(push)) * p_scale, r.q) / divisor
    last_back = (-1, case.class_axis)
    return Truth(
        ref._reduce(losses, r.divisor, reduction),
        np.moveaxis(np.where(keep, grad, 0), *last_back),
        ref._reduce(loss_scale, r.divisor, reduction),
        np.moveaxis(grad_scale, *last_back),
    )


# ----------------------------------------------------------------------------------------------------
# PyTorch's answer and ours
# ----------------------------------------------------------------------------------------------------


def torch_loss(
    x: Tensor, target: Tensor, reduction: str = "mean", *, sample_weight: Tensor | None = None, z_loss: float = 0.0,
    softcap: float | None = None, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """`F.cross_entropy`, and our extras written out in differentiable PyTorch."""
    args = dict(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if sample_weight is None and not z_loss:
        return F.cross_entropy(x, target, reduction=reduction, **args)
    soft, axis = target.shape == x.shape, min(1, x.dim() - 1)
    rows = F.cross_entropy(x, target, reduction="none", **args)
    keep = torch.ones_like(rows, dtype=torch.bool) if soft else target != ignore_index
    if z_loss:
        rows = rows + z_loss * torch.logsumexp(x, axis) ** 2 * keep
    u = torch.ones_like(rows) if sample_weight is None else sample_weight
    rows = rows * u
    if reduction == "none":
        return rows
    by_class = torch.ones_like(rows) if soft or weight is None else weight.take(target.clamp(0))
    return rows.sum() / torch.where(keep, u * by_class, 0).sum() if reduction == "mean" else rows.sum()


def at_least_float32(case: Case) -> Case:
    """The same values in the precision that the arithmetic should have: half precision is widened."""

    def up(t: Any) -> Any:
        half = isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16)
        return t.float() if half else t

    return Case(up(case.x), up(case.target), {k: up(v) for k, v in case.options.items()})


def loss_and_grad(function: Callable[..., Tensor], case: Case, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss and, of the sum of the losses, the gradient, as autograd gives it (not as `.grad` stores it)."""
    x = case.x.detach().requires_grad_()
    loss = function(x, case.target, reduction=reduction, **case.options)
    assert loss.requires_grad
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


def run_torch(case: Case, reduction: str) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch's loss and gradient: for half precision computed in float32 and rounded once.

    PyTorch in half precision is no opponent: it keeps log-probabilities and sums in half, so its errors would
    excuse any of ours.
    """
    loss, grad = loss_and_grad(torch_loss, at_least_float32(case), reduction)
    return array(loss.to(case.x.dtype)), array(grad.to(case.x.dtype))


class Same(torch.autograd.Function):
    """The same memory as a computed tensor, which may be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


def one_torch_thread() -> Iterator[None]:
    """A fixture for each module: for arrays as small as ours threads cost PyTorch 10 x what they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------
# What ran
# ----------------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels that run inside, in order."""
    names: list[str] = []
    run_task, ready = run.run, _calls._ready

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return run_task(name, *args, **kwargs)

    def counting_ready(task: run.PackedTask, *rest: Any) -> Any:
        known = ready(task, *rest)

        def call(*args: Any) -> Any:
            done = known(*args)
            if done >= 0:  # else no kernel ran
                names.append(task.name)
            return done

        return call

    with (
        patch.object(run, "run", counting),
        patch.object(_calls, "_ready", counting_ready),
    ):
        calls.clear()
        try:
            yield names
        finally:
            calls.clear()


def run_script(code: str, *arguments: str, timeout: float = 300, **environment: str) -> str:
    """What `code` prints, run by a Python of its own; an assertion that shows its errors if it fails or crashes."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout.strip()
