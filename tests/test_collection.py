"""The tests are collected wherever they are: without PyTorch and others, and where Python has no POSIX modules."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.missing import PACKAGES, POSIX
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
