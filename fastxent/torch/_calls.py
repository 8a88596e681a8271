"""Calls that are stored: with tensors like those of an earlier call, they go straight to its task.

Class indices are never taken on trust: the task checks them, before it writes anything.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty_like, is_grad_enabled

from fastxent._fastpath import builtins
from fastxent._fastpath.builtins import Operands
from fastxent._fastpath.front_end.words import NOT_MET, NOT_THERE
from fastxent._fastpath.tasks import Family, Fixed, Task, family_of
from fastxent._runtime.plan import MOST_DIRECT, WORTH_A_THREAD, Plan, over
from fastxent._runtime.run import PackedTask
from fastxent.torch import _bridge
from fastxent.torch._autograd import NodeState, apply, attach
from fastxent.torch._bridge import (
    NONE,
    Options,
    address,
    as_float64,
    gradient_like,
    is_there,
    may_be_overwritten,
    out_of_bounds,
    reach,
)
from fastxent.torch._keys import Form, Guard, form_of, given, guard, has_nested, key

# Number of threads, and tensors: the loss, x, g, y, and t, w, u, losses of the rows, or None where there is none. 1: the loss
# has been written; 0: a class index is out of range; or NOT_THERE: a tensor has not the memory that it had; NOT_MET.
Run = Callable[..., int]


class Tasks(NamedTuple):
    value: PackedTask
    gradient: PackedTask
    rows: PackedTask | None  # the gradient of reduction none, from what comes back for each row


# What is raised by tensors that stand for others, and by what is no tensor
NO_MEMORY = AttributeError, TypeError, RuntimeError
# The loss of half precision in its own dtype, as it is without autocast
_ROUNDED: dict[torch.dtype, Callable[[Tensor], Tensor]] = {torch.bfloat16: Tensor.bfloat16, torch.float16: Tensor.half}
_nowhere = torch.empty(1, dtype=torch.float64, device="cpu")  # for a sum that nobody asks for


class Call:
    """Of tensors like these or, if they have a form, of whatever extents."""

    def __init__(
        self, tasks: Tasks, options: Options, input: Tensor, target: Tensor, weight: Tensor | None, loss: Tensor,
        in_place: bool, form: Form | None,
    ) -> None:  # fmt: skip
        # Nothing that a call has refers to it: one that leaves the cache is freed at once, and its families are 130 KB each
        me = weakref.ref(self)
        self.value: Run = partial(_first_run, me, "value", tasks.value)
        self.gradient: Run = partial(_first_run, me, "gradient", tasks.gradient)
        if tasks.rows is not None:
            self.rows: Run = partial(_first_run, me, "rows", tasks.rows)
        self.form = form
        # In C order or not, where more than one form has the same guard: with two axes there is one
        self.in_order = None if form is None or form[0] < 3 else not form[2]
        self.families: dict[str, Family] = {}
        self.fixed: list[Task] = []
        self.options = options
        self.loss = loss  # its sum or mean
        self.rounded = _ROUNDED.get(input.dtype)
        self.n_weights = 0 if weight is None else weight.numel()
        self.weight_bytes = 0 if weight is None else reach(weight)
        self.in_place = in_place  # may the gradient be written where the logits are?
        self.labelled = target.dtype == torch.int64
        place = reach(target), target.itemsize
        self.operands: Operands = (
            ("x", reach(input), input.itemsize), ("g", 0, 1), ("y", *place), ("t", *place),
            ("w", self.weight_bytes, input.itemsize), ("u", 8 * self.rows_of(input).numel(), 8), ("loss", 0, 1),
        )  # fmt: skip
        # Float32 class weights are widened where the task is run
        self.n_narrow = 0 if weight is None or weight.dtype != torch.float32 or not weight.is_contiguous() else weight.numel()
        self.key = key(input, target, weight, options, form)
        self.guards: dict[bool, Guard] = {}  # of logits that require a gradient, and of those that do not

    def guard(self, input: Tensor, target: Tensor, weight: Tensor | None) -> Guard:
        """For tensors like these, which are like those of this call: made once, for that takes long."""
        differentiable = input.requires_grad
        if differentiable not in self.guards:
            self.guards[differentiable] = guard(*given(input, target, weight), free=2 if self.form else 0)
        return self.guards[differentiable]

    def team(self, input: Tensor) -> int | None:
        """Threads for a call that is not small; 0: it has to go the longer way; None: that is for others."""
        team = builtins.team(_bridge.n_threads_now())
        return None if self.form and (team == 0 or input.numel() * input.itemsize > MOST_DIRECT) else team

    def loss_of(self, input: Tensor, target: Tensor, weight: Tensor | None, inplace: bool) -> Tensor | None:
        """The loss; None if the tensors' memory is not as it was."""
        differentiate = input.requires_grad and is_grad_enabled()
        grad, reduced = None, self.options.reduction != NONE
        small = input.numel() < WORTH_A_THREAD
        if (team := 1 if small else self.team(input)) is None:
            return None
        if differentiate:
            if inplace:
                if not (self.in_place and _is_there(input, 0) and _is_there(target, 0)):
                    return None
                inplace = may_be_overwritten(input, target, weight)
            if reduced:
                grad = input.detach() if inplace else room_for_gradient(input, small)
        loss = empty_like(self.loss) if reduced else torch.empty(self.rows_of(input), dtype=self.loss.dtype, device="cpu")
        run, which = (self.value, "value") if grad is None else (self.gradient, "gradient")
        done = self.run(run, team, input, input if grad is None else grad, target, weight, None, loss)
        if done <= 0:
            return self.not_done(done, which, input, target)
        if self.rounded is not None and not torch.is_autocast_enabled("cpu"):
            loss = self.rounded(loss)
        return attach(input, loss, grad, (target, weight, None), (self.options, inplace, self)) if differentiate else loss

    def rows_of(self, input: Tensor) -> torch.Size:
        axis = min(1, input.dim() - 1)
        return input.shape[:axis] + input.shape[axis + 1 :]

    def not_done(self, why: int, which: str, input: Tensor, target: Tensor) -> Tensor | None:
        """None: what a task could not do is for others. But nobody can do it if a class index is out of range."""
        if why == 0:
            raise out_of_bounds(target, input.shape[input.dim() > 1], self.options.ignore_index)
        if why == NOT_MET:
            family = self.families[which]
            family.meet(plan_of(family.name, input, target, self.labelled, self.options))
        return None

    def run(
        self, run: Run, team: int, input: Tensor, g: Tensor, target: Tensor, weight: Tensor | None, u: Tensor | None,
        loss: Tensor | None,
    ) -> int:  # fmt: skip
        """A task with operands of any kind."""
        y, t = (target, None) if self.labelled else (None, target)
        if weight is None or self.n_narrow > 0:
            w = weight
        elif _is_there(weight, self.weight_bytes):
            w = as_float64(weight)
        else:
            return NOT_THERE
        total, rows = (_nowhere, loss) if self.options.reduction == NONE else (loss, None)
        return run(team, total, input, g, y, t, w, u, rows)

    def gradient_of_rows(
        self, input: Tensor, target: Tensor, weight: Tensor | None, grad_output: Tensor, out: Tensor | None
    ) -> Tensor | None:
        """Of reduction none, times ``grad_output``; None if the tensors are not as they were."""
        if has_nested(input, target, weight):  # hooks on saved tensors may hand over anything
            return None
        is_guarded = any(is_like(*given(input, target, weight)) for is_like in list(self.guards.values()))
        is_like = is_guarded or key(input, target, weight, self.options, self.form and form_of(input, target)) == self.key
        if not is_like or grad_output.shape != self.rows_of(input):
            return None
        if grad_output.layout != torch.strided or not _is_there(grad_output, reach(grad_output)):
            return None
        small = input.numel() < WORTH_A_THREAD
        if (team := 1 if small else self.team(input)) is None:
            return None
        grad, u = room_for_gradient(input, small) if out is None else out, as_float64(grad_output)
        done = self.run(self.rows, team, input, grad, target, weight, u, None)
        return grad if done > 0 else self.not_done(done, "rows", input, target)


class PlainCall(Call):
    """With class indices, float32 or float64 logits, a sum or mean, and no more: its loss is one number.

    `loss_of` is in as few words as can be: of a call of 5 microseconds that is one."""

    def __init__(self, tasks: Tasks, options: Options, *more: Any) -> None:
        super().__init__(tasks, options, *more)
        self.state: NodeState = (options, False, None)  # its backward needs no call

    def loss_of(self, input: Tensor, target: Tensor, weight: Tensor | None, inplace: bool) -> Tensor | None:
        if inplace:
            return super().loss_of(input, target, weight, inplace)
        team: int | None = 1
        small = input.numel() < WORTH_A_THREAD
        if not small and (team := self.team(input)) is None:
            return None
        loss = empty_like(self.loss)
        if is_grad_enabled() and input.requires_grad:
            grad = empty_like(input) if small else gradient_like(input)
            done = self.gradient(team, loss, input, grad, target)
            if done > 0:
                return apply(input, (loss, grad, (input, target), self.state))
            which = "gradient"
        else:
            done = self.value(team, loss, input, input, target)
            if done > 0:
                return loss
            which = "value"
        return self.not_done(done, which, input, target)


def room_for_gradient(input: Tensor, small: bool) -> Tensor:
    return empty_like(input) if small else gradient_like(input)


def plan_of(task: str, input: Tensor, target: Tensor, labelled: bool, options: Options) -> Plan:
    g, t = empty_like(input, device="meta"), input if labelled else target  # its strides are those of `gradient_like`
    return _bridge.plan_of(
        task, input.shape, (input.stride(), g.stride(), t.stride()), min(1, input.dim() - 1), input.dtype,
        None if labelled else target.dtype, labelled, labelled and options.label_smoothing > 0, options.softcap != 0,
    )  # fmt: skip


def _first_run(of: Callable[[], Call | None], which: str, task: PackedTask, team: int, *tensors: Tensor | None) -> int:
    """Only a task that is run is compiled."""
    call = of()
    assert call is not None  # the caller has it
    run = _ready(task, call, which)
    setattr(call, which, run)
    return run(team, *tensors)


def _ready(task: PackedTask, call: Call, which: str) -> Run:
    """The task as a function of tensors: by a builtin, if it is not large."""
    is_double = task.plan.variant.acc == "f64"
    if call.form is not None:
        n_axes, _, innermost = call.form
        family = family_of(
            task, min(1, n_axes - 1), n_axes, innermost=innermost, n_weights=call.n_weights,
            smoothing=call.options.label_smoothing,
        )  # fmt: skip
        family = call.families.setdefault(which, family)  # another thread may have been quicker
        return builtins.tensors_builtin(family, call.operands, is_double, call.n_narrow) or _cannot
    in_python = partial(_run, task, call.operands)
    if not task.direct:
        return in_python
    fixed = Fixed(task)
    call.fixed.append(fixed)  # the builtin knows it by its address
    run = builtins.tensors_builtin(fixed, call.operands, is_double, call.n_narrow)
    if run is None:
        return in_python
    return run if task.small else partial(_run_at_once, run, in_python)


def _cannot(*_: Any) -> int:
    """Where this Python has no builtin for tensors of a form."""
    return NOT_THERE


def _run_at_once(run: Run, in_python: Run, team: int, *tensors: Any) -> int:
    return run(team, *tensors) if team else in_python(team, *tensors)


def _run(
    task: PackedTask, operands: Operands, team: int, loss: Tensor, x: Tensor, g: Tensor, y: Tensor | None,
    t: Tensor | None = None, w: Tensor | None = None, u: Tensor | None = None, rows: Tensor | None = None,
) -> int:  # fmt: skip
    tensors = x, g, y, t, w, u, rows
    if not all(o is None or _is_there(o, nbytes) for o, (_, nbytes, _) in zip(tensors, operands, strict=True)):
        return NOT_THERE
    w = None if w is None else as_float64(w)
    total, bad, divisor = task(address(x), address(g), address(y), _bridge.n_threads_now(), *map(address, (t, w, u, rows)))
    number = ctypes.c_double if task.plan.variant.acc == "f64" else ctypes.c_float
    number.from_address(address(loss)).value = over(total, divisor)
    return int(not bad)


def _is_there(t: Tensor, nbytes: int) -> bool:
    """As `is_there`, of whatever may be given for a tensor."""
    try:
        return is_there(t, nbytes)
    except NO_MEMORY:
        return False
