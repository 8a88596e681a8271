"""The functions of ``_direct`` as builtins of this Python, and the table that they read.

That needs a CPython with a GIL whose objects lie in memory as expected; elsewhere calls take the longer way.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from fastxent import _parallel, _task
from fastxent._parallel import PackedTask
from fastxent._plan import TILE

_FASTCALL = 0x80  # METH_FASTCALL
_tile = np.empty(TILE + 64, np.uint8)  # of the one that holds the GIL


class _MethodDef(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


class Table:
    """Small calls that are known, and the builtins that run them: see ``_direct``."""

    def __init__(self, writes: bool) -> None:
        self.words = np.zeros(_task.HEAD + _task.MOST_ENTRIES * _task.ENTRY, np.int64)
        self.words[: _task.HEAD] = (
            0, writes, *map(id, (np.ndarray, int, float, str)), _parallel.kernel("launch").address,
            *map(_address_of, ("PyFloat_FromDouble", "PyBool_FromLong", "PyLong_AsLongLong", "PyObject_RichCompareBool")),
        )  # fmt: skip
        self.entered = 0
        self.owners: list[object] = [None] * _task.MOST_ENTRIES  # of what the entries point to
        self.answer, self.run_at = _builtin("answer", self.words), _builtin("run_at", self.words)

    def enter(self, task: PackedTask, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], options: tuple[Any, ...]) -> None:
        """Know a call with arrays like these, C-contiguous, and these options; in a full table in place of the oldest."""
        block = _own_block(task)
        nth = self.entered % _task.MOST_ENTRIES
        entry = self.words[_task.HEAD + nth * _task.ENTRY :][: _task.ENTRY]
        entry[_task.OPTIONS] = id(self)  # no option: nobody finds the entry while it changes owners
        self.owners[nth] = block, task, x.dtype, y.dtype, options
        kinds = (n for a in (x, y) for n in (id(a.dtype), a.ndim, *a.shape, *[0] * (_task.MOST_AXES - a.ndim)))
        entry[:] = (ctypes.addressof(block), x.nbytes, y.nbytes, *kinds, *map(id, options))
        self.entered += 1
        self.words[_task.COUNT] = min(self.entered, _task.MOST_ENTRIES)


def table(writes: bool) -> Table | None:
    """An empty table, of calls that write a gradient or do not; None: this Python has to do without."""
    return Table(writes) if _all_is_in_its_place() else None


@lru_cache
def _addresses() -> Table | None:
    return table(True)


def at_addresses(task: PackedTask) -> Callable[[int, int, int, int], bool] | None:
    """``run(x, g, y, loss)``, addresses all, for a small task: writes the loss, or says that a class index is out of range."""
    calls = _addresses()
    if calls is None:
        return None
    block = _own_block(task)
    run = partial(calls.run_at, ctypes.addressof(block), task.plan.variant.acc == "f64")
    run.__dict__["owner"] = block, task
    return run


def _own_block(task: PackedTask) -> ctypes.Array[ctypes.c_char]:
    """An argument block for the builtins alone, but for what they write."""
    block = task.new_block(_tile.ctypes.data + -_tile.ctypes.data % 64)
    _task.START.pack_into(block, 0, 0, 0, 1)
    return block


def _builtin(name: str, table: np.ndarray[Any, Any]) -> Callable[..., Any]:
    definition = _MethodDef(name.encode(), _parallel.kernel(name).address, _FASTCALL, None)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(definition))  # for ever: the builtin reads it up to its own end
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    new: Callable[..., Callable[..., Any]] = prototype(("PyCFunction_NewEx", ctypes.pythonapi))
    return new(ctypes.addressof(definition), table, None)


def _address_of(function: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, function), ctypes.c_void_p).value or 0


def _all_is_in_its_place() -> bool:
    """Are Python's and NumPy's objects as the table's contract has them?"""
    if (
        sys.implementation.name != "cpython"
        or sysconfig.get_config_var("Py_GIL_DISABLED")
        or ctypes.sizeof(ctypes.c_void_p) != 8
    ):
        return False
    a = np.arange(6.0).reshape(2, 3)
    words = (ctypes.c_int64 * (_task.FLAGS + 1)).from_address(id(a))
    n_axes, flags = words[_task.NDIM] & _task.LOW_HALF, words[_task.FLAGS] & _task.LOW_HALF
    found = words[_task.TYPE], words[_task.DATA], words[_task.DTYPE], n_axes, flags
    strides_behind_dims = words[_task.DIMS + 1] == words[_task.DIMS] + 8 * a.ndim  # before these are read
    if found != (id(np.ndarray), a.ctypes.data, id(a.dtype), a.ndim, a.flags.num) or not strides_behind_dims:
        return False
    return (ctypes.c_int64 * 2).from_address(words[_task.DIMS])[:] == list(a.shape)
