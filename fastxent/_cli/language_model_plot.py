"""The picture of ``fastxent demo --language-model``: the losses on one another, then time and memory side by side."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastxent._cli.language_model import LIMIT, Result
from fastxent._cli.output import CommandError

FORMATS = (".png", ".svg", ".pdf")
COLOURS = {"PyTorch": "#D55E00", "fastxent": "#0072B2"}  # of Okabe and Ito, which the colour-blind can tell apart


def check_file(file: Path) -> None:
    """Raise an error, before minutes are spent on training, if no picture can be written there."""
    if file.suffix not in FORMATS:
        raise CommandError(f"--language-model: {file} does not end in {', '.join(FORMATS)}")
    if not file.parent.is_dir():
        raise CommandError(f"--language-model: there is no folder {file.parent}")


def draw(result: Result, file: Path) -> None:
    sizes, plain, ours = result.sizes, result.plain, result.ours
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        curve, time, memory = figure.subplots(1, 3, width_ratios=(2, 1, 1))
        for training, width in ((plain, 6.0), (ours, 1.5)):  # the thin line lies on the wide one
            steps = range(1, len(training.losses) + 1)
            curve.plot(steps, training.losses, label=training.name, color=COLOURS[training.name], linewidth=width)
        curve.set(xlabel="step", ylabel="loss, nats a word")
        relation = "within" if result.passed else "NOT within"
        curve.set_title(f"the same loss: {result.difference:.1e} apart, {relation} {LIMIT:.0e}")
        curve.legend(frameon=False)
        _bars(time, "time of a step, ms", 1e3 * plain.step_seconds, 1e3 * ours.step_seconds)
        _bars(memory, "peak of resident memory, MB", plain.peak_memory / 1e6, ours.peak_memory / 1e6)
        figure.suptitle(
            f"A language model with a head of {sizes.words} words on the sources of Python's standard library: "
            f"{sizes.steps} steps of {sizes.tokens} tokens",
            weight="bold",
        )
        figure.savefig(file, dpi=160)


def _bars(axes: Axes, title: str, plain: float, ours: float) -> None:
    bars = axes.bar(list(COLOURS), [plain, ours], color=list(COLOURS.values()), width=0.6)
    axes.bar_label(bars, labels=[f"{plain:.0f}", f"{ours:.0f}\n{ours / plain:.2f} x"])
    axes.set_title(title)
    axes.margins(y=0.15)
