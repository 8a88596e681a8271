"""Memory for gradients: huge pages, and freed buffers used again.

Page faults are the largest cost of a fresh gradient: 262 MB, forward and backward, took 25 ms into a warm buffer, 37 ms into
fresh huge pages, 82 ms into fresh small ones (DESIGN.md, section 6). NumPy asks for huge pages by itself; and a training loop
frees a gradient of the size that it will want in the next step.

A buffer is free when nothing but the store refers to it, which its reference count tells: every array, view, tensor and saved
tensor that lies in it does. So none is handed out while anything still looks at it.

There is no lock: a signal handler or the garbage collector may come in anywhere and want a buffer too. Whoever takes a buffer
out of the list, which is one atomic step, has it alone until it is put back, referred to.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, Any]

SMALLEST = 1 << 20  # bytes: below this malloc recycles by itself
ALIGNMENT = 64  # bytes: whole cache lines, as non-temporal stores want them
MOST_BUFFERS = 64


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
    kept: ClassVar[list[_Buffer]] = []  # the latest handed out last


def _after_fork() -> None:
    _Store.kept = []  # the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """``np.empty``, but large arrays are aligned, and lie in used memory if there is some."""
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
    """The latest free buffer that is large enough, and not much larger, out of the store."""
    for buffer in reversed(_Store.kept):
        if nbytes <= buffer.nbytes <= nbytes + nbytes // 4 and buffer.references() == FREE:
            try:
                _Store.kept.remove(buffer)
            except ValueError:  # somebody else has just taken it
                continue
            if buffer.references() == FREE:  # still: they may have put it back, in use
                return buffer
            _Store.kept.append(buffer)
    return None


def _make_room(nbytes: int) -> bool:
    """Let free buffers go, the oldest first, until one more may be kept; is it so?"""
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
    """Keep at most ``nbytes`` bytes of gradient buffers, those in use included, for later use; 0 keeps none.

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
    _Store.limit = nbytes
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
