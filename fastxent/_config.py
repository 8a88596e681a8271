"""What fastxent runs on, and compiling ahead of the first call."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastxent import _parallel
from fastxent._parallel import available_cpus, get_num_threads
from fastxent._plan import ITEMSIZE, Variant, make_plan
from fastxent._validate import STORAGE

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
    jobs = [(name, Variant("f32")) for name in ("launch", "check", "answer", "run_on")]
    for dtype in dtypes:
        jobs += [(name, _variant_for(shape, dtype)) for shape in _COMMON for name in ("value", "value_and_grad")]
    for done, (name, variant) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), f"{name} {variant.logits}")
        _parallel.kernel(name, variant)
    if progress is not None:
        progress(len(jobs), len(jobs), "done")


def _variant_for(shape: tuple[int, ...], dtype: str) -> Variant:
    """What a C-contiguous array, with the classes on the second axis, is compiled for."""
    strides = tuple(math.prod(shape[axis + 1 :]) * ITEMSIZE[STORAGE[dtype]] for axis in range(len(shape)))
    return make_plan(shape, (strides,) * 3, 1, STORAGE[dtype], labelled=True).variant


def show_config() -> dict[str, Any]:
    """Facts about this process: processor, threads, versions, cache.

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
    from llvmlite import binding

    from fastxent import _machine_code

    features = binding.get_host_cpu_features()
    bits = next((bits for name, bits in (("avx512f", 512), ("avx2", 256)) if features.get(name)), 128)
    openmp = _parallel._openmp()
    packages = ("fastxent", "numpy", "numba", "llvmlite", "torch", "scikit-learn", "scipy")
    return {
        "cpu": {
            "model": _cpu_model(),
            "llvm name": os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name(),
            "cores available": available_cpus(),
        },
        "vectors": {"lanes": 16, "widest register, bits": bits},
        "threads": {
            "default": get_num_threads(),
            "pool": "thread pool" if openmp is None else f"OpenMP ({_parallel.openmp_path()})",
        },
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in packages if (found := _version(name)) is not None},
        },
        "cache": {"folder": _machine_code.cache_folder()},
    }


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
