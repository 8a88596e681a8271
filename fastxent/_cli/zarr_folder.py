"""Reads an array from a folder of chunks, as Zarr writes it.

Zarr's metadata may name any codec that is installed, and one of them unpickles: so only those are let through that are known to
do nothing but turn bytes into bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from fastxent._cli.files import WHOLE_BYTES, Array, FileArray, Header, Index, InputError, in_one_line

CODECS = {
    "blosc", "bytes", "bz2", "crc32", "crc32c", "delta", "gzip", "lz4", "lzma", "sharding_indexed", "shuffle", "transpose",
    "zlib", "zstd",
}  # fmt: skip
METADATA_BYTES = 1 << 20


class Chunked(FileArray):
    """The array of a zarr folder. A chunk that is not there holds the fill value, as everywhere in Zarr."""

    def __init__(self, name: str, array: Any) -> None:
        super().__init__(name, Header(array.shape, array.dtype, False, 0))
        self.chunks, self._array = array.chunks, array

    def _raw(self, index: Index) -> Array:
        with in_one_line(self.name):
            return np.asarray(self._array[index])

    def opener(self) -> Callable[[], FileArray]:
        return partial(open_folder, os.path.abspath(self.name))


def open_folder(folder: str) -> Chunked:
    """Return the array in a folder; only its metadata is read."""
    with in_one_line(folder):
        _check(folder, _metadata(folder))
    import zarr

    with in_one_line(folder):
        array = zarr.open_array(folder, mode="r")
        if not 0 < math.prod(array.chunks) * array.dtype.itemsize <= WHOLE_BYTES:
            raise InputError(f"{folder} has chunks of shape {array.chunks}: they are empty or larger than {WHOLE_BYTES} bytes")
        return Chunked(folder, array)


def _metadata(folder: str) -> dict[str, Any]:
    for name in ("zarr.json", ".zarray"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                text = file.read(METADATA_BYTES + 1)
            metadata = json.loads(text) if len(text) <= METADATA_BYTES else None
            if not isinstance(metadata, dict):
                raise InputError(f"{folder} has metadata that are damaged or too long")
            return metadata
    return {}


def _check(folder: str, metadata: dict[str, Any]) -> None:
    """Raise an error unless the metadata are those of an array whose codecs are all known."""
    if "shape" not in metadata:
        raise InputError(f"{folder} is not a regular file, nor the folder of a zarr array (one in a group: GROUP/ARRAY)")
    unknown = {name for key in ("codecs", "filters", "compressor") for name in _codecs(metadata.get(key))} - CODECS
    if unknown:
        raise InputError(f"{folder} has chunks in a code that is not read here: {', '.join(sorted(unknown))}")


def _codecs(node: Any) -> Iterator[str]:
    """Yield the names of all codecs, also of those within others, in either version of the format."""
    if isinstance(node, dict):
        yield from (str(node[key]).removeprefix("numcodecs.") for key in ("id", "name") if key in node)
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from _codecs(part)
