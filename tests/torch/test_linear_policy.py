"""Log-probability and entropy of a linear layer, block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastxent.torch import linear_log_prob_and_entropy, log_prob_and_entropy
from tests.helpers.linear_cases import N_FEATURES, Problem, assert_no_worse, limit_of, make

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def policy_step(function, problem: Problem, **options: Any) -> list[Tensor]:
    """Both results, and the gradients of a number in which every row of both counts differently."""
    x, w, b = (t.detach().clone().requires_grad_() for t in problem.layer)
    log_prob, entropy = function(x, w, problem.target, linear_bias=b, temperature=0.7, **options)
    rows = torch.linspace(-1, 1, log_prob.numel(), dtype=torch.float64)
    (log_prob * rows + entropy * rows.flip(0)).sum().backward()
    return [torch.stack([log_prob, entropy]).detach(), x.grad, w.grad, b.grad]


def whole_policy(x: Tensor, w: Tensor, y: Tensor, *, linear_bias: Tensor, temperature: float, **_: Any):
    return log_prob_and_entropy(F.linear(x, w, linear_bias), y, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_log_prob_and_entropy(dtype):
    problem = make("ignore", dtype)
    truth, theirs = policy_step(whole_policy, problem.to(torch.float64)), policy_step(whole_policy, problem)
    for limit in (None, limit_of(8)):
        ours = policy_step(linear_log_prob_and_entropy, problem, memory_limit=limit)
        assert_no_worse(ours, theirs, truth, 8 if dtype == torch.float64 else 1)


def test_log_prob_and_entropy_of_frozen_parts_any_rank_and_no_rows():
    problem = make("ignore", torch.float64, 12)
    want = policy_step(linear_log_prob_and_entropy, problem)
    head = problem.linear_weight.clone().requires_grad_()
    x, target = problem.input.reshape(3, 4, N_FEATURES), problem.target.reshape(3, 4)
    both = linear_log_prob_and_entropy(x, head, target, linear_bias=problem.linear_bias, temperature=0.7)
    assert torch.equal(torch.stack(both).reshape(2, 12), want[0])
    rows = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    (both[0] * rows + both[1] * rows.flip(0, 1)).sum().backward()
    torch.testing.assert_close(head.grad, want[2])
    ignored = linear_log_prob_and_entropy(x, head, torch.full((3, 4), -100))
    sum(t.sum() for t in ignored).backward()
    assert not torch.stack(ignored).any()
    assert all(t.shape == (0,) for t in linear_log_prob_and_entropy(x[0, :0], head, target[0, :0]))
