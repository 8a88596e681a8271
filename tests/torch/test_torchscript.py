"""TorchScript and the loss: what is scripted or traced is made of PyTorch's operators, and can be loaded without us."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastxent.torch as ft

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is not supported in Python 3.14:DeprecationWarning"),
]

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 1])
WEIGHT = torch.linspace(0.5, 2, 5)
OPTIONS = [{}, {"weight": WEIGHT, "label_smoothing": 0.1}, {"reduction": "none"}, {"reduction": "sum", "ignore_index": 1}]
OURS = [{"z_loss": 0.1}, {"softcap": 3.0}, {"z_loss": 0.1, "softcap": 3.0, "weight": WEIGHT, "reduction": "none"}]


@pytest.fixture(params=[False, True], ids=["", "install"])
def installed(request):
    if not request.param:
        yield
        return
    with ft.installed():
        yield


class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.linear, self.loss = nn.Linear(5, 5), loss


class Holds(Model):
    def forward(self, x):
        return self.linear(x)


class Computes(Model):
    def forward(self, x, y):
        return self.loss(self.linear(x), y)


def saved_and_loaded(scripted):
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def step(loss, x=X):
    x = x.clone().requires_grad_()
    made = loss(x, Y)
    return made.detach(), torch.autograd.grad(made.sum(), x)[0]


@pytest.mark.parametrize("options", [*OPTIONS, *OURS, {"inplace": True}], ids=str)
def test_script_of_a_model_that_holds_it(options, installed):
    model = Holds(ft.CrossEntropyLoss(**options))
    scripted = saved_and_loaded(torch.jit.script(model))
    torch.testing.assert_close(scripted(X), model(X))
    assert type(model.loss) is ft.CrossEntropyLoss


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("warm", [False, True])
def test_script(options, warm, installed):
    ours, theirs = ft.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    for _ in range(3 if warm else 0):
        step(ours)
    scripted = torch.jit.script(ours)
    for made in (scripted, saved_and_loaded(scripted)):
        for _ in range(3):  # TorchScript changes what it runs
            torch.testing.assert_close(step(made), step(theirs))
    model = Computes(ours)
    torch.testing.assert_close(torch.jit.script(model)(X, Y), theirs(model.linear(X), Y))


@pytest.mark.parametrize("options", OURS, ids=str)
def test_script_with_options_that_it_has_not(options):
    scripted = torch.jit.script(ft.CrossEntropyLoss(**options))
    with pytest.raises(torch.jit.Error, match="CrossEntropyLoss: TorchScript has no z_loss and no softcap"):
        scripted(X, Y)


def test_script_of_the_function_is_refused_in_one_sentence():
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments with defaults"):
        torch.jit.script(ft.cross_entropy)


@pytest.mark.parametrize("options", [*OPTIONS, *OURS], ids=str)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_trace(options, warm, dtype, installed):
    options = {name: value.to(dtype) if name == "weight" else value for name, value in options.items()}
    ours, x, other = ft.CrossEntropyLoss(**options), X.to(dtype), X.flip(0).to(dtype)
    for _ in range(3 if warm else 0):
        step(ours, x)
    traced = torch.jit.trace(ours, (x, Y), check_trace=dtype != torch.bfloat16)  # PyTorch's is not so exact as ours
    assert "fastxent::" not in str(traced.inlined_graph)
    traced = saved_and_loaded(traced)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(step(traced, other), step(ours, other), **tolerance)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the shape of the weights is looked at
def test_trace_of_a_function_with_sample_weights():
    u = torch.rand(6)
    traced = torch.jit.trace(lambda x, y, u: ft.cross_entropy(x, y, sample_weight=u), (X, Y, u))
    torch.testing.assert_close(traced(2 * X, Y, u.flip(0)), ft.cross_entropy(2 * X, Y, sample_weight=u.flip(0)))


def test_trace_of_a_backward():
    """The node of eager mode was there before. (PyTorch's own cannot be traced so.)"""
    x = X.clone().requires_grad_()
    loss = ft.cross_entropy(x, Y)
    traced = torch.jit.trace(lambda g: torch.autograd.grad(loss, x, g, retain_graph=True)[0], (torch.tensor(1.0),))
    (want,) = torch.autograd.grad(3 * F.cross_entropy(x, Y), x)
    torch.testing.assert_close(traced(torch.tensor(3.0)), want)


def test_what_was_traced_runs_without_us(tmp_path):
    path = tmp_path / "traced.pt"
    torch.jit.save(torch.jit.trace(ft.CrossEntropyLoss(z_loss=0.1), (X, Y)), path)
    code = """if True:
        import sys, torch
        torch.jit.load(sys.argv[1])(torch.zeros(6, 5), torch.zeros(6).long())
        assert "fastxent" not in sys.modules"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], check=True)


@pytest.mark.parametrize("options", [*OPTIONS, *OURS], ids=str)
def test_copies_of_the_module(options):
    loss = ft.CrossEntropyLoss(**options)
    torch.jit.script(loss)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(other) is ft.CrossEntropyLoss
        torch.testing.assert_close(step(other), step(loss))
