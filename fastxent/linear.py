"""Cross-entropy of a linear layer's logits, without the logits: the head of a language model in bounded memory.

The logits of N tokens and V classes are N V numbers, which is most of the memory of training a language model. These functions
compute them by blocks of rows, and each block is gone before the next is computed: see ``_runtime.linear_layer``.

Notation of all docstrings: N rows (the product of all axes of ``input`` but the last), D features, V classes, input h, weight W
(V, D) and bias b of the layer, logits x = h W' + b; the rest as in `fastxent.functional`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastxent._runtime.arguments import Array
from fastxent._runtime.linear_layer import Layer, check_layer, gradients_of, run_task
from fastxent._runtime.linear_loss import by_tiles, losses
from fastxent._runtime.linear_products import Gradients
from fastxent._runtime.options import checked
from fastxent._runtime.plan import over
from fastxent.functional import CrossEntropyStats


class LinearGradients(NamedTuple):
    """The gradients that `linear_cross_entropy_value_and_grad` returns, named and shaped as the arguments."""

    input: Array
    linear_weight: Array
    linear_bias: Array | None  # None without a bias


def linear_cross_entropy(
    input: object,
    linear_weight: object,
    target: object,
    *,
    linear_bias: object = None,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory_limit: int | None = None,
    n_threads: int | None = None,
) -> Any:
    r"""Cross-entropy of the logits of a linear layer; the (N, V) logits are never in memory together.

    .. math::
        x_n = W h_n + b, \qquad l_n = u_n \left(-\sum_c q_{nc} \log p_{nc} + z\, \mathrm{lse}_n^2\right), \qquad
        q_{nc} = w_c \left[(1 - \epsilon)\, t_{nc} + \epsilon / V\right]

    with p = softmax(x) and lse the logarithm of the sum of exp(x), as in `cross_entropy`. Rows of ``ignore_index`` are dropped
    before the product.

    Parameters
    ----------
    input : array_like, shape (..., D)
        float16, bfloat16, float32 or float64 (integers are taken as float64); the hidden states h. It may be memory-mapped.
        More than two axes should be contiguous, or they are copied.
    linear_weight : array_like, shape (V, D)
        The layer's weight, of the dtype of ``input``. It is read once for each block of rows, or tile of 1024 rows at most. It
        may be memory-mapped.
    target : array_like
        Class indices: any integer dtype, shape (...), each in [0, V) or ``ignore_index``. Or class probabilities: floating,
        shape (..., V).
    linear_bias : array_like, shape (V,), optional
        The layer's bias.
    weight : array_like, shape (V,), optional
        Class weights w.
    sample_weight : array_like, shape (...), optional
        Sample weights u.
    ignore_index, label_smoothing, reduction
        As in `cross_entropy`.
    z_loss : float
        z, which pulls lse to 0; not multiplied by ``weight``.
    softcap : float > 0, optional
        Use softcap * tanh(x / softcap) in place of x.
    memory_limit : int, optional
        Most bytes to use beside arguments and results. It decides how many rows a block has, at least one. None: 64 MB, or the
        bytes of ``linear_weight`` if it has more. The result depends on it by rounding only.
    n_threads : int, optional
        The most threads; None: see `get_num_threads`. Products use no more of them than NumPy's BLAS is set to. Meanwhile
        every product of the process runs on the thread that calls it.

    Returns
    -------
    numpy floating scalar, or ndarray with the shape of the rows if ``reduction="none"``
        In nats; float64 if ``input`` or class probabilities are, else float32. "mean" over no row is nan.

    Raises
    ------
    IndexError
        A class index is neither in [0, V) nor ``ignore_index``; the message names the row as it stands in ``target``.
    ValueError, TypeError
        A shape, value or dtype does not fit; the message names the argument.

    Notes
    -----
    Half precision is multiplied in float32, from copies of a block of rows and of some classes, and the logits are not rounded.
    A product runs on one thread where NumPy's BLAS is OpenBLAS, and sums are split by shapes alone. So a result has the same
    bits at any number of threads, up to the number of groups of classes, twelve at most; beyond that, and with another BLAS, if
    the products of BLAS have. The loss is computed by tiles of rows and classes if there are enough classes, and may differ in
    the last place from that of `linear_cross_entropy_value_and_grad`.

    References
    ----------
    Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, arXiv:2411.09009. z-loss: Chowdhery et al., *PaLM*,
    arXiv:2204.02311, 5. Soft cap: Gemma Team, *Gemma 2*, arXiv:2408.00118, 2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastxent as fx
    >>> hidden, head = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(f"{fx.linear_cross_entropy(hidden, head, [0, 1]):.4f}")
    0.5831
    >>> print(f"{fx.cross_entropy(hidden @ head.T, [0, 1]):.4f}")
    0.5831
    """
    checked("reduction", reduction)
    layer = check_layer(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, sample_weight=sample_weight,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, memory_limit=memory_limit,
        n_threads=n_threads,
    )  # fmt: skip
    if not by_tiles(layer):
        return _loss_of("value", layer, reduction)
    rows = losses(layer)
    if reduction == "none":
        return layer.spread(rows.astype(layer.acc))
    total = float(rows.sum())
    return layer.acc.type(over(total, layer.divisor) if reduction == "mean" else total)


def linear_cross_entropy_value_and_grad(
    input: object,
    linear_weight: object,
    target: object,
    *,
    linear_bias: object = None,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory_limit: int | None = None,
    n_threads: int | None = None,
) -> tuple[Any, LinearGradients]:
    r"""`linear_cross_entropy` and its gradients with respect to input, weight and bias of the layer.

    With g the gradient of the logits, as `cross_entropy_value_and_grad` returns it,

    .. math::
        \frac{\partial l}{\partial h} = g W, \qquad \frac{\partial l}{\partial W} = g^\top h, \qquad
        \frac{\partial l}{\partial b_c} = \sum_n g_{nc}

    g overwrites a block of logits, which is then multiplied twice and gone.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, sample_weight, ignore_index, label_smoothing
        As in `linear_cross_entropy`.
    reduction : {"mean", "sum", "none"}
        As in `cross_entropy`. With "none" the gradients are those of the sum of the losses; pass other factors of the rows as
        ``sample_weight``.
    z_loss, softcap, memory_limit, n_threads
        As in `linear_cross_entropy`.

    Returns
    -------
    loss : numpy floating scalar or ndarray
        As from `linear_cross_entropy`.
    gradients : LinearGradients
        ``input``, ``linear_weight`` and ``linear_bias`` (None without a bias), in the shapes of the arguments and the dtype of
        ``input``. Rows that are ignored have gradient 0. In half precision the gradients of weight and bias are added up in
        float32 over all rows and rounded once, which takes 4 V D bytes beside ``memory_limit``.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `linear_cross_entropy`.

    References
    ----------
    Hsu et al., *Liger Kernel*, arXiv:2410.10989, 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastxent as fx
    >>> hidden, head = np.array([[1.0, 0.0], [0.0, 2.0]]), np.zeros((4, 2))
    >>> loss, gradients = fx.linear_cross_entropy_value_and_grad(hidden, head, [1, 3], linear_bias=np.zeros(4))
    >>> print(f"{loss:.4f}")
    1.3863
    >>> gradients.linear_weight
    array([[ 0.125,  0.25 ],
           [-0.375,  0.25 ],
           [ 0.125,  0.25 ],
           [ 0.125, -0.75 ]])
    >>> gradients.linear_bias
    array([ 0.25, -0.25,  0.25, -0.25])
    """
    checked("reduction", reduction)
    layer = check_layer(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, sample_weight=sample_weight,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, memory_limit=memory_limit,
        n_threads=n_threads,
    )  # fmt: skip
    gradients = gradients_of(layer)
    loss = _loss_of("value_and_grad", layer, reduction, gradients)
    return loss, LinearGradients(*gradients.result())


def linear_cross_entropy_stats(
    input: object,
    linear_weight: object,
    target: object,
    *,
    linear_bias: object = None,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "none",
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory_limit: int | None = None,
    n_threads: int | None = None,
) -> CrossEntropyStats:
    r"""`cross_entropy_stats` of the logits of a linear layer: loss, perplexity, accuracy and entropy of a language model.

    .. math::
        x_n = W h_n + b, \qquad \mathrm{lse}_n = \log \sum_c e^{x_{nc}}, \qquad H_n = -\sum_c p_{nc} \log p_{nc}

    and what else `cross_entropy_stats` returns of x, after the soft cap if there is one.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, sample_weight, ignore_index, label_smoothing
        As in `linear_cross_entropy`. For class probabilities, y is the most probable class.
    reduction : {"mean", "sum", "none"}
        As in `cross_entropy`; it applies to ``loss`` only.
    z_loss, softcap, memory_limit, n_threads
        As in `linear_cross_entropy`. The weight is read once for each block, so with one that is memory-mapped and does not fit
        the memory, set ``memory_limit`` to what there is.

    Returns
    -------
    CrossEntropyStats
        ``loss, lse, entropy, target_prob, prediction, target_rank``, as from `cross_entropy_stats`.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `linear_cross_entropy`.

    References
    ----------
    Jelinek et al., *Perplexity - a measure of the difficulty of speech recognition tasks*, JASA 62 (1977).

    Examples
    --------
    >>> import numpy as np
    >>> import fastxent as fx
    >>> hidden, head = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> stats = fx.linear_cross_entropy_stats(hidden, head, [0, 2])
    >>> stats.prediction, stats.target_rank
    (array([0, 1]), array([0, 1]))
    >>> print(f"perplexity {np.exp(stats.loss.mean()):.4f}")
    perplexity 1.7916
    """
    checked("reduction", reduction)
    layer = check_layer(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, sample_weight=sample_weight,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, memory_limit=memory_limit,
        n_threads=n_threads,
    )  # fmt: skip
    if len(layer.weight) == 0:
        raise ValueError(f"linear_weight has shape {layer.weight.shape}: no class to predict")
    if layer.t is not None:
        layer = layer._replace(y=np.argmax(layer.t, axis=1).astype(np.int64))
    floats = {name: np.empty(layer.n_kept, layer.acc) for name in ("lse", "entropy", "target_prob")}
    indices = {name: np.empty(layer.n_kept, np.int64) for name in ("prediction", "target_rank")}
    loss = _loss_of("stats", layer, reduction, outputs=floats | indices)
    return CrossEntropyStats(
        loss,
        *(layer.spread(a) for a in floats.values()),
        *(layer.spread(a.astype(np.intp, copy=False), -1) for a in indices.values()),
    )


def linear_log_prob_and_entropy(
    input: object,
    linear_weight: object,
    target: object,
    *,
    linear_bias: object = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    memory_limit: int | None = None,
    n_threads: int | None = None,
) -> tuple[Any, Any]:
    r"""`log_prob_and_entropy` of the logits of a linear layer: what policy gradients need of a language model's hidden states.

    .. math::
        p_n = \mathrm{softmax}((W h_n + b) / T), \qquad \log p_{n y_n}, \qquad H_n = -\sum_c p_{nc} \log p_{nc}

    Parameters
    ----------
    input, linear_weight, linear_bias, memory_limit, n_threads
        As in `linear_cross_entropy`.
    target : array_like of integers, shape (...)
        Class indices y, each in [0, V) or ``ignore_index``.
    temperature : float > 0
        T.
    ignore_index : int
        Rows with this class index are dropped: both results are 0, whatever the row holds.

    Returns
    -------
    log_prob, entropy : ndarray with the shape of the rows, or numpy floating scalars if there is one row without axes
        In nats; float64 if ``input`` is, else float32.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `linear_cross_entropy`.

    References
    ----------
    As of `log_prob_and_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastxent as fx
    >>> log_prob, entropy = fx.linear_log_prob_and_entropy(np.ones((1, 2)), np.zeros((4, 2)), [1])
    >>> log_prob.round(4), entropy.round(4)
    (array([-1.3863]), array([1.3863]))
    """
    temperature = checked("temperature", temperature)
    layer = check_layer(
        input, linear_weight, target, linear_bias=linear_bias, ignore_index=ignore_index, memory_limit=memory_limit,
        n_threads=n_threads,
    )  # fmt: skip
    if layer.y is None:
        raise TypeError("target holds class probabilities; linear_log_prob_and_entropy takes class indices")
    outputs = {name: np.zeros(layer.n_kept, layer.acc) for name in ("loss", "entropy")}
    run_task("log_prob_and_entropy", layer, outputs, temperature=temperature)
    log_prob, entropy = (layer.spread(a) for a in outputs.values())
    return log_prob, entropy


def _loss_of(
    name: str,
    layer: Layer,
    reduction: str,
    gradients: Gradients | None = None,
    outputs: dict[str, Array] | None = None,
) -> Any:
    """Run a task that computes losses, and return them reduced."""
    rows = np.zeros(layer.n_kept if reduction == "none" else 0, layer.acc)
    outputs = outputs or {}
    if reduction == "none":
        outputs = outputs | {"loss": rows}
    total = run_task(name, layer, outputs, gradients, divisor=layer.divisor if reduction == "mean" else 1.0)
    if reduction == "none":
        return layer.spread(rows)
    return layer.acc.type(over(total, layer.divisor) if reduction == "mean" else total)
