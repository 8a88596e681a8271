"""``fastxent bench``: fastxent, its peers and the streaming floor, interleaved in one process.

``python -m benchmarks.compare`` is the same command: its options are here. Exit code: 0; 1 if a provider failed or was wrong;
130 if interrupted, and what was measured until then is shown and written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastxent as fx
from benchmarks import UsageError, linear, whole
from benchmarks.bars import beside
from benchmarks.cases import CASES, GRAD, HEADLINE, LOSS, SHORT, SWEEP, TOLERANCE, Case, case_of
from benchmarks.measure import NORMAL, QUICK, THOROUGH, Effort, Group, Progress, run_group, threads
from benchmarks.providers import PROVIDERS
from benchmarks.report import COMPILED
from benchmarks.screen import Screen

Job = tuple[str, Callable[[Progress], Group]]

BUSY = 1.0  # load average from which on others disturb


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return bench(args)
    except UsageError as error:
        print(f"fastxent bench: error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    text = "Time fastxent, its peers and the memory roofline."
    parser = argparse.ArgumentParser(prog="fastxent bench", description=text)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", nargs="+", type=_shape, metavar="N,C", help="these shapes only; N,C,d1,... is channels first")
    what.add_argument("--all", action="store_true", help="the whole table, and the bars; takes a quarter of an hour or more")
    parser.add_argument("--quick", action="store_true", help="few rounds, and no torch.compile, which takes long to compile")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="of the logits (float32)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="for everyone (default: what fastxent takes)")
    parser.add_argument("--provider", nargs="+", metavar="NAME", help="these only, beside the roofline; such as pytorch-eager")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and every sample")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against C and N, as .png, .svg or .pdf")
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


def bench(args: argparse.Namespace) -> int:
    """What the command line asks for; see ``fastxent bench --help``."""
    try:
        return _bench(args)
    except OSError as error:
        if error.filename not in map(str, (args.json, args.plot)):
            raise
        raise UsageError(f"{error.filename}: {error.strerror}") from error


def _bench(args: argparse.Namespace) -> int:
    if args.plot:
        from benchmarks.plot import check_file, draw

        check_file(args.plot)
    for module in ("torch", "fastxent.torch"):  # before anything is timed: the pool of threads is PyTorch's, once it is there
        try:
            __import__(module)
        except Exception:  # shown as missing, with the reason
            break
    n_threads = args.threads or fx.get_num_threads()
    work = jobs(args, n_threads)
    document: dict[str, Any] = {
        "format": 1,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": {name: value for name, value in vars(args).items() if isinstance(value, str | int | list)},
        "threads": n_threads,
        "load": load(),
        "config": config(),
        "groups": [],
        "interrupted": False,
    }
    save(document, args.json)
    screen = Screen()
    screen.head(document)
    if (document["load"] or 0) > BUSY:
        screen.console.print("other programs are running: do not trust these times")
    start = time.perf_counter()
    with threads(n_threads):
        run(work, document, screen, args.json)
    screen.tail(document["groups"], with_bars=args.all)
    document["seconds"] = round(time.perf_counter() - start, 1)
    screen.console.print(f"{document['seconds']:.0f} s" + (", interrupted" if document["interrupted"] else ""))
    save(document, args.json)
    if args.plot:
        draw(document, args.plot)
    broken = any(r.startswith(("WRONG", "failed")) for group in document["groups"] for r in group["missing"].values())
    return 130 if document["interrupted"] else int(broken)


def load() -> float | None:
    """How many programs want to run; None: Windows has no such number, and without /proc Linux has none either."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def save(document: Mapping[str, Any], file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(document, indent=1) + "\n")


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


def cases(args: argparse.Namespace) -> list[Case]:
    if args.all:
        if args.dtype:
            raise UsageError("--dtype: --all has dtypes of its own")
        chosen = list(CASES)
    elif args.shape:
        chosen = [replace(case_of(shape), mode=mode) for shape in args.shape for mode in (case_of(shape).mode, LOSS)]
    elif args.plot:
        chosen = list(SWEEP)
    else:
        chosen = [*SHORT, replace(HEADLINE, mode=LOSS)]
    return [replace(case, dtype=args.dtype) for case in chosen] if args.dtype else chosen


def jobs(args: argparse.Namespace, n_threads: int) -> list[Job]:
    effort = QUICK if args.quick else THOROUGH if args.all else NORMAL
    leave_out = {COMPILED: "left out by --quick"} if args.quick else {}
    slugs = {provider.slug: provider.name for provider in PROVIDERS}
    unknown = set(args.provider or ()) - set(slugs)
    if unknown:
        raise UsageError(f"--provider: {', '.join(sorted(unknown))} is none of {', '.join(slugs)}")
    only = [slugs[slug] for slug in args.provider] if args.provider else None

    def job(case: Case) -> Job:
        def run(progress: Progress) -> Group:
            neighbours = beside(case) if args.all else ()
            return run_group(case, n_threads, effort, beside=neighbours, only=only, leave_out=leave_out, progress=progress)

        return case.key, run

    whole_jobs = [*_linear_jobs(n_threads), *_whole_jobs(n_threads, effort)] if args.all else []
    return [*map(job, cases(args)), *whole_jobs]


def _linear_jobs(n_threads: int) -> list[Job]:
    def job(mode: str) -> Job:
        return (
            f"linear layer, {mode}",
            lambda progress: linear.run_group(linear.SHAPE, "float32", mode, n_threads, progress=progress),
        )

    return [job(mode) for mode in (GRAD, LOSS)]


def _whole_jobs(n_threads: int, effort: Effort) -> list[Job]:
    return [
        ("threads", lambda progress: whole.run_threads(n_threads, effort, progress)),
        ("training step", lambda progress: whole.run_step(n_threads, effort, progress)),
        ("start", whole.run_start),
        ("memory", whole.run_memory),
    ]


def run(work: Sequence[Job], document: dict[str, Any], screen: Screen, file: Path | None) -> None:
    """Run, show and write one group after the other."""
    try:
        with screen.progress(len(work)):
            for k, (title, job) in enumerate(work):
                done = job(screen.job(k, title))
                document["groups"].append(done)
                save(document, file)
                screen.group(done)
                if done.get("interrupted"):
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        document["interrupted"] = True


if __name__ == "__main__":
    sys.exit(main())
