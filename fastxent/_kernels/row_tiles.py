"""Tiles of short rows with contiguous classes: 16 rows are transposed into a tile, and their gradient is transposed back.

A tile holds one vector for each class. Rows whose classes are strided are gathered into it instead of transposed.
"""

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
from fastxent._simd.numba_backend import inlined
from fastxent._simd.transpose import BY_MASK, SQUARE, load_transposed, store_transposed
from fastxent._simd.vector import LANES, all_lanes, count_lanes, first_lanes, iota, maximum, splat, where

INF = float("inf")
PAGE = 4096
SHORT_ROWS_AHEAD = 2048  # prefetch distance in bytes for short rows, if units are not paired
FEWEST_STREAMED = 64  # classes from which of a large gradient only the line that 16 rows share with the next 16 is prefetched


@inlined
def first_class(task, c):
    """Return the first of 16 classes to take for c = 0, 16, ...: the last 16 begin earlier than c, so that none is missing."""
    return max(0, min(c, task.n_classes - LANES))


@inlined
def load_tile(task, tile, p, n, lanes, mask):
    """Load the logits of n rows into the tile, class by class, and return the rows' maxima, -inf where not ``mask``.

    16 rows, or a single one, are transposed; any other number, as at the end of the row axis, is gathered.
    """
    vector = LANES * itemsize(tile)
    m = splat(tile, -INF)
    if task.transposed and (n == LANES or n == 1):
        row, ahead = fixed(task.axes, 8) if n > 1 else 0, 0  # a single row is read 16 times, at stride 0
        if task.n_classes < LANES:
            prefetch_rows(task, p, row)
        elif row == task.n_classes * itemsize(p) and not task.large:  # large ones: see ``prefetch_short_rows``
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


@inlined
def load_target_tile(task, tile, p, n, lanes, mask):
    """Load the class probabilities of n rows into a tile, class by class; 16 rows are transposed, fewer are gathered."""
    vector = LANES * itemsize(tile)
    if n == LANES:
        row, ahead = fixed(task.axes, 24), 0
        if row == task.n_classes * itemsize(p) and not (task.large and task.n_classes >= LANES):
            ahead = prefetch_distance(task, row)
        for c in range(0, task.n_classes, LANES):
            first = first_class(task, c)
            load_transposed(p + first * itemsize(p), row, min(LANES, task.n_classes), tile + first * vector, ahead)
    else:
        for j in range(task.n_vectors):
            store(tile + j * vector, gather(p + j * task.t_step, lanes, mask))


@inlined
def copy_out(task, p, place, n):
    """Copy n elements to the gradient, with non-temporal stores if the gradient is written by those."""
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


@inlined
def tile_bytes(task, tile):
    """Return the size of a transposed unit's tile, which is also the size of the staging buffer after it."""
    return (task.n_classes + LANES) * LANES * itemsize(tile)


@inlined
def target_tile(task, tile):
    """Return the address of a transposed unit's class probabilities, class by class, after its tile and staging buffer."""
    return tile + 2 * tile_bytes(task, tile)


@inlined
def next_tile(task, tile):
    """Return the address of the tile of the second unit of a pair: after all buffers of the first unit, and half a page off,
    so that the two tiles begin at different offsets in their pages."""
    own = 3 if task.soft else 2
    return tile + ((own * tile_bytes(task, tile) + PAGE - 1) // PAGE * PAGE + PAGE // 2)


@inlined
def prefetch_distance(task, row):
    """Return the prefetch distance in bytes for short rows of ``row`` bytes each."""
    return SHORT_ROWS_AHEAD + LANES * row if task.paired else SHORT_ROWS_AHEAD


@inlined
def prefetch_rows(task, p, row):
    """Prefetch 16 rows of ``row`` bytes at the prefetch distance, if rows are contiguous. Short rows are read and written in
    pieces, which no hardware prefetcher follows."""
    if row == task.n_classes * itemsize(p):
        for at in range(prefetch_distance(task, row), prefetch_distance(task, row) + LANES * row, LINE):
            prefetch_near(p, at)


@inlined
def write_transposed(task, unit, tile, p, factor, g_y):
    """Write the gradient of a transposed unit, with ``g_y`` at the class indices.

    The rows are first written to a staging buffer, where they are contiguous, and copied from there, if they have less than
    SQUARE classes and masked stores are slow, if they are fewer than 16, or if contiguous rows need non-temporal stores.
    """
    row, own = fixed(task.axes, 16), task.n_classes * itemsize(p)
    if task.large and task.non_temporal != 0:
        if task.n_classes < FEWEST_STREAMED:
            prefetch_rows(task, p, row)
        else:
            prefetch_near(p, prefetch_distance(task, row))
    n = count_lanes(unit.rows)
    in_pieces = task.n_classes < SQUARE and not BY_MASK
    staged = in_pieces or n < LANES or (task.large and task.non_temporal != 0 and row == own)
    stage = as_stored(p, tile + tile_bytes(task, tile))
    to, step, lanes, columns = p, row, unit.g_lanes, min(LANES, task.n_classes)
    if staged:  # whole vectors, as a load from what a masked store has just written is slow
        to, step, lanes, columns = stage, own, iota() * own, max(columns, SQUARE)
    for c in range(0, task.n_classes, LANES):
        first = first_class(task, c)
        place = tile + first * LANES * itemsize(tile)
        store_transposed(to + first * itemsize(p), step, columns, place, factor)
    if task.labelled:  # no mask: an ignored row's gradient is 0, as is its g_y; the staging buffer has room for 16 rows
        y = where(unit.kept, unit.y, 0)
        scatter(to, lanes + y * itemsize(p), g_y, all_lanes())
    if staged:
        if row == own:
            copy_out(task, p, stage, n * task.n_classes)
        else:
            for k in range(n):
                copy_out(task, p + k * row, stage + k * own, task.n_classes)
