"""A call that was met before, for those who look whether it is seen and right."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module

import torch
import torch._dynamo  # first, or PyTorch's modes are imported in a circle
import torch.nn.functional as F

import fastxent.torch as ft
from fastxent._fastpath.cache import calls
from fastxent._runtime import fastpath
from fastxent.torch import _decomposition

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, -100])
REDUCTIONS = ["mean", "none"]


def step(loss, x, reduction="mean"):
    """Loss and gradient."""
    x = x.detach().requires_grad_()
    made = loss(x, Y, reduction=reduction)
    return made, torch.autograd.grad(made.sum() * 2, x)[0]


def warm(loss, reduction="mean"):
    """Until a guard recognises the call, with gradient and without; what is right, from PyTorch."""
    for _ in range(4):
        step(loss, X, reduction)
        loss(X, Y, reduction=reduction)
    assert not fastpath.ENABLED or any(isinstance(call, tuple) for call in map(calls.lookup, calls.keys()))
    with uninstalled():
        return step(F.cross_entropy, X, reduction)


@contextmanager
def uninstalled():
    was = _decomposition.library is not None
    ft.uninstall()
    try:
        yield
    finally:
        if was:
            ft.install()


def by_name(name):
    module, cls = name.split(":")
    return getattr(import_module(f"torch.{module}"), cls)


def agree(got, want):
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        if type(g) is torch.Tensor:
            torch.testing.assert_close(g.detach(), w.detach())
