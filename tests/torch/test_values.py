"""Loss and gradient of `fastxent.torch.cross_entropy`: every option, dtype and layout, within the error budget."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastxent.torch import cross_entropy
from tests.helpers.cases import REDUCTIONS, Case, make_rng
from tests.helpers.opponent import at_least_float32, loss_and_grad, torch_loss
from tests.helpers.opponent import run_torch_tensors as run_torch
from tests.helpers.torch_cases import DENSE, DTYPES, EXTRAS, LAYOUTS, OPTIONS, array, is_dense, make_case, make_truth
from tests.helpers.truth import Budget

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPES = {
    (7,): "one row, no batch axis",
    (5, 3): "fewer rows than lanes",
    (33, 17): "two tiles of 16 rows and one row; few classes",
    (9, 100): "vectors along the classes, and a tail",
    (4, 6, 5): "one axis after the classes",
    (2, 60, 3, 4): "images: many classes, not innermost",
    (2, 3, 2, 2, 3): "volumes",
}
MANY_DIMS = [s for s in SHAPES if len(s) > 1]


def check(*cases: Case) -> None:
    """Losses and gradients of `cases` within one budget, in the right dtypes; no argument written, no stride lost."""
    losses, gradients = Budget(), Budget()
    for case in cases:
        arguments = [t for t in (case.logits, case.target, *case.options.values()) if isinstance(t, torch.Tensor)]
        copies = [t.clone() for t in arguments]
        for reduction in REDUCTIONS:
            label = (*case.logits.shape, *case.logits.stride(), reduction)
            truth, (torchs_loss, torchs_grad) = make_truth(case, reduction), run_torch(case, reduction)
            with torch.no_grad():
                alone = cross_entropy(case.logits, case.target, reduction=reduction, **case.options)
            loss, grad = loss_and_grad(cross_entropy, case, reduction)
            for value in (alone, loss):
                assert value.dtype == case.logits.dtype and not value.requires_grad, label
                losses.add(array(value), truth.loss, torchs_loss, truth.loss_scale, label)
            assert grad.dtype == case.logits.dtype and grad.shape == case.logits.shape, label
            gradients.add(array(grad), truth.grad, torchs_grad, truth.grad_scale, label)
            if is_dense(case.logits):
                assert grad.stride() == case.logits.stride(), label
        for argument, copy in zip(arguments, copies, strict=True):
            assert torch.equal(argument, copy)
    losses.check()
    gradients.check()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, option):
    check(*(make_case(dtype, shape, option) for shape in SHAPES))


FEWER_EXTRAS = ["weight ignore sample_weight", "ignore z_loss softcap", EXTRAS[-1]]  # each variant compiles for seconds


@pytest.mark.parametrize(
    ("dtype", "option"), [(d, o) for d in DTYPES for o in (EXTRAS if d == torch.float32 else FEWER_EXTRAS)], ids=str
)
def test_extras(dtype, option):
    check(*(make_case(dtype, shape, option) for shape in [(5, 3), (33, 17), (40, 17), (9, 100), (20, 100)]))


@pytest.mark.thorough
@pytest.mark.parametrize("option", EXTRAS)
def test_extras_in_any_number_of_dimensions(option):
    check(*(make_case(torch.float32, shape, option) for shape in SHAPES))


@pytest.mark.parametrize("option", ["index", "weight ignore smoothing", "probabilities"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, option):
    cases = [make_case(torch.float32, shape, option) for shape in MANY_DIMS]
    check(*(case._replace(logits=LAYOUTS[layout](case.logits)) for case in cases))


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dense_layouts_of_other_dtypes(dtype, layout):
    check(*(case._replace(logits=DENSE[layout](case.logits)) for case in (make_case(dtype, shape) for shape in MANY_DIMS)))


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("t_layout", LAYOUTS)
def test_probabilities_that_lie_otherwise_than_the_logits(t_layout, x_layout):
    cases = [make_case(torch.float32, shape, "probabilities") for shape in [(9, 100), (4, 6, 5), (2, 60, 3, 4)]]
    check(*(Case(LAYOUTS[x_layout](x), LAYOUTS[t_layout](t), o) for x, t, o in cases))


def test_strided_target_weight_and_sample_weight():
    case = make_case(torch.float32, (4, 6, 5), "weight ignore sample_weight")
    options = {k: LAYOUTS["every_second"](v) for k, v in case.options.items()}
    check(case, *(Case(case.logits, LAYOUTS[layout](case.target), options) for layout in ("transposed", "every_second")))


@pytest.mark.parametrize("option", ["index", "smoothing", "probabilities", "z_loss", "softcap"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes(dtype, size, option):
    check(*(make_case(dtype, shape, option, size) for shape in [(5, 3), (33, 17), (9, 100), (20, 100)]))


@pytest.mark.parametrize("option", ["index", "weight ignore", "sample_weight"])
@pytest.mark.parametrize("size", [1e-3, 3.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_logits(dtype, size, option):
    """-inf rules classes out, as masks and constrained decoding do: all but the target and a few."""
    cases = [make_case(dtype, shape, option, size) for shape in [(5, 3), (33, 17), (9, 100), (20, 100)]]
    for x, target, _ in cases:
        out = torch.tensor(make_rng("masked", tuple(x.shape)).random(x.shape) < 0.6)
        x[out & (torch.arange(x.shape[1]) != target.clamp(0)[:, None])] = -torch.inf
    check(*cases)


@pytest.mark.parametrize("option", ["index", "weight ignore smoothing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_predictions(dtype, option):
    """p_y near 1, where p_y - 1 cancels, and near 0, where losses are large; random logits show neither."""
    cases = [make_case(dtype, shape, option) for shape in [(33, 17), (33, 100)]]
    lead = torch.linspace(-15, 15, 33, dtype=torch.float64)[:, None]
    hot = [F.one_hot(case.target.clamp(0), case.logits.shape[1]) * lead for case in cases]
    check(*(case._replace(logits=(case.logits.double() / 3 + h).to(dtype)) for case, h in zip(cases, hot, strict=True)))


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(2, 128257), (1, 40000)], ids=str)
@pytest.mark.parametrize("option", ["index", "weight ignore smoothing sample_weight z_loss softcap"])
def test_long_rows(shape, option):
    """Fewer rows than threads, and no row but the first aligned."""
    case = make_case(torch.float32, shape, option)
    case.target[0] = 1  # not ignored
    check(case)


def test_half_precision_mean_does_not_overflow():
    """PyTorch's float16 mean is inf and its gradient 0 here: the sum of the losses passes 65504, and so does their number."""
    case = make_case(torch.float16, (70000, 3))
    assert not torch.isfinite(F.cross_entropy(case.logits, case.target))
    check(case)
    assert loss_and_grad(cross_entropy, case, "mean")[1].abs().max() > 1e-5


# ----------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------


def test_signature_is_pytorchs_and_then_ours():
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (cross_entropy, F.cross_entropy))
    assert [(p.name, p.default, p.kind) for p in ours[:8]] == [(p.name, p.default, p.kind) for p in theirs]
    assert [(p.name, p.default) for p in ours[8:]] == [
        ("inplace", False),
        ("sample_weight", None),
        ("z_loss", 0.0),
        ("softcap", None),
    ]
    assert {p.kind for p in ours[8:]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.filterwarnings("ignore:size_average and reduce args")  # PyTorch's own warning about its own arguments
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("size_average", [None, True, False])
def test_legacy_arguments_by_position(size_average, reduce):
    x, target, options = make_case(torch.float64, (5, 3), "weight")
    target[1] = 2
    arguments = (x, target, options["weight"], size_average, 2, reduce, "sum", 0.1)
    torch.testing.assert_close(cross_entropy(*arguments), F.cross_entropy(*arguments), rtol=1e-13, atol=0)


@pytest.mark.parametrize("how", [dict(size_average=False), dict(reduce=False), dict(reduction="elementwise_mean")], ids=str)
def test_legacy_arguments_warn_as_pytorch_does(how):
    x, target, _ = make_case(torch.float64, (5, 3))
    with pytest.warns(UserWarning, match="deprecated") as theirs:
        want = F.cross_entropy(x, target, **how)
    with pytest.warns(UserWarning, match="deprecated") as ours:
        got = cross_entropy(x, target, **how)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("ignored", [-100, 7, 255])
@pytest.mark.parametrize("shape", [(33, 100), (4, 60, 5), (2, 10, 3, 3)], ids=str)
@pytest.mark.parametrize("integer", INTEGERS, ids=str)
def test_every_integer_dtype_of_target(integer, shape, ignored):
    case = make_case(torch.float32, shape, "weight smoothing")
    if torch.iinfo(integer).min <= ignored <= torch.iinfo(integer).max:
        case.target[::3] = ignored
    options = case.options | dict(ignore_index=ignored)
    for reduction in REDUCTIONS:
        want = loss_and_grad(cross_entropy, case._replace(options=options), reduction)
        got = loss_and_grad(cross_entropy, Case(case.logits, case.target.to(integer), options), reduction)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    check(case._replace(options=options))


PAIRS = [(x, t) for x in DTYPES for t in DTYPES if x != t]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_dtypes_of_logits_probabilities_and_weight_are_promoted(pair):
    """Values within the budget of the dtype that the loss has; the wider one is worth something where it is not PyTorch's."""
    losses, gradients = {dtype: Budget() for dtype in DTYPES}, Budget()
    for shape, weight in itertools.product([(5,), (17, 5)], [None, *DTYPES]):
        case = make_case(torch.float64, shape, "probabilities weight")
        w = {} if weight is None else dict(weight=case.options["weight"].to(weight))
        case = Case(case.logits.to(pair[0]), case.target.to(pair[1]), w)
        for reduction in REDUCTIONS:
            want, _ = loss_and_grad(F.cross_entropy, case, reduction)
            loss, grad = loss_and_grad(cross_entropy, case, reduction)
            assert loss.dtype == want.dtype and loss.shape == want.shape and grad.dtype == pair[0]
            truth, theirs = make_truth(case, reduction), loss_and_grad(torch_loss, at_least_float32(case), reduction)
            losses[loss.dtype].add(array(loss), truth.loss, array(theirs[0].to(loss.dtype)), truth.loss_scale)
            gradients.add(array(grad), truth.grad, array(theirs[1].to(pair[0])), truth.grad_scale)
    for budget in (*losses.values(), gradients):
        budget.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.float64], ids=str)
def test_sample_weights_of_another_dtype_do_not_change_that_of_the_loss(dtype, other):
    case = make_case(dtype, (33, 17), "sample_weight")
    u = case.options["sample_weight"].float().bfloat16().clamp(2**-10)  # values that all dtypes have
    case, wide = (case._replace(options=dict(sample_weight=u.to(d))) for d in (dtype, other))
    for reduction in REDUCTIONS:
        want, got = (loss_and_grad(cross_entropy, c, reduction) for c in (case, wide))
        assert got[0].dtype == dtype and torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_extras_that_do_nothing_change_no_bit():
    for option in ("index", "weight ignore smoothing", "probabilities"):
        case = make_case(torch.float32, (33, 17), option)
        ones = torch.ones(33)
        for reduction in REDUCTIONS:
            want = loss_and_grad(cross_entropy, case, reduction)
            for extra in (dict(z_loss=0.0, softcap=None, sample_weight=None), dict(sample_weight=ones), dict(z_loss=0)):
                got = loss_and_grad(cross_entropy, case._replace(options=case.options | extra), reduction)
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_z_loss_is_not_scaled_by_the_class_weight_and_shares_the_divisor():
    """By hand: two rows of two classes, logits 0: every loss is log 2, every lse is log 2."""
    x, target = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0, 1])
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    weight, u = torch.tensor([3.0, 5.0], dtype=torch.float64), torch.tensor([2.0, 7.0], dtype=torch.float64)
    options = dict(weight=weight, sample_weight=u, z_loss=0.5)
    rows = torch.stack([2 * (3 * log2 + 0.5 * log2**2), 7 * (5 * log2 + 0.5 * log2**2)])
    torch.testing.assert_close(cross_entropy(x, target, reduction="none", **options), rows)
    torch.testing.assert_close(cross_entropy(x, target, reduction="sum", **options), rows.sum())
    torch.testing.assert_close(cross_entropy(x, target, **options), rows.sum() / (2 * 3 + 7 * 5))
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(cross_entropy(x, half, sample_weight=u), log2)
    kept = cross_entropy(x, torch.tensor([0, -100]), **options)
    torch.testing.assert_close(kept, rows[0] / 6)


@pytest.mark.parametrize("option", OPTIONS + EXTRAS)
def test_written_out_formula_agrees(option):
    """The opponent of the budget itself, in float64, is the formula: a check of these tests."""
    case = at_least_float32(make_case(torch.float64, (9, 20), option))
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(torch_loss, case, reduction)
        truth = make_truth(case, reduction)
        torch.testing.assert_close(loss, torch.tensor(truth.loss.astype(float)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, torch.tensor(truth.grad.astype(float)), rtol=1e-12, atol=1e-12)
