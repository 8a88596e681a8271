"""The functions of `fastxent` over Dask arrays that are chunked by rows: a block of rows is a task, and results are lazy.

Sums and weights are added up over the blocks and divided once, so that blocks may differ in size. A task uses one thread of the
kernels, since Dask runs as many tasks as there are cores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

try:
    import dask.array as da
except ImportError as error:
    raise ImportError("fastxent.dask needs Dask: pip install 'fastxent[dask]'", name="dask") from error

from fastxent import functional, special
from fastxent._runtime.arguments import as_array
from fastxent._runtime.options import checked
from fastxent.functional import CrossEntropyStats

__all__ = [
    "cross_entropy", "cross_entropy_stats", "cross_entropy_value_and_grad", "log_softmax", "logsumexp", "softmax",
]  # fmt: skip


def cross_entropy(
    logits: Any,
    target: Any,
    *,
    axis: int = -1,
    weight: object = None,
    sample_weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    n_threads: int | None = 1,
) -> Any:
    r"""`fastxent.cross_entropy` of Dask arrays.

    .. math::
        L = \frac{\sum_b \sum_{n \in b} l_n}{\sum_b \sum_{n \in b} u_n w_{y_n}}

    over the blocks b of rows; l is the loss of a row, as in `fastxent.cross_entropy`.

    Parameters
    ----------
    logits : dask.array.Array, shape (..., C, ...)
        If the class axis is split into chunks, it is rechunked to one, with a warning.
    target, sample_weight : dask.array.Array or array_like
        As in `fastxent.cross_entropy`; they are rechunked as the rows of the logits are.
    axis, weight, ignore_index, label_smoothing, reduction
        As in `fastxent.cross_entropy`.
    n_threads : int or None
        The most threads that a task uses; None: as many as `fastxent.get_num_threads` says.

    Returns
    -------
    dask.array.Array
        Lazy: of shape (), or of the shape of the rows if ``reduction="none"``; dtype as from `fastxent.cross_entropy`.

    Raises
    ------
    ValueError, TypeError
        A shape, value or dtype does not fit.
    IndexError
        When it is computed: a class index is out of range. Rows are counted within the block.

    References
    ----------
    Rocklin, *Dask: parallel computation with blocked algorithms and task scheduling*, SciPy 2015.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastxent.dask as fxd
    >>> logits = da.zeros((6, 4), chunks=(4, 4))
    >>> print(f"{float(fxd.cross_entropy(logits, [0, 1, 2, 3, 0, 1])):.4f}")
    1.3863
    """
    checked("reduction", reduction)
    call = _Call(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, n_threads)
    return call.reduced(call.of_rows(functional.cross_entropy, "()", [call.dtype], call.u), reduction)


def cross_entropy_value_and_grad(
    logits: Any,
    target: Any,
    *,
    axis: int = -1,
    weight: object = None,
    sample_weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    n_threads: int | None = 1,
) -> tuple[Any, Any]:
    r"""`fastxent.cross_entropy_value_and_grad` of Dask arrays.

    .. math::
        \frac{\partial L}{\partial x_{nc}} = \frac{u_n (Q_n p_{nc} - q_{nc})}{\sum_k u_k w_{y_k}}

    The divisor of a mean follows from the targets alone. So a task makes the loss and the gradient of its block in one trip
    through memory, once all targets have been counted.

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, reduction, n_threads
        As in `cross_entropy`.

    Returns
    -------
    loss, dlogits : dask.array.Array
        Lazy; compute them together (``dask.compute(loss, dlogits)``), and each block is read once.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy`.

    References
    ----------
    Bishop, *Pattern Recognition and Machine Learning*, Springer 2006, eq. 4.109.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastxent.dask as fxd
    >>> loss, dlogits = fxd.cross_entropy_value_and_grad(da.zeros((2, 2), chunks=(1, 2)), [0, 1])
    >>> dlogits.compute()
    array([[-0.25,  0.25],
           [ 0.25, -0.25]])
    """
    checked("reduction", reduction)
    call = _Call(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, n_threads)
    divisor = call.divisor() if reduction == "mean" else None
    u = call.u if divisor is None else call.u / divisor  # so the kernel divides the gradient
    losses, grad = call.of_rows(functional.cross_entropy_value_and_grad, "(),(c)", [call.dtype, call.x.dtype], u)
    loss = call.reduced(losses, "none" if reduction == "none" else "sum")
    if divisor is not None:
        loss = da.where(da.isnan(divisor), np.nan, loss).astype(call.dtype)  # a mean over no rows
    return loss, da.moveaxis(grad, -1, call.axis)


def cross_entropy_stats(
    logits: Any,
    target: Any,
    *,
    axis: int = -1,
    weight: object = None,
    sample_weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "none",
    n_threads: int | None = 1,
) -> CrossEntropyStats:
    r"""`fastxent.cross_entropy_stats` of Dask arrays: its formulas, row by row.

    .. math::
        \mathrm{lse}_n = \log \sum_c e^{x_{nc}}, \qquad H_n = -\sum_c p_{nc} \log p_{nc}

    Parameters
    ----------
    logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, reduction, n_threads
        As in `cross_entropy`; ``reduction`` applies to ``loss`` only.

    Returns
    -------
    CrossEntropyStats
        Of lazy arrays; compute those that you need together.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy`.

    References
    ----------
    Cover, Thomas, *Elements of Information Theory*, Wiley 2006, chapter 2 (entropy).

    Examples
    --------
    >>> import dask.array as da
    >>> import fastxent.dask as fxd
    >>> stats = fxd.cross_entropy_stats(da.from_array([[0.0, 3.0], [2.0, 0.0]], chunks=(1, 2)), [1, 1])
    >>> float((stats.target_rank == 0).mean())  # accuracy
    0.5
    """
    checked("reduction", reduction)
    call = _Call(logits, target, axis, weight, sample_weight, ignore_index, label_smoothing, n_threads)
    dtypes = [call.dtype] * 4 + [np.dtype(np.intp)] * 2
    losses, *others = call.of_rows(functional.cross_entropy_stats, ",".join(["()"] * 6), dtypes, call.u)
    return CrossEntropyStats(call.reduced(losses, reduction), *others)


def softmax(x: Any, axis: int, *, n_threads: int | None = 1) -> Any:
    r"""`fastxent.softmax` of a Dask array.

    .. math:: p_c = e^{x_c - m} / \sum_k e^{x_k - m}, \qquad m = \max_c x_c

    Parameters
    ----------
    x : dask.array.Array
        If ``axis`` is split into chunks, it is rechunked to one, with a warning.
    axis : int
        The axis to normalise over.
    n_threads : int or None
        As in `cross_entropy`.

    Returns
    -------
    dask.array.Array
        Lazy; shape and dtype of ``x``.

    Raises
    ------
    ValueError, TypeError
        An axis or dtype does not fit.

    References
    ----------
    ``scipy.special.softmax``.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastxent.dask as fxd
    >>> fxd.softmax(da.zeros((2, 4), chunks=(1, 4)), axis=-1).compute()
    array([[0.25, 0.25, 0.25, 0.25],
           [0.25, 0.25, 0.25, 0.25]])
    """
    return _elementwise(special.softmax, x, axis, n_threads)


def log_softmax(x: Any, axis: int, *, n_threads: int | None = 1) -> Any:
    r"""`fastxent.log_softmax` of a Dask array.

    .. math:: \log p_c = x_c - \log \sum_k e^{x_k}

    Parameters
    ----------
    x, axis, n_threads
        As in `softmax`.

    Returns
    -------
    dask.array.Array
        Lazy; shape and dtype of ``x``.

    Raises
    ------
    ValueError, TypeError
        As in `softmax`.

    References
    ----------
    ``scipy.special.log_softmax``.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastxent.dask as fxd
    >>> fxd.log_softmax(da.from_array([[1000.0, 1.0]]), axis=-1).compute()
    array([[   0., -999.]])
    """
    return _elementwise(special.log_softmax, x, axis, n_threads)


def logsumexp(a: Any, axis: int, *, n_threads: int | None = 1) -> Any:
    r"""`fastxent.logsumexp` of a Dask array.

    .. math:: \mathrm{lse} = \log \sum_c e^{x_c}

    Parameters
    ----------
    a : dask.array.Array
        As ``x`` of `softmax`.
    axis, n_threads
        As in `softmax`.

    Returns
    -------
    dask.array.Array
        Lazy; the shape of ``a`` without ``axis``.

    Raises
    ------
    ValueError, TypeError
        As in `softmax`.

    References
    ----------
    ``scipy.special.logsumexp``.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastxent.dask as fxd
    >>> fxd.logsumexp(da.from_array([[1000.0, 1000.0]]), axis=-1).compute().round(6)
    array([1000.693147])
    """
    x, _ = _rows_of(a, axis, "a")
    function = partial(special.logsumexp, axis=-1, n_threads=checked("n_threads", n_threads))
    return da.apply_gufunc(function, "(c)->()", x, output_dtypes=special.logsumexp(_empty(x), axis=-1).dtype)


# ----------------------------------------------------------------------------------------------------


def _rows_of(a: Any, axis: int, name: str) -> tuple[Any, int]:
    """Return a Dask array with the class axis, in one chunk, moved to the end; and the number of that axis."""
    if not isinstance(a, da.Array):
        raise TypeError(f"{name} must be a dask.array.Array, got {type(a).__name__}")
    axis = checked("axis", axis)
    if not -a.ndim <= axis < a.ndim:
        raise ValueError(f"axis = {axis} is outside [{-a.ndim}, {a.ndim}) for {name} of shape {a.shape}")
    axis %= a.ndim
    if a.shape[axis] != a.shape[axis]:
        raise _unknown(a, name)
    if a.dtype.kind in "iub":
        a = a.astype(np.float64)
    if len(a.chunks[axis]) > 1:
        warnings.warn(
            f"the class axis of {name} is split into {len(a.chunks[axis])} chunks and rechunked to one; chunk by rows instead",
            da.PerformanceWarning,
            stacklevel=4,
        )
        a = a.rechunk({axis: -1})
    return da.moveaxis(a, axis, -1), axis


def _empty(a: Any) -> np.ndarray[Any, Any]:
    """Return an array of no rows, with the dtype and the classes of ``a``, from which NumPy's functions check the options."""
    return np.empty((*(0 for _ in a.shape[:-1]), a.shape[-1]), a.dtype)


def _elementwise(function: Callable[..., Any], x: Any, axis: int, n_threads: int | None) -> Any:
    rows, axis = _rows_of(x, axis, "x")
    function = partial(function, axis=-1, n_threads=checked("n_threads", n_threads))
    return da.moveaxis(da.apply_gufunc(function, "(c)->(c)", rows, output_dtypes=function(_empty(rows)).dtype), -1, axis)


def _check_sizes(a: Any, name: str) -> None:
    """Raise an error if Dask does not know how many rows a chunk has, as after a selection by a mask."""
    if any(n != n for n in a.shape):
        raise _unknown(a, name)


def _unknown(a: Any, name: str) -> ValueError:
    return ValueError(f"{name} has chunks of unknown sizes, shape {a.shape}: call compute_chunk_sizes() of it first")


class _Call:
    """A checked call: arrays with the class axis at the end, and the options of NumPy's functions on a block of their rows."""

    def __init__(
        self, logits: Any, target: Any, axis: int, weight: Any, sample_weight: Any, ignore_index: int,
        label_smoothing: float, n_threads: int | None,
    ) -> None:  # fmt: skip
        self.x, self.axis = _rows_of(logits, axis, "logits")
        target = da.asanyarray(target)
        self.soft = target.ndim == self.x.ndim
        if self.soft:
            target, _ = _rows_of(target, self.axis, "target")
        _check_sizes(self.x, "logits")
        _check_sizes(target, "target")
        rows, chunks = self.x.shape[:-1], self.x.chunks[:-1]
        if target.shape != (self.x.shape if self.soft else rows):
            raise ValueError(f"target has shape {target.shape}; rows of logits have shape {rows}, logits {self.x.shape}")
        u = da.ones(rows, chunks=chunks) if sample_weight is None else da.asanyarray(sample_weight)
        _check_sizes(u, "sample_weight")
        if u.shape != rows:
            raise ValueError(f"sample_weight has shape {u.shape}; it must be {rows}: one weight per row")
        self.target, self.u = target.rechunk(self.x.chunks if self.soft else chunks), u.rechunk(chunks)
        self.weight = None if weight is None else as_array(weight, "weight")
        self.options: dict[str, Any] = {
            "weight": self.weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "n_threads": n_threads,
        }  # fmt: skip
        t = _empty(self.target) if self.soft else np.empty((0,) * len(rows), self.target.dtype)
        self.dtype = functional.cross_entropy(_empty(self.x), t, reduction="sum", **self.options).dtype

    def of_rows(self, function: Callable[..., Any], results: str, dtypes: list[Any], u: Any) -> Any:
        """Return the results of a function of NumPy arrays, block by block; ``u``: the sample weights."""
        signature = f"(c),{'(c)' if self.soft else '()'},()->{results}"
        work = partial(_on_block, function, self.options)
        return da.apply_gufunc(
            work, signature, self.x, self.target, u, output_dtypes=dtypes if len(dtypes) > 1 else dtypes[0]
        )  # fmt: skip

    def divisor(self) -> Any:
        """Return what a mean divides by: the sum of the weights over all blocks, or nan for 0."""
        weights = self.u
        if not self.soft:
            counted = partial(_counted, self.weight, self.options["ignore_index"])
            weights = da.apply_gufunc(counted, "(),()->()", self.target, self.u, output_dtypes=np.float64)
        total = weights.sum(dtype=np.float64)
        return da.where(total == 0, np.nan, total)

    def reduced(self, losses: Any, reduction: str) -> Any:
        if reduction == "none":
            return losses
        total = losses.sum(dtype=np.float64)
        return (total / self.divisor() if reduction == "mean" else total).astype(self.dtype)


def _on_block(function: Callable[..., Any], options: dict[str, Any], x: Any, target: Any, u: Any) -> Any:
    return function(x, target, sample_weight=u, reduction="none", **options)


def _counted(weight: Any, ignore_index: int, y: Any, u: Any) -> Any:
    """Return the weight of each row in a mean. A class index out of range raises its error in the loss."""
    # In float64, as the losses are weighted: a product of int8 would overflow.
    weights = u if weight is None else np.multiply(u, weight.take(y, mode="clip"), dtype=np.float64)
    return np.where(y == ignore_index, 0.0, weights)
