"""One pool of threads, PyTorch's; its number of threads, whatever it is set to; and left as it was."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import fastxent
from fastxent._runtime import threads
from fastxent.torch import cross_entropy, installed
from tests.helpers.cases import REDUCTIONS
from tests.helpers.processes import run_script
from tests.helpers.torch_cases import make_case

ROWS, CLASSES = 512, 1024  # enough work for a dozen threads


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Watched:
    """The OpenMP library, noting the size of each team that is started, be it by Python or by a builtin."""

    def __init__(self, library: ctypes.CDLL, teams: list[int]) -> None:
        def run(function: int, block: int, team: int, flags: int) -> None:
            teams.append(team)
            library.GOMP_parallel(function, block, team, flags)

        self.library = library
        self.GOMP_parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(run)

    def __getattr__(self, name: str) -> object:
        return getattr(self.library, name)


@contextmanager
def teams() -> Iterator[list[int]]:
    """The sizes of the teams that are started inside."""
    seen: list[int] = []
    library = threads._openmp()
    assert library is not None, "PyTorch for Linux brings its libgomp"
    find, watched = threads._openmp, Watched(library, seen)

    def use(openmp: Callable[[], object]) -> None:
        threads._openmp = openmp  # type: ignore[assignment]

    use(lambda: watched)
    try:
        yield seen
    finally:
        use(find)


def step(reduction: str = "mean") -> None:
    x = torch.zeros(ROWS, CLASSES, requires_grad=True)
    cross_entropy(x, torch.zeros(ROWS, dtype=torch.long), reduction=reduction).sum().backward()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_as_many_threads_as_pytorch_has(reduction, threads):
    torch.set_num_threads(threads)
    with teams() as seen:
        step(reduction)
    assert set(seen) == ({threads} if threads > 1 else set())  # one thread: no team at all
    assert torch.get_num_threads() == threads


def test_a_call_that_is_known_has_them_too():
    with teams() as seen:
        for threads in (2, 3, 3, 1, 4):
            torch.set_num_threads(threads)
            step()
    assert seen == [2, 3, 3, 4]


def test_our_own_setting_goes_first():
    torch.set_num_threads(4)
    fastxent.set_num_threads(2)
    try:
        with teams() as seen:
            step()
    finally:
        fastxent.set_num_threads(None)
    assert set(seen) == {2} and torch.get_num_threads() == 4


def test_each_python_thread_has_its_own_number():
    """torch.set_num_threads is per thread in OpenMP; a worker thread that limits itself limits us there."""
    import threading

    seen_there: list[int] = []

    def work() -> None:
        torch.set_num_threads(2)
        with teams() as seen:
            step()
        seen_there.extend(seen)

    torch.set_num_threads(4)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert set(seen_there) == {2}


def test_small_work_starts_no_team():
    torch.set_num_threads(4)
    with teams() as seen:
        x = torch.zeros(32, 10, requires_grad=True)
        cross_entropy(x, torch.zeros(32, dtype=torch.long)).backward()
    assert seen == []


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_number_is_the_same_before_and_after_any_call(threads):
    torch.set_num_threads(threads)
    between = torch.get_num_interop_threads()
    case = make_case(torch.float64, (2, 60, 3, 4), "weight ignore")
    for function in (cross_entropy, F.cross_entropy):
        with installed():
            for reduction in REDUCTIONS:
                x = case.logits.clone().requires_grad_()
                function(x, case.target, reduction=reduction, **case.options).sum().backward()
                assert torch.get_num_threads() == threads
    assert torch.get_num_interop_threads() == between


PROCESS = """
import json, os, sys
import torch
{first}
import fastxent.torch as fxt
import torch.nn.functional as F
torch.set_num_threads(3)
x, y = torch.rand(512, 1024, requires_grad=True), torch.zeros(512, dtype=torch.long)
def threads():
    return len(os.listdir("/proc/self/task"))
for _ in range(3):
    F.cross_entropy(x, y).backward()
    (x.detach() * 2).exp().sum()
alone = threads()
for reduction in ("mean", "sum", "none"):
    for _ in range(3):
        fxt.cross_entropy(x, y, reduction=reduction).sum().backward()
together = threads()
F.cross_entropy(x, y).backward()
from fastxent._runtime import threads as ours
maps = sorted({{os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if "libgomp" in line}})
used = os.path.realpath(ours.openmp_path())
numbers = dict(alone=alone, together=together, later=threads(), threads=torch.get_num_threads())
print(json.dumps(dict(**numbers, maps=maps, used=used, torch=os.path.dirname(torch.__file__))))
"""


@pytest.mark.parametrize("first", ["", "import fastxent; fastxent.cross_entropy([[1.0, 2.0]], [0])"], ids=["torch", "NumPy"])
def test_one_libgomp_and_one_pool(first):
    """Our calls start no thread that PyTorch's have not started, and no second OpenMP runtime is loaded."""
    got = json.loads(run_script(PROCESS.format(first=first), OPENBLAS_NUM_THREADS="1"))  # SciPy's starts when Numba is loaded
    assert got["maps"] == [got["used"]] and got["used"].startswith(got["torch"])
    assert got["alone"] == got["together"] == got["later"]
    assert got["threads"] == 3


LATE = """
import os
import fastxent
import numpy as np
fastxent.set_num_threads(2)
fastxent.cross_entropy(np.zeros((512, 1024), "f4"), np.zeros(512, int))
import torch
import fastxent.torch as fxt
fastxent.set_num_threads(None)
torch.set_num_threads(2)
fxt.cross_entropy(torch.zeros(512, 1024), torch.zeros(512, dtype=torch.long))
from fastxent._runtime import threads
maps = {os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if "libgomp" in line}
assert maps == {os.path.realpath(threads.openmp_path())}, maps
assert torch.get_num_threads() == fastxent.get_num_threads() == 2
print("well")
"""


def test_one_pool_also_if_pytorch_comes_late():
    """NumPy calls before `import torch` load the system's libgomp; PyTorch then takes that one, not a second."""
    assert run_script(LATE) == "well"


def test_threadpoolctl_limits_us_through_pytorchs_pool():
    """A limit on OpenMP set from outside is a limit for PyTorch, and so for us."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    torch.set_num_threads(4)
    with threadpoolctl.threadpool_limits(2, user_api="openmp"), teams() as seen:
        assert torch.get_num_threads() == 2
        step()
    assert set(seen) == {2}
