"""What the tests of the command line share: running it, and what `fastxent evaluate` must say."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastxent import cli
from fastxent import reference as ref
from tests.helpers.cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from tests.helpers.processes import ROOT

TOLERANCE = {FLOAT16: 1e-6, BFLOAT16: 1e-6, FLOAT32: 1e-6, FLOAT64: 1e-13}  # of sums of float32 (64) losses


def run_process(*args: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastxent", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


needs_terminals = pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")


def run_on_terminal(*args: str) -> tuple[subprocess.CompletedProcess, bytes]:
    """Run the command with a terminal as standard error; return the process, with its output, and what the terminal got."""
    import pty

    terminal, stderr = pty.openpty()
    shown = []

    def read():
        with contextlib.suppress(OSError):  # Linux ends a pseudo-terminal with an error
            while text := os.read(terminal, 4096):
                shown.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, "-m", "fastxent", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, env=os.environ | {"TERM": "xterm"})
    os.close(stderr)
    reader.join()
    os.close(terminal)
    return done, b"".join(shown)


def save(folder: Path, **arrays: np.ndarray) -> list[str]:
    """Write each array as NAME.npy and return the file names."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [str(folder / f"{name}.npy") for name in arrays]


def save_zarr(folder: Path, array: np.ndarray, chunks: tuple[int, ...], version: int | None = None, fill_value=0) -> str:
    """Write an array as a zarr folder and return its name."""
    import zarr

    name = "zarr_format" if zarr.__version__ >= "3" else "zarr_version"
    options = {"fill_value": fill_value} | ({} if version is None else {name: version})
    store = zarr.open_array(store=str(folder), mode="w", shape=array.shape, chunks=chunks, dtype=array.dtype, **options)
    store[...] = array
    return str(folder)


def evaluate(capsys, *args) -> dict:
    """The JSON object that ``fastxent evaluate`` prints."""
    assert cli.main(["evaluate", *map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def error_of(capsys, *args) -> str:
    """The one line of ``fastxent evaluate`` on stderr where it fails, which it must."""
    assert cli.main(["evaluate", *map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastxent evaluate: error: ")
    assert err.count("\n") == 1 and err.endswith("\n") and err[:-1].isprintable()
    return err


def expected(logits, target, **options) -> dict:
    """Every number of ``evaluate``, row by row as the books have it; classes on the last axis."""
    stats = ref.cross_entropy_stats(logits, target, **options)
    keep = stats.target_rank >= 0
    p = ref.softmax(logits, -1)[keep]
    confidence, hit = p.max(-1), stats.target_rank[keep] == 0
    calibration = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            calibration += inside.sum() / keep.sum() * abs(hit[inside].mean() - confidence[inside].mean())
    loss = ref.cross_entropy(logits, target, **options)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "top1_accuracy": hit.mean(),
        "top5_accuracy": (stats.target_rank[keep] < 5).mean(),
        "entropy": stats.entropy[keep].mean(),
        "calibration_error": calibration,
        "rows": keep.size,
        "kept_rows": keep.sum(),
        "nonfinite_rows": 0,
        "classes": logits.shape[-1],
    }


def assert_matches(result: dict, truth: dict, tolerance: float = 1e-6) -> None:
    assert {k: result[k] for k in truth} == pytest.approx(truth, rel=tolerance, abs=tolerance)
