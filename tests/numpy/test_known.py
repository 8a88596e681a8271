"""Calls that come again are not checked again: they must give the same, and notice all that is different."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent import functional
from fastxent._fastpath.cache import calls
from fastxent._runtime import fastpath

pytestmark = pytest.mark.skipif(not fastpath.ENABLED, reason="every call is checked")

SHAPES = [
    pytest.param((5, 3), marks=pytest.mark.core),
    (16, 300),
    (700, 30),  # this and the next are for all threads
    pytest.param((40, 2000), marks=pytest.mark.core),
    (4, 70000),
]
OPTIONS: list[dict[str, Any]] = [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 2}, {"axis": 0}]


def arrays(shape: tuple[int, int], axis: int = -1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    return (x, rng.integers(0, shape[1], shape[0])) if axis else (x, rng.integers(0, shape[0], shape[1]))


@pytest.fixture
def unchecked(monkeypatch):
    """From when it is called, a call that is checked fails."""

    def no_checks(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("checked again")

    return lambda: monkeypatch.setattr(functional, "problem", no_checks)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_second_call_gives_the_same_unchecked(shape, options, unchecked):
    x, y = arrays(shape, options.get("axis", -1))
    out, place = np.empty_like(x), x.copy()
    loss, g = fx.cross_entropy_value_and_grad(x, y, **options)
    fx.cross_entropy(x, y, **options)
    fx.cross_entropy_value_and_grad(x, y, out=out, **options)
    fx.cross_entropy_value_and_grad(place, y, out=place, **options)
    place[:], out[:] = x, 7
    unchecked()
    again, g_again = fx.cross_entropy_value_and_grad(x, y, **options)
    assert (again, again.dtype) == (loss, loss.dtype) and g_again is not g and np.array_equal(g_again, g)
    assert fx.cross_entropy(x, y, **options) == loss
    again, same = fx.cross_entropy_value_and_grad(x, y, out=out, **options)
    assert again == loss and same is out and np.array_equal(out, g)
    again, same = fx.cross_entropy_value_and_grad(place, y, out=place, **options)
    assert again == loss and same is place and np.array_equal(place, g)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_values_in_arrays_that_look_the_same(shape):
    for seed in range(3):
        x, y = arrays(shape, seed=seed)
        if seed == 1:
            y[: len(y) // 2] = -100
        loss, g = fx.cross_entropy_value_and_grad(x, y)
        right, right_g = fx.reference.cross_entropy_value_and_grad(x, y)
        np.testing.assert_allclose(loss, right, rtol=1e-6)
        np.testing.assert_allclose(g, right_g, rtol=1e-4, atol=1e-9)
    y[:] = -100
    loss, g = fx.cross_entropy_value_and_grad(x, y)
    assert np.isnan(loss) and not g.any()


@pytest.mark.parametrize("bad", [-1, 2**62, -(2**63)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_indices_are_checked_every_time(shape, bad):
    x, y = arrays(shape)
    out = np.full_like(x, 7)
    fx.cross_entropy_value_and_grad(x, y, out=out.copy())
    fx.cross_entropy(x, y)
    y[3] = bad
    for call in (fx.cross_entropy, lambda x, y: fx.cross_entropy_value_and_grad(x, y, out=out)):
        with pytest.raises(IndexError, match=rf"target\[3\] = {bad} is outside \[0, {shape[1]}\); 1 of {shape[0]} rows is"):
            call(x, y)
    assert (out == 7).all()


def test_options_of_another_type():
    x, y = arrays((5, 3))
    fx.cross_entropy(x, y.clip(0, 2), axis=1, ignore_index=1, label_smoothing=0.0)
    for wrong in (dict(axis=True), dict(axis=1.0), dict(ignore_index=True), dict(label_smoothing=False), dict(axis=[1])):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            fx.cross_entropy(x, y, **{"axis": 1, "ignore_index": 1, "label_smoothing": 0.0} | wrong)
    with pytest.raises(ValueError, match="n_threads = 0"):
        fx.cross_entropy(x, y, axis=1, ignore_index=1, label_smoothing=0.0, n_threads=0)
    with pytest.raises(ValueError, match="reduction = 'most'"):
        fx.cross_entropy(x, y, reduction="most")


def test_arrays_of_another_kind():
    x, y = arrays((6, 4))
    expected = fx.cross_entropy(x, y)
    for other in (np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], x.astype(">f4"), x.tolist()):
        np.testing.assert_allclose(fx.cross_entropy(other, y), expected, rtol=1e-6)
    for other in (y.astype(np.uint8), y.astype(">i8"), np.repeat(y, 2)[::2], y.tolist()):
        assert fx.cross_entropy(x, other) == expected
    with pytest.raises(TypeError, match="class indices must be integers"):
        fx.cross_entropy(x, y.astype(float))


def test_where_the_gradient_may_lie():
    x, y = arrays((64, 6))  # rows that are read after others have been written
    _, g = fx.cross_entropy_value_and_grad(x, y)
    memory = np.empty(1200, np.float32)
    fx.cross_entropy_value_and_grad(x, y, out=memory[:384].reshape(64, 6))
    for at in (0, 30, 300, 500, 700, 784):  # before, across and behind the logits at 400 ... 783
        logits = memory[400:784].reshape(64, 6)
        logits[...] = x
        out = memory[at : at + 384].reshape(64, 6)
        fx.cross_entropy_value_and_grad(logits, y, out=out)
        assert np.array_equal(out, g), at
    both = np.zeros(300, np.int64)
    out = both.view(np.float32)[100:484].reshape(64, 6)
    targets = both[60:124]
    targets[...] = y
    fx.cross_entropy_value_and_grad(x, targets, out=out)
    assert np.array_equal(out, g)
    read_only = memory[:384].reshape(64, 6)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        fx.cross_entropy_value_and_grad(x, y, out=read_only)
    x.flags.writeable = False
    assert np.array_equal(fx.cross_entropy_value_and_grad(x, y)[1], g)
    with pytest.raises(ValueError, match="out is read-only"):
        fx.cross_entropy_value_and_grad(x, y, out=x)


def test_not_too_many_are_known(monkeypatch):
    calls.clear()
    monkeypatch.setattr(calls, "most", 4)
    for n in range(1, 12):
        fx.cross_entropy(np.zeros((n, 3), order="F"), np.zeros(n, int))  # in C order they are of one family
        assert len(calls) <= 4
