"""What each task computes: a loss, by one of the schedules, or something else of one unit after the other."""

from types import ModuleType

from fastxent._abi.variant import Schedule
from fastxent._kernels import schedules, steps
from fastxent._kernels.losses import (
    cross_entropy,
    hessian,
    log_prob_entropy,
    pointwise,
    softmax,
    statistics,
    sums,
)
from fastxent._kernels.parallel_for import one_by_one
from fastxent._kernels.split_rows import save_segment

# The loss, and whether its gradient is written too
LOSSES: dict[str, tuple[ModuleType, bool]] = {
    "value": (cross_entropy, False),
    "value_and_grad": (cross_entropy, True),
    "log_prob_and_entropy": (log_prob_entropy, False),
    "log_prob_and_entropy_grad": (log_prob_entropy, True),
}
# What is done with one unit
VISITS = {
    "save_segment": save_segment,
    "grad_hess": hessian.grad_hess,
    "stats": statistics.stats,
    "softmax": softmax.softmax,
    "log_softmax": softmax.log_softmax,
    "logsumexp": softmax.logsumexp,
    "logsumexp_of_products": sums.logsumexp_of_products,
    "entropy": sums.entropy,
}
# The same of elements, each by itself
POINTWISE = {
    "binary": pointwise.binary,
    "divergence": pointwise.divergence,
    "divergence_of_logs": pointwise.divergence_of_logs,
}
# What makes the work of a loss, without and with its gradient
SCHEDULES = {
    Schedule.PAIRED: (schedules.value_paired, schedules.value_and_grad_paired),
    Schedule.PANELS_OVERLAPPED: (schedules.by_panels, schedules.by_panels),
    Schedule.PIPELINED: (schedules.value_pipelined, schedules.value_and_grad_pipelined),
}


def work_of(name, schedule):
    """What task ``name`` does with units ``first`` ... ``stop - 1``: ``work(task, tile, first, stop)`` gives their sum."""
    if name not in LOSSES:
        return one_by_one((VISITS | POINTWISE)[name])
    loss, differentiate = LOSSES[name]
    if schedule in SCHEDULES:
        return SCHEDULES[schedule][differentiate](loss)
    return one_by_one((steps.value_and_grad if differentiate else steps.value)(loss))
