"""Calls that were met before, under tracers: they see ours, forward and backward, and results are right."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo  # first, or PyTorch's modes are imported in a circle
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastxent.torch as ft
from tests.helpers.watched import REDUCTIONS, X, Y, agree, step, warm

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(loss, tracing_mode, pre_dispatch, reduction):
    warm(loss, reduction)
    how = {"tracing_mode": tracing_mode, "pre_dispatch": pre_dispatch}
    traced = make_fx(lambda x, y: loss(x, y, reduction=reduction), **how)(X, Y)
    assert "cross_entropy" in traced.code
    torch.testing.assert_close(traced(X.flip(0), Y), loss(X.flip(0), Y, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_of_a_step(reduction, pre_dispatch):
    want = warm(ft.cross_entropy, reduction)
    traced = make_fx(lambda x: step(ft.cross_entropy, x, reduction), pre_dispatch=pre_dispatch)(torch.zeros(6, 5))
    agree(traced(X), want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_of_a_backward_alone(loss, reduction, pre_dispatch):
    want = warm(loss, reduction)
    x = X.clone().requires_grad_()
    made = loss(x, Y, reduction=reduction)
    traced = make_fx(lambda g: torch.autograd.grad(made, x, g, retain_graph=True), pre_dispatch=pre_dispatch)(
        torch.ones(made.shape)
    )
    agree(traced(torch.full(made.shape, 2.0)), want[1:])


def test_aot_function(loss):
    from torch._functorch.aot_autograd import aot_function, make_boxed_func

    want = warm(loss)
    graphs = []

    def compiler(graph, _):
        graphs.append(graph.code)
        return make_boxed_func(graph)

    compiled = aot_function(lambda x, y: loss(x, y), compiler, compiler)
    x = X.clone().requires_grad_()
    made = compiled(x, Y)
    agree([made, torch.autograd.grad(made, x, torch.tensor(2.0))[0]], want)
    assert "fastxent.cross_entropy" in graphs[0]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    warm(ft.cross_entropy)
    program = torch.export.export(ft.CrossEntropyLoss(), (X, Y), strict=strict)
    assert "fastxent.cross_entropy" in program.graph_module.code
    torch.testing.assert_close(program.module()(X.flip(0), Y), ft.cross_entropy(X.flip(0), Y))


def test_symbolic_trace():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = ft.CrossEntropyLoss()

        def forward(self, x, y):
            return self.loss(x * 2, y)

    warm(ft.cross_entropy)
    traced = torch.fx.symbolic_trace(Model())
    assert "cross_entropy" in traced.code
    torch.testing.assert_close(traced(X, Y), F.cross_entropy(2 * X, Y))
