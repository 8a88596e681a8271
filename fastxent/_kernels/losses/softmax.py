"""Softmax, its logarithm and log-sum-exp, without a target: each function takes the number of one unit."""

from fastxent._kernels.addressing import locate, put_rows, unscaled, write_out, write_tile
from fastxent._kernels.gradient import exponentials
from fastxent._kernels.inputs import logits
from fastxent._kernels.online_softmax import log_s, s_of
from fastxent._kernels.split_rows import row_state, to_row
from fastxent._simd.elementary import shift_by
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import all_lanes, narrow, widen


@inlined
def softmax(task, tile, number):
    """Write p_c = exp(x_c - m) / s."""
    unit = locate(task, tile, number)
    state = row_state(task, unit, number)
    power, rest = to_row(task, number, state)
    shift, inverse_s = shift_by(state.m), narrow(task.x, rest / s_of(state))
    for j in range(unit.start, unit.stop):
        mask = all_lanes() if j < unit.full else unit.writes
        write_out(task, unit, j, exponentials(task, unit, j, mask, shift, power) * inverse_s, mask)
    write_tile(task, unit, *unscaled(task))
    return 0.0, 1.0


@inlined
def log_softmax(task, tile, number):
    """Write log p_c = (x_c - m) - log s, computed in float64. Not x_c - lse: at a large m, lse loses the digits of log s."""
    unit = locate(task, tile, number)
    state = row_state(task, unit, number)
    m, log_sum = widen(state.m), log_s(state)
    for j in range(unit.start, unit.stop):
        mask = all_lanes() if j < unit.full else unit.writes
        log_p = (widen(logits(task, unit, j, mask)) - m) - log_sum
        write_out(task, unit, j, narrow(task.x, log_p), mask)
    write_tile(task, unit, *unscaled(task))
    return 0.0, 1.0


@inlined
def logsumexp(task, tile, number):
    """Write lse = m + log s."""
    unit = locate(task, tile, number)
    state = row_state(task, unit, number)
    if not task.split or unit.start == 0:
        put_rows(task, task.lse, unit, narrow(task.lse, widen(state.m) + log_s(state)))
    return 0.0, 1.0
