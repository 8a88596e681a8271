"""The maths of fastxent: derived on top, then a function for each term. ``reduce`` and ``gradient`` loop with them over a
unit's vectors.

Letters (a row is one position of the axes other than the class axis; C classes, logits x)
    m = max_c x_c        s = sum_c exp(x_c - m)        lse = m + log s        p_c = exp(x_c - m) / s

Cross-entropy against target weights q_c (a row's class probabilities t, smoothed by eps, times class weights w)
    q_c = w_c ((1 - eps) t_c + eps / C)        Q = sum_c q_c        D = sum_c q_c (x_c - m)
    l          = -sum_c q_c log p_c = sum_c q_c (m + log s - x_c) = Q log s - D
    dl/dx_c    = Q p_c - q_c
    d2l/dx_c^2 = Q p_c (1 - p_c)
A class index y is t = onehot(y). Without smoothing only q_y = w_y is left:
    l          = w_y (log s + (m - x_y))
    dl/dx_c    = w_y (p_c - [c = y])
z-loss adds z lse^2 to l and 2 z lse p_c to the gradient (Q becomes Q + 2 z lse there). Softcap puts cap tanh(x / cap) for x.
A sample weight u multiplies a row's l and gradient; the gradient of a mean is divided by its divisor (``scaled``).

Online softmax (Milakov, Gimelshein 2018): a row is read once, in blocks; when one raises the maximum from m to m', before it,
    s' = f s        D' = D + Q (m - m')        E' = f (E + s (m - m'))        f = exp(m - m')
with E = sum_c exp(x_c - m) (x_c - m), from which the entropy comes: log s - E / s.
The term of the maximum is exactly 1. Added to it, a confident row's other terms, r in all, would lose their digits, and with
them log s = log(1 + r) and p_y - 1 = -r / s. So s is stored as two numbers, ``s_max`` = 1 and ``s_rest`` = r.
The terms of at most eight vectors (class lanes: sixteen, and two lanes of each) are added in float32; all further sums are float64
(of float64 logits, compensated), and their order follows from the shape alone: same bits at any number of threads.

One maths, two directions. 16 lanes hold classes of one row (class lanes) or one class of 16 rows (row lanes): ``addressing``
reads and writes them. With class lanes, each reduction ends with one over the lanes, after which every lane holds the row's
value; so all that comes later is the same code.

A kernel trusts its Task: the caller has checked every shape, stride and target. An ignored row reaches no result.
"""

from collections import namedtuple

from numba import njit

from fastxent._abi.argument_block import DIVISOR
from fastxent._kernels.addressing import (
    INF,
    multiply_rows,
    raw_full,
    raw_logits,
    read,
    row_values,
    sum_rows,
    t_step,
    tile_step,
    x_step,
)
from fastxent._kernels.row_tiles import target_tile
from fastxent._simd.elementary import exp_scale, exp_scaled, log, sech_squared, shift_by, split_exponent, tanh
from fastxent._simd.lanes import fold
from fastxent._simd.memory import gather, get, itemsize, load, load_masked
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import (
    LANES,
    WIDE,
    absolute,
    any_lane,
    as_floats,
    fma,
    iota,
    lane,
    maximum,
    narrow,
    splat,
    where,
    widen,
)

# ----------------------------------------------------------------------------------------------------
# Logits and target weights, a vector at a time
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def capped(task, x):
    """The logits that softmax sees: x, or cap tanh(x / cap)."""
    return tanh(x / task.cap, task.cap) if task.capped else x


@njit(**INLINE)
def through_cap(task, x, g):
    """The gradient with respect to the stored x, from that with respect to the capped x: times 1 - tanh^2(x / cap)."""
    return g * sech_squared(x / task.cap) if task.capped else g


@njit(**INLINE)
def logits(task, unit, j, mask):
    """x, vector j, as softmax sees it."""
    return capped(task, raw_logits(task, unit, j, mask))


@njit(**INLINE)
def full_logits(task, unit, j):
    """The same, if all lanes are live: what is read without a mask is read by the instruction that uses it."""
    return capped(task, raw_full(task, unit, j))


@njit(**INLINE)
def target_weights(task, unit, j, mask):
    """q / ``share``, vector j: w ((1 - eps) t + eps / C), or w. What a class index adds at y is not in it: see ``Label``."""
    if task.soft:
        if task.transposed:
            t = load(target_tile(task, unit.tile) + j * tile_step(task, unit))
        else:
            t = read(task, task.t + (unit.t + j * t_step(task)), unit.t_lanes, mask)
        q = fma(t, task.confidence, splat(t, task.uniform))
    else:
        q = splat(task.x, 1.0)
    if task.weighted != 0:
        if task.class_lanes:
            q = q * narrow(q, load_masked(task.w + 8 * (unit.first + LANES * j), mask))
        else:
            q = q * get(task.w, 8 * j)
    return where(mask, q, 0.0)


@njit(**INLINE)
def common_weight(task):
    """What is common to all q of a smoothed class index, eps / C: multiplied, and rounded, once."""
    return 1.0 if task.soft else task.uniform


@njit(**INLINE)
def vector_max(task, unit, start, stop):
    """The maximum over vectors start ... stop - 1, lane by lane; four at a time, or each would wait for the one before."""
    a = b = c = d = splat(task.x, -INF)
    n_whole = max(start, min(stop, unit.full))
    grouped = start + (n_whole - start) // 4 * 4
    for j in range(start, grouped, 4):
        a = maximum(a, full_logits(task, unit, j))
        b = maximum(b, full_logits(task, unit, j + 1))
        c = maximum(c, full_logits(task, unit, j + 2))
        d = maximum(d, full_logits(task, unit, j + 3))
    m = maximum(maximum(a, b), maximum(c, d))
    for j in range(grouped, n_whole):
        m = maximum(m, full_logits(task, unit, j))
    for j in range(n_whole, stop):
        m = maximum(m, where(unit.reads, logits(task, unit, j, unit.reads), -INF))
    return m


# ----------------------------------------------------------------------------------------------------
# The statistics of rows, or of parts of them
# ----------------------------------------------------------------------------------------------------

# m in the logits' precision; the sums s = s_max + s_rest, Q, D, E in float64, of which s and E carry exp_scaled's factor
# 2**UP. s_max holds the terms of 1, if they are summed apart: see ``sums_of`` and ``reduce.split_sum``.
State = namedtuple("State", "m s_max s_rest q_sum q_dot e_dot")

NAN, SMALLEST_Q = float("nan"), 1e-200
CONFIDENT = 0.0625  # r below which a row's 1 + r is no factor of a product of many rows' s


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


# ----------------------------------------------------------------------------------------------------
# Class indices, loss, gradient
# ----------------------------------------------------------------------------------------------------

Label = namedtuple("Label", "raw_x_y w_y")  # stored logit (in the logits' precision) and class weight (float64) of class y


@njit(**INLINE)
def gather_labels(task, unit):
    """x_y of 16 rows. Of few classes each is looked at, for some processors with AVX-512 take long to gather."""
    if WIDE and task.packed:
        if task.n_classes <= LANES:
            y, c = where(unit.kept, as_floats(task.x, unit.y), -1.0), splat(task.x, 0.0)
            x_y = c
            for j in range(task.n_classes):
                x_y = where(y == c, raw_full(task, unit, j), x_y)
                c = c + 1.0
            return x_y
    if task.packed and task.contiguous_lanes:  # their lines have left the nearest caches
        return gather(unit.tile, iota() * itemsize(unit.tile) + unit.y * tile_step(task, unit), unit.kept)
    return gather(task.x + unit.x, unit.x_lanes + unit.y * x_step(task), unit.kept)


@njit(**INLINE)
def label(task, unit):
    """What the class indices point at; taken before anything is written, for g may be x."""
    w_y = splat(task.w, 1.0)
    if not task.labelled:
        return Label(splat(task.x, 0.0), w_y)
    if task.class_lanes:
        y = lane(unit.y, 0)
        x_y = splat(task.x, get(task.x + unit.x, y * itemsize(task.x)))
        if task.weighted != 0:
            w_y = splat(w_y, get(task.w, 8 * y))
    else:
        x_y = gather_labels(task, unit)
        if task.weighted != 0:
            w_y = gather(task.w, unit.y * 8, unit.kept)
    return Label(x_y, w_y)


@njit(**INLINE)
def sample_weights(task, unit):
    if task.sampled != 0:
        return row_values(task, task.u, unit.row, unit.row_lanes, unit.kept)
    return splat(task.w, 1.0)


@njit(**INLINE)
def target_sums(task, state, y):
    """Q and D, with what a class index adds."""
    below = widen(capped(task, y.raw_x_y)) - widen(state.m)
    if not task.dense:
        return y.w_y, y.w_y * below
    q_sum, q_dot = state.q_sum * common_weight(task), state.q_dot * common_weight(task)
    if task.labelled:
        q_y = y.w_y * task.confidence
        q_sum, q_dot = q_sum + q_y, q_dot + q_y * below
    return q_sum, q_dot


@njit(**INLINE)
def row_loss(task, unit, state, y):
    """l of every row, float64; 0 for an ignored one."""
    q_sum, q_dot = target_sums(task, state, y)
    log_sum = log_s(state)
    lse = widen(state.m) + log_sum
    loss = (q_sum * log_sum - q_dot) + lse * (lse * task.z)
    return where(unit.kept, loss * sample_weights(task, unit), 0.0)


@njit(**INLINE)
def sum_loss(task, unit, state, y):
    """Of l = log s - D, where Q = 1: the sum of -D over the rows, and the product of s, of which one log does for many rows.

    In a product of many 1 + r, small r would lose digits: confident rows have a log each."""
    _, q_dot = target_sums(task, state, y)
    s = s_of(state) / exp_scale(state.m)
    confident = state.s_rest < state.s_max * CONFIDENT
    if any_lane(confident):
        q_dot, s = where(confident, q_dot - log_s(state), q_dot), where(confident, splat(s, 1.0), s)
    s = where(unit.kept, s, 1.0)
    return 0.0 - sum_rows(task, where(unit.kept, q_dot, 0.0)), multiply_rows(task, s)


# g_c = a e_c - b (q_c / share) and, at y, g_y = scaled(u (Q p_y - q_y)) computed from registers in float64. There p_y - 1 would
# cancel: it is -(s - e_y) / s, and s - e_y = (top - e_y) + beside. So Q p_y - q_y = ((Q - q_y) e_y - q_y (s - e_y)) / s.
# e = exp(x - m), a = scaled(u) Q / s, b = scaled(u) share.
# Class probabilities that are one-hot cancel in the same way: q_y = Q. So of float64 rows, g_c = a (e_c - k q_c) - b q_c with
# k = 1 / Q and b = scaled(u) (s - 1) / s, where k q_y is ``e_hot``, just 1. If Q is too small for that, k is 0, ``q_hot`` nan.
# h_c = a e_c (1 - p_c), p_c = e_c / s. ``wide_a`` is a in float64, for parts of a row that have each another one.
Factors = namedtuple("Factors", "shift power a wide_a b k q_hot e_hot inverse_s g_y")


@njit(**INLINE)
def scaled(task, x):
    """x factor / divisor; float64 logits notice that 1 / divisor would be rounded."""
    divisor = get(task.total, DIVISOR)
    return x * task.factor / divisor if task.double else x * (task.factor / divisor)


@njit(**INLINE)
def factors(task, unit, state, y, to_row):
    """``to_row``: what turns the exponentials that were kept into exp(x - m); see ``split_rows.to_row``."""
    power, rest = to_row
    u = sample_weights(task, unit)
    b = where(unit.kept, scaled(task, u), 0.0)
    q_sum, _ = target_sums(task, state, y)
    q_y = y.w_y * (task.confidence + task.uniform) if task.dense else y.w_y
    if task.z != 0.0:  # not always: the gradient would have to wait for the log
        q_sum = q_sum + (widen(state.m) + log_s(state)) * (2.0 * task.z)
    shift = shift_by(state.m)
    s = s_of(state)
    inverse_s = where(unit.kept, splat(b, 1.0) / s, 0.0)  # s of an ignored row in the lanes is 0
    share_of_s = u * q_sum / s if task.double else u * q_sum * inverse_s  # float64 logits notice the one rounding more
    a = where(unit.kept, scaled(task, share_of_s) * rest, 0.0)
    g_y = q_y
    if task.labelled:
        e_y = widen(exp_scaled(capped(task, y.raw_x_y), shift))
        others = (state.s_max - e_y) + state.s_rest
        g_s = (q_sum - q_y) * e_y - q_y * others
        g_y = where(unit.kept, scaled(task, u * (g_s / s if task.double else g_s * inverse_s)), 0.0)
    x = task.x
    b, k, q_hot, e_hot = b * common_weight(task), splat(task.w, 0.0), q_sum, q_sum
    if task.soft and task.double:
        one = exp_scale(task.x)
        proper = unit.kept & (absolute(q_sum) > SMALLEST_Q) & (splat(s, task.z) == 0.0)
        b = where(proper, b * (((state.s_max - one) + state.s_rest) / s), b)
        e_hot = splat(k, one) / rest
        k, q_hot = where(proper, e_hot / q_sum, 0.0), where(proper, q_sum, NAN)
    g_y = through_cap(task, y.raw_x_y, narrow(x, g_y))
    return Factors(
        shift, power, narrow(x, a), a, narrow(x, b), narrow(x, k), narrow(x, q_hot), narrow(x, e_hot), narrow(x, inverse_s), g_y
    )
