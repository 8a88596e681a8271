"""Tasks as machine code runs them (``front_end``): of one shape, or of a family of shapes.

A family are calls that differ in the extents of their arrays only, and whose arrays are dense. Sequences of ever new lengths,
and an epoch's last batch, are of the family of those before: machine code makes their block ready (``front_end.strategy``).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fastxent._abi import argument_block as abi
from fastxent._fastpath.front_end import words
from fastxent._runtime import run
from fastxent._runtime.plan import Plan, number_of, traits_of
from fastxent._runtime.run import PackedTask

# Work, as ``front_end.launch.is_long`` counts it, that takes about 100 us on one thread. Measured: a float32 logit takes 0.3 to
# 0.5 ns and a row 5, in float64 three times as long.
MOST_HELD = {"f32": 250_000, "f64": 80_000}


class Task:
    """``words``: what machine code reads and writes, as ``front_end.words`` says."""

    words: np.ndarray[Any, np.dtype[np.int64]]


class Fixed(Task):
    """A task for arrays of one shape and of given strides."""

    def __init__(self, task: PackedTask) -> None:
        self.block = task.new_block()
        abi.START.pack_into(self.block, 0, 0, 0, 1)
        self.words = np.zeros(words.TASK, np.int64)
        most_held = MOST_HELD[task.plan.variant.acc]
        self.words[: words.USEFUL + 1] = ctypes.addressof(self.block), most_held, False, task.useful


class Family(Task):
    """Its words, its block, and room for chunks."""

    def __init__(
        self, name: str, plan: Plan, axis: int, n_axes: int, *,
        innermost: bool = False, n_weights: int = 0, smoothing: float = 0.0, **arguments: Any,
    ) -> None:  # fmt: skip
        """``plan``: of one of its calls. ``arguments``: as `run.argument_block` takes them."""
        block = bytes(run.argument_block(name, plan, **arguments))[: run.HEAD_OF_BLOCK]
        n_bytes = 8 * words.TASK + len(block) + abi.LINE * (1 + 2 * words.ROOM)
        self.name, self.words = name, np.zeros(-(-n_bytes // 8), np.int64)
        variant = plan.variant
        soft = variant.target is not None
        begin = self.words.ctypes.data
        at_block = begin + 8 * words.TASK
        self.words[: words.AXES] = (
            at_block, MOST_HELD[variant.acc], True, 0,
            n_axes, axis, innermost, plan.itemsize, soft, soft and arguments.get("average", False), n_weights, 0, 0,
            *traits_of(name, variant.logits, variant.target, variant.capped),
        )  # fmt: skip
        self.words.view(np.float64)[words.SMOOTHING] = smoothing
        ctypes.memmove(at_block, block, len(block))
        at_chunks = at_block + len(block)
        at_chunks += -at_chunks % abi.LINE
        for slot, at in (
            ("axes", begin + 8 * words.AXES), ("total", at_block + abi.BLOCK.size), ("taken", at_chunks),
            ("partial", at_chunks + 8), ("segments", at_chunks + abi.LINE * words.ROOM), ("team", 1),
        ):  # fmt: skip
            self.words[words.TASK + abi.SLOT[slot]] = at
        self.meet(plan)

    def meet(self, plan: Plan) -> None:
        """Get the kernels of a call, if there is room for them."""
        new = number_of(plan.variant), *run.kernels_of(self.name, plan.variant)
        kernels = self.words[words.KERNELS :][: words.MOST_KERNELS * words.KERNEL].reshape(-1, words.KERNEL)
        nth = int(self.words[words.N_KERNELS])
        if nth < words.MOST_KERNELS and new[0] not in kernels[:nth, 0]:
            kernels[nth] = new
            self.words[words.N_KERNELS] = nth + 1


def family_of(task: PackedTask, axis: int, n_axes: int, **more: Any) -> Family:
    """Of calls like this one: see `Family`."""
    return Family(task.name, task.plan, axis, n_axes, **more, **task.arguments)
