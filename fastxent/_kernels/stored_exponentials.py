"""The exponentials that the first trip stores for the second one: in the unit's tile, or where its gradient will be."""

from numba import njit

from fastxent._kernels.addressing import g_step, read, tile_step, write
from fastxent._kernels.inputs import logits
from fastxent._simd.elementary import exp_scaled
from fastxent._simd.memory import load, load_masked, store, store_masked
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import every_lane


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
