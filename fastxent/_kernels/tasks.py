"""What each task computes: a loss by one of the schedules, or another function of one unit after the other."""

from types import ModuleType

from fastxent._abi.variant import Schedule
from fastxent._kernels import schedules, steps
from fastxent._kernels.losses import (
    class_shard,
    cross_entropy,
    focal,
    hessian,
    log_prob_entropy,
    pointwise,
    softmax,
    statistics,
    sums,
)
from fastxent._kernels.parallel_for import one_by_one
from fastxent._kernels.split_rows import save_segment

# Tasks that compute a loss: its module, and whether its gradient is written too
LOSSES: dict[str, tuple[ModuleType, bool]] = {
    "value": (cross_entropy, False),
    "value_and_grad": (cross_entropy, True),
    "log_prob_and_entropy": (log_prob_entropy, False),
    "log_prob_and_entropy_grad": (log_prob_entropy, True),
    "focal": (focal, False),
    "focal_value_and_grad": (focal, True),
    "class_shard": (class_shard, False),
}
# Tasks that call a function for one unit after the other
VISITS = {
    "save_segment": save_segment,
    "class_shard_grad": class_shard.gradient,
    "grad_hess": hessian.grad_hess,
    "boosting": hessian.grad_hess,
    "stats": statistics.stats,
    "softmax": softmax.softmax,
    "log_softmax": softmax.log_softmax,
    "logsumexp": softmax.logsumexp,
    "logsumexp_of_products": sums.logsumexp_of_products,
    "entropy": sums.entropy,
}
# The same, where a unit is elements that do not depend on each other
POINTWISE = {
    "binary": pointwise.binary,
    "divergence": pointwise.divergence,
    "divergence_of_logs": pointwise.divergence_of_logs,
}
# For each schedule, what makes the work from a loss, without and with its gradient
SCHEDULES = {
    Schedule.PAIRED: (schedules.value_paired, schedules.value_and_grad_paired),
    Schedule.PANELS_OVERLAPPED: (schedules.by_panels, schedules.by_panels),
    Schedule.PIPELINED: (schedules.value_pipelined, schedules.value_and_grad_pipelined),
}


def work_of(name, schedule):
    """Return ``work(task, tile, first, stop)``: it does the task on units ``first`` ... ``stop - 1`` and returns a sum."""
    if name not in LOSSES:
        return one_by_one((VISITS | POINTWISE)[name])
    loss, differentiate = LOSSES[name]
    if schedule in SCHEDULES:
        return SCHEDULES[schedule][differentiate](loss)
    return one_by_one((steps.value_and_grad if differentiate else steps.value)(loss))
