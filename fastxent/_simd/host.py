"""What this processor can do, as LLVM tells it: without Numba, which only compiling needs."""

from __future__ import annotations

import os
from typing import Any


def features(binding: Any) -> str:
    """Of the processor that Numba compiles for, as LLVM writes them. ``binding``: llvmlite's."""
    is_generic = os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic"
    chosen = os.environ.get("NUMBA_CPU_FEATURES", "" if is_generic else None)
    if chosen is not None:
        return chosen
    found = binding.get_host_cpu_features()
    if os.environ.get("NUMBA_ENABLE_AVX", "1") == "0":
        found = {name: there and not name.startswith("avx") for name, there in found.items()}
    return ",".join(f"+{name}" for name, there in found.items() if there)


def is_wide(binding: Any) -> bool:
    """Does a register hold 16 lanes, and are there 32 of them? So it is with AVX-512; others need two or four for 16 lanes."""
    return "+avx512f" in features(binding)
