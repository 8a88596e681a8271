"""The table of strategies: every combination of layout, schedule and storage that `plan.strategy` chooses, and why.

A test holds the two against each other: each entry is chosen for some shape, and no shape is given anything else.
"""

from __future__ import annotations

from fastxent._abi.variant import Layout, Schedule, Storage

# When it is chosen, and what it gained, with the section of the log of trials (benchmarks/LOG.md). One without a number is the
# plain way, against which the others were measured.
LEGAL: dict[tuple[Layout, Schedule, Storage], str] = {
    (Layout.CLASS_LANES, Schedule.ONE_BY_ONE, Storage.NONE): """
        Many classes: a loss in a cache without AVX-512 or in float64; capped rows; rows too long for a tile; tasks that
        neither store exponentials nor are pipelined.""",
    (Layout.CLASS_LANES, Schedule.ONE_BY_ONE, Storage.TILE): """
        The gradient of the same, but for capped and too long rows; past the caches also of bfloat16.""",
    (Layout.CLASS_LANES, Schedule.PIPELINED, Storage.NONE): """
        The loss past the caches, or of float32 in a cache with AVX-512. 1024 x 1000: 9.9 -> 9.3 cycles a vector,
        LOG.md#rows-in-the-cache-and-short-rows; past the caches LOG.md#long-rows-past-the-cache-software-pipelined.""",
    (Layout.CLASS_LANES, Schedule.PIPELINED, Storage.TILE): """
        The gradient of float32 in a cache with AVX-512, 14.7 -> 13.3 cycles a vector,
        LOG.md#rows-in-the-cache-and-short-rows; of float16 past the caches.""",
    (Layout.CLASS_LANES, Schedule.PIPELINED, Storage.GRADIENT): """
        The gradient of float32 past the caches: 9.9 -> 7.4 ms, LOG.md#long-rows-past-the-cache-software-pipelined, in place
        four trips and not six, 12.0 -> 10.7 cycles, LOG.md#very-long-rows-in-parts-exponentials-stored-in-place.""",
    (Layout.CLASS_LANES, Schedule.SPLIT, Storage.NONE): """
        Fewer than 64 long rows: their loss, or a gradient in half precision. Without it one row keeps one thread busy.""",
    (Layout.CLASS_LANES, Schedule.SPLIT, Storage.GRADIENT): """
        The same: a gradient in the precision of the arithmetic.""",
    (Layout.ROW_LANES, Schedule.ONE_BY_ONE, Storage.NONE): """
        More than 320 classes (256 past the caches) in planes: 16 rows at a time, where they lie.""",
    (Layout.STRIDED_ROWS, Schedule.ONE_BY_ONE, Storage.NONE): """
        The same, where the strides of logits, gradient and probabilities differ.""",
    (Layout.TRANSPOSED_TILE, Schedule.ONE_BY_ONE, Storage.NONE): """
        Up to 320 classes (256 past the caches), contiguous: the loss, LOG.md#rows-in-the-cache-and-short-rows.""",
    (Layout.TRANSPOSED_TILE, Schedule.ONE_BY_ONE, Storage.TILE): """
        The same: the gradient. 4096 x 272, 20.3 -> 14.6 cycles, LOG.md#short-rows-two-units-at-a-time.""",
    (Layout.TRANSPOSED_TILE, Schedule.PAIRED, Storage.NONE): """
        Up to 112 of these classes, 16 past the caches: the loss, 22.2 -> 20.2 cycles,
        LOG.md#short-rows-two-units-at-a-time.""",
    (Layout.TRANSPOSED_TILE, Schedule.PAIRED, Storage.TILE): """
        The same: the gradient, 34 -> 30.5 cycles, LOG.md#short-rows-two-units-at-a-time.""",
    (Layout.GATHERED_TILE, Schedule.ONE_BY_ONE, Storage.NONE): """
        Up to 320 classes, strided in any other way: the loss. Each logit is gathered once.""",
    (Layout.GATHERED_TILE, Schedule.ONE_BY_ONE, Storage.TILE): """
        The same: the gradient.""",
    (Layout.PANEL, Schedule.ONE_BY_ONE, Storage.NONE): """
        Up to 320 classes in planes, as of pixels: the loss, 8.7 -> 6.7 ms, LOG.md#channels-first.""",
    (Layout.PANEL, Schedule.ONE_BY_ONE, Storage.TILE): """
        The same: the gradient, 14.5 -> 11.8 ms, LOG.md#channels-first.""",
    (Layout.PANEL, Schedule.PANELS_OVERLAPPED, Storage.NONE): """
        Past the caches, 8 classes or more, in float32 arithmetic: the loss, 7.0 -> 5.2 ms, LOG.md#channels-first.""",
    (Layout.PANEL, Schedule.PANELS_OVERLAPPED, Storage.TILE): """
        The same: the gradient, 12.2 -> 9.0 ms, LOG.md#channels-first.""",
}
