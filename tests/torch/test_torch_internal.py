"""PyTorch's own test inputs, as they ship inside the wheel, on ours: by our names, by patch, and by `install`.

`torch.testing._internal` needs the package expecttest (extra `dev`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastxent.torch as fxt
from tests.helpers.launches import counted
from tests.helpers.torch_cases import DTYPES

# Of PyTorch's own forward mode and test inputs, about their own code.
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ..options.. ignored:UserWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def settings_as_before() -> Iterator[None]:
    """Importing PyTorch's test utilities draws random numbers and may set defaults."""
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    yield
    torch.set_default_dtype(dtype)
    torch.set_rng_state(state)


def patched() -> AbstractContextManager[Any]:
    patch = pytest.MonkeyPatch()
    patch.setattr(F, "cross_entropy", fxt.cross_entropy)

    class Undo:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            patch.undo()

    return Undo()


ROUTES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "our names": (nullcontext, "fastxent"),
    "by patch": (patched, "torch"),
    "by install": (fxt.installed, "torch"),
}
routes = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


def modules_db(name: str) -> Any:
    from torch.testing._internal.common_modules import module_db

    return next(m for m in module_db if m.module_cls is getattr(nn, name))


def module_inputs(name: str, dtype: torch.dtype, requires_grad: bool = True) -> list[Any]:
    info = modules_db(name)
    torch.manual_seed(0)
    found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=True)
    return list(found)


def opinfos(name: str) -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.name == name]


def tensors(*groups: Any) -> list[Tensor]:
    flat = torch.utils._pytree.tree_leaves(groups)
    return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]


def outcome(call: Callable[[], Tensor], *groups: Any) -> tuple[Tensor, ...]:
    """The result, and the gradients of all that wants one, under a grad_output that differs from row to row."""
    wanted, result = tensors(groups), call()
    if not wanted:
        return (result.detach(),)
    g = torch.linspace(0.5, 2, result.numel(), dtype=result.dtype).reshape(result.shape)
    return (result.detach(), *torch.autograd.grad(result, wanted, g))


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], label: object) -> None:
    """dtype and shape PyTorch's; values those of PyTorch in float64, within some ulps of the largest element."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape, label
        eps = torch.finfo(a.dtype).eps
        size = b.double().abs().nan_to_num().max().item() if b.numel() else 0.0
        close = dict(rtol=64 * eps, atol=64 * eps * max(size, 1), equal_nan=True)
        torch.testing.assert_close(a.double(), b.double(), **close, msg=str(label))


def wide(tree: Any) -> Any:
    """The same values in float64."""

    def up(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        return t.detach().to(torch.float64, copy=True).requires_grad_(t.requires_grad)

    return torch.utils._pytree.tree_map(up, tree)


# ----------------------------------------------------------------------------------------------------
# CrossEntropyLoss
# ----------------------------------------------------------------------------------------------------


def run_module(module: type[nn.Module], construct: Any, args: Any) -> tuple[Tensor, ...]:
    criterion = module(*construct.args, **construct.kwargs)
    return outcome(lambda: criterion(*args), args)


@routes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_inputs(dtype, route):
    inside, package = route
    found = module_inputs("CrossEntropyLoss", dtype)
    assert len(found) >= 60
    for entry in found:
        construct, args = entry.constructor_input, entry.forward_input.args
        stock = run_module(nn.CrossEntropyLoss, construct, args)
        exact = type(construct)(*wide(construct.args), **wide(construct.kwargs))
        want = run_module(nn.CrossEntropyLoss, exact, wide(args))
        with inside(), counted() as kernels:
            got = run_module(fxt.CrossEntropyLoss if package == "fastxent" else nn.CrossEntropyLoss, construct, args)
        assert kernels or args[1].requires_grad, entry.desc  # probabilities that are trained take PyTorch's operators
        assert [t.dtype for t in got] == [t.dtype for t in stock], entry.desc
        assert_near(got, want, entry.desc)


def made(package: str, entry: Any) -> nn.Module:
    module = (fxt if package == "fastxent" else nn).CrossEntropyLoss
    return module(*entry.constructor_input.args, **entry.constructor_input.kwargs)


@routes
def test_module_inputs_against_pytorchs_reference(route):
    """The reference function of each entry: cross-entropy written out in PyTorch's test utilities."""
    inside, package = route
    for entry in module_inputs("CrossEntropyLoss", torch.float64, requires_grad=False):
        with inside():
            module = made(package, entry)
            got = module(*entry.forward_input.args)
        want = entry.reference_fn(made("torch", entry), *entry.forward_input.args)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True, msg=entry.desc)


@routes
def test_module_error_inputs(route):
    inside, package = route
    info = modules_db("CrossEntropyLoss")
    found = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
    assert len(found) >= 7
    for error in found:
        entry = error.module_error_input
        with inside(), pytest.raises(error.error_type, match=error.error_regex):
            module = made(package, entry)
            module(*entry.forward_input.args)


@pytest.mark.thorough
@routes
def test_module_gradients_numerically(route):
    """What PyTorch's test_modules does: gradcheck and gradgradcheck of each entry in double."""
    inside, package = route
    for entry in module_inputs("CrossEntropyLoss", torch.float64):
        if entry.forward_input.args[0].numel() > 60:
            continue  # each element costs four calls
        module = made(package, entry)
        if module(*entry.forward_input.args).isnan().any():
            continue  # the few targets that were drawn are all ignored: a nan has no numerical derivative
        with inside():
            assert gradcheck(module, entry.forward_input.args, check_forward_ad=True), entry.desc
            assert gradgradcheck(module, entry.forward_input.args), entry.desc


# ----------------------------------------------------------------------------------------------------
# nn.functional.cross_entropy
# ----------------------------------------------------------------------------------------------------


def run_sample(function: Callable[..., Tensor], sample: Any) -> tuple[Tensor, ...]:
    return outcome(lambda: function(sample.input, *sample.args, **sample.kwargs), sample.input, sample.args, sample.kwargs)


@routes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_sample_inputs(requires_grad, dtype, route):
    inside, package = route
    (op,) = opinfos("nn.functional.cross_entropy")
    assert dtype in op.dtypes
    found = list(op.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    assert len(found) >= 20
    for sample in found:
        stock = run_sample(F.cross_entropy, sample)
        exact = wide((sample.input, sample.args, sample.kwargs))
        want = outcome(lambda e=exact: F.cross_entropy(e[0], *e[1], **e[2]), *exact)
        with inside(), counted() as kernels:
            got = run_sample(fxt.cross_entropy if package == "fastxent" else F.cross_entropy, sample)
        trained = any(t.requires_grad for t in sample.args if isinstance(t, Tensor))
        assert kernels or trained, sample
        assert [t.dtype for t in got] == [t.dtype for t in stock], sample
        assert_near(got, want, sample)


@pytest.mark.thorough
@routes
def test_sample_inputs_numerically(route):
    inside, package = route
    (op,) = opinfos("nn.functional.cross_entropy")
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        function = fxt.cross_entropy if package == "fastxent" else F.cross_entropy
        call = lambda *a, f=function, s=sample: f(*a, **s.kwargs)  # noqa: E731
        with inside():
            assert gradcheck(call, (sample.input, *sample.args), check_forward_ad=True, check_batched_grad=True), sample
            assert gradgradcheck(call, (sample.input, *sample.args), check_fwd_over_rev=True), sample


def test_error_inputs_of_the_operator():
    """There are none so far. When PyTorch adds some, they are run; till then this says so."""
    (op,) = opinfos("nn.functional.cross_entropy")
    errors = list(op.error_inputs("cpu")) if op.error_inputs_func is not None else []
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            fxt.cross_entropy(sample.input, *sample.args, **sample.kwargs)
    assert op.error_inputs_func is not None or not errors


# ----------------------------------------------------------------------------------------------------
# linear_cross_entropy, which ends in cross-entropy
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["by patch", "by install"])
def test_linear_cross_entropy(name):
    inside, _ = ROUTES[name]
    reached = 0
    for op in opinfos("nn.functional.linear_cross_entropy"):
        for sample in op.sample_inputs("cpu", torch.float64, requires_grad=False):
            want = op.op(sample.input, *sample.args, **sample.kwargs)
            with inside(), counted() as kernels:
                got = op.op(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)
            reached += bool(kernels)
    assert reached > 10
