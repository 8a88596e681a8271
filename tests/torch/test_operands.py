"""What does not go together is an error, whoever hands it over: a traced graph, a hook on saved tensors, the engine."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fastxent.torch import cross_entropy

N, C = 70, 5
X, Y = torch.randn(N, C), torch.randint(0, C, (N,))
OPERATORS = torch.ops.fastxent.cross_entropy, torch.ops.fastxent.cross_entropy_value_and_grad
OPTIONS = (1, -100, 0.0, 0.0, 0.0)
WRONG = {
    "no target": (X, Y[:0], None, None),
    "few targets": (X, Y[:3], None, None),
    "targets in a column": (X, Y[:, None], None, None),
    "targets that are floats": (X, Y.float(), None, None),
    "targets elsewhere": (X, Y.to("meta"), None, None),
    "more classes than weights": (torch.randn(N, 2000), Y, torch.ones(C), None),
    "integer weights": (X, Y, torch.ones(C, dtype=torch.int64), None),
    "few sample weights": (X, Y, None, torch.ones(3)),
    "sparse logits": (X.to_sparse(), Y, None, None),
    "integer logits": (X.long(), Y, None, None),
    "a number": (X[0, 0], Y[0], None, None),
}


@pytest.fixture(autouse=True)
def known():
    for reduction in ("none", "mean"):
        for _ in range(3):
            loss = cross_entropy(X.clone().requires_grad_(), Y, reduction=reduction)
            loss.sum().backward()


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_operators_check_what_they_are_given(operator, wrong):
    with pytest.raises((RuntimeError, NotImplementedError, IndexError)):
        operator(*WRONG[wrong], *OPTIONS)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_and_take_nothing(operator):
    found = operator(X[:0], Y[:0], None, None, *OPTIONS)
    assert torch.isnan(found[0] if isinstance(found, tuple) else found)


def test_a_traced_graph_refuses_what_pytorch_refuses():
    graph = make_fx(lambda x, y: cross_entropy(x, y))(X, Y)
    with pytest.raises(RuntimeError, match="size mismatch"):
        graph(X, Y[:3])


PACKS = {
    "no target": lambda t: t[:0].clone() if t.dtype == torch.int64 else t,
    "few targets": lambda t: t[:3].clone() if t.dtype == torch.int64 else t,
    "many rows": lambda t: torch.cat([t] * 1000) if t.dim() == 2 else t,
    "one row": lambda t: t.flatten()[:N] if t.dim() == 2 else t,
    "complex logits": lambda t: t + 0j if t.dim() == 2 else t,
}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])  # met before; not
@pytest.mark.parametrize("pack", PACKS)
def test_what_hooks_hand_over_is_checked(pack, label_smoothing):
    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(PACKS[pack], lambda t: t):
        loss = cross_entropy(x, Y, reduction="none", label_smoothing=label_smoothing)
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.sum().backward()


@pytest.mark.parametrize("sample_weight", [None, torch.ones(N)])
def test_a_gradient_without_memory(sample_weight):
    x = X.clone().requires_grad_()
    loss = cross_entropy(x, Y, reduction="none", sample_weight=sample_weight)
    grad_output = torch.ones(N)
    grad_output.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, x, grad_output)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's forward AD scripts its own formulas
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_tangent_of_the_gradient_is_kept(reduction):
    x = X.clone().requires_grad_()
    loss = cross_entropy(x, Y, reduction=reduction)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(loss), 3 * torch.ones_like(loss))
        (g,) = torch.autograd.grad(loss, x, dual)
        primal, tangent = forward_ad.unpack_dual(g)
    torch.testing.assert_close(tangent, 3 * primal)
