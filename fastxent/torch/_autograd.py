"""The autograd node of eager mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import DisableTorchFunctionSubclass, _is_tracing, _len_torch_dispatch_stack
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.autograd import forward_ad

from fastxent.torch._bridge import NONE, SUM, Options, check_memory, check_operands, value_and_grad
from fastxent.torch._decomposition import differentiable_backward
from fastxent.torch._operators import gradient_of_rows
from fastxent.torch._watched import is_seen_by_a_mode

# What a node holds besides tensors: the options, whether the gradient has overwritten the logits, the stored call or None.
NodeState = tuple[Options, bool, Any]


class _Eager(torch.autograd.Function):
    """The node of eager mode. Its gradient is not a saved tensor: the first backward hands it over."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, made: tuple[Tensor, Tensor | None, tuple[Tensor | None, ...], NodeState]) -> Tensor:
        """Return the loss; only the logits are differentiated.

        ``made``: the loss, its gradient (None for reduction none), the tensors to save, and `NodeState`. They are one argument,
        since autograd checks each argument, which takes time.
        """
        loss, ctx.grad, ctx.to_save, ctx.state = made
        ctx.materialize_grads = False
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        grad = ctx.grad
        if grad is None or grad_output is None or is_grad_enabled():
            return _backward(ctx, grad_output), None
        ours = not _get_current_graph_task_keep_graph()
        if ours:
            ctx.grad = None
        if _len_torch_dispatch_stack() > 0 or _is_tracing() or type(grad_output) is not Tensor or is_dual(grad_output):
            return _times(grad, grad_output), None  # its value must not be read
        try:
            factor = grad_output.item()
        except RuntimeError:  # perhaps a wrapper tensor, which has no value; tested only now, since it is rare
            if not (stands_for_others(grad_output) or is_seen_by_a_mode()):
                raise
            return _times(grad, grad_output), None
        if factor == 1.0:  # if another backward needs grad, it must not become a .grad, which is accumulated in place
            return (grad if ours else grad.clone()), None
        options, inplace, _ = ctx.state
        if grad.element_size() == 2 and not inplace:
            # Half precision: the gradient has been rounded once, perhaps to 0, so it is computed again instead of scaled.
            input, target, weight, sample_weight = _saved(ctx)
            check_operands(input, target, weight, sample_weight)
            out = grad if ours else None
            return value_and_grad(input, target, weight, sample_weight, options, out, factor)[1], None
        return (grad.mul_(factor) if ours else grad * factor), None


def _backward(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
    """Return a gradient that the forward has not computed: for reduction none, or one to be differentiated again."""
    if grad_output is None:
        return None
    options, inplace, call = ctx.state
    if is_grad_enabled():
        return _differentiable(ctx, grad_output)
    if options.reduction != NONE:
        raise RuntimeError(
            "Trying to backward through the graph a second time: the gradient was handed over by the first backward. "
            "Specify retain_graph=True there."
        )
    saved = input, target, weight, _ = _saved(ctx)
    watched = type(grad_output) is not Tensor or is_seen_by_a_mode() or is_dual(grad_output)
    out = input.detach() if inplace else None
    grad = None if call is None or watched else call.gradient_of_rows(input, target, weight, grad_output, out)
    if grad is None:
        if stands_for_others(grad_output) or is_dual(grad_output):
            return _differentiable(ctx, grad_output)
        if watched or torch._is_functional_tensor(grad_output):
            with DisableTorchFunctionSubclass():
                return gradient_of_rows(saved, options, grad_output)
        grad = _new_gradient_of_rows(saved, options, grad_output, out)
    if inplace:
        torch.autograd.graph.increment_version(input)
    return grad


def _new_gradient_of_rows(saved: list[Any], options: Options, grad_output: Tensor, out: Tensor | None) -> Tensor:
    """Return the gradient of reduction none for a call that is not stored."""
    input, target, weight, sample_weight = saved
    if grad_output._is_zerotensor():  # a zero tensor has no memory
        grad_output = torch.zeros(grad_output.shape, dtype=grad_output.dtype, device="cpu")
    elif grad_output.layout != torch.strided:
        grad_output = grad_output.to_dense()
    check_operands(input, target, weight, grad_output if sample_weight is None else sample_weight)
    check_memory(grad_output, sample_weight)
    rows = grad_output if sample_weight is None else grad_output * sample_weight
    return value_and_grad(input, target, weight, rows, options._replace(reduction=SUM), out)[1]


def _differentiable(ctx: Any, grad_output: Tensor) -> Tensor:
    options, inplace, _ = ctx.state
    if inplace:
        raise RuntimeError("inplace=True has overwritten the logits: there is no double backward through it")
    return differentiable_backward(_saved(ctx), options, grad_output)


# The class of the nodes in the graph: the engine calls `_Eager.backward` directly, without PyTorch's method that looks it up,
# and slots save a dict.
_Eager._backward_cls = type(
    "CrossEntropyBackward", (_Eager._backward_cls,), {"__slots__": ("grad", "state"), "apply": _Eager.backward}
)
# Function.apply without its test for functorch's tensors: `route` has sent those elsewhere.
apply = super(torch.autograd.Function, _Eager).apply


def attach(input: Tensor, loss: Tensor, grad: Tensor | None, others: tuple[Tensor | None, ...], kept: NodeState) -> Tensor:
    """Return the loss with its node. ``grad``: None for reduction none; ``others``: target, weight, sample weights."""
    if grad is not None and kept[1]:
        torch.autograd.graph.increment_version(input)
        return apply(input, (loss, grad, (), kept))
    return apply(input, (loss, grad, (input, *others), kept))


def _saved(ctx: Any) -> list[Any]:
    """Return the logits, target, weight and sample weights."""
    saved = ctx.saved_tensors
    return [*saved, *[None] * (4 - len(saved))]


def _times(grad: Tensor, grad_output: Tensor) -> Tensor:
    with DisableTorchFunctionSubclass():  # as in PyTorch's own backward
        return (grad * grad_output).to(grad.dtype)


def is_dual(t: Tensor) -> bool:
    """Return whether a tensor has a tangent of forward-mode AD."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def stands_for_others(t: Tensor) -> bool:
    """Return whether a tensor is a wrapper of ``torch.func``, such as vmap's (batched gradients: ``is_grads_batched``)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)
