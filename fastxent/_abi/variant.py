"""What a kernel is compiled for, and the numbers that plans and kernels agree on."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from fastxent._abi.dtypes import precision

LANES = 16

SYMBOL = "kernel"  # of the function in an object file

# A row of this many classes or fewer is worked on with its 15 neighbours, a class a vector; a longer one by itself. Up to
# MOST_TILED classes if the rows need not be gathered: those are transposed, or lie side by side; less where they are large.
FEW_CLASSES, MOST_TILED, MOST_TILED_LARGE = 48, 320, 256  # multiples of 16
# Vectors of a row whose exponentials are stored in a thread's tile until the row's sum is known (1 MB of float32, in the second
# or third cache); those of a longer row are computed twice.
MOST_STORED = 16384
TILE = MOST_STORED * LANES * 8  # bytes
# Short rows of so many classes are worked on two units at a time: all that they read and write in float32 has room in the
# nearest cache. Past the caches more than a few classes are held up by the memory.
MOST_PAIRED, MOST_PAIRED_LARGE = 112, 16
# Functions that are compiled like kernels, and the modules in which they are: of a room that may be missing.
BUILTINS = {"run_arrays": "fastxent._fastpath.front_end.arrays", "run_tensors": "fastxent._fastpath.front_end.tensors"}
# Units of neighbouring rows that are copied to the tile together; of so many classes, and more than these units side by side,
# they are read and written while others are worked on: see ``plane_tiles``.
PANEL, FEWEST_OVERLAPPED = 16, 8
# Elements handed to a thread at a time: long enough to hide the counter, short enough to share out evenly.
CHUNK = 16384
# Where class indices are checked, a unit is of this many, and so many units are handed out at a time.
CHECKED, CHECKS = 8 * LANES, 128
# Elements that are a unit of a pointwise task, and units that are handed out at a time.
POINTS, POINTS_CHUNK = 1024, 4


class Layout(IntEnum):
    """What the 16 lanes hold, and where a unit's logits are when it is worked on."""

    CLASS_LANES = 0  # 16 classes of one row, contiguous in memory
    ROW_LANES = 1  # one class of 16 rows that are contiguous in memory, read where they lie
    STRIDED_ROWS = 2  # one class of 16 rows that are apart, gathered for each vector
    TRANSPOSED_TILE = 3  # the same, from rows whose classes are contiguous: 16 rows are transposed into a tile
    GATHERED_TILE = 4  # the same, gathered once into a tile
    PANEL = 5  # rows as in ROW_LANES, of few classes: 256 of them are copied to a tile together


class Schedule(IntEnum):
    """In which order units are worked on."""

    ONE_BY_ONE = 0
    PAIRED = 1  # two units interleaved
    PANELS_OVERLAPPED = 2  # one panel is worked on while the next is read and the last written
    PIPELINED = 3  # software-pipelined: one row is reduced while the next is read and the last written
    SPLIT = 4  # a unit is a segment of a row that threads share


class Storage(IntEnum):
    """Where exp(x - m) is between the first trip and the second."""

    NONE = 0  # it is computed anew, or there is no second trip
    TILE = 1  # in the thread's tile
    GRADIENT = 2  # where the gradient will be


class Variant(NamedTuple):
    """What a kernel is compiled for. The storages of numbers are as in ``dtypes``."""

    logits: str
    target: str | None = None  # storage of class probabilities; None: class indices, or no target
    labelled: bool = False  # class indices
    smooth: bool = False  # label smoothing, with class indices
    capped: bool = False  # softcap
    entropic: bool = False  # the first trip takes E, the sum of exp(x - m) (x - m), too
    tempered: bool = False  # the logits are divided by a temperature
    layout: Layout = Layout.STRIDED_ROWS
    schedule: Schedule = Schedule.ONE_BY_ONE
    storage: Storage = Storage.NONE
    consecutive_rows: bool = False  # rows in lanes, numbered one by one
    large: bool = False  # the logits are past the caches: they are prefetched, the gradient is written by non-temporal stores
    differentiate: bool = False  # a pointwise task: with gradient

    @property
    def acc(self) -> str:
        """Precision of the arithmetic and of the losses."""
        return precision(self.logits, self.target)
