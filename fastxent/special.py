"""The softmax family, with SciPy's signatures, and the two quantities that cross-entropy is made of: entropy and divergence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastxent._parallel import check_threads, run
from fastxent._plan import make_plan
from fastxent._validate import (
    Array,
    accumulator,
    address,
    check_integer,
    check_out,
    check_reduction,
    floating,
    like,
    storage,
    walkable,
    writable_place,
)

Axis = int | tuple[int, ...] | None


def softmax(x: object, axis: Axis = None, *, out: Array | None = None, n_threads: int | None = None) -> Array:
    r"""Probabilities from logits.

    .. math:: p_c = e^{x_c - m} / \sum_k e^{x_k - m}, \qquad m = \max_c x_c

    The shift by m changes nothing but the range: no exponential overflows.

    Parameters
    ----------
    x : array_like
        float16, bfloat16, float32 or float64 (integers are taken as float64), any shape and strides.
    axis : int, tuple of ints or None
        Axes to normalise over; None: all of them.
    out : ndarray, optional
        Takes the result: shape and dtype of ``x``; may be ``x``.
    n_threads : int, optional
        At most so many threads.

    Returns
    -------
    ndarray
        Shape and dtype of ``x``; sums to 1 over ``axis``.

    Raises
    ------
    ValueError, TypeError
        An axis, shape or dtype does not fit; the message names the argument.

    References
    ----------
    ``scipy.special.softmax``; Goodfellow, Bengio, Courville, *Deep Learning*, MIT Press 2016, 6.2.2.3.

    Examples
    --------
    >>> import fastxent as fx
    >>> fx.softmax([-2, -1, 0, 1, 2])
    array([0.01165623, 0.03168492, 0.08612854, 0.23412166, 0.63640865])
    """
    return _elementwise("softmax", x, axis, out, n_threads)


def log_softmax(x: object, axis: Axis = None, *, out: Array | None = None, n_threads: int | None = None) -> Array:
    r"""Logarithms of the probabilities.

    .. math:: \log p_c = x_c - \log \sum_k e^{x_k}

    Never the logarithm of a probability that has become 0; and the differences are taken in float64.

    Parameters
    ----------
    x, axis, out, n_threads
        As in `softmax`.

    Returns
    -------
    ndarray
        Shape and dtype of ``x``.

    Raises
    ------
    ValueError, TypeError
        As in `softmax`.

    References
    ----------
    ``scipy.special.log_softmax``.

    Examples
    --------
    >>> import fastxent as fx
    >>> fx.log_softmax([1000.0, 1.0])
    array([   0., -999.])
    """
    return _elementwise("log_softmax", x, axis, out, n_threads)


def logsumexp(
    a: object,
    axis: Axis = None,
    b: object = None,
    keepdims: bool = False,
    return_sign: bool = False,
    *,
    n_threads: int | None = None,
) -> Any:
    r"""Logarithm of a sum of exponentials, without overflow.

    .. math:: \mathrm{lse} = m + \log \sum_c b_c\, e^{x_c - m}, \qquad m = \max_c x_c

    Parameters
    ----------
    a : array_like
        As ``x`` of `softmax`.
    axis : int, tuple of ints or None
        Axes to sum over; None: all of them.
    b : array_like, optional
        Factors of the exponentials, broadcast against ``a``; may be negative or 0.
    keepdims : bool
        Keep the reduced axes with length 1.
    return_sign : bool
        Return ``(log |sum|, sign)``; without it a negative sum gives nan.
    n_threads : int, optional
        At most so many threads.

    Returns
    -------
    ndarray or scalar
        float64 for float64, else float32.
    sign : ndarray or scalar
        Only with ``return_sign``.

    Raises
    ------
    ValueError, TypeError
        As in `softmax`.

    References
    ----------
    ``scipy.special.logsumexp``; Blanchard, Higham, Higham, *Accurately computing the log-sum-exp and softmax functions*,
    IMA Journal of Numerical Analysis 41 (2021).

    Examples
    --------
    >>> import fastxent as fx
    >>> print(f"{fx.logsumexp([1000.0, 1000.0]):.6f}")
    1000.693147
    >>> value, sign = fx.logsumexp([0.0, 0.0], b=[1.0, -3.0], return_sign=True)
    >>> print(f"{value:.6f} {sign:.0f}")
    0.693147 -1
    """
    x = floating(a, "a")
    axes = _axes(axis, x.ndim)
    shape = x.shape
    if b is not None:
        factors = floating(b, "b")
        try:
            shape = np.broadcast_shapes(shape, factors.shape)
        except ValueError:
            raise ValueError(f"b has shape {factors.shape}; it cannot be broadcast with that of a, {shape}") from None
        lse, sign = _weighted_logsumexp(x, factors, axes)
        if not return_sign:
            lse = np.where(sign < 0, lse.dtype.type(np.nan), lse)
    else:
        lse = _logsumexp(x, axes, n_threads)
        sign = np.ones_like(lse) if return_sign else lse
    if keepdims:
        kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
        lse, sign = lse.reshape(kept), sign.reshape(kept)
    return (lse[()], sign[()]) if return_sign else lse[()]


def entropy(p: object, axis: int = -1) -> Any:
    r"""Shannon entropy of class probabilities, in nats.

    .. math:: H(p) = -\sum_c p_c \log p_c, \qquad 0 \log 0 = 0

    With q = softmax(x): cross_entropy(x, p) = H(p) + KL(p || q). The entropy of softmax(x) itself comes with
    `cross_entropy_stats`.

    Parameters
    ----------
    p : array_like
        Probabilities; they are not normalised.
    axis : int
        The class axis.

    Returns
    -------
    ndarray or scalar
        float64 for float64, else float32; the shape of ``p`` without ``axis``. nan where a probability is negative.

    Raises
    ------
    ValueError, TypeError
        An axis or dtype does not fit.

    References
    ----------
    Cover, Thomas, *Elements of Information Theory*, Wiley 2006, eq. 2.1. ``scipy.stats.entropy`` (which normalises).

    Examples
    --------
    >>> import fastxent as fx
    >>> print(f"{fx.entropy([0.5, 0.25, 0.25]):.6f}")
    1.039721
    """
    x = floating(p, "p")
    (axis,) = _axes(axis, x.ndim)
    return -_xlogx(_widened(x)).sum(axis=axis).astype(accumulator(x.dtype))[()]


def kl_div(input: object, target: object, *, reduction: str = "mean", log_target: bool = False) -> Any:
    r"""Kullback-Leibler divergence KL(target || exp(input)), pointwise or summed.

    .. math:: d = t (\log t - x), \qquad 0 \log 0 = 0

    Parameters
    ----------
    input : array_like
        Log-probabilities x, as from `log_softmax`.
    target : array_like, same shape
        Probabilities t; their logarithms with ``log_target``.
    reduction : {"mean", "batchmean", "sum", "none"}
        "mean" divides by the number of elements, "batchmean" by the length of the first axis (the divergence of the rows'
        distributions, averaged), "none" returns d.
    log_target : bool
        ``target`` holds log t.

    Returns
    -------
    numpy floating scalar, or ndarray if ``reduction="none"``
        In nats; float64 if an argument is, else float32.

    Raises
    ------
    ValueError, TypeError
        A shape, dtype or reduction does not fit.

    References
    ----------
    Kullback, Leibler, *On information and sufficiency*, Annals of Mathematical Statistics 22 (1951).
    ``torch.nn.functional.kl_div``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastxent as fx
    >>> p, logits = np.array([[0.5, 0.5]]), np.array([[1.0, 3.0]])
    >>> kl = fx.kl_div(fx.log_softmax(logits, axis=-1), p, reduction="batchmean")
    >>> bool(np.isclose(fx.entropy(p)[0] + kl, fx.cross_entropy(logits, p)))
    True
    """
    check_reduction(reduction, ("none", "mean", "sum", "batchmean"))
    x, t = floating(input, "input"), floating(target, "target")
    if x.shape != t.shape:
        raise ValueError(f"target has shape {t.shape}; it must be that of input, {x.shape}")
    acc = accumulator(x.dtype, t.dtype)
    x, t = _widened(x), _widened(t)
    with np.errstate(invalid="ignore"):  # 0 * -inf: nan, as in PyTorch
        d = np.exp(t) * (t - x) if log_target else _xlogx(t) - t * x
    if reduction == "none":
        return d.astype(acc)[()]
    count = {"sum": 1, "mean": d.size, "batchmean": d.shape[0] if d.ndim else 1}[reduction]
    return acc.type(d.sum() / count) if count else acc.type(np.nan)


# ----------------------------------------------------------------------------------------------------


def _widened(x: Array) -> Array:
    """In a precision that hides the roundings of a formula of NumPy's operations."""
    return x.astype(np.longdouble if x.dtype == np.float64 else np.float64)


def _xlogx(p: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p == 0, 0.0, p * np.log(p))


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Axes >= 0, each once."""
    axes = tuple(range(ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    numbers = tuple(check_integer(a, "axis") for a in axes)
    for a in numbers:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis = {a} is outside [{-ndim}, {ndim})")
    numbers = tuple(a % ndim for a in numbers)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"axis = {axis} names an axis twice")
    return numbers


def _one_axis(x: Array, axes: tuple[int, ...]) -> tuple[Array, int]:
    """x with the axes to reduce made one; a view of x if they are one already."""
    if len(axes) == 1:
        return x, axes[0]
    kept = [i for i in range(x.ndim) if i not in axes]
    moved = np.transpose(x, (*kept, *axes))
    return moved.reshape(*(x.shape[i] for i in kept), math.prod(x.shape[i] for i in axes)), len(kept)


def _elementwise(name: str, x: object, axis: Axis, out: Array | None, n_threads: int | None) -> Array:
    """softmax or log_softmax over any axes."""
    a = floating(x, "x")
    axes = _axes(axis, a.ndim)
    threads = None if n_threads is None else check_threads(n_threads, "n_threads")
    if out is not None:
        check_out(out, a)
    if len(axes) == 1 and walkable(a, axes[0]):
        g = writable_place(out, a, axes[0])
        _run(name, a, axes[0], threads, g)
    else:
        flat, one = _one_axis(a, axes)
        flat = flat if walkable(flat, one) else like(flat, one, copy=True)
        result = like(flat, one)
        _run(name, flat, one, threads, result)
        kept = [i for i in range(a.ndim) if i not in axes]
        order = kept + list(axes) if len(axes) != 1 else list(range(a.ndim))
        g = np.transpose(result.reshape([a.shape[i] for i in order]), np.argsort(order))
    if out is None:
        return g
    if g is not out:
        np.copyto(out, g)
    return out


def _run(name: str, x: Array, axis: int, n_threads: int | None, g: Array | None = None, lse: Array | None = None) -> None:
    if x.size == 0:
        return
    strides = (x.strides, (x if g is None else g).strides, x.strides)
    plan = make_plan(x.shape, strides, axis, storage(x.dtype) or "")
    run(name, plan, n_threads, x=address(x), g=address(g), lse=address(lse))


def _logsumexp(x: Array, axes: tuple[int, ...], n_threads: int | None) -> Array:
    threads = None if n_threads is None else check_threads(n_threads, "n_threads")
    flat, one = _one_axis(x, axes)
    flat = flat if walkable(flat, one) else like(flat, one, copy=True)
    rows = flat.shape[:one] + flat.shape[one + 1 :]
    lse = np.full(rows, -np.inf, accumulator(x.dtype))  # the sum over nothing is 0
    _run("logsumexp", flat, one, threads, lse=lse)
    unsure = np.isnan(lse)
    if unsure.any():  # a row with +inf has sum nan and logarithm inf, unless it holds a nan too
        with np.errstate(invalid="ignore"):
            top = np.max(flat, axis=one).astype(lse.dtype)
        lse = np.where(unsure & (top == np.inf), top, lse)
    return lse


def _weighted_logsumexp(x: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    acc = accumulator(x.dtype, b.dtype)
    x, b = np.broadcast_arrays(x.astype(np.float64), b.astype(np.float64))
    x = np.where(b == 0, -np.inf, x)
    m = np.max(x, axis=axes, keepdims=True, initial=-np.inf)
    m = np.where(np.isfinite(m), m, 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        s = np.sum(np.where(b == 0, 0.0, b * np.exp(x - m)), axis=axes)
        lse = np.log(np.abs(s)) + np.squeeze(m, axis=axes)
    return lse.astype(acc), np.sign(s).astype(acc)
