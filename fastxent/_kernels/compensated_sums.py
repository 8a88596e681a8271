"""Sums over a unit's classes: float32 terms are added in float64, float64 terms by compensated sums (Knuth's two-sum)."""

from fastxent._simd.elementary import exp_scale
from fastxent._simd.lanes import add_halves, sum_across, swap
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import splat, where, widen


@inlined
def two_sum(total, error, x):
    """Return the rounded total + x, and ``error`` plus the rounding error of that addition (Knuth's two-sum)."""
    rounded = total + x
    x_rounded = rounded - total
    return rounded, error + ((total - (rounded - x_rounded)) + (x - x_rounded))


@inlined
def compensated(total, error):
    """Return total + error, or total alone if error is nan: an inf or nan among the terms makes it so, for inf - inf is nan."""
    return total + error if error == error else total


@inlined
def two_sum_across(total, error):
    """Return the sum over the lanes, in each of them, and the rounding errors of all additions."""
    total, error = two_sum(total, error + swap(error, 8), swap(total, 8))
    total, error = two_sum(total, error + swap(error, 4), swap(total, 4))
    total, error = two_sum(total, error + swap(error, 2), swap(total, 2))
    return two_sum(total, error + swap(error, 1), swap(total, 1))


@inlined
def halve_lanes(task, x):
    """Add float32 class lanes in pairs, which halves the number of float64 additions; leave other vectors as they are."""
    if task.class_lanes and not task.double:
        return add_halves(x)
    return x


@inlined
def sum_lanes(task, x):
    """Return the sum over class lanes, in each lane; leave row lanes as they are."""
    if task.class_lanes:
        return sum_across(x)
    return x


@inlined
def widen_add(task, total, x):
    """Add a vector's terms to a sum and its rounding error; that of float32 terms in a float64 sum is too small to count."""
    value, error = total
    x = widen(halve_lanes(task, x))
    if task.double:
        return two_sum(value, error, x)
    return value + x, error


@inlined
def total_over_classes(task, total):
    """Return the sum over all classes of a unit, from the lane-wise sum of its vectors."""
    value, error = total
    if task.double:  # as in ``compensated``: with an inf or nan among the terms the error is nan
        value = where(error == error, value + error, value)
    return sum_lanes(task, value)


@inlined
def _split_by_compensation(task, top, s):
    """float64: s_max is 1 if the rounded sum is in [1, 2), else 0; s_rest is the exact remainder plus the rounding errors."""
    value, error = s
    if task.class_lanes:
        value, error = two_sum_across(value, error)
    one = exp_scale(task.x)
    top = where((value >= one) & (value < 2.0 * one), splat(value, one), 0.0)
    return top, (value - top) + error


@inlined
def _split_by_terms(task, top, s):
    """float32: the terms of 1 were summed apart, in ``top``."""
    return sum_lanes(task, top[0]), sum_lanes(task, s[0])


@inlined
def split_sum(task, top, s):
    """Return ``s_max`` and ``s_rest`` of ``State``. ``top`` and ``s`` are lane-wise sums, each with its rounding error."""
    if task.double:
        return _split_by_compensation(task, top, s)
    return _split_by_terms(task, top, s)
