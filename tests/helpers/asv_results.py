"""A repository with a made-up history and results as asv writes them, for the tests of what is made of results."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers.processes import ROOT

PROVIDERS, SHAPES, THREADS = ("fastxent out=", "fastxent torch"), ("32 x 10", "4096 x 8192"), ("1", "all")
PARAMS = [[f"'{value}'" for value in values] for values in (PROVIDERS, SHAPES, THREADS)]
RATIO = "speed.Ratio.track_ratio"
MACHINE = {"arch": "x86_64", "cpu": "made up", "machine": "bench", "num_cpu": "4", "os": "Linux", "ram": "8"}
START = 1_790_000_000  # seconds since 1970


def git(folder: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def make_repository(folder: Path, subjects: Sequence[str]) -> list[str]:
    """An hour from commit to commit; returns their hashes."""
    ignore = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=ignore)
    shutil.copy(ROOT / "asv.conf.json", folder)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    hashes = []
    for k, subject in enumerate(subjects):
        git(folder, "commit", "-q", "--allow-empty", "-m", subject, f"--date=@{START + 3600 * k}")
        hashes.append(git(folder, "rev-parse", "HEAD"))
    return hashes


def write_results(folder: Path, ratios: Mapping[str, float]) -> None:
    """Of each commit the ratio of the first combination of parameters; the k-th is 1 + k times that."""
    results = folder / json.loads((folder / "asv.conf.json").read_text())["results_dir"]
    (results / "bench").mkdir(parents=True)
    (results / "bench" / "machine.json").write_text(json.dumps({**MACHINE, "version": 1}))
    about = {"code": "", "name": RATIO, "param_names": ["provider", "shape", "threads"], "params": PARAMS}
    about |= {"type": "track", "unit": "x PyTorch eager", "version": "1"}
    never_run = {**about, "name": "speed.Time.time_never_run"}
    (results / "benchmarks.json").write_text(json.dumps({RATIO: about, never_run["name"]: never_run, "version": 2}))
    for k, (commit, ratio) in enumerate(ratios.items()):
        values = [ratio * (1 + i) for i in range(8)]
        document = {
            "commit_hash": commit, "env_name": "made-up", "date": 1000 * (START + 3600 * k), "python": "3.11",
            "params": {**MACHINE, "python": "3.11", "torch": "2.13.0"}, "requirements": {"torch": "2.13.0"}, "env_vars": {},
            "result_columns": ["result", "params", "version"], "results": {RATIO: [values, PARAMS, "1"]},
            "durations": {}, "version": 2,
        }  # fmt: skip
        (results / "bench" / f"{commit[:8]}-made-up.json").write_text(json.dumps(document))
