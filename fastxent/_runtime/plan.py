"""The strategy: shapes, strides, dtypes, options -> how a kernel walks over them. It is decided here, once, and nowhere else.

Pure data: no array is touched, no kernel is run.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from fastxent._abi.argument_block import Planned
from fastxent._abi.dtypes import ITEMSIZE, precision
from fastxent._abi.tasks import TASKS
from fastxent._abi.variant import (
    CHECKED,
    CHECKS,
    CHUNK,
    FEW_CLASSES,
    FEWEST_OVERLAPPED,
    LANES,
    MOST_PAIRED,
    MOST_PAIRED_LARGE,
    MOST_STORED,
    MOST_TILED,
    MOST_TILED_LARGE,
    PANEL,
    POINTS,
    POINTS_CHUNK,
    Layout,
    Schedule,
    Storage,
    Variant,
)
from fastxent._codegen.uninterrupted import imported
from fastxent._simd import host

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


# Every combination that a kernel exists for: layout, schedule, storage. What each gained is in benchmarks/LOG.md, by section.
LEGAL: dict[tuple[Layout, Schedule, Storage], str] = {
    (
        Layout.CLASS_LANES,
        Schedule.ONE_BY_ONE,
        Storage.NONE,
    ): "a loss in a cache; rows that are capped, or too long to store",
    (Layout.CLASS_LANES, Schedule.ONE_BY_ONE, Storage.TILE): "a gradient in a cache, without AVX-512 or not in float32",
    (Layout.CLASS_LANES, Schedule.PIPELINED, Storage.NONE): "the loss past the caches, or with AVX-512",
    (Layout.CLASS_LANES, Schedule.PIPELINED, Storage.TILE): "a gradient in a cache with AVX-512; past the caches in float16",
    (Layout.CLASS_LANES, Schedule.PIPELINED, Storage.GRADIENT): "a gradient past the caches: one trip through them less",
    (Layout.CLASS_LANES, Schedule.SPLIT, Storage.NONE): "few long rows: a loss, or a gradient in half precision",
    (Layout.CLASS_LANES, Schedule.SPLIT, Storage.GRADIENT): "few long rows: a gradient",
    (Layout.ROW_LANES, Schedule.ONE_BY_ONE, Storage.NONE): "many classes, planes apart: 16 rows at a time where they lie",
    (Layout.STRIDED_ROWS, Schedule.ONE_BY_ONE, Storage.NONE): "the same, of arrays whose strides do not agree",
    (Layout.TRANSPOSED_TILE, Schedule.ONE_BY_ONE, Storage.NONE): "up to 320 classes in a row: the loss",
    (Layout.TRANSPOSED_TILE, Schedule.ONE_BY_ONE, Storage.TILE): "the same: the gradient",
    (Layout.TRANSPOSED_TILE, Schedule.PAIRED, Storage.NONE): "up to 112 classes in a row, 16 past the caches: the loss",
    (Layout.TRANSPOSED_TILE, Schedule.PAIRED, Storage.TILE): "the same: the gradient",
    (Layout.GATHERED_TILE, Schedule.ONE_BY_ONE, Storage.NONE): "few classes, strided in any way: the loss",
    (Layout.GATHERED_TILE, Schedule.ONE_BY_ONE, Storage.TILE): "the same: the gradient",
    (Layout.PANEL, Schedule.ONE_BY_ONE, Storage.NONE): "few classes, planes apart, in a cache: the loss",
    (Layout.PANEL, Schedule.ONE_BY_ONE, Storage.TILE): "the same: the gradient",
    (Layout.PANEL, Schedule.PANELS_OVERLAPPED, Storage.NONE): "the same past the caches, float32 arithmetic: the loss",
    (Layout.PANEL, Schedule.PANELS_OVERLAPPED, Storage.TILE): "the same: the gradient",
}


class Strategy(NamedTuple):
    """What is chosen for some extents: what a kernel is compiled for, and numbers as in ``PLANNED``."""

    layout: Layout
    schedule: Schedule
    storage: Storage
    consecutive_rows: bool
    large: bool
    n_vectors: int
    n_units: int
    units_per_line: int
    panel: int
    chunk: int
    segment: int
    n_segments: int
    n_chunks: int


class Traits(NamedTuple):
    """What the choice depends on besides extents: properties of the task, the dtypes, the options and the host."""

    splits: bool
    stores: bool
    pairs: bool
    overlaps: bool  # panels
    pipelines_small: bool  # rows in a cache
    pipelines_large: bool
    unrounded: bool  # the logits are stored in the precision of the arithmetic


class Plan:
    """How the rows are walked over: `Planned` numbers for the argument block, ``axes``, what a kernel is compiled for.

    Made for each shape that was not met before, so it is made in few steps. It never changes.
    """

    __slots__ = ("axes", "elements", "most_chunks", "n_chunks", "n_units", "planned", "table", "variant")

    def __init__(
        self, variant: Variant, planned: Planned, axes: tuple[Axis, ...], n_units: int, n_chunks: int, elements: int
    ) -> None:
        self.variant, self.planned, self.axes = variant, planned, axes
        self.n_units, self.n_chunks, self.elements = n_units, n_chunks, elements
        # Of the phase that has most of them: the check of the class indices, or all else.
        self.most_chunks = max(n_chunks, n_checks(planned.n_rows)) if variant.labelled else n_chunks
        self.table = (ctypes.c_int64 * (5 * len(axes)))(*chain.from_iterable(axes))  # the axes as the kernels read them

    @property
    def itemsize(self) -> int:
        """Bytes of one logit."""
        return ITEMSIZE[self.variant.logits]

    def is_non_temporal(self, x: int, g: int) -> bool:
        """May a large gradient at address g, of logits at x, be written by non-temporal stores? In place its lines are in the
        caches already, but not those of panels in flight. And all rows have to begin where an element may."""
        apart = g != x or self.variant.schedule == Schedule.PANELS_OVERLAPPED
        return apart and g % self.itemsize == 0 and all(axis.g % self.itemsize == 0 for axis in self.axes)


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


@lru_cache
def traits_of(task: str, logits: str, target: str | None, capped: bool) -> Traits:
    """``logits``, ``target``: how they are stored."""
    traits, single = TASKS[task], precision(logits, target) == "f32"
    # Past the caches in any float32 arithmetic, but for gradients in bfloat16: rounding to it takes what overlapping would
    # gain. In the caches with AVX-512: there a row waits longer for the sums of the row before than for arithmetic units.
    pipelines = traits.pipelines and single and not (traits.stores and capped)
    return Traits(
        splits=traits.splits,
        stores=traits.stores and not capped,
        pairs=traits.interleaves,
        overlaps=traits.interleaves and single and not capped,
        pipelines_small=pipelines and logits == "f32" and host.is_wide(imported("llvmlite.binding")),
        pipelines_large=pipelines and not (traits.stores and logits == "bf16"),
        unrounded=logits == precision(logits, target),
    )


def strategy(
    class_lanes: bool,
    n_rows: int,
    n_classes: int,
    extent: int,  # of the innermost row axis, along which the lanes go if they are rows
    size: int,
    tight: bool,
    contiguous_rows: bool,
    consecutive_rows: bool,
    traits: Traits,
) -> Strategy:
    """The choice itself: one of `LEGAL`, and its numbers. It takes and gives numbers only, and needs nothing else of Python, so
    that machine code can make it for calls that differ in their extents only: see ``family``."""
    past_caches = n_rows * n_classes * size >= LARGE
    split = False
    segment = n_segments = panel = 1
    if class_lanes:
        layout = Layout.CLASS_LANES
        n_vectors = -(-n_classes // LANES)
        units_per_line = extent
        split = traits.splits and n_rows < FEW_ROWS and n_vectors >= 2 * SEGMENT
        if split:
            segment = max(SEGMENT, -(-n_vectors // MOST_SEGMENTS))
            n_segments = -(-n_vectors // segment)
        n_units = n_rows * n_segments
        per_unit = n_classes // n_segments
    else:
        n_vectors = n_classes
        units_per_line = -(-extent // LANES)
        if n_classes > (MOST_TILED_LARGE if past_caches else MOST_TILED):
            layout = Layout.ROW_LANES if contiguous_rows else Layout.STRIDED_ROWS
        elif contiguous_rows:  # whole panels, the last of which may have empty units
            layout = Layout.PANEL
            panel = -(-units_per_line // -(-units_per_line // PANEL))
            units_per_line = -(-units_per_line // panel) * panel
        else:
            layout = Layout.TRANSPOSED_TILE if tight else Layout.GATHERED_TILE
        n_units = units_per_line * (n_rows // extent)
        per_unit = n_classes * LANES
    large = past_caches and not split and layout != Layout.STRIDED_ROWS and layout != Layout.GATHERED_TILE

    # Chunks do not depend on the task, that a loss has the same bits with its gradient and without.
    paired = layout == Layout.TRANSPOSED_TILE and n_classes <= (MOST_PAIRED_LARGE if large else MOST_PAIRED)
    chunk = max(1, CHUNK // per_unit, n_units // PIECES if large else 0)
    together = 2 if paired else panel  # units that belong into one chunk
    chunk = -(-chunk // together) * together

    fits = n_vectors <= MOST_STORED or layout != Layout.CLASS_LANES
    stored = traits.stores and layout != Layout.ROW_LANES and layout != Layout.STRIDED_ROWS
    stored = stored and (traits.unrounded if split else fits)
    schedule = Schedule.ONE_BY_ONE
    if split:
        schedule = Schedule.SPLIT
    elif paired and traits.pairs:
        schedule = Schedule.PAIRED
    elif layout == Layout.PANEL and large and traits.overlaps and n_classes >= FEWEST_OVERLAPPED and units_per_line > panel:
        schedule = Schedule.PANELS_OVERLAPPED
    elif layout == Layout.CLASS_LANES and (traits.pipelines_large if large else traits.pipelines_small):
        if stored or not traits.stores:
            schedule = Schedule.PIPELINED
    storage = Storage.NONE
    if stored:
        in_gradient = split or (schedule == Schedule.PIPELINED and large and traits.unrounded)
        storage = Storage.GRADIENT if in_gradient else Storage.TILE
    return Strategy(
        layout, schedule, storage, consecutive_rows, large,
        n_vectors, n_units, units_per_line, panel, chunk, segment, n_segments, -(-n_units // chunk),
    )  # fmt: skip


def number_of(s: Strategy | Variant) -> int:
    """Of the kernel among those of a family."""
    return s.layout + s.schedule * 8 + s.storage * 64 + s.consecutive_rows * 256 + s.large * 512


def n_checks(n_rows: int) -> int:
    """Chunks of the phase that checks the class indices."""
    return -(-n_rows // (CHECKED * CHECKS))


def useful_threads(n_chunks: int, elements: int) -> int:
    """How many threads have something to do."""
    return min(n_chunks, 1 + elements // WORTH_A_THREAD)


@lru_cache(maxsize=4096)
def make_plan(
    task: str,
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    axis: int,
    logits: str,
    target: str | None = None,
    labelled: bool = False,
    smooth: bool = False,
    capped: bool = False,
) -> Plan:
    """Plan a walk of ``task`` over ``shape`` with the class axis ``axis``; ``strides`` of logits, gradient and probabilities.

    The choice depends on shapes, strides, dtypes and options only, never on threads: that is why their number changes no bit.
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
    contiguous_rows = consecutive_rows = False
    if class_lanes:
        steps = tuple(LANES * size for size in sizes)
    else:
        # Lanes go along the axis whose rows lie side by side, or else the longest.
        innermost = axes[0]
        if len(axes) > 1:
            innermost = max(axes, key=lambda a: ((a.x, a.g, a.t) == sizes, a.extent))
            axes.remove(innermost)
            axes.insert(0, innermost)
        contiguous_rows, consecutive_rows = (innermost.x, innermost.g, innermost.t) == sizes, innermost.row == 1
    s = strategy(
        class_lanes, n_rows, n_classes, axes[0].extent, sizes[0], tight, contiguous_rows, consecutive_rows,
        traits_of(task, logits, target, capped),
    )  # fmt: skip
    planned = Planned(
        n_rows, n_classes, s.n_vectors, s.n_units, s.units_per_line, s.panel, s.chunk, s.segment, s.n_segments,
        len(axes), *steps,
    )  # fmt: skip
    variant = Variant(
        logits, target, labelled, smooth, capped, TASKS[task].entropic, TASKS[task].tempered,
        s.layout, s.schedule, s.storage, consecutive_rows, s.large,
    )  # fmt: skip
    return Plan(variant, planned, tuple(axes), s.n_units, s.n_chunks, n_rows * n_classes)


@lru_cache(maxsize=4096)
def pointwise_plan(n: int, logits: str, target: str, differentiate: bool = False) -> Plan:
    """Plan a walk over n elements, each by itself."""
    n_units = -(-n // POINTS)
    planned = Planned(n, 2, 1, n_units, n_units, 1, POINTS_CHUNK, 1, 1, 0, 0, 0, 0)
    variant = Variant(logits, target, differentiate=differentiate)
    return Plan(variant, planned, (), n_units, -(-n_units // POINTS_CHUNK), n)
