"""Boosting objectives: the numbers, and real trainings that end where those of the built-in objectives end."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent import reference as ref
from fastxent.objectives import lightgbm_multiclass, log_prior, xgboost_softprob

ROUNDS = 20


class Data:
    """Stands for a data set of either library."""

    def __init__(self, labels: np.ndarray, weight: np.ndarray | None = None) -> None:
        self.get_label, self.get_weight = lambda: labels, lambda: weight


def scores(n: int = 50, k: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.standard_normal((n, k)).astype(np.float32), rng.integers(0, k, n).astype(np.float32), rng.random(n)


OBJECTIVES = [(xgboost_softprob, lambda k: 2.0), (lightgbm_multiclass, lambda k: k / (k - 1))]


@pytest.mark.core
@pytest.mark.parametrize(("objective", "factor"), OBJECTIVES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_all_signatures_give_the_formula_in_the_order_of_the_scores(objective, factor, order):
    x, y, u = scores()
    x = np.asarray(x, order=order)
    for weight, calls in (
        (None, [(x, Data(y)), (x, Data(y, np.empty(0))), (y, x), (y.astype(int), x)]),
        (u, [(x, Data(y, u)), (y, x, u)]),
    ):
        want = ref.cross_entropy_grad_hess(x, y.astype(int), sample_weight=weight)
        for call in calls:
            grad, hess = objective(*call)
            assert grad.dtype == hess.dtype == np.float32
            for result in (grad, hess):
                assert result.flags[f"{order}_CONTIGUOUS"] and result.shape == x.shape
            np.testing.assert_allclose(grad, want[0], atol=1e-6)
            np.testing.assert_allclose(hess, factor(7) * want[1], atol=1e-6)
    np.testing.assert_array_equal(xgboost_softprob(y, x, sample_weight=u)[0], xgboost_softprob(y, x, u)[0])


@pytest.mark.thorough
@pytest.mark.parametrize(("objective", "factor"), OBJECTIVES)
def test_options(objective, factor):
    x, y, _ = scores()
    soft = ref.softmax(3 * x[::-1], -1)
    w = np.arange(1.0, 8.0)
    for options, target in (
        ({"label_smoothing": 0.1}, y.astype(int)),
        ({"weight": w}, y.astype(int)),
        ({"target": soft, "label_smoothing": 0.2}, soft),
    ):
        same = {name: value for name, value in options.items() if name != "target"}
        want = ref.cross_entropy_grad_hess(x, target, **same)
        for double in (x, x.astype(np.float64)):  # LightGBM's scores are float64
            grad, hess = partial(objective, **options)(double, Data(y))
            np.testing.assert_allclose(grad, want[0], atol=3e-6)
            np.testing.assert_allclose(hess, factor(7) * want[1], atol=6e-6)
    flat = objective(x, Data(soft.ravel()))  # as XGBoost hands labels (N, K) over
    np.testing.assert_array_equal(flat[0], objective(soft, x)[0])


@pytest.mark.parametrize(
    ("shape", "order", "options"),
    [
        ((300, 7), "C", {"label_smoothing": 0.1}),
        ((300, 7), "F", {"label_smoothing": 0.1}),
        ((300, 7), "C", {}),
        ((300, 7), "F", {}),
        ((5, 70), "C", {}),
        ((40, 330), "F", {}),
        ((600, 7), "every second", {}),
        ((220_000, 10), "F", {}),
    ],
    ids=str,
)
def test_results_are_rounded_once(shape, order, options):
    """Every layout of the kernels, and an array past the caches: to the bit what float64 results are, rounded to float32."""
    rng = np.random.default_rng(0)
    x, y = 3 * rng.standard_normal(shape), rng.integers(0, shape[1], shape[0])
    x = x[::2] if order == "every second" else np.asarray(x, order=order)
    y = y[: len(x)]
    y[: len(x) // 2] = -100  # whole units and single rows
    y[::3] = 1
    u = rng.random(len(x))
    grad, hess = lightgbm_multiclass(x, Data(y, u), **options)
    want_grad, want_hess = fx.cross_entropy_grad_hess(x, y, sample_weight=u, **options)
    np.testing.assert_array_equal(grad, want_grad.astype(np.float32))
    np.testing.assert_array_equal(hess, (want_hess * (shape[1] / (shape[1] - 1))).astype(np.float32))
    assert (grad[y == -100] == 0).all() and (hess[y == -100] == 0).all()


def test_errors():
    x, y, _ = scores()
    with pytest.raises(ValueError, match=r"scores have shape \(50,\)"):
        xgboost_softprob(x[:, 0], Data(y))
    with pytest.raises(TypeError, match="smoothing_label"):
        xgboost_softprob(x, Data(y), smoothing_label=0.1)
    with pytest.raises(IndexError, match=r"target\[0\] = 7"):
        lightgbm_multiclass(x, Data(np.full(50, 7.0)))


def test_log_prior():
    np.testing.assert_allclose(log_prior([0.0, 2.0, 2.0, 2.0], 3), np.log([0.25, 1e-15, 0.75]))
    np.testing.assert_allclose(log_prior([0, 1], 2, sample_weight=[3, 1]), np.log([0.75, 0.25]))
    np.testing.assert_allclose(log_prior([[0.5, 0.5], [1, 0]], 2, sample_weight=[2, 1]), np.log([2 / 3, 1 / 3]))


@pytest.mark.parametrize(
    ("labels", "options", "error", "words"),
    [
        ([0, 3], {}, ValueError, r"labels\[1\] = 3 .*\[0, 3\)"),
        ([-1], {}, ValueError, r"labels\[0\] = -1"),
        ([1, 0.5], {}, ValueError, r"labels\[1\] = 0\.5"),
        ([np.nan], {}, ValueError, r"labels\[0\] = nan"),
        (["a"], {}, TypeError, "labels"),
        (np.ma.masked_array([0, 1], [0, 1]), {}, TypeError, "labels is a masked array"),
        ([[0.5, 0.5]], {}, ValueError, r"labels have shape \(1, 2\).*\(N, 3\)"),
        (np.zeros((1, 1, 3)), {}, ValueError, r"labels have shape \(1, 1, 3\)"),
        ([], {}, ValueError, "sum to 0"),
        ([0, 1], {"sample_weight": [0, 0]}, ValueError, "sum to 0"),
        ([[1.0, 0.0, 0.0]], {"sample_weight": [0]}, ValueError, "sum to 0"),
        ([0, 1], {"sample_weight": [np.nan, 1]}, ValueError, "sum to nan"),
        ([0, 1], {"sample_weight": [1, 1, 1]}, ValueError, r"sample_weight has shape \(3,\)"),
        ([0, 1], {"sample_weight": 2.0}, ValueError, r"sample_weight has shape \(\)"),
        ([0, 1], {"n_classes": 2.5}, TypeError, "n_classes"),
        ([], {"n_classes": -1}, ValueError, "n_classes = -1"),
    ],
    ids=repr,
)
def test_what_has_no_prior(labels, options, error, words):
    with pytest.raises(error, match=words):
        log_prior(labels, **{"n_classes": 3, **options})


@pytest.mark.parametrize("objective", [xgboost_softprob, lightgbm_multiclass])
def test_masks_and_weights_that_are_none(objective):
    x, y, _ = scores()
    masked = np.ma.masked_array(x, x > 0)
    for call, name in (
        (lambda: objective(y, masked), "scores"),
        (lambda: objective(np.ma.masked_array(y, y > 2), x), "target"),
        (lambda: objective(y, x, target=masked), "target"),
    ):
        with pytest.raises(TypeError, match=f"{name} is a masked array"):
            call()
    with pytest.raises(ValueError, match=r"sample_weight has shape \(\)"):
        objective(x, Data(y, np.float64(2.0)))
    with pytest.raises(TypeError, match="labels"):
        xgboost_softprob(y)


# ----------------------------------------------------------------------------------------------------
# With the libraries
# ----------------------------------------------------------------------------------------------------


def digits() -> tuple[Any, Any, Any, Any]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return x[:1200], y[:1200], x[1200:], y[1200:]


XGBOOST = {"num_class": 10, "max_depth": 3, "nthread": 1, "seed": 0, "objective": "multi:softprob", "verbosity": 0}
LIGHTGBM = {"num_class": 10, "num_leaves": 8, "num_threads": 1, "seed": 0, "verbose": -1, "deterministic": True}


@pytest.mark.parametrize("weighted", [False, True])
def test_xgboost_predicts_as_with_its_own_objective(weighted):
    xgb = pytest.importorskip("xgboost")
    x, y, x_test, y_test = digits()
    u = np.random.default_rng(0).uniform(0.5, 2, len(y)) if weighted else None
    prior = log_prior(y, 10, sample_weight=u)

    def matrix(x, y, u=None):
        return xgb.DMatrix(x, y, weight=u, base_margin=np.tile(prior, (len(x), 1)))

    builtin = xgb.train(XGBOOST, matrix(x, y, u), ROUNDS).predict(matrix(x_test, y_test))
    ours = xgb.train(XGBOOST, matrix(x, y, u), ROUNDS, obj=xgboost_softprob).predict(matrix(x_test, y_test))
    np.testing.assert_allclose(ours, builtin, atol=1e-4)
    assert (ours.argmax(1) == y_test).mean() > 0.85
    estimator = xgb.XGBClassifier(n_estimators=ROUNDS, max_depth=3, n_jobs=1, objective=xgboost_softprob)
    tiles = {"base_margin": np.tile(prior, (len(x), 1)), "sample_weight": u}
    estimator.fit(x, y, **tiles)
    by_estimator = estimator.predict_proba(x_test, base_margin=np.tile(prior, (len(x_test), 1)))
    np.testing.assert_allclose(by_estimator, builtin, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_lightgbm_predicts_as_with_its_own_objective(weighted):
    lgb = pytest.importorskip("lightgbm")
    x, y, x_test, y_test = digits()
    u = np.random.default_rng(0).uniform(0.5, 2, len(y)) if weighted else None
    prior = log_prior(y, 10, sample_weight=u)
    start = np.tile(prior, (len(y), 1))
    builtin = lgb.train(LIGHTGBM | {"objective": "multiclass"}, lgb.Dataset(x, y, weight=u), ROUNDS).predict(x_test)
    data = lgb.Dataset(x, y, weight=u, init_score=start)
    booster = lgb.train(LIGHTGBM | {"objective": lightgbm_multiclass}, data, ROUNDS)
    ours = ref.softmax(booster.predict(x_test, raw_score=True) + prior, -1)
    np.testing.assert_allclose(ours, builtin, atol=1e-4)
    assert (ours.argmax(1) == y_test).mean() > 0.85
    estimator = lgb.LGBMClassifier(n_estimators=ROUNDS, num_leaves=8, n_jobs=1, verbose=-1, objective=lightgbm_multiclass)
    estimator.fit(x, y, sample_weight=u, init_score=start)
    by_estimator = ref.softmax(estimator.predict(x_test, raw_score=True) + prior, -1)
    np.testing.assert_allclose(by_estimator, builtin, atol=1e-4)


def annotated_digits() -> tuple[Any, ...]:
    """Digits named by five annotators, who guess in three of ten cases: the majority's word, and what share said what."""
    x, y, x_test, y_test = digits()

    def shares(y: np.ndarray, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        words = np.where(rng.random((len(y), 5)) < 0.3, rng.integers(0, 10, (len(y), 5)), y[:, None])
        return np.stack([(words == c).mean(1) for c in range(10)], 1)

    t, t_test = shares(y, 1), shares(y_test, 2)
    return x, t.argmax(1), t, x_test, t_test


def test_soft_labels_help_xgboost():
    """What annotators will say is predicted better from the shares of their words than from the majority's."""
    xgb = pytest.importorskip("xgboost")
    x, y, t, x_test, t_test = annotated_digits()
    data, test = xgb.DMatrix(x, y), xgb.DMatrix(x_test)
    hard = xgb.train(XGBOOST, data, ROUNDS).predict(test)
    soft = xgb.train(XGBOOST, data, ROUNDS, obj=partial(xgboost_softprob, target=t)).predict(test)
    assert cross_entropy(soft, t_test) < 0.9 * cross_entropy(hard, t_test)


def test_soft_labels_help_lightgbm():
    lgb = pytest.importorskip("lightgbm")
    x, y, t, x_test, t_test = annotated_digits()
    hard = lgb.train(LIGHTGBM | {"objective": "multiclass"}, lgb.Dataset(x, y), ROUNDS).predict(x_test)
    objective = partial(lightgbm_multiclass, target=t)
    booster = lgb.train(LIGHTGBM | {"objective": objective}, lgb.Dataset(x, y), ROUNDS)
    assert cross_entropy(ref.softmax(booster.predict(x_test), -1), t_test) < 0.95 * cross_entropy(hard, t_test)


def cross_entropy(p: np.ndarray, t: np.ndarray) -> float:
    return float(-(t * np.log(p)).sum(1).mean())


def numpy_recipe(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The custom softmax objective in NumPy as LightGBM's tests have it, and the library's conversion of its result."""
    n, k = scores.shape
    e = np.exp(scores - np.max(scores, axis=1).reshape(-1, 1))
    p = e / np.sum(e, axis=1).reshape(-1, 1)
    update = np.zeros_like(p)
    update[np.arange(n), labels.astype(np.int32)] = -1.0
    return (p + update).astype(np.float32, copy=False), (k / (k - 1) * p * (1 - p)).astype(np.float32, copy=False)


@pytest.mark.parametrize(("objective", "layout", "ratio"), [(xgboost_softprob, "C", 2), (lightgbm_multiclass, "F", 1.2)])
def test_it_takes_a_fraction_of_the_numpy_recipes_time(objective, layout, ratio):
    """At 100000 x 10: CPU time with one thread, since other tests run meanwhile; NumPy has no second thread to use.

    How much page faults add to NumPy's time depends on what the process did before: in a new one the ratios are 11 and 5.4.
    """
    x, y, _ = scores(100_000, 10)
    x = np.asarray(x, np.float32 if layout == "C" else np.float64, order=layout)
    calls = {"ours": partial(objective, n_threads=1), "NumPy's": numpy_recipe}
    best = dict.fromkeys(calls, np.inf)
    for _ in range(15):
        for name, function in calls.items():
            start = time.process_time()
            function(y, x)
            best[name] = min(best[name], time.process_time() - start)
    assert best["ours"] < best["NumPy's"] / ratio, best
