"""The room for calls that come again is optional: without it all results are the same. Its cache is bounded, its builtins take
no argument on trust, and long calls let other threads go on."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent._fastpath import array_calls
from fastxent._fastpath.array_calls import DenseCall
from fastxent._fastpath.cache import CallCache, calls
from fastxent._runtime import fastpath, run, threads
from tests.helpers.processes import has_fork

PACKAGE = Path(fx.__file__).parent
with_fast_path = pytest.mark.skipif(not fastpath.ENABLED, reason="the fast path is off")


def arrays(shape: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(np.float32), rng.integers(0, shape[1], shape[0])


# ----------------------------------------------------------------------------------------------------
# The room may be missing
# ----------------------------------------------------------------------------------------------------

CALLS = """
import sys
import numpy as np
import fastxent as fx
digest = []
rng = np.random.default_rng(0)
def arrays(n):
    return rng.standard_normal((n, 10)).astype("f4"), rng.integers(0, 10, n)
for n in (40, 3, 40, 200, 3):
    x, y = arrays(n)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "sum", "ignore_index": 2}):
        loss, g = fx.cross_entropy_value_and_grad(x, y, **options)
        digest += [fx.cross_entropy(x, y, **options), loss, g.sum(), g.std()]
if sys.argv[1] == "torch":
    import torch, fastxent.torch as ft
    for n in (40, 3, 40, 200, 3):
        x, y = map(torch.from_numpy, arrays(n))
        x.requires_grad_()
        for reduction in ("mean", "none"):
            loss = ft.cross_entropy(x, y, reduction=reduction)
            g, = torch.autograd.grad(loss.sum(), x)
            digest += [loss.sum().item(), g.sum().item(), g.std().item(), ft.cross_entropy(x.detach(), y).item()]
        with ft.installed():
            digest.append(torch.nn.functional.cross_entropy(x, y).item())
from fastxent._runtime import fastpath
assert fastpath.ENABLED == ("fastxent._fastpath.cache" in sys.modules)
print(fastpath.ENABLED, [float(number).hex() for number in digest])
"""


def digest_of(root: Path, what: str, **environment: str) -> tuple[str, str]:
    """Has it a fast path?; results, bit by bit."""
    command = [sys.executable, "-W", "error", "-c", CALLS, what]
    settings = {name: value for name, value in os.environ.items() if name != "FASTXENT_FASTPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env=settings | {"PYTHONPATH": str(root)} | environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    enabled, _, digest = done.stdout.partition(" ")
    return enabled, digest


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["NumPy", "torch"])
def test_without_the_room_results_are_the_same(what, tmp_path):
    if what == "torch":
        pytest.importorskip("torch")
    shutil.copytree(PACKAGE, tmp_path / "fastxent", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "fastxent" / "_fastpath")
    want = digest_of(PACKAGE.parent, what)
    assert want[0] == "True"
    assert digest_of(PACKAGE.parent, what, FASTXENT_FASTPATH="0") == ("False", want[1])
    assert digest_of(tmp_path, what) == ("False", want[1])


# ----------------------------------------------------------------------------------------------------
# The call cache
# ----------------------------------------------------------------------------------------------------


def test_the_oldest_goes_first():
    cache = CallCache(most=3)
    for nth in range(5):
        cache.store(nth, str(nth))
    assert cache.keys() == [2, 3, 4] and cache.lookup(1) is None and cache.lookup(4) == "4"
    cache.store(3, "new")
    assert cache.keys() == [2, 3, 4] and cache.lookup(3) == "new"
    with pytest.raises(TypeError):
        cache.lookup([1])
    cache.clear()
    assert len(cache) == 0 and cache.lookup(4) is None


def test_threads_store_while_others_look_up():
    cache, failed = CallCache(most=50), []

    def work(seed: int) -> None:
        try:
            for nth in np.random.default_rng(seed).integers(0, 200, 20_000).tolist():
                if cache.lookup(nth) not in (None, -nth):
                    failed.append(nth)
                cache.store(nth, -nth)
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.setswitchinterval(interval)
    assert not failed and len(cache) == 50


@with_fast_path
@pytest.mark.parametrize("what", ["NumPy", "torch"])
def test_what_leaves_the_cache_is_freed_at_once(what):
    """A family is 130 KB that the garbage collector does not count; and some turn it off."""
    calls.clear()
    x, y = arrays((6, 4))
    if what == "torch":
        torch = pytest.importorskip("torch")
        from fastxent.torch import cross_entropy

        x, y = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)
        weight = torch.ones(4)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            if what == "torch":
                cross_entropy(x, y).backward()  # its value is never run
                cross_entropy(x, y, weight, reduction="none").sum().backward()
            else:
                fx.cross_entropy_value_and_grad(x, y)
        stored = [weakref.ref(found.family if isinstance(found, DenseCall) else found) for found in set(values_of_calls())]
        assert stored
        calls.clear()
        assert not any(call() for call in stored)
    finally:
        gc.enable()


def values_of_calls() -> list[Any]:
    """Stored calls, but for those that hold nothing but a task of Python's."""
    found = [calls.lookup(key) for key in calls.keys()]
    found = [call[1] if type(call) is tuple else call for call in found if call]
    return [call for call in found if isinstance(call, DenseCall) or hasattr(call, "guards")]


# ----------------------------------------------------------------------------------------------------
# Builtins
# ----------------------------------------------------------------------------------------------------


@with_fast_path
def test_arrays_whose_dtypes_are_equal_but_not_the_same_leave_the_builtin_to_others(monkeypatch):
    calls.clear()
    x, y = arrays((6, 4))
    odd = pickle.loads(pickle.dumps(x))
    assert odd.dtype is not x.dtype
    want = fx.cross_entropy(odd, y)
    assert fx.cross_entropy(x, y.astype(np.longlong)) == want
    monkeypatch.setattr(array_calls, "_exact_key", None)
    assert fx.cross_entropy(x, y) == want


@with_fast_path
def test_dtypes_and_numbers_of_axes_in_turn(monkeypatch):
    calls.clear()
    x, y = arrays((6, 4))
    kinds = [(x, y), (x.astype(np.float64), y), (x.reshape(2, 3, 4), y.reshape(2, 3))]
    want = [fx.cross_entropy_value_and_grad(*kind) for kind in kinds]
    monkeypatch.setattr(array_calls, "_exact_key", None)
    for _ in range(2):
        for kind, (loss, g) in zip(kinds, want, strict=True):
            again, g_again = fx.cross_entropy_value_and_grad(*kind)
            assert again == loss and again.dtype == loss.dtype and np.array_equal(g_again, g)


@with_fast_path
def test_another_number_of_arguments_is_refused():
    calls.clear()
    x, y = arrays((6, 4))
    loss = fx.cross_entropy(x, y)
    (call,) = {call for call in map(calls.lookup, calls.keys()) if isinstance(call, DenseCall)}
    good: tuple[Any, ...] = (1, x, y, x, -1, -100, 0.0, "mean")
    assert np.float32(call.run(*good)) == loss
    for bad in ((), good[:1], good[:7], (*good, None), (0, *good[1:]), ("1", *good[1:]), (None, *good[1:])):
        with pytest.raises(TypeError):
            call.run(*bad)
    for nth in range(4, 8):
        assert call.run(*good[:nth], None, *good[nth + 1 :]) is False


@with_fast_path
def test_another_number_of_tensors_is_refused():
    torch = pytest.importorskip("torch")
    from fastxent._fastpath.front_end import objects
    from fastxent.torch import _calls, cross_entropy

    if objects.c_interface() is None:
        pytest.skip("there is no builtin for tensors")
    calls.clear()
    x, y = map(torch.from_numpy, arrays((6, 4)))
    for _ in range(2):
        want = cross_entropy(x, y)
    (call,) = {call for call in map(calls.lookup, calls.keys()) if isinstance(call, _calls.Call)}
    loss = torch.zeros(())
    assert call.value(1, loss, x, x, y) == 1 and loss == want
    assert call.value(1, loss, x, x, y, None, None, None, None) == 1 and loss == want
    for bad in ((), (1,), (1, loss, x, x), (1, loss, x, x, y, *[None] * 5), (0, loss, x, x, y), (None, loss, x, x, y)):
        with pytest.raises(TypeError):
            call.value(*bad)


# ----------------------------------------------------------------------------------------------------
# Teams
# ----------------------------------------------------------------------------------------------------


def test_each_thread_of_a_team_has_a_tile(monkeypatch):
    """``python -X cpu_count=1`` tells Python of fewer CPUs than the process may use."""
    monkeypatch.setattr(threads, "available_cpus", lambda: 10_000)
    assert run._allowed(10_000) == threads.MOST_THREADS


@with_fast_path
def test_an_openmp_runtime_that_comes_later_is_used_whole_or_not_at_all(monkeypatch):
    from fastxent._fastpath import builtins
    from fastxent._fastpath.front_end import words

    if (now := threads._openmp()) is None:
        pytest.skip("there is no OpenMP runtime")
    fx.cross_entropy(*arrays((6, 4)))
    entries = threads.entries_of(now)
    where = [words.PARALLEL, words.THREAD_NUMBER]
    monkeypatch.setattr(builtins._State, "openmp", None)
    builtins._process[where] = 0  # as if there had been none

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threads, "entries_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            builtins.team(2)
    try:
        run._State.released.value = 7  # a task that may have read one word, and not the other
        assert builtins.team(2) == 0 and not builtins._process[where].any()
    finally:
        run._State.released.value = 0
    assert builtins.team(2) == 2 and tuple(builtins._process[where]) == entries


# ----------------------------------------------------------------------------------------------------
# The GIL
# ----------------------------------------------------------------------------------------------------

LONG, SHORT = [(200_000, 2), (1000, 400)], [(6, 4), (64, 300)]


def seen_while(shape: tuple[int, int]) -> set[bool]:
    """What another thread sees while calls are made: is a task run without the GIL?"""
    x, y = arrays(shape)
    out = np.empty_like(x)
    fx.cross_entropy_value_and_grad(x, y, out=out, n_threads=1)
    seen: set[bool] = set()
    enough = threading.Event()

    def look() -> None:
        while not enough.is_set():
            seen.add(run._State.released.value != 0)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(200):
        fx.cross_entropy_value_and_grad(x, y, out=out, n_threads=1)
        if True in seen:
            break
    enough.set()
    thread.join()
    return seen


@with_fast_path
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_other_threads_go_on_while_a_long_call_runs(shape):
    assert True in seen_while(shape)
    assert run._State.released.value == 0


@pytest.mark.parametrize("shape", SHORT, ids=str)
def test_short_calls_hold_the_gil(shape):
    assert True not in seen_while(shape)


@with_fast_path
def test_long_and_short_calls_of_one_family_at_once():
    """A block that is in use is left alone, and so are its tiles."""
    cases = [arrays(shape, seed) for seed in range(2) for shape in [*LONG, *SHORT]]
    want = [fx.cross_entropy_value_and_grad(x, y, n_threads=1) for x, y in cases]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for nth in np.random.default_rng(seed).integers(0, len(cases), 60).tolist():
            loss, g = fx.cross_entropy_value_and_grad(*cases[nth], n_threads=1 + seed % 2)
            if loss != want[nth][0] or not np.array_equal(g, want[nth][1]):
                wrong.append(nth)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and run._State.released.value == 0


FORKED = """
import os
from fastxent._runtime import run
run._State.released.value = 7
if os.fork() == 0:
    os._exit(run._State.released.value)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@has_fork
def test_a_forked_child_waits_for_no_task_of_its_parent():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr
