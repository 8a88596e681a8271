"""Memory for gradients: huge pages, and freed buffers used again.

Page faults are the largest cost of a fresh gradient: 262 MB, forward and backward, took 25 ms into a warm buffer, 37 ms into
fresh huge pages, 82 ms into fresh small ones (DESIGN.md, section 6). NumPy asks for huge pages by itself; and a training loop
frees a gradient of the size that it will want in the next step.

A buffer is free when nothing but the store refers to it, which its reference count tells: every array, view, tensor and saved
tensor that lies in it does. So none is handed out while anything still looks at it.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, Any]

SMALLEST = 1 << 20  # bytes: below this malloc recycles by itself
ALIGNMENT = 64  # bytes: whole cache lines, as non-temporal stores want them


@dataclass(eq=False)
class _Buffer:
    owner: Array  # of the memory
    nbytes: int  # from ``start`` on
    start: int  # bytes to the first aligned address

    def references(self) -> int:
        return sys.getrefcount(self.owner)


FREE = _Buffer(np.empty(0, np.uint8), 0, 0).references()  # of a buffer that nobody uses


class _Store:
    limit = 1 << 30  # bytes kept at most, in use or free
    lock = threading.Lock()
    kept: ClassVar[list[_Buffer]] = []  # the latest used last; touched by the holder of the lock only


def _trim() -> None:
    """Keep no more than the limit, and rather what was used of late. For the holder of the lock."""
    while sum(b.nbytes for b in _Store.kept) > _Store.limit:
        _Store.kept.pop(0)


def _after_fork() -> None:
    _Store.lock = threading.Lock()  # whoever held it does not exist here
    _Store.kept = []  # the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """``np.empty``, but large arrays are aligned, and lie in used memory if there is some."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALLEST or _Store.limit == 0:
        return np.empty(shape, dtype)
    with _Store.lock:
        fitting = [b for b in _Store.kept if nbytes <= b.nbytes <= nbytes + nbytes // 4 and b.references() == FREE]
        if fitting:
            buffer = min(fitting, key=lambda b: b.nbytes)
            _Store.kept.remove(buffer)
        else:
            buffer = _new(nbytes)
        _Store.kept.append(buffer)
        _trim()
        return np.ndarray(shape, dtype, buffer.owner, buffer.start)


def _new(nbytes: int) -> _Buffer:
    owner = np.empty(nbytes + ALIGNMENT, np.uint8)
    return _Buffer(owner, nbytes, -owner.ctypes.data % ALIGNMENT)


def set_buffer_limit(nbytes: int) -> None:
    """Keep at most ``nbytes`` bytes of freed gradient buffers for later use; 0 keeps none.

    Parameters
    ----------
    nbytes : int
        At least 0. The default is 1 GiB.

    Raises
    ------
    ValueError
        If ``nbytes`` is negative.

    Examples
    --------
    >>> import fastxent as fx
    >>> fx.set_buffer_limit(1 << 30)
    """
    if nbytes < 0:
        raise ValueError(f"nbytes = {nbytes} is negative")
    with _Store.lock:
        _Store.limit = nbytes
        _trim()


def release_buffers() -> int:
    """Give all freed gradient buffers back to the system.

    Returns
    -------
    int
        Bytes given back.

    Examples
    --------
    >>> import fastxent as fx
    >>> _ = fx.release_buffers()
    >>> fx.release_buffers()
    0
    """
    with _Store.lock:
        count = sum(b.nbytes for b in _Store.kept if b.references() == FREE)
        _Store.kept = []
        return count
