"""Reports what fastxent runs on, and compiles kernels ahead of the first call."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastxent import __version__
from fastxent._abi.dtypes import STORAGE
from fastxent._codegen import disk_cache, patience, registry
from fastxent._codegen.uninterrupted import imported
from fastxent._runtime import bfloat16, blas, common, threads
from fastxent._runtime.threads import available_cpus, check_threads, get_num_threads


def warmup(
    dtypes: Sequence[str] = ("float32", "float64"),
    progress: Callable[[int, int, str], None] | None = None,
    *,
    n_jobs: int | None = 1,
) -> None:
    """Compile the common kernels now, not in the first call that needs them.

    A kernel takes one to three seconds to compile; it is then stored on disk, for later processes too. The common kernels are
    those of loss and gradient for class indices with short rows, long rows, logits past the caches, and pixels with the classes
    on the second axis. Any other kernel is compiled by the first call that needs it.

    Parameters
    ----------
    dtypes : sequence of str
        Any of "float16", "bfloat16", "float32", "float64".
    progress : callable, optional
        Called as ``progress(done, total, name)`` before each kernel and after the last.
    n_jobs : int or None
        With more than 1, so many processes compile side by side, and end with this function; None starts one a core. In a
        packaged program, which cannot start a Python, this process compiles, as with 1.

    Raises
    ------
    TypeError
        n_jobs is not an integer.
    ValueError
        A dtype is not one of these, or n_jobs is less than 1.

    Examples
    --------
    >>> import fastxent as fx
    >>> fx.warmup(["float32"])
    """
    for dtype in dtypes:
        if dtype not in STORAGE:
            raise ValueError(f"dtypes holds {dtype!r}; allowed are {', '.join(STORAGE)}")
    n_processes = available_cpus() if n_jobs is None else check_threads(n_jobs, "n_jobs")
    kernels = common.warm(dtypes)
    with patience.quietly():
        for done, (name, variant) in enumerate(registry.kernels(kernels, n_processes)):
            if progress is not None:
                progress(done, len(kernels), f"{name} {variant.logits}")
    if progress is not None:
        progress(len(kernels), len(kernels), "done")


def show_config() -> dict[str, Any]:
    """Return facts about this process: processor, threads, versions, cache.

    A bug report should hold them, so this function never fails: a fact that cannot be found is "unknown" with the reason.

    Returns
    -------
    dict
        Of dicts, whose values are str or int; it can be printed or written as JSON.

    Examples
    --------
    >>> import fastxent as fx
    >>> sorted(fx.show_config())
    ['cache', 'cpu', 'kernels', 'products', 'threads', 'vectors', 'versions']
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
        "vectors": {
            "lanes": 16,
            "widest register, bits": _or_why_not(_widest_register),
            "instruction set": _or_why_not(_instruction_set),
        },
        "products": {
            "that add, by NumPy": _or_why_not(lambda: blas.blas().why),
            "of bfloat16, by NumPy": "converted to float32: NumPy multiplies no half precision by BLAS",
            "of bfloat16, by PyTorch": _or_why_not(bfloat16.path),
        },
        "threads": {"default": _or_why_not(get_num_threads), "pool": _or_why_not(_pool)},
        "versions": {name: found for name, found in versions.items() if found is not None},
        "cache": {"folder": _or_why_not(disk_cache.cache_folder), **refused},
        "kernels": {"prebuilt": _or_why_not(lambda: _prebuilt().available().why), **_loaded()},
    }


def kernels() -> dict[str, str]:
    """Return where this process would get each of the common kernels from, by the kernel's name."""
    found = imported("fastxent._codegen.machine_code").found
    return {_prebuilt().kernel_name(*kernel): found(*kernel)[1] for kernel in common.kernels()}


def _or_why_not(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {' '.join(str(error).split())})"


def _cpu_model() -> str:
    """Return the processor's model on Linux, else its architecture: elsewhere `platform.processor` starts a process."""
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


def _prebuilt() -> Any:
    return imported("fastxent._codegen.prebuilt")  # it imports llvmlite


def _loaded() -> dict[str, int]:
    """Return how many kernels this process has, by where they come from."""
    return {f"loaded: {origin}": n for origin, n in registry.origins().items()}


def _instruction_set() -> str:
    """Return the vector instructions of this processor. Our vectors have a fixed length, which is NEON where there is SVE."""
    features = _binding().get_host_cpu_features()
    names = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("sse2", "SSE"), ("sve", "SVE, of which NEON is used"))
    arm = "NEON" if platform.machine().lower() in ("aarch64", "arm64") else "none that is known"
    return next((name for feature, name in names if features.get(feature)), arm)


def _binding() -> Any:
    return imported("llvmlite.binding")


def _pool() -> str:
    return "thread pool" if threads._openmp() is None else f"OpenMP ({threads.openmp_path()})"


def _version(package: str) -> str | None:
    """Return the version of an installed package, importable or not; packaged programs may lack its metadata."""
    with suppress(Exception):
        return version(package)
    return getattr(sys.modules.get(package), "__version__", None)
