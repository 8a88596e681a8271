"""Binary cross-entropy from logits: one logit an element, each a problem of two classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastxent._abi.variant import LANES
from fastxent._runtime.arguments import Array, accumulator, address, check_out, floating, storage
from fastxent._runtime.options import checked
from fastxent._runtime.plan import pointwise_plan
from fastxent._runtime.run import run


def binary_cross_entropy_with_logits(
    logits: object,
    target: object,
    *,
    weight: object = None,
    pos_weight: object = None,
    reduction: str = "mean",
    n_threads: int | None = None,
) -> Any:
    r"""Cross-entropy of two classes from the logit of the second.

    .. math::
        l = w \left[(1 - t) \log(1 + e^{x}) + P\, t \log(1 + e^{-x})\right]

    This is the two-class `cross_entropy` of the logits (0, x).

    Parameters
    ----------
    logits : array_like
        x, any shape; float16, bfloat16, float32 or float64 (integers are taken as float64).
    target : array_like, same shape
        Probability t of the second class.
    weight : array_like, optional
        w, broadcast to the shape of ``logits``.
    pos_weight : array_like, optional
        P, weight of the second class, broadcast to the shape of ``logits``.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of elements.
    n_threads : int, optional
        At most so many threads.

    Returns
    -------
    numpy floating scalar, or ndarray if ``reduction="none"``
        In nats; float64 if logits or target are, else float32.

    Raises
    ------
    ValueError, TypeError
        A shape, dtype or reduction does not fit; the message names the argument.

    References
    ----------
    ``torch.nn.functional.binary_cross_entropy_with_logits``; Bishop, *Pattern Recognition and Machine Learning*, eq. 4.90.

    Examples
    --------
    >>> import fastxent as fx
    >>> print(f"{fx.binary_cross_entropy_with_logits([2.0, -1.0], [1.0, 0.0]):.6f}")
    0.220095
    """
    loss, _ = _binary(logits, target, weight, pos_weight, reduction, n_threads, differentiate=False)
    return loss


def binary_cross_entropy_with_logits_value_and_grad(
    logits: object,
    target: object,
    *,
    weight: object = None,
    pos_weight: object = None,
    reduction: str = "mean",
    out: Array | None = None,
    n_threads: int | None = None,
) -> tuple[Any, Array]:
    r"""`binary_cross_entropy_with_logits` and its gradient with respect to the logits.

    .. math::
        \frac{\partial l}{\partial x} = w \left[(1 - t)\, \sigma(x) - P\, t\, \sigma(-x)\right], \qquad
        \sigma(x) = \frac{1}{1 + e^{-x}}

    Parameters
    ----------
    logits, target, weight, pos_weight, reduction, n_threads
        As in `binary_cross_entropy_with_logits`.
    out : ndarray, optional
        Takes the gradient: shape and dtype of ``logits``; may be ``logits``.

    Returns
    -------
    loss : numpy floating scalar or ndarray
    dlogits : ndarray
        ``out``, or a new array of the shape and dtype of ``logits``.

    Raises
    ------
    ValueError, TypeError
        As in `binary_cross_entropy_with_logits`; nothing has been written then.

    References
    ----------
    Bishop, *Pattern Recognition and Machine Learning*, Springer 2006, eq. 4.91.

    Examples
    --------
    >>> import fastxent as fx
    >>> fx.binary_cross_entropy_with_logits_value_and_grad([0.0, 0.0], [1.0, 0.0], reduction="sum")[1]
    array([-0.5,  0.5])
    """
    loss, g = _binary(logits, target, weight, pos_weight, reduction, n_threads, differentiate=True, out=out)
    return loss, g


def _binary(
    logits: object,
    target: object,
    weight: object,
    pos_weight: object,
    reduction: str,
    n_threads: int | None,
    differentiate: bool,
    out: Array | None = None,
) -> tuple[Any, Array]:
    checked("reduction", reduction)
    x, t = floating(logits, "logits"), floating(target, "target")
    if t.shape != x.shape:
        raise ValueError(f"target has shape {t.shape}; it must be that of logits, {x.shape}")
    if out is not None:
        check_out(out, x)
    threads = checked("n_threads", n_threads)
    acc = accumulator(x.dtype, t.dtype)
    w, w_period = _periodic(weight, "weight", x.shape, acc)
    positive, u_period = _periodic(pos_weight, "pos_weight", x.shape, acc)
    x, t = (np.ascontiguousarray(a).reshape(x.shape) for a in (x, t))  # 0-d stays 0-d
    rows = np.empty(x.shape, acc) if reduction == "none" else None
    g = np.empty_like(x) if differentiate else x
    total = 0.0
    if x.size:
        plan = pointwise_plan(x.size, storage(x.dtype) or "", storage(t.dtype) or "", differentiate)
        total, *_ = run(
            "binary", plan, threads, x=address(x), t=address(t), g=address(g) if differentiate else 0, w=address(w),
            u=address(positive), w_period=w_period, u_period=u_period, loss=address(rows),
            divisor=x.size if reduction == "mean" else 1.0,
        )  # fmt: skip
    if out is not None:
        np.copyto(out, g.reshape(out.shape))
        g = out
    if rows is not None:
        return rows[()], g
    if reduction == "mean":
        total = total / x.size if x.size else np.nan
    return acc.type(total), g


def _periodic(values: object, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Array | None, int]:
    """Weights in the order of the logits, up to where they begin again, and that number; a vector more of those that do."""
    if values is None:
        return None, 1
    a = floating(values, name)
    if a.ndim == 0:
        return np.full(LANES + 1, a, dtype), 1
    try:
        np.broadcast_to(a, shape)
    except ValueError:
        raise ValueError(f"{name} has shape {a.shape}; it cannot be broadcast to that of logits, {shape}") from None
    while a.ndim and a.shape[0] == 1:
        a = a[0]
    a = np.ascontiguousarray(np.broadcast_to(a, shape[len(shape) - a.ndim :]), dtype=dtype).ravel()
    return (a if a.size == math.prod(shape) else np.resize(a, a.size + LANES)), a.size
