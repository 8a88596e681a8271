"""Runs a task on the logits x W' + b of a linear layer, block by block of rows: all of the logits are never in memory.

A block of logits is computed by BLAS, a kernel turns it into its gradient g in place, and two more products use that: g W is
the block's gradient of the input, and g' x is added to the gradient of the weight; ``linear_products`` computes them.
Rows that are ignored are dropped first, so every block is full of rows that count.
"""

from __future__ import annotations

import math
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
from fastxent._runtime.blocks import class_groups, rows_per_block
from fastxent._runtime.linear_products import Gradients, Products
from fastxent._runtime.options import checked, fields_of, flags_of
from fastxent._runtime.plan import Plan, make_plan
from fastxent._runtime.run import run_beside_blas


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

    @property
    def groups(self) -> list[slice]:
        """The classes in groups that threads share."""
        return class_groups(*self.weight.shape)

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


def gradients_of(layer: Layer) -> Gradients:
    """Return the gradients of a layer, to which each block of its rows adds its part."""
    return Gradients(layer.x, layer.rows, layer.weight, layer.bias is not None, layer.precision, partly=layer.kept is not None)


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
        n_kept, n_features, n_classes, layer.x.itemsize, layer.precision.itemsize, layer.memory_limit,
        n_shares=len(layer.groups),
    )  # fmt: skip
    space = buffers.empty((block, n_classes), layer.precision)
    products = Products(layer.weight, layer.bias, layer.precision, block, layer.n_threads)
    total = 0.0
    for first in range(0, n_kept, block):
        stop = min(first + block, n_kept)
        rows, logits = layer.rows_of(first, stop), space[: stop - first]
        x = np.ascontiguousarray(layer.x[rows], layer.precision)
        t = None if layer.t is None else _with_classes_together(layer.t[rows])
        products.put_logits(x, logits)
        at = {field: address(a[first:]) for field, a in outputs.items()}
        if gradients is not None:
            at["g"] = address(logits)
        sums = run_beside_blas(
            name, plan_of(name, logits, t, layer.flags), layer.n_threads, x=address(logits), t=address(t),
            y=address(None if layer.y is None else layer.y[first:]), u=address(None if layer.u is None else layer.u[first:]),
            w=address(layer.class_weight), **layer.fields, **at, **fields,
        )  # fmt: skip
        total += sums[0]
        if gradients is not None:
            gradients.add(x, rows, logits, products)
    return total


def _with_classes_together(t: Array) -> Array:
    return t if t.strides[1] == t.itemsize else np.ascontiguousarray(t)


def plan_of(name: str, logits: Array, t: Array | None, flags: dict[str, bool]) -> Plan:
    strides = logits.strides, logits.strides, (logits if t is None else t).strides
    return make_plan(
        name, logits.shape, strides, 1, storage(logits.dtype) or "", None if t is None else storage(t.dtype), **flags
    )
