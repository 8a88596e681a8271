"""What does not fit the cache, or not the nearest one: asked for before it is needed, and written around the caches."""

from numba import njit

from fastxent._abi.argument_block import LINE
from fastxent._kernels.addressing import g_step, t_step, unit_from_class, write, write_out, x_step
from fastxent._simd.memory import (
    address,
    before_aligned,
    fixed,
    itemsize,
    prefetch,
    prefetch_near,
    prefetch_to_write,
    store_non_temporal,
)
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, all_lanes, every_lane, first_lanes, splat

AHEAD = 4096  # vectors of the next row that are asked for during the gradient: what half a second-level cache holds


@njit(**INLINE)
def block_length(task):
    """Vectors between two looks at the running maximum: 16 KB of what is computed with."""
    return 128 if task.double else 256


@njit(**INLINE)
def pipeline_distance(task):
    """Bytes between what a pipeline reads and what it asks for: memory takes longer than a cache."""
    return 8192 if task.large else 4096


@njit(**INLINE)
def prefetch_operands(task, unit, j):
    """While the exponentials of vector j are computed, ask for what is read a block, a row, or 16 rows later."""
    if task.pipelined and task.class_lanes:  # the logits are asked for where they are read first: see ``prefetch_pipelined``
        if task.soft:
            prefetch_near(task.t + unit.t, j * t_step(task) + pipeline_distance(task))
        return
    if task.class_lanes and not task.large:  # it is in some cache, and most of the time not in the nearest
        prefetch_near(task.x + unit.x, (j + min(block_length(task), task.n_vectors)) * x_step(task))
    if task.large and not task.packed:
        ahead, t_ahead = LANES * itemsize(task.x), LANES * itemsize(task.t)
        if task.class_lanes:
            ahead, t_ahead = block_length(task) * x_step(task), block_length(task) * t_step(task)
        if task.class_lanes and task.stores_exp:
            ahead, t_ahead = fixed(task.axes, 8), fixed(task.axes, 24)
        prefetch(task.x + unit.x, j * x_step(task) + ahead)
        if task.double:  # two cache lines a vector
            prefetch(task.x + unit.x, j * x_step(task) + ahead + LINE)
        if task.soft:
            prefetch(task.t + unit.t, j * t_step(task) + t_ahead)


@njit(**INLINE)
def prefetch_pipelined(task, unit, j):
    """In a pipeline: while vector j is read for the first time, ask for what follows."""
    prefetch_near(task.x + unit.x, j * x_step(task) + pipeline_distance(task))


@njit(**INLINE)
def prefetch_border(task, unit):
    """Past the cache: a line that two rows share is written in parts, and has to be read before; ask for it."""
    if task.non_temporal != 0 and address(task.g + unit.g) % LINE != 0:
        prefetch_to_write(task.g + unit.g, 0)


@njit(**INLINE)
def prefetch_next_row(task, unit, j):
    """Past the cache: ask for the next row while this one's gradient is computed."""
    if task.large and task.class_lanes and not task.stores_exp:
        if j < AHEAD:
            prefetch(task.x + unit.x, j * x_step(task) + fixed(task.axes, 8))


# A gradient larger than the caches is written by non-temporal stores: else each line would be read before it is overwritten.
# Such stores take whole aligned vectors. So a row of many classes is written in three parts, and rows in lanes are written
# that way where all of their vectors are whole and aligned.


@njit(**INLINE)
def is_non_temporal(task, unit):
    """May this unit's g be streamed?"""
    if task.class_lanes:
        return task.non_temporal != 0
    if task.packed:
        return False
    astray = (address(task.g + unit.g) | g_step(task)) % (LANES * itemsize(task.g))
    return task.non_temporal != 0 and every_lane(unit.writes) and astray == 0


@njit(**INLINE)
def aligned(task, unit):
    """First lanes (mask) of a unit; the part that begins where g is aligned, and its whole vectors; last lanes (mask)."""
    if not task.class_lanes:
        return first_lanes(0), unit, task.n_vectors, first_lanes(0)
    before = before_aligned(task.g + unit.g, task.n_classes)
    body = unit_from_class(task, unit, before, task.n_vectors)
    tail = task.n_classes - before - body.full * LANES
    return first_lanes(before), body, body.full, first_lanes(tail)


@njit(**INLINE)
def write_zeros(task, unit):
    """g of rows that are all ignored."""
    zero = splat(task.x, 0.0)
    if task.large:
        if is_non_temporal(task, unit):
            head, body, n_whole, tail = aligned(task, unit)
            write(task, task.g + unit.g, unit.g_lanes, zero, head)
            for j in range(n_whole):
                store_non_temporal(task.g + (body.g + j * g_step(task)), zero)
            write(task, task.g + (body.g + n_whole * g_step(task)), unit.g_lanes, zero, tail)
            return
    for j in range(unit.start, unit.stop):
        mask = all_lanes() if task.class_lanes and j < unit.full else unit.writes
        write_out(task, unit, j, zero, mask)
