"""Calls that were met before, under all that watches operators: it sees ours, forward and backward, and results are right.

A known call runs machine code on the tensors' memory, which nobody can see.
"""

from __future__ import annotations

import re
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch._dynamo  # first, or PyTorch's modes are imported in a circle
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastxent.torch as ft
from fastxent._fastpath.cache import calls
from fastxent._runtime import fastpath
from fastxent.torch import _decomposition

pytestmark = pytest.mark.usefixtures("one_torch_thread")
X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, -100])
REDUCTIONS = ["mean", "none"]
DOORS = ["cross_entropy", "install"]


@pytest.fixture(params=DOORS)
def loss(request):
    """Ours, by either door."""
    with ft.installed() if request.param == "install" else nullcontext():
        calls.clear()
        yield F.cross_entropy if request.param == "install" else ft.cross_entropy
    calls.clear()


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


# ----------------------------------------------------------------------------------------------------
# Dispatch modes
# ----------------------------------------------------------------------------------------------------


def by_name(name):
    module, cls = name.split(":")
    return getattr(import_module(f"torch.{module}"), cls)


def flop_counter():
    return by_name("utils.flop_counter:FlopCounterMode")(display=False)


MODES = {  # where it is: how it is made
    "_functorch._aot_autograd.runtime_wrappers:_AnalyzeCustomOpInputOutputMode": lambda mode: mode(),
    "_subclasses.complex_tensor._ops.common:ComplexTensorMode": lambda mode: mode(),
    "_subclasses.complex_tensor._ops.common:WrapComplexMode": lambda mode: mode(),
    "_subclasses.fake_tensor:FakeTensorMode": lambda mode: mode(allow_non_fake_inputs=True),
    "_subclasses.fake_utils:CrossRefFakeMode": lambda mode: mode(),
    "_subclasses.functional_tensor:FunctionalTensorMode": lambda mode: mode(),
    "_subclasses.schema_check_mode:SchemaCheckMode": lambda mode: mode(),
    "autograd.graph:_CloneArgBeforeMutateMode": lambda _: torch.autograd.graph.allow_mutation_on_saved_tensors(),
    "distributed._local_tensor:LocalTensorMode": lambda mode: mode(2),
    "distributed._tools.mem_tracker:MemTracker": lambda mode: mode(),
    "distributed.tensor._ops.strategy_validation:_CaptureAtenOp": lambda mode: mode(),
    "distributed.tensor.debug._comm_mode:CommDebugMode": lambda mode: mode(),
    "utils._debug_mode._mode:DebugMode": lambda mode: mode(),
    "utils._python_dispatch:BaseTorchDispatchMode": lambda mode: mode(),
    "utils.flop_counter:_FlopCounterMode": lambda _: flop_counter(),
}
ELSEWHERE = {  # why it is not in that list
    "fx.experimental.proxy_tensor:ProxyTorchDispatchMode": "test_make_fx",
    "utils.checkpoint:_CachingTorchDispatchMode": "test_selective_checkpoint",
    "utils.checkpoint:_CachedTorchDispatchMode": "test_selective_checkpoint",
    "utils._python_dispatch:YoloMode": "in a docstring",
    "utils._cuda_debug:_TensorTrackingMode": "needs CUDA",
    "cuda._sanitizer:CUDASanitizerDispatchMode": "needs CUDA",
    "_higher_order_ops.cudagraph_conditional_nodes:CUDAGraphCaptureControlFlowOpDispatchMode": "needs CUDA",
    "_higher_order_ops.cudagraph_conditional_nodes:ControlFlowOpWarmupDispatchMode": "needs CUDA",
    "distributed._tools.memory_tracker:MemoryProfileDispatchMode": "needs CUDA",
    "distributed._tools.runtime_estimator:RuntimeEstimator": "needs CUDA",
    "distributed._tools.sac_estimator:SACEstimator": "needs CUDA",
    "distributed.tensor._decompositions:PlacementTrackingMode": "takes distributed tensors only",
    "_vendor.quack.cache.compile_only:_LocalScalarDenseSentinel": "needs CUDA",
}


@pytest.fixture(params=MODES, ids=lambda name: name.split(":")[1])
def mode(request, monkeypatch):
    """Two ways to be under a mode of PyTorch, and the operators that it sees."""
    cls = by_name(request.param)
    seen, its_own = [], cls.__torch_dispatch__

    def spy(self, func, types, args=(), kwargs=None):
        seen.append(str(func))
        return its_own(self, func, types, args, kwargs or {})

    monkeypatch.setattr(cls, "__torch_dispatch__", spy)
    return lambda: MODES[request.param](cls), seen


def agree(got, want):
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        if type(g) is torch.Tensor:
            torch.testing.assert_close(g.detach(), w.detach())


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # CrossRefFakeMode looks there
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mode_sees_a_known_call(loss, reduction, mode):
    enter, seen = mode
    want = warm(loss, reduction)
    with enter():
        value = loss(X, Y, reduction=reduction)
        assert "fastxent.cross_entropy.default" in seen
        agree([value], want[:1])
        seen.clear()
        got = step(loss, X, reduction)
    assert any(op.startswith("fastxent.cross_entropy") for op in seen)
    agree(got, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mode_that_is_entered_before_the_backward(loss, reduction, mode):
    """The node is one of eager mode then. Its gradient is made of operators, and nobody's numbers are asked for."""
    enter, seen = mode
    want = warm(loss, reduction)
    x = X.clone().requires_grad_()
    made = loss(x, Y, reduction=reduction)
    upstream = torch.full(made.shape, 2.0)
    with enter():
        seen.clear()
        (got,) = torch.autograd.grad(made, x, upstream)
    assert ("aten.mul.Tensor" if reduction == "mean" else "fastxent.cross_entropy_value_and_grad.default") in seen
    assert "aten._local_scalar_dense.default" not in seen
    agree([got], want[1:])


def test_no_mode_of_pytorch_is_forgotten():
    """A text search, for the modules of some cannot be imported everywhere."""
    if not torch.__version__.startswith("2.13."):
        pytest.skip("the list is that of PyTorch 2.13")
    root = Path(torch.__file__).parent
    found = {
        f"{'.'.join(file.relative_to(root).with_suffix('').parts).removesuffix('.__init__')}:{name}"
        for file in root.rglob("*.py")
        if "testing" not in file.parts
        for name in re.findall(r"^ *class (\w+)\((?:.*\W)?TorchDispatchMode\)", file.read_text(encoding="utf-8"), re.M)
    }
    assert found == {*MODES, *ELSEWHERE}


class Records(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class MayBeCompiledAway(Records):
    """Guards of PyTorch's compiler do not notice such a mode."""

    @classmethod
    def ignore_compile_internals(cls):
        return True


@pytest.mark.parametrize("mode_of_a_user", [Records, MayBeCompiledAway])
def test_nothing_is_remembered_under_a_mode(loss, mode_of_a_user):
    with mode_of_a_user() as records:
        for _ in range(4):
            step(loss, X)
            loss(X, Y)
    assert not len(calls)
    assert sum(op.startswith("fastxent") for op in records.seen) >= 8


@pytest.mark.parametrize("mode_of_a_user", [Records, MayBeCompiledAway])
def test_weights_and_other_kinds(loss, mode_of_a_user):
    """Calls that no guard knows, but the call cache does."""
    weight = torch.rand(5) + 0.5
    calls = [{"weight": weight}, {"weight": weight, "label_smoothing": 0.1}, {"reduction": "sum"}, {"label_smoothing": 0.2}]
    for _ in range(2):
        want = [loss(X, Y, **options) for options in calls]
    with mode_of_a_user() as records:
        got = [loss(X, Y, **options) for options in calls]
    assert records.seen.count("fastxent.cross_entropy.default") == len(calls)
    torch.testing.assert_close(got, want)


def test_a_second_backward_under_a_mode_is_refused_as_ever(loss):
    warm(loss)
    x = X.clone().requires_grad_()
    made = loss(x, Y)
    with Records():
        made.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            made.backward()


def test_selective_checkpoint(loss):
    want = warm(loss)
    seen = []

    def policy(context, op, *args, **kwargs):
        seen.append((context.is_recompute, str(op)))
        return CheckpointPolicy.PREFER_RECOMPUTE

    x = X.clone().requires_grad_()
    made = checkpoint(loss, x, Y, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    (grad,) = torch.autograd.grad(made, x, torch.tensor(2.0))
    agree([made, grad], want)
    assert any(op.startswith("fastxent") for _, op in seen)


# ----------------------------------------------------------------------------------------------------
# Tracers
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(loss, tracing_mode, pre_dispatch, reduction):
    warm(loss, reduction)
    how = {"tracing_mode": tracing_mode, "pre_dispatch": pre_dispatch}
    traced = make_fx(lambda x, y: loss(x, y, reduction=reduction), **how)(X, Y)
    assert "cross_entropy" in traced.code
    torch.testing.assert_close(traced(X.flip(0), Y), loss(X.flip(0), Y, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_of_a_step(reduction, pre_dispatch):
    want = warm(ft.cross_entropy, reduction)
    traced = make_fx(lambda x: step(ft.cross_entropy, x, reduction), pre_dispatch=pre_dispatch)(torch.zeros(6, 5))
    agree(traced(X), want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_of_a_backward_alone(loss, reduction, pre_dispatch):
    want = warm(loss, reduction)
    x = X.clone().requires_grad_()
    made = loss(x, Y, reduction=reduction)
    traced = make_fx(lambda g: torch.autograd.grad(made, x, g, retain_graph=True), pre_dispatch=pre_dispatch)(
        torch.ones(made.shape)
    )
    agree(traced(torch.full(made.shape, 2.0)), want[1:])


def test_aot_function(loss):
    from torch._functorch.aot_autograd import aot_function, make_boxed_func

    want = warm(loss)
    graphs = []

    def compiler(graph, _):
        graphs.append(graph.code)
        return make_boxed_func(graph)

    compiled = aot_function(lambda x, y: loss(x, y), compiler, compiler)
    x = X.clone().requires_grad_()
    made = compiled(x, Y)
    agree([made, torch.autograd.grad(made, x, torch.tensor(2.0))[0]], want)
    assert "fastxent.cross_entropy" in graphs[0]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    warm(ft.cross_entropy)
    program = torch.export.export(ft.CrossEntropyLoss(), (X, Y), strict=strict)
    assert "fastxent.cross_entropy" in program.graph_module.code
    torch.testing.assert_close(program.module()(X.flip(0), Y), ft.cross_entropy(X.flip(0), Y))


def test_symbolic_trace():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = ft.CrossEntropyLoss()

        def forward(self, x, y):
            return self.loss(x * 2, y)

    warm(ft.cross_entropy)
    traced = torch.fx.symbolic_trace(Model())
    assert "cross_entropy" in traced.code
    torch.testing.assert_close(traced(X, Y), F.cross_entropy(2 * X, Y))


# ----------------------------------------------------------------------------------------------------
# Function modes, transforms, and the rest of PyTorch's state
# ----------------------------------------------------------------------------------------------------

FUNCTION_MODES = [
    "_dynamo._trace_wrapped_higher_order_op:TransformGetItemToIndex",
    "_prims.context:TorchRefsMode",
    "_subclasses.fake_tensor:FakeCopyMode",
    "export._safeguard:AutogradStateOpsFailSafeguard",
    "overrides:BaseTorchFunctionMode",
    "utils._device:DeviceContext",
]


@pytest.mark.parametrize("name", FUNCTION_MODES, ids=lambda name: name.split(":")[1])
def test_function_mode_sees_a_known_call(loss, name, monkeypatch):
    cls = by_name(name)
    seen, its_own = [], cls.__torch_function__

    def spy(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return its_own(self, func, types, args, kwargs or {})

    monkeypatch.setattr(cls, "__torch_function__", spy)
    argument = {"DeviceContext": "cpu", "FakeCopyMode": None}
    want = warm(loss)
    with cls(*[argument[cls.__name__]] if cls.__name__ in argument else []):
        got = loss(X, Y)
    assert loss in seen
    torch.testing.assert_close(got, want[0])


SURROUNDINGS = {
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "profile": torch.profiler.profile,
    "emit none": lambda: torch.autograd.profiler.record_function("ours"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "forward_ad": torch.autograd.forward_ad.dual_level,
    "enable_python_dispatcher": lambda: import_module("torch._dispatch.python").enable_python_dispatcher(),
    "multithreading": lambda: torch.autograd.set_multithreading_enabled(False),
    "deterministic": lambda: deterministic(),
}


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_known_call_in_surroundings(loss, name, reduction):
    want = warm(loss, reduction)
    for _ in range(3):
        with SURROUNDINGS[name]():
            agree(step(loss, X, reduction), want)
    agree(step(loss, X, reduction), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_inference_and_autocast_change_no_known_call(loss, dtype):
    x = X.to(dtype)
    contexts = [nullcontext, torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
    with uninstalled():
        wants = []
        for context in contexts:
            with context():
                wants.append(F.cross_entropy(x, Y))
    for _ in range(4):
        for context, want in zip(contexts, wants, strict=True):
            with context():
                got = loss(x, Y)
            assert (got.dtype, got.is_inference()) == (want.dtype, want.is_inference())
            torch.testing.assert_close(got, want)


TRANSFORMS = {
    "vmap": lambda loss: torch.vmap(lambda x: loss(x, Y))(torch.stack([X, X])),
    "vmap, nothing batched": lambda loss: torch.vmap(lambda s: s * loss(X, Y))(torch.ones(2)),
    "grad": lambda loss: torch.func.grad(lambda x: loss(x, Y))(X),
    "grad, of something else": lambda loss: torch.func.grad(lambda s: s * loss(X, Y))(torch.tensor(1.0)),
    "jvp": lambda loss: torch.func.jvp(lambda x: loss(x, Y), (X,), (X,)),
    "functionalize": lambda loss: torch.func.functionalize(lambda x: loss(x, Y))(X),
    "make_fx of functionalize": lambda loss: make_fx(torch.func.functionalize(lambda x: loss(x, Y)))(X)(X),
    "forward AD": lambda loss: dual(loss),
    "batched gradients": lambda loss: batched(loss),
    "gradient of a gradient": lambda loss: twice(loss),
}


def dual(loss):
    with torch.autograd.forward_ad.dual_level():
        made = loss(torch.autograd.forward_ad.make_dual(X, X), Y)
        return torch.autograd.forward_ad.unpack_dual(made).tangent


def batched(loss):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(loss(x, Y, reduction="none"), x, torch.eye(6), is_grads_batched=True)[0]


def twice(loss):
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x, Y), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_known_call_in_a_transform(loss, name):
    warm(loss), warm(loss, "none")
    with uninstalled():
        want = TRANSFORMS[name](F.cross_entropy)
    torch.testing.assert_close(TRANSFORMS[name](loss), want)
