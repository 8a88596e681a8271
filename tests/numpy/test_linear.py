"""Cross-entropy of a linear layer: against the reference, whatever the blocks; its errors, edges and memory."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastxent as fx
from fastxent import reference as ref
from fastxent._runtime.blocks import LEAST_BUDGET, RESERVE, classes_per_block, rows_per_block
from tests.helpers.cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, REDUCTIONS, make_case, make_rng
from tests.helpers.opponent import one_torch_thread, torch_loss
from tests.helpers.processes import run_script
from tests.helpers.truth import Budget, widest

ROWS, FEATURES, CLASSES = (
    37,
    24,
    400,
)  # a tail in rows, and in a vector of classes; classes in the lanes, as with any large head
# Blocks of 1 and of 16 rows, and one of all.
LIMITS = [1, 4 * (FEATURES * CLASSES + 20 * (CLASSES + 2 * FEATURES)), None]
OPTIONS = [
    "index",
    "weight ignore sample_weight",
    "weight ignore smoothing sample_weight z_loss",
    "ignore_class softcap",
    "probabilities weight smoothing sample_weight",
]


class Case(NamedTuple):
    input: Any
    linear_weight: Any
    target: Any
    options: dict[str, Any]

    def __call__(self, function: Any, **more: Any) -> Any:
        return function(self.input, self.linear_weight, self.target, **self.options | more)


def make_layer(dtype: np.dtype, option: str = "index", rows: tuple[int, ...] = (ROWS,), classes: int = CLASSES) -> Case:
    """A layer with a bias, whose logits are about 3 in size."""
    rng, loss = make_rng("layer", dtype.name, option, rows), make_case(dtype, (*rows, classes), option)
    h, w = rng.standard_normal((*rows, FEATURES)), 3 * FEATURES**-0.5 * rng.standard_normal((classes, FEATURES))
    bias = rng.standard_normal(classes).astype(dtype).astype(np.float64)
    return Case(h.astype(dtype), w.astype(dtype), loss.target, loss.options | dict(linear_bias=bias))


def run_torch(case: Case, reduction: str) -> list[np.ndarray]:
    """Loss and gradients by PyTorch's operators, of the whole logits, in float32 or float64."""
    wide = torch.float64 if case.input.dtype == FLOAT64 else torch.float32
    options = {k: torch.tensor(v).to(wide) if isinstance(v, np.ndarray) else v for k, v in case.options.items()}
    bias = options.pop("linear_bias")
    leaves = [torch.tensor(a.astype(np.float64)).to(wide) for a in (case.input, case.linear_weight)] + [bias]
    h, w, b = (leaf.requires_grad_() for leaf in leaves)
    target = torch.tensor(case.target)
    loss = torch_loss(h @ w.T + b, target if target.dim() == 1 else target.to(wide), reduction, **options)
    gradients = torch.autograd.grad(loss.sum(), [h, w, b])
    return [loss.detach().numpy(), *(g.to(torch.float64).numpy().astype(case.input.dtype) for g in gradients)]


def make_truth(case: Case, reduction: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What is right, and for each result the size of the terms that its formula adds up."""
    options = {k: widest(v) for k, v in case.options.items()}
    wide = Case(widest(case.input), widest(case.linear_weight), widest(case.target), options)
    loss, gradients = wide(ref.linear_cross_entropy_value_and_grad, reduction=reduction)
    x = wide.input @ wide.linear_weight.T
    h, w = np.abs(wide.input), np.abs(wide.linear_weight)
    # The gradient of the logits has an error of its own: an ulp of their size, times p.
    flat = Case(
        np.eye(len(x)), (x + options["linear_bias"]).T, wide.target, {k: v for k, v in options.items() if "bias" not in k}
    )
    g = np.abs(flat(ref.linear_cross_entropy_value_and_grad, reduction=reduction)[1].linear_weight.T) * (1 + np.abs(x))
    size = np.maximum(np.abs(loss), 1 + (h @ w.T).max(-1) if np.ndim(loss) else (h @ w.T).max())
    return [loss, *gradients], [size, g @ w, g.T @ h, g.sum(0)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [pytest.param(d, marks=[pytest.mark.core] if d == FLOAT32 else []) for d in DTYPES], ids=str)
def test_loss_and_gradients_are_within_the_budget(dtype, option):
    """PyTorch's error, plus a unit in the last place, for all reductions and blocks: half precision is rounded once."""
    case, budgets = make_layer(dtype, option), [Budget() for _ in range(4)]
    for reduction in REDUCTIONS:
        with one_torch_thread():
            theirs = run_torch(case, reduction)
        truth, scale = make_truth(case, reduction)
        for limit in LIMITS:
            loss, gradients = case(fx.linear_cross_entropy_value_and_grad, reduction=reduction, memory_limit=limit)
            assert all(g.dtype == dtype for g in gradients)
            label = f"{reduction}, memory_limit {limit}"
            for budget, *results in zip(budgets, [loss, *gradients], truth, theirs, scale, strict=True):
                budget.add(*results, label)
            np.testing.assert_array_equal(case(fx.linear_cross_entropy, reduction=reduction, memory_limit=limit), loss)
    for budget in budgets:
        budget.check()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [FLOAT32, pytest.param(FLOAT64, marks=pytest.mark.slow)], ids=str)
def test_statistics_are_the_references(dtype, option):
    case, tolerance = make_layer(dtype, option), 1e-13 if dtype == FLOAT64 else 1e-5
    truth = case(ref.linear_cross_entropy_stats)
    for limit in LIMITS:
        stats = case(fx.linear_cross_entropy_stats, memory_limit=limit)
        for name, ours, right in zip(stats._fields, stats, truth, strict=True):
            np.testing.assert_allclose(ours, right, tolerance, tolerance, err_msg=name)
        assert stats.loss.dtype == dtype and stats.prediction.dtype == np.intp
        mean = case(fx.linear_cross_entropy_stats, memory_limit=limit, reduction="mean").loss
        assert mean == pytest.approx(case(ref.linear_cross_entropy), rel=tolerance)


def test_log_prob_and_entropy_are_the_references():
    case = make_layer(FLOAT32, "ignore")
    truth = case(ref.linear_log_prob_and_entropy, temperature=0.7)
    for limit in LIMITS:
        for ours, right in zip(case(fx.linear_log_prob_and_entropy, temperature=0.7, memory_limit=limit), truth, strict=True):
            np.testing.assert_allclose(ours, right, 1e-5, 1e-5)
    probabilities = make_layer(FLOAT32, "probabilities")
    with pytest.raises(TypeError, match="linear_log_prob_and_entropy takes class indices"):
        probabilities(fx.linear_log_prob_and_entropy)


def assert_same(one: Any, other: Any, tolerance: float = 3e-6) -> None:
    """Two losses with gradients are the same but for the rounding of sums, in units of the largest number of each."""
    for a, b in zip([one[0], *one[1]], [other[0], *other[1]], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-3, np.abs(b).max(initial=0)))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    features=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    block=st.integers(1, 70),
    reduction=st.sampled_from(REDUCTIONS),
    ignored=st.floats(0, 1),
)
def test_blocks_row_order_and_dropped_rows_change_rounding_only(rows, features, seed, block, reduction, ignored):
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((rows, features)).astype(np.float32)
    w = (rng.standard_normal((CLASSES, features)) / features**0.5).astype(np.float32)
    y, keep = rng.integers(0, CLASSES, rows), rng.random(rows) >= ignored
    target = np.where(keep, y, -100)
    options = dict(linear_bias=rng.standard_normal(CLASSES), reduction=reduction)
    function = fx.linear_cross_entropy_value_and_grad
    loss, gradients = whole = function(h, w, target, **options)
    limit = 4 * (min(features * CLASSES, 2 * 10**6) + block * (CLASSES + 2 * features))
    assert_same(function(h, w, target, memory_limit=limit, **options), whole)

    order = rng.permutation(rows)
    shuffled = function(h[order], w, target[order], memory_limit=limit, **options)
    back = np.argsort(order)
    moved = shuffled[0][back] if reduction == "none" else shuffled[0], shuffled[1]._replace(input=shuffled[1].input[back])
    assert_same(moved, whole)

    alone, its = function(h[keep], w, y[keep], memory_limit=limit, **options)
    of_kept = loss[keep] if reduction == "none" else loss
    assert_same((alone, its), (of_kept, gradients._replace(input=gradients.input[keep])))
    assert not gradients.input[~keep].any()


def test_the_number_of_threads_changes_no_bit_for_the_same_products():
    case = make_layer(FLOAT32, "weight ignore", (200,), 5000)
    one, two = (case(fx.linear_cross_entropy_value_and_grad, n_threads=n, memory_limit=2_000_000) for n in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip([one[0], *one[1]], [two[0], *two[1]], strict=True))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_input_of_any_rank(shape):
    case = make_layer(FLOAT64, "index", shape)
    loss, gradients = case(fx.linear_cross_entropy_value_and_grad, reduction="none", memory_limit=1)
    truth, right = case(ref.linear_cross_entropy_value_and_grad, reduction="none")
    assert loss.shape == shape and gradients.input.shape == (*shape, FEATURES)
    assert_same((loss, gradients), (truth, right), 1e-12)
    stats = case(fx.linear_cross_entropy_stats)
    assert all(np.shape(a) == shape for a in stats)


def test_weights_and_inputs_as_they_lie():
    """Transposed, strided, reversed, in the other byte order, read-only, and memory that begins at any byte."""
    case = make_layer(FLOAT32, "ignore")
    h, w, want = case.input, case.linear_weight, case(fx.linear_cross_entropy_value_and_grad)
    strided = np.zeros((2 * CLASSES, 3 * FEATURES), np.float32)[::2, ::3]
    strided[...] = w
    odd = np.zeros(w.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(w.shape)
    odd[...] = w
    fixed = w.copy()
    fixed.flags.writeable = False
    for weight in (np.asfortranarray(w), strided, w[::-1].copy()[::-1], w.astype(">f4"), odd, fixed):
        for x in (h, np.asfortranarray(h), h[:, ::-1].copy()[:, ::-1]):
            got = Case(x, weight, case.target, case.options)(fx.linear_cross_entropy_value_and_grad, memory_limit=LIMITS[1])
            assert_same(got, want)
    assert np.array_equal(fixed, w)


def test_memory_mapped_input_and_weight(tmp_path):
    case = make_layer(FLOAT32)
    np.save(tmp_path / "h.npy", case.input)
    np.save(tmp_path / "w.npy", case.linear_weight)
    h, w = (np.load(tmp_path / name, mmap_mode="r") for name in ("h.npy", "w.npy"))
    mapped = Case(h, w, case.target, case.options)
    got, want = (c(fx.linear_cross_entropy_stats, memory_limit=LIMITS[1]) for c in (mapped, case))
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


# ---------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize(("rows", "features", "classes"), [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_of_one_kind(rows, features, classes, reduction):
    """As `cross_entropy` of the product."""
    h, w, b = np.ones((rows, features)), np.ones((classes, features)), np.ones(classes)
    y = np.zeros(rows, int) if classes else np.full(rows, -100)
    for target in (y, np.full((rows, classes), 0.25)):
        loss, gradients = fx.linear_cross_entropy_value_and_grad(h, w, target, linear_bias=b, reduction=reduction)
        x = h @ w.T + b
        want, g = fx.cross_entropy_value_and_grad(x, target, reduction=reduction)
        np.testing.assert_array_equal(loss, want)
        for ours, right in zip(gradients, (g @ w, g.T @ h, g.sum(0)), strict=True):
            np.testing.assert_allclose(ours, right, atol=1e-15)
        assert fx.linear_cross_entropy(h, w, target, reduction=reduction) == pytest.approx(want, nan_ok=True)


def test_with_every_row_ignored_the_mean_is_nan_and_the_gradients_are_0():
    case = make_layer(FLOAT32)
    h = np.full_like(case.input, np.nan)
    loss, gradients = Case(h, case.linear_weight, np.full(ROWS, -100), case.options)(fx.linear_cross_entropy_value_and_grad)
    assert np.isnan(loss) and not any(g.any() for g in gradients)
    stats = fx.linear_cross_entropy_stats(h, case.linear_weight, np.full(ROWS, -100))
    assert (stats.prediction == -1).all() and not stats.loss.any()


def test_what_is_not_finite_stays_in_its_row():
    case = make_layer(FLOAT32)
    case.input[3] = np.nan
    loss, gradients = case(fx.linear_cross_entropy_value_and_grad, reduction="none", memory_limit=LIMITS[1])
    others = np.arange(ROWS) != 3
    assert np.isnan(loss[3]) and np.isnan(gradients.input[3]).all() and np.isnan(gradients.linear_weight).all()
    assert np.isfinite(loss[others]).all() and np.isfinite(gradients.input[others]).all()
    case.target[3] = -100
    loss, gradients = case(fx.linear_cross_entropy_value_and_grad, memory_limit=LIMITS[1])
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in gradients)


def test_rows_of_weight_0_have_a_mean_of_nan():
    case = make_layer(FLOAT32)
    loss, gradients = case(fx.linear_cross_entropy_value_and_grad, sample_weight=np.zeros(ROWS))
    assert np.isnan(loss) and np.isnan(gradients.input).all()


def test_half_precision_sums_over_blocks_are_rounded_once():
    """The gradient of the weight at 64 blocks is the one of one block, but for the rounding of float32."""
    for dtype in (FLOAT16, BFLOAT16):
        case = make_layer(dtype, "index", (64,))
        one, many = (case(fx.linear_cross_entropy_value_and_grad, memory_limit=limit)[1] for limit in (None, 1))
        truth = case(ref.linear_cross_entropy_value_and_grad)[1]
        for a, b, right in zip(one, many, truth, strict=True):
            errors = [np.abs(g.astype(np.float64) - right).max() for g in (a, b)]
            assert errors[1] <= 1.02 * errors[0]


# ---------------------------------------------------------------------------------------------------- errors

H, W = np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32)
ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "input is a number", dict(input=1.0)),
    (TypeError, "input has dtype complex64", dict(input=H + np.complex64())),
    (ValueError, r"linear_weight has shape \(3,\); it must be \(classes, features\)", dict(linear_weight=W[0])),
    (ValueError, r"input has shape \(2, 3\) and linear_weight \(4, 2\)", dict(linear_weight=W[:, :2])),
    (TypeError, "linear_weight has dtype float64; it must be that of input, float32", dict(linear_weight=W.astype(float))),
    (ValueError, r"linear_bias has shape \(3,\); it must be \(4,\): one number per class", dict(linear_bias=np.ones(3))),
    (TypeError, "linear_bias has dtype <U1", dict(linear_bias=np.array(list("abcd")))),
    (ValueError, r"target has shape \(3,\)", dict(target=[0, 1, 2])),
    (TypeError, "target has dtype float64; class indices must be integers", dict(target=[0.0, 1.0])),
    (IndexError, r"target\[1\] = 4 is outside \[0, 4\); 1 of 2 rows is out of range", dict(target=[-100, 4])),
    (IndexError, r"target\[0\] = -1 is outside \[0, 4\); 2 of 2 rows are out of range", dict(target=[-1, 7])),
    (ValueError, "ignore_index = 0 has no meaning", dict(target=np.full((2, 4), 0.25), ignore_index=0)),
    (ValueError, r"weight has shape \(3,\); it must be \(4,\)", dict(weight=np.ones(3))),
    (ValueError, r"sample_weight has shape \(3,\); it must be \(2,\)", dict(sample_weight=np.ones(3))),
    (ValueError, "label_smoothing = 2 is outside", dict(label_smoothing=2)),
    (ValueError, "reduction = 'all' is not one of", dict(reduction="all")),
    (ValueError, "z_loss = inf is not finite", dict(z_loss=np.inf)),
    (ValueError, "softcap = 0 is not above 0", dict(softcap=0)),
    (ValueError, "memory_limit = 0 is less than 1", dict(memory_limit=0)),
    (TypeError, "memory_limit must be an integer, got float", dict(memory_limit=64e6)),
    (ValueError, "n_threads = 0 is less than 1", dict(n_threads=0)),
]


@pytest.mark.core
@pytest.mark.parametrize(("kind", "message", "wrong"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_errors_name_argument_and_value(kind, message, wrong):
    arguments: dict[str, Any] = dict(input=H, linear_weight=W, target=[0, 1]) | wrong
    for function in (fx.linear_cross_entropy, fx.linear_cross_entropy_value_and_grad, fx.linear_cross_entropy_stats):
        with pytest.raises(kind, match=message):
            function(**arguments)


def test_a_bad_target_is_named_in_the_callers_numbering():
    with pytest.raises(IndexError, match=r"target\[1, 2\] = 9 is outside \[0, 4\)"):
        fx.linear_cross_entropy(np.zeros((2, 3, 3)), np.zeros((4, 3)), [[-100, 0, 1], [-100, -100, 9]], memory_limit=1)
    with pytest.raises(ValueError, match="no class to predict"):
        fx.linear_cross_entropy_stats(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0, int))


# ---------------------------------------------------------------------------------------------------- memory


def test_blocks_fit_the_budget_and_cover_all_rows():
    for n, d, v, size in [
        (2048, 256, 50257, 4),
        (4096, 768, 32000, 2),
        (64, 2048, 128256, 4),
        (7, 3, 5, 8),
        (100_000, 16, 300, 4),
    ]:
        unit = max(size, 4)  # NumPy's; PyTorch may hold logits of two bytes
        assert rows_per_block(n, d, v, size, 2, 64_000_000) >= rows_per_block(n, d, v, size, 4, 64_000_000)
        for limit in (None, 1, 10**6, 16_000_000, 64_000_000, 10**12):
            rows = rows_per_block(n, d, v, size, unit, limit)
            budget = limit or max(LEAST_BUDGET, d * v * size)
            assert 1 <= rows <= n
            assert rows == 1 or unit * rows * (v + 2 * d) + min(RESERVE, unit * v * d) <= budget
            assert rows in (1, n) or rows % 16 == 0 or rows < 16
        assert classes_per_block(d, size) % 16 == 0


PEAK = """
import sys, ml_dtypes, numpy as np, fastxent as fx
n, d, v, limit, dtype = *map(int, sys.argv[1:5]), np.dtype(sys.argv[5])
rng = np.random.default_rng(0)
h, w = (rng.standard_normal(shape, np.float32).astype(dtype) for shape in ((n, d), (v, d)))
y = rng.integers(0, v, n)
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
# A small call first: it compiles, and starts the threads.
function = fx.linear_cross_entropy_value_and_grad if sys.argv[6] == "gradients" else fx.linear_cross_entropy
function(h[:256], w[:5000], y[:256] % 5000)
fx.release_buffers()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
result = function(h, w, y, memory_limit=limit or None)
gradients = result[1][:2] if sys.argv[6] == "gradients" else ()
print(peak() - before - sum(g.nbytes for g in gradients))
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux reports it")
@pytest.mark.parametrize(("rows", "dtype"), [(1024, "float32"), (4096, "float32"), (4096, "bfloat16")])
@pytest.mark.parametrize("limit", [0, 24_000_000])
@pytest.mark.parametrize("what", ["gradients", "loss"])
def test_peak_of_resident_memory(rows, dtype, limit, what):
    """Beside inputs and gradients: the default budget, whatever the number of rows, or the given one and 16 MB at most.

    In half precision the sum of the weight's gradient, in float32, is beside that.
    """
    extra = int(run_script(PEAK, str(rows), "64", "32000", str(limit), dtype, what))
    extra -= 4 * 64 * 32000 if dtype == "bfloat16" and what == "gradients" else 0
    assert extra <= (limit + 16_000_000 if limit else LEAST_BUDGET)
