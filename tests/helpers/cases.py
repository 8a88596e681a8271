"""The grid of shapes, the error budget, and the makers of cases and memory layouts that the tests share.

The budget (DESIGN.md, section 7) has no tolerance in it: fastxent may be as wrong as PyTorch is on the same
case, plus one unit in the last place. See `Budget`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastxent import reference as ref

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
    64: "exactly one strip of 64 logarithms",
    65: "a strip and one row",
    100: "strips and tiles with a rest",
}
GRID = [(17, c) for c in CLASSES] + [(n, c) for n in ROWS if n != 17 for c in (3, 17, 100)]

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
    """Arguments of one call of `cross_entropy`, classes on the last axis."""

    logits: np.ndarray
    target: np.ndarray
    options: dict[str, Any]


def accumulation(dtype: np.dtype) -> np.dtype:
    """The dtype of a loss: float32, and float64 for float64 logits."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def make_rng(*key: object) -> np.random.Generator:
    """A generator that depends on `key` alone, so that a case is the same whichever tests run beside it."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def make_case(dtype: np.dtype, shape: tuple[int, ...], option: str = "index") -> Case:
    """Logits of `shape` (..., C), a target and the keyword arguments that the words of `option` ask for.

    Weights and probabilities are drawn in the dtype of the loss, so that PyTorch gets the values that we get.
    """
    rng, words, acc = make_rng(dtype.name, shape, option), option.split(), accumulation(dtype)
    *rows, classes = shape
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    target: np.ndarray = rng.integers(0, classes, rows)
    options: dict[str, Any] = {}
    if "weight" in words:
        options["weight"] = rng.uniform(0.5, 2, classes).astype(acc)
    if "sample_weight" in words:
        options["sample_weight"] = rng.uniform(0, 2, rows).astype(acc)
    if "smoothing" in words:
        options["label_smoothing"] = 0.1
    if "smoothing_one" in words:
        options["label_smoothing"] = 1.0
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


def widest(a: Any, wide: Any = None) -> Any:
    """`a`, if it is floating, in `wide`: by default in longdouble if it is float64, else in float64.

    An argument so widened makes of the reference a truth much finer than the dtype it judges. longdouble has 64
    bits of significand where the machine has any; it is slow, so float32 and less are judged in float64.
    """
    array = np.asarray(a)
    if isinstance(a, int) or array.dtype.kind in "iub":
        return a
    wide = wide or (np.longdouble if array.dtype.kind == "f" and array.dtype.itemsize >= 8 else np.float64)
    return array.astype(wide)[()]


def widest_case(case: Case) -> Case:
    """All floating arguments in the precision that the finest array among them asks for."""
    floats = [a for a in (case.logits, case.target, *case.options.values()) if isinstance(a, np.ndarray)]
    wide = np.longdouble if any(a.dtype == FLOAT64 for a in floats) else np.float64
    options = {k: widest(v, wide) for k, v in case.options.items()}
    return Case(widest(case.logits, wide), widest(case.target, wide), options)


class Truth(NamedTuple):
    """What is right, and the size of the largest term that its formula adds up (the unit of the budget)."""

    loss: np.ndarray
    grad: np.ndarray
    loss_scale: np.ndarray
    grad_scale: np.ndarray


def make_truth(case: Case, reduction: str) -> Truth:
    """Loss and gradient by the reference, from widened arguments.

    Scales. The loss of a row is u Q (m - x_y + log s), m its maximum, s = sum exp(x - m) >= 1. A relative
    error of s is an absolute one of log s, so the unit is that of max(loss, u Q). The gradient u (Q p - q) has
    that of the larger of its two terms, and p = exp(logp) that of p max(1, |logp|), as logp is rounded too.
    """
    defaults = dict(weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0)
    logits, target, options = widest_case(case)
    r = ref._rows(logits, target, -1, *(defaults | options).values())
    with np.errstate(all="ignore"):
        losses, grad, mass = ref._losses(r), ref._gradients(r), r.u * r.q.sum(-1)
        divisor = r.divisor if reduction == "mean" else 1
        loss_scale = ref._reduce(np.maximum(np.abs(losses), mass), r.divisor, reduction)
        p_scale = np.exp(logp := ref.log_softmax(r.x, -1)) * np.maximum(1, np.abs(logp))
        grad_scale = np.maximum(mass[..., None] * p_scale, r.u[..., None] * r.q) / divisor
        grad = np.where(r.keep[..., None], grad / divisor, 0)
        return Truth(ref._reduce(losses, r.divisor, reduction), grad, loss_scale, grad_scale)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For arrays as small as ours, threads cost PyTorch far more than they bring; the setting is everybody's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@one_torch_thread()
def run_torch(case: Case, reduction: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient by `F.cross_entropy`, in the dtype of the loss.

    For half precision that means in float32, on the same values, and the gradient is then rounded once.
    PyTorch in half precision is no opponent: it keeps the log-probabilities and the sum of the losses in half
    (the mean is inf once the sum passes 65504), so its errors would excuse any of ours.
    """
    options = {k: v for k, v in case.options.items() if k != "sample_weight"}
    acc = accumulation(case.logits.dtype)
    x = torch.tensor(case.logits.astype(acc), requires_grad=True)
    target = torch.tensor(case.target)
    y = target.movedim(-1, 1) if target.ndim == x.ndim > 2 else target
    if "weight" in options:
        options["weight"] = torch.tensor(options["weight"])
    sample_weight = case.options.get("sample_weight")
    how = reduction if sample_weight is None else "none"
    loss = F.cross_entropy(x.movedim(-1, 1) if x.ndim > 2 else x, y, reduction=how, **options)
    if sample_weight is not None:
        u = torch.tensor(sample_weight)
        loss = loss * u
        if reduction != "none":
            divisor = _torch_divisor(u, target, x.ndim, options) if reduction == "mean" else 1
            loss = loss.sum() / divisor
    loss.sum().backward()
    return loss.detach().numpy()[()], x.grad.numpy().astype(case.logits.dtype)


def _torch_divisor(u: torch.Tensor, target: torch.Tensor, ndim: int, options: dict[str, Any]) -> torch.Tensor:
    if target.ndim == ndim:
        return u.sum()
    keep = target != options.get("ignore_index", -100)
    return (u * options["weight"][target.clamp(0)] if "weight" in options else u)[keep].sum()


def ulp(size: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The gap between neighbours of `dtype` at numbers of this `size`; subnormal numbers share one gap."""
    info = ml_dtypes.finfo(dtype)
    return np.ldexp(1.0, np.maximum(np.frexp(size)[1] - 1, info.minexp) - info.nmant)


class Budget:
    """Collects results of one kind and asserts |ours - truth| <= |PyTorch - truth| + 1 ulp over all of them.

    Both errors are counted in ulps of the dtype of ours, in two sup-norms:

    0. element by element, in ulps at `scale`: small elements count as much as large ones. `scale` is the size
       of the largest term of the element's formula (by default the size of the truth), because a difference
       cannot be known better than its terms;
    1. a whole array at once, in ulps at its largest `scale`: the plain absolute error.

    Several results (reductions, shapes) share one budget, because of a single number PyTorch's error says
    nothing: it may be 0 by luck. Where the truth is nan or infinite, or too large for the dtype, ours must be
    just that, and nowhere else.
    """

    def __init__(self) -> None:
        self.ours, self.torch, self.where = np.zeros(2), np.zeros(2), ["", ""]

    def add(self, ours: Any, truth: Any, torch_result: Any, scale: Any = None, label: object = "") -> None:
        ours, truth, other = np.asarray(ours), np.asarray(truth), np.asarray(torch_result)
        assert ours.shape == truth.shape == other.shape, label
        scale = np.broadcast_to(np.abs(truth) if scale is None else scale, truth.shape)
        truth = np.where(np.abs(truth) > ml_dtypes.finfo(ours.dtype).max, np.copysign(np.inf, truth), truth)
        wide, finite = ours.astype(truth.dtype), np.isfinite(truth)
        np.testing.assert_array_equal(wide[~finite], truth[~finite], err_msg=str(label))
        if not finite.any():
            return
        wide, truth, scale, other = wide[finite], truth[finite], scale[finite], other[finite]
        assert np.isfinite(wide).all(), f"{label}: not finite where the truth is"
        assert np.isfinite(other).all(), f"{label}: PyTorch is not finite and sets no budget"
        scale = np.maximum(scale, np.abs(truth))
        for norm, size in enumerate((scale, scale.max()) if ours.ndim else (scale,)):
            mine, torchs = ((np.abs(x - truth) / ulp(size, ours.dtype)).max() for x in (wide, other))
            self.torch[norm] = max(self.torch[norm], torchs)
            if mine > self.ours[norm]:
                self.ours[norm], self.where[norm] = mine, str(label)

    def check(self) -> None:
        for norm, ours, allowed, where in zip("01", self.ours, self.torch + 1, self.where, strict=True):
            assert ours <= allowed, f"norm {norm}: {ours:.2f} ulp off ({where}), PyTorch {allowed - 1:.2f}"


def assert_within_budget(ours: Any, truth: Any, torch_result: Any, scale: Any = None, label: object = "") -> None:
    """A budget of one result."""
    budget = Budget()
    budget.add(ours, truth, torch_result, scale, label)
    budget.check()


def _framed(a: np.ndarray, before: tuple[int, int], after: tuple[int, int], step: tuple[int, int]) -> np.ndarray:
    """`a` as a view of a larger array, nan wherever `a` is not: who reads past the view is found out."""
    n, c = ((k - 1) * s + 1 + b + e for k, s, b, e in zip(a.shape, step, before, after, strict=True))
    frame = np.full((n, c), np.nan).astype(a.dtype)
    view = frame[before[0] : n - after[0] : step[0], before[1] : c - after[1] : step[1]]
    view[...] = a
    return view


def _unaligned(a: np.ndarray) -> np.ndarray:
    view = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def _read_only(a: np.ndarray) -> np.ndarray:
    view = a.copy()
    view.flags.writeable = False
    return view


# (N, C) array -> the same values in another memory layout; the two broadcasts repeat the first row or column.
CONTIGUOUS_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # rows or columns are: no copy is needed
    "C": lambda a: np.array(a, order="C"),
    "F": lambda a: np.array(a, order="F"),
    "columns cut": lambda a: _framed(a, (0, 2), (0, 3), (1, 1)),
    "every second row": lambda a: _framed(a, (1, 0), (1, 0), (2, 1)),
    "rows reversed": lambda a: np.array(a[::-1], order="C")[::-1],
    "F, rows cut": lambda a: _framed(a.T, (0, 2), (0, 3), (1, 1)).T,
    "F, every second class": lambda a: _framed(a.T, (1, 0), (1, 0), (2, 1)).T,
    "F, classes reversed": lambda a: np.array(a[:, ::-1], order="F")[:, ::-1],
    "one row broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "read-only": _read_only,
    "unaligned": _unaligned,
}
STRIDED_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "classes reversed": lambda a: np.array(a[:, ::-1], order="C")[:, ::-1],
    "every second class": lambda a: _framed(a, (0, 1), (0, 1), (1, 2)),
    "strided both ways": lambda a: _framed(a, (1, 1), (2, 2), (3, 2)),
    "both reversed": lambda a: np.array(a[::-1, ::-1], order="C")[::-1, ::-1],
    "one class broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
}
LAYOUTS = CONTIGUOUS_LAYOUTS | STRIDED_LAYOUTS
WRITEABLE = [k for k in LAYOUTS if "broadcast" not in k and k not in ("read-only", "byte-swapped")]


def layouts_of(dtype: np.dtype) -> list[str]:
    """The names of the layouts that `dtype` can have: bfloat16 knows no other byte order."""
    return [k for k in LAYOUTS if k != "byte-swapped" or dtype != BFLOAT16]
