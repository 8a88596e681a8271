"""Every wrong argument raises the right error, which says what is wrong where, and writes nothing before it does."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import fastxent as fx
from tests.helpers.cases import BFLOAT16, DTYPES, FLOAT32, INTEGERS, make_case

LOSSES = ["cross_entropy", "cross_entropy_value_and_grad", "cross_entropy_stats", "cross_entropy_grad_hess"]


def good() -> dict[str, Any]:
    """Arguments that are all right: four rows of five classes."""
    return dict(logits=np.arange(20, dtype=np.float32).reshape(4, 5), target=np.array([0, 1, 2, 3]))


def probabilities(**changes: Any) -> dict[str, Any]:
    return dict(target=np.full((4, 5), 0.2, np.float32)) | changes


def an(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


# (what is changed in good(), error, what its message must hold). For all functions of the cross-entropy family.
WRONG = {
    # target: values
    "too large": (dict(target=[0, 1, 2, 5]), IndexError, "target[3] = 5 is outside [0, 5)", "1 of 4 rows"),
    "vocabulary": (dict(target=[0, 1, 2, 50257]), IndexError, "target[3] = 50257 is outside [0, 5)", "1 of 4 rows"),
    "negative": (dict(target=[0, -1, 2, 3]), IndexError, "target[1] = -1 is outside [0, 5)", "1 of 4 rows"),
    "several": (dict(target=[9, 1, -7, 8]), IndexError, "target[0] = 9 is outside [0, 5)", "3 of 4 rows"),
    "one too large": (dict(target=[0, 1, -100, 5]), IndexError, "target[3] = 5", "1 of 4 rows"),
    "not the ignored one": (dict(target=[-100, 0, 0, 0], ignore_index=-1), IndexError, "target[0] = -100"),
    "2-D rows": (
        dict(logits=an(2, 3, 5), target=[[0, 1, 2], [3, 6, 4]]),
        IndexError,
        "target[1, 1] = 6 is outside [0, 5)",
        "1 of 6 rows",
    ),
    "axis": (dict(logits=an(2, 5, 3), target=[[0, 1, 2], [3, 6, 4]], axis=1), IndexError, "target[1, 1] = 6"),
    "no batch": (dict(logits=an(5), target=5), IndexError, "target", "= 5 is outside [0, 5)", "1 of 1 rows"),
    "no classes": (dict(logits=an(4, 0), target=[0, 0, 0, 0]), IndexError, "target[0] = 0 is outside [0, 0)"),
    # target: dtype and shape
    "float of another shape": (dict(target=an(4, 4)), ValueError, "target", "(4, 4)", "(4, 5)"),
    "half a class": (dict(target=[0.0, 1.0, 2.5, 3.0]), (TypeError, ValueError), "target"),
    "boolean": (dict(target=[True, False, True, False]), TypeError, "target", "bool", "integers"),
    "object": (dict(target=np.array([0, 1, 2, None], object)), TypeError, "target", "object", "integers"),
    "text": (dict(target=["0", "1", "2", "3"]), TypeError, "target", "integers"),
    "complex": (dict(target=an(4, dtype=complex)), TypeError, "target", "complex128", "integers"),
    "dates": (dict(target=an(4, dtype="M8[s]")), TypeError, "target", "datetime64", "integers"),
    "none": (dict(target=None), (TypeError, ValueError), "target"),
    "integer one-hot": (dict(target=an(4, 5, dtype=int)), TypeError, "target", "int64", "probabilities"),
    "boolean one-hot": (dict(target=an(4, 5, dtype=bool)), TypeError, "target", "bool", "probabilities"),
    "complex probabilities": (dict(target=an(4, 5, dtype=complex)), TypeError, "target", "complex128"),
    "too few rows": (dict(target=[0, 1, 2]), ValueError, "target", "(3,)", "(4,)", "(4, 5)"),
    "too many axes": (dict(target=an(4, 1, dtype=int)), ValueError, "target", "(4, 1)", "(4,)"),
    "too few axes": (dict(target=0), ValueError, "target", "()", "(4,)"),
    "rows for a lone row": (dict(logits=an(5), target=[0]), ValueError, "target", "(1,)", "()"),
    "target of another axis": (dict(axis=0), ValueError, "target", "(4,)", "(5,)"),
    # logits
    "complex logits": (dict(logits=an(4, 5, dtype=complex)), TypeError, "logits", "complex128", "float32"),
    "object logits": (dict(logits=an(4, 5, dtype=object)), TypeError, "logits", "object", "float32"),
    "text logits": (dict(logits=[["a"] * 5] * 4), TypeError, "logits", "float32"),
    "long double logits": (dict(logits=an(4, 5, dtype=np.longdouble)), TypeError, "logits", "float64"),
    "a number": (dict(logits=1.0, target=0), ValueError, "logits", "axis"),
    # weights
    "short weight": (dict(weight=[1.0, 2.0]), ValueError, "weight", "(2,)", "(5,)"),
    "weight of rows": (dict(weight=np.ones(4)), ValueError, "weight", "(4,)", "(5,)"),
    "2-D weight": (dict(weight=np.ones((1, 5))), ValueError, "weight", "(1, 5)", "(5,)"),
    "scalar weight": (dict(weight=1.0), ValueError, "weight", "()", "(5,)"),
    "complex weight": (dict(weight=np.ones(5, complex)), TypeError, "weight", "complex128"),
    "text weight": (dict(weight=["a"] * 5), TypeError, "weight"),
    "object weight": (dict(weight=np.array([None] * 5)), TypeError, "weight", "object"),
    "short sample_weight": (dict(sample_weight=[1.0]), ValueError, "sample_weight", "(1,)", "(4,)"),
    "sample_weight of classes": (dict(sample_weight=np.ones(5)), ValueError, "sample_weight", "(5,)", "(4,)"),
    "complex sample_weight": (dict(sample_weight=np.ones(4, complex)), TypeError, "sample_weight", "complex128"),
    # numbers
    "smoothing 1.5": (dict(label_smoothing=1.5), ValueError, "label_smoothing", "1.5", "[0, 1]"),
    "smoothing -0.1": (dict(label_smoothing=-0.1), ValueError, "label_smoothing", "-0.1", "[0, 1]"),
    "smoothing nan": (dict(label_smoothing=np.nan), ValueError, "label_smoothing", "nan", "[0, 1]"),
    "smoothing text": (dict(label_smoothing="0.1"), TypeError, "label_smoothing", "str"),
    "smoothing none": (dict(label_smoothing=None), TypeError, "label_smoothing", "NoneType"),
    "smoothing complex": (dict(label_smoothing=np.complex128(0.1)), TypeError, "label_smoothing", "complex128"),
    "ignore 1.5": (dict(ignore_index=1.5), TypeError, "ignore_index", "float"),
    "ignore none": (dict(ignore_index=None), TypeError, "ignore_index", "NoneType"),
    "ignore 2**64 - 1": (dict(ignore_index=2**64 - 1), ValueError, "ignore_index", str(2**64 - 1)),
    "ignore probabilities": (probabilities(ignore_index=2), ValueError, "ignore_index", "2", "probabilities"),
    "ignore probabilities 0": (probabilities(ignore_index=0), ValueError, "ignore_index", "0", "probabilities"),
    "axis 2": (dict(axis=2), (ValueError, IndexError), "axis", "2", "[-2, 2)"),
    "axis -3": (dict(axis=-3), (ValueError, IndexError), "axis", "-3", "[-2, 2)"),
    "axis 1.0": (dict(axis=1.0), TypeError, "axis", "float"),
    "axis none": (dict(axis=None), TypeError, "axis", "integer", "NoneType"),
    "axes": (dict(axis=(0, 1)), TypeError, "axis", "integer", "tuple"),
    "axis of an array": (dict(axis=np.array([1])), TypeError, "axis", "integer"),
    "ignore of an array": (dict(ignore_index=np.array(1.5)), TypeError, "ignore_index", "integer"),
    "ragged logits": (dict(logits=[[0.0, 1.0], [2.0]]), (TypeError, ValueError), "logits"),
    "no threads": (dict(n_threads=0), ValueError, "n_threads", "0", "1"),
    "fewer threads": (dict(n_threads=-2), ValueError, "n_threads", "-2", "1"),
    "half a thread": (dict(n_threads=1.5), TypeError, "n_threads", "float"),
}


WRONG_ARGUMENTS = [
    pytest.param(changes, error, words, id=name, marks=[] if name == "axis" else [pytest.mark.core])  # which compiles
    for name, (changes, error, *words) in WRONG.items()
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("changes", "error", "words"), WRONG_ARGUMENTS)
def test_wrong_arguments(changes, error, words, name):
    with pytest.raises(error) as info:
        getattr(fx, name)(**good() | changes)
    assert_says(info.value, words)


def assert_says(error: BaseException, words: list[str]) -> None:
    """The message holds all `words`, each as a word of its own: "5" is not in "(15,)"."""
    for word in words:
        pattern = rf"(?<![\w.-]){re.escape(word)}(?![\w]|\.\d)"
        assert re.search(pattern, str(error)), f"{word!r} is not in {str(error)!r}"


@pytest.mark.parametrize("name", [*LOSSES[:3], "nll_loss"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_labels_are_to_be_made_integers(dtype, name):
    first = dict(log_probs=good()["logits"]) if name == "nll_loss" else dict(logits=good()["logits"])
    with pytest.raises(TypeError) as info:
        getattr(fx, name)(**first, target=an(4, dtype=dtype))
    assert_says(info.value, ["target", dtype.name, "integers", "target.astype(int)"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_the_boosting_objective_takes_whole_floats_for_labels(dtype):
    """As XGBoost and LightGBM hand them over; never class probabilities, which have another shape."""
    x = make_case(FLOAT32, (4, 5)).logits
    labels = np.array([3, -100, 0, 4])
    for got, want in zip(
        fx.cross_entropy_grad_hess(x, labels.astype(dtype)), fx.cross_entropy_grad_hess(x, labels), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(
        fx.cross_entropy_grad_hess(x[0], np.array(2, dtype)), fx.cross_entropy_grad_hess(x[0], 2), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    for value in (0.5, np.nan, np.inf):
        with pytest.raises(ValueError) as info:
            fx.cross_entropy_grad_hess(x, np.array([0, 1, value, 3], dtype))
        assert_says(info.value, [f"target[2] = {value}", "no class index"])
    for value in (5.0, -1.0):
        with pytest.raises(IndexError) as info:
            fx.cross_entropy_grad_hess(x, np.array([0, 1, value, 3], dtype))
        assert_says(info.value, [f"target[2] = {value} is outside [0, 5)", "1 of 4 rows"])


@pytest.mark.core
@pytest.mark.parametrize("reduction", ["batchmean", "Mean", "", None, 0, True, np.array(["mean"])], ids=repr)
@pytest.mark.parametrize("name", [*LOSSES[:3], "nll_loss"])
def test_wrong_reduction(name, reduction):
    first = dict(log_probs=good()["logits"]) if name == "nll_loss" else dict(logits=good()["logits"])
    with pytest.raises((ValueError, TypeError)) as info:
        getattr(fx, name)(**first, target=[0, 1, 2, 3], reduction=reduction)
    assert_says(info.value, ["reduction", repr(reduction).strip("'") or "''", "none", "mean", "sum"])


def test_no_reduction_where_nothing_is_reduced():
    with pytest.raises(TypeError, match="reduction"):
        fx.cross_entropy_grad_hess(**good(), reduction="mean")


# ----------------------------------------------------------------------------------------------------
# Nothing is written
# ----------------------------------------------------------------------------------------------------

WRONG_FOR_ARRAYS = {k: v for k, v in WRONG.items() if "logits" not in v[0]}


@pytest.mark.core
@pytest.mark.parametrize(("changes", "error"), [(c, e) for c, e, *_ in WRONG_FOR_ARRAYS.values()], ids=list(WRONG_FOR_ARRAYS))
def test_an_error_has_written_nothing(changes, error):
    """Neither to ``out`` nor, where they are one, to the logits."""
    arguments = good() | changes
    logits, out = arguments["logits"], np.full((4, 5), 7, np.float32)
    before = logits.tobytes(), out.tobytes()
    for place in (out, logits):
        with pytest.raises(error):
            fx.cross_entropy_value_and_grad(**arguments, out=place)
        assert (logits.tobytes(), out.tobytes()) == before


@pytest.mark.parametrize("shape", [(33, 21), (33, 70), (3000, 49), (40, 6500), (2, 70000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_last_row_has_let_nothing_be_written(dtype, shape):
    """Also where the rows are shared out to threads, and where a row is."""
    case = make_case(dtype, shape, "weight smoothing")
    out = np.full(shape, 7).astype(dtype)
    before = case.logits.tobytes(), out.tobytes()
    for bad in (shape[1], -1, 2**31, -(2**63), 2**63 - 1):
        case.target[-1] = bad
        words = [f"target[{shape[0] - 1}] = {bad} is outside [0, {shape[1]})", f"1 of {shape[0]} rows"]
        for place in (out, case.logits):
            with pytest.raises(IndexError) as info:
                fx.cross_entropy_value_and_grad(*case[:2], out=place, **case.options)
            assert_says(info.value, words)
            assert (case.logits.tobytes(), out.tobytes()) == before


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("integer", INTEGERS, ids=str)
def test_extreme_targets_of_every_integer_dtype(integer, name):
    """Nothing is read at logits[2**63 - 1], nor where a number of 64 bits ends up when it is cut to fewer."""
    function, bounds = getattr(fx, name), np.iinfo(integer)
    for value in sorted({bounds.min, bounds.max, bounds.max - 1, bounds.max // 2 + 1} - {0}):
        for order in (integer, integer.newbyteorder()):
            target = np.array([0, value, 4, value], order)
            with pytest.raises(IndexError) as info:
                function(good()["logits"], target)
            assert_says(info.value, [f"target[1] = {value} is outside [0, 5)", "2 of 4 rows"])


@pytest.mark.parametrize("value", [2**32, 2**32 + 1, -(2**32), 2**33 + 3, 2**63, 2**64 - 100])
def test_targets_that_are_in_range_modulo_a_power_of_two(value):
    target = np.array([0, 1, 2, value], np.uint64 if value >= 2**63 else np.int64)
    with pytest.raises(IndexError) as info:
        fx.cross_entropy(good()["logits"], target)
    assert_says(info.value, [f"target[3] = {value} is outside [0, 5)", "1 of 4 rows"])


def test_bad_rows_are_counted_beside_ignored_ones():
    rows = np.arange(100000) % 7
    rows[::10], rows[12345], rows[77777] = -100, -100, -5
    bad = int(((rows != -100) & ((rows < 0) | (rows >= 6))).sum())
    first = int(np.argmax((rows != -100) & ((rows < 0) | (rows >= 6))))
    with pytest.raises(IndexError) as info:
        fx.cross_entropy(an(100000, 6), rows)
    assert_says(info.value, [f"target[{first}] = {rows[first]} is outside [0, 6)", f"{bad} of 100000 rows"])


# ----------------------------------------------------------------------------------------------------
# out, and the other functions
# ----------------------------------------------------------------------------------------------------


def read_only() -> np.ndarray:
    array = an(4, 5)
    array.flags.writeable = False
    return array


WRONG_OUT = {
    "shape": (an(5, 4), ValueError, "out", "(5, 4)", "(4, 5)"),
    "flat": (an(20), ValueError, "out", "(20,)", "(4, 5)"),
    "wider": (an(4, 5, dtype=float), TypeError, "out", "float64", "float32"),
    "bfloat16": (an(4, 5, dtype=BFLOAT16), TypeError, "out", "bfloat16", "float32"),
    "integer": (an(4, 5, dtype=np.int32), TypeError, "out", "int32", "float32"),
    "read-only": (read_only(), ValueError, "out", "read-only"),
    "list": ([[0.0] * 5] * 4, TypeError, "out", "list"),
    "overlapping rows": (np.lib.stride_tricks.as_strided(an(20), (4, 5), (4, 4)), ValueError, "out", "strides (4, 4)"),
    "overlapping columns": (np.lib.stride_tricks.as_strided(an(20), (4, 5), (12, 4)), ValueError, "out", "(12, 4)"),
    "one place for all": (np.lib.stride_tricks.as_strided(an(1), (4, 5), (0, 0)), ValueError, "out"),
}


@pytest.mark.core
@pytest.mark.parametrize(("out", "error", "words"), [(o, e, w) for o, e, *w in WRONG_OUT.values()], ids=list(WRONG_OUT))
def test_wrong_out(out, error, words):
    logits, target = good().values()
    calls = [
        lambda: fx.cross_entropy_value_and_grad(logits, target, out=out),
        lambda: fx.binary_cross_entropy_with_logits_value_and_grad(logits, an(4, 5), out=out),
        lambda: fx.softmax(logits, -1, out=out),
        lambda: fx.log_softmax(logits, 0, out=out),
    ]
    before = np.asarray(out).tobytes()
    for call in calls:
        with pytest.raises(error) as info:
            call()
        assert_says(info.value, words)
        assert np.asarray(out).tobytes() == before


X = np.zeros((4, 5), np.float32)
WRONG_ELSEWHERE = {
    "softmax axis": (lambda: fx.softmax(X, 2), (ValueError, IndexError), "axis", "2"),
    "softmax axes": (lambda: fx.softmax(X, (0, -3)), (ValueError, IndexError), "axis", "-3"),
    "softmax twice": (lambda: fx.softmax(X, (0, -2)), ValueError, "axis"),
    "softmax axis 1.0": (lambda: fx.softmax(X, 1.0), TypeError, "axis", "float"),
    "softmax dtype": (lambda: fx.softmax(X.astype(complex)), TypeError, "x", "complex128"),
    "softmax threads": (lambda: fx.softmax(X, n_threads=0), ValueError, "n_threads", "0"),
    "log_softmax axis": (lambda: fx.log_softmax(X, -3), (ValueError, IndexError), "axis", "-3"),
    "log_softmax dtype": (lambda: fx.log_softmax(np.array(["a"])), TypeError, "x"),
    "logsumexp axis": (lambda: fx.logsumexp(X, 5), (ValueError, IndexError), "axis", "5"),
    "logsumexp dtype": (lambda: fx.logsumexp(X.astype(object)), TypeError, "a", "object"),
    "logsumexp b dtype": (lambda: fx.logsumexp(X, b=X.astype(complex)), TypeError, "b", "complex128"),
    "logsumexp b shape": (lambda: fx.logsumexp(X, b=an(3)), ValueError, "b", "(3,)", "(4, 5)"),
    "logsumexp threads": (lambda: fx.logsumexp(X, n_threads=0), ValueError, "n_threads", "0"),
    "nll target": (lambda: fx.nll_loss(X, [0, 1, 2, 5]), IndexError, "target[3] = 5 is outside [0, 5)", "1 of 4 rows"),
    "nll probabilities": (lambda: fx.nll_loss(X, X), TypeError, "target", "class indices"),
    "nll dtype": (lambda: fx.nll_loss(X.astype(complex), [0] * 4), TypeError, "log_probs", "complex128"),
    "nll axis": (lambda: fx.nll_loss(X, [0] * 4, axis=3), (ValueError, IndexError), "axis", "3"),
    "nll weight": (lambda: fx.nll_loss(X, [0] * 4, weight=[1.0]), ValueError, "weight", "(1,)", "(5,)"),
    "entropy axis": (lambda: fx.entropy(X, 2), (ValueError, IndexError), "axis", "2"),
    "entropy axis none": (lambda: fx.entropy(X, None), TypeError, "axis", "integer", "NoneType"),
    "entropy axes": (lambda: fx.entropy(X, (0, 1)), TypeError, "axis", "integer", "tuple"),
    "entropy of a number": (lambda: fx.entropy(0.5), ValueError, "p", "axis"),
    "nll axis none": (lambda: fx.nll_loss(X, [0] * 4, axis=None), TypeError, "axis", "integer", "NoneType"),
    "softmax axes in a list": (lambda: fx.softmax(X, [0]), TypeError, "axis", "tuple", "None", "list"),
    "logsumexp axes in a list": (lambda: fx.logsumexp(X, [0]), TypeError, "axis", "tuple", "None", "list"),
    "entropy dtype": (lambda: fx.entropy(X.astype(complex)), TypeError, "p", "complex128"),
    "kl shapes": (lambda: fx.kl_div(X, X[1:]), ValueError, "target", "(3, 5)", "(4, 5)"),
    "kl reduction": (lambda: fx.kl_div(X, X, reduction="max"), ValueError, "reduction", "max", "batchmean"),
    "kl dtype": (lambda: fx.kl_div(X, X.astype(complex)), TypeError, "target", "complex128"),
    "binary shapes": (lambda: fx.binary_cross_entropy_with_logits(X, X[0]), ValueError, "target", "(5,)", "(4, 5)"),
    "binary dtype": (lambda: fx.binary_cross_entropy_with_logits(X.astype(complex), X), TypeError, "logits", "complex128"),
    "binary target": (lambda: fx.binary_cross_entropy_with_logits(X, X.astype(complex)), TypeError, "target", "complex128"),
    "binary weight": (lambda: fx.binary_cross_entropy_with_logits(X, X, weight=an(4)), ValueError, "weight", "(4,)", "(4, 5)"),
    "binary larger weight": (
        lambda: fx.binary_cross_entropy_with_logits(X, X, weight=an(2, 4, 5)),
        ValueError,
        "weight",
        "(2, 4, 5)",
        "(4, 5)",
    ),
    "binary pos_weight": (
        lambda: fx.binary_cross_entropy_with_logits(X, X, pos_weight=an(2)),
        ValueError,
        "pos_weight",
        "(2,)",
        "(4, 5)",
    ),
    "binary reduction": (
        lambda: fx.binary_cross_entropy_with_logits(X, X, reduction="batchmean"),
        ValueError,
        "reduction",
        "batchmean",
        "mean",
    ),
    "binary threads": (lambda: fx.binary_cross_entropy_with_logits(X, X, n_threads=0), ValueError, "n_threads", "0"),
    "set no threads": (lambda: fx.set_num_threads(0), ValueError, "n", "0", "1"),
    "set half a thread": (lambda: fx.set_num_threads(0.5), TypeError, "n", "float"),
    "set threads": (lambda: fx.set_num_threads(np.array([1, 2])), TypeError, "n", "array([1, 2])"),
    "softmax out": (lambda: fx.softmax(X, out=X[1:]), ValueError, "out", "(3, 5)", "that of x, (4, 5)"),
    "buffers of half a byte": (lambda: fx.set_buffer_limit(0.5), TypeError, "nbytes", "float"),
    "buffers of nan": (lambda: fx.set_buffer_limit(np.nan), TypeError, "nbytes", "float"),
    "buffers of text": (lambda: fx.set_buffer_limit("1 GB"), TypeError, "nbytes", "str"),
    "fewer buffers than none": (lambda: fx.set_buffer_limit(-1), ValueError, "nbytes", "-1"),
    "warm up by nobody": (lambda: fx.warmup(n_jobs=0), ValueError, "n_jobs", "0", "1"),
    "warm up by half": (lambda: fx.warmup(n_jobs=0.5), TypeError, "n_jobs", "float"),
    "warm up nothing": (lambda: fx.warmup(dtypes=("float8",)), (ValueError, TypeError), "dtypes", "float8", "float32"),
}


@pytest.mark.core
@pytest.mark.parametrize(
    ("call", "error", "words"), [(c, e, w) for c, e, *w in WRONG_ELSEWHERE.values()], ids=list(WRONG_ELSEWHERE)
)
def test_wrong_arguments_elsewhere(call, error, words):
    with pytest.raises(error) as info:
        call()
    assert_says(info.value, words)


def test_arguments_after_target_are_by_name_only():
    for name in LOSSES:
        with pytest.raises(TypeError):
            getattr(fx, name)(X, [0, 1, 2, 3], -1)


def test_what_is_no_error():
    """The edges of what is allowed."""
    x, y = make_case(FLOAT32, (4, 5))[:2]
    want = fx.cross_entropy(x, y)
    for options in (dict(label_smoothing=0), dict(label_smoothing=np.float32(0)), dict(axis=np.int8(1)), dict(axis=1)):
        assert fx.cross_entropy(x, y, **options) == want
    for options in (dict(n_threads=np.int64(3)), dict(n_threads=10000), dict(ignore_index=np.int64(-5)), dict(weight=[1] * 5)):
        assert fx.cross_entropy(x, y, **options) == want
    assert fx.cross_entropy(x, list(y)) == fx.cross_entropy(x.tolist(), tuple(y)).astype(np.float32) == want
    assert np.isfinite(fx.cross_entropy(x, y, label_smoothing=1))
    assert fx.cross_entropy(x, x, ignore_index=-1).dtype == np.float32
    assert fx.cross_entropy([[1.0, 2.0]], [[0, 1.0]]) > 0
    assert fx.cross_entropy(np.zeros((0, 5)), [], reduction="sum") == 0
