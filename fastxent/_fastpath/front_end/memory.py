"""Words at addresses, and C functions at addresses."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastxent._abi import argument_block as abi
from fastxent._simd.numba_backend import inlined
from fastxent._simd.vector import I8, I64, SCALAR, call_llvm


def _load(numba_type, llvm_type):
    @intrinsic
    def load(typingctx, address, nth):
        def codegen(context, builder, sig, args):
            at = builder.gep(builder.inttoptr(args[0], llvm_type.as_pointer()), [args[1]])
            return builder.load(at, align=4)

        return numba_type(types.int64, types.int64), codegen

    return load


word, number = _load(types.int64, I64), _load(types.float64, SCALAR["f64"])  # the nth word at an address
narrow_number = _load(types.float32, SCALAR["f32"])


@intrinsic
def set_word(typingctx, address, nth, value):
    """Write the nth word, or half word, at an address."""

    def codegen(context, builder, sig, args):
        address, nth, value = args
        builder.store(value, builder.gep(builder.inttoptr(address, value.type.as_pointer()), [nth]), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), codegen


@intrinsic
def clear(typingctx, block):
    """The counters of an argument block begin at 0."""

    def codegen(context, builder, sig, args):
        at = builder.inttoptr(args[0], I8.as_pointer())
        call_llvm(builder, "llvm.memset.p0.i64", ir.VoidType(), [at, I8(0), I64(8 * abi.FIRST_SLOT), ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def call_with(typingctx, function, *values):
    """What the C function at an address makes of some numbers: an address or an int, if anything."""

    def codegen(context, builder, sig, args):
        values = cgutils.unpack_tuple(builder, args[1])
        c_function = ir.FunctionType(I64, [value.type for value in values])
        return builder.call(builder.inttoptr(args[0], c_function.as_pointer()), values)

    return types.int64(types.int64, types.StarArgTuple(values)), codegen


@inlined
def argument(from_int, args, nth):
    """The nth argument, a Python int, as a number; -1 if it is none. ``from_int``: CPython's function."""
    return call_with(from_int, word(args, nth))
