"""From lane to lane: sums and maxima over the lanes of a vector, and vectors beside each other as one of more lanes."""

from numba import njit, types
from numba.extending import intrinsic

from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import I32, LANES, SCALAR, Vec, broadcast, lane, larger, maximum, pick, splat, where


def _halves(builder, x):
    lanes = x.type.count // 2
    return (pick(builder, x, x, list(range(first, first + lanes))) for first in (0, lanes))


def _halved(builder, total, lanes):
    """One half added to the other until so many lanes are left."""
    plus = builder.add if total.type.element == SCALAR["i64"] else builder.fadd
    while total.type.count > lanes:
        total = plus(*_halves(builder, total))
    return total


@intrinsic
def concat(typingctx, a, b):
    """Two vectors as one of twice the lanes.

    What is done to it is done to each part, step by step, so that none waits for the result of its own last step.
    """
    order = list(range(2 * a.lanes))
    return Vec(a.kind, 2 * a.lanes)(a, b), lambda context, builder, sig, args: pick(builder, *args, order)


@intrinsic
def repeat(typingctx, x, times):
    """``x`` beside itself, ``times`` (a literal) of it."""
    if not isinstance(times, types.IntegerLiteral):
        return None
    order = list(range(x.lanes)) * times.literal_value
    return Vec(x.kind, len(order))(x, times), lambda context, builder, sig, args: pick(builder, args[0], args[0], order)


@intrinsic
def fold(typingctx, x):
    """The vectors of which ``x`` was made, added up, pairwise."""
    return Vec(x.kind)(x), lambda context, builder, sig, args: _halved(builder, *args, LANES)


@intrinsic
def add_halves(typingctx, x):
    """Half as many lanes: each with the one that many further added."""
    return Vec(x.kind, x.lanes // 2)(x), lambda context, builder, sig, args: builder.fadd(*_halves(builder, *args))


@intrinsic
def max_of_halves(typingctx, x):
    """Half as many lanes: each the larger of itself and the one that many further, as ``maximum`` has it."""
    return Vec(x.kind, x.lanes // 2)(x), lambda context, builder, sig, args: larger(builder, *_halves(builder, *args))


@intrinsic
def swap(typingctx, x, distance):
    """Lane ``i`` takes lane ``i ^ distance`` (a literal)."""
    if not isinstance(distance, types.IntegerLiteral):
        return None
    order = [i ^ distance.literal_value for i in range(LANES)]

    def codegen(context, builder, sig, args):
        return pick(builder, args[0], args[0], order)

    return x(x, distance), codegen


def _by_swaps(step):
    """``step`` of all lanes, in every lane, in a fixed order."""

    @njit(**INLINE)
    def across(x):
        x = step(x, swap(x, 8))
        x = step(x, swap(x, 4))
        x = step(x, swap(x, 2))
        return step(x, swap(x, 1))

    return across


_largest = _by_swaps(maximum)
product_across = _by_swaps(njit(**INLINE)(lambda a, b: a * b))
min_across = _by_swaps(njit(**INLINE)(lambda a, b: where(a < b, a, b)))


@njit(**INLINE)
def max_across(x):
    """The largest lane, in every lane: of one number, so that on a host with narrow registers one holds it."""
    return splat(x, lane(_largest(x), 0))


@intrinsic
def sum_across(typingctx, x):
    """The sum of the lanes, in each of 16. The order is fixed: the same bits every time."""

    def codegen(context, builder, sig, args):
        return broadcast(builder, builder.extract_element(_halved(builder, *args, 1), I32(0)), x.kind, LANES)

    return Vec(x.kind)(x), codegen
