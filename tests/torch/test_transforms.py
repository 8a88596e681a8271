"""gradcheck, forward-mode AD and torch.func: the derivative of the derivative of a batch of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from fastxent.torch import CrossEntropyLoss, cross_entropy
from tests.helpers.cases import REDUCTIONS, softcap_is_thorough
from tests.helpers.opponent import torch_loss
from tests.helpers.torch_cases import EXTRAS, OPTIONS, make_case

# PyTorch's forward mode scripts its own decompositions when it is first used.
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

SHAPES = [(4,), (3, 5), (3, 50), (2, 3, 2)]
FULL = "weight ignore smoothing sample_weight z_loss softcap"
CHECKED = ["index", "weight ignore", "smoothing", "probabilities", FULL, EXTRAS[-1]]
double = torch.float64


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def pair(option: str, shape: tuple[int, ...], reduction: str):
    """The case, and ours and PyTorch's loss as functions of the logits alone."""
    case = make_case(double, shape, option)
    return case, *(lambda x, f=f: f(x, case.target, reduction=reduction, **case.options) for f in (cross_entropy, torch_loss))


# ----------------------------------------------------------------------------------------------------
# Numerically
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", softcap_is_thorough(CHECKED))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, option):
    for shape in [(4,), (3, 5), (2, 3, 2)]:
        case, ours, _ = pair(option, shape, reduction)
        x = case.logits.requires_grad_()
        assert gradcheck(
            ours,
            x,
            check_forward_ad=True,
            check_backward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
            check_grad_dtypes=True,
        )


@pytest.mark.parametrize("option", softcap_is_thorough(CHECKED))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradgradcheck(reduction, option):
    for shape in [(4,), (3, 5), (2, 3, 2)]:
        case, ours, _ = pair(option, shape, reduction)
        x = case.logits.requires_grad_()
        assert gradgradcheck(ours, x, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_with_respect_to_probabilities_and_weights(reduction):
    case = make_case(double, (3, 4), "probabilities")
    w, u = torch.rand(4, dtype=double) + 0.5, torch.rand(3, dtype=double) + 0.5

    def loss(x, t, w, u):
        return cross_entropy(x, t, w, reduction=reduction, label_smoothing=0.2, sample_weight=u, z_loss=0.1, softcap=4.0)

    inputs = [t.requires_grad_() for t in (case.logits, case.target, w, u)]
    assert gradcheck(loss, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, inputs, check_fwd_over_rev=True)


# ----------------------------------------------------------------------------------------------------
# Forward mode
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", softcap_is_thorough(OPTIONS + EXTRAS))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dual_numbers(reduction, option):
    for shape in SHAPES:
        case, ours, theirs = pair(option, shape, reduction)
        tangent = torch.linspace(-1, 1, case.logits.numel(), dtype=double).reshape(shape)
        results = []
        for function in (ours, theirs):
            with forward_ad.dual_level():
                out = forward_ad.unpack_dual(function(forward_ad.make_dual(case.logits, tangent)))
                results.append((out.primal.clone(), out.tangent.clone()))
        close(*results)


def test_tangent_of_what_comes_back():
    """The gradient has a tangent, and holds no graph unless one is asked for."""
    case = make_case(double, (3, 5))
    results = []
    for function in (cross_entropy, F.cross_entropy):
        leaf = case.logits.clone().requires_grad_()
        loss = function(leaf, case.target, reduction="none")
        with forward_ad.dual_level():
            ones = torch.ones(3, dtype=double)
            (grad,) = torch.autograd.grad(loss, leaf, forward_ad.make_dual(ones, 2 * ones))
            assert not grad.requires_grad
            results.append((grad.detach().clone(), forward_ad.unpack_dual(grad).tangent.clone()))
    close(*results)


def test_tangent_of_the_probabilities():
    case = make_case(double, (3, 5), "probabilities")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(case.target, torch.ones_like(case.target))
        results = [forward_ad.unpack_dual(f(case.logits, dual)).tangent for f in (cross_entropy, F.cross_entropy)]
        close(*results)


def test_no_tangent_no_formula():
    """A dual level that is open elsewhere changes nothing."""
    case = make_case(double, (3, 5))
    with forward_ad.dual_level():
        x = case.logits.clone().requires_grad_()
        cross_entropy(x, case.target).backward()
    close(x.grad, torch.func.grad(F.cross_entropy)(case.logits, case.target))


# ----------------------------------------------------------------------------------------------------
# torch.func
# ----------------------------------------------------------------------------------------------------

SCALES = torch.linspace(0.5, 2, 3, dtype=double)
TRANSFORMS = {
    "grad": lambda f: grad(lambda x: f(x).sum()),
    "grad_and_value": lambda f: grad_and_value(lambda x: f(x).sum()),
    "grad of grad": lambda f: grad(lambda x: grad(lambda v: f(v).sum())(x).square().sum()),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(lambda x: f(x).sum()),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "vjp": lambda f: lambda x: (v := vjp(f, x))[1](torch.linspace(1, 2, v[0].numel(), dtype=double).reshape(v[0].shape)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (torch.cos(x),)),
    "linearize": lambda f: lambda x: linearize(f, x)[1](torch.cos(x)),
    "vmap over scales": lambda f: lambda x: vmap(lambda k: f(x * k))(SCALES),
    "vmap of grad over scales": lambda f: lambda x: vmap(grad(lambda v, k: f(v * k).sum()), in_dims=(None, 0))(x, SCALES),
    "vmap of vmap": lambda f: lambda x: vmap(vmap(lambda k, s: f(x * k + s), (None, 0)), (0, None))(SCALES[:2], SCALES),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch.func.linearize, of its own graph
@pytest.mark.parametrize("option", softcap_is_thorough(["index", "probabilities", FULL]))
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_transforms(reduction, transform, option):
    for shape in [(4,), (3, 5), (2, 3, 2)]:
        case, ours, theirs = pair(option, shape, reduction)
        close(transform(ours)(case.logits), transform(theirs)(case.logits))


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (None, 0), (0, None), (2, 1)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap_over_logits_and_target(reduction, in_dims):
    """Any axis of either may be the batch."""
    x, target = make_case(double, (3, 4, 6)).logits, torch.arange(18).reshape(3, 6) % 4
    if in_dims == (0, None):
        target = target[0]
        x = x.movedim(2, 1)  # 3 times (6, 4)
    elif in_dims == (None, 0):
        x = x[0].T  # (6, 4) for each of 3 targets
    elif in_dims == (1, 0):
        x, target = x.permute(2, 0, 1), target  # (6, 3, 4), mapped over the 3
    elif in_dims == (0, 0):
        x = x.movedim(2, 1)
    else:
        target = target[:, :, None].expand(3, 6, 6).permute(0, 2, 1)[..., 0][:, :6]
        x = x.movedim(1, 1)  # (3, 4, 6) mapped over the 6: (3, 4) against (3,)

    def run(f):
        return vmap(lambda a, b: f(a, b, reduction=reduction), in_dims)(x, target)

    close(run(cross_entropy), run(F.cross_entropy))


def test_vmap_per_sample_gradients_of_a_model():
    """The per-sample gradients of differential privacy."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    inputs, target = torch.randn(7, 6, dtype=double), torch.arange(7) % 5
    results = []
    for f in (cross_entropy, F.cross_entropy, CrossEntropyLoss(), torch.nn.CrossEntropyLoss()):
        loss = lambda p, a, b, f=f: f(functional_call(model, p, (a[None],)), b[None])  # noqa: E731
        results.append(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, target))
    close(results[0], results[1])
    close(results[2], results[3])


@pytest.mark.parametrize("option", ["index", "weight ignore", "smoothing"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap_of_single_rows(reduction, option):
    """Inside, the logits are (C,) and the target is a number."""
    case = make_case(double, (6, 4), option)
    run = [vmap(lambda a, b, f=f: f(a, b, reduction=reduction, **case.options)) for f in (cross_entropy, F.cross_entropy)]
    torch.testing.assert_close(*(f(case.logits, case.target) for f in run), rtol=1e-10, atol=1e-11, equal_nan=True)

    def slope(f):
        return vmap(grad(lambda a, b: f(a, b, reduction=reduction, **case.options).sum()))(case.logits, case.target)

    close(slope(cross_entropy), slope(F.cross_entropy))


def test_vmap_with_per_sample_weights_and_reductions():
    case, u = make_case(double, (3, 4, 5)), torch.rand(3, 5, dtype=double)
    x = case.logits.movedim(2, 1)
    for reduction in REDUCTIONS:
        got = vmap(lambda a, b, c, r=reduction: cross_entropy(a, b, sample_weight=c, reduction=r))(x, case.target, u)
        want = [torch_loss(a, b, reduction, sample_weight=c) for a, b, c in zip(x, case.target, u, strict=True)]
        close(got, torch.stack(want))


@pytest.mark.parametrize("randomness", ["same"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap_of_ignored_rows(reduction, randomness):
    x, target = make_case(double, (2, 3, 4)).logits, torch.tensor([[0, -100, 2], [-100, -100, 3]])

    def run(f):
        return vmap(lambda a, b: f(a, b, reduction=reduction), randomness=randomness)(x, target)

    close(run(cross_entropy), run(F.cross_entropy))
    close(*(vmap(grad(lambda a, b, f=f: f(a, b, reduction="sum")))(x, target) for f in (cross_entropy, F.cross_entropy)))


def test_inner_gradient_inside_an_outer_graph():
    """MAML: a step of gradient descent on one loss, differentiated through by another."""
    inner, outer = make_case(double, (5, 4)), make_case(double, (6, 4))
    results = []
    for f in (cross_entropy, F.cross_entropy):
        w = torch.eye(4, dtype=double, requires_grad=True)
        (step,) = torch.autograd.grad(f(inner.logits @ w, inner.target), w, create_graph=True)
        f(outer.logits @ (w - 0.5 * step), outer.target).backward()
        results.append(w.grad)
    close(*results)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autograd_functional_and_batched_gradients(reduction):
    case, ours, theirs = pair("weight", (3, 5), reduction)
    for vectorize in (False, True):
        close(*(torch.autograd.functional.jacobian(f, case.logits, vectorize=vectorize) for f in (ours, theirs)))
        sums = [lambda x, f=f: f(x).sum() for f in (ours, theirs)]
        close(*(torch.autograd.functional.hessian(f, case.logits, vectorize=vectorize) for f in sums))
    results = []
    for f in (ours, theirs):
        x = case.logits.clone().requires_grad_()
        loss = f(x)
        many = torch.linspace(-1, 1, 4 * loss.numel(), dtype=double).reshape(4, *loss.shape)
        results.append(torch.autograd.grad(loss, x, many, is_grads_batched=True))
    close(*results)
