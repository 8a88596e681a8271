"""Rows: where they lie, and how vectors of them are read and written.

16 lanes hold either 16 classes of one row (class lanes: many classes, contiguous in memory) or one class of 16 rows (row
lanes: few classes, or rows that are contiguous in memory, as in (N, C, H, W)). "Vector j of a unit" is classes 16 j ...
16 j + 15 of its row, or class j of its 16 rows.
"""

from collections import namedtuple

from numba import njit

from fastxent._kernels.plane_tiles import (
    MAXIMA,
    Panel,
    align_row_numbers,
    class_step,
    head_length,
    load_panel,
    new_panel,
    put_row_numbers,
    row_numbers,
    store_panel,
)
from fastxent._kernels.row_tiles import load_target_tile, load_tile, target_tile, write_transposed
from fastxent._simd.lanes import product_across, sum_across
from fastxent._simd.memory import (
    fixed,
    gather,
    get,
    itemsize,
    load,
    load_masked,
    put,
    scatter,
    store,
    store_masked,
)
from fastxent._simd.numba_backend import INLINE, as_needed
from fastxent._simd.vector import LANES, all_lanes, any_lane, every_lane, first_lanes, iota, lane, splat, where

INF = float("inf")

# ----------------------------------------------------------------------------------------------------
# A unit: the rows that are worked on together, where they lie, and which lanes hold something
# ----------------------------------------------------------------------------------------------------

Unit = namedtuple(
    "Unit",
    "x g t "  # byte offsets of its first row
    "first "  # across: the class in lane 0 of vector 0
    "x_lanes g_lanes t_lanes "  # byte offsets of its rows from the first, lane by lane
    "row row_lanes "  # number of its first row; distance of its rows from it
    "y "  # class indices
    # Its logits, class by class, where they are put together; then, where they are kept, its exponentials. Past the cache those
    # of a long row, if the gradient is not streamed, are kept where that will be: a trip through the caches less.
    "tile "
    "m "  # maxima of the rows that are read, where the tile was filled with them alone
    "ending "  # rows of the panel that ends with this unit; 0: with another one
    "rows "  # mask: lanes that are rows (across: all)
    "kept "  # mask: rows that are not ignored
    "start stop "  # its vectors: all, or one segment of a long row
    "full "  # vectors j < full have 16 live lanes
    "reads writes",  # masks of the vectors from full on
)


@as_needed
def exp_storage(constants):
    """Where a unit keeps what ``tile`` is for."""
    if constants["exp_in_gradient"]:
        return lambda task, tile, g: task.g + g if task.non_temporal == 0 else tile
    return lambda task, tile, g: tile


@njit(**INLINE)
def offsets(task, number):
    """Where unit ``number`` is, if units are not segments: its first row's place in its line, its byte offsets, its number."""
    axes = task.axes  # (n_axes, 5) in: extent, strides in x, g, t, rows
    line, first = 0, number
    if task.n_axes > 1:
        line = number // task.units_per_line
        first = number - line * task.units_per_line
    if not task.class_lanes:
        first *= LANES
    x, g, t, row = first * fixed(axes, 8), first * fixed(axes, 16), first * fixed(axes, 24), first * fixed(axes, 32)
    for axis in range(1, task.n_axes):
        at = 40 * axis
        extent = fixed(axes, at)
        digit = line % extent
        line = line // extent
        x += digit * fixed(axes, at + 8)
        g += digit * fixed(axes, at + 16)
        t += digit * fixed(axes, at + 24)
        row += digit * fixed(axes, at + 32)
    return first, x, g, t, row


@njit(**INLINE)
def locate(task, tile, number):
    """Unit ``number``: its digits in the row axes, innermost first, give its offsets."""
    start, stop = 0, task.n_vectors
    if task.split:
        segment = number % task.n_segments
        number = number // task.n_segments
        start = segment * task.segment
        stop = min(stop, start + task.segment)
    first, x, g, t, row = offsets(task, number)
    axes = task.axes
    n = 1 if task.class_lanes else min(LANES, fixed(axes, 0) - first)

    lanes = iota()
    row_lanes = lanes * fixed(axes, 32)
    rows = all_lanes() if task.class_lanes else first_lanes(n)
    kept, y = rows, lanes
    if task.labelled:
        y = row_values(task, task.y, row, row_lanes, rows)
        kept = rows & (y != task.ignore)
    if task.class_lanes:
        full = task.n_classes // LANES
        reads = writes = first_lanes(task.n_classes - full * LANES)
    else:
        full = task.n_vectors if every_lane(kept) else 0
        reads, writes = kept, rows
    x_lanes = lanes * fixed(axes, 8)
    m, ending = splat(task.x, -INF), 0
    tile = exp_storage(task, tile, g)
    if task.packed:
        if task.contiguous_lanes:
            nth = number % task.panel
            if not task.pipelined and nth == 0:
                load_panel(task, panel_of(task, tile, number, False))
            if nth == task.panel - 1:
                ending = min(task.panel * LANES, fixed(axes, 0) - (first - nth * LANES))
            tile = tile + nth * LANES * itemsize(tile)
            m = where(reads, load(row_numbers(task, tile, MAXIMA)), -INF)
            if task.pipelined and any_lane(kept) and not every_lane(kept):
                m, full = clear_ignored(task, tile, m, kept), task.n_vectors
        else:
            m = load_tile(task, tile, task.x + x, n, x_lanes, reads)
            if task.soft and task.transposed:
                load_target_tile(task, target_tile(task, tile), task.t + t, n, lanes * fixed(axes, 24), reads)
    return Unit(
        x, g, t, 0, x_lanes, lanes * fixed(axes, 16), lanes * fixed(axes, 24),
        row, row_lanes, y, tile, m, ending, rows, kept, start, stop, full, reads, writes,
    )  # fmt: skip


@njit(**INLINE)
def clear_ignored(task, tile, m, kept):
    """Zeros for logits that nobody asks for: so vectors with such lanes are like all others. Returns the maxima then."""
    for j in range(task.n_vectors):
        p = tile + j * class_step(task, tile)
        store(p, where(kept, load(p), 0.0))
    return where(kept, m, 0.0)


@njit(**INLINE)
def panel_of(task, tile, number, follows):
    """The panel whose first unit is this one; its last units may be of no row. ``follows``: was the one before worked on?"""
    first, x, g, _, _ = offsets(task, number)
    n = min(task.panel * LANES, fixed(task.axes, 0) - first)
    return new_panel(task, tile, task.x + x, task.g + g, n, follows and first > 0)


# Bytes from vector j of a unit to vector j + 1; where lanes are classes the compiler knows them.


@njit(**INLINE)
def x_step(task):
    if task.transposed:
        return itemsize(task.x)
    return LANES * itemsize(task.x) if task.class_lanes else task.x_step


@njit(**INLINE)
def g_step(task):
    return LANES * itemsize(task.g) if task.class_lanes else task.g_step


@njit(**INLINE)
def t_step(task):
    return LANES * itemsize(task.t) if task.class_lanes else task.t_step


@njit(**INLINE)
def unit_from_class(task, unit, c, stop):
    """The unit's vectors from class c on, counted from its own first class: ``stop`` of them. The masks are right if c is a
    multiple of 16; else the last vector of a row is for the caller to mask."""
    first = unit.first + c
    return Unit(
        unit.x + c * itemsize(task.x), unit.g + c * itemsize(task.g), unit.t + c * itemsize(task.t), first,
        unit.x_lanes, unit.g_lanes, unit.t_lanes, unit.row, unit.row_lanes, unit.y,
        unit.tile + c * itemsize(unit.tile), unit.m, 0, unit.rows, unit.kept,
        0, stop, min(stop, (task.n_classes - first) // LANES), unit.reads, unit.writes,
    )  # fmt: skip


@njit(**INLINE)
def empty_unit(unit):
    """A unit like this one, but of no row and no class: nothing is read for it but what is in the tile, and nothing written."""
    none = first_lanes(0)
    return Unit(
        unit.x, unit.g, unit.t, unit.first, unit.x_lanes, unit.g_lanes, unit.t_lanes, unit.row, unit.row_lanes, unit.y,
        unit.tile, unit.m, 0, none, none, 0, 0, 0, none, none,
    )  # fmt: skip


@njit(**INLINE)
def tile_step(task, unit):
    """Bytes from vector j to vector j + 1 in the tile."""
    if task.packed and task.contiguous_lanes:
        return class_step(task, unit.tile)
    return LANES * itemsize(unit.tile)


@njit(**INLINE)
def write_tile(task, unit, factor, g_y):
    """What is in the tile goes to g, times ``factor``; and g_y."""
    if task.packed:
        tile, p = unit.tile, task.g + unit.g
        vector = LANES * itemsize(tile)
        if task.contiguous_lanes:
            put_row_numbers(task, tile, factor, where(unit.kept, unit.y, -1), g_y)
            if not task.pipelined and unit.ending > 0:
                before = (task.panel - 1) * LANES
                first_tile, first_g = tile + -before * itemsize(tile), p + -before * itemsize(p)
                head = head_length(task, first_g, unit.ending)
                panel = Panel(task.x + unit.x, first_g, unit.ending, first_tile, head, False)
                align_row_numbers(task, panel)
                store_panel(task, panel, panel, panel)
        elif task.transposed:
            write_transposed(task, unit, tile, p, factor, g_y)
        else:
            for j in range(task.n_vectors):
                g = load(tile + j * vector) * factor
                if task.labelled:
                    g = where(unit.y == j, g_y, g)
                scatter(p + j * g_step(task), unit.g_lanes, g, unit.rows)


@njit(**INLINE)
def unscaled(task):
    """For `write_tile`: a factor of 1, and the g_y of rows that are ignored or have no target."""
    return splat(task.x, 1.0), splat(task.x, 0.0)


@njit(**INLINE)
def row_values(task, p, row, row_lanes, mask):
    """The values of some rows of an array (rows,), lane by lane."""
    if task.class_lanes:
        return splat(p, get(p, row * itemsize(p)))
    if task.consecutive_rows:
        return load_masked(p + row * itemsize(p), mask)
    return gather(p + row * itemsize(p), row_lanes * itemsize(p), mask)


@njit(**INLINE)
def put_rows(task, p, unit, values):
    """Write the values of the unit's rows to an array (rows,)."""
    if task.class_lanes:
        put(p, unit.row * itemsize(p), lane(values, 0))
    elif task.consecutive_rows:
        store_masked(p + unit.row * itemsize(p), values, unit.rows)
    else:
        scatter(p + unit.row * itemsize(p), unit.row_lanes * itemsize(p), values, unit.rows)


@njit(**INLINE)
def sum_rows(task, values):
    """The sum over the unit's rows, as a number."""
    return lane(values, 0) if task.class_lanes else lane(sum_across(values), 0)


@njit(**INLINE)
def multiply_rows(task, values):
    """The product over the unit's rows, as a number."""
    return lane(values, 0) if task.class_lanes else lane(product_across(values), 0)


@njit(**INLINE)
def read(task, p, lanes, mask):
    """The vector at ``p``: neighbours, or ``lanes`` bytes apart; 0 where not ``mask``."""
    if task.contiguous_lanes:
        return load_masked(p, mask)
    return gather(p, lanes, mask)


@njit(**INLINE)
def write(task, p, lanes, values, mask):
    """The other way round."""
    if task.contiguous_lanes:
        store_masked(p, values, mask)
    else:
        scatter(p, lanes, values, mask)


@njit(**INLINE)
def raw_logits(task, unit, j, mask):
    """x, vector j, as it is stored."""
    if task.packed:
        return where(mask, raw_full(task, unit, j), 0.0)
    return read(task, task.x + (unit.x + j * x_step(task)), unit.x_lanes, mask)


@njit(**INLINE)
def raw_full(task, unit, j):
    """The same, if all lanes are live."""
    if task.packed:
        return load(unit.tile + j * tile_step(task, unit))
    p = task.x + (unit.x + j * x_step(task))
    return load(p) if task.contiguous_lanes else gather(p, unit.x_lanes, all_lanes())


@njit(**INLINE)
def write_out(task, unit, j, values, mask):
    """g, vector j; what goes into a tile is for ``write_tile`` to write."""
    if task.packed:
        store(unit.tile + j * tile_step(task, unit), values)
    else:
        write(task, task.g + (unit.g + j * g_step(task)), unit.g_lanes, values, mask)
