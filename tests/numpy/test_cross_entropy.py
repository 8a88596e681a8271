"""cross_entropy and cross_entropy_value_and_grad: every option, against truth and PyTorch."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastxent as fx
from fastxent import reference as ref
from tests.helpers.cases import (
    BFLOAT16,
    CLASSES,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GRID,
    INDEX_OPTIONS,
    INF,
    INTEGERS,
    MOST_DTYPES,
    NAN,
    OPTIONS,
    REDUCTIONS,
    SPECIAL_OPTIONS,
    SPECIAL_ROWS,
    SPECIAL_TARGETS,
    Case,
    accumulation,
    make_case,
    make_rng,
    make_special_case,
)
from tests.helpers.opponent import run_torch
from tests.helpers.truth import Budget, assert_within_budget, make_truth, widest


def check(*cases: Case) -> None:
    """Losses and gradients of `cases` within the budget, in the right dtypes, and no argument written."""
    losses, gradients = Budget(), Budget()
    for case in cases:
        logits, target, options = case
        copies = [logits.copy(), target.copy(), *(np.copy(v) for v in options.values())]
        for reduction in REDUCTIONS:
            label = (*logits.shape, reduction)
            truth, (torch_loss, torch_grad) = make_truth(case, reduction), run_torch(case, reduction)
            alone = fx.cross_entropy(logits, target, reduction=reduction, **options)
            loss, dlogits = fx.cross_entropy_value_and_grad(logits, target, reduction=reduction, **options)
            for value in (alone, loss):
                assert value.dtype == accumulation(logits.dtype), label
                assert isinstance(value, np.ndarray if np.ndim(truth.loss) else np.floating), label
                losses.add(value, truth.loss, torch_loss, truth.loss_scale, label)
            assert dlogits.dtype == logits.dtype and not np.shares_memory(dlogits, logits), label
            gradients.add(dlogits, truth.grad, torch_grad, truth.grad_scale, label)
        for argument, copy in zip([logits, target, *options.values()], copies, strict=True):
            np.testing.assert_array_equal(argument, copy)
    losses.check()
    gradients.check()


FIRST = BFLOAT16, "index"  # of half precision


@pytest.mark.parametrize(
    ("dtype", "option"),
    [pytest.param(*one, marks=[pytest.mark.core] if one == FIRST else []) for one in product(DTYPES, OPTIONS)],
    ids=str,
)
def test_grid(dtype, option):
    check(*(make_case(dtype, shape, option) for shape in GRID))


LONG_SHAPES = {
    (5, 32751): "a vector short of two segments: rows are not split",
    (20, 32768): "two segments of 1024 vectors: rows are split over threads",
    (10, 33333): "segments of unequal length, the last vector masked",
    (3, 128257): "a vocabulary, so odd that no row starts aligned",
    (1, 300001): "one row, far past the cache",
}


@pytest.mark.thorough
@pytest.mark.parametrize("option", ["index", "weight ignore smoothing sample_weight", "probabilities weight"])
@pytest.mark.parametrize("dtype", MOST_DTYPES, ids=str)
def test_long_rows(dtype, option):
    check(*(make_case(dtype, shape, option) for shape in LONG_SHAPES))


@pytest.mark.parametrize("shape", [(64, 32800), (1, 1100000)], ids=str)
def test_longest_rows(shape):
    """As many rows as are never split; more segments than there may be, so that each is longer."""
    check(make_case(FLOAT32, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_predictions(dtype):
    """p_y near 1, where p_y - 1 cancels, and near 0, where losses are large; random logits show neither."""

    def confident(classes: int) -> Case:
        case = make_case(dtype, (33, classes))
        lead = np.linspace(-40, 40, 33)[:, None] * np.eye(classes)[case.target]
        return case._replace(logits=(case.logits.astype(float) / 3 + lead).astype(dtype))

    check(*(confident(classes) for classes in (2, 10, 17, 49, 1000, 2049)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["index", "smoothing", "probabilities"])
def test_far_apart_logits(option, dtype):
    """Most probabilities underflow, the rows' maxima stand anywhere, and a block may be all but lost."""
    case = make_case(dtype, (17, 9000), option)
    check(case._replace(logits=(case.logits.astype(float) * 30).astype(dtype)))


def test_half_precision_sums_do_not_overflow():
    """PyTorch's float16 mean is inf and its gradient 0 here: sum and count of the rows pass 65504."""
    case = make_case(FLOAT16, (70000, 3))
    x = torch.tensor(case.logits, requires_grad=True)
    theirs = F.cross_entropy(x, torch.tensor(case.target))
    assert not torch.isfinite(theirs)
    check(case)
    assert np.abs(fx.cross_entropy_value_and_grad(*case[:2])[1].astype(float)).max() > 1e-5


@pytest.mark.parametrize("shape", [(40, 10), (40, 300)], ids=["rows in lanes", "classes in lanes"])
def test_logits_far_from_zero(shape):
    """Some rows past 8192, where a maximum is not split, beside rows that are not."""
    case = make_case(FLOAT32, shape)
    for far in (8000, 1e4, -1e5, 3e7):
        logits = case.logits.copy()
        logits[5:9] += FLOAT32.type(far)
        check(case._replace(logits=logits))


@pytest.mark.parametrize("options", SPECIAL_OPTIONS.values(), ids=SPECIAL_OPTIONS)
@pytest.mark.parametrize("row", SPECIAL_ROWS.values(), ids=SPECIAL_ROWS)
@pytest.mark.parametrize("target", SPECIAL_TARGETS)
def test_edge_values_are_pytorchs(row, target, options):
    """nan where PyTorch has nan, inf where it has inf (test_reference.py: so has the reference), else near."""
    check(*(make_special_case(row, target, options, rows) for rows in (1, 2, 17)))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_largest_numbers(dtype):
    """A loss past the largest float32 is inf; nothing else is harmed."""
    x = np.array([[3e38, -3e38, 0], [1, 2, 3]], dtype)
    for target, want in ([0, 2], 0.0), ([2, 2], float(x[0, 0])), ([1, 2], INF):
        case = Case(x, np.array(target), {})
        loss, dlogits = fx.cross_entropy_value_and_grad(x, target, reduction="none")
        assert loss[0] == want == fx.cross_entropy(x, target, reduction="none")[0]
        np.testing.assert_array_equal(dlogits[0].astype(float), np.eye(3)[0] - np.eye(3)[target[0]])
        truth = make_truth(case, "none")
        assert_within_budget(loss[1:], truth.loss[1:], run_torch(case, "none")[0][1:], truth.loss_scale[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_special_values_anywhere_in_a_row(special, dtype):
    """First, last and beside the block's edge: no lane and no tail may lose a nan or an infinity."""
    losses, gradients = Budget(), Budget()
    for classes in CLASSES:
        case = make_case(dtype, (33, classes))
        for row, at in enumerate([0, 1, classes - 2, classes - 1, min(2047, classes - 1)]):
            case.logits[row, at % classes] = special
            case.target[row] = at % classes if row % 2 else 0
        truth, theirs = make_truth(case, "none"), run_torch(case, "none")
        loss, dlogits = fx.cross_entropy_value_and_grad(*case[:2], reduction="none")
        for value in (loss, fx.cross_entropy(*case[:2], reduction="none")):
            losses.add(value, truth.loss, theirs[0], truth.loss_scale, classes)
        gradients.add(dlogits, truth.grad, theirs[1], truth.grad_scale, classes)
    losses.check()
    gradients.check()


@pytest.mark.parametrize("kept", [(0, 3), (50, 53), (-1, -4), (0, -1), (-60, -33)], ids=str)
@pytest.mark.parametrize("classes", [100, 4097, 8200, 33000])
def test_blocks_of_nothing_but_minus_infinity(classes, kept):
    """Before, between and behind the two numbers of a row: a running maximum of -inf makes no nan of -inf - -inf."""
    case = make_case(FLOAT32, (3, classes))
    case.logits[0] = -INF
    case.logits[0, kept] = 1.0
    case.target[0] = kept[0] % classes
    check(case)
    assert fx.cross_entropy(*case[:2], reduction="none")[0] == pytest.approx(np.log(2))
    assert fx.logsumexp(case.logits, -1)[0] == pytest.approx(1 + np.log(2))
    np.testing.assert_array_equal(np.flatnonzero(fx.softmax(case.logits[0])), np.sort(np.arange(classes)[list(kept)]))


@pytest.mark.parametrize("extra", ["", "smoothing", "weight", "weight smoothing"])
def test_all_rows_ignored(extra):
    case = make_case(FLOAT32, (5, 4), f"{extra} ignore")
    case.target[:] = -100
    case.logits[2] = [NAN, INF, -INF, 0]
    for reduction, want in {"mean": NAN, "sum": 0.0, "none": np.zeros(5)}.items():
        loss, dlogits = fx.cross_entropy_value_and_grad(*case[:2], reduction=reduction, **case.options)
        np.testing.assert_array_equal(loss, want)
        np.testing.assert_array_equal(dlogits, np.zeros((5, 4)))
        np.testing.assert_array_equal(fx.cross_entropy(*case[:2], reduction=reduction, **case.options), want)


@pytest.mark.parametrize("how", [dict(weight=np.zeros(4)), dict(sample_weight=np.zeros(5))])
def test_all_weights_zero(how):
    case = make_case(FLOAT64, (5, 4))
    loss, dlogits = fx.cross_entropy_value_and_grad(*case[:2], **how)
    assert np.isnan(loss) and np.isnan(dlogits).all()
    loss, dlogits = fx.cross_entropy_value_and_grad(*case[:2], reduction="sum", **how)
    assert loss == 0 and not dlogits.any()


@pytest.mark.parametrize("option", INDEX_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_leak_nothing(dtype, option):
    """What PyTorch does not do: nan and inf in an ignored row reach neither loss nor gradient."""
    clean = make_case(dtype, (33, 21), option)
    ignore_index = clean.options.get("ignore_index", -100)
    clean.target[::4] = ignore_index
    dirty = clean._replace(logits=clean.logits.copy())
    dirty.logits[::4, ::2], dirty.logits[::4, 1::2] = NAN, INF
    losses, gradients = Budget(), Budget()
    for reduction, case in product(REDUCTIONS, (clean, dirty)):
        loss, dlogits = fx.cross_entropy_value_and_grad(*case[:2], reduction=reduction, **case.options)
        assert not dlogits[::4].any()
        truth, theirs = make_truth(case, reduction), run_torch(clean, reduction)
        losses.add(loss, truth.loss, theirs[0], truth.loss_scale, reduction)
        gradients.add(dlogits, truth.grad, theirs[1], truth.grad_scale, reduction)
    losses.check()
    gradients.check()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(5,), (3, 4, 5), (2, 3, 4, 17), (2, 1, 3, 2, 5)], ids=str)
def test_any_number_of_axes(shape, option):
    """1-D is one row without a batch axis."""
    check(make_case(FLOAT32, shape, option))


@pytest.mark.thorough
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("axis", [0, 1, 2, -2, -3])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_axis(dtype, axis, option):
    losses, gradients = Budget(), Budget()
    for classes, reduction in product((21, 70), REDUCTIONS):
        case = make_case(dtype, (7, 6, classes), option)
        logits = np.ascontiguousarray(np.moveaxis(case.logits, -1, axis))
        target = np.moveaxis(case.target, -1, axis) if case.target.ndim == 3 else case.target
        truth, theirs = make_truth(case, reduction), run_torch(case, reduction)
        options = dict(case.options, axis=axis, reduction=reduction)
        loss, dlogits = fx.cross_entropy_value_and_grad(logits, target, **options)
        for value in (loss, fx.cross_entropy(logits, target, **options)):
            losses.add(value, truth.loss, theirs[0], truth.loss_scale, (classes, reduction))
        assert dlogits.shape == logits.shape
        dlogits = np.moveaxis(dlogits, axis, -1)
        gradients.add(dlogits, truth.grad, theirs[1], truth.grad_scale, (classes, reduction))
    losses.check()
    gradients.check()


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
def test_every_integer_dtype_of_target(integer):
    case = make_case(FLOAT32, (33, 100), "weight smoothing")
    ignored = 7 if integer.kind == "u" else -100
    case.target[::5] = ignored
    options = dict(case.options, ignore_index=ignored)
    want = fx.cross_entropy_value_and_grad(case.logits, case.target, **options)
    for target in (case.target.astype(integer), case.target.astype(integer.newbyteorder())):
        got = fx.cross_entropy_value_and_grad(case.logits, target, **options)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    check(Case(case.logits, case.target, options))


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
def test_ignore_index_is_compared_by_value_not_by_bits(integer):
    x = make_rng("bits").standard_normal((3, 5))
    bounds = np.iinfo(integer)
    for ignored in {bounds.min, bounds.max} - {2**64 - 1}:  # which no ignore_index can be: see test_errors.py
        target = np.array([1, ignored, 4], integer)
        losses = fx.cross_entropy(x, target, ignore_index=ignored, reduction="none")
        np.testing.assert_array_equal(losses == 0, target == ignored)
    for wrapped in (bounds.max - 2**bounds.bits, bounds.max + 2**bounds.bits):  # the bits of `max` in other types
        if -(2**63) <= wrapped < 2**63:
            with pytest.raises(IndexError, match=str(bounds.max)):
                fx.cross_entropy(x, np.array([1, bounds.max, 4], integer), ignore_index=wrapped)


def test_lists_and_integer_logits_are_float64():
    for x in (
        [[1, 2, 3]],
        [[1.0, 2.0, 3.0]],
        np.array([[1, 2, 3]], np.int8),
        np.array([[1, 2, 3]], np.uint64),
    ):
        loss, dlogits = fx.cross_entropy_value_and_grad(x, [1])
        assert loss.dtype == dlogits.dtype == np.float64
        truth = ref.cross_entropy_value_and_grad([[1, 2, 3]], [1])
        np.testing.assert_allclose(loss, truth[0], rtol=1e-15)
        np.testing.assert_allclose(dlogits, truth[1], rtol=1e-14)


def test_float64_probabilities_make_a_float64_loss():
    case = make_case(FLOAT32, (9, 21), "probabilities weight smoothing sample_weight")
    case = case._replace(target=make_rng("wide").dirichlet(np.ones(21), 9))
    for reduction in REDUCTIONS:
        truth = make_truth(case, reduction)
        loss, dlogits = fx.cross_entropy_value_and_grad(*case[:2], reduction=reduction, **case.options)
        assert loss.dtype == np.float64 and dlogits.dtype == np.float32
        theirs = run_torch(case, reduction)
        assert theirs[0].dtype == np.float64  # computed from float32 log-probabilities all the same
        assert_within_budget(loss, truth.loss, theirs[0], truth.loss_scale)
        assert_within_budget(dlogits, truth.grad, theirs[1], truth.grad_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_any_float_dtype(dtype):
    case = make_case(FLOAT32, (9, 21), "probabilities")
    case = case._replace(target=case.target.astype(dtype))
    truth, theirs = (
        make_truth(case, "none"),
        run_torch(case._replace(target=widest(case.target).astype("f4")), "none"),
    )
    loss, dlogits = fx.cross_entropy_value_and_grad(*case[:2], reduction="none")
    np.testing.assert_array_equal(loss.dtype, accumulation(dtype))
    assert_within_budget(loss.astype("f4"), truth.loss, theirs[0], truth.loss_scale)
    assert_within_budget(dlogits, truth.grad, theirs[1], truth.grad_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_no_classes_one_class(dtype):
    empty, indices = np.zeros((0, 4), dtype), np.zeros(0, int)
    for target in (indices, np.zeros((0, 4), dtype)):
        for reduction, want in {"mean": NAN, "sum": 0.0, "none": np.zeros(0)}.items():
            loss, dlogits = fx.cross_entropy_value_and_grad(empty, target, reduction=reduction)
            np.testing.assert_array_equal(loss, want)
            assert dlogits.shape == (0, 4) and dlogits.dtype == dtype
            np.testing.assert_array_equal(fx.cross_entropy(empty, target, reduction=reduction), want)
    for reduction, want in {"mean": NAN, "sum": 0.0, "none": np.zeros(3)}.items():
        nothing = np.zeros((3, 0), dtype)
        loss, dlogits = fx.cross_entropy_value_and_grad(nothing, nothing, reduction=reduction)
        np.testing.assert_array_equal(loss, want)
        assert dlogits.shape == (3, 0)
    with pytest.raises(IndexError, match=r"target\[0\] = 0 is outside \[0, 0\); 3 of 3 rows"):
        fx.cross_entropy(np.zeros((3, 0), dtype), [0, 0, 0])
    loss, dlogits = fx.cross_entropy_value_and_grad(np.array([[5], [-5]], dtype), [0, 0])
    assert loss == 0 and not dlogits.any()
