"""A linear layer with enough classes for several groups: threads share them; a loss alone goes by tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent import reference as ref
from fastxent._runtime import blas, linear_layer, linear_loss, linear_products
from fastxent._runtime.blas import Found
from fastxent._runtime.blocks import GROUPS, class_groups, rows_per_block, rows_per_tile
from tests.helpers.cases import BFLOAT16, FLOAT32, FLOAT64, REDUCTIONS, make_rng
from tests.helpers.processes import has_fork, run_script

ROWS, FEATURES, CLASSES = 150, 64, 6001  # four groups, the last of them smaller; a tail in a vector
OPTIONS = ["index", "ignore weight", "smoothing z_loss sample_weight ignore", "smoothing weight", "bias"]


def limits(dtype: np.dtype) -> list[int | None]:
    """Those of tiles of one row, of some, and one of all."""
    unit = max(dtype.itemsize, 4)
    return [1, unit * CLASSES * (FEATURES + 40), None]


class Case:
    def __init__(self, option: str, dtype: np.dtype) -> None:
        rng = make_rng("groups", option, dtype.name)
        self.h, self.w = (rng.standard_normal((n, FEATURES)).astype(dtype) for n in (ROWS, CLASSES))
        self.w = (self.w / 4).astype(dtype)
        self.y = rng.integers(0, CLASSES, ROWS)
        self.y[:3] = 0, CLASSES - 1, class_groups(CLASSES, FEATURES)[1].start
        if "ignore" in option:
            self.y[5:40:7] = -100
        self.options: dict[str, Any] = {}
        if "weight" in option.split():
            self.options["weight"] = rng.random(CLASSES)
        if "sample_weight" in option:
            self.options["sample_weight"] = rng.random(ROWS)
        if "smoothing" in option:
            self.options["label_smoothing"] = 0.1
        if "z_loss" in option:
            self.options["z_loss"] = 0.01
        if "bias" in option:
            self.options["linear_bias"] = rng.standard_normal(CLASSES)

    def __call__(self, function: Any, **more: Any) -> Any:
        return function(self.h, self.w, self.y, **self.options | more)


def is_tiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each tile that is computed from now on."""
    tiles: list[int] = []
    of_rows = linear_loss._of_rows
    monkeypatch.setattr(linear_loss, "_of_rows", lambda *args: tiles.append(len(args[2])) or of_rows(*args))
    return tiles


def take_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let products be computed by NumPy, or by the functions of its BLAS if these are found."""
    if path == "numpy":
        monkeypatch.setattr(blas, "blas", lambda: Found({}, ""))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("path", "dtype"), [("blas", FLOAT32), ("blas", FLOAT64), ("blas", BFLOAT16), ("numpy", FLOAT32)], ids=str
)
def test_the_loss_is_the_references_whatever_the_tiles(path, dtype, option, monkeypatch):
    take_path(path, monkeypatch)
    case, tiles = Case(option, dtype), is_tiled(monkeypatch)
    tolerance = 1e-13 if dtype == FLOAT64 else 3e-6
    for reduction in REDUCTIONS:
        truth = case(ref.linear_cross_entropy, reduction=reduction)
        for limit in limits(dtype):
            loss = case(fx.linear_cross_entropy, reduction=reduction, memory_limit=limit)
            assert loss.dtype == (FLOAT64 if dtype == FLOAT64 else FLOAT32)
            np.testing.assert_allclose(loss, truth, tolerance, tolerance)
            with_gradient = case(fx.linear_cross_entropy_value_and_grad, reduction=reduction)[0]
            np.testing.assert_allclose(loss, with_gradient, tolerance, tolerance)
    assert min(tiles) == 1 and max(tiles) >= ROWS - 5 and any(1 < n < ROWS - 20 for n in tiles)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("path", ["blas", "numpy"])
def test_gradients_are_the_references_whatever_the_groups(path, option, monkeypatch):
    take_path(path, monkeypatch)
    case = Case(option, FLOAT64)
    loss, gradients = case(ref.linear_cross_entropy_value_and_grad)
    for limit in limits(FLOAT64):
        ours, found = case(fx.linear_cross_entropy_value_and_grad, memory_limit=limit)
        np.testing.assert_allclose(ours, loss, 1e-13)
        for a, b in zip(found, gradients, strict=True):
            if b is not None:
                np.testing.assert_allclose(a, b, 1e-11, 1e-15)


@pytest.mark.parametrize("option", ["bias", "smoothing weight"])
def test_the_number_of_threads_changes_no_bit(option, monkeypatch):
    """That of products included, since each runs on one thread."""
    monkeypatch.setattr(linear_products, "WORTH_A_THREAD", 1)
    case = Case(option, FLOAT32)
    results = []
    for n in (1, 2, 3):
        loss, gradients = case(fx.linear_cross_entropy_value_and_grad, n_threads=n)
        results.append([case(fx.linear_cross_entropy, n_threads=n, reduction="none"), loss, *gradients])
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert np.array_equal(a, b) if a is not None else b is None


def test_what_is_not_finite_is_as_in_the_loss_of_whole_rows():
    case = Case("smoothing", FLOAT32)
    case.h[3], case.h[4] = np.nan, np.inf
    case.options["linear_bias"] = np.zeros(CLASSES)
    case.options["linear_bias"][[7, 3000]] = -np.inf  # as heads mask classes
    case.y[8] = 3000
    for smoothing in (0.0, 0.1):
        options = dict(reduction="none", label_smoothing=smoothing)
        tiled, whole = (case(f, **options) for f in (fx.linear_cross_entropy, fx.linear_cross_entropy_value_and_grad))
        np.testing.assert_allclose(tiled, whole[0], 1e-6)


def test_what_tiles_do_not_serve():
    case = Case("index", FLOAT32)
    for more in (dict(softcap=5.0), dict(target=np.full((ROWS, CLASSES), 1 / CLASSES))):
        arguments = dict(target=case.y) | more
        loss, truth = (
            f.linear_cross_entropy(case.h, case.w, arguments["target"], softcap=arguments.get("softcap")) for f in (fx, ref)
        )
        assert loss == pytest.approx(truth, rel=1e-5)
    few = linear_layer.check_layer(
        case.h, case.w[:400], case.y % 400, linear_bias=None, ignore_index=-100, memory_limit=None, n_threads=None
    )
    assert not linear_loss.by_tiles(few)


def test_groups_and_tiles():
    for n_classes, n_features in [(0, 5), (1, 5), (400, 12), (6001, 64), (50257, 256), (128256, 2048), (300, 4096)]:
        groups = class_groups(n_classes, n_features)
        assert [g.stop for g in groups[:-1]] == [g.start for g in groups[1:]] and len(groups) <= GROUPS
        assert sum(g.stop - g.start for g in groups) == n_classes
        for limit in (1, 16_000_000, None):
            for n_threads in (1, 2, 8):
                if n_classes:
                    rows = rows_per_tile(3000, n_features, n_classes, 4, 4, n_threads, limit)
                    held = 4 * rows * (n_threads * groups[0].stop + 2 * n_features)
                    assert rows == 1 or held <= (limit or max(64_000_000, 4 * n_classes * n_features))
    alone, shared = (rows_per_block(2048, 256, 50257, 4, 4, n_shares=n) for n in (0, 200))
    assert alone == 256 and shared < alone


# ---------------------------------------------------------------------------------------------------- threads of BLAS


@pytest.mark.skipif(not blas.blas().gemm, reason=blas.blas().why)
def test_blas_gets_its_threads_back():
    before = blas.blas().get_threads()
    with blas.one_thread_a_call():
        assert blas.blas().get_threads() == 1 and blas.get_num_threads() == before
        with pytest.raises(KeyError), blas.one_thread_a_call():
            raise KeyError
        assert blas.blas().get_threads() == 1
    assert blas.blas().get_threads() == blas.get_num_threads() == before


@has_fork
@pytest.mark.skipif(not blas.blas().gemm, reason=blas.blas().why)
def test_a_child_forked_within_a_call_has_all_threads_of_blas():
    """The call goes on in the parent alone: nothing in the child would put the threads back."""
    out = run_script(FORKED)
    assert out == "child 3 3, parent 1 3"


FORKED = """
import os, warnings
import numpy
from fastxent._runtime import blas
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
blas.blas().set_threads(3)
with blas.one_thread_a_call():
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, f"child {blas.blas().get_threads()} {blas.get_num_threads()}".encode())
        os._exit(0)
    os.wait()
    print(os.read(read, 99).decode(), f"parent {blas.blas().get_threads()} {blas.get_num_threads()}", sep=", ")
"""


def test_an_error_in_a_thread_is_raised_and_blas_gets_its_threads_back(monkeypatch):
    monkeypatch.setattr(linear_products, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(linear_products.Products, "put_some_logits", lambda *_: 1 / 0)
    before = blas.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        Case("index", FLOAT32)(fx.linear_cross_entropy, n_threads=2)
    assert blas.get_num_threads() == before


def test_more_threads_than_groups_are_those_of_blas(monkeypatch):
    monkeypatch.setattr(blas, "blas", lambda: Found({}, "", lambda: 64, lambda n: None))
    w = np.zeros((CLASSES, FEATURES), np.float32)
    workers = [linear_products.Products(w, None, FLOAT32, 1000, n).n_workers for n in (1, 2, 4, 5, 64)]
    assert workers == [1, 2, 4, 1, 1]
    assert linear_products.Products(w[:, :1], None, FLOAT32, 1, 4).n_workers == 1  # too small
