"""Memory: flat over many calls; and no gradient buffer is handed out twice, whoever still looks at it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fastxent as fx
import fastxent.torch as fxt
from fastxent._runtime import buffers
from tests.helpers.processes import has_fork, run_script

CALLS = """
import gc, os, resource
import numpy as np, torch
import fastxent as fx, fastxent.torch as fxt
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
x, y = np.random.default_rng(0).standard_normal((64, 20), np.float32), np.zeros(64, int)
large, rows = np.zeros((600, 700), np.float32), np.zeros(600, int)
t, classes = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)
bad = np.full(64, 99)
def some(n):
    for i in range(n):
        fx.cross_entropy_value_and_grad(x, y)
        fx.cross_entropy_stats(x, y)
        try:
            fx.cross_entropy(x, bad)
        except IndexError:
            pass
        torch.autograd.grad(fxt.cross_entropy(t, classes), t)
        fxt.cross_entropy(t, classes, reduction="none")  # a graph that no backward ever runs through
        if i % 50 == 0:  # past the size where buffers are recycled, and threads work
            fx.cross_entropy_value_and_grad(large, rows)
            leaf = torch.from_numpy(large).requires_grad_()
            fxt.cross_entropy(leaf, torch.from_numpy(rows)).backward()
            fx.cross_entropy(np.zeros((1 + i % 1000, 10)), np.zeros(1 + i % 1000, int))  # plans are kept, so many at most
def strange(n):
    for i in range(n):
        fx.cross_entropy(np.zeros((2, 3 + i), np.float32), [0, 1])
some({warm})
strange(5000)
before = resident()
some({calls})
strange(9000)
print((resident() - before) >> 20)
"""


def growth(calls: int) -> int:
    """MiB that so many rounds of five calls have added to the process."""
    return int(run_script(CALLS.format(warm=1000, calls=calls), PYTHONPATH=os.pathsep.join(sys.path), timeout=1500))


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory in use")


@linux
def test_memory_is_flat():
    assert growth(2000) < 6


@linux
@pytest.mark.slow
def test_memory_is_flat_over_100_000_calls():
    assert growth(20_000) < 6


# ----------------------------------------------------------------------------------------------------
# The recycler of gradient buffers
# ----------------------------------------------------------------------------------------------------

MIB = 1 << 20


def buffer(nbytes: int) -> np.ndarray:
    return buffers.empty((nbytes,), np.dtype(np.uint8))


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    limit = buffers._Store.limit
    gc.collect()
    fx.release_buffers()
    yield
    fx.set_buffer_limit(limit)
    fx.release_buffers()


def address(a: Any) -> int:
    return a.data_ptr() if isinstance(a, torch.Tensor) else a.__array_interface__["data"][0]


def gradient() -> torch.Tensor:
    x = torch.zeros(600, 700, requires_grad=True)
    fxt.cross_entropy(x, torch.zeros(600, dtype=torch.long)).backward()
    assert x.grad is not None
    return x.grad


def test_a_freed_buffer_is_used_again():
    first = gradient()
    place = address(first)
    del first
    assert address(gradient()) == place


class Kept(torch.autograd.Function):
    """Saves what it is given."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * ctx.saved_tensors[0]


def by_an_exception(g: torch.Tensor) -> Any:
    try:
        raise ValueError(g)
    except ValueError as error:
        return error


# gradient -> something that refers to its memory in some way; the gradient itself is dropped.
HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda g: g,
    "a row": lambda g: g[3],
    "the last element": lambda g: g[-1, -1],
    "transposed": lambda g: g.T,
    "as another type": lambda g: g.view(torch.int32),
    "detached": lambda g: g.detach(),
    "NumPy": lambda g: g.numpy(),
    "a row in NumPy": lambda g: g.numpy()[5:7, ::2],
    "a memoryview": lambda g: memoryview(g.numpy()),
    "storage": lambda g: g.untyped_storage(),
    "DLPack": lambda g: torch.utils.dlpack.to_dlpack(g),
    "NumPy by DLPack": lambda g: np.from_dlpack(g),
    "a parameter": lambda g: torch.nn.Parameter(g),
    "a saved tensor": lambda g: Kept.apply(g.requires_grad_()),
    "a closure": lambda g: lambda: g,
    "a cycle": lambda g: [ring := [g], ring.append(ring)],
    "an exception": by_an_exception,
    "a generator": lambda g: (x for x in [g]),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", HOLDERS)
def test_no_buffer_is_handed_out_that_is_still_looked_at(name):
    first = gradient()
    place, content = address(first), first.numpy().copy()
    holder = HOLDERS[name](first)
    look = np.ndarray(content.shape, np.float32, (ctypes.c_char * content.nbytes).from_address(place))
    del first
    for _ in range(3):
        others = [gradient() for _ in range(2)]
        assert place not in map(address, others)
        assert np.array_equal(look, content)
    del holder


def test_no_buffer_is_handed_out_that_a_hook_or_a_graph_keeps():
    kept: list[torch.Tensor] = []
    x = torch.zeros(600, 700, requires_grad=True)
    x.register_hook(kept.append)
    y = torch.zeros(600, dtype=torch.long)
    loss = fxt.cross_entropy(x, y)  # the gradient exists already, and waits in the graph
    others = [gradient() for _ in range(2)]
    loss.backward(retain_graph=True)
    (place,) = map(address, kept)
    assert place not in map(address, [*others, gradient(), gradient()])
    loss.backward()
    assert address(kept[1]) != place or kept[1] is kept[0]
    assert torch.equal(kept[0], kept[1])


def test_an_error_in_the_midst_gives_the_buffer_back():
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    for _ in range(3):
        x = torch.zeros(600, 700, requires_grad=True)
        with pytest.raises(ValueError, match="no"):
            fxt.cross_entropy(Refuses.apply(x), torch.zeros(600, dtype=torch.long)).backward()
    del x
    gc.collect()
    assert 600 * 700 * 4 <= fx.release_buffers() < 3 * 600 * 700 * 4


def test_the_store_is_bounded_and_gives_back():
    fx.set_buffer_limit(8 * MIB)
    leases = [buffer(3 * MIB) for _ in range(5)]
    del leases
    assert 0 < fx.release_buffers() <= 8 * MIB
    assert fx.release_buffers() == 0
    big = buffer(9 * MIB)
    del big
    assert fx.release_buffers() == 0  # larger than all that may be kept
    fx.set_buffer_limit(0)
    last = buffer(3 * MIB)
    del last
    assert fx.release_buffers() == 0


def test_the_latest_are_kept():
    fx.set_buffer_limit(4 * MIB)
    old = buffer(2 * MIB)
    del old
    new = buffer(3 * MIB)
    place = address(new)
    del new
    assert address(buffer(3 * MIB)) == place
    assert 3 * MIB <= fx.release_buffers() < 5 * MIB  # the old one had to go


def test_threads_share_the_store_and_nothing_else():
    """Each writes its number into all of a buffer, and finds it there."""
    wrong: list[int] = []

    def work(me: int) -> None:
        held: list[np.ndarray] = []
        for i in range(150):
            mine = buffer(MIB + 4096 * (i % 3))
            mine[::4096] = me
            held = [*held[-2:], mine]
            if any((b[::4096] != me).any() for b in held):
                wrong.append(me)
            if i % 40 == 0:
                fx.release_buffers()

    threads = [threading.Thread(target=work, args=(me,)) for me in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fx.release_buffers() <= buffers._Store.limit


FORK = """
import os
from tests.helpers import child
import numpy as np, fastxent as fx
from fastxent._runtime import buffers
buffer = lambda n: buffers.empty((n,), np.dtype("u1"))
lent, freed = buffer(1 << 21), buffer(1 << 21)
lent[:] = 1
place = freed.ctypes.data
del freed
def inside():
    assert fx.release_buffers() == 0  # what the parent has kept is the parent's
    mine = buffer(1 << 21)
    mine[:] = 2
    assert (lent == 1).all()
    return "well"
assert child.in_a_fork(inside) == "well"
assert (lent == 1).all() and buffer(1 << 21).ctypes.data == place
print("well")
"""


@has_fork
def test_the_store_survives_a_fork():
    assert run_script(FORK, PYTHONPATH=os.pathsep.join(sys.path)) == "well"


def test_signals_that_want_buffers_in_the_midst_of_the_store():
    """Whatever the store is doing: nobody waits, and no buffer goes to two."""
    code = (
        "import signal, numpy as np; from fastxent._runtime.buffers import empty\n"
        "buffer = lambda: empty((2**20,), np.dtype('u1'))\n"
        "held = [buffer() for _ in range(3)]\n"
        "def handle(*_):\n"
        "    mine = [buffer() for _ in range(2)]\n"
        "    for b in mine: b[0] = 1\n"
        "signal.signal(signal.SIGALRM, handle)\n"
        "signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)\n"
        "for n in range(20000):\n"
        "    held[n % 3] = None\n"
        "    held[n % 3] = buffer()\n"
        "    places = {b.ctypes.data for b in held}\n"
        "    assert len(places) == 3\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "print('well')"
    )
    assert run_script(code, timeout=120) == "well"


def test_gradients_that_live_together_beyond_the_limit():
    """Those that fit beside each other are used again, step by step; a cycle does not push out what comes next."""
    fx.set_buffer_limit(64 * MIB)
    places: list[set[int]] = []
    for _ in range(3):
        alive = [buffer(size * MIB) for size in (19, 25, 32)]
        places.append({address(b) for b in alive[:2]})
        del alive
    assert places[0] == places[1] == places[2]
    assert fx.release_buffers() <= 64 * MIB


def test_a_smaller_limit_lets_go_of_what_is_in_use():
    lent = buffer(3 * MIB)
    fx.set_buffer_limit(0)
    del lent
    assert fx.release_buffers() == 0


def test_buffers_at_the_end_of_the_process():
    code = (
        "import sys, numpy as np; from fastxent._runtime.buffers import empty; sys.kept = [empty((2**20,), np.dtype('u1'))] * 3"
    )
    assert run_script(code) == ""
