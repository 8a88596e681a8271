"""Squares of elements, transposed in registers on the way from memory to memory: rows become one class of 16 rows a vector."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastxent._loadstore import ITEMSIZE, encode, load_lanes, load_lanes_masked, typed
from fastxent._simd import I32, I64, LANES, SCALAR, WIDE, broadcast, lanes_of

SQUARE = 16 if WIDE else 8  # rows and columns that are transposed at a time: what the registers hold


def _transpose(builder, rows):
    """Lane j of vector i -> lane i of vector j: exchange blocks of 1, 2, 4, ... lanes between pairs of vectors."""
    rows, size = list(rows), len(rows)
    block = 1
    while block < size:
        keep = [lane if not lane & block else size + lane - block for lane in range(size)]
        swap = [lane + block if not lane & block else size + lane for lane in range(size)]
        for i in range(size):
            if not i & block:
                a, b = rows[i], rows[i + block]
                rows[i] = builder.shuffle_vector(a, b, ir.Constant(lanes_of(I32, size), keep))
                rows[i + block] = builder.shuffle_vector(a, b, ir.Constant(lanes_of(I32, size), swap))
        block *= 2
    return rows


def _squares():
    """Of 16 x 16 elements: first row and first column of each square."""
    return [(i, j) for i in range(0, LANES, SQUARE) for j in range(0, LANES, SQUARE)]


@intrinsic
def load_transposed(typingctx, p, stride, n, columns, tile):
    """n rows (at most 16), ``stride`` bytes apart -> 16 vectors at ``tile``: element j < columns of each row.

    A row that is not there is a copy of the last one: no lane needs a mask of its own.
    """

    def codegen(context, builder, sig, args):
        base, stride, n, columns, tile = args
        all_columns = builder.icmp_signed("==", columns, I64(LANES))
        last = builder.sub(n, I64(1))
        rows = []
        for row in range(LANES):
            there = builder.select(builder.icmp_signed("<", last, I64(row)), last, I64(row))
            rows.append(builder.gep(base, [builder.mul(stride, there)]))
        for i, j in _squares():
            here = [builder.gep(row, [I64(j * ITEMSIZE[p.storage])]) for row in rows[i : i + SQUARE]]
            numbers = ir.Constant(lanes_of(I64, SQUARE), list(range(j, j + SQUARE)))
            wanted = builder.icmp_signed("<", numbers, broadcast(builder, columns, "i64", SQUARE))
            with builder.if_else(all_columns) as (whole, part):
                with whole:
                    a, from_whole = [load_lanes(builder, p, at, SQUARE) for at in here], builder.block
                with part:
                    b, from_part = [load_lanes_masked(builder, p, at, wanted) for at in here], builder.block
            elements = []
            for from_a, from_b in zip(a, b, strict=True):
                elements.append(builder.phi(from_a.type))
                elements[-1].add_incoming(from_a, from_whole)
                elements[-1].add_incoming(from_b, from_part)
            for k, column in enumerate(_transpose(builder, elements), j):
                at = builder.gep(tile, [I64((k * LANES + i) * ITEMSIZE[p.kind])])
                builder.store(column, typed(builder, at, column.type), align=1)
        return context.get_dummy_value()

    return types.void(p, types.int64, types.int64, types.int64, tile), codegen


@intrinsic
def store_transposed(typingctx, p, stride, tile):
    """16 vectors at ``tile`` -> 16 rows of 16 elements, ``stride`` bytes apart.

    Rows may overlap: of two elements at one place the one nearer to the beginning of its row stays.
    """

    def codegen(context, builder, sig, args):
        base, stride, tile = args
        part = lanes_of(SCALAR[p.kind], SQUARE)
        for i, j in sorted(_squares(), key=lambda square: (-square[1], square[0])):
            columns = [builder.gep(tile, [I64((k * LANES + i) * ITEMSIZE[p.kind])]) for k in range(j, j + SQUARE)]
            elements = [builder.load(typed(builder, at, part), align=1) for at in columns]
            for row, x in enumerate(_transpose(builder, elements), i):
                raw = encode(builder, x, p)
                at = builder.gep(base, [builder.add(builder.mul(stride, I64(row)), I64(j * ITEMSIZE[p.storage]))])
                builder.store(raw, typed(builder, at, raw.type), align=1)
        return context.get_dummy_value()

    return types.void(p, types.int64, tile), codegen
