"""The commands: each takes the parsed options, imports what it needs, and returns the exit code."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from fastxent._cli import output
from fastxent._cli.output import CommandError


def evaluate(args: argparse.Namespace) -> int:
    from fastxent._cli import evaluate as evaluation
    from fastxent._cli.files import InputError

    _check_evaluated(args)
    try:
        bar = output.progress("bytes") if args.dask is None else contextlib.nullcontext()  # Dask has a bar of its own
        with output.needs_extra("dask", ("zarr", "dask", "distributed")), bar as progress:
            options = {
                "weight": args.weight,
                "ignore_index": args.ignore_index,
                "label_smoothing": args.label_smoothing,
                "dask": args.dask,
                "progress": progress,
            }
            if args.hidden is None:
                result = evaluation.evaluate(args.logits, args.targets, axis=args.axis, **options)
            else:  # the one file is that of the targets
                result = evaluation.evaluate_head(args.hidden, args.head, args.logits, bias=args.bias, **options)
    except InputError as error:
        raise CommandError(str(error)) from error
    except MemoryError as error:
        raise CommandError("out of memory") from error
    if args.json:
        output.print_json(vars(result))
    else:
        print(output.evaluation_table(result))
    return 0


def _check_evaluated(args: argparse.Namespace) -> None:
    """Exit as the parser does unless the options name logits and targets, or hidden states, a head and targets."""
    if args.hidden is None:
        if args.targets is None:
            args.wrong_usage("the following arguments are required: TARGETS")
        if args.head is not None or args.bias is not None:
            args.wrong_usage("--head and --bias go with --hidden")
    elif args.head is None:
        args.wrong_usage("--hidden needs --head")
    elif args.targets is not None:
        args.wrong_usage("with --hidden, name one more file: TARGETS")
    elif args.axis != -1:
        args.wrong_usage("--axis is for LOGITS: with --hidden the classes are on the last axis")


def demo(args: argparse.Namespace) -> int:
    return _digits(args) if args.language_model is None else _language_model(args)


def _digits(args: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    console = None if args.json else output.console()
    with output.needs_extra():
        from fastxent._cli.demo import run

    from fastxent._codegen.patience import quietly

    with contextlib.ExitStack() as stack:
        stack.enter_context(quietly())  # the table's caption says that kernels are compiled
        try:
            folder = Path(args.keep or stack.enter_context(TemporaryDirectory(prefix="fastxent-")))
            folder.mkdir(parents=True, exist_ok=True)
            if console is None:
                result = run(folder)
            else:
                result = output.run_live(run, folder, console)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CommandError(f"{error.filename}: {error.strerror}") from error

    passed = all(check.passed for check in result.checks)
    if console is None:
        from dataclasses import asdict

        checks = [{**asdict(check), "passed": check.passed} for check in result.checks]
        output.print_json({**asdict(result), "checks": checks, "passed": passed})
    else:
        output.print_demo(console, result)
        if args.keep:
            console.print(f"kept in {folder}: logits.npy, targets.npy", markup=False)
    return 0 if passed else 1


def _language_model(args: argparse.Namespace) -> int:
    console = None if args.json else output.console()
    with output.needs_extra("bench", ("torch", "matplotlib")):
        from fastxent._cli import language_model, language_model_plot

    file = Path(args.language_model)
    language_model_plot.check_file(file)
    try:
        with output.progress("steps") as progress:
            result = language_model.run(language_model.Sizes(), progress=progress)
    except EOFError as error:
        raise CommandError("a training ended early: is there too little memory?") from error
    language_model_plot.draw(result, file)
    if console is None:
        from dataclasses import asdict

        facts = {"difference": result.difference, "limit": language_model.LIMIT, "passed": result.passed}
        output.print_json({**asdict(result), **facts})
    else:
        output.print_trainings(console, result, language_model.LIMIT)
        print(f"drawn in {file}")
    return 0 if result.passed else 1


def bench(args: argparse.Namespace) -> int:
    """Run the benchmarks, which are not in the installed package: they are next to it in the repository."""
    repository = Path(__file__).resolve().parents[2]
    if not (repository / "benchmarks" / "compare.py").is_file():
        raise CommandError(
            "the benchmarks are in fastxent's repository, not in the installed package: "
            "clone it and run pip install -e '.[bench]' there"
        )
    sys.path.insert(0, str(repository))  # before any other folder called benchmarks
    with output.needs_extra("bench", ("rich", "matplotlib", "ml_dtypes")):
        from benchmarks import UsageError
        from benchmarks.compare import bench, parser

        try:
            return bench(parser().parse_args(args.options))
        except UsageError as error:
            raise CommandError(str(error)) from error


def info(args: argparse.Namespace) -> int:
    from fastxent import show_config

    config = show_config()
    if args.kernels:
        from fastxent._runtime.config import kernels

        config["common kernels"] = kernels()
    if args.json:
        output.print_json(config)
    else:
        print(output.config_table(config))
    return 0


def warmup(args: argparse.Namespace) -> int:
    from time import perf_counter

    import fastxent

    _check_jobs(args)
    start, dtypes = perf_counter(), {"dtypes": tuple(dict.fromkeys(args.dtype))} if args.dtype else {}
    with output.progress("kernels") as progress:
        fastxent.warmup(**dtypes, progress=progress, n_jobs=args.jobs)
    print(f"kernels are ready ({perf_counter() - start:.1f} s)")
    return 0


def prebuild(args: argparse.Namespace) -> int:
    from time import perf_counter

    from fastxent._cli.prebuild import PLACE, prebuild
    from fastxent._runtime.threads import available_cpus

    _check_jobs(args)
    folder, start = Path(args.into) if args.into else PLACE, perf_counter()
    with output.progress("kernels") as progress:
        n = prebuild(args.levels, folder, args.jobs or available_cpus(), args.kernels, progress)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{n} kernels in {folder}, {size / 1e6:.1f} MB ({perf_counter() - start:.1f} s)")
    return 0


def _check_jobs(args: argparse.Namespace) -> None:
    if args.jobs is not None and args.jobs < 1:
        raise CommandError(f"--jobs {args.jobs} is not above 0")
