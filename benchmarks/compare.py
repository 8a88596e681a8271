"""``python -m benchmarks.compare``: fastxent, its peers and the streaming floor, interleaved in one process.

Without arguments four shapes, in about a minute; ``--all`` measures the whole table and judges it by the bars.
Exit code: 0; 1 if a provider failed or was wrong; 130 if interrupted (what was measured until then is kept).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import fastxent as fx
from benchmarks import whole
from benchmarks.bars import beside, judge
from benchmarks.cases import CASES, HEADLINE, LOSS, SHORT, Case, case_of
from benchmarks.measure import NORMAL, QUICK, THOROUGH, Effort, Group, Progress, ratio, run_group, spread, threads
from benchmarks.report import BAR_COLUMNS, COMPILED, EAGER, amount, bar_cells, digits, duration, head, quartiles

Job = tuple[str, Callable[[Progress], Group]]

BUSY = 1.0  # load average from which on others disturb
WIDTH = 200  # of the output, where it is no terminal
COLUMNS = ("", "time", "quartiles", "GB/s", "time / floor", "eager / time", "compile / time")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    for module in ("torch", "fastxent.torch"):  # before anything is timed: the pool of threads is PyTorch's, once it is there
        try:
            __import__(module)
        except Exception:  # shown as missing, with the reason
            break
    n_threads = args.threads or fx.get_num_threads()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    document: dict[str, Any] = {
        "format": 1,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": list(sys.argv[1:] if argv is None else argv),
        "threads": n_threads,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "config": config(),
        "groups": [],
        "interrupted": False,
    }
    for name, text in head(document):
        console.print(f"{name:<9} {text}", highlight=False, markup=False)
    if (document["load"] or 0) > BUSY:
        console.print("other programs are running: do not trust these times")
    start = time.perf_counter()
    with threads(n_threads):
        run(jobs(args, n_threads), document, console)
    if args.all:
        console.print("\nbars", style="bold")
        console.print(bars_table(document["groups"], console.is_terminal))
    document["seconds"] = round(time.perf_counter() - start, 1)
    console.print(f"{document['seconds']:.0f} s" + (", interrupted" if document["interrupted"] else ""))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    broken = any(r.startswith(("WRONG", "failed")) for group in document["groups"] for r in group["missing"].values())
    return 130 if document["interrupted"] else int(broken)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="the whole table, and the bars; takes a quarter of an hour or more")
    what.add_argument("--shape", nargs="+", type=extents, metavar="N,C", help="these shapes only; N,C,d1,... is channels first")
    parser.add_argument("--quick", action="store_true", help="few rounds, and no torch.compile, which takes long to compile")
    parser.add_argument("--threads", type=positive, metavar="n", help="for everyone (default: what fastxent and PyTorch take)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample")
    return parser.parse_args(argv)


def extents(text: str) -> tuple[int, ...]:
    numbers = tuple(positive(part) for part in text.split(","))
    if len(numbers) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} has no number of classes: N,C")
    return numbers


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def config() -> dict[str, Any]:
    """fastxent's, and the versions of those that only a benchmark knows."""
    found = fx.show_config()
    for package in ("jax", "ml_dtypes"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            pass
    return found


# ----------------------------------------------------------------------------------------------------
# What is run
# ----------------------------------------------------------------------------------------------------


def jobs(args: argparse.Namespace, n_threads: int) -> list[Job]:
    effort = QUICK if args.quick else THOROUGH if args.all else NORMAL
    leave_out = {COMPILED: "left out by --quick"} if args.quick else {}
    if args.all:
        cases: Sequence[Case] = CASES
    elif args.shape:
        cases = [replace(case_of(shape), mode=mode) for shape in args.shape for mode in (case_of(shape).mode, LOSS)]
    else:
        cases = [*SHORT, replace(HEADLINE, mode=LOSS)]
    return [
        *(_case_job(case, n_threads, effort, leave_out) for case in cases),
        *(_whole_jobs(n_threads, effort) if args.all else ()),
    ]


def _case_job(case: Case, n_threads: int, effort: Effort, leave_out: Mapping[str, str]) -> Job:
    def run(progress: Progress) -> Group:
        return run_group(case, n_threads, effort, beside=beside(case), leave_out=leave_out, progress=progress)

    return case.key, run


def _whole_jobs(n_threads: int, effort: Effort) -> list[Job]:
    return [
        ("threads", lambda progress: whole.run_threads(n_threads, effort, progress)),
        ("training step", lambda progress: whole.run_step(n_threads, effort, progress)),
        ("start", whole.run_start),
        ("memory", whole.run_memory),
    ]


def _show(label: str, text: str) -> None:
    """What a job does now, in one line on a terminal. No spinner: its thread would take a core from what is timed."""
    if sys.stderr.isatty():
        line = f"{label}{text}"[: shutil.get_terminal_size().columns - 1]
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def run(work: Sequence[Job], document: dict[str, Any], console: Console) -> None:
    """Run and show one group after the other."""
    try:
        for k, (title, job) in enumerate(work):
            done = job(partial(_show, f"[{k + 1}/{len(work)}] {title}: "))
            _show("", "")
            document["groups"].append(done)
            n = max((len(entry["samples"]) for entry in done["entries"]), default=0)
            console.print(f"\n{done['title']}", style="bold", highlight=False, markup=False)
            console.print(f"{done['reason']} ({n} samples)", highlight=False, markup=False)
            console.print(group_table(done, console.is_terminal))
            for name, reason in done["missing"].items():
                console.print(f"  missing: {name}: {reason}", highlight=False, markup=False)
    except KeyboardInterrupt:
        document["interrupted"] = True
        _show("", "")


# ----------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------


def _table(rich: bool) -> Table:
    """With rules on a terminal, in plain columns elsewhere."""
    return Table(box=box.SIMPLE_HEAD if rich else None, header_style="bold" if rich else "")


def group_table(group: Group, rich: bool) -> Table:
    """Ours, peers and floors. Right of the bandwidth, ratios pair by pair: median and quartiles."""
    samples = {entry["name"]: entry["samples"] for entry in group["entries"]}
    rows = []
    for entry in group["entries"]:
        name, mine = entry["name"], entry["samples"]
        s = spread(mine)
        in_seconds = entry["unit"] == "s"
        rows.append([
            name,
            amount(entry),
            f"{duration(s.low)} - {duration(s.high)}" if in_seconds else f"{s.low:.3f} - {s.high:.3f}",
            digits(entry["bytes"] / s.median / 1e9) if entry["bytes"] else "",
            quartiles(ratio(mine, samples[entry["floor"]])) if samples.get(entry["floor"]) else "",
            *(quartiles(ratio(samples[peer], mine)) if peer in samples else "" for peer in (EAGER, COMPILED)),
        ])  # fmt: skip
    table = _table(rich)
    used = [i for i in range(len(COLUMNS)) if i == 0 or any(row[i] for row in rows)]
    for i in used:
        table.add_column(COLUMNS[i], justify="right" if i else "left", no_wrap=True)
    for entry, row in zip(group["entries"], rows, strict=True):
        style = {"ours": "bold", "floor": "dim"}.get(entry["kind"], "") if rich else ""
        table.add_row(*(row[i] for i in used), style=style)
    return table


def bars_table(groups: Sequence[Group], rich: bool) -> Table:
    table = _table(rich)
    for title in BAR_COLUMNS:
        table.add_column(title, no_wrap=not rich)
    for v in judge(groups):
        table.add_row(*bar_cells(v), style="red" if rich and v.must is False else "")
    return table


if __name__ == "__main__":
    sys.exit(main())
