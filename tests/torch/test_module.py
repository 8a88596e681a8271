"""`CrossEntropyLoss` in the place of PyTorch's: made, printed, saved, copied and moved in the same way."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from fastxent.torch import CrossEntropyLoss, cross_entropy
from tests.helpers.cases import REDUCTIONS
from tests.helpers.launches import counted
from tests.helpers.opponent import torch_loss
from tests.helpers.torch_cases import make_case

pytestmark = pytest.mark.usefixtures("one_torch_thread")

WEIGHT = torch.linspace(0.5, 2.0, 60, dtype=torch.float64)
OPTIONS = [
    {},
    dict(weight=WEIGHT),
    dict(ignore_index=3),
    dict(label_smoothing=0.2),
    dict(weight=WEIGHT, ignore_index=3, label_smoothing=0.1),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values(reduction, options):
    x, target, _ = make_case(torch.float64, (9, 60))
    results = []
    for module in (CrossEntropyLoss, nn.CrossEntropyLoss):
        v = x.clone().requires_grad_()
        with counted() as kernels:
            loss = module(reduction=reduction, **options)(v, target)
            loss.sum().backward()
        assert bool(kernels) == (module is CrossEntropyLoss)
        results.append((loss.detach(), v.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_our_options():
    x, target, _ = make_case(torch.float64, (9, 60))
    for reduction in REDUCTIONS:
        loss = CrossEntropyLoss(WEIGHT, reduction=reduction, z_loss=0.1, softcap=4.0)
        want = torch_loss(x, target, reduction, weight=WEIGHT, z_loss=0.1, softcap=4.0)
        torch.testing.assert_close(loss(x, target), want, rtol=1e-12, atol=1e-12)
    v = x.clone().requires_grad_()
    logits = v * 1
    CrossEntropyLoss(inplace=True)(logits, target).backward()
    assert torch.equal(logits, v.grad) and not torch.equal(logits, x)


def test_constructor_is_pytorchs_and_then_ours():
    ours, theirs = (inspect.signature(m).parameters for m in (CrossEntropyLoss, nn.CrossEntropyLoss))
    shared = list(ours.values())[: len(theirs)]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in theirs.values()]
    extra = {name: p for name, p in ours.items() if name not in theirs}
    assert {name: p.default for name, p in extra.items()} == dict(z_loss=0.0, softcap=None, inplace=False)
    assert {p.kind for p in extra.values()} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.filterwarnings("ignore:size_average and reduce args")  # PyTorch's own warning about its own arguments
def test_legacy_arguments():
    x, target, _ = make_case(torch.float64, (9, 60))
    for size_average, reduce in ((False, None), (None, False), (True, True)):
        a, b = (m(WEIGHT, size_average, 3, reduce)(x, target) for m in (CrossEntropyLoss, nn.CrossEntropyLoss))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_it_is_one_of_pytorchs():
    loss = CrossEntropyLoss(WEIGHT)
    assert isinstance(loss, nn.CrossEntropyLoss)
    assert repr(CrossEntropyLoss()) == repr(nn.CrossEntropyLoss()) == "CrossEntropyLoss()"
    assert repr(nn.Sequential(CrossEntropyLoss())) == repr(nn.Sequential(nn.CrossEntropyLoss()))
    assert dict(loss.named_buffers()).keys() == {"weight"} and not list(loss.parameters())
    assert loss.training and not loss.eval().training


def test_state_dict_both_ways():
    ours, theirs = CrossEntropyLoss(WEIGHT.clone()), nn.CrossEntropyLoss(WEIGHT + 1)
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"weight"}
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, WEIGHT + 1)
    theirs.load_state_dict(CrossEntropyLoss(WEIGHT).state_dict())
    assert torch.equal(theirs.weight, WEIGHT)
    assert not CrossEntropyLoss().state_dict()


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, copy.copy, saved])
def test_copies(again):
    loss = CrossEntropyLoss(WEIGHT, ignore_index=3, label_smoothing=0.1, reduction="sum", z_loss=0.1, softcap=4.0, inplace=True)
    other = again(loss)
    assert type(other) is CrossEntropyLoss
    assert (other.z_loss, other.softcap, other.inplace) == (0.1, 4.0, True)
    assert (other.ignore_index, other.label_smoothing, other.reduction) == (3, 0.1, "sum")
    x, target, _ = make_case(torch.float64, (9, 60))
    assert torch.equal(other(x, target), loss(x, target))


def test_to_moves_the_weight():
    loss = CrossEntropyLoss(WEIGHT.clone())
    assert loss.to(torch.float32) is loss and loss.weight.dtype == torch.float32
    case = make_case(torch.float32, (9, 60))
    torch.testing.assert_close(loss(case.logits, case.target), nn.CrossEntropyLoss(WEIGHT.float())(case.logits, case.target))
    assert loss.half().weight.dtype == torch.float16 and loss.double().weight.dtype == torch.float64
    meta = loss.to("meta")
    assert meta.weight.device.type == "meta"
    assert meta(case.logits.double().to("meta"), case.target.to("meta")).device.type == "meta"


def test_in_a_model_with_hooks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.loss = nn.Linear(8, 60), CrossEntropyLoss(torch.ones(60))

        def forward(self, x, y):
            return self.loss(self.linear(x), y)

    model, seen = Model(), []
    model.loss.register_forward_hook(lambda m, args, out: seen.append((type(m), out.dim())))
    assert model.state_dict().keys() == {"linear.weight", "linear.bias", "loss.weight"}
    model(torch.randn(5, 8), torch.arange(5)).backward()
    assert seen == [(CrossEntropyLoss, 0)] and model.linear.weight.grad.abs().sum() > 0


def test_sample_weight_is_an_argument_of_the_function_only():
    """A module has no weights of samples that have yet to come."""
    assert "sample_weight" in inspect.signature(cross_entropy).parameters
    with pytest.raises(TypeError):
        CrossEntropyLoss(sample_weight=torch.ones(3))
