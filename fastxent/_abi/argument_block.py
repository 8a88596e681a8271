"""The argument block of a kernel: one contract, read by the kernels (as a Numba type) and written by ``run``.

It consists of 8-byte slots: the counters that the threads of a team share, then the arguments in the order below.
C is the extent of the class axis; all other axes are row axes. Strides and steps are bytes, pointers are addresses.
"""

import struct
from typing import NamedTuple

# The phases of a launch, in this order: check the class indices, reduce the segments of split rows, do the work.
CHECK, SEGMENTS, WORK = range(3)
PHASES = 3
# Slots of the counters: threads that have begun, and chunks done in each phase, each on its own cache line (8 slots); then
# whether a phase is over, one slot a phase.
ENTERED, DONE, OVER = 0, 8, 32
# Bytes of the record of a chunk, and of a segment. Each has a cache line of its own, for transferring a line from another core
# takes as long as some hundred logits.
LINE = 64
# Byte offsets in ``total``, after a sum for each phase: whether a class index is out of range; the gradient's divisor.
BAD, DIVISOR = 24, 32

# The run and its threads: (name, kind)
RUN = (
    ("round", "int"),  # number of this run's first phase, counted over all runs of the process
    ("thread_number", "int"),  # address of the OpenMP runtime's function that returns the thread's number, or 0
    ("team", "int"),  # number of threads
)
# Addresses of a call's arrays
OPERANDS = (
    ("x", "x"),  # (rows, C) in: logits
    ("g", "g"),  # (rows, C) out: gradient, or (log-)probabilities; may be x
    ("h", "g"),  # (rows, C) out: Hessian diagonal, with the strides of g
    ("t", "t"),  # (rows, C) in: class probabilities
    ("y", "i64"),  # (rows,) in: class indices
    ("w", "weight"),  # (C,) in: class weights
    ("u", "weight"),  # (rows,) in: sample weights, or the incoming gradient of log p_y; pointwise: of the positive class
    ("loss", "acc"),  # (rows,) out
    ("tiles", "acc"),  # (threads, TILE bytes) scratch
)


class Planned(NamedTuple):
    """The arguments that the plan gives."""

    n_rows: int
    n_classes: int
    n_vectors: int  # vectors of a unit: see ``addressing``
    n_units: int  # a unit is one row, or up to 16 rows of one line of the innermost row axis, or a segment of a row
    units_per_line: int
    panel: int  # units that are copied to the tile together
    chunk: int  # units handed out at a time
    segment: int  # vectors of a segment of a split row
    n_segments: int
    n_axes: int
    x_step: int  # bytes from a unit's vector j to vector j + 1 in x; the same in g and t:
    g_step: int
    t_step: int


PLANNED = tuple((name, "int") for name in Planned._fields)
# The other arguments of a call
CALLED = (
    ("check", "int"),  # address of the kernel that checks the class indices, or 0
    ("save_segment", "int"),  # address of the kernel that reduces the segments of split rows, or 0
    ("kernel", "int"),  # address of the kernel that does the work
    ("axes", "i64"),  # (n_axes, 5) in: extent, strides in x, g, t, rows; innermost first
    ("partial", "f64"),  # (n_chunks,) out, LINE bytes apart: sum of each chunk
    ("taken", "i64"),  # (n_chunks,) in/out, LINE bytes apart: number of the last phase in which a thread took this chunk
    ("segments", "f64"),  # (n_units, 7) in/out, LINE bytes apart: sums and x_y of the segments of split rows
    ("total", "f64"),  # (5,) out: a sum for each phase (weights of the kept rows, 0, losses); in/out: see BAD, DIVISOR
    ("v", "weight"),  # (rows,) in: incoming gradient of the entropy; class shards: log s, out, or the maximum, in
    ("b", "weight"),  # (rows,) class shards: D, out, or the factor of the smoothed target's term, in
    ("g_y", "weight"),  # (rows,) in, class shards: the gradient at the class index
    ("lse", "acc"),  # (rows,) out; class shards: the maximum
    ("sign", "acc"),  # (rows,) out: sign of the sum whose logarithm is lse
    ("entropy", "acc"),  # (rows,) out
    ("target_prob", "acc"),  # (rows,) out
    ("prediction", "i64"),  # (rows,) out
    ("target_rank", "i64"),  # (rows,) out
    ("weighted", "int"),  # whether there is a w
    ("sampled", "int"),  # whether there is a u
    ("w_period", "int"),  # a pointwise task: w repeats after so many elements; 16 more than that are stored
    ("u_period", "int"),  # the same for u
    ("store_loss", "int"),  # whether there is a loss array
    ("non_temporal", "int"),  # whether g may be written by non-temporal stores
    ("ignore", "int"),  # class index of the rows to skip
    ("confidence", "float"),  # 1 - eps
    ("uniform", "float"),  # eps / C
    ("factor", "float"),  # the gradient is multiplied by factor / divisor
    ("average", "int"),  # with class indices: whether the gradient is divided by the sum of the kept rows' weights
    ("hessian_factor", "float"),  # the Hessian diagonal is multiplied by it
    ("z", "float"),  # factor of lse^2 in the loss
    ("cap", "float"),  # softcap
    ("gamma", "float"),  # exponent of the focal loss
    ("temperature", "float"),  # the logits are divided by it
    ("sched_yield", "int"),  # address of the system's function by which a waiting thread yields its core, or 0
)
FIELDS = RUN + OPERANDS + PLANNED + CALLED
# Values of fields that are not given
DEFAULTS = dict.fromkeys((name for name, _ in FIELDS), 0) | {
    "confidence": 1.0, "factor": 1.0, "hessian_factor": 1.0, "temperature": 1.0, "w_period": 1, "u_period": 1,
}  # fmt: skip
FIRST_SLOT = OVER + 8
SLOT = {name: FIRST_SLOT + nth for nth, (name, _) in enumerate(FIELDS)}
_ZEROS = f"={8 * FIRST_SLOT}x"  # the counters start at 0
BLOCK = struct.Struct(_ZEROS + "".join("d" if kind == "float" else "q" for _, kind in FIELDS))
START, START_ALONE = struct.Struct(_ZEROS + "3q"), struct.Struct(_ZEROS + "3q9q")  # RUN, and OPERANDS too
TOTAL = struct.Struct("=16x3d")  # sum of the losses, BAD, DIVISOR
