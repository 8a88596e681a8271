"""The vector type of the kernels: 16 lanes, with operators, loads, stores, exp and log.

Numba has had no vector math library since 0.62, so ``np.exp`` in a kernel is a scalar call, and LLVM prefers 256-bit
registers on AVX-512 hosts. Explicit ``<16 x float>`` values give every host its full width (LLVM splits them on narrower
ones) and let a kernel read like NumPy: ``acc += exp_up(x - m)``.

====== ============================== =========================================================
type   holds                          made by
====== ============================== =========================================================
Vec    16 lanes of one kind           ``load``, ``splat``, ``iota``, operators
Ptr    address of stored elements     a field of a Task; ``+ bytes`` moves it (strides are bytes)
Task   address of the argument block  the caller of the compiled kernel
====== ============================== =========================================================

Kinds of lanes: ``f32``, ``f64``, ``i64`` and ``mask``. Kinds of storage: ``f16``, ``bf16``, ``f32``, ``f64``, ``i64``; a Ptr
knows both, so ``load`` widens half precision in registers and ``store`` rounds once, to nearest even.

No fast-math flag is set anywhere: -inf is what a masked logit is, and a flag that assumes it away makes poison of it.
"""

import math
import operator
from collections import namedtuple

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_global, signature
from numba.extending import (
    infer_getattr,
    intrinsic,
    lower_builtin,
    lower_getattr_generic,
    overload,
)

LANES = 16
# Helpers are called by kernels only: no wrappers for Python and C callers are compiled for them, a quarter of the time.
INLINE = {
    "forceinline": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False,
}  # fmt: skip

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
BYTES = I8.as_pointer()
SCALAR = {"f32": ir.FloatType(), "f64": ir.DoubleType(), "i64": I64, "mask": I1}
STORED = {"f16": I16, "bf16": I16, "f32": ir.FloatType(), "f64": ir.DoubleType(), "i64": I64}
ITEMSIZE = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "i64": 8}
NUMBA_SCALAR = {"f32": types.float32, "f64": types.float64, "i64": types.int64, "mask": types.boolean}


def _vector(scalar):
    return ir.VectorType(scalar, LANES)


# ----------------------------------------------------------------------------------------------------
# Types
# ----------------------------------------------------------------------------------------------------


class Vec(types.Type):
    """16 lanes of one kind, held in registers."""

    def __init__(self, kind):
        self.kind = kind
        super().__init__(name=f"Vec({kind})")


class Ptr(types.Type):
    """Address of elements stored as ``storage``, computed with as ``kind``."""

    def __init__(self, storage, kind):
        self.storage, self.kind = storage, kind
        super().__init__(name=f"Ptr({storage} as {kind})")


class Task(types.Type):
    """Address of a kernel's arguments: 8-byte slots, named by ``fields``, and constants known to the compiler.

    fields    : tuple of (name, slot, "int" | "float" | (storage, kind))
    constants : tuple of (name, bool): a branch on one of them costs nothing and drops the code not taken
    build     : hash of the kernels' sources, so that the disk cache never serves yesterday's code
    """

    def __init__(self, fields, constants, build):
        self.fields, self.constants = fields, constants
        super().__init__(name=f"Task({fields}, {constants}, {build})")


@register_default(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _vector(SCALAR[fe_type.kind]))


register_default(Ptr)(models.OpaqueModel)
register_default(Task)(models.OpaqueModel)

F32, F64, INT, MASK = (Vec(kind) for kind in ("f32", "f64", "i64", "mask"))


@infer_getattr
class _TaskAttributes(AttributeTemplate):
    key = Task

    def generic_resolve(self, task, attr):
        if attr in dict(task.constants):
            return types.boolean
        field = {name: kind for name, _, kind in task.fields}.get(attr)
        if field == "int":
            return types.int64
        if field == "float":
            return types.float64
        return Ptr(*field) if field else None


@lower_getattr_generic(Task)
def _read_field(context, builder, task, address, attr):
    constants = dict(task.constants)
    if attr in constants:
        return I1(int(constants[attr]))
    slot, field = next((slot, kind) for name, slot, kind in task.fields if name == attr)
    wanted = {"int": I64, "float": SCALAR["f64"]}.get(field, BYTES)
    at = builder.gep(address, [I64(8 * slot)])
    value = builder.load(builder.bitcast(at, wanted.as_pointer()))
    value.set_metadata("invariant.load", builder.module.add_metadata([]))  # no store of the kernel's may change it: hoist it
    return value


# ----------------------------------------------------------------------------------------------------
# Operators
# ----------------------------------------------------------------------------------------------------


def _splat(builder, value, kind):
    vector = _vector(SCALAR[kind])
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(_vector(I32), [0] * LANES))


def _define(op, emit, result=None, kinds=("f32", "f64", "i64")):
    """Let ``op`` take two vectors of one kind, or a vector and a number (which is spread over the lanes)."""

    class Template(AbstractTemplate):
        def generic(self, args, kws):
            vectors = [a for a in args if isinstance(a, Vec)]
            if not vectors or any(v != vectors[0] or v.kind not in kinds for v in vectors):
                return None
            vec = vectors[0]
            if not all(isinstance(a, Vec | types.Number) for a in args):
                return None
            scalar = NUMBA_SCALAR[vec.kind]
            return signature(result or vec, *(vec if isinstance(a, Vec) else scalar for a in args))

    infer_global(op)(Template)

    def lower(context, builder, sig, args):
        kind = next(a.kind for a in sig.args if isinstance(a, Vec))
        spread = [v if isinstance(t, Vec) else _splat(builder, v, kind) for v, t in zip(args, sig.args, strict=True)]
        return emit(builder, kind, *spread)

    for pattern in ((Vec, Vec), (Vec, types.Number), (types.Number, Vec)):
        lower_builtin(op, *pattern)(lower)


def _arithmetic(name):
    return lambda b, kind, x, y: getattr(b, name if kind == "i64" else "f" + name)(x, y)


def _comparison(sign):
    def emit(b, kind, x, y):
        if kind == "i64":
            return b.icmp_signed(sign, x, y)
        # Ordered, except !=: x != x is the test for nan.
        return b.fcmp_unordered(sign, x, y) if sign == "!=" else b.fcmp_ordered(sign, x, y)

    return emit


_define(operator.add, _arithmetic("add"))
_define(operator.sub, _arithmetic("sub"))
_define(operator.mul, _arithmetic("mul"))
_define(operator.truediv, lambda b, kind, x, y: b.fdiv(x, y), kinds=("f32", "f64"))
for _op, _sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    _define(getattr(operator, _op), _comparison(_sign), result=MASK)
_define(operator.and_, lambda b, kind, x, y: b.and_(x, y), kinds=("mask",))
_define(operator.or_, lambda b, kind, x, y: b.or_(x, y), kinds=("mask",))


@infer_global(operator.add)
class _PtrAdd(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], Ptr) and isinstance(args[1], types.Integer):
            return signature(args[0], args[0], types.int64)
        return None


@lower_builtin(operator.add, Ptr, types.Integer)
def _ptr_add(context, builder, sig, args):
    return builder.gep(args[0], [args[1]])


# ----------------------------------------------------------------------------------------------------
# Making, choosing and reducing vectors
# ----------------------------------------------------------------------------------------------------


def _llvm(builder, name, result, args):
    """Call an LLVM intrinsic by its full name (llvmlite's VectorType has none to offer)."""
    fnty = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, name), args)


@intrinsic
def splat(typingctx, like, value):
    """``value`` in every lane of a vector of ``like``'s kind; ``like`` is a Vec or a Ptr."""
    vec = Vec(like.kind)

    def codegen(context, builder, sig, args):
        return _splat(builder, args[1], vec.kind)

    return vec(like, NUMBA_SCALAR[vec.kind]), codegen


@intrinsic
def iota(typingctx):
    """0, 1, ..., 15 as integers."""
    return INT(), lambda context, builder, sig, args: ir.Constant(_vector(I64), list(range(LANES)))


@intrinsic
def all_lanes(typingctx):
    """The mask that is true everywhere."""
    return MASK(), lambda context, builder, sig, args: ir.Constant(_vector(I1), [1] * LANES)


@intrinsic
def where(typingctx, mask, a, b):
    """``a`` where ``mask``, else ``b``, lane by lane; b may be a number."""
    if not (mask == MASK and isinstance(a, Vec)):
        return None
    scalar = not isinstance(b, Vec)

    def codegen(context, builder, sig, args):
        other = _splat(builder, args[2], a.kind) if scalar else args[2]
        return builder.select(args[0], args[1], other)

    return a(mask, a, NUMBA_SCALAR[a.kind] if scalar else a), codegen


@intrinsic
def maximum(typingctx, acc, x):
    """The larger of ``acc`` and ``x``; a nan in ``x`` is passed over (one ``vmaxps``: it reaches the sum by itself)."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[1], args[0]), args[1], args[0])

    return acc(acc, acc), codegen


@intrinsic
def at_least(typingctx, x, low):
    """``max(x, low)`` that keeps a nan in ``x``; low may be a number."""
    scalar = not isinstance(low, Vec)

    def codegen(context, builder, sig, args):
        bound = _splat(builder, args[1], x.kind) if scalar else args[1]
        return builder.select(builder.fcmp_ordered(">", bound, args[0]), bound, args[0])

    return x(x, NUMBA_SCALAR[x.kind] if scalar else x), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c``, fused where the host can; a and b may be numbers if c is a vector."""
    vec = c if isinstance(c, Vec) else a
    sig = vec(*(t if isinstance(t, Vec) else NUMBA_SCALAR[vec.kind] for t in (a, b, c)))

    def codegen(context, builder, sig, args):
        spread = [v if isinstance(t, Vec) else _splat(builder, v, vec.kind) for v, t in zip(args, sig.args, strict=True)]
        return _llvm(builder, f"llvm.fmuladd.v{LANES}{vec.kind}", _vector(SCALAR[vec.kind]), spread)

    return sig, codegen


@intrinsic
def absolute(typingctx, x):
    """``|x|`` of a floating vector."""

    def codegen(context, builder, sig, args):
        return _llvm(builder, f"llvm.fabs.v{LANES}{x.kind}", args[0].type, [args[0]])

    return x(x), codegen


@intrinsic
def widen(typingctx, x):
    """As float64 lanes."""

    def codegen(context, builder, sig, args):
        return args[0] if x.kind == "f64" else builder.fpext(args[0], _vector(SCALAR["f64"]))

    return F64(x), codegen


@intrinsic
def narrow(typingctx, like, x):
    """Float64 lanes ``x`` as lanes of ``like``'s kind; ``like`` is a Vec or a Ptr."""
    vec = Vec(like.kind)

    def codegen(context, builder, sig, args):
        return args[1] if vec.kind == "f64" else builder.fptrunc(args[1], _vector(SCALAR[vec.kind]))

    return vec(like, x), codegen


@intrinsic
def as_float(typingctx, like, x):
    """Integer lanes ``x`` as lanes of ``like``'s kind; ``like`` is a Vec or a Ptr."""
    vec = Vec(like.kind)
    return vec(like, x), lambda context, builder, sig, args: builder.sitofp(args[1], _vector(SCALAR[vec.kind]))


@intrinsic
def lane(typingctx, x, index):
    """One lane as a number."""
    return NUMBA_SCALAR[x.kind](x, types.int64), lambda context, builder, sig, args: builder.extract_element(*args)


@intrinsic
def any_lane(typingctx, mask):
    """Is any lane of the mask true?"""

    def codegen(context, builder, sig, args):
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], I16), I16(0))

    return types.boolean(mask), codegen


@intrinsic
def every_lane(typingctx, mask):
    """Is every lane of the mask true?"""

    def codegen(context, builder, sig, args):
        return builder.icmp_unsigned("==", builder.bitcast(args[0], I16), I16(0xFFFF))

    return types.boolean(mask), codegen


@intrinsic
def _swap(typingctx, x, distance):
    """Lane ``i`` takes lane ``i ^ distance`` (a literal)."""
    if not isinstance(distance, types.IntegerLiteral):
        return None
    order = [i ^ distance.literal_value for i in range(LANES)]

    def codegen(context, builder, sig, args):
        return builder.shuffle_vector(args[0], args[0], ir.Constant(_vector(I32), order))

    return x(x, distance), codegen


@njit(**INLINE)
def max_across(x):
    """The largest lane, in every lane."""
    x = maximum(x, _swap(x, 8))
    x = maximum(x, _swap(x, 4))
    x = maximum(x, _swap(x, 2))
    return maximum(x, _swap(x, 1))


@njit(**INLINE)
def sum_across(x):
    """The sum of the lanes, in every lane. The order is fixed: the same bits every time."""
    x = x + _swap(x, 8)
    x = x + _swap(x, 4)
    x = x + _swap(x, 2)
    return x + _swap(x, 1)


@njit(**INLINE)
def min_across(x):
    """The smallest lane, in every lane."""
    x = _smaller(x, _swap(x, 8))
    x = _smaller(x, _swap(x, 4))
    x = _smaller(x, _swap(x, 2))
    return _smaller(x, _swap(x, 1))


@njit(**INLINE)
def _smaller(a, b):
    return where(a < b, a, b)


@njit(**INLINE)
def first_lanes(n):
    """The mask of the first ``n`` lanes."""
    return iota() < n


# ----------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------


def _bf16_from_f32(builder, x):
    """Round to nearest even by adding half of what is cut off; a nan is made quiet, or rounding could make it inf."""
    ints = _vector(I32) if isinstance(x.type, ir.VectorType) else I32
    const = (lambda v: ir.Constant(ints, [v] * LANES)) if isinstance(ints, ir.VectorType) else (lambda v: I32(v))
    half = _vector(I16) if isinstance(ints, ir.VectorType) else I16
    bits = builder.bitcast(x, ints)
    odd = builder.and_(builder.lshr(bits, const(16)), const(1))
    rounded = builder.add(builder.add(bits, const(0x7FFF)), odd)
    quiet = builder.or_(bits, const(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, const(16)), half)


def _decode(builder, raw, ptr):
    """Stored bits -> numbers to compute with."""
    many = isinstance(raw.type, ir.VectorType)
    shape = _vector if many else (lambda t: t)
    if ptr.storage == "bf16":
        wide = builder.zext(raw, shape(I32))
        shift = ir.Constant(shape(I32), [16] * LANES) if many else I32(16)
        x, have = builder.bitcast(builder.shl(wide, shift), shape(SCALAR["f32"])), "f32"
    elif ptr.storage == "f16":
        x, have = builder.fpext(builder.bitcast(raw, shape(ir.HalfType())), shape(SCALAR["f32"])), "f32"
    else:
        x, have = raw, ptr.storage
    if have == ptr.kind:
        return x
    return (builder.fpext if ptr.kind == "f64" else builder.fptrunc)(x, shape(SCALAR[ptr.kind]))


def _encode(builder, x, ptr):
    """Numbers -> stored bits, rounded to nearest even; to half precision by way of float32, as PyTorch does."""
    shape = _vector if isinstance(x.type, ir.VectorType) else (lambda t: t)
    if ptr.storage == ptr.kind:
        return x
    if ptr.storage in ("f16", "bf16"):
        f32 = builder.fptrunc(x, shape(SCALAR["f32"])) if ptr.kind == "f64" else x
        if ptr.storage == "bf16":
            return _bf16_from_f32(builder, f32)
        return builder.bitcast(builder.fptrunc(f32, shape(ir.HalfType())), shape(I16))
    return (builder.fptrunc if ptr.kind == "f64" else builder.fpext)(x, shape(STORED[ptr.storage]))


def _typed(builder, address, element):
    return builder.bitcast(address, element.as_pointer())


def _masked_name(ptr):
    element = {"f16": "i16", "bf16": "i16"}.get(ptr.storage, ptr.storage)
    return f"v{LANES}{element}"


def _zeros(vector):
    return ir.Constant(vector, None)


@intrinsic
def load(typingctx, p):
    """16 neighbours at ``p``."""

    def codegen(context, builder, sig, args):
        vector = _vector(STORED[p.storage])
        return _decode(builder, builder.load(_typed(builder, args[0], vector), align=1), p)

    return Vec(p.kind)(p), codegen


@intrinsic
def load_masked(typingctx, p, mask):
    """Neighbours at ``p`` where ``mask``, else 0; nothing is read where it is false."""

    def codegen(context, builder, sig, args):
        vector = _vector(STORED[p.storage])
        address = _typed(builder, args[0], vector)
        raw = _llvm(
            builder,
            f"llvm.masked.load.{_masked_name(p)}.p0",
            vector,
            [address, I32(1), args[1], _zeros(vector)],
        )
        return _decode(builder, raw, p)

    return Vec(p.kind)(p, mask), codegen


@intrinsic
def store(typingctx, p, x):
    """Write 16 neighbours at ``p``."""

    def codegen(context, builder, sig, args):
        raw = _encode(builder, args[1], p)
        builder.store(raw, _typed(builder, args[0], raw.type), align=1)
        return context.get_dummy_value()

    return types.void(p, x), codegen


@intrinsic
def store_masked(typingctx, p, x, mask):
    """Write neighbours at ``p`` where ``mask``; nothing is touched where it is false."""

    def codegen(context, builder, sig, args):
        raw = _encode(builder, args[1], p)
        address = _typed(builder, args[0], raw.type)
        _llvm(builder, f"llvm.masked.store.{_masked_name(p)}.p0", ir.VoidType(), [raw, address, I32(1), args[2]])
        return context.get_dummy_value()

    return types.void(p, x, mask), codegen


@intrinsic
def stream(typingctx, p, x):
    """Write 16 neighbours at ``p``, aligned to the vector, past the caches (the array is not read again soon)."""

    def codegen(context, builder, sig, args):
        raw = _encode(builder, args[1], p)
        written = builder.store(raw, _typed(builder, args[0], raw.type), align=LANES * ITEMSIZE[p.storage])
        written.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    return types.void(p, x), codegen


def _lane_addresses(builder, base, offsets):
    addresses = builder.gep(base, [offsets], source_etype=I8)
    addresses.type = _vector(BYTES)  # an index vector makes a vector of addresses; llvmlite does not work that out
    return addresses


@intrinsic
def gather(typingctx, p, offsets, mask):
    """The elements at ``p + offsets`` bytes where ``mask``, else 0."""

    def codegen(context, builder, sig, args):
        vector = _vector(STORED[p.storage])
        addresses = _lane_addresses(builder, args[0], args[1])
        name = f"llvm.masked.gather.{_masked_name(p)}.v{LANES}p0"
        raw = _llvm(builder, name, vector, [addresses, I32(1), args[2], _zeros(vector)])
        return _decode(builder, raw, p)

    return Vec(p.kind)(p, offsets, mask), codegen


@intrinsic
def scatter(typingctx, p, offsets, x, mask):
    """Write lane by lane to ``p + offsets`` bytes where ``mask``."""

    def codegen(context, builder, sig, args):
        raw = _encode(builder, args[2], p)
        addresses = _lane_addresses(builder, args[0], args[1])
        name = f"llvm.masked.scatter.{_masked_name(p)}.v{LANES}p0"
        _llvm(builder, name, ir.VoidType(), [raw, addresses, I32(1), args[3]])
        return context.get_dummy_value()

    return types.void(p, offsets, x, mask), codegen


def _transpose(builder, rows):
    """16 vectors, lane j of vector i -> lane i of vector j: exchange blocks of 1, 2, 4, 8 lanes between pairs of vectors."""
    rows = list(rows)
    for block in (1, 2, 4, 8):
        keep = [lane if not lane & block else LANES + lane - block for lane in range(LANES)]
        swap = [lane + block if not lane & block else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & block:
                a, b = rows[i], rows[i + block]
                rows[i] = builder.shuffle_vector(a, b, ir.Constant(_vector(I32), keep))
                rows[i + block] = builder.shuffle_vector(a, b, ir.Constant(_vector(I32), swap))
    return rows


def _rows(builder, base, stride, mask, columns, vector):
    """For each of 16 rows its address and the mask of its elements: the first ``columns``, or none."""
    spread = _splat(builder, columns, "i64")
    wanted = builder.icmp_signed("<", ir.Constant(_vector(I64), list(range(LANES))), spread)
    for row in range(LANES):
        at = builder.gep(base, [builder.mul(stride, I64(row))])
        live = wanted
        if mask is not None:
            live = builder.select(builder.extract_element(mask, I32(row)), wanted, _zeros(wanted.type))
        yield _typed(builder, at, vector), live


def _if_all(builder, mask, emit):
    """``emit(None)`` where all lanes of ``mask`` are true, which is the common case and cheaper, else ``emit(mask)``."""
    with builder.if_else(builder.icmp_unsigned("==", builder.bitcast(mask, I16), I16(0xFFFF))) as (all_of_them, some):
        with all_of_them:
            emit(None)
        with some:
            emit(mask)


@intrinsic
def load_transposed(typingctx, p, stride, mask, columns, tile):
    """16 rows, ``stride`` bytes apart -> 16 vectors at ``tile``: element j < columns of each row; 0 where not ``mask``."""

    def codegen(context, builder, sig, args):
        base, stride, mask, columns, tile = args
        vector = _vector(STORED[p.storage])
        name = f"llvm.masked.load.{_masked_name(p)}.p0"

        def emit(mask):
            rows = [
                _decode(builder, _llvm(builder, name, vector, [at, I32(1), live, _zeros(vector)]), p)
                for at, live in _rows(builder, base, stride, mask, columns, vector)
            ]
            for j, column in enumerate(_transpose(builder, rows)):
                at = builder.gep(tile, [I64(j * LANES * ITEMSIZE[p.kind])])
                builder.store(column, _typed(builder, at, column.type), align=1)

        _if_all(builder, mask, emit)
        return context.get_dummy_value()

    return types.void(p, types.int64, mask, types.int64, tile), codegen


@intrinsic
def store_transposed(typingctx, p, stride, mask, columns, tile):
    """The other way round; nothing is touched outside the rows in ``mask`` and their first ``columns`` elements."""

    def codegen(context, builder, sig, args):
        base, stride, mask, columns, tile = args
        wide = _vector(SCALAR[p.kind])
        name = f"llvm.masked.store.{_masked_name(p)}.p0"
        vectors = [
            builder.load(_typed(builder, builder.gep(tile, [I64(j * LANES * ITEMSIZE[p.kind])]), wide), align=1)
            for j in range(LANES)
        ]
        rows = _transpose(builder, vectors)

        def emit(mask):
            places = _rows(builder, base, stride, mask, columns, _vector(STORED[p.storage]))
            for row, (at, live) in zip(rows, places, strict=True):
                _llvm(builder, name, ir.VoidType(), [_encode(builder, row, p), at, I32(1), live])

        _if_all(builder, mask, emit)
        return context.get_dummy_value()

    return types.void(p, types.int64, mask, types.int64, tile), codegen


@intrinsic
def get(typingctx, p, offset):
    """The element ``offset`` bytes behind ``p``, as a number."""

    def codegen(context, builder, sig, args):
        address = _typed(builder, builder.gep(args[0], [args[1]]), STORED[p.storage])
        return _decode(builder, builder.load(address, align=1), p)

    return NUMBA_SCALAR[p.kind](p, types.int64), codegen


@intrinsic
def put(typingctx, p, offset, value):
    """Write one element ``offset`` bytes behind ``p``."""

    def codegen(context, builder, sig, args):
        raw = _encode(builder, args[2], p)
        builder.store(raw, _typed(builder, builder.gep(args[0], [args[1]]), raw.type), align=1)
        return context.get_dummy_value()

    return types.void(p, types.int64, NUMBA_SCALAR[p.kind]), codegen


@intrinsic
def fetch_add(typingctx, task, slot):
    """Add 1 to an integer slot of the task and return what it was, atomically; this thread's earlier writes are seen first."""

    def codegen(context, builder, sig, args):
        address = builder.gep(args[0], [builder.mul(args[1], I64(8))])
        return builder.atomic_rmw("add", _typed(builder, address, I64), I64(1), "acq_rel")

    return types.int64(task, types.int64), codegen


@intrinsic
def scratch(typingctx, like, vectors):
    """Room for ``vectors`` (a literal) vectors of ``like``'s kind on the stack of the running kernel."""
    if not isinstance(vectors, types.IntegerLiteral):
        return None

    def codegen(context, builder, sig, args):
        room = ir.ArrayType(_vector(SCALAR[like.kind]), vectors.literal_value)
        return builder.bitcast(cgutils.alloca_once(builder, room), BYTES)

    return Ptr(like.kind, like.kind)(like, vectors), codegen


@intrinsic
def itemsize(typingctx, p):
    """Bytes of one stored element."""
    return types.int64(p), lambda context, builder, sig, args: I64(ITEMSIZE[p.storage])


@intrinsic
def address(typingctx, p):
    """Where ``p`` points, as a number."""
    return types.int64(p), lambda context, builder, sig, args: builder.ptrtoint(args[0], I64)


@intrinsic
def prefetch(typingctx, p, offset):
    """Ask for the cache line ``offset`` bytes behind ``p``, into the second-level cache; never faults."""

    def codegen(context, builder, sig, args):
        address = builder.gep(args[0], [args[1]])
        _llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [address, I32(0), I32(2), I32(1)])
        return context.get_dummy_value()

    return types.void(p, types.int64), codegen


# ----------------------------------------------------------------------------------------------------
# exp and log
# ----------------------------------------------------------------------------------------------------
# exp(x - m) for x <= m, with exp(0) exactly 1 and no error from the difference x - m, which is the largest one elsewhere
# (half an ulp of x - m = -12.3 is 4e-7, and so is then the relative error of the exponential).
#   k   = round((x - m) / ln 2), from adding 1.5 * 2^(mantissa bits): the sum's low bits are k, rounded by the adder.
#   r   = x - m - k ln 2, |r| <= ln(2)/2, exact but for three roundings of r's own size: m is split into base + coarse + fine,
#         and ln 2 into high + low (Cody, Waite), where coarse and high are multiples of so large a power of two (the grid) that
#         c = coarse + k high is exact; r = ((x - base) - c) - fine - k low. If m is beyond the reach of the grid, all of it is
#         base: x - base is exact then for every x that matters.
#   e^r = 1 + r + r^2 q(r), q interpolated at Chebyshev nodes: 0.2 (f32), 0.002 (f64) of a half-ulp.
#   2^k   is built from k's bits.
# Softmax needs ratios of exponentials only. So exp_up returns exp(x - m) 2^UP, UP = 24 or 52: the factor cancels, and a
# probability too small for a normal number keeps its bits until the last multiplication rounds it to a denormal one.
# Below x - m = -(bias + UP) ln 2 the exponent field is 0 and the result exactly 0, also for x = -inf.

_Q32 = (0.5, 0.16666575, 0.041666552, 0.008363472, 0.0013926551)
_Q64 = (
    0.5, 0.1666666666666667, 0.04166666666666667, 0.008333333333325848, 0.0013888888888883544,
    0.00019841269875819578, 2.4801587326261104e-05, 2.755725413931689e-06, 2.7557272742699346e-07,
    2.5105739219586713e-08, 2.0915059884917686e-09,
)  # fmt: skip
_GRID = {"f32": 2.0**-9, "f64": 2.0**-32}
_FORMAT = {  # mantissa bits, exponent bias, UP, ln 2 high part (a multiple of the grid), ln 2 low part, q
    "f32": (23, 127, 24, 0.693359375, -2.1219444005469057e-4, _Q32),
    "f64": (52, 1023, 52, 6.93147180369123816490e-01, 1.90821492927058770002e-10, _Q64),
}


def _polynomial(coefficients):
    """A jitted ``c0 + c1 x + c2 x^2 + ...``, by Horner's rule."""

    @intrinsic
    def polynomial(typingctx, x):
        vector = _vector(SCALAR[x.kind])

        def codegen(context, builder, sig, args):
            *rest, y = (ir.Constant(vector, [c] * LANES) for c in coefficients)
            for c in reversed(rest):
                y = _llvm(builder, f"llvm.fmuladd.v{LANES}{x.kind}", vector, [y, args[0], c])
            return y

        return x(x), codegen

    return polynomial


@intrinsic
def _power_of_two(typingctx, shifted):
    """``2^(k + UP)`` from ``shifted = k + magic``; 0 where k + UP is below the normal numbers."""
    mantissa, bias, up = _FORMAT[shifted.kind][:3]
    integer = {"f32": I32, "f64": I64}[shifted.kind]
    # The bits of a float in [2^mantissa, 2^(mantissa+1)) are those of its first member plus the distance to it.
    magic_bits = ((bias + mantissa) << mantissa) + (1 << (mantissa - 1))

    def codegen(context, builder, sig, args):
        ints = _vector(integer)
        bits = builder.bitcast(args[0], ints)
        exponent = builder.add(bits, ir.Constant(ints, [bias + up - magic_bits] * LANES))
        field = builder.shl(exponent, ir.Constant(ints, [mantissa] * LANES))
        return builder.bitcast(field, args[0].type)

    return shifted(shifted), codegen


Shift = namedtuple("Shift", "base coarse fine lowest")  # a maximum m in parts; the x below which exp_up is 0


def shift_by(m):
    """What ``exp_up`` needs to know of ``m``; -inf counts as 0, for -inf - -inf would be nan."""
    raise TypeError("shift_by is for kernels")


@overload(shift_by, jit_options=INLINE)
def _shift_by(m):
    mantissa, bias, up, *_ = _FORMAT[m.kind]
    to_grid = 1.5 * 2.0**mantissa * _GRID[m.kind]  # adding and subtracting it rounds to the grid
    reach = to_grid / 3.0
    lowest = -(bias + up) * math.log(2.0)

    def shift_by(m):
        m = where(m == -math.inf, splat(m, 0.0), m)
        far = absolute(m) >= reach
        near = where(far, splat(m, 0.0), m)
        coarse = (near + to_grid) - to_grid
        return Shift(where(far, m, 0.0), coarse, near - coarse, coarse + lowest)

    return shift_by


def exp_up(x, shift):
    """``exp(x - m) * 2**UP`` for ``x <= m``, -inf and nan; error below 1.5 ulp; ``shift = shift_by(m)``."""
    raise TypeError("exp_up is for kernels")


@overload(exp_up, jit_options=INLINE)
def _exp_up(x, shift):
    mantissa, _, _, ln2_high, ln2_low, q = _FORMAT[x.kind]
    magic = 1.5 * 2.0**mantissa
    log2e = 1.0 / math.log(2.0)
    q_of = _polynomial(q)

    def exp_up(x, shift):
        x = at_least(x - shift.base, shift.lowest)
        shifted = fma(x - shift.coarse, log2e, splat(x, magic))
        k = shifted - magic
        r = x - fma(k, ln2_high, shift.coarse)
        r = fma(k, -ln2_low, r - shift.fine)
        e_r = fma(r * r, q_of(r), r) + 1.0
        return e_r * _power_of_two(shifted)

    return exp_up


def tanh(x):
    """Hyperbolic tangent, relative error of some ulps also near 0: with d = -2 |x|, e^d - 1 = 2^k (e^r - 1) + (2^k - 1)."""
    raise TypeError("tanh is for kernels")


@overload(tanh, jit_options=INLINE)
def _tanh(x):
    mantissa, _, up, ln2_high, ln2_low, q = _FORMAT[x.kind]
    magic = 1.5 * 2.0**mantissa
    lowest = -1.5 * mantissa  # e^d is nothing beside 1 there
    log2e = 1.0 / math.log(2.0)
    down = 2.0**-up
    q_of = _polynomial(q)

    def tanh(x):
        d = at_least(absolute(x) * -2.0, lowest)
        shifted = fma(d, log2e, splat(d, magic))
        k = shifted - magic
        r = fma(k, -ln2_high, d)
        r = fma(k, -ln2_low, r)
        power = _power_of_two(shifted) * down
        expm1 = fma(power, fma(r * r, q_of(r), r), power - 1.0)
        size = (expm1 * -1.0) / (expm1 + 2.0)
        return where(x < 0.0, size * -1.0, size)

    return tanh


@njit(**INLINE)
def sech_squared(x):
    """``1 - tanh(x)^2``, the slope of tanh, as 4 r (1 - r) with r = 1 / (1 + e^(2 |x|)): it keeps its digits at a large |x|."""
    d = absolute(x) * -2.0
    e = exp_up(d, shift_by(splat(d, 0.0))) / up(d)
    r = e / (e + 1.0)
    return r * 4.0 * (splat(r, 1.0) - r)


def up(like):
    """What ``exp_up`` gives for ``exp(0) = 1``: the factor 2**UP of ``like``'s kind (a Vec or a Ptr)."""
    raise TypeError("up is for kernels")


@overload(up, jit_options=INLINE)
def _up(like):
    factor = 2.0 ** _FORMAT[like.kind][2]
    return lambda like: factor


# log(x) = k ln 2 + log(m), x = m 2^k with m in [sqrt(1/2), sqrt(2)).
#   log(m) = 2 atanh(s) = 2 s + 2 s z L(z), with f = m - 1, which is exact, s = f / (2 + f) and z = s^2. The rounding of s would
#   be that of the result; but 2 s = f - s f = f - f^2/2 + s f^2/2, where it stands in the small terms only.

_LOG = _polynomial((
    0.3333333333333333, 0.2000000000000047, 0.14285714285382226, 0.1111111120027388,
    0.090908973504489, 0.07693145267329496, 0.06633709298237442, 0.06550360691751746,
))  # fmt: skip
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_LN2_HIGH, _LN2_LOW = _FORMAT["f64"][3:5]


@intrinsic
def _split_exponent(typingctx, x):
    """``(k, m)`` with ``x = m * 2**k`` and m in [sqrt(1/2), sqrt(2)); k as float64 lanes."""

    def codegen(context, builder, sig, args):
        ints = _vector(I64)
        const = lambda v: ir.Constant(ints, [v] * LANES)  # noqa: E731
        bits = builder.bitcast(args[0], ints)
        k = builder.ashr(builder.sub(bits, const(_SQRT_HALF_BITS)), const(52))
        m = builder.bitcast(builder.sub(bits, builder.shl(k, const(52))), args[0].type)
        k = builder.sitofp(k, args[0].type)
        return context.make_tuple(builder, sig.return_type, [k, m])

    return types.UniTuple(F64, 2)(x), codegen


@njit(**INLINE)
def log(x):
    """Natural logarithm of float64 lanes (normal numbers, 0, inf, nan); about 1 ulp."""
    k, m = _split_exponent(x)
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    half = f * f * 0.5
    tail = s * (half + z * 2.0 * _LOG(z)) + k * _LN2_LOW
    y = k * _LN2_HIGH - ((half - tail) - f)
    y = where(x == 0.0, splat(x, -math.inf), y)
    y = where(x == math.inf, x, y)
    return where(x >= 0.0, y, math.nan)


@njit(**INLINE)
def log1p(e):
    """``log(1 + e)`` of float64 lanes ``e >= 0``: what rounding 1 + e lost is put back."""
    u = e + 1.0
    return log(u) + (e - (u - 1.0)) / u
