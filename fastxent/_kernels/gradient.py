"""Second trip through a unit's vectors: the gradient, from the exponentials that were stored, or computed anew.

Every loss has a gradient of one form. With e_c = exp(x_c - m), d_c = x_c - m and target weights q_c,
    g_c = e_c (a + a1 d_c) - b q_c
where a, a1, b are numbers of the row (``Coefficients``), which the loss makes of the row's sums: see ``losses``.
"""

from collections import namedtuple

from numba import njit

from fastxent._abi.argument_block import DIVISOR
from fastxent._kernels.addressing import g_step, raw_logits, write, write_out
from fastxent._kernels.inputs import logits, target_weights, through_cap
from fastxent._kernels.prefetch import aligned, is_non_temporal, prefetch_next_row
from fastxent._kernels.stored_exponentials import exponentials
from fastxent._simd.memory import get, itemsize, put, store_non_temporal
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, all_lanes, fma, lane, splat, where

# Of a unit's rows: what exponentials are made with (``shift``), or what the stored ones are multiplied by (``power``); a, also
# in float64 for parts of a row that have each another one; a1 and m, if the task takes the sum E; b, of q_c as
# ``target_weights`` gives them; k, q_hot, e_hot: see ``losses.cross_entropy``; 1 / s; and the gradient at the class index y,
# computed from registers in float64.
Coefficients = namedtuple("Coefficients", "shift power a wide_a a1 m b k q_hot e_hot inverse_s g_y")


@njit(**INLINE)
def scaled(task, x):
    """x factor / divisor; float64 logits notice that 1 / divisor would be rounded."""
    divisor = get(task.total, DIVISOR)
    return x * task.factor / divisor if task.double else x * (task.factor / divisor)


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
def gradient_vector(task, unit, j, mask, f):
    e = exponentials(task, unit, j, mask, f.shift, f.power)
    if task.entropic:  # e d is 0 where e is, also where d is -inf
        return where(e == 0.0, e, e * fma(logits(task, unit, j, mask) - f.m, f.a1, f.a))
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
