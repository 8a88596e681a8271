"""The vector type: exp, log, tanh to the last bits, half precision to the last bit, and what the compiler made of them."""

import ctypes
import re

import numpy as np
import pytest
from llvmlite import binding
from numba import types

from fastxent._abi.variant import SYMBOL, Layout, Variant
from fastxent._codegen import compiler, machine_code
from fastxent._simd.elementary import Shift, exp_scaled, shift_by, tanh
from fastxent._simd.lanes import concat, fold, repeat
from fastxent._simd.logarithm import log, log1p
from fastxent._simd.memory import itemsize, load, store
from fastxent._simd.parts import c_function
from fastxent._simd.task import Task
from fastxent._simd.vector import FEATURES, TRIPLE, narrow, where, widen

FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def apply_exp_up(task):
    for i in range(0, task.n, 16):
        at = i * itemsize(task.y)
        store(task.y + at, exp_scaled(load(task.x + at), shift_by(load(task.m + at))))


def apply_log(task):
    for i in range(0, task.n, 16):
        store(task.y + i * itemsize(task.y), log(load(task.x + i * itemsize(task.x))))


def apply_log1p(task):
    for i in range(0, task.n, 16):
        store(task.y + i * itemsize(task.y), log1p(load(task.x + i * itemsize(task.x))))


def apply_tanh(task):
    for i in range(0, task.n, 16):
        store(task.y + i * itemsize(task.y), tanh(load(task.x + i * itemsize(task.x)), 1.0))


def four_at_once(task):
    """exp_up of four vectors beside each other, and their sum behind them."""
    for i in range(0, task.n, 64):
        at = i * itemsize(task.x)
        a, b = load(task.x + at), load(task.x + (at + 16 * itemsize(task.x)))
        c, d = load(task.x + (at + 32 * itemsize(task.x))), load(task.x + (at + 48 * itemsize(task.x)))
        s = shift_by(load(task.m))
        shift = Shift(None, repeat(s.coarse, 4), repeat(s.fine, 4), repeat(s.lowest, 4))
        e = exp_scaled(concat(concat(a, b), concat(c, d)), shift)
        store(task.y + at, e)
        store(task.y + task.n * itemsize(task.y), fold(where(e == 0.0, e, e * 2.0)))


def copy(task):
    for i in range(0, task.n, 16):
        store(task.y + i * itemsize(task.y), narrow(task.y, widen(load(task.x + i * itemsize(task.x)))))


def run(function, x, y, storage_x, storage_y, kind, m=None):
    """Apply a function of 16 lanes to x (a multiple of 16 elements), into y."""
    pointers = (("x", 0, (storage_x, kind)), ("y", 1, (storage_y, kind)), ("m", 2, (storage_x, kind)))
    fields = (*pointers, ("n", 3, "int"))
    address, engine = machine_code.link(compiler.object_of(c_function(function, types.void(Task(fields, ())), SYMBOL)))
    block = np.array([x.ctypes.data, y.ctypes.data, 0 if m is None else m.ctypes.data, x.size], np.int64)
    FUNCTION(address)(block.ctypes.data)
    del engine  # it has kept the code alive
    return y


def in_ulps(ours, truth, dtype):
    """Largest error, in ulps of the dtype at the truth; the truth is of higher precision."""
    spacing = np.spacing(np.abs(truth).astype(dtype)).astype(truth.dtype)
    return float(np.max(np.abs(ours.astype(truth.dtype) - truth) / spacing))


# Where long double is no wider than double there is no truth to compare a float64 function with.
wider = pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="long double is double on this platform")
PRECISIONS = [
    pytest.param("f32", np.float32, np.float64, id="f32"),
    pytest.param("f64", np.float64, np.longdouble, id="f64", marks=wider),
]


@pytest.mark.parametrize("m", [0.0, 1e-3, 3.7, -41.3, 8191.5, 12345.678, -3e6], ids=str)
@pytest.mark.parametrize(("kind", "dtype", "wide"), PRECISIONS)
def test_exp_up_has_no_error_from_the_difference(kind, dtype, wide, m):
    """The truth is exp(x - m) of the exact difference, which the dtype cannot hold."""
    lowest = {"f32": -87.0, "f64": -708.0}[kind]  # what follows is rounded to denormal numbers by the caller
    m = np.full(1 << 15, m, dtype)
    x = np.minimum((m + np.linspace(lowest, 0.0, m.size) + 1e-7 * np.random.default_rng(0).random(m.size)).astype(dtype), m)
    x = np.maximum(x, np.nextafter(m + dtype(lowest), m))
    up = wide(2) ** {"f32": 24, "f64": 52}[kind]
    truth = np.exp(x.astype(wide) - m.astype(wide)) * up
    assert in_ulps(run(apply_exp_up, x, np.empty_like(x), kind, kind, kind, m), truth, dtype) < 1.6


@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f64", np.float64)])
def test_vectors_beside_each_other(kind, dtype):
    """The bits of one vector at a time; a sum pair by pair."""
    m = np.full(64, 2.5, dtype)
    x = np.linspace(-900, 2.5, 64).astype(dtype)
    one = run(apply_exp_up, x, np.empty_like(x), kind, kind, kind, m)
    four = run(four_at_once, x, np.empty(80, dtype), kind, kind, kind, m)
    np.testing.assert_array_equal(four[:64], one)
    a, b, c, d = (2 * one).reshape(4, 16)
    np.testing.assert_array_equal(four[64:], (a + c) + (b + d))


@pytest.mark.parametrize(("kind", "dtype", "up"), [("f32", np.float32, 2.0**24), ("f64", np.float64, 2.0**52)])
@pytest.mark.parametrize("m", [0.0, 5.3, -1e4, 3e38])
def test_exp_up_at_the_ends(kind, dtype, up, m):
    m = np.full(16, m, dtype)
    x = np.array([m[0], -np.inf, np.nan, -3.3e38, m[0] - 800] * 3 + [m[0]], dtype)
    y = run(apply_exp_up, x, np.empty_like(x), kind, kind, kind, m)
    at_800 = up if m[0] - dtype(800) == m[0] else 0.0
    np.testing.assert_array_equal(y[:5], [up, 0.0, np.nan, 0.0, at_800])


@wider
def test_log_is_exact_to_two_ulps():
    x = np.concatenate([np.geomspace(1e-300, 1e300, 1 << 14), 1 + np.linspace(-0.3, 0.4, 1 << 14)])
    assert in_ulps(run(apply_log, x, np.empty_like(x), "f64", "f64", "f64"), np.log(x.astype(np.longdouble)), np.float64) < 2.5


def test_log_at_the_ends():
    x = np.ones(16)
    x[:5] = [0.0, np.inf, np.nan, -1.0, 1.0]
    y = run(apply_log, x, np.empty_like(x), "f64", "f64", "f64")
    np.testing.assert_array_equal(y[:5], [-np.inf, np.inf, np.nan, np.nan, 0.0])


@wider
def test_log1p_keeps_small_numbers():
    x = np.geomspace(1e-300, 1.0, 1 << 12)
    assert (
        in_ulps(run(apply_log1p, x, np.empty_like(x), "f64", "f64", "f64"), np.log1p(x.astype(np.longdouble)), np.float64) < 4
    )


@pytest.mark.parametrize(("kind", "dtype", "wide"), PRECISIONS)
def test_tanh(kind, dtype, wide):
    x = np.concatenate([np.geomspace(1e-30, 40, 1 << 12), -np.geomspace(1e-30, 40, 1 << 12)]).astype(dtype)
    assert in_ulps(run(apply_tanh, x, np.empty_like(x), kind, kind, kind), np.tanh(x.astype(wide)), dtype) < 4


def test_float16_every_value_there_and_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = run(copy, bits, np.empty(bits.size, np.float32), "f16", "f32", "f32")
    np.testing.assert_array_equal(wide, bits.view(np.float16).astype(np.float32))
    back = run(copy, wide, np.empty_like(bits), "f32", "f16", "f32")
    np.testing.assert_array_equal(back.view(np.float16), bits.view(np.float16))


def test_bfloat16_rounds_to_nearest_even_as_ml_dtypes_does():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    x = np.concatenate([bits, ties]).view(np.float32)
    ours = run(copy, x, np.empty(x.size, np.uint16), "f32", "bf16", "f32").view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):  # the cast of a signalling nan
        theirs = x.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.astype(np.float32))


@pytest.mark.parametrize("class_lanes", [True, False], ids=["classes in lanes", "rows in lanes"])
def test_hot_loops_are_packed_and_call_nothing(class_lanes):
    """The compiled kernel holds packed arithmetic and calls no function: no scalar exp, no helper that was not inlined."""
    variant = Variant("f32", labelled=True, layout=Layout.CLASS_LANES if class_lanes else Layout.ROW_LANES)
    module = compiler.module_of("value_and_grad", variant)
    packed = r"\bv(mul|add|max|fmadd\w+)ps\b|\b(mul|add|max)ps\b|\bfml\w*\b"
    machine = binding.Target.from_triple(TRIPLE).create_target_machine(binding.get_host_cpu_name(), FEATURES)
    assert len(re.findall(packed, machine.emit_assembly(module))) > 20
    # Not in the assembly: there a call names a register, and no function.
    there = {function.name for function in module.functions if not function.is_declaration}
    assert SYMBOL in there and all(name == SYMBOL or name.startswith("store_first_") for name in there)
    called = {function.name for function in module.functions if function.is_declaration}
    assert all(name.startswith("llvm.") and "exp" not in name for name in called)
