"""What holds for any logits: hypothesis draws them, and shrinks the counterexample."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastxent as fx
from tests.helpers.cases import EVERYDAY_DTYPES, FLOAT32, FLOAT64, make_case

OPTIONS = st.sampled_from(
    [
        "index",
        "weight",
        "ignore",
        "smoothing",
        "probabilities",
        "sample_weight",
        "weight ignore smoothing sample_weight",
        "probabilities weight smoothing sample_weight",
    ]
)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 130))
SPREAD = st.sampled_from([0.0, 0.1, 3.0, 50.0])


def draw(shape, option, spread=3.0, dtype=FLOAT64):
    case = make_case(dtype, shape, option)
    return case._replace(logits=(case.logits.astype(np.float64) / 3 * spread).astype(dtype))


@given(SHAPES, OPTIONS, SPREAD, st.integers(-100, 100))
def test_a_constant_added_to_a_row_changes_nothing(shape, option, spread, shift):
    """Logits are rounded to multiples of 1/16 first, so that adding an integer is exact: the bits are the same."""
    case = draw(shape, option, spread)
    x = np.round(case.logits * 16) / 16
    want = fx.cross_entropy_value_and_grad(x, case.target, **case.options)
    got = fx.cross_entropy_value_and_grad(x + shift, case.target, **case.options)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


@given(SHAPES, OPTIONS, SPREAD)
def test_gradient_rows_sum_to_zero(shape, option, spread):
    case = draw(shape, option, spread)
    _, dlogits = fx.cross_entropy_value_and_grad(*case[:2], reduction="none", **case.options)
    # C terms that are rounded once or a few times each, at most of the size of the largest one.
    bound = 4 * shape[1] * np.spacing(np.abs(dlogits).max(1) + 2)
    assert (np.abs(dlogits.sum(1)) <= bound).all()


@given(st.tuples(st.integers(1, 20), st.integers(1, 70)), OPTIONS, st.sampled_from(["mean", "sum"]), st.data())
def test_gradient_is_the_slope_of_the_loss(shape, option, reduction, data):
    case = draw(shape, option)
    options = dict(case.options, reduction=reduction)
    loss, dlogits = fx.cross_entropy_value_and_grad(*case[:2], **options)
    if not np.isfinite(loss):  # every row ignored
        assert "ignore" in option and not dlogits.any()
        return
    at = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    h = 1e-3
    # Five points: off by h**4 / 30 times a fifth derivative of at most 2 u w, and by rounding of the loss over h.
    values = []
    for k in (-2, -1, 1, 2):
        x = case.logits.copy()
        x[at] += k * h
        values.append(fx.cross_entropy(x, case.target, **options))
    slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
    assert abs(slope - dlogits[at]) <= 1e-12 + 8 * np.spacing(max(abs(loss), 1)) / h


@given(SHAPES, OPTIONS, SPREAD, st.randoms(use_true_random=False))
def test_order_of_the_classes_does_not_matter(shape, option, spread, random):
    case = draw(shape, option, spread)
    order = random.sample(range(shape[1]), shape[1])
    place = np.argsort(order)
    soft = case.target.ndim == 2
    target = case.target[:, order] if soft else np.where(case.target < 0, -100, place[case.target.clip(0)])
    options = {k: v[order] if k == "weight" else v for k, v in case.options.items()}
    want = fx.cross_entropy_value_and_grad(*case[:2], **case.options)
    got = fx.cross_entropy_value_and_grad(case.logits[:, order], target, **options)
    room = dict(rtol=shape[1] * 1e-15, atol=shape[1] * 1e-15)  # one rounding a class: sums are taken in other orders
    np.testing.assert_allclose(got[0], want[0], **room)
    np.testing.assert_allclose(got[1], want[1][:, order], **room)


@given(SHAPES, OPTIONS, SPREAD)
def test_rows_do_not_know_of_each_other(shape, option, spread):
    """Losses and gradients of the rows one by one are those of the whole."""
    case = draw(shape, option, spread)
    want = fx.cross_entropy_value_and_grad(*case[:2], reduction="none", **case.options)
    for n in {0, shape[0] // 2, shape[0] - 1}:
        options = {k: v[n] if k == "sample_weight" else v for k, v in case.options.items()}
        got = fx.cross_entropy_value_and_grad(case.logits[n], case.target[n], reduction="none", **options)
        np.testing.assert_allclose(got[0], want[0][n], rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(got[1], want[1][n], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("n_classes", [3, 16, 100, 113, 300])
def test_a_row_does_not_know_how_many_come_after_it(n_classes):
    """Rows are worked on in units of 16, two units at a time, some of which are ignored, or half of them missing."""
    case = draw((97, n_classes), "index", dtype=FLOAT32)
    y = case.target.copy()
    y[33:48] = y[50] = -100  # of the third unit one row is kept
    y[64:96] = -100  # two whole units
    losses = fx.cross_entropy(case.logits, y, reduction="none")
    _, gradient = fx.cross_entropy_value_and_grad(case.logits, y, reduction="sum")
    assert np.array_equal(losses == 0.0, y == -100) and np.array_equal(gradient.any(axis=1), y != -100)
    for n in range(16, 97):
        x, some = case.logits[:n], y[:n]
        np.testing.assert_allclose(fx.cross_entropy(x, some, reduction="none"), losses[:n], rtol=1e-6)
        total, some_gradient = fx.cross_entropy_value_and_grad(x, some, reduction="sum")
        assert total == pytest.approx(losses[:n].sum(dtype=np.float64), rel=1e-6)
        np.testing.assert_allclose(some_gradient, gradient[:n], rtol=1e-6)


@pytest.mark.thorough
@given(SHAPES, SPREAD)
def test_cross_entropy_is_entropy_plus_divergence(shape, spread):
    case = draw(shape, "probabilities", spread)
    h_pq = fx.cross_entropy(*case[:2], reduction="none")
    kl = fx.kl_div(fx.log_softmax(case.logits, -1), case.target, reduction="none").sum(-1)
    np.testing.assert_allclose(h_pq, fx.entropy(case.target) + kl, rtol=1e-12, atol=1e-12)
    assert (kl >= -1e-12).all()


@given(SHAPES, SPREAD)
def test_one_hot_probabilities_are_class_indices(shape, spread):
    case = draw(shape, "weight smoothing", spread)
    one_hot = np.eye(shape[1])[case.target]
    for reduction in ("none", "sum"):  # the mean of probabilities does not divide by the weights of the classes
        want = fx.cross_entropy_value_and_grad(*case[:2], reduction=reduction, **case.options)
        got = fx.cross_entropy_value_and_grad(case.logits, one_hot, reduction=reduction, **case.options)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-13, atol=1e-14)


@pytest.mark.thorough
@given(SHAPES, SPREAD)
def test_softmax_family_agrees_with_itself(shape, spread):
    x = draw(shape, "index", spread).logits
    p, log_p, lse = fx.softmax(x, -1), fx.log_softmax(x, -1), fx.logsumexp(x, -1)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=shape[1] * 2.3e-16)
    np.testing.assert_allclose(np.log(p), log_p, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(x - lse[:, None], log_p, rtol=1e-13, atol=1e-13)


@pytest.mark.thorough
@given(SHAPES, OPTIONS, SPREAD)
def test_stats_agree_with_the_loss(shape, option, spread):
    case = draw(shape, option, spread)
    stats = fx.cross_entropy_stats(*case[:2], **case.options)
    np.testing.assert_allclose(
        stats.loss, fx.cross_entropy(*case[:2], reduction="none", **case.options), rtol=1e-13, atol=1e-14
    )
    kept = stats.prediction >= 0
    np.testing.assert_array_equal(stats.prediction[kept], case.logits.argmax(-1)[kept])
    y = case.target.argmax(-1) if case.target.ndim == 2 else case.target
    np.testing.assert_array_equal((stats.target_rank == 0)[kept], (stats.prediction == y)[kept])
    assert ((stats.entropy >= -1e-14) & (stats.entropy <= np.log(shape[1]) + 1e-14)).all()


# Enough elements that the plan hands out many chunks and may use four threads; and few long rows, which are split.
LARGE_SHAPES = [(50000, 3), (3000, 49), (300, 1000), (40, 6500), (2, 70000)]


@pytest.mark.thorough
@pytest.mark.parametrize("option", ["index", "weight ignore smoothing sample_weight", "probabilities weight"])
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, shape, option):
    case = make_case(dtype, shape, option)
    for reduction in ("none", "mean", "sum"):
        options = dict(case.options, reduction=reduction)
        want = fx.cross_entropy_value_and_grad(*case[:2], n_threads=1, **options)
        alone = fx.cross_entropy(*case[:2], n_threads=1, **options)
        for n_threads in (2, 3, 4, 7):
            got = fx.cross_entropy_value_and_grad(*case[:2], n_threads=n_threads, **options)
            assert got[0].tobytes() == want[0].tobytes()
            assert got[1].tobytes() == want[1].tobytes()
            assert fx.cross_entropy(*case[:2], n_threads=n_threads, **options).tobytes() == alone.tobytes()


@pytest.mark.parametrize("shape", [(50000, 3), (3000, 49)], ids=str)
def test_bits_of_rows_side_by_side_do_not_depend_on_it(shape):
    x, y, _ = make_case(FLOAT32, shape, "index")
    columns = np.asfortranarray(x).T
    want = fx.cross_entropy_value_and_grad(columns, y, axis=0, n_threads=1)
    for n_threads in (2, 3, 4, 7):
        got = fx.cross_entropy_value_and_grad(columns, y, axis=0, n_threads=n_threads)
        assert [v.tobytes() for v in got] == [v.tobytes() for v in want]


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_bits_of_the_other_functions_do_not_depend_on_it_either(shape):
    x, y, _ = make_case(FLOAT32, shape)
    soft = make_case(FLOAT32, shape, "probabilities").target
    calls = [
        lambda n: fx.cross_entropy_stats(x, y, reduction="sum", n_threads=n),
        lambda n: fx.cross_entropy_grad_hess(x, y, n_threads=n),
        lambda n: (fx.softmax(x, -1, n_threads=n), fx.log_softmax(x, 0, n_threads=n), fx.logsumexp(x, n_threads=n)),
        lambda n: fx.binary_cross_entropy_with_logits_value_and_grad(x, soft, n_threads=n),
    ]
    for call in calls:
        want = [v.tobytes() for v in call(1)]
        for n_threads in (2, 3, 4):
            assert [v.tobytes() for v in call(n_threads)] == want


def test_bits_do_not_depend_on_who_else_is_calling():
    cases = [make_case(FLOAT32, shape, "weight") for shape in LARGE_SHAPES]

    def call(case):
        return [v.tobytes() for v in fx.cross_entropy_value_and_grad(*case[:2], **case.options)]

    want = [call(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, cases * 4)) == want * 4
