"""Loss and gradient of one unit of rows, for any loss.

``loss`` is a module of ``losses``, with a row formula in two halves: ``put_loss`` (``put_zero_loss`` for ignored rows) computes
losses from the rows' sums, and ``coefficients`` computes what ``gradient`` needs. ``schedules`` works on several units at a
time.
"""

from fastxent._kernels.addressing import locate, unscaled, write_tile
from fastxent._kernels.gradient import write_gradient
from fastxent._kernels.prefetch import write_zeros
from fastxent._kernels.split_rows import row_label, row_state, to_row
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import any_lane

# Each ``visit`` takes the number of a unit, and returns an addend and a factor of the loss: see ``parallel_for``.


def value(loss):
    """Return a ``visit`` that computes the loss."""
    put_loss, put_zero_loss = loss.put_loss, loss.put_zero_loss

    @inlined
    def visit(task, tile, number):
        unit = locate(task, tile, number)
        if task.split and unit.start > 0:
            return 0.0, 1.0
        if not any_lane(unit.kept):
            return put_zero_loss(task, unit)
        y = row_label(task, unit, number)
        return put_loss(task, unit, row_state(task, unit, number), y)

    return visit


def value_and_grad(loss):
    """Return a ``visit`` that computes the loss and its gradient."""
    put_loss, put_zero_loss, coefficients = loss.put_loss, loss.put_zero_loss, loss.coefficients

    @inlined
    def visit(task, tile, number):
        unit = locate(task, tile, number)
        total, tile_update = (0.0, 1.0), unscaled(task)
        if any_lane(unit.kept):
            y = row_label(task, unit, number)
            state = row_state(task, unit, number)
            if not task.split or unit.start == 0:
                total = put_loss(task, unit, state, y)
            tile_update = write_gradient(task, unit, coefficients(task, unit, state, y, to_row(task, number, state)))
        else:
            if not task.split or unit.start == 0:
                total = put_zero_loss(task, unit)
            write_zeros(task, unit)
        write_tile(task, unit, *tile_update)
        return total

    return visit
