"""Evaluates logits in files, or those of a linear layer in files: loss, accuracy and calibration, in bounded memory.

The files may come from strangers, so nothing that they say is trusted (see ``files``), and every class index is checked before
the first logit is read. Any fault raises an `InputError`.

Data flow: `open_array` -> `Mapped` (.npy) or `Streamed` (an array in a .npz), or a `Product` of two -> `blocks` of about 32 MB
(256 MB of a product) -> ``fastxent.cross_entropy_stats`` -> `Totals`, sums in float64 -> `Evaluation`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastxent._abi.dtypes import NAMES
from fastxent._cli.files import Array, FileArray, Index, InputError, is_bfloat16, is_float, open_array
from fastxent._cli.head import Product

BLOCK_BYTES = 32 << 20  # of logits: enough to keep every core busy, small compared with any machine's memory
# With a head, each block reads all of it: a block has rows enough (500 of 128256 classes) that this is less than the products.
HEAD_BLOCK_BYTES = 256 << 20
BLOCK_ROWS = 1 << 16  # keeps the statistics of the rows in cache: at C = 10, 0.30 s; four times as many rows took 0.65 s
BINS = 15  # bins of the calibration error
FLOATS = f"{', '.join(NAMES[:-1])} or {NAMES[-1]}"


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. Means are over the kept rows, those that are not ignored."""

    loss: float  # the mean, as of torch.nn.functional.cross_entropy
    perplexity: float  # exp(loss)
    top1_accuracy: float
    top5_accuracy: float
    entropy: float  # mean entropy of softmax(logits), nats
    calibration_error: float  # see Totals.calibration_error
    rows: int
    kept_rows: int
    nonfinite_rows: int  # kept rows whose loss is inf or nan
    classes: int
    dtype: str
    n_bytes: int  # of logits and targets
    seconds: float
    gb_per_s: float


def evaluate(
    logits: str,
    targets: str,
    *,
    axis: int = -1,
    weight: str | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate the logits in one file against the targets in another.

    Parameters
    ----------
    logits, targets, weight : str
        A ``.npy`` file (memory-mapped), a ``.npz`` file that holds one array, or ``FILE.npz:key``.
        Logits: float16, bfloat16, float32 or float64, classes along `axis`.
        Targets: integer class indices of the shape of the logits without `axis`, or floating class
        probabilities of the shape of the logits. Weight: one number per class.
    axis, ignore_index, label_smoothing
        As in `fastxent.cross_entropy`.
    progress : callable, optional
        Called as ``progress(bytes_done, bytes_total)`` after each block.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        A file cannot be read, or its content does not fit.
    """
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return _evaluate(open_array(logits), open_array(targets), axis, BLOCK_BYTES, options, progress)


def evaluate_head(
    hidden: str,
    head: str,
    targets: str,
    *,
    bias: str | None = None,
    weight: str | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate the logits of a linear layer, ``hidden @ head.T + bias``, against targets; all are in files.

    Parameters
    ----------
    hidden, head, bias : str
        Files as in `evaluate`, floating: hidden states of shape (..., features), a weight of shape (classes, features) and a
        bias of shape (classes,). The head is read once for each block of rows.
    targets, weight, ignore_index, label_smoothing, progress
        As in `evaluate`; the classes of class probabilities are on the last axis.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        A file cannot be read, or its content does not fit.
    """
    x = Product(open_array(hidden), open_array(head), None if bias is None else open_array(bias))
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return _evaluate(x, open_array(targets), -1, HEAD_BLOCK_BYTES, options, progress)


def _evaluate(
    x: FileArray,
    t: FileArray,
    axis: int,
    block_bytes: int,
    options: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> Evaluation:
    axis, by_index = _check_headers(x, t, axis)
    n_classes, row_shape = x.shape[axis], x.shape[:axis] + x.shape[axis + 1 :]
    w = None if options["weight"] is None else _read_weight(options["weight"], n_classes)
    options, ignore_index = options | {"weight": w}, options["ignore_index"]
    x = x.in_blocks(axis)
    t = t.in_blocks(None if by_index else axis)
    block_rows = max(1, min(BLOCK_ROWS, block_bytes // (n_classes * x.dtype.itemsize)))

    def work() -> Iterator[tuple[Index, Index]]:
        for rows in blocks(row_shape, block_rows):
            x_index = (*rows[:axis], slice(0, n_classes), *rows[axis:])
            yield x_index, rows if by_index else x_index

    if by_index:
        _check_targets(t, (rows for _, rows in work()), n_classes, ignore_index)

    from fastxent import cross_entropy_stats  # imported here, so that earlier faults are reported before Numba is loaded

    def stats(x_block: Array, t_block: Array) -> Any:
        try:
            return cross_entropy_stats(x_block, t_block, axis=axis, **options)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise InputError(str(error)) from error

    # A block of zeros comes first: wrong options raise here, and the measured seconds do not include compiling.
    x_index, t_index = next(work())
    stats(x.zeros(x_index), t.zeros(t_index))

    totals = Totals(axis, w if by_index else None)
    total_bytes = x.n_bytes + t.n_bytes
    start = time.perf_counter()
    for x_index, t_index in work():
        x_block, t_block = x.block(x_index), t.block(t_index)
        totals.add(x_block, t_block, stats(x_block, t_block))
        del x_block, t_block
        x.release()
        t.release()
        if progress is not None:
            progress(x.read_bytes + t.read_bytes, total_bytes)
    seconds = time.perf_counter() - start

    return totals.result(
        rows=math.prod(row_shape),
        classes=n_classes,
        dtype="bfloat16" if is_bfloat16(x.dtype) else x.dtype.name,
        n_bytes=total_bytes,
        seconds=seconds,
        gb_per_s=total_bytes / seconds / 1e9,
    )


def blocks(rows: tuple[int, ...], at_most: int) -> Iterator[Index]:
    """Yield blocks of at most ``at_most`` positions that cover an index space, each contiguous in C order, and in that order.

    >>> [[(s.start, s.stop) for s in index] for index in blocks((5,), 2)]
    [[(0, 2)], [(2, 4)], [(4, 5)]]
    >>> [[(s.start, s.stop) for s in index] for index in blocks((2, 3), 2)]
    [[(0, 1), (0, 2)], [(0, 1), (2, 3)], [(1, 2), (0, 2)], [(1, 2), (2, 3)]]
    """
    if not rows:
        yield ()
        return
    inner = math.prod(rows[1:])
    if inner > at_most:
        for i in range(rows[0]):
            for rest in blocks(rows[1:], at_most):
                yield (slice(i, i + 1), *rest)
    else:
        step = at_most // inner
        for i in range(0, rows[0], step):
            yield (slice(i, min(i + step, rows[0])), *(slice(0, n) for n in rows[1:]))


class Totals:
    """Running sums over the rows, in float64."""

    def __init__(self, axis: int, weight: Array | None) -> None:
        self.axis, self.weight = axis, weight
        self.loss = self.divisor = self.entropy = 0.0
        self.kept = self.nonfinite = self.top1 = self.top5 = 0
        self.surplus = np.zeros(BINS)  # (BINS,): sum of confidence - hit over the rows of a bin

    @np.errstate(all="ignore")  # inf - inf and the like are valid results here
    def add(self, x: Array, t: Array, stats: Any) -> None:
        """Add one block: logits `x`, targets `t` and their `CrossEntropyStats`."""
        keep = np.asarray(stats.target_rank) >= 0
        loss, lse, entropy, rank = (np.asarray(a)[keep] for a in (stats.loss, stats.lse, stats.entropy, stats.target_rank))
        chosen = np.take_along_axis(x, np.expand_dims(np.asarray(stats.prediction), self.axis), self.axis)
        confidence = np.exp(chosen.squeeze(self.axis)[keep].astype(np.float64) - lse)
        known = np.isfinite(lse)  # no logit is greater than nan, so the rank would be 0: such a row is no hit
        hit = known & (rank == 0)

        self.kept += len(loss)
        self.divisor += len(loss) if self.weight is None else self.weight[t[keep]].sum(dtype=np.float64)
        self.loss += loss.sum(dtype=np.float64)
        self.entropy += entropy.sum(dtype=np.float64)
        self.nonfinite += int(np.count_nonzero(~np.isfinite(loss)))
        self.top1 += int(np.count_nonzero(hit))
        self.top5 += int(np.count_nonzero(known & (rank < 5)))
        # Bin m is (m / BINS, (m + 1) / BINS]; a confidence of nan falls in bin 0 and makes the result nan.
        which = np.clip(np.ceil(np.nan_to_num(confidence) * BINS).astype(np.intp) - 1, 0, BINS - 1)
        self.surplus += np.bincount(which, weights=np.minimum(confidence, 1.0) - hit, minlength=BINS)

    def calibration_error(self) -> float:
        """Return the expected calibration error: the mean of |accuracy - confidence| over the bins, weighted by their rows.

        Confidence is the probability of the prediction, in 15 bins of equal width. Guo, Pleiss, Sun and
        Weinberger, On Calibration of Modern Neural Networks, ICML 2017, equation 3.
        """
        return float(np.abs(self.surplus).sum() / self.kept) if self.kept else math.nan

    @np.errstate(all="ignore")
    def result(self, **facts: Any) -> Evaluation:
        """Return the means; without kept rows they are nan, as in PyTorch."""
        loss = np.float64(self.loss) / self.divisor
        top1, top5, entropy = np.array([self.top1, self.top5, self.entropy]) / self.kept
        return Evaluation(
            loss=float(loss),
            perplexity=float(np.exp(loss)),
            top1_accuracy=float(top1),
            top5_accuracy=float(top5),
            entropy=float(entropy),
            calibration_error=self.calibration_error(),
            kept_rows=self.kept,
            nonfinite_rows=self.nonfinite,
            **facts,
        )


# Checks of shapes, dtypes and class indices ---------------------------------------------------------


def _check_headers(x: FileArray, t: FileArray, axis: int) -> tuple[int, bool]:
    """Return the class axis, >= 0, and whether the targets are class indices (else class probabilities)."""
    if not is_float(x.dtype):
        swapped = " (LOGITS and TARGETS swapped?)" if x.dtype.kind in "iu" and is_float(t.dtype) else ""
        raise InputError(f"{x.name} holds {x.dtype}: logits are {FLOATS}{swapped}")
    if not (is_float(t.dtype) or t.dtype.kind in "iu"):
        raise InputError(f"{t.name} holds {t.dtype}: targets are integers, or class probabilities in {FLOATS}")
    if not -len(x.shape) <= axis < len(x.shape):
        raise InputError(f"axis {axis} does not exist: {x.name} has shape {x.shape}")
    axis %= len(x.shape)
    if 0 in x.shape:
        raise InputError(f"{x.name} is empty: shape {x.shape}")
    row_shape = x.shape[:axis] + x.shape[axis + 1 :]
    if t.shape == x.shape and is_float(t.dtype):
        return axis, False
    if t.shape == row_shape and t.dtype.kind in "iu":
        return axis, True
    raise InputError(
        f"{t.name} holds {t.dtype} of shape {t.shape}; for logits of shape {x.shape} with classes on "
        f"axis {axis}, targets are integers of shape {row_shape} or class probabilities of shape {x.shape}"
    )


def _check_targets(t: FileArray, work: Iterator[Index], n_classes: int, ignore_index: int) -> None:
    """Raise an error that names the first class index out of range, if there is one; else rewind `t`."""
    first, bad = "", 0
    for index in work:
        block = t.block(index)
        wrong = (block != ignore_index) & ((block < 0) | (block >= n_classes))
        count = np.count_nonzero(wrong)
        if count and not bad:
            offset = np.argwhere(wrong)[0]
            at = ", ".join(str(s.start + i) for s, i in zip(index, offset.tolist(), strict=True))
            first = f"target[{at}] = {block[tuple(offset)]} is outside [0, {n_classes})"
        bad += count
        t.release()
    if bad:
        rows = math.prod(t.shape)
        raise InputError(
            f"{t.name}: {first}; {bad} of {rows} rows {'is' if bad == 1 else 'are'} out of range "
            f"(rows that hold {ignore_index} are left out: --ignore-index)"
        )
    t.rewind()


def _read_weight(spec: str, n_classes: int) -> Array:
    weight = open_array(spec)
    if weight.shape != (n_classes,):
        raise InputError(f"{weight.name} has shape {weight.shape}: weights have shape ({n_classes},), one a class")
    if not (is_float(weight.dtype) or weight.dtype.kind in "iu"):
        raise InputError(f"{weight.name} holds {weight.dtype}: weights are {FLOATS}, or integers")
    return weight.block((slice(0, n_classes),)).astype(np.float64)
