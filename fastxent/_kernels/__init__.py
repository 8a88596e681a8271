"""The kernels: loss and gradient of some rows at a time.

    a matrix of logits      class lanes: 16 classes of one row      row lanes: one class of 16 rows
    +-----------------+     +----------------+--+                   +-+---
    | row 0           |     |################|..| row n             |#|    row n
    | row 1           |     +----------------+--+                   |#|    row n + 1
    | ...             |      vector 0, 1, ...                       |#|    ... 16 of them
    +-----------------+                                             +-+---

A **row** is one softmax. A **vector** is 16 **lanes**: 16 classes of one row (class lanes), or one class of 16 rows (row
lanes). A **unit** is what one kernel step works on: a row (class lanes), 16 rows (row lanes), or a **segment** of a row that
threads share (a split row). A **chunk** is as many units as a thread takes at a time. A **tile** is scratch memory of 16 rows,
class by class, into which short rows are transposed or packed and in which exponentials are stored; a **panel** is 16 such
tiles, of rows whose classes lie planes apart.

The first trip (``reduce``) gives a unit's maximum and sums (``online_softmax``). A loss (``losses``) turns the sums into its
value and into the coefficients of the gradient, which the second trip writes (``gradient``). ``steps`` does so with one unit,
``schedules`` with several at a time, ``parallel_for`` hands units to threads; ``tasks`` says which loss and which schedule a
kernel is made of, ``entry`` what a thread runs. ``inputs`` reads logits and targets, ``addressing`` finds rows in memory,
``row_tiles`` and ``plane_tiles`` pack them, ``split_rows`` merges segments, ``row_pipeline`` and ``prefetch`` keep memory and
arithmetic busy at once. ``_abi`` and ``_simd`` may be imported here. Begin with ``losses.cross_entropy``, then ``steps``.
"""
