"""Second trip through a unit's vectors: the gradient, from exponentials that were stored, or are computed anew.

The gradient has one form for every loss. With e_c = exp(x_c - m), d_c = x_c - m and target weights q_c,
    g_c = e_c (a + a1 d_c) - b q_c
where a, a1, b are scalars per row (``Coefficients``), which the loss computes from the row's sums: see ``losses``.
"""

from collections import namedtuple

from fastxent._abi.argument_block import DIVISOR
from fastxent._kernels.addressing import g_step, raw_logits, write, write_out
from fastxent._kernels.inputs import logits, target_weights, through_cap
from fastxent._kernels.prefetch import aligned, is_non_temporal, prefetch_next_row
from fastxent._kernels.stored_exponentials import exponentials
from fastxent._simd.memory import get, itemsize, put, store_non_temporal
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, all_lanes, fma, lane, splat, where

# The coefficients of a unit's rows:
#   shift             what exponentials are computed with: see ``shift_by``
#   power             what stored exponentials are multiplied by
#   a, wide_a         a, and a in float64 for rows whose parts have an a each: see ``row_pipeline``
#   a1, m             used if the task sums E
#   b                 of q_c as ``target_weights`` gives it
#   k, q_hot, e_hot   see ``losses.cross_entropy``
#   inverse_s         1 / s
#   g_y               the gradient at class index y, computed from registers in float64
Coefficients = namedtuple("Coefficients", "shift power a wide_a a1 m b k q_hot e_hot inverse_s g_y")


@inlined
def scaled(task, x):
    """Return x factor / divisor; float64 results would show the rounding of factor / divisor, so there x is divided."""
    divisor = get(task.total, DIVISOR)
    return x * task.factor / divisor if task.double else x * (task.factor / divisor)


@inlined
def with_label(task, unit, j, g, f):
    """Return vector j of g, where g_y has replaced the entry at y if the lanes are rows that are not packed."""
    if task.labelled and not task.class_lanes and not task.packed:
        return where(unit.y == j, f.g_y, g)
    return g


@inlined
def holds_label(task, unit):
    """Class lanes: return whether class y is in the unit, which may be a segment."""
    y = lane(unit.y, 0)
    return not task.split or unit.start * LANES <= y < unit.stop * LANES


@inlined
def put_label(task, unit, f):
    """Class lanes: write g_y over what the second trip wrote at y. (For packed rows `write_tile` does so.)"""
    if task.labelled and task.class_lanes:
        if holds_label(task, unit):
            put(task.g + unit.g, lane(unit.y, 0) * itemsize(task.g), lane(f.g_y, 0))


@inlined
def gradient_vector(task, unit, j, mask, f):
    """Return vector j of the gradient, but for g_y."""
    e = exponentials(task, unit, j, mask, f.shift, f.power)
    if task.entropic:  # e d is 0 where e is 0, also where d is -inf
        d = logits(task, unit, j, mask) - f.m
        return e * fma(where(e == 0.0, e, d), f.a1, f.a)
    g = e * f.a
    if task.dense:
        q = target_weights(task, unit, j, mask)
        if task.soft and task.double:
            g = (e - where(q == f.q_hot, f.e_hot, q * f.k)) * f.a
        g = g - q * f.b
    return through_cap(task, raw_logits(task, unit, j, mask), g) if task.capped else g


@inlined
def write_gradient(task, unit, f):
    """Write g, in the second trip. Return what `write_tile` has to apply to a tile afterwards: a factor, and g_y."""
    one = splat(task.x, 1.0)
    if task.large:
        if is_non_temporal(task, unit):
            write_non_temporal(task, unit, f)
            return one, f.g_y
    if task.packed and task.stores_exp and not task.dense:  # g = a e, and the tile holds e
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


@inlined
def write_non_temporal(task, unit, f):
    """Write g by non-temporal stores, but for the unaligned lanes at the row's ends."""
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
