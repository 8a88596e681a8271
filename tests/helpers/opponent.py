"""PyTorch's answer: the opponent of the error budget, for arrays and for tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.cases import Case
from tests.helpers.torch_cases import array, as_tensors, class_axis, convert


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For arrays as small as ours, threads cost PyTorch 10 x what they bring; the setting is everybody's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    return convert(case, lambda t: torch.promote_types(t.dtype, torch.float32))


def loss_and_grad(function: Callable[..., Tensor], case: Case, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss and, of the sum of the losses, the gradient, as autograd gives it (not as `.grad` stores it)."""
    x = case.logits.detach().requires_grad_()
    loss = function(x, case.target, reduction=reduction, **case.options)
    assert loss.requires_grad
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


@one_torch_thread()
def run_torch(case: Case, reduction: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss, in the dtype of the arithmetic, and gradient of a case of arrays.

    Half precision is computed in float32, on the same values, and the gradient is then rounded once. PyTorch in half
    precision is no opponent: it keeps the log-probabilities and the sum of the losses in half (the mean is inf once
    the sum passes 65504), so its errors would excuse any of ours.
    """
    tensors = at_least_float32(as_tensors(case))
    loss, grad = loss_and_grad(torch_loss, tensors, reduction)
    return array(loss)[()], np.moveaxis(array(grad), class_axis(grad), -1).astype(case.logits.dtype)


def run_torch_tensors(case: Case, reduction: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of a case of tensors; the loss too is rounded to the dtype of the logits."""
    loss, grad = loss_and_grad(torch_loss, at_least_float32(case), reduction)
    return array(loss.to(case.logits.dtype)), array(grad.to(case.logits.dtype))


class Same(torch.autograd.Function):
    """The same memory as a computed tensor, which may be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g
