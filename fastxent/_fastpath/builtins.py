"""The functions of ``front_end`` as builtins of this Python.

A builtin has a ``self``, the words of one call, so that Python looks the call up and calls its own builtin. That needs a
CPython with a GIL whose objects lie in memory as expected (``front_end.objects``); elsewhere calls take the longer way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastxent._abi import argument_block as abi
from fastxent._codegen import registry
from fastxent._fastpath.front_end import objects, words
from fastxent._fastpath.tasks import Family, Task
from fastxent._runtime import run, threads

if TYPE_CHECKING:
    from fastxent._fastpath.front_end import arrays, tensors  # noqa: F401  # for those who pack a program: see ``BUILTINS``

# Of each operand its name, the bytes that must be there, and those of an element
Operands = tuple[tuple[str, int, int], ...]
Words = np.ndarray[Any, np.dtype[np.int64]]

_process = np.zeros(words.PROCESS, np.int64)
_owners: list[object] = []  # of what the process's words point to


class _State:
    openmp: ctypes.CDLL | None = None  # that of the process's words


def arrays_builtin(family: Family, dtypes: tuple[object, object], options: tuple[Any, ...]) -> Callable[..., Any] | None:
    """``run(team, logits, target, out, *options)``, as `front_end.arrays.run_arrays`, of dtypes and options like these; None:
    this Python has to do without. The caller keeps family and dtypes."""
    if not objects.arrays_are_as_expected():
        return None
    writes = family.name != "value"
    call = [_filled().ctypes.data, family.words.ctypes.data, *map(id, dtypes), writes, *(id(type(o)) for o in options)]
    return _builtin("run_arrays", np.array(call))


def tensors_builtin(task: Task, operands: Operands, is_double: bool, n_narrow: int) -> Callable[..., int] | None:
    """``run(team, loss, x, g, y, ...)``, as `front_end.tensors.run_tensors`. The caller keeps the task.

    ``n_narrow``: class weights that come as float32."""
    interface = objects.c_interface()
    if interface is None or not objects.arrays_are_as_expected():
        return None
    process = _filled()
    process[words.TENSOR_HANDLE : words.FOUND] = interface
    parts = [n for name, *rest in operands for n in (abi.SLOT[name], *rest)]
    head = process.ctypes.data, task.words.ctypes.data, is_double, n_narrow, 0, len(operands)
    call = np.array([*head, *parts, *[0] * n_narrow])  # behind them is room for the weights
    call[words.WIDE_AT] = call[words.OPERANDS + len(parts) :].ctypes.data
    return _builtin("run_tensors", call)


def team(n_threads: int | None = None) -> int:
    """Threads for a call that a builtin runs; 0: it has to go the longer way."""
    openmp = threads._openmp()
    if _State.openmp is not openmp and not _use_openmp(openmp):  # PyTorch has come
        return 0
    return run.team_at_once(n_threads, openmp)


def _use_openmp(openmp: ctypes.CDLL | None) -> bool:
    """Not while a task runs without the GIL: it may have read one of the two words. Only what an interrupt has not kept from
    being written is remembered."""
    if run._State.released.value != 0:
        return False
    entries = threads.entries_of(openmp)
    _process[[words.PARALLEL, words.THREAD_NUMBER]] = entries
    _State.openmp = openmp
    return True


def _filled() -> Words:
    """The process's words. Whoever fills them meanwhile writes the same, but for tiles, which are as good."""
    if _process[words.LAUNCH] == 0:
        held, released = (run.tiles_for(threads.MOST_THREADS) for _ in range(2))
        _owners.extend((held, released, run._State.released))
        functions = (
            "PyEval_SaveThread", "PyEval_RestoreThread", "PyErr_BadArgument", "PyFloat_FromDouble", "PyBool_FromLong",
            "PyLong_FromLongLong", "PyLong_AsLongLong",
        )  # fmt: skip
        _use_openmp(threads._openmp())
        _process[words.HELD_TILES : words.TENSOR_HANDLE] = (
            held[1], released[1], run.released_at(), *map(_address_of, functions),
            *map(id, (np.ndarray, None)),
        )  # fmt: skip
        _process[words.LAUNCH] = registry.kernel("launch").address
    return _process


def _builtin(name: str, call: Words) -> Callable[..., Any]:
    return _new()(ctypes.addressof(_definition(name)), call, None)


@lru_cache
def _new() -> Callable[..., Callable[..., Any]]:
    """Once: each prototype is a new class, which only the garbage collector frees."""
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    return prototype(("PyCFunction_NewEx", ctypes.pythonapi))


@lru_cache
def _definition(name: str) -> objects.MethodDef:
    definition = objects.MethodDef(name.encode(), registry.kernel(name).address, objects.METH_FASTCALL, None)
    for needed in (definition, registry._kernels, _process, _owners):  # for ever: a builtin needs them up to its own end
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(needed))
    return definition


def _address_of(function: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, function), ctypes.c_void_p).value or 0
