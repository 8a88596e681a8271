"""Loss, log-sum-exp, entropy, prediction, and the target class's probability and rank, in one kernel."""

from fastxent._kernels.addressing import locate, put_rows, row_values, x_step
from fastxent._kernels.inputs import label, logits, transformed
from fastxent._kernels.losses.cross_entropy import put_loss, put_zero_loss
from fastxent._kernels.online_softmax import log_s, s_of
from fastxent._kernels.reduce import span_state
from fastxent._simd.elementary import exp_scaled, shift_by
from fastxent._simd.lanes import min_across, sum_across
from fastxent._simd.memory import gather, get, itemsize
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, all_lanes, any_lane, iota, lane, narrow, splat, where, widen

NONE = 1 << 62  # larger than every class number


@inlined
def class_numbers(task, j):
    """Return the class number of each lane of vector j."""
    if task.class_lanes:
        return iota() + j * LANES
    return splat(task.y, j)


@inlined
def stats(task, tile, number):
    """Write the statistics of one unit's rows.

    lse = m + log s;  entropy = -sum_c p_c log p_c = log s - E / s;  target_prob = exp(x_y - m) / s;  prediction = first class
    with x_c = m (the first nan, if there is one, as in argmax);  target_rank = number of classes that come before y when
    classes are sorted by falling logit, equal ones by number.
    """
    unit = locate(task, tile, number)
    zero, nothing = splat(task.w, 0.0), splat(task.y, -1)
    if not any_lane(unit.kept):
        for p in (task.lse, task.entropy, task.target_prob):
            put_rows(task, p, unit, narrow(p, zero))
        put_rows(task, task.prediction, unit, nothing)
        put_rows(task, task.target_rank, unit, nothing)
        return put_zero_loss(task, unit)
    state = span_state(task, unit)
    y = row_values(task, task.y, unit.row, unit.row_lanes, unit.kept)
    if task.class_lanes:
        x_y = splat(task.x, get(task.x + unit.x, lane(y, 0) * itemsize(task.x)))
    else:
        x_y = gather(task.x + unit.x, unit.x_lanes + y * x_step(task), unit.kept)
    x_y = transformed(task, x_y)

    none, one, no = splat(y, NONE), splat(y, 1), splat(y, 0)
    first_max, first_nan, rank = none, none, no
    for j in range(unit.start, unit.stop):
        mask = all_lanes() if j < unit.full else unit.reads
        x = logits(task, unit, j, mask)
        c = class_numbers(task, j)
        is_nan = mask & (x != x)
        first_max = where(mask & (x == state.m) & (c < first_max), c, first_max)
        first_nan = where(is_nan & (c < first_nan), c, first_nan)
        ahead = (x > x_y) | ((x == x_y) & (c < y)) | (is_nan & ((x_y == x_y) | (c < y)))
        rank = rank + where(mask & ahead, one, no)
    if task.class_lanes:
        first_max, first_nan, rank = min_across(first_max), min_across(first_nan), sum_across(rank)
    prediction = where(first_nan < none, first_nan, first_max)

    kept = unit.kept
    log_sum = log_s(state)
    p_y = widen(exp_scaled(x_y, shift_by(state.m))) / s_of(state)
    put_rows(task, task.lse, unit, narrow(task.lse, where(kept, widen(state.m) + log_sum, 0.0)))
    put_rows(task, task.entropy, unit, narrow(task.lse, where(kept, log_sum - state.e_dot / s_of(state), 0.0)))
    put_rows(task, task.target_prob, unit, narrow(task.lse, where(kept, p_y, 0.0)))
    put_rows(task, task.prediction, unit, where(kept, prediction, nothing))
    put_rows(task, task.target_rank, unit, where(kept, rank, nothing))
    return put_loss(task, unit, state, label(task, unit))
