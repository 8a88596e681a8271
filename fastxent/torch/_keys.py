"""What calls with tensors are looked up by: keys, and guards that confirm what a key does not say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastxent._fastpath.front_end import objects
from fastxent._runtime.plan import MOST_DIRECT

# How tensors lie that are dense: number of the logits' axes; are there class indices?; do the classes lie innermost?
Form = tuple[int, bool, bool]
# Are these tensors like those of a call?
Guard = Callable[..., bool]


def short_key(input: Tensor, weight: Tensor | None, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the call of this kind that was looked up last; its guard says whether it is meant. (True == 1 == 1.0.)"""
    return options, type(options[1]), weight is None, input.requires_grad


def key(input: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...], form: Form | None) -> tuple[Any, ...]:
    """All that a call is sorted by. Tensors that are odd in other ways have no strides, storage or address.

    The type of ignore_index is there because True == 1 == 1.0; the other options may be of any type.
    """
    return (
        type(input), input.dtype, input.is_cpu, input.is_neg(),
        type(target), target.dtype, target.is_cpu, target.is_neg(), target.requires_grad,
        form or (input.shape, input.stride(), target.shape, target.stride()),
        options, type(options[1]), None if weight is None else
        (type(weight), weight.shape, weight.stride(), weight.dtype, weight.is_cpu, weight.is_neg(), weight.requires_grad),
    )  # fmt: skip


def form_of(input: Tensor, target: Tensor) -> Form | None:
    """Of tensors whose extents do not matter, for they are dense, and not large; None for others."""
    n_axes = input.dim()
    labelled = target.dtype == torch.int64 and target.dim() == n_axes - 1
    if not labelled and (n_axes == 0 or target.shape != input.shape or target.dtype != input.dtype):
        return None
    if input.layout != torch.strided or target.layout != torch.strided:
        return None
    if input.numel() * input.itemsize > MOST_DIRECT or objects.c_interface() is None:
        return None
    if input.is_contiguous() and target.is_contiguous():
        return n_axes, labelled, False
    innermost = n_axes > 2 and _has_classes_innermost(input)
    if innermost and (target.is_contiguous() if labelled else _has_classes_innermost(target)):
        return n_axes, labelled, True
    return None


def _has_classes_innermost(t: Tensor) -> bool:
    """And are all other axes in C order? (A look at the strides: who watches would see other tensors being made.)"""
    step = 1
    for axis in (1, *range(t.dim() - 1, 1, -1), 0):
        if t.shape[axis] != 1 and t.stride(axis) != step:
            return False
        step *= t.shape[axis]
    return True


def guard(*tensors: Tensor, free: int = 0) -> Guard:
    """Are tensors like these in type, dispatch keys, dtype, shape, strides, ``requires_grad``, and is nobody transforming?
    The first ``free`` of them may have other extents and strides.

    PyTorch's compiler asks that before it runs what it has compiled. It takes a fifth of `key`. It does not notice dispatch
    modes that let themselves be compiled away, as that of `make_fx` does; and a nested tensor, which has no strides, makes it
    end the process.
    """
    sizes, strides = (
        [[None] * t.dim() if nth < free else list(numbers_of(t)) for nth, t in enumerate(tensors)]
        for numbers_of in (Tensor.size, Tensor.stride)
    )
    try:
        new: Any = torch._C._dynamo.guards.TensorGuards
        is_like: Guard = new(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except (AttributeError, TypeError):  # another version of PyTorch
        return of_none
    return is_like


def of_none(*_: Tensor) -> bool:
    return False


def given(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    """What a guard is asked about."""
    return (input, target) if weight is None else (input, target, weight)


def has_nested(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    return input.is_nested or target.is_nested or (weight is not None and weight.is_nested)
