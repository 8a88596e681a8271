"""Calls that come again, without weights: what was checked once is recognised, and goes straight to its task.

Class indices are never taken on trust: the task checks them, before it writes anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastxent._builtin import at_addresses
from fastxent._known import MOST_KNOWN, has_constant_options
from fastxent._parallel import PackedTask, team_at_once
from fastxent._plan import over
from fastxent.torch import _calls
from fastxent.torch._calls import MEAN, NONE, Options, gradient_like, may_be_overwritten, out_of_bounds, reach, walkable
from fastxent.torch._eager import apply

Run = Callable[[int, int, int, int], bool]  # (x, g, y, loss), addresses: writes the loss; False: a class index is out of range


class Known:
    """A kind of call that was met before."""

    def __init__(
        self, value: PackedTask, gradient: PackedTask, options: Options, input: Tensor, target: Tensor, in_place: bool
    ) -> None:
        self.value: Run = partial(self._first_run, "value", value)
        self.gradient: Run = partial(self._first_run, "gradient", gradient)
        self.small = value.small
        self.options = options
        self.loss = torch.empty((), dtype=input.dtype, device="cpu")
        self.input_bytes, self.target_bytes, self.itemsize = reach(input), reach(target), input.itemsize
        self.in_place = in_place  # may the gradient be written where the logits are?

    def _first_run(self, which: str, task: PackedTask, x: int, g: int, y: int, loss: int) -> bool:
        """Only a task that is run is compiled."""
        run = _ready(task)
        setattr(self, which, run)
        return run(x, g, y, loss)


known_calls: dict[tuple[Any, ...], Known | None] = {}


class Guarded(NamedTuple):
    """A known call that was made twice in a row, and may be made again."""

    is_like: Callable[[Tensor, Tensor], bool]
    options: tuple[Any, ...]
    known: Known


class _Latest:
    guarded: tuple[Guarded, ...] = ()  # replaced as a whole, for threads may be looking through it
    looked_up: Known | None = None


MOST_GUARDED = 2  # training and evaluation


def guard(input: Tensor, target: Tensor) -> Callable[[Tensor, Tensor], bool] | None:
    """Are two tensors like these in type, dispatch keys, dtype, shape, strides, ``requires_grad``, and is nobody transforming?

    PyTorch's compiler asks that before it runs what it has compiled. It takes a fifth of `kind_of`.
    """
    tensors = (input, target)
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    try:
        new: Any = torch._C._dynamo.guards.TensorGuards
        is_like: Callable[[Tensor, Tensor], bool] = new(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except (AttributeError, TypeError):  # another version of PyTorch
        return None
    return is_like


def _is_out_of_the_ordinary() -> bool:
    """Is somebody tracing or transforming? (Autocast leaves float32 and float64 alone.)"""
    return (
        torch.compiler.is_compiling()  # first: Dynamo must not look at the others
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def kind_of(input: Tensor, target: Tensor, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that a call without weights is sorted by. Tensors that are odd in other ways have no strides, storage or address.

    The type of ignore_index is there because True == 1 == 1.0; the other options may be of any type.
    """
    return (
        type(input), input.shape, input.stride(), input.dtype, input.is_cpu, input.is_neg(),
        type(target), target.shape, target.stride(), target.dtype, target.is_cpu, target.is_neg(), options, type(options[1]),
    )  # fmt: skip


def recall(input: Tensor, target: Tensor, options: tuple[Any, ...], inplace: bool) -> Tensor | None:
    """The loss; None where all has to be checked."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:  # what a guard does not notice
        return None
    try:
        for call in _Latest.guarded:
            if call.is_like(input, target) and call.options == options and type(call.options[1]) is type(options[1]):
                known: Known | None = call.known
                break
        else:
            known = _look_up(input, target, options)
        if (
            known is None
            or input.untyped_storage().nbytes() < known.input_bytes + input.storage_offset() * known.itemsize
            or target.untyped_storage().nbytes() < known.target_bytes + target.storage_offset() * 8
        ):
            return None
        x, y = input.data_ptr(), target.data_ptr()
    except (AttributeError, TypeError, RuntimeError):
        return None
    if x == 0 or y == 0:  # zero tensors, and those that stand for others
        return None
    grad = None
    if torch.is_grad_enabled() and input.requires_grad:
        inplace = inplace and may_be_overwritten(input, target)
        if inplace and not known.in_place:
            return None
        grad = input.detach() if inplace else torch.empty_like(input) if known.small else gradient_like(input)
    loss = torch.empty_like(known.loss)
    run, g = (known.value, x) if grad is None else (known.gradient, grad.data_ptr())
    if not run(x, g, y, loss.data_ptr()):
        raise out_of_bounds(target, input.shape[input.dim() > 1], known.options.ignore_index)
    return loss if grad is None else apply(input, (loss, grad, target, None, None, known.options, inplace))


def _look_up(input: Tensor, target: Tensor, options: tuple[Any, ...]) -> Known | None:
    if _is_out_of_the_ordinary():
        return None
    known = known_calls.get(kind_of(input, target, options))
    if known is not None and known is _Latest.looked_up and (is_like := guard(input, target)) is not None:
        _Latest.guarded = (Guarded(is_like, options, known), *_Latest.guarded[: MOST_GUARDED - 1])
    _Latest.looked_up = known
    return known


def forget() -> None:
    """All known calls."""
    known_calls.clear()
    _Latest.guarded, _Latest.looked_up = (), None


def remember(input: Tensor, target: Tensor, options: Options) -> None:
    """Keep the tasks of a call that was found good, or None if they cannot take its tensors as they lie."""
    if _is_out_of_the_ordinary() or not has_constant_options(options):
        return
    kind = kind_of(input, target, options)
    if kind in known_calls:
        return
    if len(known_calls) >= MOST_KNOWN:
        forget()
    known_calls[kind] = _tasks_for(input, target, options)


def _tasks_for(input: Tensor, target: Tensor, options: Options) -> Known | None:
    axis = 0 if input.dim() == 1 else 1
    if (
        input.dtype not in (torch.float32, torch.float64)
        or target.dtype != torch.int64
        or not target.is_contiguous()
        or options.reduction == NONE
        or input.is_neg()
        or target.is_neg()
        or not walkable(input, axis)
    ):
        return None
    g = torch.empty_like(input, device="meta")  # its strides are those of `gradient_like`
    if not _calls.lies_well(g, input, axis):
        return None
    strides = (input.stride(), g.stride(), input.stride())
    plan = _calls.plan_of(
        input.shape, strides, axis, input.dtype, None, True, options.label_smoothing > 0, options.softcap != 0
    )
    if plan.variant.large:  # it has more to pack, and takes longer anyway
        return None
    arguments = _calls.numbers(options, input.shape[axis]) | {"average": options.reduction == MEAN}
    value, gradient = (PackedTask(name, plan, **arguments) for name in ("value", "value_and_grad"))
    return Known(value, gradient, options, input, target, g.stride() == input.stride())


def _ready(task: PackedTask) -> Run:
    """The task as a function of four addresses: by a builtin, if it is not large."""
    run = at_addresses(task) if task.direct else None
    if run is None:
        return partial(_run, task)
    return partial(run, 1) if task.small else partial(_run_at_once, run, task)


def _run_at_once(run: Callable[..., bool], task: PackedTask, x: int, g: int, y: int, loss: int) -> bool:
    team = team_at_once(_calls.threads())
    return run(min(team, task.useful), x, g, y, loss) if team else _run(task, x, g, y, loss)


def _run(task: PackedTask, x: int, g: int, y: int, loss: int) -> bool:
    total, bad, divisor = task(x, g, y, _calls.threads())
    number = ctypes.c_double if task.plan.variant.acc == "f64" else ctypes.c_float
    number.from_address(loss).value = over(total, divisor)
    return not bad
