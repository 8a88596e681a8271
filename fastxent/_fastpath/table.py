"""The functions of ``fastcall`` as builtins of this Python, and the table that they read.

That needs a CPython with a GIL whose objects lie in memory as expected; elsewhere calls take the longer way.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastxent._abi import argument_block as abi
from fastxent._codegen import registry
from fastxent._fastpath.family import Family
from fastxent._runtime import run, threads
from fastxent._runtime.arguments import Array
from fastxent._runtime.plan import Plan
from fastxent._runtime.run import PackedTask

if TYPE_CHECKING:
    from fastxent._fastpath import fastcall  # noqa: F401  # for those who pack a program: see ``BUILTINS``

_FASTCALL = 0x80  # METH_FASTCALL


class _MethodDef(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


class Table:
    """Calls that are known, and ``answer``, the builtin that runs them. It only grows: nothing it points to is let go."""

    def __init__(self, writes: bool) -> None:
        self.words = _words(abi.MOST_ENTRIES, writes)
        self.openmp = threads._openmp()
        self.families: dict[tuple[Any, ...], Family] = {}
        self.owners: list[object] = []  # of what the entries point to
        self.answer = _builtin("answer", self.words)

    def enter(self, name: str, plan: Plan, axis: int, x: Array, y: Array, options: tuple[Any, ...], **arguments: Any) -> None:
        """Know calls of task ``name`` with arrays like these, C-contiguous, whatever their extents, and these options, if there
        is room. For one thread at a time."""
        key = (x.dtype, x.ndim, axis, y.dtype, options, *map(type, options))
        if (family := self.families.get(key)) is not None:
            family.meet(plan)
            return
        nth = int(self.words[abi.COUNT])
        if nth < abi.MOST_ENTRIES:
            family = Family(name, plan, axis, x.ndim, tiles=_tiles()[1], **arguments)
            self.families[key] = family
            entry = np.array([family.words.ctypes.data, id(x.dtype), id(y.dtype), *map(id, options)])
            self.owners.append((family, x.dtype, y.dtype, options))
            self.words[abi.HEAD + nth * abi.ENTRY :][: abi.ENTRY] = entry
            self.words[abi.COUNT] = nth + 1

    def team(self, n_threads: int | None = None) -> int:
        """See `run.team_at_once`."""
        if self.openmp is not (openmp := threads._openmp()):  # PyTorch has come
            self.words[[abi.PARALLEL, abi.THREAD_NUMBER]] = threads.entries_of(openmp)
            self.openmp = openmp
        return run.team_at_once(n_threads)


def table(writes: bool) -> Table | None:
    """An empty table, of calls that write a gradient or do not; None: this Python has to do without."""
    return Table(writes) if _all_is_in_its_place() else None


# Of each operand its name, the bytes that must be there, and those of an element
Operands = tuple[tuple[str, int, int], ...]


def on_tensors(
    given: PackedTask | Family, operands: Operands, is_double: bool, n_narrow: int, c_interface: tuple[int, ...] | None
) -> Callable[..., int] | None:
    """``run(team, loss, x, g, y, ...)``, the number of threads and tensors, or None where there is none; those that the task
    has not may be left out. 1: the loss has been written; 0: a class index is out of range; ``NOT_THERE``: memory is not as it
    must be, or no tensors of the family; ``NOT_MET``: the family has no kernel for them.

    ``n_narrow``: class weights that come as float32; ``c_interface``: see ``torch._handles``."""
    if c_interface is None or not _all_is_in_its_place():
        return None
    parts = [n for name, *rest in operands for n in (abi.SLOT[name], *rest)]
    of_family = isinstance(given, Family)
    call = np.array([of_family, is_double, n_narrow, 0, *parts, *[0] * n_narrow])  # behind them is room for the weights
    call[abi.WIDE_AT] = call[abi.FIRST_OPERAND + len(parts) :].ctypes.data
    return partial(_run_on(c_interface), given.words if isinstance(given, Family) else _own_block(given), call)


def family_of(task: PackedTask, axis: int, n_axes: int, **more: Any) -> Family:
    """Of calls like this one: see `Family`."""
    return Family(task.name, task.plan, axis, n_axes, tiles=_tiles()[1], **more, **task.arguments)


@lru_cache
def _run_on(c_interface: tuple[int, ...]) -> Callable[..., int]:
    return _builtin("run_on", np.concatenate([_words(0, writes=True), [*c_interface, 0, id(None)]]))


def _words(n_entries: int, writes: bool) -> Array:
    """A table without entries, for the OpenMP runtime that is there now."""
    words = np.zeros(abi.HEAD + n_entries * abi.ENTRY, np.int64)
    words[: abi.HEAD] = (
        0, writes, *map(id, (np.ndarray, int, float, str)), registry.kernel("launch").address,
        *map(_address_of, ("PyFloat_FromDouble", "PyBool_FromLong", "PyLong_FromLongLong", "PyLong_AsLongLong")),
        _address_of("PyObject_RichCompareBool"),
        *threads.entries_of(threads._openmp()),
    )  # fmt: skip
    return words


@lru_cache
def _tiles() -> tuple[Array, int]:
    """Those of the team of the one who holds the GIL."""
    return run.tiles_for(threads.MOST_THREADS)


def _own_block(task: PackedTask) -> Array:
    """An argument block for the builtins alone, but for what they write."""
    _, tiles = _tiles()
    block = task.new_block(tiles)
    abi.START.pack_into(block, 0, 0, 0, 1)
    return np.frombuffer(block, np.uint8)  # type: ignore[call-overload]  # ctypes arrays are buffers


def _builtin(name: str, words: Array) -> Callable[..., Any]:
    definition = _MethodDef(name.encode(), registry.kernel(name).address, _FASTCALL, None)
    for needed in (definition, registry._kernels):  # for ever: the builtin needs them up to its own end
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(needed))
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    new: Callable[..., Callable[..., Any]] = prototype(("PyCFunction_NewEx", ctypes.pythonapi))
    return new(ctypes.addressof(definition), words, None)


def _address_of(function: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, function), ctypes.c_void_p).value or 0


def _all_is_in_its_place() -> bool:
    """Are Python's and NumPy's objects as the table's contract has them?"""
    has_gil = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
    if not has_gil or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    a = np.arange(6.0).reshape(2, 3)
    words = (ctypes.c_int64 * (abi.FLAGS + 1)).from_address(id(a))
    n_axes, flags = words[abi.NDIM] & abi.LOW_HALF, words[abi.FLAGS] & abi.LOW_HALF
    found = words[abi.TYPE], words[abi.DATA], words[abi.DTYPE], n_axes, flags
    strides_behind_dims = words[abi.DIMS + 1] == words[abi.DIMS] + 8 * a.ndim  # before these are read
    if found != (id(np.ndarray), a.ctypes.data, id(a.dtype), a.ndim, a.flags.num) or not strides_behind_dims:
        return False
    return (ctypes.c_int64 * 2).from_address(words[abi.DIMS])[:] == list(a.shape)
