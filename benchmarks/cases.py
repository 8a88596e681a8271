"""THE table: what is measured. Everything else in this folder reads it from here.

A case is a shape, a dtype, an option and a mode. It says how its inputs are made, which bytes any method has to move, and what
the right answer is (`fastxent.reference`, float64): no provider is timed before `check` has passed its loss and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fastxent import reference

Array = np.ndarray[Any, Any]

LOSS, GRAD = "loss", "loss+gradient"
IGNORED = -100

# option: what the loss is asked for; all of them averaged over the rows
OPTIONS = {
    "plain": "class indices",
    "probabilities": "a class distribution a row for target: a second array of the size of the logits",
    "smoothing": "label smoothing 0.1",
    "weights": "a weight a class",
    "ignored": "30 % of the rows have target ignore_index",
    "z-loss": "plus 1e-4 times the mean of lse^2",
    "policy": "minus 0.01 times the mean entropy: the log-probability and the entropy of policy gradients",
}
SMOOTHING, IGNORED_SHARE, Z_LOSS, ENTROPY_BONUS = 0.1, 0.3, 1e-4, 0.01

# Relative error that is right all the same, of a loss, and of a gradient measured by its size and by the mean size in its
# row. Not a test of accuracy (that is what tests/ is for): peers that keep log-probabilities in half precision must pass. A
# forgotten target, factor or row is wrong by far more.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 3e-2, "bfloat16": 0.15}


class WrongResult(ArithmeticError):
    """A provider's loss or gradient is not the reference's."""


@dataclass(frozen=True)
class Case:
    """One thing to compute."""

    extents: tuple[int, ...]
    reason: str = "asked for"
    axis: int = -1  # of the classes
    dtype: str = "float32"
    option: str = "plain"
    mode: str = GRAD

    @property
    def shape(self) -> str:
        return " x ".join(map(str, self.extents))

    @property
    def key(self) -> str:
        return f"{self.shape} {self.dtype} {self.option} {self.mode}"

    @property
    def slug(self) -> str:
        """The key as one word: for the names of tests."""
        return self.key.replace(" x ", "x").replace(" ", "-")

    @property
    def n_classes(self) -> int:
        return self.extents[self.axis]

    @property
    def rows(self) -> tuple[int, ...]:
        axis = self.axis % len(self.extents)
        return self.extents[:axis] + self.extents[axis + 1 :]

    @property
    def n_rows(self) -> int:
        return math.prod(self.rows)

    @property
    def n_ignored(self) -> int:
        return int(IGNORED_SHARE * self.n_rows) if self.option == "ignored" else 0

    @property
    def logit_bytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.extents) * (2 if "16" in self.dtype else int(self.dtype[-2:]) // 8)

    @property
    def bytes_read(self) -> int:
        """Logits (and probabilities) of the rows that count, once."""
        kept = self.logit_bytes // self.n_rows * (self.n_rows - self.n_ignored)
        return 2 * kept if self.option == "probabilities" else kept

    @property
    def bytes_moved(self) -> int:
        """What any method has to move: logits in, targets in, gradient out. GB/s are these bytes by the time."""
        indices = 0 if self.option == "probabilities" else 8 * self.n_rows
        return self.bytes_read + indices + (self.logit_bytes if self.mode == GRAD else 0)


# ----------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------

HEADLINE = Case((4096, 8192), "a batch of tokens, a small vocabulary: 134 MB, past every cache")
SCALING = Case((1024, 1000), "ImageNet, 1024 images: 4 MB, in the last-level cache")
SMALL = Case((32, 10), "a batch of digits: the cost of a call")
LARGE = (
    HEADLINE,
    Case((2048, 32000), "Llama 2's vocabulary"),
    Case((1024, 128256), "Llama 3's vocabulary: a row is half a megabyte"),
)
SHAPES = (
    Case((1, 10), "one sample: nothing but the cost of a call"),
    SMALL,
    Case((128, 1000), "ImageNet, 128 images: 0.5 MB, in the second-level cache"),
    SCALING,
    Case((8192, 100), "CIFAR-100: six vectors and a tail a row"),
    Case((65536, 10), "many rows that are shorter than a vector, in the cache"),
    Case((1_000_000, 10), "the same past the cache"),
    *LARGE,
    Case((16, 262144), "Gemma's vocabulary, few rows: less than one a thread would do"),
    Case((1, 128256), "the next token of one sequence: only the classes can be shared out"),
    Case((16, 150, 128, 128), "segmentation, channels first: neighbours in memory are rows", axis=1),
)
VARIANTS = (
    *(replace(HEADLINE, dtype=dtype) for dtype in ("bfloat16", "float16")),
    *(replace(HEADLINE, option=option) for option in OPTIONS if option != "plain"),
    *(
        replace(case, dtype=dtype, option="policy")
        for case, dtype in ((HEADLINE, "bfloat16"), (LARGE[1], "float32"), (LARGE[1], "bfloat16"))
    ),
)
SMALL_VARIANTS = (replace(SMALL, dtype="bfloat16"), *(replace(SMALL, option=option) for option in ("probabilities", "weights")))
CASES = (*SHAPES, *(replace(case, mode=LOSS) for case in LARGE), *VARIANTS, *SMALL_VARIANTS)

# What is measured if nothing is asked for: a small, a wide, a narrow and a large one.
SHORT = tuple(c for c in SHAPES if c.extents in ((32, 10), (1024, 1000), (65536, 10), (4096, 8192)))

# What a plot shows: one extent stays, the other goes from the cost of a call to past every cache.
SWEEP = (
    *(Case((1024, c), "1024 rows of ever more classes") for c in (8, 64, 512, 4096, 32768)),
    *(Case((n, 1024), "ever more rows of 1024 classes") for n in (1, 16, 256, 4096, 32768)),
)


def case_of(extents: tuple[int, ...]) -> Case:
    """The plain case of a shape, with its reason if the table knows it; (N, C) or PyTorch's (N, C, d1, ...)."""
    known = {case.extents: case for case in SHAPES}
    return known.get(extents) or Case(extents, axis=-1 if len(extents) == 2 else 1)


# ----------------------------------------------------------------------------------------------------
# Inputs, and the right answer
# ----------------------------------------------------------------------------------------------------


def numpy_dtype(name: str) -> np.dtype[Any]:
    """bfloat16 is NumPy's by courtesy of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class Truth(NamedTuple):
    """What the reference says."""

    loss: float
    rows: tuple[Array, ...]  # the index of some rows, an array an axis
    gradient: Array  # (rows, C) of these rows


class Inputs:
    """Seeded arrays of a case, every page of them touched; plain NumPy memory, as users have it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(0)
        self.logits = np.empty(case.extents, numpy_dtype(case.dtype))
        for block in self._blocks():
            part = self.logits[block]
            part[...] = 3 * rng.standard_normal(part.shape, np.float32)
        self.weight: Array | None = None
        if case.option == "weights":
            self.weight = rng.uniform(0.5, 2, case.n_classes).astype(np.float32)
        if case.option == "probabilities":
            self.target = rng.random(case.extents, np.float32).astype(self.logits.dtype)
            self.target /= self.target.sum(case.axis, keepdims=True)
        else:
            self.target = rng.integers(0, case.n_classes, case.rows)
            self.target.flat[rng.permutation(case.n_rows)[: case.n_ignored]] = IGNORED

    def _blocks(self) -> Iterator[slice]:
        """Slices along the first axis, of about a million elements."""
        step = max(1, 2**20 // (math.prod(self.case.extents[1:]) or 1))
        return (slice(at, at + step) for at in range(0, self.case.extents[0], step))

    @cached_property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that the option stands for, in NumPy's terms; z-loss is PyTorch's and not in it."""
        smoothing = SMOOTHING if self.case.option == "smoothing" else 0.0
        return {"axis": self.case.axis, "weight": self.weight, "label_smoothing": smoothing}

    @cached_property
    def out(self) -> Array:
        """A gradient buffer, warm."""
        return np.zeros_like(self.logits)

    @property
    def divisor(self) -> float:
        """What the mean divides by: the weights of the rows' classes."""
        if self.case.option == "probabilities":
            return self.case.n_rows
        kept = self.target[self.target != IGNORED]
        return kept.size if self.weight is None else float(self.weight[kept].sum(dtype=np.float64))

    @cached_property
    def truth(self) -> Truth:
        case = self.case
        with ThreadPoolExecutor() as pool:
            loss = math.fsum(pool.map(self._loss_of_block, self._blocks())) / self.divisor
        n = min(case.n_rows, 64, max(4, 2**20 // case.n_classes))
        rows = np.unravel_index(np.linspace(0, case.n_rows - 1, n).astype(int), case.rows)
        x = np.moveaxis(self.logits, case.axis, -1)[rows]
        target = np.moveaxis(self.target, case.axis, -1)[rows] if self.target.ndim == self.logits.ndim else self.target[rows]
        options = {**self.options, "axis": -1}
        gradient = reference.cross_entropy_value_and_grad(x, target, reduction="sum", **options)[1]
        if case.option == "z-loss":
            gradient += 2 * Z_LOSS * reference.logsumexp(x, axis=-1, keepdims=True) * reference.softmax(x, axis=-1)
        if case.option == "policy":
            log_p = reference.log_softmax(x, axis=-1)
            p = np.exp(log_p)
            gradient += ENTROPY_BONUS * p * (log_p - (p * log_p).sum(axis=-1, keepdims=True))
        return Truth(loss, rows, gradient / self.divisor)

    def _loss_of_block(self, block: slice) -> float:
        x, target = self.logits[block], self.target[block]
        loss = float(reference.cross_entropy(x, target, reduction="sum", **self.options))
        if self.case.option == "z-loss":
            loss += Z_LOSS * float(np.square(reference.logsumexp(x, axis=self.case.axis)).sum())
        if self.case.option == "policy":
            loss -= ENTROPY_BONUS * float(
                reference.entropy(reference.softmax(x, axis=self.case.axis), axis=self.case.axis).sum()
            )
        return loss


def check(inputs: Inputs, loss: float, gradient: Array | None) -> None:
    """Raise `WrongResult` unless the loss is right, and the gradient in some 64 rows from the first to the last."""
    case, truth = inputs.case, inputs.truth
    tolerance = TOLERANCE[case.dtype]
    if not abs(loss - truth.loss) <= tolerance * abs(truth.loss):
        raise WrongResult(f"{case.key}: the loss is {loss:.9g}, not {truth.loss:.9g}")
    if case.mode == LOSS:
        return
    if gradient is None or gradient.shape != case.extents:
        raise WrongResult(f"{case.key}: no gradient of shape {case.extents}")
    found = np.moveaxis(gradient, case.axis, -1)[truth.rows].astype(np.float64)
    size = np.abs(truth.gradient)
    # float16 has nothing between 0 and 6e-8
    smallest = 6e-8 if case.dtype == "float16" else 0.0
    error = np.abs(found - truth.gradient) - tolerance * (size + size.mean(axis=-1, keepdims=True)) - smallest
    if not (error <= 0).all():
        row, c = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        where = tuple(int(index[row]) for index in truth.rows)
        raise WrongResult(
            f"{case.key}: the gradient of row {where}, class {c} is {found[row, c]:.9g}, not {truth.gradient[row, c]:.9g}"
        )
