"""Edge values of the loss and of its gradient: those of PyTorch, but for the differences that are meant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastxent.torch import cross_entropy
from tests.helpers.cases import REDUCTIONS, SPECIAL_OPTIONS, SPECIAL_ROWS, SPECIAL_TARGETS, Case, make_special_case
from tests.helpers.opponent import loss_and_grad
from tests.helpers.torch_cases import DTYPES, make_case

pytestmark = pytest.mark.usefixtures("one_torch_thread")

INF, NAN = float("inf"), float("nan")


def run(x, target, reduction="none", **options):
    """Loss, as a list, and gradient of the sum of the losses."""
    x = torch.tensor(x, dtype=torch.float32)
    loss, grad = loss_and_grad(cross_entropy, Case(x, torch.as_tensor(target), options), reduction)
    with torch.no_grad():
        alone = cross_entropy(x, torch.as_tensor(target), reduction=reduction, **options)
    np.testing.assert_array_equal(alone, loss)  # nan equals nan
    return loss.tolist(), grad


def same(got: object, want: object) -> bool:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6, atol=1e-7)
    return True


# ----------------------------------------------------------------------------------------------------
# Against PyTorch
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SPECIAL_OPTIONS.values(), ids=SPECIAL_OPTIONS)
@pytest.mark.parametrize("target", SPECIAL_TARGETS)
@pytest.mark.parametrize("row", SPECIAL_ROWS.values(), ids=SPECIAL_ROWS)
def test_special_rows(row, target, options, dtype):
    """nan where PyTorch has nan and inf where it has inf, in each element of loss and gradient; else near."""
    for rows in (1, 2, 17):
        case = make_special_case(row, target, options, rows)
        o = {k: torch.tensor(v).to(dtype) if isinstance(v, np.ndarray) else v for k, v in case.options.items()}
        t = torch.tensor(case.target)
        case = Case(torch.tensor(case.logits).to(dtype), t.to(dtype) if t.is_floating_point() else t, o)
        for reduction in REDUCTIONS:
            ours, theirs = (loss_and_grad(f, case, reduction) for f in (cross_entropy, F.cross_entropy))
            for got, want in zip(ours, theirs, strict=True):
                tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 8 * torch.finfo(dtype).eps)
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(6, 100), (6, 60, 2), (6, 7, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_other_layouts(dtype, shape, special):
    """First, last and between, at the target and beside it; the rows next to them do not notice."""
    case, classes = make_case(dtype, shape), shape[1]
    x, target = (t if t.dim() > n else t[..., None] for t, n in ((case.logits, 2), (case.target, 1)))
    for row, at in enumerate([0, 1, classes // 2, classes - 2, classes - 1]):
        x[row, at, 0] = special
        target[row, 0] = at if row % 2 else 0
    ours, theirs = (loss_and_grad(f, case, "none") for f in (cross_entropy, F.cross_entropy))
    for got, want in zip(ours, theirs, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 8 * torch.finfo(dtype).eps)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0), (0, 0), (2, 0, 0), (0, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("target", ["index", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype, smoothing, target, shape):
    x = torch.zeros(shape, dtype=dtype)
    t = torch.zeros(shape[:1] + shape[2:], dtype=torch.long) if target == "index" else x
    case = Case(x, t, dict(label_smoothing=smoothing))
    for reduction, want in {"mean": NAN, "sum": 0.0, "none": []}.items():
        ours, theirs = (loss_and_grad(f, case, reduction) for f in (cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        if shape[1] > 0:
            np.testing.assert_array_equal(ours[0].flatten().float(), np.ravel(want))


@pytest.mark.parametrize("integer", [torch.int32, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("options", [{}, dict(sample_weight=torch.zeros(0)), dict(z_loss=0.1), dict(softcap=2.0)], ids=str)
def test_no_rows_and_what_pytorch_does_not_know(options, integer):
    for reduction, want in {"mean": NAN, "sum": 0.0, "none": []}.items():
        loss, grad = loss_and_grad(cross_entropy, Case(torch.zeros(0, 3), torch.zeros(0, dtype=integer), options), reduction)
        np.testing.assert_array_equal(loss.flatten(), np.ravel(want))
        assert grad.shape == (0, 3)


def test_no_classes():
    none, some = torch.zeros(3, 0), torch.zeros(3, dtype=torch.long)
    for reduction, want in {"mean": NAN, "sum": 0.0, "none": [0.0, 0.0, 0.0]}.items():
        loss, grad = loss_and_grad(cross_entropy, Case(none, none, {}), reduction)
        assert same(loss, want) and grad.shape == (3, 0)
        loss, grad = loss_and_grad(cross_entropy, Case(none, some - 100, {}), reduction)
        assert same(loss, want) and grad.shape == (3, 0)
    with pytest.raises(IndexError, match=r"Target 0 is out of bounds\."):
        cross_entropy(none, some)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_class(dtype):
    """p = 1: the loss is 0 and so is the gradient, whatever the logit."""
    x = torch.tensor([[5.0], [-700.0], [0.0]], dtype=dtype)
    for target in (torch.zeros(3, dtype=torch.long), torch.ones(3, 1, dtype=dtype)):
        for reduction in REDUCTIONS:
            loss, grad = loss_and_grad(cross_entropy, Case(x, target, {}), reduction)
            assert not loss.any() and not grad.any()


# ----------------------------------------------------------------------------------------------------
# The table, literally: what each case gives, in numbers
# ----------------------------------------------------------------------------------------------------

LOG2 = float(np.log(2))


ALONE = [{}, dict(label_smoothing=0.1), dict(weight=torch.tensor([1.0, 2.0, 3.0])), dict(z_loss=0.1), dict(softcap=1.0)]


@pytest.mark.parametrize("options", ALONE, ids=str)
def test_all_rows_ignored(options):
    """The mean is nan and its gradient 0, whatever the rows hold."""
    x = [[1.0, 2, 3], [NAN, INF, -INF]]
    for reduction, want in {"mean": NAN, "sum": 0.0, "none": [0.0, 0.0]}.items():
        loss, grad = run(x, [-100, -100], reduction, **options)
        assert same(loss, want) and not grad.any()


@pytest.mark.parametrize("how", ["weight", "sample_weight"])
def test_all_weights_0(how):
    options = {how: torch.zeros({"weight": 3, "sample_weight": 2}[how])}
    loss, grad = run([[1.0, 2, 3], [4, 5, 6]], [0, 1], "mean", **options)
    assert np.isnan(loss) and grad.isnan().all()
    for reduction in ("sum", "none"):
        loss, grad = run([[1.0, 2, 3], [4, 5, 6]], [0, 1], reduction, **options)
        assert not np.any(loss) and not grad.any()


def test_minus_infinity_beside_the_target():
    loss, grad = run([[0.0, -INF, 0.0]], [0])
    assert same(loss, [LOG2]) and same(grad, [[-0.5, 0.0, 0.5]])


def test_minus_infinity_at_the_target():
    loss, grad = run([[0.0, -INF, 0.0]], [1])
    assert loss == [INF] and same(grad, [[0.5, -1.0, 0.5]])


@pytest.mark.parametrize("target", [0, 1])
def test_minus_infinity_and_smoothing(target):
    loss, grad = run([[0.0, -INF, 0.0]], [target], label_smoothing=0.3)
    want = np.array([[0.5, 0, 0.5]]) - 0.1
    want[0, target] -= 0.7
    assert loss == [INF] and same(grad, want)


def test_probability_0_at_minus_infinity():
    loss, grad = run([[0.0, -INF, 0.0]], torch.tensor([[1.0, 0.0, 0.0]]))
    assert np.isnan(loss[0]) and same(grad, [[-0.5, 0.0, 0.5]])


@pytest.mark.parametrize("row", [[-INF, -INF, -INF], [0, INF, 0], [0, NAN, 0]], ids=str)
def test_no_distribution(row):
    loss, grad = run([row, [0.0, 0, 0]], [0, 0])
    assert np.isnan(loss[0]) and grad[0].isnan().all()
    assert same(loss[1], np.log(3)) and grad[1].isfinite().all()


def test_weight_0_at_minus_infinity():
    loss, grad = run([[0.0, -INF, 0.0]], [1], weight=torch.tensor([1.0, 0.0, 1.0]))
    assert np.isnan(loss[0]) and not grad.any()


def test_large_logits():
    loss, grad = run([[1e4, -1e4]], [1])
    assert loss == [20000.0] and same(grad, [[1.0, -1.0]])
    loss, grad = run([[3e38, -3e38]], [1])
    assert loss == [INF] and same(grad, [[1.0, -1.0]])
    loss, grad = run([[3e38, -3e38]], [0])
    assert loss == [0.0] and not grad.any()


@pytest.mark.parametrize("size", [1e160, 1e300], ids=str)
def test_huge_float64_logits(size):
    """Past the square root of the largest number: the square of the log-sum-exp is inf, and 0 times it must not be seen."""
    case = Case(torch.tensor([[size, -size, 0.0], [1, 2, 3]], dtype=torch.float64), torch.tensor([1, 0]), {})
    for reduction in REDUCTIONS:
        ours, theirs = (loss_and_grad(f, case, reduction) for f in (cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_infinite_logits_under_a_cap():
    """tanh bounds them: what is capped is finite, and its slope is 0."""
    loss, grad = run([[0.0, -INF, INF]], [0], softcap=2.0)
    assert same(loss, np.log(1 + np.exp(2.0) + np.exp(-2.0)))
    assert grad.isfinite().all() and grad[0, 1] == 0 and grad[0, 2] == 0


# ----------------------------------------------------------------------------------------------------
# Better than PyTorch on purpose
# ----------------------------------------------------------------------------------------------------


LEAKY = ["index", "weight", "smoothing", "sample_weight", "z_loss", "softcap", "weight smoothing z_loss"]


@pytest.mark.parametrize("option", LEAKY)
@pytest.mark.parametrize("shape", [(12, 7), (12, 100), (6, 7, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ignored_rows_leak_nothing(dtype, shape, option):
    """nan and inf in an ignored row reach neither loss nor gradient: the bits are those of a clean row."""
    clean = make_case(dtype, shape, option)
    clean.target[::3] = -100
    dirty = clean._replace(logits=clean.logits.clone())
    dirty.logits[::3, ::2], dirty.logits[::3, 1::2] = NAN, INF
    for reduction in REDUCTIONS:
        (loss, grad), (want, want_grad) = (loss_and_grad(cross_entropy, case, reduction) for case in (dirty, clean))
        assert torch.equal(loss, want) and torch.equal(grad, want_grad)
        assert loss.isfinite().all() and not grad[::3].any() and grad[1::3].any()


def test_negative_smoothing_is_refused():
    with pytest.raises(RuntimeError, match=r"label_smoothing must be between 0\.0 and 1\.0\. Got: -0\.1"):
        cross_entropy(torch.zeros(1, 3), torch.tensor([0]), label_smoothing=-0.1)


@pytest.mark.parametrize("value", [0.0, 1.0, 1, 0])
def test_limits_of_smoothing(value):
    case = make_case(torch.float64, (5, 3), "index")
    case = case._replace(options=dict(label_smoothing=value))
    for reduction in REDUCTIONS:
        ours, theirs = (loss_and_grad(f, case, reduction) for f in (cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)
