"""Routes a call to the kernels (eagerly or through an operator), to the decomposition, or to PyTorch itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastxent.torch._autograd import attach
from fastxent.torch._bridge import INTEGERS, NONE, STORAGE, Options, as_int64, may_be_overwritten, misfit, value, value_and_grad
from fastxent.torch._decomposition import aten_cross_entropy, decomposition, loss_dtype
from fastxent.torch._fastpath import store
from fastxent.torch._operators import value_and_grad_op, value_op
from fastxent.torch._watched import is_traced, is_watched, stands_for_another


def route(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, values: tuple[Any, ...], inplace: bool
) -> Tensor:
    """Return the loss, computed by the kernels, the decomposition or PyTorch; ``values``: the fields of `Options`."""
    require_tensors("cross_entropy", {"input": input, "target": target}, {"weight": weight, "sample_weight": sample_weight})
    options = Options(*values)
    if options.label_smoothing < 0.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {options.label_smoothing}")
    if is_traced() or not takes(input, target, weight, sample_weight, options):
        return _by_pytorch(input, target, weight, sample_weight, options)
    if needs_decomposition(input, target, weight, sample_weight):
        return decomposition(input, target, weight, sample_weight, options)
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


def require_tensors(function: str, required: dict[str, Any], optional: dict[str, Any]) -> None:
    """Raise an error that names what is no tensor: arrays of NumPy and JAX have a dtype and a shape too. Optional: or None."""
    for name, t in (required | optional).items():
        if not (isinstance(t, Tensor) or (t is None and name in optional)):
            raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(t).__name__}")


def takes(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options) -> bool:
    """Return whether the kernels take this call; otherwise PyTorch computes it, or says what is wrong with it."""
    if misfit(input, target, weight, sample_weight) is not None or input.numel() == 0:
        return False
    if not is_watched() and any([t is not None and stands_for_another(t) for t in (input, target, weight, sample_weight)]):
        return False  # a wrapper tensor has no memory of its own
    if not options.label_smoothing <= 1.0:
        return False
    if target.dtype in STORAGE:
        return options.ignore_index < 0
    return weight is None or (weight.dtype == input.dtype and not weight.requires_grad)


def _by_pytorch(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options) -> Tensor:
    """Return the loss of a call that the kernels do not take, in PyTorch's operators, which may raise PyTorch's error."""
    if target.dtype != torch.int64 and target.dtype in INTEGERS and target.shape != input.shape:
        target = as_int64(target)
    if sample_weight is None and options.z_loss == 0.0 and options.softcap == 0.0:
        return aten_cross_entropy(input, target, weight, options)
    with torch.no_grad():
        aten_cross_entropy(input, target, weight, options)  # raises what PyTorch raises without our options
    dim = 0 if input.dim() == 1 else 1
    rows = (*input.shape[:dim], *input.shape[dim + 1 :])
    if sample_weight is not None and (sample_weight.layout != torch.strided or sample_weight.is_nested):
        raise ValueError("sample_weight must be dense: one weight per row")
    if sample_weight is not None and sample_weight.shape != rows:
        raise ValueError(f"sample_weight has shape {tuple(sample_weight.shape)}; it must be {rows}: one weight per row")
    return decomposition(input, target, weight, sample_weight, options)


def needs_decomposition(input: Tensor, *others: Tensor | None) -> bool:
    """Return whether the call needs the decomposition: more than a first derivative with respect to the logits is asked for."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return forward_ad._current_level >= 0 or any(t is not None and t.requires_grad for t in others)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in others):
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (input, *others)
    )
