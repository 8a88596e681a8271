"""The calls that people make, and so the kernels that are worth having before a call asks for them.

`warmup` compiles those of loss and gradient in the shapes of ``WARM``; wheels bring the kernels of all ``CALLS``. Which kernel
a call needs is asked of the plan: this table names calls, by shapes, dtypes and options, and not kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fastxent._abi.dtypes import ITEMSIZE, NAMES, STORAGE
from fastxent._abi.variant import BUILTINS, Schedule, Variant
from fastxent._runtime import fastpath
from fastxent._runtime.plan import make_plan, pointwise_plan

# Shapes of C-contiguous logits with the classes on the second axis: digits; a few hundred classes; ImageNet and more.
FEW, SOME, MANY = (64, 10), (64, 200), (64, 1000)
# The logits of a language model past the caches; of its last tokens, where rows are split among threads.
VOCABULARY, LAST_TOKENS = (4096, 32000), (8, 128000)
# Rows and classes of a linear layer whose loss alone is computed
TILE = (1024, 4200)
# Samples past the caches, and pixels in the caches and past them.
SAMPLES, MORE_SAMPLES = (1_000_000, 10), (100_000, 200)
PIXELS, IMAGES = (8, 21, 64, 64), (16, 150, 128, 128)

WARM = FEW, SOME, MANY, VOCABULARY, PIXELS, IMAGES
ALL = *WARM, LAST_TOKENS, SAMPLES, MORE_SAMPLES
LOSS = "value", "value_and_grad"
TRAINING = "float32", "bfloat16"
NUMPY = "float32", "float64"


class Calls(NamedTuple):
    """Calls of each of ``tasks``, with logits of each of ``dtypes`` in each of ``shapes``, and with these options."""

    tasks: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    labelled: bool = True
    soft: bool = False  # class probabilities in the dtype of the logits
    smooth: bool = False
    capped: bool = False


CALLS = (
    # Class indices, with or without weights: every dtype, by NumPy and PyTorch
    Calls(LOSS, NAMES, ALL),
    # Label smoothing and class probabilities: classifiers, segmentation and language models
    Calls(LOSS, (*TRAINING, "float64"), (FEW, MANY, VOCABULARY, PIXELS), smooth=True),
    Calls(LOSS, (*TRAINING, "float64"), (FEW, MANY, VOCABULARY), labelled=False, soft=True),
    # Softcap: language models
    Calls(LOSS, TRAINING, (MANY, VOCABULARY), capped=True),
    # Log-probabilities of tokens, for policies
    Calls(("log_prob_and_entropy", "log_prob_and_entropy_grad"), TRAINING, (MANY, VOCABULARY, LAST_TOKENS)),
    # The loss of a linear layer
    Calls(("class_shard",), NUMPY, (TILE,)),
    # Statistics and boosting
    Calls(("stats",), NUMPY, (FEW, MANY, VOCABULARY)),
    Calls(("grad_hess",), NUMPY, (FEW, SAMPLES)),
    # SciPy's functions
    Calls(("softmax", "log_softmax", "logsumexp", "entropy"), NUMPY, (FEW, MANY), labelled=False),
)
POINTWISE = (("binary", False), ("binary", True), ("divergence", False), ("divergence_of_logs", False))

Kernel = tuple[str, Variant]


def always() -> list[Kernel]:
    """Return the kernels that start and check the others."""
    return [(name, Variant("f32")) for name in ("launch", "check", *(BUILTINS if fastpath.ENABLED else ()))]


def warm(dtypes: Sequence[str]) -> list[Kernel]:
    """Return the kernels that `warmup` compiles."""
    return always() + [kernel for dtype in dtypes for kernel in kernels_of(Calls(LOSS, (dtype,), WARM))]


def kernels() -> list[Kernel]:
    """Return the kernels of all ``CALLS``, each once."""
    found = always() + [kernel for calls in CALLS for kernel in kernels_of(calls)]
    for dtype in map(STORAGE.__getitem__, NUMPY):
        found += [(task, pointwise_plan(1, dtype, dtype, differentiate).variant) for task, differentiate in POINTWISE]
    return list(dict.fromkeys(found))


def kernels_of(calls: Calls) -> list[Kernel]:
    """Return the kernels of some calls, and of rows that threads share also the one that reduces their segments."""
    found = []
    for dtype in map(STORAGE.__getitem__, calls.dtypes):
        for shape in calls.shapes:
            strides = tuple(math.prod(shape[axis + 1 :]) * ITEMSIZE[dtype] for axis in range(len(shape)))
            for task in calls.tasks:
                plan = make_plan(
                    task,
                    shape,
                    (strides,) * 3,
                    1,
                    dtype,
                    dtype if calls.soft else None,
                    calls.labelled,
                    calls.smooth,
                    calls.capped,
                )
                split = plan.variant.schedule == Schedule.SPLIT
                found += [(name, plan.variant) for name in (("save_segment", task) if split else (task,))]
    return found
