"""Cross-entropy of rows whose classes lie on several processes (vocabulary-parallel): what each does to its own shard.

Shard r has the maximum m_r and the sums s_r, D_r of its own classes. With M = max_r m_r and Q_r = sum_c w_c of the shard,
    s = sum_r s_r exp(m_r - M)        lse = M + log s        sum_c w_c (x_c - M) = sum_r (D_r + Q_r (m_r - M))
So ``put_loss`` hands out m_r, log s_r and D_r, and the processes merge them in float64: see ``fastxent.distributed``. No log of
0 is taken where all exponentials of a shard would underflow beside those of another. Then all know M and s, and the gradient
    g_c = a exp(x_c - M) - b w_c eps / C        a = b (Q + 2 z lse) / s,  b the row's factor
needs no sums of the row: the logits are read once. M, a, b and the gradient at the class index are given row by row. The class
index is of this shard: any class of it if the row's target lies in another one.
"""

from fastxent._kernels.addressing import locate, put_rows, row_values, unscaled, write_tile
from fastxent._kernels.gradient import Coefficients, write_gradient
from fastxent._kernels.inputs import common_weight
from fastxent._kernels.online_softmax import log_s
from fastxent._kernels.prefetch import write_zeros
from fastxent._simd.elementary import exp_scale, shift_by
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import any_lane, narrow, splat, where


@inlined
def put_loss(task, unit, state, y):
    """Write m, log s and, with label smoothing, D; 0 for an ignored row."""
    put_rows(task, task.lse, unit, where(unit.kept, state.m, 0.0))
    put_rows(task, task.v, unit, where(unit.kept, log_s(state), 0.0))
    if task.dense:
        d = where(unit.kept, state.q_dot * common_weight(task), 0.0)
        put_rows(task, task.b, unit, d)
    return 0.0, 1.0


@inlined
def put_zero_loss(task, unit):
    """Write zeros: all of the unit's rows are ignored."""
    zero = splat(task.v, 0.0)
    put_rows(task, task.lse, unit, splat(task.lse, 0.0))
    put_rows(task, task.v, unit, zero)
    if task.dense:
        put_rows(task, task.b, unit, zero)
    return 0.0, 1.0


@inlined
def of_rows(task, unit, p):
    """Return the values of the unit's rows in an array (rows,), 0 for ignored ones."""
    return where(unit.kept, row_values(task, p, unit.row, unit.row_lanes, unit.kept), 0.0)


@inlined
def gradient(task, tile, number):
    """Write the gradient of one unit."""
    unit = locate(task, tile, number)
    tile_update = unscaled(task)
    if any_lane(unit.kept):
        x, none = task.x, splat(task.x, 0.0)
        m = narrow(x, of_rows(task, unit, task.v))
        a = of_rows(task, unit, task.u) / exp_scale(m)
        b = narrow(x, of_rows(task, unit, task.b) * common_weight(task)) if task.dense else none
        f = Coefficients(
            shift_by(m), splat(x, 1.0), narrow(x, a), a, none, none, b, none, none, none, none,
            narrow(x, of_rows(task, unit, task.g_y)),
        )  # fmt: skip
        tile_update = write_gradient(task, unit, f)
    else:
        write_zeros(task, unit)
    write_tile(task, unit, *tile_update)
    return 0.0, 1.0
