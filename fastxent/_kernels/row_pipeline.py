"""The software pipeline of long rows: while the exponentials of one row are computed, the gradient of the row before is written
and the maximum of the next row is found.

One after the other, the maximum and the gradient would wait for memory and the exponentials for the arithmetic units;
overlapped, they keep both busy all the time. The exponentials of a row overwrite those of the row before just after these have
been read, so that one tile suffices.

If the logits are larger than the caches, rows of very many classes are worked on in parts. The exponentials of part k are
exp(x - m_k), where m_k is the largest logit up to the end of that part: so its logits, read to find m_k, are still in the
second-level cache when its exponentials are computed. When m, the maximum of the whole row, is known, the factor a of the
gradient (see ``Coefficients``) is rescaled to a exp(m_k - m) for part k.
"""

from collections import namedtuple

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
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, WIDE, absolute, all_lanes, first_lanes, iota, lane, maximum, splat, where, widen

# Number of vectors by which the gradient that is written is ahead of the logits that are read at the same time. Rows are often
# a multiple of 4 KB apart, and a load waits for an earlier store at the same offset in another 4 KB page, as a processor
# compares no more of their addresses (4K aliasing).
LEAD = 2 * GROUP if WIDE else GROUP
SMALLEST = 2.0**-126  # smallest normal float32

PART = 1024  # vectors of a part, or somewhat more: 64 KB of logits
PART_VECTORS = -(-MOST_STORED // (PART * LANES))  # vectors of scratch memory that hold one number for each part

Pipeline = namedtuple("Pipeline", "ahead pending")  # the unit that is read next; the `Pending` row, or part of it
# A row, or a part of it, whose gradient is still to be written, INTERLEAVED vectors at a time. unit: the row from where g is
# aligned on; f: its `Coefficients`; stop: the vectors from here on are written already; y: the target class, counted from
# the unit's first class, or -1 without class indices; y_at: the first of the vectors that are written together with that of
# y, or -1 if g_y is written already or there is none.
Pending = namedtuple("Pending", "unit f stop y y_at")


# A row's first trip is overlapped (see ``reduce.Overlap``) with ``running_max`` and ``max_ahead`` for a loss; for a gradient,
# with the following two functions, which also write the pending row.


@inlined
def write_and_read(task, pipeline, top, j):
    """Write the pending gradient that goes with vectors j, ..., and return the running maximum of the unit ahead."""
    write_pending(task, pipeline.pending, j)
    return running_max(task, pipeline.ahead, top, j)


@inlined
def finish_both(task, pipeline, top, stop):
    """Do what remains after ``write_and_read`` of all vectors below ``stop``, and return the maximum of the unit ahead."""
    finish_pending(task, pipeline.pending, stop)
    return max_ahead(task, pipeline.ahead, top, stop)


# ----------------------------------------------------------------------------------------------------
# The unit ahead: its maximum
# ----------------------------------------------------------------------------------------------------


@inlined
def running_max(task, ahead, top, j):
    """Return the running maximum ``top``, updated with vectors j, ... of the unit ahead if these are whole."""
    if j + group_length(task) <= ahead.full:
        top = max_of_vectors(task, ahead, j, top)
        if group_length(task) > INTERLEAVED:
            top = max_of_vectors(task, ahead, j + INTERLEAVED, top)
    return top


@inlined
def max_of_vectors(task, unit, at, top):
    """Return the running maximum ``top``, updated with the INTERLEAVED whole vectors of the unit from ``at`` on."""
    for j in range(at, at + INTERLEAVED):
        prefetch_pipelined(task, unit, j)
        top = maximum(top, in_register(full_logits(task, unit, j)))
    return top


@inlined
def max_ahead(task, ahead, top, j):
    """Return the maximum over the unit ahead as a scalar; ``top`` is that of what ``running_max`` has seen below vector j."""
    seen = min(j, ahead.full // group_length(task) * group_length(task))
    m = maximum(from_register(top), vector_max(task, ahead, seen, ahead.stop))
    return lane(max_across(m), 0)


@inlined
def max_of(task, ahead):
    """Return the maximum over the unit ahead as a scalar, if ``running_max`` has seen nothing of it."""
    return max_ahead(task, ahead, no_maximum(task), 0)


# ----------------------------------------------------------------------------------------------------
# The parts of a row
# ----------------------------------------------------------------------------------------------------


@inlined
def row_parts(task):
    """Return the number n of parts of a row and the number of vectors of each but the last.

    The last part has at most 8 n vectors less than the others. They have a thousand or more each, so it is never empty, and it
    holds all of the vectors at the end of the row that need a mask or are left over from groups.
    """
    n = max(1, task.n_vectors // PART) if task.large else 1
    return n, ((task.n_vectors + n - 1) // n + GROUP - 1) // GROUP * GROUP


@inlined
def row_part(task, unit, k, length):
    """Return part k of a row as a unit of its own, so that one vector number serves the part that is read, the part whose
    exponentials are computed, and the part that is written."""
    return unit_from_class(task, unit, k * length * LANES, min(length, unit.stop - k * length))


@inlined
def part_numbers(task):
    """Return memory for one number for each part: m_k, and once the row is pending, the part's factor a exp(m_k - m)."""
    return scratch(splat(task.w, 0.0), PART_VECTORS)


@inlined
def rescale_parts(task, unit, f, m, parts):
    """Replace the maximum of each part by its factor. If a factor is so small that float32 would lose digits of it, the stored
    exponentials of the part are rescaled instead."""
    n_parts, length = row_parts(task)
    if n_parts == 1:  # its maximum is m
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


@inlined
def part_factors(f, parts, k):
    """Return the coefficients of part k, with a, b and g_y splatted from scalars, so that each takes one register."""
    a, b, g_y = splat(f.a, get(parts, k * itemsize(parts))), splat(f.b, lane(f.b, 0)), splat(f.g_y, lane(f.g_y, 0))
    return Coefficients(f.shift, f.power, a, f.wide_a, f.a1, f.m, b, f.k, f.q_hot, f.e_hot, f.inverse_s, g_y)


# ----------------------------------------------------------------------------------------------------
# The pending row: its gradient
# ----------------------------------------------------------------------------------------------------


@inlined
def no_pending(task, unit):
    """Return the pending row before the first row: nothing is written for it."""
    zero = splat(task.x, 0.0)
    none = Coefficients(shift_by(zero), zero, zero, splat(task.w, 0.0), zero, zero, zero, zero, zero, zero, zero, zero)
    return Pending(unit, none, 0, -1, -1)


@inlined
def pending_row(task, unit, f, m, parts):
    """Return the row as pending, once all of its exponentials are stored, and write its gradient at both ends, as these may
    share cache lines with other rows."""
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


@inlined
def pending_part(task, row, parts, k, length):
    """Return part k of the pending row, and write its first LEAD vectors and its last ones, where the next part may begin."""
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


@inlined
def write_pending(task, pending, j):
    """Write vectors j + LEAD, ... of the pending gradient, while new exponentials overwrite its old ones in vectors j, ..."""
    at = j + LEAD
    if at < pending.stop:
        if at == pending.y_at:  # g_y is inserted in a register: to change a line after a non-temporal store is slow
            put_pending(task, pending, at, True)
        else:
            put_pending(task, pending, at, False)


@inlined
def put_pending(task, pending, at, holds_y):
    """Write INTERLEAVED vectors of the pending gradient from ``at`` on, with g_y if ``holds_y``."""
    for j in range(at, at + INTERLEAVED):
        g = gradient_vector(task, pending.unit, j, all_lanes(), pending.f)
        if holds_y:
            g = where(iota() + j * LANES == pending.y, pending.f.g_y, g)
        store_full(task, pending.unit, j, g)


@inlined
def store_full(task, unit, j, g):
    """Write vector j of g, all lanes of which are live."""
    p = task.g + (unit.g + j * g_step(task))
    if is_non_temporal(task, unit):
        store_non_temporal(p, g)
    else:
        store(p, g)


@inlined
def finish_pending(task, pending, start):
    """Write the rest of the pending gradient, if ``start`` is the first vector with which ``write_pending`` was not called."""
    for j in range(start, pending.stop - LEAD, INTERLEAVED):
        write_pending(task, pending, j)
