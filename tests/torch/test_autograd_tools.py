"""Checkpointing, hooks, anomaly mode, determinism, subclasses: the tools that people put around a backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastxent.torch import CrossEntropyLoss, cross_entropy
from tests.helpers.cases import REDUCTIONS, Case
from tests.helpers.opponent import torch_loss
from tests.helpers.torch_cases import make_case

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def leaf(case: Case) -> torch.Tensor:
    return case.logits.clone().requires_grad_()


def backward(function, case: Case, reduction: str) -> torch.Tensor:
    x = leaf(case)
    loss = function(x, case.target, reduction=reduction, **case.options)
    (loss * torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return x.grad


OPTION = "weight ignore smoothing sample_weight z_loss softcap"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("option", ["index", "probabilities", OPTION])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_checkpoint(reduction, option, reentrant):
    case = make_case(torch.float64, (5, 60), option)

    def checkpointed(x, target, **options):
        return checkpoint(lambda v: cross_entropy(v * 2, target, **options), x, use_reentrant=reentrant)

    def plain(x, target, **options):
        return torch_loss(x * 2, target, **options)

    got, want = backward(checkpointed, case, reduction), backward(plain, case, reduction)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", ["index", "probabilities", OPTION])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_saved_tensor_hooks(reduction, option):
    """The logits that wait for the backward go through the hooks, and come back as another tensor."""
    case = make_case(torch.float64, (5, 60), option)
    packed: list[torch.Size] = []

    def pack(t: torch.Tensor) -> list[object]:
        packed.append(t.shape)
        return [t.dtype, t.shape, t.flatten().tolist()]

    def unpack(p: list[object]) -> torch.Tensor:
        return torch.tensor(p[2], dtype=p[0]).reshape(p[1])

    x = leaf(case)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = cross_entropy(x * 2, case.target, reduction=reduction, **case.options)
    assert case.logits.shape in packed
    loss.sum().backward()
    want = leaf(case)
    torch_loss(want * 2, case.target, reduction, **case.options).sum().backward()
    torch.testing.assert_close(x.grad, want.grad, rtol=1e-12, atol=1e-12)


def test_save_on_cpu():
    case = make_case(torch.float64, (5, 60), "weight")
    x = leaf(case)
    with torch.autograd.graph.save_on_cpu():
        loss = cross_entropy(x, case.target, **case.options)
    loss.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(x, case.target, **case.options), x)[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_changing_the_logits_before_the_backward_is_noticed_or_harmless(reduction):
    """F.cross_entropy keeps log-probabilities; we may keep the logits, and must then raise, not return another gradient."""
    case = make_case(torch.float64, (5, 60))
    x = leaf(case)
    logits = x * 1
    loss = cross_entropy(logits, case.target, reduction=reduction).sum()
    with torch.no_grad():
        logits.zero_()
    want = torch.autograd.grad(F.cross_entropy(x, case.target, reduction=reduction).sum(), x)[0]
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hooks_on_tensors_see_and_may_change_the_gradient(reduction, factor):
    case = make_case(torch.float64, (5, 60))
    results = []
    for function in (cross_entropy, F.cross_entropy):
        x = leaf(case)
        logits = x * 1
        logits.register_hook(lambda g: g.mul_(3))  # in place, as PyTorch forbids in words only
        loss = function(logits, case.target, reduction=reduction).sum()
        loss.register_hook(lambda g: g * factor)
        loss.backward(retain_graph=True)
        x.grad = None
        loss.backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


# PyTorch warns that anomaly mode is slow, and prints the forward's traceback as a warning.
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_anomaly_mode(reduction):
    case = make_case(torch.float64, (5, 60))
    with torch.autograd.detect_anomaly():
        got = backward(cross_entropy, case, reduction)
        torch.testing.assert_close(got, backward(F.cross_entropy, case, reduction), rtol=1e-12, atol=1e-12)
        case.logits[2, 3] = float("nan")
        with pytest.raises(RuntimeError, match=r"returned nan values in its 0th output"):
            backward(cross_entropy, case, reduction)


@pytest.mark.parametrize("shape", [(300, 60), (40, 3, 9, 9)], ids=str)
def test_deterministic_mode_and_number_of_threads_change_no_bit(shape):
    case = make_case(torch.float32, shape, "weight ignore")
    before = torch.get_num_threads()
    results = []
    try:
        for threads, deterministic in ((1, False), (1, True), (2, True), (4, True), (3, False)):
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)
            results.append([backward(cross_entropy, case, r) for r in REDUCTIONS])
            results[-1] += [cross_entropy(case.logits, case.target, reduction=r, **case.options) for r in REDUCTIONS]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_multithreaded_backward_of_one_graph():
    """Two threads run backward through one graph at once; each wants the whole gradient."""
    from concurrent.futures import ThreadPoolExecutor

    case = make_case(torch.float64, (50, 60))
    x = leaf(case)
    loss = cross_entropy(x, case.target)
    (want,) = torch.autograd.grad(F.cross_entropy(x, case.target), x)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(torch.autograd.grad, loss * k, x, retain_graph=True) for k in range(1, 21)]
        for k, job in enumerate(jobs, 1):
            torch.testing.assert_close(job.result()[0], want * k, rtol=1e-12, atol=1e-12)


def test_the_graph_is_freed():
    """No cycle keeps logits or gradient alive until the garbage collector comes by."""
    import gc
    import weakref

    case = make_case(torch.float32, (5, 60))
    gc.collect()
    gc.disable()
    try:
        for reduction in REDUCTIONS:
            for finish in (True, False):
                x = leaf(case)
                logits = x * 1
                alive = weakref.ref(logits)
                loss = cross_entropy(logits, case.target, reduction=reduction).sum()
                if finish:
                    loss.backward()
                del loss, logits, x
                assert alive() is None, (reduction, finish)
    finally:
        gc.enable()


class Tagged(torch.Tensor):
    """A subclass as users write them: data only, behaviour inherited."""


def test_subclasses_and_parameters():
    case = make_case(torch.float64, (5, 60))
    want = cross_entropy(case.logits, case.target)
    tagged = case.logits.clone().as_subclass(Tagged)
    got = cross_entropy(tagged, case.target)
    assert type(got) is Tagged and torch.equal(got.as_subclass(torch.Tensor), want)
    assert type(F.cross_entropy(tagged, case.target)) is Tagged
    parameter = torch.nn.Parameter(case.logits.clone())
    CrossEntropyLoss()(parameter, case.target).backward()
    (want,) = torch.autograd.grad(F.cross_entropy(parameter, case.target), parameter)
    torch.testing.assert_close(parameter.grad, want, rtol=1e-12, atol=1e-12)


def test_torch_function_modes_see_the_call():
    from torch.overrides import TorchFunctionMode

    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    case = make_case(torch.float64, (5, 60))
    with Watch():
        got = cross_entropy(case.logits, case.target)
    assert torch.equal(got, cross_entropy(case.logits, case.target)) and seen
