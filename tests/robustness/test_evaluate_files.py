"""`fastxent evaluate` on files that are cut, also while they are read, or oddly named. More: test_evaluate_hostile.py."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from fastxent import cli
from tests.helpers.processes import run_script

LOGITS = np.arange(12, dtype=np.float32).reshape(3, 4)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["evaluate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fastxent evaluate: error: ")
    assert err.count("\n") == 1 and err[:-1].isprintable(), err
    return err


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    np.save(tmp_path / "targets.npy", np.zeros(3, int))
    return tmp_path / "targets.npy"


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed npz"])
def test_cut_anywhere(tmp_path, capsys, targets, kind):
    whole = io.BytesIO()
    save = {"npy": np.save, "npz": np.savez, "compressed npz": np.savez_compressed}[kind]
    save(whole, LOGITS)
    content = whole.getvalue()
    file = tmp_path / ("logits." + kind[-3:])
    for length in range(len(content)):
        file.write_bytes(content[:length])
        error_of(capsys, file, targets)
    file.write_bytes(content)
    assert cli.main(["evaluate", str(file), str(targets), "--json"]) == 0


NAMES = ["two\nlines.npy", "\x1b[31mred.npy", "\udcff.npy", "a\rb.npy", "-", "", "x" * 5000, "\u202e.npy"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_would_spoil_the_line(capsys, targets, name):
    error_of(capsys, "--", name, targets)


def test_a_header_that_promises_a_terabyte(tmp_path, capsys, targets):
    """Which is even there, as a hole: nothing is read or allocated before the shapes fit."""
    file = tmp_path / "logits.npy"
    with open(file, "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="<f4", fortran_order=False, shape=(2**28, 1024)))
        f.truncate(f.tell() + 2**40)
    assert "targets are integers of shape (268435456,)" in error_of(capsys, file, targets)
    assert "holds int64" in error_of(capsys, targets, file)


SHRINKING = """
import os, sys
import numpy as np
from fastxent._cli import evaluate, files as _files
folder, which = sys.argv[1:]
x = np.lib.format.open_memmap(folder + "/x.npy", "w+", np.float32, (50_000, 500))
np.save(folder + "/t.npy", np.zeros(50_000, np.int64))
del x
def shrink(done, total):
    os.truncate(f"{folder}/{which}.npy", 5000)
try:
    evaluate.evaluate(folder + "/x.npy", folder + "/t.npy", progress=shrink)
except _files.InputError as error:
    print(error)
"""


@pytest.mark.parametrize("which", ["x", "t"])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, which):
    """Behind the new end of a mapped file every access is a SIGBUS."""
    assert run_script(SHRINKING, str(tmp_path), which, PYTHONPATH=os.pathsep.join(sys.path)).endswith("is cut short")
