"""Second trip through a unit's vectors: the gradient, from the exponentials that were kept, or made anew."""

from numba import njit

from fastxent._kernels.addressing import g_step, raw_logits, read, tile_step, write, write_out
from fastxent._kernels.inputs import logits, target_weights, through_cap
from fastxent._kernels.prefetch import aligned, is_non_temporal, prefetch_next_row
from fastxent._simd.elementary import exp_scaled
from fastxent._simd.memory import itemsize, load, load_masked, put, store, store_masked, store_non_temporal
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, all_lanes, every_lane, lane, splat, where


@njit(**INLINE)
def with_label(task, unit, j, g, f):
    """Rows in lanes, no tile: g_y takes its place in the register."""
    if task.labelled and not task.class_lanes and not task.packed:
        return where(unit.y == j, f.g_y, g)
    return g


@njit(**INLINE)
def holds_label(task, unit):
    """Across: is class y among the unit's classes?"""
    y = lane(unit.y, 0)
    return not task.split or unit.start * LANES <= y < unit.stop * LANES


@njit(**INLINE)
def put_label(task, unit, f):
    """Across: g_y, over what the sweep wrote there. (Into what was put into a tile, `write_tile` does it.)"""
    if task.labelled and task.class_lanes:
        if holds_label(task, unit):
            put(task.g + unit.g, lane(unit.y, 0) * itemsize(task.g), lane(f.g_y, 0))


@njit(**INLINE)
def store_exponentials(task, unit, j, e, mask):
    """exp(x - m), vector j, to where the second trip looks for them: see ``exponentials``."""
    if task.stores_exp:
        if task.split:
            write(task, task.g + (unit.g + j * g_step(task)), unit.g_lanes, e, mask)
        elif task.exp_in_gradient:  # behind its last class is another row's first one
            store_masked(unit.tile + j * tile_step(task, unit), e, mask)
        else:
            store(unit.tile + j * tile_step(task, unit), e)


@njit(**INLINE)
def exponentials(task, unit, j, mask, shift, power):
    """exp(x - m), vector j: from where it was kept, or anew."""
    if task.stores_exp:
        if task.split:
            return read(task, task.g + (unit.g + j * g_step(task)), unit.g_lanes, mask) * power
        p = unit.tile + j * tile_step(task, unit)
        if task.exp_in_gradient:
            if not every_lane(mask):
                return load_masked(p, mask)
        return load(p)
    return exp_scaled(logits(task, unit, j, mask), shift)


@njit(**INLINE)
def gradient_vector(task, unit, j, mask, f):
    e = exponentials(task, unit, j, mask, f.shift, f.power)
    g = e * f.a
    if task.dense:
        q = target_weights(task, unit, j, mask)
        if task.soft and task.double:
            g = (e - where(q == f.q_hot, f.e_hot, q * f.k)) * f.a
        g = g - q * f.b
    return through_cap(task, raw_logits(task, unit, j, mask), g) if task.capped else g


@njit(**INLINE)
def write_gradient(task, unit, f):
    """Second trip: g. What `write_tile` has to do with it then: a factor, and g_y."""
    one = splat(task.x, 1.0)
    if task.large:
        if is_non_temporal(task, unit):
            write_non_temporal(task, unit, f)
            return one, f.g_y
    if task.packed and task.stores_exp and not task.dense:  # g = a e, and e is in the tile
        return f.a, f.g_y
    for j in range(unit.start, min(unit.stop, unit.full)):
        prefetch_next_row(task, unit, j)
        g = with_label(task, unit, j, gradient_vector(task, unit, j, all_lanes(), f), f)
        write_out(task, unit, j, g, all_lanes())
    for j in range(max(unit.start, unit.full), unit.stop):
        g = with_label(task, unit, j, gradient_vector(task, unit, j, unit.reads, f), f)
        write_out(task, unit, j, g, unit.writes)
    put_label(task, unit, f)
    return one, f.g_y


@njit(**INLINE)
def write_non_temporal(task, unit, f):
    head, body, n_whole, tail = aligned(task, unit)
    mask = all_lanes() if task.class_lanes else unit.reads
    write(task, task.g + unit.g, unit.g_lanes, gradient_vector(task, unit, unit.start, head, f), head)
    for j in range(n_whole):
        prefetch_next_row(task, body, j)
        g = with_label(task, body, j, gradient_vector(task, body, j, mask, f), f)
        store_non_temporal(task.g + (body.g + j * g_step(task)), g)
    g = gradient_vector(task, body, n_whole, tail, f)
    write(task, task.g + (body.g + n_whole * g_step(task)), unit.g_lanes, g, tail)
    put_label(task, unit, f)
