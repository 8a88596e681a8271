"""Families: calls that differ in the extents of their arrays only, and whose arrays are dense.

Sequences of ever new lengths, and an epoch's last batch, are of the family of those before. So machine code (``fastcall``) asks
the plan (``plan.strategy``) about each call's extents, and writes what they change into the family's argument block: that
takes some ten nanoseconds, where Python takes a tenth of a millisecond. Which kernel does the work it looks up here; a kernel
that the family has not met yet is for Python to get.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fastxent._abi import argument_block as abi
from fastxent._runtime import run
from fastxent._runtime.plan import Plan, number_of, traits_of


class Family:
    """``words``: what machine code reads and writes, as ``argument_block`` says: numbers, a block, room for chunks."""

    def __init__(
        self, name: str, plan: Plan, axis: int, n_axes: int, *,
        innermost: bool = False, n_weights: int = 0, smoothing: float = 0.0, tiles: int, **arguments: Any,
    ) -> None:  # fmt: skip
        """``plan``: of one of its calls. ``arguments``: as `run.argument_block` takes them."""
        block = bytes(run.argument_block(name, plan, tiles=tiles, **arguments))[: run.HEAD_OF_BLOCK]
        n_bytes = 8 * abi.FAMILY + len(block) + abi.LINE * (1 + 2 * abi.ROOM)
        self.name, self.words = name, np.zeros(-(-n_bytes // 8), np.int64)
        variant = plan.variant
        soft = variant.target is not None
        self.words[: abi.SMOOTHING + 1] = (
            n_axes, axis, innermost, plan.itemsize, soft, soft and arguments.get("average", False), n_weights, 0,
        )  # fmt: skip
        traits = traits_of(name, variant.logits, variant.target, variant.capped)
        self.words[abi.TRAITS :][: len(traits)] = traits
        self.words.view(np.float64)[abi.SMOOTHING] = smoothing
        begin = self.words.ctypes.data
        at_block = begin + 8 * abi.FAMILY
        ctypes.memmove(at_block, block, len(block))
        at_chunks = at_block + len(block)
        at_chunks += -at_chunks % abi.LINE
        for slot, at in (
            ("axes", begin + 8 * abi.AXES), ("total", at_block + abi.BLOCK.size), ("taken", at_chunks),
            ("partial", at_chunks + 8), ("segments", at_chunks + abi.LINE * abi.ROOM), ("team", 1),
        ):  # fmt: skip
            self.words[abi.FAMILY + abi.SLOT[slot]] = at
        self.meet(plan)

    def meet(self, plan: Plan) -> None:
        """Get the kernels of a call, if there is room for them."""
        new = number_of(plan.variant), *run.kernels_of(self.name, plan.variant)
        kernels = self.words[abi.KERNELS :][: abi.MOST_KERNELS * abi.KERNEL].reshape(-1, abi.KERNEL)
        nth = int(self.words[abi.N_KERNELS])
        if nth < abi.MOST_KERNELS and new[0] not in kernels[:nth, 0]:
            kernels[nth] = new
            self.words[abi.N_KERNELS] = nth + 1
