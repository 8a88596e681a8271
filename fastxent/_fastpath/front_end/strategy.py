"""Makes the argument block of a family ready for the extents of a call: asks the plan, in some ten nanoseconds.

Python takes a tenth of a millisecond for that. Which kernel does the work is looked up in the family; a kernel that it has not
met yet is for Python to get.
"""

from numba import float64

from fastxent._abi import argument_block as abi
from fastxent._abi.variant import LANES
from fastxent._fastpath.front_end import words
from fastxent._fastpath.front_end.launch import DIVISOR_AT, PLANNED
from fastxent._fastpath.front_end.memory import number, set_word, word
from fastxent._runtime import plan
from fastxent._runtime.plan import MOST_DIRECT
from fastxent._simd.numba_backend import inlined

UNIFORM, SAVE_SEGMENT, WORKS = (abi.SLOT[name] for name in ("uniform", "save_segment", "kernel"))

uses_class_lanes, strategy, number_of, n_checks, useful_threads = (
    inlined(choice) for choice in (plan.uses_class_lanes, plan.strategy, plan.number_of, plan.n_checks, plan.useful_threads)
)


@inlined
def kernel_for(family, number):
    """Where the family has the kernel with this number; 0: it has not met it."""
    at = family + 8 * words.KERNELS
    for _ in range(word(family, words.N_KERNELS)):
        if word(at, 0) == number:
            return at
        at += 8 * words.KERNEL
    return 0


@inlined
def set_axis(at, extent, stride, row):
    set_word(at, 0, extent)
    for operand in range(1, 4):
        set_word(at, operand, stride)
    set_word(at, 4, row)


@inlined
def set_axes(family, n_rows, n_classes, inner, extent):
    """The row axes, as `plan.row_axes` has them, and how many they are. ``extent``: of the innermost."""
    size, axes = word(family, words.SIZE), family + 8 * words.AXES
    stride = 0 if n_rows == 1 else (size if inner > 1 else n_classes * size)
    set_axis(axes, extent, stride, 1)
    if extent == n_rows:
        return 1
    set_axis(axes + 8 * 5, n_rows // extent, n_classes * inner * size, inner)
    return 2


@inlined
def trait(family, nth):
    return word(family, words.TRAITS + nth) != 0


@inlined
def traits_of(family):
    """What the choice depends on besides extents, as ``tasks`` has written it."""
    return plan.Traits(
        trait(family, 0), trait(family, 1), trait(family, 2), trait(family, 3), trait(family, 4), trait(family, 5),
        trait(family, 6),
    )  # fmt: skip


@inlined
def made_ready(family, outer, n_classes, inner):
    """Make a family's block ready for arrays that are dense, of these extents before the classes, of them, and behind them: how
    many threads have something to do, or ``NOT_THERE``, ``NOT_MET``."""
    block, n_rows, size = word(family, words.BLOCK_AT), outer * inner, word(family, words.SIZE)
    elements, n_weights = n_rows * n_classes, word(family, words.N_WEIGHTS)
    if elements == 0 or elements * size > MOST_DIRECT or (n_weights > 0 and n_weights != n_classes):
        return words.NOT_THERE
    tight = inner == 1
    extent = n_rows if n_classes == 1 or outer == 1 or inner == 1 else inner
    contiguous_rows = n_rows > 1 and (inner > 1 or n_classes == 1)
    class_lanes = uses_class_lanes(n_rows, n_classes, size, tight)
    s = strategy(
        class_lanes, n_rows, n_classes, extent, size, tight, contiguous_rows and not class_lanes, not class_lanes,
        traits_of(family),
    )  # fmt: skip
    kernel = kernel_for(family, number_of(s))
    if kernel == 0 or max(s.n_chunks, n_checks(n_rows)) > words.ROOM:
        return words.NOT_MET
    n_axes = set_axes(family, n_rows, n_classes, inner, extent)
    step = LANES * size if class_lanes else inner * size
    planned = (
        n_rows, n_classes, s.n_vectors, s.n_units, s.units_per_line, s.panel, s.chunk, s.segment, s.n_segments, n_axes,
        step, step, step,
    )  # fmt: skip
    for nth in range(len(planned)):
        set_word(block, PLANNED + nth, planned[nth])
    set_word(block, SAVE_SEGMENT, word(kernel, 1))
    set_word(block, WORKS, word(kernel, 2))
    set_word(block, UNIFORM, number(family, words.SMOOTHING) / n_classes)
    if word(family, words.AVERAGED) != 0:
        set_word(block, DIVISOR_AT, float64(n_rows))
    return useful_threads(s.n_chunks, elements)


@inlined
def extents_but(sizes, axis, first, stop):
    """The product of these extents, but for the class axis."""
    n = 1
    for i in range(first, stop):
        n *= 1 if i == axis else word(sizes, i)
    return n


@inlined
def ready_for(family, sizes):
    """`made_ready` for arrays of these extents."""
    axis, n_axes = word(family, words.CLASS_AXIS), word(family, words.N_AXES)
    before, behind = extents_but(sizes, axis, 0, axis), extents_but(sizes, axis, axis, n_axes)
    if word(family, words.INNERMOST) != 0:
        before, behind = before * behind, 1
    return made_ready(family, before, word(sizes, axis), behind)


@inlined
def has_rows(family, sizes, target_sizes):
    """Has the target the extents of the logits, or those of their rows?"""
    axis, soft = word(family, words.CLASS_AXIS), word(family, words.SOFT) != 0
    for i in range(word(family, words.N_AXES)):
        if soft or i != axis:
            if word(sizes, i) != word(target_sizes, i if soft or i < axis else i - 1):
                return False
    return True
