"""The tests are collected wherever they are: without PyTorch and others, and where Python has no POSIX modules. Each is in
one of the suites that .ci/run runs, or is one of the slow ones."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

from tests.helpers.missing import PACKAGES, POSIX, needs
from tests.helpers.processes import ROOT

COLLECT = """
import sys
import pytest
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for module in {absent}:
    sys.modules.pop(module, None)
sys.exit(pytest.main(["--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", *sys.argv[1:], "tests"]))
"""


def collected(absent: tuple[str, ...], *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", COLLECT.format(absent=absent), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_without_other_packages():
    tests = collected(PACKAGES, "-p", "xdist.plugin", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "tests/numpy/test_core.py" in tests and "tests/torch" not in tests


def test_without_posix():
    tests = collected(POSIX, "-W", "ignore:only soft file lock is available")  # says what PyTorch imports
    assert "tests/numpy/test_core.py" in tests and "tests/torch/test_core.py" in tests and "test_cache_folders" not in tests
    # README's command, which this is, runs some of every file. Dask's cluster imports POSIX's modules where it runs on POSIX.
    dask = ROOT / "tests" / "cli" / "test_evaluate_dask.py"
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file != dask and not needs(file) & set(POSIX)]
    assert [str(file.relative_to(ROOT)) for file in files if f"{file.relative_to(ROOT)}::" not in tests] == []


def test_every_test_is_in_one_suite():
    """Which a test is in depends on its markers only."""
    [readmes] = re.findall(r"addopts = \".* -m '(.+?)'", (ROOT / "pyproject.toml").read_text())
    [thorough] = re.findall(r"-m pytest -m '(.+?)' tests", (ROOT / ".ci" / "run").read_text())
    for markers in itertools.product((False, True), repeat=2):
        marked = dict(zip(("thorough", "slow"), markers, strict=True))
        suites = [eval(expression, marked.copy()) for expression in (readmes, thorough, "slow")]
        assert sum(suites) == 1, marked
