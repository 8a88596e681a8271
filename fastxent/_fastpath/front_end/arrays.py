"""The builtin that takes NumPy's arrays."""

from fastxent._abi import argument_block as abi
from fastxent._fastpath.front_end import objects, words
from fastxent._fastpath.front_end.launch import loss_of, released, run
from fastxent._fastpath.front_end.memory import argument, call_with, set_word, word
from fastxent._fastpath.front_end.strategy import extents_but, has_rows, ready_for
from fastxent._simd.numba_backend import inlined

X, G, Y = (abi.SLOT[name] for name in ("x", "g", "y"))


@inlined
def is_array(process, array, dtype, n_axes, flags):
    """Is it an array with these flags, of this dtype and number of axes?"""
    if word(array, objects.TYPE) != word(process, words.NDARRAY_TYPE) or word(array, objects.FLAGS) & flags != flags:
        return False
    return word(array, objects.DTYPE) == dtype and word(array, objects.NDIM) & objects.LOW_HALF == n_axes


@inlined
def has_option_types(call, options):
    """Are the options, which equal those of the call, of the same types? True == 1 == 1.0."""
    for nth in range(words.N_OPTIONS):
        if word(word(options, nth), objects.TYPE) != word(call, words.OPTION_TYPES + nth):
            return False
    return True


@inlined
def may_write(family, logits, target, out):
    """May the gradient be written here? It has the logits' shape, and lies where they do, or apart from all that is read."""
    axis, n_axes, sizes = word(family, words.CLASS_AXIS), word(family, words.N_AXES), word(logits, objects.DIMS)
    for i in range(n_axes):
        if word(word(out, objects.DIMS), i) != word(sizes, i):
            return False
    n_rows = extents_but(sizes, axis, 0, n_axes)
    x_bytes = n_rows * word(sizes, axis) * word(family, words.SIZE)
    x, y, g = word(logits, objects.DATA), word(target, objects.DATA), word(out, objects.DATA)
    if g != x and g < x + x_bytes and x < g + x_bytes:
        return False
    return not (g < y + 8 * n_rows and y < g + x_bytes)


@inlined
def is_like(process, call, logits, target, out, options):
    """Is this a call like the stored one, but for the extents?"""
    family, flags = word(call, words.TASK_AT), objects.CONTIGUOUS_AND_ALIGNED
    n_axes, x_dtype = word(family, words.N_AXES), word(call, words.X_DTYPE)
    if not has_option_types(call, options):
        return False
    if not is_array(process, logits, x_dtype, n_axes, flags):
        return False
    if not is_array(process, target, word(call, words.Y_DTYPE), n_axes - 1, flags):
        return False
    if not has_rows(family, word(logits, objects.DIMS), word(target, objects.DIMS)):
        return False
    if word(call, words.WRITES) == 0:
        return True
    return is_array(process, out, x_dtype, n_axes, flags | objects.WRITEABLE) and may_write(family, logits, target, out)


@inlined
def ran(call, team, args):
    process, family = word(call, words.PROCESS_AT), word(call, words.TASK_AT)
    logits, target, out = word(args, 1), word(args, 2), word(args, 3)
    if released(process) == family or not is_like(process, call, logits, target, out, args + 8 * 4):
        return False
    useful, block = ready_for(family, word(logits, objects.DIMS)), word(family, words.BLOCK_AT)
    if useful < 0:
        return False
    set_word(block, X, word(logits, objects.DATA))
    set_word(block, Y, word(target, objects.DATA))
    set_word(block, G, word(out, objects.DATA))
    return run(process, family, min(useful, team)) == 1


def run_arrays(self, args, n_args):
    """Python's ``run(team, logits, target, out, axis, ignore_index, label_smoothing, reduction)``: the loss, or False.

    ``self`` is the array of a call with arrays: see ``words``. False: the arrays are not like those of the call, the options
    not of the same types (that they are equal is known), or a class index is out of range; or the task is in use. Where no
    gradient is written, ``out`` may be anything.
    """
    call = word(self, objects.DATA)
    process, team = word(call, words.PROCESS_AT), 0
    if n_args == 4 + words.N_OPTIONS:
        team = argument(word(process, words.FROM_INT), args, 0)
    if team < 1:
        call_with(word(process, words.BAD_ARGUMENT))
        return 0
    if not ran(call, team, args):
        return call_with(word(process, words.TO_BOOL), 0)
    family = word(call, words.TASK_AT)
    return call_with(word(process, words.TO_FLOAT), loss_of(word(family, words.BLOCK_AT)))
