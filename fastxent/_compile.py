"""Compiles a task of ``_kernels`` for a variant, with Numba, cached on disk. Importing this module imports Numba."""

from __future__ import annotations

import hashlib
import threading
import warnings
from pathlib import Path
from typing import Any

from numba import cfunc, types
from numba.core.caching import FunctionCache

from fastxent import _kernels, _plan, _simd, _task
from fastxent._plan import Variant

lock = threading.RLock()

# Part of every signature, and so of every key in the disk cache: Numba looks at the file of the task only, and would serve
# yesterday's kernel after a change in a helper.
BUILD_ID = hashlib.sha256(
    b"".join(Path(str(module.__file__)).read_bytes() for module in (_simd, _kernels, _task, _plan))
).hexdigest()[:16]


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
        "keeps_e": variant.kept and name in ("value_and_grad", "softmax"),
        "whole_rows": variant.whole_rows,
        "adjacent": variant.adjacent,
        "split": variant.split,
        "large": variant.large,
        "double": acc == "f64",
        "differentiate": variant.differentiate,
    }
    return _simd.Task(fields, tuple(constants.items()), BUILD_ID)


def compile_task(name: str, variant: Variant) -> Any:
    """Task ``name`` as a C function (``.address``); a cache that cannot be used is no error."""
    function = getattr(_kernels, name + "_task")
    signature = types.void(task_type(name, variant))
    try:
        compiled = cfunc(signature, cache=True)(function)
    except Exception as reason:  # read-only home, truncated or unreadable cache file: compile without it
        warnings.warn(f"fastxent compiles without its disk cache: {reason}", RuntimeWarning, stacklevel=4)
        compiled = cfunc(signature)(function)
    return compiled


def cache_folder() -> str:
    """Where compiled kernels are kept."""
    try:
        locator = FunctionCache(_kernels.value_task).cache_path
    except RuntimeError:
        return "none: no folder can be written to"
    return str(locator)
