"""Long rows in a pipeline: while a row's exponentials are made, the gradient of the one before is written, and the maximum of
what comes next is found.

One after the other, reading and writing wait for the memory, and exponentials for the arithmetic; side by side, both are busy
all the time. A row's exponentials take the place of those of the row before, which are read just before that: so one tile does.

Past the cache, rows of very many classes are worked on in parts, of which part k is seen from m_k, the largest logit up to its
end: then its logits, read for m_k, are in the second-level cache still when its exponentials are made. When m, that of the row,
is known, a exp(m_k - m) is the factor of part k where a was: see ``Coefficients``.
"""

from collections import namedtuple

from numba import njit

from fastxent._abi.variant import MOST_STORED
from fastxent._kernels.addressing import g_step, unit_from_class, write
from fastxent._kernels.gradient import Coefficients, gradient_vector, put_label
from fastxent._kernels.inputs import full_logits, vector_max
from fastxent._kernels.online_softmax import rescale_stored
from fastxent._kernels.prefetch import aligned, is_non_temporal, prefetch_pipelined
from fastxent._kernels.reduce import GROUP, INTERLEAVED, from_register, group_length, in_register, no_maximum
from fastxent._kernels.stored_exponentials import exponentials, store_exponentials
from fastxent._simd.elementary import shift_by
from fastxent._simd.lanes import max_across
from fastxent._simd.memory import get, itemsize, put, scratch, store, store_non_temporal
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, WIDE, absolute, all_lanes, first_lanes, iota, lane, maximum, splat, where, widen

# Vectors between the gradient that is written and the logits that are read at the same time. Rows are often 4 KB apart, or a
# multiple of that; and a load waits for a store that is 4 KB away, for all that a processor looks at is the address in a page.
LEAD = 2 * GROUP if WIDE else GROUP
SMALLEST = 2.0**-126  # normal float32

PART = 1024  # vectors of a part, or somewhat more: 64 KB of logits
VECTORS_OF_NUMBERS = -(-MOST_STORED // (PART * LANES))  # that hold a number for each part

Pipeline = namedtuple("Pipeline", "ahead pending")  # a unit, that is read next; and:
# A row, or a part of it, whose gradient is still to be written, some vectors together: the row from where g is aligned on; up
# to which vector; the target class, counted from there, and the first of the vectors that are written together with its own.
Pending = namedtuple("Pending", "unit f stop y y_at")


# What is overlapped with the first trip of a row, see ``reduce.Overlap``: for a loss ``running_max`` and ``max_ahead``; for a
# gradient these and the row behind.


@njit(**INLINE)
def write_and_read(task, pipeline, top, j):
    """With vectors j, ...: the gradient of the row behind is written; the maximum ahead, so far."""
    write_pending(task, pipeline.pending, j)
    return running_max(task, pipeline.ahead, top, j)


@njit(**INLINE)
def finish_both(task, pipeline, top, stop):
    """What is left to do if ``write_and_read`` was called for all vectors below ``stop``; the maximum ahead."""
    finish_pending(task, pipeline.pending, stop)
    return max_ahead(task, pipeline.ahead, top, stop)


# ----------------------------------------------------------------------------------------------------
# Ahead: the maximum
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def running_max(task, ahead, top, j):
    """The maximum so far, and that of vectors j, ... ahead, if they are whole."""
    if j + group_length(task) <= ahead.full:
        top = max_of_vectors(task, ahead, j, top)
        if group_length(task) > INTERLEAVED:
            top = max_of_vectors(task, ahead, j + INTERLEAVED, top)
    return top


@njit(**INLINE)
def max_of_vectors(task, unit, at, top):
    """The larger of ``s_max`` and what is in vectors at, ...: all whole."""
    for j in range(at, at + INTERLEAVED):
        prefetch_pipelined(task, unit, j)
        top = maximum(top, in_register(full_logits(task, unit, j)))
    return top


@njit(**INLINE)
def max_ahead(task, ahead, top, j):
    """The maximum over all that is ahead, a number; ``s_max`` is that of what ``running_max`` could look at below vector j."""
    seen = min(j, ahead.full // group_length(task) * group_length(task))
    m = maximum(from_register(top), vector_max(task, ahead, seen, ahead.stop))
    return lane(max_across(m), 0)


@njit(**INLINE)
def max_of(task, ahead):
    """The maximum over all that is ahead, nothing of which was looked at."""
    return max_ahead(task, ahead, no_maximum(task), 0)


# ----------------------------------------------------------------------------------------------------
# The parts of a row
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def row_parts(task):
    """How many parts a row has; vectors of each but the last, which has at most 8 less for each part. Parts are of a thousand:
    so it is never empty, and all that is left over at the end of a row is in it."""
    n = max(1, task.n_vectors // PART) if task.large else 1
    return n, ((task.n_vectors + n - 1) // n + GROUP - 1) // GROUP * GROUP


@njit(**INLINE)
def row_part(task, unit, k, length):
    """Part k of a row, as a unit: so vectors that are ahead, here, and behind at a time have the same number."""
    return unit_from_class(task, unit, k * length * LANES, min(length, unit.stop - k * length))


@njit(**INLINE)
def part_numbers(task):
    """Memory for a number for each part: m_k, until the row is behind; then its factor."""
    return scratch(splat(task.w, 0.0), VECTORS_OF_NUMBERS)


@njit(**INLINE)
def rescale_parts(task, unit, f, m, parts):
    """The parts' factors, in place of their maxima. If one were so small that float32 would lose digits of it, the part's
    exponentials are made smaller instead."""
    n_parts, length = row_parts(task)
    if n_parts == 1:  # seen from m
        put(parts, 0, lane(f.wide_a, 0))
        return
    for k in range(n_parts):
        power, rest = rescale_stored(task, get(parts, k * itemsize(parts)), m)
        a = f.wide_a * rest * widen(power)
        if 0.0 < lane(absolute(a), 0) < SMALLEST:
            part = row_part(task, unit, k, length)
            for j in range(part.stop):
                mask = all_lanes() if j < part.full else part.reads
                store_exponentials(task, part, j, exponentials(task, part, j, mask, f.shift, power) * power, mask)
            a = f.wide_a * rest
        put(parts, k * itemsize(parts), lane(a, 0))


@njit(**INLINE)
def part_factors(f, parts, k):
    """Each is a number, and takes one register then."""
    a, b, g_y = splat(f.a, get(parts, k * itemsize(parts))), splat(f.b, lane(f.b, 0)), splat(f.g_y, lane(f.g_y, 0))
    return Coefficients(f.shift, f.power, a, f.wide_a, f.a1, f.m, b, f.k, f.q_hot, f.e_hot, f.inverse_s, g_y)


# ----------------------------------------------------------------------------------------------------
# Behind: the gradient
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def no_pending(task, unit):
    """Before the first row."""
    zero = splat(task.x, 0.0)
    none = Coefficients(shift_by(zero), zero, zero, splat(task.w, 0.0), zero, zero, zero, zero, zero, zero, zero, zero)
    return Pending(unit, none, 0, -1, -1)


@njit(**INLINE)
def pending_row(task, unit, f, m, parts):
    """The row is behind now. Its ends, which may share lines with other rows, are written."""
    rescale_parts(task, unit, f, m, parts)
    head, body, n_whole, tail = first_lanes(0), unit, unit.full, unit.writes
    if is_non_temporal(task, unit):
        head, body, n_whole, tail = aligned(task, unit)
    stop = n_whole // INTERLEAVED * INTERLEAVED
    g = gradient_vector(task, unit, 0, head, part_factors(f, parts, 0))
    write(task, task.g + unit.g, unit.g_lanes, g, head)
    n_parts, _ = row_parts(task)
    f_last = part_factors(f, parts, n_parts - 1)
    for j in range(stop, n_whole + 1):
        mask = all_lanes() if j < n_whole else tail
        g = gradient_vector(task, body, j, mask, f_last)
        write(task, task.g + (body.g + j * g_step(task)), unit.g_lanes, g, mask)
    y, y_at = -1, -1
    if task.labelled:
        y = lane(unit.y, 0) - body.first
        if 0 <= y < stop * LANES:
            y_at = y // (INTERLEAVED * LANES) * INTERLEAVED
        else:
            put_label(task, unit, f)
    return Pending(body, f, stop, y, y_at)


@njit(**INLINE)
def pending_part(task, row, parts, k, length):
    """Part k of the row behind. Its first vectors are written, and its last ones, in which the next part may begin."""
    at, stop = k * length, min(length, row.stop - k * length)
    unit, f, y = unit_from_class(task, row.unit, at * LANES, stop), part_factors(row.f, parts, k), row.y - at * LANES
    if at + length < row.stop:
        stop -= INTERLEAVED
        f_next, border = part_factors(row.f, parts, k + 1), length * LANES - row.unit.first
        for j in range(stop, stop + INTERLEAVED):
            g, g_next = gradient_vector(task, unit, j, all_lanes(), f), gradient_vector(task, unit, j, all_lanes(), f_next)
            c = iota() + j * LANES
            store_full(task, unit, j, where(c == y, f.g_y, where(c < border, g, g_next)))
    pending = Pending(unit, f, stop, y, row.y_at - at)
    for j in range(-LEAD, 0, INTERLEAVED):
        write_pending(task, pending, j)
    return pending


@njit(**INLINE)
def write_pending(task, pending, j):
    """Of the row behind, what is LEAD vectors further than vectors j, ..., whose exponentials take the place of its own."""
    at = j + LEAD
    if at < pending.stop:
        if at == pending.y_at:  # a line that bypassed the caches is slow to change
            put_pending(task, pending, at, True)
        else:
            put_pending(task, pending, at, False)


@njit(**INLINE)
def put_pending(task, pending, at, holds_y):
    for j in range(at, at + INTERLEAVED):
        g = gradient_vector(task, pending.unit, j, all_lanes(), pending.f)
        if holds_y:
            g = where(iota() + j * LANES == pending.y, pending.f.g_y, g)
        store_full(task, pending.unit, j, g)


@njit(**INLINE)
def store_full(task, unit, j, g):
    p = task.g + (unit.g + j * g_step(task))
    if is_non_temporal(task, unit):
        store_non_temporal(p, g)
    else:
        store(p, g)


@njit(**INLINE)
def finish_pending(task, pending, start):
    """What is left of the row behind, if ``call_kernel`` is the first vector with which ``write_pending`` was not called."""
    for j in range(start, pending.stop - LEAD, INTERLEAVED):
        write_pending(task, pending, j)
