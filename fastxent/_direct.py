"""Calls that are not large, in machine code from the arguments of a Python call to its result.

Python takes microseconds to see that arrays look like those of an earlier call, and to hand their addresses on; the work on 32
rows of 10 takes one, that on a row of 128,256 a dozen. So here are two functions that CPython calls as builtins of its own
(``METH_FASTCALL``): their arguments are addresses of objects, and the GIL is held, so an argument block is nobody else's.
One takes NumPy's arrays, and looks itself which call they are like; the other takes PyTorch's tensors, and is told.
``_task`` says where things are in the table that they read, ``_builtin`` makes and fills it. All addresses are numbers here;
memory is counted in words of 8 bytes.
"""

from llvmlite import ir
from numba import float32, float64, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastxent import _task
from fastxent._inlined import INLINE
from fastxent._simd import I8, I64, SCALAR, call_llvm

ROUND, OWN_NUMBER, TEAM, X, G, Y, W = (_task.SLOT[name] for name in ("round", "thread_number", "team", "x", "g", "y", "w"))
SUM, BAD_AT, DIVISOR_AT = (
    (_task.BLOCK.size + offset) // 8 for offset in (8 * _task.WORK, _task.BAD, _task.DIVISOR)
)  # behind the block: see ``_parallel``


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
    """The counters begin at 0."""

    def codegen(context, builder, sig, args):
        at = builder.inttoptr(args[0], I8.as_pointer())
        call_llvm(builder, "llvm.memset.p0.i64", ir.VoidType(), [at, I8(0), I64(8 * _task.FIRST_SLOT), ir.IntType(1)(0)])
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


@njit(**INLINE)
def run(table, block, team):
    """Run a task, whose operands are in its block, on so many threads; is every class index in range? If not, nothing has been
    written."""
    clear(block)
    set_word(block, ROUND, word(block, ROUND) + _task.PHASES)
    set_word(block, BAD_AT, 0.0)
    set_word(block, TEAM, team)
    launch = word(table, _task.LAUNCH)
    if team > 1:
        set_word(block, OWN_NUMBER, word(table, _task.THREAD_NUMBER))
        call_with(word(table, _task.PARALLEL), launch, block, team, 0)
    else:
        set_word(block, OWN_NUMBER, 0)
        call_with(launch, block)
    return number(block, BAD_AT) == 0.0


@njit(**INLINE)
def loss_of(block):
    return number(block, SUM) / number(block, DIVISOR_AT)


@njit(**INLINE)
def is_like(table, array, kind, flags):
    """Is it an array with these flags, of this dtype and shape?"""
    if word(array, _task.TYPE) != word(table, _task.NDARRAY_TYPE) or word(array, _task.FLAGS) & flags != flags:
        return False
    n_axes = word(kind, 1)
    if word(array, _task.DTYPE) != word(kind, 0) or word(array, _task.NDIM) & _task.LOW_HALF != n_axes:
        return False
    extents = word(array, _task.DIMS)
    for axis in range(n_axes):
        if word(extents, axis) != word(kind, 2 + axis):
            return False
    return True


@njit(**INLINE)
def is_same(table, option, known):
    """Is it the same object, or an int, float or string with the same value?"""
    if option == known:
        return True
    kind = word(option, _task.TYPE)
    is_plain = (
        kind == word(table, _task.INT_TYPE) or kind == word(table, _task.FLOAT_TYPE) or kind == word(table, _task.STR_TYPE)
    )
    if not is_plain or kind != word(known, _task.TYPE):
        return False
    return call_with(word(table, _task.COMPARE), option, known, _task.EQUAL) & _task.LOW_HALF == 1


@njit(**INLINE)
def is_known(table, entry, args):
    """Is this a call like the entry's, and may the gradient be written where it is to go?"""
    logits, target, out = word(args, 1), word(args, 2), word(args, 3)
    for nth in range(_task.N_OPTIONS):
        if not is_same(table, word(args, 4 + nth), word(entry, _task.OPTIONS + nth)):
            return False
    x_kind, y_kind = entry + 8 * _task.X_KIND, entry + 8 * _task.Y_KIND
    if not is_like(table, logits, x_kind, _task.CONTIGUOUS_AND_ALIGNED):
        return False
    if not is_like(table, target, y_kind, _task.CONTIGUOUS_AND_ALIGNED):
        return False
    if word(table, _task.WRITES) == 0:
        return True
    if not is_like(table, out, x_kind, _task.CONTIGUOUS_AND_ALIGNED | _task.WRITEABLE):
        return False
    x, y, g = word(logits, _task.DATA), word(target, _task.DATA), word(out, _task.DATA)
    x_bytes, y_bytes = word(entry, _task.X_BYTES), word(entry, _task.Y_BYTES)
    if g != x and g < x + x_bytes and x < g + x_bytes:
        return False
    return not (g < y + y_bytes and y < g + x_bytes)


@njit(**INLINE)
def argument(table, args, nth):
    return call_with(word(table, _task.FROM_INT), word(args, nth))


@njit(**INLINE)
def answered(table, args):
    entry = table + 8 * _task.HEAD
    for _ in range(word(table, _task.COUNT)):
        if is_known(table, entry, args):
            block, team = word(entry, _task.BLOCK_AT), min(word(entry, _task.USEFUL), argument(table, args, 0))
            set_word(block, X, word(word(args, 1), _task.DATA))
            set_word(block, Y, word(word(args, 2), _task.DATA))
            set_word(block, G, word(word(args, 3), _task.DATA))
            if run(table, block, team):
                return call_with(word(table, _task.TO_FLOAT), loss_of(block))
            break
        entry += 8 * _task.ENTRY
    return call_with(word(table, _task.TO_BOOL), 0)


@njit(**INLINE)
def element(table, tensor, nbytes, itemsize):
    """The address of a tensor's first element; 0 if from there on so many bytes are not in its memory."""
    handle, found = tensor + word(table, _task.HANDLE), table + 8 * _task.FOUND
    failed = call_with(word(table, _task.DATA_PTR), handle, found)
    at = word(found, 0)
    if nbytes > 0:
        failed |= call_with(word(table, _task.STORAGE_SIZE), handle, found)
        size = word(found, 0)
        failed |= call_with(word(table, _task.STORAGE_OFFSET), handle, found)
        if size < word(found, 0) * itemsize + nbytes:
            return 0
    return at if failed & _task.LOW_HALF == 0 else 0


@njit(**INLINE)
def ran(table, args, n_args):
    block, call, team = word(word(args, 0), _task.DATA), word(word(args, 1), _task.DATA), argument(table, args, 2)
    loss = element(table, word(args, 3), 0, 1)
    if loss == 0:
        return -1
    operand = call + 8 * _task.FIRST_OPERAND
    for nth in range(4, n_args):
        tensor, at = word(args, nth), 0
        if tensor != word(table, _task.NOTHING):
            at = element(table, tensor, word(operand, 1), word(operand, 2))
            if at == 0:
                return -1
        set_word(block, word(operand, 0), at)
        operand += 8 * _task.OPERAND
    n_narrow, wide = word(call, _task.N_NARROW), word(call, _task.WIDE_AT)
    if n_narrow > 0:
        narrow = word(block, W)
        for c in range(n_narrow):
            set_word(wide, c, float64(narrow_number(narrow, c)))
        set_word(block, W, wide)
    good = run(table, block, team)
    if word(call, _task.IS_DOUBLE) != 0:
        set_word(loss, 0, loss_of(block))
    else:
        set_word(loss, 0, float32(loss_of(block)))
    return int(good)


def answer(self, args, n_args):
    """Python's ``answer(team, logits, target, out, axis, ignore_index, label_smoothing, reduction)``: the loss, or False.

    ``self`` is the table's array. False: no entry has these options, and arrays like these; or a class index is
    out of range. Where the table says that no gradient is written, ``out`` may be any array.
    """
    return answered(word(self, _task.DATA), args)


def run_on(self, args, n_args):
    """Python's ``run_on(block, call, team, loss, x, ...)``: two arrays, a number, tensors, or None where there is none. 1: the
    loss has been written; 0: a class index is out of range; -1: a tensor has not the memory that it must have.

    ``self`` is the table's array; ``call`` says which operands these are, those that may be left out last.
    """
    return call_with(word(word(self, _task.DATA), _task.TO_INT), ran(word(self, _task.DATA), args, n_args))
