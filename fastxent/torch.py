"""PyTorch's cross-entropy on the CPU, through fastxent: replace one import, or call `install`.

    from fastxent.torch import cross_entropy        # instead of torch.nn.functional's

An adapter: shapes, dtypes and autograd are PyTorch's, the maths is in ``_kernels``. Who does what:

* `cross_entropy` sorts the calls. What the kernels take goes on; all else (other devices, odd dtypes, wrong shapes) goes to
  PyTorch itself, whose result or error the caller then gets.
* ``_Eager`` is the autograd node of eager mode. mean and sum: the forward makes the gradient, the backward returns it.
  none: the backward makes it, for only then each row's grad_output is known; it enters as a sample weight.
* The operators ``torch.ops.fastxent`` are what ``torch.compile``, ``torch.export`` and dispatch modes see.
* ``_formula`` says the same in PyTorch's operators. It serves what must be differentiated further: double backward,
  forward-mode AD, ``torch.func``, probabilities that require a gradient.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import is_non_overlapping_and_dense_or_false as is_non_overlapping_and_dense
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastxent import __version__, _memory, _parallel
from fastxent._plan import FEW_CLASSES, Plan, flat_plan, make_plan

_STORAGE = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64}
_NONE, _MEAN, _SUM = 0, 1, 2  # torch.nn._reduction's numbers
_PAST_ALL_CLASSES = 2**63 - 1


class _Options(NamedTuple):
    """All but the tensors; in the order of the operators' schema."""

    reduction: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none


# ----------------------------------------------------------------------------------------------------
# The functions people call
# ----------------------------------------------------------------------------------------------------


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace: bool = False,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    r"""``torch.nn.functional.cross_entropy``, with some options more.

    .. math::
        l_n = u_n \left[-\sum_c q_{nc} \log p_{nc} + z\, \mathrm{lse}_n^2\right], \qquad
        q_{nc} = w_c \left[(1 - \epsilon)\, t_{nc} + \epsilon / C\right], \qquad
        p_n = \mathrm{softmax}(x_n)

    Parameters
    ----------
    input : Tensor, shape (C,), (N, C) or (N, C, d1, ...)
        Logits x; float16, bfloat16, float32 or float64, any strides.
    target : Tensor
        Class indices (any integer dtype), shape (), (N,) or (N, d1, ...); or class probabilities t, the shape of ``input``.
    weight, ignore_index, reduction, label_smoothing, size_average, reduce
        As in PyTorch.
    inplace : bool
        The gradient overwrites the logits, when one is needed: no memory of their size is taken. Their version counter goes up,
        so autograd raises where they are needed elsewhere. Under ``torch.compile`` a permission that is not used.
    sample_weight : Tensor, shape of the rows, optional
        Sample weights u. For "mean" the divisor is the sum of u w_y (class indices) or of u (class probabilities).
    z_loss : float
        z: pulls the log-normaliser to 0; not multiplied by ``weight``.
    softcap : float, optional
        Use softcap * tanh(x / softcap) for x.

    Returns
    -------
    Tensor
        A number, or with ``reduction="none"`` a tensor of the shape of the rows; dtype as PyTorch's.

    Raises
    ------
    IndexError, RuntimeError, ValueError
        Where PyTorch raises them, with its messages; also for ``label_smoothing < 0``.

    References
    ----------
    ``torch.nn.functional.cross_entropy``. z-loss: Chowdhery et al., *PaLM*, arXiv:2204.02311, 5. Soft cap: Gemma Team,
    *Gemma 2*, arXiv:2408.00118, 2.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import cross_entropy
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([1, 3]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}")
    1.3863
    >>> logits.grad
    tensor([[ 0.1250, -0.3750,  0.1250,  0.1250],
            [ 0.1250,  0.1250,  0.1250, -0.3750]])
    """
    if has_torch_function_variadic(input, target, weight, sample_weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight, sample_weight), input, target, weight, size_average, ignore_index,
            reduce, reduction, label_smoothing, inplace=inplace, sample_weight=sample_weight, z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = nn._reduction.legacy_get_string(size_average, reduce)
    number = nn._reduction.get_enum(reduction)
    options = _Options(number, ignore_index, label_smoothing, z_loss, softcap or 0.0)
    try:
        return _cross_entropy(input, target, weight, sample_weight, options, inplace)
    except (AttributeError, TypeError, struct.error):
        # Is an argument of a wrong type? PyTorch's parser says which one.
        torch._C._nn.cross_entropy_loss(input, target, weight, number, ignore_index, label_smoothing)  # type: ignore[arg-type]
        raise


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` through fastxent; formula, shapes, errors and sources as in `cross_entropy`.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As in PyTorch.
    inplace, z_loss, softcap
        As in `cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import CrossEntropyLoss
    >>> loss = CrossEntropyLoss(label_smoothing=0.1)
    >>> print(f"{loss(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0])).item():.4f}")
    0.5137
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace: bool = False,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace, self.z_loss, self.softcap = inplace, z_loss, softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, inplace=self.inplace, z_loss=self.z_loss, softcap=self.softcap,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Sorting the calls
# ----------------------------------------------------------------------------------------------------


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: _Options, inplace: bool
) -> Tensor:
    kind = None
    if weight is None and sample_weight is None and not (inplace or _is_out_of_the_ordinary()):
        kind = _kind(input, target, options)
        small = _small.get(kind)
        if small is not None and _bytes_behind(input) >= small.input_bytes and _bytes_behind(target) >= small.target_bytes:
            if torch.is_grad_enabled() and input.requires_grad:
                return _apply(input, target, None, None, options, False, small)
            return _small_loss(small.value, options, input, input, target)
    if options.label_smoothing < 0.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {options.label_smoothing}")
    if not _takes(input, target, weight, sample_weight, options):
        return _by_pytorch(input, target, weight, sample_weight, options)
    if _must_be_formula(input, target, weight, sample_weight):
        return _formula(input, target, weight, sample_weight, options)
    differentiate = torch.is_grad_enabled() and input.requires_grad
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        if differentiate and options.reduction != _NONE:
            loss, _ = _value_and_grad_op(input, target, weight, sample_weight, *options)
        else:
            loss = _value_op(input, target, weight, sample_weight, *options)
    elif differentiate:
        inplace = inplace and _may_be_overwritten(input, target, weight, sample_weight)
        loss = _apply(input, target, weight, sample_weight, options, inplace, None)
    else:
        loss = _value(input, target, weight, sample_weight, options)
    if kind is not None and _parallel.small(input.numel()):
        _remember(kind, input, target, options)
    dtype = _loss_dtype(input, target, weight)
    return loss if loss.dtype == dtype else loss.to(dtype)


def _is_out_of_the_ordinary() -> bool:
    """Is somebody tracing, transforming or casting?"""
    return (
        torch.compiler.is_compiling()  # first: Dynamo must not look at the others
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled("cpu")
    )


def _takes(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: _Options) -> bool:
    """Is this a call for the kernels? Else PyTorch computes it, or says what is wrong with it."""
    shape = input.shape
    if input.dtype not in _STORAGE or not shape or not _on_cpu(input, target) or input.numel() == 0:
        return False
    if not options.label_smoothing <= 1.0:
        return False
    dim = 0 if len(shape) == 1 else 1
    probabilities = target.shape == shape
    if probabilities:
        if target.dtype not in _STORAGE or options.ignore_index >= 0:
            return False
    elif target.shape != shape[:dim] + shape[dim + 1 :] or target.dtype not in _INTEGERS:
        return False
    if weight is not None:
        if weight.shape != (shape[dim],) or not _on_cpu(weight) or weight.dtype not in _STORAGE:
            return False
        if not probabilities and (weight.dtype != input.dtype or weight.requires_grad):
            return False
    return sample_weight is None or (sample_weight.shape == shape[:dim] + shape[dim + 1 :] and _on_cpu(sample_weight))


def _by_pytorch(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: _Options
) -> Tensor:
    """What the kernels do not take, PyTorch computes, or says what is wrong with it."""
    if target.dtype in _INTEGERS and target.shape != input.shape:
        target = _as_int64(target)
    if sample_weight is None and options.z_loss == 0.0 and options.softcap == 0.0:
        return _stock(input, target, weight, options)
    with torch.no_grad():
        _stock(input, target, weight, options)  # it refuses what it would refuse without our options
    dim = 0 if input.dim() == 1 else 1
    rows = (*input.shape[:dim], *input.shape[dim + 1 :])
    if sample_weight is not None and sample_weight.shape != rows:
        raise ValueError(f"sample_weight has shape {tuple(sample_weight.shape)}; it must be {rows}: one weight per row")
    return _formula(input, target, weight, sample_weight, options)


def _as_int64(target: Tensor) -> Tensor:
    """Class indices as int64. What does not fit stays out of bounds, and must not wrap around to an ignore_index."""
    y = target.to(torch.int64)
    return torch.where(y < 0, _PAST_ALL_CLASSES, y) if target.dtype == torch.uint64 else y


def _may_be_overwritten(x: Tensor, *others: Tensor | None) -> bool:
    """Has every logit a place of its own, in which its gradient can lie?"""
    memory = x.untyped_storage().data_ptr()
    if x.is_neg() or any(t is not None and t.untyped_storage().data_ptr() == memory for t in others):
        return False
    reach = 0  # from the first element to the last, over the axes seen so far
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    if x.is_leaf or (x._is_view() and x._base.is_leaf and x._base.requires_grad):  # type: ignore[union-attr]
        raise RuntimeError("a leaf tensor that requires grad cannot be overwritten: inplace=True needs computed logits")
    return True


def _on_cpu(*tensors: Tensor) -> bool:
    """Are these tensors with memory of their own? Zero tensors have none, wrapper subclasses hide theirs."""
    if not all([t.is_cpu and t.layout == torch.strided for t in tensors]):
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return not any([t._is_zerotensor() or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in tensors])


def _must_be_formula(input: Tensor, *others: Tensor | None) -> bool:
    """Is more asked of the result than a first derivative with respect to the logits?"""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return torch.autograd.forward_ad._current_level >= 0 or any(t is not None and t.requires_grad for t in others)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in others):
        return True
    return torch.autograd.forward_ad._current_level >= 0 and any(
        t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in (input, *others)
    )


def _loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """PyTorch's: that of the logits; probabilities and their weights are promoted with it; float32 at least under autocast."""
    dtype = input.dtype
    if target.dtype in _STORAGE:
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype


# ----------------------------------------------------------------------------------------------------
# Calling the kernels: tensors -> addresses
# ----------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """Checked tensors as the kernels take them; they must outlive the addresses."""

    x: Tensor
    axis: int
    rows: torch.Size
    target: Tensor  # as it was given
    y: Tensor | None  # int64, contiguous
    t: Tensor | None
    w: Tensor | None  # float64, contiguous
    u: Tensor | None  # float64, contiguous
    divisor: float | None  # None: y is unchecked, and the task checks it
    n_threads: int
    acc: torch.dtype


def _prepare(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, ignore_index: int) -> _Call:
    _check_memory(input, target, weight, sample_weight)
    axis = 0 if input.dim() == 1 else 1
    rows = input.shape[:axis] + input.shape[axis + 1 :]
    n_classes = input.shape[axis]
    x = input.detach().resolve_neg() if input.is_neg() else input
    if not _walkable(x, axis):
        x = x.detach().movedim(axis, -1).contiguous().movedim(-1, axis)
    w = None if weight is None else weight.detach().to(torch.float64).resolve_neg().contiguous()
    u = None if sample_weight is None else sample_weight.detach().to(torch.float64).resolve_neg().contiguous()
    n_threads = _parallel.setting() or torch.get_num_threads()
    double = (
        x.dtype == torch.float64
        or target.dtype == torch.float64
        or (target.dtype in _STORAGE and weight is not None and weight.dtype == torch.float64)
    )
    acc = torch.float64 if double else torch.float32
    if target.shape == input.shape:
        t = target.resolve_neg().detach()
        if double and x.dtype != torch.float64:
            t = t.to(torch.float64)
        if n_classes > FEW_CLASSES and (t.stride(axis) == 1) != (x.stride(axis) == 1):
            t = torch.empty_like(x, dtype=t.dtype).copy_(t)
        return _Call(x, axis, rows, target, None, t, w, u, float(math.prod(rows) if u is None else u.sum()), n_threads, acc)
    y = target.resolve_neg()
    if y.dtype != torch.int64 or not y.is_contiguous():
        y = _as_int64(y).contiguous()
    divisor = None
    if not _parallel.small(x.numel()):
        plan = flat_plan(y.numel(), n_classes, "f32")
        divisor, _, bad, _ = _parallel.run(
            "check_targets", plan, n_threads, y=y.data_ptr(), w=_address(w), u=_address(u), ignore=ignore_index
        )
        if bad:
            raise _out_of_bounds(target, n_classes, ignore_index)
    return _Call(x, axis, rows, target, y, None, w, u, divisor, n_threads, acc)


def _check_memory(*tensors: Tensor | None) -> None:
    """PyTorch lets the memory of a tensor be freed under it, or cut short."""
    for t in tensors:
        if t is not None and _bytes_behind(t) < _reach(t):
            raise RuntimeError(
                "The tensor has a non-zero number of elements, but its data is not allocated yet, or not any more."
            )


def _bytes_behind(t: Tensor) -> int:
    """Bytes of memory from a tensor's first element on."""
    return t.untyped_storage().nbytes() - int(t.storage_offset()) * t.element_size()


def _reach(t: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if t.numel() == 0:
        return 0
    return int(1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _out_of_bounds(target: Tensor, n_classes: int, ignore_index: int) -> IndexError:
    y = _as_int64(target)
    wrong = target[(y != ignore_index) & ((y < 0) | (y >= n_classes))]
    return IndexError(f"Target {wrong[0].item()} is out of bounds.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _walkable(x: Tensor, axis: int) -> bool:
    """May a kernel take x as it lies? Else lanes would be gathered for many classes: a copy is faster."""
    return x.shape[axis] <= FEW_CLASSES or any(s == 1 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True))


@lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size,
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    axis: int,
    dtype: torch.dtype,
    probabilities: torch.dtype | None,
    labelled: bool,
    smooth: bool,
    capped: bool,
) -> Plan:
    """``make_plan`` for tensors: their strides count elements."""
    sizes = (dtype.itemsize, dtype.itemsize, (probabilities or dtype).itemsize)
    x, g, t = (tuple(s * size for s in stride) for stride, size in zip(strides, sizes, strict=True))
    target = None if probabilities is None else _STORAGE[probabilities]
    return make_plan(tuple(shape), (x, g, t), axis, _STORAGE[dtype], target, labelled, smooth, capped)


def _run(name: str, call: _Call, g: Tensor, options: _Options, factor: float = 1.0) -> Tensor:
    """Run a task; its loss, reduced."""
    loss = torch.zeros(call.rows, dtype=call.acc) if options.reduction == _NONE else None
    x, t = call.x, call.t
    strides = (x.stride(), g.stride(), (x if t is None else t).stride())
    labelled, smooth = call.y is not None, call.y is not None and options.label_smoothing > 0
    plan = _plan(x.shape, strides, call.axis, x.dtype, None if t is None else t.dtype, labelled, smooth, options.softcap != 0)
    average = options.reduction == _MEAN
    total, _, bad, divisor = _parallel.run(
        name, plan, call.n_threads, x=x.data_ptr(), g=g.data_ptr(), t=_address(t),
        y=_address(call.y), w=_address(call.w), u=_address(call.u), loss=_address(loss), factor=factor,
        divisor=(call.divisor or math.nan) if average else 1.0, check=call.divisor is None, average=average,
        **_numbers(options, x.shape[call.axis]),
    )  # fmt: skip
    if bad:
        raise _out_of_bounds(call.target, x.shape[call.axis], options.ignore_index)
    return _scalar(total / divisor, call.acc) if loss is None else loss


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    try:
        return torch.scalar_tensor(value, dtype=dtype)
    except RuntimeError:  # it refuses what float32 rounds to infinity; torch.tensor does not, but takes twice the time
        return torch.tensor(value, dtype=dtype)


class _Small(NamedTuple):
    """Tasks for a kind of call that one thread does, and that was met before."""

    value: _parallel.SmallTask
    gradient: _parallel.SmallTask
    input_bytes: int
    target_bytes: int


_small: dict[tuple[Any, ...], _Small] = {}


def _kind(input: Tensor, target: Tensor, options: _Options) -> tuple[Any, ...]:
    """All that a call without weights is sorted by. The keys tell device, layout, and whatever else is odd about a tensor."""
    keys = torch._C._dispatch_keys
    return (
        type(input), input.shape, input.stride(), input.dtype, keys(input).raw_repr(),
        type(target), target.shape, target.stride(), target.dtype, keys(target).raw_repr(), options,
    )  # fmt: skip


def _remember(kind: tuple[Any, ...], input: Tensor, target: Tensor, options: _Options) -> None:
    """Keep the tasks of a call that was found good, if they can take its tensors as they lie."""
    axis = 0 if input.dim() == 1 else 1
    g = _gradient_like(input)
    if (
        input.dtype not in (torch.float32, torch.float64)
        or target.dtype != torch.int64
        or not target.is_contiguous()
        or options.reduction == _NONE
        or input.is_neg()
        or target.is_neg()
        or not _walkable(input, axis)
        or not _lies_well(g, input, axis)
    ):
        return
    strides = (input.stride(), g.stride(), input.stride())
    plan = _plan(input.shape, strides, axis, input.dtype, None, True, options.label_smoothing > 0, options.softcap != 0)
    arguments = _numbers(options, input.shape[axis]) | {"average": options.reduction == _MEAN}
    if len(_small) >= 4096:
        _small.clear()
    value, gradient = (_parallel.SmallTask(name, plan, **arguments) for name in ("value", "value_and_grad"))
    _small[kind] = _Small(value, gradient, _reach(input), _reach(target))


def _numbers(options: _Options, n_classes: int) -> dict[str, float]:
    """The options as the tasks know them."""
    return {
        "ignore": options.ignore_index, "keep": 1.0 - options.label_smoothing, "spread": options.label_smoothing / n_classes,
        "z": options.z_loss, "cap": options.softcap,
    }  # fmt: skip


def _lies_well(g: Tensor, x: Tensor, axis: int) -> bool:
    """Do the lanes of the gradient lie as those of the logits do?"""
    return x.shape[axis] <= FEW_CLASSES or (g.stride(axis) == 1) == (x.stride(axis) == 1)


def _small_loss(task: _parallel.SmallTask, options: _Options, input: Tensor, g: Tensor, target: Tensor) -> Tensor:
    total, _, bad, divisor = task(input.data_ptr(), g.data_ptr(), target.data_ptr())
    if bad:
        raise _out_of_bounds(target, input.shape[input.dim() > 1], options.ignore_index)
    return _scalar(total / divisor, input.dtype)


def _value(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: _Options) -> Tensor:
    call = _prepare(input, target, weight, sample_weight, options.ignore_index)
    return _run("value", call, call.x, options)


def _value_and_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: _Options,
    out: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss, and ``factor`` times its gradient, in ``out`` if given; that may be ``input``."""
    call = _prepare(input, target, weight, sample_weight, options.ignore_index)
    result = _gradient_like(input) if out is None else out
    g = result if _lies_well(result, call.x, call.axis) else torch.empty_like(call.x)
    loss = _run("value_and_grad", call, g, options, factor)
    if g is not result:
        result.copy_(g)
    return loss, result


def _gradient_like(input: Tensor) -> Tensor:
    """``torch.empty_like``, in recycled memory and huge pages where that counts."""
    nbytes = input.numel() * input.element_size()
    if nbytes < _memory.SMALLEST or not is_non_overlapping_and_dense(input):
        return torch.empty_like(input)
    flat = torch.from_numpy(_memory.buffer(nbytes)).view(input.dtype)
    return flat.as_strided(input.shape, input.stride())


# ----------------------------------------------------------------------------------------------------
# The same in PyTorch's operators
# ----------------------------------------------------------------------------------------------------


def _stock(input: Tensor, target: Tensor, weight: Tensor | None, options: _Options) -> Tensor:
    """PyTorch's own function, also while `install` has ours in its place."""
    op = torch.ops.aten.cross_entropy_loss.default
    arguments = (input, target, weight, options.reduction, options.ignore_index, options.label_smoothing)
    return op(*arguments) if _library is None else op.decompose(*arguments)


def _formula(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: _Options) -> Tensor:
    """The loss as an expression of differentiable operators, in float32 at least."""
    dim = 0 if input.dim() == 1 else 1
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    w = None if weight is None else weight.to(torch.promote_types(weight.dtype, torch.float32))
    if options.softcap:
        x = options.softcap * torch.tanh(x / options.softcap)
    kept = None
    if target.shape != x.shape:
        target = _as_int64(target)
        kept = target != options.ignore_index
        x = torch.where(kept.unsqueeze(dim), x, 0.0)  # nothing of an ignored row leaks into its gradient
    loss = _stock(x, target, w, options._replace(reduction=_NONE))
    if options.z_loss:
        z_loss = options.z_loss * torch.logsumexp(x, dim).square()
        loss = loss + (z_loss if kept is None else torch.where(kept, z_loss, 0.0))
    if sample_weight is not None:
        loss = loss * sample_weight
    if options.reduction == _MEAN:
        counted = torch.ones_like(loss) if sample_weight is None else sample_weight
        if kept is not None:
            if w is not None:
                classes = torch.where(kept, target, 0).unsqueeze(0)  # a tensor without axes, as index, would be read by vmap
                counted = counted * w[classes].squeeze(0)
            counted = torch.where(kept, counted, 0.0)
        loss = loss.sum() / counted.sum()
    elif options.reduction == _SUM:
        loss = loss.sum()
    return loss.to(_loss_dtype(input, target, weight))


# ----------------------------------------------------------------------------------------------------
# Autograd
# ----------------------------------------------------------------------------------------------------


class _Eager(torch.autograd.Function):
    """The node of eager mode. Its gradient is no saved tensor: it is made here, and handed over by the first backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        options: _Options,
        inplace: bool,
        small: _Small | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.inplace, ctx.grad = options, inplace, None
        if options.reduction == _NONE:
            ctx.save_for_backward(input, target, weight, sample_weight)
            return _value(input, target, weight, sample_weight, options)
        if small is not None:
            ctx.grad = torch.empty_like(input)
            loss = _small_loss(small.gradient, options, input, ctx.grad, target)
        else:
            out = input.detach() if inplace else None
            loss, ctx.grad = _value_and_grad(input, target, weight, sample_weight, options, out)
        if inplace:
            torch.autograd.graph.increment_version(input)
        else:
            ctx.save_for_backward(input, target, weight, sample_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * 6
        if grad_output is None:
            return None, *none
        batched = _is_batched(grad_output)
        if torch.is_grad_enabled() or (batched and ctx.options.reduction == _NONE):
            if ctx.inplace:
                raise RuntimeError("inplace=True has overwritten the logits: there is no double backward through it")
            return _differentiable_backward(ctx.saved_tensors, ctx.options, grad_output), *none
        if ctx.options.reduction == _NONE:
            input, target, weight, sample_weight = ctx.saved_tensors
            rows = grad_output if sample_weight is None else grad_output * sample_weight
            out = input.detach() if ctx.inplace else None
            _, grad = _value_and_grad(input, target, weight, rows, ctx.options._replace(reduction=_SUM), out)
            if ctx.inplace:
                torch.autograd.graph.increment_version(input)
            return grad, *none
        grad = ctx.grad
        if grad is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the gradient was handed over by the first backward. "
                "Specify retain_graph=True there."
            )
        if batched:
            return grad * grad_output, *none
        ours = not torch._C._autograd._get_current_graph_task_keep_graph()
        if ours:
            ctx.grad = None
        factor = grad_output.item()
        if factor == 1.0:  # kept for another backward, it must not become somebody's .grad, which is added to in place
            return (grad if ours else grad.clone()), *none
        if grad.element_size() == 2 and not ctx.inplace:
            # Half precision: a gradient that has been rounded once, perhaps to 0, cannot be scaled up any more.
            input, target, weight, sample_weight = ctx.saved_tensors
            out = grad if ours else None
            return _value_and_grad(input, target, weight, sample_weight, ctx.options, out, factor)[1], *none
        return (grad.mul_(factor) if ours else grad * factor), *none


# Function.apply without its look for functorch's tensors: `_cross_entropy` has sent those elsewhere.
_apply = super(torch.autograd.Function, _Eager).apply


def _is_batched(t: Tensor) -> bool:
    """Is it one of vmap's tensors (batched gradients: ``is_grads_batched``)?"""
    return torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)


def _differentiable_backward(tensors: Sequence[Tensor], options: _Options, grad_output: Tensor) -> Tensor:
    """The gradient as a function of logits and grad_output that can be differentiated again."""
    input, target, weight, sample_weight = tensors
    with torch.enable_grad():
        loss = _formula(input, target, weight, sample_weight, options).to(grad_output.dtype)
        (grad,) = torch.autograd.grad(loss, input, grad_output, create_graph=torch.is_grad_enabled())
    return grad


# ----------------------------------------------------------------------------------------------------
# Operators: what tracers see
# ----------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, "
    "int reduction, int ignore_index, float label_smoothing, float z_loss, float softcap"
)


def _value_impl(input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, *options: Any) -> Tensor:
    return _value(input, target, weight, sample_weight, _Options(*options))


def _value_and_grad_impl(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return _value_and_grad(input, target, weight, sample_weight, _Options(*options))


def _value_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, reduction: int, *_: Any
) -> Tensor:
    dim = 0 if input.dim() == 1 else 1
    rows = (*input.shape[:dim], *input.shape[dim + 1 :]) if reduction == _NONE else ()
    dtype = torch.promote_types(input.dtype, torch.float32)
    if target.dtype in _STORAGE:
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return input.new_empty(rows, dtype=dtype)


def _value_and_grad_fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _value_fake(input, *arguments), torch.empty_like(input)


def _operator_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    """Of both operators. The second one has made the gradient already."""
    *tensors, ctx.options = *inputs[:4], _Options(*inputs[4:])
    grad = None
    if isinstance(output, tuple):
        _, grad = output
        ctx.mark_non_differentiable(grad)
    ctx.save_for_backward(*tensors, grad)


def _operator_backward(ctx: Any, grad_output: Tensor, _: None = None) -> tuple[Tensor | None, ...]:
    *tensors, grad = ctx.saved_tensors
    none = (None,) * (3 + len(ctx.options))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiable_backward(tensors, ctx.options, grad_output), *none
    if ctx.options.reduction == _NONE:
        input, target, weight, sample_weight = tensors
        rows = grad_output if sample_weight is None else grad_output * sample_weight
        _, grad = _value_and_grad_op(input, target, weight, rows, *ctx.options._replace(reduction=_SUM))
        return grad, *none
    if grad is None:
        _, grad = _value_and_grad_op(*tensors, *ctx.options)
    return (grad * grad_output).to(grad.dtype), *none


torch.library.define("fastxent::cross_entropy", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("fastxent::cross_entropy_value_and_grad", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.impl("fastxent::cross_entropy", "CPU", _value_impl)
torch.library.impl("fastxent::cross_entropy_value_and_grad", "CPU", _value_and_grad_impl)
torch.library.register_fake("fastxent::cross_entropy", _value_fake)
torch.library.register_fake("fastxent::cross_entropy_value_and_grad", _value_and_grad_fake)
for _operator in ("fastxent::cross_entropy", "fastxent::cross_entropy_value_and_grad"):
    torch.library.register_autograd(_operator, _operator_backward, setup_context=_operator_context)
_value_op = torch.ops.fastxent.cross_entropy
_value_and_grad_op = torch.ops.fastxent.cross_entropy_value_and_grad


# ----------------------------------------------------------------------------------------------------
# For the whole process
# ----------------------------------------------------------------------------------------------------

_library: torch.library.Library | None = None
_CACHE_TAG = f" fastxent {__version__}"  # Inductor's cache on disk must tell our code for F.cross_entropy from PyTorch's


def install() -> None:
    """Route every cross-entropy on the CPU in this process through fastxent; `uninstall` undoes it.

    It takes the place of ``aten::cross_entropy_loss`` in PyTorch's dispatcher, for CPU tensors. So it reaches
    ``nn.CrossEntropyLoss``, functions imported by name, other libraries, and code compiled from now on; other devices are
    untouched. The formula is that of `cross_entropy`.

    Examples
    --------
    >>> import torch, fastxent.torch
    >>> fastxent.torch.install()
    >>> print(f"{torch.nn.functional.cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item():.4f}")
    1.3863
    >>> fastxent.torch.uninstall()
    """
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        for key in ("CPU", "AutogradCPU"):
            _library.impl("cross_entropy_loss", _in_place_of_aten, key)
        torch.compiler.config.cache_key_tag += _CACHE_TAG
        _forget_compiled_code()


def uninstall() -> None:
    """Give PyTorch its own cross-entropy back.

    Examples
    --------
    >>> import fastxent.torch
    >>> fastxent.torch.uninstall()
    """
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
        torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag.replace(_CACHE_TAG, "")
        _forget_compiled_code()


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the length of a ``with`` block; what was installed before stays so.

    Examples
    --------
    >>> import torch
    >>> from fastxent.torch import installed
    >>> with installed():
    ...     loss = torch.nn.CrossEntropyLoss()(torch.zeros(1, 4), torch.tensor([2]))
    >>> print(f"{loss.item():.4f}")
    1.3863
    """
    before = _library is not None
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _in_place_of_aten(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    return _cross_entropy(input, target, weight, None, _Options(reduction, ignore_index, label_smoothing, 0.0, 0.0), False)


def _forget_compiled_code() -> None:
    """What torch.compile made of the other cross-entropy is compiled again when it is called."""
    torch.ops.aten.cross_entropy_loss.default._dispatch_cache.clear()  # which kernel a tracer takes
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
