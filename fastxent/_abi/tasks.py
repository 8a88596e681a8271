"""The tasks, with what a plan has to know of each. What they compute is in ``_kernels.tasks``."""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    losses: tuple[str, ...]  # the modules of ``_kernels.losses`` that its kernels are made of
    stores: bool = False  # a second trip uses the first one's exponentials, which are stored if there is room
    interleaves: bool = False  # it can work on several short rows, or panels of them, at a time
    pipelines: bool = False  # it can be software-pipelined
    splits: bool = False  # it can split rows into segments
    entropic: bool = False  # see `Variant`
    tempered: bool = False
    rounds: bool = False  # its gradient is stored in float32, whatever the logits are stored in


TASKS = {
    "value": Task(("cross_entropy",), interleaves=True, pipelines=True, splits=True),
    "value_and_grad": Task(("cross_entropy",), stores=True, interleaves=True, pipelines=True, splits=True),
    "grad_hess": Task(("hessian", "cross_entropy"), stores=True),
    "boosting": Task(("hessian", "cross_entropy"), stores=True, rounds=True),
    "stats": Task(("statistics", "cross_entropy"), entropic=True),
    "log_prob_and_entropy": Task(
        ("log_prob_entropy",), interleaves=True, pipelines=True, splits=True, entropic=True, tempered=True
    ),
    "log_prob_and_entropy_grad": Task(("log_prob_entropy",), splits=True, entropic=True, tempered=True),
    "focal": Task(("focal", "cross_entropy"), interleaves=True, pipelines=True, splits=True),
    "focal_value_and_grad": Task(("focal", "cross_entropy"), stores=True, interleaves=True, pipelines=True, splits=True),
    "class_shard": Task(("class_shard",), interleaves=True, pipelines=True, splits=True),
    "class_shard_grad": Task(("class_shard",)),
    "softmax": Task(("softmax",), stores=True, splits=True),
    "log_softmax": Task(("softmax",), splits=True),
    "logsumexp": Task(("softmax",), splits=True),
    "logsumexp_of_products": Task(("sums",)),
    "entropy": Task(("sums",)),
    "binary": Task(("pointwise",)),
    "divergence": Task(("pointwise",)),
    "divergence_of_logs": Task(("pointwise",)),
}
