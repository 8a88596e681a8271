"""The autograd node of eager mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxent.torch._calls import NONE, SUM, Options, check_memory, value, value_and_grad
from fastxent.torch._formula import differentiable_backward

# What the node is made of, the loss and its gradient (None for reduction none) first, a call that is known last; one argument,
# since each costs autograd a check. Only the logits are differentiated here.
Made = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Options, bool, Any]


class _Eager(torch.autograd.Function):
    """The node of eager mode. Its gradient is no saved tensor: the first backward hands it over."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, made: Made) -> Tensor:
        loss, ctx.grad, target, weight, sample_weight, ctx.options, ctx.inplace, ctx.known = made
        ctx.set_materialize_grads(False)
        if ctx.inplace and ctx.grad is not None:
            torch.autograd.graph.increment_version(input)
        else:
            ctx.save_for_backward(input, target, weight, sample_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        grad = ctx.grad
        if grad is None or grad_output is None or torch.is_grad_enabled():
            return _backward(ctx, grad_output), None
        try:
            factor = grad_output.item()
        except RuntimeError:  # asked afterwards, for it is rare: is this one of vmap's tensors (batched gradients)?
            if not _is_batched(grad_output):
                raise
            return grad * grad_output, None
        ours = not torch._C._autograd._get_current_graph_task_keep_graph()
        if ours:
            ctx.grad = None
        if factor == 1.0:  # kept for another backward, it must not become somebody's .grad, which is added to in place
            return (grad if ours else grad.clone()), None
        if grad.element_size() == 2 and not ctx.inplace:
            # Half precision: a gradient that has been rounded once, perhaps to 0, cannot be scaled up any more.
            input, target, weight, sample_weight = ctx.saved_tensors
            out = grad if ours else None
            return value_and_grad(input, target, weight, sample_weight, ctx.options, out, factor)[1], None
        return (grad.mul_(factor) if ours else grad * factor), None


def _backward(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
    """What the forward has not prepared: gradients of reduction none, and those that are to be differentiated again."""
    reduced = ctx.options.reduction != NONE
    if grad_output is None:
        return None
    if torch.is_grad_enabled() or (not reduced and _is_batched(grad_output)):
        if ctx.inplace:
            raise RuntimeError("inplace=True has overwritten the logits: there is no double backward through it")
        return differentiable_backward(ctx.saved_tensors, ctx.options, grad_output)
    if reduced:
        raise RuntimeError(
            "Trying to backward through the graph a second time: the gradient was handed over by the first backward. "
            "Specify retain_graph=True there."
        )
    input, target, weight, sample_weight = ctx.saved_tensors
    check_memory(sample_weight)
    if grad_output._is_zerotensor():  # it has no memory
        grad_output = torch.zeros(grad_output.shape, dtype=grad_output.dtype, device="cpu")
    out = input.detach() if ctx.inplace else None
    grad = None if ctx.known is None else ctx.known.gradient_of_rows(input, target, weight, grad_output, out)
    if grad is None:
        rows = grad_output if sample_weight is None else grad_output * sample_weight
        _, grad = value_and_grad(input, target, weight, rows, ctx.options._replace(reduction=SUM), out)
    if ctx.inplace:
        torch.autograd.graph.increment_version(input)
    return grad


# Function.apply without its look for functorch's tensors: `route` has sent those elsewhere. And the engine calls the backward
# itself, not a method that looks for it: half a microsecond of 23.
apply = super(torch.autograd.Function, _Eager).apply
_Eager._backward_cls.apply = _Eager.backward  # type: ignore[attr-defined]


def attach(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options, inplace: bool
) -> Tensor:
    """The loss, with its node."""
    grad = None
    if options.reduction == NONE:
        loss = value(input, target, weight, sample_weight, options)
    else:
        loss, grad = value_and_grad(input, target, weight, sample_weight, options, input.detach() if inplace else None)
    return apply(input, (loss, grad, target, weight, sample_weight, options, inplace, None))


def _is_batched(t: Tensor) -> bool:
    """Is it one of vmap's tensors (batched gradients: ``is_grads_batched``)?"""
    return torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)
