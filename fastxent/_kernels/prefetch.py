"""Memory traffic of arrays that do not fit the caches, or not the first-level one: prefetches and non-temporal stores."""

from fastxent._abi.argument_block import LINE
from fastxent._kernels.addressing import g_step, t_step, unit_from_class, write, write_out, x_step
from fastxent._simd.memory import (
    address,
    before_aligned,
    fixed,
    itemsize,
    prefetch,
    prefetch_near,
    prefetch_to_write,
    store_non_temporal,
)
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, all_lanes, every_lane, first_lanes, splat

# Prefetch distances in bytes: from memory to the second-level cache, and on to the first-level one, in two requests, as that
# one waits for few lines at a time (benchmarks/LOG.md#two-prefetches-a-line); and from the cache that cores share.
MEMORY_AHEAD, CACHE_AHEAD, SHARED_CACHE_AHEAD = 16384, 2048, 4096
NEXT_ROW_AHEAD = 4096  # vectors of the next row that are prefetched during the gradient: what half a second-level cache holds


@inlined
def block_length(task):
    """Return the number of vectors between two updates of the running maximum: 16 KB in the precision of the arithmetic."""
    return 128 if task.double else 256


@inlined
def prefetch_stream(task, p, offset):
    """Prefetch what a row pipeline reads for the first time some vectors after ``offset`` bytes from p."""
    if task.large:
        prefetch(p, offset + MEMORY_AHEAD)
        prefetch_near(p, offset + CACHE_AHEAD)
    else:
        prefetch_near(p, offset + SHARED_CACHE_AHEAD)


@inlined
def prefetch_short_rows(task, p, row, j):
    """Prefetch line j of those that lie ahead of 16 short rows at p, if these, ``row`` bytes each, are contiguous.

    Lines that are requested all at once, before the rows are transposed, are dropped, as too many are on their way.
    """
    if task.n_classes >= LANES and row == task.n_classes * itemsize(p):
        line = j * LANES * itemsize(p)
        prefetch(p, line + MEMORY_AHEAD)
        if task.double:  # a vector takes two cache lines
            prefetch(p, line + MEMORY_AHEAD + LINE)


@inlined
def prefetch_operands(task, unit, j):
    """Prefetch what is read a block, a row, or 16 rows after vector j, while the exponentials of that are computed."""
    if task.overlapped and task.class_lanes:  # the logits are prefetched where they are first read: see ``prefetch_pipelined``
        if task.soft:
            prefetch_stream(task, task.t + unit.t, j * t_step(task))
        return
    if task.class_lanes and not task.large:  # x is in some cache, but seldom in the first-level one
        prefetch_near(task.x + unit.x, (j + min(block_length(task), task.n_vectors)) * x_step(task))
    if task.large and task.transposed:
        prefetch_short_rows(task, task.x + unit.x, fixed(task.axes, 8), j)
        if task.soft:
            prefetch_short_rows(task, task.t + unit.t, fixed(task.axes, 24), j)
    if task.large and not task.packed:
        ahead, t_ahead = LANES * itemsize(task.x), LANES * itemsize(task.t)
        if task.class_lanes:
            ahead, t_ahead = block_length(task) * x_step(task), block_length(task) * t_step(task)
        if task.class_lanes and task.stores_exp:
            ahead, t_ahead = fixed(task.axes, 8), fixed(task.axes, 24)
        prefetch(task.x + unit.x, j * x_step(task) + ahead)
        if task.double:  # a vector takes two cache lines
            prefetch(task.x + unit.x, j * x_step(task) + ahead + LINE)
        if task.soft:
            prefetch(task.t + unit.t, j * t_step(task) + t_ahead)


@inlined
def prefetch_pipelined(task, unit, j):
    """Prefetch what follows vector j in a row pipeline, which reads that vector for the first time."""
    prefetch_stream(task, task.x + unit.x, j * x_step(task))


@inlined
def prefetch_border(task, unit):
    """Prefetch, for writing, the cache line of g that a row shares with the row before: each row's store fills only a part of
    the line, which therefore has to be read first. The other lines are written by non-temporal stores."""
    if task.non_temporal != 0 and address(task.g + unit.g) % LINE != 0:
        prefetch_to_write(task.g + unit.g, 0)


@inlined
def prefetch_next_row(task, unit, j):
    """Prefetch the next row while this row's gradient is computed, if the logits are larger than the caches."""
    if task.large and task.class_lanes and not task.stores_exp:
        if j < NEXT_ROW_AHEAD:
            prefetch(task.x + unit.x, j * x_step(task) + fixed(task.axes, 8))


# A gradient larger than the caches is written by non-temporal stores, as otherwise each cache line would be read before it is
# overwritten. Such stores take whole aligned vectors. So with class lanes a row is written as a head, an aligned body and a
# tail, and with row lanes non-temporal stores are used only if all vectors of a unit are whole and aligned.


@inlined
def is_non_temporal(task, unit):
    """Return whether this unit's g can be written by non-temporal stores."""
    if task.class_lanes:
        return task.non_temporal != 0
    if task.packed:
        return False
    misaligned = (address(task.g + unit.g) | g_step(task)) % (LANES * itemsize(task.g))
    return task.non_temporal != 0 and every_lane(unit.writes) and misaligned == 0


@inlined
def aligned(task, unit):
    """Return how to write a unit in aligned vectors: the mask of its head; its body, a unit that begins where g is aligned; the
    number of whole vectors of the body; the mask of its tail, the vector after those."""
    if not task.class_lanes:
        return first_lanes(0), unit, task.n_vectors, first_lanes(0)
    before = before_aligned(task.g + unit.g, task.n_classes)
    body = unit_from_class(task, unit, before, task.n_vectors)
    tail = task.n_classes - before - body.full * LANES
    return first_lanes(before), body, body.full, first_lanes(tail)


@inlined
def write_zeros(task, unit):
    """Write zeros to g of a unit whose rows are all ignored."""
    zero = splat(task.x, 0.0)
    if task.large:
        if is_non_temporal(task, unit):
            head, body, n_whole, tail = aligned(task, unit)
            write(task, task.g + unit.g, unit.g_lanes, zero, head)
            for j in range(n_whole):
                store_non_temporal(task.g + (body.g + j * g_step(task)), zero)
            write(task, task.g + (body.g + n_whole * g_step(task)), unit.g_lanes, zero, tail)
            return
    for j in range(unit.start, unit.stop):
        mask = all_lanes() if task.class_lanes and j < unit.full else unit.writes
        write_out(task, unit, j, zero, mask)
