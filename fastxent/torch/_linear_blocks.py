"""The products of a linear layer with a block of rows at a time: the logits of all rows never exist together.

    for block in blocks(layer, kept, memory_limit):     block.logits = block.input @ linear_weight.T + linear_bias
        ...                                             a kernel turns the logits into their gradient, in place
        gradients.add(block)                            two more products, which use it

Half precision is multiplied in float32, converted some classes at a time, unless the processor multiplies bfloat16 itself; its
gradients add up in float32 over the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastxent._runtime.bfloat16 import multiplies_bfloat16
from fastxent._runtime.blocks import classes_per_block, rows_per_block
from fastxent.torch._bridge import empty

ROWS_CONVERTED = 16  # of bfloat16 logits' gradients at a time, to be added up in float32


class Layer(NamedTuple):
    """A linear layer and the rows that go through it."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    linear_bias: Tensor | None  # (C,)

    @property
    def precision(self) -> torch.dtype:
        """The dtype in which products are computed, and of the logits."""
        return self.input.dtype if self.input.dtype == torch.bfloat16 and multiplies_bfloat16() else self.accumulated

    @property
    def accumulated(self) -> torch.dtype:
        """The dtype in which gradients add up."""
        return torch.promote_types(self.input.dtype, torch.float32)

    @property
    def held(self) -> torch.dtype:
        """The dtype of gradients that wait for grad_output. Before that scales them they may be too small for float16."""
        return torch.float32 if self.input.dtype == torch.float16 else self.input.dtype


class Block(NamedTuple):
    """Some of the rows. The next block overwrites the logits."""

    part: slice  # of the kept rows
    rows: slice | Tensor  # the same, counted over all rows
    input: Tensor  # (B, D), in the precision of the products
    logits: Tensor  # (B, C)


def blocks(layer: Layer, kept: Tensor | None, memory_limit: int | None) -> Iterator[Block]:
    """Yield the rows whose numbers are in ``kept``, or all rows, block by block."""
    n_rows = len(layer.input) if kept is None else len(kept)
    n_classes, n_features = layer.linear_weight.shape
    unit = layer.precision.itemsize
    size = rows_per_block(n_rows, n_features, n_classes, layer.input.itemsize, unit, memory_limit)
    logits = empty((min(size, n_rows), n_classes), layer.precision)
    for start in range(0, n_rows, size):
        part = slice(start, min(start + size, n_rows))
        rows = part if kept is None else kept[part]
        block = Block(part, rows, layer.input[rows].to(layer.precision), logits[: part.stop - start])
        _multiply(layer, block)
        yield block


def _multiply(layer: Layer, block: Block) -> None:
    # Autocast leaves products with out= alone, so these stay in the precision of their operands.
    for classes, weight in _slabs(layer):
        out = block.logits[:, classes]
        if layer.linear_bias is None:
            torch.mm(block.input, weight.T, out=out)
        else:
            torch.addmm(layer.linear_bias[classes].to(layer.precision), block.input, weight.T, out=out)


def _slabs(layer: Layer) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weights in the precision of the products: all classes at once, or as many as are converted at a time."""
    weight = layer.linear_weight
    n_classes, n_features = weight.shape
    if weight.dtype == layer.precision:
        yield slice(0, n_classes), weight
        return
    size = classes_per_block(n_features, weight.itemsize)
    converted = empty((min(size, n_classes), n_features), layer.precision)
    for start in range(0, n_classes, size):
        classes = slice(start, min(start + size, n_classes))
        yield classes, converted[: classes.stop - start].copy_(weight[classes])


class Gradients:
    """The gradients of a layer, to which each block adds its part; those that are not wanted take no product."""

    def __init__(self, layer: Layer, wanted: Sequence[bool], kept: Tensor | None) -> None:
        self.layer, self.wanted = layer, wanted
        self.is_first = True  # the first block writes, the others add
        self.n_kept = len(layer.input) if kept is None else len(kept)
        x, w, b = (t.shape if t is not None and is_wanted else (0,) for t, is_wanted in zip(layer, wanted, strict=True))
        self.input = empty(x, layer.accumulated)
        self.shape_of_weight, self.linear_weight = w, empty((0,), layer.accumulated)  # the first block makes it
        self.linear_bias = torch.zeros(b, dtype=torch.float64, device="cpu")  # of one number a class, which costs nothing
        if kept is not None:  # a row in no block has the gradient 0
            self.input.zero_()

    def add(self, block: Block) -> None:
        """Add the part of a block whose logits have become their gradient."""
        if self.wanted[0]:
            self._add_to_input(block)
        if self.wanted[1]:
            self._add_to_weight(block)
        if self.wanted[2]:
            for some in block.logits.split(len(block.logits) if block.logits.itemsize > 2 else ROWS_CONVERTED):
                self.linear_bias += some.to(self.layer.accumulated).sum(0)
        self.is_first = False

    def _add_to_input(self, block: Block) -> None:
        direct = isinstance(block.rows, slice) and self.layer.precision == self.layer.accumulated
        out = self.input[block.rows] if direct else torch.empty_like(block.input)
        for classes, weight in _slabs(self.layer):
            out.addmm_(block.logits[:, classes], weight, beta=float(classes.start > 0))
        if not direct:
            self.input[block.rows] = out.to(self.input.dtype)

    def _add_to_weight(self, block: Block) -> None:
        if self.is_first:
            is_only = len(block.logits) == self.n_kept
            self.linear_weight = empty(self.shape_of_weight, self.layer.precision if is_only else self.layer.accumulated)
        if self.layer.precision == self.linear_weight.dtype:
            self.linear_weight.addmm_(block.logits.T, block.input, beta=0.0 if self.is_first else 1.0)
            return
        n_classes, n_features = self.linear_weight.shape
        size = classes_per_block(n_features, block.input.itemsize)
        product = empty((min(size, n_classes), n_features), self.layer.precision)
        for start in range(0, n_classes, size):
            classes = slice(start, min(start + size, n_classes))
            part = torch.mm(block.logits[:, classes].T, block.input, out=product[: classes.stop - start])
            into = self.linear_weight[classes]
            into.copy_(part) if self.is_first else into.add_(part)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of input, weight and bias as they added up; one that is not wanted is empty."""
        if self.is_first:
            self.input.zero_()
            self.linear_weight = torch.zeros(self.shape_of_weight, dtype=self.layer.accumulated, device="cpu")
        return self.input, self.linear_weight, self.linear_bias

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in the dtype in which they wait for grad_output."""
        x, w, b = (gradient.to(self.layer.held) for gradient in self.result())
        return x, w, b
