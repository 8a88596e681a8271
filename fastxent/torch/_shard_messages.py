"""What processes that hold shards of the classes say to one another: two all-reduces, and an error in all of them if in one.

The first message is a maximum over the processes. Beside the maxima of the rows it says whether a process has an error, what
all have to pass alike, the range of the targets and the sizes of the shards. So nobody waits for one that has given up.

Its length must be the same everywhere before the processes have compared their numbers of rows: after an all-reduce of unequal
lengths gloo ends a process, waits, or returns wrong numbers (benchmarks/LOG.md#classes-sharded-over-processes). So it has room
for as many rows as the group's largest call so far, which all of them know, and for 1024 at least. A call with more rows sends
the rest in a message of its own, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist

from fastxent._runtime.arguments import Array

ROOM = 1024  # rows: 8 KB, which take gloo hardly longer than an empty message


class Alike(NamedTuple):
    """What the processes of a group have to pass alike, as numbers."""

    n_rows: float
    target_checksum: float
    sample_weight_checksum: float
    has_weight: float
    reduction: float  # none 0, mean 1, sum 2
    ignore_index: float
    label_smoothing: float
    z_loss: float
    input_requires_grad: float  # of a linear layer, whose backward then sends a message


@dataclass
class _Memory:
    """What a process remembers of a group."""

    room: int = ROOM  # for how many rows the first message has room; the same in all processes
    starts: dict[int, int] = field(default_factory=dict)  # by the size of this process's shard: its first class, the last time


_memories: WeakKeyDictionary[dist.ProcessGroup, _Memory] = WeakKeyDictionary()


def _memory(group: dist.ProcessGroup) -> _Memory:
    return _memories.setdefault(group, _Memory())


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group, or that of all processes for None."""
    if dist.get_rank(group) < 0:  # raises an error if there is no group of all processes
        raise ValueError("this process is not in the group")
    return dist.group.WORLD if group is None else group  # type: ignore[return-value]


def expected_start(group: dist.ProcessGroup, size: int) -> int:
    """Return the first class of this process's shard if the shards are as they were the last time."""
    return _memory(group).starts.get(size, 0)


@contextmanager
def errors_in_all(group: dist.ProcessGroup) -> Iterator[None]:
    """Let all processes raise an error if one raises one in here; those in which nothing goes wrong go on to `agree`."""
    try:
        yield
    except Exception:
        n_ranks = dist.get_world_size(group)
        nothing = np.full(2 * len(Alike._fields) + 2, -np.inf)
        _first_message(group, True, nothing, np.zeros(n_ranks), np.zeros(n_ranks), np.empty(0))
        raise


def agree(
    group: dist.ProcessGroup, alike: Alike, y: Array, size: int, vocab_start: int | None, m: Array
) -> tuple[int, int, Array]:
    """Return the first class of this shard, the number of classes of all shards, and the maxima of the rows over all of them.

    ``y``: the class indices of the rows that are not ignored; ``m``: the maxima of all rows over this shard.
    """
    rank, n_ranks, memory = dist.get_rank(group), dist.get_world_size(group), _memory(group)
    sizes, starts = np.zeros(n_ranks), np.full(n_ranks, -1.0)
    sizes[rank], starts[rank] = size, -1.0 if vocab_start is None else vocab_start
    common, targets = np.array(alike), np.array([float(y.max(initial=-1)), -float(y.min(initial=0))])
    failed, compared, sizes, starts, top = _first_message(
        group, False, np.concatenate([common, -common, targets]), sizes, starts, m[: memory.room]
    )
    if failed[0]:
        raise RuntimeError("cross_entropy: the arguments of another process of the group do not fit, and it raises an error")
    high, low, targets = np.split(compared, [len(alike), 2 * len(alike)])
    _check_targets(targets, int(sizes.sum()))
    for name, largest, smallest in zip(Alike._fields, high, -low, strict=True):
        if largest != smallest:
            raise ValueError(f"{name} must be the same in all processes of the group, and is {smallest:.17g} to {largest:.17g}")
    first = np.cumsum(sizes) - sizes
    if ((starts >= 0) & (starts != first)).any():
        given, right = (list(map(int, a)) for a in (starts, first))
        raise ValueError(f"vocab_start is {given} in the order of the ranks; by the sizes of the shards it is {right}")
    if len(m) > memory.room:
        (rest,) = all_reduced(group, dist.ReduceOp.MAX, [m[memory.room :]])
        top, memory.room = np.concatenate([top, rest]), len(m)
    memory.starts[size] = int(first[rank])
    return int(first[rank]), int(sizes.sum()), top[: len(m)]


def _check_targets(targets: Array, n_classes: int) -> None:
    largest, smallest = int(targets[0]), -int(targets[1])
    if largest >= n_classes or smallest < 0:
        raise IndexError(f"Target {largest if largest >= n_classes else smallest} is out of bounds.")


def _first_message(
    group: dist.ProcessGroup, failed: bool, compared: Array, sizes: Array, starts: Array, m: Array
) -> list[Array]:
    rows = np.full(_memory(group).room, -np.inf)
    rows[: len(m)] = m
    return all_reduced(group, dist.ReduceOp.MAX, [np.array([float(failed)]), compared, sizes, starts, rows])


def all_reduced(group: dist.ProcessGroup, op: Any, parts: list[Array]) -> list[Array]:
    """Return arrays, reduced over the processes in one message."""
    message = np.concatenate(parts)
    dist.all_reduce(torch.from_numpy(message), op, group)
    return np.split(message, np.cumsum([len(part) for part in parts[:-1]]))
