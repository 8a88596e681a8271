"""Online softmax (Milakov, Gimelshein 2018): the sums that the first trip takes of a row, and how parts of a row are merged.

    m = max_c x_c        s = sum_c exp(x_c - m)        E = sum_c exp(x_c - m) (x_c - m)
    Q = sum_c q_c        D = sum_c q_c (x_c - m)       with target weights q_c

A row is read once, in blocks. When one raises the maximum from m to m', what was summed before is rescaled:
    s' = f s        D' = D + Q (m - m')        E' = f (E + s (m - m'))        f = exp(m - m')

The term of the maximum is exactly 1. Added to it, a confident row's other terms, r in all, would lose their digits, and with
them log s = log(1 + r) and p_y - 1 = -r / s. So s is stored as two numbers, ``s_max`` = 1 and ``s_rest`` = r.

The terms of at most eight vectors (class lanes: sixteen, and two lanes of each) are added in float32; all further sums are
float64 (of float64 logits, compensated), and their order follows from the shape alone: same bits at any number of threads.

With class lanes, each sum ends with one over the lanes, after which every lane holds the row's value. So all that comes later
is the same code for class lanes and for row lanes.
"""

from collections import namedtuple

from numba import njit

from fastxent._simd.elementary import exp_scale, exp_scaled, log, shift_by, split_exponent
from fastxent._simd.lanes import fold
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import any_lane, maximum, narrow, splat, where, widen

INF = float("inf")

# m in the logits' precision; the sums s = s_max + s_rest, Q, D, E in float64, of which s and E carry exp_scaled's factor
# 2**UP. s_max holds the terms of 1, if they are summed apart: see ``sums_of`` and ``reduce.split_sum``.
State = namedtuple("State", "m s_max s_rest q_sum q_dot e_dot")


@njit(**INLINE)
def s_of(state):
    return state.s_max + state.s_rest


@njit(**INLINE)
def sums_of(task, x, e, q, m):
    """The sums top, beside, Q, D, E over vector j, or over the group that begins there.

    In float32, terms of 1 are added up apart. If classes are in the lanes, few vectors of a row have one; if rows are, nearly
    all have, and that would take an eighth of the time: there, all is beside."""
    d = x - m
    s = q_sum = q_dot = e_dot = fold(e)
    s_max = splat(task.x, 0.0)
    if task.class_lanes and not task.double:
        if any_lane(s >= exp_scale(task.x)):
            ones = where(e >= exp_scale(task.x), e, 0.0)
            s_max, s = fold(ones), fold(e - ones)
    if task.dense:
        q_sum, q_dot = fold(q), fold(q * d)
    if task.entropic:
        e_dot = fold(where(e == 0.0, e, e * d))
    return s_max, s, q_sum, q_dot, e_dot


@njit(**INLINE)
def rescale(state, m):
    """The statistics with a maximum m that is not their own, but of more classes."""
    shift = shift_by(widen(m))
    f = exp_scaled(widen(state.m), shift) / exp_scale(shift.base)
    down = where(state.m == -INF, splat(f, 0.0), widen(state.m) - widen(m))
    s, same = s_of(state), state.m == m
    s_max, s_rest = where(same, state.s_max, 0.0), where(same, state.s_rest, f * s)
    return State(m, s_max, s_rest, state.q_sum, state.q_dot + state.q_sum * down, f * (state.e_dot + s * down))


@njit(**INLINE)
def rescale_stored(task, part_m, m):
    """What turns exponentials seen from ``part_m``, a number, into those seen from m: a power of two, with which they can be
    multiplied without rounding, and a factor (float64) near 1."""
    shift = shift_by(widen(m))
    f = exp_scaled(splat(task.w, part_m), shift) / exp_scale(shift.base)
    _, rest = split_exponent(f)
    return narrow(task.x, f / rest), rest


@njit(**INLINE)
def empty(task, m):
    """The statistics of no class, with a maximum m that is of some."""
    nothing = splat(task.w, 0.0)
    return State(m, nothing, nothing, nothing, nothing, nothing)


@njit(**INLINE)
def rescale_to(state, m):
    """The statistics with a maximum of at least m: most of the time they have one."""
    if any_lane(m > state.m):
        return rescale(state, maximum(state.m, m))
    return state


@njit(**INLINE)
def merge(a, b):
    """The statistics of two parts of a row that are seen from the same maximum."""
    return State(
        a.m, a.s_max + b.s_max, a.s_rest + b.s_rest, a.q_sum + b.q_sum, a.q_dot + b.q_dot, a.e_dot + b.e_dot
    )  # fmt: skip


@njit(**INLINE)
def log_s(state):
    """log(top + beside): what rounding the sum lost is put back, as in ``log1p``."""
    s = s_of(state)
    log_sum = log(s / exp_scale(state.m))
    return where(state.s_max > state.s_rest, log_sum + (state.s_rest - (s - state.s_max)) / s, log_sum)
