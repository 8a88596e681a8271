"""Memory for gradients: huge pages, and freed buffers used again.

Page faults are the largest cost of a fresh gradient: 262 MB, forward and backward, took 25 ms into a warm buffer, 37 ms into
fresh huge pages, 82 ms into fresh small ones (DESIGN.md, section 6). NumPy asks for huge pages by itself; and a training loop
frees a gradient of the size that it will want in the next step.

A buffer goes back into the store when nothing refers to the array made of it any more, whoever that was: tensors, views, saved
tensors, NumPy arrays. Nothing else ever returns one, so none is handed out while anything still looks at it.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from typing import Any, ClassVar, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

SMALLEST = 1 << 20  # bytes: below this malloc recycles by itself
ALIGNMENT = 64  # bytes: whole cache lines, as non-temporal stores want them


class _Buffer(NamedTuple):
    raw: Array  # owner of the memory
    nbytes: int  # from ``start`` on
    start: int  # aligned address


class _Store:
    limit = 1 << 30  # bytes kept for later at most
    lock = threading.Lock()
    kept: ClassVar[list[_Buffer]] = []  # free buffers, the latest freed last; touched by the holder of the lock only
    returned: ClassVar[deque[_Buffer]] = deque()  # freed since the lock was held; append and popleft are atomic


class _Lease:
    """The base of a lent array, and so of all its views and of tensors made of them: its end is the end of them all."""

    def __init__(self, buffer: _Buffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.buffer = buffer
        self.__array_interface__ = {"data": (buffer.start, False), "shape": shape, "typestr": dtype.str, "version": 3}

    def __del__(self) -> None:
        # This may run in the midst of anything, even of a holder of the lock (garbage collection): then the holder, or the
        # next one, takes the buffer in.
        _Store.returned.append(self.buffer)
        if _Store.lock.acquire(blocking=False):
            try:
                _take_in()
            finally:
                _Store.lock.release()


def _take_in() -> None:
    """Keep what came back, and let go of the oldest above the limit. For the holder of the lock."""
    while _Store.returned:
        _Store.kept.append(_Store.returned.popleft())
    while sum(b.nbytes for b in _Store.kept) > _Store.limit:
        _Store.kept.pop(0)


def _after_fork() -> None:
    _Store.lock = threading.Lock()  # whoever held it does not exist here
    _Store.kept, _Store.returned = [], deque()  # the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """``np.empty``, but large arrays are aligned, and lie in used memory if there is some."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALLEST or _Store.limit == 0:
        return np.empty(shape, dtype)
    best = None
    with _Store.lock:
        _take_in()
        for i, b in enumerate(_Store.kept):
            if nbytes <= b.nbytes <= nbytes + nbytes // 4 and (best is None or b.nbytes < _Store.kept[best].nbytes):
                best = i
        found = None if best is None else _Store.kept.pop(best)
    a = np.asarray(_Lease(_new(nbytes) if found is None else found, shape, dtype))
    return a if a.dtype == dtype else a.view(dtype)  # bfloat16 is a dtype that NumPy's array interface cannot name


def _new(nbytes: int) -> _Buffer:
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    address = raw.ctypes.data
    return _Buffer(raw, nbytes, address + -address % ALIGNMENT)


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
        _take_in()


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
        _take_in()
        count = sum(b.nbytes for b in _Store.kept)
        _Store.kept = []
        return count
