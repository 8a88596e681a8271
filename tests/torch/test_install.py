"""`install`: every cross-entropy of the process, whoever calls it and by whatever name; `uninstall`: not a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import cross_entropy as imported_by_name
from torch.utils.checkpoint import checkpoint

import fastxent.torch as fxt
from tests.helpers.cases import REDUCTIONS
from tests.helpers.launches import counted
from tests.helpers.opponent import loss_and_grad
from tests.helpers.processes import run_script
from tests.helpers.torch_cases import DTYPES, OPTIONS, make_case

# Of PyTorch's own forward mode and compiler, about their own code.
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

ATEN = torch.ops.aten.cross_entropy_loss


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Each test ends with what it began with: the dispatcher's own account of the operator, word by word."""
    before, function = torch._C._dispatch_dump("aten::cross_entropy_loss"), F.cross_entropy
    tag = torch.compiler.config.cache_key_tag
    yield
    assert torch.compiler.config.cache_key_tag == tag
    assert torch._C._dispatch_dump("aten::cross_entropy_loss") == before
    assert F.cross_entropy is function is imported_by_name
    torch._dynamo.reset()


def ran(call: Callable[[], object]) -> bool:
    """Does `call` reach a kernel of ours?"""
    with counted() as kernels:
        call()
    return bool({"value", "value_and_grad"} & set(kernels))


X, Y = torch.linspace(-3, 3, 20, dtype=torch.float64).reshape(4, 5), torch.tensor([0, 4, 2, 2])

CALLERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.cross_entropy": lambda x, y: F.cross_entropy(x, y),
    "imported by name": imported_by_name,
    "nn.CrossEntropyLoss": nn.CrossEntropyLoss(),
    "torch.ops.aten": lambda x, y: ATEN(x, y),
    "torch._C._nn": lambda x, y: torch._C._nn.cross_entropy_loss(x, y, None, 1, -100, 0.0),
    "keywords": lambda x, y: F.cross_entropy(target=y, input=x, reduction="mean", weight=None),
    "a partial": __import__("functools").partial(F.cross_entropy, reduction="mean"),
    "TorchScript": lambda x, y: torch.jit.script(by_annotation)(x, y),
    "torch.compile": lambda x, y: torch.compile(by_annotation, backend="aot_eager", fullgraph=True)(x, y),
    "fastxent.torch": fxt.cross_entropy,
}


def by_annotation(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y)


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
@pytest.mark.parametrize("wanted", [False, True])
def test_everyone_is_reached(caller, wanted):
    results = []
    for inside in (False, True):
        x = X.clone().requires_grad_(wanted)
        with fxt.installed() if inside else torch.enable_grad(), counted() as kernels:
            loss = caller(x, Y)
            if wanted:
                loss.backward()
        results.append((loss.detach(), x.grad))
        assert bool(kernels) == (inside or caller is fxt.cross_entropy)
        assert {"value_and_grad" if wanted else "value"} <= set(kernels) or not kernels
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)
    assert caller is fxt.cross_entropy or not ran(lambda: caller(X, Y))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_those_of_our_function(dtype, option):
    for shape in [(7,), (5, 60), (2, 3, 4)]:
        case = make_case(dtype, shape, option)
        for reduction in REDUCTIONS:
            want = loss_and_grad(fxt.cross_entropy, case, reduction)
            with fxt.installed():
                got = loss_and_grad(F.cross_entropy, case, reduction)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_all_integer_dtypes_and_clean_ignored_rows_come_with_it():
    x, y = X.clone(), Y.int()
    x[1], y[1] = float("nan"), -100
    with fxt.installed():
        x.requires_grad_()
        F.cross_entropy(x, y).backward()
    assert x.grad.isfinite().all() and not x.grad[1].any() and x.grad[0].any()


@pytest.mark.filterwarnings("ignore:size_average and reduce args")  # PyTorch's own warning about its own arguments
def test_legacy_arguments():
    with fxt.installed():
        assert ran(lambda: F.cross_entropy(X, Y, size_average=False))
        got = F.cross_entropy(X, Y, None, False, 4)
    torch.testing.assert_close(got, F.cross_entropy(X, Y, None, False, 4), rtol=1e-13, atol=0)


# ----------------------------------------------------------------------------------------------------
# Undoing
# ----------------------------------------------------------------------------------------------------


def stock() -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    return F.cross_entropy(x, Y).detach(), torch.autograd.grad(F.cross_entropy(x, Y, label_smoothing=0.1), x)[0]


def test_undo_gives_the_same_bits_as_before():
    before = stock()
    fxt.install()
    fxt.uninstall()
    assert not ran(stock)
    assert all(torch.equal(a, b) for a, b in zip(before, stock(), strict=True))


def test_a_graph_made_before_is_finished_after():
    """The nodes of autograd are what they were when they were made."""
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    theirs = F.cross_entropy(x, Y)
    with fxt.installed():
        ours = F.cross_entropy(z, Y)
        assert not ran(theirs.backward)
    ours.backward()
    torch.testing.assert_close(z.grad, x.grad, rtol=1e-13, atol=1e-15)


def test_nesting():
    call = lambda: F.cross_entropy(X, Y)  # noqa: E731
    with fxt.installed():
        with fxt.installed():
            assert ran(call)
        assert ran(call)
    assert not ran(call)
    fxt.install()
    fxt.install()
    with fxt.installed():
        pass
    assert ran(call)
    fxt.uninstall()
    assert not ran(call)
    fxt.uninstall()
    fxt.uninstall()
    with fxt.installed():
        assert ran(call)
    assert not ran(call)


def test_an_error_inside_undoes_too():
    with pytest.raises(ZeroDivisionError), fxt.installed():
        raise ZeroDivisionError
    assert not ran(lambda: F.cross_entropy(X, Y))


def test_again_and_again():
    for _ in range(20):
        with fxt.installed():
            assert ran(lambda: F.cross_entropy(X, Y))


def test_other_threads_see_it():
    seen = []
    with fxt.installed():
        thread = threading.Thread(target=lambda: seen.append(ran(lambda: F.cross_entropy(X, Y))))
        thread.start()
        thread.join()
    assert seen == [True]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_follows(backend):
    """Code compiled before, during and after: each call goes where it should go when it is made.

    Inductor keeps its code on disk, under a key that does not know what `install` has changed by itself.
    """
    function = torch.compile(by_annotation, backend=backend, fullgraph=True)
    want = by_annotation(X, Y)
    for inside in (False, True, False, True):
        with fxt.installed() if inside else torch.enable_grad():
            assert ran(lambda: torch.testing.assert_close(function(X, Y), want, rtol=1e-13, atol=0)) == inside


# ----------------------------------------------------------------------------------------------------
# Everything that autograd does, through F.cross_entropy
# ----------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Callable, Tensor, Tensor], object]] = {
    "no_grad": lambda f, x, y: torch.no_grad()(f)(x, y),
    "inference_mode": lambda f, x, y: torch.inference_mode()(f)(x, y).clone(),
    "double backward": lambda f, x, y: penalty(f, x, y),
    "forward mode": lambda f, x, y: tangent(f, x, y),
    "grad": lambda f, x, y: torch.func.grad(f)(x, y),
    "hessian": lambda f, x, y: torch.func.hessian(f)(x, y),
    "jacfwd": lambda f, x, y: torch.func.jacfwd(f)(x, y),
    "vmap": lambda f, x, y: torch.vmap(f)(x, y),
    "vmap of grad": lambda f, x, y: torch.vmap(torch.func.grad(f))(x, y),
    "jacobian": lambda f, x, y: torch.autograd.functional.jacobian(lambda v: f(v, y, reduction="none"), x, vectorize=True),
    "checkpoint": lambda f, x, y: backward(lambda v, t: checkpoint(f, v, t, use_reentrant=False), x, y),
    "reentrant checkpoint": lambda f, x, y: backward(lambda v, t: checkpoint(f, v, t, use_reentrant=True), x, y),
    "autocast": lambda f, x, y: backward(torch.autocast("cpu", dtype=torch.bfloat16)(f), x.float(), y),
    "autocast of bfloat16": lambda f, x, y: backward(torch.autocast("cpu", dtype=torch.bfloat16)(f), x.bfloat16(), y),
    "trained probabilities": lambda f, x, y: backward(lambda t, _: f(x, t), x.softmax(1), y),
    "weights": lambda f, x, y: backward(lambda v, t: f(v, t, x[0].abs(), label_smoothing=0.2), x, y),
    "none": lambda f, x, y: backward(lambda v, t: f(v, t, reduction="none") @ x[:, 0], x, y),
    "export": lambda f, x, y: exported(f)(x, y),
}


def backward(f, x, y):
    x = x.detach().clone().requires_grad_()
    loss = f(x, y)
    loss.backward()
    return loss.detach(), x.grad


def penalty(f, x, y):
    x = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x, y), x, create_graph=True)
    return torch.autograd.grad((g**3).sum(), x)


def tangent(f, x, y):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.cos(x)), y)).tangent


def exported(f):
    class Module(nn.Module):
        def forward(self, x, y):
            return f(x, y)

    return torch.export.export(Module(), (X, Y)).module()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_uses(use):
    want = use(F.cross_entropy, X, Y)
    with fxt.installed():
        got = use(F.cross_entropy, X, Y)
    if isinstance(want, tuple) and want[0].dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-2 if want[1].dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


# ----------------------------------------------------------------------------------------------------
# What is not ours
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [F.cross_entropy, fxt.cross_entropy])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_meta_tensors_fall_through(reduction, function):
    x, y = X.to("meta").requires_grad_(), Y.to("meta")
    with fxt.installed():
        assert not ran(lambda: function(x, y, reduction=reduction))
        loss = function(x, y, reduction=reduction)
        loss.sum().backward()
    assert loss.device.type == x.grad.device.type == "meta"
    assert loss.shape == F.cross_entropy(X, Y, reduction=reduction).shape and x.grad.shape == X.shape


def test_other_losses_are_untouched():
    """nll_loss, log_softmax and the linear cross-entropy have their own operators, or reach us through ours."""
    linear = torch.ones(5, 5, dtype=torch.float64).tril()
    calls = [
        lambda: F.nll_loss(X, Y),
        lambda: F.log_softmax(X, 1),
        lambda: F.binary_cross_entropy_with_logits(X, X.sigmoid()),
        lambda: F.linear_cross_entropy(X, linear, Y),
    ]
    want = [f() for f in calls]
    with fxt.installed():
        for f, w in zip(calls, want, strict=True):
            torch.testing.assert_close(f(), w, rtol=1e-13, atol=1e-15)


CRASHED = """
import torch, fastxent.torch as fxt, torch.nn.functional as F
from torch.testing._internal.two_tensor import TwoTensor
x, y = torch.randn(5, 60, dtype=torch.float64), torch.arange(5)
def run(function):
    for a in (TwoTensor(x, x * 2), TwoTensor(x, x * 2).requires_grad_()):
        for reduction in ("mean", "none"):
            loss = function(a, TwoTensor(y, y), reduction=reduction)
            torch.testing.assert_close(loss.a, F.cross_entropy(x, y, reduction=reduction))
            torch.testing.assert_close(loss.b, F.cross_entropy(x * 2, y, reduction=reduction))
            if a.requires_grad:
                loss.sum().backward()
                assert type(a.grad) is TwoTensor
run(fxt.cross_entropy)
with fxt.installed():
    run(F.cross_entropy)
print("well")
"""


@pytest.mark.thorough
def test_a_tensor_made_of_tensors_is_not_read_as_memory():
    """Its data pointer is 0. In a process of its own, which a mistake would end."""
    pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
    assert run_script(CRASHED) == "well"


ZERO = """
import torch, fastxent.torch as fxt, torch.nn.functional as F
zero, x, y = torch._efficientzerotensor((5, 60)), torch.randn(5, 60), torch.arange(5)
for _ in range(2):
    torch.testing.assert_close(fxt.cross_entropy(zero, y), F.cross_entropy(torch.zeros(5, 60), y))
    torch.testing.assert_close(fxt.cross_entropy(x, zero), F.cross_entropy(x, torch.zeros(5, 60)))
    fxt.cross_entropy(x, y)  # from now on a call that looks like this one is known
    zeros = torch._efficientzerotensor((5,), dtype=torch.int64)
    torch.testing.assert_close(fxt.cross_entropy(x, zeros), F.cross_entropy(x, torch.zeros_like(y)))
torch.testing.assert_close(fxt.cross_entropy(x, y, sample_weight=zero[:, 0], reduction="none"), torch.zeros(5))
for dtype in (torch.float32, torch.float64):
    a, zeros = x.to(dtype).requires_grad_(), torch._efficientzerotensor((5,), dtype=dtype)
    (grad,) = torch.autograd.grad(fxt.cross_entropy(a, y, reduction="none"), a, zeros)
    assert not grad.any()
print("well")
"""


@pytest.mark.thorough
def test_zero_tensors_are_not_read_as_memory():
    """What autograd uses for zeros that nobody has to store: no memory either."""
    assert run_script(ZERO) == "well"


STAND_INS = """
import torch, fastxent.torch as fxt, torch.nn.functional as F
x, y, left = torch.randn(5, 60), torch.arange(5), []
torch.func.grad(lambda a: (left.append(a), a.sum())[1])(x)
(after_grad,) = left
for _ in range(2):
    functional = fxt.cross_entropy(torch._to_functional_tensor(x), torch._to_functional_tensor(y))
    torch._sync(functional)
    torch.testing.assert_close(torch._from_functional_tensor(functional), F.cross_entropy(x, y))
    torch.testing.assert_close(fxt.cross_entropy(after_grad, y).item(), F.cross_entropy(x, y).item())
    torch.testing.assert_close(fxt.cross_entropy(x, y), F.cross_entropy(x, y))  # from now on it is known
print("well")
"""


def test_what_stands_for_another_tensor_is_not_read_as_memory():
    """Functional tensors outside tracing, and what a transform of torch.func left behind."""
    assert run_script(STAND_INS) == "well"


def test_views_that_stand_for_negatives():
    """The imaginary part of a conjugate is a real tensor with a flag: its memory holds the opposite."""
    z = torch.complex(X, X * 2).conj()
    x, t = z.imag, torch.complex(X.softmax(1), -X.softmax(1)).conj().imag
    assert x.is_neg() and t.is_neg()
    torch.testing.assert_close(fxt.cross_entropy(x, Y), F.cross_entropy(x.resolve_neg(), Y), rtol=1e-13, atol=0)
    torch.testing.assert_close(fxt.cross_entropy(X, t), F.cross_entropy(X, t.resolve_neg()), rtol=1e-13, atol=0)
    w = torch.complex(X[0], -X[0].abs()).conj().imag
    torch.testing.assert_close(fxt.cross_entropy(X, Y, w), F.cross_entropy(X, Y, w.resolve_neg()), rtol=1e-13, atol=0)
    rows = fxt.cross_entropy(X, Y, sample_weight=w[:4], reduction="none")
    torch.testing.assert_close(rows, F.cross_entropy(X, Y, reduction="none") * w[:4], rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", ["sparse", "weight on meta", "target on meta"])
def test_refused_as_before(kind):
    x, y, w = X, Y, None
    if kind == "sparse":
        x = X.to_sparse()
    elif kind == "weight on meta":
        w = torch.ones(5, dtype=torch.float64, device="meta")
    else:
        y = Y.to("meta")
    with pytest.raises(Exception) as before:  # which one it must be, PyTorch says
        F.cross_entropy(x, y, w)
    for function in (fxt.cross_entropy, F.cross_entropy):
        with fxt.installed(), pytest.raises(before.type):
            function(x, y, w)
