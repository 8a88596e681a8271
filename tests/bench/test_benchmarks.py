"""The benchmarks measure what they say: the table, the answers, the floor, the timing, the bars, the report."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastxent as fx
from benchmarks import bars, compare, linear, measure, providers, report, whole
from benchmarks.cases import CASES, GRAD, IGNORED, LARGE, LOSS, OPTIONS, SHORT, Case, Inputs, WrongResult, case_of, check
from benchmarks.floor import IN_PLACE, OUT, READ, Floor
from benchmarks.measure import Effort, ratio, run_group, spread
from benchmarks.providers import BY_NAME, PROVIDERS, Call, Provider
from fastxent._abi.argument_block import WORK
from fastxent._runtime.threads import available_cpus

TINY = Case((17, 60))  # 60 classes: enough for lanes to be classes
FEW = Effort(3, 3, 0.0)


def silent(text, share=0.0):
    pass


# The table -------------------------------------------------------------------------------------------


def test_every_case_has_its_own_key_and_a_reason():
    assert len({case.key for case in CASES}) == len(CASES) and len(SHORT) == 4
    assert all(case.reason and case.reason != Case.reason for case in CASES)


@pytest.mark.parametrize(
    ("case", "nbytes"),
    [
        (Case((4, 8)), 2 * 4 * 4 * 8 + 4 * 8),
        (Case((4, 8), mode=LOSS), 4 * 4 * 8 + 4 * 8),
        (Case((4, 8), dtype="float64"), 2 * 8 * 4 * 8 + 4 * 8),
        (Case((4, 8), dtype="bfloat16"), 2 * 2 * 4 * 8 + 4 * 8),
        (Case((4, 8), option="probabilities"), 3 * 4 * 4 * 8),
        (Case((10, 8), option="ignored"), (7 + 10) * 4 * 8 + 10 * 8),
        (Case((2, 5, 3), axis=1), 2 * 4 * 2 * 5 * 3 + 6 * 8),
    ],
    ids=lambda value: value.key if isinstance(value, Case) else str(value),
)
def test_bytes_moved(case, nbytes):
    assert case.bytes_moved == nbytes


def test_inputs_are_seeded_and_what_the_option_says():
    a, b = Inputs(TINY), Inputs(TINY)
    assert np.array_equal(a.logits, b.logits) and np.array_equal(a.target, b.target)
    assert a.logits.dtype == np.float32 and 2.5 < a.logits.std() < 3.5
    ignored = replace(TINY, option="ignored")
    assert (Inputs(ignored).target == IGNORED).sum() == ignored.n_ignored == 5
    probabilities = Inputs(replace(TINY, option="probabilities")).target
    assert np.allclose(probabilities.sum(-1), 1) and probabilities.min() >= 0


def test_case_of_the_command_line_knows_the_table():
    assert case_of((4096, 8192)) is LARGE[0]
    assert case_of((2, 5, 3)).axis == 1 and case_of((2, 5, 3)).rows == (2, 3)


# The answers -----------------------------------------------------------------------------------------

ANSWERED = [
    *(replace(TINY, option=option, mode=mode) for option in OPTIONS for mode in (LOSS, GRAD)),
    *(replace(TINY, dtype=dtype, mode=mode) for dtype in ("float16", "bfloat16", "float64") for mode in (LOSS, GRAD)),
    Case((33, 10)),
    Case((2, 6, 3, 5), axis=1),
]
QUICK_PROVIDERS = [p for p in PROVIDERS if p.kind != "floor" and p.name != "torch.compile"]


@pytest.mark.parametrize("provider", QUICK_PROVIDERS, ids=lambda p: p.name)
def test_provider_is_right(provider):
    reason = provider.missing(available_cpus())
    if reason is not None:
        pytest.skip(reason)
    with measure.threads(1):
        for case in filter(provider.answers, ANSWERED):
            made = measure.make_checked(provider, Inputs(case), 1)
            assert isinstance(made, Call), f"{case.key}: {made}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [TINY, replace(TINY, option="z-loss", mode=LOSS)], ids=lambda c: c.key)
def test_torch_compile_is_right(case):
    provider = BY_NAME["torch.compile"]
    reason = provider.missing(1)
    if reason is not None:
        pytest.skip(reason)
    assert isinstance(measure.make_checked(provider, Inputs(case), 1), Call)


def right(case=TINY):
    inputs = Inputs(case)
    loss, gradient = fx.reference.cross_entropy_value_and_grad(inputs.logits, inputs.target, **inputs.options)
    return inputs, float(loss), gradient


@pytest.mark.parametrize("error", ["loss", "no target", "scale", "nan", "last row", "shape", "none"])
def test_check_catches_what_is_wrong(error):
    inputs, loss, gradient = right()
    check(inputs, loss, gradient)
    if error == "no target":
        gradient[np.arange(17), inputs.target] += 1 / 17
    elif error == "nan":
        gradient[8, 59] = np.nan
    elif error == "last row":
        gradient[-1] = 0
    loss *= 1.001 if error == "loss" else 1
    gradient *= 17 / 16 if error == "scale" else 1
    gradient = {"shape": gradient[:-1], "none": None}.get(error, gradient)
    with pytest.raises(WrongResult, match="the loss is" if error == "loss" else "gradient"):
        check(inputs, loss, gradient)


def test_loss_of_blocks_is_the_loss_of_all():
    """More than one block along the first axis, weighted, with a smoothed target."""
    case = Case((1100, 1000), option="weights")
    inputs = Inputs(case)
    assert len(list(inputs._blocks())) > 1
    expected = fx.reference.cross_entropy(inputs.logits, inputs.target, **inputs.options)
    assert inputs.truth.loss == pytest.approx(float(expected), rel=1e-12)


def test_a_wrong_or_failing_provider_is_not_timed(monkeypatch):
    def wrong(case, inputs, n_threads):
        return Call(lambda: fx.cross_entropy_value_and_grad(inputs.logits, inputs.target, reduction="sum"), lambda r: r)

    def failing(case, inputs, n_threads):
        raise OSError("no such thing\nand more")

    extra = (
        Provider("wrong", "peer", wrong, lambda n: None),
        Provider("failing", "peer", failing, lambda n: None),
        Provider("absent", "peer", failing, providers._reason("no_such_module")),
    )
    monkeypatch.setattr(measure, "PROVIDERS", (BY_NAME["fastxent out="], *extra))
    with measure.threads(1):
        group = run_group(TINY, 1, FEW)
    assert [entry["name"] for entry in group["entries"]] == ["fastxent out="]
    assert group["missing"]["wrong"].startswith("WRONG: 17 x 60 float32 plain loss+gradient: the loss is")
    assert group["missing"]["failing"] == "failed: OSError: no such thing"
    assert group["missing"]["absent"] == "import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"


# The floor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [OUT, IN_PLACE])
@pytest.mark.parametrize("extents", [(3, 10), (130, 1000)], ids=str)
@pytest.mark.parametrize("option", ["plain", "probabilities", "ignored"])
def test_floor_writes_every_element(which, extents, option):
    case = Case(extents, option=option)
    floor = Floor(case, which, 2)
    floor.restore()
    floor.run()
    elements, unit = case.logit_bytes // 4, 1024 if case.logit_bytes > 2**18 else 64
    read = -(-(case.n_rows - case.n_ignored) * case.n_classes // unit) * unit
    once = np.float32(1.0001) + np.float32(option == "probabilities")
    assert np.all(floor.g[: min(read, elements)] == once)
    assert np.all(floor.g[read:elements] == 0)
    assert floor.g.size - elements < unit
    assert (floor.g is floor.x) == (which == IN_PLACE)
    assert floor.bytes_moved == case.bytes_moved - (0 if option == "probabilities" else 8 * case.n_rows)


def test_floor_reads_every_element():
    case = Case((130, 1000), mode=LOSS)
    floor = Floor(case, READ, 2)
    floor.run()
    assert floor.sums[WORK] == pytest.approx(1.0001 * floor.x.size, rel=1e-5)
    assert floor.bytes_moved == case.logit_bytes and floor.g is None


# The timing ------------------------------------------------------------------------------------------


def test_order_brings_everyone_to_every_place():
    names = ["a", "b", "c"]
    orders = [measure.in_order(names, k) for k in range(6)]
    for place in range(3):
        assert sorted(order[place] for order in orders) == ["a", "a", "b", "b", "c", "c"]
    assert len(set(map(tuple, orders))) == 6


def test_spread_is_median_and_quartiles():
    samples = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    assert spread(samples) == pytest.approx(np.quantile(samples, [0.5, 0.25, 0.75]))
    assert ratio([2.0, 6.0, 8.0], [1.0, 2.0, 8.0]) == pytest.approx((2.0, 1.5, 2.5))


def test_time_per_run_and_samples_pair_up():
    runs = []
    call = Call(lambda: runs.append(1), lambda r: r, lambda: runs.append(0))
    timed = measure.time_interleaved({"a": call, "b": call}, fx.get_num_threads(), FEW, silent)
    assert [len(samples) for _, samples in timed.values()] == [3, 3]
    assert all(number > 1 for number, _ in timed.values())
    assert all(0 < t < 1e-3 for _, samples in timed.values() for t in samples)
    assert runs[0] == 0  # prepared first
    fx.set_num_threads(None)


def test_a_provider_that_changes_the_threads_is_named_and_undone():
    before = torch.get_num_threads(), fx.get_num_threads()
    calls = {"meddler": Call(lambda: torch.set_num_threads(3), lambda r: r)}
    with pytest.raises(RuntimeError, match=r"after meddler the threads are .*'torch': 3"), measure.threads(2):
        measure.time_interleaved(calls, 2, FEW, silent)
    assert (torch.get_num_threads(), fx.get_num_threads()) == before


# The bars, on results that are made up ---------------------------------------------------------------


def made_up(times, missing=()):
    """A run of everything, in which each provider has one time for all cases."""
    groups = []
    for case in CASES:
        named = [(p.name, p.kind, case) for p in PROVIDERS if p.answers(case)]
        named += [(measure.beside_name(name, other), "ours", other) for name, other in bars.beside(case)]
        entries = [
            measure.entry(name, kind, [times(name)] * 3, nbytes=c.bytes_moved) for name, kind, c in named if name not in missing
        ]
        groups.append(measure.group(case.key, case.key, case.reason, entries, dict.fromkeys(missing, "not there")))
    for key, names in {
        bars.THREADS: ["1 thread", "4 threads"],
        bars.STEP: ["step without loss", *(f"step with {n}" for n in ("PyTorch eager", bars.TORCH, bars.TORCH_IN_PLACE))],
        bars.START: ["import fastxent", "first call"],
        bars.MEMORY: [bars.TORCH, bars.TORCH_IN_PLACE],
    }.items():
        groups.append(measure.group(key, key, "", [measure.entry(name, "ours", [times(name)] * 3) for name in names], {}))
    ours = [name + what for name in (linear.NUMPY, linear.TORCH) for what in ("", linear.LIMITED)]
    for mode in (GRAD, LOSS):
        names = [*ours, *linear.PEERS, linear.NUMPY_FLOOR, linear.TORCH_FLOOR]
        entries = [measure.entry(name, "ours", [times(name)] * 3) for name in names]
        groups.append(measure.group(linear.key_of(linear.SHAPE, "float32", mode), "linear layer", "", entries, {}))
    return groups


def test_every_bar_finds_what_it_needs():
    verdicts = bars.judge(made_up(lambda name: 1.0))
    assert [v.reason for v in verdicts if v.finding is None] == []
    assert len(verdicts) == len(bars.BARS) > 50


def test_bars_are_judged_by_ratios_of_pairs():
    times = {"PyTorch eager": 70e-3, "torch.compile": 65e-3, "scikit-learn": 90e-3, "floor out=": 8e-3, bars.TORCH: 10e-3}
    verdicts = bars.judge(made_up(lambda name: times.get(name, 10e-3)))
    by_what = {v.bar.what: v for v in verdicts if v.bar.row.startswith("large")}
    torch_bar, floor_bar = by_what["torch, 4096 x 8192"], by_what["NumPy out=, 4096 x 8192"]
    assert torch_bar.finding.spread.median == pytest.approx(6.5)
    assert (torch_bar.finding.against, torch_bar.must, torch_bar.aim) == ("torch.compile", True, False)
    assert floor_bar.finding.spread.median == pytest.approx(1.25)
    assert (floor_bar.must, floor_bar.aim) == (True, False)


def test_a_bar_against_a_missing_peer_is_not_reached():
    verdicts = bars.judge(made_up(lambda name: 1e-9 if "fastxent" in name else 1.0, missing=["torch.compile"]))
    open_bar = next(v for v in verdicts if v.bar.what == "torch, 4096 x 8192")
    assert open_bar.finding.absent == ("torch.compile",) and open_bar.must is None
    assert report.bar_cells(open_bar)[3:] == [">= 6", "open", ">= 9", "open"]
    lost = bars.judge(made_up(lambda name: 1.0, missing=["torch.compile"]))
    assert next(v for v in lost if v.bar.what == "torch, 4096 x 8192").must is False


def test_bytes_count_where_a_variant_is_held_against_the_plain_case():
    verdicts = bars.judge(made_up(lambda name: 1.0))
    a_byte = {v.bar.row: v.finding.spread.median for v in verdicts if v.bar.what.startswith("time a byte")}
    assert a_byte["smoothing"] == pytest.approx(1)
    assert a_byte["probabilities"] == pytest.approx(2 / 3, rel=1e-3)
    assert a_byte["ignored"] == pytest.approx(1 / 0.85, rel=1e-3)


def test_the_share_of_the_loss_in_a_step():
    times = {"step without loss": 60.0, "step with PyTorch eager": 100.0, f"step with {bars.TORCH}": 64.0}
    verdict = next(v for v in bars.judge(made_up(lambda name: times.get(name, 61.0))) if v.bar.what == "the loss's share")
    assert verdict.finding.spread.median == pytest.approx(0.4 / (4 / 64))
    assert verdict.finding.against == "from 40.0% to 6.2%"


# What is not one call --------------------------------------------------------------------------------


def test_threads_and_training_step():
    with measure.threads(2):
        group = whole.run_threads(2, FEW, silent, TINY)
        assert [entry["name"] for entry in group["entries"]] == ["1 thread", "2 threads"]
        group = whole.run_step(2, FEW, silent, batch=8, n_classes=16)
    assert len(group["entries"]) == 4 and group["missing"] == {}


@pytest.mark.thorough
def test_start_and_memory_in_processes_of_their_own():
    group = whole.run_start(silent, times=1)
    assert {entry["name"] for entry in group["entries"]} == {"import fastxent", "first call"}, group["missing"]
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("memory is measured through Linux's /proc")
    group = whole.run_memory(silent, Case((2048, 4096)), times=1)
    extra = {entry["name"]: entry["samples"][0] for entry in group["entries"]}
    assert 0.9 < extra[bars.TORCH] < 1.5 and extra[bars.TORCH_IN_PLACE] < 0.2, group["missing"]


# The command lines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The JSON of a tiny run, and its exit code."""
    file = tmp_path_factory.mktemp("results") / "results.json"
    code = compare.main(["--shape", "64,32", "--quick", "--threads", "1", "--json", str(file)])
    return file, code


def test_compare_writes_machine_versions_and_samples(results):
    document, code = json.loads(results[0].read_text()), results[1]
    assert code == 0
    assert [group["key"] for group in document["groups"]] == [Case((64, 32)).key, Case((64, 32), mode=LOSS).key]
    first = document["groups"][0]
    assert {"fastxent out=", "fastxent in place", "PyTorch eager", "floor out="} <= {e["name"] for e in first["entries"]}
    assert all(3 <= len(e["samples"]) <= 5 and min(e["samples"]) > 0 for e in first["entries"])
    assert first["missing"]["torch.compile"] == "left out by --quick"
    assert document["threads"] == 1 and document["config"]["versions"]["numpy"] == np.__version__
    assert document["config"]["cpu"]["model"]


def test_compare_prints_plain_tables(capsys):
    assert compare.main(["--shape", "40,50", "--quick", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "40 x 50, float32, plain, loss+gradient" in out and "GB/s" in out and "missing: torch.compile" in out
    assert "\x1b" not in out and "─" not in out and "…" not in out


def test_compare_all_measures_the_table_and_judges_it(monkeypatch, capsys, tmp_path):
    made = {group["key"]: group for group in made_up(lambda name: 1e-3)}
    monkeypatch.setattr(compare, "run_group", lambda case, *args, **options: made[case.key])
    for key, name in (
        (bars.THREADS, "run_threads"),
        (bars.STEP, "run_step"),
        (bars.START, "run_start"),
        (bars.MEMORY, "run_memory"),
    ):
        monkeypatch.setattr(whole, name, lambda *args, key=key: made[key])
    monkeypatch.setattr(linear, "run_group", lambda *args, progress: made[linear.key_of(*args[:3])])
    file = tmp_path / "all.json"
    assert compare.main(["--all", "--threads", "1", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert all(bar.what in out for bar in bars.BARS) and "MISS" in out and "not measured" not in out
    tables = "\n".join(report.tables(json.loads(file.read_text()), "all.json").values())
    assert "| 4096 x 8192 | 1.00 ms |" in tables and tables.count("| MISS |") > 10


@pytest.mark.parametrize(("reason", "code"), [("WRONG: 1 is not 2", 1), ("failed: OSError: x", 1), ("import jax: no", 0)])
def test_exit_code_tells_of_wrong_results(reason, code, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_group", lambda *args, **options: measure.group("k", "t", "r", [], {"peer": reason}))
    assert compare.main(["--shape", "4,5", "--threads", "1"]) == code
    assert reason in capsys.readouterr().out


def test_interrupted_it_keeps_what_it_measured(monkeypatch, tmp_path, capsys):
    def interrupted(case, *args, **options):
        if case.mode == LOSS:
            raise KeyboardInterrupt
        return measure.group(case.key, "t", "r", [measure.entry("fastxent out=", "ours", [1.0, 2.0])], {})

    monkeypatch.setattr(compare, "run_group", interrupted)
    file = tmp_path / "part.json"
    assert compare.main(["--shape", "4,5", "--json", str(file), "--threads", "1"]) == 130
    document = json.loads(file.read_text())
    assert document["interrupted"] and len(document["groups"]) == 1
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--shape", "5"], ["--shape", "5,0"], ["--threads", "0"], ["--all", "--shape", "4,5"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(arguments)
    assert stopped.value.code == 2 and "error: argument" in capsys.readouterr().err


def test_report_rewrites_the_readme_between_the_markers(results, tmp_path, capsys):
    file, _ = results
    begin, end = "<!-- bars:begin -->", "<!-- bars:end -->"
    readme, manual = tmp_path / "README.md", tmp_path / "manual.md"
    readme.write_text(f"# a\n\n{begin}\nold\n{end}\n\ntail\n")
    manual.write_text("<!-- times:begin -->\nold\n<!-- times:end -->\n<!-- speed:begin -->\nold\n<!-- speed:end -->\n")
    assert report.main([str(file), "--into", str(readme), str(manual)]) == 0
    once, both = readme.read_text(), manual.read_text()
    assert "old" not in once and once.startswith(f"# a\n\n{begin}\n") and once.endswith(f"{end}\n\ntail\n")
    assert "old" not in both and both.count("`results.json`") == 2
    assert report.main([str(file), "--into", str(readme), str(manual)]) == 0
    assert (readme.read_text(), manual.read_text()) == (once, both)
    assert report.main([str(file)]) == 0
    printed = capsys.readouterr().out
    blocks = report.tables(json.loads(file.read_text()), "results.json")
    assert list(blocks) == ["speed", "times", "linear", "bars"] and all(block in printed for block in blocks.values())
    assert blocks["bars"] in once and blocks["times"] in both and blocks["speed"] in both
    with pytest.raises(ValueError, match="NAME is one of speed, times, linear, bars"):
        report.rewrite(f"{end} {begin}", blocks)


def test_durations():
    texts = {0.0: "0.00 ns", 3.2e-9: "3.20 ns", 9.999e-6: "10.0 us", 999.6e-6: "1.00 ms", 0.1234: "123 ms", 12.0: "12.0 s"}
    assert {seconds: report.duration(seconds) for seconds in texts} == texts
