"""NumPy's calls: their keys, what is stored of them, and how they are run.

Arrays that are not large, and C-contiguous, have a key without extents, and a shorter one that names the last call with these
options. A builtin (``front_end.arrays``) confirms the rest in a tenth of a microsecond. All others have a key with extents and
strides, and Python runs them in some microseconds. Class indices are never taken on trust: the task checks them, before it
writes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from fastxent._fastpath import builtins
from fastxent._fastpath.cache import calls
from fastxent._fastpath.tasks import Family, family_of
from fastxent._runtime.arguments import Array, Problem, address, new_gradient
from fastxent._runtime.plan import MOST_DIRECT, WORTH_A_THREAD, Plan, over
from fastxent._runtime.run import PackedTask

_lookup = calls.lookup  # a small call is two microseconds


class DenseCall:
    """Calls with C-contiguous arrays of whatever extents."""

    __slots__ = ("dtypes", "family", "loss", "option_types", "run")

    def __init__(
        self, run: Callable[..., Any], loss: type[np.floating[Any]], family: Family, types: tuple[type, ...], dtypes: object
    ) -> None:
        self.run, self.loss = run, loss  # see ``builtins.arrays_builtin``
        self.family, self.option_types = family, types
        self.dtypes = dtypes  # which the builtin knows by their addresses


class ExactCall(NamedTuple):
    """Calls with arrays of these extents and strides."""

    task: PackedTask
    loss: type[np.floating[Any]]
    x_bytes: int
    y_bytes: int
    axis: int


def is_constant(option: object) -> bool:
    """Will it compare as it does now? A tensor's number may change."""
    return type(option) in (int, float, str) or isinstance(option, np.generic)


def _exact_key(name: str, logits: Array, target: Array, out: Array | None, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that the checks depend on. The types are there because True == 1 == 1.0."""
    axis, ignore, smoothing, _ = options
    return (
        name, logits.shape, logits.strides, logits.dtype, target.shape, target.strides, target.dtype,
        None if out is None else (out is logits or (out.shape, out.strides, out.dtype), out.flags.writeable),
        options, type(axis), type(ignore), type(smoothing),
    )  # fmt: skip


def lookup(
    name: str, logits: object, target: object, out: object, n_threads: int | None,
    axis: int, ignore_index: int, label_smoothing: float, reduction: str,
) -> tuple[Any, Any] | None:  # fmt: skip
    """Loss, and gradient if ``name`` is "value_and_grad"; None where all has to be checked."""
    if type(logits) is not ndarray:
        return None
    if n_threads is not None and (type(n_threads) is not int or n_threads < 1):
        return None
    try:
        dense = _lookup((name, axis, ignore_index, label_smoothing, reduction))
    except TypeError:  # an option of a type that has no hash
        return None
    if dense is not None:
        if small := logits.size < WORTH_A_THREAD:
            team = 1
        else:
            direct = logits.nbytes <= MOST_DIRECT and logits.flags.c_contiguous
            team = builtins.team(n_threads) if direct else 0
        if team > 0:
            if (place := out) is None:
                if name == "value":
                    place = logits  # it is not written to
                else:
                    place = np.empty_like(logits) if small else new_gradient(logits, 0)
            loss = dense.run(team, logits, target, place, axis, ignore_index, label_smoothing, reduction)
            if loss is False:
                other = _lookup((name, axis, ignore_index, label_smoothing, reduction, logits.dtype, logits.ndim))
                if other is not None and other is not dense:
                    calls.store((name, axis, ignore_index, label_smoothing, reduction), other)
                    loss = other.run(team, logits, target, place, axis, ignore_index, label_smoothing, reduction)
                    dense = other
            if loss is not False:
                return dense.loss(loss), place
            del place  # if it is new: it would be there beside the next one
    if type(target) is not ndarray or (out is not None and type(out) is not ndarray):
        return None
    options = axis, ignore_index, label_smoothing, reduction
    exact = _lookup(_exact_key(name, logits, target, out, options))
    return None if exact is None else _run_exact(exact, name, logits, target, out, n_threads)


def _run_exact(
    call: ExactCall, name: str, logits: Array, target: Array, out: Array | None, n_threads: int | None
) -> tuple[Any, Any] | None:
    g = out
    if out is None and name == "value_and_grad":
        g = np.empty_like(logits) if call.task.alone else new_gradient(logits, call.axis)
    x_at, y_at = address(logits), address(target)
    g_at = x_at if g is None or g is logits else address(g)
    if out is not None:
        g_end = g_at + call.x_bytes
        if (g_at != x_at and g_at < x_at + call.x_bytes and x_at < g_end) or (g_at < y_at + call.y_bytes and y_at < g_end):
            return None  # memory is shared
    total, bad, divisor = call.task(x_at, g_at, y_at, n_threads)
    return None if bad else (call.loss(over(total, divisor)), g)


def store(
    name: str, p: Problem, logits: object, target: object, out: Array | None, g: Array | None, options: tuple[Any, ...]
) -> None:
    """Store a call that was found good, if its arrays were taken as they are and lie in one piece.

    ``options``: as `lookup` has them.
    """
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
        or not all(map(is_constant, options))
    ):
        return
    plan = p.plan(name, g)
    if plan.variant.large:  # it has more to pack, and takes longer anyway
        return
    task = PackedTask(name, plan, average=options[-1] == "mean", **p.fields)
    calls.store(_exact_key(name, x, target, out, options), ExactCall(task, p.acc.type, x.nbytes, target.nbytes, p.axis))
    if task.direct and x.flags.c_contiguous and (g is None or g.flags.c_contiguous):
        _store_dense(task, plan, p, options)


def _store_dense(task: PackedTask, plan: Plan, p: Problem, options: tuple[Any, ...]) -> None:
    key = task.name, *options, p.x.dtype, p.x.ndim
    # NumPy's own objects: those of unpickled arrays, say, are equal to them and not the same, and others would find them here
    types, dtypes = tuple(map(type, options)), (np.dtype(p.x.dtype.type), np.dtype(np.int64))
    dense = calls.lookup(key)
    if dense is not None and dense.option_types == types:
        dense.family.meet(plan)
        return
    family = family_of(task, p.axis, p.x.ndim, smoothing=p.smoothing)
    run = builtins.arrays_builtin(family, dtypes, options)
    if run is not None:
        dense = DenseCall(run, p.acc.type, family, types, dtypes)
        calls.store(key, dense)
        calls.store((task.name, *options), dense)
