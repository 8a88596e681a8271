"""The loss in PyTorch's operators: for what must be differentiated further, and for what the kernels do not take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastxent.torch._bridge import MEAN, NONE, STORAGE, SUM, Options, as_int64

library: torch.library.Library | None = None  # `install`'s registration in PyTorch's dispatcher


def aten_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Return PyTorch's own cross-entropy, even while `install` has replaced it by ours."""
    op = torch.ops.aten.cross_entropy_loss.default
    arguments = (input, target, weight, options.reduction, options.ignore_index, options.label_smoothing)
    return op(*arguments) if library is None else op.decompose(*arguments)


def decomposition(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options
) -> Tensor:
    """Return the loss as an expression of differentiable operators, in float32 at least."""
    dim = 0 if input.dim() == 1 else 1
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    w = None if weight is None else weight.to(torch.promote_types(weight.dtype, torch.float32))
    if options.softcap:
        x = options.softcap * torch.tanh(x / options.softcap)
    kept = None
    if target.dtype not in STORAGE:
        target = as_int64(target)
        kept = target != options.ignore_index
        x = torch.where(kept.unsqueeze(dim), x, 0.0)  # an ignored row's nan or inf must not reach its gradient
    loss = aten_cross_entropy(x, target, w, options._replace(reduction=NONE))
    if options.z_loss:
        z_loss = options.z_loss * torch.logsumexp(x, dim).square()
        loss = loss + (z_loss if kept is None else torch.where(kept, z_loss, 0.0))
    if sample_weight is not None:
        loss = loss * sample_weight
    if options.reduction == MEAN:
        counted = torch.ones_like(loss) if sample_weight is None else sample_weight
        if kept is not None:
            if w is not None:
                classes = torch.where(kept, target, 0).unsqueeze(0)  # vmap would have to read the value of a 0-d index
                counted = counted * w[classes].squeeze(0)
            counted = torch.where(kept, counted, 0.0)
        loss = loss.sum() / counted.sum()
    elif options.reduction == SUM:
        loss = loss.sum()
    return loss.to(loss_dtype(input, target, weight))


def differentiable_backward(tensors: Sequence[Tensor], options: Options, grad_output: Tensor) -> Tensor:
    """Return the gradient as a function of logits and grad_output that can be differentiated again."""
    input, target, weight, sample_weight = tensors
    return differentiable_gradient(
        lambda: (decomposition(input, target, weight, sample_weight, options),), input, (grad_output,)
    )


def differentiable_gradient(compute: Callable[[], Sequence[Tensor]], input: Tensor, grad_outputs: Sequence[Tensor]) -> Tensor:
    """Return the gradient of what ``compute`` gives, such that it can be differentiated again, along tangents too."""
    return differentiable_gradients(compute, [input], grad_outputs)[0]


def differentiable_gradients(
    compute: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients with respect to several tensors, as `differentiable_gradient` does for one."""
    again = torch.is_grad_enabled()  # if not, the gradient has at most a tangent: it must not hold a graph
    with torch.enable_grad():
        results = [result.to(g.dtype) for result, g in zip(compute(), grad_outputs, strict=True)]
        return torch.autograd.grad(results, inputs, grad_outputs, create_graph=again)


def loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """Return PyTorch's dtype of the loss.

    It is that of the logits, promoted with that of class probabilities and of their weights; under autocast at least float32.
    """
    dtype = input.dtype
    if target.dtype in STORAGE:
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype
