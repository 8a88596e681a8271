"""How kernels are compiled: what a branch does not take is never compiled, and what kernels agree in is compiled once."""

from __future__ import annotations

import ctypes
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
from numba import types
from numba.core.errors import TypingError

from fastxent._abi.variant import SYMBOL, Layout, Storage, Variant
from fastxent._codegen import compiler, machine_code
from fastxent._kernels import compensated_sums, gradient, reduce
from fastxent._simd.numba_backend import inlined
from fastxent._simd.parts import c_function
from fastxent._simd.task import Task, names_read

FIELDS = (("n", 0, "int"), ("y", 1, ("f64", "f64")))
WIDE, NARROW = True, False


@inlined
def broken(task):
    return task.no_such_field


@inlined
def doubled(task):
    return 2 * task.n


@inlined
def by_way_of(task):
    return doubled(task)


def compile_for(function, **constants):
    task = Task(FIELDS, tuple(constants.items()))
    return c_function(function, types.int64(task), SYMBOL)


def plain(task):
    return broken(task) if task.off else doubled(task)


def nested(task):
    if task.off or NARROW:
        return broken(task)
    if not task.on:
        return broken(task)
    if WIDE and task.on and not task.off:
        return doubled(task)
    return broken(task)


def in_a_loop(task):
    total = 0
    for i in range(task.n):
        if task.off and i > 3:
            total += broken(task)
        elif not (task.on and WIDE):
            total += broken(task)
        else:
            total += i
    return total


def of_two_types(task):
    value = (1, 2.0) if task.off else 3
    return value + 1


def by_a_variable(task):
    wanted = task.on
    skipped = not wanted
    if skipped:
        return broken(task)
    return 1


@pytest.mark.parametrize("function", [plain, nested, in_a_loop, of_two_types, by_a_variable])
def test_a_branch_not_taken_is_not_compiled(function):
    compile_for(function, on=True, off=False)
    if function is not of_two_types:
        with pytest.raises(TypingError, match="no_such_field"):
            compile_for(function, on=False, off=True)


def changes(task):
    """A variable that has another value later on is not known."""
    taken = task.off
    for i in range(task.n):
        if taken:
            return i
        taken = i > 3
    return -1


def test_a_value_that_changes_is_not_taken_for_known():
    address, engine = machine_code.link(compiler.object_of(compile_for(changes, off=False)))
    block = np.array([10, 0], np.int64)
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address)(block.ctypes.data) == 5
    del engine  # it has kept the code alive


# ----------------------------------------------------------------------------------------------------
# Control flow: what is compiled returns what Python does
# ----------------------------------------------------------------------------------------------------


@inlined
def halved(n):
    """Two results of a type of their own, from three places."""
    if n < 0:
        return -1, 0.0
    if n % 2 == 1:
        return n // 2, 0.5
    return n // 2, 0.0


def widened(task):
    """A variable is an integer at first, and a float from the second turn on."""
    x = 0
    for i in range(task.n):
        x = x + 0.5 * i
    return 2 * x


def exchanged(task):
    a, b = 0, 1
    for _ in range(task.n):
        a, b = b, (a + b) % 1000
    return a


def leaves_loops(task):
    total = 0
    for i in range(task.n):
        if i % 3 == 0:
            continue
        for j in range(i, 2 * i, 2):
            if j > 20:
                break
            total += max(j, 7, i) - min(i, 5)
        while total > 100:
            total -= 30
    return total


def set_on_one_way(task):
    """Read on another one too, where Python would raise an error."""
    last = -1
    for i in range(task.n):
        if i % 2 == 0:
            seen = i
        if i > 0:
            last = seen
    return last


def through_tuples(task):
    state = (0, (1.0, 2))
    for i in range(task.n):
        half, rest = halved(i)
        if rest > 0.0 or not half < 3:
            state = (state[0] + half, (state[1][0] + rest, i))
    return state[0] + 2 * state[1][0] + state[1][1]


def by_either(task):
    n = task.n
    kind = 1 if n < 2 else 2 if n < 5 and n != 3 else 3
    return kind * 10 + (n > 3 or n == 0)


@pytest.mark.parametrize("function", [widened, exchanged, leaves_loops, set_on_one_way, through_tuples, by_either])
def test_what_is_compiled_returns_what_python_does(function):
    address, engine = machine_code.link(compiler.object_of(compile_for(function)))
    run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address)
    in_python = FunctionType(function.__code__, {**function.__globals__, "halved": halved.py_func})
    for n in range(40):
        block = np.array([n, 0], np.int64)
        assert run(block.ctypes.data) == in_python(SimpleNamespace(n=n)), n
    del engine  # it has kept the code alive


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda task: halved(task.n, 1), "halved takes 1 arguments, not 2"),
        (lambda task: task.n if task.n > 3 else (1, 2), "is int64 on one way and UniTuple"),
        (lambda task: [task.n], "build_list"),
        (lambda task: halved(n=task.n), "by position"),
        (lambda task: int(0.5 * task.n), "no operations that Numba compiles"),
    ],
)
def test_what_kernels_cannot_say_is_an_error(function, message):
    with pytest.raises(TypingError, match=message):
        compile_for(function)


def test_a_function_reads_what_its_callees_read():
    assert names_read(by_way_of.py_func) == {"n"}
    assert names_read(plain) >= {"off", "n", "no_such_field"}


def test_functions_are_shared_by_tasks_that_agree_in_what_they_read():
    before = len(by_way_of.bodies)
    for other in (False, True):

        def kernel(task):
            return by_way_of(task) if task.other else by_way_of(task) + 1

        compile_for(kernel, other=other)
    assert len(by_way_of.bodies) == before + 1


def test_kernels_share_their_functions():
    """A softmax and a loss of the same layout: sums are compiled once, what differs is not shared. In this process, which
    counts them; elsewhere the tests have another one compile."""
    shared = compensated_sums.two_sum, reduce.state_of, gradient.scaled
    compiler.object_code("value_and_grad", Variant("f64", labelled=True, layout=Layout.CLASS_LANES, storage=Storage.TILE))
    counts = [len(function.bodies) for function in shared]
    compiler.object_code("softmax", Variant("f64", layout=Layout.CLASS_LANES, storage=Storage.TILE))
    assert 0 not in counts and [len(function.bodies) for function in shared] == counts


def test_compiled_again_the_code_is_the_same():
    """Whatever was compiled before it, and shares functions with it."""
    variant = Variant("f64", target="f64")
    first = machine_code.compiled("divergence", variant)
    machine_code.compiled("divergence", variant._replace(differentiate=True))
    assert machine_code.compiled("divergence", variant) == first
