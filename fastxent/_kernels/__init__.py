"""The kernels: loss and gradient of some rows at a time.

    a matrix of logits      class lanes: 16 classes of one row      row lanes: one class of 16 rows
    +-----------------+     +----------------+--+                   +-+---
    | row 0           |     |################|..| row n             |#|    row n
    | row 1           |     +----------------+--+                   |#|    row n + 1
    | ...             |      vector 0, 1, ...                       |#|    ... 16 of them
    +-----------------+                                             +-+---

A **row** is one softmax. A **vector** is 16 lanes. A **unit** is what one step works on: a row (class lanes), 16 rows
(row lanes), or a segment of a row that threads share. A **chunk** is as many units as a thread takes at a time. A
**tile** is scratch memory of 16 rows, class by class, into which short rows are transposed and in which exponentials are
kept.

``inputs`` derives the maths. The first trip (``reduce``) gives a unit's maximum and sums, the second one (``gradient``)
its gradient; ``steps`` says what each kernel does with a unit, ``schedules`` with several at once, ``parallel_for`` hands
units to threads. ``addressing`` finds rows in memory, ``row_tiles`` and ``plane_tiles`` fill and empty tiles,
``split_rows`` puts segments together, ``row_pipeline`` and ``prefetch`` keep memory and arithmetic busy at once;
``losses`` are no softmax of logits. ``_abi`` and ``_simd`` may be imported here. Begin with ``inputs``, then ``steps``.
"""
