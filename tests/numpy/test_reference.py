"""The reference itself, against PyTorch and SciPy in float64.

Both sides are float64 here and a wrong formula is wrong in its first digits, so 1e-12 is the whole tolerance.
"""

from __future__ import annotations

import ast
import inspect
from itertools import product

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F

from fastxent import reference as ref
from tests.helpers.cases import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT64,
    OPTIONS,
    REDUCTIONS,
    SPECIAL_OPTIONS,
    SPECIAL_ROWS,
    SPECIAL_TARGETS,
    Case,
    make_case,
    make_rng,
    make_special_case,
)
from tests.helpers.opponent import run_torch

TIGHT = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(7, 1), (7, 5), (1, 33), (2, 3, 4, 5)])
def test_cross_entropy_is_pytorchs(shape, option, reduction):
    case = make_case(FLOAT64, shape, option)
    loss, grad = run_torch(case, reduction)
    ours = ref.cross_entropy_value_and_grad(case.logits, case.target, reduction=reduction, **case.options)
    np.testing.assert_allclose(ours[0], loss, **TIGHT)
    np.testing.assert_allclose(ours[1], grad, **TIGHT)
    alone = ref.cross_entropy(case.logits, case.target, reduction=reduction, **case.options)
    np.testing.assert_array_equal(alone, ours[0])


@pytest.mark.parametrize("options", SPECIAL_OPTIONS.values(), ids=SPECIAL_OPTIONS)
@pytest.mark.parametrize("row", SPECIAL_ROWS.values(), ids=SPECIAL_ROWS)
@pytest.mark.parametrize("target", SPECIAL_TARGETS)
def test_edge_values_are_pytorchs(row, target, options):
    """PyTorch has float32 here, and numbers up to 1e4, so finite ones agree to its digits only."""
    for reduction in REDUCTIONS:
        for rows in (1, 2, 17):
            case = make_special_case(row, target, options, rows)
            ours = ref.cross_entropy_value_and_grad(*case[:2], reduction=reduction, **options)
            for mine, torchs in zip(ours, run_torch(case, reduction), strict=True):
                np.testing.assert_allclose(mine, torchs, rtol=1e-6, atol=1e-6)


def test_edge_values_without_rows_or_classes_are_pytorchs():
    for shape in [(0, 4), (3, 0), (3, 1), (0, 0)]:
        for target in (np.zeros(shape), np.full(shape[0], -100), np.zeros(min(shape), int)):
            if target.shape in (shape, shape[:1]):
                # Smoothing spreads over no class as eps / 0 in PyTorch: nan, even in ignored rows. Not copied.
                every = [o for o in SPECIAL_OPTIONS.values() if shape[1] or "label_smoothing" not in o]
                for reduction, options in product(REDUCTIONS, every):
                    options = {k: np.ones(shape[1]) if k == "weight" else v for k, v in options.items()}
                    case = Case(np.zeros(shape), target, options)
                    ours = ref.cross_entropy_value_and_grad(*case[:2], reduction=reduction, **options)
                    for mine, torchs in zip(ours, run_torch(case, reduction), strict=True):
                        np.testing.assert_array_equal(mine, torchs)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("axis", [0, 1, -2])
def test_axis_says_where_the_classes_are(axis, option):
    case = make_case(FLOAT64, (2, 3, 5), option)
    want = ref.cross_entropy_value_and_grad(case.logits, case.target, reduction="none", **case.options)
    logits = np.moveaxis(case.logits, -1, axis)
    target = np.moveaxis(case.target, -1, axis) if case.target.ndim == 3 else case.target
    got = ref.cross_entropy_value_and_grad(logits, target, axis=axis, reduction="none", **case.options)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], np.moveaxis(want[1], -1, axis))


@pytest.mark.parametrize("option", OPTIONS)
def test_hessian_is_the_derivative_of_the_gradient(option):
    case = make_case(FLOAT64, (4, 5), option)
    grad, hess = ref.cross_entropy_grad_hess(case.logits, case.target, **case.options)
    own = ref.cross_entropy_value_and_grad(case.logits, case.target, reduction="none", **case.options)[1]
    np.testing.assert_array_equal(grad, own)
    h = 1e-4
    for c in range(5):
        step = np.zeros(5)
        step[c] = h
        up, down = (ref.cross_entropy_grad_hess(case.logits + s, case.target, **case.options)[0] for s in (step, -step))
        # Central differences are off by h**2 / 6 times a third derivative of size 1, and by rounding / h.
        np.testing.assert_allclose(hess[:, c], ((up - down) / (2 * h))[:, c], rtol=0, atol=1e-8)


def test_stats_of_a_row_counted_by_hand():
    x = np.log([[0.1, 0.4, 0.1, 0.4], [0.4, 0.1, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25]])
    stats = ref.cross_entropy_stats(x + 3.0, [2, -100, 3])
    np.testing.assert_allclose(stats.loss, [-np.log(0.1), 0, np.log(4)], **TIGHT)
    np.testing.assert_allclose(stats.lse, [3, 0, 3], **TIGHT)
    h = scipy.stats.entropy([0.1, 0.4, 0.1, 0.4])
    np.testing.assert_allclose(stats.entropy, [h, 0, np.log(4)], **TIGHT)
    np.testing.assert_allclose(stats.target_prob, [0.1, 0, 0.25], **TIGHT)
    assert stats.prediction.tolist() == [1, -1, 0]  # the first of the largest
    assert stats.target_rank.tolist() == [3, -1, 3]  # two are larger, and one equal one stands before it


def test_stats_of_probabilities_take_their_first_largest_class():
    stats = ref.cross_entropy_stats([[1.0, 2.0, 3.0]], [[0.2, 0.4, 0.4]], reduction="sum")
    assert stats.target_rank.tolist() == [1]
    np.testing.assert_allclose(stats.target_prob, scipy.special.softmax([1.0, 2, 3])[1], **TIGHT)
    np.testing.assert_allclose(stats.loss, ref.cross_entropy([[1.0, 2, 3]], [[0.2, 0.4, 0.4]]), **TIGHT)


def test_entropy_of_minus_infinity_logits_is_finite():
    stats = ref.cross_entropy_stats([[0.0, -np.inf, 0.0]], [0])
    np.testing.assert_allclose(stats.entropy, [np.log(2)], **TIGHT)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (0, 1, 2)])
def test_softmax_family_is_scipys(axis):
    x = 30 * make_rng("softmax").standard_normal((3, 4, 5))
    b = make_rng("factors").standard_normal((4, 5)).round(1)
    x[0, 1, 1:] = -np.inf
    x[1, 2, 3] = 700
    np.testing.assert_allclose(ref.softmax(x, axis), scipy.special.softmax(x, axis), **TIGHT)
    np.testing.assert_allclose(ref.logsumexp(x, axis), scipy.special.logsumexp(x, axis), **TIGHT)
    for keepdims in (False, True):
        ours = ref.logsumexp(x, axis, b, keepdims, True)
        scipys = scipy.special.logsumexp(x, axis, b, keepdims, True)
        np.testing.assert_allclose(ours[0], scipys[0], **TIGHT)
        np.testing.assert_array_equal(ours[1], scipys[1])
    finite = np.where(np.isfinite(x), x, -1e3)  # a slice of nothing but -inf has no log_softmax
    np.testing.assert_allclose(ref.log_softmax(finite, axis), scipy.special.log_softmax(finite, axis), **TIGHT)


def test_logsumexp_edges_are_scipys():
    for a, b in [([-np.inf, -np.inf], None), ([np.inf, 1], None), ([np.nan, 1], None), ([1, 2], [1, -1])]:
        np.testing.assert_array_equal(np.isnan(ref.logsumexp(a, b=b)), np.isnan(scipy.special.logsumexp(a, b=b)))
    assert ref.logsumexp([-np.inf, -np.inf]) == -np.inf
    assert ref.logsumexp([np.inf, 1.0]) == np.inf
    assert ref.logsumexp([]) == -np.inf
    np.testing.assert_allclose(ref.logsumexp([1e300, 0.0], b=[0.0, 1.0]), 0.0, **TIGHT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("option", ["index", "weight", "ignore", "ignore_class"])
def test_nll_loss_is_pytorchs(option, reduction):
    case = make_case(FLOAT64, (9, 4), option)
    log_probs = ref.log_softmax(case.logits, -1)
    options = {k: torch.tensor(v) if k == "weight" else v for k, v in case.options.items()}
    theirs = F.nll_loss(torch.tensor(log_probs), torch.tensor(case.target), reduction=reduction, **options)
    ours = ref.nll_loss(log_probs, case.target, reduction=reduction, **case.options)
    np.testing.assert_allclose(ours, theirs.numpy(), **TIGHT)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
def test_kl_div_is_pytorchs(reduction, log_target):
    rng = make_rng("kl")
    q, p = np.log(rng.dirichlet(np.ones(5), 4)), rng.dirichlet(np.ones(5), 4)
    p = np.log(p) if log_target else np.where(p < 0.1, 0.0, p)
    theirs = F.kl_div(torch.tensor(q), torch.tensor(p), reduction=reduction, log_target=log_target)
    ours = ref.kl_div(q, p, reduction=reduction, log_target=log_target)
    np.testing.assert_allclose(ours, theirs.numpy(), **TIGHT)


def test_entropy_is_scipys():
    p = make_rng("entropy").dirichlet(np.ones(5), (2, 3))
    p[0, 0] = [0, 1, 0, 0, 0]
    for axis in (0, 1, -1):
        normal = p / p.sum(axis, keepdims=True)  # SciPy normalises, we do not
        np.testing.assert_allclose(ref.entropy(normal, axis), scipy.stats.entropy(p, axis=axis), **TIGHT)
    assert ref.entropy([0.5, 0.5, 0.5]) > np.log(2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("option", ["", "weight", "pos_weight", "weight pos_weight"])
def test_binary_cross_entropy_is_pytorchs(option, reduction):
    rng = make_rng("binary", option)
    x, y = 5 * rng.standard_normal((4, 3)), rng.uniform(size=(4, 3))
    x[0] = [800.0, -800.0, 0.0]
    options = {name: rng.uniform(0.5, 2, 3) for name in option.split()}
    loss, grad = ref.binary_cross_entropy_with_logits_value_and_grad(x, y, reduction=reduction, **options)
    t = torch.tensor(x, requires_grad=True)
    tensors = {k: torch.tensor(v) for k, v in options.items()}
    theirs = F.binary_cross_entropy_with_logits(t, torch.tensor(y), reduction=reduction, **tensors)
    theirs.sum().backward()
    np.testing.assert_allclose(loss, theirs.detach().numpy(), **TIGHT)
    np.testing.assert_allclose(grad, t.grad.numpy(), **TIGHT)
    np.testing.assert_array_equal(loss, ref.binary_cross_entropy_with_logits(x, y, reduction=reduction, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_widened_not_rounded(dtype):
    case = make_case(dtype, (5, 7))
    loss, grad = ref.cross_entropy_value_and_grad(case.logits, case.target)
    assert loss.dtype == grad.dtype == np.float64
    wide = case.logits.astype(np.float64)
    np.testing.assert_array_equal(grad, ref.cross_entropy_value_and_grad(wide, case.target)[1])
    if dtype in (FLOAT16, BFLOAT16):
        assert ref.softmax(case.logits, -1).sum(-1) == pytest.approx(np.ones(5), abs=1e-15)


def test_wider_logits_stay_wide():
    loss, grad = ref.cross_entropy_value_and_grad(np.zeros((2, 3), np.longdouble), [0, 1])
    assert loss.dtype == grad.dtype == np.longdouble
    assert abs(loss - np.log(np.longdouble(3))) <= np.spacing(np.longdouble(1))


def test_every_function_is_short():
    """Under ten lines of code each, as promised: it must be possible to read the oracle and believe it."""
    for function in ast.parse(inspect.getsource(ref)).body:
        if isinstance(function, ast.FunctionDef):
            code = function.body[1:] if ast.get_docstring(function) else function.body
            lines = code[-1].end_lineno - code[0].lineno + 1
            assert lines < 10, f"{function.name}: {lines} lines"
