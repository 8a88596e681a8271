"""Rows of few classes, which lie side by side: 16 rows are transposed on the way to a tile, and their gradient on the way back.

A tile holds a vector for each class. What is not such rows, but has to be put together, is gathered.
"""

from numba import njit

from fastxent._abi.argument_block import LINE
from fastxent._simd.memory import (
    as_stored,
    before_aligned,
    copy,
    copy_non_temporal,
    fixed,
    gather,
    itemsize,
    load,
    prefetch_near,
    scatter,
    store,
    store_masked,
)
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.transpose import BY_MASK, SQUARE, load_transposed, store_transposed
from fastxent._simd.vector import LANES, all_lanes, count_lanes, first_lanes, iota, maximum, splat, where

INF = float("inf")
PAGE = 4096
SHORT_ROWS_AHEAD = 2048  # bytes between short rows that are worked on, one unit at a time, and those that are asked for


@njit(**INLINE)
def first_class(task, c):
    """Rows are taken 16 classes at a time, from c = 0, 16, ...; the last of them begins earlier, that it be whole too."""
    return max(0, min(c, task.n_classes - LANES))


@njit(**INLINE)
def load_tile(task, tile, p, n, lanes, mask):
    """The logits of 16 rows, class by class: rows read whole and transposed, or, as the last few are, gathered.

    Returns the rows' maxima; -inf where not ``mask``.
    """
    vector = LANES * itemsize(tile)
    m = splat(tile, -INF)
    if task.transposed and (n == LANES or n == 1):
        row, ahead = fixed(task.axes, 8) if n > 1 else 0, 0  # one row is read as if it were 16
        if task.large or task.n_classes < LANES:
            prefetch_rows(task, p, row)
        elif row == task.n_classes * itemsize(p):
            ahead = prefetch_distance(task, row)
        for c in range(0, task.n_classes, LANES):
            first = first_class(task, c)
            at = p + first * itemsize(p)
            m = maximum(m, load_transposed(at, row, min(LANES, task.n_classes), tile + first * vector, ahead))
    else:
        for j in range(task.n_vectors):
            x = gather(p + j * task.x_step, lanes, mask)
            store(tile + j * vector, x)
            m = maximum(m, x)
    return where(mask, m, -INF)


@njit(**INLINE)
def load_target_tile(task, tile, p, n, lanes, mask):
    """The class probabilities of 16 rows, in the same way."""
    vector = LANES * itemsize(tile)
    if n == LANES:
        row = fixed(task.axes, 24)
        ahead = prefetch_distance(task, row) if row == task.n_classes * itemsize(p) else 0
        for c in range(0, task.n_classes, LANES):
            first = first_class(task, c)
            load_transposed(p + first * itemsize(p), row, min(LANES, task.n_classes), tile + first * vector, ahead)
    else:
        for j in range(task.n_vectors):
            store(tile + j * vector, gather(p + j * task.t_step, lanes, mask))


@njit(**INLINE)
def copy_out(task, p, place, n):
    """Copy n elements to the gradient, past the caches if it is."""
    step, from_step = LANES * itemsize(p), LANES * itemsize(place)
    if task.large and task.non_temporal != 0:
        head = before_aligned(p, n)
        if head > 0:
            store_masked(p, load(place), first_lanes(head))
            p, place, n = p + head * itemsize(p), place + head * itemsize(place), n - head
    n_whole = n // LANES
    for k in range(n_whole):
        if task.large and task.non_temporal != 0:
            copy_non_temporal(p + k * step, place + k * from_step)
        else:
            copy(p + k * step, place + k * from_step)
    tail = n - n_whole * LANES
    if tail > 0:
        store_masked(p + n_whole * step, load(place + n_whole * from_step), first_lanes(tail))


@njit(**INLINE)
def tile_bytes(task, tile):
    """Of the tile of a unit of whole rows, and of what it is written out by way of, which is behind it."""
    return (task.n_classes + LANES) * LANES * itemsize(tile)


@njit(**INLINE)
def target_tile(task, tile):
    """Where the class probabilities of a unit of whole rows are, class by class."""
    return tile + 2 * tile_bytes(task, tile)


@njit(**INLINE)
def next_tile(task, tile):
    """The tile of a second unit of whole rows: behind all that the first one has, and elsewhere in its page."""
    own = 3 if task.soft else 2
    return tile + ((own * tile_bytes(task, tile) + PAGE - 1) // PAGE * PAGE + PAGE // 2)


@njit(**INLINE)
def prefetch_distance(task, row):
    """Bytes between the short rows that are worked on, each of ``row`` bytes, and those that are asked for."""
    return SHORT_ROWS_AHEAD + LANES * row if task.paired else SHORT_ROWS_AHEAD


@njit(**INLINE)
def prefetch_rows(task, p, row):
    """Ask for as much as 16 rows of ``row`` bytes are, later on. Short rows are read and written in pieces, so no processor
    does it by itself."""
    if row == task.n_classes * itemsize(p):
        for at in range(prefetch_distance(task, row), prefetch_distance(task, row) + LANES * row, LINE):
            prefetch_near(p, at)


@njit(**INLINE)
def write_transposed(task, unit, tile, p, factor, g_y):
    """The gradient of whole rows, with that of the target; by way of a stage, where they are then one piece, what cannot be
    written as it comes: without masks rows of less than a square; fewer than 16 of them, and what goes past the caches."""
    row, own = fixed(task.axes, 16), task.n_classes * itemsize(p)
    if task.large:
        prefetch_rows(task, p, row)
    n = count_lanes(unit.rows)
    in_pieces = task.n_classes < SQUARE and not BY_MASK
    staged = in_pieces or n < LANES or (task.large and task.non_temporal != 0 and row == own)
    stage = as_stored(p, tile + tile_bytes(task, tile))
    to, step, lanes, columns = p, row, unit.g_lanes, min(LANES, task.n_classes)
    if staged:  # whole vectors: what a mask has written is slow to be read back
        to, step, lanes, columns = stage, own, iota() * own, max(columns, SQUARE)
    for c in range(0, task.n_classes, LANES):
        first = first_class(task, c)
        place = tile + first * LANES * itemsize(tile)
        store_transposed(to + first * itemsize(p), step, columns, place, factor)
    if task.labelled:  # an ignored row's gradient is 0 everywhere, as is its g_y; a stage has room for 16 rows
        y = where(unit.kept, unit.y, 0)
        scatter(to, lanes + y * itemsize(p), g_y, all_lanes())
    if staged:
        if row == own:
            copy_out(task, p, stage, n * task.n_classes)
        else:
            for k in range(n):
                copy_out(task, p + k * row, stage + k * own, task.n_classes)
