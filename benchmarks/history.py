"""``python -m benchmarks.history``: adds commits to the committed history, which asv keeps and the dashboard shows.

    python -m benchmarks.history --add                 HEAD; part of every release
    python -m benchmarks.history --backfill 24         the first landing of each 24th of the history, and the last of all
    python -m benchmarks.history --commits A B C       these

asv checks each commit out and measures it with today's suites: the ratios that the front page shows, import and first call.
That takes about a minute a commit, on a machine on which nothing else runs. Then commit ``benchmarks/results/asv``. A commit
that has results of this machine and these versions is left out, so after Ctrl-C the same command goes on where it was; to
measure a commit again, remove its file.

A landing is a first-parent commit that changes the package: asv shows commits of the first-parent history only.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastxent as fx
from benchmarks import UsageError
from benchmarks.compare import BUSY, load
from benchmarks.published import RATIO, THREADS, combinations
from benchmarks.report import digits

ROOT = Path(__file__).resolve().parent.parent
MEASURED = (f"Ratio.*{THREADS}", "Start")  # patterns of asv benchmarks
FIRST = "def cross_entropy_value_and_grad"  # before the commit that brings this, there is nothing to measure


def main(argv: Sequence[str] | None = None) -> int:
    described = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=__doc__, formatter_class=described)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--add", action="store_true", help="measure HEAD; there must be no changes that are not committed")
    which.add_argument("--backfill", type=int, metavar="N", help="measure N landings, spread over the whole history")
    which.add_argument("--commits", nargs="+", metavar="COMMIT", help="measure these")
    parser.add_argument("--repository", type=Path, default=ROOT, help="whose asv.conf.json and history (default: this one)")
    args = parser.parse_args(argv)
    history = Repository(args.repository)
    machine = this_machine(history.results)
    done = history.measured(machine["machine"])
    try:
        wanted = choose(args, history, done)
    except UsageError as error:
        parser.error(str(error))
    return measure([commit for commit in wanted if commit not in done], history, machine)


# ----------------------------------------------------------------------------------------------------
# The repository and its history
# ----------------------------------------------------------------------------------------------------


class Repository:
    """A checkout with an asv.conf.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = json.loads((folder / "asv.conf.json").read_text())
        self.results = folder / self.settings["results_dir"]

    def git(self, *args: str) -> str:
        done = subprocess.run(["git", *args], cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"git {args[0]}: {done.stderr.strip() or 'failed'}")
        return done.stdout.strip()

    def changes(self) -> list[str]:
        """Files that HEAD has otherwise, or not at all; but for results, which are committed after they were measured."""
        others = f":(exclude){self.settings['results_dir']}"
        return [line.split(maxsplit=1)[1] for line in self.git("status", "--porcelain", "--", ".", others).splitlines()]

    def shown(self) -> list[str]:
        """The commits that asv shows, oldest first."""
        return self.git("rev-list", "--first-parent", "--reverse", "HEAD").split()

    def landings(self) -> list[str]:
        """Those that change the package and can be measured, oldest first."""
        changing = self.git("rev-list", "--first-parent", "--reverse", "HEAD", "--", "fastxent").split()
        with_first = self.git("log", "--first-parent", "--reverse", "--format=%H", "-S", FIRST, "--", "fastxent").split()
        if not with_first:
            raise UsageError(f"--backfill: no commit has {FIRST!r} in fastxent/")
        return changing[changing.index(with_first[0]) :]

    def commit(self, name: str) -> str:
        """The hash of a commit that asv shows."""
        try:
            found = self.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except UsageError:
            raise UsageError(f"--commits: {name} is no commit") from None
        if found not in self.shown():
            raise UsageError(f"--commits: {name} is not in the first-parent history of HEAD, and asv shows no others")
        return found

    def measured(self, machine: str) -> dict[str, Path]:
        """Commits that have results of this machine with today's versions, and the files that hold them."""
        versions = {name: version(name) for name in self.settings["matrix"]["req"]}
        found = {}
        for file in self.results.glob(f"{machine}/*-*.json"):
            result = json.loads(file.read_text())
            same = result["requirements"] == versions and platform.python_version().startswith(f"{result['python']}.")
            if same and RATIO in result["results"]:
                found[result["commit_hash"]] = file
        return found


def choose(args: argparse.Namespace, history: Repository, done: Collection[str]) -> list[str]:
    """The commits that the command line asks for, oldest first."""
    if args.add:
        if changes := history.changes():
            raise UsageError(f"--add: {', '.join(changes)}: not as in HEAD; commit it first, for it is HEAD that is measured")
        return [history.commit("HEAD")]
    if args.commits:
        named = {history.commit(name) for name in args.commits}
        return [commit for commit in history.shown() if commit in named]
    if args.backfill < 2:
        raise UsageError("--backfill: at least 2, the first landing and the last")
    return spread(history.landings(), done, args.backfill)


def spread(landings: Sequence[str], done: Collection[str], n: int) -> list[str]:
    """One of each of ``n`` equal stretches that has none yet: the first, and of the last stretch the last."""
    n = min(n, len(landings))
    stretches = [landings[k * len(landings) // n : (k + 1) * len(landings) // n] for k in range(n)]
    ends = [*(stretch[0] for stretch in stretches[:-1]), stretches[-1][-1]]
    return [end for end, stretch in zip(ends, stretches, strict=True) if not set(stretch) & set(done)]


def this_machine(results: Path) -> dict[str, str]:
    """What asv is to know of it. Its name is made of it, so that a machine of the same kind goes on with its history."""
    from asv.machine import Machine

    found, config = Machine.get_defaults(), fx.show_config()
    cpu = f"{found['cpu']}, {config['vectors']['widest register, bits']}-bit vectors"
    cores = str(config["cpu"]["cores available"])
    name = re.sub(r"[^a-z0-9]+", "-", f"{cpu} {cores} cores".lower())
    known = results / name / "machine.json"
    if known.exists():
        return {key: value for key, value in json.loads(known.read_text()).items() if key != "version"}
    # The system's version is left out: asv would begin a new history at each of them.
    ram = f"{round(int(found['ram']) / 2**30)} GiB"
    return {"machine": name, "cpu": cpu, "num_cpu": cores, "arch": found["arch"], "os": platform.system(), "ram": ram}


# ----------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------


def measure(commits: Sequence[str], history: Repository, machine: Mapping[str, str]) -> int:
    """One commit after the other, with a line for each. Exit code: 0; 1 if one could not be measured; 130 after Ctrl-C."""
    from asv.machine import MachineCollection

    # `asv machine` would keep only what differs from its own guesses.
    MachineCollection.save(machine["machine"], dict(machine))
    print(f"{len(commits)} commits to measure on {machine['machine']}", flush=True)
    if (load() or 0) > BUSY:
        print("other programs are running: do not trust these numbers")
    start, failed = time.perf_counter(), False
    for k, commit in enumerate(commits):
        print(f"[{k + 1} of {len(commits)}] {history.git('log', '-1', '--format=%h %cs %s', commit)}", flush=True)
        try:
            asv = run_asv(commit, history, machine["machine"])
        except KeyboardInterrupt:
            print("interrupted: the same command goes on with this commit")
            return 130
        file = history.measured(machine["machine"]).get(commit)
        if file is None or asv.returncode:
            failed = True
            print(f"{asv.stdout}{asv.stderr}")
        for line in outcome(json.loads(file.read_text())) if file else ["not measured: asv says why"]:
            print(f"    {line}")
        seconds = time.perf_counter() - start
        print(f"    {seconds / 60:.1f} min, {seconds / (k + 1) * (len(commits) - k - 1) / 60:.1f} to go", flush=True)
    if commits:
        print(f"now commit {history.settings['results_dir']}")
    return 1 if failed else 0


def run_asv(commit: str, history: Repository, machine: str) -> subprocess.CompletedProcess[str]:
    patterns = [word for pattern in MEASURED for word in ("--bench", pattern)]
    command = [sys.executable, "-m", "asv", "run", "-E", "checkout", "--machine", machine, *patterns, "HASHFILE:-"]
    return subprocess.run(command, cwd=history.folder, input=commit, capture_output=True, text=True)


def outcome(result: Mapping[str, Any]) -> Iterator[str]:
    """A line for each provider: how many times as fast as PyTorch eager it is."""
    ratios, params = result["results"][RATIO][:2]
    if ratios is None:
        yield "failed"
        return
    lines: dict[str, list[str]] = {}
    for (provider, shape, threads), ratio in zip(combinations(params), ratios, strict=True):
        if threads == THREADS:
            text = "failed" if ratio is None else "n/a" if math.isnan(ratio) else f"{digits(1 / ratio)} x"
            lines.setdefault(provider, []).append(f"{shape}: {text}")
    for provider, cells in lines.items():
        yield f"{provider}  {', '.join(cells)}"


if __name__ == "__main__":
    sys.exit(main())
