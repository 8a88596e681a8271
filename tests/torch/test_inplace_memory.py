"""`inplace`: the gradient takes the place of the logits. And what any call takes of memory, measured from outside."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import fastxent
from fastxent.torch import cross_entropy
from tests.helpers.cases import REDUCTIONS, Case, softcap_is_thorough
from tests.helpers.opponent import torch_loss
from tests.helpers.processes import run_script
from tests.helpers.torch_cases import DTYPES, EXTRAS, LAYOUTS, OPTIONS, make_case

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MODIFIED = r"modified by an inplace operation"


def step(case: Case, reduction: str, inplace: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, gradient in the leaf, and the logits afterwards; grad_output differs from row to row."""
    x = case.logits.clone(memory_format=torch.preserve_format).requires_grad_()
    logits = x * 1
    loss = cross_entropy(logits, case.target, reduction=reduction, inplace=inplace, **case.options)
    (loss * torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return loss.detach(), x.grad, logits.detach()


# ----------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", softcap_is_thorough(OPTIONS + EXTRAS))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_is_the_same(reduction, option):
    for shape in [(6,), (5, 3), (5, 60), (2, 3, 4), (2, 60, 3, 4)]:
        case = make_case(torch.float64, shape, option)
        loss, grad, logits = step(case, reduction, inplace=True)
        want_loss, want_grad, untouched = step(case, reduction, inplace=False)
        torch.testing.assert_close(loss, want_loss, rtol=0, atol=0)
        torch.testing.assert_close(grad, want_grad, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(logits, want_grad, rtol=1e-13, atol=1e-15)  # so they are overwritten
        assert torch.equal(untouched, case.logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout, dtype):
    for shape in [(5, 3), (5, 60), (2, 60, 3, 4)]:
        case = make_case(dtype, shape, "weight ignore")
        case = case._replace(logits=LAYOUTS[layout](case.logits))
        for reduction in REDUCTIONS:
            leaf = case.logits.detach().clone().requires_grad_()
            if layout in ("framed", "every_second"):
                frame = torch.zeros([2 * n for n in shape], dtype=dtype)
                logits = Fill.apply(frame, leaf, 1 if layout == "framed" else 2)
            else:
                logits = LAYOUTS[layout](leaf * 1)
            try:
                loss = cross_entropy(logits, case.target, reduction=reduction, inplace=True, **case.options)
            except RuntimeError:
                assert layout == "expanded"  # rows that share memory have no room for their gradients
                continue
            loss.sum().backward()
            plain = case.logits.detach().clone().requires_grad_()
            arranged = LAYOUTS["expanded"](plain * 1) if layout == "expanded" else plain
            torch_loss(arranged.double(), case.target, reduction, weight=case.options["weight"].double()).sum().backward()
            close = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6}.get(dtype, 1e-13)
            torch.testing.assert_close(leaf.grad.double(), plain.grad.double(), rtol=close, atol=close)


class Fill(torch.autograd.Function):
    """Logits in a larger frame, as a strided view that autograd knows as an output, not as a view."""

    @staticmethod
    def forward(ctx, frame, values, step):
        view = frame[tuple(slice(None, n * step, step) for n in values.shape)]
        view.copy_(values)
        return torch.as_strided(frame, view.shape, view.stride()).detach()

    @staticmethod
    def backward(ctx, grad):
        return None, grad, None


def test_frames_around_the_logits_are_left_alone():
    """In place means in the place of the logits, not of what lies between their rows."""
    for step_ in (1, 2):
        frame = torch.full((10, 120), 7.0)
        leaf = torch.randn(5, 60, requires_grad=True)
        logits = Fill.apply(frame, leaf, step_)
        cross_entropy(logits, torch.arange(5), inplace=True).backward()
        inside = torch.zeros(10, 120, dtype=torch.bool)
        inside[: 5 * step_ : step_, : 60 * step_ : step_] = True
        assert (frame[~inside] == 7).all()
        torch.testing.assert_close(leaf.grad, torch.func.grad(F.cross_entropy)(leaf.detach(), torch.arange(5)))


# ----------------------------------------------------------------------------------------------------
# Never a wrong gradient
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_version_counter(reduction):
    x = torch.randn(5, 60, requires_grad=True)
    logits = x * 1
    version = logits._version
    cross_entropy(logits, torch.arange(5), reduction=reduction, inplace=True).sum().backward()
    assert logits._version > version
    logits = x * 1
    version = logits._version
    cross_entropy(logits, torch.arange(5), reduction=reduction).sum().backward()
    assert logits._version == version


# name: x -> the logits, and what needs them
NEEDED = {
    "the op that made them": lambda x: (x.exp(), 0),
    "softmax": lambda x: (x.softmax(1), 0),
    "another op": lambda x: (y := x * 1, y.square().sum()),
    "a view of them": lambda x: (y := x * 1, y[1:].sin().sum()),
    "what they are a view of": lambda x: ((y := x * 1).view(5, 60), y.cos().sum()),
}


@pytest.mark.parametrize("needed", NEEDED.values(), ids=NEEDED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autograd_raises_where_the_logits_are_needed_elsewhere(reduction, needed):
    x = torch.linspace(-1, 1, 300, dtype=torch.float64).reshape(5, 60).requires_grad_()
    logits, other = needed(x)
    loss = cross_entropy(logits, torch.arange(5), reduction=reduction, inplace=True).sum()
    with pytest.raises(RuntimeError, match=MODIFIED):
        (loss + other).backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_backward_is_right_or_refused(reduction):
    case = make_case(torch.float64, (5, 60))
    x = case.logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(F.cross_entropy(x, case.target, reduction=reduction).sum(), x)
    loss = cross_entropy(x * 1, case.target, reduction=reduction, inplace=True).sum()
    for factor in (1.0, 3.0, 0.5):
        try:
            (got,) = torch.autograd.grad(loss * factor, x, retain_graph=True)
        except RuntimeError as error:
            assert factor != 1.0 and ("modified" in str(error) or "second time" in str(error))
        else:
            torch.testing.assert_close(got, want * factor, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_is_refused(reduction):
    """What it needs is overwritten. A gradient without a graph would make penalties vanish silently."""
    x = make_case(torch.float64, (5, 60)).logits.requires_grad_()
    loss = cross_entropy(x * 1, torch.arange(5), reduction=reduction, inplace=True).sum()
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_leaf_is_not_overwritten(reduction):
    """PyTorch allows no operation in place on a leaf that requires a gradient: its value is the user's parameter."""
    x = make_case(torch.float64, (5, 60)).logits.requires_grad_()
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf"):
        cross_entropy(x, torch.arange(5), reduction=reduction, inplace=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "no gradient wanted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_is_overwritten_where_no_gradient_is_wanted(reduction, mode):
    """An evaluation step with the training step's settings keeps its logits: metrics are computed from them."""
    x = make_case(torch.float64, (5, 60)).logits
    before = x.clone()
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)():
        logits = (x.requires_grad_(mode != "no gradient wanted") * 1) if mode != "no gradient wanted" else x
        version = None if logits.is_inference() else logits._version
        loss = cross_entropy(logits, torch.arange(5), reduction=reduction, inplace=True)
        assert torch.equal(logits, before) and (version is None or logits._version == version)
    torch.testing.assert_close(loss, F.cross_entropy(before, torch.arange(5), reduction=reduction), rtol=1e-13, atol=0)


def test_ignored_rows_become_0_and_bad_values_stay_in_their_row():
    x = torch.randn(4, 60, dtype=torch.float64)
    x[1] = float("nan")
    x[2, 5] = float("nan")
    leaf = x.requires_grad_()
    logits = leaf * 1
    cross_entropy(logits, torch.tensor([0, -100, 2, 3]), reduction="sum", inplace=True).backward()
    assert not logits[1].any() and logits[2].isnan().all() and logits[[0, 3]].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities_that_are_the_logits_memory(reduction):
    """Self-distillation by accident: a target that the gradient would overwrite while it is read."""
    for shape in [(20, 3), (20, 60)]:
        x = torch.rand(shape, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        (want,) = torch.autograd.grad(F.cross_entropy(leaf, x, reduction=reduction).sum(), leaf)
        cross_entropy(logits, logits.detach(), reduction=reduction, inplace=True).sum().backward()
        torch.testing.assert_close(leaf.grad, want, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------

MEASURE = """
import json, re, resource, sys
import torch
import fastxent.torch as fxt
option, reduction, inplace, backward = sys.argv[1], sys.argv[2], sys.argv[3] == "True", sys.argv[4] == "True"
torch.set_num_threads(2)
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
class Make(torch.autograd.Function):  # computed logits that nothing else needs
    @staticmethod
    def forward(ctx, x, out):
        return out
    @staticmethod
    def backward(ctx, grad):
        Make.grad_pointer = grad.data_ptr()
        return grad.sum(), None
def step(rows, classes):
    logits = torch.empty(rows, classes).uniform_(-1, 1)
    target = torch.arange(rows) % classes
    options = {}
    if option == "probabilities":
        target = torch.full((rows, classes), 1 / classes)
    if option == "weight":
        options = dict(weight=torch.ones(classes), label_smoothing=0.1)
    logits = Make.apply(torch.ones((), requires_grad=True), logits)
    size, before, peak = logits.numel() * 4, status("VmRSS"), status("VmHWM")
    loss = fxt.cross_entropy(logits, target, reduction=reduction, inplace=inplace, **options)
    if backward:
        loss.sum().backward()
    return size, peak - before, status("VmHWM") - peak, status("VmRSS") - before
step(64, 8192)
step(64, 8192)  # kernels are compiled and loaded
size, slack, grown, kept = step(8192, 8192)
print(json.dumps(dict(slack=slack / size, grown=grown / size)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("option", ["index", "weight", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("inplace", "backward", "most"), [(True, True, 0.06), (False, True, 1.06), (False, False, 1.06)])
def test_peak(inplace, backward, most, reduction, option):
    """In place: no new memory of the logits' size (256 MiB). Else one buffer, also with reduction="none"."""
    got = json.loads(run_script(MEASURE, option, reduction, str(inplace), str(backward)))
    assert got["slack"] < 0.01, "the peak was reached before: nothing can be measured"
    assert got["grown"] <= most


LOOP = """
import gc, json, re
import torch
import fastxent, fastxent.torch as fxt
def rss():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
size = 2048 * 8192 * 4
target = torch.arange(2048)
def step(limit=None):
    x = torch.rand(2048, 8192, requires_grad=True)
    fxt.cross_entropy(x, target).backward()
    return x.grad
step()
step()
levels = []
for i in range(6):
    step()
    levels.append(rss())
released = fastxent.release_buffers()
after = rss()
kept = [step() for _ in range(4)]
values = [float(g.abs().sum()) for g in kept]
many = rss() - after
del kept
freed = fastxent.release_buffers()
fastxent.set_buffer_limit(size // 2)
for i in range(3):
    step()
small = fastxent.release_buffers()
print(json.dumps(dict(growth=(levels[-1] - levels[0]) / size, released=released / size, back=(levels[-1] - after) / size,
                      many=many / size, freed=freed / size, small=small / size)))
"""


@pytest.mark.slow
def test_buffers_come_back():
    """A training loop takes one buffer again and again; it is given back when asked, and never kept past the limit."""
    got = json.loads(run_script(LOOP))
    assert abs(got["growth"]) < 0.1
    assert 0.9 < got["released"] < 2.1 and got["back"] > 0.9 * got["released"]
    assert got["many"] > 3.5 and got["freed"] > 3.5  # four gradients that live at once are four buffers
    assert got["small"] <= 0.5


def test_a_buffer_is_not_lent_twice():
    fastxent.release_buffers()
    target, kept = torch.arange(512), []
    for k in range(4):
        x = torch.full((512, 1024), float(k), requires_grad=True)
        cross_entropy(x * x, target).backward()
        kept.append(x)
    assert len({x.grad.untyped_storage().data_ptr() for x in kept}) == 4
    for x in kept:
        (want,) = torch.autograd.grad(F.cross_entropy(x * x, target), x)
        torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["overlapping", "negated"])
def test_places_that_cannot_hold_a_gradient_are_left_alone(kind, reduction):
    """Windows share their logits; of a negated view the memory holds the opposite."""
    leaf, target = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_(), torch.arange(5)
    grads = []
    for inplace in (False, True):
        logits = (leaf * 3).unfold(0, 5, 1)
        if kind == "negated":
            logits = torch.complex(logits, logits.sin()).conj().imag
            assert logits.is_neg()
        loss = cross_entropy(logits, target, reduction=reduction, inplace=inplace).sum()
        grads.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-15)


def test_a_view_of_a_leaf_is_refused_as_the_leaf_is():
    leaf = torch.zeros(4, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        cross_entropy(leaf.view(2, 2, 5).flatten(0, 1), torch.arange(4), inplace=True)
    assert not leaf.detach().any()
