"""How the threads of a team walk over the units of a task, and add up what each of them gives."""

from collections import namedtuple

from numba import njit

from fastxent._abi.argument_block import DONE, ENTERED, LINE, OVER
from fastxent._abi.variant import TILE
from fastxent._kernels.reduce import add, whole
from fastxent._simd.elementary import log
from fastxent._simd.memory import call, fetch_add, get, put, raise_to, read_slot
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import lane, splat

MOST = 1e300  # of a product whose log is still to be taken
PATIENCE = 100  # looks at whether the others are ready, before they are let run


@njit(**INLINE)
def log_of(task, x):
    return lane(log(splat(task.w, x)), 0)


# A unit gives a number and a factor. The numbers, and the logs of the factors, are added up, and lose nothing to rounding on
# the way; of the factors there is one log for as many as have a product below the largest float64.
Sum = namedtuple("Sum", "total lost product")
NOTHING_SO_FAR = Sum(0.0, 0.0, 1.0)


@njit(**INLINE)
def plus(task, so_far, x, factor):
    product = so_far.product
    if product * factor > MOST:
        x, product = x + log_of(task, product), 1.0
    total, lost = add(so_far.total, so_far.lost, x)
    return Sum(total, lost, product * factor)


@njit(**INLINE)
def value_of(task, so_far):
    total, lost = so_far.total, so_far.lost
    if so_far.product != 1.0:
        total, lost = add(total, lost, log_of(task, so_far.product))
    return whole(total, lost)


def one_by_one(visit):
    """The work on units ``first`` ... ``stop - 1``: their sum."""

    @njit(**INLINE)
    def work(task, tile, first, stop):
        so_far = NOTHING_SO_FAR
        for number in range(first, stop):
            x, factor = visit(task, tile, number)
            so_far = plus(task, so_far, x, factor)
        return value_of(task, so_far)

    return work


@njit(**INLINE)
def walk(task, phase, me, work, n_units, chunk):
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
        piece = first + nth if first + nth < n_chunks else first + nth - n_chunks
        at = LINE * piece
        if get(task.taken, at) >= number_of_phase or raise_to(task.taken, at, number_of_phase) >= number_of_phase:
            continue
        put(partial, at, work(task, tile, piece * chunk, min(n_units, (piece + 1) * chunk)))
        mine += 1
    if mine > 0 and fetch_add(task, DONE + 8 * phase, mine) + mine == n_chunks:
        total, lost = 0.0, 0.0
        for k in range(n_chunks):
            total, lost = add(total, lost, get(partial, LINE * k))
        put(task.total, 8 * phase, whole(total, lost))
        fetch_add(task, OVER + phase, 1)


@njit(**INLINE)
def wait(task, phase):
    """Until all chunks of a phase are done."""
    turns = 0
    while read_slot(task, OVER + phase) == 0:
        turns += 1
        if turns > PATIENCE and task.give_way != 0:
            call(task.give_way)


@njit(**INLINE)
def enter(task):
    """The thread's number in its team."""
    return fetch_add(task, ENTERED, 1) if task.thread_number == 0 else call(task.thread_number)
