"""Small calls that a builtin function recognises: it must know them again, and nothing else, whatever it is given."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import fastxent as fx
from fastxent._fastpath import array_calls, builtins
from fastxent._fastpath.cache import calls
from fastxent._fastpath.front_end import objects, words
from fastxent._runtime import fastpath, run, threads

pytestmark = pytest.mark.skipif(not fastpath.ENABLED, reason="there are no builtins")

DEFAULTS = (-1, -100, 0.0, "mean")
AXIS, IGNORE, SMOOTHING, REDUCTION = DEFAULTS


@pytest.fixture(autouse=True)
def nothing_is_known():
    calls.clear()


def arrays(shape: tuple[int, ...] = (6, 4), dtype: Any = np.float32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(dtype), np.asarray(rng.integers(0, shape[-1], shape[:-1]))


def answer(name: str, *args: Any, options: tuple[Any, ...] = DEFAULTS, team: int = 1) -> Any:
    """What the builtins say whose calls have this name and equal options, whatever the arrays are."""
    stored = ((key, calls.lookup(key)) for key in calls.keys())
    dense = {call: key[:5] for key, call in stored if isinstance(call, array_calls.DenseCall)}
    found = [call.run(team, *args, *options) for call, key in dense.items() if key == (name, *options)]
    return next((loss for loss in found if loss is not False), False)


@pytest.mark.parametrize("shape", [(4,), (6, 4), (1, 1), (300, 10), (3, 5, 4), (2, 3, 2, 4), (1, 16000)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_it_answers_with_the_same_bits(shape, dtype):
    x, y = arrays(shape, dtype)
    loss, g = fx.cross_entropy_value_and_grad(x, y)
    alone = fx.cross_entropy(x, y)
    if dtype == np.float64:  # without its gradient a long row is taken in blocks, whose sums are rescaled, which rounds
        np.testing.assert_array_max_ulp(alone, loss, 1)
    else:
        assert alone == loss
    out = np.full_like(x, 7)
    again = answer("value_and_grad", x, y, out)
    assert type(again) is float and loss.dtype.type(again) == loss and np.array_equal(out, g)
    assert loss.dtype.type(answer("value", x, y, x)) == alone
    other, z = arrays(shape, dtype, seed=1)
    loss, g = fx.cross_entropy_value_and_grad(other, z, n_threads=1)  # not asked where a number of threads is given
    assert loss.dtype.type(answer("value_and_grad", other, z, other)) == loss and np.array_equal(other, g)


@pytest.mark.parametrize("shape", [(40, 1000), (3, 40000), (5000, 10), (1, 17000)], ids=str)
def test_a_team_gives_the_same_bits(shape):
    x, y = arrays(shape)
    loss, g = fx.cross_entropy_value_and_grad(x, y, n_threads=1)
    assert fx.cross_entropy(x, y) == loss
    for team in (1, 2, 3, 4, 2):
        out = np.full_like(x, 7)
        assert loss.dtype.type(answer("value_and_grad", x, y, out, team=team)) == loss and np.array_equal(out, g)
        assert loss.dtype.type(answer("value", x, y, x, team=team)) == loss
    wrong, out = y.copy(), np.full_like(x, 7)
    wrong[-1] = shape[1]
    assert answer("value_and_grad", x, wrong, out, team=2) is False and (out == 7).all()


def test_a_team_is_of_whom_there_is(monkeypatch):
    """The threads that are asked for; none but the caller after a fork; the longer way where calls share the cores, or there is
    no OpenMP. With another OpenMP runtime, that one's functions are called."""
    x, y = arrays((40, 1000))
    want = fx.cross_entropy(x, y, n_threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(threads._State, "setting", 3)
        assert builtins.team() == 3 and fx.cross_entropy(x, y) == want
        patch.setattr(run._State, "forked", True)
        assert builtins.team() == 1 and fx.cross_entropy(x, y) == want
    with monkeypatch.context() as patch:
        patch.setattr(run._State, "calls", {object()})
        assert builtins.team() == 0 and fx.cross_entropy(x, y) == want
    before = builtins._process.copy()
    with monkeypatch.context() as patch:
        patch.setattr(threads, "_openmp", lambda: None)
        assert builtins.team() == 0 and not builtins._process[[words.PARALLEL, words.THREAD_NUMBER]].any()
        assert fx.cross_entropy(x, y) == want
    assert builtins.team() > 0 and np.array_equal(builtins._process, before)


@pytest.mark.parametrize("shape", [(6, 4), (40, 1000)], ids=str)
def test_the_public_functions_ask_it(shape, monkeypatch):
    x, y = arrays(shape)
    fx.cross_entropy(x, y)
    fx.cross_entropy_value_and_grad(x, y)
    monkeypatch.setattr(array_calls, "_run_exact", None)
    monkeypatch.setattr(fx.functional, "problem", None)  # whoever is not known is checked
    loss, g = fx.cross_entropy_value_and_grad(x, y)
    assert loss == fx.cross_entropy(x, y) and type(loss) is np.float32 and g is not x
    assert fx.cross_entropy_value_and_grad(x, y, out=x)[1] is x and np.array_equal(x, g)


def test_what_differs_is_not_known():
    x, y = arrays()
    fx.cross_entropy(x, y)
    fx.cross_entropy_value_and_grad(x, y)
    out = np.full_like(x, 7)
    assert answer("value", x, y, None) is not False and answer("value_and_grad", x, y, out) is not False
    out[:] = 7
    memory = np.zeros(1000, np.uint8)
    unaligned = memory[1 : 1 + x.nbytes].view(np.float32).reshape(x.shape)
    read_only = x.copy()
    read_only.flags.writeable = False
    strided_y = np.repeat(y, 2)[::2]
    logits = [
        x[:5], x.T, x[None], x.ravel(), x.astype(np.float64), x.astype(">f4"), x.view(np.int32), np.asfortranarray(x),
        np.repeat(x, 2, axis=1)[:, ::2], unaligned, np.ma.array(x), x.tolist(), None, 3, "x", np.float32(1), type,
    ]  # fmt: skip
    targets = [y[:5], y[:, None], y.astype(np.int32), y.astype(">i8"), y.view(np.uint64), strided_y, y.tolist(), None, 3]
    places = [None, read_only, x[:5], x.T, x.astype(np.float64), unaligned, np.ma.array(x), x.ravel(), 3]
    for other in logits:
        assert answer("value", other, y, x) is False and answer("value_and_grad", other, y, out) is False
    for other in targets:
        assert answer("value", x, other, x) is False and answer("value_and_grad", x, other, out) is False
    for other in places:
        assert answer("value_and_grad", x, y, other) is False
    for options in (
        (1, IGNORE, SMOOTHING, REDUCTION), (AXIS, 2, SMOOTHING, REDUCTION), (AXIS, IGNORE, 0.1, REDUCTION),
        (AXIS, IGNORE, SMOOTHING, "sum"), (AXIS, IGNORE, 0, REDUCTION), (AXIS, IGNORE, False, REDUCTION),
        (-1.0, IGNORE, SMOOTHING, REDUCTION), (AXIS, 2**70, SMOOTHING, REDUCTION), (AXIS, IGNORE, float("nan"), REDUCTION),
        (np.int64(-1), IGNORE, SMOOTHING, REDUCTION), (AXIS, IGNORE, SMOOTHING, b"mean"), (None, None, None, None),
    ):  # fmt: skip
        assert answer("value", x, y, x, options=options) is False
    the_same = (int("-1"), int("-100"), float("-0"), "".join(["me", "an"]))
    assert answer("value", x, y, x, options=the_same) == answer("value", x, y, x)
    assert (out == 7).all() and not memory.any()


def test_a_gradient_in_another_order():
    x, y = arrays()
    in_columns, in_rows = np.zeros_like(x, order="F"), np.zeros_like(x)
    fx.cross_entropy_value_and_grad(x, y, out=in_columns)
    assert answer("value_and_grad", x, y, in_rows) is False and answer("value_and_grad", x, y, in_columns) is False
    for _ in range(2):
        fx.cross_entropy_value_and_grad(x, y, out=in_rows)
        assert np.array_equal(in_rows, in_columns)
        assert answer("value_and_grad", x, y, in_columns) is False


def test_a_gradient_is_not_written_over_what_is_read():
    x, y = arrays((16, 4))
    fx.cross_entropy_value_and_grad(x, y)
    memory = np.zeros(400, np.float32)
    logits = memory[100:164].reshape(16, 4)
    for at in range(0, 300, 4):
        logits[...] = x
        place = memory[at : at + 64].reshape(16, 4)
        assert (answer("value_and_grad", logits, y, place) is not False) == (at <= 36 or at == 100 or at >= 164), at
    both = np.zeros(200, np.int64)
    targets = both[50:66]
    for at in range(0, 100):
        targets[...] = y
        place = both.view(np.float32)[2 * at : 2 * at + 64].reshape(16, 4)
        assert (answer("value_and_grad", x, targets, place) is not False) == (at <= 18 or at >= 66), at


@pytest.mark.parametrize("bad", [-1, 4, 2**62, -(2**63)])
def test_a_class_index_out_of_range(bad):
    x, y = arrays()
    loss, _ = fx.cross_entropy_value_and_grad(x, y)
    wrong, out = y.copy(), np.full_like(x, 7)
    wrong[3] = bad
    assert answer("value_and_grad", x, wrong, out) is False and (out == 7).all()
    assert np.float32(answer("value_and_grad", x, y, out)) == loss  # the next one is not the worse for it
    wrong[:] = -100
    assert np.isnan(answer("value_and_grad", x, wrong, out)) and not out.any()


def test_of_a_full_cache_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(calls, "most", 60)  # each call has three keys
    x, y = arrays()
    indices = range(-23, 0)  # to be ignored: none is a class
    loss = fx.cross_entropy(x, y, ignore_index=indices[0])
    assert all(fx.cross_entropy(x, y, ignore_index=ignore) == loss for ignore in indices)
    gc.collect()
    for nth, ignore in enumerate(indices):
        options = (AXIS, ignore, SMOOTHING, REDUCTION)
        known = answer("value", x, y, x, options=options)
        assert known == (pytest.approx(loss, rel=1e-6) if nth >= 3 else False), nth
    assert all(fx.cross_entropy(x, y, ignore_index=ignore) == loss for ignore in indices)


@pytest.mark.parametrize("option", [{"ignore_index": 2}, {"axis": -1}], ids=str)
def test_options_that_may_change_are_not_remembered(option):
    class Number:
        def __index__(self) -> int:
            return value

    ((name, value),) = option.items()
    x, y = arrays((3, 3))
    first = fx.cross_entropy(x, y, **{name: Number()})
    value = 0
    assert fx.cross_entropy(x, y, **{name: Number()}) == fx.cross_entropy(x, y, **{name: 0}) != first
    with pytest.raises(TypeError, match="axis must be an integer"):
        fx.cross_entropy(x, y, axis=[0])


def test_options_live_as_long_as_they_are_known():
    x, y = arrays()
    for nth in range(50):
        smoothing = float(f"0.{nth + 1}")
        loss = fx.cross_entropy(x, y, label_smoothing=smoothing)
        assert np.float32(answer("value", x, y, x, options=(AXIS, IGNORE, smoothing, REDUCTION))) == loss
    gc.collect()
    fresh = [0.5 + nth / 1024 for nth in range(1, 200)]  # were they freed, one of these would lie where one of them did
    assert not any(answer("value", x, y, x, options=(AXIS, IGNORE, number, REDUCTION)) for number in fresh)


MANY = """
import signal, sys, threading
import numpy as np, fastxent as fx
kinds = [(np.full((n, 5), n, np.float32), np.arange(n) % 5) for n in range(1, 200)]
right = float(np.log(np.float32(5)))
def work(seed):
    for nth in np.random.default_rng(seed).permutation(len(kinds)):
        loss, g = fx.cross_entropy_value_and_grad(*kinds[nth])
        assert abs(loss - right) < 1e-6 and abs(g.sum()) < 1e-5
        assert abs(fx.cross_entropy(*kinds[nth]) - right) < 1e-6
def handle(*_):
    work(next(seeds))
seeds = iter(range(10**6))
sys.setswitchinterval(1e-6)
failed = []
threading.excepthook = failed.append
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not failed, failed
from fastxent._fastpath.cache import calls
calls.clear()
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-2)
for seed in range(5): work(seed)
signal.setitimer(signal.ITIMER_REAL, 0)
print("well")
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt, on this platform")
def test_threads_and_signals_that_make_calls_known_at_once():
    """In a process of its own, which a mistake would end."""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr[-2000:]


def test_where_objects_lie_otherwise_the_longer_way_is_taken(monkeypatch):
    assert objects.arrays_are_as_expected()
    for name in ("TYPE", "DATA", "NDIM", "DIMS", "DTYPE", "FLAGS"):
        with monkeypatch.context() as patched:
            patched.setattr(objects, name, getattr(objects, name) - 1)
            assert not objects.arrays_are_as_expected(), name
    monkeypatch.setattr(sys, "implementation", type("other", (), {"name": "other"}))
    x, y = arrays()
    loss, g = fx.cross_entropy_value_and_grad(x, y)
    assert answer("value_and_grad", x, y, np.empty_like(x)) is False
    again, g_again = fx.cross_entropy_value_and_grad(x, y)
    assert again == loss and np.array_equal(g, g_again)
