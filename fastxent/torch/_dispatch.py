"""Who computes a call: the kernels (eagerly, or through an operator), the formula, or PyTorch itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastxent.torch._autograd import attach
from fastxent.torch._bridge import INTEGERS, NONE, STORAGE, Options, as_int64, may_be_overwritten, misfit, value, value_and_grad
from fastxent.torch._decomposition import formula, loss_dtype, stock
from fastxent.torch._fastpath import store
from fastxent.torch._operators import value_and_grad_op, value_op
from fastxent.torch._watched import is_traced, is_watched, stands_for_another


def route(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, numbers: tuple[Any, ...], inplace: bool
) -> Tensor:
    """``numbers``: those of `Options`."""
    _require_tensors(input, target, weight, sample_weight)
    options = Options(*numbers)
    if options.label_smoothing < 0.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {options.label_smoothing}")
    if is_traced() or not takes(input, target, weight, sample_weight, options):
        return _by_pytorch(input, target, weight, sample_weight, options)
    if must_be_formula(input, target, weight, sample_weight):
        return formula(input, target, weight, sample_weight, options)
    differentiate = torch.is_grad_enabled() and input.requires_grad
    if is_watched():
        if differentiate and options.reduction != NONE:
            loss, _ = value_and_grad_op(input, target, weight, sample_weight, *options)
        else:
            loss = value_op(input, target, weight, sample_weight, *options)
    elif differentiate:
        inplace = inplace and may_be_overwritten(input, target, weight, sample_weight)
        grad = None
        if options.reduction == NONE:
            loss = value(input, target, weight, sample_weight, options)
        else:
            loss, grad = value_and_grad(input, target, weight, sample_weight, options, input.detach() if inplace else None)
        loss = attach(input, loss, grad, (target, weight, sample_weight), (options, inplace, None))
    else:
        loss = value(input, target, weight, sample_weight, options)
    if sample_weight is None:
        store(input, target, weight, options)
    dtype = loss_dtype(input, target, weight)
    return loss if loss.dtype == dtype else loss.to(dtype)


def _require_tensors(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None) -> None:
    """What has a dtype and a shape need not be one: arrays of NumPy and JAX have them too."""
    named = {"input": input, "target": target, "weight": weight, "sample_weight": sample_weight}
    for nth, (name, t) in enumerate(named.items(), 1):
        if not (isinstance(t, Tensor) or (nth > 2 and t is None)):
            raise TypeError(f"cross_entropy(): argument '{name}' must be Tensor, not {type(t).__name__}")


def takes(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options) -> bool:
    """Is this a call for the kernels? Else PyTorch computes it, or says what is wrong with it."""
    if misfit(input, target, weight, sample_weight) is not None or input.numel() == 0:
        return False
    if not is_watched() and any([t is not None and stands_for_another(t) for t in (input, target, weight, sample_weight)]):
        return False  # it has no memory of its own
    if not options.label_smoothing <= 1.0:
        return False
    if target.dtype in STORAGE:
        return options.ignore_index < 0
    return weight is None or (weight.dtype == input.dtype and not weight.requires_grad)


def _by_pytorch(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options) -> Tensor:
    """What the kernels do not take, PyTorch computes, or says what is wrong with it."""
    if target.dtype != torch.int64 and target.dtype in INTEGERS and target.shape != input.shape:
        target = as_int64(target)
    if sample_weight is None and options.z_loss == 0.0 and options.softcap == 0.0:
        return stock(input, target, weight, options)
    with torch.no_grad():
        stock(input, target, weight, options)  # it refuses what it would refuse without our options
    dim = 0 if input.dim() == 1 else 1
    rows = (*input.shape[:dim], *input.shape[dim + 1 :])
    if sample_weight is not None and (sample_weight.layout != torch.strided or sample_weight.is_nested):
        raise ValueError("sample_weight must be dense: one weight per row")
    if sample_weight is not None and sample_weight.shape != rows:
        raise ValueError(f"sample_weight has shape {tuple(sample_weight.shape)}; it must be {rows}: one weight per row")
    return formula(input, target, weight, sample_weight, options)


def must_be_formula(input: Tensor, *others: Tensor | None) -> bool:
    """Is more asked of the result than a first derivative with respect to the logits?"""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return forward_ad._current_level >= 0 or any(t is not None and t.requires_grad for t in others)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in others):
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (input, *others)
    )
