"""Calls that are not large, in machine code from the arguments of a Python call to its result.

Python takes microseconds to see that arrays look like those of an earlier call, and to hand their addresses on; the work on 32
rows of 10 takes one, that on a row of 128,256 a dozen. So here are two functions that CPython calls as builtins of its own
(``METH_FASTCALL``): their arguments are addresses of objects, and the GIL is held, so an argument block is nobody else's.
One takes NumPy's arrays, and looks itself which call they are like; the other takes PyTorch's tensors, and is told. Of dense
arrays the extents do not matter: their block is made ready for them here (`made_ready`).
``argument_block`` says where things are in what they read, ``table`` and ``family`` make and fill it. All addresses are numbers
here; memory is counted in words of 8 bytes.
"""

from llvmlite import ir
from numba import float32, float64, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastxent._abi import argument_block as abi
from fastxent._abi.variant import LANES
from fastxent._runtime import plan
from fastxent._runtime.plan import MOST_DIRECT
from fastxent._simd.numba_backend import INLINE
from fastxent._simd.vector import I8, I64, SCALAR, call_llvm

ROUND, OWN_NUMBER, TEAM, X, G, T, Y, W, U = (
    abi.SLOT[name] for name in ("round", "thread_number", "team", "x", "g", "t", "y", "w", "u")
)
PLANNED, SPREAD, SAVE_SEGMENT, WORKS = (abi.SLOT[name] for name in ("n_rows", "uniform", "save_segment", "kernel"))
SUM, BAD_AT, DIVISOR_AT = (
    (abi.BLOCK.size + offset) // 8 for offset in (8 * abi.WORK, abi.BAD, abi.DIVISOR)
)  # behind the block: see ``run``


def _load(numba_type, llvm_type):
    @intrinsic
    def load(typingctx, address, nth):
        def codegen(context, builder, sig, args):
            at = builder.gep(builder.inttoptr(args[0], llvm_type.as_pointer()), [args[1]])
            return builder.load(at, align=4)

        return numba_type(types.int64, types.int64), codegen

    return load


uses_class_lanes, strategy, number_of, n_checks, useful_threads = (
    njit(**INLINE)(choice)
    for choice in (plan.uses_class_lanes, plan.strategy, plan.number_of, plan.n_checks, plan.useful_threads)
)
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


@njit(**INLINE)
def run(table, block, team):
    """Run a task, whose operands are in its block, on so many threads; is every class index in range? If not, nothing has been
    written."""
    clear(block)
    set_word(block, ROUND, word(block, ROUND) + abi.PHASES)
    set_word(block, BAD_AT, 0.0)
    set_word(block, TEAM, team)
    launch = word(table, abi.LAUNCH)
    if team > 1:
        set_word(block, OWN_NUMBER, word(table, abi.THREAD_NUMBER))
        call_with(word(table, abi.PARALLEL), launch, block, team, 0)
    else:
        set_word(block, OWN_NUMBER, 0)
        call_with(launch, block)
    return number(block, BAD_AT) == 0.0


@njit(**INLINE)
def loss_of(block):
    return number(block, SUM) / number(block, DIVISOR_AT)


@njit(**INLINE)
def kernel_for(family, number):
    """Where the family has the kernel with this number; 0: it has not met it."""
    at = family + 8 * abi.KERNELS
    for _ in range(word(family, abi.N_KERNELS)):
        if word(at, 0) == number:
            return at
        at += 8 * abi.KERNEL
    return 0


@njit(**INLINE)
def set_axis(at, extent, stride, row):
    set_word(at, 0, extent)
    for operand in range(1, 4):
        set_word(at, operand, stride)
    set_word(at, 4, row)


@njit(**INLINE)
def set_axes(family, n_rows, n_classes, inner, extent):
    """The row axes, as `plan.row_axes` has them, and how many they are. ``extent``: of the innermost."""
    size, axes = word(family, abi.SIZE), family + 8 * abi.AXES
    stride = 0 if n_rows == 1 else (size if inner > 1 else n_classes * size)
    set_axis(axes, extent, stride, 1)
    if extent == n_rows:
        return 1
    set_axis(axes + 8 * 5, n_rows // extent, n_classes * inner * size, inner)
    return 2


@njit(**INLINE)
def made_ready(family, outer, n_classes, inner):
    """Make a family's block ready for arrays that are dense, of these extents before the classes, of them, and behind them: how
    many threads have something to do, or ``NOT_THERE``, ``NOT_MET``."""
    block, n_rows, size = family + 8 * abi.FAMILY, outer * inner, word(family, abi.SIZE)
    elements, n_weights = n_rows * n_classes, word(family, abi.N_WEIGHTS)
    if elements == 0 or elements * size > MOST_DIRECT or (n_weights > 0 and n_weights != n_classes):
        return abi.NOT_THERE
    tight = inner == 1
    extent = n_rows if n_classes == 1 or outer == 1 or inner == 1 else inner
    contiguous_lanes = n_rows > 1 and (inner > 1 or n_classes == 1)
    class_lanes = uses_class_lanes(n_rows, n_classes, size, tight)
    s = strategy(
        class_lanes, n_rows, n_classes, extent, size, tight, class_lanes or contiguous_lanes, not class_lanes, True,
        word(family, abi.CAPPED) != 0, word(family, abi.UNROUNDED) != 0, word(family, abi.SINGLE) != 0,
    )  # fmt: skip
    kernel = kernel_for(family, number_of(s))
    if kernel == 0 or max(s.n_chunks, n_checks(n_rows)) > abi.ROOM:
        return abi.NOT_MET
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
    set_word(block, SPREAD, number(family, abi.SMOOTHING) / n_classes)
    if word(family, abi.AVERAGED) != 0:
        set_word(block, DIVISOR_AT, float64(n_rows))
    return useful_threads(s.n_chunks, elements)


@njit(**INLINE)
def extents_but(sizes, axis, first, stop):
    """The product of these extents, but for the class axis."""
    n = 1
    for i in range(first, stop):
        n *= 1 if i == axis else word(sizes, i)
    return n


@njit(**INLINE)
def ready_for(family, sizes):
    """`made_ready` for arrays of these extents."""
    axis, n_axes = word(family, abi.CLASS_AXIS), word(family, abi.N_AXES)
    before, behind = extents_but(sizes, axis, 0, axis), extents_but(sizes, axis, axis, n_axes)
    if word(family, abi.INNERMOST) != 0:
        before, behind = before * behind, 1
    return made_ready(family, before, word(sizes, axis), behind)


@njit(**INLINE)
def has_rows(family, sizes, target_sizes):
    """Has the target the extents of the logits, or those of their rows?"""
    axis, soft = word(family, abi.CLASS_AXIS), word(family, abi.SOFT) != 0
    for i in range(word(family, abi.N_AXES)):
        if soft or i != axis:
            if word(sizes, i) != word(target_sizes, i if soft or i < axis else i - 1):
                return False
    return True


@njit(**INLINE)
def is_array(table, array, dtype, n_axes, flags):
    """Is it an array with these flags, of this dtype and number of axes?"""
    if word(array, abi.TYPE) != word(table, abi.NDARRAY_TYPE) or word(array, abi.FLAGS) & flags != flags:
        return False
    return word(array, abi.DTYPE) == dtype and word(array, abi.NDIM) & abi.LOW_HALF == n_axes


@njit(**INLINE)
def is_same(table, option, known):
    """Is it the same object, or an int, float or string with the same value?"""
    if option == known:
        return True
    kind = word(option, abi.TYPE)
    is_plain = kind == word(table, abi.INT_TYPE) or kind == word(table, abi.FLOAT_TYPE) or kind == word(table, abi.STR_TYPE)
    if not is_plain or kind != word(known, abi.TYPE):
        return False
    return call_with(word(table, abi.COMPARE), option, known, abi.EQUAL) & abi.LOW_HALF == 1


@njit(**INLINE)
def is_known(table, entry, args):
    """Is this a call like the entry's, but for the extents, and may the gradient be written where it is to go?"""
    logits, target, out = word(args, 1), word(args, 2), word(args, 3)
    for nth in range(abi.N_OPTIONS):
        if not is_same(table, word(args, 4 + nth), word(entry, abi.OPTIONS + nth)):
            return False
    family, x_dtype, flags = word(entry, abi.FAMILY_AT), word(entry, abi.X_DTYPE), abi.CONTIGUOUS_AND_ALIGNED
    n_axes = word(family, abi.N_AXES)
    if not is_array(table, logits, x_dtype, n_axes, flags):
        return False
    if not is_array(table, target, word(entry, abi.Y_DTYPE), n_axes - 1, flags):
        return False
    sizes = word(logits, abi.DIMS)
    if not has_rows(family, sizes, word(target, abi.DIMS)):
        return False
    if word(table, abi.WRITES) == 0:
        return True
    if not is_array(table, out, x_dtype, n_axes, flags | abi.WRITEABLE):
        return False
    n_rows = extents_but(sizes, word(family, abi.CLASS_AXIS), 0, n_axes)
    x_bytes = n_rows * word(sizes, word(family, abi.CLASS_AXIS)) * word(family, abi.SIZE)
    for i in range(n_axes):
        if word(word(out, abi.DIMS), i) != word(sizes, i):
            return False
    x, y, g = word(logits, abi.DATA), word(target, abi.DATA), word(out, abi.DATA)
    if g != x and g < x + x_bytes and x < g + x_bytes:
        return False
    return not (g < y + 8 * n_rows and y < g + x_bytes)


@njit(**INLINE)
def argument(table, args, nth):
    return call_with(word(table, abi.FROM_INT), word(args, nth))


@njit(**INLINE)
def answered(table, args):
    entry = table + 8 * abi.HEAD
    for _ in range(word(table, abi.COUNT)):
        if is_known(table, entry, args):
            family, logits = word(entry, abi.FAMILY_AT), word(args, 1)
            useful, block = ready_for(family, word(logits, abi.DIMS)), family + 8 * abi.FAMILY
            if useful < 0:
                break
            set_word(block, X, word(logits, abi.DATA))
            set_word(block, Y, word(word(args, 2), abi.DATA))
            set_word(block, G, word(word(args, 3), abi.DATA))
            if run(table, block, min(useful, argument(table, args, 0))):
                return call_with(word(table, abi.TO_FLOAT), loss_of(block))
            break
        entry += 8 * abi.ENTRY
    return call_with(word(table, abi.TO_BOOL), 0)


@njit(**INLINE)
def told(table, function, tensor):
    """What a function of PyTorch's C interface tells about a tensor; 0 if it fails."""
    found = table + 8 * abi.FOUND
    failed = call_with(word(table, function), tensor + word(table, abi.HANDLE), found)
    return word(found, 0) if failed & abi.LOW_HALF == 0 else 0


@njit(**INLINE)
def is_dense(table, tensor, n_axes, axis, innermost):
    """Is it in C order, or, if the classes lie innermost, are all other axes?"""
    if told(table, abi.DIM, tensor) != n_axes:
        return False
    if n_axes == 0:
        return True
    sizes, strides, step = told(table, abi.TENSOR_SIZES, tensor), told(table, abi.TENSOR_STRIDES, tensor), 1
    if sizes == 0 or strides == 0:
        return False
    if innermost:
        step = word(sizes, axis)
        if step != 1 and word(strides, axis) != 1:
            return False
    for nth in range(n_axes):
        i = n_axes - 1 - nth
        if not (innermost and i == axis):
            if word(sizes, i) != 1 and word(strides, i) != step:
                return False
            step *= word(sizes, i)
    return True


@njit(**INLINE)
def ready_for_tensors(table, family, x, target):
    """`made_ready` for these tensors, if they are as the family's."""
    axis, n_axes = word(family, abi.CLASS_AXIS), word(family, abi.N_AXES)
    innermost, soft = word(family, abi.INNERMOST) != 0, word(family, abi.SOFT) != 0
    if not is_dense(table, x, n_axes, axis, innermost):
        return abi.NOT_THERE
    if not is_dense(table, target, n_axes if soft else n_axes - 1, axis, innermost and soft):
        return abi.NOT_THERE
    sizes = told(table, abi.TENSOR_SIZES, x)
    if not has_rows(family, sizes, told(table, abi.TENSOR_SIZES, target)):
        return abi.NOT_THERE
    return ready_for(family, sizes)


@njit(**INLINE)
def bytes_of(slot, block, itemsize):
    """Of an operand, but for the class weights: they are of a number of classes."""
    n_rows, n_classes = word(block, PLANNED), word(block, PLANNED + 1)
    if slot == X or slot == T:
        return n_rows * n_classes * itemsize
    return n_rows * itemsize if slot == Y or slot == U else 0


@njit(**INLINE)
def element(table, tensor, nbytes, itemsize):
    """The address of a tensor's first element; 0 if from there on so many bytes are not in its memory."""
    handle, found = tensor + word(table, abi.HANDLE), table + 8 * abi.FOUND
    failed = call_with(word(table, abi.DATA_PTR), handle, found)
    at = word(found, 0)
    if nbytes > 0:
        failed |= call_with(word(table, abi.STORAGE_SIZE), handle, found)
        size = word(found, 0)
        failed |= call_with(word(table, abi.STORAGE_OFFSET), handle, found)
        if size < word(found, 0) * itemsize + nbytes:
            return 0
    return at if failed & abi.LOW_HALF == 0 else 0


@njit(**INLINE)
def ran(table, args, n_args):
    given, call, team = word(word(args, 0), abi.DATA), word(word(args, 1), abi.DATA), argument(table, args, 2)
    block, nothing, of_family = given, word(table, abi.NOTHING), word(call, abi.OF_FAMILY) != 0
    if of_family:
        x, y = word(args, 4), word(args, 6)
        useful = ready_for_tensors(table, given, x, word(args, 7) if y == nothing else y)
        if useful < 0:
            return useful
        block, team = given + 8 * abi.FAMILY, min(team, useful)
    loss = element(table, word(args, 3), 0, 1)
    if loss == 0:
        return abi.NOT_THERE
    operand = call + 8 * abi.FIRST_OPERAND
    for nth in range(4, n_args):
        tensor, at = word(args, nth), 0
        if tensor != nothing:
            slot, nbytes, itemsize = word(operand, 0), word(operand, 1), word(operand, 2)
            if of_family and slot != W:
                nbytes = bytes_of(slot, block, itemsize)
            at = element(table, tensor, nbytes, itemsize)
            if at == 0:
                return abi.NOT_THERE
        set_word(block, word(operand, 0), at)
        operand += 8 * abi.OPERAND
    n_narrow, wide = word(call, abi.N_NARROW), word(call, abi.WIDE_AT)
    if n_narrow > 0:
        narrow = word(block, W)
        for c in range(n_narrow):
            set_word(wide, c, float64(narrow_number(narrow, c)))
        set_word(block, W, wide)
    good = run(table, block, team)
    if word(call, abi.IS_DOUBLE) != 0:
        set_word(loss, 0, loss_of(block))
    else:
        set_word(loss, 0, float32(loss_of(block)))
    return int(good)


def answer(self, args, n_args):
    """Python's ``answer(team, logits, target, out, axis, ignore_index, label_smoothing, reduction)``: the loss, or False.

    ``self`` is the table's array. False: no entry has these options, and arrays like these; or a class index is
    out of range. Where the table says that no gradient is written, ``out`` may be any array.
    """
    return answered(word(self, abi.DATA), args)


def run_on(self, args, n_args):
    """Python's ``run_on(block, call, team, loss, x, g, y, ...)``: two arrays, a number, tensors, or None where there is none.
    1: the loss has been written; 0: a class index is out of range; or ``NOT_THERE``, ``NOT_MET``.

    ``self`` is the table's array; ``call`` says which operands these are, those that may be left out last, and whether
    ``block`` is a family's array.
    """
    return call_with(word(word(self, abi.DATA), abi.TO_INT), ran(word(self, abi.DATA), args, n_args))
