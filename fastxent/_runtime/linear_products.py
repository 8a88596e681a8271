"""The products of a linear layer with a block of rows: its logits, and from their gradient those of input, weight and bias.

The classes are in groups, which threads share. A product of a group runs on one thread: BLAS's own threads would spin on the
cores while ours run the kernels, and a call that waits for all of them takes several times as long on a machine that is not
idle, benchmarks/LOG.md#a-linear-layer-and-its-loss. Groups depend on shapes alone, so the sums have the same bits at any number
of threads. Where BLAS cannot be told its number of threads, and for more threads than groups, it uses its own.

Half precision, and any weight that BLAS cannot take as it lies, is copied to a scratch, some classes at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fastxent._runtime import blas, buffers
from fastxent._runtime.blocks import class_groups, classes_at_a_time
from fastxent._runtime.threads import get_num_threads

Array = np.ndarray[Any, Any]

# Multiplications of a block's product that are worth a thread: it takes about 50 us.
WORTH_A_THREAD = 1 << 22


class Products:
    """The products of a layer's weight and bias with blocks of at most ``n_rows`` rows."""

    def __init__(self, weight: Array, bias: Array | None, precision: np.dtype[Any], n_rows: int, n_threads: int | None) -> None:
        self.weight, self.bias, self.precision, self.n_rows = weight, bias, precision, n_rows
        self.as_it_lies = weight.dtype == precision and is_for_blas(weight)
        n_classes, n_features = weight.shape
        self.groups = class_groups(n_classes, n_features)
        self.step = classes_at_a_time(max(n_rows, n_features), precision.itemsize)
        self.n_workers = self._workers(n_threads, n_rows * n_classes * n_features)
        self.of_thread = threading.local()

    def _workers(self, n_threads: int | None, work: int) -> int:
        """Return how many threads share the groups; 1: BLAS uses its own threads."""
        wanted = min(n_threads or get_num_threads(), blas.get_num_threads())
        return min(wanted, 1 + work // WORTH_A_THREAD) if wanted <= len(self.groups) else 1

    def for_groups(self, work: Callable[[int], None]) -> None:
        """Call ``work`` with the number of each group, on several threads."""
        self.for_each(work, len(self.groups))

    def for_each(self, work: Callable[[int], None], n: int) -> None:
        """Call ``work`` with the numbers below ``n``, on several threads."""

        def quietly(number: int) -> None:
            with np.errstate(all="ignore"):  # inf and nan are numbers here
                work(number)

        if self.n_workers == 1:
            for number in range(n):
                quietly(number)
            return
        with blas.one_thread_a_call(), ThreadPoolExecutor(self.n_workers) as pool:
            for _ in pool.map(quietly, range(n)):
                pass

    def put_logits(self, x: Array, out: Array) -> None:
        """Write the logits. They are the same whichever classes a product has, so these are many."""
        n_classes = out.shape[1]
        size = -(-n_classes // (1 if self.n_workers == 1 else 2 * self.n_workers))
        shares = [slice(first, min(first + size, n_classes)) for first in range(0, n_classes, size)]
        self.for_each(lambda share: self.put_some_logits(x, shares[share], out[:, shares[share]]), len(shares))

    def put_some_logits(self, x: Array, classes: slice, out: Array) -> None:
        """Write the logits of some classes; the bias is added while the caches hold them."""
        if self.as_it_lies and self.bias is None:
            blas.put_product(x, self.weight[classes].T, out)
            return
        for some in self.parts(classes):
            logits = out[:, some.start - classes.start : some.stop - classes.start]
            blas.put_product(x, self.weights(some).T, logits)
            if self.bias is not None:
                logits += self.bias[some]

    def parts(self, classes: slice) -> Iterator[slice]:
        """Yield classes, as many at a time as make matrices that the caches hold."""
        for first in range(classes.start, classes.stop, self.step):
            yield slice(first, min(first + self.step, classes.stop))

    def space(self, shape: tuple[int, int]) -> Array:
        """Return memory for some logits; the thread's next call may overwrite it."""
        n = shape[0] * shape[1]
        if getattr(self.of_thread, "space", np.empty(0)).size < n:
            self.of_thread.space = buffers.empty((n,), self.precision)
        space: Array = self.of_thread.space[:n].reshape(shape)
        return space

    def weights(self, classes: slice) -> Array:
        """Return the weights of some classes in the precision of the products; the thread's next call may overwrite them."""
        w = self.weight[classes]
        if self.as_it_lies:
            return w
        if not hasattr(self.of_thread, "scratch"):
            self.of_thread.scratch = np.empty((self.step, w.shape[1]), self.precision)
        copy: Array = self.of_thread.scratch[: len(w)]
        np.copyto(copy, w, casting="same_kind")
        return copy


def is_for_blas(a: Array) -> bool:
    """Return whether BLAS takes a matrix as it lies; others NumPy multiplies by slow loops of its own."""
    (n, m), unit = a.shape, a.itemsize
    rows, columns = a.strides
    adjacent = (columns == unit and rows >= m * unit) or (rows == unit and columns >= n * unit)
    return a.flags.aligned and adjacent and rows % unit == columns % unit == 0


class Gradients:
    """The gradients of a layer's input, weight and bias, added up over blocks of rows; half precision is rounded at the end.

    ``rows`` is the shape of the rows of ``x``. Some of them may be in no block: ``partly``.
    """

    def __init__(
        self, x: Array, rows: tuple[int, ...], weight: Array, has_bias: bool, precision: np.dtype[Any], partly: bool
    ) -> None:
        self.dtype, self.shape = x.dtype, (*rows, x.shape[1])
        untouched = partly or not len(weight)
        self.input = np.zeros(x.shape, x.dtype) if untouched else buffers.empty(x.shape, x.dtype)
        self.weight = buffers.empty(weight.shape, precision)
        self.bias = np.zeros(len(weight)) if has_bias else None
        self.is_first = True

    def add(self, x: Array, rows: Any, g: Array, products: Products) -> None:
        """Add what a block of rows gives: its input x, and the gradient g of its logits."""
        shares = np.empty((len(products.groups), *x.shape), x.dtype)  # of the groups, in the gradient of the input
        ones = np.ones(len(g), g.dtype)
        put_or_add = blas.put_product if self.is_first else blas.add_product

        def work(group: int) -> None:
            shares[group] = 0
            for classes in products.parts(products.groups[group]):
                some = g[:, classes]
                blas.add_product(some, products.weights(classes), shares[group])
                put_or_add(some.T, x, self.weight[classes])  # which finds g in the caches
                if self.bias is not None:
                    self.bias[classes] += ones @ some

        products.for_groups(work)
        self.input[rows] = np.add.reduce(shares)
        self.is_first = False

    def result(self) -> tuple[Array, Array, Array | None]:
        if self.is_first:  # no row is kept
            self.weight[...] = 0
        bias = None if self.bias is None else self.bias.astype(self.dtype)
        return self.input.reshape(self.shape), self.weight.astype(self.dtype, copy=False), bias
