"""Compiles a task of ``steps`` for a variant. Importing this module imports Numba."""

from __future__ import annotations

from importlib import import_module
from types import FunctionType
from typing import Any

from llvmlite import binding
from numba import types
from numba.core.registry import cpu_target

from fastxent._abi import argument_block as abi
from fastxent._abi.variant import BUILTINS, KEEPERS, PAIRERS, SYMBOL, Variant
from fastxent._kernels import schedules, steps
from fastxent._kernels.losses import pointwise, sums
from fastxent._kernels.parallel_for import one_by_one
from fastxent._simd import numba_backend, vector

# What is not in ``steps``.
_POINTWISE = {
    "binary": pointwise.binary,
    "divergence": pointwise.divergence,
    "divergence_of_logs": pointwise.divergence_of_logs,
}
_OTHERS = _POINTWISE | {"entropy": sums.entropy, "logsumexp_of_products": sums.logsumexp_of_products}


def pipelined(name: str, variant: Variant) -> bool:
    """Does kernel ``name`` write one row, and read the next one, while it computes? (``row_pipeline``)

    Past the cache, but for gradients in bfloat16: rounding to it takes what side by side would gain. In the cache with AVX-512:
    there a row waits longer for the statistics of the one before than for the units of its processor.
    """
    if variant.overlapped:
        return name in PAIRERS
    kept = name == "value_and_grad" and variant.kept
    if not variant.class_lanes or variant.split or variant.acc != "f32" or not (kept or name == "value"):
        return False
    if variant.large:
        return not kept or variant.logits != "bf16"
    return vector.WIDE and variant.logits == "f32"


def task_type(name: str, variant: Variant) -> vector.Task:
    """The Numba type of the argument block: which slot is what, and what the compiler may take for granted."""
    acc, stores_exp = variant.acc, variant.kept and name in KEEPERS
    kinds: dict[str, Any] = {
        "int": "int",
        "float": "float",
        "i64": ("i64", "i64"),
        "f64": ("f64", "f64"),
        "acc": (acc, acc),
        "weight": (acc, acc) if name in _POINTWISE else ("f64", "f64"),
        "x": (variant.logits, acc),
        "t": (variant.target or acc, acc),
    }
    fields = tuple((field, abi.FIRST_SLOT + slot, kinds[kind]) for slot, (field, kind) in enumerate(abi.FIELDS))
    constants = {
        "class_lanes": variant.class_lanes,
        "contiguous_lanes": variant.contiguous_lanes,
        "labelled": variant.labelled,
        "soft": variant.target is not None,
        "dense": variant.smooth or variant.target is not None,
        "entropic": name == "stats",
        "capped": variant.capped,
        "packed": variant.packed,
        "stores_exp": stores_exp,
        "exp_in_gradient": stores_exp
        and variant.class_lanes
        and pipelined(name, variant)
        and variant.large
        and variant.logits == "f32",
        "transposed": variant.transposed,
        "paired": variant.paired,
        "consecutive_rows": variant.consecutive_rows,
        "split": variant.split,
        "large": variant.large,
        "double": acc == "f64",
        "pipelined": pipelined(name, variant),
        "differentiate": variant.differentiate,
    }
    return vector.Task(fields, tuple(constants.items()))


def c_function(name: str, variant: Variant) -> tuple[Any, str]:
    """Kernel ``name``, or a function of ``BUILTINS``, as a C function: see ``numba_backend``."""
    if name in BUILTINS:
        builtin = getattr(import_module(BUILTINS[name]), name)
        return numba_backend.c_function(builtin, types.int64(types.int64, types.int64, types.int64))
    task = task_type(name, variant)
    if name == "launch":
        return numba_backend.c_function(steps.launch, types.void(task))
    function = steps.check
    if name != "check":  # ``kernel``, with the function of this name as its ``work``
        if variant.overlapped and pipelined(name, variant):
            work = schedules.by_panels
        elif pipelined(name, variant):
            work = getattr(schedules, f"{name}_pipelined")
        elif variant.paired:
            work = getattr(schedules, f"{name}_paired")
        else:
            work = one_by_one(_OTHERS.get(name) or getattr(steps, name))
        names = vars(steps) | {"work": work}
        function = FunctionType(steps.kernel.__code__, names, name)
    return numba_backend.c_function(function, types.void(task, types.int64, types.int64))


# The linker makes no room for addresses of functions but where code takes them from a table, as compilers say -fno-plt.
_MEMSET_BY_TABLE = """
!llvm.module.flags = !{!999999}
!999999 = !{i32 7, !"RtLibUseGOT", i32 1}
"""


def object_code(name: str, variant: Variant) -> bytes:
    """Kernel ``name`` as an object file, in which it is called ``SYMBOL``."""
    library, symbol = c_function(name, variant)
    module = binding.parse_assembly(library.get_llvm_str() + _MEMSET_BY_TABLE)
    module.get_function(symbol).name = SYMBOL
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name != SYMBOL:
            value.linkage = "private"  # Numba's names, a few thousand letters each, stay out of the file
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    # Small code: constants are near, for ``machine_code.link`` puts all of a file into one piece of memory.
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu, features, opt=3, reloc="pic", codemodel="small", jit=True
    )
    _drop_errors(module, machine)
    return bytes(machine.emit_object(module))


def _drop_errors(module: binding.ModuleRef, machine: binding.TargetMachine) -> None:
    """What C calls would report an exception to Python, with Numba's help: but a kernel raises none.

    Where a file is linked, Numba may not be there. Of a function that is not found the linker says nothing: it, and whatever
    else is not in the file, would be called at address 0, be it ``memset``.
    """
    passes = binding.create_new_module_pass_manager()
    passes.add_ipsccp_pass()  # what returns 0 and nothing else is known to where it is called
    passes.add_strip_dead_prototype_pass()
    passes.run(module, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
    outside = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if outside:
        raise RuntimeError(f"a kernel needs {', '.join(outside)}")
