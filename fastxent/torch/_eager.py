"""The autograd node of eager mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxent.torch._calls import NONE, SUM, Known, Options, check_memory, gradient_like, known_loss, value, value_and_grad
from fastxent.torch._formula import differentiable_backward

# What the node is asked for; one argument, since each costs autograd a check. Only the logits are differentiated here.
Call = tuple[Tensor, Tensor | None, Tensor | None, Options, bool, Known | None]


class _Eager(torch.autograd.Function):
    """The node of eager mode. Its gradient is no saved tensor: it is made here, and handed over by the first backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: Call) -> Tensor:
        target, weight, sample_weight, options, inplace, known = call
        ctx.set_materialize_grads(False)
        ctx.options, ctx.inplace, ctx.grad = options, inplace, None
        if options.reduction == NONE:
            ctx.save_for_backward(input, target, weight, sample_weight)
            return value(input, target, weight, sample_weight, options)
        if known is not None:
            if inplace:
                ctx.grad = input.detach()
            else:
                ctx.grad = torch.empty_like(input) if known.gradient.alone else gradient_like(input)
            loss = known_loss(known.gradient, options, input, ctx.grad, target)
        else:
            out = input.detach() if inplace else None
            loss, ctx.grad = value_and_grad(input, target, weight, sample_weight, options, out)
        if inplace:
            torch.autograd.graph.increment_version(input)
        else:
            ctx.save_for_backward(input, target, weight, sample_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_output is None:
            return None, None
        if torch.is_grad_enabled() or (ctx.options.reduction == NONE and _is_batched(grad_output)):
            if ctx.inplace:
                raise RuntimeError("inplace=True has overwritten the logits: there is no double backward through it")
            return differentiable_backward(ctx.saved_tensors, ctx.options, grad_output), None
        if ctx.options.reduction == NONE:
            input, target, weight, sample_weight = ctx.saved_tensors
            check_memory(sample_weight)
            rows = grad_output if sample_weight is None else grad_output * sample_weight
            out = input.detach() if ctx.inplace else None
            _, grad = value_and_grad(input, target, weight, rows, ctx.options._replace(reduction=SUM), out)
            if ctx.inplace:
                torch.autograd.graph.increment_version(input)
            return grad, None
        grad = ctx.grad
        if grad is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the gradient was handed over by the first backward. "
                "Specify retain_graph=True there."
            )
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


# Function.apply without its look for functorch's tensors: `route` has sent those elsewhere. And the engine calls the backward
# itself, not a method that looks for it: half a microsecond of 23.
apply = super(torch.autograd.Function, _Eager).apply
_Eager._backward_cls.apply = _Eager.backward  # type: ignore[attr-defined]


def _is_batched(t: Tensor) -> bool:
    """Is it one of vmap's tensors (batched gradients: ``is_grads_batched``)?"""
    return torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)
