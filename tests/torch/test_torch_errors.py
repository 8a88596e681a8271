"""What PyTorch refuses we refuse, with the same type of exception and the same words; and nothing has been written then."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastxent.torch as fxt

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-2, 2, max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].reshape(shape).to(dtype)


def y(*shape: int, value: int = 0, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype)


OUT_OF_BOUNDS = {
    "2-D": (x(2, 3), y(2, value=3)),
    "first bad one is named": (x(3, 3), torch.tensor([1, 7, 9])),
    "negative": (x(2, 3), y(2, value=-1)),
    "1-D": (x(3), torch.tensor(5)),
    "3-D": (x(2, 3, 4), y(2, 4, value=3)),
    "4-D": (x(2, 3, 2, 2), y(2, 2, 2, value=3)),
    "5-D": (x(2, 3, 2, 2, 2), y(2, 2, 2, 2, value=3)),
    "far": (x(2, 3), y(2, value=2**40)),
    "no classes": (x(2, 0), y(2)),
    "ignore_index is in bounds": (x(2, 3), y(2, value=3), dict(ignore_index=1)),
    "default is not ignored any more": (x(2, 3), y(2, value=-100), dict(ignore_index=1)),
    "smoothing": (x(2, 3), y(2, value=3), dict(label_smoothing=0.1)),
    "smoothing, 4-D": (x(2, 3, 2, 2), y(2, 2, 2, value=3), dict(label_smoothing=0.1)),
    "weight": (x(2, 3), y(2, value=3), dict(weight=x(3))),
    "many classes": (x(2, 100), y(2, value=100)),
    "float64": (x(2, 3, dtype=torch.float64), y(2, value=3)),
    "bfloat16": (x(2, 3, dtype=torch.bfloat16), y(2, value=3)),
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_target_out_of_bounds(case, reduction):
    logits, target, *options = case
    more = options[0] if options else {}
    same_error(lambda f: f(logits, target, reduction=reduction, **more), r"^Target -?\d+ is out of bounds\.$")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint64], ids=str)
def test_target_of_any_dtype_out_of_bounds(dtype):
    with pytest.raises(IndexError, match=r"^Target 7 is out of bounds\.$"):
        fxt.cross_entropy(x(2, 3), torch.tensor([0, 7]).to(dtype))


def test_target_past_int64_is_named_as_it_is():
    with pytest.raises(IndexError, match=rf"^Target {2**64 - 100} is out of bounds\.$"):
        fxt.cross_entropy(x(2, 3), torch.tensor([0, 2**64 - 100], dtype=torch.uint64))


WRONG_DTYPE = r"^expected target dtype to be Long or Byte, but got {}$"
NO_WEIGHT = r"^{}weight tensor should be defined either for all 3 classes or no classes but got weight tensor of shape: \[{}\]$"
ND_WEIGHT = r"^weight tensor should be defined either for all or no classes$"
NOT_DIFFERENTIABLE = (
    r"^The function '{}' is not differentiable with respect to argument 'weight'\. This input cannot have requires"
)
ARGUMENT = r"argument '{}' \(position {}\) must be {}, not {}"
NOT_FLOATING = r"^Expected floating point type for target with class probabilities, got {}$"
NO_KERNEL = r'^"log_softmax_lastdim_kernel_impl" not implemented for \'{}\'$'
grad = torch.Tensor.requires_grad_

# name: (arguments, options, what both messages must match)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "float target": ((x(2, 3), torch.zeros(2)), {}, WRONG_DTYPE.format("Float")),
    "float target, 1-D": ((x(3), torch.tensor(1.5)), {}, WRONG_DTYPE.format("Float")),
    "float target, 3-D": ((x(2, 3, 4), torch.zeros(2, 4)), {}, WRONG_DTYPE.format("Float")),
    "float target, 4-D": ((x(2, 3, 4, 4), torch.zeros(2, 4, 4)), {}, WRONG_DTYPE.format("Float")),
    "float target, smoothing": ((x(2, 3), torch.zeros(2)), dict(label_smoothing=0.1), WRONG_DTYPE.format("Float")),
    "bool target": ((x(2, 3), y(2, dtype=torch.bool)), {}, WRONG_DTYPE.format("Bool")),
    "complex target": ((x(2, 3), y(2, dtype=torch.cfloat)), {}, WRONG_DTYPE.format("ComplexFloat")),
    "indices of the shape of logits": ((x(2, 3), y(2, 3)), {}, NOT_FLOATING.format("Long")),
    "bools of the shape of logits": ((x(2, 3), y(2, 3, dtype=torch.bool)), {}, NOT_FLOATING.format("Bool")),
    "int32 of the shape of logits": ((x(2, 3), y(2, 3, dtype=torch.int32)), {}, NOT_FLOATING.format("Int")),
    "(C,) indices": ((x(3), y(3)), {}, NOT_FLOATING.format("Long")),
    "complex probabilities": ((x(2, 3), y(2, 3, dtype=torch.cfloat)), {}, NOT_FLOATING.format("ComplexFloat")),
    "probabilities and ignore_index": (
        (x(2, 3), x(2, 3)),
        dict(ignore_index=1),
        r"^ignore_index is not supported for floating point target$",
    ),
    "smoothing 1.5": (
        (x(2, 3), y(2)),
        dict(label_smoothing=1.5),
        r"^label_smoothing must be between 0\.0 and 1\.0\. Got: 1\.5$",
    ),
    "smoothing 1.5, probabilities": (
        (x(2, 3), x(2, 3)),
        dict(label_smoothing=1.5),
        r"^label_smoothing must be between .* Got: 1\.5$",
    ),
    "smoothing 2": ((x(2, 3), y(2)), dict(label_smoothing=2), r"^label_smoothing must be between 0\.0 and 1\.0\. Got: 2$"),
    "batch": ((x(4, 3), y(3)), {}, r"^Expected input batch_size \(4\) to match target batch_size \(3\)\.$"),
    "batch, 3-D": ((x(2, 3, 4), y(3, 4)), {}, r"^Expected input batch_size \(2\) to match target batch_size \(3\)\.$"),
    "target without a batch": (
        (x(2, 3), torch.tensor(1)),
        {},
        r"^Expected input batch_size \(2\) to match target batch_size \(0\)\.$",
    ),
    "size, 3-D": ((x(2, 3, 5), y(2, 4)), {}, r"^Expected target size \[2, 5\], got \[2, 4\]$"),
    "size, 5-D": ((x(2, 3, 4, 5, 6), y(2, 5, 5, 6)), {}, r"^Expected target size \[2, 4, 5, 6\], got \[2, 5, 5, 6\]$"),
    "size, 4-D": ((x(2, 3, 5, 5), y(2, 4, 5)), {}, r"^size mismatch \(got input: \[2, 3, 5, 5\] , target: \[2, 4, 5\]"),
    "axes, 3-D": ((x(2, 3, 4), y(2)), {}, r"^Expected target size \[2, 4\], got \[2\]$"),
    "axes, 4-D": (
        (x(2, 3, 5, 5), y(2, 25)),
        {},
        r"^only batches of spatial targets supported \(3D tensors\) but got targets of dimension: 2$",
    ),
    "multi-target": ((x(10, 3), y(10, 2)), {}, r"^0D or 1D target tensor expected, multi-target not supported$"),
    "probabilities of another shape": (
        (x(2, 3), x(2, 4)),
        {},
        r"^0D or 1D target tensor expected, multi-target not supported$",
    ),
    "a number": ((torch.tensor(1.0), torch.tensor(1.0)), {}, r"^Dimension specified as 1 but tensor has no dimensions$"),
    "a number and an index": ((torch.tensor(1.0), torch.tensor(0)), {}, r"^Expected floating point type for target with class"),
    "weight (2,)": ((x(2, 3), y(2), x(2)), {}, NO_WEIGHT.format("", 2)),
    "weight (1, 3)": ((x(2, 3), y(2), x(1, 3)), {}, NO_WEIGHT.format("", "1, 3")),
    "weight ()": ((x(2, 3), y(2), torch.tensor(2.0)), {}, NO_WEIGHT.format("", "")),
    "weight (2,), smoothing": ((x(2, 3), y(2), x(2)), dict(label_smoothing=0.1), NO_WEIGHT.format("", 2)),
    "weight (2,), probabilities": ((x(2, 3), x(2, 3), x(2)), {}, NO_WEIGHT.format("cross_entropy: ", 2)),
    "weight (2,), 3-D": ((x(2, 3, 4), y(2, 4), x(2)), {}, ND_WEIGHT),
    "weight (2,), 4-D": ((x(2, 3, 4, 4), y(2, 4, 4), x(2)), {}, ND_WEIGHT),
    "weight double": ((x(2, 3), y(2), x(3).double()), {}, r"^expected scalar type Float but found Double$"),
    "weight float for half": ((x(2, 3).half(), y(2), x(3)), {}, r"^expected scalar type Half but found Float$"),
    "weight half": ((x(2, 3), y(2), x(3).half()), {}, r"^expected scalar type Float but found Half$"),
    "weight long": ((x(2, 3), y(2), y(3)), {}, r"^expected scalar type Float but found Long$"),
    "weight to be trained": ((grad(x(2, 3)), y(2), grad(x(3))), {}, NOT_DIFFERENTIABLE.format("nll_loss_forward")),
    "weight alone to be trained": ((x(2, 3), y(2), grad(x(3))), {}, NOT_DIFFERENTIABLE.format("nll_loss_forward")),
    "weight to be trained, 4-D": ((x(2, 3, 2, 2), y(2, 2, 2), grad(x(3))), {}, NOT_DIFFERENTIABLE.format("nll_loss2d_forward")),
    "reduction": ((x(2, 3), y(2)), dict(reduction="foo"), r"^foo is not a valid value for reduction$"),
    "reduction None": ((x(2, 3), y(2)), dict(reduction=None), r"^None is not a valid value for reduction$"),
    "Long": ((y(2, 3), y(2)), {}, NO_KERNEL.format("Long")),
    "Bool": ((y(2, 3, dtype=torch.bool), y(2)), {}, NO_KERNEL.format("Bool")),
    "ComplexFloat": ((x(2, 3, dtype=torch.cfloat), y(2)), {}, NO_KERNEL.format("ComplexFloat")),
    "Float8_e4m3fn": ((x(2, 3).to(torch.float8_e4m3fn), y(2)), {}, NO_KERNEL.format("Float8_e4m3fn")),
    "Long, probabilities": ((y(2, 3), x(2, 3)), {}, NO_KERNEL.format("Long")),
    "a list for logits": (([[1.0, 2.0]], y(1)), {}, ARGUMENT.format("input", 1, "Tensor", "list")),
    "None for logits": ((None, y(1)), {}, ARGUMENT.format("input", 1, "Tensor", "NoneType")),
    "a list for a target": ((x(2, 3), [1, 2]), {}, ARGUMENT.format("target", 2, "Tensor", "list")),
    "None for a target": ((x(2, 3), None), {}, ARGUMENT.format("target", 2, "Tensor", "NoneType")),
    "a list for a weight": ((x(2, 3), y(2), [1.0, 2.0, 3.0]), {}, ARGUMENT.format("weight", 3, "Tensor", "list")),
    "ignore_index 1.5": ((x(2, 3), y(2)), dict(ignore_index=1.5), ARGUMENT.format("ignore_index", 5, "int", "float")),
    "ignore_index None": ((x(2, 3), y(2)), dict(ignore_index=None), ARGUMENT.format("ignore_index", 5, "int", "NoneType")),
    "ignore_index 2**70": ((x(2, 3), y(2)), dict(ignore_index=2**70), r"^Overflow when unpacking long"),
    "a string for smoothing": (
        (x(2, 3), y(2)),
        dict(label_smoothing="a"),
        ARGUMENT.format("label_smoothing", 6, "float", "str"),
    ),
    "None for smoothing": (
        (x(2, 3), y(2)),
        dict(label_smoothing=None),
        ARGUMENT.format("label_smoothing", 6, "float", "NoneType"),
    ),
}


def same_error(call: Callable[[Any], object], pattern: str) -> None:
    """Both raise the same type, and both messages match `pattern` (without the lines on how to debug)."""
    messages = []
    for function in (F.cross_entropy, fxt.cross_entropy):
        with pytest.raises(Exception) as raised:  # which one it must be, PyTorch says
            call(function)
        first = str(raised.value).splitlines()[0]
        assert re.search(pattern, first), (function, raised.type, first)
        messages.append((raised.type, first))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_as_pytorch_does(case):
    arguments, options, pattern = case
    same_error(lambda f: f(*arguments, **options), pattern)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_under_install(case):
    """Now F.cross_entropy is ours: it raises what it raised before."""
    arguments, options, pattern = case
    with pytest.raises(Exception) as before:
        F.cross_entropy(*arguments, **options)
    with fxt.installed(), pytest.raises(before.type) as now:
        F.cross_entropy(*arguments, **options)
    assert re.search(pattern, str(now.value).splitlines()[0])


HAVE_LOGITS = {k: c for k, c in REFUSED.items() if isinstance(c[0][0], torch.Tensor) and "reduction" not in c[1]}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", HAVE_LOGITS.values(), ids=HAVE_LOGITS)
def test_refused_when_a_gradient_is_wanted(case, reduction):
    """The way through autograd checks no less."""
    (logits, *others), options, pattern = case
    if logits.is_floating_point() and logits.dtype != torch.float8_e4m3fn:
        logits = logits.detach().requires_grad_()
    same_error(lambda f: f(logits, *others, reduction=reduction, **options), pattern)


def test_refused_with_a_weight_that_requires_a_gradient_only_where_one_is_recorded():
    weight = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(fxt.cross_entropy(x(2, 3), y(2), weight), F.cross_entropy(x(2, 3), y(2), weight))


# ----------------------------------------------------------------------------------------------------
# What PyTorch does not know
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (1,), (), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("target", [y(2), x(2, 3)], ids=["index", "probabilities"])
def test_sample_weight_must_have_the_shape_of_the_rows(target, shape):
    with pytest.raises(ValueError, match=r"sample_weight .*\(2,\)"):
        fxt.cross_entropy(x(2, 3), target, sample_weight=torch.ones(shape))


SOME = ["float target", "smoothing 1.5", "batch", "weight (2,)", "Long", "multi-target", "weight double"]


@pytest.mark.parametrize("extra", [dict(sample_weight=torch.ones(2)), dict(z_loss=0.1), dict(softcap=3.0)], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_refused_with_our_options_too(name, extra):
    (logits, target, *weight), options, pattern = REFUSED[name]
    if name == "batch" and "sample_weight" in extra:
        logits, target = x(2, 3), y(3)
        pattern = r"^Expected input batch_size \(2\) to match target batch_size \(3\)\.$"
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=pattern):
        fxt.cross_entropy(logits, target, *weight, **options, **extra)


def test_our_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        fxt.cross_entropy(x(2, 3), y(2), None, None, -100, None, "mean", 0.0, True)  # type: ignore[misc]
    with pytest.raises(TypeError, match="z_los"):
        fxt.cross_entropy(x(2, 3), y(2), z_los=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (5, 100), (4, 3, 5)], ids=str)
def test_a_bad_target_leaves_everything_as_it_was(shape, inplace):
    """It is found before the first row is worked on, the last row's too: inplace has overwritten nothing."""
    logits = x(*shape).requires_grad_() * 1
    copy, version, target = logits.detach().clone(), logits._version, y(*shape[:1], *shape[2:])
    target.view(-1)[-1] = shape[1]
    with pytest.raises(IndexError, match="out of bounds"):
        fxt.cross_entropy(logits, target, inplace=inplace)
    assert torch.equal(logits, copy) and logits._version == version


@pytest.mark.parametrize("module", [nn.CrossEntropyLoss, fxt.CrossEntropyLoss])
def test_the_module_refuses_too(module):
    with pytest.raises(ValueError, match="foo is not a valid value for reduction"):
        module(reduction="foo")(x(2, 3), y(2))
    with pytest.raises(RuntimeError, match=r"weight tensor should be defined either for all 3 classes"):
        module(weight=torch.ones(2))(x(2, 3), y(2))
    with pytest.raises(IndexError, match=r"Target 3 is out of bounds\."):
        module()(x(2, 3), y(2, value=3))
    with pytest.raises(TypeError):
        module(x(3), None, -100, None, "mean", 0.0, 0.0)
