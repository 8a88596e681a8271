"""Truth, and the error budget that results are held to.

The budget has no tolerance in it: fastxent may be as wrong as PyTorch is on the same case, plus one unit in the last place. See
`Budget`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fastxent import reference as ref
from tests.helpers.cases import FLOAT64, Case


def widest(a: Any, wide: Any = None) -> Any:
    """`a`, if it is floating, in `wide`: by default in longdouble if it is float64, else in float64.

    An argument so widened makes of the reference a truth much finer than the dtype it judges. longdouble has 64
    bits of significand where the machine has any; it is slow, so float32 and less are judged in float64.
    """
    array = np.asarray(a)
    if isinstance(a, int) or array.dtype.kind in "iub":
        return a
    wide = wide or (np.longdouble if array.dtype.kind == "f" and array.dtype.itemsize >= 8 else np.float64)
    return array.astype(wide)[()]


def widest_case(case: Case) -> Case:
    """All floating arguments in the precision that the finest array among them asks for."""
    floats = [a for a in (case.logits, case.target, *case.options.values()) if isinstance(a, np.ndarray)]
    wide = np.longdouble if any(a.dtype == FLOAT64 for a in floats) else np.float64
    options = {k: widest(v, wide) for k, v in case.options.items()}
    return Case(widest(case.logits, wide), widest(case.target, wide), options)


class Truth(NamedTuple):
    """What is right, and the size of the largest term that its formula adds up (the unit of the budget)."""

    loss: np.ndarray
    grad: np.ndarray
    loss_scale: np.ndarray
    grad_scale: np.ndarray


@np.errstate(all="ignore")
def make_truth(case: Case, reduction: str) -> Truth:
    """Loss and gradient by the reference, from widened arguments; z-loss and softcap, which it has not, are written out.

    With y the capped logits, lse = log sum exp y and u the row's weight, a row's loss is u (-sum_c q_c logp_c + z lse^2), its
    gradient u (Q p - q + 2 z lse p) times dy/dx = 1 - tanh(x / cap)^2.

    Scales. Without extras the loss of a row is u Q (m - x_y + log s), m its maximum, s = sum exp(x - m) >= 1. A relative
    error of s is an absolute one of log s, so the unit is that of max(loss, u Q). The gradient u (Q p - q) has
    that of the larger of its two terms, and p = exp(logp) that of p max(1, |logp|), as logp is rounded too. A cap makes logits
    that are rounded themselves, by an ulp at their size: of the loss this is an absolute error, of the probabilities a
    relative one.
    """
    x, target, options = widest_case(case)
    z, cap = options.pop("z_loss", 0), options.pop("softcap", None)
    slope, size = np.ones_like(x), np.ones(x.shape[:-1])
    if cap is not None:
        bent = np.tanh(x / cap)
        x, slope = cap * bent, 1 - bent**2
        size = np.maximum(size, np.abs(x).max(-1, initial=0))
    defaults = dict(weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0)
    r = ref._rows(x, target, -1, *(defaults | options).values())
    u, keep, q_sum = r.u[..., None], r.keep[..., None], r.q.sum(-1)
    lse, p, log_p = ref.logsumexp(r.x, -1), ref.softmax(r.x, -1), ref.log_softmax(r.x, -1)
    penalty = np.where(r.keep, r.u * z * lse**2, 0) if z else np.zeros(r.u.shape)
    push = 2 * z * lse[..., None] if z else np.zeros_like(u)
    divisor = r.divisor if reduction == "mean" else 1
    losses = ref._losses(r) + penalty
    grad = np.where(keep, (ref._gradients(r) + u * push * p) * slope / divisor, 0)
    loss_scale = np.maximum(np.maximum(np.abs(losses), penalty), r.u * q_sum * size)
    p_scale = p * np.maximum(size[..., None], np.abs(log_p))
    grad_scale = u * slope * np.maximum(np.maximum(q_sum[..., None], np.abs(push)) * p_scale, r.q) / divisor
    loss, loss_scale = (ref._reduce(a, r.divisor, reduction) for a in (losses, loss_scale))
    return Truth(loss, grad, loss_scale, grad_scale)


def ulp(size: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The gap between neighbours of `dtype` at numbers of this `size`; subnormal numbers share one gap."""
    info = ml_dtypes.finfo(dtype)
    return np.ldexp(1.0, np.maximum(np.frexp(size)[1] - 1, info.minexp) - info.nmant)


class Budget:
    """Collects results of one kind and asserts |ours - truth| <= |PyTorch - truth| + 1 ulp over all of them.

    Both errors are counted in ulps of the dtype of ours, in two sup-norms:

    0. element by element, in ulps at `scale`: small elements count as much as large ones. `scale` is the size
       of the largest term of the element's formula (by default the size of the truth), because a difference
       cannot be known better than its terms;
    1. a whole array at once, in ulps at its largest `scale`: the plain absolute error.

    Several results (reductions, shapes) share one budget, because of a single number PyTorch's error says
    nothing: it may be 0 by luck. Where the truth is nan or infinite, or too large for the dtype, ours must be
    just that, and nowhere else.
    """

    def __init__(self) -> None:
        self.ours, self.torch, self.where = np.zeros(2), np.zeros(2), ["", ""]

    def add(self, ours: Any, truth: Any, torch_result: Any, scale: Any = None, label: object = "") -> None:
        ours, truth, other = np.asarray(ours), np.asarray(truth), np.asarray(torch_result)
        assert ours.shape == truth.shape == other.shape, label
        scale = np.broadcast_to(np.abs(truth) if scale is None else scale, truth.shape)
        truth = np.where(np.abs(truth) > ml_dtypes.finfo(ours.dtype).max, np.copysign(np.inf, truth), truth)
        wide, finite = ours.astype(truth.dtype), np.isfinite(truth)
        np.testing.assert_array_equal(wide[~finite], truth[~finite], err_msg=str(label))
        if not finite.any():
            return
        wide, truth, scale, other = wide[finite], truth[finite], scale[finite], other[finite]
        assert np.isfinite(wide).all(), f"{label}: not finite where the truth is"
        assert np.isfinite(other).all(), f"{label}: PyTorch is not finite and sets no budget"
        scale = np.maximum(scale, np.abs(truth))
        for norm, size in enumerate((scale, scale.max()) if ours.ndim else (scale,)):
            mine, torchs = ((np.abs(x - truth) / ulp(size, ours.dtype)).max() for x in (wide, other))
            self.torch[norm] = max(self.torch[norm], torchs)
            if mine > self.ours[norm]:
                self.ours[norm], self.where[norm] = mine, str(label)

    def check(self) -> None:
        for norm, ours, allowed, where in zip("01", self.ours, self.torch + 1, self.where, strict=True):
            assert ours <= allowed, f"norm {norm}: {ours:.2f} ulp off ({where}), PyTorch {allowed - 1:.2f}"


def assert_within_budget(ours: Any, truth: Any, torch_result: Any, scale: Any = None, label: object = "") -> None:
    """A budget of one result."""
    budget = Budget()
    budget.add(ours, truth, torch_result, scale, label)
    budget.check()
