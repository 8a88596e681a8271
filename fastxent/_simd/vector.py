"""The vector type of the kernels: 16 lanes, with operators. ``lanes``, ``memory`` and ``elementary`` build on it.

Numba has had no vector math library since 0.62, so ``np.exp`` in a kernel is a scalar call, and LLVM prefers 256-bit
registers on AVX-512 hosts. Explicit ``<16 x float>`` values give every host its full width (LLVM splits them on narrower
ones) and make a kernel read like NumPy: ``acc += exp_scaled(x, shift)``.

====== ============================== =========================================================
type   holds                          made by
====== ============================== =========================================================
Vec    16 lanes of one kind           ``load``, ``splat``, ``iota``, operators
Ptr    address of stored elements     a field of a Task; ``+ bytes`` moves it (strides are bytes)
Task   address of the argument block  the caller of the compiled kernel
====== ============================== =========================================================

Kinds of lanes: ``f32``, ``f64``, ``i64`` and ``mask``. Kinds of storage: ``f16``, ``bf16``, ``f32``, ``f64``, ``i64``; a Ptr
knows both, so ``load`` widens half precision in registers and ``store`` rounds once, to nearest even.

No fast-math flag is set anywhere: masked logits are -inf, and a flag that assumes there is none turns them into poison.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_global, signature
from numba.extending import infer_getattr, intrinsic, lower_builtin, lower_cast, lower_getattr_generic

from fastxent._simd.numba_backend import inlined
from fastxent._simd.task import Task

LANES = 16
# The host. One with AVX-512 has 32 registers of 16 lanes; on others 16 lanes take two or four registers.
TRIPLE, _, FEATURES = cpu_target.target_context.codegen().magic_tuple()
WIDE = "+avx512f" in FEATURES

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
BYTES = I8.as_pointer()
SCALAR = {"f32": ir.FloatType(), "f64": ir.DoubleType(), "i64": I64, "mask": I1}
NUMBA_SCALAR = {"f32": types.float32, "f64": types.float64, "i64": types.int64, "mask": types.boolean}


def lanes_of(scalar, lanes=LANES):
    """Return the LLVM type of a vector of ``lanes`` lanes."""
    return ir.VectorType(scalar, lanes)


# ----------------------------------------------------------------------------------------------------
# Types
# ----------------------------------------------------------------------------------------------------


class Vec(types.Type):
    """16 lanes of one kind, held in registers; or a multiple of 16: vectors that are concatenated (see ``lanes.concat``)."""

    def __init__(self, kind, lanes=LANES):
        self.kind, self.lanes = kind, lanes
        super().__init__(name=f"Vec({kind} x {lanes})")


class Ptr(types.Type):
    """Address of elements that are stored as ``storage`` and loaded as ``kind``."""

    def __init__(self, storage, kind):
        self.storage, self.kind = storage, kind
        super().__init__(name=f"Ptr({storage} as {kind})")


@register_default(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, lanes_of(SCALAR[fe_type.kind], fe_type.lanes))


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
    value.set_metadata("invariant.load", builder.module.add_metadata([]))  # no kernel writes it, so LLVM may hoist the load
    return value


@lower_cast(Task, Task)
def _narrow(context, builder, wide, narrow, address):
    return address  # of the same block


# ----------------------------------------------------------------------------------------------------
# Operators
# ----------------------------------------------------------------------------------------------------


def broadcast(builder, value, kind, lanes=LANES):
    """Return a vector with ``value`` in every lane."""
    vector = lanes_of(SCALAR[kind], lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(lanes_of(I32, lanes), [0] * lanes))


def _spread(builder, args, sig, vec):
    """Return the arguments, with scalars broadcast to the lanes of a ``vec``."""
    return [
        v if isinstance(t, Vec) else broadcast(builder, v, vec.kind, vec.lanes) for v, t in zip(args, sig.args, strict=True)
    ]


def _define(op, emit, compares=False, kinds=("f32", "f64", "i64")):
    """Let ``op`` take two vectors of one kind, or a vector and a scalar, which is broadcast."""

    class Template(AbstractTemplate):
        def generic(self, args, kws):
            vectors = [a for a in args if isinstance(a, Vec)]
            if not vectors or any(v != vectors[0] or v.kind not in kinds for v in vectors):
                return None
            vec = vectors[0]
            if not all(isinstance(a, Vec | types.Number) for a in args):
                return None
            scalar = NUMBA_SCALAR[vec.kind]
            result = Vec("mask", vec.lanes) if compares else vec
            return signature(result, *(vec if isinstance(a, Vec) else scalar for a in args))

    infer_global(op)(Template)

    def lower(context, builder, sig, args):
        vec = next(a for a in sig.args if isinstance(a, Vec))
        return emit(builder, vec.kind, *_spread(builder, args, sig, vec))

    for pattern in ((Vec, Vec), (Vec, types.Number), (types.Number, Vec)):
        lower_builtin(op, *pattern)(lower)


def _arithmetic(name):
    return lambda b, kind, x, y: getattr(b, name if kind == "i64" else "f" + name)(x, y)


def _comparison(sign):
    def emit(b, kind, x, y):
        if kind == "i64":
            return b.icmp_signed(sign, x, y)
        # Comparisons are ordered, except !=, for x != x is the test for nan.
        return b.fcmp_unordered(sign, x, y) if sign == "!=" else b.fcmp_ordered(sign, x, y)

    return emit


_define(operator.add, _arithmetic("add"))
_define(operator.sub, _arithmetic("sub"))
_define(operator.mul, _arithmetic("mul"))
_define(operator.truediv, lambda b, kind, x, y: b.fdiv(x, y), kinds=("f32", "f64"))
for _op, _sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    _define(getattr(operator, _op), _comparison(_sign), compares=True)
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


def call_llvm(builder, name, result, args):
    """Call an LLVM intrinsic by its full name (llvmlite cannot derive it from a VectorType)."""
    fnty = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, name), args)


@intrinsic
def splat(typingctx, like, value):
    """Return a vector of ``like``'s kind with ``value`` in every lane; ``like`` is a Vec or a Ptr."""
    vec = Vec(like.kind, getattr(like, "lanes", LANES))

    def codegen(context, builder, sig, args):
        return broadcast(builder, args[1], vec.kind, vec.lanes)

    return vec(like, NUMBA_SCALAR[vec.kind]), codegen


@intrinsic
def iota(typingctx):
    """Return the lanes 0, 1, ..., 15 as integers."""
    return INT(), lambda context, builder, sig, args: ir.Constant(lanes_of(I64), list(range(LANES)))


@intrinsic
def all_lanes(typingctx):
    """Return the mask that is true everywhere."""
    return MASK(), lambda context, builder, sig, args: ir.Constant(lanes_of(I1), [1] * LANES)


@intrinsic
def where(typingctx, mask, a, b):
    """Return ``a`` where ``mask``, else ``b``, lane by lane; b may be a scalar."""
    if not (isinstance(a, Vec) and mask == Vec("mask", a.lanes)):
        return None
    scalar = not isinstance(b, Vec)

    def codegen(context, builder, sig, args):
        other = broadcast(builder, args[2], a.kind, a.lanes) if scalar else args[2]
        return builder.select(args[0], args[1], other)

    return a(mask, a, NUMBA_SCALAR[a.kind] if scalar else a), codegen


def larger(builder, a, b):
    """Return the larger of two vectors, lane by lane; ``b`` if one of them is nan."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def maximum(typingctx, acc, x):
    """Return the larger of ``acc`` and ``x``: one ``vmaxps``, which can take ``x`` from memory.

    If one of them is nan, ``x`` is returned. So a running maximum may miss a nan, but the nan reaches the sums anyway.
    """
    return acc(acc, acc), lambda context, builder, sig, args: larger(builder, *args)


@intrinsic
def at_least(typingctx, x, low):
    """Return ``max(x, low)``, and nan where ``x`` is nan; low may be a scalar."""
    scalar = not isinstance(low, Vec)

    def codegen(context, builder, sig, args):
        bound = broadcast(builder, args[1], x.kind, x.lanes) if scalar else args[1]
        return larger(builder, bound, args[0])

    return x(x, NUMBA_SCALAR[x.kind] if scalar else x), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """Return ``a * b + c``, fused where the host can; a and b may be scalars if c is a vector."""
    vec = c if isinstance(c, Vec) else a
    sig = vec(*(t if isinstance(t, Vec) else NUMBA_SCALAR[vec.kind] for t in (a, b, c)))

    def codegen(context, builder, sig, args):
        spread = _spread(builder, args, sig, vec)
        return call_llvm(builder, f"llvm.fmuladd.v{vec.lanes}{vec.kind}", spread[0].type, spread)

    return sig, codegen


@intrinsic
def absolute(typingctx, x):
    """Return ``|x|`` of a floating-point vector."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, f"llvm.fabs.v{x.lanes}{x.kind}", args[0].type, [args[0]])

    return x(x), codegen


@intrinsic
def widen(typingctx, x):
    """Return ``x`` as float64 lanes."""

    def codegen(context, builder, sig, args):
        return args[0] if x.kind == "f64" else builder.fpext(args[0], lanes_of(SCALAR["f64"], x.lanes))

    return Vec("f64", x.lanes)(x), codegen


@intrinsic
def narrow(typingctx, like, x):
    """Return float64 lanes ``x`` as lanes of ``like``'s kind; ``like`` is a Vec or a Ptr."""
    vec = Vec(like.kind)

    def codegen(context, builder, sig, args):
        return args[1] if vec.kind == "f64" else builder.fptrunc(args[1], lanes_of(SCALAR[vec.kind]))

    return vec(like, x), codegen


@intrinsic
def as_floats(typingctx, like, x):
    """Return integers ``x`` as lanes of ``like``'s kind; ``like`` is a Vec or a Ptr."""
    vec = Vec(like.kind)
    return vec(like, x), lambda context, builder, sig, args: builder.sitofp(args[1], lanes_of(SCALAR[vec.kind]))


@intrinsic
def lane(typingctx, x, index):
    """Return one lane as a scalar."""
    return NUMBA_SCALAR[x.kind](x, types.int64), lambda context, builder, sig, args: builder.extract_element(*args)


@intrinsic
def any_lane(typingctx, mask):
    """Return whether any lane of the mask is true."""

    def codegen(context, builder, sig, args):
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], I16), I16(0))

    return types.boolean(mask), codegen


@intrinsic
def count_lanes(typingctx, mask):
    """Return how many lanes of the mask are true."""

    def codegen(context, builder, sig, args):
        return builder.zext(builder.ctpop(builder.bitcast(args[0], I16)), I64)

    return types.int64(mask), codegen


@intrinsic
def every_lane(typingctx, mask):
    """Return whether every lane of the mask is true."""

    def codegen(context, builder, sig, args):
        return builder.icmp_unsigned("==", builder.bitcast(args[0], I16), I16(0xFFFF))

    return types.boolean(mask), codegen


def pick(builder, x, y, order):
    """Return the lanes that ``order`` lists, numbered through ``x`` and then ``y``."""
    return builder.shuffle_vector(x, y, ir.Constant(lanes_of(I32, len(order)), order))


@inlined
def first_lanes(n):
    """Return the mask of the first ``n`` lanes."""
    return iota() < n
