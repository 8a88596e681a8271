"""Results as text: ``python -m benchmarks.report FILE`` prints the README's tables, ``--into README.md`` writes them there.

FILE is what ``python -m benchmarks.compare --json FILE`` wrote. The text between the two markers is replaced, so that no
number in the README is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import IN_PLACE, OUT, TORCH, TORCH_IN_PLACE, Finding, Verdict, judge
from benchmarks.cases import GRAD, SHAPES
from benchmarks.measure import Group, Spread, ratio, spread

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OTHERS = ("scikit-learn", "SciPy", "JAX")
EAGER, COMPILED = "PyTorch eager", "torch.compile"
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))

Document = Mapping[str, Any]


# ----------------------------------------------------------------------------------------------------
# Numbers as text
# ----------------------------------------------------------------------------------------------------


def digits(x: float) -> str:
    """Three significant digits, and never an exponent."""
    return f"{x:.0f}" if abs(x) >= 99.95 else f"{x:.1f}" if abs(x) >= 9.995 else f"{x:.2f}"


def duration(seconds: float) -> str:
    factor, unit = next((u for u in UNITS if seconds >= 0.9995 * u[0]), UNITS[-1])
    return f"{digits(seconds / factor)} {unit}"


def amount(entry: Mapping[str, Any]) -> str:
    """The median of an entry, in its unit."""
    median = spread(entry["samples"]).median
    return duration(median) if entry["unit"] == "s" else f"{median:.3f} {entry['unit']}"


def quartiles(s: Spread) -> str:
    return f"{digits(s.median)} ({digits(s.low)}-{digits(s.high)})"


def measured(finding: Finding, unit: str) -> str:
    text = f"{quartiles(finding.spread)} {unit}"
    if finding.against:
        text += f", {finding.against}"
    return f"{text} ({', '.join(finding.absent)} missing)" if finding.absent else text


def bound(verdict: Verdict, value: float | None) -> str:
    return "" if value is None else f"{'>=' if verdict.bar.at_least else '<='} {value:g}"


def mark(passed: bool | None, bound: float | None) -> str:
    return "" if bound is None else "open" if passed is None else "pass" if passed else "MISS"


BAR_COLUMNS = ("case", "what", "measured", "must", "", "aim", "")


def bar_cells(v: Verdict) -> list[str]:
    """A line of the table of bars."""
    found = measured(v.finding, v.bar.unit) if v.finding else f"not measured: {v.reason}"
    return [
        v.bar.row,
        v.bar.what,
        found,
        bound(v, v.bar.must),
        mark(v.must, v.bar.must),
        bound(v, v.bar.aim),
        mark(v.aim, v.bar.aim),
    ]


def head(document: Document) -> list[tuple[str, str]]:
    """Machine, versions, conditions."""
    config = document["config"]
    load = "unknown" if document["load"] is None else f"{document['load']:.1f}"
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    return [
        ("machine", f"{config['cpu']['model']}, {config['cpu']['cores available']} cores"),
        ("vectors", f"{config['vectors']['widest register, bits']} bits"),
        ("threads", f"{document['threads']}, {config['threads']['pool']}"),
        ("versions", versions),
        ("started", f"{document['started']}, load average {load}"),
    ]


# ----------------------------------------------------------------------------------------------------
# Markdown
# ----------------------------------------------------------------------------------------------------


def markdown(document: Document) -> str:
    """The tables of the README."""
    facts = dict(head(document))
    lines = [
        f"Loss and gradient of float32 logits, mean over the rows: medians of interleaved runs on {facts['machine']}, "
        f"{document['threads']} threads, {document['started'][:10]} ({facts['versions']}). In brackets: times as fast as the "
        "faster of PyTorch eager and torch.compile. Floor: the fastest loop that reads as much and writes as much.",
        "",
        *_times(document["groups"]),
    ]
    verdicts = [v for v in judge(document["groups"]) if v.finding is not None]
    if verdicts:
        lines += ["", "The bars of this project, met or not (median, quartiles):", "", *_bars(verdicts)]
    return "\n".join(lines)


def _times(groups: Sequence[Group]) -> list[str]:
    by_key = {group["key"]: group for group in groups}
    rows = []
    for case in SHAPES:
        if case.key not in by_key:
            continue
        entries = {entry["name"]: entry for entry in by_key[case.key]["entries"]}
        other = min((entries[n] for n in OTHERS if n in entries), key=lambda e: spread(e["samples"]).median, default=None)
        peers = [entries[name] for name in (EAGER, COMPILED) if name in entries]
        rows.append([
            case.shape,
            *(amount(entries[name]) if name in entries else "-" for name in (EAGER, COMPILED)),
            f"{amount(other)} ({other['name']})" if other else "-",
            *(_against(entries.get(name), peers) for name in (TORCH, TORCH_IN_PLACE, OUT, IN_PLACE)),
            " / ".join(amount(entries[name]) if name in entries else "-" for name in ("floor out=", "floor in place")),
        ])  # fmt: skip
    titles = ["shape", EAGER, COMPILED, "best other", TORCH, TORCH_IN_PLACE, OUT, IN_PLACE, "floor: out= / in place"]
    return _table(titles, rows) if rows else [f"No {GRAD} case of the table was run."]


def _against(ours: Mapping[str, Any] | None, peers: Sequence[Mapping[str, Any]]) -> str:
    if ours is None:
        return "-"
    if not peers:
        return amount(ours)
    best = min(peers, key=lambda e: spread(e["samples"]).median)
    return f"{amount(ours)} ({digits(ratio(best['samples'], ours['samples']).median)} x)"


def _bars(verdicts: Sequence[Verdict]) -> list[str]:
    return _table(BAR_COLUMNS, [bar_cells(verdict) for verdict in verdicts])


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def rewrite(text: str, tables: str) -> str:
    """``text`` with ``tables`` between the markers, whatever was there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} with {END} after it")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Results as the tables of the README.")
    parser.add_argument("file", type=Path, metavar="FILE", help="what benchmarks.compare --json wrote")
    parser.add_argument("--into", type=Path, metavar="README", help="write between the markers of this file")
    args = parser.parse_args(argv)
    tables = markdown(json.loads(args.file.read_text()))
    if args.into is None:
        print(tables)
    else:
        args.into.write_text(rewrite(args.into.read_text(), tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
