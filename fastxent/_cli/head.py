"""The logits of a linear layer in files, as an array that is read in blocks: no more than a block of them is ever in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from fastxent._cli.files import Array, FileArray, Header, Index, InputError, is_float
from fastxent._runtime import buffers
from fastxent._runtime.blocks import classes_per_block


class Product(FileArray):
    """``hidden @ head.T + bias``: hidden states of shape (..., D), a weight of shape (V, D), a bias of shape (V,) or None."""

    def __init__(self, hidden: FileArray, head: FileArray, bias: FileArray | None) -> None:
        for array in (hidden, head, *(() if bias is None else (bias,))):
            if not is_float(array.dtype):
                raise InputError(f"{array.name} holds {array.dtype}: hidden states, head and bias are floating point")
            if 0 in array.shape:
                raise InputError(f"{array.name} is empty: shape {array.shape}")
        if len(head.shape) != 2:
            raise InputError(f"{head.name} has shape {head.shape}: a head has shape (classes, features)")
        n_classes, n_features = head.shape
        if hidden.shape[-1:] != (n_features,):
            raise InputError(
                f"{hidden.name} has shape {hidden.shape}, {head.name} {head.shape}: their last axes, the features, must agree"
            )
        if bias is not None and bias.shape != (n_classes,):
            raise InputError(f"{bias.name} has shape {bias.shape}: a bias has shape ({n_classes},), one number a class")
        double = any(a.dtype.kind == "f" and a.dtype.itemsize == 8 for a in (hidden, head))
        dtype = np.dtype(np.float64 if double else np.float32)
        super().__init__(f"{hidden.name} by {head.name}", Header((*hidden.shape[:-1], n_classes), dtype, False, 0))
        self.n_bytes = hidden.n_bytes + head.n_bytes
        self.hidden, self.head = hidden.in_blocks(len(hidden.shape) - 1), head.to_read_again()
        self.chunks = None if hidden.chunks is None else (*hidden.chunks[:-1], n_classes)
        self._bias_file = bias
        self.bias = None if bias is None else bias.block((slice(0, n_classes),)).astype(dtype)

    @np.errstate(all="ignore")  # inf and nan are numbers here
    def block(self, index: Index) -> Array:
        """Return the logits of some rows, of all classes."""
        (n_classes, n_features), rows = self.head.shape, index[:-1]
        hidden = self.hidden.block((*rows, slice(0, n_features)))
        lead = hidden.shape[:-1]
        hidden = np.ascontiguousarray(hidden.reshape(-1, n_features), self.dtype)
        logits = buffers.empty((math.prod(lead), n_classes), self.dtype)
        step = classes_per_block(n_features, self.dtype.itemsize)
        for first in range(0, n_classes, step):
            classes = slice(first, min(first + step, n_classes))
            weight = np.ascontiguousarray(self.head.block((classes, slice(0, n_features))), self.dtype)
            np.matmul(hidden, weight.T, out=logits[:, classes])
            if self.bias is not None:
                logits[:, classes] += self.bias[classes]
            self.head.release()
        self.read_bytes = self.head.n_bytes + self.hidden.read_bytes
        return logits.reshape(*lead, n_classes)

    def zeros(self, index: Index) -> Array:
        return np.zeros([s.stop - s.start for s in index], self.dtype)

    def opener(self) -> Callable[[], FileArray]:
        files = self.hidden, self.head, self._bias_file
        return partial(_open_product, *(None if file is None else file.opener() for file in files))

    def release(self) -> None:
        self.hidden.release()


def _open_product(*openers: Callable[[], FileArray] | None) -> Product:
    hidden, head, bias = (None if opener is None else opener() for opener in openers)
    assert hidden is not None and head is not None
    return Product(hidden, head, bias)
