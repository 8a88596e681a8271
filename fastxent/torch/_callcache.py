"""Calls that come again, without sample weights: what was checked once is recognised, and goes straight to its task.

Class indices are never taken on trust: the task checks them, before it writes anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty_like, is_grad_enabled
from torch._C import _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastxent._abi.argument_block import NOT_MET, NOT_THERE
from fastxent._fastpath.callcache import MOST_KNOWN, has_constant_options
from fastxent._fastpath.family import Family
from fastxent._fastpath.table import Operands, family_of, on_tensors
from fastxent._runtime.plan import MOST_DIRECT, WORTH_A_THREAD, Plan, over
from fastxent._runtime.run import PackedTask, team_at_once
from fastxent.torch import _bridge
from fastxent.torch._autograd import Kept, apply, attach
from fastxent.torch._bridge import (
    MEAN,
    NONE,
    Options,
    address,
    as_float64,
    gradient_like,
    is_there,
    may_be_overwritten,
    out_of_bounds,
    reach,
    walkable,
)
from fastxent.torch._stable_abi import c_interface
from fastxent.torch._watched import is_watched

# Number of threads, and tensors: the loss, x, g, y, and t, w, u, losses of the rows, or None where there is none. 1: the loss
# has been written; 0: a class index is out of range; or NOT_THERE: a tensor has not the memory that it had; NOT_MET.
Run = Callable[..., int]
# Are these tensors like those of a call?
Guard = Callable[..., bool]


# How tensors lie that are dense: number of the logits' axes; are there class indices?; do the classes lie innermost?
Form = tuple[int, bool, bool]


class Tasks(NamedTuple):
    value: PackedTask
    gradient: PackedTask
    rows: PackedTask | None  # the gradient of reduction none, from what comes back for each row


# What is raised by tensors that stand for others, and by what is no tensor
_NO_MEMORY = AttributeError, TypeError, RuntimeError
# The loss of half precision in its own dtype, as it is without autocast
_ROUNDED: dict[torch.dtype, Callable[[Tensor], Tensor]] = {torch.bfloat16: Tensor.bfloat16, torch.float16: Tensor.half}


class Known:
    """A kind of call that was met before: with tensors like these or, if they have a form, of whatever extents."""

    def __init__(
        self, tasks: Tasks, options: Options, input: Tensor, target: Tensor, weight: Tensor | None, loss: Tensor,
        in_place: bool, form: Form | None,
    ) -> None:  # fmt: skip
        self.value: Run = partial(self._first_run, "value", tasks.value)
        self.gradient: Run = partial(self._first_run, "gradient", tasks.gradient)
        if tasks.rows is not None:
            self.rows: Run = partial(self._first_run, "rows", tasks.rows)
        self.form = form
        # In C order or not, where more than one form has the same guard: with two axes there is one
        self.in_order = None if form is None or form[0] < 3 else not form[2]
        self.families: dict[str, Family] = {}
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
        self.kept: Kept = (options, False, self)
        self.kind = kind_of(input, target, weight, options, form)
        self.is_like: Guard | None = None

    def _first_run(self, which: str, task: PackedTask, team: int, *tensors: Tensor | None) -> int:
        """Only a task that is run is compiled."""
        run = _ready(task, self, which)
        setattr(self, which, run)
        return run(team, *tensors)

    def team(self, input: Tensor) -> int | None:
        """Threads for a call that is not small; 0: it has to go the longer way; None: that is for others."""
        team = team_at_once(_bridge.n_threads_now())
        return None if self.form and (team == 0 or input.numel() * input.itemsize > MOST_DIRECT) else team

    def answer(self, input: Tensor, target: Tensor, weight: Tensor | None, inplace: bool) -> Tensor | None:
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
            family.meet(_plan_of(family.name, input, target, self.labelled, self.options))
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
            return -1
        total, rows = (_nowhere, loss) if self.options.reduction == NONE else (loss, None)
        return run(team, total, input, g, y, t, w, u, rows)

    def gradient_of_rows(
        self, input: Tensor, target: Tensor, weight: Tensor | None, grad_output: Tensor, out: Tensor | None
    ) -> Tensor | None:
        """Of reduction none, times ``grad_output``; None if the tensors are not as they were."""
        if _has_nested(input, target, weight):  # hooks on saved tensors may hand over anything
            return None
        known = self.is_like is not None and self.is_like(*_given(input, target, weight))
        known = known or kind_of(input, target, weight, self.options, self.form and form_of(input, target)) == self.kind
        if not known or grad_output.shape != self.rows_of(input):
            return None
        if grad_output.layout != torch.strided or not _is_there(grad_output, reach(grad_output)):
            return None
        small = input.numel() < WORTH_A_THREAD
        if (team := 1 if small else self.team(input)) is None:
            return None
        grad, u = room_for_gradient(input, small) if out is None else out, as_float64(grad_output)
        done = self.run(self.rows, team, input, grad, target, weight, u, None)
        return grad if done > 0 else self.not_done(done, "rows", input, target)


class Plain(Known):
    """A call with class indices, float32 or float64 logits, a sum or mean, and no more: its loss is one number.

    `answer` is in as few words as can be: of a call of 5 microseconds that is one."""

    def answer(self, input: Tensor, target: Tensor, weight: Tensor | None, inplace: bool) -> Tensor | None:
        if inplace:
            return super().answer(input, target, weight, inplace)
        team: int | None = 1
        small = input.numel() < WORTH_A_THREAD
        if not small and (team := self.team(input)) is None:
            return None
        loss = empty_like(self.loss)
        if is_grad_enabled() and input.requires_grad:
            grad = empty_like(input) if small else gradient_like(input)
            done = self.gradient(team, loss, input, grad, target)
            if done > 0:
                return apply(input, (loss, grad, (input, target), self.kept))
            which = "gradient"
        else:
            done = self.value(team, loss, input, input, target)
            if done > 0:
                return loss
            which = "value"
        return self.not_done(done, which, input, target)


def room_for_gradient(input: Tensor, small: bool) -> Tensor:
    return empty_like(input) if small else gradient_like(input)


_nowhere = torch.empty(1, dtype=torch.float64, device="cpu")  # for a sum that nobody asks for
known_calls: dict[tuple[Any, ...], Known | None] = {}
# Known calls that were made twice in a row, and may be made again, without weights and with them: is one like it?; its options.
# Replaced as a whole, for threads may be looking through them.
_guarded: dict[bool, tuple[tuple[Guard, tuple[Any, ...], Known], ...]] = {}
MOST_GUARDED = 2  # training and evaluation


class _Latest:
    looked_up: Known | None = None


def guard(*tensors: Tensor, free: int = 0) -> Guard | None:
    """Are tensors like these in type, dispatch keys, dtype, shape, strides, ``requires_grad``, and is nobody transforming?
    The first ``free`` of them may have other extents and strides.

    PyTorch's compiler asks that before it runs what it has compiled. It takes a fifth of `kind_of`. It does not notice dispatch
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
        return None
    return is_like


def _is_out_of_the_ordinary() -> bool:
    """Is somebody tracing or transforming? (Autocast leaves float32 and float64 alone.)"""
    return is_watched() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _has_nested(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    return input.is_nested or target.is_nested or (weight is not None and weight.is_nested)


def form_of(input: Tensor, target: Tensor) -> Form | None:
    """Of tensors whose extents do not matter, for they are dense, and not large; None for others."""
    n_axes = input.dim()
    labelled = target.dtype == torch.int64 and target.dim() == n_axes - 1
    if not labelled and (n_axes == 0 or target.shape != input.shape or target.dtype != input.dtype):
        return None
    if input.layout != torch.strided or target.layout != torch.strided:
        return None
    if input.numel() * input.itemsize > MOST_DIRECT or c_interface() is None:
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


def kind_of(
    input: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...], form: Form | None
) -> tuple[Any, ...]:
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


def recall(input: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...], inplace: bool) -> Tensor | None:
    """The loss; None where all has to be checked."""
    # What a guard does not notice; Dynamo first, for it must not look at the others
    if is_dynamo_compiling() or _len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:
        return None
    try:
        if input.is_nested or target.is_nested or (weight is not None and weight.is_nested):
            return None
        for is_like, its_options, call in _guarded.get(weight is not None, ()):
            if (
                its_options == options
                and type(its_options[1]) is type(options[1])  # True == 1 == 1.0
                and (is_like(input, target) if weight is None else is_like(input, target, weight))
                and (call.in_order is None or input.is_contiguous() is call.in_order)
            ):
                known: Known | None = call
                break
        else:
            known = _look_up(input, target, weight, options)
    except _NO_MEMORY:
        return None
    loss = None if known is None else known.answer(input, target, weight, inplace)
    if loss is None and known is not None and known.form is not None:
        known = _look_up(input, target, weight, options, exact=True)
        loss = None if known is None else known.answer(input, target, weight, inplace)
    return loss


def _look_up(
    input: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...], exact: bool = False
) -> Known | None:
    if _is_out_of_the_ordinary():
        return None
    form = None if exact else form_of(input, target)
    known = known_calls.get(kind_of(input, target, weight, options, form))
    if known is not None and known is _Latest.looked_up:
        weighted = weight is not None
        if (is_like := guard(*_given(input, target, weight), free=2 if form else 0)) is not None:
            known.is_like = is_like
            _guarded[weighted] = ((is_like, options, known), *_guarded.get(weighted, ())[: MOST_GUARDED - 1])
    _Latest.looked_up = known
    return known


def _given(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    """What a guard is asked about."""
    return (input, target) if weight is None else (input, target, weight)


def forget() -> None:
    """All known calls."""
    known_calls.clear()
    _guarded.clear()
    _Latest.looked_up = None


def remember(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> None:
    """Keep the tasks of a call that was found good, or None if they cannot take its tensors as they lie."""
    if _is_out_of_the_ordinary() or not has_constant_options(options):
        return
    form = form_of(input, target)
    kind = kind_of(input, target, weight, options, form)
    if form is not None and known_calls.get(kind) is not None:  # yet it has not served
        form, kind = None, kind_of(input, target, weight, options, None)
    if kind in known_calls:
        return
    if len(known_calls) >= MOST_KNOWN:
        forget()
    known_calls[kind] = _known(input, target, weight, options, form)


def _plan_of(task: str, input: Tensor, target: Tensor, labelled: bool, options: Options) -> Plan:
    g, t = empty_like(input, device="meta"), input if labelled else target  # its strides are those of `gradient_like`
    return _bridge.plan_of(
        task, input.shape, (input.stride(), g.stride(), t.stride()), min(1, input.dim() - 1), input.dtype,
        None if labelled else target.dtype, labelled, labelled and options.label_smoothing > 0, options.softcap != 0,
    )  # fmt: skip


def _known(input: Tensor, target: Tensor, weight: Tensor | None, options: Options, form: Form | None) -> Known | None:
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
    plan, grad_plan = (_plan_of(task, input, target, labelled, options) for task in ("value", "value_and_grad"))
    if plan.variant.large:  # it has more to pack, and takes longer anyway
        return None
    none, mean = options.reduction == NONE, options.reduction == MEAN
    there: dict[str, float] = {"t": not labelled, "w": weight is not None}  # their addresses come with each call
    there |= _bridge.numbers(options, input.shape[axis]) | {
        "average": mean,
        "divisor": float(plan.planned.n_rows) if mean else 1.0,
    }
    tasks = Tasks(
        PackedTask("value", plan, loss=none, **there),
        PackedTask("value_and_grad", grad_plan, **there),
        PackedTask("value_and_grad", grad_plan, u=1, **there) if none else None,
    )
    acc = torch.float64 if plan.variant.acc == "f64" else torch.float32
    loss = torch.empty((), dtype=acc, device="cpu")
    plain = labelled and weight is None and not none and input.itemsize > 2
    return (Plain if plain else Known)(tasks, options, input, target, weight, loss, g.stride() == input.stride(), form)


def _ready(task: PackedTask, known: Known, which: str) -> Run:
    """The task as a function of tensors: by a builtin, if it is not large."""
    given: PackedTask | Family = task
    if known.form is not None:
        n_axes, _, innermost = known.form
        family = family_of(
            task, min(1, n_axes - 1), n_axes, innermost=innermost, n_weights=known.n_weights,
            smoothing=known.options.label_smoothing,
        )  # fmt: skip
        given = known.families.setdefault(which, family)  # another thread may have been quicker
    is_double = task.plan.variant.acc == "f64"
    run = on_tensors(given, known.operands, is_double, known.n_narrow, c_interface()) if task.direct else None
    if known.form is not None:
        return run or _cannot
    if run is None:
        return partial(_run, task, known.operands)
    return run if task.small else partial(_run_at_once, run, task, known.operands)


def _cannot(*_: Any) -> int:
    """Where this Python has no builtin for tensors of a form."""
    return NOT_THERE


def _run_at_once(run: Run, task: PackedTask, operands: Operands, team: int, *tensors: Any) -> int:
    return run(min(team, task.useful), *tensors) if team else _run(task, operands, team, *tensors)


def _run(
    task: PackedTask, operands: Operands, team: int, loss: Tensor, x: Tensor, g: Tensor, y: Tensor | None,
    t: Tensor | None = None, w: Tensor | None = None, u: Tensor | None = None, rows: Tensor | None = None,
) -> int:  # fmt: skip
    tensors = x, g, y, t, w, u, rows
    if not all(o is None or _is_there(o, nbytes) for o, (_, nbytes, _) in zip(tensors, operands, strict=True)):
        return -1
    w = None if w is None else as_float64(w)
    total, bad, divisor = task(address(x), address(g), address(y), _bridge.n_threads_now(), *map(address, (t, w, u, rows)))
    number = ctypes.c_double if task.plan.variant.acc == "f64" else ctypes.c_float
    number.from_address(address(loss)).value = over(total, divisor)
    return int(not bad)


def _is_there(t: Tensor, nbytes: int) -> bool:
    """As `is_there`, of whatever may be given for a tensor."""
    try:
        return is_there(t, nbytes)
    except _NO_MEMORY:
        return False
