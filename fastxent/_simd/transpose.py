"""Squares of elements, transposed in registers on the way from memory to memory: 16 rows become vectors of one class each."""

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastxent._abi.argument_block import LINE
from fastxent._simd.half import ITEMSIZE, encode
from fastxent._simd.memory import emit_prefetch, load_lanes, load_lanes_masked, store_lanes, typed
from fastxent._simd.vector import I64, LANES, SCALAR, WIDE, Vec, broadcast, lanes_of, larger, pick

SQUARE = 16 if WIDE else 8  # rows and columns that are transposed at a time: as many as the registers hold
HALF = SQUARE // 2
BY_MASK = WIDE  # whether fewer than SQUARE columns can be written; without AVX-512 a masked store takes a dozen cycles


def _exchange(builder, vectors):
    """Exchange lane j of vector i with lane i of vector j, in each block of as many lanes as there are vectors.

    Each step takes two vectors whose numbers differ in one bit, and exchanges that bit with one of the lane numbers: it picks
    every other of four lanes, later of four quarters of a register, as x86's shuffle instructions do.
    """
    vectors, lanes = list(vectors), vectors[0].type.count
    bits = len(vectors).bit_length() - 1
    for bit in range(bits):
        size = 1 << bit // 2 * 2  # lanes that stay together
        n = min(4, len(vectors) // size)
        every_other = [
            [
                vector * lanes + first + k * size + lane
                for first in range(0, lanes, n * size) for vector in (0, 1) for k in range(odd, n, 2) for lane in range(size)
            ]
            for odd in (0, 1)
        ]  # fmt: skip
        for i in range(len(vectors)):
            if not i >> bit & 1:
                j = i | 1 << bit
                vectors[i], vectors[j] = (pick(builder, vectors[i], vectors[j], order) for order in every_other)
    return vectors


def _by_squares(builder, columns, columns_from, by_mask):
    """Emit code for all columns.

    What is left over after a square is covered by another one, or half of one, that overlaps it. Fewer columns than SQUARE are
    covered by a masked square, if ``by_mask``.
    """

    def whole_squares():
        columns_from(I64(0), SQUARE)
        if SQUARE < LANES:
            with builder.if_else(builder.icmp_signed(">", columns, I64(SQUARE + HALF))) as (many, few):
                with many:
                    columns_from(builder.sub(columns, I64(SQUARE)), SQUARE)
                with few, builder.if_then(builder.icmp_signed(">", columns, I64(SQUARE))):
                    columns_from(builder.sub(columns, I64(HALF)), HALF)

    if not by_mask:
        whole_squares()
        return
    with builder.if_else(builder.icmp_signed(">=", columns, I64(SQUARE))) as (whole, part):
        with whole:
            whole_squares()
        with part:
            numbers = ir.Constant(lanes_of(I64, SQUARE), list(range(SQUARE)))
            columns_from(I64(0), SQUARE, builder.icmp_signed("<", numbers, broadcast(builder, columns, "i64", SQUARE)))


def _place(builder, tile, first, k, row, p):
    """Return the address in a tile of rows ``row`` ... of column ``first + k``."""
    nth = builder.add(builder.mul(builder.add(first, I64(k)), I64(LANES)), I64(row))
    return builder.gep(tile, [builder.mul(nth, I64(ITEMSIZE[p.kind]))])


def _rows_at(builder, begin, stride):
    """Return the addresses of 16 rows, in two groups of eight whose offsets fit x86's addressing modes and registers."""
    eights = [builder.gep(begin, [builder.mul(stride, I64(first))]) for first in range(0, LANES, 8)]
    return [builder.gep(eight, [builder.mul(stride, I64(row))]) for eight in eights for row in range(8)]


def _largest(builder, vectors):
    """Return the lane-wise maximum of the vectors, found by pairs, pairs of pairs, ..."""
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=False)
        vectors = [larger(builder, *pair) for pair in pairs] + vectors[len(vectors) // 2 * 2 :]
    return vectors[0]


@intrinsic
def load_transposed(typingctx, p, stride, columns, tile, ahead):
    """Write elements j < columns of 16 rows, ``stride`` bytes apart, to 16 vectors at ``tile``. Return each row's maximum.

    With each whole square, what lies ``ahead`` bytes after its rows is prefetched.
    """

    def codegen(context, builder, sig, args):
        base, stride, columns, tile, ahead = args
        lowest = ir.Constant(lanes_of(SCALAR[p.kind], SQUARE), [-math.inf] * SQUARE)
        with builder.goto_entry_block():
            largest = [builder.alloca(lowest.type) for _ in range(0, LANES, SQUARE)]
        for place in largest:
            builder.store(lowest, place)

        def columns_from(first, width, wanted=None):
            rows = _rows_at(builder, builder.gep(base, [builder.mul(first, I64(ITEMSIZE[p.storage]))]), stride)
            for i in range(0, LANES, SQUARE):
                if wanted is None:
                    for at in rows[i : i + SQUARE]:
                        for line in range(0, SQUARE * ITEMSIZE[p.storage], LINE):
                            emit_prefetch(builder, builder.gep(at, [builder.add(ahead, I64(line))]))
                    elements = [load_lanes(builder, p, at, width) for at in rows[i : i + SQUARE]]
                else:
                    nothing = encode(builder, lowest, p)
                    elements = [load_lanes_masked(builder, p, at, wanted, nothing) for at in rows[i : i + SQUARE]]
                if width == HALF:  # rows k and k + HALF share a vector
                    both = list(range(SQUARE))
                    elements = [pick(builder, *pair, both) for pair in zip(elements[:HALF], elements[HALF:], strict=True)]
                exchanged = _exchange(builder, elements)
                so_far = largest[i // SQUARE]
                builder.store(_largest(builder, [builder.load(so_far), *exchanged]), so_far)
                for k, column in enumerate(exchanged):
                    at = _place(builder, tile, first, k, i, p)
                    builder.store(column, typed(builder, at, column.type), align=1)

        _by_squares(builder, columns, columns_from, True)
        parts = [builder.load(place) for place in largest]
        return parts[0] if SQUARE == LANES else pick(builder, *parts, list(range(LANES)))

    return Vec(p.kind)(p, types.int64, types.int64, tile, types.int64), codegen


@intrinsic
def store_transposed(typingctx, p, stride, columns, tile, factor):
    """Write 16 vectors at ``tile``, times ``factor``, to 16 rows of ``columns`` elements, at most 16, ``stride`` bytes apart.

    Rows may overlap, for they are written in order. Fewer than SQUARE columns are allowed only where BY_MASK.
    """

    def codegen(context, builder, sig, args):
        base, stride, columns, tile, factor = args

        def columns_from(first, width, wanted=None):
            rows = _rows_at(builder, builder.gep(base, [builder.mul(first, I64(ITEMSIZE[p.storage]))]), stride)
            part = lanes_of(SCALAR[p.kind], SQUARE)
            for i in range(0, LANES, SQUARE):
                places = [_place(builder, tile, first, k, i, p) for k in range(width)]
                factors = pick(builder, factor, factor, list(range(i, i + SQUARE)))
                products = [builder.fmul(builder.load(typed(builder, at, part), align=1), factors) for at in places]
                elements = _exchange(builder, products)
                if width == HALF:  # rows k and k + HALF share a vector
                    halves = list(range(HALF)), list(range(HALF, SQUARE))
                    elements = [pick(builder, x, x, order) for order in halves for x in elements]
                for at, x in zip(rows[i : i + SQUARE], elements, strict=True):
                    store_lanes(builder, p, at, x, wanted)

        _by_squares(builder, columns, columns_from, BY_MASK)
        return context.get_dummy_value()

    return types.void(p, types.int64, types.int64, tile, factor), codegen
