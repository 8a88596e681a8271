"""The tasks, with what a plan has to know of each. What they compute is in ``_kernels.tasks``."""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    stores: bool = False  # a second trip uses the first one's exponentials, which are stored if there is room
    interleaves: bool = False  # it can work on several short rows, or panels of them, at a time
    pipelines: bool = False  # it can be software-pipelined
    splits: bool = False  # it can split rows into segments
    entropic: bool = False  # see `Variant`
    tempered: bool = False


TASKS = {
    "value": Task(interleaves=True, pipelines=True, splits=True),
    "value_and_grad": Task(stores=True, interleaves=True, pipelines=True, splits=True),
    "grad_hess": Task(stores=True),
    "stats": Task(entropic=True),
    "log_prob_and_entropy": Task(interleaves=True, pipelines=True, splits=True, entropic=True, tempered=True),
    "log_prob_and_entropy_grad": Task(splits=True, entropic=True, tempered=True),
    "class_shard": Task(interleaves=True, pipelines=True, splits=True),
    "class_shard_grad": Task(),
    "softmax": Task(stores=True, splits=True),
    "log_softmax": Task(splits=True),
    "logsumexp": Task(splits=True),
    "logsumexp_of_products": Task(),
    "entropy": Task(),
    "binary": Task(),
    "divergence": Task(),
    "divergence_of_logs": Task(),
}
