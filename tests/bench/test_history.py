"""Adding to the committed history, with a suite that only reads a mark; and what the front page says of its age."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from benchmarks import dashboard
from benchmarks.history import Repository, main, spread
from benchmarks.published import read
from tests.helpers.asv_results import MACHINE, START, git, make_repository, write_results
from tests.helpers.processes import ROOT

SUITE = '''
import fastxent


class Ratio:
    """The suite that is tracked, without its times."""

    params = (["fastxent out=", "fastxent torch"], ["32 x 10", "4096 x 8192"], ["1", "all"])
    param_names = ("provider", "shape", "threads")
    version = "1"
    unit = "x PyTorch eager"

    def setup(self, provider, shape, threads):
        if fastxent.MARK is None:
            raise ValueError("slow morning")
        if provider == "fastxent torch" and fastxent.MARK == 1:
            raise NotImplementedError

    def track_ratio(self, provider, shape, threads):
        return 0.1 * fastxent.MARK
'''
PACKAGE = """
MARK = {mark}


def cross_entropy_value_and_grad(): ...
"""
MARKS = (1, 2, 3, None, 4)  # of the second commit and those after it; the first has nothing to measure


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Six landings, and one commit after them that leaves the package alone. asv's settings are its own, not the user's."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    folder = tmp_path / "repository"
    folder.mkdir()
    make_repository(folder, [])
    shutil.copy(ROOT / ".gitignore", folder)
    suites, package = folder / "benchmarks" / "suites", folder / "fastxent"
    for other in ("start.py", "linear.py"):
        (suites / other).unlink()
    (suites / "speed.py").write_text(SUITE)
    package.mkdir()
    texts = ["", *(PACKAGE.format(mark=mark) for mark in MARKS)]
    for k, text in enumerate(texts):
        (package / "__init__.py").write_text(text)
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", f"landing {k}")
    git(folder, "commit", "-q", "--allow-empty", "-m", "nothing of the package")
    return folder


def run(folder: Path, *args: str) -> int:
    return main(["--repository", str(folder), *args])


def error(folder: Path, capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(folder, *args)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def results(folder: Path) -> dict[str, list[float | None]]:
    """Of each commit that was measured, by its subject, the ratios with all threads."""
    found = {}
    for file in (folder / "benchmarks" / "results" / "asv").glob("*/*-*.json"):
        document = json.loads(file.read_text())
        values = document["results"]["speed.Ratio.track_ratio"][0]
        found[git(folder, "log", "-1", "--format=%s", document["commit_hash"])] = values and values[1::2]
    return found


def test_add_measures_head_for_the_front_page(repository, capsys):
    assert run(repository, "--add") == 0
    assert results(repository) == {"nothing of the package": [0.4] * 4}
    out = capsys.readouterr().out
    assert "nothing of the package" in out and "fastxent torch  32 x 10: 2.50 x, 4096 x 8192: 2.50 x" in out

    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "results")
    dashboard.build(repository, repository / "site")
    page = (repository / "site" / "index.html").read_text()
    [machine] = (folder.name for folder in (repository / "benchmarks" / "results" / "asv").iterdir() if folder.is_dir())
    assert "nothing of the package" in page and f"on the machine {machine}: commit" in page


def test_add_measures_no_commit_twice(repository, capsys):
    """Results that are not committed yet are no reason to refuse."""
    assert run(repository, "--add") == 0
    capsys.readouterr()
    assert run(repository, "--add") == 0
    assert capsys.readouterr().out.startswith("0 commits to measure")


@pytest.mark.parametrize("name", ["fastxent/__init__.py", "new.py"])
def test_add_refuses_what_is_not_committed(repository, capsys, name):
    (repository / name).write_text("MARK = 9\n")
    message = error(repository, capsys, "--add")
    assert f"--add: {name}: not as in HEAD; commit it first" in message
    assert results(repository) == {}


@pytest.mark.thorough
def test_commits_are_measured_oldest_first_and_what_fails_is_told(repository, capsys):
    assert run(repository, "--commits", "HEAD~1", "HEAD~5", "HEAD~2") == 1
    measured = results(repository)
    out = capsys.readouterr().out
    assert re.findall(r"\[\d of \d\].* (landing \d)", out) == ["landing 1", "landing 4", "landing 5"]
    assert measured["landing 1"][:2] == [0.1, 0.1] and all(value != value for value in measured["landing 1"][2:])  # n/a
    assert "fastxent out=  32 x 10: 10.0 x" in out and "fastxent torch  32 x 10: n/a" in out
    assert not any(measured["landing 4"] or [])
    assert "slow morning" in out and "failed" in out
    assert measured["landing 5"] == [0.4] * 4


def test_commits_that_asv_would_not_show_are_refused(repository, capsys):
    git(repository, "checkout", "-q", "-b", "aside", "HEAD~2")
    git(repository, "commit", "-q", "--allow-empty", "-m", "aside")
    git(repository, "checkout", "-q", "main")
    assert "--commits: aside is not in the first-parent history of HEAD" in error(repository, capsys, "--commits", "aside")
    assert "--commits: nonsense is no commit" in error(repository, capsys, "--commits", "HEAD", "nonsense")
    assert "--backfill: at least 2" in error(repository, capsys, "--backfill", "1")
    assert "one of the arguments --add --backfill --commits is required" in error(repository, capsys)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform == "win32", reason="no other process can be sent a Ctrl-C of its own")
def test_backfill_goes_on_after_ctrl_c(repository, capsys):
    """It begins with the first commit that can be measured, and ends with the last landing, not with HEAD."""
    command = [sys.executable, "-m", "benchmarks.history", "--repository", str(repository), "--backfill", "3"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "[2 of 3]" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)  # asv is at work
    process.send_signal(signal.SIGINT)
    out = process.communicate()[0]
    assert process.returncode == 130 and "interrupted" in out
    assert set(results(repository)) == {"landing 1"}

    assert run(repository, "--backfill", "3") == 0
    assert "[1 of 2]" in capsys.readouterr().out
    assert set(results(repository)) == {"landing 1", "landing 2", "landing 5"}
    assert run(repository, "--backfill", "3") == 0
    assert capsys.readouterr().out.startswith("0 commits to measure")


def test_results_of_other_versions_do_not_count(repository):
    history = Repository(repository)
    write_results(repository, {git(repository, "rev-parse", "HEAD"): 0.1})
    assert history.measured(MACHINE["machine"]) == {}


def test_spread_takes_the_first_of_each_stretch_and_the_last_of_all():
    landings = [f"{k}" for k in range(10)]
    assert spread(landings, (), 4) == ["0", "2", "5", "9"]
    assert spread(landings, ("3", "8"), 4) == ["0", "5"]
    assert spread(landings[:2], (), 24) == ["0", "1"]


# The front page --------------------------------------------------------------------------------------


def test_the_front_page_names_its_newest_result_and_says_when_it_is_old(tmp_path):
    hashes = make_repository(tmp_path, [f"Commit {k}" for k in range(3)])
    write_results(tmp_path, dict.fromkeys(hashes, 0.1))
    date = f"{datetime.fromtimestamp(START + 2 * 3600, timezone.utc):%Y-%m-%d}"
    for n_since, is_old in ((0, False), (10, False), (11, True)):
        while int(git(tmp_path, "rev-list", "--count", f"{hashes[-1]}..HEAD")) < n_since:
            git(tmp_path, "commit", "-q", "--allow-empty", "-m", "later")
        dashboard.build(tmp_path, tmp_path / "site")
        page = (tmp_path / "site" / "index.html").read_text()
        assert f"newest result is of {date}, on the machine bench: commit <code>{hashes[-1][:8]}</code> Commit 2." in page
        assert f"<h2>{date}: times as fast as PyTorch eager</h2>" in page
        assert ("11 commits came after" in page) is is_old and ("results are old" in page) is is_old


def test_the_front_page_shows_one_machine_alone(tmp_path):
    """The one that was measured last; a regression that only another saw is not shown."""
    hashes = make_repository(tmp_path, [f"Commit {k}" for k in range(12)])
    results = tmp_path / "benchmarks" / "results" / "asv"
    write_results(tmp_path, {commit: 0.1 if k < 6 else 0.2 for k, commit in enumerate(hashes[:-1])})
    (results / "bench").rename(results / "other")
    for file in (results / "other").iterdir():
        file.write_text(file.read_text().replace('"machine": "bench"', '"machine": "other"'))
    write_results(tmp_path, dict.fromkeys(hashes, 0.3))
    dashboard.build(tmp_path, tmp_path / "site")
    found = read(tmp_path / "site" / "asv", tmp_path)
    assert json.loads((tmp_path / "site" / "asv" / "regressions.json").read_text())["regressions"]
    assert found.machine["machine"] == "bench" and found.n_commits == 12 and found.regressions == []
