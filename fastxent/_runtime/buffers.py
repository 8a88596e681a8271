"""Memory for gradients: huge pages, and recycled buffers.

Page faults are the largest cost of a fresh gradient: 262 MB, forward and backward, took 25 ms into a warm buffer, 37 ms into
fresh huge pages, 82 ms into fresh small pages. NumPy requests huge pages by itself, and a training loop frees a gradient of
the size that its next step needs.

A buffer is free when only the store refers to it, which its reference count tells: every array, view, tensor and saved tensor
in its memory holds a reference. So no buffer is handed out while anything still refers to it.

There is no lock: a signal handler or the garbage collector may interrupt any line here and request a buffer too. Whoever
removes a buffer from the list, which is one atomic step, is its only owner until it is put back with a reference held.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastxent._runtime.options import check_integer

Array = np.ndarray[Any, Any]

SMALLEST = 1 << 20  # bytes: malloc itself recycles smaller ones
ALIGNMENT = 64  # bytes: a cache line, as non-temporal stores need it
MOST_BUFFERS = 64


@dataclass(eq=False)
class _Buffer:
    owner: Array  # owns the memory
    nbytes: int  # usable bytes, from ``start`` on
    start: int  # bytes to the first aligned address

    def references(self) -> int:
        return sys.getrefcount(self.owner)


FREE = _Buffer(np.empty(0, np.uint8), 0, 0).references()  # the count for a free buffer


class _Store:
    limit = 1 << 30  # most bytes of all buffers in the store, in use or free
    kept: ClassVar[list[_Buffer]] = []  # in the order in which they were handed out


def _after_fork() -> None:
    _Store.kept = []  # those belong to the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return ``np.empty``; large arrays are aligned to cache lines and reuse a free buffer if there is one."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALLEST or _Store.limit == 0:
        return np.empty(shape, dtype)
    buffer = _take(nbytes)
    keep = buffer is not None or _make_room(nbytes)
    buffer = buffer or _new(nbytes)
    array = np.ndarray(shape, dtype, buffer.owner, buffer.start)
    if keep:
        _Store.kept.append(buffer)
    return array


def _take(nbytes: int) -> _Buffer | None:
    """Remove from the store and return the latest free buffer that is large enough and at most a quarter larger."""
    for buffer in reversed(_Store.kept):
        if nbytes <= buffer.nbytes <= nbytes + nbytes // 4 and buffer.references() == FREE:
            try:
                _Store.kept.remove(buffer)
            except ValueError:  # another thread or a signal handler has just taken it
                continue
            if buffer.references() == FREE:  # it may have been taken and put back, in use
                return buffer
            _Store.kept.append(buffer)
    return None


def _make_room(nbytes: int) -> bool:
    """Drop free buffers, the oldest first, until the store has room for ``nbytes`` more; return whether it has."""
    while _Store.kept and not _is_room_for(nbytes):
        free = next((b for b in _Store.kept if b.references() == FREE), None)
        if free is None:
            return False
        with suppress(ValueError):
            _Store.kept.remove(free)
    return _is_room_for(nbytes)


def _is_room_for(nbytes: int) -> bool:
    return len(_Store.kept) < MOST_BUFFERS and sum(b.nbytes for b in _Store.kept) + nbytes <= _Store.limit


def _new(nbytes: int) -> _Buffer:
    owner = np.empty(nbytes + ALIGNMENT, np.uint8)
    return _Buffer(owner, nbytes, -owner.ctypes.data % ALIGNMENT)


def set_buffer_limit(nbytes: int) -> None:
    """Store at most ``nbytes`` bytes of gradient buffers for reuse, including those in use; 0 stores none.

    Parameters
    ----------
    nbytes : int
        At least 0. The default is 1 GiB.

    Raises
    ------
    ValueError, TypeError
        If ``nbytes`` is negative, or no integer.

    Examples
    --------
    >>> import fastxent as fx
    >>> fx.set_buffer_limit(1 << 30)
    """
    limit = check_integer(nbytes, "nbytes")
    if limit < 0:
        raise ValueError(f"nbytes = {limit} is negative")
    _Store.limit = limit
    while _Store.kept and not _is_room_for(0):
        del _Store.kept[:1]


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
    kept, _Store.kept = _Store.kept, []
    return sum(b.nbytes for b in kept if b.references() == FREE)
