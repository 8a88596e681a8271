"""asv finds the suites, and measures the commits that it is told to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.asv_results import git
from tests.helpers.processes import ROOT

MARK = """
import fastxent


def track_mark():
    return fastxent.MARK


track_mark.version = "1"
"""


def asv(folder: Path, home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """With settings of its own, not those in the home of whoever runs the tests."""
    env = {**os.environ, "HOME": str(home), "USERPROFILE": str(home)}
    return subprocess.run([sys.executable, "-m", "asv", *args], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A repository whose commits differ in a constant, and a suite that reads it; then ours is not what is imported."""
    folder = tmp_path_factory.mktemp("marked")
    shutil.copy(ROOT / "asv.conf.json", folder)
    for name in ("__init__.py", "checkout.py"):
        (folder / "benchmarks" / "suites").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "benchmarks" / name, folder / "benchmarks")
    shutil.copy(ROOT / "benchmarks" / "suites" / "__init__.py", folder / "benchmarks" / "suites")
    (folder / "benchmarks" / "suites" / "mark.py").write_text(MARK)
    (folder / "fastxent").mkdir()
    git(folder, "init", "-q", "-b", "main")
    hashes = []
    for mark in (1, 2, 3, 30):
        (folder / "fastxent" / "__init__.py").write_text(f"MARK = {mark}\n")
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", f"mark {mark}")
        hashes.append(git(folder, "rev-parse", "HEAD"))
    asv(folder, folder, "machine", "--yes", "--machine", "here")
    return folder, hashes


def test_the_suites_pass_asvs_check(tmp_path):
    asv(ROOT, tmp_path, "machine", "--yes")
    done = asv(ROOT, tmp_path, "check", "-E", "checkout")
    assert done.returncode == 0, done.stdout
    assert "No problems found" in done.stdout


def test_run_measures_each_commit_by_itself(marked):
    folder, hashes = marked
    done = asv(folder, folder, "run", "-E", "checkout", "--machine", "here", f"{hashes[0]}..{hashes[2]}")
    assert done.returncode == 0, done.stdout
    results = [json.loads(file.read_text()) for file in (folder / "benchmarks" / "results" / "asv" / "here").glob("*-*.json")]
    found = {result["commit_hash"]: result["results"]["mark.track_mark"][0] for result in results}
    assert found == {hashes[1]: [2], hashes[2]: [3]}
    assert all(set(result["requirements"]) == {"numba", "torch", "ml_dtypes"} for result in results)


def test_continuous_fails_where_it_got_slower_and_only_there(marked):
    folder, hashes = marked
    options = ["continuous", "-E", "checkout", "--machine", "here"]
    slower = asv(folder, folder, *options, hashes[2], hashes[3])
    assert slower.returncode == 1 and "PERFORMANCE DECREASED" in slower.stdout
    assert asv(folder, folder, *options, hashes[3], hashes[2]).returncode == 0
