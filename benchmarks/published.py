"""What `asv publish` wrote, as the front page needs it: commits, the ratios to PyTorch over them, and regressions."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

RATIO = "speed.Ratio.track_ratio"
THREADS = "all"  # the front page shows what a user gets who sets nothing; asv's own pages show the rest


class Commit(NamedTuple):
    """One that has results, or that a regression lies at."""

    hash: str
    date: datetime
    subject: str

    @property
    def short(self) -> str:
        return self.hash[:8]


class Regression(NamedTuple):
    """A step up that asv found and that has not been undone."""

    benchmark: str
    first: Commit | None  # it came after this one; None: with ``last`` itself
    last: Commit
    before: float
    after: float

    @property
    def factor(self) -> float:
        return self.after / self.before


class Series(NamedTuple):
    """Time by PyTorch eager's, over the commits that were measured."""

    provider: str
    shape: str
    points: list[tuple[Commit, float]]


class History(NamedTuple):
    machine: Mapping[str, str]  # of the newest result: its name, cpu, os, versions
    series: list[Series]
    regressions: list[Regression]  # on this machine, newest first
    n_commits: int  # with results

    @property
    def newest(self) -> Commit:
        return max((commit for s in self.series for commit, _ in s.points), key=lambda commit: commit.date)


def read(published: Path, repository: Path) -> History:
    """The results of the machine and versions that were measured last."""
    index = json.loads((published / "index.json").read_text())
    commits = {int(revision): _commit(index, revision, repository) for revision in index["revision_to_hash"]}
    graphs = [(params, _graph(published, params)) for params in index["graph_param_list"]]
    measured = [(params, graph) for params, graph in graphs if graph]
    if not measured:
        raise LookupError(f"no results of {RATIO} in {published}")
    machine, graph = max(measured, key=lambda found: found[1][-1][0])
    series = []
    for k, (provider, shape, threads) in enumerate(combinations(index["benchmarks"][RATIO]["params"])):
        points = [(commits[revision], value) for revision, values in graph if (value := values[k]) is not None]
        if threads == THREADS and points:
            series.append(Series(provider, shape, points))
    return History(machine, series, _regressions(published, machine, commits), len(graph))


def commits_since(commit: Commit, repository: Path) -> int:
    """How many HEAD has that ``commit`` does not have."""
    count = subprocess.run(
        ["git", "rev-list", "--count", f"{commit.hash}..HEAD"], cwd=repository, check=True, capture_output=True, text=True
    )
    return int(count.stdout)


def _commit(index: Mapping[str, Any], revision: str, repository: Path) -> Commit:
    name = index["revision_to_hash"][revision]
    date = datetime.fromtimestamp(index["revision_to_date"][revision] / 1000, timezone.utc)
    subject = subprocess.run(["git", "log", "-1", "--format=%s", name], cwd=repository, capture_output=True, text=True)
    return Commit(name, date, subject.stdout.strip())


def combinations(params: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """asv's order of values; names are written as Python writes strings."""
    return [tuple(value.strip("'") for value in values) for values in itertools.product(*params)]


def _graph(published: Path, params: Mapping[str, str]) -> list[tuple[int, list[float | None]]]:
    """Revisions and their values, in order."""
    for file in published.glob(f"graphs/**/{RATIO}.json"):
        if _is_of(params, file.relative_to(published)):
            return [(revision, values) for revision, values in json.loads(file.read_text()) if values]
    return []


def _is_of(params: Mapping[str, str], graph: Path) -> bool:
    """asv names the folders of ``graphs/`` after the parameters of machine and versions, each in one folder."""
    return set(graph.parts[1:-1]) == {f"{key}-{value}" if value else key for key, value in params.items()}


def _regressions(published: Path, machine: Mapping[str, str], commits: Mapping[int, Commit]) -> list[Regression]:
    found = []
    for benchmark, graph, _, _, _, _, jumps in json.loads((published / "regressions.json").read_text())["regressions"]:
        if not _is_of(machine, Path(graph)):
            continue
        for first, last, before, after in jumps:
            found.append(Regression(benchmark, None if first is None else commits[first], commits[last], before, after))
    return sorted(found, key=lambda r: (r.last.date, r.factor), reverse=True)
