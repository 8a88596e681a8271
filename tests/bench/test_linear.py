"""The benchmark of a linear layer: both sides give the reference's results, what is wrong is not timed, and it prints."""

from __future__ import annotations

import numpy as np
import pytest

import fastxent as fx
from benchmarks import linear, report
from benchmarks.cases import GRAD, LOSS
from benchmarks.measure import Effort
from tests.helpers.truth import widest

TINY = (40, 12, 400)
FEW = Effort(3, 3, 0.0)
SLOW = (linear.COMPILED, linear.CHUNKED)


@pytest.mark.parametrize("mode", [LOSS, GRAD])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contestants_are_right(dtype, mode):
    problem = linear.problem(TINY, dtype, mode)
    contestants, missing = linear.checked(problem, list(linear.SIDES), SLOW, lambda *_: None)
    assert set(missing) == set(SLOW)
    loss, gradients = fx.reference.linear_cross_entropy_value_and_grad(*(widest(a) for a in problem[:3]))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for name in (linear.NUMPY, linear.TORCH, linear.TORCH + linear.LIMITED, linear.EAGER):
        results = [linear._numbers(a) for a in contestants[name].run()]
        assert len(results) == (3 if mode == GRAD else 1)
        for a, b in zip(results, (loss, gradients.input, gradients.linear_weight), strict=False):
            np.testing.assert_allclose(a, b, tolerance, tolerance * np.abs(b).max(), err_msg=name)


def test_what_is_wrong_or_missing_is_not_timed(monkeypatch):
    right = linear.by_torch

    def wrong(problem):
        found = right(problem)
        loss, dx, dw = found[linear.EAGER].run()
        found[linear.EAGER] = linear.Contestant("peer", lambda: (loss, dx, 2 * dw))
        found[linear.UNCHUNKED] = linear.Contestant("peer", lambda: 1 / 0)
        return found

    monkeypatch.setitem(linear.SIDES, "torch", wrong)
    monkeypatch.setitem(linear.SIDES, "numpy", lambda problem: 1 / 0)
    contestants, missing = linear.checked(linear.problem(TINY, "float32", GRAD), list(linear.SIDES), SLOW, lambda *_: None)
    assert missing[linear.EAGER].startswith("WRONG: the gradient of the weight differs from ours by 1.0")
    assert missing[linear.UNCHUNKED] == "failed: ZeroDivisionError: division by zero"
    assert missing["numpy"] == "ZeroDivisionError: division by zero"
    assert not {linear.EAGER, linear.UNCHUNKED, linear.NUMPY} & set(contestants)


def test_the_command_prints_both_sides_and_the_report_makes_a_table(capsys, monkeypatch):
    monkeypatch.setattr(linear, "EFFORT", FEW)
    sides = ["--side", "numpy", "torch", "--shapes", ",".join(map(str, TINY)), "--threads", "1"]
    assert linear.main([*sides, "--leave-out", *SLOW]) == 0
    out = capsys.readouterr().out
    assert f"{TINY[0]} x 12 x 400, float32, {GRAD}, 1 threads, 3 rounds" in out and f"missing: {SLOW[0]}: left out" in out
    assert all(name in out for name in (linear.NUMPY + linear.LIMITED, linear.TORCH + linear.WHOLE, linear.NUMPY_FLOOR))

    monkeypatch.setattr(linear, "SHAPE", TINY)
    groups = [linear.run_group(TINY, "float32", mode, 1, leave_out=SLOW, effort=FEW) for mode in (GRAD, LOSS)]
    table = report._linear_times({group["key"]: group for group in groups})
    assert table[0] == f"| 40 x 12 x 400 | {GRAD} | {LOSS} |"
    ours = next(line for line in table if line.startswith(f"| {linear.NUMPY} |"))
    assert ours.count(" x)") == 2
    assert sum("products" in line for line in table) == 2
    (cells,) = report._front_of_linear({group["key"]: group for group in groups})
    assert cells[0] == "40 x 12 x 400, linear layer" and cells[3].endswith(f"({linear.UNCHUNKED})")
    assert [cell != "-" for cell in cells] == [True, True, False, True, True, True, True]  # torch.compile was left out
    assert report._front_of_linear({}) == []
