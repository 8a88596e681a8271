"""Objectives for gradient boosting: the callables that XGBoost and LightGBM take, on the kernels of `cross_entropy_grad_hess`.

Both libraries call a native objective with the raw scores and the data set, and one of their scikit-learn estimators with the
labels, the raw scores and perhaps weights. Each function here takes all of these calls. Options are passed with
``functools.partial``. The functions import neither library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastxent._runtime.arguments import Array, as_array, check_vector, floating
from fastxent._runtime.options import check_integer
from fastxent.functional import rounded_grad_hess

SMALLEST_PRIOR = 1e-15  # of a class without rows, whose logarithm would be -inf; LightGBM's own number


def xgboost_softprob(*call: Any, sample_weight: object = None, **options: Any) -> tuple[Array, Array]:
    r"""XGBoost's ``multi:softprob`` as a custom objective, with label smoothing, class weights and soft labels.

    .. math::
        g_{nc} = u_n (Q_n p_{nc} - q_{nc}), \qquad h_{nc} = 2\, u_n Q_n\, p_{nc} (1 - p_{nc})

    Parameters
    ----------
    *call
        ``(margins, dtrain)`` from ``xgboost.train``, or ``(labels, margins)`` from an estimator, which passes ``sample_weight``
        by keyword. ``margins`` has shape (N, K); with two classes, set ``num_class=2`` in ``xgboost.train``. Labels of shape
        (N, K) are class probabilities (soft labels).
    sample_weight : array_like, shape (N,), optional
        Sample weights u; ``dtrain`` has its own.
    **options
        ``weight`` (of the classes), ``label_smoothing``, ``ignore_index``, ``n_threads``: as in `cross_entropy_grad_hess`.
        ``target``: class probabilities of shape (N, K), which replace the labels.

    Returns
    -------
    grad, hess : ndarray of float32, shape (N, K)
        In the memory order of ``margins``: XGBoost takes them without a copy.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy_grad_hess`; also for margins that are not (N, K).

    References
    ----------
    Chen, Guestrin, *XGBoost: a scalable tree boosting system*, arXiv:1603.02754. The factor 2 is XGBoost's.

    Examples
    --------
    >>> import numpy as np
    >>> from functools import partial
    >>> from fastxent.objectives import xgboost_softprob
    >>> grad, hess = xgboost_softprob(np.array([1.0]), np.zeros((1, 2), np.float32))
    >>> grad, hess
    (array([[ 0.5, -0.5]], dtype=float32), array([[0.5, 0.5]], dtype=float32))
    >>> smoothed = partial(xgboost_softprob, label_smoothing=0.1)  # xgboost.train(..., obj=smoothed)
    >>> smoothed(np.array([1.0]), np.zeros((1, 2), np.float32))[0]
    array([[ 0.45, -0.45]], dtype=float32)
    """
    scores, labels, weights = _read(call)
    return _grad_hess(scores, labels, weights if sample_weight is None else sample_weight, options, lambda k: 2.0)


def lightgbm_multiclass(scores: Any, data: Any, *weights: Any, **options: Any) -> tuple[Array, Array]:
    r"""LightGBM's ``multiclass`` as a custom objective, with label smoothing, class weights and soft labels.

    .. math::
        g_{nc} = u_n (Q_n p_{nc} - q_{nc}), \qquad h_{nc} = \frac{K}{K - 1}\, u_n Q_n\, p_{nc} (1 - p_{nc})

    A custom objective starts from scores of 0, the built-in one from the logarithms of the class frequencies: see `log_prior`.

    Parameters
    ----------
    scores, data, *weights
        ``(scores, train_data)`` from ``lightgbm.train``, or ``(labels, scores, sample_weight, group)`` from an estimator. The
        scores have shape (N, K), in Fortran order.
    **options
        ``weight`` (of the classes), ``label_smoothing``, ``ignore_index``, ``n_threads``: as in `cross_entropy_grad_hess`.
        ``target``: class probabilities of shape (N, K) (soft labels), which replace the labels.

    Returns
    -------
    grad, hess : ndarray of float32, shape (N, K)
        In the memory order of ``scores``: LightGBM takes them without a copy.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy_grad_hess`; also for scores that are not (N, K).

    References
    ----------
    Ke et al., *LightGBM: a highly efficient gradient boosting decision tree*, NeurIPS 2017. The factor
    K / (K - 1) is LightGBM's.

    Examples
    --------
    >>> import numpy as np
    >>> from fastxent.objectives import lightgbm_multiclass
    >>> grad, hess = lightgbm_multiclass(np.array([2.0]), np.zeros((1, 4), order="F"))
    >>> grad, hess
    (array([[ 0.25,  0.25, -0.75,  0.25]], dtype=float32), array([[0.25, 0.25, 0.25, 0.25]], dtype=float32))
    """
    return _grad_hess(*_read((scores, data, *weights)), options, lambda k: k / max(k - 1, 1))


def log_prior(labels: object, n_classes: int, *, sample_weight: object = None) -> Array:
    r"""Logarithms of the class frequencies: the scores from which boosting best starts.

    .. math:: b_c = \log \frac{\sum_n u_n t_{nc}}{\sum_n u_n}

    LightGBM's built-in objective starts from these numbers, and XGBoost's from the same less their mean, which are the same
    probabilities. A custom objective starts from equal scores unless it is given them: as ``init_score`` of a
    ``lightgbm.Dataset`` or as ``base_margin`` of a ``xgboost.DMatrix``, which take a number for each row and class, such as
    ``np.tile(log_prior(y, k), (len(y), 1))``. LightGBM does not add them to its raw predictions; XGBoost takes a
    ``base_margin`` for the data of a prediction too.

    Parameters
    ----------
    labels : array_like, shape (N,) or (N, K)
        Class indices (also as whole floats), or class probabilities t.
    n_classes : int
        K.
    sample_weight : array_like, shape (N,), optional
        Sample weights u.

    Returns
    -------
    ndarray of float64, shape (K,)
        A class without rows has log 1e-15, as in LightGBM.

    Raises
    ------
    ValueError, TypeError
        A shape or dtype does not fit, a label is no class index in [0, K), or the weights sum to 0, as those of no rows do.

    References
    ----------
    Friedman, *Greedy function approximation: a gradient boosting machine*, Annals of Statistics 29 (2001), algorithm 6.

    Examples
    --------
    >>> from fastxent.objectives import log_prior
    >>> log_prior([0, 2, 2, 2], 3).round(3)
    array([ -1.386, -34.539,  -0.288])
    """
    k = check_integer(n_classes, "n_classes")
    if k < 1:
        raise ValueError(f"n_classes = {k} is less than 1")
    t = floating(labels, "labels").astype(np.float64)
    u = check_vector(sample_weight, "sample_weight", t.shape[:1], "one weight per row")
    if t.ndim == 2 and t.shape[1] == k:
        counts = (t if u is None else t * u[:, None]).sum(0)
    elif t.ndim == 1:
        good = (t >= 0) & (t < k) & (t == np.trunc(t))
        if not good.all():
            row = int(np.argmin(good))
            raise ValueError(f"labels[{row}] = {t[row]:g} is no class index in [0, {k})")
        counts = np.bincount(t.astype(np.int64), u, k)
    else:
        raise ValueError(f"labels have shape {t.shape}; they must be (N,), class indices, or (N, {k}), class probabilities")
    total = float(counts.sum())
    if not 0.0 < total < math.inf:
        raise ValueError(f"the weights of all labels sum to {total:g}: classes have no frequencies")
    return np.log(np.maximum(counts / total, SMALLEST_PRIOR))


def _read(call: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Return scores, labels and sample weights of either kind of call."""
    if len(call) < 2:
        raise TypeError(f"an objective takes scores and a data set, or labels and scores; it got {len(call)} argument")
    first, second, *more = call
    if hasattr(second, "get_label"):
        return first, second.get_label(), second.get_weight()
    return second, first, more[0] if more else None


def _grad_hess(
    scores: Any, labels: Any, sample_weight: Any, options: dict[str, Any], factor: Callable[[int], float]
) -> tuple[Array, Array]:
    """Return the gradient and ``factor(K)`` times the Hessian, in float32 but computed in the precision of the scores.

    They are rounded once: with a second rounding, LightGBM grows other trees than by itself.
    """
    scores = as_array(scores, "scores")
    if scores.ndim != 2:
        raise ValueError(f"the scores have shape {scores.shape}; they must be (rows, classes)")
    target = as_array(options.pop("target", labels), "target")
    if target.ndim == 1 and target.size == scores.size > len(scores):  # XGBoost flattens labels of shape (N, K)
        target = target.reshape(scores.shape)
    if np.ndim(sample_weight) == 1 and not np.size(sample_weight):  # XGBoost's word for no weights
        sample_weight = None
    return rounded_grad_hess(scores, target, factor(scores.shape[1]), sample_weight=sample_weight, **options)
