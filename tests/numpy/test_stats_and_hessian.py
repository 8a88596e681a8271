"""cross_entropy_stats and cross_entropy_grad_hess: every option, against truth and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastxent as fx
from fastxent import reference as ref
from tests.helpers.cases import (
    FLOAT32,
    GRID,
    INF,
    MOST_DTYPES,
    NAN,
    REDUCTIONS,
    Case,
    accumulation,
    make_case,
)
from tests.helpers.opponent import one_torch_thread, run_torch
from tests.helpers.truth import Budget, make_truth, widest_case


@one_torch_thread()
def run_torch_stats(case: Case) -> dict[str, np.ndarray]:
    """What PyTorch needs four functions for, in the dtype of the loss."""
    x = torch.tensor(case.logits.astype(accumulation(case.logits.dtype)))
    lse, log_p = torch.logsumexp(x, -1), torch.log_softmax(x, -1)
    p = log_p.exp()
    y = torch.tensor(case.target.argmax(-1) if case.target.ndim == x.ndim else case.target.clip(0))
    target_prob = p.take_along_dim(y.unsqueeze(-1), -1).squeeze(-1)
    keep = torch.tensor(ref._distribution(case.logits, case.target, -1, case.options.get("ignore_index", -100))[1])
    found = dict(lse=lse, entropy=torch.special.entr(p).sum(-1), target_prob=target_prob)
    return {name: torch.where(keep, v, 0).numpy() for name, v in found.items()}


# Statistics know of options through the loss alone: one of each kind of target, and everything at once.
SOME_OPTIONS = ["index", "ignore_class", "weight ignore smoothing sample_weight", "one_hot", "probabilities weight"]


@pytest.mark.parametrize("option", SOME_OPTIONS)
@pytest.mark.parametrize("dtype", MOST_DTYPES, ids=str)
def test_stats_grid(dtype, option):
    budgets = {name: Budget() for name in ("loss", "lse", "entropy", "target_prob")}
    for shape in GRID:
        case = make_case(dtype, shape, option)
        case.logits[:, : shape[1] // 2] = case.logits[:, : shape[1] // 2].round()  # ties, for rank and prediction
        truth, got = make_truth(case, "none"), fx.cross_entropy_stats(*case[:2], **case.options)
        wide = widest_case(case)
        stats = ref.cross_entropy_stats(*wide[:2], **wide.options)
        assert type(got) is fx.CrossEntropyStats and got._fields == ref.CrossEntropyStats._fields
        theirs = run_torch_stats(case)
        top = np.abs(wide.logits).max(-1)
        log_p_y = np.abs(np.log(np.where(stats.target_prob > 0, stats.target_prob, 1)))
        scales = dict(lse=np.maximum(top, 1), entropy=1, target_prob=stats.target_prob * np.maximum(1, log_p_y))
        for name, value in got._asdict().items():
            if name in ("prediction", "target_rank"):
                assert value.dtype == np.intp
                np.testing.assert_array_equal(value, getattr(stats, name), err_msg=f"{shape} {name}")
                continue
            assert value.dtype == accumulation(dtype) and value.shape == shape[:1]
            if name == "loss":
                budgets[name].add(value, truth.loss, run_torch(case, "none")[0], truth.loss_scale, shape)
            else:
                right = getattr(stats, name)
                budgets[name].add(value, right, theirs[name], np.maximum(scales[name], np.abs(right)), shape)
    for budget in budgets.values():
        budget.check()


def test_stats_ties_reductions_axes_and_certain_rows():
    x = np.array([[1.0, 3, 3, 3, 2], [0, 0, 0, 0, 0], [-INF, 5, -INF, -INF, -INF], [9, 8, 7, 6, NAN]])
    y = [2, 4, 0, -100]
    got = fx.cross_entropy_stats(x, y)
    assert got.prediction.tolist() == [1, 0, 1, -1] and got.target_rank.tolist() == [1, 4, 1, -1]
    np.testing.assert_array_equal(got.entropy[2:], [0, 0])
    np.testing.assert_array_equal(got.target_prob[2:], [0, 0])
    np.testing.assert_array_equal(got.loss[2:], [INF, 0])
    for reduction in REDUCTIONS:
        whole = fx.cross_entropy_stats(x[:2], y[:2], reduction=reduction)
        np.testing.assert_allclose(whole.loss, fx.cross_entropy(x[:2], y[:2], reduction=reduction), rtol=1e-15)
        assert whole.lse.shape == (2,)
    np.testing.assert_array_equal(fx.cross_entropy_stats(x.T.copy(), y, axis=0).target_rank, got.target_rank)
    one = fx.cross_entropy_stats(x[0], 2)
    assert one.target_rank == 1 and np.shape(one.lse) == () == np.shape(one.prediction)


@one_torch_thread()
def run_torch_hessian(logits: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """PyTorch has none, so: the formula, in the dtype of the loss, with its softmax."""
    acc = accumulation(logits.dtype)
    p = torch.softmax(torch.tensor(logits.astype(acc)), -1)
    return (torch.tensor(mass.astype(acc)) * p * (1 - p)).numpy().astype(logits.dtype)


@pytest.mark.parametrize("option", SOME_OPTIONS)
@pytest.mark.parametrize("dtype", MOST_DTYPES, ids=str)
def test_grad_hess_grid(dtype, option):
    """The Hessian u Q p (1 - p) has the scale of u Q p: 1 - p is as good as p near 1 is."""
    gradients, hessians = Budget(), Budget()
    for shape in GRID:
        case = make_case(dtype, shape, option)
        grad, hess = fx.cross_entropy_grad_hess(*case[:2], **case.options)
        assert grad.dtype == hess.dtype == dtype and grad.shape == hess.shape == shape
        truth, wide = make_truth(case, "none"), widest_case(case)
        right = ref.cross_entropy_grad_hess(*wide[:2], **wide.options)[1]
        log_p = ref.log_softmax(wide.logits, -1)
        part = np.exp(log_p) * -np.expm1(log_p)  # p (1 - p)
        mass = np.divide(right, part, out=np.zeros_like(right), where=part != 0).max(-1, keepdims=True)
        gradients.add(grad, truth.grad, run_torch(case, "none")[1], truth.grad_scale, shape)
        hessians.add(
            hess, right, run_torch_hessian(case.logits, mass), mass * np.exp(log_p) * np.maximum(1, np.abs(log_p)), shape
        )
    gradients.check()
    hessians.check()


@pytest.mark.parametrize("classes", [5, 70])
def test_ignored_rows_have_no_hessian(classes):
    case = make_case(FLOAT32, (33, classes))
    case.logits[::4], case.target[::4] = NAN, -100
    for logits in (case.logits, np.asfortranarray(case.logits)):
        grad, hess = fx.cross_entropy_grad_hess(logits, case.target)
        assert not grad[::4].any() and not hess[::4].any()
        assert np.isfinite(hess).all() and (hess[1::4] > 0).all()
