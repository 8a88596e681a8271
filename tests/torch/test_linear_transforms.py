"""What PyTorch's chunked path refuses: further derivatives, torch.func, compilers, tracers, checkpointing, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from fastxent.torch import LinearCrossEntropyLoss, linear_cross_entropy, linear_log_prob_and_entropy
from tests.helpers.cases import REDUCTIONS
from tests.helpers.opponent import torch_loss

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]
double = torch.float64
Loss = Callable[..., Tensor]


def make(n_rows: int = 5, n_features: int = 4, n_classes: int = 6, dtype: torch.dtype = double) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n_classes)
    shapes = (n_rows, n_features), (n_classes, n_features), (n_classes,)
    x, w, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    y = torch.randint(n_classes, (n_rows,), generator=generator)
    y[1] = -100
    return x, w, b, y


def whole(
    x: Tensor, w: Tensor, y: Tensor, *, linear_bias: Tensor | None = None, reduction: str = "mean", **options: Any
) -> Tensor:
    return torch_loss(F.linear(x, w, linear_bias), y, reduction, **options)


def step(function: Loss, tensors: tuple[Tensor, ...], reduction: str = "mean", **options: Any) -> list[Tensor]:
    x, w, b = (t.detach().clone().requires_grad_() for t in tensors[:3])
    loss = function(x, w, tensors[3], linear_bias=b, reduction=reduction, **options)
    (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return [loss.detach(), x.grad, w.grad, b.grad]


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def losses(y: Tensor, reduction: str) -> list[Loss]:
    """Ours and PyTorch's, of input, weight and bias alone."""
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1}
    return [lambda x, w, b, f=f: f(x, w, y, linear_bias=b, **options) for f in (linear_cross_entropy, whole)]


# ----------------------------------------------------------------------------------------------------
# Derivatives
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    *layer, y = make()
    ours, _ = losses(y, reduction)
    layer = [t.requires_grad_() for t in layer]
    assert gradcheck(
        ours, layer, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, check_undefined_grad=True
    )
    assert gradgradcheck(ours, layer, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dual_numbers(reduction):
    *layer, y = make()
    ours, theirs = losses(y, reduction)
    for nth in range(3):
        tangents = [torch.ones_like(t) if at == nth else torch.zeros_like(t) for at, t in enumerate(layer)]
        close(jvp(ours, tuple(layer), tuple(tangents)), jvp(theirs, tuple(layer), tuple(tangents)))
        results = []
        for function in (ours, theirs):
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(t, s) if at == nth else t
                    for at, (t, s) in enumerate(zip(layer, tangents, strict=True))
                ]
                results.append(forward_ad.unpack_dual(function(*duals)).tangent.clone())
        close(*results)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_all_kinds(reduction):
    """What comes back may be a batch, have a tangent, no memory, or another layout."""
    *layer, y = make()
    ours, theirs = losses(y, reduction)
    results = []
    for function in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in layer]
        loss = function(*leaves)
        ones = torch.linspace(1, 2, loss.numel(), dtype=double).reshape(loss.shape)
        zero = torch._efficientzerotensor(loss.shape, dtype=double)
        found = [torch.autograd.grad(loss, leaves, g, retain_graph=True) for g in (ones, zero, torch._neg_view(-ones))]
        found.append(torch.autograd.grad(loss, leaves, torch.stack([ones, 3 * ones]), is_grads_batched=True, retain_graph=True))
        with forward_ad.dual_level():
            made = torch.autograd.grad(loss, leaves, forward_ad.make_dual(ones, 2 * ones))
            assert not any(g.requires_grad for g in made)
            found.append([forward_ad.unpack_dual(g).tangent.clone() for g in made])
        results.append(found)
    close(*results)


def test_transforms():
    *layer, y = make()
    for reduction in ("mean", "sum"):
        ours, theirs = losses(y, reduction)
        close(grad(ours, (0, 1, 2))(*layer), grad(theirs, (0, 1, 2))(*layer))
    x, w, _b = layer
    per_row = [
        vmap(grad(lambda x, w, y, f=f: f(x[None], w, y[None], reduction="sum"), (0, 1)), (0, None, 0))(x, w, y)
        for f in (linear_cross_entropy, whole)
    ]
    close(*per_row)


def test_functional_call_of_the_module():
    x, w, b, y = make()
    module = LinearCrossEntropyLoss(4, 6, bias=True, dtype=double)
    gradients = grad(lambda parameters: functional_call(module, parameters, (x, y)))({"linear.weight": w, "linear.bias": b})
    want = step(whole, (x, w, b, y))
    close(gradients["linear.weight"], want[2])
    close(gradients["linear.bias"], want[3])


def test_a_gradient_of_probabilities():
    x, w, _, _ = make()
    t = torch.rand(5, 6, dtype=double)
    results = []
    for function in (linear_cross_entropy, whole):
        leaves = [a.clone().requires_grad_() for a in (x, w, t)]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    close(*results)


# ----------------------------------------------------------------------------------------------------
# Compilers and tracers
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_without_a_break(reduction, backend):
    torch._dynamo.reset()
    tensors = make(33, 8, 400, torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend=backend, fullgraph=True)
    ours, theirs = (
        step(compiled, tensors, reduction, memory_limit=1),
        step(linear_cross_entropy, tensors, reduction, memory_limit=1),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_compiled_for_any_number_of_rows_and_frozen_parts():
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 9, 17):
        x, w, _, y = make(n)
        w.requires_grad_()
        loss = compiled(x, w, y)
        loss.backward()
        close(w.grad, step(whole, (*make(n)[:2], torch.zeros(6, dtype=double), y))[2])


def test_compiled_half_precision_and_autocast():
    torch._dynamo.reset()
    tensors = make(33, 8, 400, torch.float32)

    def function(*args: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(*args, **options)

    eager, compiled = step(function, tensors), step(torch.compile(function, backend="aot_eager", fullgraph=True), tensors)
    for a, b in zip(compiled, eager, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_exported():
    x, _w, _b, y = make(33, 8, 400, torch.float32)
    module = LinearCrossEntropyLoss(8, 400, bias=True)
    program = torch.export.export(module, (x, y))
    assert "fastxent.linear_cross_entropy" in program.graph_module.code.replace("_value_and_grad", "")
    torch.testing.assert_close(program.module()(x, y), module(x, y))


def test_traced():
    x, w, _b, y = make(33, 8, 400, torch.float32)
    graph = make_fx(lambda x, w: linear_cross_entropy(x, w, y))(x, w)
    assert "fastxent" in graph.code
    assert torch.equal(graph(x, w), linear_cross_entropy(x, w, y))


def test_what_torchscript_saves_runs_without_fastxent():
    x, w, _b, y = make(5, dtype=torch.float32)
    traced = torch.jit.trace(lambda x, w, y: linear_cross_entropy(x, w, y), (x, w, y), check_trace=False)
    assert "fastxent::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x, w, y), linear_cross_entropy(x, w, y))


@pytest.mark.parametrize("reduction", [0, 1])
def test_operators(reduction):
    x, w, b, y = make(33, 8, 400, torch.float32)
    x, w = x.requires_grad_(), w.requires_grad_()
    arguments = (x, w, y, b, None, torch.rand(33), reduction, -100, 0.1, 0.0, 0.0, None)
    torch.library.opcheck(torch.ops.fastxent.linear_cross_entropy.default, arguments)
    if reduction:
        torch.library.opcheck(torch.ops.fastxent.linear_cross_entropy_value_and_grad.default, (*arguments, [True, True, False]))
    torch.library.opcheck(torch.ops.fastxent.linear_log_prob_and_entropy.default, (x, w, y, b, 0.7, -100, None))


# ----------------------------------------------------------------------------------------------------
# Surroundings
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_checkpointing(reduction, use_reentrant):
    tensors = make()

    def function(x: Tensor, w: Tensor, y: Tensor, *, linear_bias: Tensor, reduction: str) -> Tensor:
        inner = lambda x, w, b: linear_cross_entropy(x.tanh(), w, y, linear_bias=b, reduction=reduction)  # noqa: E731
        return checkpoint(inner, x, w, linear_bias, use_reentrant=use_reentrant)

    def plain(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return whole(x.tanh(), *args, **options)

    close(step(function, tensors, reduction), step(plain, tensors, reduction))


@pytest.mark.parametrize("weighted", [False, True])
def test_autocast(weighted):
    """As PyTorch's: the product in bfloat16, the loss in float32."""
    x, w, b, y = tensors = make(33, 8, 400, torch.float32)
    weight = torch.linspace(0.5, 2, 400) if weighted else None
    rounded = tuple(t.bfloat16().float() for t in (x, w, b))
    want = step(whole, (*rounded, y), weight=weight)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(linear_cross_entropy, tensors, weight=weight, memory_limit=1)
    for a, t in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert (a - t).abs().max() <= 2**-6 * t.abs().max()


def test_hooks_on_saved_tensors_and_anomaly_mode():
    tensors = make()
    want = step(whole, tensors)
    with torch.autograd.graph.save_on_cpu():
        close(step(linear_cross_entropy, tensors), want)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        close(step(linear_cross_entropy, tensors), want)


def test_a_weight_that_is_overwritten_before_the_backward():
    x, w, _b, y = make()
    for reduction in ("mean", "none"):
        weight = w.clone().requires_grad_()
        loss = linear_cross_entropy(x.requires_grad_(), weight, y, reduction=reduction)
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_other_tensors_go_to_pytorch():
    x, w, _b, y = make(dtype=torch.float32)
    meta = linear_cross_entropy(x.to("meta"), w.to("meta"), y.to("meta"))
    assert meta.device.type == "meta" and meta.shape == ()
    parameter = nn.Parameter(w)
    assert linear_cross_entropy(x, parameter, y).requires_grad


def test_log_prob_and_entropy():
    *layer, y = make()
    leaves = [t.requires_grad_() for t in layer]

    def function(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return linear_log_prob_and_entropy(x, w, y, linear_bias=b, temperature=1.3)

    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves)
    x, w, _b, y = make(33, 8, 400, torch.float32)
    torch._dynamo.reset()
    results = []
    for f in (linear_log_prob_and_entropy, torch.compile(linear_log_prob_and_entropy, fullgraph=True, backend="aot_eager")):
        leaf = w.clone().requires_grad_()
        log_prob, entropy = f(x, leaf, y)
        (log_prob - entropy).sum().backward()
        results.append((log_prob, entropy, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(t.dtype == torch.float32 for t in linear_log_prob_and_entropy(x, w, y))
