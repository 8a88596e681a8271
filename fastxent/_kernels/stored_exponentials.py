"""Exponentials that the first trip stores for the second: in the unit's tile, or where its gradient will be."""

from fastxent._kernels.addressing import g_step, read, tile_step, write
from fastxent._kernels.inputs import logits
from fastxent._simd.elementary import exp_scaled
from fastxent._simd.memory import load, load_masked, store, store_masked
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import every_lane


@inlined
def store_exponentials(task, unit, j, e, mask):
    """Store vector j of exp(x - m), if the task does, where ``exponentials`` reads it in the second trip."""
    if task.stores_exp:
        if task.split:
            write(task, task.g + (unit.g + j * g_step(task)), unit.g_lanes, e, mask)
        elif task.exp_in_gradient:  # masked, for another row may begin after the last class
            store_masked(unit.tile + j * tile_step(task, unit), e, mask)
        else:
            store(unit.tile + j * tile_step(task, unit), e)


@inlined
def exponentials(task, unit, j, mask, shift, power):
    """Return vector j of exp(x - m): as it was stored, or computed anew."""
    if task.stores_exp:
        if task.split:
            return read(task, task.g + (unit.g + j * g_step(task)), unit.g_lanes, mask) * power
        p = unit.tile + j * tile_step(task, unit)
        if task.exp_in_gradient:
            if not every_lane(mask):
                return load_masked(p, mask)
        return load(p)
    return exp_scaled(logits(task, unit, j, mask), shift)
