"""The mathematics of fastxent in textbook NumPy: slow, short, in float64.

Every function has the name and the arguments of its fast twin in `fastxent`, less ``out``, ``n_threads`` and ``memory_limit``.
It is the oracle of the tests and the baseline of the benchmarks, so it is written from the formula, not from
the fast code, and it checks no argument, but that no mask is lost. Logits of any float type are widened to
float64 and results stay float64; `numpy.longdouble` logits stay as wide as they are, which gives a truth that
is finer than float64.

Notation: x are the logits of one row, C classes, y its class index, and

    p_c  = exp(x_c) / sum_k exp(x_k)          softmax, and logp its logarithm
    t'_c = (1 - eps) t_c + eps / C            smoothed target; t is one-hot at y, or the class probabilities
    q_c  = w_c t'_c,   Q = sum_c q_c          with the weights of the classes
    u                                         the weight of the row (sample_weight)
    loss = -u sum_c q_c logp_c                gradient_c = u (Q p_c - q_c) = u ((Q - q_c) p_c - q_c (1 - p_c))

The sum of exponentials is kept as n + rest, the n terms at the maximum (each 1) and the others, for where rest is
small 1 + rest would lose it: the logarithm is log n + log1p(rest / n), and 1 - p of the maximum is rest / (1 + rest).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

__all__ = [
    "CrossEntropyStats",
    "LinearGradients",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy_with_logits_value_and_grad",
    "cross_entropy",
    "cross_entropy_grad_hess",
    "cross_entropy_stats",
    "cross_entropy_value_and_grad",
    "entropy",
    "focal_loss",
    "focal_loss_value_and_grad",
    "kl_div",
    "linear_cross_entropy",
    "linear_cross_entropy_stats",
    "linear_cross_entropy_value_and_grad",
    "linear_log_prob_and_entropy",
    "log_prob_and_entropy",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "softmax",
]

Array = npt.NDArray[Any]
Axis = int | tuple[int, ...] | None
Function = TypeVar("Function", bound=Callable[..., Any])


class CrossEntropyStats(NamedTuple):
    """What `cross_entropy_stats` returns, one value a row (`loss`: after its reduction)."""

    loss: Array
    lse: Array
    entropy: Array
    target_prob: Array
    prediction: Array
    target_rank: Array


class LinearGradients(NamedTuple):
    """The gradients of `linear_cross_entropy_value_and_grad`, in the shapes of its arguments."""

    input: Array
    linear_weight: Array
    linear_bias: Array | None


class _Rows(NamedTuple):
    """One problem in the letters of the module, classes on the last axis."""

    x: Array  # (..., C) logits; 0 in ignored rows, so that what stands there reaches nothing
    t: Array  # (..., C) target distribution, not smoothed; 0 in ignored rows
    q: Array  # (..., C) w t'
    used: Array  # (..., C) is the class in the formula? Without smoothing, a class index brings in y alone
    keep: Array  # (...) False where the row is ignored
    u: Array  # (...) weight of the row, 0 where ignored
    divisor: float  # what "mean" divides by; nan for 0: the mean of nothing


def _formula(function: Function) -> Function:
    """What is nan or inf is returned without a word; an array whose mask would be lost is refused."""

    @wraps(function)
    @np.errstate(all="ignore")
    def call(*args: Any, **options: Any) -> Any:
        for name, value in signature(function).bind(*args, **options).arguments.items():
            if isinstance(value, np.ma.MaskedArray):
                raise TypeError(f"{name} is a masked array, whose mask would be lost; pass {name}.filled(value)")
        return function(*args, **options)

    return cast(Function, call)


def _wide(a: npt.ArrayLike) -> Array:
    """`a` in float64, or in its own type where that is wider."""
    array = np.asarray(a)
    return array.astype(np.result_type(array.dtype, np.float64))


def _distribution(x: Array, target: npt.ArrayLike, axis: int, ignore_index: int) -> tuple[Array, Array, bool]:
    """The target as a distribution t over the last axis, which rows are kept, and whether t came as one."""
    t = np.asarray(target)
    if t.ndim == x.ndim:
        return np.moveaxis(_wide(t), axis, -1), np.full(x.shape[:-1], True), True
    keep = t != ignore_index
    return (t[..., None] == np.arange(x.shape[-1])) & keep[..., None], keep, False


def _rows(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    axis: int,
    weight: npt.ArrayLike | None,
    sample_weight: npt.ArrayLike | None,
    ignore_index: int,
    eps: float,
) -> _Rows:
    x = np.moveaxis(_wide(logits), axis, -1)
    C = x.shape[-1]
    t, keep, soft = _distribution(x, target, axis, ignore_index)
    w = np.ones(C) if weight is None else _wide(weight)
    u = np.where(keep, 1.0 if sample_weight is None else _wide(sample_weight), 0.0)
    q = w * ((1 - eps) * t + eps / max(C, 1))
    used = np.full(x.shape, True) if soft or eps > 0 else t
    divisor = u.sum() * np.sign(C) if soft else (u * (t @ w)).sum()  # no class, no row: as PyTorch counts
    return _Rows(np.where(keep[..., None], x, 0.0), t, q, used, keep, u, divisor or np.nan)


def _losses(r: _Rows) -> Array:
    """Loss of each row. The terms that are not in the formula are left out: 0 * inf would be nan."""
    return np.where(r.keep, r.u * (0.0 - np.where(r.used, r.q * log_softmax(r.x, -1), 0.0).sum(-1)), 0.0)


def _gradients(r: _Rows) -> Array:
    """Gradient of each row's own loss, classes on the last axis."""
    p, others = _probabilities(r.x)
    g = r.u[..., None] * ((r.q.sum(-1, keepdims=True) - r.q) * p - r.q * others)
    return np.where(r.keep[..., None], g, 0.0)


@np.errstate(all="ignore")
def _probabilities(x: Array) -> tuple[Array, Array]:
    """p and 1 - p over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True, initial=-np.inf))
    n = (e == 1).sum(-1, keepdims=True)
    rest = np.where(e == 1, 0.0, e).sum(-1, keepdims=True)
    return e / (n + rest), ((n - e) + rest) / (n + rest)


def _of_target(r: _Rows) -> tuple[Array, Array, Array]:
    """p, 1 - p and log p of each row's class index."""
    y = r.t.argmax(-1)[..., None]
    p, others, logp = (np.take_along_axis(a, y, -1)[..., 0] for a in (*_probabilities(r.x), log_softmax(r.x, -1)))
    return p, others, logp


def _layer(
    input: npt.ArrayLike, linear_weight: npt.ArrayLike, linear_bias: npt.ArrayLike | None, softcap: float | None
) -> tuple[Array, Array]:
    """Logits of a linear layer, capped, and the derivative of the cap."""
    x = _wide(input) @ _wide(linear_weight).T + (0.0 if linear_bias is None else _wide(linear_bias))
    if softcap is None:
        return x, np.ones_like(x)
    return softcap * np.tanh(x / softcap), 1 - np.tanh(x / softcap) ** 2


def _penalties(r: _Rows, z: float) -> Array:
    """u z lse^2 of each row."""
    return np.where(r.keep, r.u * z * logsumexp(r.x, -1) ** 2, 0.0) if z else np.zeros(r.u.shape, r.x.dtype)


def _log_of_sum(f: Any, e: Array, axis: Axis, keepdims: bool) -> tuple[Array, Array]:
    """log |sum_k f_k e_k| of exponentials of which the largest are 1, and the sign of the sum."""
    n = np.where(e == 1, f * e, 0.0).sum(axis, keepdims=keepdims)
    rest = np.where(e == 1, 0.0, f * e).sum(axis, keepdims=keepdims)
    s = n + rest
    return np.where(np.abs(rest) < np.abs(n), np.log(np.abs(n)) + np.log1p(rest / n), np.log(np.abs(s))), np.sign(s)


def _reduce(losses: Array, divisor: Any, reduction: str) -> Array:
    return losses[()] if reduction == "none" else losses.sum() / (divisor if reduction == "mean" else 1)


@_formula
def softmax(x: npt.ArrayLike, axis: Axis = None) -> Array:
    """Softmax: p_c = exp(x_c) / sum_k exp(x_k), over `axis` (None: over all of `x`).

    Parameters
    ----------
    x : array_like, any shape
    axis : int, tuple of int, or None

    Returns
    -------
    ndarray, shape of `x`
        A slice that holds nan or +inf, or nothing but -inf, is nan.

    Examples
    --------
    >>> print(softmax([-2, -1, 0, 1, 2]))
    [0.01165623 0.03168492 0.08612854 0.23412166 0.63640865]
    """
    x = _wide(x)
    e = np.exp(x - x.max(axis, keepdims=True, initial=-np.inf))
    return e / e.sum(axis, keepdims=True)


@_formula
def log_softmax(x: npt.ArrayLike, axis: Axis = None) -> Array:
    """Logarithm of the softmax: logp_c = x_c - log sum_k exp(x_k), over `axis` (None: over all of `x`).

    Parameters
    ----------
    x : array_like, any shape
    axis : int, tuple of int, or None

    Returns
    -------
    ndarray, shape of `x`
        A slice that holds nan or +inf, or nothing but -inf, is nan.

    Examples
    --------
    >>> print(log_softmax([1000.0, 1000.0]))
    [-0.69314718 -0.69314718]
    """
    x = _wide(x)
    x = x - x.max(axis, keepdims=True, initial=-np.inf)
    log_sum, _ = _log_of_sum(1.0, np.exp(x), axis, keepdims=True)
    return x - log_sum


@_formula
def logsumexp(
    a: npt.ArrayLike,
    axis: Axis = None,
    b: npt.ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
) -> Any:
    """Logarithm of a sum of exponentials: log |sum_k b_k exp(a_k)|, as `scipy.special.logsumexp`.

    Parameters
    ----------
    a : array_like, any shape
    axis : int, tuple of int, or None
    b : array_like, optional
        Factors, broadcast against `a`. Where b is 0, `a` does not matter.
    keepdims : bool
    return_sign : bool
        Return the sign of the sum as well. Without it a negative sum gives nan.

    Returns
    -------
    ndarray or scalar, or a pair of them (value, sign)

    Examples
    --------
    >>> print(f"{logsumexp([1000.0, 1000.0]):.6f}")
    1000.693147
    """
    x, f = np.broadcast_arrays(_wide(a), 1.0 if b is None else _wide(b))
    x = np.where(f == 0, -np.inf, x)
    m = x.max(axis, keepdims=True, initial=-np.inf)
    m = np.where(np.isfinite(m), m, 0.0)
    log_sum, sign = _log_of_sum(f, np.exp(x - m), axis, keepdims)
    value = log_sum + (m if keepdims else m.squeeze(axis))
    return (value, sign) if return_sign else np.where(sign < 0, np.nan, value)[()]


@_formula
def cross_entropy(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Array:
    """Softmax cross-entropy: loss = -u sum_c q_c logp_c of each row (letters: see the module).

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        Classes are on `axis`; a position of the other axes is a row.
    target : array_like
        Class indices: integers, shape of the rows. Or class probabilities: floats, shape of `logits`.
    axis : int
        The axis of the classes.
    weight : array_like, shape (C,), optional
        w, a weight a class.
    sample_weight : array_like, shape of the rows, optional
        u, a weight a row.
    ignore_index : int
        Rows with this class index have loss 0, gradient 0 and no part in the mean.
    label_smoothing : float
        eps, in [0, 1].
    reduction : {"mean", "sum", "none"}
        "mean" divides the sum by sum u w_y over the rows that are kept (class indices), or by sum u
        (class probabilities).

    Returns
    -------
    scalar, or ndarray of the shape of the rows with ``reduction="none"``

    Examples
    --------
    >>> print(f"{cross_entropy(np.log([[0.1, 0.7, 0.2]]), [1]):.8f}")  # -log 0.7
    0.35667494
    """
    r = _rows(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing)
    return _reduce(_losses(r), r.divisor, reduction)


@_formula
def cross_entropy_value_and_grad(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Softmax cross-entropy and its gradient: d loss / d x_c = u (Q p_c - q_c), divided as the mean is.

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, reduction
        As in `cross_entropy`.

    Returns
    -------
    loss : scalar or ndarray
        As from `cross_entropy`.
    dlogits : ndarray, shape of `logits`
        Gradient of the loss; with ``reduction="none"``, in each row the gradient of its own loss.

    Examples
    --------
    >>> loss, dlogits = cross_entropy_value_and_grad(np.log([[0.1, 0.7, 0.2]]), [1])
    >>> print(dlogits)
    [[ 0.1 -0.3  0.2]]
    """
    r = _rows(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing)
    g = np.where(r.keep[..., None], _gradients(r) / (r.divisor if reduction == "mean" else 1), 0.0)
    return _reduce(_losses(r), r.divisor, reduction), np.moveaxis(g, -1, axis)


@_formula
def cross_entropy_stats(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "none",
) -> CrossEntropyStats:
    """What one wants to know of each row beside its loss.

    With y the class index, or the likeliest class of the target's probabilities (the first of several):

        lse = log sum_c exp(x_c)        entropy    = -sum_c p_c logp_c
        target_prob = p_y               prediction = the first c of the largest x_c
        target_rank = #{c: x_c > x_y} + #{c < y: x_c = x_y}        (0: the prediction is right)

    A nan counts as the largest, as in ``numpy.argmax``.

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, reduction
        As in `cross_entropy`; `reduction` is that of the loss alone.

    Returns
    -------
    CrossEntropyStats
        An ignored row holds 0, 0, 0, 0, -1, -1.

    Examples
    --------
    >>> stats = cross_entropy_stats(np.log([[0.1, 0.7, 0.2]]), [2])
    >>> print(f"{stats.target_prob[0]:.1f} {stats.prediction[0]} {stats.target_rank[0]}")
    0.2 1 1
    """
    r = _rows(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing)
    x, p, logp, y = r.x, softmax(r.x, -1), log_softmax(r.x, -1), r.t.argmax(-1)[..., None]
    x_y, ahead = np.take_along_axis(x, y, -1), np.arange(x.shape[-1]) < y
    entropies = 0.0 - np.where(p == 0, 0.0, p * logp).sum(-1)  # 0 log 0 = 0
    nan, nan_y = np.isnan(x), np.isnan(x_y)
    rank = ((x > x_y) | (nan & ~nan_y) | (ahead & ((x == x_y) | (nan & nan_y)))).sum(-1)
    values = [np.where(r.keep, v, 0.0)[()] for v in (logsumexp(x, -1), entropies, np.take_along_axis(p, y, -1)[..., 0])]
    places = [np.where(r.keep, v, -1)[()] for v in (x.argmax(-1), rank)]
    return CrossEntropyStats(_reduce(_losses(r), r.divisor, reduction), *values, *places)


@_formula
def focal_loss(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    gamma: float = 2.0,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Array:
    """Focal loss: -u w_y (1 - p_y)^gamma logp_y of each row.

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, reduction
        As in `cross_entropy`; `target` holds class indices.
    gamma : float >= 0

    Returns
    -------
    scalar, or ndarray of the shape of the rows with ``reduction="none"``

    Examples
    --------
    >>> print(f"{focal_loss(np.log([[0.1, 0.7, 0.2]]), [1]):.8f}")  # -0.3^2 log 0.7
    0.03210074
    """
    r = _rows(logits, target, axis, weight, sample_weight, ignore_index, 0.0)
    _, others, _ = _of_target(r)
    return _reduce(np.where(r.keep, others**gamma * _losses(r), 0.0), r.divisor, reduction)


@_formula
def focal_loss_value_and_grad(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    gamma: float = 2.0,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Focal loss and its gradient: that of the cross-entropy, times (1 - p_y)^gamma - gamma p_y (1 - p_y)^(gamma - 1) logp_y.

    Parameters
    ----------
    logits, target, gamma, axis, weight, sample_weight, ignore_index, reduction
        As in `focal_loss`.

    Returns
    -------
    loss : scalar or ndarray
        As from `focal_loss`.
    dlogits : ndarray, shape of `logits`
        Gradient of the loss; with ``reduction="none"``, in each row the gradient of its own loss.

    Examples
    --------
    >>> print(focal_loss_value_and_grad([[0.0, 0.0]], [1])[1].round(4))
    [[ 0.2983 -0.2983]]
    """
    r = _rows(logits, target, axis, weight, sample_weight, ignore_index, 0.0)
    p, others, logp = _of_target(r)
    power = others**gamma
    slope = np.where(p == 0, 0.0, p * logp) * power / others
    slope = np.where(others == 0, -power, slope)  # logp is -others where that is small
    g = (power - gamma * slope)[..., None] * _gradients(r) / (r.divisor if reduction == "mean" else 1)
    g = np.where(r.keep[..., None], g, 0.0)
    return _reduce(np.where(r.keep, power * _losses(r), 0.0), r.divisor, reduction), np.moveaxis(g, -1, axis)


@_formula
def log_prob_and_entropy(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    temperature: float = 1.0,
    axis: int = -1,
    ignore_index: int = -100,
) -> tuple[Array, Array]:
    """Of p = softmax(x / temperature): log p_y, and the entropy -sum_c p_c log p_c, in nats; 0 and 0 for an ignored row.

    Parameters
    ----------
    logits, target, axis, ignore_index
        As in `cross_entropy`; `target` holds class indices.
    temperature : float > 0

    Returns
    -------
    log_prob, entropy : ndarray, shape of `target`

    Examples
    --------
    >>> log_prob, entropy = log_prob_and_entropy(np.log([[0.1, 0.7, 0.2]]), [2])
    >>> print(log_prob.round(4), entropy.round(4))
    [-1.6094] [0.8018]
    """
    stats = cross_entropy_stats(_wide(logits) / temperature, target, axis=axis, ignore_index=ignore_index)
    return 0.0 - stats.loss, stats.entropy


@_formula
def linear_cross_entropy(
    input: npt.ArrayLike,
    linear_weight: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    linear_bias: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Array:
    """Cross-entropy of logits x = input linear_weight' + linear_bias, plus u z_loss lse^2; softcap tanh(x / softcap) for x.

    Parameters
    ----------
    input : array_like, shape (..., D)
    linear_weight : array_like, shape (V, D)
    target : array_like, shape (...) for class indices, (..., V) for class probabilities
    linear_bias : array_like, shape (V,), optional
    weight, sample_weight, ignore_index, label_smoothing, reduction
        As in `cross_entropy`.
    z_loss : float
    softcap : float, optional

    Returns
    -------
    scalar, or ndarray of the shape of the rows with ``reduction="none"``

    Examples
    --------
    >>> print(f"{linear_cross_entropy([[2.0]], [[1.0], [0.0]], [0]):.8f}")  # log(1 + exp(-2))
    0.12692801
    """
    x, _ = _layer(input, linear_weight, linear_bias, softcap)
    r = _rows(x, target, -1, weight, sample_weight, ignore_index, label_smoothing)
    return _reduce(_losses(r) + _penalties(r, z_loss), r.divisor, reduction)


@_formula
def linear_cross_entropy_value_and_grad(
    input: npt.ArrayLike,
    linear_weight: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    linear_bias: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Array, LinearGradients]:
    """The same and its gradients: with g that of the logits, g linear_weight, g' input and the sum of g over the rows.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, sample_weight, ignore_index, label_smoothing, reduction, z_loss, softcap
        As in `linear_cross_entropy`. With ``reduction="none"`` the gradients are those of the sum.

    Returns
    -------
    loss : scalar or ndarray
        As from `linear_cross_entropy`.
    gradients : LinearGradients

    Examples
    --------
    >>> loss, gradients = linear_cross_entropy_value_and_grad([[2.0]], [[0.0], [0.0]], [0])
    >>> print(gradients.input, gradients.linear_weight.T)
    [[0.]] [[-1.  1.]]
    """
    x, slope = _layer(input, linear_weight, linear_bias, softcap)
    r = _rows(x, target, -1, weight, sample_weight, ignore_index, label_smoothing)
    push = (2 * z_loss * r.u * logsumexp(r.x, -1))[..., None] * softmax(r.x, -1) if z_loss else 0.0
    g = (_gradients(r) + push) * slope / (r.divisor if reduction == "mean" else 1)
    g = np.where(r.keep[..., None], g, 0.0)
    return _reduce(_losses(r) + _penalties(r, z_loss), r.divisor, reduction), _through_layer(
        g, np.where(r.keep[..., None], _wide(input), 0.0), _wide(linear_weight), linear_bias is not None
    )


def _through_layer(g: Array, h: Array, w: Array, biased: bool) -> LinearGradients:
    rows = g.reshape(-1, len(w))
    return LinearGradients(g @ w, rows.T @ h.reshape(len(rows), -1), rows.sum(0) if biased else None)


@_formula
def linear_cross_entropy_stats(
    input: npt.ArrayLike,
    linear_weight: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    linear_bias: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "none",
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> CrossEntropyStats:
    """`cross_entropy_stats` of the logits of a linear layer, with the loss of `linear_cross_entropy`.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, sample_weight, ignore_index, label_smoothing, reduction, z_loss, softcap
        As in `linear_cross_entropy`.

    Returns
    -------
    CrossEntropyStats

    Examples
    --------
    >>> print(linear_cross_entropy_stats([[2.0]], [[1.0], [0.0]], [1]).target_rank)
    [1]
    """
    x, _ = _layer(input, linear_weight, linear_bias, softcap)
    r = _rows(x, target, -1, weight, sample_weight, ignore_index, label_smoothing)
    loss = _reduce(_losses(r) + _penalties(r, z_loss), r.divisor, reduction)
    return cross_entropy_stats(x, target, ignore_index=ignore_index)._replace(loss=loss)


@_formula
def linear_log_prob_and_entropy(
    input: npt.ArrayLike,
    linear_weight: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    linear_bias: npt.ArrayLike | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Array, Array]:
    """`log_prob_and_entropy` of the logits of a linear layer.

    Parameters
    ----------
    input, linear_weight, linear_bias
        As in `linear_cross_entropy`.
    target, temperature, ignore_index
        As in `log_prob_and_entropy`.

    Returns
    -------
    log_prob, entropy : ndarray, shape of `target`

    Examples
    --------
    >>> log_prob, entropy = linear_log_prob_and_entropy([[2.0]], [[0.0], [0.0]], [1])
    >>> print(log_prob.round(4), entropy.round(4))
    [-0.6931] [0.6931]
    """
    x, _ = _layer(input, linear_weight, linear_bias, None)
    return log_prob_and_entropy(x, target, temperature=temperature, ignore_index=ignore_index)


@_formula
def cross_entropy_grad_hess(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Array, Array]:
    """Gradient and diagonal of the Hessian of each row's loss: u (Q p_c - q_c) and u Q p_c (1 - p_c).

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, label_smoothing
        As in `cross_entropy`.

    Returns
    -------
    grad, hess : ndarray, shape of `logits`

    Examples
    --------
    >>> grad, hess = cross_entropy_grad_hess(np.log([[0.1, 0.7, 0.2]]), [1])
    >>> print(hess)
    [[0.09 0.21 0.16]]
    """
    r = _rows(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing)
    p, others = _probabilities(r.x)
    hess = np.where(r.keep[..., None], (r.u * r.q.sum(-1))[..., None] * p * others, 0.0)
    return np.moveaxis(_gradients(r), -1, axis), np.moveaxis(hess, -1, axis)


@_formula
def nll_loss(
    log_probs: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Array:
    """Negative log-likelihood: loss = -w_y logp_y of each row.

    Parameters
    ----------
    log_probs : array_like of float, shape (..., C, ...)
    target : array_like of int, shape of the rows
    axis, weight, ignore_index, reduction
        As in `cross_entropy`.

    Returns
    -------
    scalar, or ndarray of the shape of the rows with ``reduction="none"``

    Examples
    --------
    >>> print(f"{nll_loss(np.log([[0.1, 0.7, 0.2]]), [1]):.8f}")
    0.35667494
    """
    r = _rows(log_probs, target, axis, weight, None, ignore_index, 0.0)
    return _reduce(0.0 - np.where(r.t, r.q * r.x, 0.0).sum(-1), r.divisor, reduction)


@_formula
def entropy(p: npt.ArrayLike, axis: int = -1) -> Array:
    """Shannon entropy in nats: H(p) = -sum_c p_c log p_c, with 0 log 0 = 0.

    Parameters
    ----------
    p : array_like of float
        Class probabilities; they are not normalised here.
    axis : int
        The axis of the classes.

    Returns
    -------
    scalar, or ndarray of the shape of `p` without `axis`

    Examples
    --------
    >>> print(f"{entropy([0.5, 0.5]):.8f}")  # log 2
    0.69314718
    """
    p = _wide(p)
    return 0.0 - np.where(p == 0, 0.0, p * np.log(p)).sum(axis)


@_formula
def kl_div(input: npt.ArrayLike, target: npt.ArrayLike, *, reduction: str = "mean", log_target: bool = False) -> Array:
    """Kullback-Leibler divergence, element by element: t (log t - input), as `torch.nn.functional.kl_div`.

    Parameters
    ----------
    input : array_like of float
        Log-probabilities of the model.
    target : array_like of float, same shape
        Probabilities t, or their logarithms with ``log_target=True``. 0 log 0 = 0.
    reduction : {"mean", "batchmean", "sum", "none"}
        "mean" divides the sum by the number of elements, "batchmean" by the length of the first axis.
    log_target : bool

    Returns
    -------
    scalar, or ndarray of the shape of `input` with ``reduction="none"``

    Examples
    --------
    >>> print(f"{kl_div(np.log([[0.5, 0.5]]), [[1.0, 0.0]], reduction='batchmean'):.8f}")  # log 2
    0.69314718
    """
    x, t = _wide(input), _wide(target)
    t, log_t = (np.exp(t), t) if log_target else (t, np.where(t == 0, 0.0, np.log(t)))
    d = t * (log_t - x)
    return _reduce(d, len(d) if reduction == "batchmean" else d.size, reduction.replace("batch", ""))


@_formula
def binary_cross_entropy_with_logits(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    pos_weight: npt.ArrayLike | None = None,
    reduction: str = "mean",
) -> Array:
    """Binary cross-entropy: loss = -w (v y log s(x) + (1 - y) log s(-x)), s(x) = 1 / (1 + exp(-x)).

    Parameters
    ----------
    logits : array_like of float, any shape
    target : array_like of float, same shape
        y, in [0, 1].
    weight : array_like, optional
        w, broadcast to the shape of `logits`. The mean does not divide by it.
    pos_weight : array_like, optional
        v, the weight of the positive class, broadcast likewise.
    reduction : {"mean", "sum", "none"}

    Returns
    -------
    scalar, or ndarray of the shape of `logits` with ``reduction="none"``

    Examples
    --------
    >>> print(f"{binary_cross_entropy_with_logits([0.0], [1.0]):.8f}")  # log 2
    0.69314718
    """
    x, y = _wide(logits), _wide(target)
    w, v = (1.0 if a is None else _wide(a) for a in (weight, pos_weight))
    softplus = np.log1p(np.exp(-np.abs(x))) + np.maximum(-x, 0)  # -log s(x)
    losses = w * ((1 - y) * x + (1 + (v - 1) * y) * softplus)  # -log s(-x) = x - log s(x)
    return _reduce(losses, losses.size, reduction)


@_formula
def binary_cross_entropy_with_logits_value_and_grad(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    pos_weight: npt.ArrayLike | None = None,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Binary cross-entropy and its gradient: w ((1 - y) s(x) - v y s(-x)), divided as the mean is.

    Parameters
    ----------
    logits, target, weight, pos_weight, reduction
        As in `binary_cross_entropy_with_logits`.

    Returns
    -------
    loss : scalar or ndarray
    dlogits : ndarray, shape of `logits`

    Examples
    --------
    >>> loss, dlogits = binary_cross_entropy_with_logits_value_and_grad([0.0], [1.0])
    >>> print(dlogits)
    [-0.5]
    """
    x, y = _wide(logits), _wide(target)
    w, v = (1.0 if a is None else _wide(a) for a in (weight, pos_weight))
    g = w * ((1 - y) / (1 + np.exp(-x)) - v * y / (1 + np.exp(x))) / (x.size if reduction == "mean" else 1)
    loss = binary_cross_entropy_with_logits(logits, target, weight=weight, pos_weight=pos_weight, reduction=reduction)
    return loss, g
