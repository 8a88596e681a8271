"""``python -m benchmarks.gate FILE``: fails where fastxent has become slow against PyTorch, both from the same run.

FILE is what ``pytest benchmarks/test_speed.py -m gate -n 0 --benchmark-enable --benchmark-json FILE`` wrote. A number is the
shortest time of ours by the shortest time of PyTorch eager, never a time: another machine has other times. Each must keep its
limit, which is generous: it is for machines that do other things as well. With ``--base FILE``, from the commit before on the
same machine, no number may have grown by more than a factor either. Of several files of a commit the shortest times count; take
them in turns with those of the base, two of each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import OUT, TORCH
from benchmarks.cases import HEADLINE, SCALING, SHAPES
from benchmarks.report import EAGER, digits

NARROW = next(case for case in SHAPES if case.extents == (65536, 10))
# Time of ours by that of PyTorch eager, at most. Measured on two quiet cores, November 2026: about 0.1, 0.6 and 0.1.
LIMITS = {
    NARROW: {OUT: 0.8, TORCH: 0.8},
    SCALING: {OUT: 1.5, TORCH: 1.5},
    HEADLINE: {OUT: 0.5, TORCH: 0.5},
}

Ratios = dict[tuple[str, str], float]  # of a case and a provider


def ratios(documents: Sequence[Mapping[str, Any]]) -> Ratios:
    """What is judged, from what pytest-benchmark wrote."""
    times: Ratios = {}
    for document in documents:
        for b in document["benchmarks"]:
            key = b["extra_info"]["case"], b["extra_info"]["provider"]
            times[key] = min(b["stats"]["min"], times.get(key, math.inf))
    wanted = [(case.key, name) for case, limits in LIMITS.items() for name in limits]
    return {(key, name): times[key, name] / times[key, EAGER] for key, name in wanted}


def judge(now: Ratios, base: Ratios | None, factor: float) -> list[tuple[str, bool]]:
    """A line for each ratio, and whether it is passed."""
    lines = []
    for case, limits in LIMITS.items():
        for name, limit in limits.items():
            ratio = now[case.key, name]
            text = f"{name}, {case.shape}: {digits(ratio)} x PyTorch eager, limit {limit:g}"
            passed = ratio <= limit
            if base is not None:
                before = base[case.key, name]
                text += f"; {digits(ratio / before)} x what it was, limit {factor:g}"
                passed = passed and ratio / before <= factor
            lines.append((text, passed))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what pytest --benchmark-json wrote")
    parser.add_argument("--base", type=Path, nargs="+", metavar="FILE", help="the same from an earlier commit")
    parser.add_argument("--factor", type=float, default=1.3, help="by which a ratio may have grown since (1.3)")
    args = parser.parse_args(argv)
    try:
        now = ratios([json.loads(file.read_text()) for file in args.files])
        base = ratios([json.loads(file.read_text()) for file in args.base]) if args.base else None
    except KeyError as error:
        print(f"not measured: {error}", file=sys.stderr)
        return 2
    lines = judge(now, base, args.factor)
    for text, passed in lines:
        print("ok  " if passed else "SLOW", text)
    return 0 if all(passed for _, passed in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
