"""Shapes, strides and options -> how a kernel walks over them. Pure data: no array is touched, no kernel is run."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from fastxent._abi.variant import (
    CHECKED,
    CHECKS,
    CHUNK,
    FEW_CLASSES,
    FEWEST_OVERLAPPED,
    ITEMSIZE,
    LANES,
    MOST_KEPT,
    MOST_PAIRED,
    MOST_PAIRED_LARGE,
    MOST_TILED,
    MOST_TILED_LARGE,
    PANEL,
    POINTS,
    POINTS_CHUNK,
    Variant,
    precision,
)

# Fewer rows than this, and each longer than two segments: the row is split, or threads would have nothing to do.
FEW_ROWS, SEGMENT = 64, 1024
MOST_SEGMENTS = 64
# Bytes of logits that no cache keeps until they are read again. Of such an array a thread takes enough rows at a time to look
# ahead to the next one, yet leaves this many pieces to share out.
LARGE, PIECES = 1 << 24, 128
# Elements that pay for one more thread: a launch costs 2.5 us, an element about 0.2 ns.
WORTH_A_THREAD = 16384
# Bytes of the logits of a call that a builtin may run.
MOST_DIRECT = 1 << 22


class Strategy(NamedTuple):
    """What is chosen for some extents: a variant's properties that depend on them, and numbers as in ``PLANNED``."""

    class_lanes: bool
    contiguous_lanes: bool
    packed: bool
    transposed: bool
    paired: bool
    overlapped: bool
    consecutive_rows: bool
    split: bool
    kept: bool
    large: bool
    n_vectors: int
    n_units: int
    units_per_line: int
    panel: int
    chunk: int
    segment: int
    n_segments: int
    n_chunks: int


class Plan:
    """How the rows are walked over; ``planned`` are the values of ``argument_block.PLANNED``, ``axes`` the row axes' table.

    Made for each shape that was not met before, so it is made in few steps. It never changes.
    """

    __slots__ = ("axes", "elements", "most_chunks", "n_chunks", "n_units", "planned", "table", "variant")

    def __init__(
        self, variant: Variant, planned: tuple[int, ...], axes: tuple[int, ...], n_units: int, n_chunks: int, elements: int
    ) -> None:
        self.variant, self.planned, self.axes = variant, planned, axes
        self.n_units, self.n_chunks, self.elements = n_units, n_chunks, elements
        # Of the phase that has most of them: the check of the class indices, or all else.
        self.most_chunks = max(n_chunks, n_checks(planned[0])) if variant.labelled else n_chunks
        self.table = (ctypes.c_int64 * len(axes))(*axes)  # the axes as the kernels read them

    @property
    def itemsize(self) -> int:
        """Bytes of one logit."""
        return ITEMSIZE[self.variant.logits]


class Axis(NamedTuple):
    """One axis of the rows: extent, and bytes from one to the next in logits, gradient, probabilities; rows by number."""

    extent: int
    x: int
    g: int
    t: int
    row: int


def row_axes(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], axis: int) -> list[Axis]:
    """The axes but the class axis, innermost first, neighbours merged where all operands allow it."""
    axes: list[Axis] = []
    row = 1
    x, g, t = strides
    for i in range(len(shape) - 1, -1, -1):
        if i == axis or shape[i] == 1:
            continue
        outer = Axis(shape[i], x[i], g[i], t[i], row)
        row *= shape[i]
        if axes and outer[1:] == tuple(near * axes[-1].extent for near in axes[-1][1:]):
            axes[-1] = axes[-1]._replace(extent=axes[-1].extent * outer.extent)
        else:
            axes.append(outer)
    return axes or [Axis(1, 0, 0, 0, 1)]


def over(a: float, b: float) -> float:
    """a / b, and nan for b = 0: a mean over nothing, or over rows that all weigh nothing, and its gradient."""
    return a / b if b else math.nan


def uses_class_lanes(n_rows: int, n_classes: int, size: int, tight: bool) -> bool:
    """Are the lanes classes of one row? ``size``: bytes of a logit; tight: the classes lie side by side in all operands."""
    most_tiled = MOST_TILED_LARGE if n_rows * n_classes * size >= LARGE else MOST_TILED
    return tight and n_classes > (most_tiled if n_rows >= LANES else FEW_CLASSES)


def strategy(
    class_lanes: bool,
    n_rows: int,
    n_classes: int,
    extent: int,  # of the innermost row axis, along which the lanes go if they are rows
    size: int,
    tight: bool,
    contiguous_lanes: bool,
    consecutive_rows: bool,
    may_split: bool,
    capped: bool,
    unrounded: bool,  # the logits are stored in the precision of the arithmetic
    single: bool,  # which is float32
) -> Strategy:
    """The choice itself. It takes and gives numbers only, and needs nothing else of Python, so that machine code can make it
    for calls that differ in their extents only: see ``family``."""
    past_caches = n_rows * n_classes * size >= LARGE
    split = packed = transposed = False
    segment = n_segments = panel = 1
    if class_lanes:
        n_vectors = -(-n_classes // LANES)
        units_per_line = extent
        split = may_split and n_rows < FEW_ROWS and n_vectors >= 2 * SEGMENT
        if split:
            segment = max(SEGMENT, -(-n_vectors // MOST_SEGMENTS))
            n_segments = -(-n_vectors // segment)
        n_units = n_rows * n_segments
        per_unit = n_classes // n_segments
    else:
        packed = n_classes <= (MOST_TILED_LARGE if past_caches else MOST_TILED)
        transposed = packed and not contiguous_lanes and tight
        n_vectors = n_classes
        units_per_line = -(-extent // LANES)
        if packed and contiguous_lanes:  # whole panels, the last of which may have empty units
            panel = -(-units_per_line // -(-units_per_line // PANEL))
            units_per_line = -(-units_per_line // panel) * panel
        n_units = units_per_line * (n_rows // extent)
        per_unit = n_classes * LANES

    # The exponentials of a split row are kept where its gradient will be.
    kept = not capped and (packed or (class_lanes and (unrounded if split else n_vectors <= MOST_KEPT)))
    large = past_caches and (contiguous_lanes or transposed) and not split
    paired = transposed and n_classes <= (MOST_PAIRED_LARGE if large else MOST_PAIRED)
    overlapped = large and packed and contiguous_lanes and kept and single
    overlapped = overlapped and n_classes >= FEWEST_OVERLAPPED and units_per_line > panel
    chunk = max(1, CHUNK // per_unit, n_units // PIECES if large else 0)
    together = 2 if paired else panel  # units that belong into one chunk
    chunk = -(-chunk // together) * together
    return Strategy(
        class_lanes, contiguous_lanes, packed, transposed, paired, overlapped, consecutive_rows, split, kept, large,
        n_vectors, n_units, units_per_line, panel, chunk, segment, n_segments, -(-n_units // chunk),
    )  # fmt: skip


def number_of(s: Strategy | Variant) -> int:
    """Of the kernel among those of a family."""
    return (
        s.class_lanes * 1 + s.contiguous_lanes * 2 + s.packed * 4 + s.transposed * 8 + s.paired * 16 + s.overlapped * 32
        + s.consecutive_rows * 64 + s.split * 128 + s.kept * 256 + s.large * 512
    )  # fmt: skip


def n_checks(n_rows: int) -> int:
    """Chunks of the phase that checks the class indices."""
    return -(-n_rows // (CHECKED * CHECKS))


def useful_threads(n_chunks: int, elements: int) -> int:
    """How many threads have something to do."""
    return min(n_chunks, 1 + elements // WORTH_A_THREAD)


@lru_cache(maxsize=4096)
def make_plan(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    axis: int,
    logits: str,
    target: str | None = None,
    labelled: bool = False,
    smooth: bool = False,
    capped: bool = False,
    may_split: bool = True,
) -> Plan:
    """Plan a walk over ``shape`` with the class axis ``axis``; ``strides`` of logits, gradient and probabilities.

    The choice depends on shapes, strides and dtypes only, never on threads: that is why their number changes no bit.
    """
    sizes = (ITEMSIZE[logits], ITEMSIZE[logits], ITEMSIZE[target or logits])
    n_classes = shape[axis]
    axes = row_axes(shape, strides, axis)
    steps = tuple(s[axis] for s in strides)
    tight = steps == sizes
    n_rows = 1
    for a in axes:
        n_rows *= a.extent

    class_lanes = uses_class_lanes(n_rows, n_classes, sizes[0], tight)
    contiguous_lanes, consecutive_rows = True, False
    if class_lanes:
        steps = tuple(LANES * size for size in sizes)
    else:
        # Lanes go along the axis whose rows lie side by side, or else the longest.
        innermost = axes[0]
        if len(axes) > 1:
            innermost = max(axes, key=lambda a: ((a.x, a.g, a.t) == sizes, a.extent))
            axes.remove(innermost)
            axes.insert(0, innermost)
        contiguous_lanes, consecutive_rows = (innermost.x, innermost.g, innermost.t) == sizes, innermost.row == 1
    acc = precision(logits, target)
    s = strategy(
        class_lanes, n_rows, n_classes, axes[0].extent, sizes[0], tight, contiguous_lanes, consecutive_rows, may_split, capped,
        logits == acc, acc == "f32",
    )  # fmt: skip
    planned = (
        n_rows, n_classes, s.n_vectors, s.n_units, s.units_per_line, s.panel, s.chunk, s.segment, s.n_segments,
        len(axes), *steps,
    )  # fmt: skip
    variant = Variant(
        logits, target, labelled, smooth, class_lanes, contiguous_lanes, s.packed, s.transposed, s.paired, s.overlapped,
        consecutive_rows, capped, s.split, s.kept, s.large,
    )  # fmt: skip
    table = tuple(chain.from_iterable(axes))
    return Plan(variant, planned, table, s.n_units, s.n_chunks, n_rows * n_classes)


@lru_cache(maxsize=4096)
def pointwise_plan(n: int, logits: str, target: str, differentiate: bool = False) -> Plan:
    """Plan a walk over n elements, each by itself."""
    n_units = -(-n // POINTS)
    planned = (n, 2, 1, n_units, n_units, 1, POINTS_CHUNK, 1, 1, 0, 0, 0, 0)
    variant = Variant(logits, target, differentiate=differentiate)
    return Plan(variant, planned, (), n_units, -(-n_units // POINTS_CHUNK), n)
