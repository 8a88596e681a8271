"""Lets a process compile kernels for a level of processors, instead of for its own processor.

It replaces Numba's code generator, of which it assumes private parts: tried with Numba 0.68. Where these are not as expected,
the build of prebuilt kernels ends in an error. No call of fastxent imports this module.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from llvmlite import binding
from numba.core.codegen import CPUCodeLibrary, JITCPUCodegen
from numba.core.registry import cpu_target

from fastxent._codegen.levels import Level


class _Library(CPUCodeLibrary):
    """Numba's own helpers as IR, which is inlined into kernels and never loaded into this process."""

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # nobody calls it


class _Codegen(JITCPUCodegen):
    """Numba's code generator without its execution engine."""

    _library_class = _Library  # type: ignore[assignment]

    def __init__(self, level: Level) -> None:
        self._level = level
        super().__init__("numba.exec")

    def _init(self, llvm_module: Any) -> None:
        level = self._level
        self._tm_features = level.features
        self._tm = binding.Target.from_triple(level.triple).create_target_machine(
            level.cpu, level.features, opt=3, reloc="static" if level.machine == "x86_64" else "default",
            codemodel="jitdefault", jit=True,
        )  # fmt: skip
        self._target_data = self._tm.target_data
        self._data_layout = str(self._target_data)
        self._loopvect, self._opt_level = False, 0

    def _create_empty_module(self, name: str) -> Any:
        module = super()._create_empty_module(name)
        module.triple = self._level.triple
        return module

    def set_env(self, env_name: str, env: Any) -> None:
        """Numba would write it into the machine code."""

    def _get_host_cpu_name(self) -> str:
        return self._level.cpu


def use(level: Level) -> None:
    """Compile and plan for ``level`` from now on. The kernels' modules ask for their processor when they are imported."""
    assert "fastxent._simd.vector" not in sys.modules
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    context = cpu_target.target_context
    context.refresh()  # Numba's runtime is compiled for this processor, and is no part of a kernel
    context._internal_codegen = _Codegen(level)
    os.environ["NUMBA_CPU_FEATURES"] = level.features  # Numba has read it; ``_simd.host`` tells the plan of it
