"""Log-probability and entropy of tensors: values, all derivatives, tracers, and what is saved for the backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from fastxent.torch import log_prob_and_entropy
from fastxent.torch._policy import decomposition

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]
SHAPES = [(33, 10), (40, 1000), (2, 5, 4, 6)]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shape[0])
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    y.view(-1)[2] = -100
    return x, y


def loss_of(results: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """A number in which every row of both counts differently."""
    log_prob, entropy = (t.to(dtype) for t in results)
    weights = torch.linspace(-1, 1, log_prob.numel(), dtype=dtype).reshape(log_prob.shape)
    return (log_prob * weights).sum() + (entropy * weights.flip(0)).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_the_formula(shape, dtype):
    """Both results and the gradient: at most the error of PyTorch's operators, plus an ulp of the largest value."""
    x, y = make(shape, dtype)
    ours, stock, truth = (x.detach().clone().to(d).requires_grad_() for d in (dtype, dtype, torch.float64))
    results = [
        function(leaf, y, **options)
        for function, leaf, options in (
            (log_prob_and_entropy, ours, {"temperature": 0.7}),
            (decomposition, stock, {"temperature": 0.7, "ignore_index": -100}),
            (decomposition, truth, {"temperature": 0.7, "ignore_index": -100}),
        )
    ]
    for result in results:
        loss_of(result).backward()
    for a, b, t in zip((*results[0], ours.grad), (*results[1], stock.grad), (*results[2], truth.grad), strict=True):
        assert a.dtype == dtype
        ulp = torch.finfo(dtype).eps * t.abs().max() * (8 if dtype == torch.float64 else 1)  # of float64, the truth has errors
        assert (a - t).abs().max() <= (b - t).abs().max() + ulp
    assert not ours.grad.movedim(1, -1).reshape(-1, shape[1])[2].any()


def test_backward_through_one_of_the_two():
    x, y = make((33, 10), torch.float64)
    for nth in range(2):
        ours, stock = (x.clone().requires_grad_() for _ in range(2))
        log_prob_and_entropy(ours, y)[nth].sum().backward()
        decomposition(stock, y, 1.0, -100)[nth].sum().backward()
        assert torch.allclose(ours.grad, stock.grad, rtol=1e-12, atol=1e-14)


def test_derivatives():
    x, y = make((4, 5), torch.float64)
    x.requires_grad_()
    assert gradcheck(lambda x: log_prob_and_entropy(x, y, temperature=1.3), (x,))
    assert gradgradcheck(lambda x: log_prob_and_entropy(x, y, temperature=1.3), (x,))
    tangent = torch.ones_like(x)
    _, along = torch.func.jvp(lambda x: log_prob_and_entropy(x, y), (x.detach(),), (tangent,))
    assert all(t.abs().max() < 1e-12 for t in along)  # a shift changes nothing


def test_transforms():
    x, y = make((33, 10), torch.float64)
    leaf = x.clone().requires_grad_()
    loss_of(log_prob_and_entropy(leaf, y)).backward()
    assert torch.allclose(torch.func.grad(lambda x: loss_of(log_prob_and_entropy(x, y)))(x), leaf.grad, atol=1e-14)
    rows = torch.func.vmap(lambda x, y: log_prob_and_entropy(x, y)[1])(x, y)
    assert torch.allclose(rows, log_prob_and_entropy(x, y)[1])


def test_compiled_without_a_break():
    x, y = make((33, 10))
    results = []
    for function in (log_prob_and_entropy, torch.compile(log_prob_and_entropy, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        both = function(leaf, y, temperature=0.7)
        loss_of(both).backward()
        results.append((*both, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_traced():
    x, y = make((33, 10))
    graph = make_fx(lambda x: log_prob_and_entropy(x, y))(x)
    assert "fastxent" in graph.code
    assert all(torch.equal(a, b) for a, b in zip(graph(x), log_prob_and_entropy(x, y), strict=True))
    torch.library.opcheck(torch.ops.fastxent.log_prob_and_entropy.default, (x.requires_grad_(), y, 0.7, -100))


def test_nothing_of_the_logits_size_is_saved():
    x, y = make((40, 1000))
    leaf, saved = x.requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        log_prob_and_entropy(leaf, y)
    assert set(saved) <= {leaf.data_ptr(), y.data_ptr()}


@pytest.mark.thorough
def test_odd_layouts_and_rows_that_hold_nan():
    x, y = make((33, 10), torch.float64)
    want = log_prob_and_entropy(x, y)
    for odd in (x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0], x.repeat(1, 2)[:, 10:]):
        leaf = odd.detach().requires_grad_()
        got = log_prob_and_entropy(leaf, y)
        loss_of(got).backward()
        assert all(torch.allclose(a, b, rtol=1e-14) for a, b in zip(got, want, strict=True))
        assert leaf.grad.isfinite().all()
    x[2] = torch.nan  # the row that is ignored
    leaf = x.requires_grad_()
    loss_of(log_prob_and_entropy(leaf, y)).backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[2].any()


def test_classes_that_are_ruled_out():
    x = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    _, entropy = log_prob_and_entropy(x, torch.tensor([0]))
    entropy.backward()
    assert entropy.item() == pytest.approx(0.6931472) and torch.equal(x.grad, torch.zeros(1, 3))


@pytest.mark.parametrize("row", [[torch.inf, 1.0, 2.0], [torch.nan, -torch.inf, 2.0], [-torch.inf] * 3], ids=str)
def test_where_there_is_no_softmax_the_gradient_is_nan(row):
    x = torch.tensor([row, [0.0, 1.0, 2.0]], requires_grad=True)
    loss_of(log_prob_and_entropy(x, torch.tensor([1, 1]))).backward()
    assert x.grad[0].isnan().all() and x.grad[1].isfinite().all()


def test_autocast():
    x, y = make((33, 10), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(t.dtype == torch.float32 for t in log_prob_and_entropy(x, y))


def test_bad_arguments():
    x, y = make((5, 7))
    y = y.clamp(0)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        log_prob_and_entropy(x, torch.tensor([0, 1, 7, 3, 4]))
    with pytest.raises(TypeError, match="it takes class indices"):
        log_prob_and_entropy(x, x.softmax(1))
    with pytest.raises(ValueError, match="Expected input batch_size"):
        log_prob_and_entropy(x, y[:4])
    with pytest.raises(TypeError, match="argument 'target' must be Tensor, not list"):
        log_prob_and_entropy(x, y.tolist())
    with pytest.raises(ValueError, match=r"Expected target size \[\], got \[1\]"):  # of which PyTorch makes no gradient either
        log_prob_and_entropy(x[0], y[:1])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"temperature = .* is not above 0 and finite"):
            log_prob_and_entropy(x, y, temperature=bad)
    for bad in ("1", True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=f"temperature must be a number, got {type(bad).__name__}"):
            log_prob_and_entropy(x, y, temperature=bad)


def test_bad_class_in_a_dual_tensor():
    x, _ = make((5, 7))
    with forward_ad.dual_level(), pytest.raises(IndexError, match="Target 7 is out of bounds"):
        log_prob_and_entropy(forward_ad.make_dual(x, x), torch.tensor([0, 1, 7, 3, 4]))


def test_no_classes():
    x, ignored = torch.zeros(3, 0, requires_grad=True), torch.full((3,), -100)
    results = log_prob_and_entropy(x, ignored)
    loss_of(results).backward()
    assert all(torch.equal(t, torch.zeros(3)) for t in results) and x.grad.shape == (3, 0)
    with pytest.raises(IndexError, match="Target 0 is out of bounds"):
        log_prob_and_entropy(x, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.uint64], ids=str)
def test_numbers_of_any_kind(dtype):
    x, y = make((33, 10))
    y = y.clamp(0)
    want = log_prob_and_entropy(x, y, temperature=2)
    got = log_prob_and_entropy(x, y.to(dtype), temperature=np.float32(2.0))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_of_all_kinds():
    """What comes back may have no memory, another layout, a negative bit, a tangent, or stand for a batch."""
    x, y = make((33, 10), torch.float64)
    ones, twos = torch.ones(33, dtype=x.dtype), torch.full((33,), 2.0, dtype=x.dtype)

    def gradient(u: Tensor, v: Tensor, **options: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(log_prob_and_entropy(leaf, y), leaf, (u, v), **options)[0]

    want = gradient(ones, twos)
    zero = torch._efficientzerotensor((33,), dtype=x.dtype)
    for u, v in [(ones.to_sparse(), twos), (torch._neg_view(-ones), twos), (ones[:1].expand(33), twos[0].expand(33))]:
        assert torch.equal(gradient(u, v), want)
    assert torch.equal(gradient(zero, twos), gradient(0 * ones, twos))
    batched = gradient(torch.stack([ones, twos]), torch.stack([twos, twos]), is_grads_batched=True)
    assert torch.equal(batched[0], want)
    with forward_ad.dual_level():
        grad = gradient(forward_ad.make_dual(ones, twos), twos)
        value, tangent = forward_ad.unpack_dual(grad)
        assert torch.allclose(value, want, atol=1e-14) and not grad.requires_grad
        assert torch.allclose(tangent, gradient(twos, 0 * ones), atol=1e-14)


OPERATOR, BACKWARD = torch.ops.fastxent.log_prob_and_entropy, torch.ops.fastxent.log_prob_and_entropy_backward
SWAPPED = {
    "too short": (lambda y: y[:2], "size mismatch"),
    "probabilities": (lambda y: torch.full((33, 10), 0.1), "expected target of class indices, got torch.float32"),
    "floats": (lambda y: y.double(), "size mismatch"),
    "bools": (lambda y: y > 0, "expected target of integers"),
    "freed": (lambda y: (y := y.clone(), y.untyped_storage().resize_(0))[0], "not allocated"),
    "out of range": (lambda y: y + 100, "Target 10.* is out of bounds"),
}


@pytest.mark.parametrize(("swap", "message"), SWAPPED.values(), ids=SWAPPED)
def test_nothing_is_read_out_of_bounds(swap, message):
    """A traced graph, or a hook on saved tensors, may pass any tensors to the operators."""
    x, y = make((33, 10))
    y, rows = y.clamp(0), torch.ones(33)
    with pytest.raises((RuntimeError, IndexError), match=message):
        OPERATOR(x, swap(y), 1.0, -100)
    with pytest.raises((RuntimeError, IndexError), match=message):
        BACKWARD(rows, rows, x, swap(y), 1.0, -100)
    leaf = x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t if t.is_floating_point() else swap(t)):
        log_prob, _ = log_prob_and_entropy(leaf, y)
    with pytest.raises((RuntimeError, IndexError), match=message):
        log_prob.sum().backward()


def test_operators_refuse_other_operands():
    x, y = make((33, 10))
    rows, freed = torch.ones(33), torch.ones(33, dtype=torch.float64)
    freed.untyped_storage().resize_(0)
    with pytest.raises(NotImplementedError, match=r"not implemented for torch\.int64"):
        OPERATOR(x.long(), y, 1.0, -100)
    with pytest.raises(ValueError, match=r"temperature = 0\.0 is not above 0"):
        OPERATOR(x, y, 0.0, -100)
    with pytest.raises(RuntimeError, match="size mismatch"):
        BACKWARD(rows[:3], rows, x, y, 1.0, -100)
    with pytest.raises(RuntimeError, match="not allocated"):
        BACKWARD(rows, freed, x, y, 1.0, -100)


def test_logits_that_are_overwritten_before_the_backward():
    x, y = make((33, 10))
    for nth in range(2):
        logits, target = x.clone().requires_grad_() * 1, y.clone()
        log_prob, _ = log_prob_and_entropy(logits, target)
        (logits, target)[nth].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            log_prob.sum().backward()
