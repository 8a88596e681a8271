"""First trip through a unit's vectors: the sums of ``online_softmax``, of which the loss makes what it is."""

from collections import namedtuple

from numba import njit

from fastxent._kernels.addressing import g_step, tile_step
from fastxent._kernels.compensated_sums import halve_lanes, split_sum, total_over_classes, widen_add
from fastxent._kernels.inputs import full_logits, logits, target_weights, vector_max
from fastxent._kernels.online_softmax import INF, State, empty, merge, rescale_to, sums_of
from fastxent._kernels.prefetch import block_length, prefetch_operands
from fastxent._kernels.stored_exponentials import store_exponentials
from fastxent._simd.elementary import Shift, exp_reduced, exp_scaled, reduce_argument, shift_by
from fastxent._simd.lanes import concat, max_across, max_of_halves, repeat
from fastxent._simd.memory import itemsize, load, scratch, store, store_each
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, WIDE, all_lanes, any_lane, splat, where, widen

HALVES = 128  # vectors of scratch for what is halfway to its exponential, where the registers are few


GROUP = 8  # vectors whose float32 terms are added up before they go to the float64 totals
INTERLEAVED = GROUP if WIDE else 2  # vectors whose exponentials are computed interleaved

# What is overlapped with the first trip: ``step(task, data, top, j)`` is called with each group of vectors j, ..., and
# ``finish(task, data, top, stop)`` when that was done for all vectors below ``stop``. Both return a running maximum.
Overlap = namedtuple("Overlap", "step finish data")
NOTHING = Overlap(njit(**INLINE)(lambda task, data, top, j: top), njit(**INLINE)(lambda task, data, top, stop: top), None)


@njit(**INLINE)
def _itself(x):
    return x


@njit(**INLINE)
def _twice(x):
    return repeat(x, 2)


# A running maximum takes one register, and becomes a vector in the end.
in_register, from_register = (_itself, _itself) if WIDE else (max_of_halves, _twice)


@njit(**INLINE)
def no_maximum(task):
    """The running maximum over nothing."""
    return in_register(splat(task.x, -INF))


@njit(**INLINE)
def group_length(task):
    """Vectors that are worked on between two steps of what is overlapped: fewer for a gradient, which does more."""
    return INTERLEAVED if WIDE or task.stores_exp or not task.class_lanes else 2 * INTERLEAVED


@njit(**INLINE)
def vector_sums(task, unit, j, mask, m, shift):
    x = logits(task, unit, j, mask)
    e = where(mask, exp_scaled(x, shift), 0.0)
    store_exponentials(task, unit, j, e, mask)
    return sums_of(task, x, e, target_weights(task, unit, j, mask), m)


def concatenated(size):
    """Vectors j, ..., so many, of what ``vector`` gives, as one."""
    if size == 1:
        return njit(**INLINE)(lambda vector, task, unit, j: vector(task, unit, j))
    half = concatenated(size // 2)
    return njit(**INLINE)(
        lambda vector, task, unit, j: concat(half(vector, task, unit, j), half(vector, task, unit, j + size // 2))
    )


@njit(**INLINE)
def full_weights(task, unit, j):
    return target_weights(task, unit, j, all_lanes())


def wide_group(size):
    """The sums over vectors j, ..., so many, step by step beside each other: no processor looks far enough ahead by itself."""
    several = concatenated(size)

    @njit(**INLINE)
    def group(task, unit, j, m, shift):
        for k in range(j, j + size):
            prefetch_operands(task, unit, k)
        x = several(full_logits, task, unit, j)
        q = x
        if task.dense:
            q = several(full_weights, task, unit, j)
        e = exp_scaled(x, Shift(None, repeat(shift.coarse, size), repeat(shift.fine, size), repeat(shift.lowest, size)))
        if task.stores_exp:
            if task.split:
                store_each(task.g + (unit.g + j * g_step(task)), e, g_step(task))
            else:
                store_each(unit.tile + j * tile_step(task, unit), e, tile_step(task, unit))
        return sums_of(task, x, e, q, repeat(m, size))

    return group


eight, two = wide_group(GROUP), wide_group(2)


@njit(**INLINE)
def add_terms(a, b):
    top, s, q_sum, q_dot, e_dot = a
    more, t, r_sum, r_dot, f_dot = b
    return top + more, s + t, q_sum + r_sum, q_dot + r_dot, e_dot + f_dot


@njit(**INLINE)
def add_sums(task, totals, sums):
    """The float64 totals with the sums of some vectors added."""
    top, s, q_sum, q_dot, e_dot = totals
    dtop, ds, dq_sum, dq_dot, de_dot = sums
    s = widen_add(task, s, ds)
    if task.class_lanes and not task.double:
        top = widen_add(task, top, dtop)
    if task.dense:
        q_sum, q_dot = widen_add(task, q_sum, dq_sum), widen_add(task, q_dot, dq_dot)
    if task.entropic:
        e_dot = widen_add(task, e_dot, de_dot)
    return top, s, q_sum, q_dot, e_dot


@njit(**INLINE)
def wide_groups(task, unit, start, stop, m, shift, totals, overlap):
    """The totals, with those of vectors start ... stop - 1, a multiple of eight; and the maximum ahead."""
    top = no_maximum(task)
    for j in range(start, stop, GROUP):
        top = overlap.step(task, overlap.data, top, j)
        totals = add_sums(task, totals, eight(task, unit, j, m, shift))
    return totals, top


@njit(**INLINE)
def wide_pairs(task, unit, start, stop, m, shift, totals):
    """The totals, with those of vectors start ... stop - 1, an even number."""
    for j in range(start, stop, 2):
        totals = add_sums(task, totals, two(task, unit, j, m, shift))
    return totals


@njit(**INLINE)
def first_half(task, unit, j, shift, r, power):
    """Halfway to the exponentials of vector j, to two addresses."""
    prefetch_operands(task, unit, j)
    half = reduce_argument(full_logits(task, unit, j), shift)
    store(r, half[0])
    store(power, half[1])


@njit(**INLINE)
def other_half(task, unit, j, m, r, power):
    """The sums over vector j, from what the first half has left there."""
    x = full_logits(task, unit, j)  # before an exponential takes its place
    e = exp_reduced(load(r), load(power))
    store_exponentials(task, unit, j, e, all_lanes())
    return sums_of(task, x, e, target_weights(task, unit, j, all_lanes()), m)


@njit(**INLINE)
def pair(task, unit, j, m, r, power):
    """The sums over vectors j and j + 1."""
    vector = LANES * itemsize(r)
    return add_terms(other_half(task, unit, j, m, r, power), other_half(task, unit, j + 1, m, r + vector, power + vector))


@njit(**INLINE)
def narrow_group(task, unit, first, end, m, r, power, totals, top, overlap):
    """The totals, with those of vectors first ... end - 1, of which the first halves are done; and the maximum ahead."""
    zero = splat(m, 0.0)
    sums = zero, zero, zero, zero, zero
    for j in range(first, end, group_length(task)):  # sums of pairs lose fewer digits than a sum of all in a row
        top = overlap.step(task, overlap.data, top, j)
        at = (j - first) * LANES * itemsize(r)
        sums = add_terms(sums, pair(task, unit, j, m, r + at, power + at))
        if group_length(task) > 2:
            at += 2 * LANES * itemsize(r)
            sums = add_terms(sums, pair(task, unit, j + 2, m, r + at, power + at))
    return add_sums(task, totals, sums), top


@njit(**INLINE)
def narrow_groups(task, unit, start, stop, m, shift, totals, overlap):
    """The totals, with those of vectors start ... stop - 1, an even number; and the maximum ahead.

    An exponential is some 16 results, each waiting for the one before, and a processor looks ahead over some 130. So a lot of
    them is made in two loops of half the length, with constants for which the registers suffice.
    """
    top = no_maximum(task)
    halves = scratch(m, HALVES)
    vector = LANES * itemsize(halves)
    lot = 2 * GROUP if task.class_lanes else HALVES // 2
    r, power = halves, halves + lot * vector
    for begin in range(start, stop, lot):
        end = min(begin + lot, stop)
        for j in range(begin, end):
            at = (j - begin) * vector
            first_half(task, unit, j, shift, r + at, power + at)
        if task.class_lanes:  # the lanes' rounding errors make up for each other
            totals, top = narrow_group(task, unit, begin, end, m, r, power, totals, top, overlap)
        else:
            for first in range(begin, end, GROUP):
                at, last = (first - begin) * vector, min(first + GROUP, end)
                totals, top = narrow_group(task, unit, first, last, m, r + at, power + at, totals, top, overlap)
    return totals, top


groups = wide_groups if WIDE else narrow_groups


@njit(**INLINE)
def block_max(task, unit, start, stop):
    """The maximum over vectors start ... stop - 1."""
    if task.packed and not (task.capped or task.tempered):  # the whole row, as it is stored: known already
        return unit.m
    m = vector_max(task, unit, start, stop)
    return max_across(m) if task.class_lanes else m


@njit(**INLINE)
def state_of(task, unit, start, stop, m, overlap):
    """The statistics of vectors start ... stop - 1, seen from m, their maximum or a larger one; and the maximum ahead.

    If something is overlapped, start is 0."""
    shift = shift_by(m)
    finite = where(m == -INF, splat(m, 0.0), m)
    none = splat(task.w, 0.0)
    zero = widen(halve_lanes(task, splat(task.x, 0.0)))
    none_so_far = zero, zero
    totals = none_so_far, none_so_far, none_so_far, none_so_far, none_so_far
    top = no_maximum(task)
    n_whole = max(start, min(stop, unit.full))
    grouped = start
    near, is_near = Shift(None, shift.coarse, shift.fine, shift.lowest), not task.double and not any_lane(shift.base != 0.0)
    if is_near:
        grouped = start + (n_whole - start) // group_length(task) * group_length(task)
        totals, top = groups(task, unit, start, grouped, finite, near, totals, overlap)
    top = overlap.finish(task, overlap.data, top, grouped)
    if WIDE and is_near:
        paired = grouped + (n_whole - grouped) // 2 * 2
        totals = wide_pairs(task, unit, grouped, paired, finite, near, totals)
        grouped = paired
    for j in range(grouped, n_whole):
        prefetch_operands(task, unit, j)
        totals = add_sums(task, totals, vector_sums(task, unit, j, all_lanes(), finite, shift))
    for j in range(n_whole, stop):
        totals = add_sums(task, totals, vector_sums(task, unit, j, unit.reads, finite, shift))
    s_top, s, q_sum, q_dot, e_dot = totals
    s_top, s_beside = split_sum(task, s_top, s)
    state = State(
        m,
        s_top,
        s_beside,
        total_over_classes(task, q_sum) if task.dense else none,
        total_over_classes(task, q_dot) if task.dense else none,
        total_over_classes(task, e_dot) if task.entropic else none,
    )
    return state, top


@njit(**INLINE)
def span_state(task, unit):
    """The statistics of the unit's vectors, in one trip through memory: twice through blocks that the nearest caches hold."""
    if task.packed or task.stores_exp:
        state, _ = state_of(task, unit, unit.start, unit.stop, block_max(task, unit, unit.start, unit.stop), NOTHING)
        return state
    state = empty(task, splat(task.x, -INF))  # Numba wants one before the loop
    for at in range(unit.start, unit.stop, block_length(task)):
        end = min(unit.stop, at + block_length(task))
        m = block_max(task, unit, at, end)
        state = rescale_to(state, m) if at > unit.start else empty(task, m)
        block, _ = state_of(task, unit, at, end, state.m, NOTHING)
        state = merge(state, block)
    return state
