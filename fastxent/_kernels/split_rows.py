"""Split rows: a row of many classes, where there are few rows, is shared out over the threads in segments.

First phase: ``save_segment`` for each segment; second phase: ``row_state`` puts them together, in order, wherever the row's
statistics are needed. Where there is a gradient, the first phase leaves the exponentials in its place, as far as they can be
stored there unrounded. Of a row that is not split, all that is here is what ``reduce`` has.
"""

from numba import njit

from fastxent._abi.argument_block import LINE
from fastxent._kernels.addressing import locate
from fastxent._kernels.gradient import holds_label
from fastxent._kernels.inputs import Label, label
from fastxent._kernels.online_softmax import INF, State, empty, merge, rescale, rescale_stored
from fastxent._kernels.reduce import span_state
from fastxent._simd.lanes import max_across, sum_across
from fastxent._simd.memory import gather, get, put
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, any_lane, first_lanes, iota, lane, maximum, narrow, splat, where, widen

X_Y = 48  # bytes of what a segment saves before x_y


@njit(**INLINE)
def save_segment(task, tile, number):
    """First phase of a split row; returns what every unit returns: see ``parallel_for``."""
    unit = locate(task, tile, number)
    if any_lane(unit.kept):
        at = task.segments + LINE * number  # (segments, 7) out: m, top, beside, Q, D, E, x_y
        if task.labelled:  # by the one segment that holds it, before the exponentials take its place
            if holds_label(task, unit):
                put(at, X_Y, lane(widen(label(task, unit).raw_x_y), 0))
        state = span_state(task, unit)
        put(at, 0, lane(widen(state.m), 0))
        put(at, 8, lane(state.s_max, 0))
        put(at, 16, lane(state.s_rest, 0))
        put(at, 24, lane(state.q_sum, 0))
        put(at, 32, lane(state.q_dot, 0))
        put(at, 40, lane(state.e_dot, 0))
    return 0.0, 1.0


@njit(**INLINE)
def load_segments(task, first, k):
    """The statistics of a row's segments k ... k + 15, lane by lane; of those that are not there, those of no class."""
    at, apart, there = first + LINE * k, iota() * LINE, first_lanes(task.n_segments - k)
    m = where(there, narrow(task.x, gather(at, apart, there)), -INF)
    return State(
        m, gather(at + 8, apart, there), gather(at + 16, apart, there), gather(at + 24, apart, there),
        gather(at + 32, apart, there), gather(at + 40, apart, there),
    )  # fmt: skip


@njit(**INLINE)
def row_state(task, unit, number):
    """The statistics of whole rows."""
    if not task.split:
        return span_state(task, unit)
    first = task.segments + LINE * (number - number % task.n_segments)
    m = splat(task.x, -INF)
    for k in range(0, task.n_segments, LANES):
        m = maximum(m, load_segments(task, first, k).m)
    m = max_across(m)
    state = empty(task, m)
    for k in range(0, task.n_segments, LANES):
        state = merge(state, rescale(load_segments(task, first, k), m))
    s_max, s_rest = sum_across(state.s_max), sum_across(state.s_rest)
    return State(m, s_max, s_rest, sum_across(state.q_sum), sum_across(state.q_dot), sum_across(state.e_dot))


@njit(**INLINE)
def to_row(task, number, state):
    """What turns the exponentials that a segment has kept into those for the row's maximum: see ``rescale_stored``."""
    if task.split and task.stores_exp:
        return rescale_stored(task, get(task.segments, LINE * number), state.m)
    return splat(task.x, 1.0), splat(task.w, 1.0)


@njit(**INLINE)
def row_label(task, unit, number):
    """The label of whole rows: of a split row another thread may already have overwritten x_y, so it was saved."""
    if task.split and task.labelled:
        at = task.segments + LINE * (number - number % task.n_segments + lane(unit.y, 0) // (task.segment * LANES))
        return Label(narrow(task.x, splat(task.w, get(at, X_Y))), label(task, unit).w_y)
    return label(task, unit)
