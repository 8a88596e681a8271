"""Split rows: if there are few rows of many classes, threads share each row, and a unit is one segment of a row.

In the first phase, ``save_segment`` saves the statistics of each segment. In the second phase, ``row_state`` merges the
segments of a row, in order, wherever the row's statistics are needed. If there is a gradient, the first phase stores the
exponentials where the gradient will be, provided that they can be stored there unrounded. For a row that is not split, the
functions of this file return what ``reduce`` and ``inputs`` return.
"""

from fastxent._abi.argument_block import LINE
from fastxent._kernels.addressing import locate
from fastxent._kernels.gradient import holds_label
from fastxent._kernels.inputs import Label, label
from fastxent._kernels.online_softmax import INF, State, empty, merge, rescale, rescale_stored
from fastxent._kernels.reduce import span_state
from fastxent._simd.lanes import max_across, sum_across
from fastxent._simd.memory import gather, get, put
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, any_lane, first_lanes, iota, lane, maximum, narrow, splat, where, widen

X_Y = 48  # byte offset of x_y in what a segment saves


@inlined
def save_segment(task, tile, number):
    """Save the statistics of a segment: the first phase of a split row.

    Return the number 0 and the factor 1, as every unit returns a number and a factor: see ``parallel_for``.
    """
    unit = locate(task, tile, number)
    if any_lane(unit.kept):
        at = task.segments + LINE * number  # (segments, 7) out: m, s_max, s_rest, Q, D, E, x_y
        if task.labelled:  # x_y is saved by the segment that holds it, before the exponentials overwrite it: g may be x
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


@inlined
def load_segments(task, first, k):
    """Return the statistics of segments k ... k + 15 of a row, lane by lane, and empty ones for segments that do not exist."""
    at, apart, there = first + LINE * k, iota() * LINE, first_lanes(task.n_segments - k)
    m = where(there, narrow(task.x, gather(at, apart, there)), -INF)
    return State(
        m, gather(at + 8, apart, there), gather(at + 16, apart, there), gather(at + 24, apart, there),
        gather(at + 32, apart, there), gather(at + 40, apart, there),
    )  # fmt: skip


@inlined
def row_state(task, unit, number):
    """Return the statistics of the unit's whole rows; those of a split row are merged from its segments."""
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


@inlined
def to_row(task, number, state):
    """Return what rescales the stored exponentials of a segment to the row's maximum: see ``rescale_stored``."""
    if task.split and task.stores_exp:
        return rescale_stored(task, get(task.segments, LINE * number), state.m)
    return splat(task.x, 1.0), splat(task.w, 1.0)


@inlined
def row_label(task, unit, number):
    """Return the label of the unit's whole rows.

    Another thread may already have overwritten x_y of a split row, so it is read from what its segment has saved.
    """
    if task.split and task.labelled:
        at = task.segments + LINE * (number - number % task.n_segments + lane(unit.y, 0) // (task.segment * LANES))
        return Label(narrow(task.x, splat(task.w, get(at, X_Y))), label(task, unit).w_y)
    return label(task, unit)
