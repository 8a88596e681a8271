"""`fastxent evaluate`: its numbers against the reference, whatever the file, axis, order and block."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from fastxent import cli
from fastxent import reference as ref
from fastxent._cli import evaluate as evaluation
from tests.helpers.cases import DTYPES, FLOAT32, FLOAT64, make_case
from tests.helpers.cli_cases import TOLERANCE, assert_matches, evaluate, expected, needs_terminals, run_on_terminal, save
from tests.helpers.processes import ROOT


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=[pytest.mark.core] if d == FLOAT32 else []) for d in DTYPES], ids=str)
@pytest.mark.parametrize(
    "option",
    [
        "index",
        "weight",
        "ignore",
        "smoothing",
        "weight ignore smoothing",
        "probabilities",
        "probabilities weight smoothing",
    ],
)
def test_numbers_are_the_references(tmp_path, capsys, dtype, option):
    case = make_case(dtype, (300, 17), option)
    files = save(tmp_path, logits=case.logits, targets=case.target)
    flags = []
    if "weight" in case.options:
        flags += ["--weight", *save(tmp_path, weight=case.options["weight"])]
    if "label_smoothing" in case.options:
        flags += ["--label-smoothing", case.options["label_smoothing"]]
    result = evaluate(capsys, *files, *flags)
    assert_matches(result, expected(case.logits, case.target, **case.options), TOLERANCE[dtype])
    assert result["dtype"] == dtype.name
    assert result["n_bytes"] == case.logits.nbytes + case.target.nbytes
    assert result["seconds"] > 0 and result["gb_per_s"] > 0


def test_ignore_index(tmp_path, capsys):
    case = make_case(FLOAT64, (50, 5))
    files = save(tmp_path, logits=case.logits, targets=case.target)
    truth = expected(case.logits, case.target, ignore_index=3)
    assert_matches(evaluate(capsys, *files, "--ignore-index", 3), truth, 1e-13)
    assert truth["kept_rows"] < truth["rows"] == 50


@pytest.mark.thorough
@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("how", ["npy", "npz", "compressed"])
@pytest.mark.parametrize("option", ["index", "probabilities"])
@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_any_axis_order_file_and_block(tmp_path, capsys, monkeypatch, axis, order, how, option, block_rows):
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", block_rows)
    case = make_case(FLOAT64, (3, 5, 4, 6), option)
    target = case.target if option == "index" else np.moveaxis(case.target, -1, axis)
    arrays = {"logits": np.moveaxis(case.logits, -1, axis), "targets": target}
    arrays = {name: np.array(array, order=order) for name, array in arrays.items()}
    if how == "npy":
        files = save(tmp_path, **arrays)
    else:
        file = tmp_path / "both.npz"
        (np.savez if how == "npz" else np.savez_compressed)(file, **arrays)
        files = [f"{file}:{name}" for name in arrays]
    result = evaluate(capsys, *files, "--axis", axis)
    assert_matches(result, expected(case.logits, case.target), 1e-13)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2"])
def test_other_byte_order(tmp_path, capsys, dtype):
    case = make_case(np.dtype(dtype[1:]), (20, 7))
    files = save(tmp_path, logits=case.logits.astype(dtype), targets=case.target.astype(">i2"))
    assert_matches(evaluate(capsys, *files), expected(case.logits, case.target))


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_targets_of_any_integer_type(tmp_path, capsys, dtype):
    case = make_case(FLOAT64, (20, 7))
    files = save(tmp_path, logits=case.logits, targets=case.target.astype(dtype))
    flags = ["--weight", *save(tmp_path, weight=np.arange(1, 8))]
    truth = expected(case.logits, case.target, weight=np.arange(1, 8))
    assert_matches(evaluate(capsys, *files, *flags), truth, 1e-13)


def test_a_single_row(tmp_path, capsys):
    logits, target = np.array([1.0, 2.0, 0.5]), np.array(1)
    assert_matches(
        evaluate(capsys, *save(tmp_path, logits=logits, targets=target)),
        {"loss": ref.cross_entropy(logits, target), "top1_accuracy": 1.0, "rows": 1, "kept_rows": 1},
    )


def test_a_npz_with_one_array_needs_no_key(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", np.zeros((2, 4)))
    np.savez(tmp_path / "t.npz", targets=np.zeros(2, int))
    assert evaluate(capsys, tmp_path / "x.npz", tmp_path / "t.npz")["rows"] == 2


def test_rows_that_hold_nan_are_counted_and_are_no_hits(tmp_path, capsys):
    logits = np.zeros((4, 3))
    logits[1, 2] = np.nan  # the target's logit is finite
    logits[2, 0] = np.nan  # the target's logit is nan, which nothing beats
    logits[3, 0] = -np.inf  # a masked target: the loss is inf
    files = save(tmp_path, logits=logits, targets=np.array([0, 0, 0, 0]))
    result = evaluate(capsys, *files)
    assert (result["rows"], result["nonfinite_rows"], result["top1_accuracy"]) == (4, 3, 0.25)
    assert result["loss"] is result["perplexity"] is result["calibration_error"] is None  # nan is not JSON
    assert cli.main(["evaluate", *files]) == 0
    assert "the loss of 3 rows" in capsys.readouterr().out


def test_with_every_row_ignored_the_means_are_nan(tmp_path, capsys):
    files = save(tmp_path, logits=np.full((4, 3), np.nan), targets=np.full(4, -100))
    result = evaluate(capsys, *files)
    assert (result["rows"], result["kept_rows"], result["nonfinite_rows"]) == (4, 0, 0)
    assert all(result[k] is None for k in ("loss", "top1_accuracy", "entropy", "calibration_error"))


def test_perfect_calibration_and_none(tmp_path, capsys):
    right = np.where(np.eye(4), 100.0, 0.0)
    for target, error in ([0, 1, 2, 3], 0.0), ([1, 2, 3, 0], 1.0):
        files = save(tmp_path, logits=right, targets=np.array(target))
        assert evaluate(capsys, *files)["calibration_error"] == pytest.approx(error, abs=1e-12)


def test_the_table_says_the_same(tmp_path, capsys):
    case = make_case(FLOAT32, (1234, 10), "ignore")
    files = save(tmp_path, logits=case.logits, targets=case.target)
    assert cli.main(["evaluate", *files]) == 0
    out, err = capsys.readouterr()
    truth = expected(case.logits, case.target)
    assert err == ""
    for text in (
        f"{truth['loss']:.6f}"[:-2],
        f"{truth['top5_accuracy']:.2%}",
        f"1,234, {truth['kept_rows']:,} kept",
    ):
        assert text in out


@needs_terminals
def test_the_progress_bar_goes_to_a_terminal_and_only_there(tmp_path):
    files = save(tmp_path, logits=np.zeros((100, 4), np.float32), targets=np.zeros(100, int))
    done, shown = run_on_terminal("evaluate", *files, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["rows"] == 100
    assert b"\x1b[" in shown


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux reports it")
@pytest.mark.parametrize("how", ["npy", "npz"])
def test_memory_is_bounded(tmp_path, how):
    """Logits of 2 GiB, in a sparse file or packed a thousandfold, take little more than logits of 1 MiB."""
    small = save(tmp_path, small=np.zeros((256, 1024), np.float32), small_targets=np.zeros(256, int))
    rows = 1 << 19
    if how == "npy":
        logits = str(tmp_path / "large.npy")
        np.lib.format.open_memmap(logits, "w+", np.float32, (rows, 1024)).flush()
    else:
        logits = str(tmp_path / "large.npz")
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, 1024)})
        with zipfile.ZipFile(logits, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("x.npy", "w", force_zip64=True) as stream:
                stream.write(header.getvalue())
                for _ in range(64):
                    stream.write(bytes(rows * 1024 * 4 // 64))
    large = [logits, *save(tmp_path, large_targets=np.zeros(rows, int))]
    code = (
        "import resource, sys; from fastxent import cli; assert cli.main(['evaluate', *sys.argv[1:]]) == 0;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak(files: list[str]) -> int:
        done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1]) << 10

    assert peak(large) - peak(small) < 400 << 20
