"""Memory layouts of arrays: the same values, lying otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.helpers.cases import BFLOAT16


def _framed(a: np.ndarray, before: tuple[int, int], after: tuple[int, int], step: tuple[int, int]) -> np.ndarray:
    """`a` as a view of a larger array, nan wherever `a` is not: who reads past the view is found out."""
    n, c = ((k - 1) * s + 1 + b + e for k, s, b, e in zip(a.shape, step, before, after, strict=True))
    frame = np.full((n, c), np.nan).astype(a.dtype)
    view = frame[before[0] : n - after[0] : step[0], before[1] : c - after[1] : step[1]]
    view[...] = a
    return view


def _unaligned(a: np.ndarray) -> np.ndarray:
    view = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def _read_only(a: np.ndarray) -> np.ndarray:
    view = a.copy()
    view.flags.writeable = False
    return view


# (N, C) array -> the same values in another memory layout; the two broadcasts repeat the first row or column.
CONTIGUOUS_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # rows or columns are: no copy is needed
    "C": lambda a: np.array(a, order="C"),
    "F": lambda a: np.array(a, order="F"),
    "columns cut": lambda a: _framed(a, (0, 2), (0, 3), (1, 1)),
    "every second row": lambda a: _framed(a, (1, 0), (1, 0), (2, 1)),
    "rows reversed": lambda a: np.array(a[::-1], order="C")[::-1],
    "F, rows cut": lambda a: _framed(a.T, (0, 2), (0, 3), (1, 1)).T,
    "F, every second class": lambda a: _framed(a.T, (1, 0), (1, 0), (2, 1)).T,
    "F, classes reversed": lambda a: np.array(a[:, ::-1], order="F")[:, ::-1],
    "one row broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "read-only": _read_only,
    "unaligned": _unaligned,
}
STRIDED_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "classes reversed": lambda a: np.array(a[:, ::-1], order="C")[:, ::-1],
    "every second class": lambda a: _framed(a, (0, 1), (0, 1), (1, 2)),
    "strided both ways": lambda a: _framed(a, (1, 1), (2, 2), (3, 2)),
    "both reversed": lambda a: np.array(a[::-1, ::-1], order="C")[::-1, ::-1],
    "one class broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
}
LAYOUTS = CONTIGUOUS_LAYOUTS | STRIDED_LAYOUTS
WRITEABLE = [k for k in LAYOUTS if "broadcast" not in k and k not in ("read-only", "byte-swapped")]


def layouts_of(dtype: np.dtype) -> list[str]:
    """The names of the layouts that `dtype` can have: bfloat16 knows no other byte order."""
    return [k for k in LAYOUTS if k != "byte-swapped" or dtype != BFLOAT16]
