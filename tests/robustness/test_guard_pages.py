"""Memory bounds: no kernel touches a byte outside its arrays.

Every array that a call reads or writes, also those that fastxent makes itself, lies right against a page that nobody may touch:
a stray access of one byte ends the process. What else is on its pages is red, that is nan: what is read astray changes the
result, what is written astray is seen. The calls run in a process of their own, which would die of a fault.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

import fastxent as fx
import fastxent.torch as fxt
from tests.helpers.cases import DTYPES, EVERYDAY_DTYPES, FLOAT32, REDUCTIONS, Case, make_case
from tests.helpers.guarded import Rooms
from tests.helpers.opponent import Same
from tests.helpers.processes import run_script
from tests.helpers.torch_cases import make_case as make_torch_case

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no mprotect on this platform")

BY_NAME = {dtype.name: dtype for dtype in DTYPES}
NAN = float("nan")

# (rows, classes). Few classes: one side and the other of every tile and vector; many: of vectors, blocks and segments.
SHORT = [(17, c) for c in (1, 2, 3, 10, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 100)] + [
    (1, 5), (16, 5), (2, 2047), (2, 2049), (1, 32768), (2, 32769), (2, 34815),
    (112, 3), (113, 50), (250, 17),  # panels of 7, 8 and 16 units, in Fortran order
]  # fmt: skip
FULL = [
    *itertools.product((1, 16, 17, 35), range(1, 101)),
    *itertools.product((1, 3), [k * 16 + d for k in (7, 8, 16, 127, 128, 129, 256, 384) for d in (-1, 0, 1, 15)]),
    *itertools.product((1, 2), [k * 16384 + d for k in (2, 3) for d in (-1, 0, 1, 17)]),
]

OPTIONS = ["index", "weight ignore sample_weight", "smoothing weight", "probabilities", "probabilities weight smoothing"]


def in_memory_order(a: np.ndarray, *axes: int) -> tuple[int, ...]:
    """Strides of a tight array whose axes lie in this order, outermost first."""
    strides, step = [0] * a.ndim, a.itemsize
    for axis in reversed(axes):
        strides[axis] = step
        step *= a.shape[axis]
    return tuple(strides)


def gapped(a: np.ndarray) -> tuple[int, ...]:
    """Every second element of every second row."""
    rows, columns = in_memory_order(a, 0, 1)
    return 4 * rows, 2 * columns


# (N, C) array -> strides.
LAYOUTS: dict[str, Callable[[np.ndarray], tuple[int, ...]]] = {
    "C": lambda a: in_memory_order(a, 0, 1),
    "F": lambda a: in_memory_order(a, 1, 0),
    "gapped": gapped,
    "reversed": lambda a: tuple(-s for s in in_memory_order(a, 0, 1)),
}


def functions(case: Case) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Names and calls ``f(rooms, logits, target, options)``; the results are arrays."""
    yield "value", lambda rooms, x, y, o: [fx.cross_entropy(x, y, reduction="none", **o)]
    yield "value and grad", lambda rooms, x, y, o: fx.cross_entropy_value_and_grad(x, y, **o)
    yield "into out", lambda rooms, x, y, o: fx.cross_entropy_value_and_grad(x, y, out=rooms.copy(x), reduction="none", **o)
    yield "in place", lambda rooms, x, y, o: fx.cross_entropy_value_and_grad(x, y, out=x, **o)
    yield "stats", lambda rooms, x, y, o: fx.cross_entropy_stats(x, y, **o)
    yield "grad and hess", lambda rooms, x, y, o: fx.cross_entropy_grad_hess(x, y, **o)
    if not case.options and case.target.ndim == 1:
        yield "softmax", lambda rooms, x, y, o: [fx.softmax(x, axis=-1)]
        yield "log_softmax in place", lambda rooms, x, y, o: [fx.log_softmax(x, axis=-1, out=x)]
        yield "logsumexp", lambda rooms, x, y, o: [fx.logsumexp(x, axis=-1)]


def cases(dtype: np.dtype, shapes: list[tuple[int, int]], options: list[str]) -> Iterator[tuple[str, Case]]:
    for shape, option in itertools.product(shapes, options):
        case = make_case(dtype, shape, option)
        if "ignore" in option:
            case.logits[case.target == -100] = NAN  # a row that is skipped is not read either
        # In the types that the kernels take, so that these very arrays are read.
        wide = {k: v.astype(np.float64) if isinstance(v, np.ndarray) else v for k, v in case.options.items()}
        target = case.target if case.target.ndim == 1 else case.target.astype(dtype)
        yield f"{dtype} {shape} {option}", Case(case.logits, target, wide)


def call(case: Case, layout: str, function: Callable[..., Any], rooms: Rooms) -> list[bytes]:
    strides = LAYOUTS[layout]
    x = rooms.copy(case.logits, strides(case.logits))
    y = rooms.copy(case.target, strides(case.target) if case.target.ndim == 2 else None)
    options = {k: rooms.copy(v) if isinstance(v, np.ndarray) else v for k, v in case.options.items()}
    with rooms.everywhere(), np.errstate(all="ignore"):
        return [np.asarray(a).tobytes() for a in function(rooms, x, y, options)]


def calls(name: str, full: bool) -> None:
    """What the process of a test runs."""
    dtype = BY_NAME[name]
    shapes = FULL if full else SHORT
    count = 0
    for label, case in cases(dtype, shapes, OPTIONS if full or dtype == FLOAT32 else OPTIONS[:2]):
        layouts = list(LAYOUTS) if case.logits.size < 200_000 else ["C"]
        for layout, (what, function) in itertools.product(layouts, functions(case)):
            print(label, layout, what, file=sys.stderr)  # the last line tells which call it was
            results = []
            for at_end in (True, False):
                rooms = Rooms(at_end)
                results.append(call(case, layout, function, rooms))
                rooms.check(f"{label} {layout} {what} {at_end}")
                count += 1
            assert results[0] == results[1], f"{label} {layout} {what}: what lies around an array has changed the result"
    print(count)


def torch_calls() -> None:
    """Tensors over guarded arrays: (N, C) and (N, C, d), forward and backward."""
    count = 0
    for shape, option, reduction in itertools.product(
        [(17, 10), (16, 48), (17, 65), (2, 2049), (5, 7, 3), (3, 70, 5)],
        ["index", "weight ignore", "probabilities"],
        REDUCTIONS,
    ):
        case = make_torch_case(torch.float32, shape, option)
        numbers = []
        for at_end, inplace in itertools.product((True, False), (False, True)):
            label = f"{shape} {option} {reduction} {at_end} {inplace}"
            print(label, file=sys.stderr)
            rooms = Rooms(at_end)
            x, y = (torch.from_numpy(rooms.copy(t.numpy())) for t in case[:2])
            options = {k: torch.from_numpy(rooms.copy(v.numpy())) for k, v in case.options.items()}
            with patch.object(
                fxt._bridge, "gradient_like", lambda t, rooms=rooms: torch.from_numpy(rooms.copy(t.detach().numpy()))
            ):
                logits = Same.apply(x.requires_grad_())
                loss = fxt.cross_entropy(logits, y, reduction=reduction, inplace=inplace, **options)
                (gradient,) = torch.autograd.grad(loss.sum(), logits)
            numbers.append(gradient.numpy().tobytes() + loss.detach().numpy().tobytes())
            rooms.check(label)
            count += 1
        assert len(set(numbers)) == 1, label
    print(count)


def run(function: str, *arguments: object) -> int:
    code = f"from tests.robustness import test_guard_pages as t; t.{function}(*{arguments!r})"
    return int(run_script(code, PYTHONPATH=os.pathsep.join(sys.path), PYTHONFAULTHANDLER="1", timeout=3000))


@pytest.mark.parametrize("dtype", EVERYDAY_DTYPES, ids=str)
def test_no_stray_access(dtype):
    assert run("calls", str(dtype), False) > 500


def test_no_stray_access_from_tensors():
    assert run("torch_calls") > 200


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BY_NAME)
def test_no_stray_access_in_full(dtype):
    assert run("calls", dtype, True) > 10_000
