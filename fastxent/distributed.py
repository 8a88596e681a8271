"""Cross-entropy of logits whose classes are sharded over the processes of a ``torch.distributed`` group (vocabulary-parallel).

A call reads the shard's logits once and exchanges two messages: the rows' maxima, then their sums, which all processes merge in
float64. The backward reads the shard once more and sends nothing. The maths is in ``fastxent._kernels.losses.class_shard``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

try:
    import torch
    import torch.distributed as dist
except ImportError as error:
    raise ImportError("fastxent.distributed needs PyTorch: pip install 'fastxent[distributed]'", name="torch") from error
from torch import Tensor, nn

from fastxent._runtime.arguments import Array
from fastxent._runtime.options import checked
from fastxent.torch import _bridge
from fastxent.torch._bridge import INTEGERS, MEAN, NONE, as_float64, as_int64
from fastxent.torch._decomposition import loss_dtype

__all__ = ["cross_entropy"]

IGNORED = -1  # a class index of a shard: the row is ignored


def cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Softmax cross-entropy of logits of which each process of a group holds a shard of the classes.

    .. math::
        l_n = u_n \left[-\sum_c q_{nc} \log p_{nc} + z\, \mathrm{lse}_n^2\right], \qquad
        q_{nc} = w_c \left[(1 - \epsilon)\, [c = y_n] + \epsilon / C\right]

    over all C classes of the group: the sum over a row's classes is merged from those of the shards,

    .. math::
        \mathrm{lse}_n = M_n + \log \sum_r s_{nr}\, e^{m_{nr} - M_n}, \qquad M_n = \max_r m_{nr}

    with the maximum m and the sum s of exponentials of shard r. Every process of the group calls this function, with its own
    shard, and otherwise with the same arguments. It sends two all-reduces, and none in the backward.

    Parameters
    ----------
    local_logits : Tensor, shape (C_r,), (N, C_r) or (N, C_r, d1, ...)
        This process's classes; float16, bfloat16, float32 or float64, any strides. Shards follow one another in the order of
        the ranks; they may differ in size, and be empty. Or a ``DTensor`` that is sharded on the class axis, which brings its
        group along; if it is sharded on rows too, the loss is that of this process's rows.
    target : Tensor of any integer dtype, shape (), (N,) or (N, d1, ...)
        Class indices y, counted over all shards.
    group : ProcessGroup, optional
        The processes that hold the shards; None: all.
    vocab_start : int, optional
        The number of the shard's first class. It follows from the sizes of the shards, and if given, it is compared with that.
    weight : Tensor, shape (C_r,), optional
        Class weights w of the shard's classes.
    sample_weight : Tensor, shape of ``target``, optional
        Sample weights u.
    ignore_index : int
        Rows with this class index are skipped: loss 0, gradient 0, not counted.
    label_smoothing : float in [0, 1]
        eps, spread over the classes of all shards.
    z_loss : float
        z, which pulls the log-normaliser lse to 0.
    reduction : {"mean", "sum", "none"}
        As in `fastxent.torch.cross_entropy`.

    Returns
    -------
    Tensor
        The loss of the whole rows, with the same bits in every process: a number, or with ``reduction="none"`` a tensor of the
        shape of ``target``. Its backward gives each process the gradient of its shard.

    Raises
    ------
    IndexError
        A class index is neither ``ignore_index`` nor that of a class. All processes raise it, even if it is in one of them.
    ValueError, TypeError, RuntimeError
        An argument does not fit; the processes whose own arguments are right raise a RuntimeError then.

    References
    ----------
    Shoeybi et al., *Megatron-LM*, arXiv:1909.08053, 3. Milakov, Gimelshein, arXiv:1805.02867.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> from fastxent.distributed import cross_entropy
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([1, 3]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}")
    1.3863
    >>> logits.grad
    tensor([[ 0.1250, -0.3750,  0.1250,  0.1250],
            [ 0.1250,  0.1250,  0.1250, -0.3750]])
    >>> dist.destroy_process_group()
    """
    if hasattr(local_logits, "to_local"):
        local_logits, group = _shard_of(local_logits)
    if hasattr(target, "to_local"):
        target = target.to_local()
    if target.dtype not in INTEGERS:
        raise TypeError(f"target has dtype {target.dtype}; a vocabulary-parallel cross_entropy takes class indices")
    options = _Options(nn._reduction.get_enum(reduction), ignore_index, label_smoothing, z_loss)
    return _VocabularyParallel.apply(local_logits, target, weight, sample_weight, group, vocab_start, options)


# ----------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    reduction: int
    ignore_index: int
    label_smoothing: float
    z_loss: float


class _Shard(NamedTuple):
    """A shard, as the kernels take it."""

    x: Tensor
    axis: int  # class axis
    w: Tensor | None  # class weights
    label: Tensor  # of each row: its class index in this shard, 0 if that is in another one, or IGNORED


class _Rows(NamedTuple):
    """What the backward needs of the rows, in float64, flattened. They are NumPy's: its bits do not depend on threads."""

    top: Array  # maximum over all classes
    s: Array  # sum of exp(x - top) over all classes
    x: Array  # x - top of class ``label``
    here: Array  # whether that class is the target
    t: Array  # (1 - eps) w_y
    uniform: float  # eps / C
    weights: float  # sum_c w_c
    u: Array | float  # sample weights
    divisor: float


class _VocabularyParallel(torch.autograd.Function):
    """The autograd node."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None,
        group: dist.ProcessGroup | None, vocab_start: int | None, options: _Options,
    ) -> Tensor:  # fmt: skip
        loss, shard, ctx.rows = _forward(input, target, weight, sample_weight, group, vocab_start, options)
        ctx.options = options
        ctx.save_for_backward(input, weight, shard.label)
        dtype = loss_dtype(input, target, None)
        if options.reduction == NONE:
            return torch.from_numpy(loss).view(target.shape).to(dtype)
        return torch.tensor(loss.sum() / ctx.rows.divisor, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of a vocabulary-parallel cross_entropy cannot be differentiated: create_graph=True"
            )
        input, weight, label = ctx.saved_tensors
        shard = _Shard(input, min(1, input.dim() - 1), weight, label)
        return _gradient(shard, ctx.rows, ctx.options, _numbers(as_float64(grad_output))), *(None,) * 6


def _shard_of(logits: Any) -> tuple[Tensor, dist.ProcessGroup]:
    """Return the local tensor of a DTensor, and the group over which its class axis is sharded."""
    axis = min(1, logits.dim() - 1)
    over = [dim for dim, placement in enumerate(logits.placements) if placement.is_shard(axis)]
    if len(over) != 1 or any(placement.is_partial() for placement in logits.placements):
        raise ValueError(f"local_logits has placements {logits.placements}; one of them must shard the class axis, {axis}")
    return logits.to_local(), logits.device_mesh.get_group(over[0])


def _forward(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None,
    group: dist.ProcessGroup | None, vocab_start: int | None, options: _Options,
) -> tuple[Array, _Shard, _Rows]:  # fmt: skip
    """Return the losses of the rows, and what the backward needs."""
    y = _numbers(as_int64(target))
    kept = y != options.ignore_index
    label = torch.from_numpy(np.where(kept, 0, IGNORED)).view(target.shape)
    shard = _Shard(input, min(1, input.dim() - 1), weight, label)
    smooth = options.label_smoothing > 0.0

    error = _error(input, target, weight, sample_weight, options)
    m, log_s, d = (np.full(y.size, -np.inf) for _ in range(3)) if error else _sums(shard, smooth)
    size = 0 if error else input.shape[shard.axis]
    start, n_classes, top = _agree(error, y[kept], size, vocab_start, m, group)

    here = kept & (y >= start) & (y < start + size)
    shard = shard._replace(label=torch.from_numpy(np.where(here, y - start, label.flatten())).view(target.shape))
    w = np.ones(size) if weight is None else _numbers(as_float64(weight))
    with np.errstate(all="ignore"):  # infinite logits give nan as in PyTorch
        x_label = _at_label(shard) - top
        message = [np.exp((m - top) + log_s), np.where(here, x_label, 0.0)]
        if weight is not None:
            message.append(np.where(here, _weights_at_label(shard), 0.0))
        if smooth:
            message.append(d + w.sum() * (m - top) if size else np.zeros(y.size))
        (weights,), *sums = _all_reduced(dist.ReduceOp.SUM, [np.array([w.sum()]), *message], group)

        s, x_y, w_y = sums[0], sums[1], 1.0 if weight is None else sums[2]
        log_s = np.log(s)
        lse, uniform = top + log_s, options.label_smoothing / n_classes
        t = (1.0 - options.label_smoothing) * w_y * np.ones(y.size)
        loss = t * (log_s - x_y) + options.z_loss * (lse * lse)
        if smooth:
            loss += uniform * (weights * log_s - sums[-1])
        u = 1.0 if sample_weight is None else _numbers(as_float64(sample_weight))
        loss = np.where(kept, u * loss, 0.0)
    counted = np.where(kept, u * w_y, 0.0).sum() if options.reduction == MEAN else 1.0
    return loss, shard, _Rows(top, s, x_label, here, t, uniform, weights, u, counted or np.nan)


def _error(
    input: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: _Options
) -> Exception | None:
    """Return what is wrong with the arguments of this process, or None."""
    try:
        checked("label_smoothing", options.label_smoothing)
        _bridge.check_operands(input, target, weight, sample_weight)
    except Exception as error:
        return error
    return None


def _sums(shard: _Shard, smooth: bool) -> tuple[Array, Array, Array]:
    """Return the maximum m of each row, log sum_c exp(x_c - m) and, with label smoothing, sum_c w_c (x_c - m)."""
    call = _bridge.prepare(shard.x, shard.label, shard.w, None)
    n = shard.label.numel()
    if shard.x.numel() == 0:
        return np.full(n, -np.inf), np.zeros(n), np.zeros(n)
    m = np.empty(n, np.float64 if call.acc == torch.float64 else np.float32)
    log_s, d = np.empty(n), np.zeros(n)
    _bridge.run_task(
        "class_shard", call, call.x, _flags(smooth), ignore=IGNORED, uniform=1.0, lse=m.ctypes.data, v=log_s.ctypes.data,
        b=d.ctypes.data,
    )  # fmt: skip
    return m.astype(np.float64), log_s, np.where(m == -np.inf, -np.inf, d)


def _agree(
    error: Exception | None, kept: Array, size: int, vocab_start: int | None, m: Array, group: dist.ProcessGroup | None
) -> tuple[int, int, Array]:
    """Return the first class of this shard, the number of classes of all shards, and the maxima of the rows over all of them.

    This is one message, a maximum over the processes: it also tells each of them what all others have to say against the call,
    so that none goes on to wait for one that has raised an error.
    """
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    sizes, starts = np.zeros(n_ranks), np.full(n_ranks, -1.0)
    sizes[rank], starts[rank] = size, -1.0 if vocab_start is None else vocab_start
    targets = np.array([float(kept.max(initial=-1)), -float(kept.min(initial=0))])
    failed, targets, sizes, starts, top = _all_reduced(
        dist.ReduceOp.MAX, [np.array([float(error is not None)]), targets, sizes, starts, m], group
    )
    if error is not None:
        raise error
    if failed[0]:
        raise RuntimeError("cross_entropy: the arguments of another process of the group do not fit, and it raises an error")
    largest, smallest, n_classes = int(targets[0]), -int(targets[1]), int(sizes.sum())
    if largest >= n_classes or smallest < 0:
        raise IndexError(f"Target {largest if largest >= n_classes else smallest} is out of bounds.")
    first = np.cumsum(sizes) - sizes
    if ((starts >= 0) & (starts != first)).any():
        given, right = (list(map(int, a)) for a in (starts, first))
        raise ValueError(f"vocab_start is {given} in the order of the ranks; by the sizes of the shards it is {right}")
    return int(first[rank]), n_classes, top


def _all_reduced(op: Any, parts: list[Array], group: dist.ProcessGroup | None) -> list[Array]:
    """Return arrays, reduced over the processes in one message."""
    message = np.concatenate(parts)
    dist.all_reduce(torch.from_numpy(message), op, group)
    return np.split(message, np.cumsum([len(part) for part in parts[:-1]]))


def _gradient(shard: _Shard, rows: _Rows, options: _Options, grad_output: Array) -> Tensor:
    """Return the gradient of the shard, which the kernel writes given the coefficients of the rows: see ``class_shard``."""
    result = _bridge.gradient_like(shard.x)
    if result.numel() == 0:
        return result
    with np.errstate(all="ignore"):
        b = grad_output * rows.u / rows.divisor * np.ones(rows.s.size)
        log_s = np.log(rows.s)
        q_sum, of_z = rows.t + rows.uniform * rows.weights, 2.0 * options.z_loss * (rows.top + log_s)
        a = b * (q_sum + of_z) / rows.s
        p = np.exp(rows.x) / rows.s
        smoothed = rows.uniform * (rows.weights * p - _weights_at_label(shard)) if rows.uniform else 0.0
        # At the target, p - 1 would lose digits by cancellation.
        g_y = b * (rows.t * np.where(rows.here, np.expm1(rows.x - log_s), p) + smoothed + of_z * p)
    call = _bridge.prepare(shard.x, shard.label, shard.w, torch.from_numpy(a).view(shard.label.shape))
    g = result if _bridge.lies_well(result, call.x, call.axis) else torch.empty_like(call.x)
    _bridge.run_task(
        "class_shard_grad", call, g, _flags(rows.uniform > 0.0), ignore=IGNORED, uniform=rows.uniform,
        v=rows.top.ctypes.data, b=b.ctypes.data, g_y=g_y.ctypes.data,
    )  # fmt: skip
    return result if g is result else result.copy_(g)


def _flags(smooth: bool) -> dict[str, bool]:
    return {"labelled": True, "smooth": smooth, "capped": False}


def _at_label(shard: _Shard) -> Array:
    """Return the logits of classes ``label``, in float64; 0 in an empty shard."""
    if shard.x.numel() == 0:
        return np.zeros(shard.label.numel())
    index = shard.label.clamp(min=0).unsqueeze(shard.axis)
    return _numbers(shard.x.gather(shard.axis, index).double())


def _weights_at_label(shard: _Shard) -> Array | float:
    """Return the weights of classes ``label``."""
    if shard.w is None:
        return 1.0
    return _numbers(as_float64(shard.w))[_numbers(shard.label).clip(0)] if len(shard.w) else 0.0


def _numbers(t: Tensor) -> Array:
    """Return a tensor's elements in row order as a flat NumPy array."""
    return t.detach().resolve_neg().reshape(-1).numpy()
