"""softmax, log_softmax, logsumexp (SciPy's signatures); nll_loss, entropy, kl_div (PyTorch's formulas)."""

from __future__ import annotations

import inspect
from itertools import product

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

import fastxent as fx
from fastxent import reference as ref
from tests.helpers.cases import (
    EVERYDAY_DTYPES,
    FLOAT32,
    FLOAT64,
    GRID,
    MOST_DTYPES,
    REDUCTIONS,
    accumulation,
    make_case,
    make_rng,
)
from tests.helpers.layouts import LAYOUTS, layouts_of
from tests.helpers.truth import Budget, assert_within_budget, widest

SOFTMAXES = ["softmax", "log_softmax"]


def torch_of(x: np.ndarray) -> torch.Tensor:
    """The opponent computes half precision in float32, as in `run_torch`."""
    return torch.tensor(x.astype(accumulation(x.dtype)))


def make_logits(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return make_case(dtype, shape).logits


def softmax_scale(name: str, truth: np.ndarray) -> np.ndarray:
    """As in `make_truth`: log p = (x - max) - log s, s >= 1; p = exp(log p), of a rounded log p."""
    if name == "log_softmax":
        return np.maximum(np.abs(truth), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(truth == 0, 0, truth * np.maximum(np.abs(np.log(truth)), 1))


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("dtype", MOST_DTYPES, ids=str)
def test_softmax_grid(dtype, name):
    budget = Budget()
    for shape in GRID:
        x = make_logits(dtype, shape)
        before = x.copy()
        got, truth = getattr(fx, name)(x, axis=-1), getattr(ref, name)(widest(x), -1)
        assert got.dtype == dtype and not np.shares_memory(got, x)
        np.testing.assert_array_equal(x, before)
        theirs = getattr(torch, name)(torch_of(x), -1).numpy().astype(dtype)
        budget.add(got, truth, theirs, softmax_scale(name, truth), shape)
    budget.check()


@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_logsumexp_grid(dtype):
    budget = Budget()
    for shape in GRID:
        x = make_logits(dtype, shape)
        got, truth = fx.logsumexp(x, axis=-1), ref.logsumexp(widest(x), -1)
        theirs = torch.logsumexp(torch_of(x), -1).numpy().astype(got.dtype)
        budget.add(got, truth, theirs, np.maximum(np.abs(truth), np.abs(widest(x)).max(-1)), shape)
    budget.check()


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_a_constant_in_all_logits_costs_no_digit(dtype, name):
    """The maximum is taken off before anything is rounded: x - (max + log s) would round log s at its size."""
    x = make_logits(dtype, (17, 70)).round().astype(dtype)
    for shift in (0, 64, -64, 128):
        np.testing.assert_array_equal(getattr(fx, name)(x + dtype.type(shift), -1), getattr(fx, name)(x, -1))


@pytest.mark.parametrize("axis", [None, 0, 1, -1, -3, (0, 2), (-1, 0), (0, 1, 2)])
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_axes(dtype, axis):
    x = make_logits(dtype, (3, 18, 5))
    every = tuple(range(3)) if axis is None else axis
    over = every if isinstance(every, tuple) else (every,)
    t = torch_of(x)
    lse = torch.logsumexp(t, over, keepdim=True)
    for name in SOFTMAXES:
        truth = getattr(ref, name)(widest(x), axis)
        theirs = torch.exp(t - lse) if name == "softmax" else t - lse
        got = getattr(fx, name)(x, axis)
        assert got.dtype == dtype
        assert_within_budget(got, truth, theirs.numpy().astype(dtype), softmax_scale(name, truth), name)
    for keepdims in (False, True):
        truth = ref.logsumexp(widest(x), axis, keepdims=keepdims)
        got = fx.logsumexp(x, axis, keepdims=keepdims)
        theirs = lse.numpy().reshape(np.shape(truth))
        assert_within_budget(got, truth, theirs.astype(got.dtype), np.maximum(np.abs(truth), 1), keepdims)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_result_dtypes_are_scipys(dtype):
    x = make_logits(np.dtype(dtype), (4, 5))
    for name in (*SOFTMAXES, "logsumexp"):
        for axis in (None, 1):
            ours, scipys = (np.asarray(getattr(m, name)(x, axis)) for m in (fx, scipy.special))
            assert ours.dtype == scipys.dtype and ours.shape == scipys.shape, (name, axis)


@pytest.mark.parametrize("name", [*SOFTMAXES, "logsumexp"])
def test_signature_starts_as_scipys(name):
    ours, scipys = (inspect.signature(getattr(m, name)).parameters.values() for m in (fx, scipy.special))
    for a, b in zip(ours, scipys, strict=False):
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours)[len(scipys) :])


@pytest.mark.parametrize("name", [*SOFTMAXES, "logsumexp"])
def test_lists_and_integers_become_float64(name):
    function, truth = getattr(fx, name), getattr(ref, name)
    for x in ([1, 2, 3], np.arange(3, dtype=np.int16), [1.0, 2.0, 3.0]):
        got = function(x)
        assert np.asarray(got).dtype == np.float64
        np.testing.assert_allclose(got, truth(np.asarray(x, float)), rtol=1e-15)


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_logsumexp_factors_and_signs_are_scipys(axis, keepdims):
    rng = make_rng("factors")
    x, b = 20 * rng.standard_normal((6, 7)), rng.integers(-2, 3, 7).astype(float)
    x[0, b == 0] = np.inf  # a factor of 0 takes its element out, whatever it is
    value, sign = fx.logsumexp(x, axis, b, keepdims, return_sign=True)
    want, want_sign = scipy.special.logsumexp(x, axis, b, keepdims, return_sign=True)
    np.testing.assert_allclose(value, want, rtol=1e-13)
    np.testing.assert_array_equal(sign, want_sign)
    assert np.shape(value) == np.shape(want)
    np.testing.assert_allclose(fx.logsumexp(x, axis, b, keepdims), np.where(want_sign < 0, np.nan, want), rtol=1e-13)


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 16, 33, 2049, 4097])
def test_edge_values(classes, dtype):
    """nan and infinities, first, last and alone, are to each function what they are to the reference."""
    rows = []
    for special in ([INF], [-INF], [NAN], [INF, -INF], [INF, INF], [NAN, -INF]):
        for at in (0, classes - len(special)):
            rows.append(make_logits(FLOAT64, (classes,)))
            rows[-1][at : at + len(special)] = special
    rows += [np.full(classes, v) for v in (INF, -INF, NAN, 0.0, 1e4, -1e4)]
    rows.append(np.full(classes, -INF))
    rows[-1][-1] = 1.0  # whole blocks of nothing but -inf, then a number
    x = np.array(rows).astype(dtype)
    theirs, t = {}, torch_of(x)
    theirs["softmax"], theirs["logsumexp"] = torch.softmax(t, -1), torch.logsumexp(t, -1)
    for name in ("softmax", "logsumexp"):
        truth, got = getattr(ref, name)(widest(x), -1), getattr(fx, name)(x, -1)
        scale = softmax_scale("softmax" if name == "softmax" else "log_softmax", truth)
        assert_within_budget(got, truth, theirs[name].numpy().astype(got.dtype), scale, name)
    got, truth = fx.log_softmax(x, -1), ref.log_softmax(widest(x), -1)
    np.testing.assert_array_equal(np.isnan(got).any(-1), np.isnan(truth).any(-1))
    fine = ~np.isnan(truth).any(-1)
    log_p = torch.log_softmax(t, -1).numpy().astype(dtype)
    assert_within_budget(got[fine], truth[fine], log_p[fine], np.maximum(np.abs(truth[fine]), 1))


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_layouts_and_out(dtype, name):
    function, opponent = getattr(fx, name), getattr(torch, name)
    for layout in layouts_of(dtype):
        x = LAYOUTS[layout](make_logits(dtype, (17, 35)))
        before = x.copy()
        for axis in (0, 1):
            got, out = function(x, axis), np.empty(x.shape, dtype)
            assert got.dtype.newbyteorder("=") == dtype and got.shape == x.shape, layout
            truth = getattr(ref, name)(widest(x), axis)
            theirs = opponent(torch_of(x), axis).numpy().astype(dtype)
            assert_within_budget(got, truth, theirs, softmax_scale(name, truth), (layout, axis))
            assert function(x, axis, out=out) is out
            np.testing.assert_array_equal(out, got, err_msg=layout)
            np.testing.assert_array_equal(x, before, err_msg=layout)
    x = make_logits(dtype, (17, 35))
    want = function(x, 1)
    assert function(x, 1, out=x) is x
    np.testing.assert_array_equal(x, want)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)], ids=str)
def test_nothing_to_sum(shape):
    x = np.zeros(shape, np.float32)
    for name in SOFTMAXES:
        assert getattr(fx, name)(x, axis=-1).shape == shape
    lse = fx.logsumexp(x, axis=-1)
    assert lse.shape == shape[:-1]
    assert (np.asarray(lse) == -INF).all()


@pytest.mark.parametrize("option", ["index", "weight", "ignore", "ignore_class", "weight ignore"])
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_nll_loss_grid(dtype, option):
    budget = Budget()
    for shape, reduction in product([(17, 5), (100, 21), (1, 1), (2, 3, 4, 6)], REDUCTIONS):
        case = make_case(dtype, shape, option)
        log_probs = ref.log_softmax(case.logits, -1).astype(dtype)
        options = dict(case.options, reduction=reduction)
        got = fx.nll_loss(log_probs, case.target, **options)
        assert np.asarray(got).dtype == accumulation(dtype)
        truth = ref.nll_loss(widest(log_probs), case.target, **options)
        tensors = {k: torch_of(v) if k == "weight" else v for k, v in options.items()}
        t, y = torch_of(log_probs), torch.tensor(case.target)
        theirs = F.nll_loss(t.movedim(-1, 1) if t.ndim > 2 else t, y, **tensors).numpy()
        budget.add(got, truth, theirs, label=(shape, reduction))
    budget.check()


def test_nll_loss_axis_edges_and_equality_with_cross_entropy():
    x = make_logits(FLOAT64, (4, 5, 6))
    target = make_rng("target").integers(0, 5, (4, 6))
    got = fx.nll_loss(fx.log_softmax(x, 1), target, axis=1)
    np.testing.assert_allclose(got, fx.cross_entropy(x, target, axis=1), rtol=1e-14)
    assert np.isnan(fx.nll_loss([[0.5, NAN]], [-100]))  # no row in the mean
    assert fx.nll_loss([[0.5, NAN]], [-100], reduction="sum") == 0
    assert fx.nll_loss([[-1.0, NAN]], [0]) == 1
    assert np.isnan(fx.nll_loss(np.zeros((0, 3)), np.zeros(0, int)))


@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_entropy(dtype):
    budget = Budget()
    for axis in (0, 1, -1):
        p = make_rng("p", axis).dirichlet(np.full(21, 0.5), (9, 21)).astype(dtype)
        p[0, 0], p[1], p[:, 2, 2] = np.eye(21)[3], 0, 0
        got = fx.entropy(p, axis)
        assert got.dtype == accumulation(dtype) and got.min() == 0
        budget.add(got, ref.entropy(widest(p), axis), torch.special.entr(torch_of(p)).sum(axis).numpy())
    budget.check()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_entropy_grid(dtype):
    """Rows in lanes and classes in lanes, whole groups of vectors and what is left; denormal probabilities; a lone long row."""
    budget = Budget()
    for shape in [(17, 3), (33, 48), (100, 17), (5, 70), (3, 1000), (2, 2049), (1, 100000)]:
        p = make_rng("entropy", shape).dirichlet(np.full(shape[1], 0.05), shape[0]).astype(dtype)
        budget.add(fx.entropy(p), ref.entropy(widest(p)), torch.special.entr(torch_of(p)).sum(-1).numpy(), label=shape)
    tiny = np.full((3, 70), np.finfo(dtype).smallest_subnormal * 9)
    for axis in (0, 1):
        budget.add(
            fx.entropy(tiny, axis), ref.entropy(widest(tiny), axis), torch.special.entr(torch_of(tiny)).sum(axis).numpy()
        )
    budget.check()
    assert np.isnan(fx.entropy(np.array([[0.5, -0.5], [0.5, NAN]], dtype))).all()
    assert fx.entropy(np.zeros((2, 0), dtype)).tolist() == [0, 0] and fx.entropy(np.zeros((0, 2), dtype)).shape == (0,)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_kl_div(dtype, reduction, log_target):
    rng = make_rng("kl", dtype.name)
    q, p = np.log(rng.dirichlet(np.ones(35), 8)).astype(dtype), rng.dirichlet(np.ones(35), 8)
    p = (np.log(p) if log_target else np.where(p < 0.01, 0, p)).astype(dtype)
    options = dict(reduction=reduction, log_target=log_target)
    got, truth = fx.kl_div(q, p, **options), ref.kl_div(widest(q), widest(p), **options)
    assert np.asarray(got).dtype == accumulation(dtype)
    terms = np.exp(widest(p)) if log_target else widest(p)
    terms = terms * np.maximum(np.abs(ref.log_softmax(widest(q), -1)), 1)  # t log t and t input, before they cancel
    scale = ref._reduce(terms, 8 if reduction == "batchmean" else terms.size, reduction.replace("batch", ""))
    assert_within_budget(got, truth, F.kl_div(torch_of(q), torch_of(p), **options).numpy(), scale)


def test_kl_div_edges_are_pytorchs():
    for x, t in [(-INF, 0.0), (-INF, 0.5), (0.0, 0.0), (NAN, 0.5), (-1.0, NAN)]:
        theirs = F.kl_div(torch.tensor([x]), torch.tensor([t]), reduction="sum").item()
        np.testing.assert_array_equal(fx.kl_div([x], [t], reduction="sum"), theirs)
