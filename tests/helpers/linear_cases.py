"""Problems of a linear layer and its loss, a step through a function, and the budget of its results."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastxent._runtime.blocks import SCRATCH
from fastxent.torch import _linear_blocks
from tests.helpers.opponent import torch_loss
from tests.helpers.torch_cases import make_case

# More than 320 classes: rows are not transposed, so all of these tests need few kernels.
N_ROWS, N_FEATURES, N_CLASSES = 37, 12, 400


class Problem(NamedTuple):
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor
    target: Tensor
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Problem:
        x, w, b, target = (t.to(dtype) if t.is_floating_point() else t for t in self[:4])
        options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return Problem(x, w, b, target, options)

    @property
    def layer(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]


def make(
    option: str = "index", dtype: torch.dtype = torch.float32, n_rows: int = N_ROWS, n_features: int = N_FEATURES
) -> Problem:
    case = make_case(dtype, (n_rows, N_CLASSES), option)
    generator = torch.Generator().manual_seed(n_rows + n_features)
    x, w, b = (
        torch.randn(shape, generator=generator) for shape in ((n_rows, n_features), (N_CLASSES, n_features), (N_CLASSES,))
    )
    return Problem(x.to(dtype), w.to(dtype), b.to(dtype), case.target, case.options)


def limit_of(n_rows: int, n_features: int = N_FEATURES, itemsize: int = 4) -> int:
    """The memory limit that makes blocks of so many rows."""
    return min(SCRATCH, itemsize * n_features * N_CLASSES) + n_rows * itemsize * (N_CLASSES + 2 * n_features)


def whole(x: Tensor, w: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, reduction: str = "mean", **options: Any):
    """The loss of whole logits, in PyTorch."""
    return torch_loss(F.linear(x, w, linear_bias), target, reduction, **options)


def step(function, problem: Problem, reduction: str = "mean", **more: Any) -> list[Tensor]:
    """The loss, and the gradients of input, weight and bias; for none each row has a grad_output of its own."""
    x, w, b = (t.detach().clone().requires_grad_() for t in problem.layer)
    loss = function(x, w, problem.target, linear_bias=b, reduction=reduction, **problem.options, **more)
    factors = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (loss * factors).sum().backward()
    return [loss.detach(), x.grad, w.grad, b.grad]


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Whether products of bfloat16 are computed as such, whatever the processor can do."""
    monkeypatch.setattr(_linear_blocks, "multiplies_bfloat16", lambda: native)


def assert_no_worse(ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor], ulps: float = 1.0) -> None:
    """At most PyTorch's error, plus an ulp of the largest value."""
    for name, a, b, t in zip(("loss", "input", "linear_weight", "linear_bias"), ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == t.shape, name
        ulp = torch.finfo(a.dtype).eps * t.abs().max()
        assert (a.double() - t).abs().max() <= (b.double() - t).abs().max() + ulps * ulp, name
