"""`fastxent evaluate --hidden X --head W`: the numbers of the product, in bounded memory, or a line that says what is wrong."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fastxent import cli
from fastxent._cli import evaluate as evaluation
from tests.helpers.cases import DTYPES, FLOAT32, FLOAT64, make_case, make_rng
from tests.helpers.cli_cases import (
    TOLERANCE,
    assert_matches,
    error_of,
    evaluate,
    expected,
    needs_terminals,
    run_on_terminal,
    save,
)
from tests.helpers.processes import ROOT

CLASSES, FEATURES = 17, 6


def make_files(tmp_path, dtype=FLOAT64, rows=(50,), option="index"):
    """Hidden states, a head, a bias and targets, in files; and the numbers that they should give."""
    rng, case = make_rng("head", dtype.name, rows, option), make_case(dtype, (*rows, CLASSES), option)
    hidden = rng.standard_normal((*rows, FEATURES)).astype(dtype)
    head, bias = rng.standard_normal((CLASSES, FEATURES)).astype(dtype), rng.standard_normal(CLASSES).astype(dtype)
    logits = hidden.astype(float) @ head.T.astype(float) + bias.astype(float)
    files = save(tmp_path, hidden=hidden, head=head, bias=bias, targets=case.target)
    flags = ["--hidden", files[0], "--head", files[1], "--bias", files[2], files[3]]
    return flags, expected(logits, case.target, **case.options), case.options


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=[pytest.mark.core] if d == FLOAT32 else []) for d in DTYPES], ids=str)
@pytest.mark.parametrize("rows", [(50,), (3, 4, 5), ()], ids=str)
@pytest.mark.parametrize("option", ["weight ignore smoothing", "probabilities"])
def test_numbers_are_those_of_the_product(tmp_path, capsys, monkeypatch, dtype, rows, option):
    if rows == () and "ignore" in option:
        option = "index"
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", 7)
    flags, truth, options = make_files(tmp_path, dtype, rows, option)
    if "weight" in options:
        flags += ["--weight", *save(tmp_path, weight=options["weight"]), "--label-smoothing", options["label_smoothing"]]
    result = evaluate(capsys, *flags)
    assert_matches(result, truth, max(TOLERANCE[dtype], 1e-12 if dtype == FLOAT64 else 5e-6))
    assert result["dtype"] == ("float64" if dtype == FLOAT64 else "float32")
    assert result["classes"] == CLASSES


@pytest.mark.parametrize("compress", [np.savez, np.savez_compressed])
def test_arrays_in_an_archive(tmp_path, capsys, monkeypatch, compress):
    """The head, which is read again for each block, too."""
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", 7)
    flags, truth, _ = make_files(tmp_path)
    arrays = {name: np.load(tmp_path / f"{name}.npy") for name in ("hidden", "head", "bias", "targets")}
    compress(tmp_path / "all.npz", **arrays)
    flags = [f"{tmp_path / 'all.npz'}:{name}" for name in arrays]
    result = evaluate(capsys, "--hidden", flags[0], "--head", flags[1], "--bias", flags[2], flags[3])
    assert_matches(result, truth, 1e-12)


def test_other_orders_of_memory(tmp_path, capsys):
    flags, truth, _ = make_files(tmp_path, rows=(5, 4))
    for name, order in (("hidden", "F"), ("head", "F")):
        np.save(tmp_path / f"{name}.npy", np.array(np.load(tmp_path / f"{name}.npy").astype(">f8"), order=order))
    assert_matches(evaluate(capsys, *flags), truth, 1e-12)


def test_without_a_bias_and_with_what_is_not_finite(tmp_path, capsys):
    hidden, head = np.ones((3, 2)), np.eye(2)
    hidden[1] = np.inf, 0
    hidden[2] = np.nan
    files = save(tmp_path, hidden=hidden, head=head, targets=np.array([0, 0, 0]))
    result = evaluate(capsys, "--hidden", files[0], "--head", files[1], files[2])
    assert (result["rows"], result["nonfinite_rows"], result["loss"]) == (3, 2, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(head=np.zeros((4, 3, 1))), r"has shape (4, 3, 1): a head has shape (classes, features)"),
        (dict(head=np.zeros((4, 2))), "their last axes, the features, must agree"),
        (dict(head=np.zeros((0, 3))), "is empty: shape (0, 3)"),
        (dict(head=np.zeros((4, 3), int)), "holds int64: hidden states, head and bias are floating point"),
        (dict(hidden=np.zeros(())), "their last axes, the features, must agree"),
        (dict(hidden=np.zeros((0, 3))), "is empty: shape (0, 3)"),
        (dict(bias=np.zeros(3)), "has shape (3,): a bias has shape (4,), one number a class"),
        (dict(targets=np.zeros(3, int)), "targets are integers of shape (2,) or class probabilities of shape (2, 4)"),
        (dict(targets=np.array([0, 4])), "target[1] = 4 is outside [0, 4); 1 of 2 rows is out of range"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(tmp_path, capsys, change, message):
    arrays = dict(hidden=np.zeros((2, 3)), head=np.zeros((4, 3)), bias=np.zeros(4), targets=np.array([0, 1])) | change
    hidden, head, bias, targets = save(tmp_path, **arrays)
    assert message in error_of(capsys, "--hidden", hidden, "--head", head, "--bias", bias, targets)


def test_options_that_do_not_go_together(tmp_path, capsys):
    flags, _, _ = make_files(tmp_path)
    hidden, head, targets = flags[1], flags[3], flags[-1]
    for arguments, message in [
        ([targets], "are required: TARGETS"),
        (["--hidden", hidden, targets], "--hidden needs --head"),
        ([hidden, targets, "--head", head], "go with --hidden"),
        ([hidden, targets, "--bias", head], "go with --hidden"),
        (["--hidden", hidden, "--head", head, targets, targets], "name one more file: TARGETS"),
        (["--hidden", hidden, "--head", head, targets, "--axis", "0"], "--axis is for LOGITS"),
    ]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["evaluate", *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_head_that_is_too_large_for_an_archive(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastxent._cli.files.WHOLE_BYTES", 10)
    flags, _, _ = make_files(tmp_path)
    np.savez(tmp_path / "head.npz", np.load(tmp_path / "head.npy"))
    flags[3] = tmp_path / "head.npz"
    assert "is read more than once and is too large for that; use a .npy file" in error_of(capsys, *flags)


@needs_terminals
def test_progress_is_shown_on_a_terminal(tmp_path):
    flags, _, _ = make_files(tmp_path, FLOAT32)
    done, shown = run_on_terminal("evaluate", *flags)
    assert done.returncode == 0 and b"perplexity" in done.stdout
    assert b"\x1b[" in shown


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux reports it")
def test_memory_is_bounded(tmp_path):
    """Hidden states of 1 GiB and a head of 512 MiB, in sparse files, take little more than small ones."""
    code = (
        "import resource, sys; from fastxent import cli; assert cli.main(['evaluate', *sys.argv[1:]]) == 0;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak(name, rows, classes, features):
        hidden, head = str(tmp_path / f"{name}_hidden.npy"), str(tmp_path / f"{name}_head.npy")
        np.lib.format.open_memmap(hidden, "w+", np.float32, (rows, features)).flush()
        np.lib.format.open_memmap(head, "w+", np.float32, (classes, features)).flush()
        (targets,) = save(tmp_path, **{f"{name}_targets": np.zeros(rows, int)})
        command = [sys.executable, "-c", code, "--hidden", hidden, "--head", head, targets]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1]) << 10

    small = peak("small", 64, 512, 8)
    assert peak("many rows", 1 << 16, 512, 4096) - small < 400 << 20
    assert peak("many classes", 64, 1 << 20, 128) - small < 400 << 20
