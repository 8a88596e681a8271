"""Log-probability of the class index and entropy of p = softmax(x / temperature), per row, as policy gradients need them.

With x for x / temperature, m = max_c x_c, d_c = x_c - m, e_c = exp(d_c), s = sum_c e_c and E = sum_c e_c d_c
    log p_y = (x_y - m) - log s              H = -sum_c p_c log p_c = log s - E / s
    d log p_y / dx_c = [c = y] - p_c         dH/dx_c = -p_c (log p_c + H) = p_c (E / s - d_c)
With u and v, the incoming gradients of log p_y and of H, the form g_c = e_c (a + a1 d_c) of ``gradient`` has
    a = (v E / s - u) / s        a1 = -v / s
and at y, where the difference 1 - p_y = (s - e_y) / s would lose digits by cancellation,
    g_y = (u ((s_max - e_y) + s_rest) + v e_y (E / s - d_y)) / s
The gradient is divided by the temperature once more: 1 / temperature is the task's ``factor``.
"""

from fastxent._kernels.addressing import put_rows, row_values
from fastxent._kernels.gradient import Coefficients, scaled
from fastxent._kernels.inputs import sample_weights, transformed
from fastxent._kernels.online_softmax import log_s, s_of
from fastxent._simd.elementary import exp_scaled, shift_by
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import narrow, splat, where, widen


@inlined
def put_loss(task, unit, state, y):
    """Store log p_y and H of every row if they are wanted: 0 for an ignored row."""
    if task.store_loss != 0:
        log_sum = log_s(state)
        log_p = (widen(transformed(task, y.raw_x_y)) - widen(state.m)) - log_sum
        put_rows(task, task.loss, unit, narrow(task.loss, where(unit.kept, log_p, 0.0)))
        h = log_sum - state.e_dot / s_of(state)
        put_rows(task, task.entropy, unit, narrow(task.entropy, where(unit.kept, h, 0.0)))
    return 0.0, 1.0


@inlined
def put_zero_loss(task, unit):
    """Store zeros if results are wanted: all of the unit's rows are ignored."""
    if task.store_loss != 0:
        put_rows(task, task.loss, unit, splat(task.loss, 0.0))
        put_rows(task, task.entropy, unit, splat(task.entropy, 0.0))
    return 0.0, 1.0


@inlined
def coefficients(task, unit, state, y, to_row):
    """Return the gradient's coefficients. ``to_row``: see ``split_rows.to_row``."""
    x, s, (power, rest) = task.x, s_of(state), to_row
    u = where(unit.kept, scaled(task, sample_weights(task, unit)), 0.0)
    v = where(unit.kept, scaled(task, row_values(task, task.v, unit.row, unit.row_lanes, unit.kept)), 0.0)
    mean_d = where(unit.kept, state.e_dot / s, 0.0)  # with row lanes, an ignored row has s = 0
    a, a1 = where(unit.kept, (v * mean_d - u) / s, 0.0), where(unit.kept, (splat(s, 0.0) - v) / s, 0.0)
    shift, x_y = shift_by(state.m), transformed(task, y.raw_x_y)
    e_y = widen(exp_scaled(x_y, shift))
    of_entropy = where(e_y == 0.0, e_y, e_y * (mean_d - (widen(x_y) - widen(state.m))))
    g_y = where(unit.kept, (u * ((state.s_max - e_y) + state.s_rest) + v * of_entropy) / s, 0.0)
    none, inverse_s = splat(x, 0.0), narrow(x, where(unit.kept, splat(s, 1.0) / s, 0.0))
    m = where(unit.kept, state.m, 0.0)  # an ignored row has m = -inf: 0 times x - m would be nan
    return Coefficients(
        shift, power, narrow(x, a * rest), a * rest, narrow(x, a1 * rest), m, none, none, none, none, inverse_s,
        narrow(x, g_y),
    )  # fmt: skip
