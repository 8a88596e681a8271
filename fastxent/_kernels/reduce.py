"""First trip through a unit's vectors: the sums of ``online_softmax``, from which a loss is computed."""

from collections import namedtuple

from fastxent._kernels.addressing import g_step, tile_step
from fastxent._kernels.compensated_sums import halve_lanes, split_sum, total_over_classes, widen_add
from fastxent._kernels.inputs import full_logits, logits, target_weights, vector_max
from fastxent._kernels.online_softmax import INF, State, empty, merge, rescale_to, sums_of
from fastxent._kernels.prefetch import block_length, prefetch_operands
from fastxent._kernels.stored_exponentials import store_exponentials
from fastxent._simd.elementary import Shift, exp_reduced, exp_scaled, reduce_argument, shift_by
from fastxent._simd.lanes import concat, max_across, max_of_halves, repeat
from fastxent._simd.memory import itemsize, load, scratch, store, store_each
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, WIDE, all_lanes, any_lane, splat, where, widen

HALVES = 128  # vectors of scratch for half-computed exponentials, on hosts with few registers


GROUP = 8  # vectors whose float32 terms are summed before they are added to the float64 totals
INTERLEAVED = GROUP if WIDE else 2  # vectors whose exponentials are computed interleaved

# Work that is overlapped with the first trip, in a software pipeline. ``step(task, data, top, j)`` is called with each group of
# vectors j, ..., and ``finish(task, data, top, stop)`` once that was done for all vectors below ``stop``. Both return ``top``,
# a running maximum of what is read ahead.
Overlap = namedtuple("Overlap", "step finish data")
NOTHING = Overlap(inlined(lambda task, data, top, j: top), inlined(lambda task, data, top, stop: top), None)


@inlined
def _itself(x):
    return x


@inlined
def _twice(x):
    return repeat(x, 2)


# A running maximum occupies one register: on hosts with narrow ones half a vector, from which a whole one is made in the end.
in_register, from_register = (_itself, _itself) if WIDE else (max_of_halves, _twice)


@inlined
def no_maximum(task):
    """Return the running maximum over nothing, -inf."""
    return in_register(splat(task.x, -INF))


@inlined
def group_length(task):
    """Return the number of vectors between two steps of the overlapped work: fewer for a gradient, where a step does more."""
    return INTERLEAVED if WIDE or task.stores_exp or not task.class_lanes else 2 * INTERLEAVED


@inlined
def vector_sums(task, unit, j, mask, m, shift, s_max):
    """Return what ``sums_of`` does over vector j, and store its exponentials if the task does."""
    x = logits(task, unit, j, mask)
    e = where(mask, exp_scaled(x, shift), 0.0)
    store_exponentials(task, unit, j, e, mask)
    return sums_of(task, x, e, target_weights(task, unit, j, mask), m, s_max)


def concatenated(size):
    """Return a function that concatenates the results of ``vector`` for ``size`` vectors from j on."""
    if size == 1:
        return inlined(lambda vector, task, unit, j: vector(task, unit, j))
    half = concatenated(size // 2)
    return inlined(lambda vector, task, unit, j: concat(half(vector, task, unit, j), half(vector, task, unit, j + size // 2)))


@inlined
def full_weights(task, unit, j):
    return target_weights(task, unit, j, all_lanes())


def wide_group(size):
    """Return a function that sums over ``size`` vectors from j on, interleaved, for processors do not look far enough ahead."""
    several = concatenated(size)

    @inlined
    def group(task, unit, j, m, shift, s_max):
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
        return sums_of(task, x, e, q, repeat(m, size), s_max)

    return group


eight, two = wide_group(GROUP), wide_group(2)


@inlined
def add_terms(a, b):
    s, q_sum, q_dot, e_dot = a
    t, r_sum, r_dot, f_dot = b
    return s + t, q_sum + r_sum, q_dot + r_dot, e_dot + f_dot


@inlined
def add_sums(task, totals, s_max, sums):
    """Return the float64 totals plus the sums over some vectors, which are added to ``s_max`` already."""
    _, s, q_sum, q_dot, e_dot = totals
    ds, dq_sum, dq_dot, de_dot = sums
    s = widen_add(task, s, ds)
    if task.dense:
        q_sum, q_dot = widen_add(task, q_sum, dq_sum), widen_add(task, q_dot, dq_dot)
    if task.entropic:
        e_dot = widen_add(task, e_dot, de_dot)
    return s_max, s, q_sum, q_dot, e_dot


@inlined
def wide_groups(task, unit, start, stop, m, shift, totals, overlap):
    """Add the sums of vectors start ... stop - 1, a multiple of eight, to the totals; return these and the maximum ahead."""
    top = no_maximum(task)
    for j in range(start, stop, GROUP):
        top = overlap.step(task, overlap.data, top, j)
        totals = add_sums(task, totals, *eight(task, unit, j, m, shift, totals[0]))
    return totals, top


@inlined
def wide_pairs(task, unit, start, stop, m, shift, totals):
    """Add the sums of vectors start ... stop - 1, an even number, to the totals."""
    for j in range(start, stop, 2):
        totals = add_sums(task, totals, *two(task, unit, j, m, shift, totals[0]))
    return totals


@inlined
def first_half(task, unit, j, shift, r, power):
    """Reduce the arguments of vector j's exponentials; store both results, to ``r`` and to ``power``."""
    prefetch_operands(task, unit, j)
    half = reduce_argument(full_logits(task, unit, j), shift)
    store(r, half[0])
    store(power, half[1])


@inlined
def other_half(task, unit, j, m, r, power, s_max):
    """Return what ``sums_of`` does over vector j, whose exponentials are finished from what ``first_half`` stored."""
    x = full_logits(task, unit, j)  # read first: the exponential may overwrite it
    e = exp_reduced(load(r), load(power))
    store_exponentials(task, unit, j, e, all_lanes())
    return sums_of(task, x, e, target_weights(task, unit, j, all_lanes()), m, s_max)


@inlined
def pair(task, unit, j, m, r, power, s_max):
    """Return what ``sums_of`` does, over vectors j and j + 1."""
    vector = LANES * itemsize(r)
    s_max, a = other_half(task, unit, j, m, r, power, s_max)
    s_max, b = other_half(task, unit, j + 1, m, r + vector, power + vector, s_max)
    return s_max, add_terms(a, b)


@inlined
def narrow_group(task, unit, first, end, m, r, power, totals, top, overlap):
    """Add the sums of vectors first ... end - 1 to the totals, after ``first_half``; return these and the maximum ahead."""
    zero = splat(m, 0.0)
    s_max, sums = totals[0], (zero, zero, zero, zero)
    for j in range(first, end, group_length(task)):  # sums of pairs lose fewer digits than one sequential sum
        top = overlap.step(task, overlap.data, top, j)
        at = (j - first) * LANES * itemsize(r)
        s_max, more = pair(task, unit, j, m, r + at, power + at, s_max)
        sums = add_terms(sums, more)
        if group_length(task) > 2:
            at += 2 * LANES * itemsize(r)
            s_max, more = pair(task, unit, j + 2, m, r + at, power + at, s_max)
            sums = add_terms(sums, more)
    return add_sums(task, totals, s_max, sums), top


@inlined
def narrow_groups(task, unit, start, stop, m, shift, totals, overlap):
    """Add the sums of vectors start ... stop - 1, an even number, to the totals; return these and the maximum ahead.

    An exponential is a dependency chain of some 16 instructions, and a processor's out-of-order window holds some 130. So the
    exponentials of up to ``batch`` vectors are computed in two loops of half the chain, whose constants fit the registers.
    """
    top = no_maximum(task)
    halves = scratch(m, HALVES)
    vector = LANES * itemsize(halves)
    batch = 2 * GROUP if task.class_lanes else HALVES // 2
    r, power = halves, halves + batch * vector
    for begin in range(start, stop, batch):
        end = min(begin + batch, stop)
        for j in range(begin, end):
            at = (j - begin) * vector
            first_half(task, unit, j, shift, r + at, power + at)
        if task.class_lanes:  # rounding errors average out over the lanes, so more terms may be summed in float32
            totals, top = narrow_group(task, unit, begin, end, m, r, power, totals, top, overlap)
        else:
            for first in range(begin, end, GROUP):
                at, last = (first - begin) * vector, min(first + GROUP, end)
                totals, top = narrow_group(task, unit, first, last, m, r + at, power + at, totals, top, overlap)
    return totals, top


groups = wide_groups if WIDE else narrow_groups


@inlined
def block_max(task, unit, start, stop):
    """Return the maximum over vectors start ... stop - 1."""
    if task.packed and not (task.capped or task.tempered):  # found when the tile was filled, for the logits as stored
        return unit.m
    m = vector_max(task, unit, start, stop)
    return max_across(m) if task.class_lanes else m


@inlined
def state_of(task, unit, start, stop, m, overlap):
    """Return the state of vectors start ... stop - 1 with m, their maximum or a larger one; and the maximum ahead.

    If work is overlapped, start is 0.
    """
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
        totals = add_sums(task, totals, *vector_sums(task, unit, j, all_lanes(), finite, shift, totals[0]))
    for j in range(n_whole, stop):
        totals = add_sums(task, totals, *vector_sums(task, unit, j, unit.reads, finite, shift, totals[0]))
    s_max, s, q_sum, q_dot, e_dot = totals
    s_max, s_rest = split_sum(task, s_max, s)
    state = State(
        m,
        s_max,
        s_rest,
        total_over_classes(task, q_sum) if task.dense else none,
        total_over_classes(task, q_dot) if task.dense else none,
        total_over_classes(task, e_dot) if task.entropic else none,
    )
    return state, top


@inlined
def span_state(task, unit):
    """Return the state of the unit's vectors, in one trip through memory: a block is read again from the nearest caches."""
    if task.packed or task.stores_exp:
        state, _ = state_of(task, unit, unit.start, unit.stop, block_max(task, unit, unit.start, unit.stop), NOTHING)
        return state
    state = empty(task, splat(task.x, -INF))  # Numba needs a definition before the loop
    for at in range(unit.start, unit.stop, block_length(task)):
        end = min(unit.stop, at + block_length(task))
        m = block_max(task, unit, at, end)
        state = rescale_to(state, m) if at > unit.start else empty(task, m)
        block, _ = state_of(task, unit, at, end, state.m, NOTHING)
        state = merge(state, block)
    return state
