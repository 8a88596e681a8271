"""Arrays past the cache: reads are asked for early, writes bypass the cache. Small arrays stand in for large ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

import fastxent as fx
from fastxent._fastpath.cache import calls
from fastxent._runtime import plan
from tests.helpers.cases import BFLOAT16, EVERYDAY_DTYPES, FLOAT16, FLOAT32, make_case
from tests.helpers.opponent import run_torch
from tests.helpers.truth import Budget, make_truth

SHAPES = {
    (5, 300): "rows that begin anywhere in a cache line",
    (18, 512): "rows that begin where a line does",
    (35, 100): "16 rows at once, written by way of a stage; three rows are left",
    (35, 7): "the same, and a row is less than a vector",
    (3, 33000): "few long rows: split, and not streamed",
}
OPTIONS = ["index", "weight ignore smoothing sample_weight", "probabilities weight"]


def planned_with(monkeypatch, limit: str) -> Iterator[None]:
    """Plans as if one of their limits were 0; calls that were known before have other ones."""
    calls.clear()
    monkeypatch.setattr(plan, limit, 0)
    plan.make_plan.cache_clear()
    yield
    plan.make_plan.cache_clear()
    calls.clear()


@pytest.fixture
def all_is_large(monkeypatch):
    yield from planned_with(monkeypatch, "LARGE")


@pytest.fixture
def nothing_is_kept(monkeypatch):
    """As if every row were longer than what is kept of its exponentials."""
    yield from planned_with(monkeypatch, "MOST_STORED")


def aligned(shape: tuple[int, ...], dtype: np.dtype, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """An array that begins ``offset`` elements after a cache line does, and all of the memory around it, which holds 7."""
    size = int(np.prod(shape))
    memory = np.full(size + 256, 7, dtype)
    start = -memory.ctypes.data // dtype.itemsize % (64 // dtype.itemsize) + 64 // dtype.itemsize + offset
    return memory[start : start + size].reshape(shape), memory


@pytest.mark.thorough
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_streamed_gradient(dtype, shape, all_is_large):
    losses, gradients = Budget(), Budget()
    for option in OPTIONS if shape[1] < 1000 else OPTIONS[:1]:
        case = make_case(dtype, shape, option)
        truth, theirs = make_truth(case, "mean"), run_torch(case, "mean")
        in_place = case.logits.copy()
        fx.cross_entropy_value_and_grad(in_place, case.target, out=in_place, **case.options)
        for offset in (0, 1, 7):
            out, memory = aligned(shape, dtype, offset)
            loss, _ = fx.cross_entropy_value_and_grad(*case[:2], out=out, **case.options)
            losses.add(loss, truth.loss, theirs[0], truth.loss_scale, (option, offset))
            gradients.add(out, truth.grad, theirs[1], truth.grad_scale, (option, offset))
            np.testing.assert_array_equal(out, in_place)  # which is not streamed
            out[...] = 7
            assert (memory == 7).all(), "written past the gradient"
    losses.check()
    gradients.check()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dtype", "option"), [*itertools.product([FLOAT32], OPTIONS), *itertools.product([FLOAT16, BFLOAT16], OPTIONS[:1])], ids=str
)
def test_a_pipeline_of_rows_gives_the_bits_of_each_alone(dtype, option, monkeypatch):
    """Long rows past the cache are written while the next one is computed: targets in all places, rows that are far from zero,
    hold an inf, or are ignored, several at once, and gradients that begin anywhere and have something between their rows."""
    for shape in ((1, 4133), (2, 49), (9, 4133), (40, plan.MOST_TILED + 10), (18, 512)):
        n_rows, n_classes = shape
        case = make_case(dtype, shape, option)
        logits, target = case.logits, case.target
        logits[n_rows // 3] += 9000
        logits[n_rows // 2, 1::2] = -np.inf
        if target.ndim == 1:
            target[:] = np.linspace(0, n_classes - 1, n_rows)
            target[[0, -1]] = (target[0], -100) if n_rows < 9 else (-100, -100)
            target[n_rows // 2 : n_rows // 2 + 2] = -100
        want = fx.cross_entropy(logits, target, reduction="none", **case.options)
        want_loss, want_g = fx.cross_entropy_value_and_grad(logits, target, **case.options)
        with monkeypatch.context() as patch:  # for this shape: what is wanted of the next one comes from each row alone again
            for _ in planned_with(patch, "LARGE"):
                np.testing.assert_array_equal(fx.cross_entropy(logits, target, reduction="none", **case.options), want)
                for offset, gap in ((0, 0), (1, 0), (7, 5), (0, 16)):
                    memory = aligned((n_rows, n_classes + gap), dtype, offset)[0]
                    before = memory.copy()
                    for x in (logits, memory[:, :n_classes]):
                        memory[:, :n_classes] = logits
                        loss, g = fx.cross_entropy_value_and_grad(x, target, out=memory[:, :n_classes], **case.options)
                        np.testing.assert_array_equal(loss, want_loss)
                        np.testing.assert_array_equal(g, want_g, err_msg=f"{shape}, {offset}, {gap}")
                        np.testing.assert_array_equal(memory[:, n_classes:], before[:, n_classes:])


def test_in_a_pipeline_a_nan_spoils_its_own_row(all_is_large):
    """What it does to the maximum of its row, which is found beside the row before, and written beside the one after."""
    case = make_case(FLOAT32, (5, 4133), OPTIONS[0])
    want = fx.cross_entropy(case.logits, case.target, reduction="none")
    _, want_g = fx.cross_entropy_value_and_grad(case.logits, case.target)
    others = [0, 1, 3, 4]
    for where in (0, 8, 1000, 4095, 4096, 4132):
        logits = case.logits.copy()
        logits[2, where] = np.nan
        loss = fx.cross_entropy(logits, case.target, reduction="none")
        _, g = fx.cross_entropy_value_and_grad(logits, case.target)
        assert np.isnan(loss[2]) and np.isnan(g[2]).all()
        np.testing.assert_array_equal(loss[others], want[others])
        np.testing.assert_array_equal(g[others], want_g[others])


@pytest.mark.parametrize("gap", [1, 2, 3, 5])
def test_rows_that_begin_between_elements(gap, all_is_large):
    """A gradient whose rows lie a few bytes more than its classes apart cannot be written past the caches."""
    case = make_case(FLOAT32, (70, 4133))
    want = fx.cross_entropy_value_and_grad(case.logits, case.target)
    memory = np.full(70 * (4 * 4133 + gap) + 64, 7, np.uint8)
    start = -memory.ctypes.data % 64
    out = np.ndarray((70, 4133), np.float32, memory, start, (4 * 4133 + gap, 4))
    loss, _ = fx.cross_entropy_value_and_grad(case.logits, case.target, out=out)
    assert loss == want[0]
    np.testing.assert_array_equal(out, want[1])
    rows = np.ndarray((70, 4 * 4133 + gap), np.uint8, memory, start)
    assert (rows[:, 4 * 4133 :] == 7).all() and (memory[start + rows.size :] == 7).all()


@pytest.mark.thorough
@pytest.mark.parametrize("option", ["index", "ignore smoothing", "probabilities weight", "sample_weight"])
def test_parts_of_a_very_long_row(option, all_is_large):
    """50,001 classes are three parts, each with a maximum of its own: it rises, falls, is far below, or is -inf; and targets
    around the ends of a part, before which the gradient is in the same vector as after it."""
    case = make_case(FLOAT32, (64, 50_001), option)
    logits, target = case.logits, case.target
    part = 16 * 1048
    logits[1] += np.linspace(0, 60, 50_001, dtype=np.float32)
    logits[2] -= np.linspace(0, 300, 50_001, dtype=np.float32)
    logits[3, :part] -= 75
    logits[4, part : 2 * part] -= 900
    logits[5, 2 * part :] += 95
    if option == "sample_weight":  # then a part's factor is small sooner
        case.options["sample_weight"][:8] *= np.float32(1e-16)
    if option == "index":
        logits[6, : part + 7] = logits[7, -part:] = -np.inf
    if target.ndim == 1:
        target[8:40] = np.arange(part - 16, part + 16)
        target[40:56] = 2 * part - np.arange(16)
        target[7] = target[62] = 0
        target[6] = target[63] = 50_000
    truth, theirs = make_truth(case, "mean"), run_torch(case, "mean")
    in_place = logits.copy()
    fx.cross_entropy_value_and_grad(in_place, target, out=in_place, **case.options)
    losses, gradients = Budget(), Budget()
    for offset in (0, 1, 15):
        out, memory = aligned(logits.shape, FLOAT32, offset)
        loss, _ = fx.cross_entropy_value_and_grad(logits, target, out=out, **case.options)
        losses.add(loss, truth.loss, theirs[0], truth.loss_scale, (option, offset))
        gradients.add(out, truth.grad, theirs[1], truth.grad_scale, (option, offset))
        np.testing.assert_array_equal(out, in_place)
        out[...] = 7
        assert (memory == 7).all(), "written past the gradient"
    losses.check()
    gradients.check()


@pytest.mark.thorough
@pytest.mark.parametrize("n_classes", [20, 300])
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_neighbours_are_rows(dtype, n_classes, all_is_large):
    """(N, C, H, W). 300 classes: whole vectors are streamed where all of them are aligned; 32 x 8 is so, 5 x 7 is not."""
    rng = np.random.default_rng(0)
    for (h, w), offset in itertools.product([(32, 8), (5, 7), (9, 25)], (0, 1)):
        shape = (2, n_classes, h, w)
        logits = rng.standard_normal(shape).astype(dtype)
        target = rng.integers(0, n_classes, (2, h, w))
        target[0, :2] = -100
        logits[0, :, :2] = np.nan
        out, memory = aligned(shape, logits.dtype, offset)
        loss, _ = fx.cross_entropy_value_and_grad(logits, target, axis=1, out=out)
        true_loss, true_grad = fx.reference.cross_entropy_value_and_grad(logits.astype(np.float64), target, axis=1)
        np.testing.assert_allclose(loss, true_loss, rtol=1e-6)
        rounding = max(1e-6, float(ml_dtypes.finfo(dtype).eps))
        np.testing.assert_allclose(out.astype(np.float64), true_grad, rtol=rounding, atol=1e-6 / (h * w))
        out[...] = 7
        assert (memory == 7).all(), "written past the gradient"


def test_ignored_rows_are_zeros(all_is_large):
    logits = np.full((4, 301), np.nan, np.float32)
    logits[1] = 0
    for offset in (0, 3):
        out, _ = aligned(logits.shape, logits.dtype, offset)
        fx.cross_entropy_value_and_grad(logits, [-100, 5, -100, -100], out=out)
        assert not out[[0, 2, 3]].any() and out[1].any()


@pytest.mark.thorough
@pytest.mark.parametrize("large", [False, True])
def test_exponentials_computed_twice(large, nothing_is_kept, request):
    """A row of two blocks and a tail."""
    if large:
        request.getfixturevalue("all_is_large")
    losses, gradients = Budget(), Budget()
    case = make_case(np.dtype(np.float32), (5, 8195), "index")
    truth, theirs = make_truth(case, "mean"), run_torch(case, "mean")
    for out in (case.logits.copy(), aligned(case.logits.shape, case.logits.dtype, 3)[0]):
        out[...] = case.logits
        x = out if out.base is None else case.logits  # in place; streamed
        loss, _ = fx.cross_entropy_value_and_grad(x, case.target, out=out, **case.options)
        losses.add(loss, truth.loss, theirs[0], truth.loss_scale)
        gradients.add(out, truth.grad, theirs[1], truth.grad_scale)
    losses.check()
    gradients.check()


@pytest.mark.parametrize("y", [7, 20000, 39999])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_segments_of_a_row_far_apart(dtype, y):
    """What a segment keeps of its exponentials is relative to its own maximum: brought down to the row's, also the smallest
    probabilities keep their digits. The target may lie in any segment, and be overwritten."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((2, 40000))).astype(dtype)
    logits[:, 16384:32768] -= 60
    logits[:, 32768:] -= 25
    target = [y, -100]
    want = fx.reference.cross_entropy_value_and_grad(logits, target, reduction="none")
    loss, dlogits = fx.cross_entropy_value_and_grad(logits, target, reduction="none")
    np.testing.assert_allclose(loss, want[0], rtol=4 * np.finfo(dtype).eps)
    ulps = 4 if dtype is np.float32 else 60  # the reference, float64 too, rounds x - m
    np.testing.assert_allclose(dlogits, want[1], rtol=ulps * np.finfo(dtype).eps)
    fx.cross_entropy_value_and_grad(logits, target, reduction="none", out=logits)
    np.testing.assert_array_equal(logits, dlogits)
