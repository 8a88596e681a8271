"""Decides how PyTorch multiplies a linear layer in bfloat16: as such, or converted to float32.

With instructions for it a product in bfloat16 takes about half the time of one in float32; without them, 20 to 50 times as
long.
"""

from __future__ import annotations

from functools import lru_cache

from fastxent._codegen.uninterrupted import imported

# Instructions that multiply bfloat16: LLVM's name of the feature, and the one that people know
INSTRUCTIONS = {"avx512bf16": "AVX512_BF16", "amx-bf16": "AMX"}


@lru_cache(maxsize=1)
def found() -> tuple[str, ...]:
    """Return which of the instructions this processor has."""
    features = imported("llvmlite.binding").get_host_cpu_features()
    return tuple(name for feature, name in INSTRUCTIONS.items() if features.get(feature))


def multiplies_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16."""
    return bool(found())


def path() -> str:
    """Return which way the products go, and why, in words."""
    if multiplies_bfloat16():
        return f"native: the processor has {' and '.join(found())}"
    return f"converted to float32: the processor has none of {', '.join(INSTRUCTIONS.values())}"
