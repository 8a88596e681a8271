"""Every public function with every option against the reference. Most of it is to run first, and compiles few kernels."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent import reference as ref

TOLERANCE = {"float32": 1e-5, "float64": 1e-13}
ELSEWHERE = {  # what computes no loss, and where it is tested
    "CrossEntropyStats": "here, as the result of cross_entropy_stats",
    "LinearGradients": "here, as the result of linear_cross_entropy_value_and_grad",
    "get_num_threads": "test_parallel.py",
    "set_num_threads": "test_parallel.py",
    "release_buffers": "test_leaks.py",
    "set_buffer_limit": "test_leaks.py",
    "show_config": "test_cli.py",
    "warmup": "test_config.py, test_cli.py",
}
Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls(shape: tuple[int, int] = (2, 3), dtype: str = "float32") -> dict[str, list[Call]]:
    """Of each function its calls, arguments and options; each option occurs."""
    n, c = shape
    rng = np.random.default_rng(shape)
    x, out = (3 * rng.standard_normal(shape)).astype(dtype), np.empty(shape, dtype)
    y, p = rng.integers(0, c, n), rng.dirichlet(np.ones(c), n).astype(dtype)
    weight, sample_weight, elements = (rng.uniform(0.5, 2, size).astype(dtype) for size in (c, n, shape))
    formula = [{}, dict(weight=weight), dict(sample_weight=sample_weight), dict(ignore_index=y[0]), dict(label_smoothing=0.1)]
    formula += [formula[1] | formula[2] | formula[3] | formula[4], dict(axis=1), dict(n_threads=2)]
    reductions = [dict(reduction=how) for how in ("none", "mean", "sum")]
    focal = [dict(gamma=0.5) | {k: v for k, v in o.items() if k != "label_smoothing"} for o in formula]
    probabilities = [((x, p), o) for o in (formula[0], formula[1] | formula[2])]
    layer = (rng.standard_normal((n, 5)).astype(dtype), rng.standard_normal((c, 5)).astype(dtype), y)
    biased = dict(linear_bias=weight, memory_limit=1)
    linear = [biased | o for o in formula if "axis" not in o] + [biased | dict(z_loss=0.01, softcap=5.0)]
    linear += [biased | o for o in reductions]
    binary = [dict(weight=elements), dict(pos_weight=weight), dict(n_threads=2), *reductions]
    return {
        "cross_entropy": [((x, y), o) for o in (*formula, *reductions)],
        "cross_entropy_value_and_grad": [((x, y), o) for o in (*formula, *reductions, dict(out=out))] + probabilities,
        "cross_entropy_stats": [((x, y), o) for o in (*formula, *reductions)],
        "cross_entropy_grad_hess": [((x, y), o) for o in formula],
        "linear_cross_entropy": [(layer, o) for o in linear],
        "linear_cross_entropy_value_and_grad": [(layer, o) for o in linear],
        "linear_cross_entropy_stats": [(layer, o) for o in linear],
        "linear_log_prob_and_entropy": [
            (layer, o) for o in (biased, biased | dict(temperature=0.7, ignore_index=y[0], n_threads=2))
        ],
        "log_prob_and_entropy": [
            ((x, y), o) for o in ({}, dict(temperature=0.7, ignore_index=y[0]), dict(axis=1), dict(n_threads=2))
        ],
        "focal_loss": [((x, y), o) for o in (*focal, *reductions)],
        "focal_loss_value_and_grad": [((x, y), o) for o in (*focal, *reductions)],
        "softmax": [((x,), dict(axis=1, **o)) for o in ({}, dict(out=out), dict(n_threads=2))],
        "log_softmax": [((x,), dict(axis=1, **o)) for o in ({}, dict(out=out), dict(n_threads=2))],
        "logsumexp": [
            ((x,), dict(axis=1, **o))
            for o in ({}, dict(b=elements), dict(keepdims=True), dict(b=-elements, return_sign=True), dict(n_threads=2))
        ],
        "nll_loss": [((np.log(p), y), o) for o in (dict(axis=1), dict(weight=weight), dict(ignore_index=y[0]), *reductions)],
        "entropy": [((p,), {}), ((p,), dict(axis=0))],
        "kl_div": [((np.log(p), p[::-1]), o) for o in reductions] + [((np.log(p), np.log(p[::-1])), dict(log_target=True))],
        "binary_cross_entropy_with_logits": [((x, p), o) for o in binary],
        "binary_cross_entropy_with_logits_value_and_grad": [((x, p), o) for o in (*binary, dict(out=out))],
    }


def assert_near(got: Any, want: Any, tolerance: float, label: object) -> None:
    if isinstance(want, tuple):
        for one, other in zip(got, want, strict=True):
            assert_near(one, other, tolerance, label)
    else:
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=str(label))


def leaves(got: Any) -> list[Any]:
    """Return the arrays of a result, however deep in tuples."""
    return [leaf for one in got for leaf in leaves(one)] if isinstance(got, tuple) else [got]


def grid() -> list[Any]:
    """Rows of 21 classes are worked on a class a vector, rows of 400 with the classes in the lanes."""
    first = [("float32", (33, 21), name) for name in calls()]
    first += [("float32", (9, 400), name) for name in ("cross_entropy", "cross_entropy_value_and_grad", "softmax")]
    first += [("float64", (9, 400), "cross_entropy_value_and_grad")]
    all_of_it = itertools.product(TOLERANCE, [(33, 21), (9, 400)], calls())
    return [pytest.param(*one, marks=[pytest.mark.core] if one in first else []) for one in all_of_it]


@pytest.mark.parametrize(("dtype", "shape", "name"), grid(), ids=str)
def test_results_are_the_references(dtype, shape, name):
    for arguments, options in calls(shape, dtype)[name]:
        formula = {k: v for k, v in options.items() if k not in ("out", "n_threads", "memory_limit")}
        got, want = getattr(fx, name)(*arguments, **options), getattr(ref, name)(*arguments, **formula)
        assert_near(got, want, TOLERANCE[dtype], options)
        for array in leaves(got):
            assert np.asarray(array).dtype in (dtype, np.intp), options
        if "out" in options:
            assert (got[1] if isinstance(got, tuple) else got) is options["out"]


@pytest.mark.core
def test_every_function_with_every_option_is_here():
    functions = {name for name in fx.__all__ if callable(getattr(fx, name))}
    assert {*calls(), *ELSEWHERE} == functions
    for name, its_calls in calls().items():
        parameters = list(inspect.signature(getattr(fx, name)).parameters)
        used = {option for _, options in its_calls for option in options}
        used |= {parameter for arguments, _ in its_calls for parameter in parameters[: len(arguments)]}
        assert used == set(parameters), name
