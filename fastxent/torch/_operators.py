"""The operators ``torch.ops.fastxent``, which tracers see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastxent._runtime.options import schema
from fastxent.torch._bridge import NONE, STORAGE, SUM, Options, check_operands, value, value_and_grad
from fastxent.torch._decomposition import decomposition, differentiable_backward

_ARGUMENTS = f"Tensor input, Tensor target, {schema('weight', 'sample_weight', *Options._fields)}"


def _of_nothing(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options) -> Tensor:
    """Return the loss of logits without rows or without classes."""
    loss = decomposition(input, target, weight, sample_weight, options)
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


def _value_impl(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, *options: Any) -> Tensor:
    check_operands(input, target, weight, sample_weight)
    if input.numel() == 0:
        return _of_nothing(input, target, weight, sample_weight, Options(*options))
    return value(input, target, weight, sample_weight, Options(*options))


def _value_and_grad_impl(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    check_operands(input, target, weight, sample_weight)
    if input.numel() == 0:
        return _of_nothing(input, target, weight, sample_weight, Options(*options)), torch.empty_like(input)
    return value_and_grad(input, target, weight, sample_weight, Options(*options))


def value_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, reduction: int, *_: Any
) -> Tensor:
    for other in (target, weight, sample_weight):
        if other is not None and other.device != input.device:
            raise RuntimeError(f"Expected all tensors to be on the same device, got {input.device} and {other.device}")
    dim = 0 if input.dim() == 1 else 1
    rows = (*input.shape[:dim], *input.shape[dim + 1 :]) if reduction == NONE else ()
    dtype = torch.promote_types(input.dtype, torch.float32)
    if target.dtype in STORAGE:
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return input.new_empty(rows, dtype=dtype)


def _value_and_grad_fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return value_fake(input, *arguments), torch.empty_like(input)


def _operator_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    """Save what the backward of either operator needs; the second one has computed the gradient already."""
    *tensors, ctx.options = *inputs[:4], Options(*inputs[4:])
    grad = None
    if isinstance(output, tuple):
        _, grad = output
        ctx.mark_non_differentiable(grad)
    ctx.save_for_backward(*tensors, grad)


def gradient_of_rows(tensors: Sequence[Any], options: Options, grad_output: Tensor) -> Tensor:
    """Return the gradient of reduction none, from ``grad_output`` for each row."""
    input, target, weight, sample_weight = tensors
    rows = grad_output if sample_weight is None else grad_output * sample_weight
    _, grad = value_and_grad_op(input, target, weight, rows, *options._replace(reduction=SUM))
    made: Tensor = grad
    return made


def _operator_backward(ctx: Any, grad_output: Tensor, _: None = None) -> tuple[Tensor | None, ...]:
    *tensors, grad = ctx.saved_tensors
    none = (None,) * (3 + len(ctx.options))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return differentiable_backward(tensors, ctx.options, grad_output), *none
    if ctx.options.reduction == NONE:
        return gradient_of_rows(tensors, ctx.options, grad_output), *none
    if grad is None:
        _, grad = value_and_grad_op(*tensors, *ctx.options)
    return (grad * grad_output).to(grad.dtype), *none


torch.library.define("fastxent::cross_entropy", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("fastxent::cross_entropy_value_and_grad", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.impl("fastxent::cross_entropy", "CPU", _value_impl)
torch.library.impl("fastxent::cross_entropy_value_and_grad", "CPU", _value_and_grad_impl)
torch.library.register_fake("fastxent::cross_entropy", value_fake)
torch.library.register_fake("fastxent::cross_entropy_value_and_grad", _value_and_grad_fake)
for _operator in ("fastxent::cross_entropy", "fastxent::cross_entropy_value_and_grad"):
    torch.library.register_autograd(_operator, _operator_backward, setup_context=_operator_context)
value_op = torch.ops.fastxent.cross_entropy
value_and_grad_op = torch.ops.fastxent.cross_entropy_value_and_grad
