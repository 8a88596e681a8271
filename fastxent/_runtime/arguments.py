"""Turns arguments into checked arrays that a kernel may trust, or raises an error that names argument, row and value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import addressof, c_byte
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastxent._abi.dtypes import ACC, NAMES, STORAGE
from fastxent._abi.variant import FEW_CLASSES
from fastxent._runtime import buffers
from fastxent._runtime.options import checked, fields_of, flags_of
from fastxent._runtime.plan import Plan, make_plan

Array = np.ndarray[Any, Any]


@lru_cache(maxsize=64)
def storage(dtype: np.dtype[Any]) -> str | None:
    """Return the kernels' name of a dtype, or None if they do not take it; bfloat16 is matched by name, whoever defined it."""
    return STORAGE.get(dtype.name)


@lru_cache(maxsize=64)
def accumulator(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the losses for logits (and probabilities) of these dtypes."""
    return np.dtype(np.float64 if "f64" in [ACC.get(storage(dtype) or "") for dtype in dtypes] else np.float32)


class Problem(NamedTuple):
    """A checked call: every array has native byte order and the right shape. The task checks the class indices it reads."""

    x: Array  # logits
    axis: int  # class axis, >= 0
    rows: tuple[int, ...]  # shape of the rows
    y: Array | None  # (rows,) int64, contiguous: class indices, or None
    t: Array | None  # the shape of x, with lanes laid out as in x: class probabilities, or None
    w: Array | None  # (C,) float64: class weights
    u: Array | None  # (rows,) float64, contiguous: sample weights
    ignore: int
    smoothing: float
    divisor: float  # of the mean, for class probabilities; for class indices the task computes it
    n_threads: int | None

    @property
    def acc(self) -> np.dtype[Any]:
        """The dtype of the losses."""
        return accumulator(self.x.dtype) if self.t is None else accumulator(self.x.dtype, self.t.dtype)

    @property
    def fields(self) -> dict[str, float]:
        """The options as fields of the argument block."""
        return fields_of(self.x.shape[self.axis], self.ignore, self.smoothing)

    def plan(self, task: str, g: Array | None = None) -> Plan:
        """Return the plan of how a task walks over this problem and writes ``g``."""
        x, t = self.x, self.t
        strides = (x.strides, (x if g is None else g).strides, (x if t is None else t).strides)
        return make_plan(
            task,
            x.shape,
            strides,
            self.axis,
            storage(x.dtype) or "",
            None if t is None else storage(t.dtype),
            **flags_of(self.y is not None, self.ignore, self.smoothing),
        )


def address(a: Array | None) -> int:
    """Return the address of an array's first element; 0 for None."""
    if a is None:
        return 0
    try:
        return addressof(c_byte.from_buffer(a))  # type: ignore[arg-type]  # three times as fast as the interface below
    except (TypeError, ValueError, BufferError):  # strided, read-only, empty, or of a dtype that the buffer protocol lacks
        return a.__array_interface__["data"][0]


def problem(
    logits: object,
    target: object,
    axis: int,
    weight: object,
    sample_weight: object,
    ignore_index: int,
    label_smoothing: float,
    n_threads: int | None,
    name: str = "logits",
    float_labels: bool = False,
) -> Problem:
    """Check the arguments that the cross-entropy functions share. With ``float_labels`` class indices may be floats."""
    x, axis = check_logits(logits, axis, name)
    rows = x.shape[:axis] + x.shape[axis + 1 :]
    n_classes = x.shape[axis]
    smoothing = checked("label_smoothing", label_smoothing)
    ignore = checked("ignore_index", ignore_index)
    w = check_vector(weight, "weight", (n_classes,), "one weight per class")
    u = check_vector(sample_weight, "sample_weight", rows, "one weight per row")
    threads = checked("n_threads", n_threads)
    y, t = check_target(target, x, axis, ignore, float_labels)
    if y is not None:
        divisor = 0.0
        if x.size == 0:  # no task runs that would check the class indices
            check_classes(y, n_classes, None, ignore)
    else:
        if ignore >= 0:
            raise ValueError(f"ignore_index = {ignore} has no meaning for a target of class probabilities")
        divisor = float(math.prod(rows) if u is None else u.sum()) if n_classes else 0.0
    return Problem(x, axis, rows, y, t, w, u, ignore, smoothing, divisor, threads)


def as_array(a: object, name: str) -> Array:
    """Return ``a`` as a plain array; refuse any kind of array that would lose its mask or its shape, whatever it holds."""
    if type(a) is np.ndarray:
        return a
    if isinstance(a, Sequence) and not isinstance(a, (str, bytes, memoryview)):
        _refuse_masks_in(a, name)
    try:
        array = np.asanyarray(a)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: PyTorch's masked tensors, for one
        raise (ValueError if isinstance(error, ValueError) else TypeError)(f"{name} is no array: {error}") from error
    if hasattr(array, "mask"):
        raise _masked(name)
    if isinstance(array, np.matrix):
        raise TypeError(f"{name} is a numpy.matrix, whose rows are matrices again; pass np.asarray({name})")
    if array.dtype == object and hasattr(a, "toarray"):
        raise TypeError(f"{name} is a sparse {type(a).__name__}; pass {name}.toarray()")
    return np.asarray(array)


def _refuse_masks_in(a: Sequence[Any], name: str) -> None:
    kinds = set(map(type, a)) - {int, float, bool, np.ndarray}
    if all(issubclass(kind, np.generic) for kind in kinds):
        return
    for element in a:
        if isinstance(element, Sequence) and not isinstance(element, (str, bytes)):
            _refuse_masks_in(element, name)
        elif hasattr(element, "mask") or (hasattr(element, "__array__") and hasattr(np.asanyarray(element), "mask")):
            raise _masked(name)


def _masked(name: str) -> TypeError:
    return TypeError(
        f"{name} is a masked array, whose mask would be lost; pass {name}.filled(value), "
        "for class indices with ignore_index as the value"
    )


def floating(a: object, name: str) -> Array:
    """Return ``a`` as a native floating array; integers become float64."""
    array = as_array(a, name)
    if array.dtype.kind in "iub":
        array = array.astype(np.float64)
    if storage(array.dtype) is None:
        allowed = f"{', '.join(NAMES)} or integers"
        raise TypeError(f"{name} has dtype {array.dtype}; it must hold {allowed}")
    return native(array)


def native(a: Array) -> Array:
    """Return ``a`` in this machine's byte order."""
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def check_logits(logits: object, axis: int, name: str) -> tuple[Array, int]:
    """Return logits that the kernels can walk over in place, and their class axis, >= 0."""
    x = floating(logits, name)
    if x.ndim == 0:
        raise ValueError(f"{name} is a number; it needs a class axis")
    axis = checked("axis", axis)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis = {axis} is outside [{-x.ndim}, {x.ndim}) for {name} of shape {x.shape}")
    axis %= x.ndim
    return (x if walkable(x, axis) else like(x, axis, copy=True)), axis


def walkable(x: Array, axis: int) -> bool:
    """Return whether a kernel can take x in place; otherwise it would gather lanes for many classes, and a copy is faster."""
    unit = x.itemsize
    return (
        x.size == 0
        or x.shape[axis] <= FEW_CLASSES
        or x.strides[axis] == unit
        or any(n > 1 and s == unit for i, (n, s) in enumerate(zip(x.shape, x.strides, strict=True)) if i != axis)
    )


def like(x: Array, axis: int, copy: bool = False, dtype: np.dtype[Any] | None = None) -> Array:
    """Return a new array in the memory order of x's axes, or with the classes innermost if that order does not suit a kernel.

    With ``copy`` it holds a copy of x. Its dtype is that of x unless another one is given.
    """
    dtype = dtype or x.dtype
    # ``np.empty_like`` orders the axes by their strides: an axis of stride 0 (broadcast rows) would become the innermost.
    closer = any(n > 1 and abs(s) <= x.itemsize for i, (n, s) in enumerate(zip(x.shape, x.strides, strict=True)) if i != axis)
    if x.shape[axis] > FEW_CLASSES and (copy or (x.strides[axis] == x.itemsize and closer)):
        rows = x.shape[:axis] + x.shape[axis + 1 :]
        new = np.moveaxis(np.empty((*rows, x.shape[axis]), dtype), -1, axis)
    else:
        new = np.empty_like(x, dtype, subok=False)
    if copy:
        new[...] = x
    return new


def new_gradient(x: Array, axis: int, dtype: np.dtype[Any] | None = None) -> Array:
    """Return a new array for the gradient of x, as `like` does; large ones are recycled memory, aligned to cache lines."""
    dtype = dtype or x.dtype
    if x.size * dtype.itemsize < buffers.SMALLEST or not x.flags.forc:
        return like(x, axis, dtype=dtype)
    return buffers.empty(x.shape, dtype) if x.flags.c_contiguous else buffers.empty(x.T.shape, dtype).T


def check_target(
    target: object, x: Array, axis: int, ignore: int, float_labels: bool = False
) -> tuple[Array | None, Array | None]:
    """Return ``(y, None)`` for class indices, ``(None, t)`` for class probabilities, laid out as the logits x."""
    y, t = target_for(target, x.shape, axis, ignore, float_labels)
    return y, None if t is None else laid_out_as(t, x, axis)


def target_for(
    target: object, shape: tuple[int, ...], axis: int, ignore: int, float_labels: bool = False
) -> tuple[Array | None, Array | None]:
    """Return the target of logits of a shape, as `check_target` does, but class probabilities as they lie."""
    a = as_array(target, "target")
    rows = shape[:axis] + shape[axis + 1 :]
    if a.size == 0 and not isinstance(target, np.ndarray) and a.shape == rows:
        a = a.astype(np.int64)  # NumPy makes float64 of an empty list
    if a.shape == shape:
        if storage(a.dtype) is None:
            raise TypeError(
                f"target has the shape of logits, {shape}, and dtype {a.dtype}; "
                "class probabilities (one-hot ones too) must be floating"
            )
        return None, native(a)
    if a.shape != rows:
        raise ValueError(
            f"target has shape {a.shape}; for logits of shape {shape} with class axis {axis} it must be {rows} "
            f"(class indices) or {shape} (class probabilities)"
        )
    if storage(a.dtype) is not None:
        if not float_labels:
            raise TypeError(f"target has dtype {a.dtype}; class indices must be integers: pass target.astype(int)")
        return _from_floats(a, shape[axis], ignore), None
    if a.dtype.kind not in "iu":
        raise TypeError(f"target has dtype {a.dtype}; class indices must be integers")
    # int(): NumPy 1 would compare uint64 with int64 as floats.
    if a.dtype.kind == "u" and a.itemsize == 8 and a.size and int(a.max()) > np.iinfo(np.int64).max:
        raise _out_of_range(a, (a >= shape[axis]) & (a != np.uint64(max(ignore, 0))), shape[axis])
    return np.ascontiguousarray(a, dtype=np.int64).reshape(rows), None


def _from_floats(a: Array, n_classes: int, ignore: int) -> Array:
    """Return class indices that came as floats, as boosting libraries pass them, in int64."""
    with np.errstate(invalid="ignore", over="ignore"):  # nan and inf, which are told below
        y = a.astype(np.int64, order="C")
        is_whole = bool((y.astype(a.dtype) == a).all())
    if a.size and is_whole and y.min() >= 0 and y.max() < n_classes:
        return y
    values = a.astype(np.float64)
    whole = np.isfinite(values) & (values == np.trunc(values))
    if not whole.all():
        first, where = _first(~whole)
        raise ValueError(f"target{where} = {values[first]} is no class index: it is not a whole number")
    bad = (values != ignore) & ((values < 0) | (values >= n_classes))
    if bad.any():
        raise _out_of_range(values, bad, n_classes)
    return np.ascontiguousarray(values, np.int64).reshape(a.shape)


def laid_out_as(t: Array, x: Array, axis: int) -> Array:
    """Return probabilities whose classes are contiguous where those of the logits are: t, or a copy."""
    if x.shape[axis] <= FEW_CLASSES or (t.strides[axis] == t.itemsize) == (x.strides[axis] == x.itemsize):
        return t
    new = like(x, axis).astype(t.dtype)
    new[...] = t
    return new


def check_classes(y: Array, n_classes: int, w: Array | None, ignore: int) -> float:
    """Return the sum of the kept rows' weights, the divisor of the mean; raise if a class index is neither valid nor ignored.

    This is for class indices that no kernel reads: a kernel checks those that it reads.
    """
    kept = y[y != ignore]
    if ((kept < 0) | (kept >= n_classes)).any():
        raise out_of_range(y, n_classes, ignore)
    return float(kept.size if w is None else w[kept].sum())


def out_of_range(y: Array, n_classes: int, ignore: int) -> IndexError:
    """Return the error for class indices some of which are neither valid nor ignored."""
    return _out_of_range(y, (y != ignore) & ((y < 0) | (y >= n_classes)), n_classes)


def _out_of_range(y: Array, bad: Array, n_classes: int) -> IndexError:
    first, where = _first(bad)
    count = int(bad.sum())
    rows = f"{count} of {y.size} rows {'is' if count == 1 else 'are'} out of range"
    return IndexError(f"target{where} = {y[first]} is outside [0, {n_classes}); {rows}")


def _first(bad: Array) -> tuple[tuple[int, ...], str]:
    """Return the first marked row, as an index and as text."""
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    return first, f"[{', '.join(map(str, first))}]" if first else ""


def check_vector(values: object, name: str, shape: tuple[int, ...], what: str) -> Array | None:
    """Return weights as a contiguous float64 array of exactly this shape."""
    if values is None:
        return None
    a = as_array(values, name)
    if a.dtype.kind not in "iufb" and storage(a.dtype) is None:
        raise TypeError(f"{name} has dtype {a.dtype}; it must hold real numbers")
    if a.shape != shape:
        raise ValueError(f"{name} has shape {a.shape}; it must be {shape}: {what}")
    return np.ascontiguousarray(a, dtype=np.float64).reshape(shape)


def check_out(out: object, x: Array, name: str = "logits") -> Array:
    """Return ``out``, or raise an error if the result for x, the argument ``name``, does not fit it."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    as_array(out, "out")
    if out.shape != x.shape:
        raise ValueError(f"out has shape {out.shape}; it must be that of {name}, {x.shape}")
    if out.dtype != x.dtype and out.dtype.newbyteorder("=") != x.dtype:
        raise TypeError(f"out has dtype {out.dtype}; it must be that of {name}, {x.dtype}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if out.size and _overlaps_itself(out):
        raise ValueError(f"out has strides {out.strides}: several of its elements share one place")
    return out


def _overlaps_itself(a: Array) -> bool:
    """Return whether elements share memory, as in overlapping windows: an axis has a step within the reach of shorter ones.

    No slice or transposition of an array has that.
    """
    reach = a.itemsize
    for step, n in sorted((abs(step), n) for step, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if step < reach:
            return True
        reach += (n - 1) * step
    return False


def writable_place(out: Array | None, x: Array, axis: int, others: tuple[Array | None, ...] = ()) -> Array:
    """Return the array that a kernel writes: ``out`` itself if possible, else a new array to be copied to ``out`` afterwards.

    ``out`` may be x itself. A new array is needed if ``out`` overlaps an input in any other way, or if its lanes are not laid
    out as those of x.
    """
    if out is None:
        return like(x, axis)
    lies_well = (out.strides[axis] == out.itemsize) == (x.strides[axis] == x.itemsize) or x.shape[axis] <= FEW_CLASSES
    clean = not any(a is not None and np.may_share_memory(out, a) for a in others)
    apart = not np.may_share_memory(out, x) or (out.strides == x.strides and address(out) == address(x))
    return out if out.dtype.isnative and lies_well and clean and apart else like(x, axis)
