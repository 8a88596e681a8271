"""What a kernel reads: logits and target weights, a vector at a time; the class index and the sample weight of a row.

A kernel trusts its Task: the caller has checked every shape, stride and target. An ignored row affects no result.
"""

from collections import namedtuple

from fastxent._kernels.addressing import INF, raw_full, raw_logits, read, row_values, t_step, tile_step, x_step
from fastxent._kernels.row_tiles import target_tile
from fastxent._simd.elementary import sech_squared, tanh
from fastxent._simd.memory import gather, get, itemsize, load, load_masked
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, WIDE, as_floats, fma, iota, lane, maximum, narrow, splat, where

# ----------------------------------------------------------------------------------------------------
# Vector j of the logits and of the target weights
# ----------------------------------------------------------------------------------------------------


@inlined
def transformed(task, x):
    """Return the logits that softmax is taken of: x, or x / temperature, or cap tanh(x / cap)."""
    if task.tempered:
        x = x / task.temperature
    return tanh(x / task.cap, task.cap) if task.capped else x


@inlined
def through_cap(task, x, g):
    """Return the gradient with respect to the stored x: ``g``, with respect to the capped x, times 1 - tanh^2(x / cap)."""
    return g * sech_squared(x / task.cap) if task.capped else g


@inlined
def logits(task, unit, j, mask):
    """Return vector j of the logits that softmax is taken of."""
    return transformed(task, raw_logits(task, unit, j, mask))


@inlined
def full_logits(task, unit, j):
    """Return the same if all lanes are live: without a mask, the load is folded into the instruction that uses it."""
    return transformed(task, raw_full(task, unit, j))


@inlined
def target_weights(task, unit, j, mask):
    """Return vector j of q / ``common_weight``: w ((1 - eps) t + eps / C), or w. A class index's term at y is not included."""
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


@inlined
def common_weight(task):
    """Return the common factor of all q of a smoothed class index, eps / C, which is thus multiplied, and rounded, once."""
    return 1.0 if task.soft else task.uniform


@inlined
def vector_max(task, unit, start, stop):
    """Return the lane-wise maximum over vectors start ... stop - 1. Four accumulators keep the dependency chain short."""
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
# The class index and the values that it selects; the sample weight
# ----------------------------------------------------------------------------------------------------

Label = namedtuple("Label", "raw_x_y w_y")  # logit as stored (in the precision of the arithmetic), class weight (float64)


@inlined
def gather_labels(task, unit):
    """Return x_y of 16 rows. With few classes each one is compared with y, for gathers are slow on some AVX-512 processors."""
    if WIDE and task.packed:
        if task.n_classes <= LANES:
            y, c = where(unit.kept, as_floats(task.x, unit.y), -1.0), splat(task.x, 0.0)
            x_y = c
            for j in range(task.n_classes):
                x_y = where(y == c, raw_full(task, unit, j), x_y)
                c = c + 1.0
            return x_y
    if task.packed and task.contiguous_lanes:  # x has left the nearest caches by now, the tile has not
        return gather(unit.tile, iota() * itemsize(unit.tile) + unit.y * tile_step(task, unit), unit.kept)
    return gather(task.x + unit.x, unit.x_lanes + unit.y * x_step(task), unit.kept)


@inlined
def label(task, unit):
    """Return what the class indices select. It has to be read before anything is written, for g may be x."""
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


@inlined
def sample_weights(task, unit):
    """Return the sample weights of the unit's rows, in float64; 1 if there are none."""
    if task.sampled != 0:
        return row_values(task, task.u, unit.row, unit.row_lanes, unit.kept)
    return splat(task.w, 1.0)
