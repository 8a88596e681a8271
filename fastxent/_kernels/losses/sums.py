"""Sums over classes that are no softmax: each function takes one unit of rows, as in ``steps``."""

from fastxent._kernels.addressing import locate, put_rows
from fastxent._kernels.compensated_sums import halve_lanes, total_over_classes, widen_add
from fastxent._kernels.inputs import full_logits, logits, target_weights
from fastxent._kernels.online_softmax import INF
from fastxent._kernels.reduce import concatenated
from fastxent._simd.elementary import exp_scale, exp_scaled, shift_by
from fastxent._simd.lanes import fold, max_across
from fastxent._simd.logarithm import log, log1p, x_log_x
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import WIDE, absolute, all_lanes, any_lane, maximum, narrow, splat, where, widen


@inlined
def reads(unit, j):
    """Return the mask of the lanes of vector j that are read."""
    return all_lanes() if j < unit.full else unit.reads


@inlined
def empty_total(task):
    """Return a sum of nothing and its rounding error."""
    nothing = widen(halve_lanes(task, splat(task.x, 0.0)))
    return nothing, nothing


def group_of_terms(size):
    """Return a function that sums x log x over ``size`` vectors from j on, interleaved."""
    several = concatenated(size)
    return inlined(lambda task, unit, j: fold(x_log_x(several(full_logits, task, unit, j))))


one, two, four = group_of_terms(1), group_of_terms(2), group_of_terms(4)


@inlined
def group_terms(task, unit, j):
    """Choose the number of vectors that keeps the processor busy: it does not look far enough ahead by itself."""
    if not WIDE:
        return one(task, unit, j)
    if task.double:
        return two(task, unit, j)
    return four(task, unit, j)


@inlined
def group_size(task):
    """Return the number of vectors that ``group_terms`` takes."""
    return (2 if task.double else 4) if WIDE else 1


@inlined
def entropy(task, tile, number):
    """Write -sum_c p_c log p_c, where the logits are probabilities p_c; 0 log 0 = 0."""
    unit = locate(task, tile, number)
    total = empty_total(task)
    in_groups = unit.full // group_size(task) * group_size(task)
    for j in range(0, in_groups, group_size(task)):
        total = widen_add(task, total, group_terms(task, unit, j))
    for j in range(in_groups, unit.stop):
        total = widen_add(task, total, x_log_x(logits(task, unit, j, reads(unit, j))))
    h = splat(task.w, 0.0) - total_over_classes(task, total)
    put_rows(task, task.entropy, unit, narrow(task.entropy, h))
    return 0.0, 1.0


@inlined
def exponents(task, unit, j):
    """Return x, and b, which takes the place of target weights; where b is 0, x counts as -inf."""
    mask = reads(unit, j)
    b = target_weights(task, unit, j, mask)
    return where(b == 0.0, splat(b, -INF), logits(task, unit, j, mask)), b


@inlined
def logsumexp_of_products(task, tile, number):
    """Write log |sum_c b_c exp(x_c)| and the sum's sign.

    With B = sum of b_c over the classes with x_c = m, and R = sum of b_c exp(x_c - m) over the others, the log is
    m + log |B| + log1p(R / B), which keeps the digits of a small R. Where R is not small it may cancel B, so there the log is
    computed as m + log |B + R|.
    """
    unit = locate(task, tile, number)
    m = splat(task.x, -INF)
    for j in range(unit.start, unit.stop):
        m = maximum(m, exponents(task, unit, j)[0])
    if task.class_lanes:
        m = max_across(m)
    shift, down = shift_by(m), 1.0 / exp_scale(task.x)
    # exp(x - m) at x = m: 1, but inf where m = inf (inf - inf would be nan), and 0 where m = -inf (only exp(-inf) is 0).
    size = where(m == INF, m, where(m == -INF, splat(m, 0.0), 1.0))
    top, rest = empty_total(task), empty_total(task)
    for j in range(unit.start, unit.stop):
        x, b = exponents(task, unit, j)
        is_top = x == m
        if any_lane(is_top):
            top = widen_add(task, top, where(is_top, b * size, 0.0))
        rest = widen_add(task, rest, where(is_top | (b == 0.0), splat(b, 0.0), exp_scaled(x, shift) * down * b))
    top, rest = total_over_classes(task, top), total_over_classes(task, rest)
    total, ratio, m = top + rest, rest / top, widen(m)
    close = absolute(ratio) <= 0.5
    by_ratio = (m + log(absolute(top))) + log1p(where(close, ratio, 0.0))
    put_rows(task, task.lse, unit, narrow(task.lse, where(close, by_ratio, m + log(absolute(total)))))
    sign = where(total > 0.0, splat(total, 1.0), where(total < 0.0, splat(total, -1.0), total))
    put_rows(task, task.sign, unit, narrow(task.sign, sign))
    return 0.0, 1.0
