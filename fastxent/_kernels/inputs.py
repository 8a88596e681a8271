"""What a kernel reads of a row, a vector at a time: logits, target weights, the class index, the sample weight.

A kernel trusts its Task: the caller has checked every shape, stride and target. An ignored row reaches no result.
"""

from collections import namedtuple

from numba import njit

from fastxent._kernels.addressing import INF, raw_full, raw_logits, read, row_values, t_step, tile_step, x_step
from fastxent._kernels.row_tiles import target_tile
from fastxent._simd.elementary import sech_squared, tanh
from fastxent._simd.memory import gather, get, itemsize, load, load_masked
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, WIDE, as_floats, fma, iota, lane, maximum, narrow, splat, where

# ----------------------------------------------------------------------------------------------------
# Logits and target weights, vector j
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def transformed(task, x):
    """The logits that softmax sees: x, or x / temperature, or cap tanh(x / cap)."""
    if task.tempered:
        x = x / task.temperature
    return tanh(x / task.cap, task.cap) if task.capped else x


@njit(**INLINE)
def through_cap(task, x, g):
    """The gradient with respect to the stored x, from that with respect to the capped x: times 1 - tanh^2(x / cap)."""
    return g * sech_squared(x / task.cap) if task.capped else g


@njit(**INLINE)
def logits(task, unit, j, mask):
    """x, vector j, as softmax sees it."""
    return transformed(task, raw_logits(task, unit, j, mask))


@njit(**INLINE)
def full_logits(task, unit, j):
    """The same, if all lanes are live: what is read without a mask is read by the instruction that uses it."""
    return transformed(task, raw_full(task, unit, j))


@njit(**INLINE)
def target_weights(task, unit, j, mask):
    """q / ``share``, vector j: w ((1 - eps) t + eps / C), or w. What a class index adds at y is not in it: see ``Label``."""
    if task.soft:
        if task.transposed:
            t = load(target_tile(task, unit.tile) + j * tile_step(task, unit))
        else:
            t = read(task, task.t + (unit.t + j * t_step(task)), unit.t_lanes, mask)
        q = fma(t, task.confidence, splat(t, task.uniform))
    else:
        q = splat(task.x, 1.0)
    if task.weighted != 0:
        if task.class_lanes:
            q = q * narrow(q, load_masked(task.w + 8 * (unit.first + LANES * j), mask))
        else:
            q = q * get(task.w, 8 * j)
    return where(mask, q, 0.0)


@njit(**INLINE)
def common_weight(task):
    """What is common to all q of a smoothed class index, eps / C: multiplied, and rounded, once."""
    return 1.0 if task.soft else task.uniform


@njit(**INLINE)
def vector_max(task, unit, start, stop):
    """The maximum over vectors start ... stop - 1, lane by lane; four at a time, or each would wait for the one before."""
    a = b = c = d = splat(task.x, -INF)
    n_whole = max(start, min(stop, unit.full))
    grouped = start + (n_whole - start) // 4 * 4
    for j in range(start, grouped, 4):
        a = maximum(a, full_logits(task, unit, j))
        b = maximum(b, full_logits(task, unit, j + 1))
        c = maximum(c, full_logits(task, unit, j + 2))
        d = maximum(d, full_logits(task, unit, j + 3))
    m = maximum(maximum(a, b), maximum(c, d))
    for j in range(grouped, n_whole):
        m = maximum(m, full_logits(task, unit, j))
    for j in range(n_whole, stop):
        m = maximum(m, where(unit.reads, logits(task, unit, j, unit.reads), -INF))
    return m


# ----------------------------------------------------------------------------------------------------
# The class index, and what it points at; the sample weight
# ----------------------------------------------------------------------------------------------------

Label = namedtuple("Label", "raw_x_y w_y")  # stored logit (in the logits' precision) and class weight (float64) of class y


@njit(**INLINE)
def gather_labels(task, unit):
    """x_y of 16 rows. Of few classes each is looked at, for some processors with AVX-512 take long to gather."""
    if WIDE and task.packed:
        if task.n_classes <= LANES:
            y, c = where(unit.kept, as_floats(task.x, unit.y), -1.0), splat(task.x, 0.0)
            x_y = c
            for j in range(task.n_classes):
                x_y = where(y == c, raw_full(task, unit, j), x_y)
                c = c + 1.0
            return x_y
    if task.packed and task.contiguous_lanes:  # their lines have left the nearest caches
        return gather(unit.tile, iota() * itemsize(unit.tile) + unit.y * tile_step(task, unit), unit.kept)
    return gather(task.x + unit.x, unit.x_lanes + unit.y * x_step(task), unit.kept)


@njit(**INLINE)
def label(task, unit):
    """What the class indices point at; taken before anything is written, for g may be x."""
    w_y = splat(task.w, 1.0)
    if not task.labelled:
        return Label(splat(task.x, 0.0), w_y)
    if task.class_lanes:
        y = lane(unit.y, 0)
        x_y = splat(task.x, get(task.x + unit.x, y * itemsize(task.x)))
        if task.weighted != 0:
            w_y = splat(w_y, get(task.w, 8 * y))
    else:
        x_y = gather_labels(task, unit)
        if task.weighted != 0:
            w_y = gather(task.w, unit.y * 8, unit.kept)
    return Label(x_y, w_y)


@njit(**INLINE)
def sample_weights(task, unit):
    if task.sampled != 0:
        return row_values(task, task.u, unit.row, unit.row_lanes, unit.kept)
    return splat(task.w, 1.0)
