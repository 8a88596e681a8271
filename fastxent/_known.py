"""Calls that come again: the checks of a small one cost more than its work, so arrays that look as checked ones did pass.

Small ones, C-contiguous, are recognised by a builtin function (``_direct``) in a tenth of a microsecond, all others in some
microseconds by Python. Class indices are never taken on trust: the task checks them, before it writes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy import float32, float64, ndarray

from fastxent import _builtin
from fastxent._parallel import WORTH_A_THREAD, PackedTask
from fastxent._plan import over
from fastxent._task import MOST_AXES
from fastxent._validate import Array, Problem, address, new_gradient


class _Known(NamedTuple):
    task: PackedTask
    loss: type[np.floating[Any]]
    x_bytes: int
    y_bytes: int
    axis: int


_known: dict[tuple[Any, ...], _Known] = {}
MOST_KNOWN = 4096


def _no_answer(*_: object) -> bool:
    return False


# The builtins ``answer``, and the tables that they read; made when there is something to know.
_answers: dict[str, Callable[..., Any]] = {"value": _no_answer, "value_and_grad": _no_answer}
_tables: dict[str, _builtin.Table | None] = {}


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
    if n_threads is None and logits.size < WORTH_A_THREAD:
        place = logits if name == "value" else np.empty_like(logits) if out is None else out
        loss = _answers[name](logits, target, place, *options)
        if loss is not False:
            return (float64 if logits.itemsize == 8 else float32)(loss), place
    if n_threads is not None and (type(n_threads) is not int or n_threads < 1):
        return None
    try:
        known = _known[_kind_of(name, logits, target, out, options)]
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
    ):
        return
    plan = p.plan(g)
    if plan.variant.large:  # it has more to pack, and takes longer anyway
        return
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    task = PackedTask(name, plan, average=options[-1] == "mean", **p.numbers)
    _known[_kind_of(name, x, target, out, options)] = _Known(task, p.acc.type, x.nbytes, target.nbytes, p.axis)
    if task.small and x.flags.c_contiguous and (g is None or g.flags.c_contiguous) and x.ndim <= MOST_AXES:
        if name not in _tables:
            _tables[name] = _builtin.table(writes=name == "value_and_grad")
        if (table := _tables[name]) is not None:
            table.enter(task, x, target, options)
            _answers[name] = table.answer
