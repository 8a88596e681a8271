"""Calls of the PyTorch adapter that come again: with all options they are as right as the first ones, and as careful."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastxent.torch as ft
from fastxent._fastpath import builtins
from fastxent._fastpath.cache import calls
from fastxent._fastpath.front_end import objects
from fastxent._runtime import fastpath
from fastxent.torch import _callcache, _calls, _dispatch

pytestmark = pytest.mark.skipif(not fastpath.ENABLED, reason="every call is checked")

C_INTERFACE = objects.c_interface
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True, params=[objects.c_interface, lambda: None], ids=["C interface", "Python"])
def nothing_is_known(request, monkeypatch):
    """Nor that memory can be looked for by PyTorch's C interface."""
    monkeypatch.setattr(objects, "c_interface", request.param)
    calls.clear()
    yield
    calls.clear()


@pytest.fixture
def all_is_known(monkeypatch):
    """Call it, and from then on who is not known fails."""
    return lambda: monkeypatch.setattr(_dispatch, "takes", None)


def make_call(shape, dtype, probabilities=False, weighted=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g).to(dtype).requires_grad_()
    if probabilities:
        y = torch.softmax(torch.randn(*shape, generator=g), 1).to(dtype)
    else:
        y = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=g)
        y.view(-1)[1] = -100
    return x, y, (torch.rand(shape[1], generator=g) + 0.5).to(dtype) if weighted else None


def gradient_of(loss, x, upstream, **options):
    return torch.autograd.grad(loss, x, upstream.to(loss.dtype), **options)[0]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(((7, 5), dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
        pytest.param((7, 5), torch.float16, marks=pytest.mark.slow),
        ((3, 5, 4, 6), torch.float32),
        pytest.param((4, 40_000), torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_later_calls_with_other_values(shape, dtype, reduction, all_is_known):
    kinds = list(itertools.product((False, True), (False, True), (0.0, 0.1) if dtype == torch.float32 else (0.0,)))
    for seed in range(3):
        for probabilities, weighted, smoothing in kinds:
            x, y, weight = make_call(shape, dtype, probabilities, weighted, seed)
            options = {"reduction": reduction, "label_smoothing": smoothing}
            loss = ft.cross_entropy(x, y, weight, **options)
            upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape)
            grad = gradient_of(loss, x, upstream)
            true_x = x.detach().double().requires_grad_()
            truth = F.cross_entropy(
                true_x, y.double() if probabilities else y, None if weight is None else weight.double(), **options
            )
            true_grad = gradient_of(truth, true_x, upstream)
            tolerance = TOLERANCE[dtype]
            assert loss.dtype == dtype
            torch.testing.assert_close(loss.double(), truth, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(grad.double(), true_grad, rtol=tolerance, atol=tolerance * float(true_grad.abs().max()))
            with torch.no_grad():
                torch.testing.assert_close(ft.cross_entropy(x, y, weight, **options), loss.detach())
        if seed == 0:
            all_is_known()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_indices_are_checked_every_time(reduction):
    x, y, weight = make_call((7, 5), torch.float32, weighted=True)
    for _ in range(3):
        ft.cross_entropy(x, y, weight, reduction=reduction)
    y[3] = 5
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds\."):
        ft.cross_entropy(x, y, weight, reduction=reduction)


def test_class_indices_that_change_before_the_backward():
    """They are saved, so PyTorch notices; not so if they change behind its back: then no address is formed of them."""
    x, y, _ = make_call((7, 5), torch.float32)
    for _ in range(3):
        loss = ft.cross_entropy(x, y, reduction="none")
    y.numpy()[3] = 2**40
    with pytest.raises(IndexError, match="out of bounds"):
        loss.sum().backward()


@pytest.mark.parametrize("which", ["input", "target", "weight"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_memory_that_was_cut_short(which, probabilities):
    x, y, weight = make_call((7, 5), torch.float32, probabilities, weighted=True)
    for _ in range(2):
        ft.cross_entropy(x, y, weight)
        losses = ft.cross_entropy(x, y, weight, reduction="none")
    {"input": x, "target": y, "weight": weight}[which].untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match="not allocated"):
        ft.cross_entropy(x, y, weight)
    with pytest.raises(RuntimeError, match="not allocated"):
        losses.sum().backward()


def test_weights_without_memory_are_pytorchs():
    x, y, weight = make_call((7, 5), torch.float32, weighted=True)
    for w in (torch._efficientzerotensor(5), torch._to_functional_tensor(weight)):
        first = ft.cross_entropy(x, y, w, reduction="sum")
        for _ in range(3):
            ft.cross_entropy(x, y, weight, reduction="sum")
        torch.testing.assert_close(ft.cross_entropy(x, y, w, reduction="sum"), first)


def test_a_tensor_that_needs_a_gradient_now():
    """Of probabilities the kernels have none: a call is another one then."""
    x, y, _ = make_call((7, 5), torch.float64, probabilities=True)
    for _ in range(2):
        ft.cross_entropy(x, y)
    y.requires_grad_()
    with torch.no_grad():
        ft.cross_entropy(x, y)
    (grad,) = torch.autograd.grad(ft.cross_entropy(x, y), y)
    (theirs,) = torch.autograd.grad(F.cross_entropy(x, y), y)
    torch.testing.assert_close(grad, theirs)


def test_autocast_comes_and_goes():
    """Under it the loss of half precision is float32."""
    x, y, _ = make_call((7, 5), torch.bfloat16)
    for _ in range(3):
        assert ft.cross_entropy(x, y).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ft.cross_entropy(x, y).dtype == F.cross_entropy(x, y).dtype == torch.float32


def test_saved_tensors_that_come_back_otherwise():
    """Hooks may keep them in another form; the gradient is computed from what comes back."""
    x, y, _ = make_call((7, 5), torch.float32)
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.detach(), lambda t: t.t().contiguous().t() if t.ndim == 2 else t
        ):
            losses = ft.cross_entropy(x, y, reduction="none")
        theirs = F.cross_entropy(x, y, reduction="none")
        torch.testing.assert_close(*(gradient_of(loss, x, torch.arange(7.0)) for loss in (losses, theirs)))


@pytest.mark.parametrize("upstream", ["expanded", "half", "negative view", "zeros"])
def test_whatever_comes_back_for_the_rows(upstream):
    x, y, weight = make_call((7, 5), torch.float32, weighted=True)
    for _ in range(2):
        ours, theirs = (f(x, y, weight, reduction="none") for f in (ft.cross_entropy, F.cross_entropy))
        rows = {
            "expanded": torch.tensor(0.5).expand(7),
            "half": torch.arange(14.0)[::2],
            "negative view": torch._neg_view(torch.arange(7.0)),
            "zeros": torch._efficientzerotensor(7),
        }[upstream]
        torch.testing.assert_close(*(torch.autograd.grad(loss, x, rows)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place_with_all_operands(probabilities, reduction, all_is_known):
    for seed in range(3):
        leaf, y, weight = make_call((40, 30), torch.float32, probabilities, weighted=True, seed=seed)
        logits = leaf * 1.0
        ft.cross_entropy(logits, y, weight, reduction=reduction, inplace=True).sum().backward()
        expected = torch.autograd.grad(F.cross_entropy(leaf, y, weight, reduction=reduction).sum(), leaf)[0]
        torch.testing.assert_close(leaf.grad, expected)
        torch.testing.assert_close(logits.detach(), expected)
        if seed == 0:
            all_is_known()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weights", ["none", "behind others", "every other"])
def test_tensors_that_begin_and_end_within_their_memory(weights, reduction, all_is_known):
    many = torch.rand(10) + 0.5
    weight = {"none": None, "behind others": many[5:], "every other": many[::2]}[weights]
    x, y = torch.randn(9, 5)[2:].requires_grad_(), torch.tensor([9, 9, 0, 4, 2, -100, 1, 1, 3])[2:]
    upstream = torch.rand(7) if reduction == "none" else torch.tensor(1.0)
    want = F.cross_entropy(x, y, weight, reduction=reduction)
    for nth in range(4):
        got = ft.cross_entropy(x, y, weight, reduction=reduction)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradient_of(got, x, upstream), gradient_of(want, x, upstream, retain_graph=True))
        if nth == 0:
            all_is_known()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 4)  # all but the last logit
    with pytest.raises(TypeError):  # nobody else is there to be asked
        ft.cross_entropy(x, y, weight, reduction=reduction)


def test_pytorchs_c_interface_is_not_taken_on_trust(monkeypatch):
    names = objects._FUNCTIONS
    for wrong in (names[::-1], ("aoti_torch_no_such_function", *names[1:])):
        monkeypatch.setattr(objects, "_FUNCTIONS", wrong)
        assert C_INTERFACE.__wrapped__() is None


def make_rows(shape, innermost=False, seed=0):
    """Logits, contiguous or with their classes innermost, class indices, and weights."""
    x, y, weight = make_call(shape, torch.float32, weighted=True, seed=seed)
    return (x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_() if innermost else x), y, weight


@pytest.mark.parametrize("innermost", [False, True], ids=["contiguous", "classes innermost"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_calls_of_ever_new_extents(innermost, reduction, weighted):
    shapes = [(3, 5, 4), (3, 5, 9), (2, 5, 33), (1, 5, 2), (400, 5, 20), (3, 6, 4), (3, 5, 1), (1, 5, 100), (3, 60, 40)]
    for seed, shape in enumerate([*shapes, *shapes]):
        x, y, weight = make_rows(shape, innermost, seed)
        weight = weight if weighted else None
        ours, theirs = (f(x, y, weight, reduction=reduction) for f in (ft.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs)
        upstream = torch.rand(ours.shape)
        ours, theirs = (gradient_of(loss, x, upstream) for loss in (ours, theirs))
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == x.stride()
        with pytest.raises(IndexError, match="out of bounds"):
            ft.cross_entropy(x, y.where(y != y.max(), shape[1]), weight, reduction=reduction)


def test_nothing_is_made_for_extents_that_are_new(request, monkeypatch, all_is_known):
    if "Python" in request.node.callspec.id:
        pytest.skip("extents are looked at through the C interface")

    def step(n, classes, reduction):
        x, y, _ = make_call((n, classes), torch.float32)
        ft.cross_entropy(x, y, reduction=reduction).sum().backward()
        ft.cross_entropy(x.detach(), y, reduction=reduction)

    kinds = list(itertools.product((2, 20, 3000), ("mean", "none")))
    for n, reduction in [*kinds, *kinds]:
        step(n, 10, reduction)
    before = len(calls)
    all_is_known()
    monkeypatch.setattr(_callcache, "_call_of", None)
    for name in ("plan_of", "guard", "_ready"):
        monkeypatch.setattr(_calls, name, None)
    for n, classes in itertools.product((3, 30, 4000), (10, 7, 30)):
        step(n, classes, "mean")
        step(n, classes, "none")
    assert len(calls) == before


def test_forms_that_differ_in_their_strides_only(request, all_is_known):
    if "Python" in request.node.callspec.id:
        pytest.skip("extents are looked at through the C interface")

    def step(n, innermost):
        x, y, _ = make_rows((3, 5, n), innermost, seed=n)
        torch.testing.assert_close(ft.cross_entropy(x, y), F.cross_entropy(x, y))

    for _ in range(2):
        for innermost in (False, True):
            for n in (40, 41, 42):
                step(n, innermost)
    all_is_known()
    for n in range(43, 50):
        step(n, False)
        step(n, True)


def test_a_form_is_left_to_others_where_it_does_not_serve(monkeypatch):
    """Shapes that do not fit, weights for other classes, no rows, many bytes; no team for a builtin."""
    for n in (6, 7, 8):
        x, y, weight = make_call((n, 5), torch.float32, weighted=True)
        ft.cross_entropy(x, y)
        ft.cross_entropy(x, y, weight)
    for wrong in (y[:7], y[None], y.float(), torch.zeros(8, 4)):
        for f in (ft.cross_entropy, F.cross_entropy):
            with pytest.raises((ValueError, RuntimeError)):
                f(x, wrong)
    with pytest.raises((ValueError, RuntimeError), match="weight"):
        ft.cross_entropy(torch.randn(8, 6), y, weight)
    assert ft.cross_entropy(torch.randn(0, 5), y[:0]).isnan()
    for shape in ((30_000, 5), (300_000, 5)):
        x, y, _ = make_call(shape, torch.float32)
        for team in (builtins.team, lambda _: 0):
            with monkeypatch.context() as patch:
                patch.setattr(builtins, "team", team)
                for _ in range(3):
                    ours, theirs = (f(x, y) for f in (ft.cross_entropy, F.cross_entropy))
                    torch.testing.assert_close(ours, theirs)
                    torch.testing.assert_close(*(gradient_of(loss, x, torch.tensor(1.0)) for loss in (ours, theirs)))


def test_hooks_that_hand_over_tensors_of_other_extents():
    for n in (7, 8):
        x, y, _ = make_call((n, 5), torch.float32)
        for _ in range(3):
            losses = ft.cross_entropy(x, y, reduction="none")
            losses.sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:4]):
        losses = ft.cross_entropy(x, y, reduction="none")
        with pytest.raises(RuntimeError):
            losses.sum().backward()
