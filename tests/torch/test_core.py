"""The adapter with every option against PyTorch, which has some of them written out: the tests to run first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastxent.torch as ft
from tests.helpers.cases import SOFTCAP, Z_LOSS, Case
from tests.helpers.opponent import at_least_float32, loss_and_grad, torch_loss
from tests.helpers.torch_cases import make_case

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_torch_thread")]

ROWS, CLASSES = 33, 21
WEIGHT, SAMPLE_WEIGHT = torch.linspace(0.5, 2, CLASSES), torch.linspace(0.5, 2, ROWS)
OPTIONS: list[dict[str, Any]] = [
    dict(weight=WEIGHT),
    dict(ignore_index=3),
    dict(label_smoothing=0.1),
    dict(sample_weight=SAMPLE_WEIGHT),
    dict(z_loss=Z_LOSS),
    dict(softcap=SOFTCAP),
    dict(weight=WEIGHT, ignore_index=3, label_smoothing=0.1, sample_weight=SAMPLE_WEIGHT, z_loss=Z_LOSS, softcap=SOFTCAP),
]


def check(case: Case, reduction: str = "mean") -> None:
    ours = loss_and_grad(ft.cross_entropy, case, reduction)
    theirs = loss_and_grad(torch_loss, at_least_float32(case), reduction)
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == case.logits.dtype
        torch.testing.assert_close(got, want.to(got.dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=", ".join)
def test_options(options):
    check(make_case(torch.float32, (ROWS, CLASSES))._replace(options=options))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reductions(dtype, reduction):
    check(make_case(dtype, (ROWS, CLASSES)), reduction)


@pytest.mark.parametrize("options", ["index", "probabilities"])
def test_images(options):
    check(make_case(torch.float32, (2, CLASSES, 4, 5), options))


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("old", [dict(size_average=False), dict(reduce=False)], ids=", ".join)
def test_old_names_of_the_reduction(old):
    x, y, _ = make_case(torch.float32, (ROWS, CLASSES))
    torch.testing.assert_close(ft.cross_entropy(x, y, **old), F.cross_entropy(x, y, **old))
    torch.testing.assert_close(ft.CrossEntropyLoss(**old)(x, y), F.cross_entropy(x, y, **old))


def test_in_place_and_as_a_module():
    x, y, _ = make_case(torch.float32, (ROWS, CLASSES))
    options = dict(weight=WEIGHT, ignore_index=3, label_smoothing=0.1, z_loss=Z_LOSS, softcap=SOFTCAP)
    want, gradient = loss_and_grad(torch_loss, Case(x, y, options), "sum")
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    loss = ft.CrossEntropyLoss(reduction="sum", inplace=True, **options)(logits, y)
    loss.backward()
    torch.testing.assert_close((loss.detach(), leaf.grad), (want, gradient))
    assert torch.equal(logits, leaf.grad)
    assert torch.equal(ft.cross_entropy(leaf * 1, y, reduction="sum", inplace=True, **options), loss)


def test_log_prob_and_entropy():
    x, y, _ = make_case(torch.float32, (ROWS, CLASSES), "ignore")
    results = []
    for ours in (True, False):
        v = x.clone().requires_grad_()
        if ours:
            log_prob, entropy = ft.log_prob_and_entropy(v, y, temperature=0.7, ignore_index=-100)
        else:
            log_p = torch.log_softmax(v / 0.7, 1)
            log_prob = torch.where(y == -100, 0, log_p.gather(1, y.clamp(0)[:, None])[:, 0])
            entropy = torch.where(y == -100, 0, torch.special.entr(log_p.exp()).sum(1))
        results.append((log_prob.detach(), entropy.detach(), torch.autograd.grad((log_prob + 0.1 * entropy).sum(), v)[0]))
    torch.testing.assert_close(*results)


def test_installed():
    x, y, _ = make_case(torch.float32, (ROWS, CLASSES))
    x.requires_grad_()
    with ft.installed():
        assert type(F.cross_entropy(x, y).grad_fn).__name__ == "CrossEntropyBackward"
    ft.install()
    assert type(F.cross_entropy(x, y).grad_fn).__name__ == "CrossEntropyBackward"
    ft.uninstall()
    assert type(F.cross_entropy(x, y).grad_fn).__name__ == "NllLossBackward0"


def test_every_option_is_here():
    here = {name for options in OPTIONS for name in options} | {
        "input",
        "target",
        "reduction",
        "size_average",
        "reduce",
        "inplace",
    }
    assert set(inspect.signature(ft.cross_entropy).parameters) == here
    assert set(inspect.signature(ft.CrossEntropyLoss).parameters) == here - {"input", "target", "sample_weight"}
    assert set(inspect.signature(ft.log_prob_and_entropy).parameters) == {"input", "target", "temperature", "ignore_index"}
    layer = {"linear_weight", "linear_bias", "memory_limit"}
    assert set(inspect.signature(ft.linear_cross_entropy).parameters) == (
        (here | layer | {"options"}) - {"size_average", "reduce", "inplace"}
    )
    assert set(inspect.signature(ft.linear_log_prob_and_entropy).parameters) == (
        layer | {"input", "target", "temperature", "ignore_index"}
    )
    assert set(ft.__all__) == {
        "CrossEntropyLoss", "LinearCrossEntropyLoss", "cross_entropy", "install", "installed", "linear_cross_entropy",
        "linear_log_prob_and_entropy", "log_prob_and_entropy", "uninstall",
    }  # fmt: skip
