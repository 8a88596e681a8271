"""Runs a task whose argument block is ready.

The GIL is held for work of less than about 100 us: it makes the block and the tiles nobody else's, and to get it back from a
thread that computes in Python takes up to 5 ms. Longer work releases it, so that other threads go on. Then the task's address
is in a place that everybody looks at: its block is in use, and there is one such task at a time, which has tiles of its own.
"""

from fastxent._abi import argument_block as abi
from fastxent._fastpath.front_end import words
from fastxent._fastpath.front_end.memory import call_with, clear, number, set_word, word
from fastxent._simd.numba_backend import inlined

ROUND, OWN_NUMBER, TEAM, TILES, PLANNED = (abi.SLOT[name] for name in ("round", "thread_number", "team", "tiles", "n_rows"))
SUM, BAD_AT, DIVISOR_AT = (
    (abi.BLOCK.size + offset) // 8 for offset in (8 * abi.WORK, abi.BAD, abi.DIVISOR)
)  # behind the block: see ``run``
# A row takes as long as so many of its logits, for its logarithm.
ROW = 12


@inlined
def released(process):
    """The task that another thread runs without the GIL, or 0."""
    return word(word(process, words.RELEASED_AT), 0)


@inlined
def is_long(task, block):
    n_rows, n_classes = word(block, PLANNED), word(block, PLANNED + 1)
    return n_rows * (n_classes + ROW) > word(task, words.MOST_HELD)


@inlined
def launch(process, block, team):
    if team > 1:
        call_with(word(process, words.PARALLEL), word(process, words.LAUNCH), block, team, 0)
    else:
        call_with(word(process, words.LAUNCH), block)


@inlined
def run(process, task, team):
    """Run a task, whose operands are in its block, on so many threads. 1: done; 0: a class index is out of range, and nothing
    has been written; ``NOT_THERE``: it would have to wait for another one."""
    block = word(task, words.BLOCK_AT)
    alone = is_long(task, block)
    if alone and released(process) != 0:
        return words.NOT_THERE
    clear(block)
    set_word(block, ROUND, word(block, ROUND) + abi.PHASES)
    set_word(block, BAD_AT, 0.0)
    set_word(block, TEAM, team)
    set_word(block, OWN_NUMBER, word(process, words.THREAD_NUMBER) if team > 1 else 0)
    set_word(block, TILES, word(process, words.RELEASED_TILES if alone else words.HELD_TILES))
    if alone:
        set_word(word(process, words.RELEASED_AT), 0, task)
        thread = call_with(word(process, words.SAVE_THREAD))
        launch(process, block, team)
        call_with(word(process, words.RESTORE_THREAD), thread)
        set_word(word(process, words.RELEASED_AT), 0, 0)
    else:
        launch(process, block, team)
    return 1 if number(block, BAD_AT) == 0.0 else 0


@inlined
def loss_of(block):
    return number(block, SUM) / number(block, DIVISOR_AT)
