"""The parallel loop: the threads of a team take chunks of units, and the results of the units are summed in a fixed order."""

from collections import namedtuple

from fastxent._abi.argument_block import DONE, ENTERED, LINE, OVER
from fastxent._abi.variant import TILE
from fastxent._kernels.compensated_sums import compensated, two_sum
from fastxent._simd.logarithm import log
from fastxent._simd.memory import call, fetch_add, fetch_max, get, put, read_slot
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import lane, splat

MOST_PRODUCT = 1e300  # largest product of factors for which the log may still be postponed
SPINS = 100  # polls of a barrier before a waiting thread yields its core


@inlined
def log_of(task, x):
    """Return log(x) of a float64 scalar."""
    return lane(log(splat(task.w, x)), 0)


# A unit returns a number and a factor. The numbers and the logs of the factors are summed with compensation, so that rounding
# loses nothing. The factors are multiplied until their product nears the largest float64, so that many of them share one log.
Sum = namedtuple("Sum", "total error product")
EMPTY_SUM = Sum(0.0, 0.0, 1.0)


@inlined
def accumulate(task, sums, x, factor):
    """Return the sum with the number and the factor of one more unit."""
    product = sums.product
    if product * factor > MOST_PRODUCT:
        x, product = x + log_of(task, product), 1.0
    total, error = two_sum(sums.total, sums.error, x)
    return Sum(total, error, product * factor)


@inlined
def total_of(task, sums):
    """Return the sum of the numbers and of the logs of the factors as a scalar."""
    total, error = sums.total, sums.error
    if sums.product != 1.0:
        total, error = two_sum(total, error, log_of(task, sums.product))
    return compensated(total, error)


def one_by_one(visit):
    """Return the ``work`` that visits units ``first`` ... ``stop - 1`` one after the other, and returns their sum."""

    @inlined
    def work(task, tile, first, stop):
        sums = EMPTY_SUM
        for number in range(first, stop):
            x, factor = visit(task, tile, number)
            sums = accumulate(task, sums, x, factor)
        return total_of(task, sums)

    return work


@inlined
def parallel_for(task, phase, me, work, n_units, chunk):
    """Take chunks of units until none is left, and sum each in order; the thread that finishes last sums the chunks in order.

    Each thread begins with chunks that are its own in every run, as they may still be in the cache of its core, and then takes
    what the next threads have left of theirs (work stealing).
    """
    n_chunks = (n_units + chunk - 1) // chunk
    partial = task.partial  # (n_chunks,) out
    tile = task.tiles + me * TILE
    first = me * n_chunks // task.team
    number_of_phase = task.round + phase
    mine = 0
    for nth in range(n_chunks):
        chunk_number = first + nth if first + nth < n_chunks else first + nth - n_chunks
        at = LINE * chunk_number
        if get(task.taken, at) >= number_of_phase or fetch_max(task.taken, at, number_of_phase) >= number_of_phase:
            continue
        put(partial, at, work(task, tile, chunk_number * chunk, min(n_units, (chunk_number + 1) * chunk)))
        mine += 1
    if mine > 0 and fetch_add(task, DONE + 8 * phase, mine) + mine == n_chunks:
        total, error = 0.0, 0.0
        for k in range(n_chunks):
            total, error = two_sum(total, error, get(partial, LINE * k))
        put(task.total, 8 * phase, compensated(total, error))
        fetch_add(task, OVER + phase, 1)


@inlined
def barrier(task, phase):
    """Wait until all chunks of a phase are done."""
    turns = 0
    while read_slot(task, OVER + phase) == 0:
        turns += 1
        if turns > SPINS and task.sched_yield != 0:
            call(task.sched_yield)


@inlined
def thread_number(task):
    """Return the thread's number in its team: from the OpenMP runtime if there is one, else in the order of arrival."""
    return fetch_add(task, ENTERED, 1) if task.thread_number == 0 else call(task.thread_number)
