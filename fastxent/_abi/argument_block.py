"""The argument block of a kernel: one contract, read by the kernels (as a Numba type) and written by ``run``.

8-byte slots: counters that the threads of a team share, each alone on its cache line, then the arguments in this order.
"axis" is the class axis, the others are the row axes; strides and steps are bytes, pointers are addresses.
"""

import struct
from typing import NamedTuple

# What is done one after the other: the class indices are checked, the statistics of split rows are taken, the work is done.
CHECK, SEGMENTS, WORK = range(3)
PHASES = 3
# Slots of the counters: threads at work; chunks done, 8 slots a phase; is a phase over?, a slot a phase.
ENTERED, DONE, OVER = 0, 8, 32
# Bytes of what is known about a chunk, and about a segment: alone on its cache line, for to take one from another core takes as
# long as some hundred logits.
LINE = 64
# Bytes from the beginning of ``total``, behind a sum for each phase: is a class index out of range?; the gradient's divisor.
BAD, DIVISOR = 24, 32

# Who runs it: (name, kind)
RUN = (
    ("round", "int"),  # number of this run's first phase, of all phases of all runs of the process
    ("thread_number", "int"),  # address of the OpenMP runtime's function that tells a thread's number, or 0
    ("team", "int"),  # number of threads
)
# Where the arrays of a call are
OPERANDS = (
    ("x", "x"),  # (rows, C) in: logits
    ("g", "x"),  # (rows, C) out: gradient, or (log-)probabilities; may be x
    ("h", "x"),  # (rows, C) out: Hessian diagonal, with the strides of g
    ("t", "t"),  # (rows, C) in: class probabilities
    ("y", "i64"),  # (rows,) in: class indices
    ("w", "weight"),  # (C,) in: class weights
    ("u", "weight"),  # (rows,) in: sample weights; a pointwise task: of the positive class
    ("loss", "acc"),  # (rows,) out
    ("tiles", "acc"),  # (threads, TILE bytes) scratch
)


class Planned(NamedTuple):
    """What the plan knows."""

    n_rows: int
    n_classes: int
    n_vectors: int  # of a unit: see ``addressing``
    n_units: int  # a unit: one row, or up to 16 rows of one line of the innermost row axis, or a segment of a row
    units_per_line: int
    panel: int  # units that are copied to the tile together
    chunk: int  # units handed out at a time
    segment: int  # vectors of a segment, where long rows are split
    n_segments: int
    n_axes: int
    x_step: int  # bytes from a unit's vector j to vector j + 1 in x ...
    g_step: int
    t_step: int


PLANNED = tuple((name, "int") for name in Planned._fields)
# What else one call knows
CALLED = (
    ("check", "int"),  # address of the kernel that checks the class indices, or 0
    ("save_segment", "int"),  # of the one that takes the statistics of split rows, or 0
    ("kernel", "int"),  # and of the one that does the work
    ("axes", "i64"),  # (n_axes, 5) in: extent, strides in x, g, t, rows; innermost first
    ("partial", "f64"),  # (n_chunks,) out, LINE bytes apart: sum of a chunk
    ("taken", "i64"),  # (n_chunks,) in/out, LINE bytes apart: number of the last phase in which a thread took this chunk
    ("segments", "f64"),  # (n_units, 6) in/out, LINE bytes apart: statistics of the segments of split rows
    ("total", "f64"),  # (5,) out: sum of the kept rows' weights, of nothing, of the losses; in/out: see BAD, DIVISOR
    ("v", "weight"),  # (rows,) in: what comes back for the entropy
    ("lse", "acc"),  # (rows,) out
    ("sign", "acc"),  # (rows,) out: of the sum whose logarithm lse is
    ("entropy", "acc"),  # (rows,) out
    ("target_prob", "acc"),  # (rows,) out
    ("prediction", "i64"),  # (rows,) out
    ("target_rank", "i64"),  # (rows,) out
    ("weighted", "int"),  # is there a w?
    ("sampled", "int"),  # is there a u?
    ("w_period", "int"),  # a pointwise task: after so many elements w begins again, and so it does for 16 more
    ("u_period", "int"),  # the same for u
    ("store_loss", "int"),  # is there a loss array?
    ("non_temporal", "int"),  # may g be written past the caches?
    ("ignore", "int"),  # class index of the rows to skip
    ("confidence", "float"),  # 1 - eps
    ("uniform", "float"),  # eps / C
    ("factor", "float"),  # the gradient is multiplied by factor / divisor
    ("average", "int"),  # with class indices: is the gradient divided by the sum of the weights of the rows that are kept?
    ("z", "float"),  # factor of lse^2 in the loss
    ("cap", "float"),  # softcap
    ("temperature", "float"),  # the logits are divided by it
    ("sched_yield", "int"),  # address of the system's function by which a thread that waits lets others run, or 0
)
FIELDS = RUN + OPERANDS + PLANNED + CALLED
# Of a field that nobody gives a value
DEFAULTS = dict.fromkeys((name for name, _ in FIELDS), 0) | {
    "confidence": 1.0, "factor": 1.0, "temperature": 1.0, "w_period": 1, "u_period": 1,
}  # fmt: skip
FIRST_SLOT = 40
SLOT = {name: FIRST_SLOT + nth for nth, (name, _) in enumerate(FIELDS)}
_ZEROS = f"={8 * FIRST_SLOT}x"  # the counters begin at 0
BLOCK = struct.Struct(_ZEROS + "".join("d" if kind == "float" else "q" for _, kind in FIELDS))
START, START_ALONE = struct.Struct(_ZEROS + "3q"), struct.Struct(_ZEROS + "3q9q")  # RUN; and the operands
TOTAL = struct.Struct("=16x3d")  # sum of the losses, BAD, DIVISOR
