"""A shard of a linear layer's classes: its logits are computed block by block of rows, and again in the backward.

If all rows are one block, its logits are kept for the backward. The forward goes through the blocks before the processes know
where the shards lie. So it takes the logits of the targets where they were the last time, and goes through the blocks once more
if that was wrong. A dot product for each target would cost nothing, but its last bits are not those of the block's product, and
the loss of a confident row is a difference of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastxent._runtime.arguments import Array
from fastxent.torch import _bridge
from fastxent.torch._bridge import NONE, Options, as_float64
from fastxent.torch._class_shards import (
    Coefficients,
    Sums,
    alike_of,
    at_label,
    coefficients,
    first_trip,
    labels,
    losses,
    numbers,
    reduced,
    refuse_double_backward,
    second_trip,
    targets_of,
)
from fastxent.torch._linear_blocks import Block, Gradients, Layer, blocks
from fastxent.torch._shard_messages import errors_in_all, expected_start


class LinearShard:
    """The shard, and the rows that are not ignored."""

    def __init__(
        self, layer: Layer, w: Tensor | None, kept: Array, memory_limit: int | None, block: Block | None = None
    ) -> None:
        self.layer, self.w, self.memory_limit = layer, w, memory_limit
        self.block = block  # all rows with their logits, if these are there
        self.kept = None if kept.all() else torch.from_numpy(kept.nonzero()[0])
        self.label, self.x = np.empty(0, np.int64), np.empty(0)  # the last class indices that were asked for, and their logits

    @property
    def n_classes(self) -> int:
        return len(self.layer.linear_weight)

    def sums(self, label: Array, smooth: bool) -> Sums:
        """Return the sums of the rows, and remember the logits of classes ``label``."""
        sums = Sums(np.full(len(label), -np.inf), np.zeros(len(label)), np.zeros(len(label)))
        self.label, self.x = label, np.zeros(len(label))
        for block, its_label in self._blocks(label):
            for values, of_block in zip(sums, first_trip(block.logits, its_label, self.w, smooth), strict=True):
                values[block.part] = of_block
            self.x[block.part] = at_label(block.logits, its_label)
        return sums

    def at_label(self, label: Array) -> Array:
        if not np.array_equal(label, self.label):
            self.label, self.x = label, np.zeros(len(label))
            for block, its_label in self._blocks(label):
                self.x[block.part] = at_label(block.logits, its_label)
        return self.x

    def gradients(self, label: Array, of: Coefficients, uniform: float, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        """Return what this shard gives to the gradient of the input, and the gradients of its weight and bias.

        Whatever block was there has become its gradient then.
        """
        gradients = Gradients(self.layer, wanted, self.kept)
        for block, its_label in self._blocks(label):
            second_trip(block.logits, its_label, self.w, of.part(block.part), uniform, block.logits)
            gradients.add(block)
        return gradients.result()

    def _blocks(self, label: Array) -> Iterator[tuple[Block, Tensor]]:
        if self.n_classes:
            all_labels = torch.from_numpy(label)
            for block in blocks(self.layer, self.kept, self.memory_limit) if self.block is None else [self.block]:
                self.block = block if len(block.logits) == len(label) else None
                yield block, all_labels[block.part]


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, weight: Tensor | None, target: Tensor,
        sample_weight: Tensor | None, group: dist.ProcessGroup, vocab_start: int | None, options: Options,
        memory_limit: int | None,
    ) -> Tensor:  # fmt: skip
        with errors_in_all(group):
            _bridge.check_memory(target, weight, sample_weight)
            targets = targets_of(target, sample_weight, options)
            alike = alike_of(targets, options, weight is not None, ctx.needs_input_grad[0])
            kept, targets = targets.kept, targets.only_kept()
            shard = LinearShard(Layer(input, linear_weight, linear_bias), weight, kept, memory_limit)
            expected = expected_start(group, shard.n_classes) if vocab_start is None else vocab_start
            label, _ = labels(targets.y, targets.kept, expected, shard.n_classes)
            sums = shard.sums(label, options.label_smoothing > 0.0)
        loss, ctx.rows = losses(shard, sums, targets, alike, options, group, vocab_start)
        ctx.options, ctx.group, ctx.kept, ctx.memory_limit = options, group, kept, memory_limit
        ctx.block = shard.block
        ctx.save_for_backward(input, linear_weight, linear_bias, weight)
        dtype = torch.promote_types(input.dtype, torch.float32)
        if options.reduction == NONE:
            every = np.zeros(len(kept))
            every[kept] = loss
            return torch.from_numpy(every).to(dtype)
        return reduced(loss, ctx.rows.divisor, dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        *layer, weight = ctx.saved_tensors
        shard, rows = LinearShard(Layer(*layer), weight, ctx.kept, ctx.memory_limit, ctx.block), ctx.rows
        ctx.block = None  # it is overwritten; should another backward come, it computes the logits
        of_loss = numbers(as_float64(grad_output))
        of = coefficients(rows, ctx.options, of_loss[ctx.kept] if ctx.options.reduction == NONE else of_loss)
        wanted = ctx.needs_input_grad[:3]
        gradients = shard.gradients(rows.label, of, rows.uniform, wanted)
        if wanted[0]:
            dist.all_reduce(gradients[0], group=ctx.group)
        made = [g.to(t.dtype) if is_wanted else None for g, t, is_wanted in zip(gradients, layer, wanted, strict=True)]
        return *made, *(None,) * 7
