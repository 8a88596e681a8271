"""Elementwise kernels on contiguous arrays: the binary loss, and the terms of a KL divergence.

Binary: x is the logit of the second of two classes, t its probability, P its extra weight, w the element's weight.
    softplus(x) = log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)),  sigmoid(x) = exp(x - softplus(x))
    l     = w ((1 - t) softplus(x) + P t softplus(-x))
    dl/dx = w ((1 - t) sigmoid(x) - P t sigmoid(-x))
No term of l is negative, so none cancels digits of another.
"""

from fastxent._abi.argument_block import DIVISOR
from fastxent._abi.variant import POINTS
from fastxent._kernels.addressing import sum_rows
from fastxent._kernels.compensated_sums import total_over_classes, widen_add
from fastxent._kernels.reduce import concatenated
from fastxent._simd.elementary import exp_negative
from fastxent._simd.lanes import fold
from fastxent._simd.logarithm import log1p_to_1, x_log_x
from fastxent._simd.memory import get, itemsize, load_masked, store_each, store_masked
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, WIDE, absolute, all_lanes, at_least, first_lanes, fma, splat, where

# Each of these reads vector j of an array: 16 elements, of which only the lanes in ``mask`` are read.


@inlined
def logits_at(task, mask, j):
    return load_masked(task.x + j * LANES * itemsize(task.x), mask)


@inlined
def targets_at(task, mask, j):
    return load_masked(task.t + j * LANES * itemsize(task.t), mask)


@inlined
def periodic(p, period, mask, j):
    """Return vector j of an array with this period, of which one period and 16 more elements are stored at ``p``."""
    first = j * LANES
    if first >= period:
        first = 0 if period == 1 else first % period
    return load_masked(p + first * itemsize(p), mask)


@inlined
def weights_at(task, mask, j):
    return periodic(task.w, task.w_period, mask, j)


@inlined
def positive_weights_at(task, mask, j):
    return periodic(task.u, task.u_period, mask, j)


# Each ``formula`` returns loss and gradient of ``size`` vectors from vector j on, whose steps are interleaved.


def binary_loss(size):
    """Return the formula of the binary loss."""
    several = concatenated(size)

    @inlined
    def formula(task, mask, j, factor):
        x, t = several(logits_at, task, mask, j), several(targets_at, task, mask, j)
        negative, positive = splat(t, 1.0) - t, t
        if task.sampled != 0:
            positive = t * several(positive_weights_at, task, mask, j)
        weight = negative
        if task.weighted != 0:
            weight = several(weights_at, task, mask, j)
        e = exp_negative(absolute(x) * -1.0)
        log1p_e = log1p_to_1(e)
        loss = fma(negative, log1p_e + at_least(x, 0.0), positive * (log1p_e + at_least(x * -1.0, 0.0)))
        if task.weighted != 0:
            loss = loss * weight
        g = loss
        if task.differentiate:
            larger = splat(e, 1.0) / (e + 1.0)
            smaller = e * larger
            up_hill, down_hill = where(x > 0.0, larger, smaller), where(x > 0.0, smaller, larger)
            g = (negative * up_hill - positive * down_hill) * factor
            if task.weighted != 0:
                g = g * weight
        return loss, g

    return formula


def divergence_term(size):
    """Return the formula of t (log t - x), where x is the logarithm of a probability."""
    several = concatenated(size)

    @inlined
    def formula(task, mask, j, factor):
        x, t = several(logits_at, task, mask, j), several(targets_at, task, mask, j)
        term = x_log_x(t) - t * x
        return term, term

    return formula


def divergence_term_of_logs(size):
    """Return the formula of exp(t) (t - x). A t above 0 is no logarithm of a probability, but may occur."""
    several = concatenated(size)

    @inlined
    def formula(task, mask, j, factor):
        x, t = several(logits_at, task, mask, j), several(targets_at, task, mask, j)
        e = exp_negative(absolute(t) * -1.0)
        term = where(t > 0.0, splat(e, 1.0) / e, e) * (t - x)
        return term, term

    return formula


def pointwise(formula):
    """Return a ``visit`` that computes the sum of the losses of a unit's elements, and stores losses and gradient if wanted."""
    one, two, four = formula(1), formula(2), formula(4)

    @inlined
    def group(task, mask, j, factor):
        """Choose the number of vectors that keeps the processor busy: it does not look far enough ahead by itself."""
        if not WIDE:
            return one(task, mask, j, factor)
        if task.double:
            return two(task, mask, j, factor)
        return four(task, mask, j, factor)

    @inlined
    def visit(task, tile, number):
        first = number * POINTS // LANES
        n = min(task.n_rows - number * POINTS, POINTS)
        size = (2 if task.double else 4) if WIDE else 1  # vectors of a group
        in_groups = first + n // LANES // size * size
        factor = task.factor / get(task.total, DIVISOR)
        nothing = splat(task.total, 0.0)
        total = nothing, nothing
        mask = all_lanes()
        for j in range(first, in_groups, size):
            loss, g = group(task, mask, j, factor)
            total = widen_add(task, total, fold(loss))
            if task.store_loss != 0:
                store_each(task.loss + j * LANES * itemsize(task.loss), loss, LANES * itemsize(task.loss))
            if task.differentiate:
                store_each(task.g + j * LANES * itemsize(task.g), g, LANES * itemsize(task.g))
        for j in range(in_groups, first + (n + LANES - 1) // LANES):
            mask = first_lanes(n - (j - first) * LANES)
            loss, g = one(task, mask, j, factor)
            total = widen_add(task, total, where(mask, loss, 0.0))
            if task.store_loss != 0:
                store_masked(task.loss + j * LANES * itemsize(task.loss), loss, mask)
            if task.differentiate:
                store_masked(task.g + j * LANES * itemsize(task.g), g, mask)
        return sum_rows(task, total_over_classes(task, total)), 1.0

    return visit


binary = pointwise(binary_loss)
divergence, divergence_of_logs = pointwise(divergence_term), pointwise(divergence_term_of_logs)
