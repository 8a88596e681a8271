"""Runs a task on the host's OpenMP pool, on a thread pool, or serially.

A compiled function, ``launch``, takes one argument block, runs the kernels that it names, one after the other, and returns when
the block's counters say that no chunk is left. So the three ways to run a task differ only in who calls ``launch``. With
libgomp, ``GOMP_parallel`` calls it in every thread of the team that PyTorch uses too. Without libgomp, threads of our own call
it. For small work, for one thread, and in any forked child (libgomp hangs after fork), only the caller calls it, and no
parallel runtime is entered. Stored calls that are not large take the first or the last way without Python: see ``_fastpath``.

``prange`` is not used: it resets ``torch.get_num_threads()``, freezes multiprocessing's start method, aborts when two threads
call it and kills forked children.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import numpy as np

from fastxent._abi import argument_block as abi
from fastxent._abi.variant import TILE, Schedule, Variant
from fastxent._codegen import registry
from fastxent._codegen.registry import Kernel
from fastxent._runtime import threads
from fastxent._runtime.plan import MOST_DIRECT, WORTH_A_THREAD, Plan, useful_threads
from fastxent._runtime.threads import MOST_THREADS, MOST_THREADS_A_CPU


class _State:
    # The calls in flight. add, discard and len are atomic; unlike a counter with a lock, the set stays right when a signal
    # handler raises in between.
    calls: ClassVar[set[object]] = set()
    forked = False
    # The address of the task that machine code runs without the GIL, which is one more call in flight, or 0.
    released: ClassVar[ctypes.c_int64] = ctypes.c_int64(0)
    tiles: ClassVar[list[tuple[np.ndarray[Any, Any], int]]] = []  # not in use by a call, with their addresses
    jobs: SimpleQueue[Callable[[], None]] | None = None


# These attributes are looked up once, since a small call takes only a few microseconds.
_start, _start_alone = abi.START.pack_into, abi.START_ALONE.pack_into
_set_totals, _totals_of = abi.TOTAL.pack_into, abi.TOTAL.unpack_from
_AT_TOTAL = abi.BLOCK.size
HEAD_OF_BLOCK = _AT_TOTAL + abi.TOTAL.size  # the chunks begin at the next cache line
_rounds = itertools.count(abi.PHASES, abi.PHASES)


# ----------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------


def run(name: str, plan: Plan, n_threads: int | None = None, **arguments: Any) -> tuple[float, float, float]:
    """Run task ``name`` over ``plan``; ``arguments`` are those of `argument_block`.

    Return the sum, whether a class index is out of range (then nothing has been written), and the divisor.
    """
    return _run(name, plan, n_threads, True, arguments)


def run_beside_blas(name: str, plan: Plan, n_threads: int | None = None, **arguments: Any) -> tuple[float, float, float]:
    """Run a task as `run` does, but on the thread pool even if there is OpenMP.

    Its threads sleep when they are done. Those of libgomp spin for some milliseconds, on the cores that products need next.
    """
    return _run(name, plan, n_threads, False, arguments)


def _run(
    name: str, plan: Plan, n_threads: int | None, with_openmp: bool, arguments: dict[str, Any]
) -> tuple[float, float, float]:
    tiles = _take_tiles()
    try:
        block = argument_block(name, plan, tiles=tiles[1], **arguments)
        _launch(registry.kernel("launch"), block, plan, n_threads, with_openmp)
        return _totals_of(block, _AT_TOTAL)
    finally:
        _State.tiles.append(tiles)


def tiles_for(n_threads: int) -> tuple[np.ndarray[Any, Any], int]:
    """Return memory for ``n_threads`` tiles, and the address of the first: on a cache line, 1 KB from the start of a page.

    Large arrays begin elsewhere in a page. A load waits for a store whose address differs by a multiple of 4 KB (4K aliasing).
    """
    tiles = np.empty(n_threads * TILE + 4096, np.uint8)
    return tiles, tiles.ctypes.data + (1024 - tiles.ctypes.data) % 4096


def _take_tiles() -> tuple[np.ndarray[Any, Any], int]:
    """Return tiles for all the threads that may ever work on one call, one for each.

    The tiles are not on the threads' stacks, which may be as small as 64 KB. Pages that are never written take no memory.
    """
    try:
        return _State.tiles.pop()
    except IndexError:
        return tiles_for(MOST_THREADS)


def argument_block(name: str, plan: Plan, *, divisor: float = 1.0, **given: float) -> ctypes.Array[ctypes.c_char]:
    """Return the block that a task reads: addresses and numbers as in ``_abi.argument_block``, then room for its sums.

    A ``divisor`` of 0, for a mean over no rows, becomes nan. With class indices and ``average`` the task computes the divisor.
    """
    variant = plan.variant
    segments = plan.n_units if variant.schedule == Schedule.SPLIT else 0
    block = ctypes.create_string_buffer(HEAD_OF_BLOCK + abi.LINE * (1 + plan.most_chunks + segments))
    block.plan = plan  # type: ignore[attr-defined]  # keeps the table of axes alive, whose address is in the block
    at_total, at_taken = ctypes.addressof(block) + _AT_TOTAL, ctypes.addressof(block) + _first_chunk(block)
    fields = abi.DEFAULTS.copy()  # in the order of the block
    fields.update(plan.fields)
    fields.update(given)
    fields["save_segment"], fields["kernel"] = kernels_of(name, variant)
    fields["check"] = registry.kernel("check").address if variant.labelled else 0
    fields["axes"] = ctypes.addressof(plan.table)
    fields["partial"], fields["taken"], fields["segments"] = at_taken + 8, at_taken, at_taken + abi.LINE * plan.most_chunks
    fields["total"] = at_total
    fields["weighted"], fields["sampled"], fields["store_loss"] = fields["w"] != 0, fields["u"] != 0, fields["loss"] != 0
    fields["non_temporal"] = plan.is_non_temporal(int(fields["x"]), int(fields["g"]))
    fields["sched_yield"] = _sched_yield()
    abi.BLOCK.pack_into(block, 0, *fields.values())
    _set_totals(block, _AT_TOTAL, 0.0, 0.0, divisor or math.nan)
    return block


def kernels_of(name: str, variant: Variant) -> tuple[int, int]:
    """Return the addresses of the kernel that reduces the segments of split rows, or 0, and of the kernel of task ``name``."""
    save = registry.kernel("save_segment", variant).address if variant.schedule == Schedule.SPLIT else 0
    return save, registry.kernel(name, variant).address


def _first_chunk(block: ctypes.Array[ctypes.c_char]) -> int:
    """Return the offset in a block at which its chunks begin, on a cache line."""
    return HEAD_OF_BLOCK + -(ctypes.addressof(block) + HEAD_OF_BLOCK) % abi.LINE


@lru_cache
def _sched_yield() -> int:
    """Return the address of the system's ``sched_yield``, by which a waiting thread lets others run, or 0 if there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (TypeError, OSError, AttributeError):  # Windows: a waiting thread spins until its time slice ends
        return 0


class PackedTask:
    """A task that is called repeatedly: all but the operands' addresses is packed once, including which operands exist."""

    def __init__(self, name: str, plan: Plan, **arguments: Any) -> None:
        self.name, self.plan, self.arguments, self.launch = name, plan, arguments, registry.kernel("launch")
        self.small = plan.elements < WORTH_A_THREAD
        self.direct = plan.elements * plan.itemsize <= MOST_DIRECT and not plan.variant.large
        self.alone = _is_for_one_thread(plan)
        self.useful = 1 if self.alone else _useful(plan)
        self.blocks: list[tuple[ctypes.Array[ctypes.c_char], int]] = []  # not in use by a thread, with their addresses

    def new_block(self, tiles: int = 0) -> ctypes.Array[ctypes.c_char]:
        return argument_block(self.name, self.plan, tiles=tiles, **self.arguments)

    def __call__(
        self, x: int, g: int, y: int, n_threads: int | None = None, t: int = 0, w: int = 0, u: int = 0, loss: int = 0
    ) -> tuple[float, float, float]:
        """Run the task and return what `run` returns."""
        try:
            block, at = self.blocks.pop()
        except IndexError:
            block = self.new_block()
            at = ctypes.addressof(block)
        tiles = _take_tiles()
        try:
            _start_alone(block, 0, next(_rounds), 0, 1, x, g, 0, t, y, w, u, loss, tiles[1])
            if self.alone:
                self.launch.call(at)
            else:
                _launch(self.launch, block, self.plan, n_threads)
            totals = _totals_of(block, _AT_TOTAL)
            if not totals[1]:  # a block with the out-of-range flag set is not used again
                self.blocks.append((block, at))
            return totals
        finally:
            _State.tiles.append(tiles)


def _is_for_one_thread(plan: Plan) -> bool:
    return plan.elements < WORTH_A_THREAD or plan.n_chunks == 1


def _launch(
    task: Kernel, block: ctypes.Array[ctypes.c_char], plan: Plan, n_threads: int | None, with_openmp: bool = True
) -> None:
    if _is_for_one_thread(plan) or _State.forked:
        _alone(task, block)
        return
    call = object()
    try:
        _State.calls.add(call)
        # Calls in flight at the same time divide the cores among them.
        team = _allowed(min(_useful(plan), max(1, (n_threads or threads.get_num_threads()) // _in_flight())))
        openmp = threads._openmp() if with_openmp else None
        if team == 1:
            _alone(task, block)
        elif openmp is not None:
            _start(block, 0, next(_rounds), threads.entries_of(openmp)[1], team)
            openmp.GOMP_parallel(task.address, block, team, 0)
        else:
            _run_on_threads(task, block, plan, team)
    finally:
        _State.calls.discard(call)


def _in_flight() -> int:
    """Return how many calls that may start a team are in flight."""
    return len(_State.calls) + (_State.released.value != 0)


def released_at() -> int:
    """Return the address of the variable that holds the address of the task that machine code runs without the GIL."""
    return ctypes.addressof(_State.released)


def _useful(plan: Plan) -> int:
    """Return how many threads have work, at most ``MOST_THREADS``."""
    return min(useful_threads(plan.n_chunks, plan.elements), MOST_THREADS)


def _allowed(team: int) -> int:
    """Return the size of a team, limited by the CPUs and the tiles; a team small enough for one CPU saves a system call.

    Python can be told of fewer CPUs than the process may use (``-X cpu_count``), and of these there are tiles.
    """
    return team if team <= MOST_THREADS_A_CPU else min(team, MOST_THREADS, MOST_THREADS_A_CPU * threads.available_cpus())


def team_at_once(n_threads: int | None, openmp: ctypes.CDLL | None) -> int:
    """Return the number of threads for a call that a builtin runs on this OpenMP runtime, or 0 if Python must run the call."""
    if _State.forked:
        return 1
    return 0 if _in_flight() or openmp is None else _allowed(n_threads or threads.get_num_threads())


def _alone(task: Kernel, block: ctypes.Array[ctypes.c_char]) -> None:
    _start(block, 0, next(_rounds), 0, 1)
    task.call(block)


def _run_on_threads(task: Kernel, block: ctypes.Array[ctypes.c_char], plan: Plan, team: int) -> None:
    """Run a task on the caller's thread and on helping threads; none works on it after this ends, even by Ctrl-C."""
    entered: list[None] = []
    left: list[None] = []
    over: list[None] = []
    wake: SimpleQueue[None] = SimpleQueue()
    this_round = next(_rounds)
    _start(block, 0, this_round, 0, team)

    def help_out() -> None:
        entered.append(None)
        if not over:  # a late helper must not touch the block: the next task may be using it
            task.call(block)
        left.append(None)
        wake.put(None)

    interrupt: KeyboardInterrupt | None = None
    try:
        with suppress(RuntimeError):  # Python is exiting and starts no more threads: the caller works alone
            for _ in range(team - 1):
                _jobs().put(help_out)
        task.call(block)
    finally:
        while True:
            try:
                over.append(None)
                _leave_nothing(block, plan, this_round)
                while len(left) < len(entered):
                    with suppress(Empty):
                        wake.get(timeout=0.1)
                break
            except KeyboardInterrupt as again:
                interrupt = again
    if interrupt is not None:
        raise interrupt


def _leave_nothing(block: ctypes.Array[ctypes.c_char], plan: Plan, this_round: int) -> None:
    """Mark all chunks of all phases as taken, so that no thread works on, and all phases as over, so that none waits."""
    words = abi.LINE // 8
    chunks = (ctypes.c_int64 * (words * plan.most_chunks)).from_buffer(block, _first_chunk(block))
    chunks[::words] = [this_round + abi.PHASES - 1] * plan.most_chunks
    over = (ctypes.c_int64 * abi.PHASES).from_buffer(block, 8 * abi.OVER)
    over[:] = [1] * abi.PHASES


def _jobs() -> SimpleQueue[Callable[[], None]]:
    """Return the queue from which the helping threads take their jobs.

    The locks of an executor would not survive Ctrl-C; those of this queue are in C.
    """
    if _State.jobs is None:
        jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()

        def work() -> None:
            while True:
                jobs.get()()

        for i in range(threads.available_cpus()):
            threading.Thread(target=work, name=f"fastxent_{i}", daemon=True).start()
        _State.jobs = jobs
    return _State.jobs


def _after_fork() -> None:
    _State.forked, _State.jobs, _State.calls, _State.released.value = True, None, set(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
