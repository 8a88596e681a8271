"""Memory layouts: any strides are right, and contiguous rows or columns are never copied."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastxent as fx
from tests.helpers.cases import EVERYDAY_DTYPES, FLOAT32, REDUCTIONS, Case, accumulation, make_case
from tests.helpers.layouts import CONTIGUOUS_LAYOUTS, LAYOUTS, WRITEABLE, layouts_of
from tests.helpers.opponent import run_torch
from tests.helpers.truth import Budget, make_truth

SHAPES = {
    (33, 21): "fewer classes than make a row of vectors worth while",
    (33, 7): "a row is less than a vector: two tiles of 16 rows and one",
    (33, 70): "vectors and a tail; two tiles of 16 rows and one",
}
TARGETS = ["index", "weight ignore smoothing sample_weight", "probabilities weight"]


def native(case: Case) -> Case:
    """The same numbers as PyTorch takes them: contiguous and in this machine's byte order."""
    return case._replace(logits=np.array(case.logits, dtype=case.logits.dtype.newbyteorder("="), order="C"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_logits_in_any_layout(dtype, layout):
    if layout not in layouts_of(dtype):
        assert dtype.name == "bfloat16"
        return
    losses, gradients = Budget(), Budget()
    for shape, option in itertools.product(SHAPES, TARGETS):
        plain = make_case(dtype, shape, option)
        case = plain._replace(logits=LAYOUTS[layout](plain.logits))
        plain, before = native(case), case.logits.tobytes()
        for reduction in REDUCTIONS:
            truth, theirs = make_truth(plain, reduction), run_torch(plain, reduction)
            options = dict(case.options, reduction=reduction)
            loss, dlogits = fx.cross_entropy_value_and_grad(*case[:2], **options)
            assert loss.dtype == accumulation(dtype)
            assert dlogits.dtype.newbyteorder("=") == dtype and dlogits.shape == shape
            for value in (loss, fx.cross_entropy(*case[:2], **options)):
                losses.add(value, truth.loss, theirs[0], truth.loss_scale, (shape, reduction))
            gradients.add(dlogits, truth.grad, theirs[1], truth.grad_scale, (shape, reduction))
            assert case.logits.tobytes() == before
    losses.check()
    gradients.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_statistics_and_hessian_in_any_layout(dtype, layout):
    """They walk over logits by themselves. The order of a sum may follow the layout, hence the last digit."""
    if layout not in layouts_of(dtype):
        assert dtype.name == "bfloat16"
        return
    for shape in SHAPES:
        plain = make_case(dtype, shape, "ignore")
        logits = LAYOUTS[layout](plain.logits)
        same = np.array(logits, dtype=dtype, order="C")
        got, want = fx.cross_entropy_stats(logits, plain.target), fx.cross_entropy_stats(same, plain.target)
        epsilon = np.finfo(accumulation(dtype)).eps
        for name in ("loss", "lse", "entropy", "target_prob"):
            a, b = getattr(got, name), getattr(want, name)
            np.testing.assert_allclose(a, b, rtol=shape[1] * epsilon, atol=shape[1] * epsilon, err_msg=name)
        np.testing.assert_array_equal(got.prediction, want.prediction)
        np.testing.assert_array_equal(got.target_rank, want.target_rank)
        epsilon = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype.name, shape[1] * epsilon)
        for a, b in zip(*(fx.cross_entropy_grad_hess(x, plain.target) for x in (logits, same)), strict=True):
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=epsilon, atol=shape[1] * 2.0**-24)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_and_weights_in_any_layout(layout):
    """A row or column of a strided array as target, weight and sample weight; strided class probabilities."""
    logits = make_case(FLOAT32, (33, 21)).logits
    index, soft = make_case(FLOAT32, (33, 21), TARGETS[1]), make_case(FLOAT32, (33, 21), TARGETS[2])
    arrange = LAYOUTS[layout]
    target = arrange(np.stack([index.target] * 2, 1).astype(float)).astype(np.int64)
    weight = arrange(np.stack([index.options["weight"]] * 2, 1))
    sample_weight = arrange(np.stack([index.options["sample_weight"]] * 2, 1))
    probabilities = arrange(soft.target)
    target = np.lib.stride_tricks.as_strided(np.repeat(target[:, 1], 3), (33,), (24,))
    for y, w, u in [(target, weight[:, 1], sample_weight[:, 1]), (probabilities, weight[:, 0], None)]:
        options = dict(weight=w, sample_weight=u, reduction="none")
        got = fx.cross_entropy_value_and_grad(logits, y, **options)
        flat = {k: None if v is None else np.array(v, np.float32) for k, v in list(options.items())[:2]}
        want = fx.cross_entropy_value_and_grad(logits, np.array(y, y.dtype.newbyteorder("=")), reduction="none", **flat)
        # Where the probabilities lie decides which way the sums go; indices and weights decide nothing.
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6 if y is probabilities else 0, atol=1e-6 if y is probabilities else 0)


@pytest.mark.parametrize("layout", WRITEABLE)
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_out_in_any_layout(dtype, layout):
    """The gradient lands in ``out`` whatever its strides, and its frame stays as it was."""
    for shape in SHAPES:
        case = make_case(dtype, shape)
        want_loss, want = fx.cross_entropy_value_and_grad(*case[:2])
        for logits in (case.logits, np.asfortranarray(case.logits)):
            out = LAYOUTS[layout](np.full(shape, np.nan).astype(dtype))
            frame = out if out.base is None else out.base
            loss, dlogits = fx.cross_entropy_value_and_grad(logits, case.target, out=out)
            assert dlogits is out
            if logits is case.logits:
                np.testing.assert_array_equal(loss, want_loss)
                np.testing.assert_array_equal(out, want)
            np.testing.assert_allclose(out.astype(float), want.astype(float), rtol=2.0**-7, atol=1e-6)
            if frame.dtype == dtype:
                assert np.isnan(frame.astype(float)).sum() == frame.size - out.size


@pytest.mark.parametrize("layout", WRITEABLE)
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_out_may_be_the_logits(dtype, layout):
    for shape in SHAPES:
        for option in TARGETS:
            case = make_case(dtype, shape, option)
            logits = LAYOUTS[layout](case.logits)
            want = fx.cross_entropy_value_and_grad(logits, case.target, **case.options)
            loss, dlogits = fx.cross_entropy_value_and_grad(logits, case.target, out=logits, **case.options)
            assert dlogits is logits
            np.testing.assert_array_equal(loss, want[0])
            np.testing.assert_array_equal(dlogits, want[1])


OVERLAPS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "a row further": lambda a: (a[:-1], a[1:]),
    "a row back": lambda a: (a[1:], a[:-1]),
    "rows reversed": lambda a: (a[1:], a[:0:-1]),
    "classes reversed": lambda a: (a[:-1, :], a[:-1, ::-1]),
    "a class further": lambda a: (a.ravel()[:-1].reshape(1, -1), a.ravel()[1:].reshape(1, -1)),
    "the same memory as another array": lambda a: (a[:-1], a.view()[:-1]),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("shape", [(18, 21), (18, 70), (66, 5)], ids=str)
def test_out_that_overlaps_the_logits(shape, overlap):
    """As NumPy does: as if there were no overlap."""
    logits, out = OVERLAPS[overlap](make_case(FLOAT32, shape).logits)
    target = np.arange(len(logits)) % logits.shape[1]
    want_loss, want = fx.cross_entropy_value_and_grad(logits.copy(), target)
    loss, dlogits = fx.cross_entropy_value_and_grad(logits, target, out=out)
    assert dlogits is out
    np.testing.assert_array_equal(loss, want_loss)
    np.testing.assert_array_equal(out, want)


def test_out_that_overlaps_target_or_weights():
    memory = np.zeros((6, 8), np.float32)
    memory[1:5, :] = np.eye(8)[:4]
    memory[5] = np.arange(8)
    logits = make_case(FLOAT32, (4, 8)).logits
    for options in (dict(target=memory[1:5]), dict(target=[0, 1, 2, 3], weight=memory[5])):
        before = memory.copy()
        want = fx.cross_entropy_value_and_grad(logits, **{k: np.array(v) for k, v in options.items()})
        for out in (memory[1:5], memory[2:6]):
            loss, dlogits = fx.cross_entropy_value_and_grad(logits, **options, out=out)
            np.testing.assert_array_equal(loss, want[0])
            np.testing.assert_array_equal(dlogits, want[1])
            memory[...] = before


def peak_bytes(call: Callable[[], Any]) -> int:
    """What NumPy and Python allocate at most during a call that has been made before (so is compiled)."""
    call()
    tracemalloc.start()
    try:
        start = tracemalloc.get_traced_memory()[0]
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
        del result
        return peak - start
    finally:
        tracemalloc.stop()


def test_peak_bytes_sees_a_copy():
    a = np.zeros((256, 4096), np.float32)
    assert peak_bytes(lambda: a + 1) >= a.nbytes
    assert peak_bytes(lambda: a.T) < a.nbytes / 100


@pytest.mark.parametrize("layout", CONTIGUOUS_LAYOUTS)
@pytest.mark.parametrize("shape", [(256, 4096), (40000, 10)], ids=str)
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_contiguous_rows_or_columns_are_not_copied(dtype, shape, layout):
    """The loss takes no memory of the size of the logits, the gradient takes one, and with ``out`` none."""
    rng = np.random.default_rng(0)
    logits = LAYOUTS[layout](rng.standard_normal(shape, np.float32).astype(dtype))
    target = rng.integers(0, shape[1], shape[0])
    # One loss a row and one number a task at most: with 10 classes that is a tenth of float32 logits.
    small = logits.nbytes / 20 + 8 * shape[0]
    assert peak_bytes(lambda: fx.cross_entropy(logits, target)) < small
    assert peak_bytes(lambda: fx.cross_entropy(logits, target, reduction="none")) < small
    assert peak_bytes(lambda: fx.cross_entropy_value_and_grad(logits, target)) < logits.nbytes + small
    if layout in WRITEABLE:
        assert peak_bytes(lambda: fx.cross_entropy_value_and_grad(logits, target, out=logits)) < small


@pytest.mark.parametrize("shape", [(8, 100, 32, 32), (8, 10, 64, 64)], ids=str)
@pytest.mark.parametrize("order", ["channels first", "channels last"])
def test_images_are_not_copied(order, shape):
    """(N, C, H, W) with axis=1, in both orders that images come in."""
    n, classes, *image = shape
    logits = np.random.default_rng(0).standard_normal((n, *image, classes), np.float32)
    logits = np.moveaxis(logits, -1, 1)
    if order == "channels first":
        logits = np.ascontiguousarray(logits)
    target = np.random.default_rng(1).integers(0, classes, (n, *image))
    small = logits.nbytes / 20 + 8 * target.size
    assert peak_bytes(lambda: fx.cross_entropy(logits, target, axis=1)) < small
    assert peak_bytes(lambda: fx.cross_entropy_value_and_grad(logits, target, axis=1)) < logits.nbytes + small
    assert peak_bytes(lambda: fx.cross_entropy_value_and_grad(logits, target, axis=1, out=logits)) < small
