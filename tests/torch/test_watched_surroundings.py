"""Calls that were met before, under function modes, transforms and the rest of PyTorch's state: seen, and right."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from importlib import import_module

import pytest
import torch
import torch._dynamo  # first, or PyTorch's modes are imported in a circle
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers.watched import REDUCTIONS, X, Y, agree, by_name, step, uninstalled, warm

pytestmark = pytest.mark.usefixtures("one_torch_thread")


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
