"""The dtypes: a row each. Another one needs a row here, and how its bits are read and written in ``_simd.half``."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    name: str  # of NumPy's, or ml_dtypes', and PyTorch's
    storage: str  # how the kernels call it
    itemsize: int  # bytes
    acc: str  # storage of what the kernels compute with, and of the losses; float64 for one operand is float64 for all
    numpy: str  # a dtype of its size that NumPy has without ml_dtypes


DTYPES = (
    DType("float16", "f16", 2, "f32", "float16"),
    DType("bfloat16", "bf16", 2, "f32", "int16"),
    DType("float32", "f32", 4, "f32", "float32"),
    DType("float64", "f64", 8, "f64", "float64"),
)
NAMES = tuple(d.name for d in DTYPES)
STORAGE = {d.name: d.storage for d in DTYPES}
ITEMSIZE = {d.storage: d.itemsize for d in DTYPES}
ACC = {d.storage: d.acc for d in DTYPES}


def precision(logits: str, target: str | None = None) -> str:
    """Of the arithmetic on logits, and class probabilities, of these storages."""
    return max(ACC[logits], ACC[target or logits])  # "f32" < "f64"
