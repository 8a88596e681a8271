"""The command line: ``fastxent`` or ``python -m fastxent``.

Exit codes: 0 all is well; 1 a check of ``demo`` failed, or a provider of ``bench`` is broken; 2 wrong options or files, told
in one line on stderr; 130 Ctrl-C. Each command imports what it needs, and nothing else is imported here, so ``--help`` is
instant.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fastxent._cli.demo import Result, Step
    from fastxent._cli.evaluate import Evaluation

DTYPES = ("float16", "bfloat16", "float32", "float64")


class CommandError(Exception):
    """Ends the command with one line on stderr and exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name. Default: those of the process.

    Returns
    -------
    int
        The exit code. Wrong usage raises ``SystemExit(2)``, ``--help`` ``SystemExit(0)``, as argparse does.
    """
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        if sys.stdout is not None:  # a program may be started without one
            sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"fastxent {args.command}: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # "fastxent info | head": nobody reads on, and Python's own flush at exit must not fail
        _discard_output()
        return 0
    except OSError as error:  # a full disk
        _discard_output()
        print(f"fastxent {args.command}: error: {_one_line(str(error))}", file=sys.stderr)
        return 2


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastxent", description="Fast and exact cross-entropy on the CPU.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, json: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        if json:
            command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    command = add("evaluate", _evaluate, "evaluate logits in a file: loss, accuracy, calibration")
    command.add_argument("logits", metavar="LOGITS", help=".npy, .npz or FILE.npz:key; floating point")
    command.add_argument("targets", metavar="TARGETS", help="likewise; class indices or class probabilities")
    command.add_argument("--axis", type=int, default=-1, metavar="N", help="axis of the classes (default: last)")
    command.add_argument("--ignore-index", type=int, default=-100, metavar="N", help="class index of rows to leave out (-100)")
    command.add_argument("--label-smoothing", type=float, default=0.0, metavar="X", help="from 0 to 1 (0)")
    command.add_argument("--weight", metavar="FILE", help="like LOGITS; one weight a class")

    command = add("demo", _demo, "train on handwritten digits and check the result against scikit-learn")
    command.add_argument("--keep", metavar="DIR", help="write logits.npy and targets.npy of the test set here")

    command = add("bench", _bench, "time fastxent, its peers and the memory roofline", json=False)
    what = command.add_mutually_exclusive_group()
    what.add_argument("--shape", nargs="+", type=_shape, metavar="N,C", help="these shapes only; N,C,d1,... is channels first")
    what.add_argument("--all", action="store_true", help="the whole table, and the bars; takes a quarter of an hour or more")
    command.add_argument("--quick", action="store_true", help="few rounds, and no torch.compile, which takes long to compile")
    command.add_argument("--dtype", choices=DTYPES, help="of the logits (float32)")
    command.add_argument("--threads", type=_positive, metavar="N", help="for everyone (default: what fastxent takes)")
    command.add_argument("--provider", nargs="+", metavar="NAME", help="these only, beside the roofline; such as pytorch-eager")
    command.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw time against C and N, as .png, .svg or .pdf")

    add("info", _info, "show the CPU, the threads, the versions and the cache folder")

    command = add("warmup", _warmup, "compile the kernels now, not at their first use", json=False)
    command.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=", ".join(DTYPES))
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    numbers = tuple(_positive(part) for part in text.split(","))
    if len(numbers) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} has no number of classes: N,C")
    return numbers


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fastxent import __version__

        print(f"fastxent {__version__}")
        parser.exit()


# Commands -------------------------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace) -> int:
    from fastxent._cli.evaluate import evaluate
    from fastxent._cli.files import InputError

    try:
        with _progress("bytes") as progress:
            result = evaluate(
                args.logits,
                args.targets,
                axis=args.axis,
                weight=args.weight,
                ignore_index=args.ignore_index,
                label_smoothing=args.label_smoothing,
                progress=progress,
            )
    except InputError as error:
        raise CommandError(str(error)) from error
    except MemoryError as error:
        raise CommandError("out of memory") from error
    if args.json:
        _print_json(vars(result))
    else:
        print(_evaluation_table(result))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    console = None if args.json else _console()
    with _needs_extra():
        from fastxent._cli.demo import run

    from fastxent._codegen.patience import quietly

    with contextlib.ExitStack() as stack:
        stack.enter_context(quietly())  # a caption says that kernels are compiled
        try:
            folder = Path(args.keep or stack.enter_context(TemporaryDirectory(prefix="fastxent-")))
            folder.mkdir(parents=True, exist_ok=True)
            if console is None:
                result = run(folder)
            else:
                result = _run_live(run, folder, console)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CommandError(f"{error.filename}: {error.strerror}") from error

    passed = all(check.passed for check in result.checks)
    if console is None:
        from dataclasses import asdict

        checks = [{**asdict(check), "passed": check.passed} for check in result.checks]
        _print_json({**asdict(result), "checks": checks, "passed": passed})
    else:
        _print_demo(console, result)
        if args.keep:
            console.print(f"kept in {folder}: logits.npy, targets.npy", markup=False)
    return 0 if passed else 1


def _bench(args: argparse.Namespace) -> int:
    """The benchmarks are no part of the installed package: they lie beside it in the repository."""
    repository = Path(__file__).resolve().parents[1]
    if not (repository / "benchmarks" / "compare.py").is_file():
        raise CommandError(
            "the benchmarks are in fastxent's repository, not in the installed package: "
            "clone it and run pip install -e '.[bench]' there"
        )
    sys.path.insert(0, str(repository))  # before any other folder called benchmarks
    with _needs_extra("bench", ("rich", "matplotlib", "ml_dtypes")):
        from benchmarks.compare import UsageError, bench

        try:
            return bench(args)
        except UsageError as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            if error.filename not in map(str, (args.json, args.plot)):
                raise
            raise CommandError(f"{error.filename}: {error.strerror}") from error


def _info(args: argparse.Namespace) -> int:
    from fastxent import show_config

    config = show_config()
    if args.json:
        _print_json(config)
    else:
        print(_config_table(config))
    return 0


def _warmup(args: argparse.Namespace) -> int:
    from time import perf_counter

    from fastxent import warmup

    start = perf_counter()
    with _progress("kernels") as progress:
        if args.dtype:
            warmup(tuple(dict.fromkeys(args.dtype)), progress=progress)
        else:
            warmup(progress=progress)
    print(f"kernels are ready ({perf_counter() - start:.1f} s)")
    return 0


# Output ---------------------------------------------------------------------------------------------------


def _evaluation_table(result: Evaluation) -> str:
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


def _config_table(config: Mapping[str, Any]) -> str:
    sections: dict[str, Mapping[str, Any]] = {"": {k: v for k, v in config.items() if not isinstance(v, Mapping)}}
    sections |= {k: v for k, v in config.items() if isinstance(v, Mapping)}
    return _table(sections)


def _table(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Two columns, names and values; each section but the one named "" under its name.

    Plain text: it is copied into reports of faults, and needs nothing that may be missing there.

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
    """What the output's encoding lacks as escape codes: names of files may hold any bytes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def _run_live(run: Callable[..., Result], folder: Any, console: Console) -> Result:
    """Train while a table shows how it goes: the iterations that are powers of two, and the latest."""
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


def _print_demo(console: Console, result: Result) -> None:
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
    console.print(_evaluation_table(result.evaluation), markup=False)


def _print_json(facts: Mapping[str, Any]) -> None:
    import json

    print(json.dumps(_finite(facts), allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no nan and no inf; null stands for them."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(message: str) -> str:
    """The message without line breaks or escape codes: part of it may come from a hostile file.

    >>> _one_line("a name\\n with \\x1b[31m")
    'a name with \\\\x1b[31m'
    """
    message = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


@contextlib.contextmanager
def _needs_extra(extra: str = "cli", packages: Sequence[str] = ("rich", "scipy", "sklearn")) -> Iterator[None]:
    """Imports of an extra: where one is missing, say what to do."""
    try:
        yield
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in packages:
            raise
        raise CommandError(f"{missing} is missing: pip install 'fastxent[{extra}]'") from error


def _console() -> Console:
    with _needs_extra():
        from rich.console import Console

        return Console(highlight=False)


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Callable[..., None] | None]:
    """A function (done, total[, name]) that moves a bar on stderr; None where nobody would see it."""
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
        task = bar.add_task("preparing", total=None)  # total=None: it moves, but to no known end

        def update(done: int, total: int, name: str = "") -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield update
