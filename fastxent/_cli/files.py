"""Reads arrays from untrusted files: a .npy is memory-mapped, a member of a .npz is a stream, a folder is for ``zarr_folder``.

Nothing that such a file says is trusted: a header is read from a bounded prefix, the size it promises is compared with the
bytes that are there before anything is mapped or allocated, and nothing is ever unpickled. Any fault raises an `InputError`.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

WHOLE_BYTES = 1 << 30  # the largest array that is read whole, if it is in a .npz and cannot be read in blocks
HEADER_BYTES = 1 << 14  # NumPy itself refuses headers past 10 000 bytes

Array = npt.NDArray[Any]
Index = tuple[slice, ...]


class InputError(ValueError):
    """A fault in a file or an option, described for the person who named it."""


class Header(NamedTuple):
    """The checked content of the header of a .npy stream."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int  # of the data

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class FileArray:
    """An array in a file, read in blocks."""

    chunks: tuple[int, ...] | None = None  # the extents of the pieces in which it is stored, if these are read as a whole

    def __init__(self, name: str, header: Header) -> None:
        self.name, self.header = name, header
        self.shape, self.dtype, self.n_bytes = header.shape, header.dtype, header.n_bytes
        self.read_bytes = 0  # since the file was opened or rewound

    def block(self, index: Index) -> Array:
        """Return the elements of one block; bfloat16 is widened to float32."""
        raw = self._raw(index)
        self.read_bytes += raw.nbytes
        return _widen(raw)

    def zeros(self, index: Index) -> Array:
        """Return zeros of the shape and dtype that `block` would return, without reading."""
        return _widen(np.zeros([s.stop - s.start for s in index], self.dtype))

    def in_blocks(self, axis: int | None) -> FileArray:
        """Return an array whose rows can be read block by block, this one if possible; the classes are on `axis`."""
        return self

    def to_read_again(self) -> FileArray:
        """Return an array of which any block can be read any number of times, this one if possible."""
        return self

    def opener(self) -> Callable[[], FileArray]:
        """Return a function that opens the array in another process, for blocks in any order."""
        raise InputError(f"{self.name} is in an archive, in which a cluster finds no blocks; use a .npy file or a zarr folder")

    def release(self) -> None:
        """Release the memory of what was read so far."""

    def rewind(self) -> None:
        self.read_bytes = 0

    def _raw(self, index: Index) -> Array:
        raise NotImplementedError


class Mapped(FileArray):
    """The array of a .npy file, memory-mapped and read-only, or one that is in memory."""

    def __init__(self, name: str, header: Header, buffer: mmap.mmap | bytes) -> None:
        super().__init__(name, header)
        self._buffer = buffer
        shape = header.shape[::-1] if header.fortran else header.shape
        array: Array = np.ndarray(shape, header.dtype, buffer, header.offset)
        self._array = array.T if header.fortran else array

    def _raw(self, index: Index) -> Array:
        if isinstance(self._buffer, mmap.mmap) and self._buffer.size() < self.header.offset + self.n_bytes:
            raise InputError(f"{self.name} is cut short")  # after it was opened: reading past its end would raise SIGBUS
        return np.asarray(self._array[index])  # the index () gives a scalar

    def opener(self) -> Callable[[], FileArray]:
        return partial(open_array, os.path.abspath(self.name)) if isinstance(self._buffer, mmap.mmap) else super().opener()

    def release(self) -> None:
        # Without this, the resident memory grows to the size of the file. The system's page cache still holds the pages.
        if isinstance(self._buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self._buffer.madvise(mmap.MADV_DONTNEED)


class Streamed(FileArray):
    """An array in a .npz file, compressed or not, read from its beginning to its end."""

    def __init__(self, name: str, header: Header, path: str, member: str) -> None:
        super().__init__(name, header)
        self._path, self._member = path, member
        self._zip: zipfile.ZipFile | None = None
        self._stream: IO[bytes] | None = None

    def in_blocks(self, axis: int | None) -> FileArray:
        # In C order, with the classes, if any, on the last axis, the blocks follow each other in the file.
        if not self.header.fortran and axis in (None, len(self.shape) - 1):
            return self
        return self._whole("has its rows scattered")

    def to_read_again(self) -> FileArray:
        return self._whole("is read more than once")

    def _whole(self, why: str) -> FileArray:
        if self.n_bytes > WHOLE_BYTES:
            raise InputError(f"{self.name} {why} and is too large for that; use a .npy file")
        return Mapped(self.name, self.header._replace(offset=0), self._read(self.n_bytes))

    def _raw(self, index: Index) -> Array:
        shape = [s.stop - s.start for s in index]
        return np.frombuffer(self._read(math.prod(shape) * self.dtype.itemsize), self.dtype).reshape(shape)

    def rewind(self) -> None:
        super().rewind()
        if self._stream is not None and self._zip is not None:
            self._stream.close()
            self._zip.close()
        self._stream = self._zip = None

    def _read(self, size: int) -> bytes:
        with in_one_line(self.name):
            if self._stream is None:
                self._zip = zipfile.ZipFile(self._path)
                self._stream = self._zip.open(self._member)
                self._stream.read(self.header.offset)
            data = self._stream.read(size)
        if len(data) != size:
            raise InputError(f"{self.name} is cut short")
        return data


def open_array(spec: str) -> FileArray:
    """Return the array in ``FILE.npy``, ``FILE.npz`` (if it holds one), ``FILE.npz:key`` or a zarr folder.

    Only its header is read.
    """
    path, key = spec, ""
    if os.path.isdir(spec):
        from fastxent._cli.zarr_folder import open_folder

        return open_folder(spec)
    if not os.path.lexists(spec) and ".npz:" in spec:
        path, _, key = spec.partition(".npz:")
        path += ".npz"
    with in_one_line(spec):
        if not stat.S_ISREG(os.stat(path).st_mode):  # tested before opening: a FIFO would wait for a writer
            raise InputError(f"{spec} is not a regular file")
        with open(path, "rb") as file:
            prefix = file.read(HEADER_BYTES)
            if prefix.startswith(b"PK"):
                return _open_member(spec, path, key)
            header = _read_header(spec, prefix, os.fstat(file.fileno()).st_size)
            return Mapped(spec, header, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _open_member(spec: str, path: str, key: str) -> Streamed:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in dict.fromkeys(archive.namelist()) if name.endswith(".npy")]
        member = f"{key}.npy" if key else names[0] if len(names) == 1 else ""
        if member not in names:
            has = ", ".join(name[:-4] for name in names[:8]) + (", ..." if len(names) > 8 else "")
            wanted = f"no array {key!r}" if key else "not just one array"
            raise InputError(f"{path} holds {wanted} but {has or 'none'}; name it as FILE.npz:key")
        with archive.open(member) as stream:
            header = _read_header(spec, stream.read(HEADER_BYTES), archive.getinfo(member).file_size)
    return Streamed(spec, header, path, member)


def _read_header(name: str, prefix: bytes, size: int) -> Header:
    """Parse the header in the first bytes of a .npy stream that is `size` bytes long."""
    if not prefix:
        raise InputError(f"{name} is empty: 0 bytes")
    if not prefix.startswith(np.lib.format.MAGIC_PREFIX):
        pickle = " (a pickle? they are never loaded)" if prefix.startswith(b"\x80") else ""
        raise InputError(f"{name} is not a .npy or .npz file{pickle}")
    stream = io.BytesIO(prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns of headers that Python 2 wrote
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise InputError(f"{name}: .npy format {version} is not one for numbers")
    header = Header(tuple(int(n) for n in shape), dtype, bool(fortran), stream.tell())
    if dtype.hasobject:
        raise InputError(f"{name} holds pickled Python objects, which are never loaded")
    if any(n < 0 for n in header.shape) or len(shape) > 32:
        raise InputError(f"{name} has a damaged header: shape {header.shape}")
    promised = header.offset + header.n_bytes
    if promised > size:
        raise InputError(f"{name} is cut short: its header promises {promised} bytes, {size} are there")
    return header


@contextlib.contextmanager
def in_one_line(name: str) -> Iterator[None]:
    """Turn whatever the parsers raise within this context, where they may read hostile bytes, into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        detail = getattr(error, "strerror", None) or str(error).split(". ")[0] or type(error).__name__
        raise InputError(f"{name} cannot be read: {detail}") from error


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is bfloat16: NumPy saves an array of ml_dtypes.bfloat16 as plain records of two bytes."""
    return dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None and dtype.subdtype is None


def is_float(dtype: np.dtype[Any]) -> bool:
    return (dtype.kind == "f" and dtype.itemsize <= 8) or is_bfloat16(dtype)


def _widen(block: Array) -> Array:
    """Return a bfloat16 block as float32, of which bfloat16 is the upper half; return any other block as it is."""
    if not is_bfloat16(block.dtype):
        return block
    return np.left_shift(block.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
