"""Linear layer and loss block by block: values against float64, options, blocks, frozen and tied parts, memory, the module."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxent.torch import LinearCrossEntropyLoss, _linear_blocks, linear_cross_entropy
from tests.helpers.cases import REDUCTIONS
from tests.helpers.linear_cases import (
    N_CLASSES,
    N_FEATURES,
    N_ROWS,
    Problem,
    assert_no_worse,
    limit_of,
    make,
    multiply_bfloat16,
    step,
    whole,
)
from tests.helpers.processes import run_script
from tests.helpers.torch_cases import DTYPES

pytestmark = pytest.mark.usefixtures("one_torch_thread")

OPTIONS = ["index", "weight ignore sample_weight z_loss", "ignore smoothing softcap", "probabilities weight sample_weight"]


# ----------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_no_worse_than_pytorch(option, reduction, dtype, monkeypatch):
    if "probabilities" in option and dtype.itemsize == 2:
        pytest.skip("more kernels, which tests of cross_entropy run")
    multiply_bfloat16(monkeypatch, reduction != "sum")  # either way
    problem = make(option, dtype)
    truth = step(whole, problem.to(torch.float64), reduction)
    theirs = step(whole, problem, reduction)
    # Of float64, the truth has errors
    assert_no_worse(step(linear_cross_entropy, problem, reduction), theirs, truth, 8 if dtype == torch.float64 else 1)
    in_blocks = step(linear_cross_entropy, problem, reduction, memory_limit=limit_of(8))
    assert_no_worse(in_blocks, theirs, truth, 8 if dtype == torch.float64 else 1)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="since PyTorch 2.13")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_no_worse_than_pytorchs_function_in_chunks(dtype, monkeypatch):
    multiply_bfloat16(monkeypatch, False)  # as PyTorch's chunks do
    problem = make("ignore weight", dtype, 64, 32)
    truth = step(whole, problem.to(torch.float64))
    theirs = step(F.linear_cross_entropy, problem, options=nn.LinearCrossEntropyOptions(batch_chunk_size=16))
    ours = step(linear_cross_entropy, problem, memory_limit=limit_of(16, 32))
    for a, b, t in zip(ours, theirs, truth, strict=True):
        # The mean error: the largest of thousands depends on the order in which BLAS adds up
        errors = [(result.double() - t).square().mean().sqrt() for result in (a, b)]
        assert errors[0] <= 1.05 * errors[1] + torch.finfo(dtype).eps * t.abs().mean()


@pytest.mark.parametrize("size", [1, 2, 7, 16, 36, 37, 100])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_block_size_gives_the_same(reduction, size):
    problem = make("ignore", torch.float64)
    results = step(linear_cross_entropy, problem, reduction, memory_limit=limit_of(size, itemsize=8))
    for a, b in zip(results, step(whole, problem, reduction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("native", "factor"), [(False, 1.001), (True, 1.1)], ids=["float32", "bfloat16"])
def test_the_weights_gradient_of_64_blocks_is_as_exact_as_of_one(native, factor, monkeypatch):
    """A gradient that added up in bfloat16 would be rounded 64 times; a product in bfloat16 is rounded where it is written."""
    multiply_bfloat16(monkeypatch, native)
    problem = make("index", torch.bfloat16, 64 * 16)
    truth = step(whole, problem.to(torch.float64), "sum")
    one, many = (
        step(linear_cross_entropy, problem, "sum", memory_limit=limit)
        for limit in (1 << 30, limit_of(16, itemsize=2 if native else 4))
    )
    for nth in (2, 3):
        errors = [(result[nth].double() - truth[nth]).abs().mean() for result in (one, many)]
        assert errors[1] <= factor * errors[0]


@pytest.mark.parametrize(("native", "n_blocks"), [(False, 4), (True, 2)], ids=["float32", "bfloat16"])
def test_a_block_has_as_many_rows_as_fit_in_the_precision_in_which_they_are_held(native, n_blocks, monkeypatch):
    multiply_bfloat16(monkeypatch, native)
    layer = _linear_blocks.Layer(*make("index", torch.bfloat16, 64).layer)
    made = list(_linear_blocks.blocks(layer, None, limit_of(16)))
    assert len(made) == n_blocks and made[0].logits.dtype == layer.precision
    assert sum(len(block.logits) for block in made) == 64


@pytest.mark.parametrize(("n_rows", "dtype"), [(64, torch.bfloat16), (16, torch.float32)], ids=["one block", "four"])
def test_float32_sums_of_a_weights_gradient_are_made_for_several_blocks_only(n_rows, dtype, monkeypatch):
    """They are the largest array of the call, and would drive others out of the recycled memory."""
    multiply_bfloat16(monkeypatch, True)
    problem = make("index", torch.bfloat16, 64)
    made = []
    empty = _linear_blocks.empty
    monkeypatch.setattr(_linear_blocks, "empty", lambda shape, dtype: made.append((tuple(shape), dtype)) or empty(shape, dtype))
    step(linear_cross_entropy, problem, memory_limit=limit_of(n_rows, itemsize=2))
    of_weight = {dtype for shape, dtype in made if shape == problem.linear_weight.shape}
    assert dtype in of_weight and (dtype == torch.float32) == (torch.float32 in of_weight)


def test_order_of_the_rows_and_ignored_rows_do_not_matter():
    problem = make("ignore", torch.float64)
    order = torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(0))
    kept = order[problem.target[order] != -100]
    want = step(linear_cross_entropy, problem)
    for rows in (order, kept):
        loss, x, *others = step(linear_cross_entropy, problem._replace(input=problem.input[rows], target=problem.target[rows]))
        for a, b in zip([loss, x, *others], [want[0], want[1][rows], *want[2:]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_nan_in_an_ignored_row_reaches_nothing():
    problem = make("ignore")
    want = step(linear_cross_entropy, problem)
    problem.input[problem.target == -100] = torch.nan
    for a, b in zip(step(linear_cross_entropy, problem), want, strict=True):
        assert torch.equal(a, b)
    problem.input[0] = torch.nan
    loss, x, w, b = step(linear_cross_entropy, problem)
    assert loss.isnan() and x[0].isnan().all() and not x[1:].isnan().any() and w.isnan().all() and b.isnan().all()


@pytest.mark.parametrize("n_axes", [1, 2, 3, 4])
@pytest.mark.parametrize("option", ["index", "probabilities"])
def test_inputs_of_any_rank(option, n_axes):
    rows = (2, 3, 4)[: n_axes - 1]
    n = math.prod(rows)
    problem = make(option, torch.float64, n)
    shaped = problem._replace(
        input=problem.input.reshape((*rows, N_FEATURES)),
        target=problem.target.reshape((*rows, *problem.target.shape[1:])),
    )
    for reduction in REDUCTIONS:
        want, got = step(linear_cross_entropy, problem, reduction), step(linear_cross_entropy, shaped, reduction)
        assert got[0].shape == (rows if reduction == "none" else ())
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.reshape(b.shape), b)


def test_layouts():
    problem = make("ignore", torch.float64)
    want = step(linear_cross_entropy, problem)
    x, w, b = problem.layer
    odd = x.t().contiguous().t(), w.t().contiguous().t(), torch.stack([b, b], -1)[:, 0]
    leaves = [t.detach().requires_grad_() for t in odd]
    loss = linear_cross_entropy(leaves[0], leaves[1], problem.target, linear_bias=leaves[2])
    loss.backward()
    for a, c in zip([loss, *(t.grad for t in leaves)], want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_rows_ignored_no_rows_no_classes_no_features(reduction):
    """As the loss of the product."""
    for n, d, c in [(5, 4, 6), (0, 4, 6), (5, 0, 6), (5, 4, 0)]:
        x, w, b = torch.ones(n, d), torch.ones(c, d), torch.ones(c)
        ignored = n == 5 and d == 4
        target = torch.full((n,), -100 if ignored else 1)
        problem = Problem(x, w, b, target, {})
        for a, t in zip(step(linear_cross_entropy, problem, reduction), step(whole, problem, reduction), strict=True):
            torch.testing.assert_close(a, t, equal_nan=True)


def test_a_loss_in_several_dimensions():
    x, w, b = torch.randn(5, 4), torch.randn(6, 2, 3, 4), torch.randn(6, 2, 3)
    target = torch.randint(6, (5, 2, 3))
    logits = F.linear(x, w.reshape(-1, 4), b.reshape(-1)).reshape(5, 6, 2, 3)
    for reduction in REDUCTIONS:
        got = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
        torch.testing.assert_close(got, F.cross_entropy(logits, target, reduction=reduction))


# ----------------------------------------------------------------------------------------------------
# What needs a gradient
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_frozen_parts(wanted, reduction, monkeypatch):
    """They get no gradient, take no product, and change nothing for the others."""
    problem = make("ignore")
    want = step(linear_cross_entropy, problem, reduction)
    leaves = [t.detach().clone().requires_grad_(bool(on)) for t, on in zip(problem.layer, wanted, strict=True)]
    products = []
    addmm = Tensor.addmm_
    monkeypatch.setattr(Tensor, "addmm_", lambda self, *a, **k: products.append(1) or addmm(self, *a, **k))
    loss = linear_cross_entropy(leaves[0], leaves[1], problem.target, linear_bias=leaves[2], reduction=reduction)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        (loss * torch.linspace(1, 2, loss.numel()).reshape(loss.shape)).sum().backward()
    assert len(products) == sum(wanted[:2])
    for leaf, grad, on in zip(leaves, want[1:], wanted, strict=True):
        assert torch.equal(leaf.grad, grad) if on else leaf.grad is None


def test_without_a_gradient_only_the_loss():
    problem = make("ignore")
    x, w, b = (t.requires_grad_() for t in problem.layer)
    loss = linear_cross_entropy(x, w, problem.target, linear_bias=b)
    with torch.no_grad():
        alone = linear_cross_entropy(x, w, problem.target, linear_bias=b)
    with torch.inference_mode():
        inferred = linear_cross_entropy(x, w, problem.target, linear_bias=b)
    assert not alone.requires_grad and torch.equal(alone, loss) and torch.equal(inferred, loss)


def test_tied_weights_add_up():
    """The weight is the embedding too; autograd adds both gradients, to one that is there already."""
    problem = make()
    tokens = torch.randint(N_CLASSES, (N_ROWS,), generator=torch.Generator().manual_seed(1))
    results = []
    for function in (linear_cross_entropy, whole):
        w = problem.linear_weight.clone().requires_grad_()
        w.grad = torch.ones_like(w)
        function(F.embedding(tokens, w).tanh(), w, problem.target).backward()
        results.append(w.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_grad_output_and_the_graph_kept(dtype):
    problem = make("ignore", dtype)
    x, w, b = (t.requires_grad_() for t in problem.layer)
    loss = linear_cross_entropy(x, w, problem.target, linear_bias=b)
    once, twice = (torch.autograd.grad(factor * loss, (x, w, b), retain_graph=True) for factor in (1, 2))
    last = torch.autograd.grad(loss, (x, w, b))
    for a, b, c in zip(once, twice, last, strict=True):
        assert torch.equal(a, c) and a.data_ptr() != c.data_ptr()
        torch.testing.assert_close(2 * a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_a_scaled_loss_keeps_small_gradients_of_half_precision():
    """What a gradient scaler is for: 1e-8 is 0 in float16, 2 ** 16 times as much is not."""
    problem = make("index", torch.float16)
    truth = step(whole, problem.to(torch.float64))[2]
    w = problem.linear_weight.clone().requires_grad_()
    (1e-4 * linear_cross_entropy(problem.input, w, problem.target, linear_bias=problem.linear_bias).float() * 2**16).backward()
    torch.testing.assert_close(w.grad.double() / (1e-4 * 2**16), truth, rtol=2e-3, atol=1e-8)


def test_the_gradient_is_handed_over():
    """No copy of the weight's gradient is made on the way to .grad."""
    problem = make()
    w = problem.linear_weight.requires_grad_()
    loss = linear_cross_entropy(problem.input, w, problem.target)
    made = loss.grad_fn
    while "fastxent" not in type(made).__name__:
        made = made.next_functions[0][0]
    pointers = {t.data_ptr() for t in made.saved_tensors if t is not None}
    loss.backward()
    assert w.grad.data_ptr() in pointers


# ----------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
import torch
from fastxent.torch import linear_cross_entropy
n, d, c, dtype, limit, warm = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10

def step(n, c, **options):
    x, w = (torch.ones(m, d, dtype=dtype).requires_grad_() for m in (n, c))
    y = torch.arange(n) % c
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    linear_cross_entropy(x, w, y, **options).backward()
    gradients = sum(t.grad.nbytes for t in (x, w))
    if dtype.itemsize == 2:  # those of float32, in which they add up
        gradients += 2 * sum(t.grad.nbytes for t in (x, w))
    return status("VmHWM") - before - gradients

step(*warm)  # loads BLAS and kernels
print(step(n, c, memory_limit=limit))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [None, 32_000_000])
def test_peak_of_memory(dtype, limit):
    """Whatever the number of rows: at most the limit, or the larger of 64 MB and the weight's bytes. The logits have 524 MB."""
    n, d, c = 4096, 64, 32000
    processes = (int(run_script(PEAK, json.dumps([n, d, c, dtype, limit, [80, 32000]]))) for _ in range(2))
    _, extra = processes  # the first may compile a kernel
    assert extra <= (limit or max(64_000_000, c * d * 4)) + (16 << 20)


# ----------------------------------------------------------------------------------------------------
# The module
# ----------------------------------------------------------------------------------------------------


def test_module():
    problem = make("weight")
    loss = LinearCrossEntropyLoss(N_FEATURES, N_CLASSES, bias=True, weight=problem.options["weight"], label_smoothing=0.1)
    assert set(loss.state_dict()) == {"weight", "linear.weight", "linear.bias"}
    loss(problem.input, problem.target).backward()
    logits = loss.linear(problem.input)
    want = F.cross_entropy(logits, problem.target, problem.options["weight"], label_smoothing=0.1)
    torch.testing.assert_close(loss(problem.input, problem.target), want)
    torch.testing.assert_close(loss.linear.weight.grad, torch.autograd.grad(want, loss.linear.weight)[0])
    assert "num_classes=400" in repr(loss)
    deep = LinearCrossEntropyLoss(4, 6, out_features=(2, 3), bias=True)
    assert deep(torch.randn(5, 4), torch.randint(6, (5, 2, 3))).shape == ()


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="since PyTorch 2.13")
def test_the_modules_state_is_pytorchs():
    ours, theirs = LinearCrossEntropyLoss(4, 6, bias=True), nn.LinearCrossEntropyLoss(4, 6, bias=True)
    ours.load_state_dict(theirs.state_dict())
    x, y = torch.randn(5, 4), torch.randint(6, (5,))
    torch.testing.assert_close(ours(x, y), theirs(x, y))
