"""What the tests of the adapter share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import fastxent.torch as ft
from fastxent._fastpath.cache import calls
from tests.helpers.opponent import one_torch_thread as one_thread


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=["cross_entropy", "install"])
def loss(request: pytest.FixtureRequest) -> Iterator[Callable[..., torch.Tensor]]:
    """Ours, by either door."""
    with ft.installed() if request.param == "install" else nullcontext():
        calls.clear()
        yield F.cross_entropy if request.param == "install" else ft.cross_entropy
    calls.clear()
