"""The proof that a slow-down is seen: by ``asv continuous``, on the dashboard and by the gate; and that nothing else is.

    python -m pytest benchmarks/test_slowdown.py -n 0

A clone gets two commits: one that changes no code, and one in which the kernels compute each exp a second time. It takes some
minutes and a machine on which little else runs, so it is not in the test command of the project.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks import dashboard
from benchmarks.published import read

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CASES = "Ratio.*out=.*1024 x 1000"  # in the cache: what costs time is arithmetic
FACTOR = 1.25  # by which a ratio may grow on a machine that is not quite alone

# The second exp waits for the first; 0 times it is nothing, but only we know that.
TWICE = """

_exp_once = exp_reduced


@inlined
def exp_reduced(r, power):
    return _exp_once(r + 0.0 * _exp_once(r, power), power)
"""


class Clone(NamedTuple):
    folder: Path
    base: str
    same: str
    slow: str

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """In the clone, with the settings of asv in a home of its own."""
        env = {**os.environ, "HOME": str(self.folder), "PYTHONPATH": str(self.folder)}
        done = subprocess.run([sys.executable, "-m", *command], cwd=self.folder, env=env, capture_output=True, text=True)
        print(done.stdout[-4000:], done.stderr[-4000:])
        return done


def git(folder: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=proof", "-c", "user.email=proof@localhost", *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    folder = tmp_path_factory.mktemp("clone")
    git(ROOT, "clone", "-q", "--shared", str(ROOT), str(folder))
    hashes = [git(folder, "rev-parse", "HEAD")]
    shutil.rmtree(folder / json.loads((folder / "asv.conf.json").read_text())["results_dir"], ignore_errors=True)
    statistics = folder / "fastxent" / "_kernels" / "reduce.py"
    assert " exp_up, reduce," in statistics.read_text()
    for file, text, subject in ((folder / "README.md", "\n", "no-op"), (statistics, TWICE, "each exp twice")):
        file.write_text(file.read_text() + text)
        git(folder, "commit", "-q", "-m", subject, "--", str(file))
        hashes.append(git(folder, "rev-parse", "HEAD"))
    made = Clone(folder, *hashes)
    made.run("asv", "machine", "--yes", "--machine", "here")
    return made


def continuous(clone: Clone, before: str, after: str) -> int:
    return clone.run(
        "asv", "continuous", "-E", "checkout", "--machine", "here", "-f", str(FACTOR), "--bench", CASES, before, after
    ).returncode  # fmt: skip


def test_asv_continuous_and_the_dashboard(clone):
    assert continuous(clone, clone.base, clone.same) == 0
    assert continuous(clone, clone.same, clone.slow) == 1
    site = clone.folder / "site"
    dashboard.build(clone.folder, site)
    found = read(site / "asv", clone.folder).regressions
    assert {(r.last.hash, r.last.subject) for r in found} == {(clone.slow, "each exp twice")}
    assert all(r.factor > FACTOR for r in found)
    assert f'data-commit="{clone.slow}"' in (site / "index.html").read_text().partition("<tbody>")[2]


def test_gate(clone):
    files: dict[str, list[str]] = {clone.base: [], clone.same: [], clone.slow: []}
    for turn in range(2):
        for commit in files:
            git(clone.folder, "checkout", "-q", commit)
            file = str(clone.folder / f"{commit}-{turn}.json")
            options = ["-m", "gate", "-n", "0", "--benchmark-enable", "--benchmark-json", file, "-q"]
            assert clone.run("pytest", "benchmarks/test_speed.py", *options).returncode == 0
            files[commit].append(file)
    assert clone.run("benchmarks.gate", *files[clone.same], "--base", *files[clone.base]).returncode == 0
    assert clone.run("benchmarks.gate", *files[clone.slow], "--base", *files[clone.base]).returncode == 1
