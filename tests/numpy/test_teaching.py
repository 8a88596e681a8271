"""The numbers of the texts that cross-entropy is taught with, from the reference and from fastxent alike.

A number printed with four decimals is right to half a unit of the fourth: that is the tolerance.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastxent as fx
from fastxent import reference as ref

FIVE_ROWS = np.array(
    [
        [1.3877, -1.2656, -0.9112],
        [0.6011, 0.0092, -0.0982],
        [-0.0674, -0.2059, 0.3410],
        [1.3918, 0.2355, 0.4159],
        [-0.6652, -1.6354, -0.9315],
    ]
)
TEN_ROWS = np.array(
    [
        [4.2177, -4.0934, 0.0668],
        [-0.7385, 2.6636, 3.4101],
        [-4.0501, 1.9145, 4.6214],
        [4.8040, 1.1541, -2.3394],
        [2.5674, -2.1252, 1.5663],
        [-2.0453, 3.3044, 0.0779],
        [4.1436, 5.1625, 4.5696],
        [4.2516, 3.3550, -0.4895],
        [-0.7235, -0.0780, 2.7425],
        [-4.7485, 0.8806, 5.0635],
    ]
)
FIVE_LOGITS = [-2.0, 3.0, -3.0, 0.0, 5.0]


@pytest.fixture(params=[fx, ref], ids=["fastxent", "reference"])
def lib(request):
    return request.param


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def is_number(value, printed: str) -> bool:
    """Is `value` what the text prints, to the text's own decimals?"""
    decimals = len(printed.partition("e")[0].partition(".")[2])
    exponent = int(printed.partition("e")[2] or 0)
    return abs(float(value) - float(printed)) <= 0.5 * 10.0 ** (exponent - decimals) * (1 + 1e-6)


def test_is_number_tells_the_last_digit():
    assert is_number(1.35774, "1.3577")
    assert not is_number(1.35780, "1.3577")
    assert is_number(-1.99707e-2, "-1.9971e-02")
    assert not is_number(-1.9972e-2, "-1.9971e-02")


def test_five_rows_three_ways(lib, dtype):
    x, y = FIVE_ROWS.astype(dtype), [2, 0, 1, 0, 1]
    assert is_number(-np.log(lib.softmax(x, axis=1))[np.arange(5), y].mean(), "1.3577")
    assert is_number(lib.nll_loss(lib.log_softmax(x, axis=1), y), "1.3577")
    assert is_number(lib.cross_entropy(x, y), "1.3577")


def test_ten_rows(lib, dtype):
    labels = [0, 2, 2, 1, 0, 1, 1, 0, 1, 2]
    assert is_number(lib.cross_entropy(TEN_ROWS.astype(dtype), labels), "0.8439")
    assert is_number(lib.cross_entropy_value_and_grad(TEN_ROWS.astype(dtype), labels)[0], "0.8439")


def test_fifty_equal_rows_and_their_gradient(lib, dtype):
    x = np.tile(np.linspace(-2, 2, 50, dtype=dtype), (50, 1))
    y = np.arange(50)
    loss, dlogits = lib.cross_entropy_value_and_grad(x, y)
    assert is_number(loss, "4.5290")
    printed = {0: "-1.9971e-02", 1: "3.1692e-05", 2: "3.4388e-05", 48: "1.4697e-03", 49: "1.5947e-03"}
    for c, text in printed.items():
        assert is_number(dlogits[0, c], text), c
    formula = (lib.softmax(x, axis=1) - np.eye(50)) / 50
    # No element is larger than 0.02, and each side rounds such a number once or twice.
    np.testing.assert_allclose(dlogits, formula, rtol=0, atol=2 * np.spacing(dtype(0.02)))


def test_minus_log_of_the_probability_of_the_target(lib):
    probabilities, one_hot = np.array([0.1, 0.7, 0.2]), np.array([0.0, 1.0, 0.0])
    by_hand = -(one_hot * np.log(probabilities)).sum()
    assert is_number(by_hand, "0.35667494")
    assert is_number(lib.cross_entropy(np.log(probabilities), one_hot), "0.35667494")
    assert is_number(lib.cross_entropy(np.log(probabilities), 1), "0.35667494")
    assert is_number(lib.nll_loss(np.log(probabilities), 1), "0.35667494")


def test_softmax_of_five_numbers(lib):
    printed = ["0.01165623", "0.03168492", "0.08612854", "0.23412166", "0.63640865"]
    for p, text in zip(lib.softmax([-2, -1, 0, 1, 2]), printed, strict=True):
        assert is_number(p, text)


@pytest.mark.parametrize("value", [-100.0, 100.0, 1e4])
@pytest.mark.parametrize("where", range(5))
def test_one_large_logit_overflows_nothing(lib, dtype, value, where):
    x = np.array([FIVE_LOGITS], dtype)
    x[0, where] = value
    for y in range(5):
        loss, dlogits = lib.cross_entropy_value_and_grad(x, [y])
        assert np.isfinite(loss) and np.isfinite(dlogits).all()
        exact = np.logaddexp.reduce(x[0].astype(np.longdouble)) - x[0, y]
        assert abs(loss - exact) <= 2 * np.spacing(dtype(max(exact, 1)))
        # A constant that is added to all logits (small integers: no rounding) changes nothing.
        shifted = lib.cross_entropy_value_and_grad(x + dtype(64), [y])
        np.testing.assert_array_equal(shifted[0], loss)
        np.testing.assert_array_equal(shifted[1], dlogits)


def test_naive_float32_exp_overflows_where_ours_does_not(lib):
    def naive(x, y):
        e = np.exp(x)
        return -np.log(e[y] / e.sum())

    below, above = np.array([88.7, 0.0], np.float32), np.array([88.8, 0.0], np.float32)
    assert np.isfinite(naive(below, 0))
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isnan(naive(above, 0))
    assert lib.cross_entropy(above, 0) < 1e-38  # 2.7e-39 where log1p has what exp left, else 0
    assert is_number(lib.cross_entropy(above, 1), "88.8")


def test_cross_entropy_is_entropy_plus_divergence(lib):
    """H(p, q) = H(p) + KL(p || q), with q the softmax of the logits."""
    rng = np.random.default_rng(0)
    p, x = rng.dirichlet(np.ones(7), 5), 3 * rng.standard_normal((5, 7))
    h_pq = lib.cross_entropy(x, p, reduction="none")
    kl = lib.kl_div(lib.log_softmax(x, axis=1), p, reduction="none").sum(1)
    np.testing.assert_allclose(h_pq, lib.entropy(p) + kl, rtol=1e-13)
    by_batch = lib.kl_div(lib.log_softmax(x, axis=1), p, reduction="batchmean")
    np.testing.assert_allclose(h_pq.mean(), lib.entropy(p).mean() + by_batch, rtol=1e-13)
    assert (kl > 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_two_classes_are_binary_cross_entropy_of_the_difference(lib, reduction):
    rng = np.random.default_rng(1)
    x, y = 3 * rng.standard_normal((9, 2)), rng.integers(0, 2, 9)
    two = lib.cross_entropy_value_and_grad(x, y, reduction=reduction)
    one = lib.binary_cross_entropy_with_logits_value_and_grad(x[:, 1] - x[:, 0], y.astype(float), reduction=reduction)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-13)
    np.testing.assert_allclose(two[1], np.stack([-one[1], one[1]], 1), rtol=1e-12, atol=1e-15)
