"""Sizes at the ends: nothing, one, and more than 2**31 elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastxent as fx
import fastxent.torch as fxt
from fastxent import reference as ref
from tests.helpers.cases import EVERYDAY_DTYPES, FLOAT16, REDUCTIONS, accumulation

EMPTY = [(0, 5), (0, 0), (3, 0), (0, 100), (0, 5, 4), (3, 5, 0), (3, 0, 4)]
FUNCTIONS = ["cross_entropy", "cross_entropy_value_and_grad", "cross_entropy_grad_hess", "cross_entropy_stats"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, reduction):
    x = np.zeros(shape, np.float32)
    rows = (shape[0], *shape[2:])
    for y in (np.full(rows, -100), np.zeros(shape, np.float32)):
        loss, gradient = fx.cross_entropy_value_and_grad(x, y, axis=1, reduction=reduction)
        np.testing.assert_array_equal(loss, ref.cross_entropy(x, y, axis=1, reduction=reduction))
        np.testing.assert_array_equal(fx.cross_entropy(x, y, axis=1, reduction=reduction), loss)
        assert gradient.shape == shape and gradient.dtype == np.float32
        out = np.empty(shape, np.float32)
        assert fx.cross_entropy_value_and_grad(x, y, axis=1, reduction=reduction, out=out)[1] is out
        assert all(a.shape == shape for a in fx.cross_entropy_grad_hess(x, y, axis=1))
    if 0 not in rows:
        with pytest.raises(IndexError, match=r"outside \[0, 0\)"):
            fx.cross_entropy(x, np.zeros(rows, int), axis=1)
    if shape[1]:
        assert all(np.shape(a) == rows for a in fx.cross_entropy_stats(x, np.zeros(rows, int), axis=1))
    weight = np.ones(shape[1])
    np.testing.assert_array_equal(
        fx.nll_loss(x, np.full(rows, -100), axis=1, weight=weight, reduction=reduction),
        ref.nll_loss(x, np.full(rows, -100), axis=1, weight=weight, reduction=reduction),
    )


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty_softmax(shape, axis):
    x = np.zeros(shape)
    assert fx.softmax(x, axis).shape == fx.log_softmax(x, axis).shape == shape
    np.testing.assert_array_equal(fx.logsumexp(x, axis), ref.logsumexp(x, axis))
    np.testing.assert_array_equal(fx.logsumexp(x, axis, keepdims=True), ref.logsumexp(x, axis, keepdims=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [s for s in EMPTY if s != (3, 0, 4)], ids=str)  # which PyTorch refuses
def test_empty_tensors(shape, reduction):
    x = torch.zeros(shape, requires_grad=True)
    y = torch.full((shape[0], *shape[2:]), -100)
    results = []
    for function in (F.cross_entropy, fxt.cross_entropy):
        loss = function(x, y, reduction=reduction)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), x)])
    for theirs, ours in zip(*results, strict=True):
        assert ours.shape == theirs.shape and torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))


@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (17, 1), (1, 2), (1,), (1, 1, 1)], ids=str)
def test_one(shape, dtype):
    """One row, one class: where there is one class only, the loss and the gradient are 0 whatever the logit."""
    x = np.linspace(-3, 3, int(np.prod(shape))).reshape(shape).astype(dtype)
    y = np.zeros(shape[:-1], int)
    loss, gradient = fx.cross_entropy_value_and_grad(x, y)
    truth = ref.cross_entropy_value_and_grad(x.astype(np.float64), y)
    assert loss.dtype == accumulation(dtype)
    np.testing.assert_allclose(float(loss), float(truth[0]), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(gradient.astype(np.float64), truth[1], rtol=0.01, atol=1e-12)
    if shape[-1] == 1:
        assert loss == 0 and not gradient.any()


# ----------------------------------------------------------------------------------------------------
# More than 2**31 elements, in place: 4.3 GB
# ----------------------------------------------------------------------------------------------------

BEYOND = 2**31


def corners(x: np.ndarray) -> list[tuple[slice, ...]]:
    """Some rows at the beginning, on both sides of element 2**31, and at the end of the memory."""
    n, c = x.shape
    middle = min(BEYOND // c, n - 4)
    return [slice(0, 3), slice(middle - 2, middle + 3), slice(n - 3, n)]


@pytest.mark.slow
@pytest.mark.parametrize("classes", [40, 1000, 2**24 + 3], ids=["few classes", "many classes", "long rows"])
def test_more_than_2_to_the_31_elements(classes):
    """The corners of a large array, which the rows between must not have reached, against small arrays of their rows."""
    rows = BEYOND // classes + 40
    x = np.zeros((rows, classes), FLOAT16)
    assert x.size > BEYOND
    rng = np.random.default_rng(0)
    y = np.full(rows, -100)  # else 2**31 exponentials
    expected = []
    for part in corners(x):
        x[part] = rng.standard_normal(x[part].shape)
        y[part] = rng.integers(0, classes, len(x[part]))
        y[part.start], y[part.stop - 1] = 0, classes - 1
        expected.append(fx.cross_entropy_value_and_grad(x[part].copy(), y[part], reduction="sum"))
    losses = fx.cross_entropy(x, y, reduction="none")
    prediction = fx.cross_entropy_stats(x, y).prediction
    for part in corners(x):
        np.testing.assert_array_equal(losses[part], fx.cross_entropy(x[part].copy(), y[part], reduction="none"))
        np.testing.assert_array_equal(prediction[part], x[part].argmax(-1))
    del losses, prediction
    before = x[rows // 3, :3].copy()
    loss, gradient = fx.cross_entropy_value_and_grad(x, y, reduction="sum", out=x)
    assert gradient is x and not before.any()
    np.testing.assert_allclose(loss, sum(part_loss for part_loss, _ in expected), rtol=1e-6)
    for part, (_, part_gradient) in zip(corners(x), expected, strict=True):
        np.testing.assert_array_equal(x[part], part_gradient)
    assert np.count_nonzero(x) == sum(np.count_nonzero(g) for _, g in expected)


@pytest.mark.slow
def test_more_than_2_to_the_31_rows():
    """Of one class and one memory; their log-sum-exps take 8.6 GB."""
    x = np.broadcast_to(np.float16([[3.0]]), (BEYOND + 17, 1))
    lse = fx.logsumexp(x, axis=-1)
    assert lse.shape == (BEYOND + 17,)
    assert all((part == 3).all() for part in np.array_split(lse, 64))
