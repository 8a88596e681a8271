"""Kernels that other processes compile: by a warm-up with jobs, in a program of any form."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from fastxent._codegen import side_by_side
from tests.helpers.processes import run_script

# No guard for ``__main__``: with multiprocessing each process would start others. The kernels are few, of small machine code.
WARM = """
import sys
import numpy as np
import fastxent as fx
from fastxent._abi.variant import Variant
from fastxent._codegen import registry
from fastxent._runtime import common

if "absent" in sys.argv:
    sys.executable = None
kernels = [("binary", Variant("f32", "f32")), ("divergence", Variant("f32", "f32")), ("launch", Variant("f32"))]
common.warm = lambda dtypes: kernels
seen = []
fx.warmup(["float32"], lambda *told: seen.append(told), n_jobs=2)
assert [done for done, total, name in seen] == [0, 1, 2, 3] and {total for done, total, name in seen} == {3}
assert list(registry._kernels) == kernels
loss = fx.binary_cross_entropy_with_logits(np.full(1, 2, "f4"), np.ones(1, "f4"))
print(f"{loss:.6f}", "numba" in sys.modules, registry.origins())
"""
LOSS = "0.126928"  # log(1 + exp(-2))


def test_a_warmup_with_jobs_compiles_in_other_processes(tmp_path):
    told = run_script(WARM, NUMBA_CACHE_DIR=str(tmp_path), FASTXENT_PREBUILT="0")
    assert told == f"{LOSS} False {{'compiled': 3}}"
    assert len(list(tmp_path.iterdir())) == 3
    told = run_script(WARM, NUMBA_CACHE_DIR=str(tmp_path), FASTXENT_PREBUILT="0")
    assert told == f"{LOSS} False {{'disk cache': 3}}"


def test_without_a_python_to_start_it_compiles_here(tmp_path):
    told = run_script(WARM, "absent", NUMBA_CACHE_DIR=str(tmp_path), FASTXENT_PREBUILT="0")
    assert told == f"{LOSS} True {{'compiled': 3}}"


# The processes -----------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_calls():
    calls = [(divmod, (n, 3)) for n in range(9)]
    assert list(side_by_side.results(calls, 3)) == [divmod(n, 3) for n in range(9)]
    assert list(side_by_side.results([], 3)) == []


def test_each_process_begins_with_a_call_and_is_replaced(monkeypatch):
    monkeypatch.setattr(side_by_side, "CALLS_A_PROCESS", 2)
    begin = sys.setrecursionlimit, (777,)
    calls = [(os.getpid, ())] * 4 + [(sys.getrecursionlimit, ())]
    *processes, limit = side_by_side.results(calls, 1, begin)
    assert processes[0] == processes[1] != processes[2] == processes[3] and limit == 777


def test_an_error_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        list(side_by_side.results([(divmod, (1, 0))], 2))


def test_a_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="exit status 3"):
        list(side_by_side.results([(os._exit, (3,))], 2))


def test_who_stops_waiting_ends_the_processes():
    results = side_by_side.results([(os.getpid, ()), (time.sleep, (100,))], 2)
    process, start = next(results), time.monotonic()
    results.close()
    assert time.monotonic() - start < 50
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_what_a_call_prints_is_no_result():
    code = "from fastxent._codegen import side_by_side\nprint(*side_by_side.results([(print, ('a',)), (abs, (-1,))], 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("None 1\n", "a\n")
