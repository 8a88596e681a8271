"""Focal loss: cross-entropy of a class index, of which confident rows get less.

With L = log p_y, r = 1 - p_y and the class weight w = w_y
    l      = -w r^gamma L
    dl/dL  = -w (r^gamma - gamma p_y r^(gamma - 1) L) = -F
    dL/dx_c = [c = y] - p_c        dl/dx_c = F (p_c - [c = y])
So a row's gradient is that of its cross-entropy times F, and the form g_c = e_c (a + a1 d_c) - b q_c of ``gradient`` has
    a = u F / s        a1 = 0        b = 0,    and at y, g_y = -u F r
r is ((s_max - e_y) + s_rest) / s, for 1 - p_y would lose digits. Where r is 0, so is L, and p_y r^(gamma - 1) L is -r^gamma.
"""

from fastxent._kernels.addressing import put_rows, sum_rows
from fastxent._kernels.gradient import Coefficients, scaled
from fastxent._kernels.inputs import sample_weights, transformed
from fastxent._kernels.losses.cross_entropy import put_zero_loss  # noqa: F401  # as for cross-entropy
from fastxent._kernels.online_softmax import log_s, s_of
from fastxent._simd.elementary import exp_negative, exp_scaled, shift_by
from fastxent._simd.logarithm import log
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import at_least, narrow, splat, where, widen


@inlined
def of_target(task, state, y):
    """Return log p_y, p_y, 1 - p_y and (1 - p_y)^gamma of every row, in float64."""
    s, x_y = s_of(state), transformed(task, y.raw_x_y)
    e_y = widen(exp_scaled(x_y, shift_by(state.m)))
    log_p = (widen(x_y) - widen(state.m)) - log_s(state)
    r = at_least(((state.s_max - e_y) + state.s_rest) / s, 0.0)  # float32 sums may round below e_y
    at_0 = splat(r, 1.0 if task.gamma == 0.0 else 0.0)
    return log_p, e_y / s, r, where(r == 0.0, at_0, exp_negative(log(r) * task.gamma))


@inlined
def put_loss(task, unit, state, y):
    """Store the rows' losses if they are wanted; return their sum."""
    log_p, _, _, power = of_target(task, state, y)
    loss = where(unit.kept, (splat(log_p, 0.0) - log_p * power) * (y.w_y * sample_weights(task, unit)), 0.0)
    if task.store_loss != 0:
        put_rows(task, task.loss, unit, narrow(task.loss, loss))
    return sum_rows(task, loss), 1.0


@inlined
def coefficients(task, unit, state, y, to_row):
    """Return the gradient's coefficients. ``to_row``: see ``split_rows.to_row``."""
    x, s, (power_of_2, rest) = task.x, s_of(state), to_row
    log_p, p, r, power = of_target(task, state, y)
    p_log_p = where(p == 0.0, p, p * log_p)
    slope = where(r == 0.0, splat(r, 0.0) - power, p_log_p * power / r)
    f = (power - slope * task.gamma) * (y.w_y * sample_weights(task, unit))
    f = where(unit.kept, scaled(task, f), 0.0)  # with row lanes, an ignored row has s = 0
    a, inverse_s = where(unit.kept, f / s, 0.0), narrow(x, where(unit.kept, splat(s, 1.0) / s, 0.0))
    none, g_y = splat(x, 0.0), where(unit.kept, (splat(r, 0.0) - r) * f, 0.0)
    return Coefficients(
        shift_by(state.m), power_of_2, narrow(x, a * rest), a * rest, none, state.m, none, none, none, none, inverse_s,
        narrow(x, g_y),
    )  # fmt: skip
