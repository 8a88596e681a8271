"""Decides how many rows of logits a linear layer with cross-entropy holds at a time, given shapes and a memory budget.

Each block of rows reads the weight twice (for the logits and for the gradient of the input) and the weight's gradient once, so
the largest block that the budget allows is the fastest. The choice depends on shapes alone, never on threads: a call has the
same blocks, and so the same sums, at any number of threads.
"""

from __future__ import annotations

from fastxent._runtime.options import checked

# The least default budget in bytes: 300 rows of 50257 float32 classes.
LEAST_BUDGET = 64_000_000
# Bytes of the scratch beside the logits: some classes' converted weights, or their share of the weight's gradient. It fits the
# caches, and its products are still as fast as large ones.
SCRATCH = 4_000_000
# Bytes that are not for logits: the scratch, and what BLAS packs of a product (OpenBLAS: of the gradient of the weight, all).
RESERVE = 2 * SCRATCH
# Blocks of many rows or classes are multiples of this: BLAS works on 16 rows at a time, our kernels on 16 classes.
MULTIPLE = 16
# Groups of classes that threads share: 2, 3, 4 and 6 threads have equally many.
GROUPS = 12
# Rows of a tile: twice as many gain nothing.
MOST_ROWS = 1024
# Classes that are worth a product of their own.
LEAST_CLASSES = 256


def rows_per_block(
    n_rows: int,
    n_features: int,
    n_classes: int,
    itemsize: int,
    unit: int,
    memory_limit: int | None = None,
    n_shares: int = 0,
) -> int:
    """Return how many rows of logits to hold at a time: at least 1, and equally many in all blocks but the last.

    ``itemsize``: bytes of an element of input and weight. ``unit``: bytes of a logit, as it is held: half precision may be
    multiplied in float32. ``n_shares``: how many groups of classes have a share in the gradient of the input.
    ``memory_limit``: most bytes of a call beside arguments and results; None: 64 MB, or the bytes of the weight if it has more.

    >>> rows_per_block(2048, 256, 50257, 4, 4)
    256
    >>> rows_per_block(2048, 256, 50257, 4, 4, memory_limit=16_000_000)
    32
    """
    budget = _budget(n_features, n_classes, itemsize, memory_limit)
    # A row's logits become their gradient in place; beside them lie the row's input, gathered or converted, its gradient, and
    # what groups of classes add to that.
    row_bytes = unit * (n_classes + (2 + n_shares) * n_features)
    most = max(1, (budget - min(RESERVE, unit * n_features * n_classes)) // max(row_bytes, 1))
    if most >= n_rows:
        return max(1, n_rows)
    rows = -(-n_rows // -(-n_rows // most))
    multiple = MULTIPLE if most >= MULTIPLE else 1
    return min(-(-rows // multiple) * multiple, most // multiple * multiple)


def rows_per_tile(
    n_rows: int,
    n_features: int,
    n_classes: int,
    itemsize: int,
    unit: int,
    n_threads: int,
    memory_limit: int | None = None,
) -> int:
    """Return how many rows a tile of logits has if only their loss is wanted; each thread holds those of a group of classes.

    The arguments are as in `rows_per_block`.

    >>> rows_per_tile(10000, 256, 50257, 4, 4, n_threads=2)
    1024
    >>> rows_per_tile(10000, 256, 50257, 4, 4, n_threads=8)
    400
    """
    group, budget = class_groups(n_classes, n_features)[0], _budget(n_features, n_classes, itemsize, memory_limit)
    row_bytes = unit * (n_threads * group.stop + 2 * n_features) + 4 * 8 * GROUPS
    most = min(MOST_ROWS, (budget - min(RESERVE, unit * n_features * n_classes)) // row_bytes)
    return max(1, min(n_rows, most // MULTIPLE * MULTIPLE if most >= MULTIPLE else most))


def _budget(n_features: int, n_classes: int, itemsize: int, memory_limit: int | None) -> int:
    limit = checked("memory_limit", memory_limit)
    return max(LEAST_BUDGET, n_features * n_classes * itemsize) if limit is None else limit


def classes_per_block(n_others: int, itemsize: int) -> int:
    """Return for how many classes a matrix of ``n_others`` numbers a class fits the scratch; half precision lies in float32.

    >>> classes_per_block(256, 4)
    3904
    """
    fit = SCRATCH // (max(itemsize, 4) * max(n_others, 1))
    return max(MULTIPLE, fit // MULTIPLE * MULTIPLE)


def class_groups(n_classes: int, n_features: int) -> list[slice]:
    """Return the classes in groups that threads share: ``GROUPS`` of them, unless they would be small.

    >>> class_groups(1000, 64)
    [slice(0, 1000, None)]
    >>> len(class_groups(50257, 256)), class_groups(50257, 256)[-1]
    (12, slice(46112, 50257, None))
    """
    least = max(LEAST_CLASSES, SCRATCH // (8 * 4 * max(n_features, 1)))
    size = max(-(-n_classes // GROUPS), least)
    size = -(-size // MULTIPLE) * MULTIPLE
    return [slice(first, min(first + size, n_classes)) for first in range(0, n_classes, size)]


def classes_at_a_time(n_others: int, itemsize: int) -> int:
    """Return how many classes of a group are multiplied at a time: a quarter of a block's, for each thread has its own.

    >>> classes_at_a_time(256, 4)
    976
    """
    return max(LEAST_CLASSES, classes_per_block(n_others, itemsize) // 4)
