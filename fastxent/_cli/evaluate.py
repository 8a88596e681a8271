"""Evaluates logits in files, or those of a linear layer in files: loss, accuracy and calibration, in bounded memory.

The files may come from strangers, so nothing that they say is trusted (see ``files``), and every class index is checked before
the first logit is read. Any fault raises an `InputError`.

Data flow: `open_array` -> `Mapped` (.npy), `Streamed` (an array in a .npz), `Chunked` (a zarr folder), or a `Product` of two ->
`blocks` of about 32 MB (256 MB of a product), or `whole_chunks` -> `Totals` -> `Evaluation`. On a Dask cluster each block is a
task, up to its totals: see ``cluster``.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fastxent._abi.dtypes import NAMES
from fastxent._cli.files import WHOLE_BYTES, Array, FileArray, Index, InputError, is_bfloat16, is_float, open_array
from fastxent._cli.head import Product
from fastxent._cli.totals import Evaluation, Totals

BLOCK_BYTES = 32 << 20  # of logits: enough to keep every core busy, small compared with any machine's memory
# With a head, each block reads all of it: a block has rows enough (500 of 128256 classes) that this is less than the products.
HEAD_BLOCK_BYTES = 256 << 20
BLOCK_ROWS = 1 << 16  # keeps the statistics of the rows in cache: at C = 10, 0.30 s; four times as many rows took 0.65 s
FLOATS = f"{', '.join(NAMES[:-1])} or {NAMES[-1]}"


def evaluate(
    logits: str,
    targets: str,
    *,
    axis: int = -1,
    weight: str | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    dask: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate the logits in one file against the targets in another.

    Parameters
    ----------
    logits, targets, weight : str
        A ``.npy`` file (memory-mapped), a ``.npz`` file that holds one array, ``FILE.npz:key``, or the folder of a zarr array.
        Logits: float16, bfloat16, float32 or float64, classes along `axis`.
        Targets: integer class indices of the shape of the logits without `axis`, or floating class
        probabilities of the shape of the logits. Weight: one number per class.
    axis, ignore_index, label_smoothing
        As in `fastxent.cross_entropy`.
    dask : str, optional
        Address of a Dask scheduler, whose workers find the files under the same names.
    progress : callable, optional
        Called as ``progress(bytes_done, bytes_total)`` after each block that is not evaluated on a cluster.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        A file cannot be read, or its content does not fit.
    """
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return _evaluate(open_array(logits), open_array(targets), axis, options, dask, progress)


def evaluate_head(
    hidden: str,
    head: str,
    targets: str,
    *,
    bias: str | None = None,
    weight: str | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    dask: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate the logits of a linear layer, ``hidden @ head.T + bias``, against targets; all are in files.

    Parameters
    ----------
    hidden, head, bias : str
        Files as in `evaluate`, floating: hidden states of shape (..., features), a weight of shape (classes, features) and a
        bias of shape (classes,). The head is read once for each block of rows.
    targets, weight, ignore_index, label_smoothing, dask, progress
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
    block_rows = HEAD_BLOCK_BYTES // (sum(x.head.shape) * x.dtype.itemsize)  # of logits and of hidden states
    return _evaluate(x, open_array(targets), -1, options, dask, progress, block_rows)


def _evaluate(
    x: FileArray,
    t: FileArray,
    axis: int,
    options: dict[str, Any],
    dask: str | None,
    progress: Callable[[int, int], None] | None,
    block_rows: int | None = None,
) -> Evaluation:
    axis, by_index = _check_headers(x, t, axis)
    n_classes, row_shape = x.shape[axis], x.shape[:axis] + x.shape[axis + 1 :]
    w = None if options["weight"] is None else _read_weight(options["weight"], n_classes)
    options, ignore_index = options | {"axis": axis, "weight": w}, options["ignore_index"]
    x = x.in_blocks(axis)
    t = t.in_blocks(None if by_index else axis)
    row_bytes = n_classes * x.dtype.itemsize
    if block_rows is None:
        block_rows = BLOCK_BYTES // row_bytes
    block_rows = max(1, min(BLOCK_ROWS, block_rows))

    def work() -> Iterator[tuple[Index, Index]]:
        for rows in _row_blocks(x, axis, block_rows):
            x_index = (*rows[:axis], slice(0, n_classes), *rows[axis:])
            yield x_index, rows if by_index else x_index

    if by_index:
        _check_targets(t, (rows for _, rows in work()), n_classes, ignore_index)

    # A block of zeros comes first: wrong options raise here, and the measured seconds do not include compiling.
    x_index, t_index = next(work())
    Totals.of_block(x.zeros(x_index), t.zeros(t_index), options)

    total_bytes = x.n_bytes + t.n_bytes
    start = time.perf_counter()
    if dask is None:
        totals = sum(_each_here(x, t, options, work(), progress), Totals())
    else:
        from fastxent._cli.cluster import each_on_cluster

        totals = sum(each_on_cluster(dask, x, t, options, work()), Totals())
    seconds = time.perf_counter() - start

    return totals.result(
        rows=math.prod(row_shape),
        classes=n_classes,
        dtype="bfloat16" if is_bfloat16(x.dtype) else x.dtype.name,
        n_bytes=total_bytes,
        seconds=seconds,
        gb_per_s=total_bytes / seconds / 1e9,
    )


def _each_here(
    x: FileArray,
    t: FileArray,
    options: dict[str, Any],
    work: Iterable[tuple[Index, Index]],
    progress: Callable[[int, int], None] | None,
) -> Iterator[Totals]:
    for x_index, t_index in work:
        yield Totals.of_block(x.block(x_index), t.block(t_index), options)
        x.release()
        t.release()
        if progress is not None:
            progress(x.read_bytes + t.read_bytes, x.n_bytes + t.n_bytes)


def _row_blocks(x: FileArray, axis: int, at_most: int) -> Iterator[Index]:
    """Yield blocks of rows that are read together: at most so many, or, of an array in chunks, whole chunks."""
    rows = x.shape[:axis] + x.shape[axis + 1 :]
    if x.chunks is None:
        return blocks(rows, at_most)
    chunks = x.chunks[:axis] + x.chunks[axis + 1 :]
    if math.prod(chunks) * x.shape[axis] * x.dtype.itemsize > WHOLE_BYTES:
        raise InputError(f"{x.name} has chunks of shape {x.chunks}: the rows of one are larger than {WHOLE_BYTES} bytes")
    return whole_chunks(rows, chunks, at_most)


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


def whole_chunks(rows: tuple[int, ...], chunks: tuple[int, ...], at_most: int) -> Iterator[Index]:
    """Yield blocks of whole chunks that cover an index space: of at most ``at_most`` positions, or one chunk if it has more.

    >>> [[(s.start, s.stop) for s in index] for index in whole_chunks((5,), (2,), 1)]
    [[(0, 2)], [(2, 4)], [(4, 5)]]
    >>> [[(s.start, s.stop) for s in index] for index in whole_chunks((2, 5), (1, 2), 4)]
    [[(0, 1), (0, 4)], [(0, 1), (4, 5)], [(1, 2), (0, 4)], [(1, 2), (4, 5)]]
    """
    block = list(chunks)
    for k in reversed(range(len(rows))):
        block[k] = min(rows[k], block[k] * max(1, at_most // math.prod(block)))
    for corner in itertools.product(*map(range, itertools.repeat(0), rows, block)):
        yield tuple(slice(i, min(i + step, n)) for i, step, n in zip(corner, block, rows, strict=True))


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
