"""Compiles a task of ``_kernels`` for a variant, with Numba, cached on disk. Importing this module imports Numba."""

from __future__ import annotations

import hashlib
import os
import pkgutil
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import numba
from numba import cfunc, types
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target

from fastxent import _elementary, _kernels, _loadstore, _maths, _plan, _rows, _simd, _task
from fastxent._plan import KEEPERS, Variant

lock = threading.RLock()

if hasattr(os, "register_at_fork"):
    # A child that is forked in the midst of compiling would find Numba locked, and for ever: the fork waits.
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def _source(module: Any) -> bytes:
    """What a module was loaded from, in a folder or in a zip archive."""
    return pkgutil.get_data(__package__, Path(module.__file__).name) or b""


# Part of every signature, and so of every key in the disk cache: Numba looks at the file of the task only, and would serve
# yesterday's kernel after a change in a helper.
_COMPILED_FROM = (_simd, _loadstore, _elementary, _rows, _maths, _kernels, _task, _plan)
BUILD_ID = hashlib.sha256(b"".join(map(_source, _COMPILED_FROM))).hexdigest()[:16]


def task_type(name: str, variant: Variant) -> _simd.Task:
    """The Numba type of the argument block: which slot is what, and what the compiler may take for granted."""
    acc = variant.acc
    kinds: dict[str, Any] = {
        "int": "int",
        "float": "float",
        "i64": ("i64", "i64"),
        "f64": ("f64", "f64"),
        "acc": (acc, acc),
        "x": (variant.logits, acc),
        "t": (variant.target or acc, acc),
    }
    fields = tuple((field, _task.FIRST_SLOT + slot, kinds[kind]) for slot, (field, kind) in enumerate(_task.FIELDS))
    constants = {
        "across": variant.across,
        "neighbours": variant.neighbours,
        "labelled": variant.labelled,
        "soft": variant.target is not None,
        "dense": variant.smooth or variant.target is not None,
        "entropic": name == "stats",
        "capped": variant.capped,
        "tiled": variant.tiled,
        "keeps_e": variant.kept and name in KEEPERS,
        "whole_rows": variant.whole_rows,
        "adjacent": variant.adjacent,
        "split": variant.split,
        "large": variant.large,
        "double": acc == "f64",
        "differentiate": variant.differentiate,
    }
    return _simd.Task(fields, tuple(constants.items()), BUILD_ID)


def compile_task(name: str, variant: Variant) -> Any:
    """Kernel ``name`` as a C function (``.address``); a cache that cannot be used is no error."""
    task = task_type(name, variant)
    signature = types.void(task) if name == "launch" else types.void(task, types.int64, types.int64)
    function = own_function(name, signature)
    with suppress(Exception):
        return cfunc(signature, cache=True)(function)
    try:
        FunctionCache(function).flush()  # what lies there may be damaged: start again
        return cfunc(signature, cache=True)(function)
    except Exception as reason:  # no folder that can be written to: compile without a cache
        warnings.warn(f"fastxent compiles without its disk cache: {reason}", RuntimeWarning, stacklevel=4)
        return cfunc(signature)(function)


def own_function(name: str, signature: Any) -> FunctionType:
    """A function of ``_kernels`` for this kernel alone, under a name that only it has, and so with cache files of its own.

    Numba keeps the kernels of one function in numbered files. Two processes that compile at once may give the same number to
    two kernels, and would then run each other's. Under this name all who write to a file write the same.
    """
    kernel = (name, str(signature), cpu_target.target_context.codegen().magic_tuple(), numba.__version__, llvmlite.__version__)
    is_whole = name in ("launch", "check")
    function = getattr(_kernels, name if is_whole else "kernel")
    names = vars(_kernels) if is_whole else vars(_kernels) | {"visit": getattr(_kernels, name)}
    own = FunctionType(function.__code__, names, name)
    own.__qualname__ = f"{name}_{hashlib.sha256(repr(kernel).encode()).hexdigest()[:16]}"
    return own


def cache_folder() -> str:
    """Where compiled kernels are kept."""
    try:
        locator = FunctionCache(_kernels.kernel).cache_path
    except RuntimeError:
        return "none: no folder can be written to"
    return str(locator)
