"""`fastxent evaluate --dask`: on a cluster the numbers are the same to the bit, and its faults are one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent._cli import evaluate as evaluation
from tests.helpers.cases import FLOAT32, make_case
from tests.helpers.cli_cases import (
    assert_matches,
    error_of,
    evaluate,
    expected,
    needs_terminals,
    run_on_terminal,
    save,
    save_zarr,
)

distributed = pytest.importorskip("distributed")
zarr = pytest.importorskip("zarr")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the cluster's own

OF_TIME = {"seconds", "gb_per_s"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A scheduler and a worker with two threads, in this process."""
    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 2, "protocol": "tcp", "dashboard_address": None}
    with distributed.LocalCluster(processes=False, **options) as cluster:
        yield cluster


def same(result: dict, other: dict) -> None:
    assert {name: result[name] for name in result if name not in OF_TIME} == {
        name: other[name] for name in other if name not in OF_TIME
    }


@pytest.mark.parametrize("how", ["npy", "zarr", "head"])
@pytest.mark.parametrize("option", ["weight ignore smoothing", "probabilities"])
def test_numbers_are_the_same(tmp_path, capsys, monkeypatch, cluster, how, option):
    monkeypatch.setattr(evaluation, "BLOCK_ROWS", 60)
    case = make_case(FLOAT32, (300, 17), option)
    flags = save(tmp_path, logits=case.logits, targets=case.target)
    if how == "zarr":
        flags[0] = save_zarr(tmp_path / "logits", case.logits, (40, 17))
    elif how == "head":
        head, bias = save(tmp_path, head=np.eye(17, dtype=np.float32), bias=np.zeros(17))
        flags = ["--hidden", flags[0], "--head", head, "--bias", bias, flags[1]]
    if "weight" in case.options:
        flags += ["--weight", *save(tmp_path, weight=case.options["weight"])]
        flags += ["--label-smoothing", case.options["label_smoothing"]]
    result = evaluate(capsys, *flags, "--dask", cluster.scheduler_address)
    assert_matches(result, expected(case.logits, case.target, **case.options), 1e-6)
    same(result, evaluate(capsys, *flags))


def test_a_file_that_is_named_from_where_the_caller_is(tmp_path, capsys, monkeypatch, cluster):
    save(tmp_path, logits=np.zeros((4, 3)), targets=np.zeros(4, int))
    monkeypatch.chdir(tmp_path)
    named = evaluate(capsys, "logits.npy", "targets.npy", "--dask", cluster.scheduler_address)
    assert named["rows"] == 4


def test_what_is_wrong_is_said_in_a_line(tmp_path, capsys, monkeypatch, cluster):
    address = cluster.scheduler_address
    logits, targets, wrong = save(tmp_path, logits=np.zeros((4, 3)), targets=np.zeros(4, int), wrong=np.array([0, 1, 3, 0]))
    assert "target[2] = 3 is outside" in error_of(capsys, logits, wrong, "--dask", address)
    np.savez(tmp_path / "logits.npz", np.zeros((4, 3)))
    assert "is in an archive" in error_of(capsys, tmp_path / "logits.npz", targets, "--dask", address)
    monkeypatch.setattr("fastxent._cli.cluster.TIMEOUT", 0.2)
    for nobody in ("tcp://127.0.0.1:9", "no-scheme://127.0.0.1:9"):
        assert f"the Dask cluster at {nobody} fails" in error_of(capsys, logits, targets, "--dask", nobody)
    folder = save_zarr(tmp_path / "folder", np.ones((4, 3)), (2, 3), 2)
    (tmp_path / "folder" / "1.0").write_bytes(b"no chunk")
    assert "folder cannot be read" in error_of(capsys, folder, targets, "--dask", address)


@pytest.mark.parametrize("package", ["distributed", "dask"])
def test_without_dask(tmp_path, capsys, monkeypatch, package):
    monkeypatch.delitem(sys.modules, "fastxent._cli.cluster", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("distributed", "dask")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    files = save(tmp_path, logits=np.zeros((4, 3)), targets=np.zeros(4, int))
    assert f"{package} is missing: pip install 'fastxent[dask]'" in error_of(capsys, *files, "--dask", "tcp://127.0.0.1:9")


@needs_terminals
def test_the_progress_of_dask_goes_to_a_terminal(tmp_path, cluster):
    files = save(tmp_path, logits=np.zeros((100, 4), np.float32), targets=np.zeros(100, int))
    done, shown = run_on_terminal("evaluate", *files, "--json", "--dask", cluster.scheduler_address)
    assert done.returncode == 0, shown
    assert json.loads(done.stdout)["rows"] == 100
    assert b"100% Completed" in shown


def peak_memory() -> int:
    """Of this program: what getrusage tells begins with the process that has started it."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux reports it")
def test_logits_larger_than_the_memory_of_a_worker(tmp_path, capsys):
    """A zarr folder of 1 GB, most of it its fill value, which is on no disk, for two processes of 500 MB."""
    rows, step, classes = 262_144, 8192, 1000
    x = np.linspace(-2, 2, step * classes, dtype=np.float32).reshape(step, classes)
    logits = save_zarr(tmp_path / "logits", x, (step, classes), fill_value=0.5)
    zarr.open_array(store=logits, mode="r+").resize((rows, classes))
    targets = save_zarr(tmp_path / "targets", np.arange(rows) % classes, (step,))
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "500MB", "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        result = evaluate(capsys, logits, targets, "--dask", cluster.scheduler_address)
        with distributed.Client(cluster) as client:
            peaks = client.run(peak_memory)
    assert len(peaks) == 2 and max(peaks.values()) < 500e6 < rows * classes * 4
    same(result, evaluate(capsys, logits, targets))
    loss = fx.cross_entropy(x, np.arange(step) % classes)
    assert result["loss"] == pytest.approx((loss * step + np.log(classes) * (rows - step)) / rows, rel=1e-6)
