"""Schedules that interleave or overlap units ``first`` ... ``stop - 1``, for any loss.

A kernel's steps for one unit are a dependency chain: maximum, sums, coefficients, gradient. While a processor waits for a step
of one unit, it can execute steps of another unit, if their instructions are near enough.
"""

from fastxent._kernels.addressing import empty_unit, locate, panel_of, unscaled, write_tile
from fastxent._kernels.gradient import write_gradient
from fastxent._kernels.inputs import label
from fastxent._kernels.online_softmax import empty, merge, rescale_to
from fastxent._kernels.parallel_for import EMPTY_SUM, accumulate, total_of
from fastxent._kernels.plane_tiles import (
    PanelPipeline,
    align_row_numbers,
    empty_panel,
    finish_panel,
    finish_unit,
    load_panel,
    panel_tile,
    pipeline_step,
    steps_per_unit,
    store_panel,
)
from fastxent._kernels.prefetch import block_length, prefetch_border, write_zeros
from fastxent._kernels.reduce import INTERLEAVED, Overlap, span_state, state_of
from fastxent._kernels.row_pipeline import (
    Pipeline,
    finish_both,
    finish_pending,
    max_ahead,
    max_of,
    no_pending,
    part_numbers,
    pending_part,
    pending_row,
    row_part,
    row_parts,
    running_max,
    write_and_read,
)
from fastxent._kernels.row_tiles import next_tile
from fastxent._kernels.split_rows import to_row
from fastxent._simd.memory import itemsize, put
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, any_lane, lane, splat, widen

# ----------------------------------------------------------------------------------------------------
# Paired: short rows that are transposed, two units at a time
# ----------------------------------------------------------------------------------------------------


@inlined
def two_units(task, tile, number, stop):
    """Return units ``number`` and ``number + 1``; the second is empty if it is past the last one."""
    unit = locate(task, tile, number)
    if number + 1 < stop:
        return unit, locate(task, next_tile(task, tile), number + 1)
    return unit, empty_unit(unit)


def value_paired(loss):
    """Return the work that computes the loss of two units at a time."""
    put_loss, put_zero_loss = loss.put_loss, loss.put_zero_loss

    @inlined
    def work(task, tile, first, stop):
        sums = EMPTY_SUM
        for number in range(first, stop, 2):
            a, b = two_units(task, tile, number, stop)
            if any_lane(a.kept | b.kept):
                a_y, b_y = label(task, a), label(task, b)
                a_state, b_state = span_state(task, a), span_state(task, b)
                a_loss, b_loss = put_loss(task, a, a_state, a_y), put_loss(task, b, b_state, b_y)
            else:
                a_loss, b_loss = put_zero_loss(task, a), put_zero_loss(task, b)
            sums = accumulate(task, sums, *a_loss)
            if number + 1 < stop:
                sums = accumulate(task, sums, *b_loss)
        return total_of(task, sums)

    return work


def value_and_grad_paired(loss):
    """Return the work that computes loss and gradient of two units at a time."""
    put_loss, put_zero_loss, coefficients = loss.put_loss, loss.put_zero_loss, loss.coefficients

    @inlined
    def work(task, tile, first, stop):
        sums = EMPTY_SUM
        for number in range(first, stop, 2):
            a, b = two_units(task, tile, number, stop)
            a_tile_update, b_tile_update = unscaled(task), unscaled(task)
            if any_lane(a.kept | b.kept):
                a_y, b_y = label(task, a), label(task, b)
                a_state, b_state = span_state(task, a), span_state(task, b)
                a_f = coefficients(task, a, a_state, a_y, to_row(task, number, a_state))
                b_f = coefficients(task, b, b_state, b_y, to_row(task, number + 1, b_state))
                a_tile_update, b_tile_update = write_gradient(task, a, a_f), write_gradient(task, b, b_f)
                a_loss, b_loss = put_loss(task, a, a_state, a_y), put_loss(task, b, b_state, b_y)
            else:
                write_zeros(task, a)
                write_zeros(task, b)
                a_loss, b_loss = put_zero_loss(task, a), put_zero_loss(task, b)
            write_tile(task, a, *a_tile_update)
            sums = accumulate(task, sums, *a_loss)
            if number + 1 < stop:
                write_tile(task, b, *b_tile_update)
                sums = accumulate(task, sums, *b_loss)
        return total_of(task, sums)

    return work


# ----------------------------------------------------------------------------------------------------
# Panels overlapped: short rows whose classes lie planes apart, see ``plane_tiles``
# ----------------------------------------------------------------------------------------------------


@inlined
def panel_in_flight(task, tile, first, number, stop):
    """Return the panel that begins with unit ``number``; past the last unit an empty one."""
    at = min(number, stop - task.panel)
    panel = panel_of(task, panel_tile(task, tile, number // task.panel), at, number > first)
    return panel if number < stop else empty_panel(panel)


@inlined
def panel_step(task, pipeline, top, j):
    pipeline_step(task, pipeline, pipeline.first + j // INTERLEAVED)
    return top


@inlined
def finish_panel_steps(task, pipeline, top, stop):
    finish_unit(task, pipeline, stop // INTERLEAVED)
    return top


def by_panels(loss):
    """Return the work that computes the loss, and the gradient if exponentials are stored.

    While panel ``here`` is computed, ``ahead`` is read; ``behind`` is written, with what it shares with ``before``.
    """
    put_loss, put_zero_loss = loss.put_loss, loss.put_zero_loss
    coefficients = getattr(loss, "coefficients", None)  # a loss without a gradient stores no exponentials

    @inlined
    def work(task, tile, first, stop):
        sums = EMPTY_SUM
        ahead = panel_in_flight(task, tile, first, first, stop)
        load_panel(task, ahead)
        here = behind = empty_panel(ahead)
        begin = first
        while begin < stop:
            before, behind, here, ahead = behind, here, ahead, panel_in_flight(task, tile, first, begin + task.panel, stop)
            n_units = (here.n + LANES - 1) // LANES
            for nth in range(n_units):
                pipeline = PanelPipeline(ahead, here, behind, before, nth * steps_per_unit(task))
                unit = locate(task, here.tile, begin + nth)
                total, tile_update = (0.0, 1.0), unscaled(task)
                if any_lane(unit.kept):
                    y = label(task, unit)
                    overlap = Overlap(panel_step, finish_panel_steps, pipeline)
                    state, _ = state_of(task, unit, 0, unit.stop, unit.m, overlap)
                    total = put_loss(task, unit, state, y)
                    if task.stores_exp:
                        tile_update = write_gradient(
                            task, unit, coefficients(task, unit, state, y, to_row(task, begin + nth, state))
                        )
                else:
                    finish_unit(task, pipeline, 0)
                    total = put_zero_loss(task, unit)
                    write_zeros(task, unit)
                write_tile(task, unit, *tile_update)
                sums = accumulate(task, sums, *total)
            finish_panel(task, PanelPipeline(ahead, here, behind, before, n_units * steps_per_unit(task)))
            if task.stores_exp:
                align_row_numbers(task, here)
            begin += task.panel
        if task.stores_exp:
            store_panel(task, behind, here, empty_panel(here))
        return total_of(task, sums)

    return work


# ----------------------------------------------------------------------------------------------------
# Software-pipelined: long rows, see ``row_pipeline``
# ----------------------------------------------------------------------------------------------------


def next_kept_of(loss):
    put_zero_loss = loss.put_zero_loss

    @inlined
    def next_kept(task, tile, number, stop):
        """Return number and unit of the first row from ``number`` on that is not ignored; write zeros for those before it.

        If there is none, the unit is empty.
        """
        unit = locate(task, tile, min(number, stop - 1))
        while number < stop and not any_lane(unit.kept):
            put_zero_loss(task, unit)
            if task.stores_exp:
                write_zeros(task, unit)
            number += 1
            unit = locate(task, tile, min(number, stop - 1))
        return number, unit if number < stop else empty_unit(unit)

    return next_kept


@inlined
def next_part(task, unit, k, n_parts, length, next_unit):
    """Return the part that is read after part k - 1 of a row: its part k, or the first part of the next row."""
    return row_part(task, unit, k, length) if k < n_parts else row_part(task, next_unit, 0, length)


def value_pipelined(loss):
    """Return the work that computes the loss block by block, while the next block's maximum is found."""
    put_loss, next_kept = loss.put_loss, next_kept_of(loss)

    @inlined
    def work(task, tile, first, stop):
        sums = EMPTY_SUM
        length = block_length(task)
        n_blocks = (task.n_vectors + length - 1) // length
        number, unit = next_kept(task, tile, first, stop)
        m = max_of(task, row_part(task, unit, 0, length))
        while number < stop:
            next_number, next_unit = next_kept(task, tile, number + 1, stop)
            state = empty(task, splat(task.x, m))
            for k in range(n_blocks):
                block, ahead = row_part(task, unit, k, length), next_part(task, unit, k + 1, n_blocks, length, next_unit)
                state = rescale_to(state, splat(task.x, m))
                more, m = state_of(task, block, 0, block.stop, state.m, Overlap(running_max, max_ahead, ahead))
                state = merge(state, more)
            sums = accumulate(task, sums, *put_loss(task, unit, state, label(task, unit)))
            number, unit = next_number, next_unit
        return total_of(task, sums)

    return work


def value_and_grad_pipelined(loss):
    """Return the work that computes loss and gradient part by part.

    With each part, the maximum of the next part is found, and the same part of the row before is written.
    """
    put_loss, coefficients, next_kept = loss.put_loss, loss.coefficients, next_kept_of(loss)

    @inlined
    def work(task, tile, first, stop):
        sums = EMPTY_SUM
        (n_parts, length), parts = row_parts(task), part_numbers(task)
        number, unit = next_kept(task, tile, first, stop)
        m = max_of(task, row_part(task, unit, 0, length))
        row = no_pending(task, unit)
        while number < stop:
            next_number, next_unit = next_kept(task, tile, number + 1, stop)
            prefetch_border(task, unit)
            y, state = label(task, unit), empty(task, splat(task.x, m))
            for k in range(n_parts):
                part, ahead = row_part(task, unit, k, length), next_part(task, unit, k + 1, n_parts, length, next_unit)
                behind = pending_part(task, row, parts, k, length)
                state = rescale_to(state, splat(task.x, m))
                put(parts, k * itemsize(parts), lane(widen(state.m), 0))
                overlap = Overlap(write_and_read, finish_both, Pipeline(ahead, behind))
                more, m = state_of(task, part, 0, part.stop, state.m, overlap)
                state = merge(state, more)
            sums = accumulate(task, sums, *put_loss(task, unit, state, y))
            row = pending_row(task, unit, coefficients(task, unit, state, y, to_row(task, number, state)), state.m, parts)
            number, unit = next_number, next_unit
        if row.stop > 0:
            for k in range(n_parts):
                finish_pending(task, pending_part(task, row, parts, k, length), 0)
        return total_of(task, sums)

    return work
