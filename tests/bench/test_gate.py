"""The gate fails where ours has become slow against PyTorch in the same run, and nowhere else."""

from __future__ import annotations

import json

import pytest

from benchmarks import gate, test_speed
from benchmarks.gate import HEADLINE, LIMITS, NARROW, OUT, TORCH
from benchmarks.report import EAGER


@pytest.fixture
def written(tmp_path):
    """Writes what pytest-benchmark would: ours takes ``share`` of the limit, but for the exceptions."""

    def write(name: str, share: float = 0.5, machine: float = 1.0, exceptions=(), without=()) -> str:
        shares = dict(exceptions)
        times = {(case.key, EAGER): machine for case in LIMITS}
        for case, limits in LIMITS.items():
            for provider, limit in limits.items():
                times[case.key, provider] = machine * limit * shares.get((case, provider), share)
        benchmarks = [
            {"extra_info": {"case": case, "provider": provider}, "stats": {"min": t, "median": 100 * t}}
            for (case, provider), t in times.items()
            if (case, provider) not in without
        ]
        file = tmp_path / name
        file.write_text(json.dumps({"benchmarks": benchmarks}))
        return str(file)

    return write


def test_below_the_limits_on_any_machine(written, capsys):
    for machine in (1e-6, 1e3):
        assert gate.main([written("now.json", machine=machine)]) == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == 12 and f"{TORCH}, 4096 x 8192: 0.25 x PyTorch eager, limit 0.5" in out


def test_one_above_its_limit_fails(written, capsys):
    assert gate.main([written("now.json", exceptions={(NARROW, OUT): 1.01})]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("SLOW")] == [
        "SLOW fastxent out=, 65536 x 10: 0.81 x PyTorch eager, limit 0.8"
    ]


def test_growth_since_the_base_fails_within_the_limits(written, capsys):
    base = written("base.json", machine=3.0)
    assert gate.main([written("now.json", share=0.6), "--base", base]) == 0
    now = written("now.json", exceptions={(HEADLINE, TORCH): 0.705})
    assert gate.main([now]) == 0
    capsys.readouterr()
    assert gate.main([now, "--base", base]) == 1
    slow = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SLOW")]
    assert slow == ["SLOW fastxent torch, 4096 x 8192: 0.35 x PyTorch eager, limit 0.5; 1.41 x what it was, limit 1.3"]
    assert gate.main([now, "--base", base, "--factor", "1.5"]) == 0
    assert gate.main([now, written("again.json"), "--base", base]) == 0  # the shortest time counts


@pytest.mark.parametrize("without", [(HEADLINE.key, EAGER), (NARROW.key, OUT)])
def test_what_was_not_measured_is_not_passed(without, written, capsys):
    assert gate.main([written("now.json", without=[without])]) == 2
    assert without[0] in capsys.readouterr().err


def test_pytest_marks_what_the_gate_needs():
    marked = {(p.values[0], p.values[1].name) for p in test_speed.params() if any(m.name == "gate" for m in p.marks)}
    assert marked == {(case, name) for case, limits in LIMITS.items() for name in (EAGER, *limits)}
