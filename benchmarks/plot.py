"""``fastxent bench --plot FILE``: time against C and against N, and the roofline that no method can pass.

Colours are Okabe and Ito's, which the colour-blind can tell apart; markers and line ends say the same in black and white.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import UsageError
from benchmarks.bars import OUT, TORCH
from benchmarks.cases import GRAD, LOSS
from benchmarks.measure import Group, spread
from benchmarks.report import COMPILED, EAGER, head

FORMATS = (".png", ".svg", ".pdf")
ROOFLINE = "floor out="
# Name in the results: label, and style of the line; the last is drawn on top.
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    ROOFLINE: ("memory roofline: read the logits, write a gradient", {"color": "black", "linewidth": 1.2, "linestyle": "--"}),
    "SciPy": ("SciPy", {"color": "#999999", "marker": "v", "linewidth": 1.0}),
    "scikit-learn": ("scikit-learn", {"color": "#E69F00", "marker": "P", "linewidth": 1.0}),
    "JAX": ("JAX", {"color": "#CC79A7", "marker": "X", "linewidth": 1.0}),
    EAGER: ("PyTorch eager", {"color": "#D55E00", "marker": "s", "linewidth": 1.6}),
    COMPILED: ("torch.compile", {"color": "#56B4E9", "marker": "^", "linewidth": 1.6}),
    TORCH: ("fastxent, torch", {"color": "#0072B2", "marker": "o", "linewidth": 2.6}),
    OUT: ("fastxent, NumPy", {"color": "#009E73", "marker": "D", "linewidth": 2.6}),
}
NANOSECONDS = 1e9

Points = list[tuple[int, float, float, float]]  # extent, then nanoseconds an element: median and quartiles


def check_file(file: Path) -> None:
    """Before an hour is spent on measuring."""
    if file.suffix not in FORMATS:
        raise UsageError(f"--plot: {file} does not end in {', '.join(FORMATS)}")
    if not file.parent.is_dir():
        raise UsageError(f"--plot: there is no folder {file.parent}")


def draw(document: Mapping[str, Any], file: Path) -> None:
    """The gradient cases of two axes: rows that most of them share on the left, classes that most share on the right."""
    groups = [g for g in document["groups"] if g.get("case") and g["case"]["mode"] != LOSS and len(g["case"]["extents"]) == 2]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        drawn = _panel(left, groups, 0) + _panel(right, groups, 1)
        if drawn:
            left.set_ylim(min(drawn) / 2, max(drawn) * 2)
        left.set_ylabel("time of loss and gradient, nanoseconds an element")
        facts = dict(head(document))
        dtypes = ", ".join(sorted({g["case"]["dtype"] for g in groups}))
        figure.suptitle(f"Cross-entropy, {GRAD}, {dtypes}: {facts['machine']}, {document['threads']} threads", weight="bold")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(labels) or 1, frameon=False)
        figure.savefig(file, dpi=160)


def _panel(axes: Axes, groups: Sequence[Group], fixed: int) -> list[float]:
    """One extent (0: rows, 1: classes) has its commonest value, the other goes along x. Returns the heights of the lines."""
    if not groups:
        return []
    free = 1 - fixed
    [(value, _)] = Counter(g["case"]["extents"][fixed] for g in groups).most_common(1)
    chosen = sorted((g for g in groups if g["case"]["extents"][fixed] == value), key=lambda g: g["case"]["extents"][free])
    axes.set(xscale="log", yscale="log", xlabel=("N, rows", "C, classes")[free], title=f"{'NC'[fixed]} = {value}")
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_xticks([g["case"]["extents"][free] for g in chosen])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    heights: list[float] = []
    for name, (label, style) in LINES.items():
        points = _points(chosen, name, free)
        if not points:
            continue
        x, median, low, high = zip(*points, strict=True)
        heights += median
        axes.plot(x, median, label=label, markersize=5, **style)
        if name == ROOFLINE:
            axes.fill_between(x, median, 1e-9, color="0.88", zorder=0)
        else:
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return heights


def _points(groups: Sequence[Group], name: str, free: int) -> Points:
    points: Points = []
    for group in groups:
        n, c = extents = group["case"]["extents"]
        for entry in group["entries"]:
            if entry["name"] == name:
                median, low, high = (NANOSECONDS * t / (n * c) for t in spread(entry["samples"]))
                points.append((extents[free], median, low, high))
    return points
