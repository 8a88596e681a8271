"""The table of dtypes. A new one needs a row here, and the conversion of its bits in ``_simd.half``."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    name: str  # in NumPy or ml_dtypes, and in PyTorch
    storage: str  # its name in the kernels
    itemsize: int  # bytes
    acc: str  # storage that the kernels compute in, and of the losses; float64 for one operand is float64 for all
    numpy: str  # a dtype of the same size that NumPy has without ml_dtypes


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
    """Return the precision of arithmetic on logits, and class probabilities, of these storages."""
    return max(ACC[logits], ACC[target or logits])  # "f32" < "f64"
