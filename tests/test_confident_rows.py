"""Rows whose largest logit leaves almost nothing to the others: 1 + r would lose r, and the loss, log(1 + r), with it.

The truth is log1p(r) and r / (1 + r), with r summed in numpy.longdouble without the term of the maximum.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastxent as fx
from fastxent.torch import cross_entropy as torch_cross_entropy

# (N, C), (N, C, pixels) and a row that threads share. In each the target leads by 0 to 60, in the last one by 40.
SHAPES = [(61, 7), (61, 400), (4, 5, 67), (1, 200_000)]
DTYPES = [np.float64, np.float32]
# Errors in units of eps, relative to the result. float32 exponentials are right to 1.5 units, and near CONFIDENT (``_maths``) r
# is still what was left of a float32 sum around 1.
UNITS = {np.float64: 6, np.float32: 24}


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
        assert error.max() <= UNITS[self.dtype], float(error.max())


@pytest.fixture(scope="module", params=[(s, d) for s in SHAPES for d in DTYPES], ids=lambda p: f"{p[0]}-{p[1].__name__}")
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
    x = np.zeros((640, 3), np.float32)
    x[:, 0] = 30
    want = 640 * np.log1p(2 * np.exp(np.longdouble(-30)))
    assert abs(fx.cross_entropy(x, np.zeros(640, int), reduction="sum") / want - 1) < 1e-6


def test_softmax_family(rows):
    rows.assert_near(rows.of_target(fx.log_softmax(rows.x, axis=1)), -rows.loss)
    rows.assert_near(fx.logsumexp(rows.x, axis=1), rows.log_sum)


def test_reference(rows):
    loss, g = fx.reference.cross_entropy_value_and_grad(rows.x, rows.y, axis=1, reduction="none")
    rows.assert_near(loss, rows.loss)
    rows.assert_near(rows.of_target(g), -rows.of_target(rows.rest))
    rows.assert_near(fx.reference.logsumexp(rows.x, axis=1), rows.log_sum)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_hessian(dtype):
    rows = Rows(SHAPES[0], dtype)
    stats = fx.cross_entropy_stats(rows.x, rows.y)
    rows.assert_near(stats.loss, rows.loss)
    with np.errstate(divide="ignore"):
        entropy = -np.where(rows.p > 0, rows.p * np.where(rows.p > 0.5, np.log1p(-rows.rest), np.log(rows.p)), 0).sum(1)
    rows.assert_near(stats.entropy, entropy)
    _, hess = fx.cross_entropy_grad_hess(rows.x, rows.y)
    rows.assert_near(hess, rows.p * rows.rest)


def test_one_hot_probabilities():
    rows = Rows(SHAPES[0], np.float64)
    loss, g = fx.cross_entropy_value_and_grad(rows.x, np.eye(7)[rows.y], reduction="none")
    rows.assert_near(loss, rows.loss)
    rows.assert_near(rows.of_target(g), -rows.of_target(rows.rest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch(dtype):
    rows = Rows(SHAPES[0], dtype)
    x = torch.tensor(rows.x, requires_grad=True)
    loss = torch_cross_entropy(x, torch.tensor(rows.y), reduction="none")
    loss.sum().backward()
    rows.assert_near(loss.detach().numpy(), rows.loss)
    rows.assert_near(rows.of_target(x.grad.numpy()), -rows.of_target(rows.rest))


def test_several_maxima_are_no_confident_row():
    for dtype in DTYPES:
        assert abs(fx.logsumexp(np.array([0, 0, -60], dtype)) / np.log(2) - 1) <= np.finfo(dtype).eps
