"""The command line: exit codes, help, demo, info, warmup; and what the README says of it.

Most tests call ``main(argv)``, which is what the console script calls; a few start a process of their own.
"""

from __future__ import annotations

import doctest
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys

import numpy as np
import pytest

import fastxent
from fastxent import cli
from fastxent._cli import evaluate
from fastxent._runtime import config as _config
from tests.helpers.cli_cases import run_process, save
from tests.helpers.processes import ROOT

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


@pytest.mark.core
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


@pytest.mark.core
def test_a_process_ends_with_the_exit_code_and_one_line():
    done = run_process("evaluate", "no-such-file.npy", "t.npy")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("fastxent evaluate: error: no-such-file.npy cannot be read: No such file or directory\n")


@pytest.mark.parametrize(
    ("missing", "args", "extra"),
    [
        ("rich.console", ["demo"], "rich is missing: pip install 'fastxent[cli]'"),
        ("sklearn.datasets", ["demo", "--json"], "sklearn is missing: pip install 'fastxent[cli]'"),
        ("rich", ["bench"], "rich is missing: pip install 'fastxent[bench]'"),
        ("matplotlib", ["bench", "--plot", "x.svg"], "matplotlib is missing: pip install 'fastxent[bench]'"),
        ("ml_dtypes", ["bench", "--quick", "--dtype", "bfloat16"], "ml_dtypes is missing: pip install 'fastxent[bench]'"),
    ],
)
def test_a_missing_extra_is_named(missing, args, extra, monkeypatch, capsys):
    loaded = [name for name in sys.modules if name.startswith(("benchmarks", "fastxent._cli.demo", missing))]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(args) == 2
    assert capsys.readouterr().err.endswith(f"error: {extra}\n")


BARE = """
import pathlib, sys
class Absent:  # as if it were not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "rich", "scipy", "sklearn", "matplotlib", "ml_dtypes"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
read_text = pathlib.Path.read_text
def no_kernel_tells(self, *arguments, **options):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(self)
    return read_text(self, *arguments, **options)
pathlib.Path.read_text = no_kernel_tells
sys.stderr.isatty = lambda: True  # where a bar would be shown
from fastxent import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_info_and_evaluate_need_nothing_but_numpy_and_numba(tmp_path):
    files = save(tmp_path, logits=np.zeros((2, 4)), targets=np.zeros(2, int))
    shown = {}
    for args in (["info"], ["info", "--json"], ["evaluate", *files], ["evaluate", *files, "--json"]):
        done = subprocess.run([sys.executable, "-c", BARE, *args], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown[len(args)] = done.stdout if "--json" not in args else json.loads(done.stdout)
        if args[0] == "info" and "--json" not in args:
            table = done.stdout
    assert shown[2]["cpu"]["model"] == platform.machine() and str(shown[2]["cpu"]["cores available"]) in table
    assert shown[4]["loss"] == pytest.approx(math.log(4)) and "1.386294" in shown[3]


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


@pytest.mark.skipif(os.name != "posix", reason="redirected by a shell")
@pytest.mark.parametrize(("where", "code", "message"), [(">&-", 0, ""), (">/dev/full", 2, "fastxent info: error: ")])
def test_an_output_that_is_closed_or_full(where, code, message):
    command = f"{shlex.quote(sys.executable)} -m fastxent info {where}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == code and result.stderr.startswith(message) and "Traceback" not in result.stderr


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
    from fastxent._cli import demo

    def run(folder, on_step=None):
        files = save(folder, logits=np.zeros((2, 3)), targets=np.zeros(2, int))
        checks = [demo.Check("coefficients", difference, 1e-3)]
        return demo.Result([], 1.0, 1.0, checks, evaluate.evaluate(*files))

    monkeypatch.setattr(demo, "run", run)
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
    assert "/x" * 100 in out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == config


@pytest.mark.parametrize("text", ["", "model name\t: \n", "\x00\xff garbage : : \n\n", "Processor : ARMv8\n"], ids=repr)
def test_the_processor_has_no_name(text, monkeypatch):
    monkeypatch.setattr(_config.Path, "read_text", lambda *arguments, **options: text)
    assert fastxent.show_config()["cpu"]["model"] == platform.machine()


def test_what_cannot_be_found_out_is_unknown(monkeypatch, capsys):
    """Who reports that something is broken has something broken."""

    def broken(*arguments):
        raise OSError("no such\nluck")

    for name in ("available_cpus", "get_num_threads", "imported", "_cpu_model", "_pool", "version"):
        monkeypatch.setattr(_config, name, broken)
    monkeypatch.setattr(_config.disk_cache, "cache_folder", broken)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.count("unknown (OSError: no such luck)") == 9
    assert all(name in out for name in ("cpu", "vectors", "threads", fastxent.__version__, np.__version__, "cache"))


def test_a_name_that_the_output_cannot_show():
    """A folder's name may hold any bytes, and the output may be ASCII."""
    environment = os.environ | {"NUMBA_CACHE_DIR": os.fsdecode(b"/no \xff folder"), "PYTHONIOENCODING": "ascii"}
    done = run_process("info", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "/no \\udcff folder" in done.stdout


def test_the_version_needs_no_metadata(monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: 1 / 0)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastxent {fastxent.__version__}\n"


@pytest.mark.core
def test_info_is_real(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(fastxent.show_config()))


def test_warmup_passes_its_options_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(fastxent, "warmup", lambda progress, **options: calls.append(options))
    assert cli.main(["warmup"]) == 0
    assert cli.main(["warmup", "--dtype", "float16", "bfloat16", "float16", "--jobs", "3"]) == 0
    assert calls == [{"n_jobs": None}, {"dtypes": ("float16", "bfloat16"), "n_jobs": 3}]
    assert "kernels are ready" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["warmup"], ["prebuild", "--levels", "aarch64"]], ids=" ".join)
def test_no_jobs(command, capsys):
    assert cli.main([*command, "--jobs", "0"]) == 2
    assert "--jobs 0 is not above 0" in capsys.readouterr().err


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
    commands = [line for line in readme.splitlines() if line.endswith("-m pytest")]
    assert commands == ["python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest"]
