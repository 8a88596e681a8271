# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
"""The streaming floor: what it costs to read the inputs and write the gradient when nothing is computed but 1.0001 x.

The same vectors, threads and way of handing out work as fastxent's kernels have. A gradient into another array is written past the
caches (non-temporal stores), one in place is not, and a loss only reads. Buffers are the floor's own, aligned to cache lines, and
float32 whatever the case is: the bytes count.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from benchmarks.cases import GRAD, Array, Case
from fastxent import _compile, _parallel, _task
from fastxent._kernels import walk
from fastxent._plan import CHUNK, Plan, Variant
from fastxent._simd import INLINE, LANES, lane, load, splat, store, stream, sum_across

VECTOR = 4 * LANES  # bytes
OUT, IN_PLACE, READ = "floor_out", "floor_in_place", "floor_read"


@njit(**INLINE)
def scaled(task, at):
    """1.0001 x, plus the probabilities where there are some."""
    x = load(task.x + at) * 1.0001
    return x + load(task.t + at) if task.soft else x


@njit(**INLINE)
def write_past_caches(task, number):
    """Unit ``number``: n_vectors vectors; zeros without a look at x from unit n_rows on, as for ignored rows."""
    at = number * task.n_vectors * VECTOR
    if number < task.n_rows:
        for j in range(task.n_vectors):
            stream(task.g + (at + VECTOR * j), scaled(task, at + VECTOR * j))
    else:
        for j in range(task.n_vectors):
            stream(task.g + (at + VECTOR * j), splat(task.g, 0.0))
    return 0.0, 0.0, 0.0


@njit(**INLINE)
def write_in_place(task, number):
    at = number * task.n_vectors * VECTOR
    if number < task.n_rows:
        for j in range(task.n_vectors):
            store(task.x + (at + VECTOR * j), scaled(task, at + VECTOR * j))
    else:
        for j in range(task.n_vectors):
            store(task.x + (at + VECTOR * j), splat(task.x, 0.0))
    return 0.0, 0.0, 0.0


@njit(**INLINE)
def read_only(task, number):
    """A sum, so that nothing is left out; in four parts, so that no addition waits for the one before."""
    at = number * task.n_vectors * VECTOR
    a = b = c = d = splat(task.x, 0.0)
    if number < task.n_rows:
        for j in range(0, task.n_vectors, 4):
            a = a + scaled(task, at + VECTOR * j)
            b = b + scaled(task, at + VECTOR * j + VECTOR)
            c = c + scaled(task, at + VECTOR * j + 2 * VECTOR)
            d = d + scaled(task, at + VECTOR * j + 3 * VECTOR)
    return float(lane(sum_across((a + b) + (c + d)), 0)), 0.0, 0.0


def out_task(task):
    walk(task, write_past_caches)


def in_place_task(task):
    walk(task, write_in_place)


def read_task(task):
    walk(task, read_only)


TASKS = {OUT: out_task, IN_PLACE: in_place_task, READ: read_task}


@lru_cache
def kernel(name: str, variant: Variant) -> _parallel.Kernel:
    compiled = cfunc(types.void(_compile.task_type(name, variant)), cache=True)(TASKS[name])
    return _parallel.Kernel(_parallel._FUNCTION(compiled.address), compiled.address, compiled)


def floats(nbytes: int) -> Array:
    """So many bytes of ones, aligned to cache lines."""
    raw = np.empty(nbytes + VECTOR, np.uint8)
    start = -raw.ctypes.data % VECTOR
    array = raw[start : start + nbytes].view(np.float32)
    array.fill(1.0)
    return array


class Floor:
    """A floor of a case: ``run`` is what is timed. ``result`` is x, g and the sum that was read."""

    def __init__(self, case: Case, name: str, n_threads: int) -> None:
        vectors = 64 if case.logit_bytes >= 64 * VECTOR * 64 else 4
        unit = vectors * VECTOR
        n_units = -(-case.logit_bytes // unit)
        soft = case.option == "probabilities"
        read_bytes = case.bytes_read // 2 if soft else case.bytes_read
        chunk = max(1, CHUNK // (LANES * vectors))
        n_chunks = -(-n_units // chunk)

        self.x = floats(n_units * unit)
        self.t = floats(n_units * unit) if soft else None
        self.g = floats(n_units * unit) if name == OUT else None
        self.sums = np.zeros(3 * (n_chunks + 1))  # of all, then of each chunk
        fields = {
            "n_rows": -(-read_bytes // unit), "n_vectors": vectors, "n_units": n_units, "chunk": chunk, "n_chunks": n_chunks,
            "total": self.sums.ctypes.data, "partial": self.sums.ctypes.data + 24,
            "x": self.x.ctypes.data, "t": _address(self.t), "g": _address(self.g),
        }  # fmt: skip
        self.block = ctypes.create_string_buffer(_task.BLOCK.size)
        _task.BLOCK.pack_into(self.block, 0, 0, 0, *(fields.get(field, 0) for field, _ in _task.FIELDS))
        variant = Variant("f32", target="f32" if soft else None)
        elements = case.logit_bytes // 4
        self.launch: Callable[[], Any] = lambda: _parallel._launch(
            kernel(name, variant), self.block, Plan(variant, (), (), n_units, n_chunks, elements), n_threads
        )
        self.bytes_moved = read_bytes * (1 + soft) + (case.logit_bytes if case.mode == GRAD else 0)

    def run(self) -> None:
        ctypes.memset(self.block, 0, 8 * _task.FIRST_SLOT)  # the two counters
        self.launch()

    def restore(self) -> None:
        self.x.fill(1.0)


def _address(array: Array | None) -> int:
    return 0 if array is None else array.ctypes.data
