"""Addressing: where the rows of a unit lie in memory, and how its vectors are read and written.

The 16 lanes of a vector hold either 16 classes of one row (class lanes: many classes, contiguous in memory) or one class of
16 rows (row lanes: few classes, or rows that are contiguous in memory, as in (N, C, H, W)). "Vector j of a unit" holds classes
16 j ... 16 j + 15 of its row, or class j of its 16 rows.
"""

from collections import namedtuple

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
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, all_lanes, any_lane, every_lane, first_lanes, iota, lane, splat, where

INF = float("inf")

# ----------------------------------------------------------------------------------------------------
# A unit: the rows that one kernel step works on, where they lie, and which lanes of their vectors are live
# ----------------------------------------------------------------------------------------------------

Unit = namedtuple(
    "Unit",
    "x g t "  # byte offsets of its first row in x, g and t
    "first "  # class lanes: the class in lane 0 of vector 0
    "x_lanes g_lanes t_lanes "  # byte offsets of its rows from its first row, lane by lane
    "row row_lanes "  # number of its first row; what to add to it for the number of each row, lane by lane
    "y "  # class indices
    # Address of its packed logits, class by class, if they are packed, and of its stored exponentials, which overwrite them.
    # `exp_storage` says where the exponentials of a long row are stored.
    "tile "
    "m "  # row maxima of the logits as they were packed, before any softcap or temperature; -inf if they are not packed
    "ending "  # number of rows in the panel whose last unit this is; 0 if another unit is the last
    "rows "  # mask: lanes that hold a row (class lanes: all)
    "kept "  # mask: lanes whose row is kept (not ignored)
    "start stop "  # range of its vectors: all, or one segment of a split row
    "full "  # vectors j < full have 16 live lanes
    "reads writes",  # masks of the vectors j >= full: lanes to read, and lanes of g to write
)


@inlined
def exp_storage(task, tile, g):
    """Return the address for ``Unit.tile``: in g if the exponentials of a pipelined row are stored there, which saves a trip
    through the caches, and g is not written by non-temporal stores; else in the thread's tile."""
    if task.exp_in_gradient:
        return task.g + g if task.non_temporal == 0 else tile
    return tile


@inlined
def offsets(task, number):
    """Return where unit ``number``, not a segment, begins: the position of its first row along the innermost row axis, the byte
    offsets of that row in x, g and t, and its row number."""
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


@inlined
def locate(task, tile, number):
    """Return unit ``number``; its digits in the row axes, innermost first, give its offsets.

    Packed logits are loaded into the tile here, unless a pipeline has loaded them already.
    """
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
            if not task.overlapped and nth == 0:
                load_panel(task, panel_of(task, tile, number, False))
            if nth == task.panel - 1:
                ending = min(task.panel * LANES, fixed(axes, 0) - (first - nth * LANES))
            tile = tile + nth * LANES * itemsize(tile)
            m = where(reads, load(row_numbers(task, tile, MAXIMA)), -INF)
            if task.overlapped and any_lane(kept) and not every_lane(kept):
                m, full = clear_ignored(task, tile, m, kept), task.n_vectors
        else:
            m = load_tile(task, tile, task.x + x, n, x_lanes, reads)
            if task.soft and task.transposed:
                load_target_tile(task, target_tile(task, tile), task.t + t, n, lanes * fixed(axes, 24), reads)
    return Unit(
        x, g, t, 0, x_lanes, lanes * fixed(axes, 16), lanes * fixed(axes, 24),
        row, row_lanes, y, tile, m, ending, rows, kept, start, stop, full, reads, writes,
    )  # fmt: skip


@inlined
def clear_ignored(task, tile, m, kept):
    """Set the logits of ignored rows in the tile to 0, so that all lanes are live; return the maxima, 0 for these rows."""
    for j in range(task.n_vectors):
        p = tile + j * class_step(task, tile)
        store(p, where(kept, load(p), 0.0))
    return where(kept, m, 0.0)


@inlined
def panel_of(task, tile, number, follows):
    """Return the panel whose first unit is ``number``; its last units may have no rows.

    ``follows`` says whether the panel before it is worked on in the same chunk: then it may adjoin that panel in memory.
    """
    first, x, g, _, _ = offsets(task, number)
    n = min(task.panel * LANES, fixed(task.axes, 0) - first)
    return new_panel(task, tile, task.x + x, task.g + g, n, follows and first > 0)


# Bytes from vector j of a unit to vector j + 1 in x, g and t. With class lanes they are compile-time constants.


@inlined
def x_step(task):
    if task.transposed:
        return itemsize(task.x)
    return LANES * itemsize(task.x) if task.class_lanes else task.x_step


@inlined
def g_step(task):
    return LANES * itemsize(task.g) if task.class_lanes else task.g_step


@inlined
def t_step(task):
    return LANES * itemsize(task.t) if task.class_lanes else task.t_step


@inlined
def unit_from_class(task, unit, c, stop):
    """Return a unit of ``stop`` vectors that begins at class c of this one (class lanes).

    Its masks are right if c is a multiple of 16; otherwise the caller has to mask the last vector of the row.
    """
    first = unit.first + c
    return Unit(
        unit.x + c * itemsize(task.x), unit.g + c * itemsize(task.g), unit.t + c * itemsize(task.t), first,
        unit.x_lanes, unit.g_lanes, unit.t_lanes, unit.row, unit.row_lanes, unit.y,
        unit.tile + c * itemsize(unit.tile), unit.m, 0, unit.rows, unit.kept,
        0, stop, min(stop, (task.n_classes - first) // LANES), unit.reads, unit.writes,
    )  # fmt: skip


@inlined
def empty_unit(unit):
    """Return a unit like this one without rows and classes: nothing but its tile is read for it, and nothing is written."""
    none = first_lanes(0)
    return Unit(
        unit.x, unit.g, unit.t, unit.first, unit.x_lanes, unit.g_lanes, unit.t_lanes, unit.row, unit.row_lanes, unit.y,
        unit.tile, unit.m, 0, none, none, 0, 0, 0, none, none,
    )  # fmt: skip


@inlined
def tile_step(task, unit):
    """Return the number of bytes from vector j to vector j + 1 in the tile."""
    if task.packed and task.contiguous_lanes:
        return class_step(task, unit.tile)
    return LANES * itemsize(unit.tile)


@inlined
def write_tile(task, unit, factor, g_y):
    """Write the tile times ``factor`` to g, and ``g_y`` at the class indices, if the unit is packed.

    For a unit of a panel, the factor, class indices and g_y are saved instead; the whole panel is written with its last unit,
    or later if it is overlapped with other panels.
    """
    if task.packed:
        tile, p = unit.tile, task.g + unit.g
        vector = LANES * itemsize(tile)
        if task.contiguous_lanes:
            put_row_numbers(task, tile, factor, where(unit.kept, unit.y, -1), g_y)
            if not task.overlapped and unit.ending > 0:
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


@inlined
def unscaled(task):
    """Return a factor of 1 and a g_y of 0 for `write_tile`: those of rows that are ignored or have no target."""
    return splat(task.x, 1.0), splat(task.x, 0.0)


@inlined
def row_values(task, p, row, row_lanes, mask):
    """Return the values of rows ``row + row_lanes`` of an array (rows,), lane by lane."""
    if task.class_lanes:
        return splat(p, get(p, row * itemsize(p)))
    if task.consecutive_rows:
        return load_masked(p + row * itemsize(p), mask)
    return gather(p + row * itemsize(p), row_lanes * itemsize(p), mask)


@inlined
def put_rows(task, p, unit, values):
    """Write the values of the unit's rows to an array (rows,)."""
    if task.class_lanes:
        put(p, unit.row * itemsize(p), lane(values, 0))
    elif task.consecutive_rows:
        store_masked(p + unit.row * itemsize(p), values, unit.rows)
    else:
        scatter(p + unit.row * itemsize(p), unit.row_lanes * itemsize(p), values, unit.rows)


@inlined
def sum_rows(task, values):
    """Return the sum over the unit's rows as a scalar."""
    return lane(values, 0) if task.class_lanes else lane(sum_across(values), 0)


@inlined
def multiply_rows(task, values):
    """Return the product over the unit's rows as a scalar."""
    return lane(values, 0) if task.class_lanes else lane(product_across(values), 0)


@inlined
def read(task, p, lanes, mask):
    """Return the vector at ``p``, contiguous or gathered from byte offsets ``lanes``; lanes outside ``mask`` are 0."""
    if task.contiguous_lanes:
        return load_masked(p, mask)
    return gather(p, lanes, mask)


@inlined
def write(task, p, lanes, values, mask):
    """Write a vector at ``p``, contiguous or scattered to byte offsets ``lanes``, where ``mask`` is true."""
    if task.contiguous_lanes:
        store_masked(p, values, mask)
    else:
        scatter(p, lanes, values, mask)


@inlined
def raw_logits(task, unit, j, mask):
    """Return vector j of the logits as they are stored, before any softcap or temperature; 0 where not ``mask``."""
    if task.packed:
        return where(mask, raw_full(task, unit, j), 0.0)
    return read(task, task.x + (unit.x + j * x_step(task)), unit.x_lanes, mask)


@inlined
def raw_full(task, unit, j):
    """Return vector j of the logits as they are stored, if all its lanes are live."""
    if task.packed:
        return load(unit.tile + j * tile_step(task, unit))
    p = task.x + (unit.x + j * x_step(task))
    return load(p) if task.contiguous_lanes else gather(p, unit.x_lanes, all_lanes())


@inlined
def write_out(task, unit, j, values, mask):
    """Write vector j of g, or, if the unit is packed, of its tile, which ``write_tile`` writes to g later."""
    if task.packed:
        store(unit.tile + j * tile_step(task, unit), values)
    else:
        write(task, task.g + (unit.g + j * g_step(task)), unit.g_lanes, values, mask)
