"""Sums over a unit's classes: float32 terms are added up in float64; float64 terms compensated (Knuth's two-sum)."""

from numba import njit

from fastxent._simd.elementary import exp_scale
from fastxent._simd.lanes import add_halves, sum_across, swap
from fastxent._simd.numba_backend import INLINE, as_needed
from fastxent._simd.vector import splat, where, widen


@njit(**INLINE)
def two_sum(total, error, x):
    """total + x, and what its rounding has lost added to ``error`` (Knuth's two-sum)."""
    rounded = total + x
    there = rounded - total
    return rounded, error + ((total - (rounded - there)) + (x - there))


@njit(**INLINE)
def compensated(total, error):
    """The sum; of an inf or nan nothing was lost, and inf - inf is nan."""
    return total + error if error == error else total


@njit(**INLINE)
def two_sum_across(total, error):
    """The sum over the lanes, in each of them, and what all its roundings have lost."""
    total, error = two_sum(total, error + swap(error, 8), swap(total, 8))
    total, error = two_sum(total, error + swap(error, 4), swap(total, 4))
    total, error = two_sum(total, error + swap(error, 2), swap(total, 2))
    return two_sum(total, error + swap(error, 1), swap(total, 1))


@as_needed
def halve_lanes(constants):
    """A vector's terms: of float32 classes two and two added, for that makes half as many float64 sums."""
    if constants["class_lanes"] and not constants["double"]:
        return lambda task, x: add_halves(x)
    return lambda task, x: x


@as_needed
def sum_lanes(constants):
    """The sum over the lanes if they are classes."""
    if constants["class_lanes"]:
        return lambda task, x: sum_across(x)
    return lambda task, x: x


@njit(**INLINE)
def widen_add(task, total, x):
    """A sum and what it has lost, with a vector's terms added; float32 terms lose nothing that counts."""
    value, error = total
    x = widen(halve_lanes(task, x))
    if task.double:
        return two_sum(value, error, x)
    return value + x, error


@njit(**INLINE)
def total_over_classes(task, total):
    """The sum over the vectors' classes."""
    value, error = total
    if task.double:  # of an inf or nan nothing was lost, and inf - inf is nan
        value = where(error == error, value + error, value)
    return sum_lanes(task, value)


def _split_by_compensation(task, top, s):
    """float64: what is beside 1 is what rounding lost when it was added to 1."""
    value, error = s
    if task.class_lanes:
        value, error = two_sum_across(value, error)
    one = exp_scale(task.x)
    top = where((value >= one) & (value < 2.0 * one), splat(value, one), 0.0)
    return top, (value - top) + error


def _split_by_terms(task, top, s):
    return sum_lanes(task, top[0]), sum_lanes(task, s[0])


@as_needed
def split_sum(constants):
    """The sum over the classes as the two numbers of ``State``. ``s_max``, ``s``: lane by lane, and what each has lost."""
    return _split_by_compensation if constants["double"] else _split_by_terms
