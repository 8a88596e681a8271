"""Long rows in a pipeline: while a row's exponentials are made, the gradient of the one before is written, and the maximum of
the next one found.

One after the other, reading and writing wait for the memory, and exponentials for the arithmetic; side by side, both are busy
all the time. A row's exponentials take the place of those of the row before, which are read just before that: so one tile does.
"""

from collections import namedtuple

from numba import njit, types
from numba.extending import overload

from fastxent._across import max_across, max_of_halves, repeat
from fastxent._elementary import shift_by
from fastxent._gradient import gradient_vector, put_label
from fastxent._inlined import INLINE
from fastxent._loadstore import store, stream
from fastxent._maths import INF, Factors, vector_max, whole_logits
from fastxent._rows import g_step, write
from fastxent._simd import LANES, WIDE, all_lanes, first_lanes, iota, lane, maximum, splat, where
from fastxent._streaming import aligned, look_further, streams

GROUP = 8  # vectors whose float32 terms are added up before they go to the float64 totals
AT_A_TIME = GROUP if WIDE else 2  # vectors whose exponentials are made beside each other
# Vectors between the gradient that is written and the logits that are read at the same time. Rows are often 4 KB apart, or a
# multiple of that; and a load waits for a store that is 4 KB away, for all that a processor looks at is the address in a page.
LEAD = 2 * GROUP if WIDE else GROUP

Pipeline = namedtuple("Pipeline", "ahead behind")
Ahead = namedtuple("Ahead", "unit start stop")  # vectors that are read next
# A row whose gradient is still to be written, some vectors together: its part where g is aligned; how many vectors; the target
# class, counted from where that part begins, and the first of the vectors that are written together with its own.
Behind = namedtuple("Behind", "unit f stop y y_at")


@njit(**INLINE)
def together(task):
    """Vectors that are worked on between looks at what is ahead and behind: fewer for a gradient, which does more."""
    return AT_A_TIME if WIDE or task.keeps_e or not task.across else 2 * AT_A_TIME


def unless_none(otherwise):
    """A function of kernels that is ``otherwise`` where its second argument is None: no code is made for what is not there."""

    def decorate(function):
        def choose(task, there, *more):
            return otherwise if isinstance(there, types.NoneType) else function

        overload(function, jit_options=INLINE, strict=False)(choose)
        return function

    return decorate


@unless_none(otherwise=lambda task, pipeline, top, start, j: top)
def alongside(task, pipeline, top, start, j):
    """What is done beside the exponentials of vectors j, ..., the first of which is ``start``; the maximum ahead, so far."""
    write_behind(task, pipeline.behind, j)
    return look_ahead_at(task, pipeline.ahead, top, j - start)


@unless_none(otherwise=lambda task, pipeline, top, start, stop: top)
def rest(task, pipeline, top, start, stop):
    """What is left to do if ``alongside`` was called for vectors ``start`` ... ``stop - 1``; the maximum ahead."""
    finish_behind(task, pipeline.behind, stop)
    return max_ahead(task, pipeline.ahead, top, stop - start)


# ----------------------------------------------------------------------------------------------------
# Ahead: the maximum
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def _itself(x):
    return x


@njit(**INLINE)
def _twice(x):
    return repeat(x, 2)


# A maximum so far takes one register, and becomes a vector in the end.
in_register, from_register = (_itself, _itself) if WIDE else (max_of_halves, _twice)


@njit(**INLINE)
def nothing_seen(task):
    """The maximum over nothing."""
    return in_register(splat(task.x, -INF))


@njit(**INLINE)
def look_ahead_at(task, ahead, top, k):
    """The maximum so far, and that of vectors k, ... ahead, if they are whole."""
    at = ahead.start + k
    if at + together(task) <= min(ahead.stop, ahead.unit.full):
        top = max_of_some(task, ahead.unit, at, top)
        if together(task) > AT_A_TIME:
            top = max_of_some(task, ahead.unit, at + AT_A_TIME, top)
    return top


@njit(**INLINE)
def max_of_some(task, unit, at, top):
    """The larger of ``top`` and what is in vectors at, ...: all whole."""
    for j in range(at, at + AT_A_TIME):
        look_further(task, unit, j)
        top = maximum(top, in_register(whole_logits(task, unit, j)))
    return top


@njit(**INLINE)
def max_ahead(task, ahead, top, k):
    """The maximum over all that is ahead, a number; ``top`` is that of what ``look_ahead_at`` could look at below vector k."""
    n_whole = max(ahead.start, min(ahead.stop, ahead.unit.full)) - ahead.start
    seen = min(k, n_whole // together(task) * together(task))
    m = maximum(from_register(top), vector_max(task, ahead.unit, ahead.start + seen, ahead.stop))
    return lane(max_across(m), 0)


@njit(**INLINE)
def max_of(task, ahead):
    """The maximum over all that is ahead, nothing of which was looked at."""
    return max_ahead(task, ahead, nothing_seen(task), 0)


# ----------------------------------------------------------------------------------------------------
# Behind: the gradient
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def nothing_behind(task, unit):
    """Before the first row."""
    zero = splat(task.x, 0.0)
    return Behind(unit, Factors(shift_by(zero), zero, zero, zero, zero, zero), 0, -1, -1)


@njit(**INLINE)
def follow(task, unit, f):
    """The row is behind now. Its ends, which may share lines with other rows, and its first vectors are written."""
    head, body, n_whole, tail = first_lanes(0), unit, unit.full, unit.writes
    if streams(task, unit):
        head, body, n_whole, tail = aligned(task, unit)
    stop = n_whole // AT_A_TIME * AT_A_TIME
    write(task, task.g + unit.g, unit.g_lanes, gradient_vector(task, unit, 0, head, f), head)
    for j in range(stop, n_whole + 1):
        mask = all_lanes() if j < n_whole else tail
        g = gradient_vector(task, body, j, mask, f)
        write(task, task.g + (body.g + j * g_step(task)), unit.g_lanes, g, mask)
    y, y_at = -1, -1
    if task.labelled:
        y = lane(unit.y, 0) - body.first
        if 0 <= y < stop * LANES:
            y_at = y // (AT_A_TIME * LANES) * AT_A_TIME
        else:
            put_label(task, unit, f)
    behind = Behind(body, one_number_each(f), stop, y, y_at)
    for j in range(-LEAD, 0, AT_A_TIME):
        write_behind(task, behind, j)
    return behind


@njit(**INLINE)
def one_number_each(f):
    """The factors of one row, each of which then takes one register."""
    return Factors(
        f.shift, f.power, splat(f.a, lane(f.a, 0)), splat(f.b, lane(f.b, 0)), f.inverse_s, splat(f.g_y, lane(f.g_y, 0))
    )


@unless_none(otherwise=lambda task, behind, j: None)
def write_behind(task, behind, j):
    """Of the row behind, what is LEAD vectors further than vectors j, ..., whose exponentials take the place of its own."""
    at = j + LEAD
    if at < behind.stop:
        if at == behind.y_at:  # a line that bypassed the caches is slow to change
            put_behind(task, behind, at, True)
        else:
            put_behind(task, behind, at, False)


@njit(**INLINE)
def put_behind(task, behind, at, holds_y):
    for j in range(at, at + AT_A_TIME):
        g = gradient_vector(task, behind.unit, j, all_lanes(), behind.f)
        if holds_y:
            g = where(iota() + j * LANES == behind.y, behind.f.g_y, g)
        p = task.g + (behind.unit.g + j * g_step(task))
        if streams(task, behind.unit):
            stream(p, g)
        else:
            store(p, g)


@unless_none(otherwise=lambda task, behind, start: None)
def finish_behind(task, behind, start):
    """What is left of the row behind, if ``start`` is the first vector with which ``write_behind`` was not called."""
    for j in range(start, behind.stop - LEAD, AT_A_TIME):
        write_behind(task, behind, j)
