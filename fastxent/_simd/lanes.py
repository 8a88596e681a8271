"""Operations between lanes: sums and maxima over the lanes of a vector, and vectors concatenated into one of more lanes."""

from numba import types
from numba.extending import intrinsic

from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import I32, LANES, SCALAR, Vec, broadcast, lane, larger, maximum, pick, splat, where


def _halves(builder, x):
    lanes = x.type.count // 2
    return (pick(builder, x, x, list(range(first, first + lanes))) for first in (0, lanes))


def _halved(builder, total, lanes):
    """Add one half to the other until ``lanes`` lanes are left."""
    plus = builder.add if total.type.element == SCALAR["i64"] else builder.fadd
    while total.type.count > lanes:
        total = plus(*_halves(builder, total))
    return total


@intrinsic
def concat(typingctx, a, b):
    """Return two vectors concatenated into one of twice the lanes.

    LLVM splits each operation on it into one per register, so the dependency chains of the two vectors are interleaved.
    """
    order = list(range(2 * a.lanes))
    return Vec(a.kind, 2 * a.lanes)(a, b), lambda context, builder, sig, args: pick(builder, *args, order)


@intrinsic
def repeat(typingctx, x, times):
    """Return ``times`` (a literal) copies of ``x``, concatenated."""
    if not isinstance(times, types.IntegerLiteral):
        return None
    order = list(range(x.lanes)) * times.literal_value
    return Vec(x.kind, len(order))(x, times), lambda context, builder, sig, args: pick(builder, args[0], args[0], order)


@intrinsic
def fold(typingctx, x):
    """Return the pairwise sum of the vectors that were concatenated into ``x``."""
    return Vec(x.kind)(x), lambda context, builder, sig, args: _halved(builder, *args, LANES)


@intrinsic
def upper_bound(typingctx, x):
    """Return a bound from above, lane by lane, of the vectors that were concatenated into ``x``, none of which is negative.

    It is the largest sum of two of them; ``fold`` starts with the same sums, so LLVM computes them once.
    """

    def codegen(context, builder, sig, args):
        bound = args[0]
        if bound.type.count > LANES:
            bound = builder.fadd(*_halves(builder, bound))
        while bound.type.count > LANES:
            bound = larger(builder, *_halves(builder, bound))
        return bound

    return Vec(x.kind)(x), codegen


@intrinsic
def add_halves(typingctx, x):
    """Return half as many lanes: the sum of the two halves."""
    return Vec(x.kind, x.lanes // 2)(x), lambda context, builder, sig, args: builder.fadd(*_halves(builder, *args))


@intrinsic
def max_of_halves(typingctx, x):
    """Return half as many lanes: the larger of the two halves, lane by lane, as in ``maximum``."""
    return Vec(x.kind, x.lanes // 2)(x), lambda context, builder, sig, args: larger(builder, *_halves(builder, *args))


@intrinsic
def swap(typingctx, x, distance):
    """Return ``x`` with lanes ``i`` and ``i ^ distance`` (a literal) exchanged."""
    if not isinstance(distance, types.IntegerLiteral):
        return None
    order = [i ^ distance.literal_value for i in range(LANES)]

    def codegen(context, builder, sig, args):
        return pick(builder, args[0], args[0], order)

    return x(x, distance), codegen


def _by_swaps(step):
    """Return a function that reduces all lanes by ``step``, in a fixed order, to one value in every lane."""

    @inlined
    def across(x):
        x = step(x, swap(x, 8))
        x = step(x, swap(x, 4))
        x = step(x, swap(x, 2))
        return step(x, swap(x, 1))

    return across


_largest = _by_swaps(maximum)
product_across = _by_swaps(inlined(lambda a, b: a * b))
min_across = _by_swaps(inlined(lambda a, b: where(a < b, a, b)))


@inlined
def max_across(x):
    """Return the largest lane, in every lane; splat from a scalar, so that on a host with narrow registers one holds it."""
    return splat(x, lane(_largest(x), 0))


@intrinsic
def sum_across(typingctx, x):
    """Return the sum of the lanes, in each of 16 lanes. The order is fixed, so the bits are the same every time."""

    def codegen(context, builder, sig, args):
        return broadcast(builder, builder.extract_element(_halved(builder, *args, 1), I32(0)), x.kind, LANES)

    return Vec(x.kind)(x), codegen
