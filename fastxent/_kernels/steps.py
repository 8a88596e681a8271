"""The kernels: what each does with one unit of rows; what a thread runs.

By the formulas of ``inputs``, the loops of ``reduce`` and ``gradient``; ``split_rows`` for rows that are split. Those that
work on several units beside each other are in ``schedules``, those that are no softmax in ``sums`` and ``pointwise``.
"""

from numba import njit

from fastxent._abi.argument_block import BAD, CHECK, DIVISOR, SEGMENTS, WORK
from fastxent._abi.variant import CHECKED, CHECKS
from fastxent._kernels.addressing import (
    g_step,
    locate,
    put_rows,
    row_values,
    sum_rows,
    unscaled,
    write,
    write_out,
    write_tile,
    x_step,
)
from fastxent._kernels.gradient import exponentials, write_gradient
from fastxent._kernels.inputs import factors, label, log_s, logits, row_loss, s_of, sum_loss
from fastxent._kernels.parallel_for import barrier, one_by_one, parallel_for, thread_number
from fastxent._kernels.prefetch import write_zeros
from fastxent._kernels.reduce import span_state
from fastxent._kernels.split_rows import row_label, row_state, save_segment, to_row
from fastxent._simd.elementary import exp_scaled, shift_by
from fastxent._simd.lanes import min_across, sum_across
from fastxent._simd.memory import call_kernel, gather, get, itemsize, load, load_masked, put
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import (
    LANES,
    all_lanes,
    any_lane,
    count_lanes,
    first_lanes,
    iota,
    lane,
    narrow,
    splat,
    where,
    widen,
)

NAN = float("nan")
NONE = 1 << 62  # past every class number

# ----------------------------------------------------------------------------------------------------
# What each kernel does with unit ``number``; it returns a number and a factor: see ``parallel_for``
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def check_targets(task, tile, number):
    """Class indices -> sum of their weights (the divisor of the mean); notes if one is out of range."""
    n_kept, n_good = 0, 0
    weights = splat(task.w, 0.0)
    whole = (number + 1) * CHECKED <= task.n_rows
    for row in range(number * CHECKED, (number + 1) * CHECKED, LANES):
        if whole:
            rows, y = all_lanes(), load(task.y + 8 * row)
        else:
            rows = first_lanes(task.n_rows - row)
            y = load_masked(task.y + 8 * row, rows)
        kept = rows & (y != task.ignore)
        good = kept & (y >= 0) & (y < task.n_classes)
        n_kept += count_lanes(kept)
        n_good += count_lanes(good)
        if task.weighted != 0 or task.sampled != 0:
            weight = splat(task.w, 1.0)
            if task.weighted != 0:
                weight = gather(task.w, y * 8, good)
            if task.sampled != 0:
                weight = weight * load_masked(task.u + 8 * row, rows)
            weights = weights + where(good, weight, 0.0)
    if n_good < n_kept:
        put(task.total, BAD, 1.0)
    if task.weighted != 0 or task.sampled != 0:
        return lane(sum_across(weights), 0), 1.0
    return float(n_good), 1.0


@njit(**INLINE)
def put_loss(task, unit, state, y):
    """Store the rows' losses if they are wanted; return their sum, as ``parallel_for`` takes it."""
    plain = task.weighted == 0 and task.sampled == 0 and task.z == 0.0 and not task.soft  # Q = 1: l = log s - D
    if plain and task.store_loss == 0 and not task.double:
        rest, product = sum_loss(task, unit, state, y)
        return rest, product
    loss = row_loss(task, unit, state, y)
    if task.store_loss != 0:
        put_rows(task, task.loss, unit, narrow(task.loss, loss))
    return sum_rows(task, loss), 1.0


@njit(**INLINE)
def put_zero_loss(task, unit):
    """All of the unit's rows are ignored."""
    if task.store_loss != 0:
        put_rows(task, task.loss, unit, splat(task.loss, 0.0))
    return 0.0, 1.0


@njit(**INLINE)
def value(task, tile, number):
    """Loss."""
    unit = locate(task, tile, number)
    if task.split and unit.start > 0:
        return 0.0, 1.0
    if not any_lane(unit.kept):
        return put_zero_loss(task, unit)
    y = row_label(task, unit, number)
    return put_loss(task, unit, row_state(task, unit, number), y)


@njit(**INLINE)
def value_and_grad(task, tile, number):
    """Loss and gradient."""
    unit = locate(task, tile, number)
    loss, late = (0.0, 1.0), unscaled(task)
    if any_lane(unit.kept):
        y = row_label(task, unit, number)
        state = row_state(task, unit, number)
        if not task.split or unit.start == 0:
            loss = put_loss(task, unit, state, y)
        late = write_gradient(task, unit, factors(task, unit, state, y, to_row(task, number, state)))
    else:
        if not task.split or unit.start == 0:
            loss = put_zero_loss(task, unit)
        write_zeros(task, unit)
    write_tile(task, unit, *late)
    return loss


@njit(**INLINE)
def hessian_vector(task, unit, j, mask, f, s_max, s_rest):
    """h_c = a e_c (s - e_c) / s, with s - e_c = (top - e_c) + beside."""
    e = exp_scaled(logits(task, unit, j, mask), f.shift)
    return e * f.a * (((s_max - e) + s_rest) * f.inverse_s)


@njit(**INLINE)
def grad_hess(task, tile, number):
    """Gradient and Hessian diagonal, which has the strides of the gradient."""
    unit = locate(task, tile, number)
    zero, late = splat(task.x, 0.0), unscaled(task)
    if any_lane(unit.kept):
        state = span_state(task, unit)
        f = factors(task, unit, state, label(task, unit), to_row(task, number, state))
        s_max, s_rest = narrow(task.x, state.s_max), narrow(task.x, state.s_rest)
        for j in range(unit.start, unit.stop):
            whole = j < unit.full
            reads = all_lanes() if whole else unit.reads
            writes = all_lanes() if whole else unit.writes
            h = hessian_vector(task, unit, j, reads, f, s_max, s_rest)
            write(task, task.h + (unit.g + j * g_step(task)), unit.g_lanes, h, writes)
        late = write_gradient(task, unit, f)
    else:
        for j in range(unit.start, unit.stop):
            mask = all_lanes() if task.class_lanes and j < unit.full else unit.writes
            write(task, task.h + (unit.g + j * g_step(task)), unit.g_lanes, zero, mask)
        write_zeros(task, unit)
    write_tile(task, unit, *late)
    return 0.0, 1.0


@njit(**INLINE)
def class_numbers(task, j):
    """The classes in vector j."""
    if task.class_lanes:
        return iota() + j * LANES
    return splat(task.y, j)


@njit(**INLINE)
def stats(task, tile, number):
    """Loss, log-sum-exp, entropy, and how the target class stands among the others.

    lse = m + log s;  entropy = -sum_c p_c log p_c = log s - E / s;  target_prob = exp(x_y - m) / s;  prediction = first class
    with x_c = m (the first nan, if there is one, as argmax has it);  target_rank = classes that come before y when classes are
    sorted by falling logit, equal ones by number.
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


@njit(**INLINE)
def softmax(task, tile, number):
    """p_c = exp(x_c - m) / s."""
    unit = locate(task, tile, number)
    state = row_state(task, unit, number)
    power, rest = to_row(task, number, state)
    shift, inverse_s = shift_by(state.m), narrow(task.x, rest / s_of(state))
    for j in range(unit.start, unit.stop):
        mask = all_lanes() if j < unit.full else unit.writes
        write_out(task, unit, j, exponentials(task, unit, j, mask, shift, power) * inverse_s, mask)
    write_tile(task, unit, *unscaled(task))
    return 0.0, 1.0


@njit(**INLINE)
def log_softmax(task, tile, number):
    """log p_c = (x_c - m) - log s, in float64. Not x_c - lse: beside a large m, lse has no digits left for log s."""
    unit = locate(task, tile, number)
    state = row_state(task, unit, number)
    m, log_sum = widen(state.m), log_s(state)
    for j in range(unit.start, unit.stop):
        mask = all_lanes() if j < unit.full else unit.writes
        log_p = (widen(logits(task, unit, j, mask)) - m) - log_sum
        write_out(task, unit, j, narrow(task.x, log_p), mask)
    write_tile(task, unit, *unscaled(task))
    return 0.0, 1.0


@njit(**INLINE)
def logsumexp(task, tile, number):
    """lse = m + log s."""
    unit = locate(task, tile, number)
    state = row_state(task, unit, number)
    if not task.split or unit.start == 0:
        put_rows(task, task.lse, unit, narrow(task.lse, widen(state.m) + log_s(state)))
    return 0.0, 1.0


# ----------------------------------------------------------------------------------------------------
# What a thread runs
# ----------------------------------------------------------------------------------------------------

check_all = one_by_one(check_targets)


def check(task, phase, me):
    """A kernel: are all class indices in range, and what do the rows weigh?"""
    parallel_for(task, phase, me, check_all, (task.n_rows + CHECKED - 1) // CHECKED, CHECKS)


work = one_by_one(value)  # what a kernel does with some units: ``compiler`` puts in what it is to do
keep_segment = save_segment  # with task.stores_exp


def kernel(task, phase, me):
    """A kernel: ``work`` on all units."""
    parallel_for(task, phase, me, work, task.n_units, task.chunk)


def launch(task):
    """What every thread of a team runs, with the same argument block: a task's kernels, one after the other.

    Before all class indices are checked, nothing is written, and nothing is read by one of them.
    """
    me = thread_number(task)
    if task.check != 0:
        call_kernel(task.check, task, CHECK, me)
        barrier(task, CHECK)
        if get(task.total, BAD) != 0.0:
            return
        if task.average != 0:  # every thread writes the same
            weight = get(task.total, 8 * CHECK)
            put(task.total, DIVISOR, weight if weight != 0.0 else NAN)
    if task.save_segment != 0:
        call_kernel(task.save_segment, task, SEGMENTS, me)
        barrier(task, SEGMENTS)
    call_kernel(task.kernel, task, WORK, me)
