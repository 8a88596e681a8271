"""The command line: exit codes, help, demo, info, warmup; and what the README says of it.

Most tests call ``main(argv)``, which is what the console script calls; a few start a process of their own.
"""

from __future__ import annotations

import doctest
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from cli_cases import ROOT, evaluate, run_process, save

import fastxent
from fastxent import _evaluate, cli

# The command as such --------------------------------------------------------------------------------------


def test_help_is_instant_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom fastxent import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'numba', 'torch', 'rich', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("evaluate", "demo", "info", "warmup"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["evaluate", "--help"], 0),
        ([], 2),
        (["train"], 2),
        (["evaluate", "logits.npy"], 2),
        (["evaluate", "x", "t", "--axis", "last"], 2),
        (["warmup", "--dtype", "int8"], 2),
    ],
)
def test_usage(args, code, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_process_ends_with_the_exit_code_and_one_line():
    done = run_process("evaluate", "no-such-file.npy", "t.npy")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("fastxent evaluate: error: no-such-file.npy cannot be read: No such file or directory\n")


@pytest.mark.parametrize("args", [["evaluate", "x.npy", "t.npy"], ["info"], ["demo"]])
def test_a_missing_extra_is_named(args, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(args) == 2
    assert capsys.readouterr().err.endswith("error: rich is missing: pip install 'fastxent[cli]'\n")


def test_json_needs_no_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    files = save(tmp_path, logits=np.zeros((2, 4)), targets=np.zeros(2, int))
    assert evaluate(capsys, *files)["loss"] == pytest.approx(math.log(4))


def test_interrupt(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(fastxent, "show_config", interrupted)
    assert cli.main(["info", "--json"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_goes_away_is_no_error():
    command = [sys.executable, "-m", "fastxent", "info", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


# demo, info, warmup ---------------------------------------------------------------------------------------


def test_demo_end_to_end(tmp_path):
    done = run_process("demo", "--keep", tmp_path / "new" / "folder")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("train accuracy", "loss with fastxent", "coefficients", "perplexity", "kept in"):
        assert words in done.stdout
    assert "FAILED" not in done.stdout
    logits = np.load(tmp_path / "new" / "folder" / "logits.npy")
    targets = np.load(tmp_path / "new" / "folder" / "targets.npy")
    assert logits.shape == (450, 10) and targets.shape == (450,)
    assert (logits.argmax(1) == targets).mean() > 0.95


def test_demo_json(capsys):
    assert cli.main(["demo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    assert [check["name"] for check in result["checks"] if check["passed"]] == [
        "coefficients",
        "intercepts, centred",
        "training loss",
        "test loss, from the files",
    ]
    assert abs(result["loss"] - result["sklearn_loss"]) < 1e-8
    losses = [step["loss"] for step in result["steps"]]
    assert np.diff(losses).max() < 1e-12
    assert result["evaluation"]["top1_accuracy"] > 0.95


@pytest.mark.parametrize("flags", [[], ["--json"]])
@pytest.mark.parametrize(("difference", "code"), [(1e-4, 0), (1e-2, 1), (math.nan, 1)])
def test_demo_fails_with_a_check(monkeypatch, capsys, flags, difference, code):
    from fastxent import _demo

    def run(folder, on_step=None):
        files = save(folder, logits=np.zeros((2, 3)), targets=np.zeros(2, int))
        checks = [_demo.Check("coefficients", difference, 1e-3)]
        return _demo.Result([], 1.0, 1.0, checks, _evaluate.evaluate(*files))

    monkeypatch.setattr(_demo, "run", run)
    assert cli.main(["demo", *flags]) == code
    out = capsys.readouterr().out
    assert ('"passed": false' in out) if flags and code else ("FAILED" in out) == bool(code)


def test_demo_cannot_write(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--json", "--keep", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_info_shows_whatever_there_is(monkeypatch, capsys):
    config = {
        "version": "1.2",
        "cpu": {"name": "a [b]c[/b]", "cores": [0, 2]},
        "cache": "/x" * 100,
        "no": None,
    }
    monkeypatch.setattr(fastxent, "show_config", lambda: config)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "a [b]c[/b]" in out and "0, 2" in out and "1.2" in out
    assert "/x" * 100 in "".join(out.split())  # folded, not cut
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == config


def test_info_is_real(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(fastxent.show_config()))


def test_warmup_passes_its_dtypes_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(fastxent, "warmup", lambda *args, progress=None: calls.append(args))
    assert cli.main(["warmup"]) == 0
    assert cli.main(["warmup", "--dtype", "float16", "bfloat16", "float16"]) == 0
    assert calls == [(), (("float16", "bfloat16"),)]
    assert "kernels are ready" in capsys.readouterr().out


def test_warmup_is_real():
    done = run_process("warmup", "--dtype", "float32")
    assert (done.returncode, done.stderr) == (0, "")


# README and .ci/run ---------------------------------------------------------------------------------------


def test_readme_example():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 5 and result.failed == 0


def test_ci_runs_the_readmes_test_command():
    """`.ci/run` greps the command out of README.md, so it must stand there once, on a line of its own."""
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if "-m pytest" in line]
    assert commands == ["python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest"]
