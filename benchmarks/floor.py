# mypy: ignore-errors
# (kernels are typed by Numba, as in fastxent._kernels.steps)
"""The streaming floor: what it costs to read the inputs and write the gradient when nothing is computed but 1.0001 x.

The same vectors, threads and way of handing out work as fastxent's kernels have. A gradient in place is written with plain
stores, one into another array past the caches (non-temporal) or not, whichever is faster; a loss only reads. Buffers are the
floor's own, aligned to cache lines, and float32 whatever the case is: the bytes count.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numba import types

from benchmarks.cases import GRAD, Array, Case
from fastxent._abi import argument_block as abi
from fastxent._abi.argument_block import WORK
from fastxent._abi.variant import CHUNK, SYMBOL, Variant
from fastxent._codegen import compiler, machine_code, registry
from fastxent._kernels.parallel_for import one_by_one, parallel_for, thread_number
from fastxent._runtime import run
from fastxent._runtime.plan import Plan
from fastxent._simd.lanes import sum_across
from fastxent._simd.memory import load, prefetch, store, store_non_temporal
from fastxent._simd.numba_backend import inlined
from fastxent._simd.parts import c_function
from fastxent._simd.vector import LANES, lane, splat

VECTOR = 4 * LANES  # bytes
AHEAD = 128  # vectors
OUT, IN_PLACE, READ = "out=", "in place", "read"  # floors; then the tasks that may be one
TASKS_OF = {OUT: ("streamed", "stored"), IN_PLACE: ("stored",), READ: ("read",)}


@inlined
def scaled(task, x, t, j):
    """1.0001 x, vector j of a unit; plus the probabilities where there are some."""
    prefetch(x, VECTOR * (j + AHEAD))
    y = load(x + VECTOR * j) * 1.0001
    if task.soft:
        prefetch(t, VECTOR * (j + AHEAD))
        return y + load(t + VECTOR * j)
    return y


@inlined
def streamed(task, tile, number):
    """Unit ``number``: n_vectors vectors; zeros without a look at x from unit n_rows on, as for ignored rows."""
    at = number * task.n_vectors * VECTOR
    x, t, g = task.x + at, task.t + at, task.g + at
    if number < task.n_rows:
        for j in range(task.n_vectors):
            store_non_temporal(g + VECTOR * j, scaled(task, x, t, j))
    else:
        for j in range(task.n_vectors):
            store_non_temporal(g + VECTOR * j, splat(g, 0.0))
    return 0.0, 1.0


@inlined
def stored(task, tile, number):
    """The same through the caches; g may be x."""
    at = number * task.n_vectors * VECTOR
    x, t, g = task.x + at, task.t + at, task.g + at
    if number < task.n_rows:
        for j in range(task.n_vectors):
            store(g + VECTOR * j, scaled(task, x, t, j))
    else:
        for j in range(task.n_vectors):
            store(g + VECTOR * j, splat(g, 0.0))
    return 0.0, 1.0


@inlined
def read(task, tile, number):
    """A sum, so that nothing is left out; in four parts, so that no addition waits for the one before."""
    at = number * task.n_vectors * VECTOR
    x, t = task.x + at, task.t + at
    a = b = c = d = splat(x, 0.0)
    if number < task.n_rows:
        for j in range(0, task.n_vectors, 4):
            a = a + scaled(task, x, t, j)
            b = b + scaled(task, x, t, j + 1)
            c = c + scaled(task, x, t, j + 2)
            d = d + scaled(task, x, t, j + 3)
    return float(lane(sum_across((a + b) + (c + d)), 0)), 1.0


all_streamed, all_stored, all_read = map(one_by_one, (streamed, stored, read))


def streamed_task(task):
    parallel_for(task, WORK, thread_number(task), all_streamed, task.n_units, task.chunk)


def stored_task(task):
    parallel_for(task, WORK, thread_number(task), all_stored, task.n_units, task.chunk)


def read_task(task):
    parallel_for(task, WORK, thread_number(task), all_read, task.n_units, task.chunk)


TASKS = {"streamed": streamed_task, "stored": stored_task, "read": read_task}


@lru_cache
def kernel(name: str, variant: Variant) -> registry.Kernel:
    module = c_function(TASKS[name], types.void(compiler.task_type("floor", variant)), SYMBOL)
    address, engine = machine_code.link(compiler.object_of(module))
    return registry.Kernel(registry._FUNCTION(address), address, engine)


def floats(nbytes: int) -> Array:
    """So many bytes of ones, aligned to cache lines."""
    raw = np.empty(nbytes + VECTOR, np.uint8)
    start = -raw.ctypes.data % VECTOR
    array = raw[start : start + nbytes].view(np.float32)
    array.fill(1.0)
    return array


class Floor:
    """A floor of a case: ``run`` is what is timed; ``x``, ``t``, ``g`` and ``sums`` are what it reads and writes."""

    def __init__(self, case: Case, which: str, n_threads: int) -> None:
        vectors = 64 if case.logit_bytes >= 64 * VECTOR * 64 else 4
        unit = vectors * VECTOR
        n_units = -(-case.logit_bytes // unit)
        soft = case.option == "probabilities"
        read_bytes = case.bytes_read // 2 if soft else case.bytes_read
        chunk = max(1, CHUNK // (LANES * vectors))
        n_chunks = -(-n_units // chunk)

        self.x = floats(n_units * unit)
        self.t = floats(n_units * unit) if soft else None
        self.g = self.x if which == IN_PLACE else floats(n_units * unit) if which == OUT else None
        self.sums = np.zeros(5)
        self.chunks = floats(n_chunks * abi.LINE)
        self.chunks.fill(0.0)
        fields = {
            "n_rows": -(-read_bytes // unit), "n_vectors": vectors, "n_units": n_units, "chunk": chunk,
            "total": self.sums.ctypes.data, "partial": self.chunks.ctypes.data + 8, "taken": self.chunks.ctypes.data,
            "x": self.x.ctypes.data, "t": _address(self.t), "g": _address(self.g),
        }  # fmt: skip
        self.block = ctypes.create_string_buffer(abi.BLOCK.size)
        abi.BLOCK.pack_into(self.block, 0, *(fields.get(field, 0) for field, _ in abi.FIELDS))
        variant = Variant("f32", target="f32" if soft else None)
        plan = Plan(variant, abi.Planned(*[0] * len(abi.PLANNED)), (), n_units, n_chunks, case.logit_bytes // 4)
        self.launch: Callable[[str], object] = lambda task: run._launch(kernel(task, variant), self.block, plan, n_threads)
        self.bytes_moved = read_bytes * (1 + soft) + (case.logit_bytes if case.mode == GRAD else 0)
        self.task, *others = TASKS_OF[which]
        if others:
            self.task = min(TASKS_OF[which], key=self._best_time)

    def run(self) -> None:
        self.launch(self.task)

    def restore(self) -> None:
        self.x.fill(1.0)

    def _best_time(self, task: str) -> float:
        """Of five runs, after one that compiles."""
        self.task = task
        times = []
        for _ in range(6):
            start = time.perf_counter()
            self.run()
            times.append(time.perf_counter() - start)
        return min(times)


def _address(array: Array | None) -> int:
    return 0 if array is None else array.ctypes.data
