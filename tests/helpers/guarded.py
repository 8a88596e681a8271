"""Arrays that lie right against pages which nobody may touch: a stray access ends the process, a stray write is seen."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from fastxent import binary, functional, special
from fastxent._runtime import arguments, run

PAGE = mmap.PAGESIZE
RED = 0xFF  # fills the rest of the pages: a nan in every floating dtype, -1 in every signed integer
NO_ACCESS = 0  # PROT_NONE


def forbid(page: int) -> None:
    """Nobody may touch the page at this address any more."""
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if mprotect(page, PAGE, NO_ACCESS):
        raise OSError(ctypes.get_errno(), "mprotect")


class Room:
    """Memory between two forbidden pages, an array at its very beginning or end, red all around it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None, at_end: bool) -> None:
        dtype = np.dtype(dtype)
        dense = np.empty(shape, np.uint8).strides  # of single bytes
        strides = tuple(s * dtype.itemsize for s in dense) if strides is None else strides
        # Bytes of the array before and from its first element.
        before = sum((n - 1) * -s for n, s in zip(shape, strides, strict=True) if s < 0 and n)
        behind = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s > 0 and n) + dtype.itemsize
        pages = -(-(before + behind) // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self.bytes = np.frombuffer(memory, np.uint8)
        self.bytes[PAGE:-PAGE] = RED
        start = self.bytes.ctypes.data
        for page in (start, start + (pages + 1) * PAGE):
            forbid(page)
        offset = PAGE + (pages * PAGE - before - behind if at_end else 0) + before
        self.array = np.ndarray(shape, dtype, memory, offset, strides)
        # Which bytes are not the array's.
        self.outside = np.ones(pages * PAGE, bool)
        own = np.ndarray((*shape, dtype.itemsize), bool, self.outside, offset - PAGE, (*strides, 1))
        own[...] = False

    def is_clean(self) -> bool:
        return bool((self.bytes[PAGE:-PAGE][self.outside] == RED).all())


class Rooms:
    """All guarded arrays of a test; ``at_end`` or at the beginning of their pages."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.rooms: list[Room] = []

    def empty(self, shape: Any, dtype: Any = np.float64, strides: tuple[int, ...] | None = None) -> np.ndarray:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.rooms.append(Room(shape, dtype, strides, self.at_end))
        return self.rooms[-1].array

    def copy(self, a: np.ndarray, strides: tuple[int, ...] | None = None) -> np.ndarray:
        """The values of ``a``, as they lie or as ``strides`` say."""
        new = self.empty(a.shape, a.dtype, a.strides if strides is None else strides)
        new[...] = a
        return new

    def check(self, label: str) -> None:
        for room in self.rooms:
            assert room.is_clean(), f"{label}: bytes around an array of shape {room.array.shape}, {room.array.dtype}"
        self.rooms.clear()

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """All arrays that fastxent makes inside are guarded too: losses, gradients, statistics, partial sums."""
        with ExitStack() as stack:
            for module in (functional, arguments, special, binary):
                stack.enter_context(patch.object(module, "np", _Numpy(self)))
            stack.enter_context(patch.object(run, "ctypes", _Ctypes(self)))
            yield


class _Numpy:
    """NumPy, with guarded new arrays."""

    def __init__(self, rooms: Rooms) -> None:
        self.empty = rooms.empty
        self._rooms = rooms

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def full(self, shape: Any, value: Any, dtype: Any = np.float64) -> np.ndarray:
        new = self._rooms.empty(shape, dtype)
        new[...] = value
        return new

    def zeros(self, shape: Any, dtype: Any = np.float64) -> np.ndarray:
        return self.full(shape, 0, dtype)

    def empty_like(self, a: np.ndarray, dtype: Any = None, subok: bool = True) -> np.ndarray:
        model = np.empty_like(a, dtype=dtype)
        return self._rooms.empty(model.shape, model.dtype, model.strides)


class _Ctypes:
    """ctypes, with guarded string buffers."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    def __getattr__(self, name: str) -> Any:
        return getattr(ctypes, name)

    def create_string_buffer(self, size: int) -> Any:
        block = self._rooms.empty(size, np.uint8)
        block[...] = 0
        return (ctypes.c_char * size).from_buffer(block)
