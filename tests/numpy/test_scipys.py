"""SciPy's own tests of logsumexp, softmax and log_softmax, run on ours; then ranks, axes and dtypes as SciPy takes them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.special

import fastxent as fx
from tests.helpers.cases import BFLOAT16, make_rng

NAMES = ["logsumexp", "softmax", "log_softmax"]
# What is told of SciPy's tests by their names or parameters: those of complex numbers, which fastxent does not take.
COMPLEX = ("test_logsumexp_complex_sign", "test_gh21610", "test_gh21709_small_imaginary")
PARTS = ("complex64", "complex128")


MARKS = ("xfail_xp_backends", "skip_xp_backends", "array_api_backends", "uses_xp_capabilities", "parallel_threads")


@pytest.fixture
def scipys_tests(pytestconfig) -> Any:
    """The module of SciPy's tests, if this version ships it as we know it."""
    for mark in MARKS:
        pytestconfig.addinivalue_line("markers", f"{mark}: SciPy's own")
    try:
        module = importlib.import_module("scipy.special.tests.test_logsumexp")
    except (ImportError, pytest.fail.Exception) as reason:
        pytest.skip(f"this SciPy's tests cannot be imported: {reason}")
    if any(not hasattr(module, name) for name in NAMES):
        pytest.skip("this SciPy tests other functions there")
    return module


def parameters_of(method: Any) -> list[dict[str, Any]]:
    """One dict a case of its ``parametrize`` marks, as pytest would make them."""
    cases: list[dict[str, Any]] = [{}]
    for mark in getattr(method, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args[:2]
            keys = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
            more = [dict(zip(keys, v if len(keys) > 1 else [v], strict=True)) for v in map(_plain, values)]
            cases = [a | b for a, b in product(cases, more)]
    return cases


def _plain(value: Any) -> Any:
    """The values of a ``pytest.param``."""
    values = getattr(value, "values", None)
    return value if values is None or callable(values) else values if len(values) > 1 else values[0]


def is_complex(name: str, case: dict[str, Any]) -> bool:
    return name in COMPLEX or any(v in PARTS if isinstance(v, str) else isinstance(v, complex) for v in case.values())


FIXTURES = {"xp": np, "devices": ["cpu"]}


def those_in(module: Any) -> Iterator[tuple[str, Any]]:
    """SciPy's test functions, those of classes bound to a new object."""
    for name, thing in vars(module).items():
        if name.startswith("Test") and inspect.isclass(thing):
            yield from ((n, getattr(thing(), n)) for n in vars(thing) if n.startswith("test"))
        elif name.startswith("test_log") or name.startswith("test_softmax"):
            yield name, thing


@pytest.mark.thorough
def test_scipys_own_tests(scipys_tests, monkeypatch):
    """Every one of real numbers passes."""
    for name in NAMES:
        monkeypatch.setattr(scipys_tests, name, getattr(fx, name))
    ran, failed = 0, []
    for name, test in those_in(scipys_tests):
        wanted = list(inspect.signature(test).parameters)
        for case in parameters_of(test):
            arguments = {p: FIXTURES[p] for p in wanted if p in FIXTURES} | case
            if is_complex(name, case) or set(arguments) != set(wanted):  # a fixture of theirs: versions before 1.15
                continue
            ran += 1
            try:
                with np.errstate(all="ignore"):
                    test(**arguments)
            except AssertionError as error:
                failed.append(f"{name} {case}: {error}")
    assert not failed, "\n".join(failed)
    assert ran >= 10


SHAPES = [(), (1,), (4,), (3, 4), (2, 1, 4), (0,), (3, 0), (0, 4)]
PAIRS = [p for p in product(SHAPES, [None, *SHAPES]) if p[1] is None or 0 in (*p[0], *p[1]) or len(p[0]) < 3 or len(p[1]) < 3]


def oracle(a: Any, b: Any, **options: Any) -> Any:
    """In float64, by the formula: versions of SciPy differ where nothing is summed, and at infinities."""
    x, f = (np.atleast_1d(v) for v in np.broadcast_arrays(np.asarray(a, float), 1.0 if b is None else np.asarray(b, float)))
    axis = options.get("axis")
    with np.errstate(all="ignore"):
        s = np.where(f == 0, 0.0, f * np.exp(x)).sum(axis, keepdims=options.get("keepdims", False))
        return np.log(np.abs(s)), np.sign(s)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, -2, (0, 1), (-1, 0), ()])
def test_logsumexp_over_the_ranks_of_a_and_b(axis, keepdims):
    """The axes are those of a and b together."""
    for at, bt in PAIRS:
        rng = make_rng("ranks", at, bt)
        a, b = rng.standard_normal(at), None if bt is None else rng.choice([-0.37, 0.0, 1.0, 1.3], bt)
        try:
            want, want_sign = oracle(a, b, axis=axis, keepdims=keepdims)
        except ValueError:  # no such axis, or no shape of both
            with pytest.raises(ValueError, match=r"axis|broadcast"):
                fx.logsumexp(a, axis, b, keepdims)
            continue
        value, sign = fx.logsumexp(a, axis, b, keepdims, return_sign=True)
        assert np.shape(value) == np.shape(sign) == np.shape(want), (at, bt)
        assert isinstance(value, np.ndarray) == bool(np.ndim(want)), (at, bt)
        np.testing.assert_allclose(value, want, rtol=1e-13, atol=1e-13, err_msg=f"{at} {bt}")
        np.testing.assert_array_equal(sign, want_sign, err_msg=f"{at} {bt}")
        alone = fx.logsumexp(a, axis, b, keepdims)
        np.testing.assert_array_equal(alone, np.where(sign < 0, np.nan, value), err_msg=f"{at} {bt}")


def test_logsumexp_of_values_that_are_no_numbers():
    """inf, -inf and nan in a, and every sign of b; a factor of 0 takes out what its a is."""
    special = [np.inf, -np.inf, np.nan, 0.0, 3.0]
    for x in product(special, special):
        for f in product([-2.0, 0.0, 1.0], [-1.0, 0.0, 1.0]):
            value, sign = fx.logsumexp(x, b=f, return_sign=True)
            want, want_sign = oracle(x, f)
            np.testing.assert_allclose(value, want, rtol=1e-14, err_msg=f"{x} {f}")
            np.testing.assert_array_equal(sign, want_sign, err_msg=f"{x} {f}")
        value, sign = fx.logsumexp(x, return_sign=True)
        want, want_sign = oracle(x, None)
        np.testing.assert_allclose(value, want, rtol=1e-14, err_msg=str(x))
        np.testing.assert_array_equal(sign, want_sign, err_msg=str(x))


@pytest.mark.parametrize("classes", [10, 70, 5000])
def test_logsumexp_with_factors_keeps_the_digits_of_a_small_rest(classes):
    """log1p of what is beside the maximum: the sum is 1 + R, R = 4.2e-18."""
    a, b = np.full((3, classes), -np.inf), np.ones((3, classes))
    a[:, 1], a[:, -2], b[:, -2] = 0.0, -40.0, [1.0, -1.0, 2.0]
    want = np.exp(-40.0) * b[:, -2]
    np.testing.assert_allclose(fx.logsumexp(a, axis=-1, b=b), want, rtol=1e-15)
    np.testing.assert_allclose(fx.logsumexp(a.T, axis=0, b=b.T), want, rtol=1e-15)


def test_logsumexp_factors_may_cancel_at_the_maximum():
    value, sign = fx.logsumexp([5.0, 5.0, 1.0], b=[1.0, -1.0, -3.0], return_sign=True)
    np.testing.assert_allclose((value, sign), (1.0 + np.log(3.0), -1.0), rtol=1e-15)


FLOAT_OF_SUM = {  # of a, of b: of the result
    ("float32", None): "float32",
    ("float16", None): "float32",
    ("int8", None): "float64",
    ("bool", None): "float64",
    ("float32", "bool"): "float32",
    ("float32", "int8"): "float32",
    ("float32", "int16"): "float32",
    ("float32", "int32"): "float64",
    ("float32", "uint64"): "float64",
    ("float32", "float64"): "float64",
    ("float64", "float32"): "float64",
    ("float64", "int8"): "float64",
    ("int8", "float32"): "float32",
    ("int64", "float32"): "float64",
    ("int8", "int8"): "float64",
    ("bool", "bool"): "float64",
}


@pytest.mark.thorough
def test_logsumexp_dtypes_are_scipys():
    """But float32 for float16. A Python number has no say."""
    for (of_a, of_b), want in FLOAT_OF_SUM.items():
        a, b = np.array([1, 0, 1], of_a), None if of_b is None else np.array([1, 1, 0], of_b)
        got = fx.logsumexp(a, b=b)
        assert got.dtype == want, (of_a, of_b)
        np.testing.assert_allclose(got, oracle(a, b)[0], rtol=1e-6 if want == "float32" else 1e-14)
    x = np.float32([1, 2])
    for number in (True, 2, 0.5):
        assert fx.logsumexp(x, b=number).dtype == fx.logsumexp(number, b=x).dtype == np.float32
    assert fx.logsumexp(x, b=np.float64(2)).dtype == fx.logsumexp(1, b=2).dtype == np.float64
    x = np.array([1, 2], BFLOAT16)
    assert fx.logsumexp(x, b=x).dtype == np.float32 and fx.logsumexp(x, b=np.ones(2)).dtype == np.float64


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_number_gives_a_scalar(name):
    function, want = getattr(fx, name), 1.0 if name == "softmax" else 0.0
    for x in (1000, 1.5, True, np.float32(3), np.array(2.0), np.array(2.0, BFLOAT16)):
        for axis in (None, 0, -1, ()):
            got = function(x, axis)
            assert isinstance(got, np.generic) and got == want, (x, axis)
    assert function(np.float32(3)).dtype == np.float32
    out = np.array(7.0)
    assert function(2.0, out=out) is out and out == want
    with pytest.raises(ValueError, match="axis = 1"):
        function(2.0, 1)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_over_ranks_and_axes(name):
    ours, scipys = getattr(fx, name), getattr(scipy.special, name)
    for shape in [(4,), (3, 4), (2, 1, 4)]:
        x = make_rng("softmax", shape).standard_normal(shape)
        for axis in [None, 0, -1, (), (0,), (0, -1)]:
            if isinstance(axis, tuple) and len(axis) > len(shape):
                continue
            np.testing.assert_allclose(ours(x, axis), scipys(x, axis), rtol=1e-14, atol=1e-15, err_msg=f"{shape} {axis}")
