"""binary_cross_entropy_with_logits and its gradient, against truth and PyTorch."""

from __future__ import annotations

import tracemalloc
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastxent as fx
from fastxent import reference as ref
from tests.helpers.cases import DTYPES, FLOAT32, INF, NAN, REDUCTIONS, accumulation, make_rng
from tests.helpers.layouts import LAYOUTS, WRITEABLE, layouts_of
from tests.helpers.opponent import one_torch_thread
from tests.helpers.truth import Budget, widest

SHAPES = {
    (): "a number",
    (1,): "one element of a vector",
    (15,): "a vector less one",
    (16,): "a vector",
    (17,): "a vector and one",
    (3, 5): "two axes, less than a vector",
    (2, 3, 4): "three axes",
    (2047,): "many vectors and a tail",
    (33, 100): "as many labels as a multi-label task has",
    (70001,): "more than one thread's share",
}
OPTIONS = ["", "weight", "pos_weight", "weight pos_weight"]


def make_binary(dtype: np.dtype, shape: tuple[int, ...], option: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Logits, probabilities (some 0, some 1) and weights that are broadcast over all axes but the last."""
    rng, acc = make_rng("binary", dtype.name, shape, option), accumulation(dtype)
    x = np.asarray(6 * rng.standard_normal(shape)).astype(dtype)
    y = np.asarray(rng.uniform(-0.5, 1.5, shape)).clip(0, 1).astype(dtype)
    return x, y, {name: np.asarray(rng.uniform(0.5, 2, shape[-1:])).astype(acc) for name in option.split()}


@one_torch_thread()
def run_torch(x: np.ndarray, y: np.ndarray, options: dict[str, Any], reduction: str) -> tuple[np.ndarray, np.ndarray]:
    """In the dtype of the loss, as in `run_torch`."""
    acc = accumulation(x.dtype)
    t = torch.tensor(x.astype(acc), requires_grad=True)
    tensors = {k: torch.tensor(v) for k, v in options.items()}
    loss = F.binary_cross_entropy_with_logits(t, torch.tensor(y.astype(acc)), reduction=reduction, **tensors)
    loss.sum().backward()
    return loss.detach().numpy(), t.grad.numpy().astype(x.dtype)


@np.errstate(over="ignore")
def make_scales(x: np.ndarray, y: np.ndarray, options: dict[str, Any], reduction: str) -> tuple[np.ndarray, np.ndarray]:
    """Largest terms: w (1 - y) x and w v y log(1 + exp(-x)) of the loss; of the gradient, w (1 - y) s and w v y s'."""
    x, y = widest(x), widest(y)
    w, v = (widest(np.asarray(options.get(k, 1.0))) for k in ("weight", "pos_weight"))
    loss = ref.binary_cross_entropy_with_logits(x, y, weight=w, pos_weight=v, reduction="none")
    terms = np.maximum(loss, w * (1 - y) * np.abs(x))
    s, near = 1 / (1 + np.exp(-x)), np.maximum(1, np.abs(x))  # an exponential knows x to half an ulp
    slopes = w * np.maximum((1 - y) * s, v * y * (1 - s)) * near
    return ref._reduce(terms, x.size, reduction), slopes / (x.size if reduction == "mean" else 1)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid(dtype, option):
    losses, gradients = Budget(), Budget()
    for shape, reduction in product(SHAPES, REDUCTIONS):
        x, y, options = make_binary(dtype, shape, option)
        before = x.copy(), y.copy()
        wide = [widest(x), widest(y), {k: widest(v) for k, v in options.items()}]
        truth = ref.binary_cross_entropy_with_logits_value_and_grad(*wide[:2], reduction=reduction, **wide[2])
        theirs, scales = run_torch(x, y, options, reduction), make_scales(x, y, options, reduction)
        alone = fx.binary_cross_entropy_with_logits(x, y, reduction=reduction, **options)
        loss, dlogits = fx.binary_cross_entropy_with_logits_value_and_grad(x, y, reduction=reduction, **options)
        for value in (loss, alone):
            assert value.dtype == accumulation(dtype)
            losses.add(value, truth[0], theirs[0], scales[0], (shape, reduction))
        assert dlogits.dtype == dtype and not np.shares_memory(dlogits, x)
        gradients.add(dlogits, truth[1], theirs[1], scales[1], (shape, reduction))
        np.testing.assert_array_equal(x, before[0])
        np.testing.assert_array_equal(y, before[1])
    losses.check()
    gradients.check()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_far_logits(target, reduction):
    """Far from 0 a loss is 0 or |x|, and tiny ones keep their digits: log(1 + e) would lose them."""
    losses, gradients = Budget(), Budget()
    for value in [0.0, -0.0, 40.0, -40.0, 88.7, -88.8, 100.0, -100.0, 1e4, -1e4, 3e38, -3e38]:
        x, y = np.float32([value]), np.float32([target])
        truth = ref.binary_cross_entropy_with_logits_value_and_grad(widest(x), widest(y), reduction=reduction)
        theirs, scales = run_torch(x, y, {}, reduction), make_scales(x, y, {}, reduction)
        got = fx.binary_cross_entropy_with_logits_value_and_grad(x, y, reduction=reduction)
        losses.add(got[0], truth[0], theirs[0], scales[0], value)
        gradients.add(got[1], truth[1], theirs[1], scales[1], value)
    losses.check()
    gradients.check()


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_no_logit(value, target):
    """The gradient is PyTorch's; a loss is inf where PyTorch has inf, nan for nan, and never a number."""
    x, y = np.float32([value]), np.float32([target])
    theirs = run_torch(x, y, {}, "none")
    for reduction in REDUCTIONS:
        loss, dlogits = fx.binary_cross_entropy_with_logits_value_and_grad(x, y, reduction=reduction)
        assert not np.isfinite(loss)
        if not np.isnan(theirs[0]) or np.isnan(value):
            np.testing.assert_array_equal(loss, theirs[0] if reduction == "none" else theirs[0][0])
        np.testing.assert_array_equal(dlogits, theirs[1])


def test_no_elements():
    for shape in [(0,), (3, 0)]:
        x = np.zeros(shape, np.float32)
        for reduction, want in {"mean": NAN, "sum": 0.0, "none": x}.items():
            loss, dlogits = fx.binary_cross_entropy_with_logits_value_and_grad(x, x, reduction=reduction)
            np.testing.assert_array_equal(loss, want)
            assert dlogits.shape == shape


def test_weights_broadcast_any_way():
    x, y, _ = make_binary(FLOAT32, (2, 3, 4), "")
    rng = make_rng("broadcast")
    for shape in [(), (1,), (4,), (3, 1), (2, 1, 1), (2, 3, 4)]:
        w, v = rng.uniform(0.5, 2, (2, *shape)).astype(np.float32)
        full = {k: np.array(np.broadcast_to(a, x.shape)) for k, a in {"weight": w, "pos_weight": v}.items()}
        for reduction in REDUCTIONS:
            got = fx.binary_cross_entropy_with_logits_value_and_grad(x, y, weight=w, pos_weight=v, reduction=reduction)
            want = fx.binary_cross_entropy_with_logits_value_and_grad(x, y, reduction=reduction, **full)
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_that_come_again_are_not_spread(dtype):
    """A number, or one a label: nothing of the logits' size is made for it."""
    x = np.zeros((3000, 100), dtype)
    for w in (2.0, np.float64(2), np.ones(100), np.ones((1, 100), np.float16), np.ones((1, 1))):
        for name in ("weight", "pos_weight"):
            fx.binary_cross_entropy_with_logits(x, x, **{name: w})  # the kernel is there
            tracemalloc.start()
            fx.binary_cross_entropy_with_logits(x, x, **{name: w})
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < x.nbytes / 8, (name, np.shape(w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_out(dtype):
    x, y, _ = make_binary(dtype, (33, 21), "")
    for layout in layouts_of(dtype):
        logits, target = LAYOUTS[layout](x), LAYOUTS[layout](y)
        same = [np.array(a, dtype=dtype, order="C") for a in (logits, target)]
        want = fx.binary_cross_entropy_with_logits_value_and_grad(*same, reduction="none")
        for a, b in ((logits, target), (logits, same[1]), (same[0], target)):
            got = fx.binary_cross_entropy_with_logits_value_and_grad(a, b, reduction="none")
            np.testing.assert_array_equal(got[0], want[0], err_msg=layout)
            np.testing.assert_array_equal(got[1], want[1], err_msg=layout)
        out = LAYOUTS[layout](np.zeros_like(x)) if layout in WRITEABLE else np.zeros_like(x)
        for place in (out, logits) if layout in WRITEABLE else (out,):
            got = fx.binary_cross_entropy_with_logits_value_and_grad(logits, target, reduction="none", out=place)
            assert got[1] is place
            np.testing.assert_array_equal(place, want[1], err_msg=layout)


def test_target_may_be_integers_or_booleans_or_lists():
    x = [0.5, -1.0, 2.0]
    want = fx.binary_cross_entropy_with_logits(np.array(x), np.array([1.0, 0.0, 1.0]))
    for y in ([1, 0, 1], [True, False, True], np.array([1, 0, 1], np.uint8)):
        assert fx.binary_cross_entropy_with_logits(x, y) == want


def test_out_over_the_target():
    x, y, _ = make_binary(FLOAT32, (100,), "")
    want = fx.binary_cross_entropy_with_logits_value_and_grad(x, y)
    got = fx.binary_cross_entropy_with_logits_value_and_grad(x, y, out=y)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(y, want[1])
