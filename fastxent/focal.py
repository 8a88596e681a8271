"""Focal loss and its gradient: cross-entropy that rows count less in, the more confident they are."""

from __future__ import annotations

from typing import Any

from fastxent._runtime.arguments import Array, Problem, new_gradient, problem
from fastxent._runtime.options import checked
from fastxent.functional import loss_of


def focal_loss(
    logits: object,
    target: object,
    *,
    gamma: float = 2.0,
    axis: int = -1,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    n_threads: int | None = None,
) -> Any:
    r"""Focal loss of class indices, for classes that are rare.

    .. math::
        l_n = -u_n w_{y_n} (1 - p_{n y_n})^\gamma \log p_{n y_n}, \qquad p_n = \mathrm{softmax}(x_n)

    Parameters
    ----------
    logits, axis, sample_weight, ignore_index, reduction, n_threads
        As in `cross_entropy`.
    target : array_like of integers, the shape of ``logits`` without ``axis``
        Class indices y, each in [0, C) or ``ignore_index``.
    gamma : float >= 0
        0 makes it cross-entropy.
    weight : array_like, shape (C,), optional
        Class weights w, the paper's alpha. As in `cross_entropy`, "mean" divides by the sum of u w_y.

    Returns
    -------
    numpy floating scalar, or ndarray with the shape of the rows if ``reduction="none"``
        In nats; float64 if the logits are, else float32.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy`; also for a target of class probabilities.

    References
    ----------
    Lin et al., *Focal loss for dense object detection*, ICCV 2017, equation 5.

    Examples
    --------
    >>> import numpy as np
    >>> import fastxent as fx
    >>> print(f"{fx.focal_loss(np.log([[0.1, 0.7, 0.2]]), [1]):.8f}")  # -0.3^2 log 0.7
    0.03210074
    """
    checked("reduction", reduction)
    p, gamma = _problem(logits, target, gamma, axis, weight, sample_weight, ignore_index, n_threads)
    return loss_of("focal", p, reduction, gamma=gamma)


def focal_loss_value_and_grad(
    logits: object,
    target: object,
    *,
    gamma: float = 2.0,
    axis: int = -1,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    n_threads: int | None = None,
) -> tuple[Any, Array]:
    r"""Focal loss and its gradient with respect to the logits, in one trip through memory.

    .. math::
        \frac{\partial l_n}{\partial x_{nc}} = u_n w_y
        \left[(1 - p_y)^\gamma - \gamma\, p_y (1 - p_y)^{\gamma - 1} \log p_y\right] (p_{nc} - [c = y_n])

    Parameters
    ----------
    logits, target, gamma, axis, weight, sample_weight, ignore_index, reduction, n_threads
        As in `focal_loss`. With ``reduction="none"`` the gradient is each row's own.

    Returns
    -------
    loss : numpy floating scalar or ndarray
        As from `focal_loss`.
    dlogits : ndarray
        Shape, dtype and order of axes of ``logits``.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `focal_loss`.

    References
    ----------
    Lin et al., *Focal loss for dense object detection*, ICCV 2017, appendix A.

    Examples
    --------
    >>> import fastxent as fx
    >>> loss, dlogits = fx.focal_loss_value_and_grad([[0.0, 0.0]], [1])
    >>> dlogits.round(4)
    array([[ 0.2983, -0.2983]])
    """
    checked("reduction", reduction)
    p, gamma = _problem(logits, target, gamma, axis, weight, sample_weight, ignore_index, n_threads)
    g = new_gradient(p.x, p.axis)
    return loss_of("focal_value_and_grad", p, reduction, g, gamma=gamma), g


def _problem(
    logits: object, target: object, gamma: float, axis: int, weight: object, sample_weight: object, ignore_index: int,
    n_threads: int | None,
) -> tuple[Problem, float]:  # fmt: skip
    gamma = checked("gamma", gamma)
    p = problem(logits, target, axis, weight, sample_weight, ignore_index, 0.0, n_threads)
    if p.y is None:
        raise TypeError("target holds class probabilities; focal_loss takes class indices")
    return p, gamma
