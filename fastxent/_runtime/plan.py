"""Decides the strategy: how a kernel walks over the rows, given shapes, strides, dtypes and options. No other module does.

A plan is pure data: making one touches no array and runs no kernel.
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

# If there are fewer than FEW_ROWS rows, each of at least two segments of SEGMENT vectors, the rows are split: otherwise some
# threads would have no work.
FEW_ROWS, SEGMENT = 64, 1024
MOST_SEGMENTS = 64
# LARGE: bytes of logits that no cache holds until they are read again. For such logits a chunk has enough rows to prefetch the
# next row while one is computed, yet there are about PIECES chunks left for the threads to divide among them.
LARGE, PIECES = 1 << 24, 128
# Elements that make one more thread worth its cost: a launch costs 2.5 us, an element about 0.2 ns.
WORTH_A_THREAD = 16384
# The most bytes of logits for which a builtin may run the call.
MOST_DIRECT = 1 << 22


class Strategy(NamedTuple):
    """What is chosen for given extents: what a kernel is compiled for, and numbers as in ``argument_block.Planned``."""

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
    overlaps: bool  # overlaps panels
    pipelines_small: bool  # software-pipelines rows in a cache
    pipelines_large: bool  # software-pipelines rows past the caches
    unrounded: bool  # the logits are stored in the precision of the arithmetic


class Plan:
    """How the rows are walked over: `Planned` numbers for the argument block, ``axes``, and the variant of the kernel.

    A plan is made for each new shape, so making one takes few steps. It never changes.
    """

    __slots__ = ("axes", "elements", "fields", "most_chunks", "n_chunks", "n_units", "planned", "table", "variant")

    def __init__(
        self, variant: Variant, planned: Planned, axes: tuple[Axis, ...], n_units: int, n_chunks: int, elements: int
    ) -> None:
        self.variant, self.planned, self.axes = variant, planned, axes
        self.fields = planned._asdict()  # of the argument block
        self.n_units, self.n_chunks, self.elements = n_units, n_chunks, elements
        # The most chunks of any phase: that which checks the class indices, or one of the others.
        self.most_chunks = max(n_chunks, n_checks(planned.n_rows)) if variant.labelled else n_chunks
        self.table = (ctypes.c_int64 * (5 * len(axes)))(*chain.from_iterable(axes))  # the axes as the kernels read them

    @property
    def itemsize(self) -> int:
        """Bytes of one logit."""
        return ITEMSIZE[self.variant.logits]

    def is_non_temporal(self, x: int, g: int) -> bool:
        """Return whether non-temporal stores may write a large gradient at address g, for logits at address x.

        In place, the cache lines of the gradient are in the caches already, except with overlapped panels. Every row must
        begin at a multiple of the element's size.
        """
        apart = g != x or self.variant.schedule == Schedule.PANELS_OVERLAPPED
        return apart and g % self.itemsize == 0 and all(axis.g % self.itemsize == 0 for axis in self.axes)


class Axis(NamedTuple):
    """One axis of the rows: its extent, its strides in bytes in logits, gradient and probabilities, and in row numbers."""

    extent: int
    x: int
    g: int
    t: int
    row: int


def row_axes(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], axis: int) -> list[Axis]:
    """Return the axes except the class axis, innermost first; adjacent axes are merged where all operands allow it."""
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
    """Return a / b, or nan for b = 0: a mean over no rows, or over rows whose weights are all 0, and its gradient."""
    return a / b if b else math.nan


def uses_class_lanes(n_rows: int, n_classes: int, size: int, tight: bool) -> bool:
    """Return whether the lanes are classes of one row.

    ``size``: bytes of a logit; ``tight``: the classes are contiguous in all operands.
    """
    most_tiled = MOST_TILED_LARGE if n_rows * n_classes * size >= LARGE else MOST_TILED
    return tight and n_classes > (most_tiled if n_rows >= LANES else FEW_CLASSES)


@lru_cache
def traits_of(task: str, logits: str, target: str | None, capped: bool) -> Traits:
    """Return the traits of a task; ``logits`` and ``target`` say how these are stored."""
    traits, single = TASKS[task], precision(logits, target) == "f32"
    # Rows past the caches are software-pipelined in all float32 arithmetic, except for gradients in bfloat16: rounding to
    # bfloat16 costs what pipelining would gain. Rows in the caches are software-pipelined with AVX-512: there a row waits
    # longer for the sums of the previous row than for arithmetic units.
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
    extent: int,  # of the innermost row axis, along which row lanes run
    size: int,
    tight: bool,
    contiguous_rows: bool,
    consecutive_rows: bool,
    traits: Traits,
) -> Strategy:
    """Return the choice: one of ``strategies.LEGAL``, and its numbers.

    It takes and returns only numbers and needs nothing else of Python, so that it can be compiled for calls that differ only in
    their extents: see ``_fastpath.front_end.strategy``.
    """
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
        elif contiguous_rows:  # a line is padded to whole panels, the last of which may have empty units
            layout = Layout.PANEL
            panel = -(-units_per_line // -(-units_per_line // PANEL))
            units_per_line = -(-units_per_line // panel) * panel
        else:
            layout = Layout.TRANSPOSED_TILE if tight else Layout.GATHERED_TILE
        n_units = units_per_line * (n_rows // extent)
        per_unit = n_classes * LANES
    large = past_caches and not split and layout != Layout.STRIDED_ROWS and layout != Layout.GATHERED_TILE

    # Chunks do not depend on the task, so that a float32 loss has the same bits with its gradient and without.
    paired = layout == Layout.TRANSPOSED_TILE and n_classes <= (MOST_PAIRED_LARGE if large else MOST_PAIRED)
    chunk = max(1, CHUNK // per_unit, n_units // PIECES if large else 0)
    together = 2 if paired else panel  # units that must be in the same chunk
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
    """Return the number of the kernel among those of a family."""
    return s.layout + s.schedule * 8 + s.storage * 64 + s.consecutive_rows * 256 + s.large * 512


def n_checks(n_rows: int) -> int:
    """Return the number of chunks of the phase that checks the class indices."""
    return -(-n_rows // (CHECKED * CHECKS))


def useful_threads(n_chunks: int, elements: int) -> int:
    """Return how many threads have work that is worth their cost."""
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
    """Plan how ``task`` walks over ``shape`` with the class axis ``axis``; ``strides``: of logits, gradient, probabilities.

    The choice depends only on shapes, strides, dtypes and options, never on threads, so the number of threads changes no bit.
    """
    sizes = (ITEMSIZE[logits], ITEMSIZE["f32" if TASKS[task].rounds else logits], ITEMSIZE[target or logits])
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
        # Row lanes run along the axis whose rows are contiguous in all operands, else along the longest axis.
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
    """Plan a pointwise task over n elements."""
    n_units = -(-n // POINTS)
    planned = Planned(n, 2, 1, n_units, n_units, 1, POINTS_CHUNK, 1, 1, 0, 0, 0, 0)
    variant = Variant(logits, target, differentiate=differentiate)
    return Plan(variant, planned, (), n_units, -(-n_units // POINTS_CHUNK), n)
