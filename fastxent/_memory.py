"""Memory for gradients: huge pages, and freed buffers used again.

Page faults are the largest cost of a fresh gradient: 262 MB, forward and backward, took 25 ms into a warm buffer, 37 ms into
fresh huge pages, 82 ms into fresh small ones (DESIGN.md, section 6). NumPy asks for huge pages by itself; and a training loop
frees a gradient of the size that it will want in the next step.

A buffer goes back into the store when nothing refers to the array made of it any more, whoever that was: tensors, views, saved
tensors, NumPy arrays. Nothing else ever returns one, so none is handed out while anything still looks at it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, Any]

SMALLEST = 1 << 20  # bytes: below this malloc recycles by itself
ALIGNMENT = 64  # bytes: whole cache lines, as non-temporal stores want them


class _Store:
    limit = 1 << 30  # bytes kept for later at most
    lock = threading.Lock()
    kept: ClassVar[list[Array]] = []  # free buffers, the latest freed last; touched by the holder of the lock only
    returned: ClassVar[deque[Array]] = deque()  # freed since the lock was held; append and popleft are atomic


class _Lease:
    """The base of a lent array, and so of all its views and of tensors made of them: its end is the end of them all."""

    def __init__(self, raw: Array, nbytes: int) -> None:
        address = raw.__array_interface__["data"][0]
        self.raw = raw
        self.__array_interface__ = {
            "data": (address + -address % ALIGNMENT, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        # This may run in the midst of anything, even of a holder of the lock (garbage collection): then the holder, or the
        # next one, takes the buffer in.
        _Store.returned.append(self.raw)
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


def buffer(nbytes: int) -> Array:
    """``nbytes`` bytes to write to, as a uint8 array, aligned if large; what they hold is anything."""
    if nbytes < SMALLEST or _Store.limit == 0:
        return np.empty(nbytes, np.uint8)
    wanted = nbytes + ALIGNMENT
    raw = None
    with _Store.lock:
        _take_in()
        fitting = [b for b in _Store.kept if wanted <= b.nbytes <= wanted + nbytes // 4]
        if fitting:
            raw = min(fitting, key=lambda b: b.nbytes)
            _Store.kept = [b for b in _Store.kept if b is not raw]
    return np.asarray(_Lease(np.empty(wanted, np.uint8) if raw is None else raw, nbytes))


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
