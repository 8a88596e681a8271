"""Softmax cross-entropy of NumPy arrays; read this module first.

A call takes two hops: these functions check their arguments (``_runtime.arguments``), plan the walk over the rows
(``_runtime.plan``) and pass addresses to a compiled task (``_runtime.run``), whose maths is in ``_kernels.losses``.

Notation of all docstrings: N rows (the product of all axes but ``axis``), C classes, logits x, probabilities p = softmax(x),
class indices y or class probabilities t, class weights w, sample weights u, label smoothing eps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastxent._runtime import fastpath
from fastxent._runtime.arguments import (
    Array,
    Problem,
    address,
    check_classes,
    check_out,
    new_gradient,
    out_of_range,
    problem,
    writable_place,
)
from fastxent._runtime.options import checked
from fastxent._runtime.plan import Plan, over
from fastxent._runtime.run import run

if fastpath.ENABLED:
    from fastxent._fastpath.array_calls import lookup, store
else:
    from fastxent._runtime.fastpath import lookup, store


class CrossEntropyStats(NamedTuple):
    """The result of `cross_entropy_stats`: arrays with the shape of the rows, except a reduced ``loss``."""

    loss: Any  # float: loss of the row, or the reduced loss
    lse: Array  # float: log sum_c exp(x_c)
    entropy: Array  # float: -sum_c p_c log p_c, in nats
    target_prob: Array  # float: p_y
    prediction: Array  # intp: argmax_c x_c, the first of equals
    target_rank: Array  # intp: number of classes that rank before y; 0 is a top-1 hit, < 5 a top-5 hit


def cross_entropy(
    logits: object,
    target: object,
    *,
    axis: int = -1,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    n_threads: int | None = None,
) -> Any:
    r"""Softmax cross-entropy of logits against class indices or class probabilities.

    .. math::
        l_n = -u_n \sum_c w_c \left[(1 - \epsilon)\, t_{nc} + \epsilon / C\right] \log p_{nc}, \qquad
        \log p_{nc} = x_{nc} - \log \sum_k e^{x_{nk}}

    A class index y stands for t = onehot(y). The logits are read once; none of the (N, C) arrays of the formula is allocated.

    Parameters
    ----------
    logits : array_like, shape (..., C, ...)
        float16, bfloat16, float32 or float64 (integers are taken as float64), any strides, C on ``axis``. May hold -inf
        (a class ruled out).
    target : array_like
        Class indices: any integer dtype, the shape of ``logits`` without ``axis``, each in [0, C) or ``ignore_index``.
        Or class probabilities: floating, the shape of ``logits``.
    axis : int
        The class axis.
    weight : array_like, shape (C,), optional
        Class weights w.
    sample_weight : array_like, shape of the rows, optional
        Sample weights u.
    ignore_index : int
        Rows with this class index are skipped: loss 0, gradient 0, not counted, whatever the row holds.
    label_smoothing : float in [0, 1]
        eps, the part of the target distribution that is spread evenly over all classes.
    reduction : {"mean", "sum", "none"}
        "sum" adds up l; "none" returns it. "mean" divides the sum by the sum of u_n w_{y_n} over the rows that are not
        ignored; for class probabilities by the sum of u_n, as PyTorch does.
    n_threads : int, optional
        The most threads to use; None: see `get_num_threads`. The number changes no bit of the result.

    Returns
    -------
    numpy floating scalar, or ndarray with the shape of the rows if ``reduction="none"``
        In nats; float64 if logits or class probabilities are, else float32. "mean" over no row is nan.

    Raises
    ------
    IndexError
        A class index is neither in [0, C) nor ``ignore_index``.
    ValueError, TypeError
        A shape, value or dtype does not fit; the message names the argument.

    See Also
    --------
    cross_entropy_value_and_grad : also returns the gradient, at little more cost.

    References
    ----------
    Goodfellow, Bengio, Courville, *Deep Learning*, MIT Press 2016, 6.2.2. Online softmax: Milakov, Gimelshein,
    arXiv:1805.02867. Label smoothing: Szegedy et al., arXiv:1512.00567.

    Examples
    --------
    >>> import numpy as np
    >>> import fastxent as fx
    >>> logits = np.array([[2.0, 1.0, 0.1], [0.5, 2.5, 0.3]])
    >>> print(f"{fx.cross_entropy(logits, [0, 1]):.4f}")
    0.3185
    >>> fx.cross_entropy(logits, [0, -100], reduction="none").round(4)
    array([0.417, 0.   ])
    """
    plain = weight is sample_weight is None
    if plain and (met := lookup("value", logits, target, None, n_threads, axis, ignore_index, label_smoothing, reduction)):
        return met[0]
    checked("reduction", reduction)
    p = problem(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, n_threads)
    loss = loss_of("value", p, reduction)
    if plain and reduction != "none":
        store("value", p, logits, target, None, None, (axis, ignore_index, label_smoothing, reduction))
    return loss


def cross_entropy_value_and_grad(
    logits: object,
    target: object,
    *,
    axis: int = -1,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out: Array | None = None,
    n_threads: int | None = None,
) -> tuple[Any, Array]:
    r"""`cross_entropy` and its gradient with respect to the logits, in one trip through memory.

    .. math::
        \frac{\partial l_n}{\partial x_{nc}} = u_n (Q_n p_{nc} - q_{nc}), \qquad
        q_{nc} = w_c \left[(1 - \epsilon)\, t_{nc} + \epsilon / C\right], \quad Q_n = \sum_c q_{nc}

    Without options and for class indices this is softmax - onehot, divided by the number of rows for "mean".

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, reduction, n_threads
        As in `cross_entropy`. With ``reduction="none"`` the gradient is each row's own.
    out : ndarray, optional
        Receives the gradient; it has the shape and dtype of ``logits``, any strides. It may be ``logits`` itself, which is then
        overwritten, and no memory of that size is needed. Reusing one array in every call saves the page faults of a new one.

    Returns
    -------
    loss : numpy floating scalar or ndarray
        As from `cross_entropy`.
    dlogits : ndarray
        ``out``, or a new array of the shape and dtype of ``logits`` with the same order of axes in memory.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy`; nothing has been written then, not even to ``out``.

    References
    ----------
    Bishop, *Pattern Recognition and Machine Learning*, Springer 2006, eq. 4.109.

    Examples
    --------
    >>> import numpy as np
    >>> import fastxent as fx
    >>> loss, dlogits = fx.cross_entropy_value_and_grad(np.zeros((2, 4)), [1, 3])
    >>> print(f"{loss:.4f}")
    1.3863
    >>> dlogits
    array([[ 0.125, -0.375,  0.125,  0.125],
           [ 0.125,  0.125,  0.125, -0.375]])
    """
    plain = weight is sample_weight is None
    if plain and (
        met := lookup("value_and_grad", logits, target, out, n_threads, axis, ignore_index, label_smoothing, reduction)
    ):
        return met
    checked("reduction", reduction)
    p = problem(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, n_threads)
    if out is not None:
        check_out(out, p.x)
    g = new_gradient(p.x, p.axis) if out is None else writable_place(out, p.x, p.axis, (p.y, p.t, p.w, p.u))
    loss = loss_of("value_and_grad", p, reduction, g)
    if plain and reduction != "none":
        store("value_and_grad", p, logits, target, out, g, (axis, ignore_index, label_smoothing, reduction))
    if out is None:
        return loss, g
    if g is not out:
        np.copyto(out, g)
    return loss, out


def cross_entropy_stats(
    logits: object,
    target: object,
    *,
    axis: int = -1,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "none",
    n_threads: int | None = None,
) -> CrossEntropyStats:
    r"""Loss, log-sum-exp, entropy, target probability, prediction and target rank of each row, in one trip through memory.

    .. math::
        \mathrm{lse}_n = \log \sum_c e^{x_{nc}}, \qquad H_n = -\sum_c p_{nc} \log p_{nc}, \qquad
        \mathrm{rank}_n = \#\{c : x_{nc} > x_{ny}\} + \#\{c < y : x_{nc} = x_{ny}\}

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, reduction, n_threads
        As in `cross_entropy`; ``reduction`` applies to ``loss`` only. For class probabilities, y is the most probable class.

    Returns
    -------
    CrossEntropyStats
        ``loss, lse, entropy, target_prob, prediction, target_rank``. Accuracy is ``(target_rank == 0).mean()``, top-5
        accuracy ``(target_rank < 5).mean()``. Ignored rows give 0, 0, 0, 0, -1, -1.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy`.

    References
    ----------
    Cover, Thomas, *Elements of Information Theory*, Wiley 2006, chapter 2 (entropy).

    Examples
    --------
    >>> import fastxent as fx
    >>> stats = fx.cross_entropy_stats([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]], [1, 2])
    >>> stats.prediction, stats.target_rank
    (array([1, 0]), array([0, 1]))
    >>> stats.target_prob.round(4)
    array([0.8438, 0.2447])
    """
    checked("reduction", reduction)
    p = problem(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, n_threads)
    if p.x.shape[p.axis] == 0:
        raise ValueError(f"logits has shape {p.x.shape}: no class to predict")
    lse, entropy, target_prob = (np.empty(p.rows, p.acc) for _ in range(3))
    prediction, target_rank = (np.empty(p.rows, np.int64) for _ in range(2))
    labels = p.y if p.t is None else np.ascontiguousarray(np.argmax(p.t, axis=p.axis), np.int64)
    loss = loss_of(
        "stats", p, reduction, labels=labels, lse=address(lse), entropy=address(entropy), target_prob=address(target_prob),
        prediction=address(prediction), target_rank=address(target_rank),
    )  # fmt: skip
    indices = (a.astype(np.intp, copy=False) for a in (prediction, target_rank))
    return CrossEntropyStats(loss, lse, entropy, target_prob, *indices)


def cross_entropy_grad_hess(
    logits: object,
    target: object,
    *,
    axis: int = -1,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    n_threads: int | None = None,
) -> tuple[Array, Array]:
    r"""Gradient and diagonal of the Hessian of each row's loss: what a boosting objective returns.

    .. math::
        g_{nc} = u_n (Q_n p_{nc} - q_{nc}), \qquad h_{nc} = u_n Q_n\, p_{nc} (1 - p_{nc})

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, n_threads
        As in `cross_entropy`. Nothing is reduced. Class indices may be whole floats, as XGBoost and LightGBM pass them.

    Returns
    -------
    grad, hess : ndarray
        Shape, dtype and order of axes of ``logits``; zero in ignored rows. XGBoost and LightGBM multiply the Hessian by a
        constant (2 and C/(C-1)), which these results do not contain.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy`.

    References
    ----------
    Friedman, *Greedy function approximation: a gradient boosting machine*, Annals of Statistics 29 (2001), 4.6.

    Examples
    --------
    >>> import fastxent as fx
    >>> grad, hess = fx.cross_entropy_grad_hess([[0.0, 0.0]], [1])
    >>> grad, hess
    (array([[ 0.5, -0.5]]), array([[0.25, 0.25]]))
    """
    p = problem(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, n_threads, float_labels=True)
    return _grad_hess_of("grad_hess", p, p.x.dtype)


def nll_loss(
    log_probs: object,
    target: object,
    *,
    axis: int = -1,
    weight: object = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Any:
    r"""Negative log-likelihood of class indices, given log-probabilities: the second half of a cross-entropy.

    .. math:: l_n = -w_{y_n} \log p_{n y_n}

    Parameters
    ----------
    log_probs : array_like, shape (..., C, ...)
        Logarithms of probabilities, as from `log_softmax`.
    target : array_like of integers, the shape of ``log_probs`` without ``axis``
        Class indices, in [0, C) or ``ignore_index``.
    axis, weight, ignore_index, reduction
        As in `cross_entropy`.

    Returns
    -------
    numpy floating scalar, or ndarray with the shape of the rows if ``reduction="none"``
        In nats.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy`.

    References
    ----------
    ``torch.nn.functional.nll_loss``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastxent as fx
    >>> print(f"{fx.nll_loss(np.log([[0.1, 0.7, 0.2]]), [1]):.8f}")
    0.35667494
    """
    checked("reduction", reduction)
    p = problem(log_probs, target, axis, weight, None, ignore_index, 0.0, None, "log_probs")
    if p.y is None:
        raise TypeError("target holds class probabilities; nll_loss takes class indices")
    divisor = check_classes(p.y, p.x.shape[p.axis], p.w, p.ignore)
    kept = p.y != p.ignore
    loss = np.zeros(p.rows)
    if p.x.size:
        y = np.where(kept, p.y, 0)
        picked = np.take_along_axis(p.x, np.expand_dims(y, p.axis), p.axis).squeeze(p.axis).astype(np.float64)
        loss = np.where(kept, 0.0 - picked * (1.0 if p.w is None else p.w[y]), 0.0)
    return _reduced(loss.sum(), divisor, reduction, loss.astype(p.acc))


# ----------------------------------------------------------------------------------------------------


def rounded_grad_hess(
    scores: Array,
    target: object,
    hessian_factor: float,
    *,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    n_threads: int | None = None,
) -> tuple[Array, Array]:
    """Return `cross_entropy_grad_hess` of scores (rows, classes), the Hessian times a factor, each rounded once to float32."""
    p = problem(
        scores, target, 1, weight, sample_weight, ignore_index, label_smoothing, n_threads, "scores", float_labels=True
    )  # fmt: skip
    return _grad_hess_of("boosting", p, np.dtype(np.float32), hessian_factor=hessian_factor)


def _grad_hess_of(name: str, p: Problem, dtype: np.dtype[Any], **more: Any) -> tuple[Array, Array]:
    grad, hess = new_gradient(p.x, p.axis, dtype), new_gradient(p.x, p.axis, dtype)
    if p.x.size:
        run_problem(name, p, p.plan(name, grad), g=address(grad), h=address(hess), **more)
    return grad, hess


def loss_of(name: str, p: Problem, reduction: str, g: Array | None = None, labels: Array | None = None, **more: Any) -> Any:
    """Run a task that computes losses, and return them reduced."""
    rows = np.zeros(p.rows if reduction == "none" else 0, p.acc)
    total, divisor = 0.0, p.divisor
    if p.x.size:
        plan = p.plan(name, g)
        more |= {"g": address(g), "loss": address(rows) if reduction == "none" else 0}
        total, divisor = run_problem(name, p, plan, reduction == "mean", labels, **more)
    return _reduced(total, divisor, reduction, rows)


def _reduced(total: float, divisor: float, reduction: str, rows: Array) -> Any:
    if reduction == "none":
        return rows if rows.ndim else rows[()]
    return rows.dtype.type(over(total, divisor) if reduction == "mean" else total)


def run_problem(
    name: str, p: Problem, plan: Plan, average: bool = False, labels: Array | None = None, **more: Any
) -> tuple[float, float]:
    """Run a task; return the sum of the losses and the divisor of the gradient."""
    total, bad, divisor = run(
        name, plan, p.n_threads, x=address(p.x), t=address(p.t), y=address(p.y if labels is None else labels),
        w=address(p.w), u=address(p.u), divisor=p.divisor if average else 1.0, average=average,
        **p.fields, **more,
    )  # fmt: skip
    if p.y is not None and bad:
        raise out_of_range(p.y, p.x.shape[p.axis], p.ignore)
    return total, divisor
