"""Cases: the dtypes, the grid of shapes, the options, and the arguments that are made of them."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

FLOAT16, FLOAT32, FLOAT64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [FLOAT16, BFLOAT16, FLOAT32, FLOAT64]
# Kernels are compiled dtype by dtype, for seconds each: most of the time that the tests take. float16 differs from bfloat16 in
# loads and stores, which the grid of the cross-entropy shows. Where the matter is another one, two dtypes are for every day.
MOST_DTYPES = [pytest.param(FLOAT16, marks=pytest.mark.slow), BFLOAT16, FLOAT32, FLOAT64]
EVERYDAY_DTYPES = [BFLOAT16, FLOAT32, *(pytest.param(d, marks=pytest.mark.slow) for d in (FLOAT16, FLOAT64))]
REDUCTIONS = ["none", "mean", "sum"]
INTEGERS = [np.dtype(s + w) for s in "iu" for w in "1248"]

CLASSES = {
    1: "the loss is 0 and the gradient is 0",
    2: "the logistic case; 14 of 16 lanes are masked",
    3: "the teaching texts",
    10: "digits: small C, where a row is less than a vector",
    15: "one lane short of a vector",
    16: "exactly one vector",
    17: "one lane into the second vector",
    48: "three whole vectors, no tail",
    49: "three vectors and one lane",
    64: "the largest C a row tile may hold; a whole number of unrolled steps",
    65: "one past it",
    100: "vectors and a tail of four lanes",
    1000: "ImageNet; tail of eight lanes",
    2047: "one lane short of a block of float64",
    2048: "exactly one block of float64: the online softmax never rescales",
    2049: "a second block of one lane",
    4097: "the same of float32",
    6500: "blocks, the last one partial",
}
ROWS = {
    1: "no second row to prefetch or to pair with",
    2: "two rows",
    15: "one row short of a tile of 16",
    16: "exactly one tile",
    17: "a tile and one row: the default of the grid",
    33: "two tiles and one row",
    64: "four whole tiles",
    65: "four tiles and one row",
    100: "six tiles and four rows",
}
GRID = [(17, c) for c in CLASSES] + [(n, c) for n in ROWS if n != 17 for c in (3, 17, 100)]

Z_LOSS, SOFTCAP = 0.01, 5.0  # a cap that bends logits of the size of ours

# Words that `make_case` understands; each option alone, then those that interact in the formula.
OPTIONS = [
    "index",
    "weight",
    "sample_weight",
    "ignore",
    "ignore_class",
    "smoothing",
    "smoothing_one",
    "weight ignore smoothing sample_weight",
    "probabilities",
    "probabilities unnormalised",
    "one_hot",
    "probabilities weight",
    "probabilities weight smoothing sample_weight",
]


def softcap_is_thorough(options: list[str]) -> list[Any]:
    """Options for a parametrisation over float64 cases, where every third kernel would be one for a softcap."""
    return [pytest.param(o, marks=pytest.mark.thorough) if "softcap" in o else o for o in options]


INDEX_OPTIONS = [o for o in OPTIONS if "probabilities" not in o and "one_hot" not in o]

INF, NAN = np.inf, np.nan
# Rows of three classes with their target, for the table of PyTorch's edge values.
SPECIAL_ROWS = {
    "-inf elsewhere": ([1, -INF, 2], 0),
    "-inf at the target": ([1, -INF, 2], 1),
    "all -inf": ([-INF, -INF, -INF], 1),
    "+inf elsewhere": ([1, INF, 2], 0),
    "+inf at the target": ([1, INF, 2], 1),
    "all +inf": ([INF, INF, INF], 1),
    "+inf and -inf": ([INF, -INF, 2], 2),
    "nan elsewhere": ([1, NAN, 2], 0),
    "nan at the target": ([1, NAN, 2], 1),
    "1e4": ([1e4, -1e4, 0], 1),
    "smallest": ([1e-45, 0, -1e-45], 0),
}
SPECIAL_OPTIONS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1),
    "weight": dict(weight=np.float32([0.5, 2, 1])),
    "weight 0 at class 1": dict(weight=np.float32([0.5, 0, 1])),
    "both": dict(weight=np.float32([0.5, 0, 1]), label_smoothing=0.1),
}
SPECIAL_TARGETS = ["index", "one-hot", "probabilities"]


class Case(NamedTuple):
    """One call of `cross_entropy`, but for the reduction: arrays with the classes last, or tensors as PyTorch has them."""

    logits: Any
    target: Any
    options: dict[str, Any]

    @property
    def soft(self) -> bool:
        """Is the target one of class probabilities?"""
        return self.target.shape == self.logits.shape


def accumulation(dtype: np.dtype) -> np.dtype:
    """The dtype of a loss: float32, and float64 for float64 logits."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def make_rng(*key: object) -> np.random.Generator:
    """A generator that depends on `key` alone, so that a case is the same whichever tests run beside it."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def make_case(dtype: np.dtype, shape: tuple[int, ...], option: str = "index", size: float = 3.0) -> Case:
    """Logits of `shape` (..., C) and of `size`, a target and the keyword arguments that the words of `option` ask for.

    Weights and probabilities are drawn in the dtype of the loss, so that PyTorch gets the values that we get.
    """
    rng, words, acc = make_rng(dtype.name, shape, option), option.split(), accumulation(dtype)
    *rows, classes = shape
    logits = (size * rng.standard_normal(shape)).astype(dtype)
    target: np.ndarray = np.asarray(rng.integers(0, max(classes, 1), rows))
    options: dict[str, Any] = {}
    if "weight" in words:
        options["weight"] = rng.uniform(0.5, 2, classes).astype(acc)
    if "sample_weight" in words:
        options["sample_weight"] = np.asarray(rng.uniform(0, 2, rows), acc)
    if "smoothing" in words:
        options["label_smoothing"] = 0.1
    if "smoothing_one" in words:
        options["label_smoothing"] = 1.0
    if "z_loss" in words:
        options["z_loss"] = Z_LOSS
    if "softcap" in words:
        options["softcap"] = SOFTCAP
    if "ignore" in words:
        target[rng.uniform(size=rows) < 0.3] = -100
    if "ignore_class" in words:
        options["ignore_index"] = classes // 2
    if "probabilities" in words:
        target = rng.dirichlet(np.full(classes, 0.5), rows)
        if "unnormalised" in words:  # nobody says that they must add up to 1
            target = target * rng.uniform(0, 3, (*rows, 1))
        target = target.astype(acc)
    if "one_hot" in words:
        target = np.eye(classes, dtype=acc)[target]
    return Case(logits, target, options)


def make_special_case(row: tuple[list[float], int], target: str, options: dict[str, Any], rows: int) -> Case:
    """A special row in front of rows - 1 ordinary ones, which must not notice it."""
    logits, y, _ = make_case(FLOAT32, (rows, 3))
    logits[0], y[0] = row
    t = make_case(FLOAT32, (rows, 3), "probabilities").target if target == "probabilities" else np.eye(3, dtype="f4")[y]
    return Case(logits, y if target == "index" else t, options)
