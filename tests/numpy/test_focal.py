"""Focal loss: the reference, cross-entropy at gamma 0, finite differences, and rows at either end of confidence."""

from __future__ import annotations

import numpy as np
import pytest

import fastxent as fx
from fastxent import reference as ref

GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]


def case(n: int, c: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n * c)
    y = rng.integers(0, c, n)
    y[::7] = -100
    return scale * rng.standard_normal((n, c)), y, rng.uniform(0.5, 2, c), rng.random(n)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shape", [(33, 21), (64, 10), (9, 400)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_are_the_references(dtype, shape, gamma):
    x, y, w, u = case(*shape)
    x = x.astype(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == "float32" else {"rtol": 1e-13, "atol": 1e-15}
    for options in ({}, {"weight": w, "sample_weight": u}, {"reduction": "none"}):
        loss, g = fx.focal_loss_value_and_grad(x, y, gamma=gamma, **options)
        want, want_g = ref.focal_loss_value_and_grad(x, y, gamma=gamma, **options)
        np.testing.assert_allclose(loss, want, **tolerance)
        np.testing.assert_allclose(g, want_g, **tolerance)
        np.testing.assert_array_equal(fx.focal_loss(x, y, gamma=gamma, **options), loss)
        assert g.dtype == dtype and (g[y == -100] == 0).all()


@pytest.mark.parametrize("how", ["float16", "channels first", "large", "one long row"])
def test_other_layouts(how):
    x, y, _, _ = case(1, 40_000) if how == "one long row" else case(200_000, 24) if how == "large" else case(60, 21)
    x, axis, tolerance = x.astype(np.float32), 1, 1e-6
    y[0] = 3
    if how == "float16":
        x, tolerance = x.astype(np.float16), 1e-4
    elif how == "channels first":
        x, y, axis = np.ascontiguousarray(x.reshape(3, 20, 21).transpose(0, 2, 1)), y.reshape(3, 20), 1
    loss, g = fx.focal_loss_value_and_grad(x, y, axis=axis)
    want, want_g = ref.focal_loss_value_and_grad(x, y, axis=axis)
    assert loss == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(g, want_g, atol=tolerance)


def test_the_reference_is_the_formula_and_its_derivative():
    x, y, w, u = case(5, 4, 1.0)
    y = np.abs(y) % 4
    p = np.exp(x[range(5), y]) / np.exp(x).sum(1)
    np.testing.assert_allclose(
        ref.focal_loss(x, y, weight=w, sample_weight=u, reduction="none"), -u * w[y] * (1 - p) ** 2 * np.log(p), rtol=1e-13
    )
    _, g = ref.focal_loss_value_and_grad(x, y, gamma=1.5, weight=w, sample_weight=u)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-5
        up, down = (ref.focal_loss(x + s, y, gamma=1.5, weight=w, sample_weight=u) for s in (step, -step))
        assert g[i] == pytest.approx((up - down) / 2e-5, abs=1e-9)


def test_gamma_0_is_cross_entropy():
    x, y, w, u = case(33, 21)
    ours = fx.focal_loss_value_and_grad(x, y, gamma=0, weight=w, sample_weight=u)
    want = fx.cross_entropy_value_and_grad(x, y, weight=w, sample_weight=u)
    np.testing.assert_allclose(ours[0], want[0], rtol=1e-15)
    np.testing.assert_allclose(ours[1], want[1], rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_at_either_end(dtype, gamma):
    """Confident rows, certain ones, rows of one class left, and rows whose class is ruled out: nothing is nan."""
    x = np.array([[0, 40], [0, 300], [-np.inf, 0], [0, -1000], [0, -np.inf], [0, 0]] * 3, dtype)
    y = np.array([1, 1, 1, 1, 1, 0] * 3)
    loss, g = fx.focal_loss_value_and_grad(x, y, gamma=gamma, reduction="none")
    want, want_g = ref.focal_loss_value_and_grad(x, y, gamma=gamma, reduction="none")
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=0 if dtype == "float64" else 1e-7)
    np.testing.assert_allclose(g, want_g, rtol=1e-5, atol=0 if dtype == "float64" else 1e-7)
    assert not np.isnan(loss).any() and not np.isnan(g).any()
    assert fx.focal_loss(np.zeros((3, 1), dtype), [0, 0, 0], gamma=gamma) == 0


def test_errors():
    x = np.zeros((2, 3))
    for error, message, call in [
        (TypeError, "takes class indices", lambda: fx.focal_loss(x, x)),
        (ValueError, "gamma = -1 is negative", lambda: fx.focal_loss(x, [0, 1], gamma=-1)),
        (ValueError, "gamma = inf", lambda: fx.focal_loss(x, [0, 1], gamma=float("inf"))),
        (ValueError, "reduction = 'max'", lambda: fx.focal_loss_value_and_grad(x, [0, 1], reduction="max")),
        (IndexError, r"target\[1\] = 3", lambda: fx.focal_loss_value_and_grad(x, [0, 3])),
    ]:
        with pytest.raises(error, match=message):
            call()
