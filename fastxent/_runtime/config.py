"""What fastxent runs on, and compiling ahead of the first call."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastxent import __version__
from fastxent._abi.dtypes import ITEMSIZE, STORAGE
from fastxent._abi.variant import BUILTINS, Variant
from fastxent._codegen import disk_cache, patience, registry
from fastxent._codegen.uninterrupted import imported
from fastxent._runtime import fastpath, threads
from fastxent._runtime.plan import make_plan
from fastxent._runtime.threads import available_cpus, get_num_threads

# Few classes; some more; many; those of a language model, past the cache; those of pixels, in it and past it.
_COMMON = ((64, 10), (64, 200), (64, 1000), (4096, 32000), (8, 21, 64, 64), (16, 150, 128, 128))


def warmup(dtypes: Sequence[str] = ("float32", "float64"), progress: Callable[[int, int, str], None] | None = None) -> None:
    """Compile the common kernels now, not in the first call that needs them.

    A kernel takes some seconds to compile; it is then kept on disk, for later processes too. Compiled are loss and gradient for
    class indices of short and long rows, of logits past the cache, and of pixels with the classes on the second axis; what else
    is used is compiled when it is.

    Parameters
    ----------
    dtypes : sequence of str
        Of "float16", "bfloat16", "float32", "float64".
    progress : callable, optional
        Called as ``progress(done, total, name)`` before each kernel and after the last.

    Raises
    ------
    ValueError
        A dtype is not one of these.

    Examples
    --------
    >>> import fastxent as fx
    >>> fx.warmup(["float32"])
    """
    for dtype in dtypes:
        if dtype not in STORAGE:
            raise ValueError(f"dtypes holds {dtype!r}; allowed are {', '.join(STORAGE)}")
    jobs = [(name, Variant("f32")) for name in ("launch", "check", *(BUILTINS if fastpath.ENABLED else ()))]
    for dtype in dtypes:
        jobs += [(name, _variant_for(name, shape, dtype)) for shape in _COMMON for name in ("value", "value_and_grad")]
    with patience.quietly():
        for done, (name, variant) in enumerate(jobs):
            if progress is not None:
                progress(done, len(jobs), f"{name} {variant.logits}")
            registry.kernel(name, variant)
    if progress is not None:
        progress(len(jobs), len(jobs), "done")


def _variant_for(task: str, shape: tuple[int, ...], dtype: str) -> Variant:
    """What a C-contiguous array, with the classes on the second axis, is compiled for."""
    strides = tuple(math.prod(shape[axis + 1 :]) * ITEMSIZE[STORAGE[dtype]] for axis in range(len(shape)))
    return make_plan(task, shape, (strides,) * 3, 1, STORAGE[dtype], labelled=True).variant


def show_config() -> dict[str, Any]:
    """Facts about this process: processor, threads, versions, cache.

    It is what a report of a fault should hold, so it always returns: what cannot be found out is "unknown", and why.

    Returns
    -------
    dict
        Of str, int and dict of str; made to be printed or written as JSON.

    Examples
    --------
    >>> import fastxent as fx
    >>> sorted(fx.show_config())
    ['cache', 'cpu', 'threads', 'vectors', 'versions']
    """
    packages = ("numpy", "numba", "llvmlite", "torch", "scikit-learn", "scipy")
    versions = {"python": platform.python_version(), "fastxent": __version__} | {name: _version(name) for name in packages}
    refused = {f"refused: {folder.path}": fault for folder, fault in disk_cache.judged() if fault is not None}
    return {
        "cpu": {
            "model": _or_why_not(_cpu_model),
            "llvm name": _or_why_not(_llvm_name),
            "cores available": _or_why_not(available_cpus),
        },
        "vectors": {"lanes": 16, "widest register, bits": _or_why_not(_widest_register)},
        "threads": {"default": _or_why_not(get_num_threads), "pool": _or_why_not(_pool)},
        "versions": {name: found for name, found in versions.items() if found is not None},
        "cache": {"folder": _or_why_not(disk_cache.cache_folder), **refused},
    }


def _or_why_not(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {' '.join(str(error).split())})"


def _cpu_model() -> str:
    """Only Linux is asked: elsewhere `platform.processor` starts a process."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, model = line.partition(":")
            if name.strip() == "model name" and model.strip():
                return model.strip()
    return platform.machine()


def _llvm_name() -> str:
    return os.environ.get("NUMBA_CPU_NAME") or _binding().get_host_cpu_name()


def _widest_register() -> int:
    features = _binding().get_host_cpu_features()
    return next((bits for name, bits in (("avx512f", 512), ("avx2", 256)) if features.get(name)), 128)


def _binding() -> Any:
    return imported("llvmlite.binding")


def _pool() -> str:
    return "thread pool" if threads._openmp() is None else f"OpenMP ({threads.openmp_path()})"


def _version(package: str) -> str | None:
    """Of an installed package, whether or not it can be imported; packed programs may have none of its metadata."""
    with suppress(Exception):
        return version(package)
    return getattr(sys.modules.get(package), "__version__", None)
