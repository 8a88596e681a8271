"""Calls that come again: the checks of a small one cost more than its work, so arrays that look as checked ones did pass.

Those that are not large, and C-contiguous, are recognised by a builtin function (``fastcall``) in a tenth of a microsecond,
whatever their extents; all others, of extents that were met before, in some microseconds by Python. Class indices are never
taken on trust: the task checks them, before it writes anything.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
from numpy import float32, float64, ndarray

from fastxent._fastpath import table as _builtin
from fastxent._runtime.arguments import Array, Problem, address, new_gradient
from fastxent._runtime.plan import MOST_DIRECT, WORTH_A_THREAD, Plan, over
from fastxent._runtime.run import PackedTask


class Known(NamedTuple):
    """A kind of call that was met before."""

    task: PackedTask
    loss: type[np.floating[Any]]
    x_bytes: int
    y_bytes: int
    axis: int


known_calls: dict[tuple[Any, ...], Known] = {}
MOST_KNOWN = 4096
_tables: dict[str, _builtin.Table | None] = {"value": None, "value_and_grad": None}
_entering = threading.Lock()


def has_constant_options(options: tuple[Any, ...]) -> bool:
    """Will they compare as they do now? A tensor's number may change."""
    return all(type(option) in (int, float, str) or isinstance(option, np.generic) for option in options)


def _kind_of(name: str, logits: Array, target: Array, out: Array | None, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that the checks depend on. The types are there because True == 1 == 1.0."""
    axis, ignore, smoothing, _ = options
    return (
        name, logits.shape, logits.strides, logits.dtype, target.shape, target.strides, target.dtype,
        None if out is None else (out is logits or (out.shape, out.strides, out.dtype), out.flags.writeable),
        options, type(axis), type(ignore), type(smoothing),
    )  # fmt: skip


def recall(
    name: str, logits: object, target: object, out: object, options: tuple[Any, ...], n_threads: int | None
) -> tuple[Any, Any] | None:
    """Loss, and gradient if ``name`` is "value_and_grad"; None where all has to be checked.

    ``options``: axis, ignore_index, label_smoothing, reduction.
    """
    if type(logits) is not ndarray or type(target) is not ndarray or (out is not None and type(out) is not ndarray):
        return None
    table = _tables[name]
    if n_threads is not None and (type(n_threads) is not int or n_threads < 1):
        return None
    if table is not None and logits.nbytes <= MOST_DIRECT:
        small = logits.size < WORTH_A_THREAD
        if small:
            team = 1
        else:
            team = table.team(n_threads) if logits.flags.c_contiguous else 0
        if team > 0:
            place = logits if name == "value" else out
            if place is None:
                place = np.empty_like(logits) if small else new_gradient(logits, 0)
            loss = table.answer(team, logits, target, place, *options)
            if loss is not False:
                return (float64 if logits.itemsize == 8 else float32)(loss), place
            del place  # if it is new: it would be there beside the next one
    try:
        known = known_calls[_kind_of(name, logits, target, out, options)]
    except (KeyError, TypeError):  # TypeError: an option of a type that has no hash
        return None
    g = out
    if out is None and name == "value_and_grad":
        g = np.empty_like(logits) if known.task.alone else new_gradient(logits, known.axis)
    x_at, y_at = address(logits), address(target)
    g_at = x_at if g is None or g is logits else address(g)
    if out is not None:
        g_end = g_at + known.x_bytes
        if (g_at != x_at and g_at < x_at + known.x_bytes and x_at < g_end) or (g_at < y_at + known.y_bytes and y_at < g_end):
            return None  # memory is shared
    total, bad, divisor = known.task(x_at, g_at, y_at, n_threads)
    return None if bad else (known.loss(over(total, divisor)), g)


def remember(
    name: str, p: Problem, logits: object, target: object, out: Array | None, g: Array | None, options: tuple[Any, ...]
) -> None:
    """Know this call again, if its arrays were taken as they are and lie in one piece."""
    x = p.x
    if (
        x is not logits
        or x.size == 0
        or p.y is None
        or type(x) is not np.ndarray
        or type(target) is not np.ndarray
        or target.dtype != np.int64
        or not (target.dtype.isnative and target.flags.c_contiguous and x.flags.forc)
        or not (g is None or g is out or (out is None and g.strides == x.strides))
        or not (g is None or g.flags.forc)
        or not has_constant_options(options)
    ):
        return
    plan = p.plan(name, g)
    if plan.variant.large:  # it has more to pack, and takes longer anyway
        return
    if len(known_calls) >= MOST_KNOWN:
        known_calls.clear()
    average = options[-1] == "mean"
    task = PackedTask(name, plan, average=average, **p.numbers)
    known_calls[_kind_of(name, x, target, out, options)] = Known(task, p.acc.type, x.nbytes, target.nbytes, p.axis)
    if task.direct and x.flags.c_contiguous and (g is None or g.flags.c_contiguous):
        _enter(name, plan, p, target, options, average)


def _enter(name: str, plan: Plan, p: Problem, target: Array, options: tuple[Any, ...], average: bool) -> None:
    """Let the builtin know it too. Who comes while another enters, perhaps in a signal handler, does without."""
    if _entering.acquire(blocking=False):
        try:
            table = _tables[name] or _builtin.table(writes=name == "value_and_grad")
            if table is not None:
                table.enter(name, plan, p.axis, p.x, target, options, smoothing=p.smoothing, average=average, **p.numbers)
                _tables[name] = table
        finally:
            _entering.release()
