"""Targets that nobody should pass: an error or the result, never a stray access.

Whatever runs here would crash if it went wrong, so it runs in a process of its own.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastxent as fx
import fastxent.torch as fxt
from tests.helpers.cases import INTEGERS, REDUCTIONS
from tests.helpers.opponent import Same
from tests.helpers.processes import run_script

# (rows, classes) and what they are there for.
SHAPES = {
    (5, 3): "few classes, serial",
    (5, 70): "many classes, serial",
    (40_000, 3): "few classes, threads",
    (600, 300): "many classes, threads",
    (2, 40_000): "a row is shared out",
}
EXTREMES = [-(2**63), -(2**62), -(2**32), -(2**31), -128, -1, 2**7, 2**8, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1]
BEYOND_INT64 = [2**63, 2**63 + 1, 2**64 - 100, 2**64 - 1]


def run(function: str) -> int:
    code = f"from tests.robustness import test_target_values as t; t.{function}()"
    return int(run_script(code, PYTHONPATH=os.pathsep.join(sys.path), PYTHONFAULTHANDLER="1"))


def bad_values(classes: int, integer: Any) -> Iterator[int]:
    """Values of this integer type that are no class."""
    bounds = np.iinfo(integer)
    for value in {classes, classes + 1, bounds.min, bounds.max, *EXTREMES, *BEYOND_INT64}:
        if bounds.min <= value <= bounds.max and not 0 <= value < classes and value != -100:
            yield value


def fails(error: type[Exception], message: str, call: Callable[[], Any]) -> int:
    with pytest.raises(error, match=message):
        call()
    return 1


def arrays() -> None:
    count = 0
    for (rows, classes), integer in itertools.product(SHAPES, INTEGERS):
        x, out = np.zeros((rows, classes), np.float32), np.full((rows, classes), 7, np.float32)
        for value, place in itertools.product(bad_values(classes, integer), (0, rows - 1)):
            y = np.zeros(rows, integer)
            y[place] = value
            message = rf"^target\[{place}\] = {value} is outside \[0, {classes}\); 1 of {rows} rows is out of range$"
            for function, options in (
                (fx.cross_entropy, dict(label_smoothing=0.1)),
                (fx.cross_entropy_value_and_grad, dict(out=out)),
                (fx.cross_entropy_value_and_grad, dict(out=x, weight=np.ones(classes))),
            ):
                count += fails(IndexError, message, lambda f=function, x=x, y=y, o=options: f(x, y, **o))
        assert not x.any() and (out == 7).all()
    print(count)


def test_integers_of_every_type():
    assert run("arrays") > 1000


def tensors() -> None:
    count = 0
    types = [torch.from_numpy(np.zeros(0, integer)).dtype for integer in INTEGERS]
    for (rows, classes), (integer, dtype) in itertools.product(SHAPES, zip(INTEGERS, types, strict=True)):
        x = torch.zeros(rows, classes, requires_grad=True)
        for value, reduction in itertools.product(bad_values(classes, integer), REDUCTIONS):
            y = np.zeros(rows, integer)
            y[-1] = value
            y = torch.from_numpy(y)
            assert y.dtype == dtype
            message = rf"^Target {value} is out of bounds\.$"
            count += fails(IndexError, message, lambda x=x, y=y, r=reduction: fxt.cross_entropy(x, y, reduction=r))
    print(count)


def test_integer_tensors_of_every_type():
    assert run("tensors") > 500


ODD = {
    "booleans": np.array([True, False, True]),
    "nan": np.full(3, np.nan),
    "floats": np.array([0.0, 1.0, 2.0]),
    "halves": np.zeros(3, np.float16),
    "complex": np.zeros(3, np.complex64),
    "objects": np.array([0, 1, 2], object),
    "objects that are no numbers": np.array([None, "1", []], object),
    "strings": np.array(["0", "1", "2"]),
    "bytes": np.array([b"0", b"1", b"2"]),
    "dates": np.zeros(3, "M8[s]"),
    "durations": np.zeros(3, "m8[s]"),
    "records": np.zeros(3, [("y", np.int64)]),
    "nothing": np.zeros(3, "V8"),
    "a list of different lengths": [[0], [1, 2], []],
    "None": None,
}


@pytest.mark.parametrize("target", ODD.values(), ids=ODD)
def test_what_is_no_integer(target):
    x = np.zeros((3, 4), np.float32)
    for function in (fx.cross_entropy, fx.cross_entropy_value_and_grad, fx.cross_entropy_stats, fx.nll_loss):
        with pytest.raises((TypeError, ValueError), match=r"target|sequence"):
            function(x, target)
    if isinstance(target, np.ndarray) and target.dtype.kind in "bfc":
        tensor = torch.from_numpy(target)
        for f in (fxt.cross_entropy, F.cross_entropy):
            with pytest.raises(RuntimeError):
                f(torch.from_numpy(x), tensor)


# ----------------------------------------------------------------------------------------------------
# Memory that is not what it seems
# ----------------------------------------------------------------------------------------------------


def gradient_in_place(x: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
    logits = Same.apply(x.detach().requires_grad_())
    loss = fxt.cross_entropy(logits, y, inplace=True, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return gradient


@pytest.mark.parametrize("classes", [10, 4096])
def test_arrays_that_lie_in_the_logits_memory(classes):
    """The gradient overwrites what must still be read: class indices, which have been checked already, and weights."""
    x = np.zeros((64, classes))
    x[0] = 1 + np.arange(classes)
    views = dict(target=x[1:].reshape(-1)[:64].view(np.int64), weight=x[0], sample_weight=x.reshape(-1)[:64])
    assert all(np.may_share_memory(x, view) for view in views.values())  # 0.0 is class 0
    loss, expected = fx.cross_entropy_value_and_grad(x, **{k: v.copy() for k, v in views.items()})
    in_place = fx.cross_entropy_value_and_grad(x, **views, out=x)
    assert in_place[0] == loss and np.array_equal(in_place[1], expected) and in_place[1] is x


def shared_memory() -> None:
    count = 0
    for classes, reduction in itertools.product((10, 4096), REDUCTIONS):
        ramp = 1 + torch.arange(classes, dtype=torch.float64)

        def logits(ramp: torch.Tensor = ramp) -> torch.Tensor:
            return torch.vstack([ramp, ramp.new_zeros(63, len(ramp))])

        def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
            rest = x[1:].view(-1)
            return dict(y=rest[:64].view(torch.int64), weight=x[0], sample_weight=x.view(-1)[:64])

        for names in (["y"], ["y", "weight"], ["y", "sample_weight"]):
            x = logits()
            expected = gradient_in_place(x, **{k: views(x)[k].clone() for k in names}, reduction=reduction)
            x = logits()
            got = gradient_in_place(x, **{k: views(x)[k] for k in names}, reduction=reduction)
            assert torch.equal(got, expected), (classes, reduction, names)
            count += 1
    print(count)


def test_tensors_that_lie_in_the_logits_memory():
    assert run("shared_memory") == 18


def freed_memory() -> None:
    """FSDP frees storages in this way."""
    count = 0
    for which, (rows, classes) in itertools.product(("x", "y", "w", "u"), [(64, 10), (64, 100)]):
        for when, reduction in (("before", "mean"), ("before", "none"), ("between", "none")):
            t = dict(
                x=torch.zeros(rows, classes, requires_grad=True), y=torch.zeros(rows, dtype=torch.long),
                w=torch.ones(classes), u=torch.ones(rows),
            )  # fmt: skip

            def forward(t: dict[str, torch.Tensor] = t, reduction: str = reduction) -> torch.Tensor:
                return fxt.cross_entropy(t["x"], t["y"], t["w"], sample_weight=t["u"], reduction=reduction)

            loss = forward() if when == "between" else None
            t[which].untyped_storage().resize_(0)
            count += fails(RuntimeError, "not allocated", forward if loss is None else loss.sum().backward)
    for gone, reduction in itertools.product((0, 1, 2), ("mean", "none")):
        few = torch.zeros(64, dtype=torch.int32), torch.rand(64, 10), torch.rand(64, 10)
        weight = torch.rand(10)
        (weight if gone == 2 else few[gone]).untyped_storage().resize_(0)
        lost = partial(fxt.cross_entropy, torch.zeros(64, 10), few[gone], weight if gone == 2 else None, reduction=reduction)
        count += fails(RuntimeError, "not allocated", lost)
    print(count)


def test_tensors_whose_memory_is_gone():
    assert run("freed_memory") == 30


def test_negated_views():
    """They carry the sign in a flag, not in memory."""
    x = torch._neg_view(torch.tensor([[1.0, 2, 3], [0, 1, 0]], dtype=torch.float64))
    u, w = torch._neg_view(torch.tensor([-1.0, -3], dtype=torch.float64)), torch._neg_view(-torch.arange(1.0, 4).double())
    y = torch._neg_view(torch.tensor([0, -1]))
    plain = [t.resolve_neg() for t in (x, y, w, u)]
    options = [dict(), dict(weight=2), dict(sample_weight=3)]
    for option in options:
        views = {k: (x, y, w, u)[i] for k, i in option.items()}
        copies = {k: plain[i] for k, i in option.items()}
        expected = gradient_in_place(plain[0].clone(), plain[1], **copies)
        assert torch.equal(fxt.cross_entropy(x, y, **views), fxt.cross_entropy(plain[0], plain[1], **copies))
        assert torch.equal(gradient_in_place(x.clone(), y, **views), expected)
        again = torch._neg_view(x.resolve_neg().neg())
        assert torch.equal(gradient_in_place(again, y, **views), expected)


def changed_between() -> None:
    """PyTorch's own backward of reduction="none" writes wherever the changed class index says."""
    count = 0
    for (rows, classes), value in itertools.product(SHAPES, (-1, 10**9, -(2**63), 2**63 - 1)):
        x, y = torch.zeros(rows, classes, requires_grad=True), torch.zeros(rows, dtype=torch.long)
        loss = fxt.cross_entropy(x, y, reduction="none")
        y.data[-1] = value  # behind autograd's back
        count += fails(IndexError, f"Target {value} is out of bounds", loss.sum().backward)
        y.zero_()
        loss = fxt.cross_entropy(x.half(), y)
        y.data[-1] = value
        count += fails(IndexError, f"Target {value} is out of bounds", lambda loss=loss: (loss * 1024).backward())
    print(count)


def test_a_target_that_has_changed_before_the_backward():
    assert run("changed_between") == 40
