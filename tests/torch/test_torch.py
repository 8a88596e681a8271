"""The PyTorch adapter in short: what it must never get wrong. The long suite is tests/torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastxent.torch as ft
from fastxent._fastpath.cache import calls
from fastxent._runtime import fastpath

TARGET = torch.tensor([0, 1, -100, 3, 4, 2])
OPTIONS = [{}, {"label_smoothing": 0.1}, {"weight": torch.linspace(0.5, 2, 5, dtype=torch.float64)}]


def make_logits(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "".join(o) or "plain")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_value_and_gradient_are_pytorchs(reduction, options):
    x = make_logits(6, 5)
    ours, theirs = (f(x, TARGET, reduction=reduction, **options) for f in (ft.cross_entropy, F.cross_entropy))
    upstream = torch.linspace(-1, 2, theirs.numel(), dtype=torch.float64).reshape(theirs.shape)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x, upstream)[0] for loss in (ours, theirs)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of PyTorch's own gradcheck
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivatives_of_all_kinds(reduction):
    def f(x):
        return ft.cross_entropy(x, TARGET, label_smoothing=0.1, reduction=reduction)

    x = make_logits(6, 5)
    assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, x)


@pytest.mark.core
def test_a_kept_graph_gives_the_same_gradient_again():
    x = make_logits(6, 5)
    loss = ft.cross_entropy(x, TARGET)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_in_place_the_gradient_takes_the_logits_memory():
    leaf = make_logits(40, 300, dtype=torch.float32)
    y = torch.arange(40)
    logits = leaf * 1.0
    loss = ft.cross_entropy(logits, y, inplace=True)
    loss.backward()
    expected = torch.autograd.grad(F.cross_entropy(leaf, y), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(logits.detach(), expected)
    needed = leaf.exp()  # its backward needs its result, which is overwritten
    with pytest.raises(RuntimeError, match="inplace"):
        ft.cross_entropy(needed, y, inplace=True).backward()


@pytest.mark.core
def test_install_reaches_everyone_and_leaves_no_trace():
    from torch.nn.functional import cross_entropy as imported_before

    x = make_logits(6, 5)
    for call in (imported_before, torch.nn.CrossEntropyLoss()):
        with ft.installed():
            assert type(call(x, TARGET).grad_fn).__name__ == "CrossEntropyBackward"
        assert type(call(x, TARGET).grad_fn).__name__ == "NllLossBackward0"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # Dynamo makes an instance of autograd.Function
def test_traced_by_dynamo():
    x = make_logits(6, 5)
    compiled = torch.compile(lambda x: ft.cross_entropy(x, TARGET), fullgraph=True, backend="aot_eager")
    expected = F.cross_entropy(x, TARGET)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(*(torch.autograd.grad(f, x)[0] for f in (compiled(x), expected)))


@pytest.mark.core
def test_errors_are_pytorchs():
    x = make_logits(6, 5)
    for arguments in ((x, TARGET[:5]), (x, TARGET.float()), (x, torch.full((6,), 5)), (x, TARGET, torch.ones(3))):
        with pytest.raises(Exception) as theirs:
            F.cross_entropy(*arguments)
        with pytest.raises(theirs.type) as ours:
            ft.cross_entropy(*arguments)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5, 3), (700, 30), (40, 2000), (3, 70000), (3, 30, 25, 25)], ids=str)
def test_calls_that_come_again(shape, smoothing):
    """They run tasks that are packed already: other values, the same checks."""

    def f(loss, x, y):
        return loss(x, y, label_smoothing=smoothing)

    for seed in range(3):
        torch.manual_seed(seed)
        x, y = torch.randn(shape, requires_grad=True), torch.randint(shape[1], (shape[0], *shape[2:]))
        y.view(-1)[seed] = -100
        for _ in range(2):
            ours, theirs = f(ft.cross_entropy, x, y), f(F.cross_entropy, x, y)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)))
            with torch.no_grad():
                assert f(ft.cross_entropy, x, y) == ours
    y.view(-1)[-1] = shape[1]
    for logits in (x, x.detach()):
        with pytest.raises(IndexError, match=f"Target {shape[1]} is out of bounds"):
            f(ft.cross_entropy, logits, y)
    y.fill_(-100)
    loss = f(ft.cross_entropy, x, y)
    loss.backward()
    assert loss.isnan() and not x.grad.any()
    short = x.detach()
    short.untyped_storage().resize_(short.untyped_storage().nbytes() - 4)
    with pytest.raises(RuntimeError, match="data is not allocated"):
        f(ft.cross_entropy, short, y.fill_(0))


@pytest.mark.parametrize("name", ["label_smoothing", "ignore_index", "z_loss"])
def test_options_that_may_change_are_looked_at_every_time(name):
    x, y = torch.randn(6, 4), torch.arange(6) % 4
    option = torch.tensor(1) if name == "ignore_index" else torch.tensor(0.1, dtype=torch.float64)
    for value in (option.item(), option.add_(1 if name == "ignore_index" else 0.5).item()):
        option.fill_(value)
        assert ft.cross_entropy(x, y, **{name: option}) == ft.cross_entropy(x, y, **{name: value})
    ft.cross_entropy(x, y, ignore_index=1)
    with pytest.raises(TypeError):
        ft.cross_entropy(x, y, ignore_index=1.0)


def test_a_call_makes_ready_only_what_it_runs(monkeypatch):
    from fastxent.torch import _calls

    made: list[str] = []
    ready = _calls._ready
    calls.clear()
    monkeypatch.setattr(_calls, "_ready", lambda task, *rest: made.append(task.name) or ready(task, *rest))
    x = torch.randn(6, 4, requires_grad=True)
    for _ in range(3):
        ft.cross_entropy(x.detach(), torch.zeros(6, dtype=torch.long))
    assert made == ["value"]
    for _ in range(3):
        ft.cross_entropy(x, torch.zeros(6, dtype=torch.long)).backward()
    assert made == ["value", "value_and_grad"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of PyTorch's own forward-mode AD
@pytest.mark.core
def test_what_only_looks_like_the_last_call():
    calls.clear()
    x, y = torch.randn(6, 4), torch.arange(6) % 4
    for _ in range(4):
        ft.cross_entropy(x, y)
    guarded = [call for call in map(calls.lookup, calls.keys()) if isinstance(call, tuple)]
    assert len(guarded) == fastpath.ENABLED
    others = {
        "other strides": torch.randn(6, 8)[:, ::2],
        "transposed": torch.randn(4, 6).T,
        "other rows": torch.randn(7, 4)[1:],
        "float64": torch.randn(6, 4, dtype=torch.float64),
        "negative view": torch.randn(6, 4, dtype=torch.complex64).conj().imag,
        "a parameter": torch.nn.Parameter(torch.randn(6, 4)),
        "zeros without memory": torch._efficientzerotensor((6, 4)),
    }
    for name, other in others.items():
        torch.testing.assert_close(ft.cross_entropy(other, y), F.cross_entropy(other, y), msg=name)
    torch.testing.assert_close(ft.cross_entropy(x, x.softmax(1)), F.cross_entropy(x, x.softmax(1)))
    assert ft.cross_entropy(x, y, ignore_index=3) != ft.cross_entropy(x, y)
    assert ft.cross_entropy(x, y, reduction="sum") != ft.cross_entropy(x, y)
    rows = torch.func.vmap(lambda scale: ft.cross_entropy(x * scale, y) + ft.cross_entropy(x, y))(torch.ones(2))
    torch.testing.assert_close(rows, 2 * F.cross_entropy(x, y).repeat(2))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(ft.cross_entropy(dual, y)).tangent is not None
    with torch.inference_mode():
        torch.testing.assert_close(ft.cross_entropy(torch.zeros(6, 4), y), torch.tensor(4.0).log())
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        ft.cross_entropy(x, y + 1)
    x.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="not allocated yet"):
        ft.cross_entropy(x, y)


def test_known_calls_are_known_where_it_is_installed(monkeypatch):
    from fastxent.torch import _dispatch

    x, y = torch.randn(6, 4, requires_grad=True), torch.arange(6) % 4
    with ft.installed():
        first = F.cross_entropy(x, y)
        monkeypatch.setattr(_dispatch, "takes", None)  # whoever is not known is looked at
        assert F.cross_entropy(x, y) == first and torch.nn.CrossEntropyLoss()(x, y).requires_grad
