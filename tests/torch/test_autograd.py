"""Backward in every way that PyTorch offers: any grad_output, again and again, twice, hooked, checkpointed, under autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from fastxent.torch import cross_entropy
from tests.helpers.cases import REDUCTIONS, Case, softcap_is_thorough
from tests.helpers.launches import counted
from tests.helpers.opponent import torch_loss
from tests.helpers.torch_cases import DTYPES, EXTRAS, OPTIONS, make_case

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPES = [(6,), (5, 3), (5, 60), (2, 3, 4)]
CLOSE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-6, torch.float64: 1e-12}


def loss_of(function, case: Case, x: torch.Tensor, reduction: str = "mean", **more) -> torch.Tensor:
    return function(x, case.target, reduction=reduction, **case.options, **more)


def assert_close(ours, theirs, dtype=torch.float64):
    torch.testing.assert_close(ours, theirs, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def leaf(case: Case) -> torch.Tensor:
    return case.logits.clone().requires_grad_()


def grad_outputs(loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """A different factor a row, in every layout that autograd hands over; also 0, huge and of one element."""
    g = torch.linspace(-1.5, 2.0, loss.numel(), dtype=torch.float64).to(loss.dtype).reshape(loss.shape)
    wide = torch.stack([g, torch.full_like(g, float("nan"))], -1)
    return {
        "rows": g,
        "expanded": g.new_full((), 0.3).expand(loss.shape),
        "strided": wide[..., 0],
        "transposed": g.reshape(loss.shape[::-1]).permute(tuple(range(loss.dim() - 1, -1, -1))),
        "zeros": torch.zeros_like(g),
        "large": 1e3 * g,
    }


@pytest.mark.parametrize("option", softcap_is_thorough(OPTIONS + EXTRAS))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_grad_output(reduction, option):
    for shape in SHAPES:
        case = make_case(torch.float64, shape, option)
        a, b = leaf(case), leaf(case)
        ours, theirs = loss_of(cross_entropy, case, a, reduction), loss_of(torch_loss, case, b, reduction)
        for name, g in grad_outputs(theirs).items():
            got, want = grad(ours, a, g, retain_graph=True)[0], grad(theirs, b, g, retain_graph=True)[0]
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-9 if name == "large" else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grad_output_in_each_dtype(reduction, dtype):
    """In half precision too a factor is applied before rounding: loss scaling lives from it (tiny gradients, factor 2^16)."""
    case = make_case(dtype, (64, 100), "index")
    for factor in (1.0, 0.3, 2.0**12, 2.0**-10):
        x, wide = leaf(case), case.logits.to(torch.float64, copy=True).requires_grad_()
        (loss_of(cross_entropy, case, x, reduction).sum().float() * factor).backward()
        (F.cross_entropy(wide, case.target, reduction=reduction).sum() * factor).backward()
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        eps = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 1e-13)
        size = wide.grad.abs().max().item()
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2 * eps, atol=2 * tiny + 1e-7 * size)


def test_accumulation_over_several_losses():
    """The logits serve two losses and a penalty; their gradients add up in the leaf."""
    case = make_case(torch.float64, (5, 3))
    for function in (cross_entropy, F.cross_entropy):
        x = leaf(case)
        total = 0.5 * loss_of(function, case, x) + 2 * loss_of(function, case, x * 2, "sum") + x.square().sum()
        total.backward()
        loss_of(function, case, x, "none")[1:3].sum().backward()
        if function is cross_entropy:
            ours = x.grad
    assert_close(ours, x.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_backward(dtype, reduction):
    """Each gives the whole gradient, whatever was done to the gradients given before."""
    case = make_case(dtype, (5, 60), "weight ignore")
    x = leaf(case)
    loss = loss_of(cross_entropy, case, x, reduction).sum()
    (want,) = grad(loss, x, retain_graph=True)
    want = want.clone()
    for factor in (1.0, 3.0, 1.0, 0.5):
        (got,) = grad(loss, x, torch.tensor(factor, dtype=dtype), retain_graph=True)
        torch.testing.assert_close(got, want * factor, rtol=4 * CLOSE[dtype], atol=CLOSE[dtype])
        got.fill_(float("nan"))  # the caller's own
    loss.backward(retain_graph=True)
    x.grad.mul_(-7)
    loss.backward()
    torch.testing.assert_close(x.grad, -6 * want, rtol=8 * CLOSE[dtype], atol=8 * CLOSE[dtype])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_several_steps_are_their_own(reduction):
    """Nothing that a gradient lives in is used again while anyone looks at it: tensor, view or NumPy array."""
    kept = []
    case = make_case(torch.float32, (2048, 256))  # 2 MiB: large enough to be recycled
    for step in range(6):
        x = (case.logits + step).mul(0.1 * step + 0.1).requires_grad_()
        loss_of(cross_entropy, case, x, reduction).sum().backward()
        want = x.grad.clone()
        keeper = [x.grad, x.grad[3:5], x.grad.numpy(), x.grad.numpy()[:, 7], x.grad.detach().view(-1), x.grad.untyped_storage()]
        kept.append((keeper[step], want, step))
        del x, keeper
    for thing, want, step in kept:
        views = [lambda w: w, lambda w: w[3:5], lambda w: w.numpy(), lambda w: w.numpy()[:, 7], lambda w: w.view(-1)]
        if step == 5:
            thing, views = torch.empty(0).set_(thing).view(-1), [*views, lambda w: w.view(-1)]
        torch.testing.assert_close(torch.as_tensor(thing), torch.as_tensor(views[step](want)), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------
# Twice differentiable
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", softcap_is_thorough(OPTIONS + EXTRAS))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_penalty(reduction, option):
    """Double backward is there: its values are PyTorch's, with respect to the logits and to grad_output."""
    for shape in SHAPES:
        case = make_case(torch.float64, shape, option)
        results = []
        for function in (cross_entropy, torch_loss):
            x = leaf(case)
            loss = loss_of(function, case, x, reduction)
            g = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape).requires_grad_()
            (first,) = grad(loss, x, g, create_graph=True)
            assert first.requires_grad
            (loss.sum() + first.square().sum()).backward()
            results.append((first.detach(), x.grad, g.grad))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_gradient_penalty_where_grad_output_is_a_plain_1():
    """`create_graph=True` with no grad_output given: no gradient must be dropped on the way (once_differentiable drops it)."""
    case = make_case(torch.float64, (5, 3))
    x = leaf(case)
    (first,) = grad(loss_of(cross_entropy, case, x), x, create_graph=True)
    (second,) = grad(first.square().sum(), x)
    want = torch.autograd.functional.hessian(lambda v: F.cross_entropy(v, case.target), case.logits)
    assert_close(second, 2 * torch.einsum("ij,ijkl->kl", first.detach(), want))
    assert second.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradient_penalty_in_other_dtypes(dtype):
    case = make_case(dtype, (5, 3), "weight")
    x, wide = leaf(case), case.logits.double().requires_grad_()
    penalties = []
    for function, v in ((cross_entropy, x), (F.cross_entropy, wide)):
        (first,) = grad(function(v, case.target, case.options["weight"].to(v.dtype)), v, create_graph=True)
        penalties.append(grad(first.square().sum(), v)[0])
    assert penalties[0].dtype == dtype
    torch.testing.assert_close(penalties[0].double(), penalties[1], rtol=8 * CLOSE[dtype], atol=CLOSE[dtype])


def test_third_derivative():
    case = make_case(torch.float64, (4, 3))
    results = []
    for function in (cross_entropy, F.cross_entropy):
        x = leaf(case)
        (g,) = grad(loss_of(function, case, x, "sum"), x, create_graph=True)
        (h,) = grad(g.pow(3).sum(), x, create_graph=True)
        results.append(grad(h.square().sum(), x)[0])
    assert_close(*results)


# ----------------------------------------------------------------------------------------------------
# Targets and weights that are trained
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [o for o in OPTIONS + EXTRAS if "probabilities" in o])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", ["target", "both"])
def test_probabilities_are_differentiable(wanted, reduction, option):
    for shape in SHAPES:
        case = make_case(torch.float64, shape, option)
        results = []
        for function in (cross_entropy, torch_loss):
            x, t = case.logits.clone().requires_grad_(wanted == "both"), case.target.clone().requires_grad_()
            loss = function(x, t, reduction=reduction, **case.options)
            g = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
            results.append(grad(loss, [x, t] if wanted == "both" else [t], g))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_weight_of_probabilities_is_differentiable():
    """PyTorch refuses it for class indices only."""
    case = make_case(torch.float64, (5, 3), "probabilities weight smoothing")
    results = []
    for function in (cross_entropy, F.cross_entropy):
        x, w = leaf(case), case.options["weight"].clone().requires_grad_()
        results.append(grad(function(x, case.target, w, label_smoothing=0.1), [x, w]))
    assert_close(*results)


@pytest.mark.parametrize("option", ["index", "ignore weight", "probabilities", "z_loss softcap"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sample_weight_is_differentiable(reduction, option):
    """Learned weights of samples; for the mean, through its divisor too."""
    case = make_case(torch.float64, (5, 3), option)
    results = []
    for function in (cross_entropy, torch_loss):
        x, u = leaf(case), torch.linspace(0.5, 2, 5, dtype=torch.float64).requires_grad_()
        loss = loss_of(function, case, x, reduction, sample_weight=u)
        results.append(grad(loss, [x, u], torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)))
    assert_close(*results)


# ----------------------------------------------------------------------------------------------------
# Modes
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["index", "smoothing", "probabilities", EXTRAS[-3]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_work_where_none_is_wanted(mode, reduction, option):
    case = make_case(torch.float32, (5, 60), option)
    with counted() as kernels, mode():
        loss = loss_of(cross_entropy, case, leaf(case), reduction)
        plain = loss_of(cross_entropy, case, case.logits.clone(), reduction)
    assert not loss.requires_grad and torch.equal(loss, plain)
    assert "value" in kernels and not [k for k in kernels if "grad" in k]
    with counted() as kernels:
        loss = loss_of(cross_entropy, case, case.logits, reduction)
    assert not loss.requires_grad and not [k for k in kernels if "grad" in k]
    assert_close(loss, loss_of(torch_loss, case, case.logits, reduction), torch.float32)


def test_one_kernel_a_step():
    """One trip through memory for loss and gradient; the backward of a mean or a sum runs nothing."""
    case = make_case(torch.float32, (5, 60))
    for reduction in ("mean", "sum"):
        with counted() as kernels:
            loss = loss_of(cross_entropy, case, leaf(case), reduction)
            loss.backward()
        assert kernels == ["value_and_grad"]


def test_no_grad_for_the_logits_alone():
    """A detached input of a graph that needs gradients elsewhere."""
    case, scale = make_case(torch.float32, (5, 3)), torch.ones((), requires_grad=True)
    (loss_of(cross_entropy, case, case.logits) * scale).backward()
    assert_close(scale.grad, loss_of(F.cross_entropy, case, case.logits), torch.float32)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["index", "weight smoothing", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction, option, dtype, low):
    """As PyTorch: cross-entropy runs in float32, the loss is float32, the gradient has the dtype of the logits."""
    case = make_case(dtype, (5, 60), option)
    if "weight" in case.options and dtype != torch.float64:
        case = case._replace(options=case.options | dict(weight=case.options["weight"].float()))
    results = []
    for function in (cross_entropy, F.cross_entropy):
        x = leaf(case)
        with torch.autocast("cpu", dtype=low):
            loss = loss_of(function, case, x, reduction)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    assert results[0][0].dtype == results[1][0].dtype == torch.promote_types(dtype, torch.float32)
    assert results[0][1].dtype == dtype
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=CLOSE[got.dtype], atol=CLOSE[got.dtype])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_a_model(low):
    torch.manual_seed(0)
    model, inputs, target = torch.nn.Linear(20, 60), torch.randn(9, 20), torch.arange(9)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        model.zero_grad()
        with torch.autocast("cpu", dtype=low):
            logits = model(inputs)
            assert logits.dtype == low
            loss = function(logits, target)
        loss.backward()
        results.append((loss.detach(), model.weight.grad.clone()))
    torch.testing.assert_close(*results, rtol=2e-2, atol=1e-3)
    assert_close(results[0][0], results[1][0], torch.float32)
