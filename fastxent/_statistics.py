"""First trip through a unit's vectors: its statistics. The formulas are those of ``_maths``."""

from numba import njit

from fastxent._elementary import Shift, exp_of, exp_up, reduce, shift_by
from fastxent._inlined import INLINE
from fastxent._loadstore import itemsize, load, scratch, store, store_apart
from fastxent._maths import INF, State, logits, merge, sums_of, target_weights, vector_max
from fastxent._pipeline import AT_A_TIME, GROUP, alongside, rest
from fastxent._rows import g_step, tile_step, write
from fastxent._simd import (
    LANES,
    WIDE,
    all_lanes,
    any_lane,
    beside,
    max_across,
    repeat,
    splat,
    sum_across,
    where,
    widen,
)
from fastxent._streaming import BLOCK, look_ahead

LOT = 64  # vectors that are halfway to their exponentials at a time, where the registers are few


@njit(**INLINE)
def keep(task, unit, j, e, mask):
    """The exponentials of vector j, to where the second trip looks for them."""
    if task.keeps_e:
        if task.split:
            write(task, task.g + (unit.g + j * g_step(task)), unit.g_lanes, e, mask)
        else:
            store(unit.tile + j * tile_step(task, unit), e)


@njit(**INLINE)
def vector_sums(task, unit, j, mask, m, shift):
    x = logits(task, unit, j, mask)
    e = where(mask, exp_up(x, shift), 0.0)
    keep(task, unit, j, e, mask)
    return sums_of(task, x, e, target_weights(task, unit, j, mask), m)


@njit(**INLINE)
def beside_each_other(vector, task, unit, j):
    """Vectors j ... j + 7 of what ``vector`` gives, as one of 128 lanes."""
    every = all_lanes()
    a = beside(vector(task, unit, j, every), vector(task, unit, j + 1, every))
    b = beside(vector(task, unit, j + 2, every), vector(task, unit, j + 3, every))
    c = beside(vector(task, unit, j + 4, every), vector(task, unit, j + 5, every))
    d = beside(vector(task, unit, j + 6, every), vector(task, unit, j + 7, every))
    return beside(beside(a, b), beside(c, d))


@njit(**INLINE)
def wide_group(task, unit, j, m, shift):
    """The sums over vectors j ... j + 7, step by step beside each other: no processor looks far enough ahead by itself."""
    for k in range(j, j + GROUP):
        look_ahead(task, unit, k)
    x = beside_each_other(logits, task, unit, j)
    q = x
    if task.dense:
        q = beside_each_other(target_weights, task, unit, j)
    e = exp_up(x, Shift(None, repeat(shift.coarse, GROUP), repeat(shift.fine, GROUP), repeat(shift.lowest, GROUP)))
    if task.keeps_e:
        if task.split:
            store_apart(task.g + (unit.g + j * g_step(task)), e, g_step(task))
        else:
            store_apart(unit.tile + j * tile_step(task, unit), e, tile_step(task, unit))
    return sums_of(task, x, e, q, repeat(m, GROUP))


@njit(**INLINE)
def both(a, b):
    s, q_sum, q_dot, e_dot = a
    t, r_sum, r_dot, f_dot = b
    return s + t, q_sum + r_sum, q_dot + r_dot, e_dot + f_dot


@njit(**INLINE)
def add(total, lost, x):
    """total + x, and what its rounding has lost added to ``lost`` (Knuth's two-sum)."""
    new = total + x
    there = new - total
    return new, lost + ((total - (new - there)) + (x - there))


@njit(**INLINE)
def whole(total, lost):
    """The sum; of an inf or nan nothing was lost, and inf - inf is nan."""
    return total + lost if lost == lost else total


@njit(**INLINE)
def widen_add(task, total, x):
    """A sum and what it has lost, with a vector's terms added; float32 terms lose nothing that counts."""
    value, lost = total
    if task.double:
        return add(value, lost, widen(x))
    return value + widen(x), lost


@njit(**INLINE)
def add_sums(task, totals, sums):
    """The float64 totals with the sums of some vectors added."""
    s, q_sum, q_dot, e_dot = totals
    ds, dq_sum, dq_dot, de_dot = sums
    s = widen_add(task, s, ds)
    if task.dense:
        q_sum, q_dot = widen_add(task, q_sum, dq_sum), widen_add(task, q_dot, dq_dot)
    if task.entropic:
        e_dot = widen_add(task, e_dot, de_dot)
    return s, q_sum, q_dot, e_dot


@njit(**INLINE)
def wide_groups(task, unit, start, stop, m, shift, totals, pipeline):
    """The totals, with those of vectors start ... stop - 1, a multiple of eight; and the maximum ahead."""
    top = splat(m, -INF)
    for j in range(start, stop, GROUP):
        top = alongside(task, pipeline, top, start, j)
        totals = add_sums(task, totals, wide_group(task, unit, j, m, shift))
    return totals, top


@njit(**INLINE)
def other_half(task, unit, j, m, r, power):
    """The sums over vector j, from what the first half has left at two addresses."""
    x = logits(task, unit, j, all_lanes())  # before an exponential takes its place
    e = exp_of(load(r), load(power))
    keep(task, unit, j, e, all_lanes())
    return sums_of(task, x, e, target_weights(task, unit, j, all_lanes()), m)


@njit(**INLINE)
def narrow_groups(task, unit, start, stop, m, shift, totals, pipeline):
    """The totals, with those of vectors start ... stop - 1, an even number; and the maximum ahead.

    An exponential is some 16 results, each waiting for the one before, and a processor looks ahead over some 130. So a lot of
    them is made in two loops of half the length, with constants for which the registers suffice.
    """
    top = splat(m, -INF)
    r, power = scratch(m, LOT), scratch(m, LOT)
    vector = LANES * itemsize(r)
    group = 2 * GROUP if task.across else GROUP  # across, the lanes' rounding errors make up for each other
    for lot in range(start, stop, LOT):
        end = min(lot + LOT, stop)
        for j in range(lot, end):
            look_ahead(task, unit, j)
            half = reduce(logits(task, unit, j, all_lanes()), shift)
            store(r + (j - lot) * vector, half[0])
            store(power + (j - lot) * vector, half[1])
        for first in range(lot, end, group):
            nothing = splat(m, 0.0)
            sums = nothing, nothing, nothing, nothing
            for j in range(first, min(first + group, end), 2):  # sums of pairs lose fewer digits than a sum of all in a row
                top = alongside(task, pipeline, top, start, j)
                at = (j - lot) * vector
                a = other_half(task, unit, j, m, r + at, power + at)
                b = other_half(task, unit, j + 1, m, r + (at + vector), power + (at + vector))
                sums = both(sums, both(a, b))
            totals = add_sums(task, totals, sums)
    return totals, top


groups = wide_groups if WIDE else narrow_groups


@njit(**INLINE)
def total_over_classes(task, total):
    """The sum over the vectors' classes: over the lanes too, if they are classes."""
    value, lost = total
    if task.double:  # of an inf or nan nothing was lost, and inf - inf is nan
        value = where(lost == lost, value + lost, value)
    return sum_across(value) if task.across else value


@njit(**INLINE)
def block_state(task, unit, start, stop):
    """The statistics of vectors start ... stop - 1: twice through a block that the first-level cache holds."""
    m = vector_max(task, unit, start, stop)
    state, _ = state_of(task, unit, start, stop, max_across(m) if task.across else m, None)
    return state


@njit(**INLINE)
def state_of(task, unit, start, stop, m, pipeline):
    """The statistics of vectors start ... stop - 1, of which m is the maximum, and the maximum ahead."""
    top = splat(m, -INF)
    shift = shift_by(m)
    finite = where(m == -INF, splat(m, 0.0), m)
    zero = (splat(task.w, 0.0), splat(task.w, 0.0))
    totals = (zero, zero, zero, zero)
    n_whole = max(start, min(stop, unit.full))
    grouped = start
    if not task.double and not any_lane(shift.base != 0.0):
        near = Shift(None, shift.coarse, shift.fine, shift.lowest)
        grouped = start + (n_whole - start) // AT_A_TIME * AT_A_TIME
        totals, top = groups(task, unit, start, grouped, finite, near, totals, pipeline)
    top = rest(task, pipeline, top, start, grouped)
    for j in range(grouped, n_whole):
        look_ahead(task, unit, j)
        totals = add_sums(task, totals, vector_sums(task, unit, j, all_lanes(), finite, shift))
    for j in range(n_whole, stop):
        totals = add_sums(task, totals, vector_sums(task, unit, j, unit.reads, finite, shift))
    s, q_sum, q_dot, e_dot = totals
    state = State(
        m,
        total_over_classes(task, s),
        total_over_classes(task, q_sum) if task.dense else q_sum[0],
        total_over_classes(task, q_dot) if task.dense else q_dot[0],
        total_over_classes(task, e_dot) if task.entropic else e_dot[0],
    )
    return state, top


@njit(**INLINE)
def span_state(task, unit):
    """The statistics of the unit's vectors, in one trip through memory."""
    if task.tiled or task.keeps_e:
        return block_state(task, unit, unit.start, unit.stop)
    nothing = splat(task.w, 0.0)
    state = State(splat(task.x, -INF), nothing, nothing, nothing, nothing)  # of no block: Numba wants one before the loop
    for at in range(unit.start, unit.stop, BLOCK):
        block = block_state(task, unit, at, min(unit.stop, at + BLOCK))
        state = merge(state, block) if at > unit.start else block
    return state
