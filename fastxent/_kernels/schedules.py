"""Loss, and loss with gradient, of units ``first`` ... ``stop - 1`` beside each other, where one by one they would wait.

What a kernel does with one unit is a chain: its maximum, its sums, its factors, its gradient. While a processor waits for a
link of one unit's chain, it can work on another unit's, if that is near enough in the code.
"""

from numba import njit

from fastxent._kernels.addressing import flush, locate, of_no_row, strip_of, unchanged
from fastxent._kernels.gradient import write_gradient
from fastxent._kernels.inputs import factors, joined, label, of_none, raised
from fastxent._kernels.parallel_for import NOTHING_SO_FAR, plus, value_of
from fastxent._kernels.plane_tiles import (
    Beside,
    finish_beside,
    of_no_rows,
    read_strip,
    rest_beside,
    share,
    shift_numbers,
    tile_in_hand,
    write_strip,
)
from fastxent._kernels.prefetch import block_length, look_at_border, write_zeros
from fastxent._kernels.reduce import span_state, state_of
from fastxent._kernels.row_pipeline import (
    Pipeline,
    finish_behind,
    follow,
    max_of,
    nothing_behind,
    part_behind,
    part_numbers,
    part_of_row,
    parts_of_row,
)
from fastxent._kernels.row_tiles import next_tile
from fastxent._kernels.split_rows import to_row
from fastxent._kernels.steps import deliver_loss, deliver_no_loss
from fastxent._simd.memory import itemsize, put
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import LANES, any_lane, lane, splat, widen

# ----------------------------------------------------------------------------------------------------
# Short rows that are read whole, two units at a time
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def two_units(task, tile, number, stop):
    """Units ``number`` and ``number + 1``; if that is past the last one, no row."""
    unit = locate(task, tile, number)
    if number + 1 < stop:
        return unit, locate(task, next_tile(task, tile), number + 1)
    return unit, of_no_row(unit)


@njit(**INLINE)
def value_by_twos(task, tile, first, stop):
    """Loss."""
    so_far = NOTHING_SO_FAR
    for number in range(first, stop, 2):
        a, b = two_units(task, tile, number, stop)
        if any_lane(a.kept | b.kept):
            a_y, b_y = label(task, a), label(task, b)
            a_state, b_state = span_state(task, a), span_state(task, b)
            a_loss, b_loss = deliver_loss(task, a, a_state, a_y), deliver_loss(task, b, b_state, b_y)
        else:
            a_loss, b_loss = deliver_no_loss(task, a), deliver_no_loss(task, b)
        so_far = plus(task, so_far, *a_loss)
        if number + 1 < stop:
            so_far = plus(task, so_far, *b_loss)
    return value_of(task, so_far)


@njit(**INLINE)
def value_and_grad_by_twos(task, tile, first, stop):
    """Loss and gradient."""
    so_far = NOTHING_SO_FAR
    for number in range(first, stop, 2):
        a, b = two_units(task, tile, number, stop)
        a_late, b_late = unchanged(task), unchanged(task)
        if any_lane(a.kept | b.kept):
            a_y, b_y = label(task, a), label(task, b)
            a_state, b_state = span_state(task, a), span_state(task, b)
            a_f = factors(task, a, a_state, a_y, to_row(task, number, a_state))
            b_f = factors(task, b, b_state, b_y, to_row(task, number + 1, b_state))
            a_late, b_late = write_gradient(task, a, a_f), write_gradient(task, b, b_f)
            a_loss, b_loss = deliver_loss(task, a, a_state, a_y), deliver_loss(task, b, b_state, b_y)
        else:
            write_zeros(task, a)
            write_zeros(task, b)
            a_loss, b_loss = deliver_no_loss(task, a), deliver_no_loss(task, b)
        flush(task, a, *a_late)
        so_far = plus(task, so_far, *a_loss)
        if number + 1 < stop:
            flush(task, b, *b_late)
            so_far = plus(task, so_far, *b_loss)
    return value_of(task, so_far)


# ----------------------------------------------------------------------------------------------------
# Short rows that are neighbours: see ``plane_tiles``
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def strip_in_hand(task, tile, first, number, stop):
    """The strip that begins with unit ``number``; past the last unit one of no row."""
    at = min(number, stop - task.strip)
    strip = strip_of(task, tile_in_hand(task, tile, number // task.strip), at, number > first)
    return strip if number < stop else of_no_rows(strip)


@njit(**INLINE)
def by_strips(task, tile, first, stop):
    """Loss, with the gradient if exponentials are kept."""
    so_far = NOTHING_SO_FAR
    ahead = strip_in_hand(task, tile, first, first, stop)
    read_strip(task, ahead)
    here = behind = of_no_rows(ahead)
    begin = first
    while begin < stop:
        before, behind, here, ahead = behind, here, ahead, strip_in_hand(task, tile, first, begin + task.strip, stop)
        n_units = (here.n + LANES - 1) // LANES
        for nth in range(n_units):
            beside = Beside(ahead, here, behind, before, nth * share(task))
            unit = locate(task, here.tile, begin + nth)
            loss, late = (0.0, 1.0), unchanged(task)
            if any_lane(unit.kept):
                y = label(task, unit)
                state, _ = state_of(task, unit, 0, unit.stop, unit.m, beside)
                loss = deliver_loss(task, unit, state, y)
                if task.keeps_e:
                    late = write_gradient(task, unit, factors(task, unit, state, y, to_row(task, begin + nth, state)))
            else:
                rest_beside(task, beside, 0)
                loss = deliver_no_loss(task, unit)
                write_zeros(task, unit)
            flush(task, unit, *late)
            so_far = plus(task, so_far, *loss)
        finish_beside(task, Beside(ahead, here, behind, before, n_units * share(task)))
        if task.keeps_e:
            shift_numbers(task, here)
        begin += task.strip
    if task.keeps_e:
        write_strip(task, behind, here, of_no_rows(here))
    return value_of(task, so_far)


# ----------------------------------------------------------------------------------------------------
# Long rows: see ``row_pipeline``
# ----------------------------------------------------------------------------------------------------


@njit(**INLINE)
def next_kept(task, tile, number, stop):
    """The first row from ``number`` on that is not ignored, as number and unit; what is to be done for those before is done.
    If there is none, the unit is of no class."""
    unit = locate(task, tile, min(number, stop - 1))
    while number < stop and not any_lane(unit.kept):
        deliver_no_loss(task, unit)
        if task.keeps_e:
            write_zeros(task, unit)
        number += 1
        unit = locate(task, tile, min(number, stop - 1))
    return number, unit if number < stop else of_no_row(unit)


@njit(**INLINE)
def part_ahead(task, unit, k, n_parts, length, next_unit):
    """What is read after part k - 1 of a row: its part k, or the first one of the next row."""
    return part_of_row(task, unit, k, length) if k < n_parts else part_of_row(task, next_unit, 0, length)


@njit(**INLINE)
def value_pipelined(task, tile, first, stop):
    """Loss, block by block."""
    so_far = NOTHING_SO_FAR
    length = block_length(task)
    n_blocks = (task.n_vectors + length - 1) // length
    number, unit = next_kept(task, tile, first, stop)
    m = max_of(task, part_of_row(task, unit, 0, length))
    while number < stop:
        next_number, next_unit = next_kept(task, tile, number + 1, stop)
        state = of_none(task, splat(task.x, m))
        for k in range(n_blocks):
            block, ahead = part_of_row(task, unit, k, length), part_ahead(task, unit, k + 1, n_blocks, length, next_unit)
            state = raised(state, splat(task.x, m))
            more, m = state_of(task, block, 0, block.stop, state.m, Pipeline(ahead, None))
            state = joined(state, more)
        so_far = plus(task, so_far, *deliver_loss(task, unit, state, label(task, unit)))
        number, unit = next_number, next_unit
    return value_of(task, so_far)


@njit(**INLINE)
def value_and_grad_pipelined(task, tile, first, stop):
    """Loss and gradient, part by part; behind is the same part of the row before."""
    so_far = NOTHING_SO_FAR
    (n_parts, length), parts = parts_of_row(task), part_numbers(task)
    number, unit = next_kept(task, tile, first, stop)
    m = max_of(task, part_of_row(task, unit, 0, length))
    row = nothing_behind(task, unit)
    while number < stop:
        next_number, next_unit = next_kept(task, tile, number + 1, stop)
        look_at_border(task, unit)
        y, state = label(task, unit), of_none(task, splat(task.x, m))
        for k in range(n_parts):
            part, ahead = part_of_row(task, unit, k, length), part_ahead(task, unit, k + 1, n_parts, length, next_unit)
            behind = part_behind(task, row, parts, k, length)
            state = raised(state, splat(task.x, m))
            put(parts, k * itemsize(parts), lane(widen(state.m), 0))
            more, m = state_of(task, part, 0, part.stop, state.m, Pipeline(ahead, behind))
            state = joined(state, more)
        so_far = plus(task, so_far, *deliver_loss(task, unit, state, y))
        row = follow(task, unit, factors(task, unit, state, y, to_row(task, number, state)), state.m, parts)
        number, unit = next_number, next_unit
    if row.stop > 0:
        for k in range(n_parts):
            finish_behind(task, part_behind(task, row, parts, k, length), 0)
    return value_of(task, so_far)
