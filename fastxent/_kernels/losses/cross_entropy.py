"""Cross-entropy: its derivation, then its row formula.

Letters (a row is one position of the axes other than the class axis; C classes, logits x)
    m = max_c x_c        s = sum_c exp(x_c - m)        lse = m + log s        p_c = exp(x_c - m) / s

Against target weights q_c (a row's class probabilities t, smoothed by eps, times class weights w)
    q_c = w_c ((1 - eps) t_c + eps / C)        Q = sum_c q_c        D = sum_c q_c (x_c - m)
    l          = -sum_c q_c log p_c = sum_c q_c (m + log s - x_c) = Q log s - D
    dl/dx_c    = Q p_c - q_c
    d2l/dx_c^2 = Q p_c (1 - p_c)
A class index y means t = onehot(y). Without smoothing, only q_y = w_y is not 0:
    l          = w_y (log s + (m - x_y))
    dl/dx_c    = w_y (p_c - [c = y])
z-loss adds z lse^2 to l and 2 z lse p_c to the gradient (Q becomes Q + 2 z lse there). Softcap replaces x by cap tanh(x / cap).
A sample weight u multiplies a row's l and gradient; the gradient of a mean is divided by its divisor (``scaled``).

In the form of ``gradient``, g_c = e_c (a + a1 d_c) - b q_c, that is
    a = u (Q + 2 z lse) / s        a1 = 0        b = u
Two differences would lose digits by cancellation, so they are computed from other terms:
    p_y - 1 is -(s - e_y) / s, and s - e_y = (s_max - e_y) + s_rest. So Q p_y - q_y = ((Q - q_y) e_y - q_y (s - e_y)) / s.
    For one-hot class probabilities, q_y = Q. So float64 rows use g_c = a (e_c - k q_c) - b q_c with k = 1 / Q and
    b = u (s - 1) / s, where k q_y is replaced by ``e_hot``, exactly 1. If Q is too small for that, k is 0 and ``q_hot`` is nan.
"""

from fastxent._kernels.addressing import multiply_rows, put_rows, sum_rows
from fastxent._kernels.gradient import Coefficients, scaled
from fastxent._kernels.inputs import common_weight, sample_weights, through_cap, transformed
from fastxent._kernels.online_softmax import log_s, s_of
from fastxent._simd.elementary import exp_scale, exp_scaled, shift_by
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import absolute, any_lane, narrow, splat, where, widen

NAN, SMALLEST_Q = float("nan"), 1e-200
CONFIDENT = 0.0625  # a row with r below this has a log of its own: in a product of many rows' s, 1 + r would lose digits


@inlined
def target_sums(task, state, y):
    """Return Q and D, including the terms of a class index."""
    below = widen(transformed(task, y.raw_x_y)) - widen(state.m)
    if not task.dense:
        return y.w_y, y.w_y * below
    q_sum, q_dot = state.q_sum * common_weight(task), state.q_dot * common_weight(task)
    if task.labelled:
        q_y = y.w_y * task.confidence
        q_sum, q_dot = q_sum + q_y, q_dot + q_y * below
    return q_sum, q_dot


@inlined
def row_loss(task, unit, state, y):
    """Return l of every row, in float64; 0 for an ignored one."""
    q_sum, q_dot = target_sums(task, state, y)
    log_sum = log_s(state)
    lse = widen(state.m) + log_sum
    loss = (q_sum * log_sum - q_dot) + lse * (lse * task.z)
    return where(unit.kept, loss * sample_weights(task, unit), 0.0)


@inlined
def sum_loss(task, unit, state, y):
    """Return the sum of -D over the rows and the product of their s: with Q = 1, l = log s - D, and one log does for many rows.

    In a product of many 1 + r, a small r would lose digits: so confident rows have a log each.
    """
    _, q_dot = target_sums(task, state, y)
    s = s_of(state) / exp_scale(state.m)
    confident = state.s_rest < state.s_max * CONFIDENT
    if any_lane(confident):
        q_dot, s = where(confident, q_dot - log_s(state), q_dot), where(confident, splat(s, 1.0), s)
    s = where(unit.kept, s, 1.0)
    return 0.0 - sum_rows(task, where(unit.kept, q_dot, 0.0)), multiply_rows(task, s)


@inlined
def put_loss(task, unit, state, y):
    """Store the rows' losses if they are wanted; return their sum, as ``parallel_for`` takes it: an addend and a factor."""
    plain = task.weighted == 0 and task.sampled == 0 and task.z == 0.0 and not task.soft  # Q = 1: l = log s - D
    if plain and task.store_loss == 0 and not task.double:
        rest, product = sum_loss(task, unit, state, y)
        return rest, product
    loss = row_loss(task, unit, state, y)
    if task.store_loss != 0:
        put_rows(task, task.loss, unit, narrow(task.loss, loss))
    return sum_rows(task, loss), 1.0


@inlined
def put_zero_loss(task, unit):
    """Store zero losses if they are wanted: all of the unit's rows are ignored."""
    if task.store_loss != 0:
        put_rows(task, task.loss, unit, splat(task.loss, 0.0))
    return 0.0, 1.0


@inlined
def coefficients(task, unit, state, y, to_row):
    """Return the gradient's coefficients. ``to_row`` turns stored exponentials into exp(x - m): see ``split_rows.to_row``."""
    power, rest = to_row
    u = sample_weights(task, unit)
    b = where(unit.kept, scaled(task, u), 0.0)
    q_sum, _ = target_sums(task, state, y)
    q_y = y.w_y * (task.confidence + task.uniform) if task.dense else y.w_y
    if task.z != 0.0:  # only with z-loss, for the gradient has to wait for the log
        q_sum = q_sum + (widen(state.m) + log_s(state)) * (2.0 * task.z)
    shift = shift_by(state.m)
    s = s_of(state)
    inverse_s = where(unit.kept, splat(b, 1.0) / s, 0.0)  # with row lanes, an ignored row has s = 0
    q_over_s = u * q_sum / s if task.double else u * q_sum * inverse_s  # float64 results would show the extra rounding
    a = where(unit.kept, scaled(task, q_over_s) * rest, 0.0)
    g_y = q_y
    if task.labelled:
        e_y = widen(exp_scaled(transformed(task, y.raw_x_y), shift))
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
    return Coefficients(
        shift, power, narrow(x, a), a, splat(x, 0.0), state.m, narrow(x, b), narrow(x, k), narrow(x, q_hot), narrow(x, e_hot),
        narrow(x, inverse_s), g_y,
    )  # fmt: skip
