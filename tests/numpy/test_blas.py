"""Products that are added by NumPy's own BLAS: where it is found, what makes it refused, and the way without it."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastxent._runtime import blas
from fastxent._runtime.blas import Found, add_product, is_right, put_product
from tests.helpers.processes import run_script

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
needs_blas = pytest.mark.skipif(not blas.blas().gemm, reason=blas.blas().why)


@pytest.fixture(autouse=True)
def found_anew():
    """`blas.blas` remembers what it finds."""
    yield
    blas.blas.cache_clear()


def lie(a, how):
    """The same numbers, in another place."""
    if how == "columns":
        return np.asfortranarray(a)
    if how == "within a larger one":
        around = np.full((len(a) + 2, a.shape[1] + 3), np.nan, a.dtype)
        around[1:-1, 2:-1] = a
        return around[1:-1, 2:-1]
    return a


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["rows", "columns", "within a larger one"])
@pytest.mark.parametrize("path", [pytest.param("blas", marks=needs_blas), "numpy"])
def test_a_product_is_added_or_written(path, how, dtype, monkeypatch):
    if path == "numpy":
        monkeypatch.setattr(blas, "blas", lambda: Found({}, ""))
    rng = np.random.default_rng(0)
    for n, k, m in [(5, 7, 3), (1, 7, 3), (5, 1, 3), (5, 7, 1), (1, 1, 1), (40, 300, 20), (5, 0, 3), (0, 7, 3), (5, 7, 0)]:
        a, b, out = (rng.integers(-9, 9, shape).astype(dtype) for shape in ((n, k), (k, m), (n, m)))
        want = out + a @ b
        into = lie(out, how if how != "columns" else "rows")
        add_product(lie(a, how), lie(b, how), into)
        np.testing.assert_array_equal(into, want)
        into[...] = np.nan
        put_product(lie(a, how), lie(b, how), into)
        np.testing.assert_array_equal(into, a @ b)


@pytest.mark.skipif(sys.platform != "linux", reason="tried with the wheels for Linux")
def test_numpys_wheels_have_it():
    if "openblas" not in str(np.show_config("dicts")).lower():
        pytest.skip("another BLAS")
    assert set(blas.blas().gemm) == set(DTYPES), blas.blas().why


@pytest.mark.parametrize("wrong", ["nothing", "does not add", "adds twice", "writes beyond", "ignores a layout"])
def test_a_function_that_is_not_right_is_refused(wrong, monkeypatch):
    """Each of these stands for another function under the same name."""

    def gemm(order, a_order, b_order, n, m, k, alpha, a, a_ld, b, b_ld, beta, out, ld):
        def matrix(at, order, rows, columns, ld):
            if order == 112:
                return matrix(at, 111, columns, rows, ld).T
            numbers = np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_double)), (rows * ld,))
            return np.lib.stride_tricks.as_strided(numbers, (rows, columns), (8 * ld, 8))

        product = matrix(a, a_order, n, k, a_ld) @ matrix(b, b_order, k, m, b_ld)
        if wrong == "ignores a layout" and b_order == 112:
            product = product[::-1]
        result = matrix(out, 111, n, m, ld)
        if beta == 0 or wrong == "does not add":
            result[...] = product
        else:
            result += 2 * product if wrong == "adds twice" else product
        if wrong == "writes beyond":
            ctypes.cast(out, ctypes.POINTER(ctypes.c_double))[m] = 0.0

    assert is_right(gemm, DTYPES[1]) == (wrong == "nothing")
    monkeypatch.setattr(blas, "LETTERS", {"d": DTYPES[1]})
    monkeypatch.setattr(blas, "_function", lambda *_: gemm)
    blas.blas.cache_clear()
    assert bool(blas.blas().gemm) == (wrong == "nothing")
    assert ("does not give what NumPy's product gives" in blas.blas().why) == (wrong != "nothing")


def test_without_the_functions_numpy_multiplies(monkeypatch):
    monkeypatch.setattr(blas, "NAMES", (("no_such_{}gemm", "threads", ctypes.c_int64),))
    blas.blas.cache_clear()
    assert blas.blas() == Found({}, "NumPy's core is linked with none of no_such_sgemm")
    monkeypatch.setitem(sys.modules, blas.CORES[0], SimpleNamespace())
    blas.blas.cache_clear()
    assert blas.blas().why.startswith("NumPy's core is not found (AttributeError")


SWITCH = """
import numpy as np, fastxent as fx
from fastxent._runtime.blas import blas
rng = np.random.default_rng(0)
h, w, y = rng.standard_normal((64, 16)), rng.standard_normal((400, 16)), rng.integers(0, 400, 64)
_, gradients = fx.linear_cross_entropy_value_and_grad(h, w, y, memory_limit=1)
print(len(blas().gemm), blas().why, f"{gradients.linear_weight[3, 4]:.12e}", sep="|")
"""


def test_it_can_be_turned_off():
    on, off = (run_script(SWITCH, FASTXENT_BLAS=switch).split("|") for switch in ("1", "0"))
    assert off[:2] == ["0", "FASTXENT_BLAS=0 turns it off"] and off[2] == on[2]
