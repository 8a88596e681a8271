"""Results as tables: ``python -m benchmarks.report FILE`` prints them, ``--into TEXT ...`` writes them there.

FILE is what ``python -m benchmarks.compare --json FILE`` wrote. A text asks for a table by markers with its name; what
stands between them is replaced, so that no number in a README is typed by hand. Each table names FILE, so that a test can make
it again. The tables are ``speed``, the small one of the front page, ``times``, of all shapes, ``linear``, of a linear layer and
its loss, and ``bars``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import linear
from benchmarks.bars import IN_PLACE, OUT, TORCH, TORCH_IN_PLACE, TORCH_PEERS, Finding, Verdict, judge
from benchmarks.cases import GRAD, LOSS, SHAPES, Case
from benchmarks.measure import Group, Spread, ratio, spread

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("scikit-learn", "SciPy", "JAX", linear.UNCHUNKED, linear.CHUNKED)
EAGER, COMPILED = TORCH_PEERS
OURS = (TORCH, TORCH_IN_PLACE, OUT, IN_PLACE)
BEST_OTHER = "best other"
COLUMNS = (EAGER, COMPILED, BEST_OTHER, *OURS, "floor out=", "floor in place")
FRONT_COLUMNS = (EAGER, COMPILED, BEST_OTHER, TORCH, OUT, "floor out=")
FRONT = ((32, 10), (1024, 1000), (65536, 10), (4096, 8192), (1024, 128256), (16, 150, 128, 128))  # shapes of the front page
FRONT_OF_LINEAR = {linear.NUMPY: OUT, linear.NUMPY_FLOOR: "floor out="}  # the columns of a linear layer
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


def tables(document: Document, source: str) -> dict[str, str]:
    """Each table under its name; ``source`` is the file that the results stand in."""
    groups = {group["key"]: group for group in document["groups"]}
    shapes = [case for case in SHAPES if case.key in groups]
    verdicts = [verdict for verdict in judge(document["groups"]) if verdict.finding is not None]
    facts = dict(head(document))
    about = (
        f"Measured on {facts['machine']}, {document['threads']} threads, {document['started'][:10]} ({facts['versions']}): "
        f"`{source}`."
    )
    front = [case for case in shapes if case.extents in FRONT]
    lines = {
        "speed": _times(front, groups, FRONT_COLUMNS, _front_of_linear(groups)),
        "times": _times(shapes, groups, COLUMNS),
        "linear": _linear_times(groups),
        "bars": _table(BAR_COLUMNS, [bar_cells(verdict) for verdict in verdicts]),
    }
    return {name: "\n".join([*table, "", about]) for name, table in lines.items()}


def _times(
    cases: Sequence[Case], groups: Mapping[str, Group], columns: Sequence[str], more: Sequence[Sequence[str]] = ()
) -> list[str]:
    """A line a case, and ``more`` lines."""
    rows = [*([case.shape, *_time_cells(groups[case.key], columns)] for case in cases), *more]
    return _table(("shape", *columns), rows) if rows else [f"No {GRAD} case of the table was run."]


def _front_of_linear(groups: Mapping[str, Group]) -> list[list[str]]:
    """The cells of a linear layer on the front page, if it was run."""
    found = groups.get(linear.key_of(linear.SHAPE, "float32", GRAD))
    if found is None:
        return []
    entries = [{**entry, "name": FRONT_OF_LINEAR.get(entry["name"], entry["name"])} for entry in found["entries"]]
    shape = f"{' x '.join(map(str, linear.SHAPE))}, linear layer"
    return [[shape, *_time_cells({**found, "entries": entries}, FRONT_COLUMNS)]]


def _linear_times(groups: Mapping[str, Group]) -> list[str]:
    """A line a contestant: its time, in brackets by that of its products."""
    found = [groups.get(linear.key_of(linear.SHAPE, "float32", mode)) for mode in (GRAD, LOSS)]
    entries = [{} if group is None else {entry["name"]: entry for entry in group["entries"]} for group in found]
    names = dict.fromkeys(name for of_mode in entries for name in of_mode)
    rows = [[name, *(_by_floor(of_mode, name) for of_mode in entries)] for name in names]
    return _table((" x ".join(map(str, linear.SHAPE)), GRAD, LOSS), rows) if rows else ["No linear layer was run."]


def _by_floor(entries: Mapping[str, Mapping[str, Any]], name: str) -> str:
    if name not in entries:
        return "-"
    floor = entries.get(entries[name]["floor"])
    by_floor = f" ({ratio(entries[name]['samples'], floor['samples']).median:.3f} x)" if floor else ""
    return amount(entries[name]) + by_floor


def _time_cells(group: Group, columns: Sequence[str]) -> list[str]:
    """A line of a table of times."""
    entries = {entry["name"]: entry for entry in group["entries"]}
    peers = [entries[name] for name in TORCH_PEERS if name in entries]
    others = [entries[name] for name in OTHERS if name in entries]
    cells = {name: amount(entry) for name, entry in entries.items()}
    cells |= {name: _against(entries[name], peers) for name in OURS if name in entries}
    if others:
        other = min(others, key=_median)
        cells[BEST_OTHER] = f"{amount(other)} ({other['name']})"
    return [cells.get(name, "-") for name in columns]


def _against(ours: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> str:
    if not peers:
        return amount(ours)
    best = min(peers, key=_median)
    return f"{amount(ours)} ({digits(ratio(best['samples'], ours['samples']).median)} x)"


def _median(entry: Mapping[str, Any]) -> float:
    return spread(entry["samples"]).median


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def rewrite(text: str, blocks: Mapping[str, str]) -> str:
    """``text`` with each block between its markers, whatever was there."""
    found = 0
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, has_begin, rest = text.partition(begin)
        _, has_end, after = rest.partition(end)
        if has_begin and has_end:
            text = f"{before}{begin}\n{block}\n{end}{after}"
            found += 1
    if not found:
        raise ValueError(f"no <!-- NAME:begin --> with <!-- NAME:end --> after it, where NAME is one of {', '.join(blocks)}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Results as tables of Markdown.")
    parser.add_argument("file", type=Path, metavar="FILE", help="what benchmarks.compare --json wrote")
    parser.add_argument("--into", type=Path, nargs="+", metavar="TEXT", help="write between the markers of these files")
    args = parser.parse_args(argv)
    file = args.file.resolve()
    source = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name
    blocks = tables(json.loads(file.read_text()), source)
    if args.into is None:
        print("\n\n".join(blocks.values()))
    for text in args.into or ():
        text.write_text(rewrite(text.read_text(), blocks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
