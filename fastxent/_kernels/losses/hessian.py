"""Gradient and Hessian diagonal of the cross-entropy per row, as gradient boosting needs them.

h_c = d2l/dx_c^2 = u Q p_c (1 - p_c), times a constant that boosting libraries have there
"""

from fastxent._kernels.addressing import g_step, locate, unscaled, write, write_tile
from fastxent._kernels.gradient import write_gradient
from fastxent._kernels.inputs import label
from fastxent._kernels.losses.cross_entropy import coefficients
from fastxent._kernels.prefetch import write_zeros
from fastxent._kernels.reduce import span_state
from fastxent._kernels.split_rows import to_row
from fastxent._kernels.stored_exponentials import exponentials
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import all_lanes, any_lane, narrow, splat


@inlined
def hessian_vector(task, unit, j, mask, f, s_max, s_rest, factor):
    """Return vector j of h_c = factor a e_c (s - e_c) / s, with s - e_c = (s_max - e_c) + s_rest."""
    e = exponentials(task, unit, j, mask, f.shift, f.power)
    return e * f.a * (((s_max - e) + s_rest) * f.inverse_s) * factor


@inlined
def grad_hess(task, tile, number):
    """Write the gradient, and the Hessian diagonal with the gradient's strides."""
    unit = locate(task, tile, number)
    zero, tile_update = splat(task.x, 0.0), unscaled(task)
    if any_lane(unit.kept):
        y = label(task, unit)  # read before the exponentials overwrite the tile
        state = span_state(task, unit)
        f = coefficients(task, unit, state, y, to_row(task, number, state))
        s_max, s_rest = narrow(task.x, state.s_max), narrow(task.x, state.s_rest)
        factor = narrow(task.x, splat(task.w, task.hessian_factor))
        for j in range(unit.start, unit.stop):
            whole = j < unit.full
            reads = all_lanes() if whole else unit.reads
            writes = all_lanes() if whole else unit.writes
            h = hessian_vector(task, unit, j, reads, f, s_max, s_rest, factor)
            write(task, task.h + (unit.g + j * g_step(task)), unit.g_lanes, h, writes)
        tile_update = write_gradient(task, unit, f)
    else:
        for j in range(unit.start, unit.stop):
            mask = all_lanes() if task.class_lanes and j < unit.full else unit.writes
            write(task, task.h + (unit.g + j * g_step(task)), unit.g_lanes, zero, mask)
        write_zeros(task, unit)
    write_tile(task, unit, *tile_update)
    return 0.0, 1.0
