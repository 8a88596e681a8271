"""The cases of `tests.helpers.cases` in tensors, and back: classes on PyTorch's axis, memory in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from tests.helpers import cases, truth
from tests.helpers.cases import Case, make_rng

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

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

POISON = {True: float("nan"), False: 10**6}  # what stands around a view: is it floating?


def class_axis(x: Tensor) -> int:
    return min(1, x.dim() - 1)


def array(t: Tensor) -> np.ndarray:
    """The values of `t` in NumPy, bfloat16 included."""
    t = t.detach()
    return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def tensor(a: np.ndarray) -> Tensor:
    """The values of `a` in PyTorch, bfloat16 included."""
    bits = a.dtype == ml_dtypes.bfloat16
    return torch.tensor(a.view(np.int16)).view(torch.bfloat16) if bits else torch.tensor(a)


def as_tensors(case: Case) -> Case:
    """The classes, last in an array, are on PyTorch's axis; the memory is in the same order."""
    x, target = tensor(case.logits), tensor(case.target)
    target = target.movedim(-1, class_axis(x)) if case.soft else target
    options = {k: tensor(v) if isinstance(v, np.ndarray) else v for k, v in case.options.items()}
    return Case(x.movedim(-1, class_axis(x)), target, options)


def as_arrays(case: Case) -> Case:
    """The classes are on the last axis."""
    x, target = np.moveaxis(array(case.logits), class_axis(case.logits), -1), array(case.target)
    target = np.moveaxis(target, class_axis(case.logits), -1) if case.soft else target.reshape(x.shape[:-1])
    return Case(x, target, {k: array(v) if isinstance(v, Tensor) else v for k, v in case.options.items()})


def convert(case: Case, dtype: Callable[[Tensor], torch.dtype]) -> Case:
    """Every floating tensor in the dtype that `dtype` says for it."""

    def to(t: Any) -> Any:
        return t.to(dtype(t)) if isinstance(t, Tensor) and t.is_floating_point() else t

    return Case(to(case.logits), to(case.target), {k: to(v) for k, v in case.options.items()})


def make_case(dtype: torch.dtype, shape: tuple[int, ...], option: str = "index", size: float = 3.0) -> Case:
    """Logits of `shape` (N, C, ...) or (C,), contiguous, and all that floats in `dtype`. Not all rows are ignored."""
    rng, words = make_rng(str(dtype), shape, option, size), option.split()
    axis = min(1, len(shape) - 1)
    rows, classes = shape[:axis] + shape[axis + 1 :], shape[axis]

    def floats(a: Any) -> Tensor:
        return torch.tensor(np.asarray(a, np.float64)).to(dtype)

    x = floats(size * rng.standard_normal(shape))
    target = torch.tensor(rng.integers(0, max(classes, 1), rows))
    options: dict[str, Any] = {}
    if "weight" in words:
        options["weight"] = floats(rng.uniform(0.5, 2, classes))
    if "ignore" in words:
        target[torch.tensor(rng.random(rows) < 0.25)] = -100
        target.view(-1)[0] = classes - 1
    if "smoothing" in words:
        options["label_smoothing"] = 0.1
    if "sample_weight" in words:
        options["sample_weight"] = floats(rng.uniform(0, 2, rows))
    if "z_loss" in words:
        options["z_loss"] = cases.Z_LOSS
    if "softcap" in words:
        options["softcap"] = cases.SOFTCAP
    if "probabilities" in words:
        t = rng.dirichlet(np.full(classes, 0.5), rows)
        if "unnormalised" in words:  # nobody says that they must add up to 1
            t = t * rng.uniform(0, 3, (*t.shape[:-1], 1))
        target = floats(np.moveaxis(t, -1, axis))
    return Case(x, target, options)


def make_truth(case: Case, reduction: str) -> truth.Truth:
    """As of arrays; the classes of the gradient are where those of the logits are."""
    right = truth.make_truth(as_arrays(case), reduction)
    grad, scale = (np.moveaxis(a, -1, class_axis(case.logits)) for a in (right.grad, right.grad_scale))
    return right._replace(grad=grad, grad_scale=scale)


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
