"""Writes products of matrices to part of an array, or adds them to it, by the BLAS that NumPy brings along.

NumPy's own products cannot add, and they are copied to an array whose rows do not follow one another.

The library that NumPy's core is linked with has the C functions of BLAS, under one of a few names, which are no part of
NumPy's interface. So they are used only if they multiply and add small matrices of whole numbers, in every layout, as NumPy
does, and write nothing else. Where they are missing or differ, and with FASTXENT_BLAS=0 in the environment, read by the first
call, NumPy's own products serve. Results are the same but for rounding. Tried with the OpenBLAS of NumPy 2.4 from PyPI.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

CORES = "numpy._core._multiarray_umath", "numpy.core._multiarray_umath"  # since NumPy 2, and before
# OpenBLAS's names of the product, for a letter, s or d, and of what gets and sets the number of threads, and the integer of
# sizes: NumPy's wheels, then what distributions link.
NAMES = (
    ("scipy_cblas_{}gemm64_", "scipy_openblas_{}_num_threads64_", ctypes.c_int64),
    ("cblas_{}gemm64_", "openblas_{}_num_threads64_", ctypes.c_int64),
    ("cblas_{}gemm", "openblas_{}_num_threads", ctypes.c_int32),
)
LETTERS: dict[str, np.dtype[Any]] = {"s": np.dtype(np.float32), "d": np.dtype(np.float64)}
_BY_ROWS, _AS_IT_LIES, _TRANSPOSED = 101, 111, 112

Gemm = Callable[..., None]


class Found(NamedTuple):
    """The functions by dtype, none if NumPy's products serve, and where they come from, or why there are none."""

    gemm: dict[np.dtype[Any], Gemm]
    why: str
    get_threads: Callable[[], int] = lambda: 1
    set_threads: Callable[[int], object] = lambda n: None


def put_product(a: Array, b: Array, out: Array) -> None:
    """Write ``a @ b`` to ``out``. The rows or columns of each matrix are contiguous, and the rows of ``out``."""
    gemm = blas().gemm.get(out.dtype)
    if gemm is None or 0 in (*a.shape, *b.shape):
        np.matmul(a, b, out=out)
    else:
        _run(gemm, a, b, out, 0.0)


def add_product(a: Array, b: Array, out: Array) -> None:
    """Add ``a @ b`` to ``out``; matrices as in `put_product`."""
    gemm = blas().gemm.get(out.dtype)
    if gemm is None:
        out += a @ b
    else:
        _run(gemm, a, b, out, 1.0)


def _run(gemm: Gemm, a: Array, b: Array, out: Array, beta: float) -> None:
    """Multiply ``out`` by ``beta`` and add ``a @ b``; with 0 it is written, whatever it held."""
    (n, k), m = a.shape, b.shape[1]
    (a_order, a_ld), (b_order, b_ld), (_, ld) = map(_layout, (a, b, out))
    gemm(_BY_ROWS, a_order, b_order, n, m, k, 1.0, a.ctypes.data, a_ld, b.ctypes.data, b_ld, beta, out.ctypes.data, ld)


def _layout(a: Array) -> tuple[int, int]:
    """Return how a matrix lies, and the elements from one contiguous row or column to the next."""
    (n, m), (rows, columns) = a.shape, a.strides
    if columns == a.itemsize or m <= 1:
        return _AS_IT_LIES, max(rows // a.itemsize, m, 1)
    return _TRANSPOSED, max(columns // a.itemsize, n, 1)


class _Calls:
    """Calls in flight that have set BLAS to one thread, and what it was set to before the first of them."""

    lock = threading.Lock()
    n, before = 0, 1


def _after_fork() -> None:
    """Give BLAS its threads back in a child: the calls in flight go on in its parent alone."""
    in_flight, _Calls.n, _Calls.lock = _Calls.n, 0, threading.Lock()
    if in_flight:
        blas().set_threads(_Calls.before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def get_num_threads() -> int:
    """Return the number of threads of a product, or 1 if it is not known."""
    return blas().get_threads() if _Calls.n == 0 else _Calls.before


@contextmanager
def one_thread_a_call() -> Iterator[None]:
    """Let each product run on the thread that calls it, in the whole process; the last call that ends puts it back."""
    found = blas()
    with _Calls.lock:
        if _Calls.n == 0:
            _Calls.before = found.get_threads()
            found.set_threads(1)
        _Calls.n += 1
    try:
        yield
    finally:
        with _Calls.lock:
            _Calls.n -= 1
            if _Calls.n == 0:
                found.set_threads(_Calls.before)


@lru_cache(maxsize=1)
def blas() -> Found:
    """Return the functions that are used in this process."""
    if os.environ.get("FASTXENT_BLAS") == "0":
        return Found({}, "FASTXENT_BLAS=0 turns it off")
    core = next((sys.modules[name] for name in CORES if name in sys.modules), None)
    try:
        library = ctypes.CDLL(core.__file__)  # type: ignore[union-attr]
    except (OSError, AttributeError, TypeError) as error:
        return Found({}, f"NumPy's core is not found ({type(error).__name__}: {error})")
    for name, threads, integer in NAMES:
        try:
            gemm = {dtype: _function(library, name.format(letter), letter, integer) for letter, dtype in LETTERS.items()}
            get_threads, set_threads = (getattr(library, threads.format(verb)) for verb in ("get", "set"))
        except AttributeError:
            continue
        if all(is_right(function, dtype) for dtype, function in gemm.items()):
            return Found(gemm, name.format("s"), get_threads, set_threads)
        return Found({}, f"{name.format('s')} does not give what NumPy's product gives")
    return Found({}, "NumPy's core is linked with none of " + ", ".join(name.format("s") for name, *_ in NAMES))


def _function(library: ctypes.CDLL, name: str, letter: str, integer: Any) -> Gemm:
    function = getattr(library, name)
    number, address = ctypes.c_float if letter == "s" else ctypes.c_double, ctypes.c_void_p
    order = [ctypes.c_int] * 3
    function.argtypes = [*order, *[integer] * 3, number, address, integer, address, integer, number, address, integer]
    function.restype = None
    return function


def is_right(gemm: Gemm, dtype: np.dtype[Any]) -> bool:
    """Return whether a function writes and adds products as NumPy does, and leaves what is around them alone."""
    n, k, m = 5, 7, 3
    for transposed in product((False, True), repeat=2):
        a, b = (_whole_numbers(shape, dtype, t) for shape, t in zip(((n, k), (k, m)), transposed, strict=True))
        around = np.full((n + 2, m + 2), np.nan, dtype)
        for beta in (0.0, 1.0):
            want = around.copy()
            want[1:-1, 1:-1] = (1 + beta) * (a @ b)
            _run(gemm, a, b, around[1:-1, 1:-1], beta)
            if not np.array_equal(around, want, equal_nan=True):
                return False
    return True


def _whole_numbers(shape: tuple[int, int], dtype: np.dtype[Any], transposed: bool) -> Array:
    """Return a matrix within a larger one: its products have no rounding errors."""
    n, m = shape[::-1] if transposed else shape
    numbers = (np.arange((n + 1) * (m + 2)) % 11 - 5).astype(dtype).reshape(n + 1, m + 2)[1:, 1:-1]
    return numbers.T if transposed else numbers
