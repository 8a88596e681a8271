"""The first call, which imports and compiles: interrupted, slow, on a small stack, where there are no threads."""

from __future__ import annotations

import logging
import threading

import pytest

import fastxent as fx
from fastxent._codegen import patience as patience_module
from fastxent._codegen import registry
from fastxent._codegen.uninterrupted import lock, uninterrupted
from tests.helpers.processes import run_script

LOSS = "0.126928"  # log(1 + exp(-2))

# A signal comes exactly when the import of one of these begins, and the import waits until the interrupt has been seen. The
# compiler imports the last three when it finds out that it needs them.
INTERRUPTED = """
import os, signal, sys, threading
points = ["numpy.linalg", "llvmlite.binding.ffi", "numba.core.types", "numba.core.typing.templates"]
points += ["numba.core.typing.arraydecl", "numba.np.arrayobj", "numba.cpython.mathimpl"]
seen = threading.Event()
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in points:
            points.remove(name)
            seen.clear()
            os.kill(os.getpid(), signal.SIGINT)
            seen.wait(20)
sys.meta_path.insert(0, Finder())
import fastxent as fx
interrupts = 0
while True:
    try:
        loss = fx.binary_cross_entropy_with_logits([2.0], [1.0])
        break
    except KeyboardInterrupt:
        interrupts += 1
        seen.set()
assert interrupts == 7 and not points, (interrupts, points)
assert threading.active_count() == 1
print(f"{loss:.6f}")
"""


def test_ctrl_c_while_it_imports_and_compiles(tmp_path):
    """NumPy, llvmlite, Numba: none of them can be imported again once half of it was."""
    assert run_script(INTERRUPTED, NUMBA_CACHE_DIR=str(tmp_path)) == LOSS


SMALL_STACK = """
import logging, sys, threading
import fastxent as fx
from fastxent._codegen import patience as patience_module
patience_module._State.left = 0
threading.stack_size(64 * 1024)
losses = []
thread = threading.Thread(target=lambda: losses.append(fx.binary_cross_entropy_with_logits([2.0], [1.0])))
thread.start()
thread.join()
assert threading.stack_size() == 64 * 1024
print(*(f"{loss:.6f}" for loss in losses))
"""


def test_a_thread_with_a_small_stack_compiles_and_says_so_on_stderr(tmp_path):
    """A warning of the log, not one of ``warnings``: those are errors in this process."""
    code = "import sys; sys.stderr = sys.stdout\n" + SMALL_STACK
    message, loss = run_script(code, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    assert "fastxent warmup" in message and loss == LOSS


# Patience ---------------------------------------------------------------------------------------------


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(patience_module._State, "left", patience_module.SECONDS)
    monkeypatch.setattr(patience_module._State, "quiet", False)


def test_it_is_said_once(patience, caplog):
    waited = []
    for ended in (True, False, False):
        patience_module.watch(lambda seconds, ended=ended: waited.append(seconds) or ended)
    assert 0 < waited[1] <= waited[0] == patience_module.SECONDS and len(waited) == 2
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("fastxent", "WARNING")


def test_seconds_add_up(patience, monkeypatch, caplog):
    """A call may need several kernels, none of which takes two seconds."""
    clock = iter([0.0, 1.5, 10.0, 11.5])
    monkeypatch.setattr(patience_module.time, "monotonic", lambda: next(clock))
    left = []
    for _ in range(2):
        patience_module.watch(lambda seconds: left.append(seconds) or seconds > 1.5)
    assert left == [2.0, 0.5] and len(caplog.records) == 1


def test_it_can_be_silenced(patience, caplog):
    with caplog.at_level(logging.ERROR, "fastxent"):
        patience_module.watch(lambda seconds: False)
    assert not caplog.records


def test_warmup_says_nothing(patience, caplog, monkeypatch):
    monkeypatch.setattr(registry, "kernel", lambda name, variant: patience_module.watch(lambda seconds: False))
    fx.warmup(["float32"])
    assert not caplog.records and not patience_module._State.quiet


# The thread -------------------------------------------------------------------------------------------


def test_results_and_errors_are_the_works():
    assert uninterrupted(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        uninterrupted(divmod, 7, 0)
    assert uninterrupted(threading.current_thread) is not threading.current_thread()


def test_work_that_needs_work():
    assert uninterrupted(uninterrupted, uninterrupted, int, "7") == 7


def test_one_work_at_a_time():
    inside, most = [], []

    def work():
        inside.append(1)
        most.append(len(inside))
        inside.pop()

    stack = threading.stack_size()
    threads = [threading.Thread(target=uninterrupted, args=(work,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20 and threading.stack_size() == stack
    assert lock.acquire(blocking=False)
    lock.release()


def test_where_no_thread_can_be_started_the_caller_works(monkeypatch):
    """At a system's limit, in a browser, and when the interpreter is ending."""

    def no_more(self):
        raise RuntimeError("can't start new thread")

    before = threading.stack_size()
    monkeypatch.setattr(threading.Thread, "start", no_more)
    assert uninterrupted(threading.current_thread) is threading.current_thread()
    assert threading.stack_size() == before
