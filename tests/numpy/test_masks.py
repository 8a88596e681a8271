"""What ``np.asarray`` would lose is refused: masks, and what is no array of numbers; and zeros have no sign."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse

import fastxent as fx
from tests.helpers.cases import FLOAT32, FLOAT64

X, P, Y = np.zeros((4, 5), np.float32), np.full((4, 5), 0.2, np.float32), np.arange(4)
LOSS = dict(logits=X, target=Y, weight=np.ones(5), sample_weight=np.ones(4))
LINEAR = dict(
    input=X, linear_weight=P, target=np.arange(4), linear_bias=np.ones(4), weight=np.ones(4), sample_weight=np.ones(4)
)
BINARY = dict(logits=X, target=P, weight=P, pos_weight=P)
CALLS: dict[str, dict[str, Any]] = {
    "cross_entropy": LOSS,
    "cross_entropy_value_and_grad": LOSS | dict(out=X),
    "cross_entropy_stats": LOSS,
    "cross_entropy_grad_hess": LOSS,
    "focal_loss": LOSS,
    "focal_loss_value_and_grad": LOSS,
    "linear_cross_entropy": LINEAR,
    "linear_cross_entropy_value_and_grad": LINEAR,
    "linear_cross_entropy_stats": LINEAR,
    "linear_log_prob_and_entropy": {k: v for k, v in LINEAR.items() if k not in ("weight", "sample_weight")},
    "nll_loss": dict(log_probs=X, target=Y, weight=np.ones(5)),
    "softmax": dict(x=X, out=X),
    "log_softmax": dict(x=X, out=X),
    "logsumexp": dict(a=X, b=P),
    "entropy": dict(p=P),
    "kl_div": dict(input=X, target=P),
    "binary_cross_entropy_with_logits": BINARY,
    "binary_cross_entropy_with_logits_value_and_grad": BINARY | dict(out=X),
}
ARGUMENTS = [(name, argument) for name, arguments in CALLS.items() for argument in arguments]


class Disguised:
    """What gives a masked array only when it is asked for an array."""

    def __init__(self, a: np.ndarray) -> None:
        self.a = np.ma.masked_array(a)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.a


MASKED: dict[str, Callable[[np.ndarray], Any]] = {
    "something masked": lambda a: np.ma.masked_array(a, mask=np.arange(a.size).reshape(a.shape) == 1),
    "nothing masked": np.ma.masked_array,
    "in a list": lambda a: [np.ma.masked_array(row) for row in a],
    "deep in a list": lambda a: [(row, [np.ma.masked]) for row in a],
    "in a deque": lambda a: deque(np.ma.masked_array(row) for row in a),
    "disguised": Disguised,
    "disguised, in a list": lambda a: [Disguised(row) for row in a],
}
OTHERS: dict[str, Callable[[np.ndarray], Any]] = {
    "matrix": np.matrix,
    "sparse": lambda a: scipy.sparse.csr_matrix(np.atleast_2d(a)),
    "objects": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 1, None, a),
}


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_masks_are_never_dropped(name, argument, kind):
    with pytest.raises(TypeError, match=argument) as info:
        getattr(fx, name)(**CALLS[name] | {argument: MASKED[kind](CALLS[name][argument])})
    if argument != "out" or "masked" in kind:
        assert f"{argument}.filled(" in str(info.value) and "ignore_index" in str(info.value)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_what_is_no_plain_array_is_refused_by_name(name, argument, kind):
    with pytest.raises(TypeError, match=argument):
        getattr(fx, name)(**CALLS[name] | {argument: OTHERS[kind](CALLS[name][argument])})


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, a in ARGUMENTS if a != "out"])
def test_nor_by_the_reference(name, argument):
    arguments = {k: v for k, v in CALLS[name].items() if k != "out"}
    with pytest.raises(TypeError, match=argument):
        getattr(fx.reference, name)(**arguments | {argument: np.ma.masked_array(arguments[argument])})


@pytest.mark.parametrize("name", ["axis", "ignore_index"])
def test_nor_those_of_numbers(name):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got MaskedArray"):
        fx.cross_entropy(X, Y, **{name: np.ma.masked_array(1, mask=True)})


def test_a_known_call_is_not_known_with_a_mask():
    fx.cross_entropy(X, Y)
    with pytest.raises(TypeError, match="target"):
        fx.cross_entropy(X, np.ma.masked_array(Y, mask=Y == 1))


def no_sign(value: Any) -> bool:
    return bool((np.asarray(value) == 0).all() and not np.signbit(value).any())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("module", [fx, fx.reference], ids=["fast", "reference"])
def test_a_loss_of_0_has_no_sign(module, dtype, reduction):
    far = np.array([[0, -np.inf], [-np.inf, 0]], dtype)
    options = dict(reduction=reduction)
    assert no_sign(module.cross_entropy(far, [0, 1], **options))
    assert no_sign(module.nll_loss(far, [0, 1], **options))
    assert no_sign(module.kl_div(np.zeros(3, dtype), np.array([1, 0, 1], dtype), **options))
    assert no_sign(module.kl_div(np.zeros(3, dtype), np.zeros(3, dtype), log_target=True, **options))
    assert no_sign(module.binary_cross_entropy_with_logits(np.array([900, -900], dtype), np.array([1, 0], dtype), **options))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("module", [fx, fx.reference], ids=["fast", "reference"])
def test_an_entropy_of_0_has_no_sign(module, dtype):
    for p in (np.eye(3), np.zeros((2, 3)), np.ones((2, 1)), np.eye(100)):
        assert no_sign(module.entropy(p.astype(dtype)))
    assert no_sign(module.cross_entropy_stats(np.array([[0, -np.inf]], dtype), [0]).entropy)
    assert no_sign(module.entropy(np.array([1.0, 0.0], dtype)))
