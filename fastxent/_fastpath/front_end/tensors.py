"""The builtin that takes PyTorch's tensors."""

from numba import float32, float64

from fastxent._abi import argument_block as abi
from fastxent._fastpath.front_end import objects, words
from fastxent._fastpath.front_end.launch import PLANNED, loss_of, released, run
from fastxent._fastpath.front_end.memory import argument, call_with, narrow_number, set_word, word
from fastxent._fastpath.front_end.strategy import has_rows, ready_for
from fastxent._simd.numba_backend import inlined

X, T, Y, W, U = (abi.SLOT[name] for name in ("x", "t", "y", "w", "u"))


@inlined
def told(process, function, tensor):
    """What a function of PyTorch's C interface tells about a tensor; 0 if it fails."""
    found = process + 8 * words.FOUND
    failed = call_with(word(process, function), tensor + word(process, words.TENSOR_HANDLE), found)
    return word(found, 0) if failed & objects.LOW_HALF == 0 else 0


@inlined
def is_dense(process, tensor, n_axes, axis, innermost):
    """Is it in C order, or, if the classes lie innermost, are all other axes?"""
    if told(process, words.DIM, tensor) != n_axes:
        return False
    if n_axes == 0:
        return True
    sizes, strides, step = told(process, words.SIZES, tensor), told(process, words.STRIDES, tensor), 1
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


@inlined
def ready_for_tensors(process, family, x, target):
    """`made_ready` for these tensors, if they are as the family's."""
    axis, n_axes = word(family, words.CLASS_AXIS), word(family, words.N_AXES)
    innermost, soft = word(family, words.INNERMOST) != 0, word(family, words.SOFT) != 0
    if not is_dense(process, x, n_axes, axis, innermost):
        return words.NOT_THERE
    if not is_dense(process, target, n_axes if soft else n_axes - 1, axis, innermost and soft):
        return words.NOT_THERE
    sizes = told(process, words.SIZES, x)
    if not has_rows(family, sizes, told(process, words.SIZES, target)):
        return words.NOT_THERE
    return ready_for(family, sizes)


@inlined
def bytes_of(slot, block, itemsize):
    """Of an operand, but for the class weights: they are of a number of classes."""
    n_rows, n_classes = word(block, PLANNED), word(block, PLANNED + 1)
    if slot == X or slot == T:
        return n_rows * n_classes * itemsize
    return n_rows * itemsize if slot == Y or slot == U else 0


@inlined
def element(process, tensor, nbytes, itemsize):
    """The address of a tensor's first element; 0 if from there on so many bytes are not in its memory."""
    handle, found = tensor + word(process, words.TENSOR_HANDLE), process + 8 * words.FOUND
    failed = call_with(word(process, words.DATA_PTR), handle, found)
    at = word(found, 0)
    if nbytes > 0:
        failed |= call_with(word(process, words.STORAGE_SIZE), handle, found)
        size = word(found, 0)
        failed |= call_with(word(process, words.STORAGE_OFFSET), handle, found)
        if size < word(found, 0) * itemsize + nbytes:
            return 0
    return at if failed & objects.LOW_HALF == 0 else 0


@inlined
def set_operands(process, call, block, of_family, tensors, n_tensors):
    """Write where the operands are into the block; is each as long as it must be?"""
    operand, nothing = call + 8 * words.OPERANDS, word(process, words.NOTHING)
    for nth in range(n_tensors):
        tensor, at = word(tensors, nth), 0
        if tensor != nothing:
            slot, nbytes, itemsize = word(operand, 0), word(operand, 1), word(operand, 2)
            if of_family and slot != W:
                nbytes = bytes_of(slot, block, itemsize)
            at = element(process, tensor, nbytes, itemsize)
            if at == 0:
                return False
        set_word(block, word(operand, 0), at)
        operand += 8 * words.OPERAND
    n_narrow, wide = word(call, words.N_NARROW), word(call, words.WIDE_AT)
    if n_narrow > 0:
        narrow = word(block, W)
        for c in range(n_narrow):
            set_word(wide, c, float64(narrow_number(narrow, c)))
        set_word(block, W, wide)
    return True


@inlined
def ran(call, team, args, n_args):
    process, task = word(call, words.PROCESS_AT), word(call, words.TASK_AT)
    if released(process) == task:
        return words.NOT_THERE
    useful = word(task, words.USEFUL)
    of_family = word(task, words.IS_FAMILY) != 0
    if of_family:
        x, target = word(args, 2), word(args, 4)
        if target == word(process, words.NOTHING) and n_args > 5:
            target = word(args, 5)
        useful = ready_for_tensors(process, task, x, target)
        if useful < 0:
            return useful
    loss, block = element(process, word(args, 1), 0, 1), word(task, words.BLOCK_AT)
    if loss == 0 or not set_operands(process, call, block, of_family, args + 8 * 2, n_args - 2):
        return words.NOT_THERE
    done = run(process, task, min(team, useful))
    if done >= 0:
        if word(call, words.IS_DOUBLE) != 0:
            set_word(loss, 0, loss_of(block))
        else:
            set_word(loss, 0, float32(loss_of(block)))
    return done


def run_tensors(self, args, n_args):
    """Python's ``run(team, loss, x, g, y, t, w, u, losses)``: a number of threads, tensors, or None where there is none; from t
    on they may be left out. 1: the loss has been written; 0: a class index is out of range; or ``NOT_THERE``, ``NOT_MET``.

    ``self`` is the array of a call with tensors: see ``words``.
    """
    call = word(self, objects.DATA)
    process, team = word(call, words.PROCESS_AT), 0
    if 5 <= n_args and n_args <= 2 + word(call, words.N_OPERANDS):
        team = argument(word(process, words.FROM_INT), args, 0)
    if team < 1:
        call_with(word(process, words.BAD_ARGUMENT))
        return 0
    return call_with(word(process, words.TO_INT), ran(call, team, args, n_args))
