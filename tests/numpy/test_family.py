"""Calls of ever new extents: machine code plans them as Python does, and gives the same bits; nothing is made anew for them."""

from __future__ import annotations

import itertools
import math
import random
from ctypes import c_double, c_int64
from itertools import chain
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent._abi import argument_block as abi
from fastxent._abi.dtypes import ITEMSIZE
from fastxent._abi.variant import Schedule
from fastxent._codegen import registry
from fastxent._fastpath.array_calls import DenseCall
from fastxent._fastpath.cache import calls
from fastxent._fastpath.front_end import strategy, words
from fastxent._fastpath.tasks import Family
from fastxent._runtime import arguments, fastpath, run
from fastxent._runtime.plan import MOST_DIRECT, WORTH_A_THREAD, Plan, make_plan, number_of

pytestmark = pytest.mark.skipif(not fastpath.ENABLED, reason="every call is planned")

EXTENTS = (1, 2, 3, 15, 16, 17, 33, 48, 49, 63, 64, 65, 112, 113, 256, 257, 320, 321, 1000, 5000, 40_000, 300_000)
MOST_CHUNKS = (2044, 513, 2)  # in float16: its units are of two rows


@pytest.fixture
def nothing_is_known():
    calls.clear()


def in_python() -> dict[str, Any]:
    """The functions of ``strategy``, as Python runs them."""

    def set_word(at: int, nth: int, value: float) -> None:
        kind = c_double if isinstance(value, float) else c_int64
        kind.from_address(at + 8 * nth).value = value

    names: dict[str, Any] = dict(vars(strategy))
    for name, function in vars(strategy).items():
        if hasattr(function, "py_func"):
            ours = function.py_func.__module__ == strategy.__name__
            names[name] = FunctionType(function.py_func.__code__, names, name) if ours else function.py_func
    names["word"] = lambda at, nth: c_int64.from_address(at + 8 * nth).value
    names["number"] = lambda at, nth: c_double.from_address(at + 8 * nth).value
    names |= {"set_word": set_word, "float64": float}
    return names


def c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def plan_of(shape: tuple[int, ...], axis: int, logits: str, soft: bool) -> Plan:
    strides = c_strides(shape, ITEMSIZE[logits])
    return make_plan("value", shape, (strides,) * 3, axis, logits, logits if soft else None, labelled=not soft)


def test_machine_code_plans_as_python_does(monkeypatch):
    """Over the borders between strategies, of few rows, split rows, several threads."""
    ready_for = in_python()["ready_for"]
    monkeypatch.setattr(registry, "kernel", lambda *_: SimpleNamespace(address=7))
    rng, n_met, kinds = random.Random(0), 0, set()
    for nth in range(20_000):
        shape = tuple(rng.choice(EXTENTS) for _ in range(rng.randrange(1, 5)))
        axis, logits, soft = rng.randrange(len(shape)), rng.choice(sorted(ITEMSIZE)), rng.random() < 0.3
        if nth == 0:
            shape, axis, logits = MOST_CHUNKS, 1, "f16"
        if math.prod(shape) * ITEMSIZE[logits] > MOST_DIRECT:
            continue
        plan = plan_of(shape, axis, logits, soft)
        first = plan_of((1,) * len(shape), axis, logits, soft)
        family = Family("value", first, axis, len(shape), smoothing=0.1, average=True)
        at, sizes = family.words.ctypes.data, np.array(shape)
        if number_of(plan.variant) != number_of(first.variant):
            assert ready_for(at, sizes.ctypes.data) == words.NOT_MET
        family.meet(plan)
        useful = ready_for(at, sizes.ctypes.data)
        block = family.words[words.TASK :]
        assert (nth == 0) == (plan.most_chunks > words.ROOM)
        assert plan.variant.schedule != Schedule.SPLIT or plan.n_units <= words.ROOM
        if nth == 0:
            assert useful == words.NOT_MET
            continue
        planned = tuple(block[abi.SLOT["n_rows"] :][: len(plan.planned)].tolist())
        assert planned == plan.planned, (shape, axis, logits)
        axes = list(chain.from_iterable(plan.axes))
        assert family.words[words.AXES :][: len(axes)].tolist() == axes, (shape, axis, logits)
        assert useful == min(plan.n_chunks, 1 + plan.elements // WORTH_A_THREAD)
        assert block.view(np.float64)[abi.SLOT["uniform"]] == 0.1 / shape[axis]
        n_met, kinds = n_met + 1, kinds | {number_of(plan.variant)}
    assert n_met > 5000 and len(kinds) > 6
    assert len(kinds) <= words.MOST_KERNELS


def arrays(shape: tuple[int, ...], axis: int = -1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    return rng.standard_normal(shape).astype(np.float32), rng.integers(0, shape[axis], rows)


SEQUENCES: list[tuple[int, list[tuple[int, ...]]]] = [
    (-1, [(n, 10) for n in (40, 1, 2, 15, 16, 17, 63, 64, 399, 5000)]),
    (-1, [(b, t, c) for b, t, c in itertools.product((1, 3), (1, 7, 40), (10, 7, 100))]),
    (1, [(b, c, t) for b, t, c in itertools.product((1, 3), (1, 7, 40), (10, 7))]),
    (-1, [(n, 33_000) for n in (1, 3, 30)]),
]


@pytest.mark.parametrize(("axis", "shapes"), SEQUENCES, ids=["rows", "sequences", "channels first", "split"])
def test_the_bits_do_not_depend_on_what_was_met_before(axis, shapes, nothing_is_known):
    options: dict[str, Any] = {"axis": axis, "label_smoothing": 0.1}
    cold = {}
    for shape in shapes:
        calls.clear()
        cold[shape] = fx.cross_entropy_value_and_grad(*arrays(shape, axis), **options)
    calls.clear()
    for shape in [*shapes, *reversed(shapes)]:
        for n_threads in (None, 1, 3):
            loss, g = fx.cross_entropy_value_and_grad(*arrays(shape, axis), n_threads=n_threads, **options)
            assert loss == cold[shape][0] and np.array_equal(g, cold[shape][1]), shape


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("n_threads", [None, 2])
def test_nothing_is_made_for_extents_that_are_new(with_out, n_threads, nothing_is_known, monkeypatch):
    def call(n: int, c: int) -> None:
        x, y = arrays((n, c))
        fx.cross_entropy(x, y, n_threads=n_threads)
        fx.cross_entropy_value_and_grad(x, y, out=x if with_out else None, n_threads=n_threads)

    for n in (1, 20, 3000):
        call(n, 10)
    for name in ("make_plan", "problem"):
        monkeypatch.setattr(arguments, name, None)
    monkeypatch.setattr(fx.functional, "problem", None)
    monkeypatch.setattr(run, "argument_block", None)
    before = calls.keys()
    for n, c in itertools.product((2, 5, 16, 200, 4000), (10, 11, 30)):
        call(n, c)
    assert calls.keys() == before
    assert sum(isinstance(calls.lookup(key), DenseCall) for key in before) == 2  # with gradient and without


def test_what_does_not_fit_is_refused_at_any_extents(nothing_is_known):
    for n in (20, 21):
        x, y = arrays((n, 10))
        fx.cross_entropy(x, y)
        fx.cross_entropy_value_and_grad(x, y)
    x, y = arrays((23, 10))
    with pytest.raises(ValueError, match=r"target has shape \(22,\)"):
        fx.cross_entropy(x, y[:22])
    with pytest.raises(ValueError, match=r"out has shape \(22, 10\)"):
        fx.cross_entropy_value_and_grad(x, y, out=np.empty((22, 10), np.float32))
    y[11] = 10
    out = np.full_like(x, 7)
    with pytest.raises(IndexError, match=r"target\[11\] = 10"):
        fx.cross_entropy_value_and_grad(x, y, out=out)
    assert (out == 7).all()
    assert math.isnan(fx.cross_entropy(np.empty((0, 10), np.float32), np.empty(0, np.int64)))
    with pytest.raises(IndexError):
        fx.cross_entropy(np.empty((2, 0), np.float32), np.zeros(2, np.int64))
