"""``fastxent bench``: what it takes, shows, draws and keeps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace

import matplotlib.image
import numpy as np
import pytest

from benchmarks import compare, measure, plot, screen
from benchmarks.cases import GRAD, LOSS, SWEEP, Case
from benchmarks.measure import Effort, entry, group
from benchmarks.providers import PROVIDERS, Call
from fastxent import cli
from tests.helpers.processes import ROOT

TINY = ["--shape", "40,50", "--quick", "--threads", "1"]


def bench(*args: object) -> int:
    return cli.main(["bench", *map(str, args)])


def made_up(case: Case, times: dict[str, float]) -> dict:
    """The group of a case in which each provider took the same time in three rounds."""
    kinds = {provider.name: provider.kind for provider in PROVIDERS}
    floors = {name: "" if kinds[name] == "floor" else "floor out=" for name in times}
    entries = [entry(name, kinds[name], [t] * 3, nbytes=case.bytes_moved, floor=floors[name]) for name, t in times.items()]
    return group(case.key, f"{case.shape}, {case.dtype}, {case.option}, {case.mode}", case.reason, entries, {}) | {
        "case": asdict(case)
    }


def test_only_the_providers_asked_for_beside_the_floors(tmp_path, capsys):
    file = tmp_path / "results.json"
    assert bench(*TINY, "--provider", "fastxent-out", "pytorch-eager", "--dtype", "float64", "--json", file) == 0
    document = json.loads(file.read_text())
    of_gradient, of_loss = document["groups"]
    assert {e["name"] for e in of_gradient["entries"]} == {"fastxent out=", "PyTorch eager", "floor out=", "floor in place"}
    assert {e["name"] for e in of_loss["entries"]} == {"PyTorch eager", "floor read"}
    assert of_gradient["case"]["dtype"] == "float64" and of_gradient["case"]["extents"] == [40, 50]
    assert document["arguments"]["provider"] == ["fastxent-out", "pytorch-eager"]
    assert "40 x 50, float64, plain, loss+gradient" in capsys.readouterr().out


def test_slugs_are_words_and_differ():
    slugs = [provider.slug for provider in PROVIDERS]
    assert len(set(slugs)) == len(slugs) and all(slug.replace("-", "").isalpha() for slug in slugs)


def test_cells_of_the_table():
    times = {"fastxent torch": 2e-3, "PyTorch eager": 8e-3, "torch.compile": 5e-3, "floor out=": 1e-3}
    case = Case((1000, 250))
    made = made_up(case, times)
    cells = dict(zip(screen.COLUMNS, screen.group_rows(made)[0], strict=True))
    assert cells["time"] == "2.00 ms" and cells["of roofline"] == "50.0 (50.0-50.0) %"
    assert cells["vs eager"] == "4.00 (4.00-4.00)" and cells["vs compile"] == "2.50 (2.50-2.50)"
    assert cells["GB/s"] == f"{(2 * 4 * 250_000 + 8 * 1000) / 2e-3 / 1e9:.2f}"
    of_loss = made_up(replace(case, mode=LOSS), times)
    assert screen.summary([made, of_loss]) == [
        ["1000 x 250, float32, plain", "8.00 ms", "5.00 ms", "2.00 ms", *(cells[c] for c in screen.COLUMNS[-3:])]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "pytorch"], "--provider: pytorch is none of fastxent-loss, "),
        (["--all", "--dtype", "float16"], "--dtype: --all has dtypes of its own"),
        (["--plot", "plot.txt"], "--plot: plot.txt does not end in .png, .svg, .pdf"),
        (["--plot", "no/such/folder.png"], "--plot: there is no folder no/such"),
        (["--json", "no/such/folder.json"], "no/such/folder.json: No such file or directory"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line_before_anything_is_timed(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(compare, "run_group", lambda *args, **options: pytest.fail("timed"))
    assert bench(*(() if "--all" in arguments else TINY), *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fastxent bench: error: {message}") and err.count("\n") == 1


def test_the_module_of_the_benchmarks_is_the_same_command(capsys):
    errors = []
    for run in (bench, lambda *arguments: compare.main(arguments)):
        assert run(*TINY, "--provider", "nobody") == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1]


def test_an_installed_package_says_where_the_benchmarks_are(tmp_path):
    shutil.copytree(ROOT / "fastxent", tmp_path / "fastxent", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "fastxent", "bench", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert "the benchmarks are in fastxent's repository" in done.stderr and "pip install -e '.[bench]'" in done.stderr


def test_a_folder_called_benchmarks_does_not_get_in_the_way(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    program = f"import sys; sys.path.insert(1, {str(ROOT)!r}); from fastxent.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "bench", "--provider", "nobody"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "nobody is none of" in done.stderr


# Interrupted -----------------------------------------------------------------------------------------


def test_the_rounds_before_ctrl_c_are_kept():
    runs = []

    def call(name: str) -> Call:
        def run():
            runs.append(name)
            if runs.count(name) == 6 and name == "a":  # it is second in the sixth round: b has a sample more
                raise KeyboardInterrupt

        return Call(run, lambda r: r)

    calls = {"a": call("a"), "b": call("b")}
    with pytest.MonkeyPatch.context() as patch, measure.threads(1), pytest.raises(measure.Interrupted) as stopped:
        patch.setattr(measure, "estimate", lambda call: 1.0)  # one run a sample, none before it
        measure.time_interleaved(calls, 1, Effort(9, 9, 0.0), lambda text, share=0.0: None)
    assert {name: len(samples) for name, (_, samples) in stopped.value.timed.items()} == {"a": 5, "b": 5}


def test_a_call_that_compiles_at_first_is_estimated_by_a_later_one():
    waits = iter([0.2])  # the first run takes so long, as one that compiles a kernel does
    call = Call(lambda: time.sleep(next(waits, 0.0)), lambda r: r)
    assert measure.estimate(call) < 0.1


def test_ctrl_c_within_a_group_shows_and_writes_it(tmp_path, capsys, monkeypatch):
    case = Case((40, 50))

    def interrupted(calls, *args):
        raise measure.Interrupted({name: (1, [1e-3, 2e-3]) for name in calls})

    monkeypatch.setattr(measure, "time_interleaved", interrupted)
    file = tmp_path / "part.json"
    assert bench(*TINY, "--provider", "fastxent-torch", "--json", file) == 130
    document = json.loads(file.read_text())
    assert document["interrupted"] and [g["key"] for g in document["groups"]] == [case.key]
    assert document["groups"][0]["entries"][0]["samples"] == [1e-3, 2e-3]
    out = capsys.readouterr().out
    assert case.reason in out and "interrupted" in out and "1.50 ms" in out


def test_what_was_measured_is_on_the_disk_before_the_end(tmp_path, monkeypatch):
    file = tmp_path / "part.json"

    def measured(case, *args, **options):
        if case.mode == LOSS:
            assert [g["key"] for g in json.loads(file.read_text())["groups"]] == [replace(case, mode=GRAD).key]
        return made_up(case, {"fastxent torch": 1e-3})

    monkeypatch.setattr(compare, "run_group", measured)
    assert bench(*TINY, "--json", file) == 0
    assert len(json.loads(file.read_text())["groups"]) == 2


# The plot --------------------------------------------------------------------------------------------


@pytest.fixture
def swept(monkeypatch):
    """No timing: PyTorch takes ten times as long as the floor, fastxent twice."""

    def measured(case, *args, **options):
        seconds = case.bytes_moved / 50e9 + 1e-6
        return made_up(case, {"fastxent torch": 2 * seconds, "PyTorch eager": 10 * seconds, "floor out=": seconds})

    monkeypatch.setattr(compare, "run_group", measured)


def test_svg_holds_lines_labels_and_both_axes(swept, tmp_path):
    file = tmp_path / "plot.svg"
    assert bench("--quick", "--plot", file) == 0
    text = file.read_text()
    axes = ("N = 1024", "C = 1024", "C, classes", "N, rows", "32768")
    for label in ("fastxent, torch", "PyTorch eager", "memory roofline", *axes):
        assert label in text
    assert "SciPy" not in text  # it was not measured


def test_png_is_not_empty(swept, tmp_path):
    file = tmp_path / "plot.png"
    assert bench("--quick", "--plot", file) == 0
    image = matplotlib.image.imread(file)[..., :3]
    blue, orange = np.array([0x00, 0x72, 0xB2]) / 255, np.array([0xD5, 0x5E, 0x00]) / 255  # fastxent torch, PyTorch eager
    for colour in (blue, orange):
        assert (np.abs(image - colour).max(-1) < 0.02).sum() > 1000


def test_points_are_nanoseconds_an_element():
    groups = [made_up(case, {"PyTorch eager": 1e-9 * case.n_rows * case.n_classes * 7}) for case in SWEEP[:2]]
    points = plot._points(groups, "PyTorch eager", free=1)
    assert [p[0] for p in points] == [8, 64]
    assert np.allclose([p[1:] for p in points], 7)
