"""What a kernel is compiled for, and the numbers that plans and kernels agree on."""

from __future__ import annotations

from typing import NamedTuple

LANES = 16
ITEMSIZE = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}

SYMBOL = "kernel"  # of the function in an object file

# A row of this many classes or fewer is worked on with its 15 neighbours, a class a vector; a longer one by itself. Up to
# MOST_TILED classes if the rows need not be gathered: those are read whole, or lie side by side; less where they are large.
FEW_CLASSES, MOST_TILED, MOST_TILED_LARGE = 48, 320, 256  # multiples of 16
# Vectors of a row whose exponentials are kept in a thread's tile until the row's sum is known (1 MB of float32, in the second
# or third cache); those of a longer row are computed twice.
MOST_KEPT = 16384
TILE = MOST_KEPT * LANES * 8  # bytes
KEEPERS = ("value_and_grad", "softmax", "keep_segment")
# Short rows of so many classes are worked on two units at a time, by these kernels: all that they read and write in float32 has
# room in the nearest cache. Past the caches more than a few classes are held up by the memory.
MOST_PAIRED, MOST_PAIRED_LARGE = 112, 16
PAIRERS = ("value", "value_and_grad")
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


def precision(logits: str, target: str | None) -> str:
    """Of the arithmetic on logits and class probabilities of these storages."""
    return "f64" if "f64" in (logits, target) else "f32"


class Variant(NamedTuple):
    """What a kernel is compiled for. Storage is "f16", "bf16", "f32" or "f64"."""

    logits: str
    target: str | None = None  # storage of class probabilities; None: class indices, or no target
    labelled: bool = False  # class indices
    smooth: bool = False  # label smoothing, with class indices
    class_lanes: bool = False  # lanes are classes of one row; else rows
    contiguous_lanes: bool = False  # what the lanes hold lies side by side in memory
    packed: bool = False  # rows in lanes, put together once in a tile, class by class
    transposed: bool = False  # what goes into the tile are rows with their classes side by side
    paired: bool = False  # two units of such rows are worked on at a time, by the kernels that do
    overlapped: bool = False  # neighbours in a tile are read and written while others are worked on, by the kernels that do
    consecutive_rows: bool = False  # rows in lanes, numbered one by one
    capped: bool = False  # softcap
    split: bool = False  # a unit is a segment of a row
    kept: bool = False  # the exponentials of a unit are kept between the two trips, by the kernels that make two
    large: bool = False  # the logits are past the cache: what comes next is asked for early, the gradient bypasses the cache
    differentiate: bool = False  # a pointwise task: with gradient

    @property
    def acc(self) -> str:
        """Precision of the arithmetic and of the losses."""
        return precision(self.logits, self.target)
