"""What this processor can do, as LLVM reports it. Numba is not imported, since only compiling needs it."""

from __future__ import annotations

import os
from typing import Any


def features(binding: Any) -> str:
    """Return the features of the processor that Numba compiles for, as LLVM writes them. ``binding`` is llvmlite's."""
    is_generic = os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic"
    chosen = os.environ.get("NUMBA_CPU_FEATURES", "" if is_generic else None)
    if chosen is not None:
        return chosen
    found = binding.get_host_cpu_features()
    if os.environ.get("NUMBA_ENABLE_AVX", "1") == "0":
        found = {name: there and not name.startswith("avx") for name, there in found.items()}
    return ",".join(f"+{name}" for name, there in found.items() if there)


def is_wide(binding: Any) -> bool:
    """Return whether there are 32 registers of 16 lanes each, as with AVX-512; other hosts need two or four for 16 lanes."""
    return "+avx512f" in features(binding)
