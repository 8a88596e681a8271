"""What a run shows on the screen: progress while it goes on, tables of what it found.

Nothing is drawn by a thread, which would take a core from what is timed: the bar moves when it is told to, between samples.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from benchmarks.bars import TORCH, judge
from benchmarks.cases import GRAD
from benchmarks.measure import Group, Progress, Spread, ratio, spread
from benchmarks.report import BAR_COLUMNS, COMPILED, EAGER, amount, bar_cells, digits, duration, head, quartiles

WIDTH = 200  # of the output, where it is no terminal
COLUMNS = ("", "time", "quartiles", "GB/s", "of roofline", "vs eager", "vs compile")
CAPTION = (
    "GB/s: the bytes that any method has to move, by the time. Of roofline: the time of the floor, the fastest loop that moves "
    "as much memory, by the time. Vs: how many times as fast as PyTorch eager and torch.compile. Ratios are taken pair by "
    "pair: median (quartiles)."
)


class Screen:
    """Standard output, and a bar on the terminal if there is one."""

    def __init__(self) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
        self.rich = self.console.is_terminal
        self._told: set[tuple[str, str]] = set()  # who is missing and why: said once
        terminal = self.console if self.rich else Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        self._bar = Bar(*columns, console=terminal, disable=not terminal.is_terminal, auto_refresh=False, transient=True)

    @contextmanager
    def progress(self, total: int) -> Iterator[None]:
        """A bar for so many jobs."""
        self._task = self._bar.add_task("", total=total)
        with self._bar:
            yield

    def job(self, done: int, title: str) -> Progress:
        """What a job calls to say how far it is."""

        def progress(text: str, share: float = 0.0) -> None:
            self._bar.update(self._task, completed=done + share, description=f"{title}: {text}", refresh=True)

        return progress

    def head(self, document: dict[str, Any]) -> None:
        for name, text in head(document):
            self.console.print(f"{name:<9} {text}")

    def title(self, text: str) -> None:
        self.console.print()
        self.console.print(Text(text, style="bold"))  # as a style of print it would colour the bar too

    def group(self, group: Group) -> None:
        n = max((len(entry["samples"]) for entry in group["entries"]), default=0)
        self.title(group["title"])
        self.console.print(f"{group['reason']} ({n} samples)")
        self.console.print(self.group_table(group))
        for missing in group["missing"].items():
            if missing not in self._told:
                self._told.add(missing)
                self.console.print("  missing: " + ": ".join(missing))

    def tail(self, groups: Sequence[Group], with_bars: bool) -> None:
        """What is made of all groups."""
        if with_bars:
            self.title("bars")
            self.console.print(self.bars_table(groups))
        self.console.print(f"\n{CAPTION}")
        rows = summary(groups)
        if rows:
            self.title(f"{TORCH}, {GRAD}")
            self.console.print(self.table(SUMMARY_COLUMNS, rows))

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()) -> Table:
        """With rules on a terminal, in plain columns elsewhere; columns without a cell are left out."""
        table = Table(box=box.SIMPLE_HEAD if self.rich else None, header_style="bold" if self.rich else "")
        used = [i for i in range(len(titles)) if i == 0 or any(row[i] for row in rows)]
        for i in used:
            table.add_column(titles[i], justify="right" if i else "left", no_wrap=True)
        for k, row in enumerate(rows):
            table.add_row(*(Text(row[i]) for i in used), style=styles[k] if styles and self.rich else "")
        return table

    def group_table(self, group: Group) -> Table:
        """Ours, peers and floors."""
        styles = [{"ours": "bold", "floor": "dim"}.get(entry["kind"], "") for entry in group["entries"]]
        return self.table(COLUMNS, group_rows(group), styles)

    def bars_table(self, groups: Sequence[Group]) -> Table:
        verdicts = judge(groups)
        styles = ["red" if v.must is False else "" for v in verdicts]
        table = self.table(BAR_COLUMNS, [bar_cells(v) for v in verdicts], styles)
        for column in table.columns:
            column.justify, column.no_wrap = "left", not self.rich
        return table


def group_rows(group: Group) -> list[list[str]]:
    samples = {entry["name"]: entry["samples"] for entry in group["entries"]}
    rows = []
    for entry in group["entries"]:
        mine = entry["samples"]
        s = spread(mine)
        in_seconds = entry["unit"] == "s"
        rows.append([
            entry["name"],
            amount(entry),
            f"{duration(s.low)} - {duration(s.high)}" if in_seconds else f"{s.low:.3f} - {s.high:.3f}",
            digits(entry["bytes"] / s.median / 1e9) if entry["bytes"] else "",
            share(ratio(samples[entry["floor"]], mine)) if samples.get(entry["floor"]) else "",
            *(quartiles(ratio(samples[peer], mine)) if peer in samples else "" for peer in (EAGER, COMPILED)),
        ])  # fmt: skip
    return rows


SUMMARY_COLUMNS = ("", EAGER, COMPILED, TORCH, "of roofline", "vs eager", "vs compile")


def summary(groups: Sequence[Group]) -> list[list[str]]:
    """A line a case: what a user of PyTorch has and gets. Cases without fastxent's torch function are left out."""
    lines = []
    for group in groups:
        entries = {entry["name"]: entry for entry in group["entries"]}
        if TORCH not in entries or group.get("case", {}).get("mode") != GRAD:
            continue
        cells = dict(zip(COLUMNS, group_rows(group)[list(entries).index(TORCH)], strict=True))
        peers = [amount(entries[name]) if name in entries else "" for name in (EAGER, COMPILED)]
        title = group["title"].removesuffix(f", {GRAD}")
        lines.append([title, *peers, *(cells[name] for name in ("time", "of roofline", "vs eager", "vs compile"))])
    return lines


def share(s: Spread) -> str:
    return f"{quartiles(Spread(*(100 * x for x in s)))} %"
