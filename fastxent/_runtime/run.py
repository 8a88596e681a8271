"""Runs a task on the host's OpenMP pool, on a thread pool, or serially.

A compiled function, ``launch``, takes one argument block, runs the kernels that it names, one after the other, and works until
the block's counters say that nothing is left. So the three ways to run it differ in who calls it: ``GOMP_parallel`` calls it in
every thread of the team that PyTorch uses too; threads of our own call it where there is no libgomp; or the caller alone calls
it, and no parallel runtime is entered at all: small work, one thread, and any forked child (libgomp hangs after fork).
Calls that are known and not large do the first or the last of these without Python: see ``fastcall``.

``prange`` is not used: it resets ``torch.get_num_threads()``, freezes multiprocessing's start method, aborts when two threads
call it and kills forked children (DESIGN.md, section 5).
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastxent._abi import argument_block as _task
from fastxent._codegen import patience as _patience
from fastxent._codegen.uninterrupted import imported, lock, uninterrupted
from fastxent._runtime.plan import KEEPERS, MOST_DIRECT, PAIRERS, TILE, WORTH_A_THREAD, Plan, Variant, useful_threads

MOST_THREADS_A_CPU = 4  # whatever a caller asks for: a system refuses thousands, and the OpenMP runtime then ends the process

MOST_THREADS = MOST_THREADS_A_CPU * (os.cpu_count() or 1)  # of all CPUs, whichever are allowed now

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Kernel(NamedTuple):
    """A compiled function of ``steps``."""

    call: Callable[[object], None]  # of "launch", which takes nothing but the argument block
    address: int
    owner: object  # of the machine code, which lives as long as this does


class _State:
    setting: int | None = None  # set_num_threads
    # Who is calling now. add, discard and len are atomic, and unlike a counter and its lock they lose nothing when a signal
    # handler raises in between.
    calls: ClassVar[set[object]] = set()
    forked = False
    tiles: ClassVar[list[tuple[np.ndarray[Any, Any], int]]] = []  # that no call is using; their addresses
    jobs: SimpleQueue[Callable[[], None]] | None = None


# Looked up once: a small call is a few microseconds.
_start, _start_alone = _task.START.pack_into, _task.START_ALONE.pack_into
_set_totals, _totals_of = _task.TOTAL.pack_into, _task.TOTAL.unpack_from
_AT_TOTAL = _task.BLOCK.size
HEAD_OF_BLOCK = _AT_TOTAL + _task.TOTAL.size  # the chunks begin at the next cache line
_rounds = itertools.count(_task.PHASES, _task.PHASES)

_kernels: dict[tuple[str, Variant], Kernel] = {}
_ANY = Variant("f32")  # for those that read no logits


# ----------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------


def run(name: str, plan: Plan, n_threads: int | None = None, **arguments: Any) -> tuple[float, float, float]:
    """Run task ``name`` over ``plan``; arguments as in `argument_block`.

    Returns the sum, whether a class index is out of range (then nothing has been written), and the divisor.
    """
    tiles = _take_tiles()
    try:
        block = argument_block(name, plan, tiles=tiles[1], **arguments)
        _launch(kernel("launch"), block, plan, n_threads)
        return _totals_of(block, _AT_TOTAL)
    finally:
        _State.tiles.append(tiles)


def tiles_for(n_threads: int) -> tuple[np.ndarray[Any, Any], int]:
    """Memory for so many tiles, and where the first begins: on a cache line, but not where large arrays begin in a page.

    A load waits for a store that is 4 KB, or a multiple of that, from it.
    """
    tiles = np.empty(n_threads * TILE + 4096, np.uint8)
    return tiles, tiles.ctypes.data + (1024 - tiles.ctypes.data) % 4096


def _take_tiles() -> tuple[np.ndarray[Any, Any], int]:
    """A tile for each thread that may ever work at one call. Not on the threads' stacks: those may be as small as 64 KB.

    What is not written to takes no memory.
    """
    try:
        return _State.tiles.pop()
    except IndexError:
        return tiles_for(MOST_THREADS)


def argument_block(
    name: str, plan: Plan, *,
    x: int = 0, g: int = 0, h: int = 0, t: int = 0, y: int = 0, tiles: int = 0, w: int = 0, u: int = 0,
    loss: int = 0, lse: int = 0, sign: int = 0, entropy: int = 0, target_prob: int = 0, prediction: int = 0,
    target_rank: int = 0, ignore: int = 0, keep: float = 1.0, spread: float = 0.0, factor: float = 1.0, divisor: float = 1.0,
    average: bool = False, z: float = 0.0, cap: float = 0.0, w_period: int = 1, u_period: int = 1,
) -> ctypes.Array[ctypes.c_char]:  # fmt: skip
    """What a task reads: addresses and numbers as in ``argument_block``, and behind them room for its sums.

    ``divisor`` 0, a mean over nothing, is nan. With class indices and ``average`` the task makes it.
    """
    variant = plan.variant
    segments = plan.n_units if variant.split else 0
    block = ctypes.create_string_buffer(HEAD_OF_BLOCK + _task.LINE * (1 + plan.most_chunks + segments))
    block.plan = plan  # type: ignore[attr-defined]  # owns the axes' table, whose address is in the block
    at_total, at_taken = ctypes.addressof(block) + _AT_TOTAL, ctypes.addressof(block) + _first_chunk(block)
    at_partial, at_segments = at_taken + 8, at_taken + _task.LINE * plan.most_chunks
    _task.BLOCK.pack_into(
        block, 0, 0, 0, 0, x, g, h, t, y, w, u, loss, tiles, *plan.planned,
        kernel("check").address if variant.labelled else 0, *kernels_of(name, variant),
        ctypes.addressof(plan.table), at_partial, at_taken, at_segments, at_total,
        lse, sign, entropy, target_prob, prediction, target_rank,
        w != 0, u != 0, w_period, u_period, loss != 0, _may_bypass(x, g, plan), ignore, keep, spread, factor, average, z, cap,
        _give_way(),
    )  # fmt: skip
    _set_totals(block, _AT_TOTAL, 0.0, 0.0, divisor or math.nan)
    return block


def kernels_of(name: str, variant: Variant) -> tuple[int, int]:
    """Addresses of the kernels that take the statistics of split rows, or 0, and that do the work of task ``name``."""
    save = "keep_segment" if name in KEEPERS and variant.kept else "save_segment"
    return kernel(save, variant).address if variant.split else 0, kernel(name, variant).address


def _may_bypass(x: int, g: int, plan: Plan) -> bool:
    """May a large gradient be written past the caches? In place its lines are there already, but not those of strips in hand
    (see ``plane_tiles``). And all rows have to begin where an element may."""
    steps = plan.axes[2::5]  # the row axes' strides in g
    return (g != x or plan.variant.overlapped) and all(at % plan.itemsize == 0 for at in (g, *steps))


def _first_chunk(block: ctypes.Array[ctypes.c_char]) -> int:
    """Where in a block its chunks begin: at a cache line."""
    return HEAD_OF_BLOCK + -(ctypes.addressof(block) + HEAD_OF_BLOCK) % _task.LINE


@lru_cache
def _give_way() -> int:
    """Where the system's function is by which a thread that waits lets others run; 0: it has to do without."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (TypeError, OSError, AttributeError):  # Windows: another thread runs when its time has come
        return 0


class PackedTask:
    """A task that is called again and again: all but the operands is packed once, and of an operand whether there is one."""

    def __init__(self, name: str, plan: Plan, **arguments: Any) -> None:
        self.name, self.plan, self.arguments, self.launch = name, plan, arguments, kernel("launch")
        self.small = plan.elements < WORTH_A_THREAD
        self.direct = plan.elements * plan.itemsize <= MOST_DIRECT and not plan.variant.large
        self.alone = _is_for_one_thread(plan)
        self.useful = 1 if self.alone else _useful(plan)
        self.blocks: list[tuple[ctypes.Array[ctypes.c_char], int]] = []  # those that no thread is using; their addresses

    def new_block(self, tiles: int = 0) -> ctypes.Array[ctypes.c_char]:
        return argument_block(self.name, self.plan, tiles=tiles, **self.arguments)

    def __call__(
        self, x: int, g: int, y: int, n_threads: int | None = None, t: int = 0, w: int = 0, u: int = 0, loss: int = 0
    ) -> tuple[float, float, float]:
        """As `run`."""
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
            if not totals[1]:  # else the block keeps that
                self.blocks.append((block, at))
            return totals
        finally:
            _State.tiles.append(tiles)


def _is_for_one_thread(plan: Plan) -> bool:
    return plan.elements < WORTH_A_THREAD or plan.n_chunks == 1


def _launch(task: Kernel, block: ctypes.Array[ctypes.c_char], plan: Plan, n_threads: int | None) -> None:
    if _is_for_one_thread(plan) or _State.forked:
        _alone(task, block)
        return
    call = object()
    try:
        _State.calls.add(call)
        # Calls in flight at once share the cores.
        team = _allowed(min(_useful(plan), max(1, (n_threads or get_num_threads()) // len(_State.calls))))
        openmp = _openmp()
        if team == 1:
            _alone(task, block)
        elif openmp is not None:
            _start(block, 0, next(_rounds), entries_of(openmp)[1], team)
            openmp.GOMP_parallel(task.address, block, team, 0)
        else:
            _run_on_threads(task, block, plan, team)
    finally:
        _State.calls.discard(call)


def _useful(plan: Plan) -> int:
    """How many threads have something to do."""
    return min(useful_threads(plan.n_chunks, plan.elements), MOST_THREADS)


def _allowed(team: int) -> int:
    """At most so many; a team so small that it is allowed anywhere spares asking the system."""
    return team if team <= MOST_THREADS_A_CPU else min(team, MOST_THREADS_A_CPU * available_cpus())


def team_at_once(n_threads: int | None) -> int:
    """Threads for a call that a builtin runs; 0: it has to go the longer way."""
    if _State.forked:
        return 1
    return 0 if _State.calls or _openmp() is None else _allowed(n_threads or get_num_threads())


def _alone(task: Kernel, block: ctypes.Array[ctypes.c_char]) -> None:
    _start(block, 0, next(_rounds), 0, 1)
    task.call(block)


def _run_on_threads(task: Kernel, block: ctypes.Array[ctypes.c_char], plan: Plan, team: int) -> None:
    """By the caller and helping threads. None of them works on after this has ended, be it by Ctrl-C."""
    entered: list[None] = []
    left: list[None] = []
    over: list[None] = []
    wake: SimpleQueue[None] = SimpleQueue()
    this_round = next(_rounds)
    _start(block, 0, this_round, 0, team)

    def help_out() -> None:
        entered.append(None)
        if not over:  # else this comes too late: the block may be in use for the next task
            task.call(block)
        left.append(None)
        wake.put(None)

    interrupt: KeyboardInterrupt | None = None
    try:
        with suppress(RuntimeError):  # the interpreter is ending and starts no more threads: the caller does it alone
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
    """Take all chunks of all phases, so that nobody works on, and say that they are over, so that nobody waits."""
    words = _task.LINE // 8
    chunks = (ctypes.c_int64 * (words * plan.most_chunks)).from_buffer(block, _first_chunk(block))
    chunks[::words] = [this_round + _task.PHASES - 1] * plan.most_chunks
    over = (ctypes.c_int64 * _task.PHASES).from_buffer(block, 8 * _task.OVER)
    over[:] = [1] * _task.PHASES


def _jobs() -> SimpleQueue[Callable[[], None]]:
    """What the helping threads take their work from. An executor's locks would not survive Ctrl-C; this queue's are in C."""
    if _State.jobs is None:
        jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()

        def work() -> None:
            while True:
                jobs.get()()

        for i in range(available_cpus()):
            threading.Thread(target=work, name=f"fastxent_{i}", daemon=True).start()
        _State.jobs = jobs
    return _State.jobs


def _after_fork() -> None:
    _State.forked, _State.jobs, _State.calls = True, None, set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ----------------------------------------------------------------------------------------------------
# Threads
# ----------------------------------------------------------------------------------------------------


def _openmp() -> ctypes.CDLL | None:
    """The process's libgomp: PyTorch's, once that is loaded, so that both share one pool; else the system's; else None."""
    return _find_openmp("torch" in sys.modules)


@lru_cache(maxsize=3)
def entries_of(openmp: ctypes.CDLL | None) -> tuple[int, int]:
    """Where its functions are that run another in a team, and that tell a thread its number there; zeros for no runtime, which
    is the third there may be: see ``_find_openmp``."""
    if openmp is None:
        return 0, 0
    parallel, number = (ctypes.cast(f, ctypes.c_void_p).value for f in (openmp.GOMP_parallel, openmp.omp_get_thread_num))
    return parallel or 0, number or 0


@lru_cache(maxsize=2)
def _find_openmp(with_torch: bool) -> ctypes.CDLL | None:
    candidates: list[str | None] = ["libgomp.so.1"]
    if with_torch:
        candidates.insert(0, None)  # what the process has loaded for all to see, as PyTorch does with its libgomp
    for name in candidates:
        try:
            library = ctypes.CDLL(name)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            library.omp_get_max_threads.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return library
    return None


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p),
    )  # fmt: skip


def openmp_path() -> str:
    """The file of the libgomp in use."""
    info = _DlInfo()
    function = ctypes.cast(_openmp().GOMP_parallel, ctypes.c_void_p)  # type: ignore[union-attr]
    found = ctypes.CDLL(None).dladdr(function, ctypes.byref(info))
    return os.fsdecode(info.file) if found and info.file else "unknown"


def available_cpus() -> int:
    """Cores that this process may use: affinity mask and cgroup quota respected."""
    cpus = os.cpu_count() or 1
    with suppress(AttributeError, OSError):  # not on macOS and Windows; and a sandbox may forbid it
        cpus = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(cpus, _cgroup_quota())))


@lru_cache(maxsize=1)
def _cgroup_quota() -> float:
    """CPUs that the process's control group, and those above it, may use: of version 2, else of version 1, else infinity."""
    root = Path("/sys/fs/cgroup")
    quotas, own = [], Path("/")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = Path(next(line for line in lines if line.startswith("0::"))[len("0::") :])
    for folder in (own, *own.parents):
        with suppress(OSError, ValueError):
            quota, period = (root / str(folder).lstrip("/") / "cpu.max").read_text().split()
            quotas.append(_cpus(quota, period))
    with suppress(OSError, ValueError):
        quotas.append(_cpus(*((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))))
    return min(quotas, default=math.inf)


def _cpus(quota: str, period: str) -> float:
    """No limit is "max", which is no number, in version 2, and -1 in version 1; what makes no sense is none either."""
    allowed, of = float(quota), float(period)
    return allowed / of if 0 < allowed < math.inf and 0 < of < math.inf else math.inf


def get_num_threads() -> int:
    """Number of threads that a call uses unless it says otherwise.

    What `set_num_threads` set; else the limit of the OpenMP runtime that PyTorch uses too (``OMP_NUM_THREADS``,
    ``torch.set_num_threads``, threadpoolctl), but not more than the cores that the process may use.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import fastxent as fx
    >>> fx.get_num_threads() >= 1
    True
    """
    if _State.setting is not None:
        return _State.setting
    openmp = _openmp()
    if openmp is not None:
        limit = int(openmp.omp_get_max_threads())
        return limit if _is_told() else min(limit, available_cpus())
    try:
        return max(1, int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
    except (KeyError, ValueError):
        return available_cpus()


@lru_cache(maxsize=1)
def _is_told() -> bool:
    """Is the limit of the OpenMP runtime a user's? The runtime, too, has looked only once."""
    return "OMP_NUM_THREADS" in os.environ


def setting() -> int | None:
    """What `set_num_threads` set."""
    return _State.setting


def set_num_threads(n: int | None) -> None:
    """Set the number of threads of later calls; None undoes it.

    Parameters
    ----------
    n : int or None
        At least 1. The result of a call has the same bits whatever the number.

    Raises
    ------
    ValueError
        If ``n`` is less than 1.
    TypeError
        If ``n`` is not an integer.

    Examples
    --------
    >>> import fastxent as fx
    >>> fx.set_num_threads(2)
    >>> fx.get_num_threads()
    2
    >>> fx.set_num_threads(None)
    """
    _State.setting = None if n is None else check_threads(n, "n")


def check_threads(n: object, name: str) -> int:
    """``n`` as a number of threads, or an error that names it."""
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} must be an integer or None, got {type(n).__name__}")
    count = int(n.__index__())
    if count < 1:
        raise ValueError(f"{name} = {count} is less than 1")
    return count


# ----------------------------------------------------------------------------------------------------
# Compiling
# ----------------------------------------------------------------------------------------------------


def kernel(name: str, variant: Variant = _ANY) -> Kernel:
    """The compiled kernel ``name`` for ``variant``: from memory, from the disk cache, or compiled now."""
    if (variant.paired or variant.overlapped) and name not in PAIRERS:  # one kernel for both
        variant = variant._replace(paired=False, overlapped=False)
    try:
        return _kernels[name, variant]
    except KeyError:
        pass
    imported("fastxent._codegen.machine_code")  # with llvmlite: only for those who compute
    from fastxent._codegen import machine_code as _machine_code  # whoever packs a program looks for such statements

    with lock:
        _keep(name, variant, _machine_code.loaded)
    if (name, variant) not in _kernels:
        uninterrupted(_keep, name, variant, _machine_code.made, meanwhile=_patience.watch)
    return _kernels[name, variant]


def _keep(name: str, variant: Variant, get: Callable[[str, Variant], tuple[int, object] | None]) -> None:
    """Get a kernel, unless another thread has done so by now."""
    found = None if (name, variant) in _kernels else get(name, variant)
    if found is not None:
        _kernels[name, variant] = Kernel(_FUNCTION(found[0]), *found)
