"""The two trips through a unit's vectors: first its statistics, then its gradient. The formulas are those of ``_maths``."""

from numba import njit

from fastxent._elementary import Shift, exp_of, exp_up, reduce, shift_by
from fastxent._inlined import INLINE
from fastxent._loadstore import itemsize, load, put, scatter, scratch, store, store_apart, stream
from fastxent._maths import INF, State, logits, merge, sums_of, target_weights, through_cap
from fastxent._rows import (
    BLOCK,
    aligned,
    g_step,
    look_ahead,
    look_at_next_row,
    raw_logits,
    read,
    streams,
    tile_step,
    write,
    write_out,
)
from fastxent._simd import (
    LANES,
    WIDE,
    all_lanes,
    any_lane,
    beside,
    iota,
    lane,
    max_across,
    maximum,
    repeat,
    splat,
    sum_across,
    where,
    widen,
)

GROUP = 8  # vectors whose float32 terms are added up before they go to the float64 totals
LOT = 64  # vectors that are halfway to their exponentials at a time, where the registers are few

# ----------------------------------------------------------------------------------------------------
# First trip: the statistics of a unit
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def block_max(task, unit, start, stop):
    """m; four maxima at a time, or each would wait for the one before."""
    a = b = c = d = splat(task.x, -INF)
    n_whole = max(start, min(stop, unit.full))
    grouped = start + (n_whole - start) // 4 * 4
    for j in range(start, grouped, 4):
        a = maximum(a, logits(task, unit, j, all_lanes()))
        b = maximum(b, logits(task, unit, j + 1, all_lanes()))
        c = maximum(c, logits(task, unit, j + 2, all_lanes()))
        d = maximum(d, logits(task, unit, j + 3, all_lanes()))
    m = maximum(maximum(a, b), maximum(c, d))
    for j in range(grouped, n_whole):
        m = maximum(m, logits(task, unit, j, all_lanes()))
    for j in range(n_whole, stop):
        m = maximum(m, where(unit.reads, logits(task, unit, j, unit.reads), -INF))
    return max_across(m) if task.across else m


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
def wide_groups(task, unit, start, stop, m, shift, totals):
    """The totals, with those of vectors start ... stop - 1, a multiple of eight."""
    for j in range(start, stop, GROUP):
        totals = add_sums(task, totals, wide_group(task, unit, j, m, shift))
    return totals


@njit(**INLINE)
def other_half(task, unit, j, m, r, power):
    """The sums over vector j, from what the first half has left at two addresses."""
    x = logits(task, unit, j, all_lanes())  # before an exponential takes its place
    e = exp_of(load(r), load(power))
    keep(task, unit, j, e, all_lanes())
    return sums_of(task, x, e, target_weights(task, unit, j, all_lanes()), m)


@njit(**INLINE)
def narrow_groups(task, unit, start, stop, m, shift, totals):
    """The totals, with those of vectors start ... stop - 1, an even number.

    An exponential is some 16 results, each waiting for the one before, and a processor looks ahead over some 130. So a lot of
    them is made in two loops of half the length, with constants for which the registers suffice.
    """
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
                at = (j - lot) * vector
                a = other_half(task, unit, j, m, r + at, power + at)
                b = other_half(task, unit, j + 1, m, r + (at + vector), power + (at + vector))
                sums = both(sums, both(a, b))
            totals = add_sums(task, totals, sums)
    return totals


groups, AT_A_TIME = (wide_groups, GROUP) if WIDE else (narrow_groups, 2)


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
    m = block_max(task, unit, start, stop)
    shift = shift_by(m)
    finite = where(m == -INF, splat(m, 0.0), m)
    zero = (splat(task.w, 0.0), splat(task.w, 0.0))
    totals = (zero, zero, zero, zero)
    n_whole = max(start, min(stop, unit.full))
    grouped = start
    if not task.double and not any_lane(shift.base != 0.0):
        near = Shift(None, shift.coarse, shift.fine, shift.lowest)
        grouped = start + (n_whole - start) // AT_A_TIME * AT_A_TIME
        totals = groups(task, unit, start, grouped, finite, near, totals)
    for j in range(grouped, n_whole):
        look_ahead(task, unit, j)
        totals = add_sums(task, totals, vector_sums(task, unit, j, all_lanes(), finite, shift))
    for j in range(n_whole, stop):
        totals = add_sums(task, totals, vector_sums(task, unit, j, unit.reads, finite, shift))
    s, q_sum, q_dot, e_dot = totals
    return State(
        m,
        total_over_classes(task, s),
        total_over_classes(task, q_sum) if task.dense else q_sum[0],
        total_over_classes(task, q_dot) if task.dense else q_dot[0],
        total_over_classes(task, e_dot) if task.entropic else e_dot[0],
    )


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


# ----------------------------------------------------------------------------------------------------
# Second trip: the gradient
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def with_label(task, unit, j, g, f):
    """Rows in lanes, no tile: g_y takes its place in the register."""
    if task.labelled and not task.across and not task.tiled:
        return where(unit.y == j, f.g_y, g)
    return g


@njit(**INLINE)
def holds_label(task, unit):
    """Across: is class y among the unit's classes?"""
    y = lane(unit.y, 0)
    return not task.split or unit.start * LANES <= y < unit.stop * LANES


@njit(**INLINE)
def put_label(task, unit, f):
    """g_y, over what the sweep wrote there: into the gradient of one row, or into the tile, unless `flush` does it."""
    if task.labelled and task.across:
        if holds_label(task, unit):
            put(task.g + unit.g, lane(unit.y, 0) * itemsize(task.g), lane(f.g_y, 0))
    if task.labelled and task.tiled and not task.whole_rows:  # an ignored row's gradient is 0 everywhere, as is its g_y
        y = where(unit.kept, unit.y, 0)
        scatter(unit.tile, iota() * itemsize(unit.tile) + y * tile_step(task, unit), f.g_y, all_lanes())


@njit(**INLINE)
def exponentials(task, unit, j, mask, shift, power):
    """exp(x - m), vector j: from where it was kept, or anew."""
    if task.keeps_e:
        if task.split:
            return read(task, task.g + (unit.g + j * g_step(task)), unit.g_lanes, mask) * power
        return load(unit.tile + j * tile_step(task, unit))
    return exp_up(logits(task, unit, j, mask), shift)


@njit(**INLINE)
def gradient_vector(task, unit, j, mask, f):
    g = exponentials(task, unit, j, mask, f.shift, f.power) * f.a
    if task.dense:
        g = g - target_weights(task, unit, j, mask) * f.b
    return through_cap(task, raw_logits(task, unit, j, mask), g) if task.capped else g


@njit(**INLINE)
def write_gradient(task, unit, f):
    """Second trip: g. What `flush` has to do with it then: a factor, and g_y."""
    one = splat(task.x, 1.0)
    if task.large:
        if streams(task, unit):
            stream_gradient(task, unit, f)
            return one, f.g_y
    if task.whole_rows and task.keeps_e and not task.dense:  # g = a e, and e is in the tile
        return f.a, f.g_y
    for j in range(unit.start, min(unit.stop, unit.full)):
        look_at_next_row(task, unit, j)
        g = with_label(task, unit, j, gradient_vector(task, unit, j, all_lanes(), f), f)
        write_out(task, unit, j, g, all_lanes())
    for j in range(max(unit.start, unit.full), unit.stop):
        g = with_label(task, unit, j, gradient_vector(task, unit, j, unit.reads, f), f)
        write_out(task, unit, j, g, unit.writes)
    put_label(task, unit, f)
    return one, f.g_y


@njit(**INLINE)
def stream_gradient(task, unit, f):
    head, body, n_whole, tail = aligned(task, unit)
    mask = all_lanes() if task.across else unit.reads
    write(task, task.g + unit.g, unit.g_lanes, gradient_vector(task, unit, unit.start, head, f), head)
    for j in range(n_whole):
        look_at_next_row(task, body, j)
        g = with_label(task, body, j, gradient_vector(task, body, j, mask, f), f)
        stream(task.g + (body.g + j * g_step(task)), g)
    g = gradient_vector(task, body, n_whole, tail, f)
    write(task, task.g + (body.g + n_whole * g_step(task)), unit.g_lanes, g, tail)
    put_label(task, unit, f)
