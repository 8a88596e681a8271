"""Decides how many threads a call uses, and finds the OpenMP runtime of the process."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

MOST_THREADS_A_CPU = 4  # a limit on any request: a system refuses thousands, and the OpenMP runtime then ends the process

MOST_THREADS = MOST_THREADS_A_CPU * (os.cpu_count() or 1)  # counts all CPUs, even those not allowed now


class _State:
    setting: int | None = None  # set by `set_num_threads`


def _openmp() -> ctypes.CDLL | None:
    """Return the process's libgomp: PyTorch's once that is loaded, so that both use one pool; else the system's; else None."""
    return _find_openmp("torch" in sys.modules)


@lru_cache(maxsize=3)
def entries_of(openmp: ctypes.CDLL | None) -> tuple[int, int]:
    """Return the addresses of the runtime's functions that run a function in a team, and that return a thread's number there.

    Both are 0 without a runtime. The cache has three entries: two runtimes (see ``_find_openmp``) and None.
    """
    if openmp is None:
        return 0, 0
    parallel, number = (ctypes.cast(f, ctypes.c_void_p).value for f in (openmp.GOMP_parallel, openmp.omp_get_thread_num))
    return parallel or 0, number or 0


@lru_cache(maxsize=2)
def _find_openmp(with_torch: bool) -> ctypes.CDLL | None:
    candidates: list[str | None] = ["libgomp.so.1"]
    if with_torch:  # a handle finds what PyTorch's own library depends on; None what the process has loaded globally
        with suppress(AttributeError):  # PyTorch is being imported
            candidates.insert(0, sys.modules["torch"]._C.__file__)
        candidates.insert(-1, None)
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
    """Return the file of the libgomp in use."""
    info = _DlInfo()
    function = ctypes.cast(_openmp().GOMP_parallel, ctypes.c_void_p)  # type: ignore[union-attr]
    found = ctypes.CDLL(None).dladdr(function, ctypes.byref(info))
    return os.fsdecode(info.file) if found and info.file else "unknown"


def available_cpus() -> int:
    """Return the number of cores that this process may use, by its affinity mask and its cgroup quota."""
    cpus = os.cpu_count() or 1
    with suppress(AttributeError, OSError):  # macOS and Windows lack it, and a sandbox may forbid it
        cpus = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(cpus, _cgroup_quota())))


@lru_cache(maxsize=1)
def _cgroup_quota() -> float:
    """Return the CPUs that the process's control group and its parents allow, by cgroup version 2 or 1; else infinity."""
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
    """Return a quota in CPUs, or infinity if there is no limit or the values make no sense.

    No limit is -1 in version 1, and in version 2 "max", which is no number: it raises, and the caller ignores that quota.
    """
    allowed, of = float(quota), float(period)
    return allowed / of if 0 < allowed < math.inf and 0 < of < math.inf else math.inf


def get_num_threads() -> int:
    """Return the number of threads that a call uses by default.

    This is what `set_num_threads` set; else the limit of the OpenMP runtime that PyTorch uses too (``OMP_NUM_THREADS``,
    ``torch.set_num_threads``, threadpoolctl), but not more than the cores that the process may use, unless ``OMP_NUM_THREADS``
    is set.

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
    """Return whether a user set the OpenMP runtime's limit; cached, since the runtime reads the environment once, too."""
    return "OMP_NUM_THREADS" in os.environ


def setting() -> int | None:
    """Return what `set_num_threads` set."""
    return _State.setting


def set_num_threads(n: int | None) -> None:
    """Set the number of threads of later calls; None restores the default.

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
    """Return ``n`` as a number of threads, or raise an error that names the argument."""
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} must be an integer or None, got {type(n).__name__}")
    try:
        count = int(n.__index__())
    except TypeError:  # it is an array of several numbers, or of floats
        raise TypeError(f"{name} must be an integer or None, got {n!r}") from None
    if count < 1:
        raise ValueError(f"{name} = {count} is less than 1")
    return count
