"""The softmax family, with SciPy's signatures, and the two quantities that cross-entropy is made of: entropy and divergence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastxent._runtime.arguments import (
    Array,
    accumulator,
    address,
    as_array,
    check_logits,
    check_out,
    floating,
    laid_out_as,
    like,
    storage,
    walkable,
    writable_place,
)
from fastxent._runtime.options import REDUCTIONS, check_integer, check_reduction, checked
from fastxent._runtime.plan import make_plan, over, pointwise_plan
from fastxent._runtime.run import run

Axis = int | tuple[int, ...] | None


def softmax(x: object, axis: Axis = None, *, out: Array | None = None, n_threads: int | None = None) -> Array:
    r"""Probabilities from logits.

    .. math:: p_c = e^{x_c - m} / \sum_k e^{x_k - m}, \qquad m = \max_c x_c

    The shift by m leaves the result unchanged and keeps the exponentials from overflowing.

    Parameters
    ----------
    x : array_like
        float16, bfloat16, float32 or float64 (integers are taken as float64), any shape and strides.
    axis : int, tuple of ints or None
        Axes to normalise over; None: all of them.
    out : ndarray, optional
        Receives the result; it has the shape and dtype of ``x`` and may be ``x``.
    n_threads : int, optional
        The most threads to use.

    Returns
    -------
    ndarray, or numpy floating scalar if ``x`` is a number
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

    No logarithm of a probability that has underflowed to 0 is taken, and the differences are computed in float64.

    Parameters
    ----------
    x, axis, out, n_threads
        As in `softmax`.

    Returns
    -------
    ndarray, or numpy floating scalar if ``x`` is a number
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
        Factors of the exponentials, broadcast against ``a``; ``axis`` refers to the broadcast shape. They may be negative;
        where one is 0, its ``a`` does not matter.
    keepdims : bool
        Keep the reduced axes with length 1.
    return_sign : bool
        Return ``(log |sum|, sign)``; without it a negative sum gives nan. The sign of 0, also of a sum over nothing, is 0.
    n_threads : int, optional
        The most threads to use.

    Returns
    -------
    ndarray or scalar
        float64 for float64, else float32. (An integer ``b`` takes part in promotion as in NumPy, a Python number does not.) A
        number ``a`` is taken as an array with one axis of length 1.
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
    threads = checked("n_threads", n_threads)
    if b is None:
        x = np.atleast_1d(floating(a, "a"))
        axes = _axes(axis, x.ndim)
        lse = _logsumexp(x, axes, threads)
        sign = np.where(np.isnan(lse), lse, lse > -np.inf).astype(lse.dtype)
    else:
        x, factors = _broadcast(a, b)
        axes = _axes(axis, x.ndim)
        lse, sign = _logsumexp_of_products(x, factors, axes, threads)
        if not return_sign:
            lse[sign < 0] = np.nan
    if keepdims:
        kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
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
    x, axis = check_logits(p, axis, "p")
    h = np.zeros(x.shape[:axis] + x.shape[axis + 1 :], accumulator(x.dtype))
    _run("entropy", x, axis, None, entropy=address(h))
    return h[()]


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
    check_reduction(reduction, allowed=(*REDUCTIONS, "batchmean"))
    x, t = floating(input, "input"), floating(target, "target")
    if x.shape != t.shape:
        raise ValueError(f"target has shape {t.shape}; it must be that of input, {x.shape}")
    acc = accumulator(x.dtype, t.dtype)
    x, t = (np.ascontiguousarray(a).reshape(a.shape) for a in (x, t))  # 0-d stays 0-d
    d = np.empty(x.shape, acc) if reduction == "none" else None
    total = 0.0
    if x.size:
        plan = pointwise_plan(x.size, storage(x.dtype) or "", storage(t.dtype) or "")
        name = "divergence_of_logs" if log_target else "divergence"
        total, *_ = run(name, plan, x=address(x), t=address(t), loss=address(d))
    if d is not None:
        return d[()]
    count = {"sum": 1, "mean": x.size, "batchmean": x.shape[0] if x.ndim else 1}[reduction]
    return acc.type(over(total, count))


# ----------------------------------------------------------------------------------------------------


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Return the axes, each >= 0 and named once. A number has one axis, as in NumPy's reductions."""
    ndim = max(1, ndim)
    axes = tuple(range(ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if not isinstance(axis, tuple) and axis is not None and not hasattr(axis, "__index__"):
        raise TypeError(f"axis must be an integer, a tuple of integers or None, got {type(axis).__name__}")
    numbers = tuple(check_integer(a, "axis") for a in axes)
    for a in numbers:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis = {a} is outside [{-ndim}, {ndim})")
    numbers = tuple(a % ndim for a in numbers)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"axis = {axis} names an axis twice")
    return numbers


def _one_axis(x: Array, axes: tuple[int, ...]) -> tuple[Array, int]:
    """Return x with the axes to reduce merged into one, and the number of that axis; x itself if there is only one."""
    if len(axes) == 1:
        return x, axes[0]
    kept = [i for i in range(x.ndim) if i not in axes]
    moved = np.transpose(x, (*kept, *axes))
    return moved.reshape(*(x.shape[i] for i in kept), math.prod(x.shape[i] for i in axes)), len(kept)


def _elementwise(name: str, x: object, axis: Axis, out: Array | None, n_threads: int | None) -> Array:
    """Return softmax or log_softmax over any axes."""
    a = floating(x, "x")
    axes = _axes(axis, a.ndim)
    threads = checked("n_threads", n_threads)
    if out is not None:
        check_out(out, a, "x")
    if a.ndim == 0:
        one = _elementwise(name, a.reshape(1), axis, None, threads)[0]
        if out is None:
            return one
        out[()] = one
        return out
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


def _run(
    name: str, x: Array, axis: int, n_threads: int | None, g: Array | None = None, t: Array | None = None, **results: int
) -> None:
    if x.size == 0:
        return
    strides = tuple((x if a is None else a).strides for a in (None, g, t))
    plan = make_plan(name, x.shape, strides, axis, storage(x.dtype) or "", None if t is None else storage(t.dtype))
    run(name, plan, n_threads, x=address(x), g=address(g), t=address(t), **results)


def _logsumexp(x: Array, axes: tuple[int, ...], n_threads: int | None) -> Array:
    flat, one = _one_axis(x, axes)
    flat = flat if walkable(flat, one) else like(flat, one, copy=True)
    rows = flat.shape[:one] + flat.shape[one + 1 :]
    lse = np.full(rows, -np.inf, accumulator(x.dtype))  # log 0, for the sum over no classes
    _run("logsumexp", flat, one, n_threads, lse=address(lse))
    unsure = np.isnan(lse)
    if unsure.any():  # a row with +inf has the sum nan, and the result inf unless it holds a nan too
        with np.errstate(invalid="ignore"):
            top = np.max(flat, axis=one).astype(lse.dtype)
        lse = np.where(unsure & (top == np.inf), top, lse)
    return lse


def _broadcast(a: object, b: object) -> tuple[Array, Array]:
    """Return the exponents and factors of a logsumexp, broadcast against each other."""
    given = {"a": a, "b": b}
    arrays = {name: as_array(value, name) for name, value in given.items()}
    floats = {name: floating(array, name) for name, array in arrays.items()}
    dtypes = [
        x.dtype if x.dtype.kind in "iub" or x.dtype == np.float64 else np.dtype(np.float32)
        for name, x in arrays.items()
        if type(given[name]) not in (bool, int, float)
    ]
    acc = np.dtype(np.float32 if dtypes and np.result_type(*dtypes) == np.float32 else np.float64)
    x, factors = (
        np.atleast_1d(f.astype(acc) if arrays[name].dtype.kind in "iub" or f.dtype.itemsize > acc.itemsize else f)
        for name, f in floats.items()
    )
    try:
        shape = np.broadcast_shapes(x.shape, factors.shape)
    except ValueError:
        raise ValueError(f"b has shape {factors.shape}; it cannot be broadcast with that of a, {x.shape}") from None
    return np.broadcast_to(x, shape), np.broadcast_to(factors, shape)


def _logsumexp_of_products(x: Array, b: Array, axes: tuple[int, ...], n_threads: int | None) -> tuple[Array, Array]:
    """Return log |sum b e^x| and the sum's sign; x and b have the same shape."""
    (x, one), (b, _) = _one_axis(x, axes), _one_axis(b, axes)
    x = x if walkable(x, one) else like(x, one, copy=True)
    rows, acc = x.shape[:one] + x.shape[one + 1 :], accumulator(x.dtype, b.dtype)
    lse, sign = np.full(rows, -np.inf, acc), np.zeros(rows, acc)
    _run("logsumexp_of_products", x, one, n_threads, t=laid_out_as(b, x, one), lse=address(lse), sign=address(sign))
    return lse, sign
