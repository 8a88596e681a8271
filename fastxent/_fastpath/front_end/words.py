"""What the machine code reads and writes, in words of 8 bytes: one contract, kept by ``builtins`` and ``tasks`` in Python.

All are integers, but for SMOOTHING, a float64. "_AT" is an address.
"""

# The process: one for all calls. Where PyTorch has no C interface, the words from TENSOR_HANDLE on are 0.
(
    LAUNCH,  # the kernel that runs an argument block
    PARALLEL,  # the OpenMP runtime's function that runs another in a team, and that which tells a thread's number there
    THREAD_NUMBER,
    HELD_TILES,  # tiles of the one who holds the GIL
    RELEASED_TILES,  # and of the one whose task runs without it
    RELEASED_AT,  # where that task's address is, or 0: one at a time
    SAVE_THREAD,  # functions of CPython
    RESTORE_THREAD,
    BAD_ARGUMENT,
    TO_FLOAT,
    TO_BOOL,
    TO_INT,
    FROM_INT,
    TUPLE_SIZE,
    TUPLE_ITEM,
    TUPLE_TYPE,  # objects
    NDARRAY_TYPE,
    NOTHING,
    TENSOR_HANDLE,  # bytes from a tensor's object to its handle, and PyTorch's functions that take it
    DATA_PTR,
    STORAGE_SIZE,
    STORAGE_OFFSET,
    DIM,
    SIZES,
    STRIDES,
    FOUND,  # what they write
) = range(26)
PROCESS = 26

# A task: the address of its argument block; work, as ``launch.is_long`` counts it, up to which the GIL is held; is it a family,
# whose extents may change?; if not, how many threads have something to do. A family has besides: number of axes; the class
# axis; do the classes lie innermost (else as in C order)?; bytes of a logit; are there class probabilities?; is their loss
# averaged?; number of class weights, or 0; label smoothing; number of kernels; ``plan.Traits``
BLOCK_AT, MOST_HELD, IS_FAMILY, USEFUL = range(4)
N_AXES, CLASS_AXIS, INNERMOST, SIZE, SOFT, AVERAGED, N_WEIGHTS, SMOOTHING, N_KERNELS, TRAITS = range(4, 14)
N_TRAITS = 7
AXES = TRAITS + N_TRAITS  # the row axes' table, of two axes at most
# Of each kernel its number, that of its segments, itself
KERNELS, MOST_KERNELS, KERNEL = AXES + 2 * 5, 16, 3
TASK = KERNELS + MOST_KERNELS * KERNEL  # behind it lies a family's argument block
ROOM = 1024  # chunks, and segments, that there is room for behind that

# A call, which is a builtin's ``self``, has the addresses of the process and of its task. With arrays: dtypes of logits and
# class indices; is a gradient written?; types of the options
PROCESS_AT, TASK_AT = range(2)
X_DTYPE, Y_DTYPE, WRITES, OPTION_TYPES, N_OPTIONS = 2, 3, 4, 5, 4
ARRAYS_CALL = OPTION_TYPES + N_OPTIONS
# With tensors: is its loss a float64?; how many class weights are float32, and where they go as float64; number of operands; of
# each its slot in the block, bytes that must be there, those of an element
IS_DOUBLE, N_NARROW, WIDE_AT, N_OPERANDS, OPERANDS, OPERAND = 2, 3, 4, 5, 6, 3

# What a call that has not been run says: its operands are not as they must be, or the task is in use; its family has no kernel
# for these extents.
NOT_THERE, NOT_MET = -1, -2
