"""The loss of a linear layer alone, by tiles of rows and classes: each is computed, reduced to sums of its rows, and gone.

A gradient needs all logits of a row at a time. A loss does not, so the same memory holds tiles of many more rows, and the
weight is read once for these: with blocks of 256 whole rows the product takes 1.1 to 1.2 times as long as in one piece, with
tiles of 1024 rows 1.02 times, benchmarks/LOG.md#a-linear-layer-and-its-loss. The sums are those of
``_kernels.losses.class_shard``, a shard being a group of classes, and are merged in float64.
"""

from __future__ import annotations

import numpy as np

from fastxent._runtime.arguments import Array, address
from fastxent._runtime.blocks import rows_per_tile
from fastxent._runtime.linear_layer import Layer, plan_of
from fastxent._runtime.linear_products import Products
from fastxent._runtime.options import flags_of
from fastxent._runtime.run import run_beside_blas

IGNORED = -1  # no row is: those were dropped


def by_tiles(layer: Layer) -> bool:
    """Return whether the loss is computed by tiles: not a soft cap, class probabilities, or a single group of classes."""
    return layer.y is not None and not layer.fields["cap"] and len(layer.groups) > 1


@np.errstate(all="ignore")  # inf and nan are numbers here
def losses(layer: Layer) -> Array:
    """Return the losses of the kept rows, in float64."""
    assert layer.y is not None
    n_kept, (n_classes, n_features) = layer.n_kept, layer.weight.shape
    products = Products(layer.weight, layer.bias, layer.precision, n_kept, layer.n_threads)
    tile = rows_per_tile(
        n_kept, n_features, n_classes, layer.x.itemsize, layer.precision.itemsize, products.n_workers, layer.memory_limit
    )
    found = np.empty(n_kept)
    for first in range(0, n_kept, tile):
        rows = slice(first, min(first + tile, n_kept))
        x = np.ascontiguousarray(layer.x[layer.rows_of(rows.start, rows.stop)], layer.precision)
        found[rows] = _of_rows(layer, products, x, rows)
    return found


def _of_rows(layer: Layer, products: Products, x: Array, rows: slice) -> Array:
    """Return the losses of a tile's rows, whose classes are computed group by group."""
    assert layer.y is not None
    y, w, n_rows = layer.y[rows], layer.class_weight, len(x)
    smooth = layer.flags["smooth"]
    flags = flags_of(labelled=True, ignore_index=IGNORED, label_smoothing=float(smooth))
    m, log_s, d = (np.zeros((len(products.groups), n_rows)) for _ in range(3))
    x_y, any_class = np.empty(n_rows), np.zeros(n_rows, np.int64)

    def work(group: int) -> None:
        classes = products.groups[group]
        logits = products.space((n_rows, classes.stop - classes.start))
        products.put_some_logits(x, classes, logits)
        top = np.empty(n_rows, layer.precision)
        run_beside_blas(
            "class_shard", plan_of("class_shard", logits, None, flags), 1, x=address(logits),
            y=address(any_class), w=address(w[classes]) if smooth and w is not None else 0, ignore=IGNORED, uniform=1.0,
            lse=address(top), v=address(log_s[group]), b=address(d[group]),
        )  # fmt: skip
        m[group] = top
        here = np.flatnonzero((y >= classes.start) & (y < classes.stop))
        x_y[here] = logits[here, y[here] - classes.start]

    products.for_groups(work)
    largest = m.max(0)
    lse = largest + np.log(np.exp((m - largest) + log_s).sum(0))
    loss = layer.fields["confidence"] * (1.0 if w is None else w[y]) * (lse - x_y) + layer.fields["z"] * (lse * lse)
    if smooth:
        weights = np.array([float(c.stop - c.start) if w is None else w[c].sum() for c in products.groups])
        loss += layer.fields["uniform"] * (weights @ (lse - m) - d.sum(0))
    return loss if layer.u is None else layer.u[rows] * loss
