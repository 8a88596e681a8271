"""`fastxent evaluate` on zarr folders: the numbers are those of .npy files, and a folder that means harm is one line."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastxent import cli
from fastxent._cli import evaluate as evaluation
from tests.helpers.cases import FLOAT64, make_case
from tests.helpers.cli_cases import assert_matches, error_of, evaluate, expected, save, save_zarr

zarr = pytest.importorskip("zarr")
FORMATS = [2, 3] if int(zarr.__version__.partition(".")[0]) > 2 else [2]


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("option", ["weight ignore smoothing", "probabilities"])
@pytest.mark.parametrize("chunks", [(40, 17), (7, 5), (100, 17), (1, 17)], ids=str)
@pytest.mark.parametrize("block_rows", [1, 60, 1000])
def test_numbers_are_those_of_npy_files(tmp_path, capsys, monkeypatch, version, option, chunks, block_rows):
    """Chunks that are larger and smaller than a block, and that split the classes."""
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", block_rows)
    case = make_case(FLOAT64, (100, 17), option)
    logits = save_zarr(tmp_path / "logits", case.logits, chunks, version)
    targets = save_zarr(tmp_path / "targets", case.target, chunks[: case.target.ndim], version)
    flags = []
    if "weight" in case.options:
        weight = save_zarr(tmp_path / "weight", case.options["weight"], (4,), version)
        flags = ["--weight", weight, "--label-smoothing", case.options["label_smoothing"]]
    files = save(tmp_path, logits=case.logits, targets=case.target)
    ours, npy = evaluate(capsys, logits, targets, *flags), evaluate(capsys, *files, *flags)
    assert_matches(ours, expected(case.logits, case.target, **case.options), 1e-13)
    assert_matches(ours, {name: value for name, value in npy.items() if name not in ("dtype", "seconds", "gb_per_s")}, 1e-14)
    assert ours["dtype"] == npy["dtype"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis(tmp_path, capsys, axis):
    case = make_case(FLOAT64, (9, 8, 6))
    logits = save_zarr(tmp_path / "logits", np.moveaxis(case.logits, -1, axis), (4, 3, 5))
    targets = save_zarr(tmp_path / "targets", case.target, (2, 8))
    assert_matches(evaluate(capsys, logits, targets, "--axis", axis), expected(case.logits, case.target), 1e-13)


def test_each_chunk_of_logits_is_read_once(tmp_path, capsys, monkeypatch):
    read = []
    raw = evaluation.open_array(save_zarr(tmp_path / "logits", np.zeros((100, 8)), (30, 4))).__class__._raw
    monkeypatch.setattr("fastxent._cli.zarr_folder.Chunked._raw", lambda self, index: read.append(index) or raw(self, index))
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", 20)
    evaluate(capsys, tmp_path / "logits", *save(tmp_path, targets=np.zeros(100, int)))
    assert [(rows.start, rows.stop) for rows, _ in read] == [(0, 30), (30, 60), (60, 90), (90, 100)]


def test_hidden_states_and_a_head(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {"hidden": rng.standard_normal((50, 6)), "head": rng.standard_normal((17, 6))}
    targets = save_zarr(tmp_path / "targets", rng.integers(0, 17, 50), (20,))
    found = []
    for flags in (
        [save_zarr(tmp_path / name, array, (20, 4)) for name, array in arrays.items()],
        save(tmp_path, **arrays),
    ):
        found.append(evaluate(capsys, "--hidden", flags[0], "--head", flags[1], targets)["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-13)


# Folders that are wrong, or mean harm -------------------------------------------------------------------------


class Trap:
    """Unpickling one writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edited(folder: Path, **changes: Any) -> str:
    """A zarr folder of version 2 whose metadata are then changed."""
    save_zarr(folder, np.zeros((2, 3)), (2, 3), 2)
    metadata = json.loads((folder / ".zarray").read_text())
    (folder / ".zarray").write_text(json.dumps(metadata | changes))
    return str(folder)


@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_nothing_is_unpickled(tmp_path, capsys, place):
    codec = {"id": "pickle", "protocol": 5}
    logits = edited(tmp_path / "logits", **{place: [codec] if place == "filters" else codec})
    (tmp_path / "logits" / "0.0").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    message = error_of(capsys, logits, *save(tmp_path, targets=np.zeros(2, int)))
    assert "has chunks in a code that is not read here: pickle" in message and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "|O"}, "logits"),
        ({"dtype": "<i4"}, "holds int32: logits are float16"),
        ({"dtype": "<q9"}, "cannot be read"),
        ({"shape": [-2, 3]}, "logits"),
        ({"shape": [0, 3]}, "is empty"),
        ({"shape": "2"}, "logits"),
        ({"shape": [1 << 40, 1 << 40], "chunks": [1 << 20, 1 << 20]}, "larger than 1073741824 bytes"),
        ({"shape": [1 << 40, 1 << 20], "chunks": [1 << 10, 1]}, "the rows of one are larger than 1073741824 bytes"),
        ({"chunks": [0, 3]}, "has chunks of shape (0, 3)"),
        ({"compressor": {"id": "no-such"}}, "a code that is not read here: no-such"),
        ({"zarr_format": 77}, "cannot be read"),
    ],
)
def test_metadata_that_are_wrong_are_said_in_a_line(tmp_path, capsys, changes, message):
    logits = edited(tmp_path / "logits", **changes)
    (targets,) = save(tmp_path, targets=np.zeros(2, int))
    if changes.get("shape", [2])[0] == 1 << 40:  # targets without chunks: as many as there are logits
        targets = edited(tmp_path / "targets", shape=[1 << 40], chunks=[1 << 10], dtype="<i8")
    assert message in error_of(capsys, logits, targets)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000, '{"shape": 1}' + " " * (1 << 20)])
def test_damaged_metadata(tmp_path, capsys, text):
    logits = edited(tmp_path / "logits")
    (tmp_path / "logits" / ".zarray").write_text(text)
    assert "logits" in error_of(capsys, logits, *save(tmp_path, targets=np.zeros(2, int)))


def test_a_damaged_chunk(tmp_path, capsys):
    logits = save_zarr(tmp_path / "logits", np.ones((2, 3)), (2, 3), 2)
    (tmp_path / "logits" / "0.0").write_bytes(b"no chunk")
    assert "cannot be read" in error_of(capsys, logits, *save(tmp_path, targets=np.zeros(2, int)))


def test_folders_without_an_array(tmp_path, capsys):
    (targets,) = save(tmp_path, targets=np.zeros(2, int))
    (tmp_path / "empty").mkdir()
    group = zarr.open_group(str(tmp_path / "group"), mode="w")
    group.create_group("inner")
    for folder in ("empty", "group"):
        assert "is not a regular file, nor the folder of a zarr array" in error_of(capsys, tmp_path / folder, targets)
    save_zarr(tmp_path / "group" / "logits", np.zeros((2, 3)), (2, 3))
    assert evaluate(capsys, tmp_path / "group" / "logits", targets)["rows"] == 2


def test_without_zarr(tmp_path, capsys, monkeypatch):
    logits = save_zarr(tmp_path / "logits", np.zeros((2, 3)), (2, 3))
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert cli.main(["evaluate", logits, *save(tmp_path, targets=np.zeros(2, int))]) == 2
    assert capsys.readouterr().err == "fastxent evaluate: error: zarr is missing: pip install 'fastxent[dask]'\n"
