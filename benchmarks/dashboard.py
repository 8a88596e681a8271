"""``python -m benchmarks.dashboard``: the committed results as web pages; ``--serve`` shows them at http://localhost:8000.

A folder of static files that works under any path: ``index.html`` is ours and needs no script, ``asv/`` is what
``asv publish`` writes. asv's pages load jQuery, Flot and others from the net; ``--offline`` puts copies beside them, from npm.
"""

from __future__ import annotations

import argparse
import functools
import html
import http.server
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template

from benchmarks.bars import OUT
from benchmarks.published import RATIO, Commit, History, Regression, Series, commits_since, read
from benchmarks.report import digits

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_name("dashboard.html")
LATEST = 10  # regressions that are listed
NOISE = 1.15  # a smaller change from one commit to the next says nothing
OLD = 10  # commits since the newest result from which on the page says that it is old

# What asv's pages load from elsewhere: the file's name there, its package and its place in it.
SCRIPTS = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard", description=__doc__)
    parser.add_argument("--repository", type=Path, default=ROOT, help="whose asv.conf.json and results (default: this one)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: .asv/html)")
    parser.add_argument("--offline", action="store_true", help="copy what asv's pages load from the net; needs npm")
    parser.add_argument("--serve", type=int, nargs="?", const=8000, metavar="PORT", help="then show it (8000)")
    args = parser.parse_args(argv)
    site = args.out or args.repository / ".asv" / "html"
    build(args.repository, site)
    if args.offline:
        copy_scripts(site / "asv")
    print(site / "index.html")
    if args.serve is not None:
        serve(site, args.serve)
    return 0


def build(repository: Path, site: Path) -> None:
    """asv's pages, then ours."""
    published = site.resolve() / "asv"
    command = [sys.executable, "-m", "asv", "publish", "--html-dir", str(published)]
    subprocess.run(command, cwd=repository, check=True, stdout=subprocess.DEVNULL)
    leave_out_unmeasured(published)
    history = read(published, repository)
    (site / "index.html").write_text(page(history, commits_since(history.newest, repository)))


def leave_out_unmeasured(published: Path) -> None:
    """asv's pages would ask for graphs of benchmarks that no commit has results of."""
    index = json.loads((published / "index.json").read_text())
    measured = {file.stem for file in (published / "graphs" / "summary").glob("*.json")}
    index["benchmarks"] = {name: about for name, about in index["benchmarks"].items() if name in measured}
    (published / "index.json").write_text(json.dumps(index))


def serve(site: Path, port: int) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("localhost", port), handler) as server:
        print(f"http://localhost:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def copy_scripts(published: Path) -> None:
    """Replace asv's links to other hosts by copies. The copies are other builds of the same versions: no checksums."""
    with tempfile.TemporaryDirectory() as folder:
        packages = sorted({package for package, _ in SCRIPTS.values()})
        names = subprocess.run(["npm", "pack", "--silent", *packages], cwd=folder, check=True, capture_output=True, text=True)
        archives = dict(zip(packages, names.stdout.split(), strict=True))
        for name, (package, place) in SCRIPTS.items():
            with tarfile.open(Path(folder, archives[package])) as archive:
                source = archive.extractfile(f"package/{place}")
                assert source is not None, f"{package} has no {place}"
                with (published / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    index = published / "index.html"
    text = re.sub(r'(src|href)="https://[^"]*/([^"/]+)"[^>]*?(onerror="[^"]*")?>', _local, index.read_text())
    index.write_text(text)


def _local(link: re.Match[str]) -> str:
    attribute, name, on_error = link.groups()
    return f'{attribute}="{name}" {on_error or ""}>' if name in SCRIPTS else link[0]


# ----------------------------------------------------------------------------------------------------
# The front page
# ----------------------------------------------------------------------------------------------------


def page(history: History, n_since: int) -> str:
    """``n_since`` is the number of commits that HEAD has and the newest result does not."""
    shapes = list(dict.fromkeys(s.shape for s in history.series))
    newest, machine = history.newest, history.machine
    facts = [machine.get("cpu"), f"{machine['num_cpu']} cores" if machine.get("num_cpu") else None, machine.get("os")]
    facts += [f"{name} {machine[name]}" for name in ("python", "numba", "torch") if machine.get(name)]
    return Template(PAGE.read_text()).substitute(
        where=html.escape(", ".join(fact for fact in facts if fact)),
        newest=_commit_text(newest),
        date=f"{newest.date:%Y-%m-%d}",
        machine=html.escape(machine["machine"]),
        old=_old(newest, n_since) if n_since > OLD else "",
        n_commits=history.n_commits,
        tiles="\n".join(_tile(s) for shape in shapes for s in history.series if s.shape == shape),
        charts="\n".join(_chart([s for s in history.series if s.shape == shape], shape, history) for shape in shapes),
        regressions="\n".join(map(_row, history.regressions[:LATEST])) or '<tr><td colspan="5">none</td></tr>',
    )


def _commit_text(commit: Commit) -> str:
    return f"<code>{commit.short}</code> {html.escape(commit.subject)}"


def _old(newest: Commit, n_since: int) -> str:
    return (
        f'<p class="old" data-since="{n_since}">These results are old: {n_since} commits came after '
        f"<code>{newest.short}</code>. <code>python -m benchmarks.history --add</code> measures HEAD.</p>"
    )


def _tile(series: Series) -> str:
    """How many times as fast as PyTorch, and how that has changed since the commit before."""
    (_, now), *before = series.points[::-1]
    change = ""
    if before:
        faster = before[0][1] / now
        kind = "same" if 1 / NOISE < faster < NOISE else "faster" if faster > 1 else "slower"
        text = {"same": "as before", "faster": f"{digits(faster)} × faster", "slower": f"{digits(1 / faster)} × slower"}[kind]
        change = f'<span class="{kind}">{text}</span>'
    return (
        f'<div class="tile" data-provider="{series.provider}" data-shape="{series.shape}" data-ratio="{now!r}">'
        f"<b>{digits(1 / now)} ×</b>{html.escape(series.provider)}<br>{series.shape} {change}</div>"
    )


def _row(regression: Regression) -> str:
    r = regression
    cause = _commit_text(r.last) + (f", or one after <code>{r.first.short}</code>" if r.first else "")
    link = f"asv/index.html#{r.benchmark.partition('(')[0]}"
    return (
        f'<tr data-commit="{r.last.hash}"><td>{r.last.date:%Y-%m-%d}</td><td>{cause}</td>'
        f'<td><a href="{link}">{html.escape(r.benchmark)}</a></td>'
        f"<td>{r.before:.3g} → {r.after:.3g}</td><td>{digits(r.factor)} ×</td></tr>"
    )


# A chart in user units of SVG
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 240, 46, 14, 12, 40


def _chart(series: Sequence[Series], shape: str, history: History) -> str:
    """Time by PyTorch's over the commits, both axes labelled; a commit with a regression has a line through it."""
    marked = {r.last.hash for r in history.regressions if r.benchmark.startswith(RATIO) and repr(shape) in r.benchmark}
    commits = sorted({commit for s in series for commit, _ in s.points}, key=lambda commit: commit.date)
    values = [value for s in series for _, value in s.points]
    x_of = {c.hash: LEFT + (WIDTH - LEFT - RIGHT) * (k + 0.5) / len(commits) for k, c in enumerate(commits)}
    low, high = min(values) / 1.4, max(values) * 1.4
    y_of = _log_scale(low, high)
    parts = []
    for tick in _ticks(low, high):
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>')
    for c in commits:
        x = x_of[c.hash]
        if c.hash in marked:
            parts.append(f'<line class="regression" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        every = math.ceil(len(commits) / 8)
        if commits.index(c) % every == 0:
            parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{c.short[:7]}</text>')
    for s in series:
        kind = "numpy" if s.provider == OUT else "torch"
        line = " ".join(f"{x_of[c.hash]:.1f},{y_of(value):.1f}" for c, value in s.points)
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
        parts += [_point(kind, s, c, value, x_of[c.hash], y_of(value)) for c, value in s.points]
    label = f"time by PyTorch eager's at {shape}, over {len(commits)} commits"
    return (
        f'<figure><figcaption>{shape}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        + "".join(parts)
        + f'<text class="x" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}">commits, oldest first</text></svg></figure>'
    )


def _point(kind: str, series: Series, commit: Commit, value: float, x: float, y: float) -> str:
    """Its exact value is kept in the page; the title is shown under the mouse."""
    text = f"{series.provider}: {value:.3g} of PyTorch's time\n{commit.short} {commit.subject}"
    data = f'data-provider="{series.provider}" data-shape="{series.shape}" data-commit="{commit.hash}" data-value="{value!r}"'
    title = f"<title>{html.escape(text)}</title>"
    if kind == "numpy":
        return f'<rect class="{kind}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {data}>{title}</rect>'
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5" {data}>{title}</circle>'


def _log_scale(low: float, high: float) -> Callable[[float], float]:
    """Values to heights: equal factors are equal distances."""
    span = math.log(high / low)
    return lambda value: TOP + (HEIGHT - TOP - BOTTOM) * math.log(high / value) / span


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for p in powers for m in (1, 2, 5) if low <= (tick := float(f"{m}e{p}")) <= high]


if __name__ == "__main__":
    sys.exit(main())
