"""Rows whose largest logit leaves almost nothing to the others: 1 + r would lose r, and the loss, log(1 + r), with it.

The truth is log1p(r) and r / (1 + r), with r summed in numpy.longdouble without the term of the maximum.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastxent as fx
from fastxent.torch import cross_entropy as torch_cross_entropy

# (N, C), (N, C, pixels), rows in several blocks, and a row that threads share. In each the target leads by 0 to 60, in the last
# one by 40. float32 rows of few classes, and planes, keep PyTorch's accuracy: see ``sums_of`` in ``inputs``.
FEW, MANY = (61, 7), (61, 400)
CASES = [(shape, np.float64) for shape in (FEW, MANY, (4, 5, 67), (7, 9000), (1, 200_000))]
CASES += [(shape, np.float32) for shape in (MANY, (7, 9000), (1, 200_000))]
SMALL = [(FEW, np.float64), (MANY, np.float32)]
UNITS = 6  # of the result's eps: exponentials are right to 1.6


class Rows:
    """Logits, class indices, and the true loss, log-sum-exp, p and 1 - p."""

    def __init__(self, shape, dtype):
        rng = np.random.default_rng(7)
        rows = (shape[0], *shape[2:])
        lead = np.linspace(0, 60, np.prod(rows)).reshape(rows) if np.prod(rows) > 1 else np.full(rows, 40.0)
        self.y = rng.integers(0, shape[1], rows)
        hot = np.expand_dims(self.y, 1)
        x = rng.normal(size=shape)
        np.put_along_axis(x, hot, lead[:, None], 1)
        x = (x - x.max(1, keepdims=True)).astype(dtype)  # the maximum is 0, so log-sum-exp is log(1 + r)
        self.x, self.dtype, self.hot = x, dtype, hot
        wide = self.x.astype(np.longdouble)
        top = wide.argmax(1, keepdims=True)
        e = np.exp(wide)
        others = e.copy()
        np.put_along_axis(others, top, 0, 1)
        r = others.sum(1, keepdims=True)
        self.log_sum = np.log1p(r)[:, 0]
        self.loss = self.log_sum - self.of_target(wide)
        self.p = e / (1 + r)
        self.rest = np.where(np.arange(shape[1]).reshape(1, -1, *[1] * len(shape[2:])) == top, r, 1 + r - e) / (1 + r)

    def of_target(self, a):
        return np.take_along_axis(a, self.hot, 1)[:, 0]

    def assert_near(self, got, want):
        small = np.finfo(self.dtype).tiny
        error = np.abs(np.asarray(got, np.longdouble) - want) / np.maximum(np.abs(want), small) / np.finfo(self.dtype).eps
        assert error.max() <= UNITS, float(error.max())


@pytest.fixture(scope="module", params=CASES, ids=lambda p: f"{p[0]}-{p[1].__name__}")
def rows(request):
    return Rows(*request.param)


def test_loss_and_gradient(rows):
    loss, g = fx.cross_entropy_value_and_grad(rows.x, rows.y, axis=1, reduction="none")
    rows.assert_near(loss, rows.loss)
    rows.assert_near(rows.of_target(g), -rows.of_target(rows.rest))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_loss_alone(rows, reduction):
    """The loss of a sum is not what a product of many 1 + r has left of it."""
    want = {"none": rows.loss, "sum": rows.loss.sum(), "mean": rows.loss.mean()}[reduction]
    rows.assert_near(fx.cross_entropy(rows.x, rows.y, axis=1, reduction=reduction), want)


def test_sum_over_nothing_but_confident_rows():
    x = np.zeros((640, 400), np.float32)
    x[:, 0] = 30
    want = 640 * np.log1p(399 * np.exp(np.longdouble(-30)))
    assert abs(fx.cross_entropy(x, np.zeros(640, int), reduction="sum") / want - 1) < 1e-6


def test_softmax_family(rows):
    rows.assert_near(rows.of_target(fx.log_softmax(rows.x, axis=1)), -rows.loss)
    rows.assert_near(fx.logsumexp(rows.x, axis=1), rows.log_sum)


def test_reference(rows):
    loss, g = fx.reference.cross_entropy_value_and_grad(rows.x, rows.y, axis=1, reduction="none")
    rows.assert_near(loss, rows.loss)
    rows.assert_near(rows.of_target(g), -rows.of_target(rows.rest))
    rows.assert_near(fx.reference.logsumexp(rows.x, axis=1), rows.log_sum)


@pytest.mark.parametrize(("shape", "dtype"), SMALL)
def test_statistics_and_hessian(shape, dtype):
    rows = Rows(shape, dtype)
    stats = fx.cross_entropy_stats(rows.x, rows.y)
    rows.assert_near(stats.loss, rows.loss)
    with np.errstate(divide="ignore"):
        entropy = -np.where(rows.p > 0, rows.p * np.where(rows.p > 0.5, np.log1p(-rows.rest), np.log(rows.p)), 0).sum(1)
    rows.assert_near(stats.entropy, entropy)
    _, hess = fx.cross_entropy_grad_hess(rows.x, rows.y)
    rows.assert_near(hess, rows.p * rows.rest)


@pytest.mark.parametrize("weight", [None, np.array([49.0, 3.0, 0.1, 7.0, 1e-3, 1.0, 5.0])])
def test_one_hot_probabilities(weight):
    rows = Rows(FEW, np.float64)
    loss, g = fx.cross_entropy_value_and_grad(rows.x, np.eye(7)[rows.y], weight=weight, reduction="none")
    w = 1 if weight is None else weight[rows.y]
    rows.assert_near(loss, w * rows.loss)
    rows.assert_near(rows.of_target(g), -w * rows.of_target(rows.rest))


@pytest.mark.thorough
def test_one_hot_probabilities_of_a_split_row():
    rows = Rows((1, 200_000), np.float64)
    t = np.zeros(rows.x.shape)
    t[0, rows.y] = 1
    _, g = fx.cross_entropy_value_and_grad(rows.x, t)
    rows.assert_near(rows.of_target(g), -rows.of_target(rows.rest))
    t[0] = fx.softmax(np.random.default_rng(1).normal(size=200_000))
    _, g = fx.cross_entropy_value_and_grad(rows.x, t)
    np.testing.assert_allclose(g, fx.softmax(rows.x, axis=1) - t, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("shape", "dtype"), SMALL)
def test_torch(shape, dtype):
    rows = Rows(shape, dtype)
    x = torch.tensor(rows.x, requires_grad=True)
    loss = torch_cross_entropy(x, torch.tensor(rows.y), reduction="none")
    loss.sum().backward()
    rows.assert_near(loss.detach().numpy(), rows.loss)
    rows.assert_near(rows.of_target(x.grad.numpy()), -rows.of_target(rows.rest))


def test_several_maxima_are_no_confident_row():
    for dtype in (np.float64, np.float32):
        assert abs(fx.logsumexp(np.array([0, 0, -60], dtype)) / np.log(2) - 1) <= np.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(64, 400, 16), (64, 20000)])
def test_blocks_whose_maximum_is_elsewhere(shape):
    """A block of a row may sum up to just above 1 without holding the row's maximum."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=shape).astype(np.float32), rng.integers(0, shape[1], (shape[0], *shape[2:]))
    loss, g = fx.cross_entropy_value_and_grad(x, y, axis=1, reduction="none")
    want, want_g = fx.reference.cross_entropy_value_and_grad(x, y, axis=1, reduction="none")
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(g, want_g, rtol=0, atol=1e-6)
