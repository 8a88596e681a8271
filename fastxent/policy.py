"""The two quantities that policy gradients need of a policy's logits: log-probability of the chosen action, and entropy."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastxent._runtime.arguments import address, problem
from fastxent._runtime.options import checked
from fastxent.functional import run_problem


def log_prob_and_entropy(
    logits: object,
    target: object,
    *,
    temperature: float = 1.0,
    axis: int = -1,
    ignore_index: int = -100,
    n_threads: int | None = None,
) -> tuple[Any, Any]:
    r"""Log-probability of the target class and entropy of each row, in one trip through the logits.

    .. math::
        p_n = \mathrm{softmax}(x_n / T), \qquad \log p_{n y_n}, \qquad H_n = -\sum_c p_{nc} \log p_{nc}

    With actions as classes, these are what REINFORCE, PPO and GRPO need of a policy. None of the (N, C) arrays of the formula
    is allocated. `fastxent.torch.log_prob_and_entropy` is the same for tensors, with gradients.

    Parameters
    ----------
    logits : array_like, shape (..., C, ...)
        float16, bfloat16, float32 or float64 (integers are taken as float64), any strides, C on ``axis``. May hold -inf
        (a class ruled out), which adds 0 to the entropy.
    target : array_like of integers, the shape of ``logits`` without ``axis``
        Class indices y, each in [0, C) or ``ignore_index``.
    temperature : float > 0
        T.
    axis : int
        The class axis.
    ignore_index : int
        Rows with this class index are skipped: both results are 0, whatever the row holds.
    n_threads : int, optional
        The most threads to use; None: see `get_num_threads`. The number changes no bit of the result.

    Returns
    -------
    log_prob, entropy : ndarray with the shape of the rows, or numpy floating scalars if there is one row without axes
        In nats; float64 if the logits are, else float32.

    Raises
    ------
    IndexError
        A class index is neither in [0, C) nor ``ignore_index``.
    ValueError, TypeError
        A shape, value or dtype does not fit; the message names the argument.

    See Also
    --------
    cross_entropy_stats : the entropy with prediction and rank of the target.

    References
    ----------
    Williams, *Simple statistical gradient-following algorithms for connectionist reinforcement learning*, Machine Learning 8
    (1992). Entropy as a bonus: Mnih et al., arXiv:1602.01783.

    Examples
    --------
    >>> import fastxent as fx
    >>> log_prob, entropy = fx.log_prob_and_entropy([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]], [1, 2])
    >>> log_prob.round(4), entropy.round(4)
    (array([-0.1698, -1.4076]), array([0.5243, 0.8324]))
    """
    temperature = checked("temperature", temperature)
    p = problem(logits, target, axis, None, None, ignore_index, 0.0, n_threads)
    if p.y is None:
        raise TypeError("target holds class probabilities; log_prob_and_entropy takes class indices")
    log_prob, entropy = np.zeros(p.rows, p.acc), np.zeros(p.rows, p.acc)
    if p.x.size:
        run_problem(
            "log_prob_and_entropy", p, p.plan("log_prob_and_entropy"), loss=address(log_prob), entropy=address(entropy),
            temperature=temperature,
        )  # fmt: skip
    return log_prob[()], entropy[()]
