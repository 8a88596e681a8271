"""The output of the commands: tables, JSON, a progress bar, and one line when they fail."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fastxent._cli.demo import Result, Step
    from fastxent._cli.evaluate import Evaluation
    from fastxent._cli.language_model import Result as Trainings


class CommandError(Exception):
    """An error that ends the command with one line on stderr and exit code 2."""


def evaluation_table(result: Evaluation) -> str:
    rows = {
        "loss": f"{result.loss:.6f}",
        "perplexity": f"{result.perplexity:.6g}",
        "top-1 accuracy": f"{result.top1_accuracy:.2%}",
        "top-5 accuracy": f"{result.top5_accuracy:.2%}",
        "mean entropy": f"{result.entropy:.6f} nats",
        "calibration error": f"{result.calibration_error:.4f}",
        "rows": f"{result.rows:,}, {result.kept_rows:,} kept",
        "logits": f"{result.dtype}, {result.classes:,} classes",
        "time": f"{result.seconds:.3g} s, {result.gb_per_s:.3g} GB/s",
    }
    if result.nonfinite_rows:
        rows["not finite"] = f"the loss of {result.nonfinite_rows:,} rows"
    return _table({"": rows})


def config_table(config: Mapping[str, Any]) -> str:
    sections: dict[str, Mapping[str, Any]] = {"": {k: v for k, v in config.items() if not isinstance(v, Mapping)}}
    sections |= {k: v for k, v in config.items() if isinstance(v, Mapping)}
    return _table(sections)


def _table(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return two columns, names and values; each section but the one named "" is listed under its name.

    The table is plain text: it is copied into bug reports, and needs no package that may be missing.

    >>> print(_table({"": {"rows": 3}, "threads": {"default": 2, "cores": [0, 1]}}))
    rows       3
    threads
      default  2
      cores    0, 1
    """
    rows: list[tuple[str, str]] = []
    for title, facts in sections.items():
        if title and facts:
            rows.append((title, ""))
        for name, value in facts.items():
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((f"  {name}" if title else name, text))
    width = max((len(name) for name, text in rows if text), default=0)
    return "\n".join(_printable(f"{name:<{width}}  {text}".rstrip()) for name, text in rows)


def _printable(line: str) -> str:
    """Return a line with escape codes for what the output's encoding lacks: names of files may hold any bytes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def print_json(facts: Mapping[str, Any]) -> None:
    import json

    print(json.dumps(_finite(facts), allow_nan=False))


def _finite(value: Any) -> Any:
    """Return a value with None in place of nan and inf, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(message: str) -> str:
    """Return the message without line breaks or escape codes: part of it may come from a hostile file.

    >>> one_line("a name\\n with \\x1b[31m")
    'a name with \\\\x1b[31m'
    """
    message = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


@contextlib.contextmanager
def needs_extra(extra: str = "cli", packages: Sequence[str] = ("rich", "scipy", "sklearn")) -> Iterator[None]:
    """Turn a failed import of an extra's package, within this context, into an error that says what to install."""
    try:
        yield
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in packages:
            raise
        raise CommandError(f"{missing} is missing: pip install 'fastxent[{extra}]'") from error


def console() -> Console:
    with needs_extra():
        from rich.console import Console

        return Console(highlight=False)


@contextlib.contextmanager
def progress(unit: str) -> Iterator[Callable[..., None] | None]:
    """Yield a function (done, total[, name]) that moves a bar on stderr, or None without a terminal or rich."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        yield None
        return

    columns: tuple[progress.ProgressColumn, ...] = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
    )
    if unit == "bytes":
        columns += (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    else:
        columns += (progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing", total=None)  # total=None: a bar without a known end

        def update(done: int, total: int, name: str = "") -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield update


# The demos ------------------------------------------------------------------------------------------------


def run_live(run: Callable[..., Result], folder: Any, console: Console) -> Result:
    """Train while a table shows the progress: the iterations that are powers of two, and the latest."""
    from rich.live import Live
    from rich.table import Table

    steps: list[Step] = []

    def table() -> Table:
        table = Table(title="softmax regression on handwritten digits, L-BFGS")
        if not steps:
            table.caption = "compiling the kernels, the first time only"
        for column in ("iteration", "loss", "train accuracy", "test accuracy"):
            table.add_column(column, justify="right")
        for step in steps:
            if step.iteration & (step.iteration - 1) == 0 or step is steps[-1]:
                accuracies = f"{step.train_accuracy:.2%}", f"{step.test_accuracy:.2%}"
                table.add_row(str(step.iteration), f"{step.loss:.10f}", *accuracies)
        return table

    if not console.is_terminal:
        result = run(folder, steps.append)
        console.print(table())
        return result

    with Live(table(), console=console) as live:

        def on_step(step: Step) -> None:
            steps.append(step)
            live.update(table())

        return run(folder, on_step)


def print_demo(console: Console, result: Result) -> None:
    from rich.table import Table

    console.print(f"loss with fastxent      {result.loss:.12f}")
    console.print(f"loss with scikit-learn  {result.sklearn_loss:.12f}")
    table = Table(title="against scikit-learn")
    for column in ("", "difference", "limit", ""):
        table.add_column(column, justify="right" if column else "left")
    for check in result.checks:
        verdict = "[green]ok[/]" if check.passed else "[bold red]FAILED[/]"
        table.add_row(check.name, f"{check.difference:.1e}", f"{check.limit:.0e}", verdict)
    console.print(table)
    console.print("fastxent evaluate logits.npy targets.npy (the test set):")
    console.print(evaluation_table(result.evaluation), markup=False)


def print_trainings(console: Console, result: Trainings, limit: float) -> None:
    from rich.table import Table

    plain, ours, sizes = result.plain, result.ours, result.sizes
    table = Table(title=f"a language model with a head of {sizes.words} words, {sizes.steps} steps of {sizes.tokens} tokens")
    for column in ("", plain.name, ours.name, "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, index in (("loss of the first step", 0), ("loss of the last step", -1)):
        table.add_row(name, f"{plain.losses[index]:.7f}", f"{ours.losses[index]:.7f}")
    for name, a, b in (
        ("time of a step, ms", 1e3 * plain.step_seconds, 1e3 * ours.step_seconds),
        ("peak of resident memory, MB", plain.peak_memory / 1e6, ours.peak_memory / 1e6),
    ):
        table.add_row(name, f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f} x")
    console.print(table)
    verdict = "[green]ok[/]" if result.passed else "[bold red]FAILED[/]"
    console.print(f"largest relative difference of the losses of a step: {result.difference:.1e}, limit {limit:.0e}, {verdict}")
