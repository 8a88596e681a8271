"""Who else is in the process and on the machine: limits are obeyed, nobody is disturbed, and imports come in any order."""

from __future__ import annotations

import math
import os
import sys

import pytest

from fastxent._runtime import threads
from tests.helpers.processes import run_script

linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity masks, cgroups and libgomp are Linux's")

# Sets what cv2 sets when it is imported.
LIKE_CV2 = """
import ctypes, sys, types
module = types.ModuleType("like_cv2")
ctypes.CDLL("libgomp.so.1").omp_set_dynamic(1)
sys.modules["like_cv2"] = module
"""
ORDERS = [
    ("fastxent", "torch", "numba", "sklearn", "like_cv2"),
    ("torch", "numba", "fastxent", "like_cv2", "sklearn"),
    ("numba", "like_cv2", "sklearn", "torch", "fastxent"),
    ("sklearn", "fastxent", "like_cv2", "numba", "torch"),
    ("like_cv2", "torch", "sklearn", "fastxent", "numba"),
    ("fastxent", "sklearn", "numba", "like_cv2"),  # no torch at all
]
IMPORT = """
import sys
for name in sys.argv[1:]:
    if name == "like_cv2":
        exec({like_cv2!r})
    elif name == "sklearn":
        import sklearn._loss.loss, sklearn._loss._loss
    else:
        __import__(name)
    if name == "fastxent":
        from tests.helpers import child
        before = child.result()  # used at once: what comes later must not matter
assert child.result() == before
print(before)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    path = os.pathsep.join(sys.path)
    return run_script("import warnings; warnings.simplefilter('ignore')\n" + code, *arguments, PYTHONPATH=path, **environment)


@pytest.mark.thorough
@linux
def test_any_order_of_imports_gives_one_result():
    assert len({run(IMPORT.format(like_cv2=LIKE_CV2), *order) for order in ORDERS}) == 1


PRANGE = """
import numpy as np, numba, torch, fastxent.torch
from tests.helpers import child
from numba import njit, prange
@njit(parallel=True)
def total(a):
    s = 0.0
    for i in prange(len(a)):
        s += a[i]
    return s
a = np.ones(100_000)
torch.set_num_threads(3)
before = child.both()
assert torch.get_num_threads() == 3  # after ours; Numba's own first launch resets it
numba.set_num_threads(2)
for _ in range(5):
    assert total(a) == 100_000.0 and child.both() == before
assert numba.get_num_threads() == 2
threads = torch.get_num_threads()
assert child.both() == before and torch.get_num_threads() == threads
print("well")
"""


@linux
def test_prange_in_the_same_process_is_undisturbed():
    assert run(PRANGE, NUMBA_NUM_THREADS="4") == "well"


LIMITS = """
import os, sys
from tests.helpers import child
import fastxent as fx
{before}
print(fx.get_num_threads())
"""
ONE_CORE = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"


@linux
@pytest.mark.parametrize(
    ("before", "environment", "most"),
    [
        (ONE_CORE, {}, 1),
        ("fx.get_num_threads(); " + ONE_CORE, {}, 1),
        ("", dict(OMP_NUM_THREADS="1"), 1),
        ("", dict(OMP_NUM_THREADS="3"), 3),
        ("", dict(OMP_NUM_THREADS="2,1"), 2),
        ("import torch; torch.set_num_threads(1)", {}, 1),
        ("child.result(); import threadpoolctl; threadpoolctl.threadpool_limits(1)", {}, 1),
    ],
    ids=["affinity", "affinity, later", "OMP_NUM_THREADS=1", "=3", "=2,1", "torch", "threadpoolctl"],
)
def test_limits_are_obeyed(before, environment, most):
    threads = int(run(LIMITS.format(before=before), **environment))
    assert threads == most if environment else threads <= most


CGROUP = """
import fastxent._runtime.threads as p, builtins, io, os
from pathlib import Path
files = {files!r}
def read_text(self, *args, **kwargs):
    if str(self) in files:
        return files[str(self)]
    raise FileNotFoundError(str(self))
Path.read_text = read_text
os.sched_getaffinity = lambda pid: set(range(64))
print(p.available_cpus())
"""
RUBBISH = ["", "\n", "0::", "0::\0", "0 0", "nan 100000", "100000 nan", "-5 100000", "100000 0", "1 -1", "1e999 1", "9" * 5000]
CGROUPS = {
    "v2, a container": ({"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
    "v2, no limit": ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
    "v2, a systemd service": (
        {
            "/proc/self/cgroup": "0::/system.slice/my.service\n",
            "/sys/fs/cgroup/system.slice/my.service/cpu.max": "200000 100000\n",
            "/sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
        },
        2,
    ),
    "v2, a limit further up": (
        {
            "/proc/self/cgroup": "0::/a/b\n",
            "/sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "/sys/fs/cgroup/a/cpu.max": "300000 100000\n",
        },
        3,
    ),
    "v1": (
        {
            "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "v1, no limit": ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 64),
    "none": ({}, 64),
}


@linux
@pytest.mark.parametrize(("files", "cpus"), CGROUPS.values(), ids=CGROUPS)
def test_a_cgroup_limit_is_obeyed(files, cpus):
    assert int(run(CGROUP.format(files=files))) == cpus


@linux
def test_a_cgroup_file_that_makes_no_sense_is_no_limit(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for text in RUBBISH:
        monkeypatch.setattr(threads.Path, "read_text", lambda *arguments, text=text, **options: text)
        assert threads._cgroup_quota.__wrapped__() == math.inf, text[:20]
    monkeypatch.setattr(threads.Path, "read_text", lambda *arguments, **options: b"\xff".decode())
    assert threads._cgroup_quota.__wrapped__() == math.inf


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this platform")
def test_a_sandbox_that_tells_no_affinity(monkeypatch):
    def forbidden(pid):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_getaffinity", forbidden)
    assert 1 <= threads.available_cpus() <= os.cpu_count()


BUSY = """
import json, multiprocessing as mp, os, statistics, time
import torch, torch.nn.functional as F
import fastxent.torch as fxt
def spin():
    while True:
        pass
x, y = torch.zeros(2048, 1000, requires_grad=True), torch.zeros(2048, dtype=torch.long)
def step(function):
    start = time.perf_counter()
    torch.autograd.grad(function(x, y), x)
    return time.perf_counter() - start
def medians():
    both = [(step(F.cross_entropy), step(fxt.cross_entropy)) for _ in range(60)]
    return [statistics.median(times) for times in zip(*both)]
medians()
alone = medians()
busy = [mp.get_context("fork").Process(target=spin, daemon=True) for _ in os.sched_getaffinity(0)]
for process in busy:
    process.start()
time.sleep(0.5)
crowded = medians()
for process in busy:
    process.kill()
print(json.dumps([crowded[0] / alone[0], crowded[1] / alone[1]]))
"""


@linux
@pytest.mark.slow
def test_busy_neighbours_slow_us_down_no_more_than_pytorch():
    """As many busy processes as cores. Timings: run it alone on the machine."""
    import json

    pytorch, ours = json.loads(run(BUSY))
    assert ours <= 1.25 * pytorch, f"{ours:.2f} times as long, PyTorch {pytorch:.2f}"
