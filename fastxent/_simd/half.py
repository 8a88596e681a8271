"""How numbers are stored, and computed with: half precision is widened, and rounded to nearest even."""

from functools import partial

from llvmlite import ir

from fastxent._abi.dtypes import DTYPES
from fastxent._simd.vector import FEATURES, I16, I32, I64, SCALAR, TRIPLE, call_llvm, lanes_of

# How a storage lies in memory: what is not computed with is bits.
STORED = {"i64": I64} | {d.storage: SCALAR.get(d.storage, ir.IntType(8 * d.itemsize)) for d in DTYPES}
ITEMSIZE = {"i64": 8} | {d.storage: d.itemsize for d in DTYPES}


def shape_of(like, element):
    """``element``, or as many lanes of it as ``like`` has."""
    return lanes_of(element, like.type.count) if isinstance(like.type, ir.VectorType) else element


def constant(shape, value):
    return ir.Constant(shape, [value] * shape.count if isinstance(shape, ir.VectorType) else value)


class _BFloat(ir.HalfType):
    """What llvmlite has no name for."""

    def __str__(self):
        return "bfloat"


_BFloat._create_instance()
BFLOAT_IN_HARDWARE = "+avx512bf16" in FEATURES
DENORMAL = I32(0x90)  # of either sign, for llvm.is.fpclass


def _bf16_from_f32(builder, x, whole):
    """Whole vectors by an instruction, where there is one. It takes denormal numbers for 0: those are rounded by hand, and what
    is in lanes that nobody asks for may be denormal."""
    if not (BFLOAT_IN_HARDWARE and whole and isinstance(x.type, ir.VectorType)):
        return _bf16_by_hand(builder, x)
    lanes, bit = x.type.count, ir.IntType(1)
    rounded = builder.bitcast(builder.fptrunc(x, lanes_of(_BFloat(), lanes)), lanes_of(I16, lanes))
    denormal = call_llvm(builder, f"llvm.is.fpclass.v{lanes}f32", lanes_of(bit, lanes), [x, DENORMAL])
    before = builder.block
    with builder.if_then(call_llvm(builder, f"llvm.vector.reduce.or.v{lanes}i1", bit, [denormal]), likely=False):
        by_hand = _bf16_by_hand(builder, x)
        there = builder.block
    chosen = builder.phi(rounded.type)
    chosen.add_incoming(rounded, before)
    chosen.add_incoming(by_hand, there)
    return chosen


def _bf16_by_hand(builder, x):
    """Round to nearest even by adding half of what is cut off; a nan is made quiet, or rounding could make it inf."""
    ints = shape_of(x, I32)
    const = partial(constant, ints)
    bits = builder.bitcast(x, ints)
    odd = builder.and_(builder.lshr(bits, const(16)), const(1))
    rounded = builder.add(builder.add(bits, const(0x7FFF)), odd)
    quiet = builder.or_(bits, const(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, const(16)), shape_of(x, I16))


# x86 processors before 2012 have no instruction between float16 and float32, and LLVM would call a library that is not there.
HALF_IN_HARDWARE = not TRIPLE.startswith(("x86", "i686")) or "+f16c" in FEATURES


def _f32_from_bf16(builder, raw):
    ints = shape_of(raw, I32)
    bits = builder.shl(builder.zext(raw, ints), constant(ints, 16))
    return builder.bitcast(bits, shape_of(raw, SCALAR["f32"]))


def _f32_from_f16(builder, raw):
    """By hand: the same bits further to the left are the number times 2^-112; of inf and nan the exponent is filled up."""
    floats, ints = shape_of(raw, SCALAR["f32"]), shape_of(raw, I32)
    if HALF_IN_HARDWARE:
        return builder.fpext(builder.bitcast(raw, shape_of(raw, ir.HalfType())), floats)
    const = partial(constant, ints)
    wide = builder.zext(raw, ints)
    size = builder.and_(wide, const(0x7FFF))
    shifted = builder.bitcast(builder.shl(size, const(13)), floats)
    bits = builder.bitcast(builder.fmul(shifted, constant(floats, 2.0**112)), ints)
    full = builder.select(builder.icmp_unsigned(">=", size, const(0x7C00)), const(0x7F800000), const(0))
    sign = builder.shl(builder.and_(wide, const(0x8000)), const(16))
    return builder.bitcast(builder.or_(builder.or_(bits, full), sign), floats)


def _f16_from_f32(builder, x, whole):
    """By hand: half an ulp less one, and the last bit kept, carry into it; a denormal gets 0.5 added, whose ulp is its own."""
    floats, ints, halves = shape_of(x, SCALAR["f32"]), shape_of(x, I32), shape_of(x, I16)
    if HALF_IN_HARDWARE:
        return builder.bitcast(builder.fptrunc(x, shape_of(x, ir.HalfType())), halves)
    const = partial(constant, ints)
    bits = builder.bitcast(x, ints)
    size = builder.and_(bits, const(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, const(13)), const(1))
    carried = builder.add(builder.add(size, const(0xFFF)), odd)
    normal = builder.lshr(builder.sub(carried, const(0x38000000)), const(13))
    denormal = builder.bitcast(builder.fadd(builder.bitcast(size, floats), constant(floats, 0.5)), ints)
    denormal = builder.sub(denormal, const(0x3F000000))
    huge = builder.select(builder.icmp_unsigned(">", size, const(0x7F800000)), const(0x7E00), const(0x7C00))
    small = builder.select(builder.icmp_unsigned("<", size, const(0x38800000)), denormal, normal)
    chosen = builder.select(builder.icmp_unsigned(">=", size, const(0x47800000)), huge, small)
    sign = builder.lshr(builder.and_(bits, const(0x80000000)), const(16))
    return builder.trunc(builder.or_(chosen, sign), halves)


# Storages that are not computed with: how their bits are read and written.
_TO_F32 = {"bf16": _f32_from_bf16, "f16": _f32_from_f16}
_FROM_F32 = {"bf16": _bf16_from_f32, "f16": _f16_from_f32}


def decode(builder, raw, ptr):
    """Stored bits -> numbers to compute with."""
    x, have = raw, ptr.storage
    if ptr.storage in _TO_F32:
        x, have = _TO_F32[ptr.storage](builder, raw), "f32"
    if have == ptr.kind:
        return x
    return (builder.fpext if ptr.kind == "f64" else builder.fptrunc)(x, shape_of(raw, SCALAR[ptr.kind]))


def encode(builder, x, ptr, whole=True):
    """Numbers -> stored bits, rounded to nearest even; to half precision by way of float32, as PyTorch does."""
    if ptr.storage == ptr.kind:
        return x
    if ptr.storage in _FROM_F32:
        f32 = builder.fptrunc(x, shape_of(x, SCALAR["f32"])) if ptr.kind == "f64" else x
        return _FROM_F32[ptr.storage](builder, f32, whole)
    return (builder.fptrunc if ptr.kind == "f64" else builder.fpext)(x, shape_of(x, STORED[ptr.storage]))
