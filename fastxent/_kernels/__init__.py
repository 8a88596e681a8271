"""The kernels: loss and gradient of many softmaxes, a few rows at a time.

Class lanes, for many classes that are contiguous in memory: the 16 lanes of a vector hold 16 classes of one row.

    logits   vector 0   vector 1        last vector
            +----------+----------+- -+--------+
    row 0   | 0 ... 15 | 16 .. 31 |...| .. C-1 |  unit 0 |
    row 1   | 0 ... 15 | 16 .. 31 |...| .. C-1 |  unit 1 | chunk 0
    row 2   | 0 ... 15 | 16 .. 31 |...| .. C-1 |  unit 2 |
    row 3   | 0 ... 15 | 16 .. 31 |...| .. C-1 |  unit 3   chunk 1 ...

Row lanes, for fewer classes, or rows that are contiguous in memory: the 16 lanes of a vector hold one class of 16 rows. Short
rows are packed into a tile first, so that all vectors of a unit lie together.

    logits                                     tile       lane 0    lane 1         lane 15
            +----------------+                           +---------+---------+- -+---------+
    row 0   | 0, 1, ..., C-1 | |               vector 0  | row 0   | row 1   |...| row 15  |  class 0
    row 1   | 0, 1, ..., C-1 | | unit 0   ->   vector 1  | row 0   | row 1   |...| row 15  |  class 1
    ...                        | (packed)      ...
    row 15  | 0, 1, ..., C-1 | |               last      | row 0   | row 1   |...| row 15  |  class C-1
    row 16  | 0, 1, ..., C-1 |   unit 1        vector    +---------+---------+- -+---------+

row, class            one softmax; one of its C logits
vector, lane          the 16 numbers that one operation works on; one of them
class lanes           the lanes of a vector hold 16 classes of one row
row lanes             the lanes of a vector hold one class of 16 rows
unit                  what one kernel step works on: a row (class lanes), up to 16 rows (row lanes), or a segment
chunk                 the units that a thread takes at a time
kept rows             rows that are not ignored
tile                  scratch memory of a thread: 16 rows, class by class, or a panel, or the exponentials of a long row
packed                copied to the tile before the unit is worked on: transposed, gathered, or in a panel
transposed rows       16 rows of contiguous classes that are packed by transposing them in registers, a square at a time
panel                 up to 16 units of rows that are contiguous in memory, packed together plane by plane (a plane: one class)
split row, segment    a long row that threads share; the range of its vectors that is one unit
label                 a row's class index y, with its logit x_y and class weight w_y
first, second trip    the walk over a unit's vectors that finds their statistics; the one that writes the gradient
statistics            the maximum m and the sums s, Q, D, E of a row, or of some of its vectors (``State``)
empty, rescale, merge online softmax: statistics of no class; make them those for a larger maximum; combine those of two ranges
compensated sum       a sum that carries what rounding loses in a second number, found by ``two_sum``
stored exponentials   exp(x - m), stored in the tile or in the gradient's place from the first trip to the second
paired                two units are interleaved, so that one is computed while the other waits for a result
software-pipelined    one row is computed while the row before is written and the next is read; panels are overlapped likewise
part                  a range of a very long software-pipelined row that has a maximum of its own, and is rescaled in the end
prefetch              a request to load a cache line before it is needed
non-temporal store    a store that bypasses the caches, for a gradient that is larger than they are

The first trip (``reduce``) finds a unit's statistics (``online_softmax``, ``compensated_sums``). A loss (``losses``) turns them
into its value and into the coefficients of the gradient, which the second trip (``gradient``) writes. ``steps`` does so for one
unit, ``schedules`` for several at a time, and ``parallel_for`` hands units to threads; ``tasks`` says which loss and which
schedule a kernel consists of, and ``entry`` is what a thread runs. ``inputs`` reads logits and targets, ``addressing`` finds
rows in memory, ``row_tiles`` and ``plane_tiles`` pack them, ``stored_exponentials`` writes and reads what the first trip leaves
to the second, ``split_rows`` merges segments, and ``row_pipeline`` and ``prefetch`` keep memory and arithmetic busy at once.

``_abi`` and ``_simd`` may be imported here. Begin with ``losses.cross_entropy``, then ``steps``.
"""
