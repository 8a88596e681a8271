"""Rows that are neighbours, as in (N, C, H, W): copied to a tile in panels, and past the cache while others are worked on."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import fastxent as fx
from fastxent._abi.variant import Schedule
from fastxent._runtime import plan
from tests.helpers.cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from tests.numpy.test_large import aligned, planned_with

# 1320 rows are 6 panels of 14 units, 515 are 3 of 11, 272 are 2 of 9, 129 are one of 9; 8 classes are the fewest that overlap.
IMAGES = [(3, 20, 40, 33), (2, 49, 5, 103), (5, 8, 16, 17), (2, 3, 40, 33), (4, 20, 3, 43)]


@pytest.fixture
def all_is_large(monkeypatch):
    yield from planned_with(monkeypatch, "LARGE")


def make_image(shape, dtype):
    rng = np.random.default_rng(1)
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    return logits, rng.integers(0, shape[1], (shape[0], *shape[2:]))


def gradient_in(out, logits, target, **options):
    loss, _ = fx.cross_entropy_value_and_grad(logits, target, axis=1, out=out, **options)
    return loss


@pytest.mark.thorough
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "option"),
    [
        *itertools.product([FLOAT32], ["index", "smoothing", "weight", "ignore"]),
        (BFLOAT16, "ignore"),
        *(pytest.param(d, "ignore", marks=pytest.mark.slow) for d in (FLOAT16, FLOAT64)),
    ],
    ids=str,
)
def test_panels_past_the_cache(shape, dtype, option, all_is_large):
    """Whatever of a line of 64 bytes a panel begins with, in place, at any number of threads; nothing is written beside it."""
    logits, target = make_image(shape, dtype)
    options = {"smoothing": {"label_smoothing": 0.1}, "weight": {"weight": np.linspace(0.5, 2, shape[1])}}.get(option, {})
    if option == "ignore":  # single rows, all of a unit, all of a panel
        target[0, 0, ::3] = target[1, :, 16:33] = -100
        target[-1] = -100
        logits[np.broadcast_to(target[:, None] == -100, shape)] = np.nan
    want_loss, want = fx.reference.cross_entropy_value_and_grad(logits.astype(np.float64), target, axis=1, **options)
    in_place = logits.copy()
    loss = gradient_in(in_place, in_place, target, **options)
    eps = max(1e-6, float(ml_dtypes.finfo(dtype).eps))
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    np.testing.assert_allclose(in_place.astype(np.float64), want, rtol=eps, atol=1e-6 * np.abs(want).max() + tiny)
    assert fx.cross_entropy(logits, target, axis=1, **options) == loss
    for offset, n_threads in itertools.product((0, 1, 7), (1, 3)):
        out, memory = aligned(shape, dtype, offset)
        assert gradient_in(out, logits, target, n_threads=n_threads, **options) == loss
        np.testing.assert_array_equal(out, in_place)
        out[...] = 7
        assert (memory == 7).all(), "written past the gradient"


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_panels_have_the_same_bits_in_the_cache_and_past_it(shape, monkeypatch, request):
    logits, target = make_image(shape, FLOAT32)
    loss, g = fx.cross_entropy_value_and_grad(logits, target, axis=1)
    request.getfixturevalue("all_is_large")
    large_loss, large_g = fx.cross_entropy_value_and_grad(logits, target, axis=1)
    assert fx.cross_entropy(logits, target, axis=1) == large_loss
    np.testing.assert_allclose(large_loss, loss, rtol=1e-6)
    whole = np.s_[:, :, : np.prod(shape[2:]) // 16 * 16]  # rows that fill their units: the others' sums are in another order
    large_g, g = (a.reshape(*shape[:2], -1) for a in (large_g, g))
    np.testing.assert_array_equal(large_g[whole], g[whole])
    np.testing.assert_allclose(large_g, g, rtol=1e-5)


def test_an_image_of_ignored_rows_between_others_changes_nothing(all_is_large):
    """Its panels are read and written while nothing is computed."""
    logits, target = make_image((5, 20, 40, 33), FLOAT32)
    _, g = fx.cross_entropy_value_and_grad(logits, target, axis=1, reduction="sum")
    target[1:3] = -100
    _, fewer = fx.cross_entropy_value_and_grad(logits, target, axis=1, reduction="sum")
    assert not fewer[1:3].any()
    np.testing.assert_array_equal(np.delete(fewer, [1, 2], axis=0), np.delete(g, [1, 2], axis=0))


@pytest.mark.parametrize(("shape", "around"), [((3, 20, 40, 33), (3, 23, 40, 33)), ((2, 20, 3, 600), (2, 20, 3, 640))], ids=str)
def test_a_gradient_with_gaps(shape, around, all_is_large):
    """Panels follow each other in a line only; what lies between lines, or images, is left alone."""
    logits, target = make_image(shape, FLOAT32)
    _, want = fx.cross_entropy_value_and_grad(logits, target, axis=1)
    memory = np.full(around, 7, np.float32)
    out = memory[:, : shape[1], :, : shape[3]]
    gradient_in(out, logits, target)
    np.testing.assert_allclose(out, want, rtol=1e-5)
    out[...] = 7
    assert (memory == 7).all()


def test_what_overlaps():
    """Past the cache, of 8 classes and more, if a line has panels that follow each other."""

    def variant(shape, task="value_and_grad"):
        steps = tuple(int(s) for s in np.empty(shape, np.uint8).strides)
        strides = tuple(4 * s for s in steps)
        return plan.make_plan(task, shape, (strides,) * 3, 1, "f32", labelled=True).variant

    assert variant((16, 150, 128, 128)).schedule == Schedule.PANELS_OVERLAPPED
    assert variant((1, 150, 128, 128)).schedule != Schedule.PANELS_OVERLAPPED
    assert variant((512, 7, 128, 128)).schedule != Schedule.PANELS_OVERLAPPED
    assert variant((4096, 64, 16, 16)).schedule != Schedule.PANELS_OVERLAPPED
    assert variant((16, 150, 128, 128), "logsumexp").schedule == Schedule.ONE_BY_ONE
