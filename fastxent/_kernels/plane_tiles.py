"""Panels: rows that are neighbours in memory, with few classes, such as an image's pixels, whose classes lie planes apart.

The planes are often a power of two apart, so that a cache holds few of them at once. So ``task.panel`` units are copied to a
tile before they are worked on, plane by plane, and their gradient is copied back in the same way: a longer piece of a plane at
a time, and no line waits for the next unit.

Past the cache three panels are in hand: while the exponentials of one are made, vectors of the one before are written, and
vectors of the next one read. What is read was asked for some planes before: as many as have room at one place of a cache.
"""

from collections import namedtuple

from numba import njit

from fastxent._simd.memory import (
    address,
    before_aligned,
    itemsize,
    load,
    load_masked,
    prefetch_near,
    store,
    store_masked,
    store_non_temporal,
)
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, WIDE, as_floats, first_lanes, maximum, splat, where

INF = float("inf")
VECTORS_A_STEP = 8 if WIDE else 2  # vectors that are read, or written, in one step: neighbours in a plane
PLANES = 4  # between what is read and what is asked for
PANELS_IN_FLIGHT = 3

# Addresses of its first row's class 0, in x and in g; its rows; the tile; how many of them come before g is aligned, if it has
# to be; does it follow the panel that was worked on before, in memory too?
Panel = namedtuple("Panel", "x g n tile head adjoins")
# What is done while a unit is worked on, from step ``first`` on: a panel ahead is read, and of the two behind, the second is
# written, and what it has in common with the first.
PanelPipeline = namedtuple("PanelPipeline", "ahead here pending before first")

# Behind its logits, class by class, a tile has numbers of the panel's rows: the maxima; then what makes a gradient of
# exponentials, a factor, the target class, and the gradient there; and these again, with the row where g is aligned first.
MAXIMA, FACTORS, TARGETS, AT_TARGETS, SHIFTED = 0, 1, 2, 3, 3


@njit(**INLINE)
def class_step(task, tile):
    """Bytes from class to class in a tile: an odd number of vectors, which spreads the classes over all sets of a cache."""
    return (task.panel | 1) * LANES * itemsize(tile)


@njit(**INLINE)
def row_numbers(task, tile, which):
    return tile + (task.n_vectors + which) * class_step(task, tile)


@njit(**INLINE)
def panel_tile(task, tile, nth):
    """Tiles follow each other, with room for some numbers before each."""
    return tile + (nth % PANELS_IN_FLIGHT * ((task.n_vectors + 8) * class_step(task, tile)) + LANES * itemsize(tile))


@njit(**INLINE)
def new_panel(task, tile, x, g, n, joins):
    """A panel that is still to be read."""
    for k in range(task.panel):
        store(row_numbers(task, tile, MAXIMA) + k * LANES * itemsize(tile), splat(tile, -INF))
    return Panel(x, g, n, tile, head_length(task, g, n), joins)


@njit(**INLINE)
def empty_panel(panel):
    return Panel(panel.x, panel.g, 0, panel.tile, 0, False)


@njit(**INLINE)
def head_length(task, g, n):
    """Elements of n before the first vector that can be written past the caches, if that is what is done."""
    return before_aligned(g, n) if task.large and task.non_temporal != 0 else 0


@njit(**INLINE)
def steps_per_plane(task):
    """For a plane."""
    return (task.panel + VECTORS_A_STEP - 1) // VECTORS_A_STEP


@njit(**INLINE)
def load_part(task, panel, j, k, end):
    """The logits of class j, units k ... end - 1, and the maxima so far."""
    vector, step = LANES * itemsize(panel.tile), LANES * itemsize(panel.x)
    line, place = panel.x + j * task.x_step, panel.tile + j * class_step(task, panel.tile)
    maxima = row_numbers(task, panel.tile, MAXIMA)
    n_whole = panel.n // LANES
    stop = min(end, n_whole)
    if task.large and j + PLANES < task.n_vectors:
        for i in range(k, stop):
            prefetch_near(line + i * step, PLANES * task.x_step)
        prefetch_near(line + stop * step, PLANES * task.x_step - 1)
    for i in range(k, stop):
        x = load(line + i * step)
        store(place + i * vector, x)
        store(maxima + i * vector, maximum(load(maxima + i * vector), x))
    if k <= n_whole < end and n_whole * LANES < panel.n:
        x = load_masked(line + n_whole * step, first_lanes(panel.n - n_whole * LANES))
        store(place + n_whole * vector, x)
        store(maxima + n_whole * vector, maximum(load(maxima + n_whole * vector), x))


@njit(**INLINE)
def put_row_numbers(task, tile, factor, y, g_y):
    """What makes a gradient of what is in the tile of a unit."""
    store(row_numbers(task, tile, FACTORS), factor)
    if task.labelled:
        store(row_numbers(task, tile, TARGETS), as_floats(tile, y))
        store(row_numbers(task, tile, AT_TARGETS), g_y)


@njit(**INLINE)
def align_numbers(task, panel, which):
    vector, off = LANES * itemsize(panel.tile), panel.head * itemsize(panel.tile)
    for k in range(task.panel):
        x = load(row_numbers(task, panel.tile, which) + (k * vector + off))
        store(row_numbers(task, panel.tile, which + SHIFTED) + k * vector, x)


@njit(**INLINE)
def align_row_numbers(task, panel):
    """All units are done: their numbers once more, for vectors of g that are aligned."""
    if panel.head > 0:
        align_numbers(task, panel, FACTORS)
        if task.labelled:
            align_numbers(task, panel, TARGETS)
            align_numbers(task, panel, AT_TARGETS)


@njit(**INLINE)
def panel_gradient(task, panel, j, off, shifted, at):
    """The gradient of class j: exponentials and numbers lie ``off`` and ``at`` bytes after those of the first row."""
    g = load(panel.tile + (j * class_step(task, panel.tile) + off)) * load(
        row_numbers(task, panel.tile, FACTORS + shifted) + at
    )
    if task.labelled:
        is_target = load(row_numbers(task, panel.tile, TARGETS + shifted) + at) == float(j)
        g = where(is_target, load(row_numbers(task, panel.tile, AT_TARGETS + shifted) + at), g)
    return g


@njit(**INLINE)
def store_part(task, before, panel, after, j, k, end):
    """The gradient of class j, vectors k ... end - 1; past the caches if it is: then of vectors that are aligned."""
    vector, step, size = LANES * itemsize(panel.tile), LANES * itemsize(panel.g), itemsize(panel.tile)
    p = panel.g + j * task.g_step
    head = head_length(task, p, panel.n)
    if k == 0 and head > 0:
        store_head(task, before, panel, j, p, head)
    p, off, shifted, at = p + head * itemsize(p), head * size, 0, head * size
    if head == panel.head and head > 0:  # as for most arrays: numbers that span lines take longer
        shifted, at = SHIFTED, 0
    n_whole = (panel.n - head) // LANES
    for i in range(k, min(end, n_whole)):
        g = panel_gradient(task, panel, j, off + i * vector, shifted, at + i * vector)
        if task.large and task.non_temporal != 0:
            store_non_temporal(p + i * step, g)
        else:
            store(p + i * step, g)
    tail = panel.n - head - n_whole * LANES
    if k <= n_whole < end and tail > 0 and not after.adjoins:
        g = panel_gradient(task, panel, j, off + n_whole * vector, shifted, at + n_whole * vector)
        store_masked(p + n_whole * step, g, first_lanes(tail))


@njit(**INLINE)
def store_head(task, before, panel, j, p, head):
    """What comes before the first vector that is aligned; with what the panel before has in the same one, if it was left."""
    vector, size = LANES * itemsize(p), itemsize(panel.tile)
    if not panel.adjoins:
        store_masked(p, panel_gradient(task, panel, j, 0, 0, 0), first_lanes(head))
        return
    left = address(p) % vector // itemsize(p)
    off, past = -left * size, (before.n - left) * size
    g = where(first_lanes(left), panel_gradient(task, before, j, past, 0, past), panel_gradient(task, panel, j, off, 0, off))
    p = p + -left * itemsize(p)
    if left + head == LANES:
        store_non_temporal(p, g)
    else:  # the panel ends here, too
        store_masked(p, g, first_lanes(left + head))


@njit(**INLINE)
def load_panel(task, panel):
    for j in range(task.n_vectors):
        load_part(task, panel, j, 0, task.panel)


@njit(**INLINE)
def store_panel(task, before, panel, after):
    for j in range(task.n_vectors):
        store_part(task, before, panel, after, j, 0, task.panel)


@njit(**INLINE)
def pipeline_step(task, pipeline, number):
    """Step ``number``, counted plane by plane, of both."""
    j, k = number // steps_per_plane(task), number % steps_per_plane(task) * VECTORS_A_STEP
    if j < task.n_vectors:
        if task.stores_exp:
            store_part(task, pipeline.before, pipeline.pending, pipeline.here, j, k, k + VECTORS_A_STEP)
        load_part(task, pipeline.ahead, j, k, k + VECTORS_A_STEP)


@njit(**INLINE)
def steps_per_unit(task):
    """Steps that are done while one unit is worked on."""
    return task.n_vectors // VECTORS_A_STEP


@njit(**INLINE)
def finish_unit(task, pipeline, done):
    """What is left of a unit's share."""
    for number in range(done, steps_per_unit(task)):
        pipeline_step(task, pipeline, pipeline.first + number)


@njit(**INLINE)
def finish_panel(task, pipeline):
    """What is left if all units have done their share."""
    for number in range(pipeline.first, task.n_vectors * steps_per_plane(task)):
        pipeline_step(task, pipeline, number)
