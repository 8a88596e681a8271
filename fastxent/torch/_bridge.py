"""Runs the kernels: checks tensors, and turns them into addresses and plans."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastxent._abi.dtypes import DTYPES
from fastxent._abi.variant import FEW_CLASSES
from fastxent._runtime import buffers, run, threads
from fastxent._runtime.options import fields_of, flags_of
from fastxent._runtime.plan import Plan, make_plan

STORAGE: dict[torch.dtype, str] = {getattr(torch, d.name): d.storage for d in DTYPES}
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {getattr(torch, d.name): np.dtype(d.numpy) for d in DTYPES}
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64}
NONE, MEAN, SUM = 0, 1, 2  # torch.nn._reduction's numbers
_PAST_ALL_CLASSES = 2**63 - 1


class Options(NamedTuple):
    """All options but the tensors, in the order of the operators' schema."""

    reduction: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none


class Call(NamedTuple):
    """Checked tensors in the form that the kernels take; they must outlive the addresses."""

    x: Tensor
    axis: int
    rows: torch.Size
    target: Tensor  # as it was given
    y: Tensor | None  # int64, contiguous
    t: Tensor | None
    w: Tensor | None  # float64, contiguous
    u: Tensor | None  # float64, contiguous
    divisor: float  # of the mean, for class probabilities; for class indices the task computes it
    n_threads: int
    acc: torch.dtype


def misfit(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None) -> Exception | None:
    """Return an error that says why these tensors do not fit together, or None if they do."""
    for name, t in (("input", input), ("target", target), ("weight", weight), ("sample_weight", sample_weight)):
        if t is not None and not (t.is_cpu and t.layout == torch.strided and not t.is_nested):
            return RuntimeError(f"Expected {name} to be a dense tensor on the CPU, got one of {t.layout} on {t.device}")
    if input.dtype not in STORAGE:
        return NotImplementedError(f'"fastxent" not implemented for {input.dtype}')
    if input.dim() == 0:
        return IndexError("Dimension specified as 0 but tensor has no dimensions")
    axis = 0 if input.dim() == 1 else 1
    rows, n_classes = input.shape[:axis] + input.shape[axis + 1 :], input.shape[axis]
    if target.shape != (input.shape if target.dtype in STORAGE else rows):
        return RuntimeError(f"size mismatch (got input: {list(input.shape)}, target: {list(target.shape)} of {target.dtype})")
    if target.dtype not in STORAGE and target.dtype not in INTEGERS:
        return RuntimeError(f"expected target of integers or floating point numbers, got {target.dtype}")
    if weight is not None and (weight.shape != (n_classes,) or weight.dtype not in STORAGE):
        return RuntimeError(f"weight must be {n_classes} floating point numbers, got {list(weight.shape)} of {weight.dtype}")
    if sample_weight is not None and sample_weight.shape != rows:
        return RuntimeError(f"size mismatch (got rows: {list(rows)}, factors of the rows: {list(sample_weight.shape)})")
    return None


def check_operands(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None) -> None:
    """Check the tensors of a call that `route` has not seen: a traced graph or a hook on saved tensors may pass anything."""
    if (error := misfit(input, target, weight, sample_weight)) is not None:
        raise error


def prepare(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None) -> Call:
    check_memory(input, target, weight, sample_weight)
    axis = 0 if input.dim() == 1 else 1
    rows = input.shape[:axis] + input.shape[axis + 1 :]
    n_classes = input.shape[axis]
    x = input.detach().resolve_neg() if input.is_neg() else input
    if not walkable(x, axis):
        x = x.detach().movedim(axis, -1).contiguous().movedim(-1, axis)
    w = None if weight is None else as_float64(weight)
    u = None if sample_weight is None else as_float64(sample_weight)
    n_threads = n_threads_now()
    double = (
        x.dtype == torch.float64
        or target.dtype == torch.float64
        or (target.dtype in STORAGE and weight is not None and weight.dtype == torch.float64)
    )
    acc = torch.float64 if double else torch.float32
    if target.shape == input.shape:
        t = target.resolve_neg().detach()
        if double and x.dtype != torch.float64:
            t = t.to(torch.float64)
        if n_classes > FEW_CLASSES and (t.stride(axis) == 1) != (x.stride(axis) == 1):
            t = torch.empty_like(x, dtype=t.dtype).copy_(t)
        return Call(x, axis, rows, target, None, t, w, u, float(math.prod(rows) if u is None else u.sum()), n_threads, acc)
    y = target.resolve_neg()
    if y.dtype != torch.int64 or not y.is_contiguous():
        y = as_int64(y).contiguous()
    return Call(x, axis, rows, target, y, None, w, u, 1.0, n_threads, acc)


def n_threads_now() -> int:
    return threads.setting() or torch.get_num_threads()


def check_memory(*tensors: Tensor | None) -> None:
    """Raise an error if a tensor's memory has been freed or cut short, which PyTorch allows."""
    for t in tensors:
        if t is None or t.numel() == 0:
            continue
        if not is_there(t, reach(t)):
            raise RuntimeError(
                "The tensor has a non-zero number of elements, but its data is not allocated yet, or not any more."
            )


def is_there(t: Tensor, nbytes: int) -> bool:
    """Return whether a tensor's memory has ``nbytes`` bytes from the tensor's first element on."""
    return t.data_ptr() != 0 and t.untyped_storage().nbytes() >= t.storage_offset() * t.itemsize + nbytes


def reach(t: Tensor) -> int:
    """Return the number of bytes from a tensor's first element to the end of its last."""
    if t.numel() == 0:
        return 0
    return int(1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def as_float64(t: Tensor) -> Tensor:
    """Return weights in the form that the kernels take: contiguous float64."""
    t = t.detach() if t.requires_grad else t
    t = (t.resolve_neg() if t.is_neg() else t).double()
    return t if t.is_contiguous() else t.contiguous()


def as_int64(target: Tensor) -> Tensor:
    """Return class indices as int64. Those that do not fit stay out of bounds and do not wrap around to an ignore_index."""
    y = target.to(torch.int64)
    return torch.where(y < 0, _PAST_ALL_CLASSES, y) if target.dtype == torch.uint64 else y


def out_of_bounds(target: Tensor, n_classes: int, ignore_index: int) -> IndexError:
    y = as_int64(target)
    where = ((y != ignore_index) & ((y < 0) | (y >= n_classes))).nonzero()[0].tolist()
    return IndexError(f"Target {target[tuple(where)].item()} is out of bounds.")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def walkable(x: Tensor, axis: int) -> bool:
    """Return whether a kernel can take x in place; otherwise it would gather lanes for many classes, and a copy is faster."""
    return x.shape[axis] <= FEW_CLASSES or any(s == 1 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True))


@lru_cache(maxsize=4096)
def plan_of(
    task: str,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    axis: int,
    dtype: torch.dtype,
    probabilities: torch.dtype | None,
    labelled: bool,
    smooth: bool,
    capped: bool,
) -> Plan:
    """Return the plan for tensors, whose strides count elements: see `make_plan`."""
    sizes = (dtype.itemsize, dtype.itemsize, (probabilities or dtype).itemsize)
    x, g, t = (tuple(s * size for s in stride) for stride, size in zip(strides, sizes, strict=True))
    target = None if probabilities is None else STORAGE[probabilities]
    return make_plan(task, tuple(shape), (x, g, t), axis, STORAGE[dtype], target, labelled, smooth, capped)


def _run(name: str, call: Call, g: Tensor, options: Options, factor: float = 1.0) -> Tensor:
    """Run a task and return its loss, reduced."""
    loss = torch.zeros(call.rows, dtype=call.acc, device="cpu") if options.reduction == NONE else None
    average = options.reduction == MEAN
    total, divisor = run_task(
        name, call, g, flags_of(call.y is not None, *options[1:]), loss=address(loss), factor=factor,
        divisor=call.divisor if average else 1.0, average=average, **fields(options, call.x.shape[call.axis]),
    )  # fmt: skip
    return scalar(total / divisor, call.acc) if loss is None else loss


def run_task(name: str, call: Call, g: Tensor, flags: dict[str, bool], **more: float) -> tuple[float, float]:
    """Run a task and return its sum and its divisor; ``more`` holds further fields of the argument block."""
    x, t = call.x, call.t
    strides = (x.stride(), g.stride(), (x if t is None else t).stride())
    plan = plan_of(name, x.shape, strides, call.axis, x.dtype, None if t is None else t.dtype, **flags)
    total, bad, divisor = run.run(
        name, plan, call.n_threads, x=x.data_ptr(), g=g.data_ptr(), t=address(t), y=address(call.y), w=address(call.w),
        u=address(call.u), **more,
    )  # fmt: skip
    if bad:
        raise out_of_bounds(call.target, x.shape[call.axis], int(more["ignore"]))
    return total, divisor


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    try:
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    except RuntimeError:  # scalar_tensor refuses what float32 rounds to infinity; torch.tensor takes it, in twice the time
        return torch.tensor(value, dtype=dtype, device="cpu")


def fields(options: Options, n_classes: int) -> dict[str, float]:
    """Return the options as fields of the argument block."""
    return fields_of(n_classes, *options[1:])


def lies_well(g: Tensor, x: Tensor, axis: int) -> bool:
    """Return whether the lanes of the gradient are laid out as those of the logits."""
    return x.shape[axis] <= FEW_CLASSES or (g.stride(axis) == 1) == (x.stride(axis) == 1)


def may_be_overwritten(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the gradient can overwrite the logits: no two of them, and no other tensor, have memory in common."""
    memory = x.untyped_storage().data_ptr()
    if x.is_neg() or any(t is not None and t.untyped_storage().data_ptr() == memory for t in others):
        return False
    reach = 0  # elements from the first to the last, over the axes seen so far
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    if x.is_leaf or (x._is_view() and x._base.is_leaf and x._base.requires_grad):  # type: ignore[union-attr]
        raise RuntimeError("a leaf tensor that requires grad cannot be overwritten: inplace=True needs computed logits")
    return True


def value(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Options) -> Tensor:
    """Return the loss. The caller has checked that the tensors fit together: see `misfit`."""
    call = prepare(input, target, weight, sample_weight)
    return _run("value", call, call.x, options)


def value_and_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
    out: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the loss and ``factor`` times its gradient, in ``out`` if given, which may be ``input``; tensors as in `value`."""
    call = prepare(input, target, weight, sample_weight)
    result = gradient_like(input) if out is None else out
    g = result if lies_well(result, call.x, call.axis) else torch.empty_like(call.x)
    loss = _run("value_and_grad", call, g, options, factor)
    if g is not result:
        result.copy_(g)
    return loss, result


def gradient_like(input: Tensor) -> Tensor:
    """Return ``torch.empty_like``; a large tensor is in recycled memory with huge pages."""
    nbytes = input.numel() * input.element_size()
    contiguous = input.is_contiguous()
    if nbytes < buffers.SMALLEST or not (contiguous or torch.ops.aten.is_non_overlapping_and_dense(input)):
        return torch.empty_like(input)
    g = empty(input.shape if contiguous else (input.numel(),), input.dtype)
    return g if contiguous else g.as_strided(input.shape, input.stride())


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return ``torch.empty``; a large tensor is in recycled memory with huge pages."""
    tensor = torch.from_numpy(buffers.empty(shape, _NUMPY[dtype]))
    return tensor if tensor.dtype == dtype else tensor.view(dtype)  # NumPy lacks bfloat16
