"""How kernels are compiled: what a branch does not take is never compiled, and what kernels agree in is compiled once."""

from __future__ import annotations

import numpy as np
import pytest
from numba import types
from numba.core.errors import TypingError

from fastxent._abi.variant import Layout, Storage, Variant
from fastxent._codegen import compiler, machine_code
from fastxent._kernels import compensated_sums, gradient, reduce
from fastxent._simd.numba_backend import c_function, inlined
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
    return c_function(function, types.int64(task))[0]


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
    import ctypes

    library, symbol = c_function(changes, types.int64(Task(FIELDS, (("off", False),))))
    block = np.array([10, 0], np.int64)
    code = compiler.binding.parse_assembly(library.get_llvm_str())
    machine = compiler.binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = compiler.binding.create_mcjit_compiler(code, machine)
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(engine.get_function_address(symbol))
    assert run(block.ctypes.data) == 5


def test_a_function_reads_what_its_callees_read():
    assert names_read(by_way_of.py_func) == {"n"}
    assert names_read(plain) >= {"off", "n", "no_such_field"}


def test_functions_are_shared_by_tasks_that_agree_in_what_they_read():
    before = len(by_way_of.overloads)
    for other in (False, True):

        def kernel(task):
            return by_way_of(task) if task.other else by_way_of(task) + 1

        compile_for(kernel, other=other)
    assert len(by_way_of.overloads) == before + 1


def test_kernels_share_their_functions():
    """A softmax and a loss of the same layout: sums are compiled once, what differs is not shared. In this process, which
    counts them; elsewhere the tests have another one compile."""
    shared = compensated_sums.two_sum, reduce.state_of, gradient.scaled
    compiler.object_code("value_and_grad", Variant("f64", labelled=True, layout=Layout.CLASS_LANES, storage=Storage.TILE))
    counts = [len(function.overloads) for function in shared]
    compiler.object_code("softmax", Variant("f64", layout=Layout.CLASS_LANES, storage=Storage.TILE))
    assert 0 not in counts and [len(function.overloads) for function in shared] == counts


def test_compiled_again_the_code_is_the_same():
    """Whatever was compiled before it, and shares functions with it."""
    variant = Variant("f64", target="f64")
    first = machine_code.compiled("divergence", variant)
    machine_code.compiled("divergence", variant._replace(differentiate=True))
    assert machine_code.compiled("divergence", variant) == first
