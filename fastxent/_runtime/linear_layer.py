"""Runs a task on the logits x W' + b of a linear layer, block by block of rows: all of the logits are never in memory.

A block of logits is computed by BLAS, a kernel turns it into its gradient g in place, and two more products use that, some
classes at a time, so that the second finds g in the caches: g W is added to the block's gradient of the input, and g' x to the
gradient of the weight. Half precision, and any weight that BLAS cannot take as it lies, is copied to a scratch in the precision
of the products. Rows that are ignored are dropped first, so every block is full of rows that count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastxent._runtime import buffers
from fastxent._runtime.arguments import (
    Array,
    accumulator,
    address,
    check_classes,
    check_vector,
    floating,
    storage,
    target_for,
)
from fastxent._runtime.blas import add_product
from fastxent._runtime.blocks import classes_per_block, rows_per_block
from fastxent._runtime.options import checked, fields_of, flags_of
from fastxent._runtime.plan import Plan, make_plan
from fastxent._runtime.run import run


class Layer(NamedTuple):
    """A checked call. N rows, of which K are kept, D features, V classes."""

    x: Array  # (N, D)
    weight: Array  # (V, D)
    bias: Array | None  # (V,), in the precision of the products
    rows: tuple[int, ...]  # shape of the rows
    kept: Array | None  # (K,) numbers of the rows that are not ignored; None: all are kept
    y: Array | None  # (K,) int64: class indices, all in range, or None
    t: Array | None  # (N, V): class probabilities, or None
    class_weight: Array | None  # (V,) float64
    u: Array | None  # (K,) float64: sample weights
    divisor: float  # of the mean
    fields: dict[str, float]  # the options as fields of the argument block
    flags: dict[str, bool]  # and of the plan
    memory_limit: int | None
    n_threads: int | None

    @property
    def n_kept(self) -> int:
        return len(self.x) if self.kept is None else len(self.kept)

    @property
    def precision(self) -> np.dtype[Any]:
        """The dtype of the products."""
        return accumulator(self.x.dtype)

    @property
    def acc(self) -> np.dtype[Any]:
        """The dtype of the losses."""
        return accumulator(self.x.dtype) if self.t is None else accumulator(self.x.dtype, self.t.dtype)

    def rows_of(self, first: int, stop: int) -> Any:
        """Return the index, in all rows, of the kept rows from ``first`` to ``stop``."""
        return slice(first, stop) if self.kept is None else self.kept[first:stop]

    def spread(self, values: Array, fill: float = 0) -> Any:
        """Return one value for each row: those of the kept rows, and ``fill`` in the others."""
        if self.kept is not None:
            everywhere = np.full(len(self.x), fill, values.dtype)
            everywhere[self.kept] = values
            values = everywhere
        return values.reshape(self.rows)[()]


def check_layer(
    input: object,
    linear_weight: object,
    target: object,
    *,
    linear_bias: object,
    weight: object = None,
    sample_weight: object = None,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory_limit: int | None,
    n_threads: int | None,
) -> Layer:
    """Check the arguments that the functions of a linear layer share; every class index is checked, too."""
    x, w = floating(input, "input"), floating(linear_weight, "linear_weight")
    if x.ndim == 0:
        raise ValueError("input is a number; it needs an axis of features")
    if w.ndim != 2:
        raise ValueError(f"linear_weight has shape {w.shape}; it must be (classes, features)")
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"input has shape {x.shape} and linear_weight {w.shape}; their last axes, the features, must agree")
    if x.dtype != w.dtype:
        raise TypeError(f"linear_weight has dtype {w.dtype}; it must be that of input, {x.dtype}")
    rows, n_classes = x.shape[:-1], len(w)
    bias = check_vector(linear_bias, "linear_bias", (n_classes,), "one number per class")
    smoothing, ignore = checked("label_smoothing", label_smoothing), checked("ignore_index", ignore_index)
    z, cap = checked("z_loss", z_loss), checked("softcap", softcap) or 0.0
    class_weight = check_vector(weight, "weight", (n_classes,), "one weight per class")
    u = check_vector(sample_weight, "sample_weight", rows, "one weight per row")
    limit, threads = checked("memory_limit", memory_limit), checked("n_threads", n_threads)
    y, t = target_for(target, (*rows, n_classes), len(rows), ignore)
    u, kept = None if u is None else u.reshape(-1), None
    if y is not None:
        check_classes(y, n_classes, None, ignore)
        y, kept = y.reshape(-1), np.flatnonzero(y != ignore)
        if len(kept) < len(y):
            y, u = y[kept], None if u is None else u[kept]
        else:
            kept = None
        weights = np.ones(len(y)) if class_weight is None else class_weight[y]
        divisor = float((weights if u is None else weights * u).sum())
    elif ignore >= 0:
        raise ValueError(f"ignore_index = {ignore} has no meaning for a target of class probabilities")
    else:
        divisor = float(math.prod(rows) if u is None else u.sum()) if n_classes else 0.0
    return Layer(
        x.reshape(math.prod(rows), x.shape[-1]), w, None if bias is None else bias.astype(accumulator(x.dtype)), rows, kept,
        y, None if t is None else t.reshape(math.prod(rows), n_classes), class_weight, u, divisor,
        fields_of(n_classes or 1, ignore, smoothing, z, cap), flags_of(y is not None, ignore, smoothing, z, cap), limit,
        threads,
    )  # fmt: skip


@np.errstate(all="ignore")  # inf and nan are numbers here
def run_task(
    name: str,
    layer: Layer,
    outputs: dict[str, Array],
    gradients: Gradients | None = None,
    **fields: float,
) -> float:
    """Run a task on all logits; return the sum of the losses.

    ``outputs`` are arrays of one value for each kept row. The task's gradient goes into ``gradients``.
    """
    n_features, n_classes, n_kept = layer.x.shape[1], len(layer.weight), layer.n_kept
    if n_kept == 0 or n_classes == 0:
        return 0.0
    block = rows_per_block(
        n_kept, n_features, n_classes, layer.x.itemsize, layer.precision.itemsize, layer.memory_limit
    )
    space = buffers.empty((block, n_classes), layer.precision)
    weight = Weight(layer)
    total = 0.0
    for first in range(0, n_kept, block):
        stop = min(first + block, n_kept)
        rows, logits = layer.rows_of(first, stop), space[: stop - first]
        x = np.ascontiguousarray(layer.x[rows], layer.precision)
        t = None if layer.t is None else _with_classes_together(layer.t[rows])
        weight.multiply(x, layer.bias, logits)
        at = {field: address(a[first:]) for field, a in outputs.items()}
        if gradients is not None:
            at["g"] = address(logits)
        sums = run(
            name, _plan(name, logits, t, layer.flags), layer.n_threads, x=address(logits), t=address(t),
            y=address(None if layer.y is None else layer.y[first:]), u=address(None if layer.u is None else layer.u[first:]),
            w=address(layer.class_weight), **layer.fields, **at, **fields,
        )  # fmt: skip
        total += sums[0]
        if gradients is not None:
            gradients.add(x, rows, logits, weight)
    return total


def _with_classes_together(t: Array) -> Array:
    return t if t.strides[1] == t.itemsize else np.ascontiguousarray(t)


def _plan(name: str, logits: Array, t: Array | None, flags: dict[str, bool]) -> Plan:
    strides = logits.strides, logits.strides, (logits if t is None else t).strides
    return make_plan(
        name, logits.shape, strides, 1, storage(logits.dtype) or "", None if t is None else storage(t.dtype), **flags
    )


class Weight:
    """A layer's weight, as products take it: as it lies, or some classes at a time, converted."""

    def __init__(self, layer: Layer) -> None:
        self.w, precision = layer.weight, layer.precision
        self.as_it_lies = self.w.dtype == precision and _is_for_blas(self.w)
        n_classes, n_features = self.w.shape
        self.scratch = np.empty((min(classes_per_block(n_features, self.w.itemsize), n_classes), n_features), precision)

    def classes(self, n_others: int) -> Iterator[slice]:
        """Yield so many classes at a time that a matrix of ``n_others`` numbers a class is as small as the scratch."""
        n_classes, step = len(self.w), classes_per_block(n_others, self.w.itemsize)
        for first in range(0, n_classes, step):
            yield slice(first, min(first + step, n_classes))

    def of(self, classes: slice) -> Array:
        """Return the weights of some classes; the next call may overwrite them."""
        w = self.w[classes]
        if self.as_it_lies:
            return w
        scratch = self.scratch[: len(w)]
        np.copyto(scratch, w, casting="same_kind")
        return scratch

    def multiply(self, x: Array, bias: Array | None, out: Array) -> None:
        """Write the logits; the bias is added while the caches hold them."""
        if self.as_it_lies and bias is None:
            np.matmul(x, self.w.T, out=out)
            return
        for classes in self.classes(self.w.shape[1]):
            np.matmul(x, self.of(classes).T, out=out[:, classes])
            if bias is not None:
                out[:, classes] += bias[classes]


def _is_for_blas(a: Array) -> bool:
    """Return whether NumPy passes a matrix to BLAS as it lies; others it multiplies by slow loops of its own."""
    (n, m), unit = a.shape, a.itemsize
    rows, columns = a.strides
    adjacent = (columns == unit and rows >= m * unit) or (rows == unit and columns >= n * unit)
    return a.flags.aligned and adjacent and rows % unit == columns % unit == 0


class Gradients:
    """The gradients of a layer's input, weight and bias, added up over blocks of rows; half precision is rounded at the end."""

    def __init__(self, layer: Layer) -> None:
        x, w, precision = layer.x, layer.weight, layer.precision
        self.dtype, self.shape = x.dtype, (*layer.rows, x.shape[1])
        untouched = layer.kept is not None or not len(w)
        self.input = np.zeros(x.shape, x.dtype) if untouched else buffers.empty(x.shape, x.dtype)
        self.in_place = layer.kept is None and x.dtype == precision
        self.weight = buffers.empty(w.shape, precision)
        self.bias = None if layer.bias is None else np.zeros(len(w))
        self.is_first = True

    def add(self, x: Array, rows: Any, g: Array, weight: Weight) -> None:
        """Add what a block of rows gives: its input x, and the gradient g of its logits."""
        dinput = self.input[rows] if self.in_place else np.empty(x.shape, x.dtype)
        dinput[...] = 0
        # OpenBLAS packs all of an operand in its own memory: so some classes at a time.
        for classes in weight.classes(max(x.shape)):
            some = g[:, classes]
            add_product(some, weight.of(classes), dinput)
            if self.is_first:
                np.matmul(some.T, x, out=self.weight[classes])
            else:
                add_product(some.T, x, self.weight[classes], weight.scratch[: some.shape[1]])
        if not self.in_place:
            self.input[rows] = dinput
        if self.bias is not None:
            self.bias += np.ones(len(g), g.dtype) @ g
        self.is_first = False

    def result(self) -> tuple[Array, Array, Array | None]:
        if self.is_first:  # no row is kept
            self.weight[...] = 0
        bias = None if self.bias is None else self.bias.astype(self.dtype)
        return self.input.reshape(self.shape), self.weight.astype(self.dtype, copy=False), bias
