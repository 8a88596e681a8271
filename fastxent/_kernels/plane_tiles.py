"""Panels: up to 256 rows of few classes that are contiguous in memory, such as the pixels of an image, where each class is a
plane.

The planes are often a power of two apart, so that their cache lines fall into the same sets and a cache holds few of them at
once. So the ``task.panel`` units of a panel are packed into a tile together, plane by plane, before they are worked on, and
their gradient is copied back in the same way: a longer stretch of a plane is accessed at a time, and no cache line has to stay
in the cache for the next unit.

If the logits are larger than the caches, three panels are in flight: while the exponentials of one are computed, the gradient
of the panel before is written and the next panel is read. Its logits are prefetched some planes ahead: as many as one set of a
cache has room for.
"""

from collections import namedtuple

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
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, WIDE, as_floats, first_lanes, maximum, splat, where

INF = float("inf")
VECTORS_A_STEP = 8 if WIDE else 2  # contiguous vectors of a plane that one pipeline step reads, or writes
PLANES = 4  # prefetch distance in planes
PANELS_IN_FLIGHT = 3

# x, g: addresses of class 0 of its first row; n: number of its rows; tile: address of its tile; head: number of rows before the
# first vector of g that is aligned, if non-temporal stores need that, else 0; adjoins: whether it begins in memory where the
# panel ends that was worked on before.
Panel = namedtuple("Panel", "x g n tile head adjoins")
# Four successive panels: ``ahead`` is read, the exponentials of ``here`` are computed, the gradient of ``pending`` is written,
# and with it that of the last rows of ``before``, in the vectors that both panels share. ``first`` is the number of the first
# pipeline step that is done while the current unit is worked on.
PanelPipeline = namedtuple("PanelPipeline", "ahead here pending before first")

# After the logits, class by class, a tile holds numbers of the panel's rows: their maxima; then what turns exponentials into a
# gradient, which is a factor, the target class, and the gradient there; then copies of these three that are shifted so that
# lane 0 holds the first row at which g is aligned.
MAXIMA, FACTORS, TARGETS, AT_TARGETS, SHIFTED = 0, 1, 2, 3, 3


@inlined
def class_step(task, tile):
    """Return the bytes from class to class in a tile: an odd number of vectors, so that classes use all cache sets."""
    return (task.panel | 1) * LANES * itemsize(tile)


@inlined
def row_numbers(task, tile, which):
    """Return the address of one kind of number, such as ``MAXIMA``, of the panel's rows."""
    return tile + (task.n_vectors + which) * class_step(task, tile)


@inlined
def panel_tile(task, tile, nth):
    """Return the address of the tile of panel ``nth``; before each tile there is room for a vector that `store_head` reads."""
    return tile + (nth % PANELS_IN_FLIGHT * ((task.n_vectors + 8) * class_step(task, tile)) + LANES * itemsize(tile))


@inlined
def new_panel(task, tile, x, g, n, adjoins):
    """Return a panel whose logits are still to be loaded; its maxima are set to -inf."""
    for k in range(task.panel):
        store(row_numbers(task, tile, MAXIMA) + k * LANES * itemsize(tile), splat(tile, -INF))
    return Panel(x, g, n, tile, head_length(task, g, n), adjoins)


@inlined
def empty_panel(panel):
    """Return a panel without rows: nothing is read or written for it."""
    return Panel(panel.x, panel.g, 0, panel.tile, 0, False)


@inlined
def head_length(task, g, n):
    """Return how many of n elements at ``g`` precede the first vector for a non-temporal store; 0 if g has no such stores."""
    return before_aligned(g, n) if task.large and task.non_temporal != 0 else 0


@inlined
def steps_per_plane(task):
    """Return the number of pipeline steps that one plane of a panel takes."""
    return (task.panel + VECTORS_A_STEP - 1) // VECTORS_A_STEP


@inlined
def load_vectors(task, panel, j, k, end):
    """Load the logits of class j, units k ... end - 1, into the tile, and update the rows' maxima."""
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


@inlined
def put_row_numbers(task, tile, factor, y, g_y):
    """Save what turns the exponentials in a unit's tile into a gradient: factor, class indices, and the gradient there."""
    store(row_numbers(task, tile, FACTORS), factor)
    if task.labelled:
        store(row_numbers(task, tile, TARGETS), as_floats(tile, y))
        store(row_numbers(task, tile, AT_TARGETS), g_y)


@inlined
def align_numbers(task, panel, which):
    """Write a copy of one kind of number, shifted by ``panel.head`` rows."""
    vector, off = LANES * itemsize(panel.tile), panel.head * itemsize(panel.tile)
    for k in range(task.panel):
        x = load(row_numbers(task, panel.tile, which) + (k * vector + off))
        store(row_numbers(task, panel.tile, which + SHIFTED) + k * vector, x)


@inlined
def align_row_numbers(task, panel):
    """Write the shifted copies of a panel's numbers, for aligned vectors of g, once all of its units are done."""
    if panel.head > 0:
        align_numbers(task, panel, FACTORS)
        if task.labelled:
            align_numbers(task, panel, TARGETS)
            align_numbers(task, panel, AT_TARGETS)


@inlined
def panel_gradient(task, panel, j, off, shifted, at):
    """Return a vector of the gradient of class j.

    Its exponentials are ``off`` bytes after those of the panel's first row; its numbers, or for ``shifted`` = SHIFTED their
    shifted copies, are ``at`` bytes after the first ones.
    """
    g = load(panel.tile + (j * class_step(task, panel.tile) + off)) * load(
        row_numbers(task, panel.tile, FACTORS + shifted) + at
    )
    if task.labelled:
        is_target = load(row_numbers(task, panel.tile, TARGETS + shifted) + at) == float(j)
        g = where(is_target, load(row_numbers(task, panel.tile, AT_TARGETS + shifted) + at), g)
    return g


@inlined
def store_vectors(task, before, panel, after, j, k, end):
    """Write the gradient of class j, vectors k ... end - 1, which are aligned vectors of g if its stores are non-temporal."""
    vector, step, size = LANES * itemsize(panel.tile), LANES * itemsize(panel.g), itemsize(panel.tile)
    p = panel.g + j * task.g_step
    head = head_length(task, p, panel.n)
    if k == 0 and head > 0:
        store_head(task, before, panel, j, p, head)
    p, off, shifted, at = p + head * itemsize(p), head * size, 0, head * size
    if head == panel.head and head > 0:  # as in most arrays; loads of unshifted numbers span cache lines and take longer
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


@inlined
def store_head(task, before, panel, j, p, head):
    """Write the gradient before the first aligned vector of g, together with the elements of the panel before that share a
    vector with it, if the panels adjoin: `store_vectors` has left those out."""
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


@inlined
def load_panel(task, panel):
    """Load the whole panel into its tile."""
    for j in range(task.n_vectors):
        load_vectors(task, panel, j, 0, task.panel)


@inlined
def store_panel(task, before, panel, after):
    """Write the gradient of the whole panel."""
    for j in range(task.n_vectors):
        store_vectors(task, before, panel, after, j, 0, task.panel)


@inlined
def pipeline_step(task, pipeline, number):
    """Do step ``number``, counted plane by plane: write vectors of the pending panel, and load as many of the one ahead."""
    j, k = number // steps_per_plane(task), number % steps_per_plane(task) * VECTORS_A_STEP
    if j < task.n_vectors:
        if task.stores_exp:
            store_vectors(task, pipeline.before, pipeline.pending, pipeline.here, j, k, k + VECTORS_A_STEP)
        load_vectors(task, pipeline.ahead, j, k, k + VECTORS_A_STEP)


@inlined
def steps_per_unit(task):
    """Return the number of pipeline steps that are done while one unit is worked on."""
    return task.n_vectors // VECTORS_A_STEP


@inlined
def finish_unit(task, pipeline, done):
    """Do the remaining pipeline steps of a unit, the first ``done`` of which have been done."""
    for number in range(done, steps_per_unit(task)):
        pipeline_step(task, pipeline, pipeline.first + number)


@inlined
def finish_panel(task, pipeline):
    """Do the pipeline steps that remain when all units of a panel have done theirs."""
    for number in range(pipeline.first, task.n_vectors * steps_per_plane(task)):
        pipeline_step(task, pipeline, number)
