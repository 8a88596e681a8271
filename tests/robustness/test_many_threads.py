"""Sixteen Python threads at once: the bits of a serial call, no deadlock, and nothing left of threads that have ended."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import fastxent as fx
import fastxent.torch as fxt
from fastxent._codegen import registry
from fastxent._runtime import threads
from tests.helpers.cases import BFLOAT16, FLOAT32, FLOAT64, make_case
from tests.helpers.processes import run_script
from tests.helpers.torch_cases import make_case as make_torch_case

THREADS = 16

# From serial calls to calls that want every core, and one whose rows are shared out.
SHAPES = [(5, 10), (3000, 10), (17, 100), (700, 300), (64, 6500), (2, 70_000)]


def array_calls() -> list[Callable[[], list[Any]]]:
    calls: list[Callable[[], list[Any]]] = []
    for (rows, classes), dtype in itertools.product(SHAPES, (FLOAT32, FLOAT64, BFLOAT16)):
        x, y, _ = make_case(dtype, (rows, classes))
        calls += [lambda x=x, y=y: [*fx.cross_entropy_value_and_grad(x, y)]]
        if dtype == FLOAT32:
            calls += [
                lambda x=x, y=y: [fx.cross_entropy(x, y, reduction="none")],
                lambda x=x: [fx.log_softmax(x, axis=-1)],
                lambda x=x, y=y: [*fx.cross_entropy_stats(x, y)],
            ]
    return calls


def tensor_calls() -> list[Callable[[], list[Any]]]:
    def step(x: torch.Tensor, y: torch.Tensor, reduction: str) -> list[Any]:
        x = x.detach().requires_grad_()
        loss = fxt.cross_entropy(x, y, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        return [loss.detach().numpy(), gradient.numpy()]

    cases = [make_torch_case(torch.float32, shape) for shape in [*SHAPES, (600, 700)]]
    return [lambda c=c, r=r: step(c.logits, c.target, r) for c, r in itertools.product(cases, ("mean", "none"))]


def bits(results: list[Any]) -> list[bytes]:
    return [np.asarray(a).tobytes() for a in results]


def hammer(seconds: float) -> tuple[int, list[str]]:
    """Each thread makes random calls; how many there were, and what was wrong."""
    calls = array_calls() + tensor_calls()
    fx.set_num_threads(1)
    try:
        expected = [bits(call()) for call in calls]
    finally:
        fx.set_num_threads(None)
    wrong: list[str] = []
    counts = [0] * THREADS
    end = time.monotonic() + seconds

    def work(me: int) -> None:
        rng = np.random.default_rng(me)
        while time.monotonic() < end:
            k = int(rng.integers(len(calls)))
            try:
                if bits(calls[k]()) != expected[k]:
                    wrong.append(f"call {k} gave other bits")
            except Exception as error:
                wrong.append(f"call {k}: {error!r}")
            counts[me] += 1

    threads = [threading.Thread(target=work, args=(me,), daemon=True) for me in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=seconds + 120)
    wrong += [f"{thread.name} hangs" for thread in threads if thread.is_alive()]
    return sum(counts), wrong


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["OpenMP", "threads"])
def test_the_bits_of_serial_calls(how, monkeypatch):
    if how == "threads":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    count, wrong = hammer(4)
    assert not wrong
    assert count > 100


@pytest.mark.slow
def test_the_bits_of_serial_calls_for_a_minute():
    count, wrong = hammer(60)
    assert not wrong
    assert count > 2000


def test_calls_in_flight_share_the_cores(monkeypatch):
    """While one call is in flight the next gets half of the threads, and all of them afterwards."""
    teams: list[int] = []
    inside, go_on = threading.Event(), threading.Event()

    class Library:
        """OpenMP's place, waiting in the first call."""

        omp_get_thread_num = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)

        @staticmethod
        @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        def GOMP_parallel(function: int, block: int, team: int, flags: int) -> None:
            teams.append(team)
            if len(teams) == 1:
                inside.set()
                assert go_on.wait(60)
            registry._FUNCTION(function)(block)

        def omp_get_max_threads(self) -> int:
            return 8

    x, y, _ = make_case(FLOAT32, (4000, 300))  # no builtin, which would keep the GIL, takes so many
    expected = bits([*fx.cross_entropy_value_and_grad(x, y)])
    library = Library()
    monkeypatch.setattr(threads, "_openmp", lambda: library)
    fx.set_num_threads(8)
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(fx.cross_entropy_value_and_grad, x, y)
            assert inside.wait(60)
            second = fx.cross_entropy_value_and_grad(x, y)
            go_on.set()
            assert bits([*first.result(60)]) == bits([*second]) == expected
        fx.cross_entropy_value_and_grad(x, y)
    finally:
        fx.set_num_threads(None)
    assert teams == [8, 4, 8]


SERVER = """
import os, threading
from tests.helpers import child
from fastxent._codegen import registry
from fastxent._runtime import threads
{how}
def tasks():
    return len(os.listdir("/proc/self/task"))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
def generation():
    threads = [threading.Thread(target=child.both) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
for _ in range(30):
    generation()
threads, memory = tasks(), resident()
for _ in range({generations}):
    generation()
assert tasks() <= threads + 8, (threads, tasks())  # the last ones' may be ending
assert resident() - memory < 10 << 20, (memory, resident())
print("well")
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the number of threads and the memory")
@pytest.mark.parametrize("how", ["", "threads._openmp = lambda: None"], ids=["OpenMP", "threads"])
def test_threads_that_come_and_go_leave_nothing(how):
    """A web server's pool: eight threads at a time, all of which call, end and are replaced."""
    code = SERVER.format(how=how, generations=60)
    assert run_script(code, PYTHONPATH=os.pathsep.join(sys.path)) == "well"
