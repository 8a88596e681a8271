"""The command-line parser: the options of each command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fastxent._abi.dtypes import NAMES
from fastxent._cli import commands

LEVELS = (
    "x86-64-v2",
    "x86-64-v3",
    "x86-64-v4",
    "x86-64-v4-bf16",
    "aarch64",
    "apple-m1",
)  # of `_codegen.levels`, which imports more than --help may wait for


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="fastxent", description="Fast and exact cross-entropy on the CPU.")
    main.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = main.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, json: bool = True) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        if json:
            command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    command = add("evaluate", commands.evaluate, "evaluate logits in a file: loss, accuracy, calibration")
    text = ".npy, .npz, FILE.npz:key or the folder of a zarr array; floating point"
    command.add_argument("logits", metavar="LOGITS", help=text)
    targets = command.add_argument("targets", metavar="TARGETS", help="likewise; class indices or class probabilities")
    targets.required = False  # with --hidden, TARGETS are the only file
    command.set_defaults(wrong_usage=command.error)
    command.add_argument("--hidden", metavar="FILE", help="in place of LOGITS: the input of a linear layer, features last")
    command.add_argument("--head", metavar="FILE", help="its weight, classes x features; it may be larger than the memory")
    command.add_argument("--bias", metavar="FILE", help="its bias, one number a class")
    command.add_argument("--axis", type=int, default=-1, metavar="N", help="axis of the classes (default: last)")
    command.add_argument("--ignore-index", type=int, default=-100, metavar="N", help="class index of rows to leave out (-100)")
    command.add_argument("--label-smoothing", type=float, default=0.0, metavar="X", help="from 0 to 1 (0)")
    command.add_argument("--weight", metavar="FILE", help="like LOGITS; one weight a class")
    text = "evaluate on the cluster of this Dask scheduler, whose workers find the files under the same names"
    command.add_argument("--dask", metavar="ADDRESS", help=text)

    command = add("demo", commands.demo, "train on handwritten digits and check the result against scikit-learn")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--keep", metavar="DIR", help="write logits.npy and targets.npy of the test set here")
    text = "train a language model instead, with PyTorch's loss and with ours; draw loss, time and memory (language-model.png)"
    which.add_argument("--language-model", nargs="?", const="language-model.png", metavar="FILE", help=text)

    # The benchmarks parse the options of ``bench`` themselves: here no prefix marks an option, so all words are passed on.
    text = "time fastxent, its peers and the memory roofline"
    command = subparsers.add_parser("bench", help=text, add_help=False, prefix_chars="\0")
    command.set_defaults(run=commands.bench)
    command.add_argument("options", nargs=argparse.REMAINDER)

    command = add("info", commands.info, "show the CPU, threads, versions, ways of products, cache folder and prebuilt kernels")
    command.add_argument("--kernels", action="store_true", help="list the common kernels, and where each would come from")

    command = add("warmup", commands.warmup, "compile the kernels now, not at their first use", json=False)
    command.add_argument("--dtype", nargs="+", choices=NAMES, metavar="DTYPE", help=", ".join(NAMES))
    jobs: dict[str, Any] = {"type": int, "metavar": "N", "help": "processes that compile (default: one a core)"}
    command.add_argument("--jobs", **jobs)

    text = "compile the common kernels for levels of processors, as wheels bring them"
    command = add("prebuild", commands.prebuild, text, json=False)
    command.add_argument("--levels", nargs="+", required=True, choices=LEVELS, metavar="LEVEL", help=", ".join(LEVELS))
    command.add_argument("--into", metavar="DIR", help="write the files here (default: where this fastxent looks for them)")
    command.add_argument(
        "--kernels", nargs="+", metavar="PATTERN", default=["*"], help="only those of such names, as value*-f32-*"
    )
    command.add_argument("--jobs", **jobs)
    return main


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fastxent import __version__

        print(f"fastxent {__version__}")
        parser.exit()
