"""Calls that were met before, under dispatch modes: they see ours, forward and backward, and results are right.

A known call runs machine code on the tensors' memory, which nobody can see.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch._dynamo  # first, or PyTorch's modes are imported in a circle
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastxent._fastpath.cache import calls
from tests.helpers.watched import REDUCTIONS, X, Y, agree, by_name, step, warm

pytestmark = pytest.mark.usefixtures("one_torch_thread")


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
