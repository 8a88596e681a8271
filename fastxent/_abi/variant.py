"""What a kernel is compiled for, and the sizes that plans and kernels agree on."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from fastxent._abi.dtypes import precision

LANES = 16

SYMBOL = "kernel"  # name of the function in an object file

# Rows whose classes are contiguous use class lanes if they have more than MOST_TILED classes, or more than FEW_CLASSES where
# there are fewer than 16 rows; all others use row lanes. With row lanes, up to MOST_TILED classes are packed into a tile. For
# arrays that do not fit the caches, MOST_TILED_LARGE takes the place of MOST_TILED.
FEW_CLASSES, MOST_TILED, MOST_TILED_LARGE = 48, 320, 256  # multiples of 16
# The most vectors of a row whose exponentials are stored in a thread's tile until the row's sum is known (1 MB of float32, in
# the second- or third-level cache); those of a longer row are computed twice.
MOST_STORED = 16384
TILE = MOST_STORED * LANES * 8  # bytes
# Short rows of at most so many classes are worked on two units at a time: all that two units read and write in float32 fits the
# nearest cache. Past the caches, rows of more than a few classes wait for the memory anyway.
MOST_PAIRED, MOST_PAIRED_LARGE = 112, 16
# Functions that are compiled like kernels, and their modules, in a room that may be missing.
BUILTINS = {"run_arrays": "fastxent._fastpath.front_end.arrays", "run_tensors": "fastxent._fastpath.front_end.tensors"}
# At most PANEL units of contiguous rows are copied to a tile together. Past the caches, with at least FEWEST_OVERLAPPED classes
# and more than one panel in a line, a panel is worked on while others are read and written: see ``plane_tiles``.
PANEL, FEWEST_OVERLAPPED = 16, 8
# Elements of a chunk: enough to hide the cost of the counter, few enough to balance the threads' load.
CHUNK = 16384
# In the check of the class indices: rows of a unit, and units of a chunk.
CHECKED, CHECKS = 8 * LANES, 128
# In pointwise tasks: elements of a unit, and units of a chunk.
POINTS, POINTS_CHUNK = 1024, 4


class Layout(IntEnum):
    """What the 16 lanes hold, and where a unit's logits are while it is worked on."""

    CLASS_LANES = 0  # 16 classes of one row, contiguous in memory
    ROW_LANES = 1  # one class of 16 rows that are contiguous in memory, read in place
    STRIDED_ROWS = 2  # one class of 16 rows that are not contiguous, gathered for each vector
    TRANSPOSED_TILE = 3  # one class of 16 rows whose classes are contiguous: they are transposed into a tile
    GATHERED_TILE = 4  # one class of 16 rows that are gathered once into a tile
    PANEL = 5  # rows as in ROW_LANES, of few classes: up to 256 rows are copied to a tile together


class Schedule(IntEnum):
    """The order in which units are worked on."""

    ONE_BY_ONE = 0
    PAIRED = 1  # two units interleaved
    PANELS_OVERLAPPED = 2  # one panel is worked on while the next is read and the last written
    PIPELINED = 3  # software-pipelined: one row is reduced while the next is read and the last written
    SPLIT = 4  # a unit is a segment of a row that threads share


class Storage(IntEnum):
    """Where exp(x - m) is between the first trip and the second."""

    NONE = 0  # nowhere: it is computed anew, or there is no second trip
    TILE = 1  # in the thread's tile
    GRADIENT = 2  # where the gradient will be


class Variant(NamedTuple):
    """What a kernel is compiled for. Storages are those of ``dtypes``."""

    logits: str
    target: str | None = None  # storage of class probabilities; None: class indices, or no target
    labelled: bool = False  # there are class indices
    smooth: bool = False  # label smoothing, with class indices
    capped: bool = False  # softcap
    entropic: bool = False  # the first trip also sums E = sum of exp(x - m) (x - m)
    tempered: bool = False  # the logits are divided by a temperature
    layout: Layout = Layout.STRIDED_ROWS
    schedule: Schedule = Schedule.ONE_BY_ONE
    storage: Storage = Storage.NONE
    consecutive_rows: bool = False  # row lanes: the 16 rows have consecutive numbers
    large: bool = False  # the logits do not fit the caches: they are prefetched, and g may be written by non-temporal stores
    differentiate: bool = False  # a pointwise task: with its gradient

    @property
    def acc(self) -> str:
        """The precision of the arithmetic and of the losses."""
        return precision(self.logits, self.target)
