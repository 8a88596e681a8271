"""Compiles a task for a variant; importing this module imports Numba."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from llvmlite import binding
from numba import types
from numba.core.registry import cpu_target

from fastxent._abi import argument_block as abi
from fastxent._abi.tasks import TASKS
from fastxent._abi.variant import BUILTINS, SYMBOL, Layout, Schedule, Storage, Variant
from fastxent._kernels import entry, tasks
from fastxent._simd import parts
from fastxent._simd.task import Task

_TILES = Layout.TRANSPOSED_TILE, Layout.GATHERED_TILE, Layout.PANEL


def task_type(name: str, variant: Variant) -> Task:
    """Return the Numba type of the argument block: the kind of each slot, and the constants that the compiler may assume."""
    acc = variant.acc
    kinds: dict[str, Any] = {
        "int": "int",
        "float": "float",
        "i64": ("i64", "i64"),
        "f64": ("f64", "f64"),
        "acc": (acc, acc),
        "weight": (acc, acc) if name in tasks.POINTWISE else ("f64", "f64"),
        "x": (variant.logits, acc),
        "g": ("f32" if name in TASKS and TASKS[name].rounds else variant.logits, acc),
        "t": (variant.target or acc, acc),
    }
    fields = tuple((field, abi.FIRST_SLOT + slot, kinds[kind]) for slot, (field, kind) in enumerate(abi.FIELDS))
    constants = {
        "class_lanes": variant.layout == Layout.CLASS_LANES,
        "contiguous_lanes": variant.layout in (Layout.CLASS_LANES, Layout.ROW_LANES, Layout.PANEL),
        "packed": variant.layout in _TILES,
        "transposed": variant.layout == Layout.TRANSPOSED_TILE,
        "consecutive_rows": variant.consecutive_rows,
        "labelled": variant.labelled,
        "soft": variant.target is not None,
        "dense": variant.smooth or variant.target is not None,
        "capped": variant.capped,
        "entropic": variant.entropic,
        "tempered": variant.tempered,
        "stores_exp": variant.storage != Storage.NONE,
        "exp_in_gradient": variant.storage == Storage.GRADIENT and variant.schedule == Schedule.PIPELINED,
        "split": variant.schedule == Schedule.SPLIT,
        "paired": variant.schedule == Schedule.PAIRED,
        "overlapped": variant.schedule in (Schedule.PIPELINED, Schedule.PANELS_OVERLAPPED),
        "large": variant.large,
        "double": acc == "f64",
        "differentiate": variant.differentiate,
    }
    return Task(fields, tuple(constants.items()))


def module_of(name: str, variant: Variant) -> Any:
    """Return the LLVM module of kernel ``name``, or of a function of ``BUILTINS``: a C function, ``SYMBOL``."""
    if name in BUILTINS:
        builtin = getattr(import_module(BUILTINS[name]), name)
        return parts.c_function(builtin, types.int64(types.int64, types.int64, types.int64), SYMBOL)
    task = task_type(name, variant)
    if name == "launch":
        return parts.c_function(entry.launch, types.void(task), SYMBOL)
    function = entry.check if name == "check" else entry.kernel(tasks.work_of(name, variant.schedule))
    return parts.c_function(function, types.void(task, types.int64, types.int64), SYMBOL)


# MCJIT's linker reserves room for the address of a function, such as memset, only where code loads that address from the
# global offset table, as compilers' option -fno-plt makes it do.
_MEMSET_BY_TABLE = """
!llvm.module.flags = !{!999999}
!999999 = !{i32 7, !"RtLibUseGOT", i32 1}
"""


def object_code(name: str, variant: Variant) -> bytes:
    """Return kernel ``name`` as an object file that defines it as ``SYMBOL``."""
    return object_of(module_of(name, variant))


def object_of(module: binding.ModuleRef) -> bytes:
    """Return a module's object file, which ``machine_code.link`` takes."""
    module = binding.parse_assembly(str(module) + _MEMSET_BY_TABLE)
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    # The small code model needs constants near the code: ``machine_code.link`` loads a file into one contiguous region.
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu, features, opt=3, reloc="pic", codemodel="small", jit=True
    )
    _check_calls(module)
    return bytes(machine.emit_object(module))


def _check_calls(module: binding.ModuleRef) -> None:
    """Raise an error if a kernel calls a function that it does not define.

    The linker does not report one that it cannot find: it, even ``memset``, would be called at address 0.
    """
    outside = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if outside:
        raise RuntimeError(f"a kernel needs {', '.join(outside)}")
