"""Random calls against the reference: the result within a few units in the last place, or the error that is due.

A call is made of its number, so one that fails is repeated by ``check(number)``.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastxent as fx
from fastxent import reference as ref
from tests.helpers.cases import DTYPES, FLOAT16, FLOAT64, INTEGERS, Case, accumulation
from tests.helpers.truth import make_truth, ulp, widest

NAN, INF = np.nan, np.inf
CLASSES = [1, 1, 2, 3, 4, 7, 10, 15, 16, 17, 31, 33, 47, 48, 49, 50, 64, 65, 97, 130, 300, 2049]
MOST = 6  # units in the last place of the largest term; 200,000 calls reached 5.0 (float64)


class Call(NamedTuple):
    """A call with its logits as they lie in memory, and the same with the classes last for the reference."""

    logits: np.ndarray
    target: np.ndarray
    axis: int
    options: dict[str, Any]
    n_threads: int | None

    @property
    def plain(self) -> Case:
        x = np.moveaxis(self.logits, self.axis, -1)
        soft = self.target.ndim == self.logits.ndim
        t = np.moveaxis(self.target, self.axis, -1) if soft else self.target
        return Case(native(x), native(t), {k: native(v) for k, v in self.options.items()})


def native(a: Any) -> Any:
    return a.astype(a.dtype.newbyteorder("=")) if isinstance(a, np.ndarray) and not a.dtype.isnative else a


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Logits of some kind: ordinary, equal, huge, tiny, or with places that are nothing of the sort."""
    top = {2: 3e4 if dtype == FLOAT16 else 2e37, 4: 2e37, 8: 1e304}[dtype.itemsize]  # sums of a few do not overflow
    kind = rng.integers(8)
    x = rng.standard_normal(shape) * [1, 1, 3, 30, 0, 1, 1, 100][kind]
    if kind == 4:
        x += rng.integers(-3, 3)
    elif kind == 5:
        x = rng.uniform(-1, 1, shape) * rng.choice([1e-3, 1, top], shape)
    elif kind == 6:
        x = rng.uniform(-1, 1, shape) * float(np.nextafter(dtype.type(0), dtype.type(1))) * 8
    if rng.random() < 0.25:
        odd = rng.choice([[INF], [-INF], [NAN], [-INF, INF], [-INF, NAN, INF, 0.0]][rng.integers(5)], shape)
        x = np.where(rng.random(shape) < rng.choice([0.02, 0.3, 1.0], p=[0.6, 0.3, 0.1]), odd, x)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def laid_out(rng: np.random.Generator, a: np.ndarray) -> np.ndarray:
    """The values of ``a`` in some memory order, perhaps with gaps, backwards, unaligned or byte-swapped."""
    order = rng.permutation(a.ndim) if rng.random() < 0.5 else np.arange(a.ndim)
    steps = rng.choice([1, 1, 1, 2, -1], a.ndim) if rng.random() < 0.5 else np.ones(a.ndim, int)
    frame = np.empty([a.shape[i] * abs(steps[i]) for i in order], a.dtype)
    if rng.random() < 0.1:
        frame = np.zeros(frame.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(frame.shape)
    frame.view(np.uint8 if frame.itemsize == 1 else f"u{frame.itemsize}")[...] = -1 & (2 ** (8 * frame.itemsize) - 1)
    view = frame[(*(slice(None, None, steps[i]) for i in order), ...)].transpose(np.argsort(order))
    view[...] = a
    if rng.random() < 0.05 and a.dtype.kind != "V" and a.dtype.name != "bfloat16":
        return view.astype(a.dtype.newbyteorder())
    return view


def make_call(number: int) -> Call:
    rng = np.random.default_rng([7, number])
    dtype = DTYPES[rng.choice(4, p=[0.15, 0.15, 0.5, 0.2])]
    classes = int(rng.choice(CLASSES))
    ndim = int(rng.choice([1, 2, 3, 4], p=[0.1, 0.6, 0.2, 0.1]))
    rows = [int(rng.choice([0, 1, 2, 3, 5, 16, 17, 40], p=[0.02, *[0.14] * 7])) for _ in range(ndim - 1)]
    while np.prod(rows, initial=1) * classes > 6000:
        rows[int(np.argmax(rows))] //= 2
    axis = int(rng.integers(ndim))
    shape = (*rows[:axis], classes, *rows[axis:])
    logits = laid_out(rng, values(rng, shape, dtype))
    if ndim > 1 and rng.random() < 0.03:
        logits = np.broadcast_to(np.take(logits, [0], int(rng.integers(ndim))) if logits.size else logits, shape)
    options: dict[str, Any] = dict(reduction=str(rng.choice(["none", "mean", "sum"])))
    acc = accumulation(dtype)
    if rng.random() < 0.3:
        options["weight"] = laid_out(rng, (rng.uniform(0, 2, classes) * (rng.random(classes) < 0.9)).astype(acc))
    if rng.random() < 0.3:
        options["sample_weight"] = laid_out(rng, (rng.uniform(0, 2, rows) * (rng.random(rows) < 0.9)).astype(acc))
    if rng.random() < 0.3:
        options["label_smoothing"] = float(rng.choice([0.1, 0.5, 0.9]))  # 1.0 at a target of -inf is nan in PyTorch
    target: np.ndarray
    if rng.random() < 0.3:
        t = (
            rng.dirichlet(np.full(classes, 0.3), rows)
            if rng.random() < 0.7
            else np.eye(classes)[rng.integers(0, classes, rows)]
        )
        if rng.random() < 0.3:
            t = t * rng.uniform(0, 3, (*t.shape[:-1], 1))
        target = laid_out(rng, np.moveaxis(t, -1, axis).astype(acc))
    else:
        integer = INTEGERS[rng.integers(len(INTEGERS))] if classes < 128 else np.dtype(np.int64)
        ignore = int(rng.choice([-100, 0, classes - 1, 100]))
        options["ignore_index"] = ignore
        y = rng.integers(0, classes, rows)
        if np.iinfo(integer).min <= ignore:
            y = np.where(rng.random(rows) < rng.choice([0, 0.2, 1], p=[0.5, 0.4, 0.1]), ignore, y)
        target = laid_out(rng, y.astype(integer))
    return Call(logits, target, axis, options, [None, 1, 3][rng.integers(3)])


# ----------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------


def assert_near(ours: Any, truth: Any, scale: Any, label: str, most: float = MOST) -> None:
    """nan and inf in the same places, elsewhere at most so many units in the last place at ``scale``."""
    ours, truth = np.asarray(ours), np.asarray(truth)
    assert ours.shape == truth.shape, label
    wide = ours.astype(truth.dtype)
    largest = truth.dtype.type(np.finfo(np.float64).max if ours.dtype == FLOAT64 else float(widest_max(ours.dtype)))
    truth = np.where(np.abs(truth) > largest, np.copysign(INF, truth), truth)
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(wide[~finite], truth[~finite], err_msg=label)
    scale = np.nan_to_num(np.broadcast_to(scale, truth.shape))  # 0 * inf: a term that is not there
    scale = np.maximum(scale, np.abs(truth))[finite]
    with np.errstate(all="ignore"):
        off = np.abs(wide[finite] - truth[finite]) / ulp(np.minimum(scale, largest), ours.dtype)
    assert not off.size or off.max() <= most, f"{label}: {off.max():.1f} units in the last place off"


def widest_max(dtype: np.dtype) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).max)


@np.errstate(all="ignore")
def check(number: int) -> None:
    """Make the call of this number, with a function that its number chooses too, and compare."""
    c = make_call(number)
    pick = zlib.crc32(str(number).encode())
    label, common = f"call {number}", dict(axis=c.axis, n_threads=c.n_threads)
    x, t, options = c.plain
    before = [a.tobytes() for a in (c.logits, c.target)]
    how = pick % 10
    if how < 7:
        reduction = options.pop("reduction")
        truth = make_truth(Case(x, t, options), reduction)
        if how < 2:
            loss, gradient = fx.cross_entropy(c.logits, c.target, **c.options, **common), None
        elif how == 6 and c.logits.flags.writeable and 0 not in c.logits.strides and c.logits.dtype.isnative:
            loss, gradient = fx.cross_entropy_value_and_grad(c.logits, c.target, **c.options, **common, out=c.logits)
            before[0] = c.logits.tobytes()
        else:
            out = (
                laid_out(np.random.default_rng(number), np.zeros(c.logits.shape, native(c.logits).dtype)) if how == 5 else None
            )
            loss, gradient = fx.cross_entropy_value_and_grad(c.logits, c.target, **c.options, **common, out=out)
        assert_near(loss, truth.loss, truth.loss_scale, label)
        if gradient is not None:
            assert_near(native(gradient), np.moveaxis(truth.grad, -1, c.axis), np.moveaxis(truth.grad_scale, -1, c.axis), label)
    elif how == 7:
        ours, truth = (
            fx.cross_entropy_stats(c.logits, c.target, **c.options, **common),
            ref.cross_entropy_stats(widest(x), t, **options),
        )
        assert np.array_equal(ours.prediction, truth.prediction) and np.array_equal(ours.target_rank, truth.target_rank), label
        finite = np.isfinite(x).all(-1) & (np.abs(x.astype(np.float64)).max(-1, initial=0) < 1e4)
        for name in ("lse", "entropy", "target_prob"):
            a, b = np.asarray(getattr(ours, name))[finite], np.asarray(getattr(truth, name))[finite]
            top = np.maximum(np.abs(truth.lse[finite]), 1) if name != "target_prob" else b * np.maximum(1, -np.log(b))
            assert_near(a, b, top, f"{label} {name}", 8)
    else:
        wide = widest(x)
        logp = ref.log_softmax(wide, -1)
        for name, most_at in (("softmax", np.exp(logp) * np.maximum(1, -logp)), ("log_softmax", np.maximum(1, -logp))):
            ours = native(getattr(fx, name)(c.logits, **common))
            assert_near(np.moveaxis(ours, c.axis, -1), getattr(ref, name)(wide, -1), most_at, f"{label} {name}")
        lse = ref.logsumexp(wide, -1)
        assert_near(fx.logsumexp(c.logits, **common), lse, np.maximum(1, np.abs(lse)), f"{label} logsumexp")
    assert [a.tobytes() for a in (c.logits, c.target)] == before, f"{label}: an input has been changed"


# ----------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------


def spoil(number: int) -> tuple[Call, type[Exception] | tuple[type[Exception], ...]] | None:
    """The call with one thing wrong, and the error that is due; None if it leaves nothing to spoil."""
    c = make_call(number)
    rng = np.random.default_rng([8, number])
    soft = c.target.ndim == c.logits.ndim
    kind = int(rng.integers(9))
    classes = c.logits.shape[c.axis]
    if kind == 0 and not soft and c.target.size:
        y = c.target.astype(np.int64)
        bad = int(rng.choice([-1, classes, -(2**63), 2**63 - 1, classes + 2**32]))
        y.flat[rng.integers(y.size)] = bad
        return None if bad == c.options["ignore_index"] else (c._replace(target=y), IndexError)
    if kind == 1:
        return c._replace(axis=int(rng.choice([c.logits.ndim, -c.logits.ndim - 1, 99]))), ValueError
    if kind == 2:
        return c._replace(target=c.target[..., None, None]), ValueError
    if kind == 3:
        dtype = rng.choice(["c8", "O", "U3", "M8[s]", "g"])
        return c._replace(logits=np.zeros(c.logits.shape, dtype)), TypeError
    if kind == 4:
        return c._replace(target=np.zeros(c.target.shape, rng.choice(["c8", "O", "?", "M8[s]"]))), TypeError
    if kind == 5:
        name = str(rng.choice(["weight", "label_smoothing", "reduction", "ignore_index", "sample_weight"]))
        wrong: dict[str, tuple[Any, Any]] = dict(
            weight=(np.ones(classes + 1), ValueError), label_smoothing=(float(rng.choice([-0.1, 1.5, NAN])), ValueError),
            reduction=("average", ValueError), ignore_index=(rng.choice([0.5, NAN]), TypeError),
            sample_weight=(np.ones((*c.logits.shape, 2)), ValueError),
        )  # fmt: skip
        return c._replace(options=c.options | {name: wrong[name][0]}), wrong[name][1]
    if kind == 6:
        return c._replace(n_threads=int(rng.choice([0, -1]))), ValueError
    return None


def check_error(number: int) -> bool:
    spoilt = spoil(number)
    if spoilt is None:
        return False
    c, error = spoilt
    out = np.full(c.logits.shape, 7, c.logits.dtype if c.logits.dtype.kind in "fV" else np.float64)
    function = [fx.cross_entropy_value_and_grad, fx.cross_entropy, fx.cross_entropy_stats][number % 3]
    more = dict(out=out) if number % 3 == 0 else {}
    with pytest.raises(error):
        function(c.logits, c.target, **c.options, axis=c.axis, n_threads=c.n_threads, **more)
    assert (out == 7).all()
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(dtype):
    for number in range(160):
        if native(make_call(number).logits).dtype == dtype:
            check(number)


@pytest.mark.thorough
def test_random_errors():
    assert sum(map(check_error, range(2000))) > 1000


@pytest.mark.thorough
@given(st.integers(10**6, 2**31))
def test_calls_of_any_number(number):
    check(number)
    check_error(number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_200_000_random_calls(part):
    for number in range(3000 + part * 25_000, 3000 + (part + 1) * 25_000):
        check(number)
        if number % 5 == 0:
            check_error(number)
