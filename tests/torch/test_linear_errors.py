"""Linear layer and loss: errors are PyTorch's or name the argument, and the operators read nothing out of bounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastxent.torch import LinearCrossEntropyLoss, linear_cross_entropy, linear_log_prob_and_entropy

pytestmark = pytest.mark.usefixtures("one_torch_thread")

x, w, y = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 1, 2, 3, 6])
ERRORS = {
    "class": (lambda f: f(x, w, y + 1), IndexError, "Target 7 is out of bounds"),
    "negative class": (lambda f: f(x, w, y - 1), IndexError, "Target -1 is out of bounds"),
    "batch": (lambda f: f(x, w, y[:4]), ValueError, r"Expected input batch_size \(5\) to match target batch_size \(4\)"),
    "features": (lambda f: f(x[:, :3], w, y), RuntimeError, "expected equal input and linear_weight last dimensions"),
    "weight's rank": (lambda f: f(x, w[0], y), RuntimeError, "linear_weight with dimensionality at least 2, got 1"),
    "bias": (lambda f: f(x, w, y, linear_bias=torch.ones(6)), RuntimeError, r"expected linear_bias shape \(7,\), got \(6,\)"),
    "class weight": (lambda f: f(x, w, y, weight=torch.ones(6)), RuntimeError, "defined either for all 7"),
    "reduction": (lambda f: f(x, w, y, reduction="men"), ValueError, "men is not a valid value for reduction"),
    "dtypes": (lambda f: f(x, w.double(), y), RuntimeError, "same dtype"),
    "smoothing": (lambda f: f(x, w, y, label_smoothing=1.5), RuntimeError, "label_smoothing must be between 0.0 and 1.0"),
    "target's dtype": (lambda f: f(x, w, y.float()), RuntimeError, "expected .*Long.* Float"),
    "ignore_index": (
        lambda f: f(x, w, torch.rand(5, 7), ignore_index=3), RuntimeError, "ignore_index cannot be specified when target",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_pytorchs(call, kind, message):
    with pytest.raises(kind, match=message):
        call(linear_cross_entropy)
    if hasattr(F, "linear_cross_entropy"):
        with pytest.raises(kind, match=message):
            call(F.linear_cross_entropy)


def test_errors_of_our_own():
    with pytest.raises(ValueError, match="memory_limit = 0 is less than 1"):
        linear_cross_entropy(x, w, y, memory_limit=0)
    with pytest.raises(TypeError, match="memory_limit must be an integer"):
        linear_cross_entropy(x, w, y, memory_limit=1.5)
    with pytest.raises(TypeError, match="argument 'linear_weight' must be Tensor, not list"):
        linear_cross_entropy(x, w.tolist(), y)
    with pytest.raises(TypeError, match="softcap must be a number, got str"):
        linear_cross_entropy(x, w, y, softcap="1")
    with pytest.raises(ValueError, match="sample_weight has shape"):
        linear_cross_entropy(x, w, y, sample_weight=torch.ones(4))
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        linear_cross_entropy(x, w, y, label_smoothing=-0.1)
    with pytest.raises(RuntimeError, match="requires batched input"):
        linear_cross_entropy(x[0], torch.randn(7, 2, 4), y)
    with pytest.raises(RuntimeError, match="expected weight shape"):
        LinearCrossEntropyLoss(4, 7, weight=torch.ones(6))


OPERATORS = torch.ops.fastxent.linear_cross_entropy, torch.ops.fastxent.linear_cross_entropy_value_and_grad


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


SWAPPED = {
    "target": ({2: y[:4]}, "size mismatch"),
    "freed target": ({2: freed(y)}, "not allocated"),
    "freed input": ({0: freed(x)}, "not allocated"),
    "freed weight": ({1: freed(w)}, "not allocated"),
    "rank": ({0: x[None]}, "size mismatch"),
    "features": ({1: w[:, :3]}, "size mismatch"),
    "bias": ({3: torch.ones(6)}, "size mismatch"),
    "dtype": ({1: w.double()}, "one dtype"),
    "whole numbers": ({0: x.long(), 1: w.long()}, "floating point numbers"),
    "class": ({2: y + 1}, "Target 7 is out of bounds"),
    "class weight": ({4: torch.ones(6)}, "weight must be 7"),
}


@pytest.mark.parametrize(("swapped", "message"), SWAPPED.values(), ids=SWAPPED)
def test_nothing_is_read_out_of_bounds(swapped, message):
    """A traced graph, or a hook on saved tensors, may pass any tensors to the operators."""
    arguments = [x, w, y, None, None, None, 1, -100, 0.0, 0.0, 0.0, None]
    for place, value in swapped.items():
        arguments[place] = value
    with pytest.raises((RuntimeError, IndexError), match=message):
        OPERATORS[0](*arguments)
    with pytest.raises((RuntimeError, IndexError), match=message):
        OPERATORS[1](*arguments, [True, True, False])


def test_log_prob_and_entropy_errors():
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        linear_log_prob_and_entropy(x, w, y + 1)
    with pytest.raises(TypeError, match="it takes class indices"):
        linear_log_prob_and_entropy(x, w, torch.rand(5, 7))
    with pytest.raises(ValueError, match=r"temperature = 0\.0 is not above 0"):
        linear_log_prob_and_entropy(x, w, y, temperature=0.0)
    with pytest.raises(RuntimeError, match="expected equal input and linear_weight last dimensions"):
        linear_log_prob_and_entropy(x, w[:, :3], y)
    with pytest.raises(TypeError, match="argument 'target' must be Tensor, not list"):
        linear_log_prob_and_entropy(x, w, y.tolist())


@pytest.mark.parametrize("missing", ["input", "linear_weight", "target"])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_prob_and_entropy])
def test_a_required_tensor_must_not_be_none(function, missing):
    arguments = {"input": torch.rand(5, 4), "linear_weight": torch.rand(7, 4), "target": torch.arange(5)} | {missing: None}
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\): argument '{missing}' must be Tensor, not NoneType"):
        function(**arguments)
