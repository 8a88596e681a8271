"""Strips: rows that are neighbours in memory, with few classes, such as an image's pixels, whose classes lie planes apart.

The planes are often a power of two apart, so that a cache holds few of them at once. So ``task.strip`` units are copied to a
tile before they are worked on, plane by plane, and their gradient is copied back in the same way: a longer piece of a plane at
a time, and no line waits for the next unit.

Past the cache three strips are in hand: while the exponentials of one are made, vectors of the one before are written, and
vectors of the next one read. What is read was asked for some planes before: as many as have room at one place of a cache.
"""

from collections import namedtuple

from numba import njit

from fastxent._simd.memory import (
    address,
    before_aligned,
    itemsize,
    load,
    load_masked,
    prefetch_near,
    store,
    store_first,
    stream,
)
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, WIDE, as_numbers, first_lanes, maximum, splat, where

INF = float("inf")
SOME = 8 if WIDE else 2  # vectors that are read, or written, in one step: neighbours in a plane
PLANES = 4  # between what is read and what is asked for
IN_HAND = 3

# Addresses of its first row's class 0, in x and in g; its rows; the tile; how many of them come before g is aligned, if it has
# to be; does it follow the strip that was worked on before, in memory too?
Strip = namedtuple("Strip", "x g n tile head joins")
# What is done while a unit is worked on, from step ``first`` on: a strip ahead is read, and of the two behind, the second is
# written, and what it has in common with the first.
Beside = namedtuple("Beside", "ahead here behind before first")

# Behind its logits, class by class, a tile has numbers of the strip's rows: the maxima; then what makes a gradient of
# exponentials, a factor, the target class, and the gradient there; and these again, with the row where g is aligned first.
MAXIMA, FACTORS, TARGETS, AT_TARGETS, SHIFTED = 0, 1, 2, 3, 3


@njit(**INLINE)
def class_step(task, tile):
    """Bytes from class to class in a tile: an odd number of vectors, which spreads the classes over all sets of a cache."""
    return (task.strip | 1) * LANES * itemsize(tile)


@njit(**INLINE)
def numbers(task, tile, which):
    return tile + (task.n_vectors + which) * class_step(task, tile)


@njit(**INLINE)
def tile_in_hand(task, tile, nth):
    """Tiles follow each other, with room for some numbers before each."""
    return tile + (nth % IN_HAND * ((task.n_vectors + 8) * class_step(task, tile)) + LANES * itemsize(tile))


@njit(**INLINE)
def strip_at(task, tile, x, g, n, joins):
    """A strip that is still to be read."""
    for k in range(task.strip):
        store(numbers(task, tile, MAXIMA) + k * LANES * itemsize(tile), splat(tile, -INF))
    return Strip(x, g, n, tile, head_of(task, g, n), joins)


@njit(**INLINE)
def of_no_rows(strip):
    return Strip(strip.x, strip.g, 0, strip.tile, 0, False)


@njit(**INLINE)
def head_of(task, g, n):
    """Elements of n before the first vector that can be written past the caches, if that is what is done."""
    return before_aligned(g, n) if task.large and task.stream != 0 else 0


@njit(**INLINE)
def steps(task):
    """For a plane."""
    return (task.strip + SOME - 1) // SOME


@njit(**INLINE)
def read_some(task, strip, j, k, end):
    """The logits of class j, units k ... end - 1, and the maxima so far."""
    vector, step = LANES * itemsize(strip.tile), LANES * itemsize(strip.x)
    line, place = strip.x + j * task.x_step, strip.tile + j * class_step(task, strip.tile)
    maxima = numbers(task, strip.tile, MAXIMA)
    n_whole = strip.n // LANES
    stop = min(end, n_whole)
    if task.large and j + PLANES < task.n_vectors:
        for i in range(k, stop):
            prefetch_near(line + i * step, PLANES * task.x_step)
        prefetch_near(line + stop * step, PLANES * task.x_step - 1)
    for i in range(k, stop):
        x = load(line + i * step)
        store(place + i * vector, x)
        store(maxima + i * vector, maximum(load(maxima + i * vector), x))
    if k <= n_whole < end and n_whole * LANES < strip.n:
        x = load_masked(line + n_whole * step, first_lanes(strip.n - n_whole * LANES))
        store(place + n_whole * vector, x)
        store(maxima + n_whole * vector, maximum(load(maxima + n_whole * vector), x))


@njit(**INLINE)
def put_numbers(task, tile, factor, y, g_y):
    """What makes a gradient of what is in the tile of a unit."""
    store(numbers(task, tile, FACTORS), factor)
    if task.labelled:
        store(numbers(task, tile, TARGETS), as_numbers(tile, y))
        store(numbers(task, tile, AT_TARGETS), g_y)


@njit(**INLINE)
def shift(task, strip, which):
    vector, off = LANES * itemsize(strip.tile), strip.head * itemsize(strip.tile)
    for k in range(task.strip):
        x = load(numbers(task, strip.tile, which) + (k * vector + off))
        store(numbers(task, strip.tile, which + SHIFTED) + k * vector, x)


@njit(**INLINE)
def shift_numbers(task, strip):
    """All units are done: their numbers once more, for vectors of g that are aligned."""
    if strip.head > 0:
        shift(task, strip, FACTORS)
        if task.labelled:
            shift(task, strip, TARGETS)
            shift(task, strip, AT_TARGETS)


@njit(**INLINE)
def finished(task, strip, j, off, shifted, at):
    """The gradient of class j: exponentials and numbers lie ``off`` and ``at`` bytes after those of the first row."""
    g = load(strip.tile + (j * class_step(task, strip.tile) + off)) * load(numbers(task, strip.tile, FACTORS + shifted) + at)
    if task.labelled:
        is_target = load(numbers(task, strip.tile, TARGETS + shifted) + at) == float(j)
        g = where(is_target, load(numbers(task, strip.tile, AT_TARGETS + shifted) + at), g)
    return g


@njit(**INLINE)
def write_some(task, before, strip, after, j, k, end):
    """The gradient of class j, vectors k ... end - 1; past the caches if it is: then of vectors that are aligned."""
    vector, step, size = LANES * itemsize(strip.tile), LANES * itemsize(strip.g), itemsize(strip.tile)
    p = strip.g + j * task.g_step
    head = head_of(task, p, strip.n)
    if k == 0 and head > 0:
        write_head(task, before, strip, j, p, head)
    p, off, shifted, at = p + head * itemsize(p), head * size, 0, head * size
    if head == strip.head and head > 0:  # as for most arrays: numbers that span lines take longer
        shifted, at = SHIFTED, 0
    n_whole = (strip.n - head) // LANES
    for i in range(k, min(end, n_whole)):
        g = finished(task, strip, j, off + i * vector, shifted, at + i * vector)
        if task.large and task.stream != 0:
            stream(p + i * step, g)
        else:
            store(p + i * step, g)
    tail = strip.n - head - n_whole * LANES
    if k <= n_whole < end and tail > 0 and not after.joins:
        g = finished(task, strip, j, off + n_whole * vector, shifted, at + n_whole * vector)
        store_first(p + n_whole * step, g, first_lanes(tail))


@njit(**INLINE)
def write_head(task, before, strip, j, p, head):
    """What comes before the first vector that is aligned; with what the strip before has in the same one, if it was left."""
    vector, size = LANES * itemsize(p), itemsize(strip.tile)
    if not strip.joins:
        store_first(p, finished(task, strip, j, 0, 0, 0), first_lanes(head))
        return
    left = address(p) % vector // itemsize(p)
    off, past = -left * size, (before.n - left) * size
    g = where(first_lanes(left), finished(task, before, j, past, 0, past), finished(task, strip, j, off, 0, off))
    p = p + -left * itemsize(p)
    if left + head == LANES:
        stream(p, g)
    else:  # the strip ends here, too
        store_first(p, g, first_lanes(left + head))


@njit(**INLINE)
def read_strip(task, strip):
    for j in range(task.n_vectors):
        read_some(task, strip, j, 0, task.strip)


@njit(**INLINE)
def write_strip(task, before, strip, after):
    for j in range(task.n_vectors):
        write_some(task, before, strip, after, j, 0, task.strip)


@njit(**INLINE)
def step_beside(task, beside, number):
    """Step ``number``, counted plane by plane, of both."""
    j, k = number // steps(task), number % steps(task) * SOME
    if j < task.n_vectors:
        if task.keeps_e:
            write_some(task, beside.before, beside.behind, beside.here, j, k, k + SOME)
        read_some(task, beside.ahead, j, k, k + SOME)


@njit(**INLINE)
def share(task):
    """Steps that are done while one unit is worked on."""
    return task.n_vectors // SOME


@njit(**INLINE)
def rest_beside(task, beside, done):
    """What is left of a unit's share."""
    for number in range(done, share(task)):
        step_beside(task, beside, beside.first + number)


@njit(**INLINE)
def finish_beside(task, beside):
    """What is left if all units have done their share."""
    for number in range(beside.first, task.n_vectors * steps(task)):
        step_beside(task, beside, number)
