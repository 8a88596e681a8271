"""Forked, spawned, interrupted and ending processes: the same bits, no hang, no crash, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.processes import has_fork, run_script

NO_OPENMP = "threads._openmp = lambda: None  # as on macOS and Windows"


def run(code: str, **environment: str) -> str:
    """Numba may say that it cannot know what a fork of a process with threads does: that is what is tested."""
    ignore = "import warnings; warnings.filterwarnings('ignore', '.*fork', DeprecationWarning)\n"
    return run_script(ignore + code, PYTHONPATH=os.pathsep.join(sys.path), PYTHONFAULTHANDLER="1", **environment)


METHODS = """
import multiprocessing as mp
import fastxent.torch
from tests.helpers import child
mp.set_start_method({before!r})  # after the import ...
before = child.both()
mp.set_start_method({after!r}, force=True)  # ... and after use
with mp.Pool(2) as pool:
    assert pool.map(child.both, range(4)) == [before] * 4
assert child.both() == before
import torch.utils.data as data
loader = data.DataLoader(child.Losses(), num_workers=2, multiprocessing_context={after!r}, batch_size=None)
assert list(loader) == [before[1]] * 4
assert child.both() == before
print("well")
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param("spawn", "fork", marks=has_fork), pytest.param("fork", "forkserver", marks=has_fork), ("spawn", "spawn")],
)
def test_start_methods(before, after):
    assert run(METHODS.format(before=before, after=after)) == "well"


GENERATIONS = """
import threading
from tests.helpers import child
before = child.both()
# A grandchild, and one whose parent has used nothing.
assert child.in_a_fork(lambda: (child.both(), child.in_a_fork(child.both))) == str((before, str(before)))
assert child.in_a_fork(lambda: child.in_a_fork(child.both)) == str(before)
# A thread of the child, and a fork from a thread.
def from_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]
assert child.in_a_fork(lambda: from_a_thread(child.both)) == str(before)
assert from_a_thread(lambda: child.in_a_fork(child.both)) == str(before)
print("well")
"""


@has_fork
def test_children_and_grandchildren():
    assert run(GENERATIONS) == "well"


BUSY = """
import threading
from tests.helpers import child
from fastxent._runtime import run
from fastxent._runtime import threads
{how}
before = child.result()
stop = False
wrong = []
def work():
    while not stop:
        if child.result() != before:
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads:
    t.start()
children = [child.in_a_fork() for _ in range(25)]
stop = True
for t in threads:
    t.join()
assert children == [before] * 25, children
assert not wrong and child.result() == before
print("well")
"""


@has_fork
@pytest.mark.parametrize("how", ["", NO_OPENMP], ids=["OpenMP", "threads"])
def test_a_fork_while_others_compute(how):
    assert run(BUSY.format(how=how)) == "well"


COMPILING = """
import threading, time
from tests.helpers import child
import numpy as np, fastxent as fx
from fastxent._codegen import machine_code
begun, compiled = threading.Event(), machine_code.compiled
def signalling(*arguments):
    begun.set()
    return compiled(*arguments)
machine_code.compiled = signalling
def loss(dtype):
    return float(fx.binary_cross_entropy_with_logits(np.full(5, 2, dtype), np.ones(5, dtype)))
thread = threading.Thread(target=loss, args=("f4",))
thread.start()
begun.wait()
time.sleep(0.2)
assert thread.is_alive()
assert child.in_a_fork(lambda: f"{loss('f8'):.6f}") == "0.126928"
thread.join()
print("well")
"""


@has_fork
def test_a_fork_while_another_thread_compiles(tmp_path):
    """Numba compiles behind a lock; a child that is forked meanwhile must not find it locked."""
    assert run(COMPILING, NUMBA_CACHE_DIR=str(tmp_path)) == "well"


INTERRUPTED = """
import gc, os, random, signal, threading, time
from tests.helpers import child
import numpy as np, fastxent as fx
from fastxent._runtime import run
from fastxent._runtime import threads
{how}
random.seed(1)
x, y = np.zeros((4000, 2000), np.float32), np.zeros(4000, int)
out = np.empty_like(x)
before = child.result()
fx.cross_entropy_value_and_grad(x, y, out=out)
gc.collect(); gc.disable()  # compiling leaves finalizers behind, and Python drops an interrupt that falls into one
interrupts = 0
for _ in range(40):
    out[...] = 7
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 4e-3))
        while True:
            fx.cross_entropy_value_and_grad(x, y, out=out)
    except KeyboardInterrupt:
        interrupts += 1
    seen = out.copy()  # nobody writes any more: the array could be freed now
    time.sleep(0.01)
    assert np.array_equal(out, seen)
# Small calls, so that the signal comes between the instructions of ours.
x, y = child.X[:300], child.Y[:300]
for _ in range(1500):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 4e-4))
        while True:
            fx.cross_entropy_value_and_grad(x, y)
    except KeyboardInterrupt:
        interrupts += 1
assert interrupts == 1540
assert child.result() == before
assert not run._State.calls, "later calls would take fewer threads"
print("well")
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this platform")
@pytest.mark.parametrize("how", ["", NO_OPENMP], ids=["OpenMP", "threads"])
def test_ctrl_c(how):
    ctrl_c = "import signal; signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
    assert run(ctrl_c + INTERRUPTED.format(how=how)) == "well"


ENDING = """
import logging, sys, threading, time
from tests.helpers import child
import numpy as np, fastxent as fx
from fastxent._runtime import run
from fastxent._runtime import threads
{how}
logging.getLogger("fastxent").setLevel("ERROR")  # it would say that it compiles
child.result()
x, y = np.zeros((3000, 3000), np.float32), np.zeros(3000, int)
def work():
    while True:
        fx.cross_entropy_value_and_grad(x, y)
        child.result()
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
{end}
"""


@pytest.mark.thorough
@pytest.mark.parametrize("end", ["", "sys.exit(3)", "import os; os.kill(os.getpid(), 15)"], ids=["end", "exit", "SIGTERM"])
@pytest.mark.parametrize("how", ["", NO_OPENMP], ids=["OpenMP", "threads"])
def test_exit_while_calls_are_in_flight(how, end):
    """NumPy only: PyTorch aborts by itself if the process ends while daemon threads are in its operators."""
    code = ENDING.format(how=how, end=end)
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == {"": 0, "s": 3, "i": -signal.SIGTERM}[end[:1]], done.stderr[-2000:]
        assert done.stderr == ""
        assert time.monotonic() - start < 60
