"""What a thread runs: it checks the class indices, reduces the segments of split rows, and does the task's work."""

from fastxent._abi.argument_block import BAD, CHECK, DIVISOR, SEGMENTS, WORK
from fastxent._abi.variant import CHECKED, CHECKS
from fastxent._kernels.parallel_for import barrier, one_by_one, parallel_for, thread_number
from fastxent._simd.lanes import sum_across
from fastxent._simd.memory import call_kernel, gather, get, load, load_masked, put
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import LANES, all_lanes, count_lanes, first_lanes, lane, splat, where

NAN = float("nan")


@inlined
def check_targets(task, tile, number):
    """Return the sum of the weights of a unit of CHECKED rows (for the mean); set BAD if a class index is out of range."""
    n_kept, n_good = 0, 0
    weights = splat(task.w, 0.0)
    whole = (number + 1) * CHECKED <= task.n_rows
    for row in range(number * CHECKED, (number + 1) * CHECKED, LANES):
        if whole:
            rows, y = all_lanes(), load(task.y + 8 * row)
        else:
            rows = first_lanes(task.n_rows - row)
            y = load_masked(task.y + 8 * row, rows)
        kept = rows & (y != task.ignore)
        good = kept & (y >= 0) & (y < task.n_classes)
        n_kept += count_lanes(kept)
        n_good += count_lanes(good)
        if task.weighted != 0 or task.sampled != 0:
            weight = splat(task.w, 1.0)
            if task.weighted != 0:
                weight = gather(task.w, y * 8, good)
            if task.sampled != 0:
                weight = weight * load_masked(task.u + 8 * row, rows)
            weights = weights + where(good, weight, 0.0)
    if n_good < n_kept:
        put(task.total, BAD, 1.0)
    if task.weighted != 0 or task.sampled != 0:
        return lane(sum_across(weights), 0), 1.0
    return float(n_good), 1.0


check_all = one_by_one(check_targets)


def check(task, phase, me):
    """Check, as a kernel, that all class indices are in range, and sum the rows' weights."""
    parallel_for(task, phase, me, check_all, (task.n_rows + CHECKED - 1) // CHECKED, CHECKS)


def kernel(work):
    """Return a kernel that does ``work`` on all units."""

    def on_all_units(task, phase, me):
        parallel_for(task, phase, me, work, task.n_units, task.chunk)

    return on_all_units


def launch(task):
    """Run a task's kernels one after the other. Each thread of a team does so, with the same argument block.

    Until all class indices are checked, nothing is written, and no class index is used to read anything.
    """
    me = thread_number(task)
    if task.check != 0:
        call_kernel(task.check, task, CHECK, me)
        barrier(task, CHECK)
        if get(task.total, BAD) != 0.0:
            return
        if task.average != 0:  # all threads write the same value
            weight = get(task.total, 8 * CHECK)
            put(task.total, DIVISOR, weight if weight != 0.0 else NAN)
    if task.save_segment != 0:
        call_kernel(task.save_segment, task, SEGMENTS, me)
        barrier(task, SEGMENTS)
    call_kernel(task.kernel, task, WORK, me)
