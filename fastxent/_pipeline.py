"""Long rows in a pipeline: while a row's exponentials are made, the gradient of the one before is written, and the maximum of
the next one found.

One after the other, reading and writing wait for the memory, and exponentials for the arithmetic; side by side, both are busy
all the time. A row's exponentials take the place of those of the row before, which are read just before that: so one tile does.
"""

from collections import namedtuple

from numba import njit

from fastxent._elementary import shift_by
from fastxent._gradient import gradient_vector, put_label
from fastxent._inlined import INLINE
from fastxent._loadstore import store, stream
from fastxent._maths import Factors, logits, vector_max
from fastxent._rows import g_step, write
from fastxent._simd import LANES, WIDE, all_lanes, first_lanes, iota, lane, max_across, maximum, splat, where
from fastxent._streaming import aligned, look_further, streams

GROUP = 8  # vectors whose float32 terms are added up before they go to the float64 totals
AT_A_TIME = GROUP if WIDE else 2  # vectors whose exponentials are made beside each other
# Vectors between the gradient that is written and the logits that are read at the same time. Rows are often 4 KB apart, or a
# multiple of that; and a load waits for a store that is 4 KB away, for all that a processor looks at is the address in a page.
LEAD = 2 * AT_A_TIME if WIDE else 4 * AT_A_TIME

# ----------------------------------------------------------------------------------------------------
# Ahead: the maximum
# ----------------------------------------------------------------------------------------------------

Ahead = namedtuple("Ahead", "unit start stop")  # vectors that are read next


@njit(**INLINE)
def nothing_ahead(unit):
    return Ahead(unit, 0, 0)


@njit(**INLINE)
def look_ahead_at(task, ahead, top, k):
    """The maximum so far, and that of vectors k, ... ahead, if they are whole."""
    if task.pipelined:
        at = ahead.start + k
        if at + AT_A_TIME <= min(ahead.stop, ahead.unit.full):
            for j in range(at, at + AT_A_TIME):
                look_further(task, ahead.unit, j)
                top = maximum(top, logits(task, ahead.unit, j, all_lanes()))
    return top


@njit(**INLINE)
def rest_ahead(task, ahead, top, k):
    """The maximum over all that is ahead, of which ``look_ahead_at`` has looked at what it could below vector k."""
    n_whole = max(ahead.start, min(ahead.stop, ahead.unit.full)) - ahead.start
    seen = min(k, n_whole // AT_A_TIME * AT_A_TIME)
    top = maximum(top, vector_max(task, ahead.unit, ahead.start + seen, ahead.stop))
    return max_across(top) if task.across else top


# ----------------------------------------------------------------------------------------------------
# Behind: the gradient
# ----------------------------------------------------------------------------------------------------

# A row whose gradient is still to be written, in groups of AT_A_TIME vectors: where in it g is aligned, their number, may they
# bypass the caches? and where the target class is among them.
Behind = namedtuple("Behind", "unit f stop streamed y_at y_lane")


@njit(**INLINE)
def nothing_behind(task, unit):
    zero = splat(task.x, 0.0)
    return Behind(unit, Factors(shift_by(zero), zero, zero, zero, zero, zero), 0, False, -1, 0)


@njit(**INLINE)
def follow(task, unit, f):
    """The row is behind now. Its ends, which may share lines with other rows, and its first vectors are written."""
    body, n_whole, streamed, y_at, y_lane = unit, unit.full, False, -1, 0
    head, tail = first_lanes(0), unit.writes
    if streams(task, unit):
        head, body, n_whole, tail = aligned(task, unit)
        streamed = True
    stop = n_whole // AT_A_TIME * AT_A_TIME
    write(task, task.g + unit.g, unit.g_lanes, gradient_vector(task, unit, 0, head, f), head)
    for j in range(stop, n_whole + 1):
        mask = all_lanes() if j < n_whole else tail
        g = gradient_vector(task, body, j, mask, f)
        write(task, task.g + (body.g + j * g_step(task)), unit.g_lanes, g, mask)
    if task.labelled:
        y = lane(unit.y, 0) - body.first
        y_at, y_lane = y // LANES, y % LANES
        if not 0 <= y_at < stop:
            put_label(task, unit, f)
    behind = Behind(body, f, stop, streamed, y_at, y_lane)
    for j in range(-LEAD, 0, AT_A_TIME):
        write_behind(task, behind, j)
    return behind


@njit(**INLINE)
def write_behind(task, behind, j):
    """Of the row behind, what is LEAD vectors further than vectors j, ..., whose exponentials take the place of its own."""
    if task.pipelined and task.keeps_e:
        at = j + LEAD
        if at < behind.stop:
            if at <= behind.y_at < at + AT_A_TIME:  # a line that bypassed the caches is slow to change
                put_behind(task, behind, at, True)
            else:
                put_behind(task, behind, at, False)


@njit(**INLINE)
def put_behind(task, behind, at, holds_y):
    for j in range(at, at + AT_A_TIME):
        g = gradient_vector(task, behind.unit, j, all_lanes(), behind.f)
        if holds_y and j == behind.y_at:
            g = where(iota() == behind.y_lane, behind.f.g_y, g)
        p = task.g + (behind.unit.g + j * g_step(task))
        if behind.streamed:
            stream(p, g)
        else:
            store(p, g)


@njit(**INLINE)
def finish_behind(task, behind, start):
    """What is left of the row behind, if ``start`` is the first vector with which ``write_behind`` was not called."""
    for j in range(start, behind.stop - LEAD, AT_A_TIME):
        write_behind(task, behind, j)
