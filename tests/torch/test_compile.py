"""torch.compile, torch.export and the operators that they see: one graph, the same values, and fastxent in it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastxent.torch as fxt
from fastxent.torch import (
    CrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
    linear_log_prob_and_entropy,
    log_prob_and_entropy,
)
from tests.helpers.cases import REDUCTIONS, Case
from tests.helpers.launches import counted
from tests.helpers.opponent import torch_loss
from tests.helpers.torch_cases import DTYPES, make_case

# Of PyTorch 2.13's own compiler, about its own code.
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

FULL = "weight ignore smoothing sample_weight z_loss softcap"
COMPILED = ["index", "weight ignore smoothing", "probabilities", FULL]
CLOSE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def step(function, case: Case, reduction: str, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a call whose logits are computed, as in a model."""
    x = (case.logits if x is None else x).detach().clone().requires_grad_()
    loss = function(x, case.target, case.options, reduction)
    loss.sum().backward()
    return loss.detach(), x.grad


def ours(x: Tensor, target: Tensor, options: dict, reduction: str) -> Tensor:
    return cross_entropy(x * 2, target, reduction=reduction, **options)


def theirs(x: Tensor, target: Tensor, options: dict, reduction: str) -> Tensor:
    return torch_loss(x * 2, target, reduction, **options)


def check(function, case: Case, reduction: str) -> None:
    dtype = case.logits.dtype
    want_loss, want_grad = step(theirs, case._replace(logits=case.logits.double(), **widened(case)), reduction)
    loss, grad = step(function, case, reduction)
    assert loss.dtype == grad.dtype == dtype
    size = want_grad.abs().max().item()
    torch.testing.assert_close(loss.double(), want_loss, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    torch.testing.assert_close(grad.double(), want_grad, rtol=CLOSE[dtype], atol=CLOSE[dtype] * size)


def widened(case: Case) -> dict:
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.options.items()}
    return dict(options=wide, target=case.target.double() if case.soft else case.target)


# ----------------------------------------------------------------------------------------------------
# torch.compile
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (5, 60), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("option", COMPILED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_graph(reduction, option, shape):
    """fullgraph=True raises at a break. The compiled code ran our kernel, not PyTorch's decomposition."""
    case = make_case(torch.float64, shape, option)
    with counted() as kernels:
        check(compiled(ours), case, reduction)
    assert "value_and_grad" in kernels


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
def test_other_dtypes(dtype):
    case = make_case(dtype, (5, 60), "weight ignore")
    for reduction in REDUCTIONS:
        with counted() as kernels:
            check(compiled(ours), case, reduction)
        assert "value_and_grad" in kernels


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_work(mode):
    case, function = make_case(torch.float64, (5, 60)), compiled(ours)
    with counted() as kernels, mode():
        loss = function(case.logits.clone().requires_grad_(), case.target, {}, "mean")
    assert not loss.requires_grad and "value" in kernels and not [k for k in kernels if "grad" in k]
    torch.testing.assert_close(loss, theirs(case.logits, case.target, {}, "mean"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dynamic_shapes(reduction):
    """Compiled for all numbers of rows and classes, as often as PyTorch's own loss is."""
    counts = []
    for function in (theirs, ours):
        counter = CompileCounterWithBackend("aot_eager")
        function = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        for shape in [(5, 60), (7, 33), (12, 128), (3, 9), (64, 49)]:
            check(function, make_case(torch.float64, shape, "weight"), reduction)
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0] < 5


def test_shapes_that_turn_dynamic_by_themselves():
    function = compiled(ours)
    for rows in (4, 5, 6, 9):
        check(function, make_case(torch.float64, (rows, 60), "ignore"), "mean")


def test_integer_targets_and_strides():
    for integer in (torch.int32, torch.uint8):
        case = make_case(torch.float64, (5, 60))
        check(compiled(lambda x, t, o, r, i=integer: ours(x, t.to(i), o, r)), case, "mean")
    case = make_case(torch.float64, (2, 60, 3, 4))
    check(compiled(ours), case._replace(logits=case.logits.contiguous(memory_format=torch.channels_last)), "mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_grad_output(reduction):
    case = make_case(torch.float64, (5, 60), "weight")

    def scaled(function):
        def run(x, target, options, reduction):
            loss = function(x, target, options, reduction)
            return loss * torch.linspace(0.5, 2, max(1, loss.numel()), dtype=loss.dtype).reshape(loss.shape)

        return run

    got, want = step(compiled(scaled(ours)), case, reduction), step(scaled(theirs), case, reduction)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_module_in_a_model():
    torch.manual_seed(0)
    results = []
    for loss in (CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 60)).double()
        x, y = torch.randn(9, 8, dtype=torch.float64), torch.arange(9)
        run = compiled(lambda a, b, m=model, f=loss: f(m(a), b))
        run(x, y).backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_errors_are_raised_in_compiled_code():
    function = compiled(ours)
    with pytest.raises(IndexError, match=r"Target 60 is out of bounds\."):
        function(torch.zeros(5, 60), torch.full((5,), 60), {}, "mean")


def test_inplace_in_compiled_code():
    """A permission: values and gradients are right, the caller's logits too."""
    case = make_case(torch.float64, (5, 60))
    check(compiled(lambda x, t, o, r: cross_entropy(x * 2, t, reduction=r, inplace=True)), case, "mean")


def test_trained_probabilities():
    case = make_case(torch.float64, (5, 60), "probabilities")
    results = []
    for function in (compiled(cross_entropy), F.cross_entropy):
        x, t = case.logits.clone().requires_grad_(), case.target.clone().requires_grad_()
        results.append(torch.autograd.grad(function(x, t), [x, t]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


TRANSFORMS = {
    "grad": torch.func.grad,
    "hessian": torch.func.hessian,
    "vmap": lambda f: torch.vmap(lambda k: f(k * torch.ones(5, 7, dtype=torch.float64).cumsum(1))),
    "vmap of grad": lambda f: lambda x: torch.vmap(lambda k: torch.func.grad(f)(x * k))(x[0]),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.cos(x),))[1],
}


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_inside_compiled_code(transform, installed):
    case = make_case(torch.float64, (5, 7), "weight ignore")
    x = case.logits[0] if transform is TRANSFORMS["vmap"] else case.logits

    def loss(f):
        return lambda v: f(v, case.target, **case.options)

    want = transform(loss(F.cross_entropy))(x)
    with fxt.installed() if installed else nullcontext():
        got = compiled(transform(loss(F.cross_entropy if installed else cross_entropy)))(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_dual_numbers_inside_compiled_code():
    case = make_case(torch.float64, (5, 7))

    def tangent(f, x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.cos(x)), case.target)).tangent

    got, want = compiled(tangent)(cross_entropy, case.logits), tangent(F.cross_entropy, case.logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("option", COMPILED)
def test_inductor(option, dynamic):
    """The compiler of the default: generated C++ around our operator."""
    function = compiled(ours, backend="inductor", dynamic=dynamic)
    for reduction in REDUCTIONS:
        for shape in [(5, 60), (8, 17)]:
            with counted() as kernels:
                check(function, make_case(torch.float32, shape, option), reduction)
            assert "value_and_grad" in kernels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_inductor_in_other_dtypes(dtype):
    function = compiled(ours, backend="inductor")
    check(function, make_case(dtype, (5, 60), "weight"), "mean")
    case = make_case(dtype, (2, 60, 3, 4))
    check(function, case._replace(logits=case.logits.contiguous(memory_format=torch.channels_last)), "mean")


# ----------------------------------------------------------------------------------------------------
# torch.export
# ----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(8, 60), CrossEntropyLoss(weight=torch.linspace(0.5, 2, 60))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.linear(x), target)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """The program has our operator in it, takes any number of rows, and survives a file."""
    torch.manual_seed(0)
    model, rows = Model(), torch.export.Dim("rows", min=2, max=100)
    arguments = (torch.randn(5, 8), torch.arange(5))
    program = torch.export.export(model, arguments, dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert any("fastxent" in str(node.target) for graph in graphs for node in graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program.module(), torch.export.load(file).module()):
        for n in (5, 9):
            x, y = torch.randn(n, 8), torch.arange(n)
            torch.testing.assert_close(exported(x, y), model(x, y))


def test_fx_and_fake_tensors():
    """Meta data without data: shape, dtype and strides of loss and gradient, for any option."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in DTYPES:
        for option in COMPILED:
            case = make_case(dtype, (5, 60), option)
            for reduction in REDUCTIONS:
                x = case.logits.clone().requires_grad_()
                want = torch_loss(x, case.target, reduction, **case.options)
                with FakeTensorMode() as mode:
                    fake = mode.from_tensor(x)
                    o = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in case.options.items()}
                    got = cross_entropy(fake, mode.from_tensor(case.target), reduction=reduction, **o)
                    (grad,) = torch.autograd.grad(got.sum(), fake)
                assert (got.shape, got.dtype) == (want.shape, want.dtype)
                assert (grad.shape, grad.dtype, grad.stride()) == (x.shape, x.dtype, x.stride())


# ----------------------------------------------------------------------------------------------------
# Operators
# ----------------------------------------------------------------------------------------------------


class Record(TorchDispatchMode):
    """The calls of our operators, with arguments that can be used again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastxent":
            self.calls.append((func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args), kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded() -> list[tuple]:
    with Record() as record:
        for option in COMPILED:
            for shape in [(6,), (5, 60), (2, 3, 4)]:
                for dtype in (torch.float32, torch.bfloat16):
                    case = make_case(dtype, shape, option)
                    for reduction in REDUCTIONS:
                        step(ours, case, reduction)
                        ours(case.logits, case.target, case.options, reduction)
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(dtype, (5, 60), "ignore")
            leaf = case.logits.requires_grad_()
            sum(t.sum() for t in log_prob_and_entropy(leaf, case.target, temperature=0.7)).backward()
            hidden, head = (torch.rand(n, 8, dtype=dtype).requires_grad_() for n in (5, 60))
            for reduction in REDUCTIONS:
                linear_cross_entropy(hidden, head, case.target, reduction=reduction).sum().backward()
                linear_cross_entropy(hidden.detach(), head.detach(), case.target, reduction=reduction)
            sum(t.sum() for t in linear_log_prob_and_entropy(hidden, head, case.target)).backward()
    return record.calls


@pytest.mark.thorough
def test_opcheck():
    """Schema (nothing aliased, nothing mutated that is not said), fake tensors, autograd registration, dynamic AOT."""
    calls = recorded()
    exercised = {func.name().split("::")[1] for func, *_ in calls}
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastxent::")}
    assert registered and exercised == registered
    for func, args, kwargs in calls:
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("option", COMPILED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_under_a_dispatch_mode(reduction, option):
    """Part of the second derivative reaches the logits by other ways: a missing rest would go unnoticed."""
    case, results = make_case(torch.float64, (5, 7), option), []
    for function, mode in ((cross_entropy, Record()), (torch_loss, nullcontext())):
        x = case.logits.clone().requires_grad_()
        scale = x.square().sum()
        with mode:
            loss = (function(x, case.target, reduction=reduction, **case.options) * scale).sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            results.append(torch.autograd.grad((grad**3).sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operators_are_differentiable_themselves(reduction):
    """An exported program holds them, and may be trained."""
    case = make_case(torch.float64, (5, 7), "weight ignore")
    x = case.logits.clone().requires_grad_()
    op = torch.ops.fastxent.cross_entropy
    weight = case.options["weight"]
    loss = op(x, case.target, weight, None, REDUCTIONS.index(reduction), -100, 0.0, 0.0, 0.0)
    (grad,) = torch.autograd.grad((2 * loss).sum(), x)
    want = torch.func.grad(lambda v: 2 * F.cross_entropy(v, case.target, weight, reduction=reduction).sum())(case.logits)
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)


def test_operators_give_what_the_functions_give():
    """A dispatch mode (profilers, counters of FLOPs) sees the operators; the values do not change."""
    case = make_case(torch.float64, (5, 60), FULL)
    for reduction in REDUCTIONS:
        with Record() as record:
            seen = step(ours, case, reduction)
        assert record.calls
        for got, want in zip(seen, step(ours, case, reduction), strict=True):
            assert torch.equal(got, want)
