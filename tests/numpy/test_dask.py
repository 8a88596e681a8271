"""The functions over Dask arrays: lazy, and the same as over the whole array."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastxent as fx

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
fxd = pytest.importorskip("fastxent.dask")

rng = np.random.default_rng(0)
X = (3 * rng.standard_normal((103, 21))).astype(np.float32)
Y = rng.integers(0, 21, 103)
Y[::5] = -100
U, W, T = rng.random(103), rng.random(21), rng.dirichlet(np.ones(21), 103).astype(np.float32)
CHUNKS = ((40, 3, 60), 21)  # unequal: a mean of the blocks' means would be wrong


@pytest.fixture(autouse=True, params=["threads", "sync"])
def scheduler(request: pytest.FixtureRequest) -> Iterator[None]:
    with dask.config.set(scheduler=request.param):
        yield


def lazy(a: Any, chunks: Any = CHUNKS) -> Any:
    return da.from_array(a, chunks=chunks if a.ndim == 2 else (chunks[0],))


def same(ours: Any, want: Any) -> None:
    assert isinstance(ours, da.Array) and ours.shape == np.shape(want) and ours.dtype == want.dtype
    assert type(ours._meta) is np.ndarray and ours._meta.dtype == want.dtype
    found = ours.compute()
    assert found.dtype == want.dtype
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("target", "options"),
    [
        (Y, {}),
        (Y, {"label_smoothing": 0.1}),
        (Y, {"weight": W, "sample_weight": U}),
        (T, {}),
        (T, {"weight": W, "sample_weight": U}),
    ],
)
def test_cross_entropy(target, options, reduction):
    given = options | {name: lazy(a) for name, a in options.items() if name == "sample_weight"}
    same(fxd.cross_entropy(lazy(X), lazy(target), **given, reduction=reduction),
         fx.cross_entropy(X, target, **options, reduction=reduction))  # fmt: skip
    loss, grad = fxd.cross_entropy_value_and_grad(lazy(X), target, **options, reduction=reduction)
    want_loss, want_grad = fx.cross_entropy_value_and_grad(X, target, **options, reduction=reduction)
    same(loss, want_loss)
    same(grad, want_grad)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float16, np.float32], ids=lambda dtype: dtype.__name__)
def test_a_mean_adds_weights_up_in_float64_whatever_their_type(dtype):
    weight, sample_weight = (100 * W).astype(dtype), (100 * U).astype(dtype)  # their products are above 127
    ours = fxd.cross_entropy(lazy(X), lazy(Y), weight=weight, sample_weight=lazy(sample_weight))
    same(ours, fx.cross_entropy(X, Y, weight=weight, sample_weight=sample_weight))


def test_statistics_and_the_softmax_family():
    for ours, want in zip(fxd.cross_entropy_stats(lazy(X), lazy(Y)), fx.cross_entropy_stats(X, Y), strict=True):
        same(ours, want)
    same(fxd.cross_entropy_stats(lazy(X), Y, reduction="mean").loss, fx.cross_entropy_stats(X, Y, reduction="mean").loss)
    for name in ("softmax", "log_softmax", "logsumexp"):
        for axis in (1, -1):
            same(getattr(fxd, name)(lazy(X), axis), getattr(fx, name)(X, axis))
        same(getattr(fxd, name)(lazy(X.T, (21, (40, 3, 60))), 0), getattr(fx, name)(X.T, 0))


def test_axes():
    x, y = X[:100].reshape(4, 25, 21), Y[:100].reshape(4, 25)
    for axis in range(3):
        moved = np.ascontiguousarray(np.moveaxis(x, -1, axis))
        chunks = [2, 10]
        chunks.insert(axis, 21)
        loss, grad = fxd.cross_entropy_value_and_grad(da.from_array(moved, chunks=tuple(chunks)), y, axis=axis)
        want_loss, want_grad = fx.cross_entropy_value_and_grad(moved, y, axis=axis)
        same(loss, want_loss)
        same(grad, want_grad)


def test_a_split_class_axis_is_rechunked_with_a_warning():
    with pytest.warns(da.PerformanceWarning, match="3 chunks") as found:
        loss = fxd.cross_entropy(lazy(X, (50, 7)), Y)
    assert found[0].filename == __file__
    same(loss, fx.cross_entropy(X, Y))


def test_nothing_is_computed_before_it_is_asked_for():
    def never(block: np.ndarray) -> np.ndarray:
        raise AssertionError("computed")

    x = da.map_blocks(never, lazy(X), dtype=X.dtype, meta=X[:0])
    loss, _ = fxd.cross_entropy_value_and_grad(x, Y)
    with pytest.raises(AssertionError, match="computed"):
        loss.compute()


def test_integers_and_no_rows():
    integers = rng.integers(0, 5, (10, 4))
    same(fxd.cross_entropy(lazy(integers, ((4, 6), 4)), Y[:10] % 4), fx.cross_entropy(integers, Y[:10] % 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(fxd.cross_entropy(lazy(X), np.full(103, -100)).compute())
        loss, grad = dask.compute(*fxd.cross_entropy_value_and_grad(lazy(X), np.full(103, -100)))
    assert np.isnan(loss) and not grad.any()


def test_an_npy_stack(tmp_path):
    """Written by Dask, and read block by block; on a cluster below."""
    da.to_npy_stack(tmp_path, lazy(X))
    same(fxd.cross_entropy(da.from_npy_stack(tmp_path), Y), fx.cross_entropy(X, Y))


def test_errors():
    with pytest.raises(IndexError, match="= 21 is outside"):
        fxd.cross_entropy(lazy(X), np.full(103, 21), weight=W).compute()
    for error, call in {
        "must be a dask.array.Array": lambda: fxd.cross_entropy(X, Y),
        "target has shape": lambda: fxd.cross_entropy(lazy(X), Y[1:]),
        "sample_weight has shape": lambda: fxd.cross_entropy(lazy(X), Y, sample_weight=U[1:]),
        "weight has shape": lambda: fxd.cross_entropy(lazy(X), Y, weight=W[1:]),
        "weight is a masked array": lambda: fxd.cross_entropy(lazy(X), Y, weight=np.ma.masked_array(W, W > 1)),
        "logits has chunks of unknown sizes": lambda: fxd.cross_entropy(lazy(X)[lazy(X)[:, 0] > 0], Y),
        "x has chunks of unknown sizes": lambda: fxd.softmax(lazy(X)[:, lazy(X)[0] > 0], 1),
        "target has chunks of unknown sizes": lambda: fxd.cross_entropy(lazy(X), da.from_array(Y)[da.from_array(Y) > 2]),
        "sample_weight has chunks of unk": lambda: fxd.cross_entropy(lazy(X), Y, sample_weight=lazy(U)[lazy(U) > 0.1]),
        "reduction = 'max'": lambda: fxd.cross_entropy(lazy(X), Y, reduction="max"),
        "label_smoothing = 2": lambda: fxd.cross_entropy(lazy(X), Y, label_smoothing=2),
        "axis = 2 is outside": lambda: fxd.softmax(lazy(X), 2),
        "n_threads": lambda: fxd.softmax(lazy(X), 1, n_threads=0),
    }.items():
        with pytest.raises((ValueError, TypeError), match=error):
            call()


@pytest.mark.parametrize("scheduler", ["threads"], indirect=True)  # once: the cluster's own takes its place
@pytest.mark.filterwarnings("ignore")  # of the cluster's own
def test_an_array_larger_than_the_memory_of_a_worker(tmp_path):
    """Two processes of 500 MB: an npy stack of 600 MB, and its gradient, which is as large."""
    distributed = pytest.importorskip("distributed")
    rows, blocks = 10_000, 15
    for block in range(blocks):  # five blocks, three times each: links, so that less is written
        if block < 5:
            np.save(tmp_path / f"{block}.npy", np.random.default_rng(block).standard_normal((rows, 1000), dtype=np.float32))
        else:
            os.link(tmp_path / f"{block % 5}.npy", tmp_path / f"{block}.npy")
    info = {"chunks": ((rows,) * blocks, (1000,)), "dtype": np.dtype(np.float32), "axis": 0}
    (tmp_path / "info").write_bytes(pickle.dumps(info))
    x = da.from_npy_stack(tmp_path)
    y = da.arange(len(x), chunks=rows) % 1000
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, memory_limit="500MB", dashboard_address=None) as cluster,
        distributed.Client(cluster, timeout=60) as client,
    ):
        loss, grad = fxd.cross_entropy_value_and_grad(x, y)
        ours, squares = client.compute([loss, (grad.astype(np.float64) ** 2).sum()], sync=True)
    want, want_squares = 0.0, 0.0
    for block in range(blocks):
        a, g = fx.cross_entropy_value_and_grad(np.load(tmp_path / f"{block}.npy"), np.arange(rows) % 1000)
        want, want_squares = want + a / blocks, want_squares + (g.astype(np.float64) ** 2).sum() / blocks**2
    assert ours == pytest.approx(want, rel=1e-6) and squares == pytest.approx(want_squares, rel=1e-5)
