"""How the threads of a team walk over the units of a task, and add up what each of them gives."""

from collections import namedtuple

from numba import njit

from fastxent._abi.argument_block import DONE, ENTERED, LINE, OVER
from fastxent._abi.variant import TILE
from fastxent._kernels.compensated_sums import compensated, two_sum
from fastxent._simd.elementary import log
from fastxent._simd.memory import call, fetch_add, fetch_max, get, put, read_slot
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import lane, splat

MOST = 1e300  # of a product whose log is still to be taken
SPINS = 100  # looks at whether the others are ready, before they are let run


@njit(**INLINE)
def log_of(task, x):
    return lane(log(splat(task.w, x)), 0)


# A unit gives a number and a factor. The numbers, and the logs of the factors, are added up, and lose nothing to rounding on
# the way; of the factors there is one log for as many as have a product below the largest float64.
Sum = namedtuple("Sum", "total error product")
EMPTY_SUM = Sum(0.0, 0.0, 1.0)


@njit(**INLINE)
def accumulate(task, sums, x, factor):
    product = sums.product
    if product * factor > MOST:
        x, product = x + log_of(task, product), 1.0
    total, error = two_sum(sums.total, sums.error, x)
    return Sum(total, error, product * factor)


@njit(**INLINE)
def total_of(task, sums):
    total, error = sums.total, sums.error
    if sums.product != 1.0:
        total, error = two_sum(total, error, log_of(task, sums.product))
    return compensated(total, error)


def one_by_one(visit):
    """The work on units ``first`` ... ``stop - 1``: their sum."""

    @njit(**INLINE)
    def work(task, tile, first, stop):
        sums = EMPTY_SUM
        for number in range(first, stop):
            x, factor = visit(task, tile, number)
            sums = accumulate(task, sums, x, factor)
        return total_of(task, sums)

    return work


@njit(**INLINE)
def parallel_for(task, phase, me, work, n_units, chunk):
    """Take chunks of units until none is left; sum each chunk in order; the last to finish sums the chunks in order.

    A thread begins with its own share of the chunks, the same in every run, for it may find them in its core's cache; then it
    takes what is left of the next one's.
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


@njit(**INLINE)
def barrier(task, phase):
    """Until all chunks of a phase are done."""
    turns = 0
    while read_slot(task, OVER + phase) == 0:
        turns += 1
        if turns > SPINS and task.sched_yield != 0:
            call(task.sched_yield)


@njit(**INLINE)
def thread_number(task):
    """The thread's number in its team."""
    return fetch_add(task, ENTERED, 1) if task.thread_number == 0 else call(task.thread_number)
