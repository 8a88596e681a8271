"""Lookup and store of calls without sample weights: what was checked once goes straight to its task.

The same call has two keys. One is quickly made, and names the last call of a kind, whose guard confirms it. The other one says
all that a call is sorted by, in five times the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, empty_like
from torch._C import _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastxent._fastpath.array_calls import is_constant
from fastxent._fastpath.cache import calls
from fastxent._runtime.run import PackedTask
from fastxent.torch import _bridge
from fastxent.torch._bridge import MEAN, NONE, Options, walkable
from fastxent.torch._calls import NO_MEMORY, Call, PlainCall, Tasks, plan_of
from fastxent.torch._keys import Form, form_of, key, of_none, short_key
from fastxent.torch._watched import is_watched

_NONE: tuple[Any, Any] = of_none, None


def lookup(input: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...], inplace: bool) -> Tensor | None:
    """The loss; None where all has to be checked."""
    # What a guard does not notice; Dynamo first, for it must not look at the others
    if is_dynamo_compiling() or _len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:
        return None
    try:
        if input.is_nested or target.is_nested or (weight is not None and weight.is_nested):
            return None
        is_like, call = calls.lookup(short_key(input, weight, options)) or _NONE
        if not (
            (is_like(input, target) if weight is None else is_like(input, target, weight))
            and (call.in_order is None or input.is_contiguous() is call.in_order)
        ):
            call = _by_full_key(input, target, weight, options)
    except NO_MEMORY:
        return None
    loss = None if call is None else call.loss_of(input, target, weight, inplace)
    if loss is None and call is not None and call.form is not None:
        call = _by_full_key(input, target, weight, options, exact=True)
        loss = None if call is None else call.loss_of(input, target, weight, inplace)
    return loss


def _by_full_key(
    input: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...], exact: bool = False
) -> Call | None:
    if _is_out_of_the_ordinary():
        return None
    call: Call | None = calls.lookup(key(input, target, weight, options, None if exact else form_of(input, target)))
    if call:
        calls.store(short_key(input, weight, options), (call.guard(input, target, weight), call))
    return call or None


def _is_out_of_the_ordinary() -> bool:
    """Is somebody tracing or transforming? (Autocast leaves float32 and float64 alone.)"""
    return is_watched() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def store(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> None:
    """Store the tasks of a call that was found good, or False if they cannot take its tensors as they lie."""
    if _is_out_of_the_ordinary() or not all(map(is_constant, options)):
        return
    form = form_of(input, target)
    full_key = key(input, target, weight, options, form)
    if form is not None and calls.lookup(full_key):  # yet it has not served
        form, full_key = None, key(input, target, weight, options, None)
    if calls.lookup(full_key) is None:
        calls.store(full_key, _call_of(input, target, weight, options, form) or False)


def _call_of(input: Tensor, target: Tensor, weight: Tensor | None, options: Options, form: Form | None) -> Call | None:
    axis = 0 if input.dim() == 1 else 1
    labelled = target.dtype == torch.int64 and target.shape != input.shape
    others = [target] if weight is None else [target, weight]
    if (
        (not (labelled and target.is_contiguous()) and target.dtype != input.dtype)
        or any(t.is_neg() or t.requires_grad for t in others)
        or input.is_neg()
        or (weight is not None and weight.dtype != input.dtype)
        or not walkable(input, axis)
    ):
        return None
    g = empty_like(input, device="meta")
    if not _bridge.lies_well(g, input, axis) or not (labelled or _bridge.lies_well(target, input, axis)):
        return None
    plan, grad_plan = (plan_of(task, input, target, labelled, options) for task in ("value", "value_and_grad"))
    if plan.variant.large:  # it has more to pack, and takes longer anyway
        return None
    none, mean = options.reduction == NONE, options.reduction == MEAN
    there: dict[str, float] = {"t": not labelled, "w": weight is not None}  # their addresses come with each call
    there |= {"average": mean, "divisor": float(plan.planned.n_rows) if mean else 1.0}
    there |= _bridge.numbers(options, input.shape[axis])
    tasks = Tasks(
        PackedTask("value", plan, loss=none, **there),
        PackedTask("value_and_grad", grad_plan, **there),
        PackedTask("value_and_grad", grad_plan, u=1, **there) if none else None,
    )
    acc = torch.float64 if plan.variant.acc == "f64" else torch.float32
    loss = torch.empty((), dtype=acc, device="cpu")
    plain = labelled and weight is None and not none and input.itemsize > 2
    return (PlainCall if plain else Call)(tasks, options, input, target, weight, loss, g.stride() == input.stride(), form)
