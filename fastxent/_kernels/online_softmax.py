"""Online softmax (Milakov, Gimelshein 2018): the sums that the first trip makes of a row, and how parts of a row are merged.

    m = max_c x_c        s = sum_c exp(x_c - m)        E = sum_c exp(x_c - m) (x_c - m)
    Q = sum_c q_c        D = sum_c q_c (x_c - m)       with target weights q_c

A row is read once, in blocks. When a block raises the maximum from m to m', the sums so far are rescaled:
    s' = f s        D' = D + Q (m - m')        E' = f (E + s (m - m'))        f = exp(m - m')

The term of the maximum is exactly 1. If a confident row's other terms, r in all, were added to it, they would lose their
digits, and so would log s = log(1 + r) and p_y - 1 = -r / s. So s is stored as two numbers, ``s_max`` = 1 and ``s_rest`` = r.

The terms of at most eight vectors (with class lanes: of sixteen vectors, and of two lanes of each) are added in float32. All
further sums are in float64 (for float64 logits: compensated), and their order follows from the shape alone, so the bits are the
same at any number of threads.

With class lanes, each sum ends with a sum over the lanes, after which every lane holds the row's value. So all later code is
the same for class lanes and for row lanes.
"""

from collections import namedtuple

from fastxent._kernels.compensated_sums import widen_add
from fastxent._simd.elementary import exp_scale, exp_scaled, shift_by
from fastxent._simd.lanes import fold, upper_bound
from fastxent._simd.logarithm import log, split_exponent
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import any_lane, maximum, narrow, splat, where, widen

INF = float("inf")

# The maximum m is in the precision of the arithmetic. The sums s = s_max + s_rest, Q, D, E are in float64; s and E carry
# exp_scaled's factor 2**UP. s_max holds the terms of 1 where they are summed apart: see ``sums_of`` and ``split_sum``.
State = namedtuple("State", "m s_max s_rest q_sum q_dot e_dot")


@inlined
def s_of(state):
    """Return s, rounded."""
    return state.s_max + state.s_rest


@inlined
def sums_of(task, x, e, q, m, s_max):
    """Return ``s_max``, and s_rest, Q, D, E over one vector, or over a group of vectors that are concatenated.

    With class lanes in float32, terms of 1 are added to the total ``s_max``, not to s_rest: few groups of a row have one. With
    row lanes nearly all vectors have one, and telling them apart would take an eighth of the time: there, s_rest takes all.
    """
    d = x - m
    s = q_sum = q_dot = e_dot = fold(e)
    if task.class_lanes and not task.double:
        if any_lane(upper_bound(e) >= exp_scale(task.x)):
            ones = where(e >= exp_scale(task.x), e, 0.0)
            s_max, s = widen_add(task, s_max, fold(ones)), fold(e - ones)
    if task.dense:
        q_sum, q_dot = fold(q), fold(q * d)
    if task.entropic:
        e_dot = fold(where(e == 0.0, e, e * d))
    return s_max, (s, q_sum, q_dot, e_dot)


@inlined
def rescale(state, m):
    """Return the state rescaled to ``m``, the maximum over more classes than the state's own."""
    shift = shift_by(widen(m))
    f = exp_scaled(widen(state.m), shift) / exp_scale(shift.base)
    down = where(state.m == -INF, splat(f, 0.0), widen(state.m) - widen(m))
    s, same = s_of(state), state.m == m
    s_max, s_rest = where(same, state.s_max, 0.0), where(same, state.s_rest, f * s)
    return State(m, s_max, s_rest, state.q_sum, state.q_dot + state.q_sum * down, f * (state.e_dot + s * down))


@inlined
def rescale_stored(task, part_m, m):
    """Return two factors that turn stored exponentials exp(x - part_m), where ``part_m`` is a scalar, into exp(x - m).

    The first is a power of two, which multiplies them without rounding; the second, in float64, is near 1.
    """
    shift = shift_by(widen(m))
    f = exp_scaled(splat(task.w, part_m), shift) / exp_scale(shift.base)
    _, rest = split_exponent(f)
    return narrow(task.x, f / rest), rest


@inlined
def empty(task, m):
    """Return the state of no classes, with the maximum ``m`` of the classes that will be merged into it."""
    nothing = splat(task.w, 0.0)
    return State(m, nothing, nothing, nothing, nothing, nothing)


@inlined
def rescale_to(state, m):
    """Return the state, rescaled if its maximum is less than ``m``, which is rare."""
    if any_lane(m > state.m):
        return rescale(state, maximum(state.m, m))
    return state


@inlined
def merge(a, b):
    """Return the state of two parts of a row, whose states are scaled to the same maximum."""
    return State(
        a.m, a.s_max + b.s_max, a.s_rest + b.s_rest, a.q_sum + b.q_sum, a.q_dot + b.q_dot, a.e_dot + b.e_dot
    )  # fmt: skip


@inlined
def log_s(state):
    """Return log(s_max + s_rest), corrected for the rounding error of that sum as in ``log1p``."""
    s = s_of(state)
    log_sum = log(s / exp_scale(state.m))
    return where(state.s_max > state.s_rest, log_sum + (state.s_rest - (s - state.s_max)) / s, log_sum)
