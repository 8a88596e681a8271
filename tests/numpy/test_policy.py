"""Log-probability and entropy against the reference, within PyTorch's error; what they say of bad arguments."""

from __future__ import annotations

import numpy as np
import pytest

import fastxent as fx
from fastxent import reference as ref
from tests.helpers.cases import BFLOAT16

# 16 rows at a time, some of them a pair; a row at a time; few long rows, which threads share.
SHAPES = [(33, 10), (40, 1000), (3, 40_000)]
TOLERANCE = {"float16": 2e-6, "bfloat16": 2e-6, "float32": 2e-6, "float64": 1e-14}


def logits_of(shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(shape)
    return (3 * rng.standard_normal(shape)).astype(dtype), rng.integers(0, shape[-1], shape[:-1])


def assert_right(got, want, dtype) -> None:
    for ours, truth in zip(got, want, strict=True):
        assert ours.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert (np.abs(ours - truth) <= TOLERANCE[np.dtype(dtype).name] * (1 + np.abs(truth))).all()


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    x, y = logits_of(shape, dtype)
    wide = x.astype(np.float64)
    assert_right(fx.log_prob_and_entropy(x, y), ref.log_prob_and_entropy(wide, y), dtype)
    y[1::3] = -100
    x[1::3] = np.nan  # of ignored rows nothing is seen
    wide = np.where(np.isnan(wide := x.astype(np.float64)), 0.0, wide)
    got = fx.log_prob_and_entropy(x, y, temperature=0.7, n_threads=2)
    assert_right(got, ref.log_prob_and_entropy(wide, y, temperature=0.7), dtype)
    assert not any(a[1::3].any() for a in got)


def test_axes_and_layouts():
    x, y = logits_of((4, 5, 7), np.dtype(np.float64))
    want = ref.log_prob_and_entropy(x, y)
    for axis in range(3):
        moved = np.ascontiguousarray(np.moveaxis(x, -1, axis))
        assert_right(fx.log_prob_and_entropy(moved, y, axis=axis), want, np.float64)
    assert_right(fx.log_prob_and_entropy(x[..., ::-1], 6 - y), want, np.float64)
    log_prob, entropy = fx.log_prob_and_entropy([0.0, 0.0], 1)
    assert log_prob.shape == entropy.shape == () and entropy == pytest.approx(np.log(2))


def test_what_is_ruled_out_adds_nothing_and_certainty_has_all_digits():
    x = np.array([[0.0, -np.inf, 0.0], [40.0, 0.0, -np.inf]])
    log_prob, entropy = fx.log_prob_and_entropy(x, [0, 0])
    small = np.exp(-40.0)
    assert entropy == pytest.approx([np.log(2), 41 * small], rel=1e-12)
    assert log_prob == pytest.approx([-np.log(2), -small], rel=1e-12)
    assert fx.log_prob_and_entropy(x, [1, 2])[0].tolist() == [-np.inf, -np.inf]


def test_the_number_of_threads_changes_no_bit():
    x, y = logits_of((3, 40_000), np.dtype(np.float32))
    one, two = (fx.log_prob_and_entropy(x, y, n_threads=n) for n in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_bad_arguments():
    x, y = logits_of((5, 7), np.dtype(np.float32))
    with pytest.raises(IndexError, match=r"target\[2\] = 7 is outside \[0, 7\)"):
        fx.log_prob_and_entropy(x, [0, 1, 7, 3, 4])
    with pytest.raises(TypeError, match="target holds class probabilities"):
        fx.log_prob_and_entropy(x, np.full((5, 7), 1 / 7))
    with pytest.raises(ValueError, match=r"target has shape \(4,\)"):
        fx.log_prob_and_entropy(x, y[:4])
    for bad in (0.0, -1.0, np.inf, np.nan, 10**400):
        with pytest.raises(ValueError, match="temperature"):
            fx.log_prob_and_entropy(x, y, temperature=bad)
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        fx.log_prob_and_entropy(x, y, temperature="1")
    assert [a.shape for a in fx.log_prob_and_entropy(np.zeros((0, 3)), np.zeros(0, int))] == [(0,), (0,)]
