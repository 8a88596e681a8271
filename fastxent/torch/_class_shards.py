"""The loss of rows whose classes are sharded over processes: a shard's sums, what all make of them, the shard's gradient.

The maths is in ``_kernels.losses.class_shard``; the public functions are in ``fastxent.distributed``. A shard is one of logits,
whose node of autograd is here, or of a linear layer (``_linear_shards``).
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastxent._runtime.arguments import Array
from fastxent.torch import _bridge
from fastxent.torch._bridge import MEAN, NONE, Options, as_float64, as_int64
from fastxent.torch._decomposition import loss_dtype
from fastxent.torch._shard_messages import Alike, agree, all_reduced, errors_in_all

IGNORED = -1  # a class index of a shard: the row is ignored


class Sums(NamedTuple):
    """What a shard says of each row, in float64."""

    m: Array  # maximum
    log_s: Array  # log sum_c exp(x_c - m)
    d: Array  # with label smoothing, sum_c w_c (x_c - m)


class Shard(Protocol):
    """Some of the classes of all rows."""

    w: Tensor | None  # class weights

    @property
    def n_classes(self) -> int: ...

    def at_label(self, label: Array) -> Array:
        """Return one logit of each row, in float64: that of the class index ``label`` of this shard, any for `IGNORED`."""
        ...


class LogitsShard:
    """A shard of logits, with the classes on the axis of `cross_entropy`."""

    def __init__(self, logits: Tensor, w: Tensor | None) -> None:
        self.logits, self.w = logits, w
        self.axis = min(1, logits.dim() - 1)

    @property
    def n_classes(self) -> int:
        return self.logits.shape[self.axis]

    def sums(self, kept: Array, smooth: bool) -> Sums:
        """Return the sums of the rows; ``kept``: which are not ignored."""
        return first_trip(self.logits, self._as_rows(np.where(kept, 0, IGNORED)), self.w, smooth)

    def at_label(self, label: Array) -> Array:
        return at_label(self.logits, self._as_rows(label))

    def gradient(self, label: Array, of: Coefficients, uniform: float) -> Tensor:
        result = _bridge.gradient_like(self.logits)
        second_trip(self.logits, self._as_rows(label), self.w, of, uniform, result)
        return result

    def _as_rows(self, label: Array) -> Tensor:
        shape = self.logits.shape
        return torch.from_numpy(label).view(shape[: self.axis] + shape[self.axis + 1 :])


class Targets(NamedTuple):
    """What belongs to the rows and is the same in all processes, flattened. The numbers are NumPy's: no thread changes them."""

    y: Array
    kept: Array  # whether a row is not ignored
    u: Array | float  # sample weights, float64

    def only_kept(self) -> Targets:
        return Targets(self.y[self.kept], self.kept[self.kept], self.u[self.kept] if isinstance(self.u, np.ndarray) else self.u)


class Rows(NamedTuple):
    """What the backward needs of the rows, in float64."""

    label: Array  # class index in this shard, 0 if it is in another one, or `IGNORED`
    here: Array  # whether the target is in this shard
    top: Array  # maximum over all classes
    s: Array  # sum of exp(x - top) over all classes
    x: Array  # x - top of class ``label``
    w: Array | float  # weight of class ``label``
    t: Array  # (1 - eps) w_y
    uniform: float  # eps / C
    weights: float  # sum_c w_c
    u: Array | float  # sample weights
    divisor: float


class Coefficients(NamedTuple):
    """What the kernel makes the gradient of."""

    top: Array
    a: Array
    b: Array
    g_y: Array  # the gradient at class ``label``

    def part(self, rows: slice) -> Coefficients:
        return Coefficients(*(values[rows] for values in self))


def numbers(t: Tensor) -> Array:
    """Return a tensor's elements in row order as a flat NumPy array."""
    return t.detach().resolve_neg().reshape(-1).numpy()


def targets_of(target: Tensor, sample_weight: Tensor | None, options: Options) -> Targets:
    y = numbers(as_int64(target))
    return Targets(y, y != options.ignore_index, 1.0 if sample_weight is None else numbers(as_float64(sample_weight)))


def alike_of(targets: Targets, options: Options, has_weight: bool, input_requires_grad: bool = False) -> Alike:
    y, u = (float(zlib.crc32(np.asarray(values).tobytes())) for values in (targets.y, targets.u))
    return Alike(len(targets.y), y, u, has_weight, *options[:4], input_requires_grad)


def labels(y: Array, kept: Array, start: int, size: int) -> tuple[Array, Array]:
    """Return each row's class index in a shard, and whether it is that of its target: see `Rows`."""
    here = kept & (y >= start) & (y < start + size)
    return np.where(here, y - start, np.where(kept, 0, IGNORED)), here


# ----------------------------------------------------------------------------------------------------
# Forward
# ----------------------------------------------------------------------------------------------------


def losses(
    shard: Shard, sums: Sums, targets: Targets, alike: Alike, options: Options, group: dist.ProcessGroup,
    vocab_start: int | None,
) -> tuple[Array, Rows]:  # fmt: skip
    """Return the losses of the rows, and what the backward needs."""
    (m, log_s, d), (y, kept, u) = sums, targets
    start, n_classes, top = agree(group, alike, y[kept], shard.n_classes, vocab_start, m)
    smooth, n_rows = options.label_smoothing > 0.0, len(y)

    label, here = labels(y, kept, start, shard.n_classes)
    w = np.ones(shard.n_classes) if shard.w is None else numbers(as_float64(shard.w))
    w_label: Array | float = 1.0
    if shard.w is not None:
        w_label = w[label.clip(0)] if len(w) else 0.0
    with np.errstate(all="ignore"):  # infinite logits give nan as in PyTorch
        x_label = shard.at_label(label) - top
        message = [np.exp((m - top) + log_s), np.where(here, x_label, 0.0)]
        if shard.w is not None:
            message.append(np.where(here, w_label, 0.0))
        if smooth:
            message.append(d + w.sum() * (m - top) if shard.n_classes else np.zeros(n_rows))
        (weights,), s, x_y, *more = all_reduced(group, dist.ReduceOp.SUM, [np.array([w.sum()]), *message])

        w_y = 1.0 if shard.w is None else more[0]
        log_s = np.log(s)
        lse, uniform = top + log_s, options.label_smoothing / max(n_classes, 1)
        t = (1.0 - options.label_smoothing) * w_y * np.ones(n_rows)
        loss = t * (log_s - x_y) + options.z_loss * (lse * lse)
        if smooth:
            loss += uniform * (weights * log_s - more[-1])
        loss = np.where(kept, u * loss, 0.0)
    counted = np.where(kept, u * w_y, 0.0).sum() if options.reduction == MEAN else 1.0
    return loss, Rows(label, here, top, s, x_label, w_label, t, uniform, weights, u, counted or np.nan)


def first_trip(x: Tensor, label: Tensor, w: Tensor | None, smooth: bool) -> Sums:
    """Return the sums of logits; ``label``, of the rows' shape, says which are ignored."""
    n = label.numel()
    if x.numel() == 0:
        return Sums(np.full(n, -np.inf), np.zeros(n), np.zeros(n))
    call = _bridge.prepare(x, label, w, None)
    m = np.empty(n, np.float64 if call.acc == torch.float64 else np.float32)
    log_s, d = np.empty(n), np.zeros(n)
    _bridge.run_task(
        "class_shard", call, call.x, _flags(smooth), ignore=IGNORED, uniform=1.0, lse=m.ctypes.data, v=log_s.ctypes.data,
        b=d.ctypes.data,
    )  # fmt: skip
    return Sums(m.astype(np.float64), log_s, np.where(m == -np.inf, -np.inf, d))


def at_label(x: Tensor, label: Tensor) -> Array:
    """Return one logit of each row, in float64; 0 in an empty shard."""
    if x.numel() == 0:
        return np.zeros(label.numel())
    axis = min(1, x.dim() - 1)
    return numbers(x.gather(axis, label.clamp(min=0).unsqueeze(axis)).double())


# ----------------------------------------------------------------------------------------------------
# Backward
# ----------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def coefficients(rows: Rows, options: Options, grad_output: Array) -> Coefficients:
    b = grad_output * rows.u / rows.divisor * np.ones(rows.s.size)
    log_s = np.log(rows.s)
    q_sum, of_z = rows.t + rows.uniform * rows.weights, 2.0 * options.z_loss * (rows.top + log_s)
    a = b * (q_sum + of_z) / rows.s
    p = np.exp(rows.x) / rows.s
    smoothed = rows.uniform * (rows.weights * p - rows.w) if rows.uniform else 0.0
    # At the target, p - 1 would lose digits by cancellation.
    g_y = b * (rows.t * np.where(rows.here, np.expm1(rows.x - log_s), p) + smoothed + of_z * p)
    return Coefficients(rows.top, a, b, g_y)


def second_trip(x: Tensor, label: Tensor, w: Tensor | None, of: Coefficients, uniform: float, result: Tensor) -> None:
    """Write the gradient of logits, which it may overwrite."""
    if x.numel() == 0:
        return
    call = _bridge.prepare(x, label, w, torch.from_numpy(of.a).view(label.shape))
    g = result if _bridge.lies_well(result, call.x, call.axis) else torch.empty_like(call.x)
    _bridge.run_task(
        "class_shard_grad", call, g, _flags(uniform > 0.0), ignore=IGNORED, uniform=uniform, v=of.top.ctypes.data,
        b=of.b.ctypes.data, g_y=of.g_y.ctypes.data,
    )  # fmt: skip
    if g is not result:
        result.copy_(g)


def _flags(smooth: bool) -> dict[str, bool]:
    return {"labelled": True, "smooth": smooth, "capped": False}


# ----------------------------------------------------------------------------------------------------
# Autograd
# ----------------------------------------------------------------------------------------------------


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, target: Tensor, sample_weight: Tensor | None,
        group: dist.ProcessGroup, vocab_start: int | None, options: Options,
    ) -> Tensor:  # fmt: skip
        with errors_in_all(group):
            shard = LogitsShard(input, weight)
            targets = targets_of(target, sample_weight, options)
            alike = alike_of(targets, options, weight is not None)
            sums = shard.sums(targets.kept, options.label_smoothing > 0.0)
        loss, ctx.rows = losses(shard, sums, targets, alike, options, group, vocab_start)
        ctx.options = options
        ctx.save_for_backward(input, weight)
        dtype = loss_dtype(input, target, None)
        if options.reduction == NONE:
            return torch.from_numpy(loss).view(target.shape).to(dtype)
        return reduced(loss, ctx.rows.divisor, dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        shard, rows = LogitsShard(*ctx.saved_tensors), ctx.rows
        of = coefficients(rows, ctx.options, numbers(as_float64(grad_output)))
        return shard.gradient(rows.label, of, rows.uniform), *(None,) * 6


def reduced(loss: Array, divisor: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(loss.sum() / divisor, dtype=dtype)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("the gradient of a vocabulary-parallel cross_entropy cannot be differentiated: create_graph=True")
